//! The clients: each asks one thing after the other, and notes it.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ringleader::kv::{Text, Version};
use ringleader::net::call::{CallFailure, Caller};
use ringleader::sim::linearizability::{Call, Operation, Outcome};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How many keys are in use at a time.
const KEYS: u64 = 6;

/// How long a key is in use: then others take its place, and it is read now and
/// then. So no key's history grows without bound.
pub(super) const GENERATION: Duration = Duration::from_secs(20);

/// How long a client waits for the answer to a write. Longer than most, and shorter
/// than the servers' own patience: some outcomes remain unknown.
const WRITE_PATIENCE: Duration = Duration::from_secs(4);

/// How long a client waits for the answer to a read. An old primary that answers
/// does so at once, and one that is cut off from the others must be asked often.
const READ_PATIENCE: Duration = Duration::from_millis(400);

/// How long a client waits for a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

/// How long a client rests between two questions, at most, in milliseconds.
const MAX_REST_MS: u64 = 16;

/// How long everything is tried in the end.
const LAST_PATIENCE: Duration = Duration::from_secs(10);

/// What the clients share.
pub(crate) struct Shared {
    pub(crate) origin: Instant,
    pub(crate) servers: Mutex<Vec<SocketAddrV4>>,
    pub(crate) end: AtomicBool,
}

impl Shared {
    /// How long it has been, in microseconds.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_micros()).unwrap()
    }
}

/// Clients that run.
pub(crate) struct Clients {
    pub(crate) shared: Arc<Shared>,
    threads: Vec<JoinHandle<Seen>>,
}

/// What clients have seen.
#[derive(Default)]
pub(crate) struct Seen {
    /// What they asked and were answered; times in microseconds.
    pub(crate) history: Vec<Operation>,
    /// Answers that nobody should get.
    pub(crate) strange: Vec<String>,
    /// What those did who took locks, in words.
    pub(crate) under_locks: String,
    origin: Option<Instant>,
}

impl Clients {
    /// Starts `count` clients that ask any of `servers`.
    pub(crate) fn start(count: usize, seed: u64, servers: Vec<SocketAddrV4>) -> Self {
        let (origin, servers) = (Instant::now(), Mutex::new(servers));
        let shared = Arc::new(Shared { origin, servers, end: AtomicBool::new(false) });
        let threads = (0..count as u64).map(|number| {
            let shared = Arc::clone(&shared);
            let rng = StdRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(number));
            thread::spawn(move || Client::new(number, rng, shared).work())
        });
        let threads = threads.collect();
        Self { shared, threads }
    }

    /// The servers that they may ask from now on.
    pub(crate) fn use_servers(&self, servers: Vec<SocketAddrV4>) {
        *self.shared.servers.lock().unwrap() = servers;
    }

    /// Ends them.
    pub(crate) fn end(mut self) -> Seen {
        self.shared.end.store(true, Ordering::Relaxed);
        let mut all = Seen { origin: Some(self.shared.origin), ..Seen::default() };
        for client in std::mem::take(&mut self.threads) {
            let seen = client.join().expect("a client that does not panic");
            all.history.extend(seen.history);
            all.strange.extend(seen.strange);
        }
        all
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Relaxed);
    }
}

impl Seen {
    /// Writes a few keys, each through another one of `servers`: that all is at rest is not
    /// enough. Then asks each of them for every key that was ever used.
    pub(crate) fn use_everything(&mut self, servers: &[SocketAddrV4]) {
        for (number, &server) in (0..KEYS).zip(servers.iter().cycle()) {
            let key = format!("last key {number}").into();
            let write = Call::Write { value: format!("last {number}").into() };
            self.insist(2000 + number, server, &[key], &write);
        }
        let keys: BTreeSet<Text> =
            self.history.iter().map(|operation| Text::clone(&operation.key)).collect();
        let keys: Vec<Text> = keys.into_iter().collect();
        for (number, &server) in servers.iter().enumerate() {
            self.insist(1000 + number as u64, server, &keys, &Call::Read);
        }
    }

    /// One more client does this with each of `keys` through `server`, again until it is
    /// done.
    fn insist(&mut self, number: u64, server: SocketAddrV4, keys: &[Text], call: &Call) {
        let servers = Mutex::new(vec![server]);
        let origin = self.origin.expect("clients that have ended");
        let shared = Arc::new(Shared { origin, servers, end: AtomicBool::new(false) });
        let mut client = Client::new(number, StdRng::seed_from_u64(0), shared);
        for key in keys {
            let deadline = Instant::now() + LAST_PATIENCE;
            // A server may hear of the last change of the view a moment later.
            while !client.ask(key, call.clone()) {
                if Instant::now() > deadline {
                    client.seen.strange.push(format!("in the end, {server}: no {call:?} of {key}"));
                    break;
                }
            }
        }
        self.history.extend(client.seen.history);
        self.strange.extend(client.seen.strange);
    }
}

struct Client {
    number: u64,
    rng: StdRng,
    shared: Arc<Shared>,
    line: Option<Caller>,
    writes: u64,
    /// The key that it was told of last, and the version of it; none: it was missing.
    known: Option<(Text, Option<Version>)>,
    seen: Seen,
}

impl Client {
    fn new(number: u64, rng: StdRng, shared: Arc<Shared>) -> Self {
        Self { number, rng, shared, line: None, writes: 0, known: None, seen: Seen::default() }
    }

    /// Every other client only reads, and stays with one server, whatever happens to
    /// it: stale reads come from servers that others shun.
    fn stays(&self) -> bool {
        self.number % 2 == 1
    }

    fn work(mut self) -> Seen {
        while !self.shared.end.load(Ordering::Relaxed) {
            let now = self.shared.origin.elapsed().as_secs() / GENERATION.as_secs();
            let key = self.rng.random_range(0..KEYS);
            if self.rng.random_ratio(1, 20) {
                let generation = self.rng.random_range(0..=now);
                let known = self.known.clone();
                self.ask(&format!("key {generation}.{key}").into(), Call::Read);
                // Nobody writes to it any more.
                self.known = known;
            } else if self.stays() || self.rng.random() {
                self.ask(&format!("key {now}.{key}").into(), Call::Read);
            } else {
                self.change(&format!("key {now}.{key}").into());
            }
            thread::sleep(Duration::from_millis(self.rng.random_range(1..=MAX_REST_MS)));
        }
        self.seen
    }

    /// Writes, deletes, or changes what it was told of last, if that is still so.
    fn change(&mut self, key: &Text) {
        self.writes += 1;
        let value = format!("{}.{}", self.number, self.writes).into();
        match (self.rng.random_range(0..10), self.known.take()) {
            (0, _) => self.ask(key, Call::Delete),
            (1..4, Some((known, expected))) => {
                self.ask(&known, Call::CompareAndSet { expected, value })
            }
            _ => self.ask(key, Call::Write { value }),
        };
    }

    fn now(&self) -> u64 {
        self.shared.now()
    }

    /// Asks some server and notes it; whether it was served.
    fn ask(&mut self, key: &Text, call: Call) -> bool {
        let name: &str = key;
        let request = match &call {
            Call::Write { value } => {
                json!({"cmd": "setr", "key": name, "val": &**value, "direct": true})
            }
            Call::CompareAndSet { expected, value } => {
                let expected = expected.unwrap_or_default();
                json!({"cmd": "setr", "key": name, "val": &**value, "direct": true,
                       "if_version": expected})
            }
            Call::Delete => json!({"cmd": "delr", "key": name}),
            Call::WriteUnder { lock, token, value } => {
                json!({"cmd": "setr", "key": name, "val": &**value, "direct": true,
                       "fence": {"lock": &**lock, "token": token}})
            }
            Call::Read => json!({"cmd": "getr", "key": name}),
        };
        let Some(mut line) = self.line() else { return false };
        let operation = Operation::new(self.number, Text::clone(key), call, self.now());
        let patience = match operation.call {
            Call::Read => READ_PATIENCE,
            _ => WRITE_PATIENCE,
        };
        let answer = line.call(&request, Instant::now() + patience);
        let now = self.now();
        let operation = match answer {
            Ok(body) => {
                let server = line.address;
                if self.rng.random_ratio(49, 50) {
                    self.line = Some(line);
                }
                let reply: Value = serde_json::from_slice(&body).unwrap_or_default();
                match outcome_of(&operation.call, &reply) {
                    Ok(Some(outcome)) => {
                        match &outcome {
                            Outcome::Found { version, .. } => {
                                self.known = Some((Text::clone(key), *version));
                            }
                            Outcome::Missing => self.known = Some((Text::clone(key), None)),
                            _ => {}
                        }
                        operation.ended(now, outcome)
                    }
                    Ok(None) => operation,
                    Err(()) => {
                        self.seen.strange.push(format!("{request} to {server}: {reply}"));
                        operation
                    }
                }
            }
            Err(CallFailure::NotSent(_)) => operation.ended(now, Outcome::Refused),
            Err(CallFailure::Closed | CallFailure::Lost(_)) => operation,
        };
        let served = !matches!(operation.end, None | Some((_, Outcome::Refused)));
        self.seen.history.push(operation);
        served
    }

    /// A connection to some server.
    fn line(&mut self) -> Option<Caller> {
        if let Some(line) = self.line.take() {
            return Some(line);
        }
        let servers = self.shared.servers.lock().unwrap().clone();
        let which = match self.stays() {
            true => usize::try_from(self.number).unwrap() / 2 % servers.len(),
            false => self.rng.random_range(0..servers.len()),
        };
        Caller::connect(servers[which], Instant::now() + CONNECT_PATIENCE).ok()
    }
}

/// What an answer says; none if nothing is known by it.
fn outcome_of(call: &Call, reply: &Value) -> Result<Option<Outcome>, ()> {
    match reply["reason"].as_str() {
        Some("unavailable") => return Ok(Some(Outcome::Refused)),
        Some("unknown_outcome") => return Ok(None),
        Some("conflict") => return Ok(Some(Outcome::Mismatch { found: None })),
        Some(_) => return Err(()),
        None => {}
    }
    let version = || serde_json::from_value::<Version>(reply["version"].clone()).map_err(|_| ());
    match (call, reply["status"].as_str()) {
        (Call::Write { .. } | Call::CompareAndSet { .. } | Call::Delete, Some("ok")) => {
            Ok(Some(Outcome::Done { version: Some(version()?) }))
        }
        (Call::Read | Call::Delete, Some("not_found")) => Ok(Some(Outcome::Missing)),
        (Call::Read, Some("ok")) => {
            let value = reply["value"].as_str().ok_or(())?.into();
            Ok(Some(Outcome::Found { value, version: Some(version()?) }))
        }
        _ => Err(()),
    }
}
