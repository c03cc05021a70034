//! The file system: files in chunks, chunks on several chunkservers, one master
//! that knows where.
//!
//! It follows the Google File System (Ghemawat, Gobioff, Leung, SOSP 2003), with
//! one thing made stricter: what a client was told is never taken back, and
//! what is read is never old.
//!
//! # Who knows what
//! The *master* knows the names, which chunks a file has, and for every chunk its
//! *version* and its *members*: the chunkservers whose copies count. It knows no
//! data and no lengths. A *chunkserver* holds copies of chunks, and for each of
//! them the version, a *serial* (how many mutations it has applied), its length,
//! and a checksum for every [`BLOCK_BYTES`]. A *client* asks the master where,
//! and then speaks to chunkservers only.
//!
//! # Promises, and how each is kept
//!
//! 1. **Acknowledged data is on the disk of every member.** The primary gives
//!    each mutation the next serial and its place in the chunk; every member
//!    applies mutations in the order of their serials, without a gap; the primary
//!    acknowledges what all members have on their disks. So of two members, one
//!    always holds a prefix of the other's mutations, and each holds all that was
//!    acknowledged.
//! 2. **A copy that missed a mutation is never read for it.** While a member is
//!    silent, nothing is acknowledged. The primary tells the master, and the
//!    master begins a *round*: every member that can be reached promises to
//!    refuse versions older than the new one; every other one must have stopped
//!    to serve *by itself*. It has, once its lease is over, and a lease is renewed
//!    only by an answer that names the chunks that it may serve no more: not even
//!    under the new version, as long as nobody has heard that it agrees to it. Then
//!    the new version with its members goes into the master's log, and only after
//!    that anything is acknowledged without the silent one.
//! 3. **Two primaries never act for one chunk.** A primary acts under a version
//!    and needs every member of it. A new version has at least one member of the
//!    one before, and that member has promised to refuse it. Besides, a primary
//!    acts only while its server's lease is live: for the server it runs from when
//!    the heartbeat was *sent*, for the master from when it was *received*, and
//!    longer by [`DRIFT_PER_MILLE`].
//! 4. **What differs after a failure is made equal before anything goes on.** What
//!    was in flight is on some members and not on others, and nobody was told. Of
//!    the new members the one with the highest serial becomes primary; the others
//!    fetch from it what they miss. Then it acknowledges what was pending.
//!    So a region is the same on all members, whether its writer was told of
//!    success or not.
//! 5. **A record append is atomic, and exactly once for whoever numbers it.** A
//!    client's name and number are kept with the chunk, durable with the mutation
//!    itself, and travel with every copy. The same number again is answered
//!    with the place that it got. They are never forgotten: a chunk that can't
//!    remember one client more is closed, and the append goes to the next.
//! 6. **The metadata survives a kill at any instant.** Whatever the master must
//!    not forget is a change in a log, on its disk before anybody sees it.
//!    Leases are not: a master that has just started confirms no version of a chunk
//!    before every lease that the one before could have given for it is over, or its
//!    chunkserver has promised, or was told, to serve older ones no more.
//! 7. **A damaged block is never returned.** Every read and every change of a part
//!    of a block checks its checksum, and a scrub reads everything in its turn. A
//!    copy with a damaged block serves nothing more; it is reported, left out by a
//!    round, deleted, and replaced from a good one.
//! 8. **Nothing a name holds reaches outside.** File names live in the master
//!    only, checked by [`FileName`]; a chunk's file is named by its number.
//!
//! # What a client sees
//! A read returns what was last acknowledged, or what was written since and not
//! yet acknowledged; if the writer then never hears of success, that may be gone
//! again (when every member that had it has failed). A write that fails leaves its
//! region undefined, though equal on all members. A file's chunks have all the
//! same size; an append that does not fit in the last one fills it up with zeros
//! and goes to the next, as in the paper.
//!
//! Whoever writes to what a snapshot shares gets a chunk of its own in its place. Locations
//! are good for [`LOCATIONS_LAST`], and the first change of that chunk waits for as long:
//! so nobody reads what is the snapshot's alone by then. A shared chunk has no primary.
//!
//! Clients keep leases. So a snapshot is taken, and a file renamed or deleted, when the leases of
//! its chunks are taken away: what is written later is written to what is called so then.
//!
//! When a member fails, writes to its chunks wait until its lease is over, at
//! most [`LEASE`] and the margin; reads go on at the others.
//!
//! # What is missing on purpose
//! No directories of their own (a name has slashes, and that is all), no
//! permissions, no quotas, no encryption. Locations are in the master's log: the
//! paper leaves them to the chunkservers, and can't tell there whether a copy that
//! returns missed something *under* its version.

pub mod chunkserver;
pub mod files;
pub mod master;
pub mod messages;
pub mod state;
pub mod vault;

pub use files::{FileName, NameError};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// A checksum covers this many bytes of a chunk.
pub const BLOCK_BYTES: usize = 64 * 1024;

/// The size of a file's chunks unless its creator says otherwise: the paper's.
pub const DEFAULT_CHUNK_BYTES: u64 = 64 * 1024 * 1024;

/// The size of the chunks of a file that an original client makes, which computes
/// places in chunks by itself.
pub const ORIGINAL_CHUNK_BYTES: u64 = 64_000;

/// The smallest and the largest chunk size.
pub const CHUNK_BYTES: std::ops::RangeInclusive<u64> = 1024..=1024 * 1024 * 1024;

/// How many copies of each chunk there are, unless a file's creator says
/// otherwise.
pub const DEFAULT_COPIES: u8 = 3;

/// The most copies that a file can ask for.
pub const MAX_COPIES: u8 = 16;

/// How much data one message carries at most.
pub const MAX_PIECE_BYTES: usize = 1024 * 1024;

/// The longest record that can be appended: a quarter of a chunk of the default
/// size is the paper's limit, one message is ours.
pub const MAX_RECORD_BYTES: usize = MAX_PIECE_BYTES;

/// How long a chunkserver serves after it has sent a heartbeat that was answered.
pub const LEASE: Duration = Duration::from_secs(4);

/// How long a chunkserver of the original is taken to be there after a sign of life:
/// the original's figure.
pub const ORIGINAL_LEASE: Duration = Duration::from_secs(35);

/// By how much two clocks' rates may differ: thousandths of a lease that the
/// master waits longer than the chunkserver does.
pub const DRIFT_PER_MILLE: u32 = 20;

/// How long the master waits for a lease to run out.
pub fn lease_margin() -> Duration {
    LEASE + LEASE * DRIFT_PER_MILLE / 1000
}

/// For how long a client may go on reading where it was told that a chunk is. Somebody
/// who writes to what a snapshot shares gets another chunk, and waits for so long until
/// nobody reads the shared one in its place.
pub const LOCATIONS_LAST: Duration = Duration::from_secs(2);

/// How long the master waits until locations that it has told are forgotten.
pub fn locations_margin() -> Duration {
    LOCATIONS_LAST + LOCATIONS_LAST * DRIFT_PER_MILLE / 1000
}

/// Which chunk. Ids count up and are never used again.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct ChunkId(pub u64);

impl ChunkId {
    /// The first one, as in the original.
    pub const FIRST: ChunkId = ChunkId(1000);
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chunk {}", self.0)
    }
}

/// Which version of a chunk's group of members. It grows with every new primary
/// and every change of the members; it is not a count of writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u64);

impl Version {
    /// The one after it.
    pub fn next(self) -> Version {
        Version(self.0 + 1)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

/// How many mutations a copy has applied: the name of the last one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Serial(pub u64);

impl Serial {
    /// The one after it.
    pub fn next(self) -> Serial {
        Serial(self.0 + 1)
    }
}

/// A chunkserver, as the master's log numbers it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServerNo(pub u32);

impl fmt::Display for ServerNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}
