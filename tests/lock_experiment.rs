//! Both arms of the lock experiment, in short. `make lock-experiment` is the long run.

#![allow(clippy::disallowed_methods, reason = "it starts programs")]

#[path = "lock_experiment/mod.rs"]
mod experiment;

use experiment::{Outcome, Settings, run, worker};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// What a client runs: this binary, and in it the test of this name alone.
fn client() -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program's path"));
    command.args(["--exact", "a_client", "--nocapture"]);
    command
}

/// In a process that was started for it, one of the clients. Else nothing.
#[test]
fn a_client() {
    worker::work_if_told();
}

fn arm(tokens: bool) -> Outcome {
    let programs = Path::new(env!("CARGO_BIN_EXE_server")).parent().expect("a folder");
    let outcome = run(&Settings {
        programs: programs.to_owned(),
        worker: client,
        tokens,
        span: Duration::ZERO,
        least_between: 2,
        interrupted: Arc::new(AtomicBool::new(false)),
    });
    assert!(outcome.counter <= outcome.acknowledged + outcome.unknown, "{outcome}");
    outcome
}

#[test]
fn with_tokens_no_update_is_lost_when_clients_sleep_through_their_leases() {
    let outcome = arm(true);
    assert_eq!(outcome.lost(), 0, "{outcome}");
    assert!(outcome.fenced >= 2, "each of those that slept was kept out: {outcome}");
}

#[test]
fn without_tokens_updates_are_lost() {
    let outcome = arm(false);
    // Each of those that slept has written over what three others had counted.
    assert!(outcome.lost() >= 2, "{outcome}");
    assert_eq!(outcome.fenced, 0, "{outcome}");
}
