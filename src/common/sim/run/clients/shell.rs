//! The shell of the real client: asks, waits, and comes back, on virtual time.
//! What it keeps of `net::ask` and `net::call`: a walk along addresses leaves each
//! but the last half of the time that is left, and of answers with an error the
//! first one counts when there is no other. A viewleader that does not lead may say
//! who does, and that one is asked next; when none leads, all are asked again soon.

use super::super::{NEVER, Run};
use super::{Job, State, Step, Task};
use crate::kv::messages::{Public, Setr};
use crate::kv::operation::{Conclusion, Event, Next, Question, Whom};
use crate::machine::Time;
use crate::sim::cluster::{Answered, MAX_HINTS, Silence, not_leader};
use crate::sim::network::Rpc;
use crate::view::messages::ViewRequest;
use crate::wire::Reason;
use rand::RngExt;
use serde_json::Value;
use std::collections::VecDeque;
use std::net::SocketAddrV4;
use std::time::Duration;

/// How long a command may take, waiting for a lock aside: the client's default.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// How soon viewleaders are asked again when none of them leads.
const LEADER_GLANCE: Duration = Duration::from_millis(50);

/// How many servers a user names at most.
const MAX_NAMED: usize = 3;

/// One question along several addresses.
#[derive(Debug)]
pub(super) struct Walk {
    question: String,
    /// Where it leads, from the beginning.
    all: VecDeque<SocketAddrV4>,
    asked: SocketAddrV4,
    /// When that was.
    asked_at: Time,
    rest: VecDeque<SocketAddrV4>,
    hinted: u32,
    /// An answer with an error is passed over while there are others.
    is_walk: bool,
    /// It may come twice.
    is_harmless: bool,
    refused: Option<(SocketAddrV4, Vec<u8>)>,
    sent: bool,
    closed: bool,
    deadline: Time,
}

/// What comes of an answer on a walk.
enum Walked {
    /// Ask the next one.
    On,
    /// Nobody leads: ask all of them again in a moment.
    Again,
    /// It is over.
    Over(Event),
}

impl Run {
    /// Asks the first of `addresses`, and the others later.
    pub(super) fn walk(
        &mut self,
        client: usize,
        question: String,
        addresses: VecDeque<SocketAddrV4>,
        is_walk: bool,
        deadline: Time,
    ) -> Option<(Rpc, Walk)> {
        let mut walk = Walk {
            is_harmless: may_come_twice(&question),
            question,
            asked: *addresses.front()?,
            asked_at: self.cluster.now(),
            rest: VecDeque::new(),
            all: addresses,
            hinted: 0,
            is_walk,
            refused: None,
            sent: false,
            closed: false,
            deadline,
        };
        Some((self.walk_anew(client, &mut walk), walk))
    }

    /// Asks all of them, from the first one on.
    pub(super) fn walk_anew(&mut self, client: usize, walk: &mut Walk) -> Rpc {
        walk.rest = walk.all.clone();
        (walk.hinted, walk.refused) = (0, None);
        (walk.sent, walk.closed) = (false, false);
        self.ask_next(client, walk)
    }

    fn ask_next(&mut self, client: usize, walk: &mut Walk) -> Rpc {
        walk.asked = walk.rest.pop_front().unwrap_or(walk.asked);
        walk.asked_at = self.cluster.now();
        let left = walk.deadline.since(self.cluster.now());
        let limit = if walk.rest.is_empty() { left } else { left / 2 };
        let body = (walk.question.clone().into_bytes(), self.words(&walk.question));
        let rpc = self.cluster.client_asks(client, walk.asked, body, walk.is_harmless, limit);
        self.clients.calls.insert(rpc, client);
        rpc
    }

    /// The viewleaders, in the order in which they were named to the client.
    fn viewleaders_for(&self, client: usize) -> VecDeque<SocketAddrV4> {
        let sites = 0..self.cluster.viewleaders();
        let mut addresses: VecDeque<_> =
            sites.map(|site| self.cluster.viewleader_address(site)).collect();
        addresses.rotate_left(client % addresses.len());
        addresses
    }

    fn words(&self, question: &str) -> String {
        if self.kept_lines > 0 { self.cluster.names.rewrite(question) } else { String::new() }
    }

    /// The servers that a user has named: some of those that there are or were.
    pub(super) fn named_servers(&mut self) -> VecDeque<SocketAddrV4> {
        let count = self.rng.random_range(1..=MAX_NAMED);
        let alive = self.alive();
        let any = |run: &mut Self| match alive.as_slice() {
            [] => run.rng.random_range(0..run.cluster.servers()),
            _ if run.rng.random_bool(0.1) => run.rng.random_range(0..run.cluster.servers()),
            alive => alive[run.rng.random_range(0..alive.len())],
        };
        let named: Vec<usize> = (0..count).map(|_| any(self)).collect();
        named.into_iter().map(|server| self.cluster.address(server)).collect()
    }

    /// Tells the program of the task what has happened, and does what it asks.
    /// Returns its conclusion, if it has come to one.
    pub(super) fn drive(
        &mut self,
        client: usize,
        task: &mut Task,
        event: Event,
    ) -> Option<Conclusion> {
        let mut event = event;
        loop {
            let program = task.program.as_mut()?;
            let now = self.cluster.now();
            match program.step(event) {
                Next::Done(conclusion) => return Some(conclusion),
                Next::Wait(_, span) => {
                    task.deadline = now + span + TIMEOUT;
                    task.step = Step::Waiting { until: now + span };
                    return None;
                }
                Next::Ask(whom, question) => {
                    if let (true, Question::View(ViewRequest::QueryView(_))) =
                        (task.is_original, &question)
                    {
                        let why = "an original drops it".to_owned();
                        event = Event::Silence { sent: true, closed: true, why };
                        continue;
                    }
                    let is_commit = |setr: &Setr| task.is_original && !setr.direct;
                    task.commits += usize::from(
                        matches!(&question, Question::Server(Public::Setr(it)) if is_commit(it)),
                    );
                    let (addresses, is_walk) = match whom {
                        Whom::AnyServer => (self.named_servers(), true),
                        Whom::Viewleader => (self.viewleaders_for(client), true),
                        Whom::At(address) => (VecDeque::from([address]), false),
                    };
                    let deadline = match question {
                        Question::View(ViewRequest::QueryView(_)) => {
                            now + task.deadline.since(now) / 2
                        }
                        _ => task.deadline,
                    };
                    let question =
                        serde_json::to_string(&question).expect("questions can be written");
                    match self.walk(client, question, addresses, is_walk, deadline) {
                        Some((rpc, walk)) => {
                            task.step = Step::Asking { rpc, walk };
                            return None;
                        }
                        None => {
                            let why = "nobody is named".to_owned();
                            event = Event::Silence { sent: false, closed: false, why };
                        }
                    }
                }
            }
        }
    }

    /// A call of a client has ended. Returns whose, and what that means for its walk
    /// when it is over.
    pub(super) fn walked(&mut self, rpc: Rpc, answered: Answered) -> Option<(usize, Event)> {
        let client = self.clients.calls.remove(&rpc)?;
        let state = &mut self.clients.all[client].state;
        // Who asked may have died, and be about to come back as somebody else.
        if matches!(state, State::Idle { .. }) {
            return None;
        }
        let idle = State::Idle { next: NEVER, then: None };
        let State::Busy(mut task) = std::mem::replace(state, idle) else { return None };
        let event = match &mut task.step {
            Step::Asking { rpc: current, walk } if *current == rpc => {
                task.was_silent |= may_come_later(&answered);
                let now = self.cluster.now();
                task.asked_at = walk.asked_at;
                match walk.take(answered, now) {
                    Walked::Over(event) => Some(event),
                    Walked::On => {
                        *current = self.ask_next(client, walk);
                        None
                    }
                    Walked::Again => {
                        let step = Step::Waiting { until: now };
                        if let Step::Asking { walk, .. } = std::mem::replace(&mut task.step, step) {
                            task.step = Step::Glancing { until: now + LEADER_GLANCE, walk };
                        }
                        None
                    }
                }
            }
            _ => None,
        };
        if let (Job::Lock(wish), Some(Event::Answer { body, .. })) = (&task.job, &event)
            && let Ok(reply) = serde_json::from_slice::<Value>(body)
            && reply["status"] == "retry"
        {
            self.told_to_wait(client, wish, task.asked_at);
        }
        self.clients.all[client].state = State::Busy(task);
        event.map(|event| (client, event))
    }
}

impl Walk {
    /// The number of the request that is asked, if it has one.
    pub(super) fn number(&self) -> Option<u64> {
        serde_json::from_str::<Value>(&self.question).ok()?["request"].as_u64()
    }

    /// What the walk has come to with this.
    fn take(&mut self, answered: Answered, now: Time) -> Walked {
        match answered {
            Ok(body) => {
                let is_error = serde_json::from_slice::<Value>(&body)
                    .is_ok_and(|reply| reply.get("error").is_some());
                if !self.is_walk || !is_error {
                    return Walked::Over(Event::Answer { from: self.asked, body });
                }
                if let Some(leader) = not_leader(&body).and_then(|it| it.leader)
                    && self.hinted < MAX_HINTS
                {
                    self.hinted += 1;
                    self.rest.retain(|address| *address != leader);
                    self.rest.push_front(leader);
                }
                let said = self.refused.as_ref().map(|(_, body)| says_little(body));
                if said.is_none_or(|said| says_little(&body) < said) {
                    self.refused = Some((self.asked, body));
                }
            }
            Err(silence) => {
                self.sent |= silence != Silence::NotSent;
                self.closed |= silence == Silence::Closed;
            }
        }
        if !self.rest.is_empty() {
            return Walked::On;
        }
        match self.refused.take() {
            Some((_, body)) if says_little(&body) == 1 && now + LEADER_GLANCE < self.deadline => {
                Walked::Again
            }
            Some((from, body)) => Walked::Over(Event::Answer { from, body }),
            None => {
                let why = "nobody answers".to_owned();
                Walked::Over(Event::Silence { sent: self.sent, closed: self.closed, why })
            }
        }
    }
}

/// Whether what was asked may have been done, or be done yet.
fn may_come_later(answered: &Answered) -> bool {
    match answered {
        Ok(body) => not_leader(body).is_some_and(|it| it.reason == Reason::UnknownOutcome),
        Err(silence) => *silence != Silence::NotSent,
    }
}

/// How little a refusal says: more than `not leader`; that; that it is in no group.
fn says_little(body: &[u8]) -> u8 {
    not_leader(body).map_or(0, |it| 1 + u8::from(it.note.is_some()))
}

/// Whether whoever is asked this does nothing the second time: it has a number of its
/// own, or changes nothing.
fn may_come_twice(question: &str) -> bool {
    let question: Value = serde_json::from_str(question).unwrap_or_default();
    match question["cmd"].as_str() {
        Some("lock_get" | "lock_release") => question["request"].is_u64(),
        Some("lock_keep" | "viewleader_add") => true,
        _ => false,
    }
}
