//! The viewleader as a machine: leases, the clock, and everything it answers.
//!
//! A server's lease runs, for the viewleader, from the moment its heartbeat was
//! *received*, and somewhat longer than was asked for; for the server it runs
//! from the moment the heartbeat was *sent*. As long as the two clocks' rates
//! differ by less than [`DRIFT_PER_MILLE`], a server has stopped trusting its
//! lease before anybody else is given its role.

use super::locks::{Grant, Locks};
use super::messages::{
    Beat, Heartbeat, HeartbeatReply, LockCall, Okay, QueryView, Report, ViewAnswer, ViewReply,
    ViewRequest,
};
use super::state::{MAX_MEMBERS, State};
use super::{Dialect, Member, Revision, View};
use crate::kv::ring::Point;
use crate::machine::{Machine, Time};
use crate::wire::{Identity, Refusal};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

/// The lease of a server that names none: the original's.
pub const ORIGINAL_LEASE: Duration = Duration::from_secs(30);

/// The shortest lease that is granted.
pub const MIN_LEASE: Duration = Duration::from_millis(500);

/// The longest lease that is granted.
pub const MAX_LEASE: Duration = Duration::from_secs(300);

/// By how much two clocks' rates may differ: thousandths of a lease that the
/// viewleader waits longer than the server does.
pub const DRIFT_PER_MILLE: u32 = 20;

/// How many requests can wait for the next view at once.
pub const MAX_WATCHERS: usize = 10_000;

/// The longest that a `query_view` waits, in milliseconds.
pub const MAX_WATCH_MS: u64 = 60_000;

/// What can happen to the viewleader. `T` names a request to its shell.
#[derive(Debug)]
pub enum Input<T> {
    /// A request has come.
    Request {
        /// To be given back with the reply.
        from: T,
        /// The address that it came from.
        host: Ipv4Addr,
        /// What is asked.
        request: ViewRequest,
    },
    /// Time has passed.
    Tick,
    /// This process has not run for so long: servers may have called in vain, so
    /// no lease runs out for that.
    Slept(Duration),
    /// The process is about to end: nobody is to be kept waiting.
    Ending,
}

/// What the viewleader asks for. In any order.
#[derive(Debug)]
pub enum Effect<T> {
    /// Answer the request `to`.
    Reply {
        /// Which request.
        to: T,
        /// The answer.
        reply: ViewReply,
    },
    /// Something worth a line in the log.
    Note(String),
}

#[derive(Debug)]
struct Watcher<T> {
    to: T,
    after: Revision,
    until: Time,
}

/// The viewleader.
#[derive(Debug)]
pub struct Leader<T> {
    state: State,
    /// When each member's lease runs out for certain.
    leases: BTreeMap<Identity, Time>,
    locks: Locks,
    watchers: Vec<Watcher<T>>,
    /// The view as it was last shown, shared by all who ask for it.
    shown: Arc<View>,
}

impl<T> Default for Leader<T> {
    fn default() -> Self {
        Self {
            state: State::default(),
            leases: BTreeMap::new(),
            locks: Locks::default(),
            watchers: Vec::new(),
            shown: Arc::default(),
        }
    }
}

impl<T> Machine for Leader<T> {
    type Input = Input<T>;
    type Effect = Effect<T>;

    fn step(&mut self, now: Time, input: Input<T>, effects: &mut Vec<Effect<T>>) {
        if let Input::Slept(span) = input {
            self.leases.values_mut().for_each(|end| *end = *end + span);
        }
        // Before anything else, so that no reply depends on when a tick came.
        self.expire(now, effects);
        if matches!(input, Input::Ending) {
            self.watchers.iter_mut().for_each(|watcher| watcher.until = now);
        }
        if let Input::Request { from, host, request } = input {
            let reply = match request {
                ViewRequest::Heartbeat(beat) => self.heartbeat(now, host, beat, effects),
                ViewRequest::QueryServers {} => ViewReply::Servers {
                    result: self.view().members.iter().map(|m| (m.address, m.hash)).collect(),
                    epoch: self.view().epoch,
                },
                ViewRequest::QueryView(query) => return self.query_view(now, from, query, effects),
                ViewRequest::Report(report) => self.report(&report),
                ViewRequest::LockGet(call) => self.lock_get(&call),
                ViewRequest::LockRelease(call) => self.lock_release(&call),
            };
            effects.push(Effect::Reply { to: from, reply });
        }
        self.show(effects);
        self.wake(now, effects);
    }
}

impl<T> Leader<T> {
    fn view(&self) -> &View {
        self.state.view()
    }

    /// Puts out every member whose lease has run out.
    fn expire(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let over = self.leases.iter().filter(|(_, end)| **end <= now);
        for id in over.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
            self.leases.remove(&id);
            let address = self.view().member(&id).map(|member| member.address);
            self.state.expel(&id);
            if let Some(address) = address {
                effects.push(Effect::Note(format!(
                    "{address} ({id}) is out: its lease has run out; {}",
                    self.view().epoch
                )));
            }
        }
    }

    fn heartbeat(
        &mut self,
        now: Time,
        host: Ipv4Addr,
        beat: Heartbeat,
        effects: &mut Vec<Effect<T>>,
    ) -> ViewReply {
        let answer = |status, epoch, lease_ms| {
            ViewReply::Heartbeat(HeartbeatReply { status, epoch, lease_ms })
        };
        if self.state.is_denied(&beat.requestor) {
            return answer(Beat::Deny, None, None);
        }
        if beat.seen.is_some_and(|seen| seen > self.view().revision) {
            return ViewReply::Refused(Refusal::unavailable(format!(
                "this viewleader is at revision {} and you have seen a newer one: it has lost its \
                 state, or it is not yours; start the server again to join it as a new one",
                self.view().revision.0
            )));
        }
        let address = beat.address.unwrap_or(SocketAddrV4::new(host, beat.port));
        let id = beat.requestor;
        let taken =
            self.view().members.iter().any(|other| other.address == address && other.id != id);
        if taken {
            return answer(Beat::Retry, Some(self.view().epoch), None);
        }
        if self.view().member(&id).is_some() {
            self.state.move_to(&id, address);
        } else if self.view().members.len() >= MAX_MEMBERS {
            return ViewReply::Refused(Refusal::unavailable(format!(
                "there are {MAX_MEMBERS} servers already: no more can join"
            )));
        } else {
            let hash = Point::of(id.as_str());
            let dialect =
                if beat.lease_ms.is_some() { Dialect::Ringleader } else { Dialect::Original };
            self.state.join(Member { id: id.clone(), address, hash, dialect });
            effects.push(Effect::Note(format!(
                "{address} ({id}) is in, at {hash}; {}",
                self.view().epoch
            )));
        }
        let lease = beat.lease_ms.map_or(ORIGINAL_LEASE, |wanted| {
            Duration::from_millis(wanted).clamp(MIN_LEASE, MAX_LEASE)
        });
        self.leases.insert(id, now + lease + lease * DRIFT_PER_MILLE / 1000);
        let granted = beat.lease_ms.map(|_| lease.as_millis() as u64);
        answer(Beat::Ok, Some(self.view().epoch), granted)
    }

    fn report(&mut self, report: &Report) -> ViewReply {
        for (start, version) in &report.ready {
            self.state.is_ready(&report.requestor, *start, *version);
        }
        for (start, version) in &report.established {
            self.state.is_established(&report.requestor, *start, *version);
        }
        ViewReply::status("ok")
    }

    fn lock_get(&mut self, call: &LockCall) -> ViewReply {
        match self.locks.get(&call.lockid, &call.requestor) {
            Grant::Granted => ViewReply::status("granted"),
            Grant::Queued { ahead } => ViewReply::Status { status: "retry", position: Some(ahead) },
            Grant::Full => ViewReply::Refused(Refusal::unavailable(
                "too many locks or too many waiting for this one: try again later",
            )),
        }
    }

    fn lock_release(&mut self, call: &LockCall) -> ViewReply {
        let known = self.locks.release(&call.lockid, &call.requestor);
        ViewReply::status(if known { "ok" } else { "unknown" })
    }

    fn query_view(&mut self, now: Time, from: T, query: QueryView, effects: &mut Vec<Effect<T>>) {
        self.show(effects);
        let wait = query.wait_ms.unwrap_or(0).min(MAX_WATCH_MS);
        let news = query.after.is_none_or(|after| self.view().revision > after);
        match query.after {
            Some(after) if !news && wait > 0 && self.watchers.len() < MAX_WATCHERS => {
                let until = now + Duration::from_millis(wait);
                self.watchers.push(Watcher { to: from, after, until });
            }
            _ => effects.push(Effect::Reply { to: from, reply: self.answer() }),
        }
        self.wake(now, effects);
    }

    fn answer(&self) -> ViewReply {
        ViewReply::View(ViewAnswer { status: Okay::Ok, view: Arc::clone(&self.shown) })
    }

    /// Makes a changed view the one that is shown.
    fn show(&mut self, effects: &mut Vec<Effect<T>>) {
        if self.shown.revision == self.view().revision {
            return;
        }
        let before = std::mem::replace(&mut self.shown, Arc::new(self.state.view().clone()));
        for group in self.shown.groups.iter().filter(|group| group.is_lost()) {
            let known = before.groups.iter().any(|old| old.start == group.start && old.is_lost());
            if !known {
                effects.push(Effect::Note(format!(
                    "the arc from {} on is lost: {:?} held it last",
                    group.start, group.held_by
                )));
            }
        }
        if self.shown.is_at_rest() && !before.is_at_rest() {
            effects.push(Effect::Note(format!(
                "every group is at its target; {}",
                self.shown.revision
            )));
        }
    }

    /// Answers those who wait for a view, when there is one or their time is up.
    fn wake(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let revision = self.shown.revision;
        let waiting = std::mem::take(&mut self.watchers);
        for watcher in waiting {
            if revision > watcher.after || watcher.until <= now {
                effects.push(Effect::Reply { to: watcher.to, reply: self.answer() });
            } else {
                self.watchers.push(watcher);
            }
        }
    }
}
