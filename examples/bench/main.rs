//! `make bench`: this project and the programs that people use instead of it, side
//! by side.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a command that prints, around programs that run: it has a clock, sockets and threads"
)]

mod bare;
mod etcd;
mod load;
mod moosefs;
mod ours;
mod plot;
#[path = "../../tests/support/process.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "shared with the tests, which may panic")]
mod process;
mod programs;
mod redis;
mod report;
mod rows;

use clap::Parser;
use rows::{Effort, Figure};
use std::io;
use std::process::ExitCode;
use std::time::Duration;

/// Measures the release programs that stand in the folder above this one against
/// those of others, and writes docs/benchmarks.md.
#[derive(Parser)]
#[command(name = "bench", version, max_term_width = 100)]
struct Flags {
    /// Only these groups of rows
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = GROUPS.map(|it| it.0))]
    only: Vec<String>,

    /// Of these, only the rows whose name holds this
    #[arg(long, value_name = "NAME", default_value = "")]
    row: String,

    /// Leave out the other side: for a profile of ours
    #[arg(long)]
    alone: bool,

    /// How often each side has its turn
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,

    /// How long a turn takes, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    turn: f64,

    /// Write the figures into docs/benchmarks.md
    #[arg(long)]
    write: bool,

    /// Be the bare server of the group `shape`
    #[arg(long, value_name = "IP:PORT", hide = true)]
    bare: Option<std::net::SocketAddrV4>,

    /// Fail if a figure falls short of what docs/benchmarks.md claims
    #[arg(long, conflicts_with = "write")]
    check: bool,
}

type Group = (&'static str, fn(&Effort) -> io::Result<Vec<Figure>>);

const GROUPS: [Group; 16] = [
    ("reads", rows::kv::reads_of_one),
    ("shape", rows::kv::shape),
    ("etcd", rows::kv::against_etcd),
    ("memory", rows::kv::writes_in_memory),
    ("locks", rows::locks::against_etcd),
    ("moving", rows::moving::clients),
    ("growth", rows::moving::growth),
    ("sizes", rows::sizes::all),
    ("kill", rows::failing::kill),
    ("recovery", rows::failing::recovery),
    ("idle", rows::failing::idle),
    ("files", rows::files::limits),
    ("appends", rows::files::appends),
    ("metadata", rows::files::metadata),
    ("moosefs", rows::files::against_moosefs),
    ("curves", rows::kv::curves),
];

/// The rows that `--check` measures, quickly.
const CHECKED: [&str; 3] = ["reads", "etcd", "locks"];

fn main() -> ExitCode {
    match run(&Flags::parse()) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> io::Result<ExitCode> {
    if let Some(address) = flags.bare {
        return bare::serve(address).map(|()| ExitCode::SUCCESS);
    }
    if (flags.write || flags.check) && !report::is_here() {
        return Err(io::Error::other(
            "no docs/benchmarks.md here: run this in the project's folder",
        ));
    }
    let effort = Effort {
        rounds: flags.rounds,
        turn: Duration::from_secs_f64(flags.turn),
        row: flags.row.clone(),
        alone: flags.alone,
    };
    let is_asked_for =
        |name: &str| flags.only.is_empty() || flags.only.iter().any(|only| only == name);
    let is_wanted = |name: &str| is_asked_for(name) && (!flags.check || CHECKED.contains(&name));
    let (mut figures, mut has_failed) = (Vec::new(), false);
    for (name, rows) in GROUPS.iter().filter(|(name, _)| is_wanted(name)) {
        match rows(&effort) {
            Ok(measured) => figures.extend(measured),
            Err(error) => {
                eprintln!("bench: {name}: {error}");
                has_failed = true;
            }
        }
    }
    if flags.write {
        let (rounds, turn) = (flags.rounds, flags.turn);
        let effort = format!(
            "Medians; in each round each side has a turn of {turn} s. The last run was of {rounds} \
             rounds; rows that it left out are those of the run before."
        );
        report::write(&figures, &effort)?;
    }
    if flags.check {
        let short = report::shortfalls(&figures)?;
        short.iter().for_each(|line| eprintln!("bench: {line}"));
        has_failed |= !short.is_empty();
    }
    Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
