//! The view: who is in the cluster and which servers hold what.
//!
//! The *viewleader* is a configuration manager in the sense of PacificA (Lin,
//! Yang, Zhang, Zhou; MSR-TR-2008-25): servers keep *leases* with it by
//! heartbeats, and it alone decides who is a *member* and which members form
//! the *group* of each arc of the ring. The data itself never passes through
//! it, and while nobody comes or goes servers and clients need it only to renew
//! leases.
//!
//! Two counters order everything it decides:
//!
//! * the *epoch* grows when a member comes or goes. It is the original's, and
//!   the original's clients compare it before they commit;
//! * the *revision* grows with every change of the view, of members or of
//!   groups. A group's *version* is the revision that last changed it; no two
//!   groups share one. Every
//!   message between replicas carries it, and a replica refuses one that is not
//!   its own: this is the fence that keeps a deposed primary out.
//!
//! In this folder: [`state`] holds members and groups and plans the next step
//! of each group; [`locks`] the lock service; [`leader`] is what the viewleader that
//! leads does with both, with leases and the clock; [`viewleader`] is the machine of
//! one viewleader of a group, which replicates the changes of the state through
//! [`crate::consensus`]; [`restoring`] is how a new cluster takes over from one that is gone;
//! [`messages`] is what it understands.

pub mod answered;
pub mod health;
pub mod leader;
pub mod locks;
pub mod messages;
pub mod restoring;
pub mod state;
pub mod viewleader;

use crate::kv::ring::{self, Arc, Point};
use crate::wire::Identity;
use restoring::Restoration;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddrV4;

/// Counts the changes of membership.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// Counts the changes of the view; also the version of a group: the revision
/// that last changed it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// Comes with every grant of a lock; larger than that of any grant before it, of
/// whatever lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(pub u64);

impl Token {
    /// Whether it is that of no grant.
    pub fn is_none(&self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "e{}", self.0)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

/// Which protocol a server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dialect {
    /// The Python original's: it is listed, but it can't be in a group.
    Original,
    /// Ours.
    Ringleader,
}

/// A server with a live lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Who it is; its place on the ring is the hash of this.
    pub id: Identity,
    /// Where others reach it.
    pub address: SocketAddrV4,
    /// Its place on the ring.
    pub hash: Point,
    /// Which protocol it speaks.
    pub dialect: Dialect,
    /// How long its leases are, in milliseconds.
    pub lease_ms: u64,
    /// Which of its starts this is; what is known of one of ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// Its disk has no room: its groups take no writes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// It is to leave: it is in no target, and goes once it holds nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

/// One start of a server over its data directory. An old copy of the directory
/// does not know of the starts after it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// How many starts there have been over this directory.
    pub count: u64,
    /// Drawn at this start.
    pub drawn: u64,
}

/// The replicas of one arc of the ring. The arc ends where the next group's
/// starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Where its arc starts.
    pub start: Point,
    /// The revision that last changed it: the fence of all its messages.
    pub version: Revision,
    /// Who takes writes and answers reads; always a ready replica. `None` when
    /// the group is lost.
    pub primary: Option<Identity>,
    /// Everyone who must acknowledge a write, the ready and the others.
    pub replicas: Vec<Seat>,
    /// The replicas that hold every committed entry of the arc.
    pub ready: Vec<Identity>,
    /// The primary has reported that every replica follows this version.
    pub established: bool,
    /// When the group is lost: those that were ready last. Each of them holds
    /// everything that was committed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held_by: Vec<Holder>,
}

/// A server that held a group which is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Who it was; its disk says so when it returns.
    pub id: Identity,
    /// Where it listened.
    pub address: SocketAddrV4,
    /// Which of its starts it was then: an older copy of its disk does not count.
    pub start: Option<Start>,
}

/// A replica's place in a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// Whose it is.
    pub id: Identity,
    /// The revision at which it entered. A server that left a group and entered
    /// it again without noticing sees by this that writes have passed it by.
    pub since: Revision,
    /// It is set aside: its disk has no room and it is to leave. It still has to
    /// follow a new version, so that it stops; nobody waits for it to store
    /// anything, so it is not ready and can't become so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub aside: bool,
}

impl Seat {
    /// The seat of a server that enters at the revision `since`.
    pub fn new(id: Identity, since: Revision) -> Self {
        Self { id, since, aside: false }
    }
}

impl Group {
    /// The seat of `id`, if it is a replica.
    pub fn seat(&self, id: &Identity) -> Option<&Seat> {
        self.replicas.iter().find(|seat| seat.id == *id)
    }

    /// Whether `id` is a replica, ready or not.
    pub fn seats(&self, id: &Identity) -> bool {
        self.seat(id).is_some()
    }

    /// No ready replica is left: the arc can't be served.
    pub fn is_lost(&self) -> bool {
        self.primary.is_none()
    }
}

/// A view: one consistent answer to who is there and who holds what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// The number of membership changes so far.
    pub epoch: Epoch,
    /// The number of changes so far.
    pub revision: Revision,
    /// Everyone with a live lease, by (hash, identity).
    pub members: Vec<Member>,
    /// Every arc of the ring, by its start. Empty until the first server of our
    /// dialect has joined.
    pub groups: Vec<Group>,
    /// No token up to this one fences anything off: it is from before the cluster was
    /// restored from a backup.
    #[serde(default, skip_serializing_if = "Token::is_none")]
    pub burnt: Token,
    /// It is being restored, and serves nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restoring: Option<Restoration>,
}

impl View {
    /// The member with this identity.
    pub fn member(&self, id: &Identity) -> Option<&Member> {
        self.members.iter().find(|member| member.id == *id)
    }

    /// The arc of the group at `index`.
    ///
    /// # Panics
    /// If there is no such group.
    pub fn arc(&self, index: usize) -> Arc {
        let next = (index + 1) % self.groups.len();
        Arc { start: self.groups[index].start, end: self.groups[next].start }
    }

    /// The index of the group whose arc holds `point`; `None` while there are
    /// no groups.
    pub fn group_at(&self, point: Point) -> Option<usize> {
        let last = self.groups.len().checked_sub(1)?;
        let above = self.groups.partition_point(|group| group.start <= point);
        Some(above.checked_sub(1).unwrap_or(last))
    }

    /// Where the primary of the key at `point` listens, if there is one.
    pub fn primary_of(&self, point: Point) -> Option<SocketAddrV4> {
        let group = &self.groups[self.group_at(point)?];
        Some(self.member(group.primary.as_ref()?)?.address)
    }

    /// The members that can be in a group, by (hash, identity).
    pub fn own_members(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.dialect == Dialect::Ringleader)
    }

    /// The replicas that the arc starting at `start` should have, its owner
    /// first. Members that are to leave are in it only while nobody else is there.
    pub fn target_of(&self, start: Point) -> Vec<Identity> {
        let mut own: Vec<&Member> = self.own_members().filter(|member| !member.leaving).collect();
        if own.is_empty() {
            own = self.own_members().collect();
        }
        let places: Vec<Point> = own.iter().map(|member| member.hash).collect();
        ring::target_of(start, &places).into_iter().map(|index| own[index].id.clone()).collect()
    }

    /// Whether every group is exactly its target, led by the arc's owner, with
    /// all replicas ready: nothing is left to move, and nothing is lost.
    pub fn is_at_rest(&self) -> bool {
        self.is_settled() && !self.groups.iter().any(Group::is_lost)
    }

    /// Whether nothing is left to do: every group that is not lost is at its
    /// target and whole, and nobody is about to leave.
    pub fn is_settled(&self) -> bool {
        let nobody_leaves = self.members.iter().all(|member| !member.leaving);
        let mut groups = (0..self.groups.len()).filter(|index| !self.groups[*index].is_lost());
        nobody_leaves
            && groups.all(|index| self.is_complete(index))
            && self.first_divided().is_none()
    }

    /// The index of a group that can become one with the next around the ring: no
    /// server stands between them any more, and both are complete.
    pub fn first_divided(&self) -> Option<usize> {
        let count = self.groups.len();
        let is_divided = |index: &usize| {
            let next = (index + 1) % count;
            let [this, that] = [*index, next].map(|index| &self.groups[index]);
            !self.own_members().any(|member| member.hash == that.start)
                && this.primary == that.primary
                && self.target_of(this.start) == self.target_of(that.start)
                && self.is_complete(*index)
                && self.is_complete(next)
        };
        (0..count).filter(|_| count > 1).find(is_divided)
    }
}
