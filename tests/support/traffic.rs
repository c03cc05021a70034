//! Readers and writers that go on while servers come and go, and know what they
//! have been promised.

use super::keys::{getr, setr, value_of};
use super::process::{PATIENCE, wait_until};
use super::wire::{Connection, Reply};
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long each client rests between two calls: there are few processors here,
/// and what is written will be read from every server.
const REST: Duration = Duration::from_millis(3);

/// Clients at work.
pub(crate) struct Traffic {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

/// What the clients of a [`Traffic`] have seen.
#[derive(Default)]
struct Seen {
    servers: Vec<SocketAddrV4>,
    /// Servers that have been killed: only they may hang up.
    gone: BTreeSet<SocketAddrV4>,
    /// The keys whose writes have been acknowledged.
    acknowledged: Vec<String>,
    /// The keys whose writes may have been made.
    in_doubt: BTreeSet<String>,
    /// What was refused and had not been done.
    refused: Vec<String>,
    /// The register: which one it is, and the last number that was acknowledged.
    register: (u64, u64),
    /// The longest that a key which was asked for could not be read.
    longest_gap: Duration,
    /// Requests that servers which were to go had not answered when they went.
    hung_up: usize,
}

#[derive(Default)]
struct Shared {
    /// Tells these clients' keys from those of others.
    number: usize,
    end: AtomicBool,
    seen: Mutex<Seen>,
}

/// What has come of it.
pub(crate) struct Outcome {
    /// What the clients' keys begin with.
    pub(crate) prefix: String,
    /// The keys that must be there, each with its [`value_of`].
    pub(crate) acknowledged: BTreeSet<String>,
    /// The keys that may be there.
    pub(crate) in_doubt: BTreeSet<String>,
    /// The refusals.
    pub(crate) refused: Vec<String>,
    /// The key of the register that was written last, and the last number that was
    /// acknowledged.
    pub(crate) register: (String, u64),
    /// The longest that a key which was asked for could not be read.
    pub(crate) longest_gap: Duration,
    /// Requests that servers which were to go had not answered when they went.
    pub(crate) hung_up: usize,
}

impl Outcome {
    /// What is found must have been written, and what was acknowledged found.
    pub(crate) fn assert_explains(&self, found: &BTreeSet<String>) {
        let lost = self.acknowledged.difference(found).next();
        assert_eq!(lost, None, "lost; {} were acknowledged", self.acknowledged.len());
        let mut ours = found.iter().filter(|key| key.starts_with(&self.prefix));
        let strange =
            ours.find(|key| !self.acknowledged.contains(*key) && !self.in_doubt.contains(*key));
        assert_eq!(strange, None, "refused, and there all the same");
    }
}

impl Traffic {
    /// Starts two writers, a reader of what they have written, and a writer and
    /// a reader of one register.
    pub(crate) fn start(servers: Vec<SocketAddrV4>) -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let seen = Mutex::new(Seen { servers, ..Seen::default() });
        let shared = Arc::new(Shared { number, end: AtomicBool::new(false), seen });
        let works: [fn(&mut Client); 5] = [
            |client| client.write_keys("first"),
            |client| client.write_keys("second"),
            Client::read_keys,
            Client::write_register,
            Client::read_register,
        ];
        let clients = works.into_iter().enumerate().map(|(index, work)| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || work(&mut Client { shared, server: index, line: None }))
        });
        let clients = clients.collect();
        Self { shared, clients }
    }

    /// The servers that the clients may turn to from now on.
    pub(crate) fn use_servers(&self, servers: Vec<SocketAddrV4>) {
        self.shared.seen.lock().unwrap().servers = servers;
    }

    /// `server` is about to be killed.
    pub(crate) fn expect_gone(&self, server: SocketAddrV4) {
        let mut seen = self.shared.seen.lock().unwrap();
        seen.gone.insert(server);
        seen.servers.retain(|other| *other != server);
    }

    /// Any of `servers` is about to end or to sleep, and will be back.
    pub(crate) fn expect_silence(&self, servers: &[SocketAddrV4]) {
        self.shared.seen.lock().unwrap().gone.extend(servers);
    }

    /// The refusals so far.
    pub(crate) fn refused(&self) -> Vec<String> {
        self.shared.seen.lock().unwrap().refused.clone()
    }

    /// Waits until this many more writes have been acknowledged.
    pub(crate) fn wait_for_writes(&self, count: usize) {
        let acknowledged = || self.shared.seen.lock().unwrap().acknowledged.len();
        let goal = acknowledged() + count;
        wait_until("writers are served", PATIENCE, || {
            self.assert_unharmed();
            (acknowledged() >= goal).then_some(())
        });
    }

    /// # Panics
    /// If a client has seen what it must not.
    fn assert_unharmed(&self) {
        let running = self.clients.iter().filter(|client| !client.is_finished()).count();
        assert_eq!(running, self.clients.len(), "a client has given up; see above");
    }

    /// The keys whose writes have been acknowledged so far.
    pub(crate) fn acknowledged(&self) -> Vec<String> {
        self.shared.seen.lock().unwrap().acknowledged.clone()
    }

    /// Ends the clients.
    ///
    /// # Panics
    /// If one of them has seen what it must not.
    pub(crate) fn end(mut self) -> Outcome {
        self.shared.end.store(true, Ordering::Relaxed);
        for client in std::mem::take(&mut self.clients) {
            client.join().expect("a client that has seen nothing wrong");
        }
        let seen = std::mem::take(&mut *self.shared.seen.lock().unwrap());
        Outcome {
            prefix: self.shared.prefix(),
            acknowledged: seen.acknowledged.into_iter().collect(),
            in_doubt: seen.in_doubt,
            refused: seen.refused,
            register: (self.shared.register(seen.register.0), seen.register.1),
            longest_gap: seen.longest_gap,
            hung_up: seen.hung_up,
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    /// What the writers' keys begin with.
    fn prefix(&self) -> String {
        format!("writer {} ", self.number)
    }

    /// The key of the register `which`.
    fn register(&self, which: u64) -> String {
        format!("register {} {which}", self.number)
    }
}

/// What came of one call.
enum Came {
    Answer(Value),
    /// It was not done.
    Nothing,
    /// It may have been done.
    InDoubt,
}

/// One client: a connection to some server, and to another one when that is gone.
struct Client {
    shared: Arc<Shared>,
    /// Which of the servers it turns to, modulo their number.
    server: usize,
    line: Option<(SocketAddrV4, Connection)>,
}

impl Client {
    fn goes_on(&self) -> bool {
        thread::sleep(REST);
        !self.shared.end.load(Ordering::Relaxed)
    }

    fn seen<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(&mut self.shared.seen.lock().unwrap())
    }

    fn call(&mut self, request: &Value) -> Came {
        let index = self.server;
        let server = self.seen(|seen| seen.servers[index % seen.servers.len()]);
        let (address, mut connection) = match self.line.take() {
            Some(line) => line,
            None => match Connection::open(server) {
                Some(connection) => (server, connection),
                None => {
                    self.server += 1;
                    return Came::Nothing;
                }
            },
        };
        match connection.call(request) {
            Reply::Value(reply) => {
                self.line = Some((address, connection));
                match reply["reason"].as_str() {
                    None => Came::Answer(reply),
                    Some("unavailable") => {
                        self.seen(|seen| seen.refused.push(format!("{request}: {reply}")));
                        Came::Nothing
                    }
                    Some("unknown_outcome") => Came::InDoubt,
                    Some(_) => panic!("{request} through {address}: {reply}"),
                }
            }
            Reply::Closed | Reply::Silent if self.seen(|seen| seen.gone.contains(&address)) => {
                self.server += 1;
                self.seen(|seen| seen.hung_up += 1);
                Came::InDoubt
            }
            other => panic!("{request} through {address}: {other:?}"),
        }
    }

    /// Writes one new key after the other.
    fn write_keys(&mut self, name: &str) {
        for number in 0.. {
            if !self.goes_on() {
                return;
            }
            let key = format!("{}{name} {number}", self.shared.prefix());
            match self.call(&setr(&key, &value_of(&key))) {
                Came::Answer(reply) => {
                    assert_eq!(reply["status"], "ok", "{reply}");
                    self.seen(|seen| seen.acknowledged.push(key));
                }
                Came::InDoubt => self.seen(|seen| assert!(seen.in_doubt.insert(key))),
                Came::Nothing => {}
            }
        }
    }

    /// Reads here and there what has been acknowledged.
    fn read_keys(&mut self) {
        let mut turn = 0;
        while self.goes_on() {
            turn += 7919;
            let key = self.seen(|seen| {
                let count = seen.acknowledged.len().max(1);
                seen.acknowledged.get(turn % count).cloned()
            });
            let Some(key) = key else { continue };
            let asked = Instant::now();
            let reply = loop {
                match self.call(&getr(&key)) {
                    Came::Answer(reply) => break Some(reply),
                    _ if !self.goes_on() => break None,
                    _ => {}
                }
            };
            let gap = asked.elapsed();
            self.seen(|seen| seen.longest_gap = seen.longest_gap.max(gap));
            if let Some(reply) = reply {
                assert_eq!(reply["value"], value_of(&key), "{key} was acknowledged: {reply}");
            }
        }
    }

    /// Writes rising numbers under one key. When one is in doubt it may yet come
    /// at any time: from then on another key is the register.
    fn write_register(&mut self) {
        while self.goes_on() {
            let (register, last) = self.seen(|seen| seen.register);
            let next = last + 1;
            match self.call(&setr(&self.shared.register(register), &next.to_string())) {
                Came::Answer(reply) => {
                    assert_eq!(reply["status"], "ok", "{reply}");
                    self.seen(|seen| seen.register.1 = next);
                }
                Came::InDoubt => self.seen(|seen| seen.register = (register + 1, 0)),
                Came::Nothing => {}
            }
        }
    }

    /// Reads that key: never an older number than was acknowledged before, nor
    /// than was read before.
    fn read_register(&mut self) {
        let mut newest = (0, 0);
        while self.goes_on() {
            let (register, acknowledged) = self.seen(|seen| seen.register);
            if newest.0 != register {
                newest = (register, 0);
            }
            let Came::Answer(reply) = self.call(&getr(&self.shared.register(register))) else {
                continue;
            };
            let value = reply["value"].as_str().unwrap_or("0").parse::<u64>().unwrap();
            let due = acknowledged.max(newest.1);
            assert!(value >= due, "{value} was read from register {register} after {due}");
            newest.1 = value;
        }
    }
}
