//! One client of the lock experiment: a process of its own, so that it can be stopped
//! with all that it is.

use super::TTL;
use crossbeam_channel::{Receiver, never};
use ringleader::kv::content::Fence;
use ringleader::kv::messages::{Get, Setr};
use ringleader::kv::operation::{Command, Operation};
use ringleader::kv::{Text, Version};
use ringleader::net::ask::Asker;
use ringleader::view::Token;
use ringleader::view::messages::LockCall;
use ringleader::wire::{HostPort, Identity};
use serde_json::Value;
use std::io::Write;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

/// The variable of the environment that makes a program a worker, and tells it its
/// task.
pub(crate) const TASK: &str = "RINGLEADER_LOCK_EXPERIMENT";

/// How long a client thinks between reading and writing: long enough to be stopped
/// there.
const THOUGHT: Duration = Duration::from_millis(100);

const COUNTER: &str = "the counter";
const LOCK: &str = "counter";

/// What a worker is to do.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) viewleader: SocketAddrV4,
    pub(crate) tokens: bool,
    /// It ends once there is this file.
    pub(crate) stop: PathBuf,
    pub(crate) number: usize,
}

impl Task {
    pub(crate) fn to_text(&self) -> String {
        let Self { viewleader, tokens, stop, number } = self;
        format!("{viewleader} {tokens} {number} {}", stop.display())
    }

    fn of_text(text: &str) -> Self {
        let parts: Vec<&str> = text.splitn(4, ' ').collect();
        let [viewleader, tokens, number, stop] = parts[..] else { panic!("no task: {text}") };
        Self {
            viewleader: viewleader.parse().expect("an address"),
            tokens: tokens.parse().expect("true or false"),
            number: number.parse().expect("a number"),
            stop: stop.into(),
        }
    }
}

/// What a worker says, a word in a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// It has the lock and has read the counter.
    Thinks,
    /// It has counted: that was acknowledged.
    Wrote,
    /// It has not: a later holder of the lock has written.
    Fenced,
    /// It may have.
    Unknown,
}

const WORDS: [(Said, &str); 4] = [
    (Said::Thinks, "thinks"),
    (Said::Wrote, "wrote"),
    (Said::Fenced, "fenced"),
    (Said::Unknown, "unknown"),
];

/// What a worker has said that has printed `text`.
pub(crate) fn said(text: &str) -> Vec<Said> {
    let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let word = |line: &str| WORDS.iter().find(|(_, word)| *word == line.trim());
    lines.filter_map(|line| word(line).map(|(said, _)| *said)).collect()
}

fn say(said: Said) {
    let (_, word) = WORDS.iter().find(|(it, _)| *it == said).expect("there is a word for all");
    // Who started it is gone: so it ends.
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{word}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// Makes this process a worker, if it was started as one, and ends it with its task.
pub(crate) fn work_if_told() {
    let Ok(task) = std::env::var(TASK) else { return };
    Worker::new(Task::of_text(&task)).work();
    std::process::exit(0);
}

/// Puts the counter there; `None` if that can't be done yet.
pub(crate) fn begin_counter(task: &Task) -> Option<()> {
    let setr = setr("0".into(), None, Some(Version::default()));
    let reply = Worker::new(task.clone()).ask(Command::Setr(setr));
    matches!(reply["status"].as_str(), Some("ok")).then_some(()).or_else(|| {
        // It may have been there already, after an unknown outcome.
        (reply["reason"] == "conflict").then_some(())
    })
}

/// The counter.
pub(crate) fn read_counter(task: &Task) -> u64 {
    Worker::new(task.clone()).read().0
}

fn setr(val: Text, fence: Option<Fence>, if_version: Option<Version>) -> Setr {
    Setr { key: COUNTER.into(), val, direct: true, if_version, fence }
}

struct Worker {
    task: Task,
    asker: Asker,
    never: Receiver<()>,
}

impl Worker {
    fn new(task: Task) -> Self {
        let (host, port) = (task.viewleader.ip().to_string(), Some(task.viewleader.port()));
        let viewleaders = vec![HostPort { host, port }];
        let asker = Asker { servers: Vec::new(), viewleaders, timeout: Duration::from_secs(30) };
        Self { task, asker, never: never() }
    }

    fn ask(&self, command: Command) -> Value {
        let conclusion = self.asker.run(Operation::new(command), &self.never, |_| {});
        let reply = conclusion.reply.and_then(|reply| serde_json::from_str(&reply).ok());
        reply.unwrap_or_default()
    }

    fn lock_call(&self) -> LockCall {
        LockCall {
            request: Some(rand::random()),
            ttl_ms: Some(TTL.as_millis() as u64),
            wait_ms: Some(TTL.as_millis() as u64 / 2),
            ..LockCall::new(LOCK.into(), Identity::text(format!("worker {}", self.task.number)))
        }
    }

    /// The counter and its version, tried until it is read.
    fn read(&self) -> (u64, Version) {
        loop {
            let reply = self.ask(Command::Getr(Get { key: COUNTER.into() }));
            let number = reply["value"].as_str().and_then(|value| value.parse().ok());
            let version = reply["version"].as_str().and_then(|version| version.parse().ok());
            if let (Some(number), Some(version)) = (number, version) {
                return (number, version);
            }
        }
    }

    fn work(&self) {
        while !self.task.stop.exists() {
            let reply = self.ask(Command::LockGet(self.lock_call()));
            let Some(token) = reply["token"].as_u64().map(Token) else { continue };
            self.count(token);
            self.ask(Command::LockRelease(self.lock_call()));
        }
    }

    /// Adds one to the counter, under the lock that was granted with `token`.
    fn count(&self, token: Token) {
        let fence = self.task.tokens.then(|| Fence { lock: LOCK.into(), token });
        let number = loop {
            let (number, version) = self.read();
            let Some(fence) = fence.clone() else { break number };
            // From here on nobody with an earlier token writes.
            let claim = setr(number.to_string().into(), Some(fence), Some(version));
            let reply = self.ask(Command::Setr(claim));
            match (reply["status"].as_str(), reply["reason"].as_str()) {
                (Some("ok"), _) => break number,
                (_, Some("fenced")) => return say(Said::Fenced),
                _ => {}
            }
        };
        say(Said::Thinks);
        thread::sleep(THOUGHT);
        let reply = self.ask(Command::Setr(setr((number + 1).to_string().into(), fence, None)));
        match (reply["status"].as_str(), reply["reason"].as_str()) {
            (Some("ok"), _) => say(Said::Wrote),
            (_, Some("fenced")) => say(Said::Fenced),
            (_, Some("unavailable")) => {}
            _ => say(Said::Unknown),
        }
    }
}
