//! What clients ask the master for: names, places, leases, snapshots.

use super::{Asker, Effect, Leader, MAX_ASKED, MAX_PROPOSED, PATIENCE, refuse, reply_of};
use crate::gfs::files::{File, FileName};
use crate::gfs::messages::{
    Census, FailedPrimary, Listed, Located, MasterReply, MasterRequest, Status,
};
use crate::gfs::state::{Change, Outcome};
use crate::gfs::{CHUNK_BYTES, ChunkId, DEFAULT_CHUNK_BYTES, LOCATIONS_LAST, MAX_COPIES};
use crate::machine::Time;
use crate::wire::Refusal;
use std::collections::BTreeSet;

/// How many names one page has at most.
pub(super) const MAX_PAGE: usize = 1_000;

/// How many chunks one answer locates at most.
pub(super) const MAX_LOCATED: usize = 64;

/// How many changes can wait at once until nobody writes to what they are about.
const MAX_STANDSTILLS: usize = 1_000;

/// A change that waits until nobody writes to what it is about: a snapshot; or a file gets
/// another name, or none. Clients keep their leases: who kept one of a file that is called
/// otherwise would be told that his record stands under its name.
#[derive(Debug)]
pub(super) struct Standstill<T> {
    /// Taken when the change is on its way into the log.
    to: Option<T>,
    change: Change,
    until: Time,
}

impl<T> Standstill<T> {
    /// Who waits for it, unless it is on its way into the log.
    pub(super) fn into_asker(self) -> Option<T> {
        self.to
    }

    /// What nobody is to write to: this, and what lies under it.
    fn what(&self) -> Option<&FileName> {
        match &self.change {
            Change::Delete { name, .. } => Some(name),
            Change::Snapshot { from, .. } | Change::Rename { from, .. } => Some(from),
            _ => None,
        }
    }
}

impl<T> Leader<T> {
    /// A request has come. What becomes a change proves itself in the log; anything else
    /// is answered when this master is confirmed to lead.
    pub(super) fn request(
        &mut self,
        now: Time,
        to: T,
        request: MasterRequest,
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.proposed.len() >= MAX_PROPOSED || self.asked.len() >= MAX_ASKED {
            let refusal = Refusal::unavailable("the master is overloaded: try again later");
            return refuse(to, refusal, effects);
        }
        match request {
            MasterRequest::Create { .. }
            | MasterRequest::Delete { .. }
            | MasterRequest::Undelete { .. }
            | MasterRequest::Rename { .. } => self.answer(now, to, request, effects),
            request => self.asked.push((to, request)),
        }
    }

    pub(super) fn answer(
        &mut self,
        now: Time,
        to: T,
        request: MasterRequest,
        effects: &mut Vec<Effect<T>>,
    ) {
        let at_ms = self.day_ms(now);
        let change = match request {
            MasterRequest::Create { name, chunk_bytes, copies } => {
                match self.new_file(at_ms, chunk_bytes, copies) {
                    Ok(file) => Change::Create { name, file },
                    Err(refusal) => return refuse(to, refusal, effects),
                }
            }
            MasterRequest::Delete { name } => {
                return self.stand_still(now, to, Change::Delete { name, at_ms }, effects);
            }
            MasterRequest::Undelete { name } => Change::Undelete { name },
            MasterRequest::Rename { from, to: dest } => {
                let change = Change::Rename { from, to: dest };
                return self.stand_still(now, to, change, effects);
            }
            MasterRequest::Snapshot { from, to: dest } => {
                let change = Change::Snapshot { from, to: dest, at_ms };
                return self.stand_still(now, to, change, effects);
            }
            MasterRequest::Lease { name, index, failed } => {
                return self.lease(now, to, name, index, failed, effects);
            }
            MasterRequest::Heartbeat(beat) => return self.heartbeat(now, to, beat, effects),
            MasterRequest::Failed { chunk, version, silent, refused } => {
                let reply = MasterReply::Done(Status::Ok);
                effects.push(Effect::Reply { to, reply });
                return self.members_failed(now, chunk, version, &silent, &refused, effects);
            }
            MasterRequest::Unreached { address } => {
                self.unreached(now, address);
                let reply = MasterReply::Done(Status::Ok);
                return effects.push(Effect::Reply { to, reply });
            }
            MasterRequest::Damaged { server, chunk } => {
                let reply = MasterReply::Done(Status::Ok);
                effects.push(Effect::Reply { to, reply });
                if let Some(number) = self.state.server_named(&server) {
                    self.damaged(now, number, chunk, effects);
                }
                return;
            }
            MasterRequest::Ls { under, after, limit } => {
                let reply = self.page(under.as_ref(), after.as_ref(), limit);
                return effects.push(Effect::Reply { to, reply });
            }
            MasterRequest::Stat { name } => {
                let reply = self.stat(&name);
                return effects.push(Effect::Reply { to, reply });
            }
            MasterRequest::Locate { name, index, count } => {
                let reply = self.locate(now, &name, index, count.unwrap_or(1));
                return effects.push(Effect::Reply { to, reply });
            }
            MasterRequest::Census {} => {
                let reply = MasterReply::Census(self.census());
                return effects.push(Effect::Reply { to, reply });
            }
        };
        self.propose(change, Asker::Client(to), effects);
    }

    fn new_file(
        &self,
        made_ms: u64,
        chunk_bytes: Option<u64>,
        copies: Option<u8>,
    ) -> Result<File, Refusal> {
        let chunk_bytes = chunk_bytes.unwrap_or(DEFAULT_CHUNK_BYTES);
        let copies = copies.unwrap_or(self.settings.copies);
        if !CHUNK_BYTES.contains(&chunk_bytes) {
            let (least, most) = (CHUNK_BYTES.start(), CHUNK_BYTES.end());
            return Err(Refusal::invalid(format!("a chunk has from {least} to {most} bytes")));
        }
        if !(1..=MAX_COPIES).contains(&copies) {
            return Err(Refusal::invalid(format!("there are from 1 to {MAX_COPIES} copies")));
        }
        Ok(File { chunk_bytes, copies, made_ms, chunks: Vec::new() })
    }

    fn lease(
        &mut self,
        now: Time,
        to: T,
        name: FileName,
        index: Option<usize>,
        failed: Option<FailedPrimary>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let last = self.state.file(&name).map_or(0, |file| file.chunks.len().saturating_sub(1));
        let waiter = Self::waiter(now, to, name, index.unwrap_or(last));
        self.seek(now, waiter, failed, effects);
    }

    // ---- reading the names ----

    fn page(
        &self,
        under: Option<&FileName>,
        after: Option<&FileName>,
        limit: Option<usize>,
    ) -> MasterReply {
        let limit = limit.unwrap_or(MAX_PAGE).clamp(1, MAX_PAGE);
        let from = after.max(under);
        let fits = |name: &FileName| match under {
            None => true,
            Some(under) => name.as_str().starts_with(under.as_str()),
        };
        let mut files: Vec<Listed> = self
            .state
            .files_after(from)
            .take_while(|(name, _)| fits(name))
            .filter(|(name, _)| under.is_none_or(|under| name.is_under(under)))
            .take(limit + 1)
            .map(|(name, file)| listed(name, file))
            .collect();
        let more = files.len() > limit;
        files.truncate(limit);
        MasterReply::Listed { files, more }
    }

    fn stat(&self, name: &FileName) -> MasterReply {
        match self.state.file(name) {
            Some(file) => MasterReply::Stat { file: listed(name, file), copies: file.copies },
            None => MasterReply::Refused(Refusal::not_found(format!("{name} is not there"))),
        }
    }

    fn locate(&self, now: Time, name: &FileName, index: usize, count: usize) -> MasterReply {
        let Some(file) = self.state.file(name) else {
            return MasterReply::Refused(Refusal::not_found(format!("{name} is not there")));
        };
        let count = count.clamp(1, MAX_LOCATED);
        let wanted = file.chunks.iter().enumerate().skip(index).take(count);
        let chunks = wanted.map(|(index, &chunk)| self.place_of(now, index, chunk)).collect();
        MasterReply::Located { total: file.chunks.len(), chunk_bytes: file.chunk_bytes, chunks }
    }

    /// Where a chunk can be read: if it is a copy that is still to be made, where
    /// that is which it is a copy of, until it is made.
    fn place_of(&self, now: Time, index: usize, chunk: ChunkId) -> Located {
        let made = self.state.chunk(chunk).is_some_and(|known| !known.members.is_empty());
        let valid = match made {
            true => LOCATIONS_LAST,
            false => self.time_until_made(now, chunk).unwrap_or(LOCATIONS_LAST),
        };
        let chunk = if made { chunk } else { self.source_of(chunk).unwrap_or(chunk) };
        let version = self.state.chunk(chunk).map(|known| known.version).unwrap_or_default();
        let replicas = match valid.is_zero() {
            true => Vec::new(),
            false => self.addresses(&self.holders(chunk)),
        };
        Located { index, chunk, version, replicas, valid_ms: valid.as_millis() as u64 }
    }

    fn census(&self) -> Census {
        let mut census = Census {
            servers: self.alive.len(),
            files: self.state.count_files(),
            deleted: self.state.deleted().count(),
            orphans: self.alive.values().map(|server| server.doomed.len()).sum(),
            copying: self.repairs.count(),
            damaged: self.damaged.iter().copied().collect(),
            ..Census::default()
        };
        for (id, chunk) in self.state.chunks() {
            census.chunks += 1;
            let copies = self.holders(id).len();
            census.copies += copies;
            let is_short = copies < usize::from(chunk.copies) && copies < self.count_suited(id);
            if chunk.members.is_empty() {
                continue;
            }
            if copies == 0 {
                census.lost.push(id);
            } else if is_short {
                census.short.push(id);
            }
        }
        census
    }

    // ---- what waits until nobody writes ----

    fn stand_still(&mut self, now: Time, to: T, change: Change, effects: &mut Vec<Effect<T>>) {
        if self.standstills.len() >= MAX_STANDSTILLS {
            let refusal = Refusal::unavailable("too many wait until nobody writes: try again");
            return refuse(to, refusal, effects);
        }
        self.standstills.push(Standstill { to: Some(to), change, until: now + PATIENCE });
    }

    /// Whether writing to `name` has to wait.
    pub(super) fn is_frozen(&self, name: &FileName) -> bool {
        let mut names = self.standstills.iter().filter_map(Standstill::what);
        names.any(|it| name == it || name.is_under(it))
    }

    /// Takes the leases away, and makes the changes of what nobody can write to any more.
    pub(super) fn advance_standstills(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let (mut ready, mut led) = (Vec::new(), BTreeSet::new());
        for (place, it) in self.standstills.iter().enumerate().filter(|(_, it)| it.to.is_some()) {
            let files = match &it.change {
                // It will be refused: nothing that lies under a name is deleted with it.
                Change::Delete { name, .. } if self.state.file(name).is_none() => Vec::new(),
                _ => it.what().map(|name| self.state.tree(name)).unwrap_or_default(),
            };
            let chunks: Vec<ChunkId> = files.into_iter().flat_map(|(_, it)| it.chunks).collect();
            let is_busy = |it: &ChunkId| self.primaries.contains_key(it) || self.is_in_round(*it);
            let busy: Vec<ChunkId> = chunks.iter().copied().filter(is_busy).collect();
            if chunks.is_empty() || (busy.is_empty() && now >= self.settles) {
                ready.push(place);
            }
            led.extend(busy);
        }
        for place in ready {
            let standstill = &mut self.standstills[place];
            if let Some(to) = standstill.to.take() {
                let change = standstill.change.clone();
                self.propose(change, Asker::Standstill(to), effects);
            }
        }
        led.retain(|chunk| self.primaries.contains_key(chunk));
        for chunk in led {
            self.begin_round(now, chunk, false, &[], &[], effects);
            self.advance(now, chunk, effects);
        }
        let late = |it: &Standstill<T>| it.to.is_some() && it.until <= now;
        let (late, rest) = std::mem::take(&mut self.standstills).into_iter().partition(late);
        self.standstills = rest;
        let late: Vec<Standstill<T>> = late;
        let is_over = !late.is_empty();
        for to in late.into_iter().filter_map(Standstill::into_asker) {
            let refusal =
                Refusal::unavailable("somebody who writes there can't be stopped: try again");
            refuse(to, refusal, effects);
        }
        if is_over {
            self.unpark(now, effects);
        }
    }

    /// The change is in the log, or was refused there.
    pub(super) fn stood_still(
        &mut self,
        now: Time,
        change: &Change,
        to: T,
        outcome: Outcome,
        effects: &mut Vec<Effect<T>>,
    ) {
        let place = self.standstills.iter().position(|it| it.to.is_none() && it.change == *change);
        place.into_iter().for_each(|place| drop(self.standstills.remove(place)));
        effects.push(Effect::Reply { to, reply: reply_of(outcome) });
        self.unpark(now, effects);
    }

    fn unpark(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        for waiter in std::mem::take(&mut self.parked) {
            self.seek(now, waiter, None, effects);
        }
    }
}

fn listed(name: &FileName, file: &File) -> Listed {
    Listed {
        name: name.clone(),
        chunks: file.chunks.len(),
        chunk_bytes: file.chunk_bytes,
        made_ms: file.made_ms,
    }
}
