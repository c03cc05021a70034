//! Clients that take locks, keep them or let them run out, and write under their
//! tokens, too early and too late.
//!
//! What must be so, whatever happens meanwhile:
//!
//! * no token comes twice, and one that was asked for after another had been told is
//!   larger;
//! * nobody holds a lock while another one is sure of it: from the answer to a sign of
//!   life until it is given back, or a time to live after that sign was sent;
//! * no fenced write is made that was begun after one with a newer token had been
//!   acknowledged.
//!
//! And what they write is in the history with everything else.

use super::clients::{Clients, Seen, Shared};
use crossbeam_channel::never;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ringleader::kv::operation::{Command, Operation as Asked};
use ringleader::kv::{Text, Version};
use ringleader::net::ask::Asker;
use ringleader::net::call::{CallFailure, Caller};
use ringleader::sim::linearizability::{Call, Operation, Outcome};
use ringleader::view::Token;
use ringleader::view::messages::{LockCall, LockKeep};
use ringleader::wire::{HostPort, Identity};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How many there are.
const LOCKERS: u64 = 6;

/// How many locks they want.
const LOCKS: u64 = 2;

/// After so long without a sign of life a lock is another's.
const TTL: Duration = Duration::from_millis(1500);

/// How long a client tries to get a lock, or to give it back.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it waits for the answer to a write.
const WRITE_PATIENCE: Duration = Duration::from_secs(4);

/// How long a guarded key is in use.
const GENERATION: Duration = Duration::from_secs(20);

/// Their names in the history begin here.
const FIRST_NAME: u64 = 500;

/// One grant, as its holder saw it; times in microseconds.
struct Grant {
    lock: String,
    token: u64,
    asked: u64,
    told: u64,
    /// When it was sure to hold the lock.
    sure: Vec<(u64, u64)>,
}

/// One fenced write that was acknowledged.
struct Write {
    key: Text,
    token: u64,
    began: u64,
    ended: u64,
}

/// What one of them has seen.
#[derive(Default)]
struct Notes {
    grants: Vec<Grant>,
    writes: Vec<Write>,
    fenced: usize,
    kept_in_vain: usize,
    history: Vec<Operation>,
    strange: Vec<String>,
}

/// Those that run.
pub(crate) struct Lockers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Notes>>,
}

impl Lockers {
    /// Starts them beside `clients`, with the same clock and the same servers.
    pub(crate) fn start(clients: &Clients, seed: u64, viewleaders: Vec<SocketAddrV4>) -> Self {
        let shared = Arc::clone(&clients.shared);
        let threads = (0..LOCKERS).map(|number| {
            let rng = StdRng::seed_from_u64(seed.wrapping_mul(7919).wrapping_add(number));
            let host =
                |at: &SocketAddrV4| HostPort { host: at.ip().to_string(), port: Some(at.port()) };
            let viewleaders = viewleaders.iter().map(host).collect();
            let asker = Asker { servers: Vec::new(), viewleaders, timeout: PATIENCE };
            let (shared, notes) = (Arc::clone(&shared), Notes::default());
            let locker = Locker { number, rng, shared, asker, tries: 0, writes: 0, notes };
            thread::spawn(move || locker.work())
        });
        let threads = threads.collect();
        Self { shared, threads }
    }

    /// Ends them, and says what was wrong.
    pub(crate) fn end(self) -> Locked {
        self.shared.end.store(true, Ordering::Relaxed);
        let mut all = Notes::default();
        for thread in self.threads {
            let notes = thread.join().expect("a client that does not panic");
            all.grants.extend(notes.grants);
            all.writes.extend(notes.writes);
            all.fenced += notes.fenced;
            all.kept_in_vain += notes.kept_in_vain;
            all.history.extend(notes.history);
            all.strange.extend(notes.strange);
        }
        all.strange.extend(wrong_tokens(&all.grants));
        all.strange.extend(held_twice(&all.grants));
        all.strange.extend(late_writes(&all.writes));
        Locked(all)
    }
}

/// What has come of it.
pub(crate) struct Locked(Notes);

impl Locked {
    /// Puts it with the rest.
    pub(crate) fn add_to(self, seen: &mut Seen) {
        let Notes { grants, writes, fenced, kept_in_vain, history, strange } = self.0;
        seen.under_locks = format!(
            "{} locks granted, {} kept in vain; {} fenced writes made, {fenced} kept out",
            grants.len(),
            kept_in_vain,
            writes.len(),
        );
        seen.history.extend(history);
        seen.strange.extend(strange);
    }
}

/// Tokens that came twice, or went back.
fn wrong_tokens(grants: &[Grant]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut by_token: Vec<&Grant> = grants.iter().collect();
    by_token.sort_by_key(|grant| grant.token);
    for pair in by_token.windows(2).filter(|pair| pair[0].token == pair[1].token) {
        wrong.push(format!("the token {} came twice, for {}", pair[0].token, pair[1].lock));
    }
    // From the newest token down: nobody before may have asked after it was told.
    let mut last_told = u64::MAX;
    let mut newest = 0;
    for grant in by_token.iter().rev() {
        if grant.asked > last_told {
            wrong.push(format!("the token {} came after {newest}", grant.token));
        }
        if grant.told < last_told {
            (last_told, newest) = (grant.told, grant.token);
        }
    }
    wrong
}

/// Locks of which two were sure at one moment.
fn held_twice(grants: &[Grant]) -> Vec<String> {
    let mut sure: BTreeMap<&str, Vec<(u64, u64, u64)>> = BTreeMap::new();
    for Grant { lock, token, sure: spans, .. } in grants {
        let spans = spans.iter().map(|(from, to)| (*from, *to, *token));
        sure.entry(lock).or_default().extend(spans);
    }
    let mut wrong = Vec::new();
    for (lock, mut spans) in sure {
        spans.sort_unstable();
        let mut last: Option<(u64, u64)> = None;
        for (from, to, token) in spans {
            if let Some((until, other)) = last
                && other != token
                && from < until
            {
                wrong.push(format!("{lock} is held under {other} and under {token}"));
            }
            if last.is_none_or(|(until, _)| until < to) {
                last = Some((to, token));
            }
        }
    }
    wrong
}

/// Writes that were made after one with a newer token.
fn late_writes(writes: &[Write]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut by_key: BTreeMap<&str, Vec<&Write>> = BTreeMap::new();
    for write in writes {
        by_key.entry(&write.key).or_default().push(write);
    }
    for (key, mut writes) in by_key {
        writes.sort_by_key(|write| std::cmp::Reverse(write.token));
        let (mut first_end, mut newest) = (u64::MAX, 0);
        for write in writes {
            if write.token < newest && write.began > first_end {
                wrong.push(format!("{key} was written under {} after {newest}", write.token));
            }
            if write.ended < first_end {
                (first_end, newest) = (write.ended, write.token);
            }
        }
    }
    wrong
}

struct Locker {
    number: u64,
    rng: StdRng,
    shared: Arc<Shared>,
    asker: Asker,
    tries: u64,
    writes: u64,
    notes: Notes,
}

impl Locker {
    fn work(mut self) -> Notes {
        while !self.shared.end.load(Ordering::Relaxed) {
            let lock = format!("lock {}", self.rng.random_range(0..LOCKS));
            self.tries += 1;
            // Somebody else each time: a grant is never one that was given before.
            let who = Identity::text(format!("locker {}.{}", self.number, self.tries));
            let call = LockCall {
                request: Some(self.rng.random()),
                ttl_ms: Some(TTL.as_millis() as u64),
                wait_ms: Some(500),
                ..LockCall::new(lock.clone(), who.clone())
            };
            let asked = self.shared.now();
            let reply = self.ask(Command::LockGet(call.clone()));
            let told = self.shared.now();
            if let Some(token) = reply["token"].as_u64() {
                self.notes.grants.push(Grant { lock, token, asked, told, sure: Vec::new() });
                self.hold(&call, token);
            }
        }
        self.notes
    }

    fn ask(&self, command: Command) -> Value {
        let conclusion = self.asker.run(Asked::new(command), &never(), |_| {});
        let reply = conclusion.reply.and_then(|reply| serde_json::from_str(&reply).ok());
        reply.unwrap_or_default()
    }

    /// Holds the lock for a while, as one who has it and sometimes has not.
    fn hold(&mut self, call: &LockCall, token: u64) {
        for _ in 0..self.rng.random_range(0..4) {
            if self.rng.random_ratio(1, 2) {
                self.keep(call, token);
            }
            // Now and then longer than it may.
            let longest = if self.rng.random_ratio(1, 8) { 2500 } else { 60 };
            let rest = self.rng.random_range(0..longest);
            thread::sleep(Duration::from_millis(rest));
            self.write(&call.lockid, token);
        }
        // One in eight goes away without a word.
        if self.rng.random_ratio(7, 8) {
            let now = self.shared.now();
            let grant = self.notes.grants.last_mut().expect("the one that is held");
            for (_, until) in &mut grant.sure {
                *until = now.min(*until);
            }
            let request = call.request.map(|number| number.wrapping_add(1));
            self.ask(Command::LockRelease(LockCall { request, ..call.clone() }));
        }
        // A write that is too late, whoever has the lock by now.
        if self.rng.random_ratio(1, 3) {
            self.write(&call.lockid, token);
        }
    }

    fn keep(&mut self, call: &LockCall, token: u64) {
        let keep = LockKeep {
            lockid: call.lockid.clone(),
            requestor: call.requestor.clone(),
            token: Some(Token(token)),
        };
        let sent = self.shared.now();
        let reply = self.ask(Command::LockKeep(keep));
        let told = self.shared.now();
        let until = sent + TTL.as_micros() as u64;
        match reply["status"].as_str() {
            // It may have been sent again meanwhile: each of them is a sign of life.
            Some("ok") if told < until => {
                let grant = self.notes.grants.last_mut().expect("the one that is held");
                grant.sure.push((told, until));
            }
            Some("unknown") => self.notes.kept_in_vain += 1,
            _ => {}
        }
    }

    /// A write under the token.
    fn write(&mut self, lock: &str, token: u64) {
        self.writes += 1;
        let generation = self.shared.origin.elapsed().as_secs() / GENERATION.as_secs();
        let key: Text = format!("guarded by {lock}, {generation}").into();
        let value: Text = format!("locker {}.{}", self.number, self.writes).into();
        let request = json!({
            "cmd": "setr", "key": &*key, "val": &*value, "direct": true,
            "fence": {"lock": lock, "token": token},
        });
        let servers = self.shared.servers.lock().unwrap().clone();
        let server = servers[self.rng.random_range(0..servers.len())];
        let deadline = Instant::now() + WRITE_PATIENCE;
        let Ok(mut line) = Caller::connect(server, deadline) else { return };
        let began = self.shared.now();
        let name = FIRST_NAME + self.number;
        let call = Call::Write { value };
        let operation = Operation::new(name, Text::clone(&key), call, began);
        let answer = line.call(&request, deadline);
        let ended = self.shared.now();
        let operation = match answer {
            Err(CallFailure::NotSent(_)) => operation.ended(ended, Outcome::Refused),
            Err(CallFailure::Closed | CallFailure::Lost(_)) => operation,
            Ok(body) => {
                let reply: Value = serde_json::from_slice(&body).unwrap_or_default();
                let version = serde_json::from_value::<Version>(reply["version"].clone()).ok();
                match (reply["status"].as_str(), reply["reason"].as_str()) {
                    (Some("ok"), _) => {
                        self.notes.writes.push(Write { key, token, began, ended });
                        operation.ended(ended, Outcome::Done { version })
                    }
                    (_, Some("fenced")) => {
                        self.notes.fenced += 1;
                        operation.ended(ended, Outcome::Refused)
                    }
                    (_, Some("unavailable")) => operation.ended(ended, Outcome::Refused),
                    (_, Some("unknown_outcome")) => operation,
                    _ => {
                        self.notes.strange.push(format!("{request} to {server}: {reply}"));
                        operation
                    }
                }
            }
        };
        self.notes.history.push(operation);
    }
}
