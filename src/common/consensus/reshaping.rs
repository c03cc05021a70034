//! Adding and removing nodes while the group runs.
//!
//! One node at a time, and one wish at a time; the roster changes by entries of the
//! log ([`super::roster`]). Whoever is to be added is asked first who it is:
//!
//! * in no group: it is added under its name as a learner; once it has caught up the
//!   leader gives it a vote, and the wish is fulfilled;
//! * if the roster has another node at its address, that one's disk is gone: it is
//!   removed first. So a node that has lost its disk is replaced with one wish;
//! * in another group: refused.
//!
//! A wish is refused if for some time the nodes that answer would be no majority of those
//! that stay. A leader that is to go hands over first; the next one fulfils the wish
//! when it is asked again. So every wish may be repeated: each step looks at how the
//! roster is, and does what is missing.

use super::member::Member;
use super::message::Hello;
use super::roster::{MAX_NODES, RosterChange};
use super::{Effect, NodeId, State};
use crate::machine::Time;
use std::net::SocketAddrV4;
use std::time::Duration;

/// How long a wish may take, a new node's catching up included.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// For how long nobody counts as silent: a leader that was elected just now has not heard
/// from the others yet.
const LISTENING: Duration = Duration::from_secs(2);

/// What somebody wishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// That the process at this address is in the group, and votes.
    Add(SocketAddrV4),
    /// That no node at this address is in the group.
    Remove(SocketAddrV4),
}

/// Why a wish is not fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Another one is under way.
    #[error("the group is being changed already: try again")]
    Busy,
    /// This node does not lead, or hands over now.
    #[error("this node does not lead")]
    NotLeader,
    /// Nobody sits at the address.
    #[error("nobody answers at {0}: start one there first, with --join")]
    Nobody(SocketAddrV4),
    /// Whoever sits there is in another group.
    #[error(
        "what listens at {0} is of another group: it would lose what it holds; to let it come into \
         this one, start it over an empty data directory, with --join"
    )]
    Foreign(SocketAddrV4),
    /// Whoever sits there was removed from this group.
    #[error("what listens at {0} was removed: start it over an empty data directory, with --join")]
    Removed(SocketAddrV4),
    /// No node of the group is there.
    #[error("no node of the group is at {0}")]
    Unknown(SocketAddrV4),
    /// It is the last one.
    #[error("{0} is the only node that votes: add another one first")]
    Last(SocketAddrV4),
    /// Too few of those that stay answer.
    #[error(
        "without {0} only {1} of {2} nodes that vote would answer, which is no majority: \
         start those that are down, or remove one of them first"
    )]
    NoMajority(SocketAddrV4, usize, usize),
    /// The group is full.
    #[error("the group has {MAX_NODES} nodes, as many as it can: remove one first")]
    Full,
    /// It is taking long, and may be done yet.
    #[error("it is taking long: see status for how far it is")]
    Late,
}

/// A wish under way.
#[derive(Debug)]
pub(super) struct Reshaping {
    number: u64,
    wish: Wish,
    until: Time,
    /// When those that were not heard until then are silent.
    listens_until: Time,
    /// Who sits at the address of one to be added, once it has said so.
    newcomer: Option<NodeId>,
    /// The change that was proposed last.
    proposed: Option<RosterChange>,
}

impl Reshaping {
    pub(super) fn new<S: State>(
        now: Time,
        number: u64,
        wish: Wish,
        hello: Hello,
        effects: &mut Vec<Effect<S>>,
    ) -> Self {
        if let Wish::Add(address) = wish {
            effects.push(Effect::Ask { address, hello: Box::new(hello) });
        }
        let (until, listens_until) = (now + PATIENCE, now + LISTENING);
        Self { number, wish, until, listens_until, newcomer: None, proposed: None }
    }

    /// Whether this is what it is about.
    pub(super) fn is_for(&self, wish: Wish) -> bool {
        self.wish == wish
    }

    /// The same wish has come again: from now on it has this number. Returns the one
    /// that it had.
    pub(super) fn renumber(&mut self, number: u64) -> u64 {
        std::mem::replace(&mut self.number, number)
    }

    /// What the wish has come to.
    pub(super) fn outcome(self, outcome: Result<(), Refused>) -> (u64, Result<(), Refused>) {
        (self.number, outcome)
    }

    /// Takes what the process at `address` says of itself.
    pub(super) fn heard<S: State>(
        &mut self,
        address: SocketAddrV4,
        hello: Option<&Hello>,
        member: &Member<S>,
    ) -> Result<(), Refused> {
        if self.wish != Wish::Add(address) || self.newcomer.is_some() {
            return Ok(());
        }
        let Some(hello) = hello else { return Err(Refused::Nobody(address)) };
        match hello.group {
            _ if member.roster().has_removed(hello.node) => Err(Refused::Removed(address)),
            Some(group) if group != member.group() => Err(Refused::Foreign(address)),
            _ => {
                self.newcomer = Some(hello.node);
                Ok(())
            }
        }
    }

    /// Takes the next step; what the wish has come to, if that was the last one.
    pub(super) fn advance<S: State>(
        &mut self,
        now: Time,
        member: &mut Member<S>,
        effects: &mut Vec<Effect<S>>,
    ) -> Option<Result<(), Refused>> {
        if now >= self.until {
            return Some(Err(Refused::Late));
        }
        let next = match self.wish {
            Wish::Add(address) => self.next_of_adding(address, member),
            Wish::Remove(address) => self.next_of_removing(address, member),
        };
        match next {
            Err(Refused::NoMajority(..)) if now < self.listens_until => None,
            Err(Refused::NotLeader) => member.hand_over(effects).then_some(Err(Refused::NotLeader)),
            Err(refused) => Some(Err(refused)),
            // Whoever hears that it is done may erase a disk.
            Ok(Next::Done) => member.has_kept_roster().then_some(Ok(())),
            Ok(Next::Wait) => None,
            Ok(Next::Change(change)) => {
                if !member.is_reshaping() {
                    self.proposed = Some(change);
                    member.change_roster(change, effects);
                }
                None
            }
        }
    }

    fn next_of_adding<S: State>(
        &self,
        address: SocketAddrV4,
        member: &Member<S>,
    ) -> Result<Next, Refused> {
        let Some(node) = self.newcomer else { return Ok(Next::Wait) };
        let roster = member.roster();
        if let Some(seat) = roster.seats.get(&node) {
            // The leader gives it a vote when it has caught up.
            return Ok(if seat.votes { Next::Done } else { Next::Wait });
        }
        if roster.has_removed(node) {
            return Err(Refused::Removed(address));
        }
        match roster.at(address) {
            Some(old) => self.remove(old, address, member),
            None if roster.seats.len() >= MAX_NODES => Err(Refused::Full),
            None => Ok(Next::Change(RosterChange::Add { node, address })),
        }
    }

    fn next_of_removing<S: State>(
        &self,
        address: SocketAddrV4,
        member: &Member<S>,
    ) -> Result<Next, Refused> {
        match member.roster().at(address) {
            Some(node) => self.remove(node, address, member),
            None if self.proposed.is_some() => Ok(Next::Done),
            None => Err(Refused::Unknown(address)),
        }
    }

    /// The way to remove `node`, if those that answer are a majority without it.
    fn remove<S: State>(
        &self,
        node: NodeId,
        address: SocketAddrV4,
        member: &Member<S>,
    ) -> Result<Next, Refused> {
        let change = RosterChange::Remove { node };
        if self.proposed == Some(change) {
            return Ok(Next::Change(change));
        }
        let standings = member.standings();
        let votes = standings.get(&node).is_some_and(|standing| standing.votes);
        let others = standings.iter().filter(|(other, it)| **other != node && it.votes);
        let (all, answer) = others
            .fold((0, 0), |(all, answer), (_, it)| (all + 1, answer + usize::from(it.answers)));
        if votes && all == 0 {
            return Err(Refused::Last(address));
        }
        if votes && answer * 2 <= all {
            return Err(Refused::NoMajority(address, answer, all));
        }
        if member.leader() == Some(node) {
            return Err(Refused::NotLeader);
        }
        Ok(Next::Change(change))
    }
}

/// What is to be done next for a wish.
enum Next {
    Wait,
    Change(RosterChange),
    Done,
}
