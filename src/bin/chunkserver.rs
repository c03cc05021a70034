//! A chunkserver: copies of chunks on a disk.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(clippy::disallowed_methods, reason = "a program may draw from the system's randomness")]

use clap::Parser;
use ringleader::gfs::chunkserver::Settings;
use ringleader::net::daemon::{self, DataDir, End};
use ringleader::net::listen::{self, MAX_CONNECTIONS};
use ringleader::net::serve_chunks::ChunkShell;
use ringleader::store::Durability;
use ringleader::store::disk::DiskStore;
use ringleader::wire::HostPort;
use ringleader::wire::address::PortRange;
use std::net::{SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::process::ExitCode;

/// A chunkserver of the file system: it holds copies of chunks.
///
/// It listens on the first free port of 9001 to 9010 unless told otherwise, prints
/// `listening on IP:PORT` once it serves, and joins as soon as its master can be
/// reached.
#[derive(Parser)]
#[command(name = "chunkserver", version, max_term_width = 100)]
struct Flags {
    /// Where to listen: an address of this machine; it is also where others reach it
    #[arg(default_value = "0.0.0.0")]
    host: String,

    /// On which port (0: any free one)
    port: Option<u16>,

    /// Where the master is: HOST or HOST:PORT; several with commas
    #[arg(
        long,
        value_name = "HOST[:PORT]",
        env = "RINGLEADER_MASTER",
        default_value = "localhost",
        value_delimiter = ','
    )]
    master: Vec<HostPort>,

    /// Where others reach it [default: where it listens; for 0.0.0.0 this machine's own address]
    #[arg(long, value_name = "IP:PORT")]
    advertise: Option<SocketAddrV4>,

    /// Where it keeps the chunks [default: ./data/chunkserver-PORT]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,

    /// What stands and falls together with this machine: copies are spread over different racks
    #[arg(long, value_name = "NAME", default_value = "")]
    rack: String,

    /// How many bytes a second it fetches at most to make copies
    #[arg(long, value_name = "BYTES", default_value_t = 100 * 1024 * 1024)]
    copy_rate: u64,

    /// How many bytes a second it reads at most to look for damage
    #[arg(long, value_name = "BYTES", default_value_t = 4 * 1024 * 1024)]
    scrub_rate: u64,

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
    daemon::run("chunkserver", || run(&flags))
}

fn run(flags: &Flags) -> Result<(), Box<dyn std::error::Error>> {
    daemon::log_to_stderr(flags.log.as_deref())?;
    daemon::raise_file_limit(flags.max_connections);
    let end = End::prepare()?;
    if flags.end_with_stdin {
        end.with_stdin()?;
    }
    let listen = HostPort { host: flags.host.clone(), port: flags.port };
    let listener = listen::bind(&listen, PortRange::CHUNKSERVER)?;
    let SocketAddr::V4(bound) = listener.local_addr()? else {
        return Err("a chunkserver listens on an IPv4 address".into());
    };
    let data_dir = flags.data_dir.clone();
    let data_dir = data_dir.unwrap_or_else(|| format!("data/chunkserver-{}", bound.port()).into());
    let data = DataDir::take(&data_dir)?;
    let store = DiskStore::open(&data.store(), Durability::Always)?;
    let settings = Settings {
        name: format!("{:016x}", rand::random::<u64>()).into(),
        start: rand::random(),
        address: flags.advertise.unwrap_or_else(|| daemon::reachable_at(bound)),
        rack: flags.rack.as_str().into(),
        copy_rate: flags.copy_rate,
    };
    let shell = ChunkShell::start(settings, &flags.master, &data.path, store, flags.scrub_rate)?;
    let connections = listen::serve(listener, flags.max_connections, shell)?;
    daemon::print_line(&format!("listening on {bound}"));
    end.wait();
    connections.stop();
    Ok(())
}
