//! The simulator: runs of random chance, and that they can be repeated.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test may panic, and says what it did"
)]

use ringleader::sim::run::{Clocks, Fault, Report, Tally, run};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many seeds are run, unless `SEEDS` says otherwise.
const SEEDS: u64 = 1000;

/// How many lines of the trace of a failure are shown.
const LAST_LINES: usize = 20;

/// Runs the seeds up to `end` on all processors.
fn run_all(end: u64, clocks: Clocks) -> (Tally, Vec<Report>) {
    let (next, done) = (AtomicU64::new(0), Mutex::new((Tally::default(), Vec::new())));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let report = run(seed, clocks, 0);
                    let (tally, failed) = &mut *done.lock().unwrap();
                    *tally += report.tally.clone();
                    failed.extend(Some(report).filter(|report| report.failure.is_some()));
                }
            });
        }
    });
    done.into_inner().unwrap()
}

#[test]
fn by_chance_nothing_is_lost_and_everything_comes_to_rest() {
    let seeds = std::env::var("SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    let (tally, failed) = run_all(seeds, Clocks::Within);
    println!("{tally:?}");
    let failed: Vec<String> = failed
        .iter()
        .map(|report| {
            let what = report.failure.as_ref().unwrap();
            let last = run(report.seed, Clocks::Within, LAST_LINES).lines;
            let last = last.into_iter().collect::<Vec<_>>().join("\n  ");
            let again = format!("again: make sim SEED={}", report.seed);
            format!("{what}\n  {}\n  {last}\n  {again}", report.options)
        })
        .collect();
    assert!(failed.is_empty(), "{} seeds fail:\n{}", failed.len(), failed.join("\n"));
    let Tally { written, read, refused, unknown, fenced, granted, .. } = tally;
    for (what, count) in [
        ("written", written),
        ("read", read),
        ("refused", refused),
        ("unknown", unknown),
        ("fenced", fenced),
        ("granted", granted),
    ] {
        assert!(count > 0, "nothing was {what} in {seeds} seeds");
    }
    let is_missing = |fault: &&Fault| !tally.faults.contains_key(fault);
    let missing: Vec<_> = Fault::ALL.iter().filter(is_missing).collect();
    assert!(missing.is_empty() || seeds < SEEDS, "{missing:?} never happened");
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..10 {
        let [first, again] = [(); 2].map(|()| run(seed, Clocks::Within, usize::MAX));
        assert_eq!(first.digest, again.digest, "seed {seed}");
        assert_eq!(first.lines, again.lines, "seed {seed}");
        assert!(first.lines.len() > 100, "seed {seed}: {} lines", first.lines.len());
        let unwatched = run(seed, Clocks::Within, 0);
        assert_eq!(first.digest, unwatched.digest, "seed {seed}, without its trace");
    }
}

#[test]
fn with_clocks_beyond_the_stated_drift_two_servers_can_lead() {
    let (_, failed) = run_all(300, Clocks::Beyond);
    let is_expected = |report: &&Report| report.failure.as_ref().unwrap().oracle == "primaries";
    let count = failed.iter().filter(is_expected).count();
    println!("{count} of {} failures are of two primaries", failed.len());
    assert!(count > 0, "the margin of leases is for nothing, or the simulator is blind");
}
