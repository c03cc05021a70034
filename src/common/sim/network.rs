//! The network between the machines: connections that deliver in order, late,
//! and sometimes not at all.
//!
//! Each party has a connection to each other party for each [`Lane`], as the
//! shells do; a client makes a new one for each call. What is sent on one arrives
//! in its order, calls and answers each. What can go wrong:
//!
//! * A *wall* stands between parties: what the one sends to the other is lost, and
//!   only time-outs tell. Walls are how partitions are made, one-way ones too.
//! * A connection *breaks*: of what is on its way the last part is lost, in each
//!   direction, and the caller is told. What was saved may arrive after what is
//!   sent on the next connection.
//! * A pair of parties is *held*: what the one sends to the other waits, in both
//!   roles, as call and as answer, until it is delivered, duplicated or dropped by
//!   hand.

use super::chance::Chance;
use crate::kv::messages::Request;
use crate::machine::Time;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Who can send and be sent something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party {
    /// The viewleader at this site.
    Viewleader(usize),
    /// The server with this index.
    Server(usize),
    /// The client with this number.
    Client(usize),
}

/// A connection of its own, so that what is slow does not hold up the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
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
    /// What viewleaders say to each other.
    Group,
    /// A viewleader asks who somebody is.
    Hello,
    /// What a client asks, on a connection of its own.
    Client,
}

impl Lane {
    /// The lane of a call to a server, as in the shells' links.
    pub fn of(request: &Request) -> Self {
        match request {
            Request::Op(op) if op.is_write() => Self::Patient,
            _ => Self::Prompt,
        }
    }
}

/// Names one call from beginning to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rpc(pub u64);

/// What crosses the network, as its JSON.
#[derive(Clone)]
pub enum Body {
    /// What is asked.
    Request(Rc<[u8]>),
    /// What is answered.
    Reply(Rc<[u8]>),
    /// The connection was closed without an answer.
    Closed,
}

/// A message on its way.
#[derive(Clone)]
pub struct Parcel {
    /// The call that it belongs to.
    pub rpc: Rpc,
    /// What it says.
    pub body: Body,
    /// The same in a few words; empty when it is not worth a line.
    pub words: String,
    /// Whether it may come twice: whoever is sent it does nothing the second time.
    pub is_harmless: bool,
}

/// What becomes of a parcel that was sent.
pub enum Sent {
    /// It will arrive then.
    Arrives(Time, Parcel),
    /// It waits until it is let through by hand.
    Held,
    /// Nobody will hear of it.
    Lost,
}

/// One direction of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    /// Who sends.
    pub from: Party,
    /// Who is sent something.
    pub to: Party,
    /// What kind of calls the connection is for.
    pub lane: Lane,
    /// Whether this is the way of the answers.
    pub back: bool,
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
pub struct Network {
    /// When the last parcel on each way arrives.
    last: BTreeMap<Way, Time>,
    held: BTreeMap<(Party, Party), Held>,
    cut: BTreeSet<Party>,
    walls: BTreeMap<Wall, BTreeSet<(Party, Party)>>,
    last_wall: u64,
}

/// Names a wall.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wall(u64);

impl Network {
    /// Sends a parcel. It takes as long as `chance` says, and longer if the one
    /// before it arrives later.
    pub fn send(
        &mut self,
        now: Time,
        chance: &mut dyn Chance,
        (from, to, lane): (Party, Party, Lane),
        parcel: Parcel,
    ) -> Sent {
        if self.is_blocked(from, to) {
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
        if lane == Lane::Client {
            return Sent::Arrives(now + delay, parcel);
        }
        let last = self.last.entry(way).or_default();
        *last = (now + delay).max(*last);
        Sent::Arrives(*last, parcel)
    }

    /// Whether what `from` sends to `to` is lost.
    pub fn is_blocked(&self, from: Party, to: Party) -> bool {
        self.cut.contains(&from)
            || self.cut.contains(&to)
            || self.walls.values().any(|wall| wall.contains(&(from, to)))
    }

    /// From now on, what is sent from the first to the second of one of these
    /// `pairs` is lost.
    pub fn raise(&mut self, pairs: BTreeSet<(Party, Party)>) -> Wall {
        self.last_wall += 1;
        self.walls.insert(Wall(self.last_wall), pairs);
        Wall(self.last_wall)
    }

    /// The wall stands no more.
    pub fn pull_down(&mut self, wall: Wall) {
        self.walls.remove(&wall);
    }

    /// `new` has taken the place of `old`, and stands behind the same walls.
    pub fn take_place(&mut self, old: Party, new: Party) {
        for wall in self.walls.values_mut() {
            let instead = |party| if party == old { new } else { party };
            *wall = wall.iter().map(|(from, to)| (instead(*from), instead(*to))).collect();
        }
    }

    /// The connection of `caller` to `callee` is a new one: what is sent on it can
    /// overtake what was sent before.
    pub fn renew(&mut self, caller: Party, callee: Party, lane: Lane) {
        self.last.remove(&Way { from: caller, to: callee, lane, back: false });
        self.last.remove(&Way { from: callee, to: caller, lane, back: true });
    }

    /// From now on, what `from` sends to `to` waits; or only what it sends on one
    /// lane.
    pub fn hold(&mut self, from: Party, to: Party, only: Option<Lane>) {
        self.held.entry((from, to)).or_default().only = only;
    }

    /// What `from` sends to `to` waits no more. Returns what has waited.
    pub fn release(&mut self, from: Party, to: Party) -> Vec<(Lane, Parcel)> {
        self.held.remove(&(from, to)).unwrap_or_default().waiting
    }

    /// What waits from `from` to `to`; nothing when that is not held.
    pub fn waiting(&mut self, from: Party, to: Party) -> Option<&mut Vec<(Lane, Parcel)>> {
        self.held.get_mut(&(from, to)).map(|held| &mut held.waiting)
    }

    /// Loses everything from and to `party` from now on.
    pub fn cut_off(&mut self, party: Party) {
        self.cut.insert(party);
    }

    /// Ends that.
    pub fn heal(&mut self, party: Party) {
        self.cut.remove(&party);
    }
}
