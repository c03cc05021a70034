//! Chunkservers: heartbeats, leases, and what each of them holds.
//!
//! A chunkserver that is not known, or whose lease has run out, has to *link*: it
//! stops leading, and says all that it holds, which counts only if it leads nothing.
//! From then on the master knows better than the chunkserver what its copies are
//! worth, and tells it with every answer: *fences*, what it may not serve while a round
//! is under way that it has not agreed to; and what to *delete*. An answer that names
//! them renews the lease, so nobody serves what it was not allowed to serve when its
//! lease began.
//!
//! A chunkserver of the original says with each sign of life what it holds, and takes
//! orders to delete. It knows of no leases and no fences.

use super::rounds::fence;
use super::{Asker, Effect, Leader, refuse};
use crate::gfs::messages::{Beat, BeatReply, Heartbeat, MasterReply};
use crate::gfs::state::Change;
use crate::gfs::{ChunkId, LEASE, ORIGINAL_LEASE, ServerNo, Version, lease_margin};
use crate::machine::Time;
use crate::wire::Refusal;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::time::Duration;

/// How often a chunkserver is asked for all that it holds.
pub(super) const INVENTORY_EVERY: Duration = Duration::from_secs(60);

/// What was heard of a copy less than this ago is not taken back by an inventory,
/// which may have been written before.
const INVENTORY_GRACE: Duration = Duration::from_secs(10);

/// Copies of a chunk that is no more are deleted whatever they have: it has no versions to
/// come, and nobody looks for it.
const COLLECTED: Version = Version(u64::MAX);

/// A chunkserver whose lease is live.
#[derive(Debug)]
pub(super) struct Alive {
    pub(super) start: u64,
    pub(super) address: SocketAddrV4,
    pub(super) lease_until: Time,
    pub(super) rack: Box<str>,
    pub(super) used: u64,
    pub(super) free: u64,
    pub(super) full: bool,
    /// Whether it is a program of the original.
    pub(super) original: bool,
    /// The copies that count, and when each was heard of.
    pub(super) holds: BTreeMap<ChunkId, Time>,
    /// What it must not serve below these versions.
    pub(super) fences: BTreeMap<ChunkId, Version>,
    /// What it must delete, unless it has a higher version.
    pub(super) doomed: BTreeMap<ChunkId, Version>,
    /// Chunks that a primary could not reach it for, and under which version.
    pub(super) silent: BTreeMap<ChunkId, Version>,
    /// Chunks that were put there lately.
    pub(super) recent: u32,
    inventory_at: Time,
}

impl Alive {
    /// Which part of its disk is in use, in thousandths.
    pub(super) fn fill(&self) -> u64 {
        self.used.saturating_mul(1000) / (self.used.saturating_add(self.free)).max(1)
    }

    fn take(&mut self, now: Time, beat: &Heartbeat) {
        self.lease_until = now + if self.original { ORIGINAL_LEASE } else { lease_margin() };
        self.rack = beat.rack.clone();
        (self.used, self.free, self.full) = (beat.used, beat.free, beat.full);
        for chunk in &beat.gone {
            self.doomed.remove(chunk);
        }
    }

    /// Orders up to `deleted_at_once` copies to be deleted, those of chunks that there still
    /// are first. Of these, whatever has to wait for its turn is fenced: the answer renews the
    /// lease.
    fn answer(&mut self, now: Time, deleted_at_once: usize) -> BeatReply {
        let inventory = now >= self.inventory_at;
        if inventory {
            self.inventory_at = now + INVENTORY_EVERY;
        }
        let (gone, old): (Vec<_>, Vec<_>) =
            self.doomed.iter().map(|(it, v)| (*it, *v)).partition(|(_, v)| *v == COLLECTED);
        let mut fences = self.fences.clone();
        for (chunk, version) in old.iter().skip(deleted_at_once) {
            let fence = fences.entry(*chunk).or_default();
            *fence = version.next().max(*fence);
        }
        BeatReply {
            status: Beat::Ok,
            lease_ms: LEASE.as_millis() as u64,
            fences: fences.into_iter().collect(),
            delete: old.into_iter().chain(gone).take(deleted_at_once).collect(),
            inventory,
        }
    }
}

impl<T> Leader<T> {
    /// Whose leases have run out: they hold nothing and lead nothing any more.
    pub(super) fn expire(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let over = self.alive.iter().filter(|(_, server)| server.lease_until <= now);
        let over: Vec<(ServerNo, SocketAddrV4)> =
            over.map(|(number, server)| (*number, server.address)).collect();
        for (number, address) in over {
            self.alive.remove(&number);
            self.departed.insert(number, now);
            self.primaries.retain(|_, primary| *primary != number);
            self.repairs.look_again();
            effects.push(Effect::Note(format!("{address} ({number}) is gone: no heartbeat")));
        }
    }

    /// A client of the original can't reach a chunkserver. One of ours has a lease that
    /// says whether it is there; one of the original is taken to be gone.
    pub(super) fn unreached(&mut self, now: Time, address: SocketAddrV4) {
        let Some(number) = self.number_at(address) else { return };
        let server = self.alive.get_mut(&number).filter(|server| server.original);
        server.into_iter().for_each(|server| server.lease_until = now);
    }

    pub(super) fn slept(&mut self, span: Duration) {
        self.alive.values_mut().for_each(|server| server.lease_until = server.lease_until + span);
        self.settles = self.settles + span;
    }

    pub(super) fn heartbeat(
        &mut self,
        now: Time,
        to: T,
        beat: Heartbeat,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(address) = beat.address else {
            let refusal = Refusal::invalid("heartbeat: a chunkserver has an \"address\"");
            return refuse(to, refusal, effects);
        };
        let number = self.state.server_named(&beat.server);
        let same = |server: &Alive| server.start == beat.start && server.address == address;
        let known = number.and_then(|number| self.alive.get_mut(&number)).filter(|it| same(it));
        // What it holds may have been meant for a master before this one, which made it primary of
        // chunks that this one takes for led by nobody.
        let holds = beat.holds.as_ref().filter(|_| known.is_some() || !beat.leads);
        match (known, holds) {
            (Some(server), None) => {
                server.take(now, &beat);
                let answer = server.answer(now, self.settings.deleted_at_once);
                let reply = MasterReply::Beat(answer);
                effects.push(Effect::Reply { to, reply });
            }
            (None, None) => {
                let reply = BeatReply {
                    status: Beat::Link,
                    lease_ms: 0,
                    fences: Vec::new(),
                    delete: Vec::new(),
                    inventory: true,
                };
                effects.push(Effect::Reply { to, reply: MasterReply::Beat(reply) });
            }
            (_, Some(holds)) => {
                let mut said = holds.iter().map(|(chunk, _)| chunk).chain(&beat.damaged);
                if let Some(newer) = said.find(|chunk| !self.state.was_made(**chunk)) {
                    let refusal = Refusal::unavailable(format!(
                        "this master has never made {newer}: it has lost its state, or it is \
                         another cluster's; start it over its own data, or give the chunkserver an \
                         empty data directory"
                    ));
                    return refuse(to, refusal, effects);
                }
                let registered = number.and_then(|number| self.state.server(number));
                match number {
                    Some(number) if registered.is_some_and(|it| it.address == address) => {
                        self.link(now, to, number, &beat, effects);
                    }
                    _ => {
                        let change = Change::Register { name: beat.server.clone(), address };
                        self.propose(change, Asker::Linking(to, beat), effects);
                    }
                }
            }
        }
    }

    /// A chunkserver says all that it holds.
    pub(super) fn link(
        &mut self,
        now: Time,
        to: T,
        number: ServerNo,
        beat: &Heartbeat,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(address) = beat.address else { return };
        let before = self.alive.remove(&number);
        let known = before.filter(|it| it.start == beat.start && it.address == address);
        let is_new = known.is_none();
        let mut server = known.unwrap_or_else(|| Alive {
            start: beat.start,
            address,
            lease_until: now,
            rack: Box::default(),
            used: 0,
            free: 0,
            full: false,
            original: beat.original,
            holds: BTreeMap::new(),
            fences: BTreeMap::new(),
            doomed: BTreeMap::new(),
            silent: BTreeMap::new(),
            recent: 0,
            inventory_at: now + INVENTORY_EVERY,
        });
        server.take(now, beat);
        if beat.original {
            let held: BTreeSet<ChunkId> = beat.holds.iter().flatten().map(|it| it.0).collect();
            server.doomed.retain(|chunk, _| held.contains(chunk));
        }
        let held: BTreeMap<ChunkId, Version> = beat.holds.iter().flatten().copied().collect();
        let lost: Vec<ChunkId> = server
            .holds
            .iter()
            .filter(|(chunk, since)| {
                let old = now.since(**since) > INVENTORY_GRACE;
                old && !held.contains_key(chunk) && !self.rounds.contains_key(chunk)
            })
            .map(|(chunk, _)| *chunk)
            .collect();
        for chunk in lost {
            effects.push(Effect::Note(format!("{address} ({number}) no longer holds {chunk}")));
            server.holds.remove(&chunk);
        }
        self.alive.insert(number, server);
        let mut invited = Vec::new();
        for (chunk, version) in held {
            if self.sort(now, number, chunk, version) {
                invited.push(chunk);
            }
        }
        if is_new {
            // A new process, or one that was away: whatever it led is over.
            self.primaries.retain(|_, primary| *primary != number);
            self.departed.remove(&number);
            effects.push(Effect::Note(format!("{address} ({number}) is here: {}", beat.server)));
        }
        self.repairs.look_again();
        if let Some(server) = self.alive.get_mut(&number) {
            let answer = server.answer(now, self.settings.deleted_at_once);
            let reply = MasterReply::Beat(BeatReply { inventory: false, ..answer });
            effects.push(Effect::Reply { to, reply });
        }
        for chunk in invited {
            self.invite(chunk, number, effects);
            self.advance(now, chunk, effects);
        }
        for chunk in &beat.damaged {
            self.damaged(now, number, *chunk, effects);
        }
    }

    /// What a copy that a chunkserver holds is worth; whether it is to be asked
    /// into a round that is under way.
    fn sort(&mut self, now: Time, number: ServerNo, chunk: ChunkId, version: Version) -> bool {
        let known = self.state.chunk(chunk);
        let counts = known.is_some_and(|it| it.members.contains(&number) && version >= it.version);
        let others = self
            .alive
            .iter()
            .any(|(other, server)| *other != number && server.holds.contains_key(&chunk));
        let round = self.rounds.get(&chunk).filter(|it| it.is_open());
        let round = round.map(|it| (it.version, it.concerns(number)));
        let is_being_made = self.repairs.is_made_by(number, chunk);
        let is_fresh =
            |since: Option<&Time>| since.is_some_and(|it| now.since(*it) <= INVENTORY_GRACE);
        let Some(server) = self.alive.get_mut(&number) else { return false };
        match round {
            Some((next, _)) if counts => {
                server.holds.entry(chunk).or_insert(now);
                server.fences.insert(chunk, fence(next));
                true
            }
            // It is about to become a member, or was refused: the round decides. It may have
            // promised before it went.
            Some((next, true)) => {
                server.fences.insert(chunk, fence(next));
                false
            }
            None if counts => {
                server.holds.entry(chunk).or_insert(now);
                false
            }
            // It has agreed to the version of now after this inventory was written.
            None if is_fresh(server.holds.get(&chunk)) => false,
            // It tells of what it is just making, serves without leases, and can't be fenced.
            _ if is_being_made && server.original => false,
            _ => {
                // A promise that comes late may still lift it to the version of now.
                let highest = known.map_or(COLLECTED, |it| version.max(it.version));
                // What may be the last trace of a chunk is not destroyed, nor read.
                let is_doomed = known.is_none() || others;
                if is_doomed {
                    server.doomed.insert(chunk, highest);
                }
                // Until it has heard that, it may serve under the lease of an earlier master.
                let is_settling = now < self.settles && known.is_some();
                if is_settling || !is_doomed {
                    server.fences.insert(chunk, highest.next());
                }
                let open = self.rounds.get_mut(&chunk).filter(|it| it.is_open());
                if let Some(round) = open.filter(|_| is_settling) {
                    round.waits_for(number, self.settles);
                }
                server.holds.remove(&chunk);
                false
            }
        }
    }

    /// These chunks are no more: every copy is to be deleted.
    pub(super) fn doom(&mut self, chunks: &[ChunkId]) {
        for chunk in chunks {
            self.primaries.remove(chunk);
            for server in self.alive.values_mut() {
                if server.holds.remove(chunk).is_some() {
                    server.doomed.insert(*chunk, COLLECTED);
                }
            }
        }
    }

    /// Members of `chunk` that are alive and hold it.
    pub(super) fn holders(&self, chunk: ChunkId) -> Vec<ServerNo> {
        let members = self.state.chunk(chunk).map_or(&[][..], |known| &known.members);
        let holds = |number: &&ServerNo| {
            self.alive.get(*number).is_some_and(|server| server.holds.contains_key(&chunk))
        };
        members.iter().filter(holds).copied().collect()
    }

    /// Where these chunkservers are, if they are alive.
    pub(super) fn addresses(&self, numbers: &[ServerNo]) -> Vec<SocketAddrV4> {
        numbers.iter().filter_map(|number| Some(self.alive.get(number)?.address)).collect()
    }

    /// The number of the chunkserver at `address`, if it is alive.
    pub(super) fn number_at(&self, address: SocketAddrV4) -> Option<ServerNo> {
        self.alive.iter().find(|(_, server)| server.address == address).map(|(number, _)| *number)
    }

    /// When `number` has certainly stopped serving by itself what it is not
    /// allowed to serve from now on.
    pub(super) fn stops_by(&self, now: Time, number: ServerNo) -> Time {
        match self.alive.get(&number) {
            Some(server) => server.lease_until,
            None if self.departed.contains_key(&number) => now,
            None => self.settles.max(now),
        }
    }

    /// Whether a chunkserver that has not been heard yet may still serve under a lease that an
    /// earlier master gave: what that one had it promise is not in the log.
    pub(super) fn is_unsettled(&self, now: Time) -> bool {
        let is_heard =
            |it: &ServerNo| self.alive.contains_key(it) || self.departed.contains_key(it);
        now < self.settles && !self.state.servers().all(|number| is_heard(&number))
    }

    /// A copy is damaged: it counts no more, a round leaves it out, and then it is deleted. That
    /// is said when the damage is found, and again with all that is held: the round may have gone
    /// by while its chunkserver was away, and so did not order it to be deleted.
    pub(super) fn damaged(
        &mut self,
        now: Time,
        number: ServerNo,
        chunk: ChunkId,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(server) = self.alive.get_mut(&number) else { return };
        if !self.state.was_made(chunk) {
            return;
        }
        let address = server.address;
        if server.holds.remove(&chunk).is_some() {
            self.damaged.insert((chunk, address));
            let note = format!("{address} ({number}): its copy of {chunk} is damaged");
            effects.push(Effect::Note(note));
            self.repairs.look_again();
        }
        let round = self.rounds.get_mut(&chunk);
        if let Some(round) = round.filter(|it| it.is_open() && it.concerns(number)) {
            // It decides about this one, too, and may have heard before that it agrees.
            round.leave_out(number);
            self.ask_what_it_holds(now, number);
            return self.advance(now, chunk, effects);
        }
        let known = self.state.chunk(chunk);
        let is_member = known.is_some_and(|it| it.members.contains(&number));
        let highest = known.map_or(COLLECTED, |it| it.version);
        let is_elsewhere = !self.holders(chunk).is_empty();
        if is_member && is_elsewhere {
            let lease = self.primaries.contains_key(&chunk);
            self.begin_round(now, chunk, lease, &[], &[number], effects);
        } else if !is_member
            && (known.is_none() || is_elsewhere)
            && let Some(server) = self.alive.get_mut(&number)
        {
            server.doomed.insert(chunk, highest);
        }
    }

    /// Asks `number` with the next answer for all that it holds.
    fn ask_what_it_holds(&mut self, now: Time, number: ServerNo) {
        let server = self.alive.get_mut(&number);
        server.into_iter().for_each(|server| server.inventory_at = now);
    }

    /// What the chunkserver at `address` calls itself, if it is alive.
    pub fn server_at(&self, address: SocketAddrV4) -> Option<Box<str>> {
        let number = self.number_at(address)?;
        self.state.server(number).map(|server| server.name.clone())
    }

    /// Where the chunkserver `number` is, if it is alive.
    pub(super) fn address_of(&self, number: ServerNo) -> Option<SocketAddrV4> {
        self.alive.get(&number).map(|server| server.address)
    }
}
