//! One server's part in one group.
//!
//! A replica is *primary* or *secondary* in one version of its group. It holds
//! the list of *pending* entries: prepared and not known to be committed. At
//! the primary they wait for acknowledgements; at a secondary for the news that
//! they are committed, which comes as a *watermark* with the primary's next
//! message ("every entry up to this version is committed").
//!
//! # A new version
//! When the group changes, its primary asks every other replica to *follow* the
//! new version. A replica that follows refuses all older messages, which is
//! what stops a deposed primary. It answers with its own pending entries. A
//! primary that was not primary before takes these in, prepares the union of
//! all pending entries at every replica, and serves once they are committed: a
//! write that was acknowledged is on every replica, so it is in that union or
//! committed already, and one that was not may turn out either way. A primary
//! that was primary before knows every pending entry and goes on serving; what
//! it has pending is prepared anew under the new version.
//!
//! # Deleted keys
//! A deletion is an entry like any other, and must win over older writes of its
//! key that some replica still has pending. A replica that acknowledges a
//! watermark has nothing older pending, so what all have acknowledged is
//! *settled*: the primary forgets the deletions up to there, and tells the others
//! with its next message. A replica that is not ready forgets none: a page with
//! an older write of the key may be on its way to it.
//!
//! # A replica that is not ready
//! It gets every prepare from the moment it enters, and fetches what was
//! committed before that in pages from the primary, in the order of the ring.
//! What it has fetched stays right under later versions, as long as it stays in
//! the group: every write since then has needed its acknowledgement.

use super::disk::Seat;
use super::messages::InGroup;
use super::ring::{Arc, Point};
use super::server::OpId;
use super::table::Cursor;
use super::{Text, Version};
use crate::machine::Time;
use crate::view::Revision;
use crate::wire::Identity;
use std::collections::BTreeMap;
use std::net::SocketAddrV4;

/// How many entries can be pending in one group; further writes wait.
pub const MAX_PENDING: usize = 16 * 1024;

/// How many messages with entries can be on their way from a primary to one fellow.
/// What comes meanwhile goes together with the next one: so the more writers there
/// are, the more entries share a message, an acknowledgement and a batch on the disk.
/// A single writer never waits for it.
pub const MAX_PREPARES: usize = 1;

/// Another replica of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fellow {
    /// Who it is.
    pub id: Identity,
    /// Where it listens.
    pub address: SocketAddrV4,
    /// Its disk has no room.
    pub full: bool,
    /// It follows, and nobody waits for it to store anything.
    pub aside: bool,
}

/// A set of fellows, by their index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fellows(u32);

impl Fellows {
    /// Every one of `count` fellows.
    pub fn all(count: usize) -> Self {
        assert!(count < 32, "a group of {count} replicas");
        Self((1 << count) - 1)
    }

    /// Adds the one with this index.
    pub fn add(&mut self, index: usize) {
        self.0 |= 1 << index;
    }

    /// Takes the one with this index out.
    pub fn remove(&mut self, index: usize) {
        self.0 &= !(1 << index);
    }

    /// Whether the one with this index is in the set.
    pub fn has(self, index: usize) -> bool {
        self.0 & 1 << index != 0
    }
}

/// An entry that is prepared here and not known to be committed. Its value is in
/// the table.
#[derive(Debug)]
pub struct Pending {
    /// Where its key stands.
    pub point: Point,
    /// Its key.
    pub key: Text,
    /// What it counts for against the limit on a message.
    pub bytes: usize,
    /// At the primary: the fellows that it has been sent to under this version,
    /// less those where that has failed.
    pub asked: Fellows,
    /// At the primary: the fellows that have prepared it under this version.
    pub acknowledged: Fellows,
    /// It is on this server's disk.
    pub stored: bool,
    /// The operation that waits for it.
    pub op: Option<OpId>,
}

/// What a primary knows beside what every replica knows.
#[derive(Debug, Default)]
pub struct Primary {
    /// It may answer reads, lease permitting, and take writes.
    pub serving: bool,
    /// The fellows that follow this version.
    pub following: Fellows,
    /// The fellows that have been asked to follow it, less those where that has
    /// failed.
    pub asked: Fellows,
    /// How many entries it has made under this version.
    pub made: u64,
    /// Somebody may lack a pending entry that was passed over, or not taken.
    pub unsent: bool,
    /// How far each fellow has been sent what is pending.
    pub dialogues: BTreeMap<usize, Dialogue>,
    /// The watermark that was sent last, and when.
    pub told: (Version, Time),
    /// The watermark that each fellow has acknowledged.
    pub heard: BTreeMap<usize, Version>,
    /// Deletions have been forgotten here, and the others do not know that they may.
    pub forgot: bool,
}

/// How far a primary has sent one fellow what is pending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dialogue {
    /// How many messages with entries are on their way, less than or as many as
    /// [`MAX_PREPARES`].
    pub under_way: usize,
    /// What is pending up to this version has been sent. That is where to go on, not
    /// whether it has arrived.
    pub sent: Version,
}

/// How far a replica is in fetching what was committed before it entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// Everything up to here.
    UpTo(Option<Cursor>),
    /// All of it, and the last page is on its way to the disk.
    Storing,
    /// All of it is on the disk, and that it is all is on its way there.
    Sealing,
    /// All of it.
    All,
}

/// One server's part in one group, in one version.
#[derive(Debug)]
pub struct Replica {
    /// The arc of the group.
    pub arc: Arc,
    /// The version.
    pub version: Revision,
    /// The revision at which this server entered the group.
    pub since: Revision,
    /// The other replicas.
    pub fellows: Vec<Fellow>,
    /// What it knows as primary; `None` at a secondary.
    pub primary: Option<Primary>,
    /// The pending entries.
    pub pending: BTreeMap<Version, Pending>,
    /// The sum of the pending entries' bytes.
    pub pending_bytes: usize,
    /// What has been fetched.
    pub fetched: Fetched,
    /// A page has been asked for and has not come yet.
    pub fetching: bool,
    /// How many keys are left to fetch, about.
    pub left: u64,
    /// Everything up to this version is committed, as far as this server knows.
    pub committed: Version,
    /// Every replica knows that, up to this version.
    pub settled: Version,
    /// The deletions that are committed here and not forgotten yet, with their keys.
    /// Known once everything is fetched.
    pub deleted: BTreeMap<Version, (Point, Text)>,
    /// The view counts it as ready.
    pub counted_ready: bool,
    /// The view knows that this version is established.
    pub counted_established: bool,
}

impl Replica {
    /// How its messages are addressed.
    pub fn in_group(&self) -> InGroup {
        InGroup { start: self.arc.start, version: self.version }
    }

    /// Whether it is the primary and serves.
    pub fn is_serving(&self) -> bool {
        self.primary.as_ref().is_some_and(|primary| primary.serving)
    }

    /// Whether every fellow follows this version of the primary.
    pub fn all_follow(&self) -> bool {
        let all = Fellows::all(self.fellows.len());
        self.primary.as_ref().is_some_and(|primary| primary.following == all)
    }

    /// At the primary: whether it may send what is pending, and commit it. Before it
    /// serves, it must have heard of everything that is.
    pub fn may_send(&self) -> bool {
        self.is_serving() || self.all_follow()
    }

    /// Adds a pending entry, unless it is known.
    pub fn push(&mut self, version: Version, pending: Pending) {
        self.pending_bytes += pending.bytes;
        if let Some(known) = self.pending.insert(version, pending) {
            self.pending_bytes -= known.bytes;
            if let Some(now) = self.pending.get_mut(&version) {
                now.op = now.op.or(known.op);
                (now.asked, now.acknowledged) = (known.asked, known.acknowledged);
                now.stored |= known.stored;
            }
        }
    }

    /// Takes the pending entry `version` off the list.
    pub fn take(&mut self, version: Version) -> Option<Pending> {
        let pending = self.pending.remove(&version)?;
        self.pending_bytes -= pending.bytes;
        Some(pending)
    }

    /// At the primary: the version up to which everything is committed.
    pub fn watermark(&self) -> Version {
        let made = self.primary.as_ref().map_or(0, |primary| primary.made);
        match self.pending.first_key_value() {
            Some((first, _)) => Version { number: first.number - 1, ..*first },
            None => Version { group: self.version, number: made },
        }
    }

    /// At the primary: whether the pending entry `version` is on every disk that
    /// counts: the fellows', who have acknowledged it, and this server's.
    pub fn is_everywhere(&self, version: Version) -> bool {
        let Some(pending) = self.pending.get(&version) else { return false };
        let mut fellows = self.fellows.iter().enumerate();
        pending.stored
            && fellows.all(|(index, fellow)| fellow.aside || pending.acknowledged.has(index))
    }

    /// At the primary: the version up to which every replica knows that everything is
    /// committed. One that is set aside counts, too: it may have something older pending,
    /// and brings that to the next primary.
    pub fn settled_by_all(&self) -> Version {
        let Some(primary) = &self.primary else { return self.settled };
        let heard = (0..self.fellows.len())
            .map(|fellow| primary.heard.get(&fellow).copied().unwrap_or_default());
        heard.fold(self.watermark(), Version::min)
    }

    /// What the disk is to know of this server's part in the group.
    pub fn seat(&self) -> Seat {
        Seat {
            start: self.arc.start,
            end: self.arc.end,
            since: self.since,
            complete: matches!(self.fetched, Fetched::Sealing | Fetched::All),
            committed: self.committed,
        }
    }

    /// Splits off what stands in `arc`, a part of this replica's arc that has
    /// become a group of its own.
    pub fn part(&mut self, arc: Arc) -> Replica {
        let outside = |pending: &Pending| !arc.contains(pending.point);
        let all = std::mem::take(&mut self.pending);
        let (stays, moves) = all.into_iter().partition(|(_, pending)| outside(pending));
        self.pending = stays;
        let deleted = std::mem::take(&mut self.deleted);
        let (stays, leaves) =
            deleted.into_iter().partition(|(_, (point, _))| !arc.contains(*point));
        self.deleted = stays;
        let mut part = Replica {
            arc,
            version: self.version,
            since: self.since,
            fellows: self.fellows.clone(),
            primary: self
                .primary
                .as_ref()
                .map(|primary| Primary { serving: primary.serving, ..Primary::default() }),
            pending: moves,
            pending_bytes: 0,
            fetched: self.fetched_in(arc),
            fetching: false,
            left: 0,
            committed: self.committed,
            settled: self.settled,
            deleted: leaves,
            counted_ready: self.counted_ready,
            counted_established: false,
        };
        for half in [self, &mut part] {
            half.pending_bytes = half.pending.values().map(|pending| pending.bytes).sum();
        }
        part
    }

    /// Joins this replica and `next`, whose arc begins where this one's ends: their
    /// groups have become one, with the same replicas. Versions of two groups are
    /// never the same, so nothing pending is mistaken for something else.
    pub fn and(self, next: Replica) -> Replica {
        let primary = self.primary.zip(next.primary);
        let mut pending = self.pending;
        pending.extend(next.pending);
        let mut deleted = self.deleted;
        deleted.extend(next.deleted);
        let all = self.fetched == Fetched::All && next.fetched == Fetched::All;
        Replica {
            arc: Arc { start: self.arc.start, end: next.arc.end },
            version: self.version.min(next.version),
            since: self.since.max(next.since),
            fellows: self.fellows,
            primary: primary
                .map(|(a, b)| Primary { serving: a.serving && b.serving, ..Primary::default() }),
            pending,
            pending_bytes: self.pending_bytes + next.pending_bytes,
            fetched: if all { Fetched::All } else { Fetched::UpTo(None) },
            fetching: false,
            left: self.left + next.left,
            // Of what is above it in one of them nobody knows whether it is committed
            // in the other.
            committed: self.committed.min(next.committed),
            settled: self.settled.min(next.settled),
            deleted,
            counted_ready: self.counted_ready && next.counted_ready,
            counted_established: false,
        }
    }

    /// How far the fetch is in `arc`, a part of this replica's arc.
    fn fetched_in(&self, arc: Arc) -> Fetched {
        let Fetched::UpTo(Some(cursor)) = &self.fetched else { return self.fetched.clone() };
        if arc.contains(cursor.point) {
            return self.fetched.clone();
        }
        let reached = cursor.point.distance_from(self.arc.start);
        let begins = arc.start.distance_from(self.arc.start);
        // What has come may not be on the disk yet.
        if reached < begins { Fetched::UpTo(None) } else { Fetched::Storing }
    }
}
