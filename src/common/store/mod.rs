//! What must outlive the process: a store of keys and values on one disk.
//!
//! A [`Store`] is three separate maps ([`Space`]) from bytes to bytes. They
//! change by *batches*: all of a batch happens or nothing of it, and a batch is
//! durable when [`Store::commit`] returns, as far as its [`Durability`] says.
//! [`disk::DiskStore`] keeps them in a directory, [`memory::MemoryStore`] in
//! memory. Waiting for the disk is what takes time, so nobody waits alone:
//! [`committer::Committer`] has a thread that makes one batch of all that is
//! queued and tells everybody at once.
//!
//! # What is promised
//!
//! 1. *All or nothing.* After any crash a batch is there as a whole or not at
//!    all, and if it is there then so are all batches before it.
//! 2. *Durable.* With [`Durability::Always`] no committed batch is ever missing
//!    after a crash of the process, of the system, or a loss of power.
//! 3. *Never wrong.* What was damaged on the disk is refused by name
//!    ([`StoreError::Damaged`]); it is never read as something else, as older, or
//!    as absent. (The exceptions are under "Torn or damaged".)
//! 4. *Full is not broken.* While the disk has no room, commits are refused with
//!    [`StoreError::Full`] *before* anything is written; reads go on, and commits
//!    succeed again as soon as there is room, in the same process.
//! 5. *Failed is final.* After [`StoreError::Failed`] the outcome of the last
//!    commit is unknown and no later one is tried: a kernel that could not write a
//!    page has dropped it and may report success the next time (Rebello and
//!    others, "Can applications recover from fsync failures?", USENIX ATC 2020).
//!    The process must end; its replicas have what it acknowledged.
//! 6. *Bounded space.* Old versions don't fill the disk; the bound is in
//!    [`disk`].
//!
//! # What each durability can lose
//!
//! |            | the process is killed | the system crashes, the power fails          |
//! |------------|-----------------------|----------------------------------------------|
//! | `always`   | nothing               | nothing                                      |
//! | `interval` | nothing               | what was committed in the last [`SYNC_INTERVAL`], and while one sync took |
//! | `none`     | nothing               | what the system had not written by itself: on Linux up to some 30 s |
//!
//! Nobody loses to a kill, since a commit has always handed its batch to the
//! system before it returns. What is lost is lost from the end: promise 1 holds
//! for each of the three. A replica that ran with less than `always` must count
//! itself as not ready when it starts, until it has caught up.
//!
//! # The bytes
//!
//! The engine under [`disk::DiskStore`] is fjall, a log-structured merge tree. A
//! batch is appended to the *journal* and synced; then it goes into sorted tables
//! in memory, one for each space, which are written out as sorted files once they
//! are large; files are merged in the background; a journal is deleted once all
//! that is in it stands in files.
//!
//! ```text
//! DIR/lock             held by the process that has the store open
//! DIR/version          "FJL" 3
//! DIR/7.jnl            sealed journal: to be deleted once it is in tables
//! DIR/8.jnl            active journal, 64 MiB long from the start (a hole, not blocks)
//! DIR/keyspaces/0      the engine's own: the names and options of the spaces
//! DIR/keyspaces/1/...  the tables of one space, their list (v9, current)
//!
//! journal   batch* zeros
//! batch     1  count:u32  number:u64                      begin
//!           2  type:u8  0:u8  space:u64  |key|:u16  |value|:u32  |value|:u32  key  value
//!           ...                                           count times
//!           3  xxh3(items):u64  "FJL" 3                   end
//! ```
//!
//! Integers are little-endian. `type` is 0 for a value, 1 for a removal. The
//! number of a batch is larger than that of every batch before it. Tables carry an
//! xxh3 checksum with each block.
//!
//! # Torn or damaged
//!
//! A journal that ends in the middle of a batch was *torn*: the process or the
//! power went while it was written. Nobody was told that this batch was durable,
//! and it is cut. A batch that makes no sense *with a whole batch behind it* was
//! durable once (each batch is synced before the next one is written), so it was
//! *damaged*, and the store is refused. The engine makes less of a difference: it
//! silently cuts the journal at whatever it can't parse
//! (<https://github.com/fjall-rs/fjall/issues/311>). So [`disk::DiskStore`] looks
//! through the journals itself before the engine does (`journal.rs`), and checks
//! the lists of tables, whose checksums the engine writes and does not read. With a
//! weaker durability than `always` the system may have written the journal's pages
//! in any order; then what stands behind the first hole is cut, too.
//!
//! What is not noticed:
//!
//! - Damage within the very last batch looks like a torn one, and is cut. A
//!   journal that somebody cut off exactly between two batches looks whole.
//! - The number of a batch is not in its checksum; it is only seen to be in order.
//!
//! # Assumptions about the medium
//!
//! - What `fdatasync` has reported as written is read back later, in this process
//!   and any other, until it is damaged. A disk that lies about it, or a virtual
//!   one with its cache set to "unsafe", voids promise 2.
//! - A write that was not synced may be there after a crash, in part, in any
//!   order of its pages, or not at all. A page that was not written reads as zeros
//!   or as the end of the file (as with ext4, XFS and Btrfs by default), not as what
//!   another file had there.
//! - A write that fails or is torn does not harm what was durable before it in the
//!   same page: a journal's last page is written again with the next batch.
//! - `rename` within a directory is atomic, and durable once the directory is
//!   synced.
//! - Damage is accidental. The checksums are no protection against somebody who
//!   writes to the files.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the store is a shell: it waits for the disk"
)]

pub mod committer;
pub mod disk;
pub mod journal;
pub mod memory;
mod upkeep;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// With [`Durability::Interval`], how long what is committed may wait to be
/// synced.
pub const SYNC_INTERVAL: Duration = Duration::from_millis(100);

/// The longest key, in bytes. The journal has two bytes for the length; a
/// longer key would be cut without a word, so it is asserted.
pub const MAX_KEY_BYTES: usize = u16::MAX as usize;

/// Which of the separate maps of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// The data that is served.
    Entries,
    /// What the process must remember about itself: identity, epoch, groups.
    Meta,
    /// Numbered entries of a replicated log. Its old end is removed as it grows:
    /// read it from the first number that is still wanted, since a scan from the
    /// beginning passes over everything that was ever removed there.
    Log,
}

impl Space {
    /// All of them.
    pub const ALL: [Space; 3] = [Space::Entries, Space::Meta, Space::Log];

    /// Its name on the disk.
    fn name(self) -> &'static str {
        match self {
            Space::Entries => "entries",
            Space::Meta => "meta",
            Space::Log => "log",
        }
    }
}

/// One change of one key. A later change of a batch wins over an earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The key has this value from now on.
    Put {
        /// Where.
        space: Space,
        /// At most [`MAX_KEY_BYTES`], and not empty.
        key: Vec<u8>,
        /// Its value.
        value: Vec<u8>,
    },
    /// The key has no value from now on, whether it had one or not.
    Remove {
        /// Where.
        space: Space,
        /// At most [`MAX_KEY_BYTES`], and not empty.
        key: Vec<u8>,
    },
}

impl Change {
    /// A [`Change::Put`].
    pub fn put(space: Space, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { space, key: key.into(), value: value.into() }
    }

    /// A [`Change::Remove`].
    pub fn remove(space: Space, key: impl Into<Vec<u8>>) -> Self {
        Self::Remove { space, key: key.into() }
    }

    /// About how many bytes it takes in a journal.
    pub fn bytes(&self) -> usize {
        const ENVELOPE: usize = 32;
        match self {
            Self::Put { key, value, .. } => key.len() + value.len() + ENVELOPE,
            Self::Remove { key, .. } => key.len() + ENVELOPE,
        }
    }

    /// What it changes.
    fn place(&self) -> (Space, &[u8]) {
        match self {
            Self::Put { space, key, .. } | Self::Remove { space, key } => (*space, key),
        }
    }

    /// Checks what the journal relies upon.
    fn assert_writable(&self) {
        let (Self::Put { key, .. } | Self::Remove { key, .. }) = self;
        assert!(!key.is_empty() && key.len() <= MAX_KEY_BYTES, "a key of {} bytes", key.len());
    }
}

/// When a commit is on the disk. The module's table says what each can lose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Durability {
    /// Synced before it is acknowledged: nothing acknowledged is ever lost
    #[default]
    Always,
    /// Synced every 100 ms: a power failure takes what was acknowledged since
    Interval,
    /// Never synced: a power failure takes what the system had not written yet
    None,
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Always => "always",
            Self::Interval => "interval",
            Self::None => "none",
        })
    }
}

impl FromStr for Durability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        <Self as clap::ValueEnum>::from_str(text, false)
            .map_err(|_| format!("{text:?} is no durability: write always, interval or none"))
    }
}

/// What can go wrong, by what the caller can do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Nothing was written and nothing is broken. Refuse the write, or try
    /// again once there is room.
    #[error("the disk is full: {free} bytes are free, {needed} are needed")]
    Full {
        /// How many bytes are free.
        free: u64,
        /// How many would have to be, for this batch.
        needed: u64,
    },
    /// What is stored can't be read any more. Set the directory aside and fetch
    /// the data from the replicas; starting again does not help.
    #[error("{path} is damaged: {what}", path = path.display())]
    Damaged {
        /// The file; the store's directory where the engine does not say which.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// Another process has the store open. Stop that one or choose another
    /// directory.
    #[error("{path} is in use by another process", path = path.display())]
    InUse {
        /// The store's directory.
        path: PathBuf,
    },
    /// The disk or the engine has failed. What was being committed is there or
    /// not; only the next start can tell. End the process.
    #[error("the store has failed: {what}")]
    Failed {
        /// What was tried, and what came of it.
        what: String,
    },
}

/// Three maps from bytes to bytes that outlive the process.
pub trait Store: Send + 'static {
    /// What [`commit`](Self::commit) waits for.
    fn durability(&self) -> Durability;

    /// Makes all changes of `batch`, in order, or none of them. They are seen by
    /// [`get`](Self::get) and [`scan`](Self::scan) at once and are durable as
    /// [`durability`](Self::durability) says. May wait for the engine's
    /// background work.
    ///
    /// # Errors
    /// [`StoreError::Full`]: nothing has changed. [`StoreError::Failed`]: unknown,
    /// and every later commit fails in the same way.
    ///
    /// # Panics
    /// At a key that is empty or longer than [`MAX_KEY_BYTES`].
    fn commit(&mut self, batch: &[Change]) -> Result<(), StoreError>;

    /// Makes everything that was committed durable. With [`Durability::Interval`]
    /// whoever commits must see to it that this is called within
    /// [`SYNC_INTERVAL`]; the [`committer`] does.
    ///
    /// # Errors
    /// [`StoreError::Failed`].
    fn sync(&mut self) -> Result<(), StoreError>;

    /// The value of `key`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] or [`StoreError::Failed`]; never an answer that
    /// isn't right.
    fn get(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Calls `take` with keys and values from `from` (included) on, in the order
    /// of the keys, until it says `false` or there are no more.
    ///
    /// # Errors
    /// As [`get`](Self::get); what `take` was called with until then is right.
    fn scan(
        &self,
        space: Space,
        from: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::disk::DiskStore;
    use crate::store::memory::MemoryStore;

    type Pairs = Vec<(String, String)>;

    /// Up to `limit` pairs of a space, from `from` on.
    pub(super) fn pairs(store: &impl Store, space: Space, from: &str, limit: usize) -> Pairs {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut pairs = Pairs::new();
        let mut take = |key: &[u8], value: &[u8]| {
            pairs.push((text(key), text(value)));
            pairs.len() < limit
        };
        store.scan(space, from.as_bytes(), &mut take).unwrap();
        pairs
    }

    fn on_each_kind_of_store(check: impl Fn(&mut dyn FnMut(&[Change]), &dyn Fn(Space) -> Pairs)) {
        fn run<S: Store>(
            store: S,
            check: &impl Fn(&mut dyn FnMut(&[Change]), &dyn Fn(Space) -> Pairs),
        ) {
            let store = std::cell::RefCell::new(store);
            check(&mut |batch| store.borrow_mut().commit(batch).unwrap(), &|space| {
                pairs(&*store.borrow(), space, "", usize::MAX)
            });
        }
        run(MemoryStore::default(), &check);
        let dir = tempfile::tempdir().unwrap();
        run(DiskStore::open(&dir.path().join("store"), Durability::None).unwrap(), &check);
    }

    fn put(key: &str, value: &str) -> Change {
        Change::put(Space::Entries, key, value)
    }

    #[test]
    fn the_last_change_of_a_key_wins_within_a_batch_too() {
        on_each_kind_of_store(|commit, all| {
            commit(&[put("a", "1"), put("b", "1"), put("a", "2")]);
            commit(&[put("b", "2"), Change::remove(Space::Entries, "b")]);
            commit(&[Change::remove(Space::Entries, "c"), put("c", "3")]);
            commit(&[]);
            let [a, c] = [("a", "2"), ("c", "3")].map(|(k, v)| (k.to_owned(), v.to_owned()));
            assert_eq!(all(Space::Entries), [a, c]);
        });
    }

    #[test]
    fn spaces_do_not_see_each_other() {
        on_each_kind_of_store(|commit, all| {
            commit(&Space::ALL.map(|space| Change::put(space, "k", space.name())));
            commit(&[Change::remove(Space::Log, "k")]);
            assert_eq!(all(Space::Entries), [("k".to_owned(), "entries".to_owned())]);
            assert_eq!(all(Space::Meta), [("k".to_owned(), "meta".to_owned())]);
            assert_eq!(all(Space::Log), []);
        });
    }

    #[test]
    fn a_scan_goes_in_the_order_of_keys_from_where_it_is_told_until_it_is_told() {
        fn check(mut store: impl Store) {
            store.commit(&["d", "b", "a", "c"].map(|key| put(key, ""))).unwrap();
            let keys = |from, limit| {
                let pairs = pairs(&store, Space::Entries, from, limit);
                pairs.into_iter().map(|(key, _)| key).collect::<String>()
            };
            assert_eq!(keys("", 9), "abcd");
            assert_eq!(keys("b", 2), "bc");
            assert_eq!(keys("bb", 9), "cd");
            assert_eq!(keys("e", 9), "");
            assert_eq!(store.get(Space::Entries, b"c").unwrap(), Some(vec![]));
            assert_eq!(store.get(Space::Entries, b"cc").unwrap(), None);
        }
        check(MemoryStore::default());
        let dir = tempfile::tempdir().unwrap();
        check(DiskStore::open(&dir.path().join("store"), Durability::None).unwrap());
    }

    #[test]
    fn a_durability_is_read_as_it_is_written() {
        for durability in [Durability::Always, Durability::Interval, Durability::None] {
            assert_eq!(durability.to_string().parse(), Ok(durability));
        }
        assert!("Always".parse::<Durability>().is_err());
    }
}
