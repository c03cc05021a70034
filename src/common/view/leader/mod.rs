//! The viewleader as a machine: leases, the clock, and everything it answers.
//!
//! # Changes
//! Whatever must outlive this process is a [`Change`] of the [`State`]. A change
//! is first appended to the log ([`Effect::Append`]) and applied when the shell
//! says that it is there to stay ([`Input::Committed`]); only then it is
//! answered, and only then anybody sees it. So a viewleader that is killed at any
//! instant comes back with everything that it has ever told.
//!
//! # One at a time
//! Of a group of viewleaders one leads, and this machine is what it does while it
//! leads; [`super::viewleader`] makes one when that begins and takes it apart
//! ([`Leader::retire`]) when it ends. A leader that was cut off or asleep may not
//! know that there is another one by now. A change proves itself: it is committed
//! only by the one who leads. Any other answer waits until a majority has confirmed
//! that this was the leader when the request came ([`Unconfirmed`]). Renewals of leases are such answers, so a lease
//! is never renewed after the next leader has begun to count.
//!
//! # Leases
//! Leases are not in the log. A server's lease runs, for the viewleader, from the
//! moment its heartbeat was *received*, and somewhat longer than was asked for;
//! for the server it runs from the moment the heartbeat was *sent*. As long as
//! the two clocks' rates differ by less than [`DRIFT_PER_MILLE`], a server has
//! stopped trusting its lease before anybody else is given its role. A viewleader
//! that begins to lead gives every member one full lease: whatever was renewed
//! before runs out within it.
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

mod keeping;
mod leases;
mod rebalancing;

pub use leases::{DRIFT_PER_MILLE, MAX_LEASE, MIN_LEASE, ORIGINAL_LEASE};
pub use rebalancing::{Cause, REBALANCING, Worker};

use keeping::{Deadlines, Waiter, grant_reply};
use leases::{lease_of, margin};
use rebalancing::Rebalance;

use super::locks::Grant;
use super::messages::{
    Beat, Heartbeat, LockCall, NumbersAnswer, Okay, Progress, QueryView, Report, ViewAnswer,
    ViewReply, ViewRequest,
};
use super::restoring::{Restore, Step};
use super::state::{Change, MAX_MEMBERS, Outcome, State};
use super::{Dialect, Member, Revision, View};
use crate::consensus::confirming::Unconfirmed;
use crate::consensus::requests::NotLeader;
use crate::machine::{Machine, Time};
use crate::wire::{Identity, Refusal};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

/// How many requests can wait for the next view at once.
pub const MAX_WATCHERS: usize = 10_000;

/// The longest that a `query_view` waits, in milliseconds.
pub const MAX_WATCH_MS: u64 = 60_000;

/// How many changes can be on their way into the log; beyond it, requests are
/// refused.
pub const MAX_PROPOSED: usize = 10_000;

/// How many requests can wait to be confirmed; beyond it, requests are refused.
pub const MAX_ASKED: usize = 20_000;

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
    /// When [`Effect::Confirm`] asked with this number, and before, this was the
    /// leader, and all that was committed by then has been told.
    Confirmed {
        /// The number.
        number: u64,
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
        /// Counts the changes of this leader.
        index: u64,
        /// The change.
        change: Change,
    },
    /// Find out whether this is the leader still, and say so with
    /// [`Input::Confirmed`], or take it apart.
    Confirm {
        /// Greater than those before.
        number: u64,
    },
    /// Start a thread that asks [`Input::Work`] now and then, until it is told
    /// that it is done.
    StartWorker(Worker),
    /// This worker has nothing more to do. Its line, if it has one, is to be
    /// printed.
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
    /// A client that asks for a lock.
    Lock {
        to: T,
        call: LockCall,
    },
    /// A worker that gives its lock back, and what it has to say.
    Worker(Worker, Option<String>),
    Nobody,
}

/// A request whose answer waits until this is confirmed to be the leader.
#[derive(Debug)]
struct Asked<T> {
    arrived: Time,
    from: T,
    host: Ipv4Addr,
    request: ViewRequest,
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
    asked: Unconfirmed<Asked<T>>,
    watchers: Vec<Watcher<T>>,
    /// When places in the queues of locks are given up.
    kept: Deadlines,
    /// Who waits for a lock.
    waiters: Vec<Waiter<T>>,
    /// Somebody may hold a lock who has not held it before.
    locks_changed: bool,
    /// The view as it was last shown, shared by all who ask for it.
    shown: Arc<View>,
    workers: BTreeSet<Worker>,
    last_worker: u64,
    /// Workers of a leader before this one have left something to be completed.
    inherits_work: bool,
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
            self.kept.put_off(span);
        }
        // Before anything else, so that no reply depends on when a tick came.
        self.expire(now, effects);
        self.expire_locks(now, effects);
        match input {
            Input::Request { from, host, request } => {
                self.request(now, from, host, request, effects);
            }
            Input::Committed { index } => self.committed(now, index, effects),
            Input::Confirmed { number } => {
                for asked in self.asked.confirmed(number) {
                    self.answer(now, asked, effects);
                }
            }
            Input::Work(worker) => self.work(now, worker, effects),
            Input::Ending => {
                self.watchers.iter_mut().for_each(|watcher| watcher.until = now);
                self.waiters.iter_mut().for_each(|waiter| waiter.end_wait(now));
            }
            Input::Tick | Input::Slept(_) => {}
        }
        effects.extend(self.asked.ask().map(|number| Effect::Confirm { number }));
        self.show(effects);
        self.wake(now, effects);
        self.wake_waiters(now, effects);
    }
}

impl<T> Leader<T> {
    /// The viewleader that begins to lead with `state`, in which everything up to
    /// `last_index` of the log is applied.
    pub fn new(now: Time, state: State, last_index: u64) -> Self {
        let full = |member: &Member| (member.id.clone(), now + margin(lease_of(member)));
        Self {
            leases: state.view().members.iter().map(full).collect(),
            kept: Deadlines::full(now, &state),
            waiters: Vec::new(),
            locks_changed: false,
            shown: Arc::default(),
            state,
            expelling: BTreeSet::new(),
            proposed: VecDeque::new(),
            last_index,
            asked: Unconfirmed::default(),
            watchers: Vec::new(),
            workers: BTreeSet::new(),
            last_worker: last_index,
            inherits_work: false,
            advanced: Revision(0),
            progress: BTreeMap::new(),
            rebalance: Rebalance { ended: Some(now), ..Rebalance::default() },
        }
    }

    /// The index of the last change that is applied.
    pub fn applied(&self) -> u64 {
        self.proposed.front().map_or(self.last_index, |(index, ..)| index - 1)
    }

    /// The state, with all applied that is committed.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// It leads no more: `leader` does, if that is known. Nobody is kept waiting, and
    /// the state goes on elsewhere.
    pub fn retire(self, leader: Option<SocketAddrV4>, effects: &mut Vec<Effect<T>>) -> State {
        let undone = || ViewReply::NotLeader(NotLeader::undone(leader));
        let in_doubt = || ViewReply::NotLeader(NotLeader::in_doubt(leader));
        for (.., asker) in self.proposed {
            match asker {
                Asker::Client(to) | Asker::Lock { to, .. } => {
                    effects.push(Effect::Reply { to, reply: in_doubt() });
                }
                // A heartbeat may come twice.
                Asker::Heartbeat { to, .. } => effects.push(Effect::Reply { to, reply: undone() }),
                Asker::Worker(..) | Asker::Nobody => {}
            }
        }
        let asked = self.asked.into_waiting().map(|asked| asked.from);
        let waiting = asked.chain(self.watchers.into_iter().map(|watcher| watcher.to));
        let waiting = waiting.chain(self.waiters.into_iter().map(Waiter::into_asker));
        effects.extend(waiting.map(|to| Effect::Reply { to, reply: undone() }));
        effects.extend(self.workers.into_iter().map(|worker| Effect::WorkerDone(worker, None)));
        self.state
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
        if self.proposed.len() >= MAX_PROPOSED || self.asked.len() >= MAX_ASKED {
            let refusal = Refusal::unavailable("the viewleader is overloaded: try again later");
            return effects.push(Effect::Reply { to: from, reply: ViewReply::Refused(refusal) });
        }
        match request {
            ViewRequest::Report(report) => {
                self.report(report, effects);
                effects.push(Effect::Reply { to: from, reply: ViewReply::status("ok") });
            }
            ViewRequest::LockGet(call) if self.known_place(&call).is_none() => {
                self.get_lock(now, from, call, effects);
            }
            ViewRequest::LockRelease(call) => {
                self.propose(Change::LockRelease(call), Asker::Client(from), effects);
            }
            ViewRequest::Restore(restore) => {
                self.propose(Change::Restore(restore), Asker::Client(from), effects);
            }
            ViewRequest::Drain(drain) => {
                self.propose(Change::Drain(drain.server), Asker::Client(from), effects);
            }
            request => {
                self.asked.push(Asked { arrived: now, from, host, request });
            }
        }
    }

    fn answer(&mut self, now: Time, asked: Asked<T>, effects: &mut Vec<Effect<T>>) {
        let Asked { arrived, from, host, request, .. } = asked;
        let reply = match request {
            ViewRequest::Heartbeat(beat) => {
                return self.heartbeat(now, arrived, from, host, beat, effects);
            }
            ViewRequest::QueryView(query) => return self.query_view(now, from, query, effects),
            ViewRequest::QueryServers {} => ViewReply::Servers {
                result: self.view().members.iter().map(|m| (m.address, m.hash)).collect(),
                epoch: self.view().epoch,
            },
            ViewRequest::RebalanceStatus {} => ViewReply::Rebalance(self.rebalance_status(now)),
            ViewRequest::Status {} => ViewReply::Health(self.view().health(|id| {
                let left = self.leases.get(id).map(|end| end.since(now));
                left.unwrap_or_default().as_millis() as u64
            })),
            ViewRequest::LockGet(call) => match self.known_place(&call) {
                Some(grant) => {
                    self.watch_place(arrived, &call.lockid, &call.requestor);
                    return self.answer_lock(now, from, call, grant, effects);
                }
                None => return self.get_lock(arrived, from, call, effects),
            },
            ViewRequest::LockKeep(keep) => self.keep_lock(arrived, &keep),
            ViewRequest::LockList(list) => self.list_locks(now, &list),
            ViewRequest::Numbers {} => {
                let (status, numbers) = (Okay::Ok, self.state.numbers());
                ViewReply::Numbers(NumbersAnswer { status, numbers })
            }
            // These prove themselves by their changes, and do not come here.
            ViewRequest::Report(_)
            | ViewRequest::LockRelease(_)
            | ViewRequest::Drain(_)
            | ViewRequest::Restore(_) => return,
        };
        effects.push(Effect::Reply { to: from, reply });
    }

    /// Where the requestor of a lock stands already, if nothing that is on its way
    /// into the log can change it. A request with a number must go there first: what
    /// is not remembered would be carried out if it came again.
    fn known_place(&self, call: &LockCall) -> Option<Grant> {
        let is_known = self.proposed.is_empty() && self.state.remembers(call.request);
        is_known.then(|| self.state.place_in_queue(call)).flatten()
    }

    fn get_lock(&mut self, arrived: Time, from: T, call: LockCall, effects: &mut Vec<Effect<T>>) {
        self.hear_of(arrived, &call.lockid, &call.requestor);
        let asker = Asker::Lock { to: from, call: call.clone() };
        self.propose(Change::LockGet(call), asker, effects);
    }

    fn propose(&mut self, change: Change, asker: Asker<T>, effects: &mut Vec<Effect<T>>) {
        self.last_index += 1;
        self.proposed.push_back((self.last_index, change.clone(), asker));
        effects.push(Effect::Append { index: self.last_index, change });
    }

    /// Applies the changes up to `index`, and answers those who wait for them.
    fn committed(&mut self, now: Time, index: u64, effects: &mut Vec<Effect<T>>) {
        while self.proposed.front().is_some_and(|(first, ..)| *first <= index) {
            let Some((_, change, asker)) = self.proposed.pop_front() else { return };
            let news = self.news_of(&change);
            if let Change::Expel(ids) = &change {
                self.expelling.retain(|id| !ids.contains(id));
            }
            let place = change.place().map(|(lock, who)| (lock.to_owned(), who.clone()));
            let outcome = self.state.apply(change);
            if let Some((lock, requestor)) = place {
                self.locks_changed = true;
                self.watch_place(now, &lock, &requestor);
            }
            if let Some((note, cause)) = news.filter(|_| outcome == Outcome::Done) {
                effects.push(Effect::Note(note));
                cause.into_iter().for_each(|cause| self.start_worker(cause, effects));
            }
            let view = self.state.view();
            self.leases.retain(|id, _| view.member(id).is_some());
            match asker {
                Asker::Nobody => {}
                Asker::Lock { to, call } => match outcome {
                    Outcome::Lock(grant) => self.answer_lock(now, to, call, grant, effects),
                    _ => effects.push(Effect::Reply { to, reply: outcome_reply(outcome) }),
                },
                Asker::Worker(worker, line) => {
                    self.workers.remove(&worker);
                    effects.push(Effect::WorkerDone(worker, line));
                }
                Asker::Client(to) => {
                    effects.push(Effect::Reply { to, reply: outcome_reply(outcome) });
                }
                Asker::Heartbeat { to, beat, leased_until } => {
                    let reply = match outcome {
                        Outcome::Taken => self.beat_reply(Beat::Retry, &beat),
                        Outcome::Denied => self.beat_reply(Beat::Deny, &beat),
                        Outcome::Crowded => self.crowded_reply(),
                        Outcome::Full => ViewReply::Refused(Refusal::unavailable(format!(
                            "there are {MAX_MEMBERS} servers already: no more can join"
                        ))),
                        // Its lease ran out while this was on its way into the log, and its
                        // expulsion is behind it.
                        _ if self.expelling.contains(&beat.requestor) => {
                            self.beat_reply(Beat::Retry, &beat)
                        }
                        _ => {
                            self.renew(beat.requestor.clone(), leased_until);
                            self.beat_reply(Beat::Ok, &beat)
                        }
                    };
                    effects.push(Effect::Reply { to, reply });
                }
            }
        }
    }

    /// What there is to tell of `change` once it is done, and why it needs a
    /// rebalancing, if it does.
    fn news_of(&self, change: &Change) -> Option<(String, Option<Cause>)> {
        Some(match change {
            Change::Join { member, .. } if self.view().member(&member.id).is_none() => {
                let Member { id, address, hash, dialect, .. } = member;
                let is_ours = *dialect == Dialect::Ringleader;
                (format!("{address} ({id}) joins, at {hash}"), is_ours.then_some(Cause::Added))
            }
            Change::Restart { id, start, .. } => {
                (format!("{id} goes on: its start {}", start.count), None)
            }
            Change::Expel(ids) => {
                let names = ids.iter().filter_map(|id| self.view().member(id));
                let names: Vec<String> =
                    names.map(|m| format!("{} ({})", m.address, m.id)).collect();
                let note = format!("{} out: no heartbeat for a lease", names.join(", "));
                (note, Some(Cause::Failed))
            }
            Change::Restore(Restore { backup, step }) => {
                let what = match step {
                    Step::Begin { .. } => "restoring from the backup",
                    Step::Load {} => "the cluster is empty: loading the backup",
                    Step::Finish {} => "restored from the backup",
                    Step::GiveUp {} => "the cluster is not empty: not restoring the backup",
                };
                (format!("{what} {backup}"), None)
            }
            Change::Drain(address) => (format!("{address} is to leave"), Some(Cause::Failed)),
            _ => return None,
        })
    }

    fn report(&mut self, report: Report, effects: &mut Vec<Effect<T>>) {
        let Report { requestor, ready, established, progress } = report;
        self.take_progress(&requestor, progress);
        let id = || requestor.clone();
        let ready =
            ready.into_iter().map(|(start, version)| Change::Ready { id: id(), start, version });
        let established = established.into_iter().map(|(start, version)| Change::Established {
            id: id(),
            start,
            version,
        });
        for change in ready.chain(established) {
            if self.state.is_news(&change) {
                self.propose(change, Asker::Nobody, effects);
            }
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
            _ => effects.push(Effect::Reply { to: from, reply: self.shown_view() }),
        }
    }

    fn shown_view(&self) -> ViewReply {
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
            let queue = self.state.locks().queue(REBALANCING);
            let queue: Vec<Identity> = queue.map(|place| place.requestor.clone()).collect();
            for requestor in queue {
                let lockid = REBALANCING.to_owned();
                if requestor.as_str().starts_with(REBALANCING) {
                    self.inherits_work = true;
                    let change = Change::LockRelease(LockCall::new(lockid, requestor));
                    self.propose(change, Asker::Nobody, effects);
                }
            }
        }
        if before.revision == Revision(0) && (self.inherits_work || !self.shown.is_settled()) {
            // A leader goes on with what the one before it has begun.
            self.start_worker(Cause::Failed, effects);
        }
    }

    /// Answers those who wait for a view, when there is one or their time is up.
    fn wake(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let revision = self.shown.revision;
        let waiting = std::mem::take(&mut self.watchers);
        for watcher in waiting {
            if revision > watcher.after || watcher.until <= now {
                effects.push(Effect::Reply { to: watcher.to, reply: self.shown_view() });
            } else {
                self.watchers.push(watcher);
            }
        }
    }
}

fn outcome_reply(outcome: Outcome) -> ViewReply {
    match outcome {
        Outcome::Lock(grant) => grant_reply(grant),
        Outcome::Unknown => ViewReply::status("unknown"),
        Outcome::Last => ViewReply::Refused(Refusal::invalid(
            "it is the last server that stays: start another one first",
        )),
        Outcome::NotRestored(why) => ViewReply::Refused(Refusal::conflict(why.to_string())),
        _ => ViewReply::status("ok"),
    }
}
