//! The master as a machine: who is alive, who holds what, and what is done about
//! it.
//!
//! Like the viewleader ([`crate::view::leader`]): whatever must outlive the
//! process is a [`Change`] that is appended to the log first and applied, answered
//! and seen when the shell says that it is there to stay. Everything else is what
//! it has heard since it started: chunkservers and their leases (`servers.rs`),
//! rounds that change a chunk's members (`rounds.rs`), copies that are being made
//! (`repair.rs`).
//!
//! Of several masters one leads, and this machine is what it does while it leads; see
//! [`crate::consensus::replica`]. What it answers without a change, leases among it,
//! waits until it is confirmed to lead ([`Unconfirmed`]): so no lease is given after
//! the next one has begun to count. That one waits out whatever was given before.

mod repair;
mod requests;
mod rounds;
mod servers;

use super::messages::{ChunkReply, ChunkRequest, Heartbeat, MasterReply, MasterRequest, Status};
use super::state::{Change, Outcome, State};
use super::{ChunkId, ServerNo, lease_margin};
use crate::consensus::confirming::Unconfirmed;
use crate::consensus::replica::{Lead, News, Replica, Wanted};
use crate::consensus::requests::NotLeader;
use crate::machine::{Machine, Time};
use crate::wire::Refusal;
use repair::Repairs;
use requests::Standstill;
use rounds::{Round, Waiter};
use servers::Alive;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddrV4;
use std::time::Duration;

/// How many changes can be on their way into the log; beyond it, requests are
/// refused.
pub const MAX_PROPOSED: usize = 10_000;

/// How many requests can wait for a lease or a snapshot at once.
pub const MAX_WAITING: usize = 10_000;

/// How long a request waits for a lease or a snapshot: two rounds, each of which
/// may have to wait until a lease is over, and a moment.
pub const PATIENCE: Duration = Duration::from_secs(12);

/// How long a chunkserver may take for what it does at once.
pub const CALL_PATIENCE: Duration = Duration::from_secs(2);

/// Names a call to a chunkserver.
pub type CallId = u64;

/// How many requests can wait until this master is confirmed to lead.
pub const MAX_ASKED: usize = 20_000;

/// One master of a group. `T` names a request to its shell.
pub type Master<T> = Replica<Leader<T>>;

/// How a master goes about it; all of it may differ from start to start.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How many copies of a chunk, for files that don't say.
    pub copies: u8,
    /// For how long a deleted file can be brought back.
    pub keep_deleted: Duration,
    /// How long a chunkserver may be away before copies are made of what it holds,
    /// as long as there are others.
    pub repair_after: Duration,
    /// How many copies one answer to a heartbeat orders to be deleted at most.
    pub deleted_at_once: usize,
    /// The time of day at the origin of its clock, in milliseconds since 1970.
    pub day_ms: u64,
}

impl Default for Settings {
    /// Three copies, three days (the paper's), ten seconds, a thousand.
    fn default() -> Self {
        Self {
            copies: super::DEFAULT_COPIES,
            keep_deleted: Duration::from_secs(3 * 24 * 3600),
            repair_after: Duration::from_secs(10),
            deleted_at_once: 1_000,
            day_ms: 0,
        }
    }
}

/// What can happen to the master. `T` names a request to its shell.
#[derive(Debug)]
pub enum Input<T> {
    /// A request has come.
    Request {
        /// To be given back with the reply.
        from: T,
        /// What is asked.
        request: MasterRequest,
    },
    /// A chunkserver has answered a call, or has not.
    Answer {
        /// Which call.
        call: CallId,
        /// The answer; `None` when there was none.
        answer: Option<Result<ChunkReply, Refusal>>,
    },
    /// The first changes that were appended and not yet committed, up to this
    /// one, are in the log to stay.
    Committed {
        /// The index of the last one.
        index: u64,
    },
    /// It led when [`Effect::Confirm`] asked with this number.
    Confirmed {
        /// The number.
        number: u64,
    },
    /// Time has passed.
    Tick,
    /// This process has not run for so long: chunkservers may have called in
    /// vain, so no lease runs out for that.
    Slept(Duration),
}

/// What the master asks for. Appends are to be done in their order; anything else
/// in any order.
#[derive(Debug)]
pub enum Effect<T> {
    /// Answer the request `to`.
    Reply {
        /// Which request.
        to: T,
        /// The answer.
        reply: MasterReply,
    },
    /// Append a change to the log, and say so with [`Input::Committed`].
    Append {
        /// Counts the changes of this leader.
        index: u64,
        /// The change.
        change: Change,
    },
    /// Find out whether this master leads still, and say so with
    /// [`Input::Confirmed`], or take it apart.
    Confirm {
        /// Greater than those before.
        number: u64,
    },
    /// Call a chunkserver, and say what came of it with [`Input::Answer`], once.
    Call {
        /// Where it is.
        to: SocketAddrV4,
        /// The name of the call.
        call: CallId,
        /// What is asked.
        request: ChunkRequest,
        /// How long the answer may take.
        patience: Duration,
    },
    /// Something worth a line in the log.
    Note(String),
}

/// Who waits for a change to be committed.
#[derive(Debug)]
enum Asker<T> {
    /// A client that gets the outcome.
    Client(T),
    /// A client that wants a lease; the chunk is there then.
    Seeker(Waiter<T>),
    /// A chunkserver that comes in.
    Linking(T, Heartbeat),
    /// The round of this chunk.
    Round(ChunkId),
    /// A client that waited until nobody writes to what the change is about.
    Standstill(T),
    Nobody,
}

/// What a call is about.
#[derive(Debug)]
enum Call {
    /// Asked in a round of the chunk to make it, to promise, or to stop serving.
    Round(ChunkId, ServerNo),
    /// To be primary after a round.
    Lead(ChunkId, ServerNo),
    /// To make a copy.
    Copy(ChunkId),
}

/// The master that leads.
#[derive(Debug)]
pub struct Leader<T> {
    settings: Settings,
    state: State,
    /// What waits until it is confirmed to lead.
    asked: Unconfirmed<(T, MasterRequest)>,
    /// Changes on their way into the log, in order.
    proposed: VecDeque<(u64, Change, Asker<T>)>,
    last_index: u64,
    started: Time,
    /// Until when leases may be live that an earlier master has given.
    settles: Time,
    /// The chunkservers whose leases are live.
    alive: BTreeMap<ServerNo, Alive>,
    /// When the others' leases ran out.
    departed: BTreeMap<ServerNo, Time>,
    /// Who was made primary of a chunk and has not been succeeded.
    primaries: BTreeMap<ChunkId, ServerNo>,
    rounds: BTreeMap<ChunkId, Round<T>>,
    standstills: Vec<Standstill<T>>,
    /// Who waits until such a change is made.
    parked: Vec<Waiter<T>>,
    repairs: Repairs,
    calls: BTreeMap<CallId, Call>,
    last_call: CallId,
    /// Where damage was found since the start.
    damaged: BTreeSet<(ChunkId, SocketAddrV4)>,
    collecting: bool,
}

impl<T> Machine for Leader<T> {
    type Input = Input<T>;
    type Effect = Effect<T>;

    fn step(&mut self, now: Time, input: Input<T>, effects: &mut Vec<Effect<T>>) {
        if let Input::Slept(span) = input {
            self.slept(span);
        }
        // Before anything else, so that no reply depends on when a tick came.
        self.expire(now, effects);
        match input {
            Input::Request { from, request } => self.request(now, from, request, effects),
            Input::Answer { call, answer } => self.answered(now, call, answer, effects),
            Input::Committed { index } => self.committed(now, index, effects),
            Input::Confirmed { number } => {
                for (from, request) in self.asked.confirmed(number) {
                    self.answer(now, from, request, effects);
                }
            }
            Input::Tick | Input::Slept(_) => self.tick(now, effects),
        }
        if !self.standstills.is_empty() {
            self.advance_standstills(now, effects);
        }
        effects.extend(self.asked.ask().map(|number| Effect::Confirm { number }));
    }
}

impl<T> Lead for Leader<T> {
    type Asker = T;
    type State = State;
    type Settings = Settings;

    /// Chunkservers may have leases that an earlier leader has given, if any ever came.
    fn begin(now: Time, settings: &Settings, state: State, last_index: u64) -> Self {
        Self {
            settings: *settings,
            settles: if state.is_untouched() { now } else { now + lease_margin() },
            state,
            asked: Unconfirmed::default(),
            proposed: VecDeque::new(),
            last_index,
            started: now,
            alive: BTreeMap::new(),
            departed: BTreeMap::new(),
            primaries: BTreeMap::new(),
            rounds: BTreeMap::new(),
            standstills: Vec::new(),
            parked: Vec::new(),
            repairs: Repairs::default(),
            calls: BTreeMap::new(),
            last_call: 0,
            damaged: BTreeSet::new(),
            collecting: false,
        }
    }

    fn state(&self) -> &State {
        &self.state
    }

    fn retire(self, leader: Option<SocketAddrV4>, effects: &mut Vec<Effect<T>>) -> State {
        let mut reply = |to, not_leader| {
            effects.push(Effect::Reply { to, reply: MasterReply::NotLeader(not_leader) });
        };
        for (.., asker) in self.proposed {
            match asker {
                Asker::Client(to) | Asker::Standstill(to) => {
                    reply(to, NotLeader::in_doubt(leader));
                }
                // These may be asked twice.
                Asker::Seeker(Waiter { to, .. }) | Asker::Linking(to, _) => {
                    reply(to, NotLeader::undone(leader));
                }
                Asker::Round(_) | Asker::Nobody => {}
            }
        }
        let asked = self.asked.into_waiting().map(|(to, _)| to);
        let waiters = self.rounds.into_values().flat_map(Round::into_waiters).chain(self.parked);
        let standstills = self.standstills.into_iter().filter_map(Standstill::into_asker);
        for to in asked.chain(waiters.map(|waiter| waiter.to)).chain(standstills) {
            reply(to, NotLeader::undone(leader));
        }
        self.state
    }

    fn told(news: News) -> Option<Input<T>> {
        Some(match news {
            News::Committed { index } => Input::Committed { index },
            News::Confirmed { number } => Input::Confirmed { number },
            News::Tick => Input::Tick,
            News::Slept(span) => Input::Slept(span),
            News::Ending => return None,
        })
    }

    fn sort(effect: Effect<T>) -> Wanted<Self> {
        match effect {
            Effect::Append { index, change } => Wanted::Append { index, change },
            Effect::Confirm { number } => Wanted::Confirm { number },
            effect => Wanted::Own(effect),
        }
    }

    fn turn_away(input: Input<T>, not_leader: NotLeader, effects: &mut Vec<Effect<T>>) {
        if let Input::Request { from, .. } = input {
            let reply = MasterReply::NotLeader(not_leader);
            effects.push(Effect::Reply { to: from, reply });
        }
    }
}

impl<T> Leader<T> {
    /// The time of day, in milliseconds since 1970, by this process's own clock.
    fn day_ms(&self, now: Time) -> u64 {
        self.settings.day_ms + now.since(Time::default()).as_millis() as u64
    }

    fn propose(&mut self, change: Change, asker: Asker<T>, effects: &mut Vec<Effect<T>>) {
        self.last_index += 1;
        self.proposed.push_back((self.last_index, change.clone(), asker));
        effects.push(Effect::Append { index: self.last_index, change });
    }

    /// Applies the changes up to `index`, and goes on with what waits for them.
    fn committed(&mut self, now: Time, index: u64, effects: &mut Vec<Effect<T>>) {
        while self.proposed.front().is_some_and(|(first, ..)| *first <= index) {
            let Some((_, change, asker)) = self.proposed.pop_front() else { return };
            let outcome = self.state.apply(change.clone());
            if let Outcome::Gone(chunks) = &outcome {
                self.doom(chunks);
            }
            if let Change::Collect { .. } = change {
                self.collecting = false;
            }
            match asker {
                Asker::Nobody => {}
                Asker::Client(to) => effects.push(Effect::Reply { to, reply: reply_of(outcome) }),
                Asker::Seeker(waiter) => match outcome {
                    Outcome::Refused(refusal) => refuse(waiter.to, refusal, effects),
                    _ => self.seek(now, waiter, None, effects),
                },
                Asker::Linking(to, beat) => match outcome {
                    Outcome::Server(number) => self.link(now, to, number, &beat, effects),
                    outcome => effects.push(Effect::Reply { to, reply: reply_of(outcome) }),
                },
                Asker::Round(chunk) => self.confirmed(now, chunk, change, &outcome, effects),
                Asker::Standstill(to) => self.stood_still(now, &change, to, outcome, effects),
            }
        }
    }

    fn call(
        &mut self,
        to: SocketAddrV4,
        about: Call,
        request: ChunkRequest,
        patience: Duration,
        effects: &mut Vec<Effect<T>>,
    ) -> CallId {
        self.last_call += 1;
        let call = self.last_call;
        self.calls.insert(call, about);
        effects.push(Effect::Call { to, call, request, patience });
        call
    }

    fn answered(
        &mut self,
        now: Time,
        call: CallId,
        answer: Option<Result<ChunkReply, Refusal>>,
        effects: &mut Vec<Effect<T>>,
    ) {
        match self.calls.remove(&call) {
            None => {}
            Some(Call::Round(chunk, server)) => {
                self.round_answered(now, chunk, call, server, answer, effects);
            }
            Some(Call::Lead(chunk, server)) => {
                let leads = matches!(answer, Some(Ok(_)));
                self.lead_answered(now, chunk, call, server, leads, effects);
            }
            Some(Call::Copy(chunk)) => self.copied(now, chunk, call, answer, effects),
        }
    }

    fn tick(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let chunks: Vec<ChunkId> = self.rounds.keys().copied().collect();
        for chunk in chunks {
            self.advance(now, chunk, effects);
        }
        self.repair(now, effects);
        self.collect(now, effects);
    }

    /// Lets deleted files go once they were kept long enough.
    fn collect(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let keep = self.settings.keep_deleted.as_millis() as u64;
        let Some(until_ms) = self.day_ms(now).checked_sub(keep) else { return };
        let is_due = self.state.deleted().any(|deleted| deleted.at_ms <= until_ms);
        if is_due && !self.collecting {
            self.collecting = true;
            self.propose(Change::Collect { until_ms }, Asker::Nobody, effects);
        }
    }
}

fn reply_of(outcome: Outcome) -> MasterReply {
    match outcome {
        Outcome::Refused(refusal) => MasterReply::Refused(refusal),
        _ => MasterReply::Done(Status::Ok),
    }
}

fn refuse<T>(to: T, refusal: Refusal, effects: &mut Vec<Effect<T>>) {
    effects.push(Effect::Reply { to, reply: MasterReply::Refused(refusal) });
}
