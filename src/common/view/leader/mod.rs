//! The viewleader as a machine: leases, the clock, and everything it answers.
//!
//! # Changes
//! Whatever must outlive this process is a [`Change`] of the [`State`]. A change
//! is first appended to the log ([`Effect::Append`]) and applied when the shell
//! says that it is there to stay ([`Input::Committed`]); only then it is
//! answered, and only then anybody sees it. So a viewleader that is killed at any
//! instant comes back with everything that it has ever told.
//!
//! # Leases
//! Leases are not in the log. A server's lease runs, for the viewleader, from the
//! moment its heartbeat was *received*, and somewhat longer than was asked for;
//! for the server it runs from the moment the heartbeat was *sent*. As long as
//! the two clocks' rates differ by less than [`DRIFT_PER_MILLE`], a server has
//! stopped trusting its lease before anybody else is given its role. A viewleader
//! that has just started gives every member one full lease.
//!
//! Members whose leases run out at about the same time are put out together: see
//! `leases.rs`.
//!
//! # Rebalancing
//! When the groups are not at their target, the machine asks for a worker, a
//! thread of the shell that is called `rebalancing_f` after a failure and
//! `rebalancing_a` after an addition. It takes the lock `rebalancing`, lets the
//! groups advance whenever there is something new, and is done when all are at
//! rest. Workers follow each other: each waits for the lock in its turn.

mod leases;
mod rebalancing;

pub use leases::{DRIFT_PER_MILLE, MAX_LEASE, MIN_LEASE, ORIGINAL_LEASE};
pub use rebalancing::{Cause, REBALANCING, Worker};

use leases::{lease_of, margin};
use rebalancing::Rebalance;

use super::locks::Grant;
use super::messages::{
    Beat, Heartbeat, LockCall, Okay, Progress, QueryView, Report, ViewAnswer, ViewReply,
    ViewRequest,
};
use super::state::{Change, MAX_MEMBERS, Outcome, State};
use super::{Dialect, Member, Revision, View};
use crate::machine::{Machine, Time};
use crate::wire::{Identity, Refusal};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

/// How many requests can wait for the next view at once.
pub const MAX_WATCHERS: usize = 10_000;

/// The longest that a `query_view` waits, in milliseconds.
pub const MAX_WATCH_MS: u64 = 60_000;

/// How many changes can be on their way into the log; beyond it, requests are
/// refused.
pub const MAX_PROPOSED: usize = 10_000;

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
    /// The first changes that were appended and not yet committed, up to this
    /// one, are in the log to stay.
    Committed {
        /// The index of the last one.
        index: u64,
    },
    /// A rebalancing worker asks what to do.
    Work(Worker),
    /// Time has passed.
    Tick,
    /// This process has not run for so long: servers may have called in vain, so
    /// no lease runs out for that.
    Slept(Duration),
    /// The process is about to end: nobody is to be kept waiting.
    Ending,
}

/// What the viewleader asks for. Appends are to be done in their order; anything
/// else in any order.
#[derive(Debug)]
pub enum Effect<T> {
    /// Answer the request `to`.
    Reply {
        /// Which request.
        to: T,
        /// The answer.
        reply: ViewReply,
    },
    /// Append a change to the log, and say so with [`Input::Committed`].
    Append {
        /// Its place in the log.
        index: u64,
        /// The change.
        change: Change,
    },
    /// Start a thread that asks [`Input::Work`] now and then, until it is told
    /// that it is done.
    StartWorker(Worker),
    /// This worker is done. Its line, if it has one, is to be printed.
    WorkerDone(Worker, Option<String>),
    /// Something worth a line in the log.
    Note(String),
}

#[derive(Debug)]
struct Watcher<T> {
    to: T,
    after: Revision,
    until: Time,
}

/// Who waits for a change to be committed.
#[derive(Debug)]
enum Asker<T> {
    /// A server whose heartbeat led to it, and until when its lease runs.
    Heartbeat {
        to: T,
        beat: Heartbeat,
        leased_until: Time,
    },
    /// A client, about a lock or a drain.
    Client(T),
    Nobody,
}

/// The viewleader.
#[derive(Debug)]
pub struct Leader<T> {
    state: State,
    /// When each member's lease runs out for certain.
    leases: BTreeMap<Identity, Time>,
    /// Members whose expulsion is on its way into the log.
    expelling: BTreeSet<Identity>,
    /// Changes on their way into the log, in order.
    proposed: VecDeque<(u64, Change, Asker<T>)>,
    last_index: u64,
    watchers: Vec<Watcher<T>>,
    /// The view as it was last shown, shared by all who ask for it.
    shown: Arc<View>,
    workers: BTreeSet<Worker>,
    last_worker: u64,
    /// The revision at which groups were last let advance.
    advanced: Revision,
    /// What each server has reported last of what it fetches.
    progress: BTreeMap<Identity, Progress>,
    rebalance: Rebalance,
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
        match input {
            Input::Request { from, host, request } => {
                self.request(now, from, host, request, effects);
            }
            Input::Committed { index } => self.committed(index, effects),
            Input::Work(worker) => self.work(now, worker, effects),
            Input::Ending => self.watchers.iter_mut().for_each(|watcher| watcher.until = now),
            Input::Tick | Input::Slept(_) => {}
        }
        self.show(effects);
        self.wake(now, effects);
    }
}

impl<T> Leader<T> {
    /// The viewleader that goes on with `state`, in which the log ends with the
    /// change `last_index`.
    pub fn new(now: Time, state: State, last_index: u64) -> Self {
        let full = |member: &Member| (member.id.clone(), now + margin(lease_of(member)));
        Self {
            leases: state.view().members.iter().map(full).collect(),
            shown: Arc::default(),
            state,
            expelling: BTreeSet::new(),
            proposed: VecDeque::new(),
            last_index,
            watchers: Vec::new(),
            workers: BTreeSet::new(),
            last_worker: last_index,
            advanced: Revision(0),
            progress: BTreeMap::new(),
            rebalance: Rebalance { ended: Some(now), ..Rebalance::default() },
        }
    }

    /// The index of the last change that is applied.
    pub fn applied(&self) -> u64 {
        self.proposed.front().map_or(self.last_index, |(index, ..)| index - 1)
    }

    /// What would have to be kept if the log were cut here: the state, and the
    /// index of the last change in it.
    pub fn snapshot(&self) -> (u64, State) {
        (self.applied(), self.state.clone())
    }

    fn view(&self) -> &View {
        self.state.view()
    }

    fn request(
        &mut self,
        now: Time,
        from: T,
        host: Ipv4Addr,
        request: ViewRequest,
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.proposed.len() >= MAX_PROPOSED {
            let refusal = Refusal::unavailable("the viewleader is overloaded: try again later");
            return effects.push(Effect::Reply { to: from, reply: ViewReply::Refused(refusal) });
        }
        let reply = match request {
            ViewRequest::Heartbeat(beat) => return self.heartbeat(now, from, host, beat, effects),
            ViewRequest::QueryView(query) => return self.query_view(now, from, query, effects),
            ViewRequest::QueryServers {} => ViewReply::Servers {
                result: self.view().members.iter().map(|m| (m.address, m.hash)).collect(),
                epoch: self.view().epoch,
            },
            ViewRequest::Report(report) => {
                self.report(report, effects);
                ViewReply::status("ok")
            }
            ViewRequest::RebalanceStatus {} => ViewReply::Rebalance(self.rebalance_status(now)),
            ViewRequest::Status {} => ViewReply::Health(self.view().health(|id| {
                let left = self.leases.get(id).map(|end| end.since(now));
                left.unwrap_or_default().as_millis() as u64
            })),
            ViewRequest::LockGet(call) => match self.known_place(&call) {
                Some(grant) => grant_reply(grant),
                None => {
                    return self.propose(Change::LockGet(call), Asker::Client(from), effects);
                }
            },
            ViewRequest::LockRelease(call) => {
                return self.propose(Change::LockRelease(call), Asker::Client(from), effects);
            }
            ViewRequest::Drain(drain) => {
                let change = Change::Drain(drain.server);
                return self.propose(change, Asker::Client(from), effects);
            }
        };
        effects.push(Effect::Reply { to: from, reply });
    }

    /// Where the requestor of a lock stands already, if nothing that is on its way
    /// into the log can change it.
    fn known_place(&self, call: &LockCall) -> Option<Grant> {
        self.proposed.is_empty().then(|| self.state.place_in_queue(call)).flatten()
    }

    fn propose(&mut self, change: Change, asker: Asker<T>, effects: &mut Vec<Effect<T>>) {
        self.last_index += 1;
        self.proposed.push_back((self.last_index, change.clone(), asker));
        effects.push(Effect::Append { index: self.last_index, change });
    }

    /// Applies the changes up to `index`, and answers those who wait for them.
    fn committed(&mut self, index: u64, effects: &mut Vec<Effect<T>>) {
        while self.proposed.front().is_some_and(|(first, ..)| *first <= index) {
            let Some((_, change, asker)) = self.proposed.pop_front() else { return };
            self.tell(&change, effects);
            if let Change::Expel(ids) = &change {
                self.expelling.retain(|id| !ids.contains(id));
            }
            let outcome = self.state.apply(change);
            let view = self.state.view();
            self.leases.retain(|id, _| view.member(id).is_some());
            match asker {
                Asker::Nobody => {}
                Asker::Client(to) => {
                    effects.push(Effect::Reply { to, reply: outcome_reply(outcome) });
                }
                Asker::Heartbeat { to, beat, leased_until } => {
                    let reply = match outcome {
                        Outcome::Taken => self.beat_reply(Beat::Retry, &beat),
                        Outcome::Denied => self.beat_reply(Beat::Deny, &beat),
                        Outcome::Full => ViewReply::Refused(Refusal::unavailable(format!(
                            "there are {MAX_MEMBERS} servers already: no more can join"
                        ))),
                        _ => {
                            self.leases.insert(beat.requestor.clone(), leased_until);
                            self.beat_reply(Beat::Ok, &beat)
                        }
                    };
                    effects.push(Effect::Reply { to, reply });
                }
            }
        }
    }

    /// Notes a change of membership, and asks for the worker that it needs.
    fn tell(&mut self, change: &Change, effects: &mut Vec<Effect<T>>) {
        let note = match change {
            Change::Join { member, .. } if self.view().member(&member.id).is_none() => {
                format!("{} ({}) joins, at {}", member.address, member.id, member.hash)
            }
            Change::Restart { id, start } => format!("{id} goes on: its start {}", start.count),
            Change::Expel(ids) => {
                let names = ids.iter().filter_map(|id| self.view().member(id));
                let names: Vec<String> =
                    names.map(|m| format!("{} ({})", m.address, m.id)).collect();
                format!("{} out: no heartbeat for a lease", names.join(", "))
            }
            Change::Drain(address) => format!("{address} is to leave"),
            _ => return,
        };
        effects.push(Effect::Note(note));
        match change {
            Change::Join { member, .. } if member.dialect == Dialect::Original => {}
            Change::Join { .. } => self.start_worker(Cause::Added, effects),
            Change::Expel(_) | Change::Drain(_) => self.start_worker(Cause::Failed, effects),
            _ => {}
        }
    }

    fn report(&mut self, report: Report, effects: &mut Vec<Effect<T>>) {
        let Report { requestor, ready, established, progress } = report;
        self.take_progress(&requestor, progress);
        for (start, version) in ready {
            let change = Change::Ready { id: requestor.clone(), start, version };
            self.propose(change, Asker::Nobody, effects);
        }
        for (start, version) in established {
            let change = Change::Established { id: requestor.clone(), start, version };
            self.propose(change, Asker::Nobody, effects);
        }
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
                let held: Vec<String> =
                    group.held_by.iter().map(|holder| holder.address.to_string()).collect();
                effects.push(Effect::Note(format!(
                    "the arc from {} on is lost; it was held last by {}",
                    group.start,
                    held.join(", ")
                )));
            }
        }
        if before.revision == Revision(0) {
            // Workers of a viewleader that is no more hold nothing.
            for requestor in self.state.waiting_for(REBALANCING) {
                let lockid = REBALANCING.to_owned();
                if requestor.as_str().starts_with(REBALANCING) {
                    let change = Change::LockRelease(LockCall { lockid, requestor });
                    self.propose(change, Asker::Nobody, effects);
                }
            }
        }
        if before.revision == Revision(0) && !self.shown.is_settled() {
            // A viewleader that has just started goes on with what was begun.
            self.start_worker(Cause::Failed, effects);
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

fn grant_reply(grant: Grant) -> ViewReply {
    match grant {
        Grant::Granted => ViewReply::status("granted"),
        Grant::Queued { ahead } => ViewReply::Status { status: "retry", position: Some(ahead) },
        Grant::Full => ViewReply::Refused(Refusal::unavailable(
            "too many locks or too many waiting for this one: try again later",
        )),
    }
}

fn outcome_reply(outcome: Outcome) -> ViewReply {
    match outcome {
        Outcome::Lock(grant) => grant_reply(grant),
        Outcome::Unknown => ViewReply::status("unknown"),
        Outcome::Last => ViewReply::Refused(Refusal::invalid(
            "it is the last server that stays: start another one first",
        )),
        _ => ViewReply::status("ok"),
    }
}
