//! Clients that want locks, and what they do while they hold one.
//!
//! Most ask as our client does: their requests have numbers, they may share, wait, and
//! have a time to live, which they count by their own clock from when they sent their
//! last sign of life. While they hold the lock they write one key under its token, keep
//! the lock alive, and sleep, often for longer than their time, or until right before it
//! is over. Some are *heedless*: they go on writing when their time is over. Some wake
//! without knowing that they hold anything, and ask again, with the number that they have
//! asked with or with another one. Others ask as the original's client does. Those that
//! have a time to live may die at any moment.

use super::super::{Judgement, NEVER, Run};
use super::{Job, State, Step, Task, Trade};
use crate::kv::Text;
use crate::machine::Time;
use crate::sim::linearizability::Call;
use crate::sim::oracle::locks::Claim;
use crate::view::Token;
use crate::view::locks::Manner;
use crate::view::messages::{LockCall, LockKeep};
use crate::wire::Identity;
use rand::RngExt;
use rand::rngs::StdRng;
use serde_json::Value;
use std::time::Duration;

/// How many locks there are.
pub(super) const LOCKS: usize = 2;

/// For how long a lock is held at most, in milliseconds.
const HOLDS_MS: u64 = 2000;

/// How long a time to live is, in milliseconds.
const TTL_MS: std::ops::Range<u64> = 300..4000;

/// A holder with a time to live gives so many signs of life in it.
const SIGNS: u32 = 4;

/// For how long the witness lets its request wait, in milliseconds.
const WITNESS_WAITS_MS: u64 = 1000;

/// How long before the end of its time somebody wakes at the last moment, in milliseconds.
const LAST_MOMENT_MS: std::ops::Range<u64> = 1..50;

/// A wish for a lock, from when somebody first asks until it has left.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    pub(super) lock: String,
    /// Who asks, for the oracle: nobody else ever.
    pub(super) who: String,
    /// Who asks, for the viewleaders.
    requestor: String,
    manner: Manner,
    wait_ms: Option<u64>,
    /// What its request is numbered, if they are.
    pub(super) request: Option<u64>,
    /// The number of the request that gives it back.
    release: Option<u64>,
}

/// A lock that is held, or was until a moment ago.
#[derive(Clone, Debug)]
pub(super) struct Holding {
    wish: Wish,
    token: Token,
    /// When its time is over.
    until: Time,
    /// When the next sign of life is due.
    keep_at: Time,
    /// When it is to be given back.
    ends: Time,
    /// Its holder goes on when the time is over.
    is_heedless: bool,
}

impl Wish {
    pub(super) fn claim(&self) -> Claim<'_> {
        Claim { lock: &self.lock, who: &self.who, shared: self.manner.shared }
    }

    pub(super) fn call(&self) -> LockCall {
        let requestor = Identity::text(self.requestor.clone());
        let Manner { shared, ttl_ms } = self.manner;
        let (request, wait_ms) = (self.request, self.wait_ms);
        LockCall { request, shared, ttl_ms, wait_ms, ..LockCall::new(self.lock.clone(), requestor) }
    }

    pub(super) fn release(&self) -> LockCall {
        LockCall { request: self.release, ..self.call() }
    }

    /// The same, to be given back with another request.
    pub(super) fn released_anew(self, rng: &mut StdRng) -> Self {
        Self { release: self.release.map(|_| rng.random()), ..self }
    }
}

impl Holding {
    pub(super) fn sign_of_life(&self) -> LockKeep {
        let LockCall { lockid, requestor, .. } = self.wish.call();
        LockKeep { lockid, requestor, token: Some(self.token) }
    }
}

impl Run {
    pub(super) fn wish_for_lock(&mut self, client: usize) -> Wish {
        let number = self.clients.all[client].jobs;
        let (rng, deaths) = (&mut self.rng, self.clients.all[client].deaths);
        let lock = format!("lock-{}", rng.random_range(0..LOCKS));
        let who = format!("{client}-{number}");
        if rng.random_bool(0.2) {
            let (requestor, manner) = (who.clone(), Manner::default());
            let (wait_ms, request, release) = (None, None, None);
            return Wish { lock, who, requestor, manner, wait_ms, request, release };
        }
        let ttl_ms = rng.random_bool(0.7).then(|| rng.random_range(TTL_MS));
        Wish {
            lock,
            who,
            requestor: format!("{client}.{deaths}"),
            manner: Manner { shared: rng.random_bool(0.3), ttl_ms },
            // Whoever asks only now and then would lose its place each time.
            wait_ms: (ttl_ms.is_some() || rng.random_bool(0.8))
                .then(|| rng.random_range(100..2000)),
            request: Some(rng.random()),
            release: Some(rng.random()),
        }
    }

    /// To hold the lock of this number for a moment.
    pub(super) fn wish_of_witness(&mut self, client: usize, number: usize) -> Wish {
        let who = format!("{client}-{}", self.clients.all[client].jobs);
        Wish {
            lock: format!("lock-{number}"),
            requestor: who.clone(),
            who,
            manner: Manner::default(),
            wait_ms: Some(WITNESS_WAITS_MS),
            request: Some(self.rng.random()),
            release: Some(self.rng.random()),
        }
    }

    /// When a time to live is over that the client counts from `sent` on.
    fn end_of_time(&self, client: usize, sent: Time, ttl_ms: Option<u64>) -> Time {
        let rate = 1_000_000 + self.clients.all[client].fast_by;
        let micros = |ttl: u64| ttl * 1000 * 1_000_000 / rate as u64;
        ttl_ms.map_or(NEVER, |ttl| sent + Duration::from_micros(micros(ttl)))
    }

    /// The client was told to wait, in answer to what it had sent then.
    pub(super) fn told_to_wait(&mut self, client: usize, wish: &Wish, sent: Time) {
        let until = self.end_of_time(client, sent, wish.manner.ttl_ms);
        let now = self.cluster.now();
        self.clients.told_to_wait = Some(self.locks.waits(now, wish.claim(), until));
    }

    pub(super) fn lock_concluded(
        &mut self,
        client: usize,
        wish: Wish,
        task: &Task,
        reply: &Value,
    ) -> Judgement {
        if reply["status"] != "granted" {
            // It may be in the queue all the same; and what was sent may yet arrive, if
            // only the second time: at whoever leads by then.
            let late = task.was_silent || self.options.weather.twice > 0.0;
            self.then(client, Duration::ZERO, Job::Unlock { wish, late });
            return Ok(());
        }
        // To ask again and again is to ask anew: this is the number that was granted.
        let request = match &task.step {
            Step::Asking { walk, .. } => walk.number(),
            _ => wish.request,
        };
        let wish = Wish { request, ..wish };
        self.tally.granted += 1;
        let token = Token(reply["token"].as_u64().unwrap_or_default());
        let (now, ttl_ms) = (self.cluster.now(), wish.manner.ttl_ms);
        let until = self.end_of_time(client, task.asked_at, ttl_ms);
        if let Err(what) = self.locks.granted(now, wish.claim(), token, until) {
            return self.fails("locks", what);
        }
        let holds = Duration::from_millis(self.rng.random_range(0..HOLDS_MS));
        if self.clients.all[client].trade == Trade::Witness {
            self.then(client, Duration::ZERO, Job::Unlock { wish, late: false });
            return Ok(());
        }
        // Without numbers, what was sent in vain may be heard after the lock is given back.
        if task.was_silent && wish.request.is_none() {
            self.then(client, holds, Job::Unlock { wish, late: true });
            return Ok(());
        }
        let is_heedless = self.rng.random_bool(0.5);
        let (keep_at, ends) = (self.next_sign(task.asked_at, ttl_ms), now + holds);
        let held = Holding { wish, token, until, keep_at, ends, is_heedless };
        self.clients.all[client].held = Some(held);
        self.then(client, Duration::ZERO, Job::Hold);
        Ok(())
    }

    fn next_sign(&self, last: Time, ttl_ms: Option<u64>) -> Time {
        ttl_ms.map_or(NEVER, |ttl| last + Duration::from_millis(ttl) / SIGNS)
    }

    /// Somebody holds a lock, and does the next thing.
    pub(super) fn hold(&mut self, client: usize) -> Judgement {
        let Some(held) = self.clients.all[client].held.clone() else { return Ok(()) };
        let (now, ttl_ms) = (self.cluster.now(), held.wish.manner.ttl_ms);
        if now >= held.ends || now >= held.until && !held.is_heedless {
            self.clients.all[client].held = None;
            return self.begin(client, Job::Unlock { wish: held.wish, late: false });
        }
        if ttl_ms.is_some() && self.rng.random_bool(0.02) {
            let who = &mut self.clients.all[client];
            (who.held, who.deaths) = (None, who.deaths + 1);
            let pause = self.pause(client);
            self.clients.all[client].state = pause;
            return Ok(());
        }
        // In the end nobody keeps others waiting for long.
        if now < self.clients.all[client].stops && self.rng.random_bool(0.15) {
            self.sleep(client, held);
            return Ok(());
        }
        if now >= held.keep_at && now < held.until {
            return self.begin(client, Job::Keep);
        }
        if self.rng.random_bool(0.5) {
            let soon = self.rng.random_range(10..300);
            self.then(client, Duration::from_millis(soon), Job::Hold);
            return Ok(());
        }
        // All who hold a lock write the same key.
        let place = held.wish.lock.len() + usize::from(held.wish.lock.ends_with('1'));
        let key = Text::clone(&self.keys[place % self.keys.len()]);
        let (lock, token) = (Text::from(&*held.wish.lock), held.token);
        let value = self.value(client);
        self.begin(client, Job::Ask { key, call: Call::WriteUnder { lock, token, value } })
    }

    /// Somebody who holds a lock sleeps. It may wake without knowing that it holds it.
    fn sleep(&mut self, client: usize, mut held: Holding) {
        let (now, ttl_ms) = (self.cluster.now(), held.wish.manner.ttl_ms);
        let mut span = self.rng.random_range(0..ttl_ms.unwrap_or(HOLDS_MS) * 3);
        if ttl_ms.is_some() && self.rng.random_bool(0.3) {
            let left = held.until.since(now).as_millis() as u64;
            span = left.saturating_sub(self.rng.random_range(LAST_MOMENT_MS));
        }
        let span = Duration::from_millis(span);
        if held.wish.request.is_some() && self.rng.random_bool(0.3) {
            let wish = held.wish;
            let request = wish.request.filter(|_| self.rng.random_bool(0.5));
            let request = request.or_else(|| Some(self.rng.random()));
            self.clients.all[client].held = None;
            return self.then(client, span, Job::Lock(Wish { request, ..wish }));
        }
        // What it was to do it does later: it does not know that time has passed.
        held.ends = held.ends + span;
        self.clients.all[client].held = Some(held);
        self.then(client, span, Job::Hold);
    }

    pub(super) fn keep_concluded(
        &mut self,
        client: usize,
        task: &Task,
        reply: &Value,
    ) -> Judgement {
        let Some(mut held) = self.clients.all[client].held.take() else { return Ok(()) };
        let (now, ttl_ms) = (self.cluster.now(), held.wish.manner.ttl_ms);
        match reply["status"].as_str() {
            Some("ok") => {
                held.until = held.until.max(self.end_of_time(client, task.asked_at, ttl_ms));
                held.keep_at = self.next_sign(task.asked_at, ttl_ms);
                if let Err(what) = self.locks.kept(now, held.wish.claim(), held.until) {
                    return self.fails("locks", what);
                }
            }
            Some(said) => {
                if now < held.until {
                    let Wish { lock, who, .. } = &held.wish;
                    let left = held.until.since(now);
                    let what = format!("{who} has lost {lock} {left:?} before its time: {said}");
                    return self.fails("locks", what);
                }
                self.locks.leaves(&held.wish.lock, &held.wish.who);
            }
            None => held.keep_at = self.next_sign(now, ttl_ms),
        }
        self.clients.all[client].held = Some(held);
        self.clients.all[client].state =
            State::Idle { next: self.cluster.now(), then: Some(Job::Hold) };
        Ok(())
    }
}
