//! A server: a place on the ring, and the data that belongs there.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(clippy::disallowed_methods, reason = "a program may draw from the system's randomness")]

use clap::Parser;
use ringleader::kv::server::{Batch, DEFAULT_FETCH_RATE, DEFAULT_LEASE, Settings};
use ringleader::net::daemon::{self, DataDir, End};
use ringleader::net::listen::{self, MAX_CONNECTIONS};
use ringleader::net::serve_kv::KvShell;
use ringleader::store::Durability;
use ringleader::store::disk::DiskStore;
use ringleader::view::leader::{MAX_LEASE, MIN_LEASE};
use ringleader::wire::HostPort;
use ringleader::wire::address::PortRange;
use std::net::{SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// A server of the replicated key-value store.
///
/// It listens on the first free port of 38000 to 38009, on all addresses,
/// unless told otherwise, prints `listening on IP:PORT` once it serves, and
/// joins the cluster of its viewleader as soon as that can be reached.
#[derive(Parser)]
#[command(name = "server", version, max_term_width = 100)]
struct Flags {
    /// Where viewleaders are: HOST (ports 39000 to 39009 are tried) or HOST:PORT; several with commas
    #[arg(
        long,
        value_name = "HOST[:PORT]",
        env = "RINGLEADER_VIEWLEADER",
        default_value = "localhost",
        value_delimiter = ','
    )]
    viewleader: Vec<HostPort>,

    /// Where to listen: IP or IP:PORT (port 0: any free one)
    #[arg(long, value_name = "IP[:PORT]", default_value = "0.0.0.0")]
    listen: HostPort,

    /// Where others reach this server [default: where it listens; for 0.0.0.0 this machine's own address]
    #[arg(long, value_name = "IP:PORT")]
    advertise: Option<SocketAddrV4>,

    /// Where this server keeps what must outlive it [default: ./data/server-PORT]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// When a write is on the disk: `always` before it is acknowledged, `interval` within 100 ms,
    /// `none` when the system sees fit. None of them loses anything when a process is killed; the
    /// latter two can lose the last writes when all three machines of a key lose power at once
    #[arg(long, default_value_t = Durability::Always)]
    durability: Durability,

    /// How many bytes a second this server fetches at most when data moves
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_FETCH_RATE)]
    rebalance_rate: u64,

    /// How long a lease to ask the viewleader for: others take over this long after a failure
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_LEASE.as_secs_f64(), value_parser = lease)]
    lease: f64,

    /// How many connections are served at once
    #[arg(long, value_name = "N", default_value_t = MAX_CONNECTIONS)]
    max_connections: usize,

    /// End when standard input is closed: for programs that start this one
    #[arg(long)]
    end_with_stdin: bool,

    /// What to log: error, warn, info, debug, trace [default: RUST_LOG, else info]
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
}

fn lease(text: &str) -> Result<f64, String> {
    let bounds = MIN_LEASE.as_secs_f64()..=MAX_LEASE.as_secs_f64();
    match text.parse::<f64>() {
        Ok(seconds) if bounds.contains(&seconds) => Ok(seconds),
        _ => Err(format!("a lease has from {} to {} seconds", bounds.start(), bounds.end())),
    }
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    daemon::run("server", || run(&flags))
}

fn run(flags: &Flags) -> Result<(), Box<dyn std::error::Error>> {
    daemon::log_to_stderr(flags.log.as_deref())?;
    daemon::raise_file_limit(flags.max_connections);
    let end = End::prepare()?;
    if flags.end_with_stdin {
        end.with_stdin()?;
    }
    let listener = listen::bind(&flags.listen, PortRange::SERVER)?;
    let SocketAddr::V4(bound) = listener.local_addr()? else {
        return Err("--listen takes an IPv4 address".into());
    };
    let data_dir = flags.data_dir.clone();
    let data_dir = data_dir.unwrap_or_else(|| format!("data/server-{}", bound.port()).into());
    let data = DataDir::take(&data_dir)?;
    let store = DiskStore::open(&data.store(), flags.durability)?;
    let settings = Settings {
        address: flags.advertise.unwrap_or_else(|| daemon::reachable_at(bound)),
        lease: Duration::from_secs_f64(flags.lease),
        fetch_rate: flags.rebalance_rate,
        synced: flags.durability == Durability::Always,
        drawn: rand::random(),
        batch: Batch::default(),
    };
    let handle = end.handle();
    let shell = KvShell::start(settings, &flags.viewleader, store, move || handle.close())?;
    let connections = listen::serve(listener, flags.max_connections, shell)?;
    daemon::print_line(&format!("listening on {bound}"));
    end.wait();
    connections.stop();
    Ok(())
}
