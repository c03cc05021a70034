//! The store in a directory, over the engine fjall.
//!
//! # Space
//!
//! At rest and under endless overwrite the directory holds at most
//!
//! > 3 times the live data + [`FIXED_BYTES`]
//!
//! where the live data are keys and values. TODO
//!
//! # A full disk
//!
//! TODO

use super::journal::{self, Active};
use super::{Change, Durability, Space, Store, StoreError};
use fjall::compaction::Leveled;
use fjall::{
    AbstractTree as _, CompressionType, Database, Keyspace, KeyspaceCreateOptions, PersistMode,
};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A megabyte, in bytes.
const MIB: u64 = 1024 * 1024;

/// The table in memory of one space is written out when it is this large.
pub const MEMORY_TABLE_BYTES: u64 = 8 * MIB;

/// How large a file of a sorted table is about.
pub const TABLE_BYTES: u64 = 8 * MIB;

/// So many tables of one space that overlap are merged into one.
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

/// A commit waits while a space has this many tables in memory that wait to be
/// written out. The engine itself would wait at 4, for ever if its workers have
/// failed.
const MAX_SEALED: usize = 3;

/// A commit waits while a space has this many tables that overlap. The engine
/// itself would wait at 30.
const MAX_OVERLAPPING: usize = 12;

/// How often a commit that waits for the engine looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Says how many bytes are free where the store is.
type Free = Box<dyn Fn() -> io::Result<u64> + Send>;

/// A store in a directory of its own.
pub struct DiskStore {
    path: PathBuf,
    durability: Durability,
    free: Free,
    failed: Option<StoreError>,
    spaces: [Keyspace; Space::ALL.len()],
    engine: Database,
}

impl DiskStore {
    /// Opens the store in the directory `path`, which is made if it isn't there.
    /// Nothing else may be in it, nor in `path` with `.new` appended, where a new
    /// store is made before it is moved into place.
    ///
    /// # Errors
    /// [`StoreError::InUse`], [`StoreError::Damaged`], [`StoreError::Full`] when
    /// there is no room to make it, and [`StoreError::Failed`] for everything
    /// else, such as a directory that can't be written to.
    pub fn open(path: &Path, durability: Durability) -> Result<Self, StoreError> {
        let watched = path.to_owned();
        Self::open_with(path, durability, Box::new(move || free_bytes(&watched)))
    }

    fn open_with(path: &Path, durability: Durability, free: Free) -> Result<Self, StoreError> {
        if is_empty(path)? {
            make(path)?;
        }
        let active = vet(path, durability)?;
        let engine = open_engine(path).or_else(|error| without_last_batch(path, &active, error))?;
        let spaces = open_spaces(&engine).map_err(|error| unreadable(path, error))?;
        Ok(Self { path: path.to_owned(), durability, free, failed: None, spaces, engine })
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
                    || space.tree.l0_run_count() >= MAX_OVERLAPPING
            };
            if !self.spaces.iter().any(is_behind) {
                return Ok(());
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
        for change in batch {
            match change {
                Change::Put { space, key, value } => {
                    writes.insert(self.space(*space), &**key, &**value);
                }
                Change::Remove { space, key } => writes.remove(self.space(*space), &**key),
            }
        }
        // A worker that panicked has left its locks poisoned.
        catch_unwind(AssertUnwindSafe(|| writes.commit()))
            .unwrap_or(Err(fjall::Error::Poisoned))
            .map_err(failed)
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
        let removes_only = batch.iter().all(|change| matches!(change, Change::Remove { .. }));
        self.check_room(batch.iter().map(|change| change.bytes() as u64).sum(), removes_only)?;
        let outcome = self.wait_for_workers().and_then(|()| self.write(batch));
        self.failed = outcome.as_ref().err().cloned();
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

/// Looks through the journals while nobody else can write to them.
fn vet(path: &Path, durability: Durability) -> Result<Active, StoreError> {
    let lock_path = path.join("lock");
    let lock = OpenOptions::new().write(true).open(&lock_path).map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            StoreError::Damaged { path: path.into(), what: "it is no store".into() }
        } else {
            unusable(&lock_path, &error)
        }
    })?;
    match lock.try_lock() {
        Ok(()) => journal::vet(path, durability),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse { path: path.into() }),
        Err(TryLockError::Error(error)) => Err(unusable(&lock_path, &error)),
    }
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
    catch_unwind(AssertUnwindSafe(|| builder.open())).unwrap_or(Err(fjall::Error::Unrecoverable))
}

fn open_spaces(engine: &Database) -> Result<[Keyspace; Space::ALL.len()], fjall::Error> {
    let options = || {
        let strategy =
            Leveled::default().with_l0_threshold(MERGE_AT).with_table_target_size(TABLE_BYTES);
        KeyspaceCreateOptions::default()
            .max_memtable_size(MEMORY_TABLE_BYTES)
            .compaction_strategy(Arc::new(strategy))
    };
    let [entries, meta, log] = Space::ALL.map(|space| engine.keyspace(space.name(), options));
    Ok([entries?, meta?, log?])
}

/// The engine did not open: `error`. If that was for the checksum of the very
/// last batch then it was torn with its end on the disk and its middle not, so
/// the store opens without it.
fn without_last_batch(
    path: &Path,
    active: &Active,
    error: fjall::Error,
) -> Result<Database, StoreError> {
    let is_checksum = matches!(
        error,
        fjall::Error::JournalRecovery(fjall::JournalRecoveryError::ChecksumMismatch)
    );
    let Some((begin, end)) = active.last.filter(|_| is_checksum) else {
        return Err(unreadable(path, error));
    };
    let journal = &active.path;
    let bytes = fs::read(journal).map_err(|error| unusable(journal, &error))?;
    journal::cut(journal, begin).map_err(|error| unusable(journal, &error))?;
    if let Ok(engine) = open_engine(path) {
        tracing::warn!("{} was torn: its last batch, at byte {begin}, is cut", journal.display());
        return Ok(engine);
    }
    // It was another batch: leave everything as it was found.
    let restored = bytes.get(begin as usize..end as usize).ok_or(io::ErrorKind::UnexpectedEof);
    let restored = restored.map_err(io::Error::from).and_then(|batch| {
        let mut file = OpenOptions::new().append(true).open(journal)?;
        io::Write::write_all(&mut file, batch)
    });
    restored.map_err(|error| unusable(journal, &error))?;
    Err(unreadable(path, error))
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
                io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound | io::ErrorKind::InvalidData
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
