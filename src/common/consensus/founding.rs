//! How a group comes to be.
//!
//! A process with an empty disk is a new node, and in no group. There are three
//! ways on from there:
//!
//! * *alone*: it was told of no others, and founds a group of one;
//! * *with founders*: it was told with whom to found one, itself included. All of
//!   them must have been started with the same list, and *all* must be there at
//!   once, in no group: then the first of the list founds the group, with all of
//!   them as voters. If only a majority had to be there, a founder that has lost its
//!   disk could found a second group with one that had never heard of the first;
//! * *waiting*: until a group that exists adds it. So does a founder that hears that
//!   another founder is in a group already: its own disk has been lost, and with it
//!   what it has promised, so it is somebody new and must be let in.
//!
//! Whoever waits comes into the group with the first message that a node of the
//! group has for it: only who has it in the roster sends one.

use super::log::Recovered;
use super::message::Hello;
use super::requests::Kind;
use super::roster::Roster;
use super::{Effect, GroupId, NodeId, State};
use crate::machine::Time;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::time::Duration;

/// How often the other founders are asked.
const ASK_EVERY: Duration = Duration::from_millis(500);

/// How a process that is in no group comes into one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// It founds a group of one.
    Alone,
    /// It founds one with these, itself included.
    Founders(Vec<SocketAddrV4>),
    /// It waits to be added.
    Wait,
}

impl Entrance {
    /// How `own` comes into a group with `founders`, if there are any.
    ///
    /// # Errors
    /// What is wrong with the list.
    pub fn with_founders(own: SocketAddrV4, founders: &[SocketAddrV4]) -> Result<Self, String> {
        let distinct: BTreeSet<_> = founders.iter().copied().collect();
        if distinct.len() != founders.len() {
            return Err("an address stands in the list twice".into());
        }
        if distinct.len() > super::roster::MAX_NODES {
            return Err(format!("a group has at most {} nodes", super::roster::MAX_NODES));
        }
        if !founders.is_empty() && !distinct.contains(&own) {
            return Err(format!(
                "{own}, where this one listens, is not in the list; to found a group, start all of \
                 it with the same list; to come into a group that exists, start with --join"
            ));
        }
        Ok(if founders.is_empty() {
            Self::Alone
        } else {
            Self::Founders(distinct.into_iter().collect())
        })
    }
}

impl<S> Recovered<S> {
    /// What to tell the user who starts a node with this entrance over a disk that is in
    /// a group already, if anything: then the entrance does not count.
    ///
    /// # Errors
    /// When the founders are not those of that group, and never were: then the user means
    /// another disk, or another group, or takes the list for a way to make it larger.
    pub fn check(&self, entrance: &Entrance, kind: Kind) -> Result<Option<String>, String> {
        let (Some((_, Some(group))), Entrance::Founders(founders)) = (self.person, entrance) else {
            return Ok(None);
        };
        let names = |list: &BTreeSet<SocketAddrV4>| {
            list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        let present = names(&self.heard.present);
        if let Some(stranger) = founders.iter().find(|it| !self.heard.ever.contains(it)) {
            return Err(format!(
                "it belongs to a {kind} of the group {group}, whose members are {present}; \
                 {stranger} of --peers was never among them. A group that exists is not changed by \
                 --peers: start with its members, or without --peers; to let {stranger} in, start \
                 that one with --join and give the command {kind}_add {stranger}"
            ));
        }
        let founders: BTreeSet<_> = founders.iter().copied().collect();
        Ok((founders != self.heard.present).then(|| {
            format!("--peers does not count any more: the members of the group are {present}")
        }))
    }
}

/// A process that is in no group yet.
#[derive(Debug)]
pub(super) struct Founding {
    node: NodeId,
    own: SocketAddrV4,
    /// In order; empty for one that waits to be added.
    founders: Vec<SocketAddrV4>,
    heard: BTreeMap<SocketAddrV4, NodeId>,
    /// The group that another founder is in.
    exists: Option<GroupId>,
    next: Time,
    /// What was noted last.
    noted: String,
}

impl Founding {
    pub(super) fn new(
        now: Time,
        node: NodeId,
        own: SocketAddrV4,
        founders: Vec<SocketAddrV4>,
    ) -> Self {
        let (heard, noted) = (BTreeMap::new(), String::new());
        Self { node, own, founders, heard, exists: None, next: now, noted }
    }

    /// With whom to found a group.
    pub(super) fn founders(&self) -> &[SocketAddrV4] {
        &self.founders
    }

    /// What to say of oneself.
    pub(super) fn hello(&self) -> Hello {
        let (node, address) = (self.node, self.own);
        Hello { node, group: None, address, founders: self.founders.clone() }
    }

    /// What this process waits for.
    pub(super) fn why(&self) -> String {
        let missing = self.founders.iter().filter(|at| **at != self.own);
        let missing: Vec<String> =
            missing.filter(|at| !self.heard.contains_key(*at)).map(ToString::to_string).collect();
        if let Some(group) = self.exists {
            format!(
                "the group {group} of its peers exists, and this one's disk is empty: it waits to \
                 be added, as {}",
                self.own
            )
        } else if self.founders.is_empty() {
            format!("it waits to be added to a group, as {}", self.own)
        } else if missing.is_empty() {
            "its group is being founded".into()
        } else {
            format!(
                "its group is not founded yet: that takes all of --peers at once, and {} {} missing",
                missing.join(", "),
                if missing.len() == 1 { "is" } else { "are" }
            )
        }
    }

    /// Asks the other founders who they are, now and then.
    pub(super) fn tick<S: State>(&mut self, now: Time, effects: &mut Vec<Effect<S>>) {
        if now < self.next {
            return;
        }
        self.next = now + ASK_EVERY;
        for address in self.founders.iter().filter(|address| **address != self.own) {
            let hello = Box::new(self.hello());
            effects.push(Effect::Ask { address: *address, hello });
        }
        let why = self.why();
        self.note(why, effects);
    }

    fn note<S: State>(&mut self, what: String, effects: &mut Vec<Effect<S>>) {
        if self.noted != what {
            effects.push(Effect::Note(format!("in no group: {what}")));
            self.noted = what;
        }
    }

    /// Takes what the process at `address` says of itself. The roster of the group,
    /// when it is this node that has to found it now.
    pub(super) fn heard<S: State>(
        &mut self,
        address: SocketAddrV4,
        hello: Option<Hello>,
        effects: &mut Vec<Effect<S>>,
    ) -> Option<Roster> {
        if !self.founders.contains(&address) {
            return None;
        }
        let Some(hello) = hello else {
            self.heard.remove(&address);
            return None;
        };
        if let Some(group) = hello.group {
            self.exists = Some(group);
            return None;
        }
        if hello.founders != self.founders {
            self.heard.remove(&address);
            let list = |founders: &[SocketAddrV4]| {
                let names: Vec<String> = founders.iter().map(ToString::to_string).collect();
                if names.is_empty() { "none".to_owned() } else { names.join(",") }
            };
            let what = format!(
                "{address} was started with other --peers ({}) than this one ({}): a group is \
                 founded only when all have the same list; end the wrong one and start it again",
                list(&hello.founders),
                list(&self.founders)
            );
            self.note(what, effects);
            return None;
        }
        self.heard.insert(address, hello.node);
        let is_complete = self.heard.len() + 1 == self.founders.len();
        let is_first = self.founders.first() == Some(&self.own);
        (is_complete && is_first && self.exists.is_none()).then(|| {
            let others = self.heard.iter().map(|(address, node)| (*node, *address));
            Roster::of_founders(others.chain([(self.node, self.own)]))
        })
    }
}
