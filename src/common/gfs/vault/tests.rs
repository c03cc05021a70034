//! The vault over a real disk.

use super::*;
use crate::gfs::messages::Data;
use crate::gfs::{Serial, Version};
use crate::store::disk::DiskStore;
use crate::store::{Change, Durability};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::time::Duration;
use tempfile::TempDir;

const CHUNK: ChunkId = ChunkId(1007);
const PATIENCE: Duration = Duration::from_secs(20);

/// A store whose disk is full on demand, and which tells what it has removed.
struct Limited {
    store: DiskStore,
    is_full: Arc<AtomicBool>,
    removed: Sender<Change>,
}

impl Store for Limited {
    fn durability(&self) -> Durability {
        self.store.durability()
    }

    fn commit(&mut self, batch: &[Change]) -> Result<(), StoreError> {
        let puts = batch.iter().any(|change| matches!(change, Change::Put { .. }));
        if puts && self.is_full.load(Ordering::Relaxed) {
            return Err(StoreError::Full { free: 0, needed: 1 });
        }
        self.store.commit(batch)?;
        let removed = batch.iter().filter(|change| matches!(change, Change::Remove { .. }));
        removed.cloned().for_each(|change| drop(self.removed.send(change)));
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.store.sync()
    }

    fn get(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.get(space, key)
    }

    fn scan(
        &self,
        space: Space,
        from: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        self.store.scan(space, from, take)
    }
}

struct Trial {
    dir: TempDir,
    is_full: Arc<AtomicBool>,
    vault: Option<Vault>,
    found: Vec<Found>,
    done: Receiver<(JobId, Option<Trouble>)>,
    removed: Receiver<Change>,
    jobs: u64,
    serial: Serial,
    /// What must be there.
    model: Vec<u8>,
}

impl Trial {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ((_, done), (_, removed)) = (unbounded(), unbounded());
        let mut trial = Self {
            dir,
            is_full: Arc::default(),
            vault: None,
            found: Vec::new(),
            done,
            removed,
            jobs: 0,
            serial: Serial(0),
            model: Vec::new(),
        };
        trial.open();
        let (version, serial, marks) = (Version(1), Serial(0), Vec::new());
        trial.run(Op::Make { chunk: CHUNK, version, serial, copy_of: None, marks, joining: false });
        trial
    }

    fn open(&mut self) {
        let ((sender, done), (remover, removed)) = (unbounded(), unbounded());
        let store = self.dir.path().join("store");
        let store = DiskStore::open(&store, Durability::Always).unwrap();
        let is_full = Arc::clone(&self.is_full);
        let store = Limited { store, is_full, removed: remover };
        let (vault, opened) = Vault::open(self.dir.path(), store, "me", move |job, trouble| {
            let _ = sender.send((job, trouble));
        })
        .unwrap();
        (self.vault, self.found) = (Some(vault), opened.found);
        (self.done, self.removed) = (done, removed);
    }

    /// Ends it, and opens it again: files that were not synced yet are not.
    fn reopen(&mut self) {
        drop(self.vault.take());
        self.open();
    }

    fn vault(&self) -> &Vault {
        self.vault.as_ref().unwrap()
    }

    fn submit(&mut self, op: Op) {
        self.jobs += 1;
        self.vault().submit(self.jobs, op);
    }

    fn run(&mut self, op: Op) -> Option<Trouble> {
        self.submit(op);
        let (job, trouble) = self.done.recv_timeout(PATIENCE).unwrap();
        assert_eq!(job, self.jobs);
        trouble
    }

    fn write(&mut self, offset: usize, data: &[u8]) -> Option<Trouble> {
        let op = self.mutation(offset, data);
        self.run(op)
    }

    fn mutation(&mut self, offset: usize, data: &[u8]) -> Op {
        self.serial = self.serial.next();
        self.model.resize(self.model.len().max(offset + data.len()), 0);
        self.model[offset..offset + data.len()].copy_from_slice(data);
        let (serial, data) = (self.serial, Data::from(data));
        let mark = Some((7, serial.0));
        Op::Mutate { chunk: CHUNK, serial, offset: offset as u64, data, mark }
    }

    /// Until the files are synced, and what was kept of the last change for that is dropped.
    fn wait_until_flushed(&self) {
        let last = self.vault().shared.next_redo.load(Ordering::Relaxed) - 1;
        while self.removed.recv_timeout(PATIENCE).unwrap() != records::remove_redo(last) {}
    }

    fn assert_as_written(&self) {
        let length = self.model.len();
        let read = self.vault().read(CHUNK, 0, length).unwrap();
        assert!(read == self.model, "what is read is not what was written");
        for (offset, length) in [(0, 1), (length / 2, length / 3), (length - 1, 1)] {
            let part = self.vault().read(CHUNK, offset as u64, length).unwrap();
            assert!(part == self.model[offset..offset + length]);
        }
        assert_eq!(self.vault().read(CHUNK, length as u64, 1), Err(ReadTrouble::Gone));
    }

    fn file(&self) -> PathBuf {
        self.vault().shared.path(CHUNK)
    }
}

fn bytes(seed: usize, count: usize) -> Vec<u8> {
    (0..count).map(|index| (index * 31 + seed * 17 + index / 251) as u8).collect()
}

/// Short and long appends, gaps, writes below the end and across it.
fn write_all_kinds(trial: &mut Trial) {
    let places = [
        (0, 100),
        (100, 70_000),
        (70_100, 5),
        (70_105, 200_000),
        (300_000, 10),
        (50, 20),
        (65_530, 20),
        (299_990, 100_000),
        (700_000, 300_000),
        (999_999, 2),
    ];
    for (seed, (offset, count)) in places.into_iter().enumerate() {
        assert_eq!(trial.write(offset, &bytes(seed, count)), None);
        trial.assert_as_written();
    }
}

#[test]
fn what_was_written_is_read_wherever_it_was_written() {
    let mut trial = Trial::new();
    write_all_kinds(&mut trial);
    let end = trial.model.len() + 100_000;
    trial.write(end, &[]);
    trial.assert_as_written();
}

#[test]
fn what_was_durable_is_there_after_a_kill_with_all_that_belongs_to_it() {
    let mut trial = Trial::new();
    write_all_kinds(&mut trial);
    trial.reopen();
    trial.assert_as_written();
    let found = trial.found[0].clone();
    assert_eq!((found.chunk, found.version, found.serial), (CHUNK, Version(1), Serial(10)));
    assert_eq!(found.marks, [(7, 10, 999_999)]);
    assert_eq!(found.regions.len(), 10);
    assert_eq!(found.regions[4], (Serial(5), 270_105, 29_905));
    trial.write(3, b"more");
    trial.assert_as_written();
}

#[test]
fn a_change_that_did_not_reach_the_file_is_made_again() {
    let mut trial = Trial::new();
    trial.write(0, &bytes(1, 1000));
    trial.write(500, &bytes(2, 100));
    // As if the system had not written the file before it went down.
    let file = trial.file();
    fs::write(&file, bytes(9, 1000)).unwrap();
    trial.reopen();
    trial.assert_as_written();
}

#[test]
fn what_was_made_again_at_a_start_is_not_made_again_over_what_came_later() {
    let mut trial = Trial::new();
    trial.write(0, b"first");
    trial.reopen();
    trial.write(0, b"after");
    trial.wait_until_flushed();
    trial.reopen();
    trial.assert_as_written();
}

#[test]
fn what_was_made_again_at_a_start_does_not_come_to_a_chunk_of_the_same_number() {
    let mut trial = Trial::new();
    trial.write(0, &bytes(1, 1000));
    trial.reopen();
    trial.run(Op::Delete { chunk: CHUNK });
    let (version, serial, marks) = (Version(5), Serial(0), Vec::new());
    trial.run(Op::Make { chunk: CHUNK, version, serial, copy_of: None, marks, joining: false });
    (trial.model, trial.serial) = (Vec::new(), Serial(0));
    trial.write(0, &bytes(2, 1000));
    trial.wait_until_flushed();
    trial.reopen();
    trial.assert_as_written();
}

#[test]
fn a_torn_append_is_cut_off() {
    let mut trial = Trial::new();
    trial.write(0, &bytes(1, 100_000));
    let mut torn = fs::read(trial.file()).unwrap();
    torn.extend_from_slice(&bytes(5, 5_000));
    fs::write(trial.file(), torn).unwrap();
    trial.reopen();
    trial.assert_as_written();
    // A gap over it is filled with zeros, not with what was torn.
    trial.write(110_000, b"end");
    trial.assert_as_written();
}

#[test]
fn a_flipped_bit_is_never_returned_nor_covered_up() {
    let mut trial = Trial::new();
    trial.write(0, &bytes(1, 200_000));
    let mut flipped = fs::read(trial.file()).unwrap();
    flipped[100_000] ^= 4;
    fs::write(trial.file(), flipped).unwrap();
    assert_eq!(trial.vault().read(CHUNK, 99_990, 20), Err(ReadTrouble::Damaged));
    assert_eq!(trial.vault().read(CHUNK, 70_000, 1), Err(ReadTrouble::Damaged), "in its block");
    assert!(trial.vault().read(CHUNK, 0, 65_536).is_ok());
    assert_eq!(trial.write(70_000, b"new"), Some(Trouble::Damaged));
}

#[test]
fn on_a_full_disk_changes_wait_in_their_order_and_reads_and_deletions_go_on() {
    let mut trial = Trial::new();
    let (chunk, version, serial, marks) = (ChunkId(1010), Version(1), Serial(0), Vec::new());
    trial.run(Op::Make { chunk, version, serial, copy_of: None, marks, joining: false });
    trial.write(0, &bytes(1, 1000));
    let written = trial.model.clone();
    trial.is_full.store(true, Ordering::Relaxed);
    for seed in 0..10 {
        let op = trial.mutation(1000 + seed * 100_000, &bytes(seed, 50_000 + seed * 10_000));
        trial.submit(op);
    }
    assert!(trial.done.recv_timeout(Duration::from_millis(300)).is_err(), "there was no room");
    assert!(trial.vault().room().2);
    assert!(trial.vault().read(CHUNK, 0, 1000).unwrap() == written);
    trial.submit(Op::Delete { chunk });
    assert_eq!(trial.done.recv_timeout(PATIENCE), Ok((trial.jobs, None)));
    trial.is_full.store(false, Ordering::Relaxed);
    for job in trial.jobs - 10..trial.jobs {
        assert_eq!(trial.done.recv_timeout(PATIENCE), Ok((job, None)));
    }
    trial.assert_as_written();
    trial.reopen();
    trial.assert_as_written();
}

#[test]
fn what_a_full_disk_has_not_taken_by_the_end_is_not_there_nor_anything_after_it() {
    let mut trial = Trial::new();
    trial.write(0, &bytes(1, 1000));
    let (model, serial) = (trial.model.clone(), trial.serial);
    trial.is_full.store(true, Ordering::Relaxed);
    for seed in 0..10 {
        let op = trial.mutation(1000 + seed * 100, &bytes(seed, 100));
        trial.submit(op);
    }
    trial.reopen();
    (trial.model, trial.serial) = (model, serial);
    assert_eq!(trial.found[0].serial, serial);
    trial.assert_as_written();
    trial.is_full.store(false, Ordering::Relaxed);
    assert_eq!(trial.write(500, &bytes(3, 1000)), None);
    trial.assert_as_written();
}

#[test]
fn after_a_change_that_was_not_made_there_is_no_other() {
    let mut trial = Trial::new();
    trial.write(0, &bytes(1, 200_000));
    let mut flipped = fs::read(trial.file()).unwrap();
    flipped[100_000] ^= 4;
    fs::write(trial.file(), flipped).unwrap();
    assert_eq!(trial.write(70_000, b"new"), Some(Trouble::Damaged));
    assert_eq!(trial.write(200_000, b"after it"), Some(Trouble::Damaged));
    let version = Version(2);
    assert_eq!(trial.run(Op::Promise { chunk: CHUNK, version }), Some(Trouble::Damaged));
    trial.reopen();
    assert_eq!((trial.found[0].version, trial.found[0].serial), (Version(1), Serial(1)));
    assert_eq!(trial.run(Op::Delete { chunk: CHUNK }), None);
}

#[test]
fn what_can_not_be_read_at_the_moment_is_not_damaged() {
    let mut trial = Trial::new();
    trial.write(0, &bytes(1, 1000));
    let (file, aside) = (trial.file(), trial.dir.path().join("aside"));
    fs::rename(&file, &aside).unwrap();
    std::os::unix::fs::symlink(&file, &file).unwrap();
    assert_eq!(trial.vault().read(CHUNK, 0, 10), Err(ReadTrouble::NotNow));
    fs::rename(aside, file).unwrap();
    trial.assert_as_written();
    for passing in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::ACCESS, Errno::INTR] {
        assert!(!is_damage(&passing.into()), "{passing}");
    }
    assert!(is_damage(&Errno::IO.into()));
    assert!(is_damage(&Errno::NOENT.into()));
    assert!(is_damage(&ErrorKind::UnexpectedEof.into()));
}

#[test]
fn a_copy_whose_records_do_not_fit_together_is_damaged_and_the_others_are_not() {
    let mut trial = Trial::new();
    let (chunk, version, serial, marks) = (ChunkId(1010), Version(1), Serial(0), Vec::new());
    trial.run(Op::Make { chunk, version, serial, copy_of: None, marks, joining: false });
    trial.write(0, &bytes(1, 40 * BLOCK_BYTES));
    let data = Data::from(b"another".as_slice());
    trial.run(Op::Mutate { chunk, serial: Serial(1), offset: 0, data, mark: None });
    let path = trial.dir.path().join("store");
    for (group, sums) in [(1, &[][..]), (2, &[7; 48]), (0, &[7; 3])] {
        drop(trial.vault.take());
        let mut store = DiskStore::open(&path, Durability::Always).unwrap();
        store.commit(&records::put_sums(CHUNK, sums, group * 16, group * 16)).unwrap();
        drop(store);
        trial.reopen();
        assert!(trial.found[0].damaged, "{group}");
        assert!(!trial.found[1].damaged);
        assert_eq!(trial.vault().read(CHUNK, 0, 40 * BLOCK_BYTES), Err(ReadTrouble::Damaged));
        assert_eq!(trial.vault().read(chunk, 0, 7).unwrap(), b"another");
    }
    assert_eq!(trial.write(0, b"new"), Some(Trouble::Damaged));
    assert_eq!(trial.run(Op::Delete { chunk: CHUNK }), None);
    trial.reopen();
    assert_eq!(trial.found.len(), 1);
    // Nothing is left of it.
    let (version, serial, marks) = (Version(2), Serial(0), Vec::new());
    trial.run(Op::Make { chunk: CHUNK, version, serial, copy_of: None, marks, joining: false });
    trial.reopen();
    assert!(!trial.found[0].damaged);
}

#[test]
fn a_file_that_is_gone_is_damage() {
    let mut trial = Trial::new();
    trial.write(0, &bytes(1, 200_000));
    fs::remove_file(trial.file()).unwrap();
    trial.reopen();
    assert_eq!(trial.vault().read(CHUNK, 0, 10), Err(ReadTrouble::Damaged));
}

#[test]
fn what_is_deleted_leaves_nothing_for_a_chunk_of_the_same_number() {
    let mut trial = Trial::new();
    trial.write(0, &bytes(1, 1000));
    let file = trial.file();
    trial.run(Op::Delete { chunk: CHUNK });
    assert!(!file.exists());
    let (version, serial, marks) = (Version(5), Serial(0), Vec::new());
    trial.run(Op::Make { chunk: CHUNK, version, serial, copy_of: None, marks, joining: true });
    (trial.model, trial.serial) = (Vec::new(), Serial(0));
    trial.write(0, &bytes(2, 500));
    trial.reopen();
    trial.assert_as_written();
    assert!(trial.found[0].joining);
    assert_eq!(trial.found[0].regions.len(), 1);
}

#[test]
fn a_copy_of_a_chunk_here_has_all_that_it_has() {
    let mut trial = Trial::new();
    write_all_kinds(&mut trial);
    let (chunk, marks) = (ChunkId(1010), vec![(7, 10, 999_999)]);
    let (version, serial, copy_of) = (Version(1), trial.serial, Some(CHUNK));
    trial.run(Op::Make { chunk, version, serial, copy_of, marks, joining: false });
    assert!(trial.vault().read(chunk, 0, trial.model.len()).unwrap() == trial.model);
    trial.write(0, b"changed");
    assert_eq!(trial.vault().read(chunk, 0, 7).unwrap(), bytes(0, 100)[..7]);
    trial.reopen();
    assert_eq!(trial.found.len(), 2);
    assert_eq!(trial.found[1].serial, Serial(10));
    assert_eq!(trial.found[1].marks, [(7, 10, 999_999)]);
}
