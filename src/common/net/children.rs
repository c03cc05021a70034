//! Programs of ours as child processes: started, awaited, stopped in order.

use super::threads;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::SocketAddrV4;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a child may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a child may take to end when it is asked to; then it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a child that is to end is looked at.
const GLANCE: Duration = Duration::from_millis(10);

/// How much of the log of a child that died is shown, in lines.
const LAST_LINES: usize = 10;

/// A daemon that runs as a child of this process, and ends with it.
#[derive(Debug)]
pub struct Daemon {
    /// What it is called in messages.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddrV4,
    child: Child,
    log: PathBuf,
}

/// Why a child could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It could not be run at all.
    #[error("can't run {}: {error}; build all programs first: cargo build --release", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Its log can't be written.
    #[error("can't write {}: {error}; choose another directory with --data-dir", log.display())]
    Log {
        /// The log.
        log: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It ended, or said nothing, before it listened.
    #[error("{name} did not start: {why}")]
    Silent {
        /// Which child.
        name: String,
        /// The end of its log.
        why: String,
    },
}

/// The program of ours that is called `name`: it stands beside this one.
pub fn program(name: &str) -> PathBuf {
    let here = std::env::current_exe().unwrap_or_default();
    here.with_file_name(name)
}

impl Daemon {
    /// Starts the program `program` with `arguments` and waits until it listens.
    /// Its log goes to `log`; each further line of its output to `output`.
    ///
    /// # Errors
    /// A [`StartError`] that says what to do.
    pub fn start(
        name: &str,
        program: &str,
        arguments: &[String],
        log: &Path,
        mut output: impl FnMut(&str, &str) + Send + 'static,
    ) -> Result<Self, StartError> {
        let program = self::program(program);
        let log_file = fs::create_dir_all(log.parent().unwrap_or(Path::new(".")))
            .and_then(|()| File::create(log))
            .map_err(|error| StartError::Log { log: log.to_owned(), error })?;
        let run_error = |error| StartError::Run { program: program.clone(), error };
        let mut child = Command::new(&program)
            .args(arguments)
            .arg("--end-with-stdin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file)
            // Ctrl-C is for us: we stop our children ourselves, in order.
            .process_group(0)
            .spawn()
            .map_err(run_error)?;
        let (listening, listens) = crossbeam_channel::bounded(1);
        let stdout = child.stdout.take();
        let (speaker, thread) = (name.to_owned(), format!("out of {name}"));
        threads::start(thread, move || {
            for line in stdout.into_iter().flat_map(|out| BufReader::new(out).lines()) {
                let Ok(line) = line else { return };
                match line.strip_prefix("listening on ").map(str::parse) {
                    Some(Ok(address)) => drop(listening.try_send(address)),
                    _ => output(&speaker, &line),
                }
            }
        })
        .map_err(run_error)?;
        // The channel ends with the thread, and the thread with the child.
        match listens.recv_timeout(START_TIMEOUT) {
            Ok(address) => Ok(Self { name: name.to_owned(), address, child, log: log.to_owned() }),
            Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                let why = last_lines(log);
                let why = if why.is_empty() { "it said nothing".to_owned() } else { why };
                Err(StartError::Silent { name: name.to_owned(), why })
            }
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// The last lines of its log.
    pub fn last_words(&self) -> String {
        last_lines(&self.log)
    }

    /// Asks it to end and waits until it has; kills it if it takes too long.
    pub fn stop(mut self) {
        if self.ended().is_some() {
            return;
        }
        if let Ok(pid) = i32::try_from(self.child.id())
            && let Some(pid) = Pid::from_raw(pid)
        {
            // An error means that it has just ended.
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + END_TIMEOUT;
        while self.ended().is_none() {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(GLANCE);
        }
    }
}

fn last_lines(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}
