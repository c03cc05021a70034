//! Runs the simulator: `make sim SEEDS=1000`, `make sim SEED=17`.
//!
//! Each seed is a whole life of a cluster: see [`ringleader::sim::run`]. A seed that
//! fails is named at once; at the end the first few are run again with their traces, and
//! printed with their options and the command that repeats them.
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a program prints, has threads, and looks at the clock"
)]

use clap::Parser;
use ringleader::sim::run::{Clocks, Report, Tally, run};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How many failures are printed with their traces; of others only the line said at once.
const PRINTED_FAILURES: usize = 5;

/// How often a long run says how far it is.
const SAY_EVERY: Duration = Duration::from_secs(30);

/// The simulator: the real machines in one thread, with a virtual clock, network and disk.
#[derive(Parser)]
#[command(name = "sim")]
struct Flags {
    /// How many seeds to run
    #[arg(long, default_value_t = 1000)]
    seeds: u64,

    /// The first of them
    #[arg(long, default_value_t = 0)]
    first: u64,

    /// Run this one alone, and print its trace
    #[arg(long)]
    seed: Option<u64>,

    /// Let clocks drift beyond what leases allow for, and show what breaks
    #[arg(long)]
    drift: bool,

    /// Stop at the first seed that fails
    #[arg(long)]
    stop: bool,

    /// How many threads to run seeds on [default: one for each processor, with many seeds]
    #[arg(long)]
    threads: Option<usize>,

    /// Begin no further seed after so many seconds
    #[arg(long)]
    seconds: Option<u64>,

    /// How many lines of the trace to print of a failure; 0: only what it is
    #[arg(long, default_value_t = 60)]
    lines: usize,
}

impl Flags {
    fn clocks(&self) -> Clocks {
        if self.drift { Clocks::Beyond } else { Clocks::Within }
    }

    fn command(&self, seed: u64) -> String {
        format!("make {} SEED={seed}", if self.drift { "sim-drift" } else { "sim" })
    }
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    if let Some(seed) = flags.seed {
        let report = run(seed, flags.clocks(), usize::MAX);
        report.lines.iter().for_each(|line| println!("{line}"));
        println!("seed {seed}: {}", report.options);
        print_tally(&report.tally, None);
        println!("digest {:016x}", report.digest);
        return match report.failure {
            None => ExitCode::SUCCESS,
            Some(failure) => {
                println!("seed {seed} FAILS: {failure}");
                ExitCode::FAILURE
            }
        };
    }
    // A panic of a machine is a failure of its seed, and is printed with it.
    std::panic::set_hook(Box::new(|_| {}));
    let began = Instant::now();
    let (total, failures) = run_all(&flags, began);
    let printed = if flags.lines > 0 { PRINTED_FAILURES } else { 0 };
    for report in failures.iter().take(printed) {
        print_failure(&flags, report);
    }
    print_tally(&total, Some(began.elapsed()));
    let all = format!("{} of {} seeds fail", failures.len(), total.runs);
    match (failures.is_empty(), flags.drift) {
        (true, _) => {
            println!("no seed of {} fails", total.runs);
            ExitCode::SUCCESS
        }
        (false, true) => {
            println!("{all}, with clocks that drift beyond what leases allow for");
            ExitCode::SUCCESS
        }
        (false, false) => {
            println!("{all}");
            ExitCode::FAILURE
        }
    }
}

/// Runs all seeds on all threads. Returns what failed, by seed.
fn run_all(flags: &Flags, began: Instant) -> (Tally, Vec<Report>) {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = flags.threads.unwrap_or(if flags.seeds >= 20 { processors } else { 1 });
    let end = flags.first.saturating_add(flags.seeds);
    let (next, stopped) = (AtomicU64::new(flags.first), AtomicBool::new(false));
    let is_over = || {
        let late = flags.seconds.is_some_and(|limit| began.elapsed().as_secs() >= limit);
        late || stopped.load(Ordering::Relaxed)
    };
    let (mut total, mut failures) = (Tally::default(), Vec::new());
    std::thread::scope(|scope| {
        let (sender, reports) = mpsc::channel();
        for _ in 0..threads {
            let sender = sender.clone();
            scope.spawn(|| {
                let sender = sender;
                while !is_over() {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || sender.send(run(seed, flags.clocks(), 0)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut said = began;
        for report in reports {
            total += report.tally.clone();
            if let Some(failure) = &report.failure {
                // At once: nobody should wait for the end of a long run to look into it.
                let what = failure.to_string();
                println!("seed {} fails: {}", report.seed, what.lines().next().unwrap_or_default());
                stopped.store(flags.stop, Ordering::Relaxed);
                failures.push(report);
            }
            if said.elapsed() > SAY_EVERY {
                said = Instant::now();
                println!("... {} seeds, {} fail", total.runs, failures.len());
            }
        }
    });
    failures.sort_by_key(|report| report.seed);
    (total, failures)
}

/// Runs the seed again for its trace, and prints it.
fn print_failure(flags: &Flags, report: &Report) {
    let again = run(report.seed, flags.clocks(), flags.lines);
    println!("--- seed {}", report.seed);
    println!("options: {}", again.options);
    again.lines.iter().for_each(|line| println!("{line}"));
    if let Some(failure) = &again.failure {
        println!("seed {} FAILS: {failure}", report.seed);
    }
    if again.digest != report.digest {
        println!("and it was not the same the second time: the simulator itself is wrong");
    }
    println!("again: {}", flags.command(report.seed));
}

fn print_tally(tally: &Tally, took: Option<Duration>) {
    let hours = tally.virtual_time.as_secs_f64() / 3600.0;
    println!(
        "{} written, {} read, {} refused, {} fenced, {} unknown, {} locks granted; {hours:.2} \
         virtual hours",
        tally.written, tally.read, tally.refused, tally.fenced, tally.unknown, tally.granted
    );
    let faults = tally.faults.iter().map(|(fault, count)| format!("{count} {fault:?}"));
    println!("faults: {}", faults.collect::<Vec<_>>().join(", "));
    if let Some(took) = took {
        let rate = tally.runs as f64 / took.as_secs_f64();
        println!("{} seeds in {:.1} s, {rate:.0} a second", tally.runs, took.as_secs_f64());
    }
}
