//! Locks at the leader: whose time runs out, and who waits for an answer.
//!
//! A place in the queue of a lock that has a time to live is given up when nothing
//! was heard of its requestor for so long; as with the leases of servers, the time
//! is counted from when a sign of life was *received*, with a margin for the clocks,
//! so whoever counts from when it was *sent* has stopped before. To ask for the lock
//! again is such a sign, and so is `lock_keep`. It is not in the log; a leader that
//! begins to lead gives every place its full time.
//!
//! Whoever asks with a wait is answered when the lock is granted, or when the wait
//! is over; while it waits it is alive, as far as anybody can tell, so it may wait
//! for half of its time to live at most.

use super::leases::margin;
use super::{Asker, Effect, Leader, MAX_WATCH_MS, MAX_WATCHERS};
use crate::machine::Time;
use crate::view::Token;
use crate::view::locks::{Grant, Place};
use crate::view::messages::{
    ListedLock, ListedPlace, LockCall, LockKeep, LockList, MAX_LISTED, ViewReply,
};
use crate::view::state::{Change, State};
use crate::wire::{Identity, Refusal};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// One requestor's place in the queue of one lock.
type Key = (String, Identity);

/// When places are given up.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    ends: BTreeMap<Key, Time>,
    in_order: BTreeSet<(Time, Key)>,
}

impl Deadlines {
    /// Every place of `state` has its full time from `now` on.
    pub(super) fn full(now: Time, state: &State) -> Self {
        let mut deadlines = Self::default();
        for (lock, queue) in state.locks().list(None) {
            for place in queue {
                if let Some(ttl) = ttl_of(place) {
                    deadlines.set((lock.to_owned(), place.requestor.clone()), now + margin(ttl));
                }
            }
        }
        deadlines
    }

    /// Everybody has so much more time.
    pub(super) fn put_off(&mut self, span: Duration) {
        self.ends.values_mut().for_each(|end| *end = *end + span);
        self.in_order = self.ends.iter().map(|(key, end)| (*end, key.clone())).collect();
    }

    fn set(&mut self, key: Key, end: Time) {
        self.remove(&key);
        self.in_order.insert((end, key.clone()));
        self.ends.insert(key, end);
    }

    fn remove(&mut self, key: &Key) {
        if let Some(end) = self.ends.remove(key) {
            self.in_order.remove(&(end, key.clone()));
        }
    }

    /// Takes out a place whose time is over at `now`.
    fn take_over(&mut self, now: Time) -> Option<Key> {
        let (_, key) = self.in_order.first().filter(|(end, _)| *end <= now)?.clone();
        self.remove(&key);
        Some(key)
    }
}

fn ttl_of(place: &Place) -> Option<Duration> {
    place.manner.ttl_ms.map(Duration::from_millis)
}

/// One who is answered when it holds the lock, or when its time to wait is over.
#[derive(Debug)]
pub(super) struct Waiter<T> {
    to: T,
    call: LockCall,
    until: Time,
}

impl<T> Waiter<T> {
    /// Its time to wait is over.
    pub(super) fn end_wait(&mut self, now: Time) {
        self.until = now;
    }

    /// Whom to answer.
    pub(super) fn into_asker(self) -> T {
        self.to
    }
}

impl<T> Leader<T> {
    /// Gives up the places whose time is over.
    pub(super) fn expire_locks(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        while let Some((lock, requestor)) = self.kept.take_over(now) {
            let Some(place) = self.place_of(&lock, &requestor) else { continue };
            let token = place.token;
            let note = format!("the lock {lock:?} of {requestor}: no sign of life");
            effects.push(Effect::Note(note));
            let change = Change::LockExpire { lock, requestor, token };
            self.propose(change, Asker::Nobody, effects);
        }
    }

    fn place_of(&self, lock: &str, requestor: &Identity) -> Option<&Place> {
        self.state.locks().queue(lock).find(|place| place.requestor == *requestor)
    }

    /// A change about `lock` and `requestor` is applied. The place may have come
    /// into being, or have turned from waiting into holding before its time was
    /// over: then it has its full time again.
    pub(super) fn watch_place(&mut self, now: Time, lock: &str, requestor: &Identity) {
        let key = (lock.to_owned(), requestor.clone());
        match self.place_of(lock, requestor).and_then(ttl_of) {
            Some(ttl) => self.kept.set(key, now + margin(ttl)),
            None => self.kept.remove(&key),
        }
    }

    /// Somebody asks for a lock, and that is on its way into the log. If it has a place
    /// it lives, and the place is not given up before that is there.
    pub(super) fn hear_of(&mut self, arrived: Time, lock: &str, requestor: &Identity) {
        let key = (lock.to_owned(), requestor.clone());
        let ttl = self.place_of(lock, requestor).and_then(ttl_of);
        if let Some(ttl) = ttl.filter(|_| self.kept.ends.contains_key(&key)) {
            self.kept.set(key, arrived + margin(ttl));
        }
    }

    /// Answers one who has asked for a lock, or lets it wait.
    pub(super) fn answer_lock(
        &mut self,
        now: Time,
        to: T,
        call: LockCall,
        grant: Grant,
        effects: &mut Vec<Effect<T>>,
    ) {
        let wait = call.wait_ms.filter(|_| matches!(grant, Grant::Queued { .. })).unwrap_or(0);
        let wait = call.manner().ttl_ms.map_or(wait, |ttl| wait.min(ttl / 2)).min(MAX_WATCH_MS);
        if wait == 0 || self.waiters.len() >= MAX_WATCHERS {
            return effects.push(Effect::Reply { to, reply: grant_reply(grant) });
        }
        let until = now + Duration::from_millis(wait);
        self.waiters.push(Waiter { to, call, until });
    }

    /// Answers those who wait for a lock and hold it by now, or whose time to wait is
    /// over.
    pub(super) fn wake_waiters(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let is_due = |waiter: &Waiter<T>| waiter.until <= now;
        if !std::mem::take(&mut self.locks_changed) && !self.waiters.iter().any(is_due) {
            return;
        }
        for waiter in std::mem::take(&mut self.waiters) {
            match self.state.place_in_queue(&waiter.call) {
                Some(Grant::Queued { .. }) if waiter.until > now => self.waiters.push(waiter),
                Some(grant) => {
                    effects.push(Effect::Reply { to: waiter.to, reply: grant_reply(grant) });
                }
                // It has left the queue meanwhile, or was too late: to ask again is
                // to ask anew.
                None => {
                    let reply = ViewReply::Refused(Refusal::unavailable(
                        "the place in the queue was given up: ask again",
                    ));
                    effects.push(Effect::Reply { to: waiter.to, reply });
                }
            }
        }
    }

    /// The sign of life of one who holds a lock, or waits for it.
    pub(super) fn keep_lock(&mut self, arrived: Time, keep: &LockKeep) -> ViewReply {
        let LockKeep { lockid, requestor, token } = keep;
        let key = (lockid.clone(), requestor.clone());
        let place = self.place_of(lockid, requestor).filter(|place| place.token == *token);
        match place.map(|place| (place.token, ttl_of(place))) {
            // A time that is over is over, even while that is on its way into the log.
            Some((token, Some(ttl))) if self.kept.ends.contains_key(&key) => {
                self.kept.set(key, arrived + margin(ttl));
                kept_reply(token)
            }
            Some((token, None)) => kept_reply(token),
            _ => ViewReply::status("unknown"),
        }
    }

    /// Who holds which lock, and who waits.
    pub(super) fn list_locks(&self, now: Time, list: &LockList) -> ViewReply {
        let (mut locks, mut listed, mut more) = (Vec::new(), 0, false);
        for (lock, queue) in self.state.locks().list(list.after.as_deref()) {
            if listed >= MAX_LISTED {
                more = true;
                break;
            }
            listed += queue.len() + 1;
            let shown = queue.iter().map(|place| {
                let end = self.kept.ends.get(&(lock.to_owned(), place.requestor.clone()));
                ListedPlace {
                    requestor: place.requestor.clone(),
                    token: place.token,
                    shared: place.manner.shared,
                    left_ms: end.map(|end| end.since(now).as_millis() as u64),
                }
            });
            let (holders, waiting) = shown.partition(|place: &ListedPlace| place.token.is_some());
            locks.push(ListedLock { lock: lock.to_owned(), holders, waiting });
        }
        ViewReply::Locks { status: "ok", locks, more }
    }
}

fn kept_reply(token: Option<Token>) -> ViewReply {
    ViewReply::Status { status: "ok", position: None, token }
}

pub(super) fn grant_reply(grant: Grant) -> ViewReply {
    match grant {
        Grant::Granted { token } => {
            ViewReply::Status { status: "granted", position: None, token: Some(token) }
        }
        Grant::Queued { ahead } => {
            ViewReply::Status { status: "retry", position: Some(ahead), token: None }
        }
        Grant::Full => ViewReply::Refused(Refusal::unavailable(
            "too many locks or too many waiting for this one: try again later",
        )),
        Grant::Gone => ViewReply::Refused(Refusal::unavailable(
            "what came of this request, the lock or a place in its queue, has been given up or \
             given back since: ask anew",
        )),
        Grant::OtherManner => ViewReply::Refused(Refusal::invalid(
            "it has this lock, or waits for it, in the other manner, shared or alone: release it \
             first",
        )),
    }
}
