//! The programs on both sides: started, watched for what they use, and ended.

use super::process::{self, Program, within};
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long a program may take until it serves.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A free address on this machine.
pub(crate) fn loopback() -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, process::free_ports(1))
}

/// So many of them.
pub(crate) fn loopbacks(count: usize) -> Vec<SocketAddrV4> {
    (0..count).map(|_| loopback()).collect()
}

/// A program that serves; it ends when this is dropped.
pub(crate) struct Daemon {
    /// Where it serves.
    pub(crate) address: SocketAddrV4,
    name: &'static str,
    program: Program,
}

impl Daemon {
    /// Starts a program that will serve at `address`, and waits until it accepts
    /// connections there.
    ///
    /// # Errors
    /// When it does not.
    pub(crate) fn start(
        name: &'static str,
        command: Command,
        address: SocketAddrV4,
    ) -> io::Result<Self> {
        let daemon = Self::launch(name, command, address)?;
        daemon.wait_until(|| TcpStream::connect(address))?;
        Ok(daemon)
    }

    /// Starts a program, and does not wait.
    ///
    /// # Errors
    /// When it is not installed.
    pub(crate) fn launch(
        name: &'static str,
        mut command: Command,
        address: SocketAddrV4,
    ) -> io::Result<Self> {
        if !is_installed(command.get_program().as_ref()) {
            let hint = format!("{name} is not installed: docs/benchmarks.md names the packages");
            return Err(io::Error::other(hint));
        }
        let program = Program::start(name, &mut command);
        Ok(Self { address, name, program })
    }

    /// Waits until `is_ready` succeeds.
    ///
    /// # Errors
    /// Its last error, when it never does.
    pub(crate) fn wait_until<R>(&self, is_ready: impl Fn() -> io::Result<R>) -> io::Result<()> {
        match within(PATIENCE, || is_ready().ok()) {
            Some(_) => Ok(()),
            None => {
                let error = is_ready().err().map_or(String::new(), |error| error.to_string());
                let said = self.said();
                Err(io::Error::other(format!("{} does not serve: {error}\n{said}", self.name)))
            }
        }
    }

    /// What it has written to standard error so far.
    pub(crate) fn said(&self) -> String {
        self.program.stderr()
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.program.id()
    }

    /// Sends it a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        self.program.signal(name);
    }
}

/// Whether `program` is a file, or one of the commands of this machine.
pub(crate) fn is_installed(program: &Path) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    program.exists() || std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}

/// The processor time that the processes have used so far, in seconds.
pub(crate) fn cpu_seconds(processes: &[u32]) -> f64 {
    let ticks = |process: &u32| -> Option<u64> {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // The name, in parentheses, may hold anything; utime and stime are the 12th
        // and 13th word behind it.
        let mut words = stat.rsplit_once(") ")?.1.split(' ').skip(11);
        Some(words.next()?.parse::<u64>().ok()? + words.next()?.parse::<u64>().ok()?)
    };
    let ticks: u64 = processes.iter().filter_map(ticks).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

/// The memory that the processes have used at most, together, in MiB.
pub(crate) fn peak_memory(processes: &[u32]) -> f64 {
    processes.iter().map(|process| memory(*process, "VmHWM")).sum()
}

/// The memory of one process, in MiB: `VmHWM` at most, `VmRSS` now.
pub(crate) fn memory(process: u32, what: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    kib.unwrap_or(0.0) / 1024.0
}

/// The folder with our programs: the one above this program's own.
///
/// # Errors
/// When they have not been built.
pub(crate) fn our_folder() -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().and_then(Path::parent).unwrap_or(Path::new(".")).to_owned();
    if folder.join("server").exists() {
        return Ok(folder);
    }
    let hint = format!("no programs in {}: run `cargo build --release --bins`", folder.display());
    Err(io::Error::other(hint))
}
