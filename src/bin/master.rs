//! The master of the file system: names, chunks, and who holds what.
#![allow(missing_docs, reason = "a program's flags document themselves")]

use clap::Parser;
use ringleader::consensus::founding::Entrance;
use ringleader::consensus::log::SNAPSHOT_EVERY;
use ringleader::consensus::node;
use ringleader::gfs::master::Settings;
use ringleader::gfs::{DEFAULT_COPIES, MAX_COPIES};
use ringleader::net::daemon::{self, DataDir, End};
use ringleader::net::listen::{self, MAX_CONNECTIONS};
use ringleader::net::serve_master::MasterShell;
use ringleader::store::Durability;
use ringleader::store::disk::DiskStore;
use ringleader::wire::HostPort;
use ringleader::wire::address::PortRange;
use std::net::{SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// The master of a file system, or one of several: it keeps the names of files, decides
/// which chunkservers hold which chunks, and has copies made of what is short.
///
/// Three of them, started with the same --peers, go on when one fails, five when two do.
///
/// It listens on port 9000, on all addresses, unless told otherwise, and prints
/// `listening on IP:PORT` once it serves.
#[derive(Parser)]
#[command(name = "master", version, max_term_width = 100)]
struct Flags {
    /// Where to listen: IP or IP:PORT (port 0: any free one)
    #[arg(long, value_name = "IP[:PORT]", default_value = "0.0.0.0")]
    listen: HostPort,

    /// Found a group with these masters, this one among them: all are to be started with the same
    /// list. It counts only as long as the data directory is empty
    #[arg(long, value_name = "IP:PORT,...", value_delimiter = ',', conflicts_with = "join")]
    peers: Vec<SocketAddrV4>,

    /// Come into a group that exists: wait until `gfs master-add` names this master. It counts only
    /// as long as the data directory is empty
    #[arg(long)]
    join: bool,

    /// Where others reach this master [default: where it listens; for 0.0.0.0 this machine's own
    /// address]
    #[arg(long, value_name = "IP:PORT")]
    advertise: Option<SocketAddrV4>,

    /// Where the master keeps what must outlive it [default: ./data/master-PORT]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// How many copies of each chunk, for files that don't say
    #[arg(long, value_name = "N", default_value_t = DEFAULT_COPIES,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_COPIES)))]
    copies: u8,

    /// For how many seconds a deleted file can be brought back
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().keep_deleted.as_secs())]
    keep_deleted: u64,

    /// After how many seconds copies are made of what a chunkserver holds that is away, while
    /// there are others
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().repair_after.as_secs())]
    repair_after: u64,

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

fn main() -> ExitCode {
    let flags = Flags::parse();
    daemon::run("master", || run(&flags))
}

fn run(flags: &Flags) -> Result<(), Box<dyn std::error::Error>> {
    daemon::log_to_stderr(flags.log.as_deref())?;
    daemon::raise_file_limit(flags.max_connections);
    let end = End::prepare()?;
    if flags.end_with_stdin {
        end.with_stdin()?;
    }
    let listener = listen::bind(&flags.listen, PortRange::MASTER)?;
    let SocketAddr::V4(bound) = listener.local_addr()? else {
        return Err("--listen takes an IPv4 address".into());
    };
    let address = flags.advertise.unwrap_or_else(|| daemon::reachable_at(bound));
    let entrance = match flags.join {
        true => Entrance::Wait,
        false => Entrance::with_founders(address, &flags.peers)
            .map_err(|error| format!("--peers: {error}"))?,
    };
    let data_dir = flags.data_dir.clone();
    let data_dir = data_dir.unwrap_or_else(|| format!("data/master-{}", bound.port()).into());
    let data = DataDir::take(&data_dir)?;
    let settings = Settings {
        copies: flags.copies,
        keep_deleted: Duration::from_secs(flags.keep_deleted),
        repair_after: Duration::from_secs(flags.repair_after),
        ..Settings::default()
    };
    let place = node::Settings { address, entrance, snapshot_every: SNAPSHOT_EVERY };
    let store = DiskStore::open(&data.store(), Durability::Always)?;
    let shell = MasterShell::start(place, settings, store)
        .map_err(|error| format!("{}: {error}", data_dir.display()))?;
    let connections = listen::serve(listener, flags.max_connections, Arc::clone(&shell))?;
    daemon::print_line(&format!("listening on {bound}"));
    end.wait();
    shell.end();
    connections.stop();
    Ok(())
}
