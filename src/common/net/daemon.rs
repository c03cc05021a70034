//! What every daemon does: log, print, wait for its end, say why it can't start.

use super::threads;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use std::cell::Cell;
use std::fs::{self, File, TryLockError};
use std::io::{self, IsTerminal, Write};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// How many files a daemon has open that are no connections of clients: its store's,
/// and connections to others like it.
const OTHER_FILES: usize = 512;

/// Runs a daemon called `name`; an error becomes one line on standard error and
/// a failing exit code.
pub fn run(name: &str, work: impl FnOnce() -> Result<(), Box<dyn std::error::Error>>) -> ExitCode {
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Logs to standard error, by `filter` (a level such as `debug`, or directives
/// as in `RUST_LOG`), else by `RUST_LOG`, else from `info` on.
///
/// # Errors
/// When `filter` is no filter.
pub fn log_to_stderr(filter: Option<&str>) -> Result<(), Box<dyn std::error::Error>> {
    let filter = match filter {
        Some(text) => EnvFilter::try_new(text).map_err(|error| {
            format!("--log {text}: {error}; write a level: error, warn, info, debug, trace")
        })?,
        None => EnvFilter::try_from_default_env()
            .unwrap_or_else(|_| EnvFilter::new("info,fjall=warn,lsm_tree=warn")),
    };
    end_on_panic();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .try_init()
        .map_err(|error| format!("can't log: {error}"))?;
    Ok(())
}

thread_local! {
    /// Whether a panic of this thread is caught by [`catch`].
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// A panic is a bug. Whatever it has left half done under a lock, nobody goes on
/// with: the process ends, and the others take over. Only where [`catch`] waits for it
/// there is somebody who says what it means.
pub(crate) fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if IS_CAUGHT.get() {
            tracing::error!("{panic}");
        } else {
            report(panic);
            std::process::exit(101);
        }
    }));
}

/// Does `work` of which a panic can be told from the outside, and catches it: in a
/// daemon, too.
///
/// # Errors
/// What it has panicked with.
pub(crate) fn catch<R>(work: impl FnOnce() -> R) -> std::thread::Result<R> {
    let before = IS_CAUGHT.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    IS_CAUGHT.set(before);
    outcome
}

/// Lets this process have as many open files as the system allows it at all, and warns
/// when those are too few for so many `connections`.
pub fn raise_file_limit(connections: usize) {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let current = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    // No number means no limit.
    let Some(current) = current else { return };
    let needed = connections.saturating_add(OTHER_FILES) as u64;
    if current < needed {
        tracing::warn!(
            "{current} open files are allowed, too few for {connections} connections: raise the \
             limit (ulimit -n) to {needed}, or choose fewer with --max-connections"
        );
    }
}

/// Ends this process at once: going on could do harm.
pub fn die(why: &str) -> ! {
    tracing::error!("{why}");
    std::process::exit(1)
}

/// Prints a line on standard output, at once. Somebody who reads no more is no
/// reason to stop.
pub fn print_line(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Asked for before anything is started, so that a signal is never missed.
#[derive(Debug)]
pub struct End(Signals);

impl End {
    /// Takes over SIGTERM and SIGINT.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn prepare() -> io::Result<Self> {
        Ok(Self(Signals::new([SIGTERM, SIGINT])?))
    }

    /// Also ends when standard input does: whoever started this program holds
    /// the other end, and is gone then.
    ///
    /// # Errors
    /// When the system has no room for a thread.
    pub fn with_stdin(&self) -> io::Result<()> {
        let handle = self.0.handle();
        threads::start("stdin", move || {
            let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
            handle.close();
        })?;
        Ok(())
    }

    /// What ends this process from within, when closed.
    pub fn handle(&self) -> Handle {
        self.0.handle()
    }

    /// Waits until this process is asked to end.
    pub fn wait(mut self) {
        let why = match self.0.forever().next() {
            Some(SIGINT) => "SIGINT",
            Some(_) => "SIGTERM",
            None => "nothing is left to do",
        };
        tracing::info!("{why}: ending");
    }
}

/// A data directory that belongs to this process while this lives.
#[derive(Debug)]
pub struct DataDir {
    /// Where it is.
    pub path: PathBuf,
    _lock: File,
}

/// Makes the directory at `path` if it isn't there, and those above it, and sees to it
/// that they stay.
fn make_dir(path: &Path) -> io::Result<()> {
    let made: Vec<&Path> = path.ancestors().take_while(|it| !it.exists()).collect();
    fs::create_dir_all(path)?;
    for parent in made.into_iter().filter_map(Path::parent) {
        let is_here = parent.as_os_str().is_empty();
        File::open(if is_here { Path::new(".") } else { parent })?.sync_all()?;
    }
    Ok(())
}

impl DataDir {
    /// Where the store in it is.
    pub fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    /// Takes the directory at `path`, which is made if it isn't there.
    ///
    /// # Errors
    /// One line that says what is wrong: not writable, or another process has it.
    pub fn take(path: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let shown = path.display();
        let explain = |error: io::Error| {
            format!("can't use the data directory {shown}: {error}; choose another with --data-dir")
        };
        make_dir(path).map_err(explain)?;
        let lock = File::create(path.join("lock")).map_err(explain)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(format!(
                "the data directory {shown} is in use by another process; choose another with --data-dir"
            )
            .into()),
            Err(TryLockError::Error(error)) => Err(explain(error).into()),
        }
    }
}

/// The address under which a program that listens at `bound` is reached by
/// others: `bound` itself, unless that is "all addresses"; then the one that
/// this machine would send from, else loopback.
pub fn reachable_at(bound: SocketAddrV4) -> SocketAddrV4 {
    if !bound.ip().is_unspecified() {
        return bound;
    }
    // Connecting a datagram socket sends nothing: it only asks which address
    // would be used. 192.0.2.0/24 is set aside for documentation (RFC 5737).
    let outward = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        socket.local_addr()
    });
    let ip = match outward {
        Ok(std::net::SocketAddr::V4(address)) if !address.ip().is_unspecified() => *address.ip(),
        _ => Ipv4Addr::LOCALHOST,
    };
    SocketAddrV4::new(ip, bound.port())
}
