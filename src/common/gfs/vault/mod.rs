//! The copies of a chunkserver on its disk.
//!
//! # What is where
//! The data of a chunk is a plain file, `chunks/3f/00000000000003f.chunk`, named by
//! its number. Everything else stands in the [`crate::store`], in batches that are
//! there as a whole or not at all: a copy's version, serial and length, its
//! checksums, the last append of each client, the places of the last mutations.
//! The paper does it so, too: checksums are kept in memory, and on the disk apart
//! from the data.
//!
//! # Mutations
//! *Appends of more than [`REDO_BYTES`]* are written to the file and synced; then
//! the new length and checksums are committed. A crash in between leaves bytes
//! behind the length, which the next start cuts off.
//!
//! *Anything else* (short appends, and whatever changes bytes that were there) is
//! committed together with its data first: one sync, which it shares with
//! everybody who commits at that moment. Then it is written to the file, without a
//! sync. A crash in between is made good by the next start, which writes it again.
//! Once a second the files are synced, and what was kept for that is dropped. So is,
//! before anything else is committed, what a start has written again.
//!
//! So the file and the checksums never disagree but by damage.
//!
//! # A full disk
//! What does not fit in the store waits there, in its order, until it does, and
//! whoever asks is told that there is no room. When a file does not take something, or
//! it is damaged, then nothing that comes later for this copy is done either, but to
//! delete it: a serial stands for all mutations up to it.
//!
//! # Threads
//! Jobs for one chunk are done in their order by one of [`LANES`] threads. Readers
//! share a chunk with each other, and exclude the moment in which its file is
//! written to below its length.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the vault is a shell: it waits for the disk"
)]

mod lane;
mod records;

use super::chunkserver::{Found, JobId, Op, Trouble};
use super::{BLOCK_BYTES, ChunkId};
use crate::net::{daemon, threads};
use crate::store::committer::Committer;
use crate::store::{self, Space, Store, StoreError};
use crossbeam_channel::{Sender, bounded};
use lane::{Lane, Note};
use rustix::fs::statvfs;
use rustix::io::Errno;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

/// What is changed in a file by no more than this, or below its end, is kept with
/// the change until the file is synced.
pub const REDO_BYTES: usize = 64 * 1024;

/// How many threads write.
pub const LANES: u64 = 4;

/// How many jobs can wait for one of them. Chunkservers bound what is under way
/// for each chunk; beyond this, whoever submits waits.
const MAX_QUEUED: usize = 64 * 1024;

/// How often a full queue is looked at again.
const QUEUE_GLANCE: Duration = Duration::from_millis(1);

/// With less room than this on its disk, a chunkserver takes nothing more.
pub const RESERVE_BYTES: u64 = 512 * 1024 * 1024;

/// Where the name of this chunkserver is kept in [`Space::Meta`].
const NAME: &[u8] = b"name";

/// A copy as readers see it.
#[derive(Debug, Default)]
struct Sheet {
    length: u64,
    /// One for each block, up to the length.
    sums: Vec<u32>,
}

type Sheets = Mutex<BTreeMap<ChunkId, Arc<RwLock<Sheet>>>>;

/// What lanes, readers and the scrub share.
struct Shared {
    dir: PathBuf,
    sheets: Sheets,
    /// The number of the next record that is kept with its data.
    next_redo: AtomicU64,
    /// It commits for lanes, which are told; and for nobody.
    committer: Mutex<Option<Committer<Option<Note>>>>,
    /// The store waits until its disk has room.
    is_full: Arc<AtomicBool>,
    done: Box<dyn Fn(JobId, Option<Trouble>) + Send + Sync>,
}

/// Copies of chunks on a disk. Dropping it commits what is queued, if there is room,
/// and waits until its threads have ended.
pub struct Vault {
    shared: Arc<Shared>,
    lanes: Vec<Sender<Note>>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Vault {
    fn drop(&mut self) {
        let committer = self.shared.committer.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(committer);
        self.lanes.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// What a vault holds as it is opened.
pub struct Opened {
    /// What this chunkserver is called: drawn when there was nothing yet.
    pub name: Box<str>,
    /// The copies.
    pub found: Vec<Found>,
}

/// Why a part of a copy can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadTrouble {
    /// It is not there.
    Gone,
    /// A block is not what was written.
    Damaged,
    /// Not now, as when there are too many open files: that says nothing of the copy.
    NotNow,
}

impl Vault {
    /// Opens what is in `dir`, where `store` keeps all but the data. A chunkserver
    /// without a name gets `name`. What the disk has done is told to `done`.
    ///
    /// # Errors
    /// When it can't be read, or the system has no room for threads.
    pub fn open<S: Store>(
        dir: &Path,
        mut store: S,
        name: &str,
        done: impl Fn(JobId, Option<Trouble>) + Send + Sync + 'static,
    ) -> Result<(Self, Opened), Box<dyn std::error::Error>> {
        let named = match store.get(Space::Meta, NAME)? {
            Some(name) => String::from_utf8(name)?,
            None => {
                store.commit(&[store::Change::put(Space::Meta, NAME, name)])?;
                name.to_owned()
            }
        };
        fs::create_dir_all(dir.join("chunks"))?;
        File::open(dir)?.sync_all()?;
        let read = records::read(&store)?;
        let redone = redo(dir, &store, &read)?;
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            sheets: Mutex::default(),
            next_redo: AtomicU64::new(redone.last().map_or(1, |last| last + 1)),
            committer: Mutex::default(),
            is_full: Arc::default(),
            done: Box::new(done),
        });
        remove_strangers(dir, &read)?;
        let (mut found, mut lanes, mut queues) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..LANES {
            let (sender, queue) = bounded(MAX_QUEUED);
            lanes.push(sender);
            queues.push(Lane::new(Arc::clone(&shared), queue));
        }
        for (chunk, copy) in read {
            if !copy.found.damaged {
                prepare(dir, chunk, copy.found.length)?;
            }
            let sheet = Sheet { length: copy.found.length, sums: copy.sums };
            let clients = copy.found.marks.iter().map(|(client, ..)| *client).collect();
            let last = sheet.sums.last().copied();
            queues[lane_of(chunk)].adopt(chunk, &copy.found, last, clients);
            shared.sheets().insert(chunk, Arc::new(RwLock::new(sheet)));
            found.push(copy.found);
        }
        let (notes, is_full) = (lanes.clone(), Arc::clone(&shared.is_full));
        let room = move |is_room: bool| {
            is_full.store(!is_room, Ordering::Relaxed);
            if is_room {
                tracing::warn!("the disk has room again");
            } else {
                tracing::error!("the disk is full: taking no writes until there is room");
            }
        };
        let done = move |told: Vec<Option<Note>>, result| match result {
            Ok(()) => {
                for note in told.into_iter().flatten() {
                    if let Note::Committed { chunk, .. } = note {
                        // A lane ends only with the process.
                        let _ = notes[lane_of(chunk)].send(note);
                    }
                }
            }
            Err(StoreError::Full { .. }) => {
                tracing::warn!("the disk is full: {} changes are lost with the end", told.len());
            }
            Err(error) => daemon::die(&format!("{error}; ending")),
        };
        let committer = Committer::start_patient("committer", store, room, done)?;
        *shared.committer.lock().unwrap_or_else(PoisonError::into_inner) = Some(committer);
        // Before all else: it must not be written again over what comes later, nor into a
        // chunk that is made under the number of one that is gone.
        if !redone.is_empty() {
            shared.commit(redone.into_iter().map(records::remove_redo).collect(), None);
        }
        let started = queues.into_iter().enumerate();
        let started =
            started.map(|(number, lane)| threads::start(format!("lane {number}"), || lane.run()));
        let threads = started.collect::<io::Result<Vec<_>>>()?;
        let opened = Opened { name: named.into(), found };
        Ok((Self { shared, lanes, threads }, opened))
    }

    /// Has `op` done after what was asked for the same chunk before.
    pub fn submit(&self, job: JobId, op: Op) {
        let _ = self.lanes[lane_of(chunk_of(&op))].send(Note::Do { job, op });
    }

    /// Reads a part of a copy that is there, and checks all blocks that it touches.
    ///
    /// # Errors
    /// A [`ReadTrouble`].
    pub fn read(&self, chunk: ChunkId, offset: u64, length: usize) -> Result<Vec<u8>, ReadTrouble> {
        let sheet = self.shared.sheet(chunk).ok_or(ReadTrouble::Gone)?;
        let sheet = sheet.read().unwrap_or_else(PoisonError::into_inner);
        let end = offset.saturating_add(length as u64);
        if end > sheet.length {
            return Err(ReadTrouble::Gone);
        }
        let block = BLOCK_BYTES as u64;
        let first = offset / block * block;
        let last = (end.div_ceil(block) * block).min(sheet.length);
        let mut bytes = vec![0; (last - first) as usize];
        let read = File::open(self.shared.path(chunk))
            .and_then(|file| file.read_exact_at(&mut bytes, first));
        if let Err(error) = read {
            tracing::error!("{chunk}: {error}");
            let is_damage = is_damage(&error);
            return Err(if is_damage { ReadTrouble::Damaged } else { ReadTrouble::NotNow });
        }
        for (index, part) in bytes.chunks(BLOCK_BYTES).enumerate() {
            let number = (first / block) as usize + index;
            if sheet.sums.get(number) != Some(&crc32c::crc32c(part)) {
                tracing::error!("{chunk}: block {number} is not what was written");
                return Err(ReadTrouble::Damaged);
            }
        }
        bytes.truncate((end - first) as usize);
        bytes.drain(..(offset - first) as usize);
        Ok(bytes)
    }

    /// The chunks that are here, with their lengths.
    pub fn chunks(&self) -> Vec<(ChunkId, u64)> {
        let sheets = self.shared.sheets();
        let length = |sheet: &Arc<RwLock<Sheet>>| {
            sheet.read().unwrap_or_else(PoisonError::into_inner).length
        };
        sheets.iter().map(|(chunk, sheet)| (*chunk, length(sheet))).collect()
    }

    /// How many bytes of the disk are in use and free, and whether that is too little
    /// to take anything more.
    pub fn room(&self) -> (u64, u64, bool) {
        let (used, free) = match statvfs(&self.shared.dir) {
            Ok(disk) => {
                let free = disk.f_bavail * disk.f_frsize;
                (disk.f_blocks.saturating_sub(disk.f_bfree) * disk.f_frsize, free)
            }
            Err(_) => (0, 0),
        };
        (used, free, free < RESERVE_BYTES || self.shared.is_full.load(Ordering::Relaxed))
    }
}

impl Shared {
    fn sheets(&self) -> std::sync::MutexGuard<'_, BTreeMap<ChunkId, Arc<RwLock<Sheet>>>> {
        self.sheets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sheet(&self, chunk: ChunkId) -> Option<Arc<RwLock<Sheet>>> {
        self.sheets().get(&chunk).map(Arc::clone)
    }

    fn path(&self, chunk: ChunkId) -> PathBuf {
        path(&self.dir, chunk)
    }

    fn next_redo(&self) -> u64 {
        self.next_redo.fetch_add(1, Ordering::Relaxed)
    }

    fn commit(&self, mut changes: Vec<store::Change>, mut note: Option<Note>) {
        loop {
            let committer = self.committer.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(running) = committer.as_ref() else { return };
            match running.submit(changes, note) {
                Ok(()) => return,
                Err(refused) => (changes, note) = refused,
            }
            drop(committer);
            // The queue is bounded: there is room a moment later, or once the disk has some.
            std::thread::sleep(QUEUE_GLANCE);
        }
    }
}

fn chunk_of(op: &Op) -> ChunkId {
    match op {
        Op::Make { chunk, .. }
        | Op::Promise { chunk, .. }
        | Op::Mutate { chunk, .. }
        | Op::Patch { chunk, .. }
        | Op::Adopt { chunk, .. }
        | Op::Delete { chunk } => *chunk,
    }
}

fn lane_of(chunk: ChunkId) -> usize {
    (chunk.0 % LANES) as usize
}

/// Whether an error of a read says that the bytes are not there: others, as of a process
/// that has too many files open, will be over.
fn is_damage(error: &io::Error) -> bool {
    let kind = error.kind();
    matches!(kind, ErrorKind::NotFound | ErrorKind::UnexpectedEof | ErrorKind::InvalidData)
        || error.raw_os_error() == Some(Errno::IO.raw_os_error())
}

/// Where the data of `chunk` is: a number can name nothing else.
fn path(dir: &Path, chunk: ChunkId) -> PathBuf {
    let folder = format!("{:02x}", chunk.0 % 256);
    dir.join("chunks").join(folder).join(format!("{:016x}.chunk", chunk.0))
}

/// The file of `chunk`, to be written to.
fn open(dir: &Path, chunk: ChunkId) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path(dir, chunk))
}

/// Makes an empty file, and sees to it that it stays.
fn create(dir: &Path, chunk: ChunkId) -> io::Result<File> {
    let path = path(dir, chunk);
    let folder = path.parent().unwrap_or(dir);
    if !folder.exists() {
        fs::create_dir_all(folder)?;
        File::open(dir.join("chunks"))?.sync_all()?;
    }
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
    File::open(folder)?.sync_all()?;
    Ok(file)
}

/// What was left behind the end of a file by a crash goes; what lacks is damage,
/// and will be found.
fn prepare(dir: &Path, chunk: ChunkId, length: u64) -> io::Result<()> {
    let file = match open(dir, chunk) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => create(dir, chunk)?,
        Err(error) => return Err(error),
    };
    if file.metadata()?.len() != length {
        file.set_len(length)?;
    }
    Ok(())
}

/// Deletes files of chunks that are no more: a crash came before their turn.
fn remove_strangers(dir: &Path, read: &BTreeMap<ChunkId, records::Read>) -> io::Result<()> {
    let known: BTreeSet<PathBuf> = read.keys().map(|chunk| path(dir, *chunk)).collect();
    for folder in fs::read_dir(dir.join("chunks"))? {
        for file in fs::read_dir(folder?.path())? {
            let file = file?.path();
            if !known.contains(&file) {
                tracing::info!("{} belongs to no chunk: deleting it", file.display());
                fs::remove_file(file)?;
            }
        }
    }
    Ok(())
}

/// Writes again what was committed with its data. Returns the numbers of all records,
/// also of chunks that are no more: they are done with.
fn redo<S: Store>(
    dir: &Path,
    store: &S,
    read: &BTreeMap<ChunkId, records::Read>,
) -> Result<Vec<u64>, Box<dyn std::error::Error>> {
    let (mut numbers, mut failure) = (Vec::new(), None);
    let mut files: BTreeMap<ChunkId, File> = BTreeMap::new();
    store.scan(Space::Log, &[0], &mut |key, value| {
        let done = records::redo(key, value).and_then(|(number, chunk, offset, data)| {
            numbers.push(number);
            if !read.contains_key(&chunk) {
                return Ok(());
            }
            let file = match files.entry(chunk) {
                Entry::Occupied(file) => file.into_mut(),
                Entry::Vacant(place) => place.insert(match open(dir, chunk) {
                    Err(error) if error.kind() == ErrorKind::NotFound => create(dir, chunk)?,
                    opened => opened?,
                }),
            };
            file.write_all_at(data, offset)
        });
        failure = done.err();
        failure.is_none()
    })?;
    if let Some(error) = failure {
        return Err(format!("can't write again what was committed: {error}").into());
    }
    for file in files.values() {
        file.sync_data()?;
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests;
