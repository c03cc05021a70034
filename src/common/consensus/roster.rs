//! Who is in a group.
//!
//! The roster is changed by entries of the log, one node at a time, so that
//! everybody who has applied the same entries knows the same members. A *learner*
//! gets the log and has no vote; it becomes a *voter* once it has caught up, so
//! that a new node with an empty disk never makes the others wait for it.

use super::NodeId;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddrV4;

/// How many nodes a group can have. Each one more makes every command dearer.
pub const MAX_NODES: usize = 9;

/// How many nodes that were removed are remembered, to be told so.
const MAX_REMOVED: usize = 1_000;

/// One node of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// Where others reach it.
    pub address: SocketAddrV4,
    /// Whether it has a vote; a learner has none.
    pub votes: bool,
}

/// One change of a roster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RosterChange {
    /// A learner comes in.
    Add {
        /// Who.
        node: NodeId,
        /// Where.
        address: SocketAddrV4,
    },
    /// A learner becomes a voter.
    Promote {
        /// Who.
        node: NodeId,
    },
    /// A node leaves, for good.
    Remove {
        /// Who.
        node: NodeId,
    },
}

/// The nodes of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roster {
    /// Those that are in it.
    pub seats: BTreeMap<NodeId, Seat>,
    /// Those that were removed last.
    removed: VecDeque<NodeId>,
}

impl Roster {
    /// The voters with whom a group is founded.
    pub fn of_founders(founders: impl IntoIterator<Item = (NodeId, SocketAddrV4)>) -> Self {
        let seat = |(node, address)| (node, Seat { address, votes: true });
        Self { seats: founders.into_iter().map(seat).collect(), removed: VecDeque::new() }
    }

    /// Who sits at `address`.
    pub fn at(&self, address: SocketAddrV4) -> Option<NodeId> {
        self.seats.iter().find(|(_, seat)| seat.address == address).map(|(node, _)| *node)
    }

    /// Those that have a vote.
    pub fn voters(&self) -> impl Iterator<Item = NodeId> {
        self.seats.iter().filter(|(_, seat)| seat.votes).map(|(node, _)| *node)
    }

    /// Those that have none yet.
    pub fn learners(&self) -> impl Iterator<Item = NodeId> {
        self.seats.iter().filter(|(_, seat)| !seat.votes).map(|(node, _)| *node)
    }

    /// Whether this node was in it and is not any more.
    pub fn has_removed(&self, node: NodeId) -> bool {
        self.removed.contains(&node)
    }

    /// Makes `change`.
    pub fn apply(&mut self, change: RosterChange) {
        match change {
            RosterChange::Add { node, address } => {
                self.seats.entry(node).or_insert(Seat { address, votes: false });
            }
            RosterChange::Promote { node } => {
                self.seats.entry(node).and_modify(|seat| seat.votes = true);
            }
            RosterChange::Remove { node } => {
                if self.seats.remove(&node).is_some() {
                    self.removed.push_back(node);
                }
                if self.removed.len() > MAX_REMOVED {
                    self.removed.pop_front();
                }
            }
        }
    }

    /// The node is reached elsewhere.
    pub fn relocate(&mut self, node: NodeId, address: SocketAddrV4) {
        self.seats.entry(node).and_modify(|seat| seat.address = address);
    }

    /// How the library calls it.
    pub(super) fn to_raft(&self) -> ConfState {
        let names = |nodes: Vec<NodeId>| nodes.into_iter().map(|node| node.0).collect::<Vec<_>>();
        ConfState::from((names(self.voters().collect()), names(self.learners().collect())))
    }
}

impl RosterChange {
    /// Who it is about.
    pub fn node(self) -> NodeId {
        match self {
            Self::Add { node, .. } | Self::Promote { node } | Self::Remove { node } => node,
        }
    }

    /// How the library calls it.
    pub(super) fn to_raft(self) -> ConfChangeV2 {
        let mut single = ConfChangeSingle { node_id: self.node().0, ..ConfChangeSingle::default() };
        single.set_change_type(match self {
            Self::Add { .. } => ConfChangeType::AddLearnerNode,
            Self::Promote { .. } => ConfChangeType::AddNode,
            Self::Remove { .. } => ConfChangeType::RemoveNode,
        });
        let mut change = ConfChangeV2::default();
        change.set_changes(vec![single].into());
        change
    }
}
