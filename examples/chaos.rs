//! `make chaos`: a cluster of the real programs, real faults, and a judge.
//!
//! `cargo run --release --example chaos -- --seconds 600 --seed 7` after `cargo build
//! --release --bins`. The work is in `tests/chaos`; this is its command line.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a command that prints, around programs that run"
)]

#[path = "../tests/chaos/mod.rs"]
mod chaos;

use chaos::network::{self, Network};
use chaos::{Settings, run};
use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Set once this process stands in namespaces of its own.
const INSIDE: &str = "RINGLEADER_CHAOS_INSIDE";

/// Runs a cluster of the programs that stand beside this one, harms it, and judges
/// what its clients saw. The exit status is 0 if nothing was wrong.
#[derive(Parser)]
#[command(name = "chaos", version, max_term_width = 100)]
struct Flags {
    /// For how many seconds to do harm
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,

    /// What to draw the faults and the requests from [default: a new one]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// With how many servers to begin
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(3..=7))]
    servers: u16,

    /// How many clients ask at the same time
    #[arg(long, value_name = "N", default_value_t = 16)]
    clients: usize,

    /// Run all on loopback even where namespaces can be had
    #[arg(long)]
    loopback: bool,

    /// Where to write the report, in a folder named after the seed
    #[arg(long, value_name = "DIR", default_value = "target/chaos")]
    report: PathBuf,

    /// Be the proxy that makes a link slow, by so many milliseconds
    #[arg(long, value_name = "N", hide = true)]
    delay_proxy: Option<u64>,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    if let Some(ms) = flags.delay_proxy {
        let served = chaos::delay::serve(Duration::from_millis(ms));
        let error = served.err().map_or(String::new(), |error| error.to_string());
        let _ = writeln!(std::io::stderr(), "the proxy can't listen: {error}");
        return ExitCode::FAILURE;
    }
    let inside = std::env::var_os(INSIDE).is_some();
    let network = match network::can_have_namespaces() {
        _ if flags.loopback => Network::Loopback { why: "as was asked for".to_owned() },
        _ if inside => Network::namespaces(),
        Ok(()) => {
            let why = network::enter_namespaces(INSIDE).to_string();
            Network::Loopback { why }
        }
        Err(why) => Network::Loopback { why },
    };
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).expect("a signal's flag");
    }
    let seed = flags.seed.unwrap_or_else(rand::random);
    println!("seed {seed}; {network}");
    let here = std::env::current_exe().expect("this program's path");
    let programs = here.parent().and_then(|folder| folder.parent()).expect("target/release");
    let report = run(Settings {
        programs: programs.to_owned(),
        network,
        span: Duration::from_secs(flags.seconds),
        seed,
        servers: flags.servers.into(),
        clients: flags.clients,
        interrupted,
    });
    println!("{report}");
    let folder = flags.report.join(seed.to_string());
    match report.write(&folder) {
        Ok(()) => println!("written to {}", folder.display()),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "can't write {}: {error}", folder.display());
        }
    }
    if report.is_fine() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
