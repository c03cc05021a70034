//! The store in a directory, over the engine fjall.
//!
//! What it promises and the bytes are drawn in [`super`]. Here is what it costs,
//! and what stands between the engine and us.
//!
//! # Space
//!
//! With `live` bytes of keys and values the directory holds, by measurement
//! (`examples/store_trial.rs`, overwriting everything again and again):
//!
//! - at rest at most `2 * live + 128 MiB`,
//! - while everything is overwritten as fast as the disk takes it, at most
//!   `3 * live + 256 MiB`.
//!
//! The fixed part is journals: a journal is sealed at [`JOURNAL_BYTES`], by the
//! engine's own rule, and deleted once the tables in memory that it stands for
//! have been written out. The factor is what a log-structured merge tree pays:
//! older versions in tables that have not been merged yet, and a merge's result
//! beside what it merges. `upkeep.rs` sees to it that both are short-lived.
//! In memory it takes up to [`MAX_SEALED`] + 1 tables of [`MEMORY_TABLE_BYTES`] for
//! each space in use, and the cache.
//!
//! # A full disk
//!
//! The engine doesn't survive a write that finds no room: whatever it was, it
//! takes no more commits until it is opened again. So a commit asks the file
//! system first, and is refused while fewer than [`RESERVE_BYTES`] would stay
//! free. The reserve is what the engine may still write for commits that it has
//! taken: the tables in memory, one merge, and one journal (a new journal is a
//! hole of that size; most file systems give it blocks only as it fills, some at
//! once). A batch that only removes is taken down to half the reserve, for else a
//! full store could never be made emptier. Nothing is remembered: the next commit
//! asks again. A disk that isn't larger than the reserve is always full.
//!
//! If others fill the disk beyond the reserve, and a write finds no room all the
//! same, then that commit or a later one is [`StoreError::Failed`], and the
//! process must end. Nothing acknowledged is lost; reads go on until it ends, and
//! the next start works as soon as there is room.
//!
//! # Opening
//!
//! A new store is made beside its place and moved there, so that there is never
//! half a store. An old one is looked through by `journal.rs` before the engine
//! sees it. The engine reads the journals (64 MiB or a few times that) and the
//! lists of tables, so the time to open does not grow with the data; tables are
//! checked block by block as they are read.

use super::journal;
use super::upkeep::Upkeep;
use super::{Change, Durability, Space, Store, StoreError};
use crate::net::daemon;
use fjall::compaction::Leveled;
use fjall::{
    AbstractTree as _, CompressionType, Database, Keyspace, KeyspaceCreateOptions, PersistMode,
};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A megabyte, in bytes.
const MIB: u64 = 1024 * 1024;

/// The table in memory of one space is written out when it is this large.
pub const MEMORY_TABLE_BYTES: u64 = 8 * MIB;

/// How large a file of a sorted table is about.
pub const TABLE_BYTES: u64 = 8 * MIB;

/// So many tables of one space that overlap are merged.
pub const MERGE_AT: u8 = 4;

/// A journal is sealed when it is this large: the engine's constant.
pub const JOURNAL_BYTES: u64 = 64 * MIB;

/// Blocks of tables that are kept in memory for reads, in bytes. Servers
/// answer reads from tables of their own, so this is for scans at the start.
const CACHE_BYTES: u64 = 8 * MIB;

/// How many files of tables are kept open.
const MAX_OPEN_TABLES: usize = 128;

/// One writes tables out, one merges them. With fewer the engine can lock itself
/// up: its only worker would wait for room in the queue that it empties.
const WORKERS: usize = 2;

/// So many bytes must stay free for the engine's background work.
pub const RESERVE_BYTES: u64 = 256 * MIB;

// A journal, what is in memory, and a merge of what is piled up with as much
// from the level below.
const _: () = assert!(
    RESERVE_BYTES
        >= JOURNAL_BYTES
            + (Space::ALL.len() * (MAX_SEALED + 1)) as u64 * MEMORY_TABLE_BYTES
            + (MAX_PILED_UP as u64 + MERGE_AT as u64) * TABLE_BYTES
);

/// A commit waits while a space has this many tables in memory that wait to be
/// written out. The engine itself would wait at 4, for ever if its workers have
/// failed.
pub const MAX_SEALED: usize = 3;

/// A commit waits while a space has this many tables that overlap. The engine
/// itself would wait at 30, also for ever. Few means that merges keep up, and so
/// less space; many, that a burst of writes is taken faster.
const MAX_PILED_UP: usize = 8;

/// How often whoever waits for the engine looks again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Says how many bytes are free where the store is.
pub(super) type Free = Arc<dyn Fn() -> io::Result<u64> + Send + Sync>;

/// A store in a directory of its own.
pub struct DiskStore {
    path: PathBuf,
    durability: Durability,
    free: Free,
    failed: Option<StoreError>,
    /// Ended first.
    upkeep: Upkeep,
    spaces: [Keyspace; Space::ALL.len()],
    engine: Database,
}

impl DiskStore {
    /// Opens the store in the directory `path`, which is made if it isn't there.
    /// Nothing else may be in it, nor in `path` with `.new` appended, where a new
    /// store is made before it is moved into place; so `path` can't be a mount
    /// point itself.
    ///
    /// # Errors
    /// [`StoreError::InUse`], [`StoreError::Damaged`], [`StoreError::Full`] when
    /// there is no room to make it, and [`StoreError::Failed`] for everything
    /// else, such as a directory that can't be written to.
    pub fn open(path: &Path, durability: Durability) -> Result<Self, StoreError> {
        let watched = path.to_owned();
        Self::open_with(path, durability, Arc::new(move || free_bytes(&watched)))
    }

    fn open_with(path: &Path, durability: Durability, free: Free) -> Result<Self, StoreError> {
        if is_empty(path)? {
            make(path)?;
        }
        vet(path, durability)?;
        let engine = open_engine(path).map_err(|error| unreadable(path, error))?;
        let spaces = open_spaces(&engine).map_err(|error| unreadable(path, error))?;
        let upkeep = Upkeep::start(engine.clone(), spaces.to_vec(), Arc::clone(&free))
            .map_err(|error| unusable(path, &error))?;
        Ok(Self { path: path.to_owned(), durability, free, failed: None, upkeep, spaces, engine })
    }

    fn space(&self, space: Space) -> &Keyspace {
        &self.spaces[space as usize]
    }

    /// Refuses a batch of `bytes` for which there is no room.
    fn check_room(&self, bytes: u64, removes_only: bool) -> Result<(), StoreError> {
        let free = (self.free)().map_err(|error| StoreError::Failed {
            what: format!("no free space known of {}: {error}", self.path.display()),
        })?;
        // Twice: in the journal, and once more in a table.
        let reserve = if removes_only { RESERVE_BYTES / 2 } else { RESERVE_BYTES };
        let needed = reserve + 2 * bytes;
        if free < needed { Err(StoreError::Full { free, needed }) } else { Ok(()) }
    }

    /// Waits until the engine's workers have caught up, or have failed.
    fn wait_for_workers(&self) -> Result<(), StoreError> {
        loop {
            // This writes nothing: it is how to ask whether a worker has failed.
            self.engine.persist(PersistMode::Buffer).map_err(failed)?;
            let is_behind = |space: &Keyspace| {
                space.tree.sealed_memtable_count() >= MAX_SEALED
                    || space.tree.l0_run_count() >= MAX_PILED_UP
            };
            if !self.spaces.iter().any(is_behind) {
                return Ok(());
            }
            if self.upkeep.has_ended() {
                return Err(StoreError::Failed { what: "a merge has failed, see the log".into() });
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn write(&self, batch: &[Change]) -> Result<(), StoreError> {
        // To hand it to the system at least survives a kill.
        let mode = match self.durability {
            Durability::Always => PersistMode::SyncData,
            Durability::Interval | Durability::None => PersistMode::Buffer,
        };
        let mut writes = self.engine.batch().durability(Some(mode));
        for change in winners(batch) {
            match change {
                Change::Put { space, key, value } => {
                    writes.insert(self.space(*space), &**key, &**value);
                }
                Change::Remove { space, key } => writes.remove(self.space(*space), &**key),
            }
        }
        writes.commit().map_err(failed)
    }
}

impl Store for DiskStore {
    fn durability(&self) -> Durability {
        self.durability
    }

    fn commit(&mut self, batch: &[Change]) -> Result<(), StoreError> {
        batch.iter().for_each(Change::assert_writable);
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        if batch.is_empty() {
            return Ok(());
        }
        let removes = batch.iter().filter(|change| matches!(change, Change::Remove { .. })).count();
        let bytes = batch.iter().map(|change| change.bytes() as u64).sum();
        self.check_room(bytes, removes == batch.len())?;
        let write = || self.wait_for_workers().and_then(|()| self.write(batch));
        // A worker that panicked has left its locks poisoned.
        let outcome = daemon::catch(write).unwrap_or_else(|_| Err(failed(fjall::Error::Poisoned)));
        self.failed = outcome.as_ref().err().cloned();
        self.upkeep.removed(removes);
        outcome
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        let outcome = self.engine.persist(PersistMode::SyncData).map_err(failed);
        self.failed = outcome.as_ref().err().cloned();
        outcome
    }

    fn get(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let value = self.space(space).get(key).map_err(|error| unreadable(&self.path, error))?;
        Ok(value.map(|value| value.to_vec()))
    }

    fn scan(
        &self,
        space: Space,
        from: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        for pair in self.space(space).range(from..) {
            let (key, value) = pair.into_inner().map_err(|error| unreadable(&self.path, error))?;
            if !take(&key, &value) {
                break;
            }
        }
        Ok(())
    }
}

/// The changes that no later one of the batch overrides: of a key that many writers
/// change (how far a group has committed, above all) the engine needs only the last.
fn winners(batch: &[Change]) -> impl Iterator<Item = &Change> {
    let last: HashMap<_, _> = match batch {
        [_] => HashMap::new(),
        batch => batch.iter().enumerate().map(|(at, change)| (change.place(), at)).collect(),
    };
    let wins = move |at, change: &Change| last.get(&change.place()).is_none_or(|last| *last == at);
    batch.iter().enumerate().filter(move |(at, change)| wins(*at, change)).map(|(_, change)| change)
}

/// How many bytes are free on the disk that `path` is on, for who isn't root.
fn free_bytes(path: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(path)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Whether there is nothing yet at `path`.
fn is_empty(path: &Path) -> Result<bool, StoreError> {
    match fs::read_dir(path) {
        Ok(mut files) => Ok(files.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(unusable(path, &error)),
    }
}

/// Makes an empty store at `path`. A store that was half made when the power
/// failed would be taken for a damaged one, so it is moved into place when it is
/// whole.
fn make(path: &Path) -> Result<(), StoreError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    match fs::remove_dir_all(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(unusable(&new, &error));
        }
        _ => {}
    }
    fs::create_dir_all(parent).map_err(|error| unusable(parent, &error))?;
    let engine = open_engine(&new).map_err(|error| unreadable(&new, error))?;
    open_spaces(&engine).map_err(|error| unreadable(&new, error))?;
    engine.persist(PersistMode::SyncAll).map_err(failed)?;
    drop(engine);
    let in_place = File::open(&new)
        .and_then(|made| made.sync_all())
        .and_then(|()| fs::rename(&new, path))
        .and_then(|()| File::open(parent)?.sync_all());
    in_place.map_err(|error| unusable(path, &error))
}

/// Looks through what the engine does not, while nobody else can write to it.
fn vet(path: &Path, durability: Durability) -> Result<(), StoreError> {
    let lock_path = path.join("lock");
    let lock = OpenOptions::new().write(true).open(&lock_path).map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            StoreError::Damaged { path: path.into(), what: "it is no store".into() }
        } else {
            unusable(&lock_path, &error)
        }
    })?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(StoreError::InUse { path: path.into() }),
        Err(TryLockError::Error(error)) => return Err(unusable(&lock_path, &error)),
    }
    // The engine takes a space without its list of tables for one that was never
    // finished, and deletes it. Ours are finished before the store is in place.
    for number in 0..=Space::ALL.len() {
        journal::vet_list(&path.join("keyspaces").join(number.to_string()))?;
    }
    journal::vet(path, durability)
}

fn open_engine(path: &Path) -> Result<Database, fjall::Error> {
    let builder = Database::builder(path)
        .worker_threads(WORKERS)
        .cache_size(CACHE_BYTES)
        .max_cached_files(Some(MAX_OPEN_TABLES))
        .max_journaling_size(JOURNAL_BYTES)
        // A damaged length of something compressed would not parse, and the
        // engine would cut there: `journal.rs` can only see through it plain.
        .journal_compression(CompressionType::None);
    // It asserts some of what it reads.
    daemon::catch(|| builder.open()).unwrap_or(Err(fjall::Error::Unrecoverable))
}

/// How tables are merged.
pub(super) fn strategy() -> Arc<Leveled> {
    Arc::new(Leveled::default().with_l0_threshold(MERGE_AT).with_table_target_size(TABLE_BYTES))
}

fn open_spaces(engine: &Database) -> Result<[Keyspace; Space::ALL.len()], fjall::Error> {
    let options = || {
        KeyspaceCreateOptions::default()
            .max_memtable_size(MEMORY_TABLE_BYTES)
            .compaction_strategy(strategy())
    };
    let [entries, meta, log] = Space::ALL.map(|space| engine.keyspace(space.name(), options));
    Ok([entries?, meta?, log?])
}

/// The file at `path` can't be used: `error`.
fn unusable(path: &Path, error: &io::Error) -> StoreError {
    if error.kind() == io::ErrorKind::StorageFull {
        let free = free_bytes(path).unwrap_or(0);
        return StoreError::Full { free, needed: RESERVE_BYTES };
    }
    StoreError::Failed { what: format!("{}: {error}", path.display()) }
}

/// What is to be done about an error of the engine when it opened or read the
/// store at `path`.
fn unreadable(path: &Path, error: fjall::Error) -> StoreError {
    match error {
        fjall::Error::Locked => StoreError::InUse { path: path.into() },
        fjall::Error::Poisoned => failed(error),
        fjall::Error::Io(error) | fjall::Error::Storage(fjall::LsmError::Io(error))
            // Files that are cut or gone.
            if !matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::NotFound
                    | io::ErrorKind::InvalidData
                    | io::ErrorKind::InvalidInput
            ) =>
        {
            unusable(path, &error)
        }
        error => StoreError::Damaged { path: path.into(), what: error.to_string() },
    }
}

/// What an error of the engine means when it wrote.
fn failed(error: fjall::Error) -> StoreError {
    StoreError::Failed { what: error.to_string() }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
