//! Programs under test: started, listened to, and gone when the test is.

use std::fmt;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything may take on a busy machine before a test gives up on it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How often a condition is looked at while a test waits for it.
const GLANCE: Duration = Duration::from_millis(20);

/// How much of a program's output is shown when its test fails, in lines.
const LAST_LINES: usize = 30;

/// What `condition` gives as soon as it gives something, or `None` when it has
/// not done so within `patience`.
pub(crate) fn within<T>(patience: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + patience;
    loop {
        // The clock is read first: however slow the condition is, it is looked
        // at once more after the deadline has passed.
        let late = Instant::now() >= deadline;
        if let Some(outcome) = condition() {
            return Some(outcome);
        }
        if late {
            return None;
        }
        thread::sleep(GLANCE);
    }
}

/// Waits until `condition` gives something, and returns it.
///
/// # Panics
/// If it has not done so after `patience`; the message says `what` was awaited.
pub(crate) fn wait_until<T>(
    what: &str,
    patience: Duration,
    condition: impl FnMut() -> Option<T>,
) -> T {
    within(patience, condition)
        .unwrap_or_else(|| panic!("waited {patience:?} in vain until {what}"))
}

/// The first of `count` consecutive ports on which nobody listens.
///
/// They lie below the ports that systems give out by themselves, and no two
/// calls in one process return the same one; a port can be lost only to a
/// program that takes it between this call and the bind.
///
/// # Panics
/// If there is no such block.
pub(crate) fn free_ports(count: u16) -> u16 {
    const LOWEST: u16 = 10_000;
    const SPAN: u16 = 22_000;
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    // Test binaries that run side by side start to look at different places.
    let next = NEXT.get_or_init(|| AtomicU16::new((std::process::id() * 97 % 20_000) as u16));
    for _ in 0..SPAN / count {
        let first = LOWEST + next.fetch_add(count, Ordering::Relaxed) % (SPAN - count);
        if (first..first + count).all(is_free) {
            return first;
        }
    }
    panic!("no {count} free ports in a row from {LOWEST} to {}", LOWEST + SPAN);
}

/// Whether nobody listens on `port`, on the loopback interface or on all.
fn is_free(port: u16) -> bool {
    // Some systems let one listen on the one while another listens on the other.
    let free = |host: Ipv4Addr| TcpListener::bind((host, port)).is_ok();
    free(Ipv4Addr::LOCALHOST) && free(Ipv4Addr::UNSPECIFIED)
}

/// A running program; killed, if it still runs, when this value is dropped.
pub(crate) struct Program {
    name: String,
    child: Child,
    stdout: Collected,
    stderr: Collected,
    /// A folder that goes when the program is gone.
    _data: Option<TempDir>,
}

/// A program that has ended.
pub(crate) struct Finished {
    name: String,
    /// Its exit status; `None` when a signal ended it.
    pub(crate) code: Option<i32>,
    /// All that it wrote to standard output.
    pub(crate) stdout: String,
    /// All that it wrote to standard error.
    pub(crate) stderr: String,
}

impl Program {
    /// Starts `command`, with nothing on its standard input; `name` is for
    /// messages.
    ///
    /// # Panics
    /// If it can't be started.
    pub(crate) fn start(name: &str, command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("can't start {name} ({command:?}): {error}"));
        let stdout = Collected::from(child.stdout.take().unwrap());
        let stderr = Collected::from(child.stderr.take().unwrap());
        Self { name: name.to_owned(), child, stdout, stderr, _data: None }
    }

    /// Keeps `data`, which the program uses, as long as the program.
    pub(crate) fn keeping(mut self, data: TempDir) -> Self {
        self._data = Some(data);
        self
    }

    /// What it has written to standard output so far.
    pub(crate) fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it has written to standard error so far.
    pub(crate) fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status when it has ended, by its own doing or by a signal.
    fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.ended().is_some()
    }

    /// # Panics
    /// If it has ended; the message holds what it said last.
    pub(crate) fn assert_running(&mut self) {
        if let Some(status) = self.ended() {
            panic!("{} has ended early: {status}\n{}", self.name, self.stderr());
        }
    }

    /// Waits for the line `listening on IP:PORT` and returns the address.
    ///
    /// # Panics
    /// If it ends before, or says nothing of the kind for long.
    pub(crate) fn listening(&mut self) -> SocketAddrV4 {
        let what = format!("{} says where it listens", self.name);
        wait_until(&what, PATIENCE, || {
            let said = self.stdout();
            // A line without its end may lack the end of the port.
            let lines = said.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            let mut addresses = lines.filter_map(|line| line.trim().strip_prefix("listening on "));
            let address = addresses.next().map(|address| address.parse().unwrap());
            if address.is_none() {
                self.assert_running();
            }
            address
        })
    }

    /// Sends it a signal by name: `TERM`, `INT`, `STOP`, `CONT`, `KILL`. After `STOP`
    /// all of its threads stand still: until one of them has taken that signal, the
    /// others go on.
    ///
    /// # Panics
    /// If the signal can't be sent.
    pub(crate) fn signal(&self, name: &str) {
        let line = format!("kill -{name} {}", self.id());
        let status = Command::new("sh").arg("-c").arg(line).status().unwrap();
        assert!(status.success(), "SIG{name} did not reach {}", self.name);
        if name == "STOP" {
            wait_until("it stands still", PATIENCE, || self.is_stopped().then_some(()));
        }
    }

    /// Whether all of its threads are stopped, or have ended.
    fn is_stopped(&self) -> bool {
        let threads = format!("/proc/{}/task", self.id());
        let Ok(threads) = std::fs::read_dir(threads) else { return true };
        threads.flatten().all(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // The state stands behind the name, which is in parentheses.
            stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 'Z', 'X']))
        })
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    /// If it still runs after `patience`.
    pub(crate) fn finish(mut self, patience: Duration) -> Finished {
        let what = format!("{} ends", self.name);
        let status = wait_until(&what, patience, || self.ended());
        for output in [&self.stdout, &self.stderr] {
            wait_until("its output ends", patience, || output.reader.is_finished().then_some(()));
        }
        Finished {
            name: self.name.clone(),
            code: status.code(),
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Either may fail only because it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            for (stream, text) in [("stdout", self.stdout()), ("stderr", self.stderr())] {
                let lines: Vec<&str> = text.lines().collect();
                for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
                    eprintln!("{} {stream}| {line}", self.name);
                }
            }
        }
    }
}

/// Runs `command` to its end.
///
/// # Panics
/// If it can't be started, or still runs after [`PATIENCE`].
pub(crate) fn run(name: &str, command: &mut Command) -> Finished {
    Program::start(name, command).finish(PATIENCE)
}

impl Finished {
    /// Its standard output as one JSON value.
    ///
    /// # Panics
    /// If it is anything else.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self}"))
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, code, stdout, stderr } = self;
        write!(f, "{name}, exit status {code:?}\nstdout: {stdout}\nstderr: {stderr}")
    }
}

/// What a program writes to one stream, read by a thread so that it never has
/// to wait for the test.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Collected {
    fn from(mut stream: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let collected = Arc::clone(&bytes);
        let reader = thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut piece) {
                collected.lock().unwrap().extend_from_slice(&piece[..count]);
            }
        });
        Self { bytes, reader }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }
}
