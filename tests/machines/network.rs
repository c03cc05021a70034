//! The network between the machines: connections that deliver in order, late,
//! and, when a script says so, not at all.
//!
//! Each party has a connection to each other party for each [`Lane`], as the
//! shells do. What is sent on one arrives in its order, calls and answers each. A pair of parties can be
//! *held*: what the one sends to the other then waits, in both roles, as call
//! and as answer, until it is delivered, duplicated or dropped by hand. A party
//! can be *cut off*: what it sends or is sent is lost, and only time-outs tell.

use super::chance::Chance;
use ringleader::kv::messages::{Op, Request};
use ringleader::machine::Time;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Who can send and be sent something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Party {
    /// The viewleader.
    Viewleader,
    /// The server with this index.
    Server(usize),
}

/// A connection of its own, so that what is slow does not hold up the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lane {
    /// To a server, answered at once.
    Prompt,
    /// To a server, which may have to wait for others.
    Patient,
    /// Heartbeats.
    Beat,
    /// Questions for the view.
    View,
    /// Reports.
    Report,
}

impl Lane {
    /// The lane of a call to a server, as in the shells' links.
    pub(crate) fn of(request: &Request) -> Self {
        match request {
            Request::Op(Op::PrimarySet(_) | Op::PrimaryCommit(_)) => Self::Patient,
            _ => Self::Prompt,
        }
    }
}

/// Names one call from beginning to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rpc(pub(crate) u64);

/// What crosses the network, as its JSON.
#[derive(Clone)]
pub(crate) enum Body {
    /// What is asked.
    Request(Rc<[u8]>),
    /// What is answered.
    Reply(Rc<[u8]>),
    /// The connection was closed without an answer.
    Closed,
}

/// A message on its way.
#[derive(Clone)]
pub(crate) struct Parcel {
    /// The call that it belongs to.
    pub(crate) rpc: Rpc,
    /// What it says.
    pub(crate) body: Body,
    /// The same in a few words; empty when it is not worth a line.
    pub(crate) words: String,
}

/// What becomes of a parcel that was sent.
pub(crate) enum Sent {
    /// It will arrive then.
    Arrives(Time, Parcel),
    /// It waits until it is let through by hand.
    Held,
    /// Nobody will hear of it.
    Lost,
}

/// One direction of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Way {
    /// Who sends.
    pub(crate) from: Party,
    /// Who is sent something.
    pub(crate) to: Party,
    /// What kind of calls the connection is for.
    pub(crate) lane: Lane,
    /// Whether this is the way of the answers.
    pub(crate) back: bool,
}

/// What waits from one party to another.
#[derive(Default)]
struct Held {
    /// Nothing else is held than this lane.
    only: Option<Lane>,
    waiting: Vec<(Lane, Parcel)>,
}

/// All connections.
#[derive(Default)]
pub(crate) struct Network {
    /// When the last parcel on each way arrives.
    last: BTreeMap<Way, Time>,
    held: BTreeMap<(Party, Party), Held>,
    cut: BTreeSet<Party>,
}

impl Network {
    /// Sends a parcel. It takes as long as `chance` says, and longer if the one
    /// before it arrives later.
    pub(crate) fn send(
        &mut self,
        now: Time,
        chance: &mut dyn Chance,
        (from, to, lane): (Party, Party, Lane),
        parcel: Parcel,
    ) -> Sent {
        if self.cut.contains(&from) || self.cut.contains(&to) {
            return Sent::Lost;
        }
        if let Some(held) = self.held.get_mut(&(from, to))
            && held.only.is_none_or(|only| only == lane)
        {
            held.waiting.push((lane, parcel));
            return Sent::Held;
        }
        let back = !matches!(parcel.body, Body::Request(_));
        let way = Way { from, to, lane, back };
        let delay = chance.delay(way);
        let last = self.last.entry(way).or_default();
        *last = (now + delay).max(*last);
        Sent::Arrives(*last, parcel)
    }

    /// From now on, what `from` sends to `to` waits; or only what it sends on one
    /// lane.
    pub(crate) fn hold(&mut self, from: Party, to: Party, only: Option<Lane>) {
        self.held.entry((from, to)).or_default().only = only;
    }

    /// What `from` sends to `to` waits no more. Returns what has waited.
    pub(crate) fn release(&mut self, from: Party, to: Party) -> Vec<(Lane, Parcel)> {
        self.held.remove(&(from, to)).unwrap_or_default().waiting
    }

    /// What waits from `from` to `to`; nothing when that is not held.
    pub(crate) fn waiting(&mut self, from: Party, to: Party) -> Option<&mut Vec<(Lane, Parcel)>> {
        self.held.get_mut(&(from, to)).map(|held| &mut held.waiting)
    }

    /// Loses everything from and to `party` from now on.
    pub(crate) fn cut_off(&mut self, party: Party) {
        self.cut.insert(party);
    }

    /// Ends that.
    pub(crate) fn heal(&mut self, party: Party) {
        self.cut.remove(&party);
    }
}
