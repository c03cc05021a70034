//! Where copies go, and which are made anew: fewest copies first.
//!
//! A copy is made by the chunkserver that is to have it, from one that has it,
//! while the chunk goes on being written; a round then takes it in. The copies of
//! a chunk are spread over racks, then over the emptier disks, then over those that
//! were given least of late.
//!
//! Chunkservers of the original hold either all copies of a chunk or none.
//!
//! When nothing is short, the fullest disk gives to the emptiest, one chunk at a
//! time, as long as they differ by more than [`UNEVEN`].

use super::{Call, CallId, Effect, Leader};
use crate::gfs::messages::{ChunkReply, ChunkRequest};
use crate::gfs::{ChunkId, ORIGINAL_CHUNK_BYTES, ServerNo, Version};
use crate::machine::Time;
use crate::wire::Refusal;
use std::collections::BTreeMap;
use std::time::Duration;

/// How many copies are made at once, and how many one chunkserver makes or gives.
const MAX_AT_ONCE: usize = 32;
const MAX_EACH: usize = 4;

/// How often the chunks are looked through for what is short.
const LOOK: Duration = Duration::from_millis(500);

/// How long making one copy may take.
const COPY_PATIENCE: Duration = Duration::from_secs(85);

/// By how many thousandths the fullest and the emptiest disk may differ.
const UNEVEN: u64 = 100;

/// Chunks that were put somewhere lately are forgotten by half this often.
const FORGET: Duration = Duration::from_secs(10);

/// A copy that is being made.
#[derive(Debug)]
struct Copying {
    call: CallId,
    from: ServerNo,
    to: ServerNo,
}

/// The copies that are being made.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    copying: BTreeMap<ChunkId, Copying>,
    /// Nothing was short when it was looked last, and nothing has changed.
    is_quiet: bool,
    looked: Time,
    forgot: Time,
}

impl Repairs {
    /// Something has changed: there may be a chunk that is short.
    pub(super) fn look_again(&mut self) {
        self.is_quiet = false;
    }

    pub(super) fn count(&self) -> usize {
        self.copying.len()
    }

    /// Whether `number` is making a copy of `chunk`.
    pub(super) fn is_made_by(&self, number: ServerNo, chunk: ChunkId) -> bool {
        self.copying.get(&chunk).is_some_and(|it| it.to == number)
    }

    fn busy(&self, number: ServerNo) -> usize {
        self.copying.values().filter(|it| it.from == number || it.to == number).count()
    }
}

impl<T> Leader<T> {
    /// Whether `chunk` is with chunkservers of the original, or is to go there: a file
    /// that a client of the original has made, and there are no others.
    fn is_original(&self, chunk: ChunkId) -> bool {
        let holders = self.holders(chunk);
        match holders.first().and_then(|number| self.alive.get(number)) {
            Some(server) => server.original,
            None => {
                let bytes = self.state.chunk(chunk).map(|known| known.bytes);
                bytes == Some(ORIGINAL_CHUNK_BYTES) && self.alive.values().all(|it| it.original)
            }
        }
    }

    /// How many chunkservers could hold a copy of `chunk`.
    pub(super) fn count_suited(&self, chunk: ChunkId) -> usize {
        let original = self.is_original(chunk);
        self.alive.values().filter(|server| server.original == original).count()
    }

    /// Up to `count` chunkservers that a new copy of `chunk` should go to.
    pub(super) fn places_for(&mut self, chunk: ChunkId, count: usize) -> Vec<ServerNo> {
        let members = self.state.chunk(chunk).map(|it| it.members.clone()).unwrap_or_default();
        let mut racks: Vec<Box<str>> = self
            .holders(chunk)
            .iter()
            .filter_map(|it| Some(self.alive.get(it)?.rack.clone()))
            .collect();
        let (original, mut chosen) = (self.is_original(chunk), Vec::new());
        while chosen.len() < count {
            let free = self.alive.iter().filter(|(number, server)| {
                let has = members.contains(number) && server.holds.contains_key(&chunk);
                !server.full
                    && server.original == original
                    && !has
                    && !server.doomed.contains_key(&chunk)
                    && !chosen.contains(*number)
            });
            let best = free.min_by_key(|(number, server)| {
                let same_rack = racks.iter().filter(|rack| **rack == server.rack).count();
                (same_rack, server.fill() / 50, server.recent, **number)
            });
            let Some((&number, server)) = best else { break };
            racks.push(server.rack.clone());
            chosen.push(number);
        }
        for number in &chosen {
            if let Some(server) = self.alive.get_mut(number) {
                server.recent += 1;
            }
        }
        chosen
    }

    /// Starts what copies should and can be made.
    pub(super) fn repair(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        if now.since(self.repairs.forgot) >= FORGET {
            self.repairs.forgot = now;
            self.alive.values_mut().for_each(|server| server.recent /= 2);
        }
        if now.since(self.repairs.looked) < LOOK || now < self.settles {
            return;
        }
        self.repairs.looked = now;
        if self.repairs.is_quiet {
            return self.balance(effects);
        }
        let mut short: Vec<(usize, bool, bool, ChunkId)> = Vec::new();
        let (mut many, mut useless) = (Vec::new(), Vec::new());
        for (id, chunk) in self.state.chunks() {
            let copies = self.holders(id).len();
            if copies > usize::from(chunk.copies) && !self.is_in_round(id) {
                many.push(id);
            }
            // A member that is there and holds nothing whole: a round leaves it out, and
            // what it holds is deleted.
            let members = chunk.members.iter().copied();
            let is_useless = |it: &ServerNo| {
                self.alive.get(it).is_some_and(|server| !server.holds.contains_key(&id))
            };
            let members: Vec<ServerNo> = members.filter(is_useless).collect();
            if copies > 0 && !members.is_empty() && !self.is_in_round(id) {
                useless.push((id, members));
            }
            let lacks = copies > 0 && copies < usize::from(chunk.copies);
            if lacks && copies < self.count_suited(id) {
                let waited_for = self.primaries.contains_key(&id);
                short.push((copies, !waited_for, chunk.live == 0, id));
            }
        }
        short.sort_unstable();
        self.repairs.is_quiet = short.is_empty()
            && many.is_empty()
            && useless.is_empty()
            && self.repairs.copying.is_empty();
        for (chunk, members) in useless.into_iter().take(MAX_AT_ONCE) {
            let lease = self.primaries.contains_key(&chunk);
            self.begin_round(now, chunk, lease, &[], &members, effects);
            self.advance(now, chunk, effects);
        }
        many.into_iter().take(MAX_AT_ONCE).for_each(|chunk| self.shed(now, chunk, effects));
        for (copies, _, _, chunk) in short {
            if self.repairs.count() >= MAX_AT_ONCE {
                return;
            }
            if copies == 1 || self.are_away_for_long(now, chunk) {
                self.copy(chunk, None, effects);
            }
        }
    }

    /// Gives up the copy of `chunk` on the fullest disk: it was taken for lost, and
    /// has come back.
    fn shed(&mut self, now: Time, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        let primary = self.primaries.get(&chunk).copied();
        let others = self.holders(chunk).into_iter().filter(|it| Some(*it) != primary);
        let fill = |number: &ServerNo| self.alive.get(number).map(|server| server.fill());
        let Some(fullest) = others.max_by_key(|number| (fill(number), *number)) else { return };
        self.begin_round(now, chunk, primary.is_some(), &[], &[fullest], effects);
        self.advance(now, chunk, effects);
    }

    /// Whether those members of `chunk` that are away have been so for long.
    fn are_away_for_long(&self, now: Time, chunk: ChunkId) -> bool {
        let members = self.state.chunk(chunk).map_or(&[][..], |known| &known.members);
        members.iter().filter(|number| !self.alive.contains_key(number)).all(|number| {
            let since = self.departed.get(number).copied().unwrap_or(self.started);
            now.since(since) >= self.settings.repair_after
        })
    }

    /// Has a copy of `chunk` made: from one to another chunkserver, if it is to move.
    fn copy(
        &mut self,
        chunk: ChunkId,
        moves: Option<(ServerNo, ServerNo)>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.repairs.copying.contains_key(&chunk) || self.is_in_round(chunk) {
            return;
        }
        let holders = self.holders(chunk);
        let from = moves.map(|(from, _)| from).or_else(|| {
            let least = holders.iter().min_by_key(|it| self.repairs.busy(**it));
            least.copied()
        });
        let to = match moves {
            Some((_, to)) => Some(to),
            None => self.places_for(chunk, 1).first().copied(),
        };
        let (Some(from), Some(to)) = (from, to) else { return };
        if self.repairs.busy(from) >= MAX_EACH || self.repairs.busy(to) >= MAX_EACH {
            return;
        }
        let (Some(source), Some(address)) = (self.address_of(from), self.address_of(to)) else {
            return;
        };
        let version = self.state.chunk(chunk).map_or(Version(0), |known| known.version);
        let request = ChunkRequest::Replicate { chunk, version, from: source };
        let call = self.call(address, Call::Copy(chunk), request, COPY_PATIENCE, effects);
        effects.push(Effect::Note(format!("{chunk} is copied from {from} to {to}")));
        let copying = Copying { call, from, to };
        self.repairs.copying.insert(chunk, copying);
    }

    /// A copy was made, or not.
    pub(super) fn copied(
        &mut self,
        now: Time,
        chunk: ChunkId,
        call: CallId,
        answer: Option<Result<ChunkReply, Refusal>>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.repairs.copying.get(&chunk).is_none_or(|it| it.call != call) {
            return;
        }
        let Some(Copying { to, .. }) = self.repairs.copying.remove(&chunk) else {
            return;
        };
        self.repairs.look_again();
        match answer {
            Some(Ok(_)) => {
                // If it moves, there is one copy too many now, and the fullest disk
                // gives its own up.
                let lease = self.primaries.contains_key(&chunk);
                self.begin_round(now, chunk, lease, &[to], &[], effects);
                self.advance(now, chunk, effects);
            }
            Some(Err(refusal)) => {
                effects.push(Effect::Note(format!("{chunk} was not copied to {to}: {refusal}")));
            }
            None => {
                effects.push(Effect::Note(format!("{chunk} was not copied to {to}: no answer")))
            }
        }
    }

    /// Moves one chunk from the fullest disk to the emptiest.
    fn balance(&mut self, effects: &mut Vec<Effect<T>>) {
        if !self.repairs.copying.is_empty() {
            return;
        }
        let usable = || {
            let ours = self.alive.iter().filter(|(_, server)| !server.original);
            ours.filter(|(_, server)| !server.full || server.used > 0)
        };
        let fullest = usable().max_by_key(|(number, server)| (server.fill(), **number));
        let emptiest = usable().min_by_key(|(number, server)| (server.fill(), **number));
        let (Some((&from, full)), Some((&to, empty))) = (fullest, emptiest) else { return };
        if full.fill() < empty.fill() + UNEVEN || empty.full {
            return;
        }
        let fits = |chunk: &&ChunkId| {
            let known = self.state.chunk(**chunk);
            !empty.holds.contains_key(chunk)
                && !empty.doomed.contains_key(chunk)
                && !self.primaries.contains_key(chunk)
                && known.is_some_and(|it| it.members.contains(&from))
        };
        let chunk = full.holds.keys().find(fits).copied();
        if let Some(chunk) = chunk {
            self.copy(chunk, Some((from, to)), effects);
        }
    }
}
