//! A copy of a chunk: what it applies, promises and serves.

use super::catching_up::CatchUp;
use super::{ChunkServer, Effect, Job, Op, Trouble, WINDOW, refuse};
use crate::gfs::messages::{Appended, Apply, ChunkReply, Data, Mark, MissedReply};
use crate::gfs::{CHUNK_BYTES, ChunkId, MAX_PIECE_BYTES, Serial, Version};
use crate::machine::Time;
use crate::wire::Refusal;
use std::collections::{BTreeMap, VecDeque};

/// How many clients' last appends a chunk remembers; the next client's goes to the
/// next chunk.
pub const MAX_CLIENTS: usize = 10_000;

/// How many of the last mutations a copy knows the places of: what is behind by no
/// more fetches only these.
pub const MAX_KEPT_REGIONS: usize = 4 * WINDOW;

/// A copy as the disk has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// Of which chunk.
    pub chunk: ChunkId,
    /// Its version.
    pub version: Version,
    /// The last mutation that it has applied.
    pub serial: Serial,
    /// Its length.
    pub length: u64,
    /// Whether it was still being filled.
    pub joining: bool,
    /// Whether what stands of it does not fit together.
    pub damaged: bool,
    /// The last append of each client: client, number, offset.
    pub marks: Vec<(u64, u64, u64)>,
    /// The places of the last mutations: serial, offset, length.
    pub regions: Vec<(Serial, u64, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worth {
    /// It can be read.
    Served,
    /// It is being made: the disk has not got it yet.
    Making,
    /// It is being filled.
    Joining,
    /// A block of it is damaged.
    Damaged,
}

/// The last append of a client: its number, its place, and which mutation it was.
#[derive(Clone, Copy, Debug)]
pub(super) struct Last {
    pub(super) number: u64,
    pub(super) offset: u64,
    pub(super) serial: Serial,
}

/// A copy.
#[derive(Debug)]
pub(super) struct Copy<T> {
    pub(super) version: Version,
    /// The last mutation that went to the disk.
    pub(super) serial: Serial,
    /// The last one that is durable.
    pub(super) durable: Serial,
    pub(super) length: u64,
    /// The length that is durable.
    pub(super) shown: u64,
    pub(super) worth: Worth,
    pub(super) marks: BTreeMap<u64, Last>,
    pub(super) regions: VecDeque<(Serial, u64, u64)>,
    /// Mutations that have come before the one before them.
    early: BTreeMap<Serial, (Apply, Data, T)>,
}

impl<T> Copy<T> {
    pub(super) fn new(version: Version, worth: Worth) -> Self {
        Self {
            version,
            serial: Serial::default(),
            durable: Serial::default(),
            length: 0,
            shown: 0,
            worth,
            marks: BTreeMap::new(),
            regions: VecDeque::new(),
            early: BTreeMap::new(),
        }
    }

    pub(super) fn found(found: Found) -> Self {
        let serial = found.serial;
        let last = |(client, number, offset)| (client, Last { number, offset, serial });
        Self {
            serial,
            durable: serial,
            length: found.length,
            shown: found.length,
            marks: found.marks.into_iter().map(last).collect(),
            regions: found.regions.into(),
            ..Self::new(found.version, Worth::Served)
        }
    }

    pub(super) fn is_served(&self) -> bool {
        self.worth == Worth::Served
    }

    pub(super) fn is_damaged(&self) -> bool {
        self.worth == Worth::Damaged
    }

    /// Notes the mutation that is now the last one.
    pub(super) fn note(&mut self, offset: u64, bytes: usize, mark: Option<Mark>) {
        self.serial = self.serial.next();
        let end = offset + bytes as u64;
        // What lies between the end and the place is filled with zeros.
        let begin = offset.min(self.length);
        self.regions.push_back((self.serial, begin, end - begin));
        if self.regions.len() > MAX_KEPT_REGIONS {
            self.regions.pop_front();
        }
        self.length = self.length.max(end);
        if let Some(Mark { client, number }) = mark {
            self.marks.insert(client, Last { number, offset, serial: self.serial });
        }
    }
}

impl<T> ChunkServer<T> {
    /// The copy of `chunk`, if it is whole.
    pub(super) fn served(&mut self, chunk: ChunkId) -> Result<&mut Copy<T>, Refusal> {
        match self.copies.get_mut(&chunk) {
            Some(copy) if copy.is_served() => Ok(copy),
            Some(copy) if copy.is_damaged() => {
                Err(Refusal::unavailable(format!("the copy of {chunk} here is damaged")))
            }
            _ => Err(Refusal::unavailable(format!("{chunk} is not here"))),
        }
    }

    /// Answers with a part of a chunk, or only with its length.
    pub(super) fn read(
        &mut self,
        now: Time,
        to: T,
        chunk: ChunkId,
        version: Version,
        part: Option<(u64, usize)>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if !self.is_leased(now) {
            let refusal = Refusal::unavailable(
                "this chunkserver has no lease: it may have missed changes; ask another",
            );
            return refuse(to, refusal, effects);
        }
        let fence = self.fences.get(&chunk).copied().unwrap_or_default();
        let (held, whole) = match self.served(chunk) {
            Ok(copy) => (copy.version, copy.shown),
            Err(refusal) => return refuse(to, refusal, effects),
        };
        if held < version.max(fence) {
            let refusal =
                Refusal::unavailable(format!("the copy of {chunk} here is {held}: it may be old"));
            return refuse(to, refusal, effects);
        }
        match part {
            Some((offset, length)) if offset < whole && length > 0 => {
                let length = length.min(MAX_PIECE_BYTES).min((whole - offset) as usize);
                effects.push(Effect::Read { to, chunk, offset, length, whole });
            }
            _ => effects.push(Effect::Reply { to, reply: ChunkReply::Length { length: whole } }),
        }
    }

    // ---- what a primary says ----

    /// A mutation comes from the primary.
    pub(super) fn apply(&mut self, to: T, apply: Apply, data: Data, effects: &mut Vec<Effect<T>>) {
        let full = self.room.2;
        let copy = match self.served(apply.chunk) {
            Ok(copy) => copy,
            Err(refusal) => return refuse(to, refusal, effects),
        };
        let early = copy.serial.0 + WINDOW as u64;
        let refusal = if apply.version != copy.version {
            format!("the copy of {} here is {}, not {}", apply.chunk, copy.version, apply.version)
        } else if full {
            "the disk is full".to_owned()
        } else if apply.serial <= copy.durable {
            let reply = ChunkReply::Agreed { serial: copy.durable };
            return effects.push(Effect::Reply { to, reply });
        } else if apply.serial <= copy.serial || apply.serial.0 > early {
            format!("mutation {} does not come after {}", apply.serial.0, copy.serial.0)
        } else {
            copy.early.insert(apply.serial, (apply.clone(), data, to));
            return self.apply_in_order(apply.chunk, effects);
        };
        refuse(to, Refusal::unavailable(refusal), effects);
    }

    /// Applies what has its turn.
    fn apply_in_order(&mut self, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        loop {
            let Some(copy) = self.copies.get_mut(&chunk) else { return };
            let next = copy.serial.next();
            let Some((apply, data, to)) = copy.early.remove(&next) else { return };
            let data = match self.data_of(apply.pushed, data) {
                Ok(data) => data,
                Err(refusal) => return refuse(to, refusal, effects),
            };
            let end = apply.offset.checked_add(data.len() as u64);
            if end.is_none_or(|end| end > *CHUNK_BYTES.end()) {
                let refusal = format!("no chunk has more than {} bytes", CHUNK_BYTES.end());
                return refuse(to, Refusal::invalid(refusal), effects);
            }
            self.change(chunk, apply.offset, data, apply.mark, Some(to), effects);
        }
    }

    /// Makes the next mutation of a copy.
    pub(super) fn change(
        &mut self,
        chunk: ChunkId,
        offset: u64,
        data: Data,
        mark: Option<Mark>,
        to: Option<T>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(copy) = self.copies.get_mut(&chunk) else { return };
        copy.note(offset, data.len(), mark);
        let serial = copy.serial;
        let mark = mark.map(|mark| (mark.client, mark.number));
        let op = Op::Mutate { chunk, serial, offset, data, mark };
        self.disk(op, Job::Mutated(chunk, serial, to), effects);
    }

    /// A mutation is durable.
    pub(super) fn mutated(
        &mut self,
        now: Time,
        chunk: ChunkId,
        serial: Serial,
        to: Option<T>,
        trouble: Option<Trouble>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if trouble.is_some() {
            // It can't go on from here: its serial would promise too much.
            if let Some(to) = to {
                refuse(to, Refusal::unavailable(format!("{chunk} can't be changed here")), effects);
            }
            return self.damaged(chunk, effects);
        }
        let Some(copy) = self.copies.get_mut(&chunk) else { return };
        copy.durable = copy.durable.max(serial);
        let end = copy.regions.iter().rev().find(|(it, ..)| *it == serial);
        copy.shown = end.map_or(copy.length, |(_, offset, bytes)| copy.shown.max(offset + bytes));
        if let Some(to) = to {
            effects.push(Effect::Reply { to, reply: ChunkReply::Agreed { serial } });
        }
        self.go_on(now, chunk, effects);
    }

    // ---- what the master says ----

    pub(super) fn make(
        &mut self,
        to: T,
        chunk: ChunkId,
        version: Version,
        copy_of: Option<ChunkId>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.room.2 {
            return refuse(to, Refusal::unavailable("the disk is full"), effects);
        }
        let mut copy = Copy::new(version, Worth::Making);
        if let Some(source) = copy_of {
            match self.served(source) {
                Ok(source) => {
                    (copy.serial, copy.durable) = (source.serial, source.serial);
                    (copy.length, copy.shown) = (source.length, source.length);
                    copy.marks = source.marks.clone();
                }
                Err(refusal) => return refuse(to, refusal, effects),
            }
        }
        match self.copies.get(&chunk) {
            // It was made before, by a round that came to nothing; or this request
            // comes late, and then nobody listens.
            Some(old) if old.is_served() && old.version == version => {
                let reply = ChunkReply::Agreed { serial: old.serial };
                return effects.push(Effect::Reply { to, reply });
            }
            Some(_) => {
                let refusal = Refusal::unavailable(format!("{chunk} is here already"));
                return refuse(to, refusal, effects);
            }
            None => {}
        }
        let serial = copy.serial;
        let marks = copy.marks.iter().map(|(client, last)| (*client, last.number, last.offset));
        let marks = marks.collect();
        self.copies.insert(chunk, copy);
        let op = Op::Make { chunk, version, serial, copy_of, marks, joining: false };
        self.disk(op, Job::Made(chunk, to), effects);
    }

    pub(super) fn made(
        &mut self,
        to: T,
        chunk: ChunkId,
        trouble: Option<Trouble>,
        effects: &mut Vec<Effect<T>>,
    ) {
        match (self.copies.get_mut(&chunk), trouble) {
            (Some(copy), None) => {
                copy.worth = Worth::Served;
                let reply = ChunkReply::Agreed { serial: copy.serial };
                effects.push(Effect::Reply { to, reply });
            }
            _ => {
                self.copies.remove(&chunk);
                refuse(to, Refusal::unavailable(format!("{chunk} can't be made here")), effects);
            }
        }
    }

    pub(super) fn promise(
        &mut self,
        to: T,
        chunk: ChunkId,
        version: Version,
        effects: &mut Vec<Effect<T>>,
    ) {
        let is_filled = self.catching_up.get(&chunk).is_none_or(CatchUp::is_over);
        let Some(copy) = self.copies.get_mut(&chunk) else {
            return refuse(to, Refusal::unavailable(format!("{chunk} is not here")), effects);
        };
        let usable = match copy.worth {
            Worth::Served => true,
            Worth::Joining => is_filled,
            Worth::Making | Worth::Damaged => false,
        };
        if !usable || version < copy.version {
            let refusal = format!("the copy of {chunk} here can't promise {version}");
            return refuse(to, Refusal::unavailable(refusal), effects);
        }
        copy.version = version;
        let early = std::mem::take(&mut copy.early);
        for (_, _, primary) in early.into_values() {
            refuse(primary, Refusal::unavailable(format!("{chunk} is {version} by now")), effects);
        }
        self.catching_up.remove(&chunk);
        self.disk(Op::Promise { chunk, version }, Job::Promised(chunk, to), effects);
    }

    pub(super) fn promised(
        &mut self,
        to: T,
        chunk: ChunkId,
        trouble: Option<Trouble>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if trouble.is_some() {
            // It would serve under a version that is forgotten with the process.
            let refusal = format!("the copy of {chunk} here can't promise anything more");
            refuse(to, Refusal::unavailable(refusal), effects);
            return self.damaged(chunk, effects);
        }
        match self.copies.get_mut(&chunk) {
            Some(copy) if matches!(copy.worth, Worth::Served | Worth::Joining) => {
                copy.worth = Worth::Served;
                let reply = ChunkReply::Agreed { serial: copy.durable };
                effects.push(Effect::Reply { to, reply });
            }
            _ => refuse(to, Refusal::unavailable(format!("{chunk} is gone")), effects),
        }
    }

    pub(super) fn delete(
        &mut self,
        chunk: ChunkId,
        version: Version,
        effects: &mut Vec<Effect<T>>,
    ) {
        self.gone.insert(chunk);
        let is_old = |copy: &Copy<T>| copy.version <= version || !copy.is_served();
        if self.copies.get(&chunk).is_some_and(is_old) {
            self.drop_lead(chunk, "the chunk is no longer here", effects);
            self.catching_up.remove(&chunk);
            self.copies.remove(&chunk);
            self.damage.remove(&chunk);
            self.disk(Op::Delete { chunk }, Job::Nothing, effects);
        }
    }

    /// A block of a copy is not what was written, or the disk does not take what comes
    /// next: it serves nothing any more.
    pub(super) fn damaged(&mut self, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        let Some(copy) = self.copies.get_mut(&chunk) else { return };
        match copy.worth {
            Worth::Damaged => return,
            Worth::Joining => {
                self.fail_catching_up(chunk, "it is damaged", effects);
                return self.drop_half_copied(chunk, effects);
            }
            Worth::Served | Worth::Making => {}
        }
        copy.worth = Worth::Damaged;
        for (_, _, to) in std::mem::take(&mut copy.early).into_values() {
            refuse(to, Refusal::unavailable(format!("{chunk} is damaged here")), effects);
        }
        effects.push(Effect::Note(format!("the copy of {chunk} here is damaged")));
        self.drop_lead(chunk, "the primary's copy is damaged", effects);
        self.tell_damage(chunk, effects);
    }

    // ---- what a copy says that is behind ----

    pub(super) fn missed(
        &mut self,
        to: T,
        chunk: ChunkId,
        after: Option<Serial>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let copy = match self.served(chunk) {
            Ok(copy) => copy,
            Err(refusal) => return refuse(to, refusal, effects),
        };
        let oldest = copy.regions.front().map_or(copy.serial.next(), |(serial, ..)| *serial);
        let regions = match after {
            Some(after) if after == copy.durable => Vec::new(),
            Some(after) if oldest <= after.next() => {
                let known = after.next()..=copy.durable;
                let missed = copy.regions.iter().filter(|(serial, ..)| known.contains(serial));
                missed.map(|(_, offset, bytes)| (*offset, *bytes)).collect()
            }
            _ => vec![(0, copy.shown)],
        };
        let marks = copy.marks.iter().filter(|(_, last)| last.serial <= copy.durable);
        let reply = ChunkReply::Missed(MissedReply {
            version: copy.version,
            serial: copy.durable,
            length: copy.shown,
            regions,
            marks: marks
                .map(|(client, last)| Appended {
                    mark: Mark { client: *client, number: last.number },
                    offset: last.offset,
                })
                .collect(),
        });
        effects.push(Effect::Reply { to, reply });
    }

    pub(super) fn fetch(
        &mut self,
        to: T,
        chunk: ChunkId,
        offset: u64,
        length: usize,
        effects: &mut Vec<Effect<T>>,
    ) {
        match self.served(chunk) {
            Ok(copy) if offset < copy.shown => {
                let (whole, length) = (copy.shown, length.min(MAX_PIECE_BYTES));
                let length = length.min((whole - offset) as usize);
                effects.push(Effect::Read { to, chunk, offset, length, whole });
            }
            Ok(_) => refuse(to, Refusal::invalid("that is beyond the end of the chunk"), effects),
            Err(refusal) => refuse(to, refusal, effects),
        }
    }
}
