//! The clients of a run: who asks for what, and what becomes of it.
//!
//! Some are the real client, [`kv::operation`](crate::kv::operation), in a shell on
//! virtual time; so are those who write as the original's clients do: to them the
//! viewleader is one that drops the question for its view. Others are programs
//! that speak the protocol and ask any server at all. Each has one request at a
//! time, and pauses between two.

mod locking;
mod shell;
mod witness;
mod work;

use super::{NEVER, Options};
use crate::kv::operation;
use crate::kv::{Text, Version};
use crate::machine::Time;
use crate::sim::linearizability::Call;
use crate::sim::network::Rpc;
use crate::view::Revision;
use locking::{Holding, Wish};
use rand::RngExt;
use rand::rngs::StdRng;
use shell::Walk;
use std::collections::{BTreeMap, VecDeque};

/// What a client does all day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trade {
    Writer,
    Reader,
    Original,
    Locker,
    /// Changes the group of viewleaders, when told to.
    Operator,
    /// Uses what is at rest, when told to.
    Witness,
}

/// What a client has been asked to do.
#[derive(Clone, Debug)]
enum Job {
    /// A read or a write.
    Ask { key: Text, call: Call },
    /// Get a lock.
    Lock(Wish),
    /// Do whatever one does who holds a lock.
    Hold,
    /// Give a sign of life for the lock that is held.
    Keep,
    /// Until the viewleader has said that it is given back.
    Unlock {
        wish: Wish,
        /// Some call for it was not answered, and may yet arrive.
        late: bool,
    },
    /// Until the viewleaders say that it is done.
    Reshape {
        /// Which viewleader.
        site: usize,
        /// Whether it is to be added, or removed.
        add: bool,
        /// Some call for it was not answered, and may yet arrive.
        late: bool,
    },
}

/// A job under way.
#[derive(Debug)]
struct Task {
    job: Job,
    /// When it began, in the history.
    began: u64,
    /// The real client; without it the only request has been made.
    program: Option<operation::Operation>,
    is_original: bool,
    /// How many commits of an original it has sent, and how the key's group was before.
    commits: usize,
    group: Option<Revision>,
    /// Some call was not answered.
    was_silent: bool,
    /// When the question was sent that was answered last.
    asked_at: Time,
    deadline: Time,
    step: Step,
}

#[derive(Debug)]
enum Step {
    Asking {
        rpc: Rpc,
        walk: Walk,
    },
    Waiting {
        until: Time,
    },
    /// No viewleader leads: all are asked again then.
    Glancing {
        until: Time,
        walk: Walk,
    },
}

#[derive(Debug)]
enum State {
    /// The next job begins then; it may be known what it is.
    Idle {
        next: Time,
        then: Option<Job>,
    },
    Busy(Box<Task>),
}

#[derive(Debug)]
struct Client {
    trade: Trade,
    is_program: bool,
    thinks_ms: u64,
    /// It begins nothing new after that.
    stops: Time,
    state: State,
    /// How many jobs it has had.
    jobs: u64,
    /// By how many millionths its clock is fast.
    fast_by: i64,
    /// How often it has died and come back as somebody else.
    deaths: u64,
    /// The key that it was told of last, and its version; none: it was missing.
    known: Option<(Text, Option<Version>)>,
    /// The lock that it holds, or takes itself to hold.
    held: Option<Holding>,
    /// For which keys it has voted as the original's client does, and when that last ended.
    voted: BTreeMap<Text, u64>,
}

/// All clients.
#[derive(Debug)]
pub(super) struct Clients {
    all: Vec<Client>,
    /// Whose call it is.
    calls: BTreeMap<Rpc, usize>,
    due: Time,
    /// What the operator is to do when it is done with what it does.
    wishes: VecDeque<Job>,
    /// What the oracle says to that somebody was told to wait for a lock.
    told_to_wait: Option<Result<(), String>>,
}

impl Clients {
    pub(super) fn draw(rng: &mut StdRng, options: &Options) -> Self {
        let trades = [
            (Trade::Writer, options.writers),
            (Trade::Reader, options.readers),
            (Trade::Original, options.originals),
            (Trade::Locker, options.lockers),
            (Trade::Operator, 1),
            (Trade::Witness, 1),
        ];
        let trades = trades.into_iter().flat_map(|(trade, count)| vec![trade; count]);
        let all = trades.map(|trade| {
            let is_program = match trade {
                Trade::Writer | Trade::Reader => rng.random_range(0..100) < options.programs,
                Trade::Original | Trade::Locker | Trade::Operator | Trade::Witness => true,
            };
            let is_told = matches!(trade, Trade::Operator | Trade::Witness);
            Client {
                trade,
                is_program,
                thinks_ms: rng.random_range(options.think_ms / 2..=options.think_ms).max(1),
                stops: Time::default() + options.busy,
                state: State::Idle { next: if is_told { NEVER } else { super::FIRST }, then: None },
                jobs: 0,
                fast_by: rng.random_range(-options.drift..=options.drift),
                deaths: 0,
                known: None,
                held: None,
                voted: BTreeMap::new(),
            }
        });
        Self {
            all: all.collect(),
            calls: BTreeMap::new(),
            due: super::FIRST,
            wishes: VecDeque::new(),
            told_to_wait: None,
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// When the next of them has something to do by itself.
    pub(super) fn due(&self) -> Time {
        self.due
    }

    /// A client that waits for an answer, or has yet to give a lock back.
    pub(super) fn unanswered(&self) -> Option<usize> {
        self.all.iter().position(|client| match &client.state {
            State::Idle { then, .. } => then.is_some(),
            State::Busy(_) => true,
        })
    }
}

impl Client {
    /// When it has something to do by itself.
    fn due(&self) -> Time {
        match &self.state {
            State::Idle { next, then: None } if *next > self.stops => NEVER,
            State::Idle { next, .. } => *next,
            State::Busy(task) => match &task.step {
                Step::Asking { .. } => NEVER,
                Step::Waiting { until } | Step::Glancing { until, .. } => *until,
            },
        }
    }
}
