//! The lock experiment: does a lock protect what clients write under it, when one of
//! them sleeps through the end of its lease?
//!
//! A counter is kept in the store. Client processes take the lock `counter`, which is
//! lost after 2 s without a sign of life, read the counter, think for a moment, write
//! one more, and give the lock back. Now and then one of them is stopped (SIGSTOP)
//! until its lock is another's and others have counted on; then it goes on, and writes
//! what it had in mind. Each write that was acknowledged must be in the counter in the
//! end; what is not there was *lost*.
//!
//! With `tokens`, every write carries the token of the lock (`--fence`). A fence keeps
//! a late writer out once somebody with a later token has written; so whoever gets the
//! lock first writes the counter back as it is, under its own token, and only then
//! counts. Without them, the same program loses updates: the control, which proves
//! that this experiment sees.
//!
//! Two of three pauses are made to fall between reading and writing: the client says
//! when it begins to think, and is stopped at once. (If it was too quick it counts as
//! any other pause.) The others fall at any moment.
//!
//! * [`worker`]: one client.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic and print, and stands outside of the machines: it has a clock, \
              sockets and threads"
)]
#![allow(dead_code, reason = "the command and the test use the part that each needs")]

#[path = "../support/process.rs"]
pub(crate) mod process;
pub(crate) mod worker;

use process::{PATIENCE, Program, wait_until};
use rand::RngExt;
use std::fmt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use worker::{Said, Task};

/// After so long without a sign of life the lock is another's.
pub(crate) const TTL: Duration = Duration::from_secs(2);

/// How many clients count.
const WORKERS: usize = 5;

/// How many servers there are.
const SERVERS: usize = 3;

/// One client is stopped so often.
const PAUSE_EVERY: Duration = Duration::from_secs(5);

/// For so long at least, which is longer than [`TTL`].
const PAUSE: Duration = Duration::from_secs(3);

/// And until the others have counted so often.
const COUNTS_MEANWHILE: usize = 3;

/// How often what clients say is looked at.
const GLANCE: Duration = Duration::from_millis(1);

/// How a run is to be.
pub(crate) struct Settings {
    /// Where the programs are.
    pub(crate) programs: PathBuf,
    /// What becomes a client: the program that has this module, told with
    /// [`worker::TASK`] what to do.
    pub(crate) worker: fn() -> Command,
    /// Writes carry the token of the lock.
    pub(crate) tokens: bool,
    /// How long it goes on.
    pub(crate) span: Duration,
    /// And until so many pauses have fallen between reading and writing.
    pub(crate) least_between: usize,
    /// When set, the run ends early.
    pub(crate) interrupted: Arc<AtomicBool>,
}

/// What has come of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) tokens: bool,
    pub(crate) span: Duration,
    /// Writes that were acknowledged.
    pub(crate) acknowledged: u64,
    /// The counter in the end.
    pub(crate) counter: u64,
    /// Writes that were refused, since a later holder had written.
    pub(crate) fenced: u64,
    /// Writes that may have been made.
    pub(crate) unknown: u64,
    /// Pauses between reading and writing.
    pub(crate) between: usize,
    /// Other pauses.
    pub(crate) elsewhere: usize,
}

impl Outcome {
    /// How many acknowledged writes are not in the counter.
    pub(crate) fn lost(&self) -> u64 {
        self.acknowledged.saturating_sub(self.counter)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { span, acknowledged, counter, fenced, unknown, between, elsewhere, .. } = self;
        write!(
            f,
            "{} tokens, {} s: {acknowledged} updates acknowledged, the counter is at {counter}: {} \
             lost; {fenced} refused as fenced, {unknown} unknown; {between} pauses between reading \
             and writing, {elsewhere} elsewhere",
            if self.tokens { "with" } else { "without" },
            span.as_secs(),
            self.lost(),
        )
    }
}

/// A cluster, and clients that count.
struct Run {
    workers: Vec<Program>,
    task: Task,
    programs: Vec<Program>,
    data: TempDir,
}

/// Runs it all.
///
/// # Panics
/// If the cluster can't be started, or a client sees what it must not.
pub(crate) fn run(settings: &Settings) -> Outcome {
    let mut run = Run::start(settings);
    let started = Instant::now();
    let (mut between, mut elsewhere, mut next) = (0, 0, started);
    let is_over = |between| {
        let is_enough = started.elapsed() >= settings.span && between >= settings.least_between;
        is_enough || settings.interrupted.load(Ordering::Relaxed)
    };
    for number in 0.. {
        while Instant::now() < next && !is_over(between) {
            thread::sleep(GLANCE);
        }
        if is_over(between) {
            break;
        }
        next = Instant::now() + PAUSE_EVERY;
        match run.pause(number % 3 != 2) {
            true => between += 1,
            false => elsewhere += 1,
        }
    }
    let span = started.elapsed();
    let said = run.end();
    let count = |word: Said| said.iter().filter(|it| **it == word).count() as u64;
    Outcome {
        tokens: settings.tokens,
        span,
        acknowledged: count(Said::Wrote),
        counter: worker::read_counter(&run.task),
        fenced: count(Said::Fenced),
        unknown: count(Said::Unknown),
        between,
        elsewhere,
    }
}

impl Run {
    fn start(settings: &Settings) -> Self {
        let data = tempfile::tempdir().unwrap();
        let start = |name: &str, flags: &[String]| {
            let mut command = Command::new(settings.programs.join(name));
            command.args(["--listen", "127.0.0.1:0", "--log", "warn"]).args(flags);
            command.arg("--data-dir").arg(data.path().join(format!("{name}-{}", flags.join(""))));
            Program::start(name, &mut command)
        };
        let mut viewleader = start("viewleader", &[]);
        let leader = viewleader.listening();
        let mut programs = vec![viewleader];
        for number in 0..SERVERS {
            // Each lease is a little different, and with it the folder.
            let lease = format!("{}", 4.0 + number as f64 / 10.0);
            let flags =
                ["--viewleader".to_owned(), leader.to_string(), "--lease".to_owned(), lease];
            let mut server = start("server", &flags);
            server.listening();
            programs.push(server);
        }
        let stop = data.path().join("stop");
        let task = Task { viewleader: leader, tokens: settings.tokens, stop, number: 0 };
        wait_until("the store serves", PATIENCE, || worker::begin_counter(&task));
        let workers = (0..WORKERS).map(|number| {
            let task = Task { number, ..task.clone() };
            let mut command = (settings.worker)();
            Program::start(&format!("worker {number}"), command.env(worker::TASK, task.to_text()))
        });
        let workers = workers.collect();
        Self { workers, task, programs, data }
    }

    fn said(&self, worker: usize) -> Vec<Said> {
        worker::said(&self.workers[worker].stdout())
    }

    /// How often the others than `worker` have counted.
    fn counts_beside(&self, worker: usize) -> usize {
        let others = (0..WORKERS).filter(|other| *other != worker);
        let counts = others.map(|other| {
            let said = self.said(other);
            said.into_iter().filter(|it| *it == Said::Wrote).count()
        });
        counts.sum()
    }

    /// Stops one client until the others have gone on without it. Returns whether it was
    /// between reading and writing.
    fn pause(&mut self, is_aimed: bool) -> bool {
        let first = rand::rng().random_range(0..WORKERS);
        let victim = if is_aimed {
            let before: Vec<usize> = (0..WORKERS).map(|it| self.said(it).len()).collect();
            let thinks = |it: &usize| {
                let said = self.said(*it);
                said.len() > before[*it] && said.last() == Some(&Said::Thinks)
            };
            wait_until("a client thinks", PATIENCE, || {
                (0..WORKERS).map(|step| (first + step) % WORKERS).find(thinks)
            })
        } else {
            first
        };
        self.workers[victim].signal("STOP");
        let since = Instant::now();
        let before = self.counts_beside(victim);
        wait_until("the others go on", PATIENCE, || {
            let counts = self.counts_beside(victim) - before;
            (since.elapsed() >= PAUSE && counts >= COUNTS_MEANWHILE).then_some(())
        });
        let is_between = self.said(victim).last() == Some(&Said::Thinks);
        self.workers[victim].signal("CONT");
        is_between
    }

    /// Ends the clients, and returns all that they have said.
    fn end(&mut self) -> Vec<Said> {
        std::fs::write(&self.task.stop, "").unwrap();
        let ended = std::mem::take(&mut self.workers).into_iter().map(|it| it.finish(PATIENCE));
        let said = ended.flat_map(|finished| {
            assert_eq!(finished.code, Some(0), "{finished}");
            worker::said(&finished.stdout)
        });
        said.collect()
    }
}
