//! Names, files, chunks and chunkservers, as they are kept in the master's log.
//!
//! [`State::apply`] takes one [`Change`] after the other and depends on nothing
//! else, no clock and no chance: whoever applies the same changes has the same
//! state. A change that can't be (a name that is taken by now) changes nothing
//! and says so.
//!
//! # Chunks
//! A chunk is *referred to* by the files that hold it. It begins at version 0
//! without members: nothing was ever written to it, or it is a copy that is still
//! to be made (`copy_of`), and then it reads as the chunk that it is a copy of,
//! which it refers to until then. [`Change::Confirm`] gives it the next version
//! and its members.
//!
//! # Snapshots
//! A snapshot refers to the same chunks as the file. Whoever writes to a chunk
//! that is referred to more than once gets a copy of it first: [`Change::Copy`]
//! puts a new chunk in the file's place.
//!
//! # Deleting
//! A deleted file keeps its chunks, apart from the names, until it is collected.

use super::files::{Deleted, File, FileName, MAX_CHUNKS};
use super::{ChunkId, ServerNo, Version};
use crate::consensus;
use crate::wire::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::ops::Bound;

/// How many files there can be, deleted ones too.
pub const MAX_FILES: usize = 10_000_000;

/// How many chunkservers are remembered.
pub const MAX_SERVERS: usize = 10_000;

/// One change of the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A chunkserver is here for the first time, or is reached elsewhere.
    Register {
        /// What it calls itself, for as long as its disk lasts.
        name: Box<str>,
        /// Where it is reached.
        address: SocketAddrV4,
    },
    /// A file without chunks.
    Create {
        /// Its name.
        name: FileName,
        /// What it is.
        file: File,
    },
    /// One chunk more at the end of a file.
    AddChunk {
        /// Whose.
        name: FileName,
        /// Which one it is to be: how many there are.
        index: usize,
    },
    /// A chunk of its own for a file that shares it with others.
    Copy {
        /// Whose.
        name: FileName,
        /// Where.
        index: usize,
        /// The chunk that is shared.
        of: ChunkId,
    },
    /// A chunk has a new version, whose members these are.
    Confirm {
        /// Which.
        chunk: ChunkId,
        /// The version: higher than the one before.
        version: Version,
        /// Who has agreed to it.
        members: Vec<ServerNo>,
    },
    /// A file is deleted.
    Delete {
        /// Which.
        name: FileName,
        /// When, in milliseconds since 1970.
        at_ms: u64,
    },
    /// The file of this name that was deleted last is there again.
    Undelete {
        /// Which.
        name: FileName,
    },
    /// A file, or all that lies under a name, is called otherwise.
    Rename {
        /// What it was called.
        from: FileName,
        /// What it is called.
        to: FileName,
    },
    /// A file, or all that lies under a name, is there a second time.
    Snapshot {
        /// What is there.
        from: FileName,
        /// What the copy is called.
        to: FileName,
        /// When, in milliseconds since 1970.
        at_ms: u64,
    },
    /// What was deleted up to this moment is gone for good.
    Collect {
        /// In milliseconds since 1970.
        until_ms: u64,
    },
}

/// What came of a change.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It was made.
    Done,
    /// It was made, and the chunk is this one.
    Chunk(ChunkId),
    /// The chunkserver has this number.
    Server(ServerNo),
    /// It was made, and these chunks are no more.
    Gone(Vec<ChunkId>),
    /// Nothing was changed.
    Refused(Refusal),
}

/// What the master knows of a chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Its version; 0 until it has had members.
    pub version: Version,
    /// Whose copies count.
    pub members: Vec<ServerNo>,
    /// How many copies there are to be.
    pub copies: u8,
    /// How long it can be, in bytes.
    pub bytes: u64,
    /// How many files refer to it.
    pub live: u32,
    /// How many deleted files, and copies that are to be made of it, do.
    pub held: u32,
    /// Its content is that chunk's until it has members.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<ChunkId>,
}

impl Chunk {
    /// Whether it may not be changed, since others rely on it as it is.
    pub fn is_shared(&self) -> bool {
        self.live + self.held > 1
    }
}

/// A chunkserver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// What it calls itself.
    pub name: Box<str>,
    /// Where it was reached last.
    pub address: SocketAddrV4,
}

/// What the master must not forget.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    files: BTreeMap<FileName, File>,
    deleted: BTreeMap<u64, Deleted>,
    chunks: BTreeMap<ChunkId, Chunk>,
    servers: BTreeMap<ServerNo, Server>,
    next_chunk: ChunkId,
    next_deleted: u64,
}

impl consensus::State for State {
    type Command = Change;

    fn obey(&mut self, command: Change) {
        self.apply(command);
    }
}

impl State {
    /// The file of this name.
    pub fn file(&self, name: &FileName) -> Option<&File> {
        self.files.get(name)
    }

    /// All files in the order of their names, from the first one after `after`.
    pub fn files_after<'a>(
        &'a self,
        after: Option<&FileName>,
    ) -> impl Iterator<Item = (&'a FileName, &'a File)> + use<'a> {
        let from = after.map_or(Bound::Unbounded, |name| Bound::Excluded(name.clone()));
        self.files.range((from, Bound::Unbounded))
    }

    /// The files that lie under `name`.
    pub fn files_under<'a>(
        &'a self,
        name: &'a FileName,
    ) -> impl Iterator<Item = (&'a FileName, &'a File)> + 'a {
        // `a-b` stands between `a` and `a/b`.
        self.files_after(Some(name))
            .take_while(move |(other, _)| other.as_str().starts_with(name.as_str()))
            .filter(move |(other, _)| other.is_under(name))
    }

    /// The file called `name`, or those that lie under it.
    pub fn tree(&self, name: &FileName) -> Vec<(FileName, File)> {
        match self.files.get(name) {
            Some(file) => vec![(name.clone(), file.clone())],
            None => {
                self.files_under(name).map(|(name, file)| (name.clone(), file.clone())).collect()
            }
        }
    }

    /// What was deleted and not yet collected, the first one first.
    pub fn deleted(&self) -> impl Iterator<Item = &Deleted> {
        self.deleted.values()
    }

    /// How many files there are.
    pub fn count_files(&self) -> usize {
        self.files.len()
    }

    /// What is known of `chunk`.
    pub fn chunk(&self, chunk: ChunkId) -> Option<&Chunk> {
        self.chunks.get(&chunk)
    }

    /// All chunks.
    pub fn chunks(&self) -> impl Iterator<Item = (ChunkId, &Chunk)> {
        self.chunks.iter().map(|(id, chunk)| (*id, chunk))
    }

    /// Whether a chunk of this number was ever made.
    pub fn was_made(&self, chunk: ChunkId) -> bool {
        chunk < self.next_chunk.max(ChunkId::FIRST)
    }

    /// The chunkserver of this number.
    pub fn server(&self, number: ServerNo) -> Option<&Server> {
        self.servers.get(&number)
    }

    /// The numbers of all chunkservers that ever came.
    pub fn servers(&self) -> impl Iterator<Item = ServerNo> {
        self.servers.keys().copied()
    }

    /// The number of the chunkserver of this name.
    pub fn server_named(&self, name: &str) -> Option<ServerNo> {
        self.servers.iter().find(|(_, server)| &*server.name == name).map(|(number, _)| *number)
    }

    /// Whether no chunkserver has ever come, and so none has got a lease.
    pub fn is_untouched(&self) -> bool {
        self.servers.is_empty()
    }

    /// Makes a change, or says why it can't be made.
    pub fn apply(&mut self, change: Change) -> Outcome {
        let made = match change {
            Change::Register { name, address } => self.register(name, address),
            Change::Create { name, file } => self.create(name, file),
            Change::AddChunk { name, index } => self.add_chunk(&name, index),
            Change::Copy { name, index, of } => self.copy(&name, index, of),
            Change::Confirm { chunk, version, members } => self.confirm(chunk, version, members),
            Change::Delete { name, at_ms } => self.delete(name, at_ms),
            Change::Undelete { name } => self.undelete(&name),
            Change::Rename { from, to } => self.rename(&from, &to),
            Change::Snapshot { from, to, at_ms } => self.snapshot(&from, &to, at_ms),
            Change::Collect { until_ms } => Ok(self.collect(until_ms)),
        };
        made.unwrap_or_else(Outcome::Refused)
    }

    fn register(&mut self, name: Box<str>, address: SocketAddrV4) -> Result<Outcome, Refusal> {
        let known = self.server_named(&name);
        if known.is_none() && self.servers.len() >= MAX_SERVERS {
            return Err(Refusal::unavailable(format!(
                "{MAX_SERVERS} chunkservers are known: no more can join"
            )));
        }
        let last = self.servers.last_key_value().map_or(0, |(number, _)| number.0);
        let number = known.unwrap_or(ServerNo(last + 1));
        self.servers.insert(number, Server { name, address });
        Ok(Outcome::Server(number))
    }

    /// Whether a file can be called `name`.
    fn check_free(&self, name: &FileName) -> Result<(), Refusal> {
        if self.files.contains_key(name) {
            return Err(Refusal::invalid(format!("{name} exists")));
        }
        if let Some(above) = name.above().find(|above| self.files.contains_key(above)) {
            return Err(Refusal::invalid(format!("{above} is a file: nothing can lie under it")));
        }
        if let Some((under, _)) = self.files_under(name).next() {
            return Err(Refusal::invalid(format!("{under} lies under {name}: it can't be a file")));
        }
        Ok(())
    }

    fn create(&mut self, name: FileName, file: File) -> Result<Outcome, Refusal> {
        self.check_free(&name)?;
        if self.files.len() + self.deleted.len() >= MAX_FILES {
            return Err(Refusal::unavailable(format!("there are {MAX_FILES} files already")));
        }
        self.files.insert(name, file);
        Ok(Outcome::Done)
    }

    fn new_chunk(&mut self, chunk: Chunk) -> ChunkId {
        let id = self.next_chunk.max(ChunkId::FIRST);
        self.next_chunk = ChunkId(id.0 + 1);
        self.chunks.insert(id, chunk);
        id
    }

    fn add_chunk(&mut self, name: &FileName, index: usize) -> Result<Outcome, Refusal> {
        let file = self.files.get(name).ok_or_else(|| not_found(name))?;
        if let Some(&chunk) = file.chunks.get(index) {
            return Ok(Outcome::Chunk(chunk));
        }
        if index > file.chunks.len() || index >= MAX_CHUNKS {
            let count = file.chunks.len();
            return Err(Refusal::invalid(format!(
                "{name} has {count} chunks of at most {MAX_CHUNKS}: chunk {index} is not the next"
            )));
        }
        let chunk =
            Chunk { copies: file.copies, bytes: file.chunk_bytes, live: 1, ..Chunk::default() };
        let id = self.new_chunk(chunk);
        if let Some(file) = self.files.get_mut(name) {
            file.chunks.push(id);
        }
        Ok(Outcome::Chunk(id))
    }

    fn copy(&mut self, name: &FileName, index: usize, of: ChunkId) -> Result<Outcome, Refusal> {
        let file = self.files.get(name).ok_or_else(|| not_found(name))?;
        let now = file.chunks.get(index).copied();
        let shared = self.chunks.get_mut(&of).filter(|chunk| chunk.is_shared());
        let (Some(shared), true) = (shared, now == Some(of)) else {
            // Somebody was faster, or the others are gone: it is as was asked.
            return now.map(Outcome::Chunk).ok_or_else(|| not_found(name));
        };
        // The file's own reference becomes that of the copy.
        shared.live -= 1;
        shared.held += 1;
        let Chunk { copies, bytes, .. } = *shared;
        let chunk = Chunk { copies, bytes, live: 1, copy_of: Some(of), ..Chunk::default() };
        let id = self.new_chunk(chunk);
        if let Some(place) = self.files.get_mut(name).and_then(|it| it.chunks.get_mut(index)) {
            *place = id;
        }
        Ok(Outcome::Chunk(id))
    }

    fn confirm(
        &mut self,
        id: ChunkId,
        version: Version,
        members: Vec<ServerNo>,
    ) -> Result<Outcome, Refusal> {
        let chunk = self.chunks.get_mut(&id);
        let chunk = chunk.ok_or_else(|| Refusal::unavailable(format!("{id} is gone")))?;
        if version <= chunk.version || members.is_empty() {
            return Err(Refusal::unavailable(format!("{id} has {} by now", chunk.version)));
        }
        (chunk.version, chunk.members) = (version, members);
        let (source, mut gone) = (chunk.copy_of.take(), Vec::new());
        source.into_iter().for_each(|source| self.let_go(source, &mut gone));
        Ok(Outcome::Gone(gone))
    }

    /// One reference less from what is no live file; notes what is gone by that.
    fn let_go(&mut self, id: ChunkId, gone: &mut Vec<ChunkId>) {
        let Some(chunk) = self.chunks.get_mut(&id) else { return };
        chunk.held -= 1;
        if chunk.live + chunk.held > 0 {
            return;
        }
        let source = chunk.copy_of;
        self.chunks.remove(&id);
        gone.push(id);
        // The copy was never made.
        if let Some(source) = source {
            self.let_go(source, gone);
        }
    }

    fn delete(&mut self, name: FileName, at_ms: u64) -> Result<Outcome, Refusal> {
        let file = self.files.remove(&name).ok_or_else(|| not_found(&name))?;
        self.each_chunk(&file, |chunk| {
            chunk.live -= 1;
            chunk.held += 1;
        });
        self.next_deleted += 1;
        self.deleted.insert(self.next_deleted, Deleted { name, at_ms, file });
        Ok(Outcome::Done)
    }

    fn undelete(&mut self, name: &FileName) -> Result<Outcome, Refusal> {
        let last = self.deleted.iter().rev().find(|(_, deleted)| deleted.name == *name);
        let number = last.map(|(number, _)| *number).ok_or_else(|| not_found(name))?;
        self.check_free(name)?;
        if let Some(deleted) = self.deleted.remove(&number) {
            self.each_chunk(&deleted.file, |chunk| {
                chunk.live += 1;
                chunk.held -= 1;
            });
            self.files.insert(deleted.name, deleted.file);
        }
        Ok(Outcome::Done)
    }

    fn each_chunk(&mut self, file: &File, mut change: impl FnMut(&mut Chunk)) {
        for id in &file.chunks {
            if let Some(chunk) = self.chunks.get_mut(id) {
                change(chunk);
            }
        }
    }

    /// The files called `from` or under it, with the names that they would have
    /// as `to`.
    fn moved(
        &self,
        from: &FileName,
        to: &FileName,
    ) -> Result<Vec<(FileName, FileName, File)>, Refusal> {
        let tree = self.tree(from);
        if tree.is_empty() {
            return Err(not_found(from));
        }
        if to == from || to.is_under(from) {
            return Err(Refusal::invalid(format!("{to} lies under {from} itself")));
        }
        self.check_free(to)?;
        let moved = tree.into_iter().map(|(name, file)| {
            let new = name.moved(from, to).map_err(|error| Refusal::invalid(error.to_string()))?;
            Ok((name, new, file))
        });
        moved.collect()
    }

    fn rename(&mut self, from: &FileName, to: &FileName) -> Result<Outcome, Refusal> {
        for (old, new, _) in self.moved(from, to)? {
            if let Some(file) = self.files.remove(&old) {
                self.files.insert(new, file);
            }
        }
        Ok(Outcome::Done)
    }

    fn snapshot(&mut self, from: &FileName, to: &FileName, at_ms: u64) -> Result<Outcome, Refusal> {
        let moved = self.moved(from, to)?;
        if self.files.len() + self.deleted.len() + moved.len() > MAX_FILES {
            return Err(Refusal::unavailable(format!("there can be {MAX_FILES} files, no more")));
        }
        for (_, new, file) in moved {
            self.each_chunk(&file, |chunk| chunk.live += 1);
            self.files.insert(new, File { made_ms: at_ms, ..file });
        }
        Ok(Outcome::Done)
    }

    fn collect(&mut self, until_ms: u64) -> Outcome {
        let old = self.deleted.iter().filter(|(_, deleted)| deleted.at_ms <= until_ms);
        let old: Vec<u64> = old.map(|(number, _)| *number).collect();
        let mut gone = Vec::new();
        for number in old {
            let chunks = self.deleted.remove(&number).map(|deleted| deleted.file.chunks);
            chunks.into_iter().flatten().for_each(|chunk| self.let_go(chunk, &mut gone));
        }
        Outcome::Gone(gone)
    }
}

fn not_found(name: &FileName) -> Refusal {
    Refusal::not_found(format!("{name} is not there"))
}
