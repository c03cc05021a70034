//! The disk of a chunkserver in memory: what was not stored is lost with a crash.

use rand::RngExt;
use rand::rngs::StdRng;
use ringleader::gfs::chunkserver::{Found, Op, Trouble};
use ringleader::gfs::{ChunkId, Version};
use ringleader::machine::Time;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

#[derive(Debug, Default)]
pub(crate) struct MemoryDisk {
    copies: BTreeMap<ChunkId, (Found, Vec<u8>)>,
    /// Jobs in their order, and when each is done.
    queue: VecDeque<(u64, Op, Time)>,
    /// Copies in which a bit is flipped.
    damaged: BTreeSet<ChunkId>,
    /// Copies of which the next job finds no room; whether it has come. What comes after
    /// it is not done either.
    refusing: BTreeMap<ChunkId, bool>,
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

impl MemoryDisk {
    pub(crate) fn found(&self) -> Vec<Found> {
        self.copies.values().map(|(found, _)| found.clone()).collect()
    }

    /// Queues a job that is done at `due`, or after the one of its chunk before it.
    pub(crate) fn queue(&mut self, job: u64, op: Op, due: Time) -> Time {
        let chunk = chunk_of(&op);
        let before = self.queue.iter().filter(|(_, op, _)| chunk_of(op) == chunk);
        let due = before.map(|(_, _, time)| *time).max().map_or(due, |last| last.max(due));
        self.queue.push_back((job, op, due));
        due
    }

    /// Whether a job has its turn: what was asked for its chunk before is done.
    pub(crate) fn is_next(&self, job: u64) -> bool {
        let queued = self.queue.iter().find(|(queued, ..)| *queued == job);
        let chunk = queued.map(|(_, op, _)| chunk_of(op));
        let first = self.queue.iter().find(|(_, op, _)| Some(chunk_of(op)) == chunk);
        first.is_some_and(|(first, ..)| *first == job)
    }

    /// The job is done.
    pub(crate) fn store(&mut self, job: u64) -> Option<Trouble> {
        let place = self.queue.iter().position(|(queued, ..)| *queued == job).unwrap();
        let (_, op, _) = self.queue.remove(place).unwrap();
        self.perform(op)
    }

    /// Of what is queued, any number of jobs has made it.
    pub(crate) fn crash(&mut self, rng: &mut StdRng) {
        let kept = rng.random_range(0..=self.queue.len());
        let kept: Vec<_> = self.queue.drain(..).take(kept).collect();
        for (_, op, _) in kept {
            self.perform(op);
        }
        self.refusing.clear();
    }

    pub(crate) fn read(&self, chunk: ChunkId, offset: u64, length: usize) -> Option<Vec<u8>> {
        let (_, bytes) = self.copies.get(&chunk)?;
        bytes.get(offset as usize..offset as usize + length).map(<[u8]>::to_vec)
    }

    /// A bit flips in the copy of `chunk`.
    pub(crate) fn damage(&mut self, chunk: ChunkId) {
        self.damaged.insert(chunk);
    }

    /// Whether a bit is flipped in the copy of `chunk`.
    pub(crate) fn is_damaged(&self, chunk: ChunkId) -> bool {
        self.damaged.contains(&chunk)
    }

    /// Whether a bit is flipped in any copy, or one can't be changed.
    pub(crate) fn has_trouble(&self) -> bool {
        !self.damaged.is_empty() || !self.refusing.is_empty()
    }

    /// The next job for `chunk` finds no room.
    pub(crate) fn refuse(&mut self, chunk: ChunkId) {
        self.refusing.insert(chunk, false);
    }

    /// There is room for what has not been refused by now.
    pub(crate) fn has_room(&mut self) {
        self.refusing.retain(|_, has_refused| *has_refused);
    }

    pub(crate) fn content(&self, chunk: ChunkId) -> (Version, Vec<u8>) {
        let copy = self.copies.get(&chunk);
        copy.map(|(found, bytes)| (found.version, bytes.clone())).unwrap_or_default()
    }

    pub(crate) fn holds(&self, chunk: ChunkId) -> bool {
        self.copies.contains_key(&chunk)
    }

    fn perform(&mut self, op: Op) -> Option<Trouble> {
        if !matches!(op, Op::Delete { .. })
            && let Some(has_refused) = self.refusing.get_mut(&chunk_of(&op))
        {
            *has_refused = true;
            return Some(Trouble::Full);
        }
        match op {
            Op::Mutate { chunk, .. } | Op::Patch { chunk, .. } if self.is_damaged(chunk) => {
                return Some(Trouble::Damaged);
            }
            // What it is to be a copy of may have been deleted since.
            Op::Make { copy_of: Some(source), .. }
                if self.is_damaged(source) || !self.holds(source) =>
            {
                return Some(Trouble::Damaged);
            }
            Op::Make { chunk, version, serial, copy_of, marks, joining } => {
                let bytes = copy_of.map(|it| self.copies[&it].1.clone()).unwrap_or_default();
                let length = bytes.len() as u64;
                let found =
                    Found { chunk, version, serial, length, joining, marks, ..Found::default() };
                self.copies.insert(chunk, (found, bytes));
            }
            Op::Promise { chunk, version } => {
                let (found, _) = self.copies.get_mut(&chunk)?;
                (found.version, found.joining) = (version, false);
            }
            Op::Mutate { chunk, serial, offset, data, mark } => {
                let (found, _) = self.copies.get_mut(&chunk)?;
                assert_eq!(found.serial.next(), serial, "a gap in {chunk}");
                found.serial = serial;
                let begin = offset.min(found.length);
                found.regions.push((serial, begin, offset + data.len() as u64 - begin));
                if found.regions.len() > 128 {
                    found.regions.remove(0);
                }
                if let Some((client, number)) = mark {
                    found.marks.retain(|(it, ..)| *it != client);
                    found.marks.push((client, number, offset));
                }
                self.write(chunk, offset, &data);
            }
            Op::Patch { chunk, offset, data } => self.write(chunk, offset, &data),
            Op::Adopt { chunk, version, serial, length, marks } => {
                let (found, bytes) = self.copies.get_mut(&chunk)?;
                (found.version, found.serial, found.length) = (version, serial, length);
                assert_eq!(bytes.len() as u64, length, "all of {chunk} was fetched");
                found.regions.clear();
                for mark in marks {
                    found.marks.retain(|(it, ..)| *it != mark.0);
                    found.marks.push(mark);
                }
            }
            Op::Delete { chunk } => {
                self.copies.remove(&chunk);
                self.damaged.remove(&chunk);
                self.refusing.remove(&chunk);
            }
        }
        None
    }

    fn write(&mut self, chunk: ChunkId, offset: u64, data: &[u8]) {
        let Some((found, bytes)) = self.copies.get_mut(&chunk) else { return };
        let (begin, end) = (offset as usize, offset as usize + data.len());
        bytes.resize(bytes.len().max(end), 0);
        bytes[begin..end].copy_from_slice(data);
        found.length = bytes.len() as u64;
    }
}
