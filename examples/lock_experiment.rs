//! `make lock-experiment`: a counter under a lock, and clients that sleep.
//!
//! `cargo run --release --example lock_experiment -- --seconds 600 --tokens` after `cargo
//! build --release --bins`. The work is in `tests/lock_experiment`; this is its command
//! line.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a command that prints, around programs that run"
)]

#[path = "../tests/lock_experiment/mod.rs"]
mod lock_experiment;

use clap::Parser;
use lock_experiment::{Settings, run, worker};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Five clients count under a lock that is lost after 2 s, and one of them is stopped
/// for longer every 5 s. Tells how many acknowledged updates were lost. The exit status
/// is 0 if, with --tokens, none was; or without, some were.
#[derive(Parser)]
#[command(name = "lock_experiment", version, max_term_width = 100)]
struct Flags {
    /// Write under the token of the lock
    #[arg(long)]
    tokens: bool,

    /// For how many seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
}

fn main() -> ExitCode {
    worker::work_if_told();
    let Flags { tokens, seconds } = Flags::parse();
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).expect("a signal's flag");
    }
    let here = std::env::current_exe().expect("this program's path");
    let programs = here.parent().and_then(|folder| folder.parent()).expect("target/release");
    let outcome = run(&Settings {
        programs: programs.to_owned(),
        worker: || Command::new(std::env::current_exe().expect("this program's path")),
        tokens,
        span: Duration::from_secs(seconds),
        least_between: 1,
        interrupted,
    });
    println!("{outcome}");
    if tokens == (outcome.lost() == 0) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
