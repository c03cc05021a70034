//! A client of the file system: files in, files out, records appended.
//!
//! The client asks the master where, keeps the answer for a while, and speaks to
//! chunkservers. Whoever does not answer, or refuses, is reported with the next
//! question to the master; everything is tried again until its time is up. A write
//! at a place can be repeated without harm, and an append is numbered, so none of
//! that can duplicate anything.

use super::call::{self, CallFailure, Caller, Patience, Walked};
use crate::gfs::messages::{
    Census, ChunkReply, ChunkRequest, Data, DataId, FailedPrimary, LeaseGranted, Listed, Located,
    Mark, MasterRequest, Packet, append_packet,
};
use crate::gfs::{FileName, LOCATIONS_LAST, MAX_PIECE_BYTES, MAX_RECORD_BYTES};
use crate::wire::address::PortRange;
use crate::wire::{HostPort, Reason, Refusal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

/// How long one question to a chunkserver may take: longer than it lets a mutation
/// wait.
const CHUNK_PATIENCE: Duration = Duration::from_secs(16);

/// How long one question to the master may take: longer than it lets a lease wait.
const MASTER_PATIENCE: Duration = Duration::from_secs(13);

/// The first pause before something is tried again; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How many leases are remembered.
const MAX_LEASES: usize = 256;

/// How many chunks are located at once.
const LOCATE_COUNT: usize = 16;

/// What is no longer than this goes to the primary itself; else it is pushed along
/// the chain of replicas first.
pub const INLINE_BYTES: usize = 64 * 1024;

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The system says no.
    #[error("{0}")]
    No(Refusal),
    /// Nobody has answered, or nobody could do it.
    #[error("{0}")]
    Nobody(String),
    /// It may or may not have been done.
    #[error("{0}; it may or may not have been done")]
    Unknown(String),
}

/// What is known of one file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stat {
    /// Its name, chunks, and when it was made.
    #[serde(flatten)]
    pub file: Listed,
    /// How many copies its chunks are to have.
    pub copies: u8,
    /// Its length in bytes, fillings between appends included.
    pub length: u64,
}

#[derive(Deserialize)]
struct StatReply {
    file: Listed,
    copies: u8,
}

/// A page of names.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Page {
    /// The names.
    pub files: Vec<Listed>,
    /// Whether there are more.
    pub more: bool,
}

#[derive(Deserialize)]
struct LocatedReply {
    total: usize,
    chunk_bytes: u64,
    chunks: Vec<Located>,
}

/// Where the chunks of a file are, as far as it is known.
struct Known {
    total: usize,
    chunk_bytes: u64,
    /// Where each is, and until when that is good.
    chunks: BTreeMap<usize, (Located, Instant)>,
    since: Instant,
}

/// A client. It does one thing at a time.
pub struct FileClient {
    masters: Vec<HostPort>,
    /// How long one operation is tried.
    pub timeout: Duration,
    callers: HashMap<SocketAddrV4, Caller>,
    known: BTreeMap<FileName, Known>,
    /// What it is called in marks and in the names of pushed data.
    name: u64,
    last_number: u64,
    /// Which replica is read from next.
    turn: usize,
    /// The chunk that each file is appended to.
    tails: BTreeMap<FileName, usize>,
    /// Who takes changes, as far as it is known.
    leases: BTreeMap<(FileName, usize), LeaseGranted>,
}

/// Waits longer each time, until the time is up.
struct Again {
    until: Instant,
    pause: Duration,
}

impl Again {
    fn new(span: Duration) -> Self {
        Self { until: Instant::now() + span, pause: FIRST_PAUSE }
    }

    /// Waits; `false` when the time is up.
    fn wait(&mut self) -> bool {
        if Instant::now() + self.pause >= self.until {
            return false;
        }
        std::thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        true
    }

    fn deadline(&self, patience: Duration) -> Instant {
        self.until.min(Instant::now() + patience)
    }
}

impl FileClient {
    /// A client of the masters at `masters`, called `name`: no two clients may
    /// have the same.
    pub fn new(masters: Vec<HostPort>, timeout: Duration, name: u64) -> Self {
        Self {
            masters,
            timeout,
            callers: HashMap::new(),
            known: BTreeMap::new(),
            name,
            last_number: 0,
            turn: name as usize % 64,
            tails: BTreeMap::new(),
            leases: BTreeMap::new(),
        }
    }

    // ---- asking ----

    /// Asks the master until it answers with something else than "later".
    ///
    /// # Errors
    /// A [`Failure`]: [`Failure::Unknown`] only for what is not `harmless` when it
    /// is done twice.
    pub fn ask<R: DeserializeOwned>(
        &mut self,
        request: &impl Serialize,
        harmless: bool,
    ) -> Result<R, Failure> {
        let mut again = Again::new(self.timeout);
        self.ask_until(request, harmless, &mut again)
    }

    fn ask_until<R: DeserializeOwned>(
        &mut self,
        request: &impl Serialize,
        harmless: bool,
        again: &mut Again,
    ) -> Result<R, Failure> {
        loop {
            let addresses = call::addresses(&self.masters, PortRange::MASTER)
                .map_err(|error| Failure::Nobody(format!("no master can be found: {error}")))?;
            let deadline = again.deadline(MASTER_PATIENCE);
            let patience = Patience::Until(deadline);
            let walked = match harmless {
                true => call::walk(&addresses, request, patience).0,
                false => call::walk_once(&addresses, request, patience),
            };
            let why = match walked {
                Walked::Answer { body, .. } | Walked::Refused { body, .. } => {
                    match Packet::reply(&body) {
                        Ok(packet) => return Ok(packet.message),
                        Err(refusal) if refusal.reason == Reason::Unavailable => {
                            Failure::Nobody(refusal.error)
                        }
                        Err(refusal) if refusal.reason == Reason::UnknownOutcome => {
                            match harmless {
                                true => Failure::Nobody(refusal.error),
                                false => return Err(Failure::Unknown(refusal.error)),
                            }
                        }
                        Err(refusal) => return Err(Failure::No(refusal)),
                    }
                }
                Walked::Silence(tried) => {
                    let sent = tried.iter().any(|(_, failure)| failure.was_sent());
                    let hosts: Vec<String> = self.masters.iter().map(HostPort::to_string).collect();
                    let why = format!(
                        "no master answers at {}; is it running, and is --master right?",
                        hosts.join(", ")
                    );
                    if sent && !harmless {
                        return Err(Failure::Unknown(why));
                    }
                    Failure::Nobody(why)
                }
            };
            if !again.wait() {
                return Err(why);
            }
        }
    }

    /// Asks a chunkserver once.
    fn call(
        &mut self,
        at: SocketAddrV4,
        request: &ChunkRequest,
        data: &[u8],
        deadline: Instant,
    ) -> Result<Packet<ChunkReply>, Option<Refusal>> {
        let mut frame = Vec::new();
        append_packet(&mut frame, request, data)
            .map_err(|error| Some(Refusal::invalid(error.to_string())))?;
        // A connection that was kept may have been closed meanwhile: what is asked
        // here can be asked twice.
        for _ in 0..2 {
            let (mut caller, is_old) = match self.callers.remove(&at) {
                Some(caller) => (caller, true),
                None => (Caller::connect(at, deadline).map_err(|_| None)?, false),
            };
            match caller.exchange(&frame, deadline, Packet::reply) {
                Ok(reply) => {
                    self.callers.insert(at, caller);
                    return reply.map_err(Some);
                }
                Err(CallFailure::Closed) if is_old => {}
                Err(_) => return Err(None),
            }
        }
        Err(None)
    }

    /// What it is called in marks and in the names of pushed data.
    pub fn name(&self) -> u64 {
        self.name
    }

    // ---- reading ----

    /// Whether there is a file called so.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn exists(&mut self, name: &FileName) -> Result<bool, Failure> {
        match self.ask::<StatReply>(&MasterRequest::Stat { name: name.clone() }, true) {
            Ok(_) => Ok(true),
            Err(Failure::No(refusal)) if refusal.reason == Reason::NotFound => Ok(false),
            Err(failure) => Err(failure),
        }
    }

    /// What is known of a file, its length too.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn stat(&mut self, name: &FileName) -> Result<Stat, Failure> {
        let request = MasterRequest::Stat { name: name.clone() };
        let StatReply { file, copies } = self.ask(&request, true)?;
        self.known.remove(name);
        let length = match file.chunks.checked_sub(1) {
            None => 0,
            Some(last) => last as u64 * file.chunk_bytes + self.length_of_chunk(name, last)?,
        };
        Ok(Stat { file, copies, length })
    }

    fn length_of_chunk(&mut self, name: &FileName, index: usize) -> Result<u64, Failure> {
        match self.at_some_replica(name, index, None)? {
            None => Ok(0),
            Some(Packet { message: ChunkReply::Length { length }, .. }) => Ok(length),
            Some(_) => Err(Failure::Nobody("an answer that is none".to_owned())),
        }
    }

    /// The names of files, a page at a time.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn page(
        &mut self,
        under: Option<FileName>,
        after: Option<FileName>,
    ) -> Result<Page, Failure> {
        self.ask(&MasterRequest::Ls { under, after, limit: None }, true)
    }

    /// Whether all is well.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn census(&mut self) -> Result<Census, Failure> {
        self.ask(&MasterRequest::Census {}, true)
    }

    /// Up to `length` bytes from `offset` on; fewer at the end of the file, and
    /// where a chunk ends.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn read(&mut self, name: &FileName, offset: u64, length: usize) -> Result<Data, Failure> {
        let mut again = Again::new(self.timeout);
        let (total, chunk_bytes) = self.locate(name, 0, &mut again)?;
        let index = (offset / chunk_bytes) as usize;
        if index >= total {
            // Perhaps by now.
            self.known.remove(name);
            if index >= self.locate(name, index, &mut again)?.0 {
                return Ok(Data::default());
            }
        }
        let within = offset % chunk_bytes;
        let length = length.min(MAX_PIECE_BYTES).min((chunk_bytes - within) as usize);
        let packet = self.at_some_replica(name, index, Some((within, length)))?;
        let data = packet.map(|packet| packet.data).unwrap_or_default();
        if data.len() < length && index + 1 < total {
            // A chunk in the middle that was not filled reads as zeros.
            let zeros = std::iter::repeat_n(0, length - data.len());
            return Ok(data.iter().copied().chain(zeros).collect());
        }
        Ok(data)
    }

    /// Learns where the chunk `index` is, if there is one; returns how many there
    /// are and how large.
    fn locate(
        &mut self,
        name: &FileName,
        index: usize,
        again: &mut Again,
    ) -> Result<(usize, u64), Failure> {
        let now = Instant::now();
        if let Some(known) = self.known.get(name) {
            let is_there = known.chunks.get(&index).is_some_and(|(_, until)| *until > now);
            let is_beyond = index >= known.total && known.since.elapsed() < LOCATIONS_LAST;
            if is_there || is_beyond {
                return Ok((known.total, known.chunk_bytes));
            }
        }
        let request =
            MasterRequest::Locate { name: name.clone(), index, count: Some(LOCATE_COUNT) };
        let reply: LocatedReply = self.ask_until(&request, true, again)?;
        let known = self.known.entry(name.clone()).or_insert_with(|| Known {
            total: 0,
            chunk_bytes: 0,
            chunks: BTreeMap::new(),
            since: now,
        });
        (known.total, known.chunk_bytes, known.since) = (reply.total, reply.chunk_bytes, now);
        known.chunks.retain(|_, (_, until)| *until > now);
        for located in reply.chunks {
            let until = now + Duration::from_millis(located.valid_ms);
            known.chunks.insert(located.index, (located, until));
        }
        Ok((known.total, known.chunk_bytes))
    }

    /// Asks one replica after the other for a part of a chunk, or for its length;
    /// nothing if it was never written to.
    fn at_some_replica(
        &mut self,
        name: &FileName,
        index: usize,
        part: Option<(u64, usize)>,
    ) -> Result<Option<Packet<ChunkReply>>, Failure> {
        let mut again = Again::new(self.timeout);
        loop {
            self.locate(name, index, &mut again)?;
            let located = self.known.get(name).and_then(|known| known.chunks.get(&index));
            let Some((located, _)) = located.cloned() else { return Ok(None) };
            if located.version.0 == 0 {
                return Ok(None);
            }
            let (chunk, version) = (located.chunk, located.version);
            let request = match part {
                Some((offset, length)) => ChunkRequest::Read { chunk, version, offset, length },
                None => ChunkRequest::Length { chunk, version },
            };
            let mut why = format!("no chunkserver that is alive holds {chunk} ({index} of {name})");
            self.turn += 1;
            for place in 0..located.replicas.len() {
                let at = located.replicas[(self.turn + place) % located.replicas.len()];
                let deadline = again.deadline(CHUNK_PATIENCE);
                match self.call(at, &request, &[], deadline) {
                    Ok(packet) => return Ok(Some(packet)),
                    Err(Some(refusal)) => why = format!("{at}: {refusal}"),
                    Err(None) => why = format!("{at} does not answer"),
                }
            }
            // It may be elsewhere by now.
            self.known.remove(name);
            if !again.wait() {
                return Err(Failure::Nobody(why));
            }
        }
    }

    // ---- writing ----

    /// Who takes changes of the chunk `index`; it is made if it is the next.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn lease(&mut self, name: &FileName, index: usize) -> Result<LeaseGranted, Failure> {
        let request = MasterRequest::Lease { name: name.clone(), index: Some(index), failed: None };
        self.ask(&request, true)
    }

    /// Writes `data` at `offset`, across chunks where it must.
    ///
    /// # Errors
    /// A [`Failure`]; what was written by then is undefined.
    pub fn write(&mut self, name: &FileName, offset: u64, data: &[u8]) -> Result<(), Failure> {
        let request = MasterRequest::Stat { name: name.clone() };
        let StatReply { file, .. } = self.ask(&request, true)?;
        let (mut offset, mut rest) = (offset, data);
        // A gap before it is made of chunks that were never written to.
        for index in file.chunks..(offset / file.chunk_bytes) as usize {
            self.lease(name, index)?;
        }
        while !rest.is_empty() {
            let (index, within) = (offset / file.chunk_bytes, offset % file.chunk_bytes);
            let room = (file.chunk_bytes - within).min(MAX_PIECE_BYTES as u64);
            let (now, later) = rest.split_at(rest.len().min(room as usize));
            self.write_piece(name, index as usize, within, now)?;
            offset += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    /// Writes `data`, one piece, at `offset` in the chunk `index`.
    ///
    /// # Errors
    /// A [`Failure`].
    pub fn write_piece(
        &mut self,
        name: &FileName,
        index: usize,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Failure> {
        self.mutate(name, index, data, |chunk, version, pushed| ChunkRequest::Write {
            chunk,
            version,
            offset,
            pushed,
        })
        .map(|_| ())
    }

    /// Appends `record` in one piece, exactly once; returns where it stands in the
    /// file.
    ///
    /// # Errors
    /// A [`Failure`]: with [`Failure::Unknown`] it may stand there.
    pub fn append(&mut self, name: &FileName, record: &[u8]) -> Result<u64, Failure> {
        if record.is_empty() || record.len() > MAX_RECORD_BYTES {
            let refusal = format!("a record has from 1 to {MAX_RECORD_BYTES} bytes");
            return Err(Failure::No(Refusal::invalid(refusal)));
        }
        self.last_number += 1;
        let mark = Some(Mark { client: self.name, number: self.last_number });
        let mut index = match self.tails.get(name) {
            Some(index) => *index,
            None => {
                let request = MasterRequest::Stat { name: name.clone() };
                let StatReply { file, .. } = self.ask(&request, true)?;
                file.chunks.saturating_sub(1)
            }
        };
        loop {
            let (reply, chunk_bytes) =
                self.mutate(name, index, record, |chunk, version, pushed| ChunkRequest::Append {
                    chunk,
                    version,
                    pushed,
                    mark,
                })?;
            match reply {
                // It is certain now that the record is not in that chunk, nor will be.
                ChunkReply::Closed { .. } => index += 1,
                ChunkReply::Written { offset } => {
                    self.tails.insert(name.clone(), index);
                    return Ok(index as u64 * chunk_bytes + offset);
                }
                _ => return Err(Failure::Unknown("an answer that is none".to_owned())),
            }
        }
    }

    /// Has a primary make a mutation, and another one if that fails, until the time
    /// is up.
    fn mutate(
        &mut self,
        name: &FileName,
        index: usize,
        data: &[u8],
        request: impl Fn(crate::gfs::ChunkId, crate::gfs::Version, Option<DataId>) -> ChunkRequest,
    ) -> Result<(ChunkReply, u64), Failure> {
        let mut again = Again::new(self.timeout);
        let (mut failed, mut was_sent) = (None::<FailedPrimary>, false);
        loop {
            let key = (name.clone(), index);
            let lease = match self.leases.remove(&key) {
                Some(lease) => lease,
                None => {
                    let name = name.clone();
                    let request = MasterRequest::Lease { name, index: Some(index), failed };
                    match self.ask_until(&request, true, &mut again) {
                        Ok(lease) => lease,
                        Err(Failure::Nobody(why)) if was_sent => return Err(Failure::Unknown(why)),
                        Err(failure) => return Err(failure),
                    }
                }
            };
            let deadline = again.deadline(CHUNK_PATIENCE);
            let pushed = self.push(&lease, data, deadline);
            let with = if pushed.is_some() { &[][..] } else { data };
            let request = request(lease.chunk, lease.version, pushed);
            let why = match self.call(lease.primary, &request, with, deadline) {
                Ok(packet) => {
                    let chunk_bytes = lease.chunk_bytes;
                    if self.leases.len() >= MAX_LEASES {
                        self.leases.clear();
                    }
                    self.leases.insert(key, lease);
                    return Ok((packet.message, chunk_bytes));
                }
                Err(Some(refusal)) if refusal.reason == Reason::Invalid => {
                    return Err(Failure::No(refusal));
                }
                Err(Some(refusal)) => {
                    was_sent |= refusal.reason == Reason::UnknownOutcome;
                    refusal.error
                }
                Err(None) => {
                    was_sent = true;
                    format!("{} does not answer", lease.primary)
                }
            };
            failed = Some(FailedPrimary { server: lease.primary, version: lease.version });
            if !again.wait() {
                let failure = if was_sent { Failure::Unknown } else { Failure::Nobody };
                return Err(failure(why));
            }
        }
    }

    /// Pushes long data along the replicas, the primary first; what can't be pushed
    /// goes with the request.
    fn push(&mut self, lease: &LeaseGranted, data: &[u8], deadline: Instant) -> Option<DataId> {
        if data.len() <= INLINE_BYTES {
            return None;
        }
        self.last_number += 1;
        let id = (self.name, self.last_number);
        let chain: Vec<SocketAddrV4> =
            lease.replicas.iter().copied().filter(|it| *it != lease.primary).collect();
        let request = ChunkRequest::Push { id, chain, chunk: None };
        let pushed = self.call(lease.primary, &request, data, deadline).map(|it| it.message);
        matches!(pushed, Ok(ChunkReply::Done(_))).then_some(id)
    }
}
