//! A thread that writes the chunks of its lane.

use super::records::{self, Head};
use super::{REDO_BYTES, Shared, Sheet, create, is_damage, open};
use crate::gfs::chunkserver::{Found, JobId, Op, Trouble};
use crate::gfs::messages::Data;
use crate::gfs::{BLOCK_BYTES, ChunkId, Serial};
use crate::net::daemon;
use crate::store::Change;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// How often files are synced that were written to without.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// What a lane is told.
pub(super) enum Note {
    /// Something is to be done.
    Do { job: JobId, op: Op },
    /// What was submitted has been committed.
    Committed { job: Option<JobId>, chunk: ChunkId, then: Then },
}

/// What remains to be done once a batch is committed.
pub(super) enum Then {
    /// Nothing more: it was only about what stands in the store.
    Nothing,
    /// The file has it already; readers are to see it.
    Show { length: u64, from: usize, sums: Vec<u32> },
    /// It is to be written to the file, which stands under this number until the
    /// file is synced.
    Write { redo: u64, offset: u64, data: Data, length: u64, from: usize, sums: Vec<u32> },
    /// The file is to be deleted.
    Unlink,
}

/// A chunk as it will be when all that was submitted is committed.
struct Plan {
    head: Head,
    /// The checksum of the last block.
    last_sum: Option<u32>,
    /// All checksums, while batches are on their way.
    planned_sums: Vec<u32>,
    clients: BTreeSet<u64>,
    /// How many batches are on their way.
    in_flight: usize,
    /// What waits until there are none.
    held: VecDeque<(JobId, Op)>,
    /// What was written to the file and not synced.
    dirty: Vec<u64>,
    /// Why something was not done: nothing that comes later must be done without it.
    trouble: Option<Trouble>,
}

pub(super) struct Lane {
    shared: Arc<Shared>,
    queue: Receiver<Note>,
    plans: BTreeMap<ChunkId, Plan>,
}

impl Lane {
    pub(super) fn new(shared: Arc<Shared>, queue: Receiver<Note>) -> Self {
        Self { shared, queue, plans: BTreeMap::new() }
    }

    /// Takes over a chunk that was there.
    pub(super) fn adopt(
        &mut self,
        chunk: ChunkId,
        found: &Found,
        last_sum: Option<u32>,
        clients: BTreeSet<u64>,
    ) {
        let Found { version, serial, length, joining, damaged, .. } = *found;
        let head = Head { version, serial, length, joining };
        let trouble = damaged.then_some(Trouble::Damaged);
        self.plans.insert(chunk, Plan { trouble, ..Plan::new(head, last_sum, clients) });
    }

    pub(super) fn run(mut self) {
        let mut flush_at = Instant::now() + FLUSH_EVERY;
        loop {
            match self.queue.recv_deadline(flush_at) {
                Ok(Note::Do { job, op }) => self.take(job, op),
                Ok(Note::Committed { job, chunk, then }) => self.committed(job, chunk, then),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if Instant::now() >= flush_at {
                self.flush();
                flush_at = Instant::now() + FLUSH_EVERY;
            }
        }
    }

    fn take(&mut self, job: JobId, op: Op) {
        let chunk = super::chunk_of(&op);
        if let Some(plan) = self.plans.get_mut(&chunk)
            && (!plan.held.is_empty() || (plan.in_flight > 0 && plan.needs_quiet(&op)))
        {
            return plan.held.push_back((job, op));
        }
        let before = self.plans.get(&chunk).and_then(|plan| plan.trouble);
        if before.is_some() && !matches!(op, Op::Delete { .. }) {
            return (self.shared.done)(job, before);
        }
        let Err(error) = self.begin(job, op) else { return };
        let Some(trouble) = trouble_of(&error) else {
            daemon::die(&format!("{chunk}: {error}; ending"));
        };
        if let Some(plan) = self.plans.get_mut(&chunk) {
            tracing::error!("{chunk}: {error}: it is changed no more");
            plan.trouble = Some(trouble);
        }
        (self.shared.done)(job, Some(trouble));
    }

    fn begin(&mut self, job: JobId, op: Op) -> io::Result<()> {
        match op {
            Op::Make { chunk, version, serial, copy_of, marks, joining } => {
                let head = Head { version, serial, length: 0, joining };
                self.make(job, chunk, head, copy_of, &marks)
            }
            Op::Promise { chunk, version } => {
                let Some(plan) = self.plans.get_mut(&chunk) else { return Err(gone()) };
                plan.head.version = version;
                plan.head.joining = false;
                let changes = vec![records::put_head(chunk, plan.head)];
                self.commit(Some(job), chunk, changes, Then::Nothing);
                Ok(())
            }
            Op::Mutate { chunk, serial, offset, data, mark } => {
                self.mutate(job, chunk, Some(serial), offset, data, mark)
            }
            Op::Patch { chunk, offset, data } => self.mutate(job, chunk, None, offset, data, None),
            Op::Adopt { chunk, version, serial, length, marks } => {
                let Some(plan) = self.plans.get_mut(&chunk) else { return Err(gone()) };
                (plan.head.version, plan.head.serial) = (version, serial);
                let mut changes: Vec<Change> = marks
                    .iter()
                    .map(|(client, number, at)| records::put_mark(chunk, *client, *number, *at))
                    .collect();
                plan.clients.extend(marks.iter().map(|(client, ..)| *client));
                // Where the mutations were that came with it is not known one by one.
                changes.extend(records::remove_regions(chunk));
                changes.push(records::put_head(chunk, plan.head));
                debug_assert!(plan.head.length >= length, "all of it was fetched");
                self.commit(Some(job), chunk, changes, Then::Nothing);
                Ok(())
            }
            Op::Delete { chunk } => {
                let Some(plan) = self.plans.get(&chunk) else { return Err(gone()) };
                let sums = self.shared.sheet(chunk).map_or(0, |sheet| {
                    sheet.read().unwrap_or_else(PoisonError::into_inner).sums.len()
                });
                // Of a damaged copy there may be more checksums than blocks.
                let blocks = blocks(plan.head.length).max(sums);
                let mut changes = records::remove_copy(chunk, blocks, plan.clients.iter().copied());
                // A chunk of this number that comes here again is not to get them.
                changes.extend(plan.dirty.iter().map(|number| records::remove_redo(*number)));
                self.shared.sheets().remove(&chunk);
                self.commit(Some(job), chunk, changes, Then::Unlink);
                Ok(())
            }
        }
    }

    fn make(
        &mut self,
        job: JobId,
        chunk: ChunkId,
        mut head: Head,
        copy_of: Option<ChunkId>,
        marks: &[(u64, u64, u64)],
    ) -> io::Result<()> {
        let file = create(&self.shared.dir, chunk)?;
        let mut sums = Vec::new();
        if let Some(source) = copy_of {
            let sheet = self.shared.sheet(source).ok_or_else(gone)?;
            let sheet = sheet.read().unwrap_or_else(PoisonError::into_inner);
            fs::copy(self.shared.path(source), self.shared.path(chunk))?;
            file.sync_all()?;
            head.length = sheet.length;
            sums.clone_from(&sheet.sums);
        }
        let mut changes = vec![records::put_head(chunk, head)];
        if !sums.is_empty() {
            changes.extend(records::put_sums(chunk, &sums, 0, sums.len() - 1));
        }
        for (client, number, offset) in marks {
            changes.push(records::put_mark(chunk, *client, *number, *offset));
        }
        let clients = marks.iter().map(|(client, ..)| *client).collect();
        self.plans.insert(chunk, Plan::new(head, sums.last().copied(), clients));
        let sheet = Sheet { length: head.length, sums };
        self.shared.sheets().insert(chunk, Arc::new(RwLock::new(sheet)));
        self.commit(Some(job), chunk, changes, Then::Nothing);
        Ok(())
    }

    /// Makes a mutation, or puts in place what was missed when it has no serial.
    fn mutate(
        &mut self,
        job: JobId,
        chunk: ChunkId,
        serial: Option<Serial>,
        offset: u64,
        data: Data,
        mark: Option<(u64, u64)>,
    ) -> io::Result<()> {
        let Some(plan) = self.plans.get_mut(&chunk) else { return Err(gone()) };
        let before = plan.head.length;
        let sheet = self.shared.sheet(chunk).ok_or_else(gone)?;
        let end = offset + data.len() as u64;
        let is_append = offset >= before;
        let from = offset.min(before) as usize / BLOCK_BYTES;
        let sums = if is_append {
            appended_sums(before, plan.last_sum, offset, &data)
        } else {
            let file = open(&self.shared.dir, chunk)?;
            let sheet = sheet.read().unwrap_or_else(PoisonError::into_inner);
            overwritten_sums(&file, &sheet, offset, &data)?
        };
        plan.head.length = before.max(end);
        if blocks(plan.head.length) == from + sums.len() {
            plan.last_sum = sums.last().copied();
        }
        let mut changes = Vec::new();
        if let Some(serial) = serial {
            plan.head.serial = serial;
            let begin = offset.min(before);
            changes.push(records::put_region(chunk, serial, begin, end - begin));
        }
        if let Some((client, number)) = mark {
            plan.clients.insert(client);
            changes.push(records::put_mark(chunk, client, number, offset));
        }
        changes.push(records::put_head(chunk, plan.head));
        changes.extend(self.sum_changes(chunk, &sheet, from, &sums));
        let length = self.plans.get(&chunk).map_or(end, |plan| plan.head.length);
        let then = if is_append && data.len() > REDO_BYTES {
            let file = open(&self.shared.dir, chunk)?;
            file.write_all_at(&data, offset)?;
            file.sync_data()?;
            Then::Show { length, from, sums }
        } else {
            let redo = self.shared.next_redo();
            changes.push(records::put_redo(redo, chunk, offset, &data));
            Then::Write { redo, offset, data, length, from, sums }
        };
        self.commit(Some(job), chunk, changes, then);
        Ok(())
    }

    /// The groups of checksums that change, whole: what readers see now, what is on
    /// its way, and what is new.
    fn sum_changes(
        &mut self,
        chunk: ChunkId,
        sheet: &Arc<RwLock<Sheet>>,
        from: usize,
        sums: &[u32],
    ) -> Vec<Change> {
        let Some(plan) = self.plans.get_mut(&chunk) else { return Vec::new() };
        let planned = &mut plan.planned_sums;
        if planned.is_empty() {
            // Nothing is on its way: readers see all that there is.
            planned.clone_from(&sheet.read().unwrap_or_else(PoisonError::into_inner).sums);
        }
        planned.resize(planned.len().max(from + sums.len()), 0);
        planned[from..from + sums.len()].copy_from_slice(sums);
        match sums.len() {
            0 => Vec::new(),
            count => records::put_sums(chunk, planned, from, from + count - 1),
        }
    }

    fn commit(&mut self, job: Option<JobId>, chunk: ChunkId, changes: Vec<Change>, then: Then) {
        if let Some(plan) = self.plans.get_mut(&chunk) {
            plan.in_flight += 1;
        }
        self.shared.commit(changes, Some(Note::Committed { job, chunk, then }));
    }

    fn committed(&mut self, job: Option<JobId>, chunk: ChunkId, then: Then) {
        let is_gone = matches!(then, Then::Unlink);
        if let Err(error) = self.finish(chunk, then) {
            daemon::die(&format!("{chunk}: {error}; ending, since its file is uncertain"));
        }
        if let Some(job) = job {
            (self.shared.done)(job, None);
        }
        let Some(plan) = self.plans.get_mut(&chunk) else { return };
        plan.in_flight -= 1;
        if plan.in_flight > 0 {
            return;
        }
        plan.planned_sums = Vec::new();
        let held = std::mem::take(&mut plan.held);
        if is_gone {
            self.plans.remove(&chunk);
        }
        for (job, op) in held {
            self.take(job, op);
        }
    }

    /// Does what remains once the batch is committed.
    fn finish(&mut self, chunk: ChunkId, then: Then) -> io::Result<()> {
        match then {
            Then::Nothing => Ok(()),
            Then::Unlink => match fs::remove_file(self.shared.path(chunk)) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
            Then::Show { length, from, sums } => {
                if let Some(sheet) = self.shared.sheet(chunk) {
                    sheet.write().unwrap_or_else(PoisonError::into_inner).show(length, from, &sums);
                }
                Ok(())
            }
            Then::Write { redo, offset, data, length, from, sums } => {
                let Some(sheet) = self.shared.sheet(chunk) else { return Ok(()) };
                let file = open(&self.shared.dir, chunk)?;
                let mut sheet = sheet.write().unwrap_or_else(PoisonError::into_inner);
                file.write_all_at(&data, offset)?;
                if offset + data.len() as u64 == length && file.metadata()?.len() < length {
                    file.set_len(length)?;
                }
                sheet.show(length, from, &sums);
                if let Some(plan) = self.plans.get_mut(&chunk) {
                    plan.dirty.push(redo);
                }
                Ok(())
            }
        }
    }

    /// Syncs the files, and drops what was kept for the case that they are not.
    fn flush(&mut self) {
        let mut flushed = Vec::new();
        for (&chunk, plan) in self.plans.iter_mut().filter(|(_, plan)| !plan.dirty.is_empty()) {
            let synced = open(&self.shared.dir, chunk).and_then(|file| file.sync_data());
            match synced {
                Ok(()) => flushed.push((chunk, std::mem::take(&mut plan.dirty))),
                Err(error) => daemon::die(&format!("{chunk}: {error}; ending")),
            }
        }
        for (chunk, numbers) in flushed {
            let changes = numbers.into_iter().map(records::remove_redo).collect();
            self.commit(None, chunk, changes, Then::Nothing);
        }
    }
}

impl Plan {
    fn new(head: Head, last_sum: Option<u32>, clients: BTreeSet<u64>) -> Self {
        Self {
            head,
            last_sum,
            planned_sums: Vec::new(),
            clients,
            in_flight: 0,
            held: VecDeque::new(),
            dirty: Vec::new(),
            trouble: None,
        }
    }

    /// Whether `op` has to see the file as it will be.
    fn needs_quiet(&self, op: &Op) -> bool {
        match op {
            Op::Mutate { offset, .. } | Op::Patch { offset, .. } => *offset < self.head.length,
            Op::Make { .. } | Op::Delete { .. } => true,
            Op::Promise { .. } | Op::Adopt { .. } => false,
        }
    }
}

impl Sheet {
    fn show(&mut self, length: u64, from: usize, sums: &[u32]) {
        self.length = self.length.max(length);
        self.sums.resize(self.sums.len().max(from + sums.len()), 0);
        self.sums[from..from + sums.len()].copy_from_slice(sums);
    }
}

fn blocks(length: u64) -> usize {
    length.div_ceil(BLOCK_BYTES as u64) as usize
}

fn gone() -> io::Error {
    ErrorKind::NotFound.into()
}

/// What the chunkserver can be told of an error; others end it.
fn trouble_of(error: &io::Error) -> Option<Trouble> {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(Trouble::Full),
        ErrorKind::NotFound | ErrorKind::InvalidData | ErrorKind::UnexpectedEof => {
            Some(Trouble::Damaged)
        }
        _ => None,
    }
}

/// The checksums from the block on that `length` lies in, when zeros up to `offset`
/// and then `data` come behind it.
fn appended_sums(length: u64, last: Option<u32>, offset: u64, data: &[u8]) -> Vec<u32> {
    static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    let mut sums = Vec::new();
    let mut filled = (length % BLOCK_BYTES as u64) as usize;
    let mut sum = if filled > 0 { last.unwrap_or(0) } else { 0 };
    let mut take = |mut bytes: &[u8]| {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(BLOCK_BYTES - filled));
            sum = crc32c::crc32c_append(sum, now);
            filled += now.len();
            bytes = rest;
            if filled == BLOCK_BYTES {
                sums.push(std::mem::take(&mut sum));
                filled = 0;
            }
        }
    };
    let mut gap = offset - length;
    while gap > 0 {
        let now = gap.min(BLOCK_BYTES as u64);
        take(&ZEROS[..now as usize]);
        gap -= now;
    }
    take(data);
    if filled > 0 {
        sums.push(sum);
    }
    sums
}

/// The checksums of the blocks that `data` changes at `offset`, which is below the
/// end. What stays of them is checked first: a new checksum must not cover up what
/// was damaged before.
fn overwritten_sums(
    file: &fs::File,
    sheet: &Sheet,
    offset: u64,
    data: &[u8],
) -> io::Result<Vec<u32>> {
    let block = BLOCK_BYTES as u64;
    let (first, end) = (offset / block, (offset + data.len() as u64).max(offset + 1));
    let last = (end - 1) / block;
    let mut bytes = vec![0; ((last + 1 - first) * block) as usize];
    let there = (sheet.length.min((last + 1) * block) - first * block) as usize;
    file.read_exact_at(&mut bytes[..there], first * block)
        .map_err(|error| if is_damage(&error) { ErrorKind::InvalidData.into() } else { error })?;
    for (index, part) in bytes[..there].chunks(BLOCK_BYTES).enumerate() {
        if sheet.sums.get(first as usize + index) != Some(&crc32c::crc32c(part)) {
            return Err(ErrorKind::InvalidData.into());
        }
    }
    let begin = (offset - first * block) as usize;
    bytes[begin..begin + data.len()].copy_from_slice(data);
    let length = there.max(begin + data.len());
    Ok(bytes[..length].chunks(BLOCK_BYTES).map(crc32c::crc32c).collect())
}
