//! Rounds: how a chunk comes to its next version, its members, and its primary.
//!
//! 1. *Asking.* Every member that is alive, and whoever is to join, promises to
//!    refuse older versions; a new chunk is made instead. Members that are to be
//!    left out are told to stop serving. The round goes on when at least one has
//!    agreed, nobody else is expected to, and every member that has not agreed has
//!    stopped serving: it said so, or its lease is over, or it was only renewed by
//!    answers that forbade it this chunk. Whom an earlier master may have asked to join
//!    has said what it holds and is told to stop, too, or that one's leases are over.
//!    Who is to join fetches what was written since it made its copy: from now on it
//!    counts like any other.
//! 2. *Logging.* The version and those who have agreed go into the log. From then
//!    on only their copies count; all others are deleted.
//!    If nobody is to be primary, all who have agreed fetch first what some of them
//!    have and others don't: it was never acknowledged, and is the same everywhere now.
//! 3. *Leading.* If somebody wants to write, the one with the most mutations is
//!    made primary. A client that waits hears of it when the primary has answered.
//!
//! A copy of what a snapshot shares is made when locations of the shared chunk that were
//! told in its place are forgotten, and after a round that makes the shared one equal
//! everywhere.
//!
//! A round that finds nobody stays open while somebody waits for it: a member
//! that comes back is asked into it.

use super::{Asker, CALL_PATIENCE, Call, CallId, Effect, Leader, MAX_WAITING, PATIENCE, refuse};
use crate::gfs::files::FileName;
use crate::gfs::messages::{ChunkReply, ChunkRequest, FailedPrimary, LeaseGranted, MasterReply};
use crate::gfs::state::{Change, Outcome};
use crate::gfs::{ChunkId, LOCATIONS_LAST, Serial, ServerNo, Version, locations_margin};
use crate::machine::Time;
use crate::wire::Refusal;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::time::Duration;

/// After a member did not answer, it is asked again after this long, while there
/// is still time.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// How long a copy that joins may take to fetch what was written while it was
/// made.
const BRING_UP_PATIENCE: Duration = Duration::from_secs(5);

/// Below which version a member may not serve while a round for `version` is under way and
/// has not heard that it agrees. The promise itself lifts its copy to `version`, whether we
/// hear of it or not, and this time or in a round before that came to nothing.
pub(super) fn fence(version: Version) -> Version {
    version.next()
}

/// A client that wants to write to a chunk.
#[derive(Debug)]
pub(super) struct Waiter<T> {
    pub(super) to: T,
    pub(super) name: FileName,
    pub(super) index: usize,
    pub(super) until: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Waiting(CallId),
    /// It has agreed, and fetches what it has missed.
    Fetching(CallId),
    Agreed(Serial),
    Refused,
    Silent(Time),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Asking,
    Logging,
    Leading(CallId),
}

/// A round that is under way.
#[derive(Debug)]
pub(super) struct Round<T> {
    pub(super) version: Version,
    stage: Stage,
    /// Whether somebody is to be primary in the end.
    lease: bool,
    /// Who should rather not be.
    avoid: Option<ServerNo>,
    waiters: Vec<Waiter<T>>,
    asked: BTreeMap<ServerNo, Asked>,
    /// Answers to calls up to this one come too late: they say nothing of now.
    before: CallId,
    /// Members, and others that may have promised, that have not agreed, and when each has
    /// stopped serving for certain: the answer of who is to join may be lost.
    stops: BTreeMap<ServerNo, Time>,
    /// Who holds a copy that is no member yet.
    joining: BTreeSet<ServerNo>,
    /// What a chunk is to be made of that has no members yet.
    made: Option<Option<ChunkId>>,
    /// It does not end before: the last one did not lead to anything.
    rests_until: Time,
}

impl<T> Round<T> {
    pub(super) fn into_waiters(self) -> Vec<Waiter<T>> {
        self.waiters
    }

    /// Whether it is not yet certain who is a member: then the log says so, and whoever comes
    /// is one or is not.
    pub(super) fn is_open(&self) -> bool {
        !matches!(self.stage, Stage::Leading(_))
    }

    /// Whether `number` may become a member by it.
    pub(super) fn concerns(&self, number: ServerNo) -> bool {
        self.asked.contains_key(&number) || self.joining.contains(&number)
    }

    /// `number` holds a copy that is none of a member's, and may serve it until `stop`.
    pub(super) fn waits_for(&mut self, number: ServerNo, stop: Time) {
        self.stops.entry(number).or_insert(stop);
    }

    /// `number` has a damaged copy: it can't be a member, whether it has agreed or not, unless the
    /// log is about to say so. It serves nothing of it.
    pub(super) fn leave_out(&mut self, number: ServerNo) {
        if self.stage == Stage::Asking {
            self.asked.insert(number, Asked::Refused);
        }
    }

    /// Who can be a member of the new version; nobody while all that have agreed
    /// are still to join: they may not have all that was acknowledged.
    fn agreed(&self) -> Vec<ServerNo> {
        let has_agreed = |asked: &Asked| matches!(asked, Asked::Agreed(_));
        let agreed = self.asked.iter().filter(|(_, it)| has_agreed(it)).map(|(it, _)| *it);
        let agreed: Vec<ServerNo> = agreed.collect();
        let was_member = |number: &ServerNo| !self.joining.contains(number);
        if agreed.iter().any(was_member) { agreed } else { Vec::new() }
    }

    /// Who has less than another one: with that one, and its serial. There will be no more
    /// mutations: the members have promised. Who is to join may lack what was acknowledged
    /// since it made its copy. Members lack only what was not, and what one that joins has
    /// beyond them was not, either: that is made equal if `all` are asked for.
    fn behind(&self, all: bool) -> Vec<(ServerNo, ServerNo, Serial)> {
        let serials = self.asked.iter().filter_map(|(number, asked)| match asked {
            Asked::Agreed(serial) => Some((*serial, *number)),
            _ => None,
        });
        let joins = |number: &ServerNo| self.joining.contains(number);
        let best = serials.clone().filter(|(_, number)| all || !joins(number)).max();
        let Some((most, best)) = best else { return Vec::new() };
        let behind = serials.filter(|(serial, _)| *serial < most);
        let behind = behind.filter(|(_, number)| all || joins(number));
        behind.map(|(_, number)| (number, best, most)).collect()
    }
}

impl<T> Leader<T> {
    /// Has those that are behind fetch what they have missed. Who can't is left out: so it is
    /// not to serve meanwhile, and it is waited for until it doesn't.
    fn bring_up(
        &mut self,
        chunk: ChunkId,
        behind: &[(ServerNo, ServerNo, Serial)],
        effects: &mut Vec<Effect<T>>,
    ) {
        // Nobody is waited for any more: who was told to stop before, and says so only now, may
        // have agreed since.
        if let Some(round) = self.rounds.get_mut(&chunk) {
            round.before = self.last_call;
        }
        for &(number, best, serial) in behind {
            let addresses = self.address_of(number).zip(self.address_of(best));
            let Some(round) = self.rounds.get_mut(&chunk) else { return };
            let Some((to, from)) = addresses else {
                round.asked.insert(number, Asked::Refused);
                continue;
            };
            let version = round.version;
            if let Some(server) = self.alive.get_mut(&number) {
                round.stops.insert(number, server.lease_until);
                server.fences.insert(chunk, fence(version));
            }
            let request = ChunkRequest::Establish { chunk, version, serial, from };
            let about = Call::Round(chunk, number);
            let call = self.call(to, about, request, BRING_UP_PATIENCE, effects);
            if let Some(round) = self.rounds.get_mut(&chunk) {
                round.asked.insert(number, Asked::Fetching(call));
            }
        }
    }

    /// A client wants to write; `failed` is who did not take it before.
    pub(super) fn seek(
        &mut self,
        now: Time,
        waiter: Waiter<T>,
        failed: Option<FailedPrimary>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.is_frozen(&waiter.name) {
            if self.parked.len() >= MAX_WAITING {
                let refusal = Refusal::unavailable("too many wait to write: try again");
                return refuse(waiter.to, refusal, effects);
            }
            return self.parked.push(waiter);
        }
        let (name, index) = (waiter.name.clone(), waiter.index);
        let Some(file) = self.state.file(&name) else {
            let refusal = Refusal::not_found(format!("{name} is not there"));
            return refuse(waiter.to, refusal, effects);
        };
        let Some(&chunk) = file.chunks.get(index) else {
            let change = Change::AddChunk { name, index };
            return self.propose(change, Asker::Seeker(waiter), effects);
        };
        let Some(known) = self.state.chunk(chunk) else { return };
        // Before anything else: a round of a shared chunk may be under way, and leads to nobody.
        if known.is_shared() {
            let change = Change::Copy { name, index, of: chunk };
            return self.propose(change, Asker::Seeker(waiter), effects);
        }
        if let Some(round) = self.rounds.get_mut(&chunk) {
            if round.waiters.len() >= MAX_WAITING {
                let refusal = Refusal::unavailable("too many wait for this chunk: try again");
                return refuse(waiter.to, refusal, effects);
            }
            round.lease = true;
            return round.waiters.push(waiter);
        }
        let primary = self.primaries.get(&chunk).copied();
        let address = primary.and_then(|number| self.address_of(number));
        let complaint = failed.filter(|it| it.version == known.version);
        let failed = complaint.and_then(|it| self.number_at(it.server));
        match address {
            Some(address) if complaint.is_none_or(|it| it.server != address) => {
                let reply = self.granted(chunk, index, address);
                effects.push(Effect::Reply { to: waiter.to, reply });
            }
            _ => {
                self.begin_round(now, chunk, true, &[], &[], effects);
                if let Some(round) = self.rounds.get_mut(&chunk) {
                    round.avoid = failed;
                    round.waiters.push(waiter);
                }
                self.advance(now, chunk, effects);
            }
        }
    }

    fn granted(&self, chunk: ChunkId, index: usize, primary: SocketAddrV4) -> MasterReply {
        let known = self.state.chunk(chunk).cloned().unwrap_or_default();
        MasterReply::Lease(LeaseGranted {
            index,
            chunk,
            version: known.version,
            chunk_bytes: known.bytes,
            primary,
            replicas: self.addresses(&known.members),
        })
    }

    /// Begins a round, unless one is under way. `joining` hold a copy that is to
    /// count from now on, `leaving` are to be left out.
    pub(super) fn begin_round(
        &mut self,
        now: Time,
        chunk: ChunkId,
        lease: bool,
        joining: &[ServerNo],
        leaving: &[ServerNo],
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(known) = self.state.chunk(chunk) else { return };
        if self.rounds.contains_key(&chunk) {
            return;
        }
        let (members, version) = (known.members.clone(), known.version.next());
        // Who is fenced may have promised this very version, in a round that came to nothing.
        let fenced = self.alive.iter().filter(|(_, server)| server.fences.contains_key(&chunk));
        let fenced = fenced.map(|(number, _)| *number);
        let may_serve: BTreeSet<ServerNo> =
            members.iter().chain(joining).copied().chain(fenced).collect();
        let made = members.is_empty().then(|| self.source_of(chunk));
        let asked = match made {
            None => [self.holders(chunk), joining.to_vec()].concat(),
            Some(None) => self.places_for(chunk, usize::from(known.copies)),
            Some(Some(source)) => self.holders(source),
        };
        let round = Round {
            version,
            stage: Stage::Asking,
            lease,
            avoid: None,
            waiters: Vec::new(),
            asked: BTreeMap::new(),
            before: self.last_call,
            stops: may_serve.iter().map(|it| (*it, self.stops_by(now, *it))).collect(),
            joining: joining.iter().copied().collect(),
            made,
            rests_until: if let Some(Some(_)) = made { now + locations_margin() } else { now },
        };
        self.rounds.insert(chunk, round);
        if let Some(Some(source)) = made {
            self.begin_round(now, source, false, &[], &[], effects);
        }
        for number in &may_serve {
            let Some(server) = self.alive.get_mut(number) else { continue };
            server.fences.insert(chunk, fence(version));
            if leaving.contains(number) || !asked.contains(number) {
                self.stop(chunk, version, *number, effects);
            }
        }
        for number in asked.into_iter().filter(|number| !leaving.contains(number)) {
            self.ask(chunk, number, effects);
        }
    }

    /// Tells a chunkserver to serve `chunk` no more, for a round for `version` without it.
    fn stop(
        &mut self,
        chunk: ChunkId,
        version: Version,
        number: ServerNo,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(address) = self.address_of(number) else { return };
        let request = ChunkRequest::Fence { chunk, below: fence(version) };
        self.call(address, Call::Round(chunk, number), request, CALL_PATIENCE, effects);
    }

    /// What a chunk without members is to be made of: nothing, or the chunk whose
    /// content it has.
    pub(super) fn source_of(&self, chunk: ChunkId) -> Option<ChunkId> {
        let mut source = self.state.chunk(chunk)?.copy_of?;
        while let Some(known) = self.state.chunk(source) {
            match known.copy_of {
                Some(next) if known.members.is_empty() => source = next,
                _ if known.members.is_empty() => return None,
                _ => return Some(source),
            }
        }
        None
    }

    /// How long it takes at least until a copy is made of what its file shares; nothing
    /// if that has not begun.
    pub(super) fn time_until_made(&self, now: Time, chunk: ChunkId) -> Option<Duration> {
        let round = self.rounds.get(&chunk).filter(|round| matches!(round.made, Some(Some(_))))?;
        // By a clock that is slower than this one.
        let left = round.rests_until.since(now);
        Some(left.saturating_sub(locations_margin() - LOCATIONS_LAST))
    }

    fn ask(&mut self, chunk: ChunkId, number: ServerNo, effects: &mut Vec<Effect<T>>) {
        let Some(address) = self.address_of(number) else { return };
        let Some(round) = self.rounds.get(&chunk) else { return };
        let version = round.version;
        let request = match round.made {
            Some(copy_of) => ChunkRequest::Make { chunk, version, copy_of },
            None => ChunkRequest::Promise { chunk, version },
        };
        let call = self.call(address, Call::Round(chunk, number), request, CALL_PATIENCE, effects);
        if let Some(round) = self.rounds.get_mut(&chunk) {
            round.asked.insert(number, Asked::Waiting(call));
        }
    }

    /// Asks a member that has come back into a round that is under way.
    pub(super) fn invite(
        &mut self,
        chunk: ChunkId,
        number: ServerNo,
        effects: &mut Vec<Effect<T>>,
    ) {
        let is_open = self.rounds.get(&chunk).is_some_and(|round| {
            let is_out = !matches!(round.asked.get(&number), Some(Asked::Agreed(_)));
            round.stage == Stage::Asking && round.made.is_none() && is_out
        });
        if is_open {
            self.ask(chunk, number, effects);
        }
    }

    pub(super) fn round_answered(
        &mut self,
        now: Time,
        chunk: ChunkId,
        call: CallId,
        number: ServerNo,
        answer: Option<Result<ChunkReply, Refusal>>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(round) = self.rounds.get_mut(&chunk) else { return };
        if round.stage != Stage::Asking || call <= round.before {
            // Too late to be a member: what it holds will be deleted. Or it has stopped serving
            // for a round that came to nothing, or before it agreed, and may have begun again.
            return;
        }
        let asked = round.asked.get(&number).copied();
        let is_asked = asked == Some(Asked::Waiting(call)) || asked == Some(Asked::Fetching(call));
        match answer {
            Some(Ok(ChunkReply::Agreed { serial })) if is_asked => {
                round.asked.insert(number, Asked::Agreed(serial));
                round.stops.remove(&number);
                if let Some(server) = self.alive.get_mut(&number) {
                    server.fences.remove(&chunk);
                }
            }
            // It has stopped serving, as it was told.
            Some(Ok(ChunkReply::Done(_))) => drop(round.stops.remove(&number)),
            // Who could not fetch is left out; it may serve this chunk still.
            _ if asked == Some(Asked::Fetching(call)) => {
                round.asked.insert(number, Asked::Refused);
                let version = round.version;
                self.stop(chunk, version, number, effects);
            }
            // A refusal says that it does not serve this chunk.
            Some(Err(_)) if is_asked => {
                round.asked.insert(number, Asked::Refused);
                round.stops.remove(&number);
            }
            _ if is_asked => drop(round.asked.insert(number, Asked::Silent(now))),
            _ => {}
        }
        self.advance(now, chunk, effects);
    }

    /// Takes a round as far as it can go.
    pub(super) fn advance(&mut self, now: Time, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        let Some(round) = self.rounds.get_mut(&chunk) else { return };
        let (late, waiters) =
            std::mem::take(&mut round.waiters).into_iter().partition(|it| it.until <= now);
        round.waiters = waiters;
        let late: Vec<Waiter<T>> = late;
        for waiter in late {
            let refusal = Refusal::unavailable(format!(
                "{chunk} ({} of {}) has no chunkserver that can take a change now; try again",
                waiter.index, waiter.name
            ));
            refuse(waiter.to, refusal, effects);
        }
        let Some(round) = self.rounds.get_mut(&chunk) else { return };
        if round.stage != Stage::Asking {
            return;
        }
        let gone = round.asked.iter().filter(|(number, asked)| {
            let expected = !matches!(asked, Asked::Refused | Asked::Silent(_));
            expected && !self.alive.contains_key(number)
        });
        let gone: Vec<ServerNo> = gone.map(|(number, _)| *number).collect();
        for number in gone {
            round.asked.insert(number, Asked::Silent(now));
        }
        let is_waited_for =
            round.asked.values().any(|it| matches!(it, Asked::Waiting(_) | Asked::Fetching(_)));
        let is_served_elsewhere = round
            .stops
            .iter()
            .any(|(number, stop)| *stop > now && !self.departed.contains_key(number));
        let members = round.agreed();
        if round.made.flatten().is_some_and(|source| self.rounds.contains_key(&source)) {
            // What it is a copy of is made equal first.
            return;
        }
        let is_unsettled = self.is_unsettled(now);
        let Some(round) = self.rounds.get_mut(&chunk) else { return };
        // Whoever was to join in a round of an earlier master may have promised this very version.
        let may_have_joined = round.made.is_none() && is_unsettled;
        let is_certain = !is_waited_for && !is_served_elsewhere && !may_have_joined;
        if is_certain && !members.is_empty() && now >= round.rests_until {
            let behind = round.behind(!round.lease);
            if !behind.is_empty() {
                return self.bring_up(chunk, &behind, effects);
            }
            round.stage = Stage::Logging;
            let change = Change::Confirm { chunk, version: round.version, members };
            return self.propose(change, Asker::Round(chunk), effects);
        }
        let again = round.asked.iter().filter(|(number, asked)| {
            matches!(asked, Asked::Silent(since) if *since + ASK_AGAIN <= now)
                && self.alive.contains_key(number)
        });
        let mut again: Vec<ServerNo> = again.map(|(number, _)| *number).collect();
        let (made, copies) = (round.made, self.state.chunk(chunk).map_or(0, |it| it.copies));
        if let Some(source) = made.filter(|_| members.is_empty() && !is_waited_for) {
            // Whoever has come meanwhile.
            let mut more = match source {
                None => self.places_for(chunk, usize::from(copies)),
                Some(source) => self.holders(source),
            };
            more.retain(|it| !self.rounds[&chunk].asked.contains_key(it));
            again.append(&mut more);
        }
        let Some(round) = self.rounds.get(&chunk) else { return };
        if !is_waited_for && members.is_empty() && again.is_empty() && round.waiters.is_empty() {
            let is_hopeless = !round.asked.values().any(|it| matches!(it, Asked::Silent(_)));
            if is_hopeless || !round.lease {
                return self.give_up(chunk);
            }
        }
        for number in again {
            self.ask(chunk, number, effects);
        }
    }

    /// Ends a round that came to nothing: everything is as it was before. Who is no member may
    /// have promised: it is fenced, and the next round stops it and has it deleted. Not yet: it
    /// may be the last trace of the chunk.
    fn give_up(&mut self, chunk: ChunkId) {
        let Some(round) = self.rounds.remove(&chunk) else { return };
        let members = self.state.chunk(chunk).map_or(&[][..], |known| &known.members);
        for (number, server) in &mut self.alive {
            if members.contains(number) {
                server.fences.remove(&chunk);
            } else if round.joining.contains(number) {
                server.fences.insert(chunk, fence(round.version));
            }
        }
    }

    /// The version and its members are in the log.
    pub(super) fn confirmed(
        &mut self,
        now: Time,
        chunk: ChunkId,
        change: Change,
        outcome: &Outcome,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(round) = self.rounds.remove(&chunk) else { return };
        let Change::Confirm { members, version, .. } = change else { return };
        if let Outcome::Refused(refusal) = outcome {
            for waiter in round.waiters {
                refuse(waiter.to, refusal.clone(), effects);
            }
            // The chunk is gone: so are the copies that were made of it just now.
            for (number, server) in &mut self.alive {
                server.fences.remove(&chunk);
                if round.asked.contains_key(number) || round.joining.contains(number) {
                    server.doomed.insert(chunk, version);
                }
            }
            return;
        }
        self.primaries.remove(&chunk);
        for (number, server) in &mut self.alive {
            let was_fenced = server.fences.remove(&chunk).is_some();
            if members.contains(number) {
                server.holds.insert(chunk, now);
                continue;
            }
            let was_asked = round.asked.contains_key(number) || round.joining.contains(number);
            let held = server.holds.remove(&chunk).is_some();
            if was_fenced || held || was_asked {
                server.doomed.insert(chunk, version);
            }
        }
        self.repairs.look_again();
        let names: Vec<String> = members.iter().map(ToString::to_string).collect();
        effects.push(Effect::Note(format!("{chunk} is {version}: {}", names.join(" "))));
        let is_shared = self.state.chunk(chunk).is_some_and(|known| known.is_shared());
        if is_shared || round.waiters.iter().any(|waiter| self.is_frozen(&waiter.name)) {
            // Nobody is to write to it: whoever wants to asks anew. What a primary would have made
            // equal is made equal by one round more.
            if round.lease {
                self.begin_round(now, chunk, false, &[], &[], effects);
            }
            for waiter in round.waiters {
                self.seek(now, waiter, None, effects);
            }
            return self.advance(now, chunk, effects);
        }
        if round.lease {
            self.lead(chunk, round, &members, effects);
        }
    }

    /// Makes one of the members primary.
    fn lead(
        &mut self,
        chunk: ChunkId,
        mut round: Round<T>,
        members: &[ServerNo],
        effects: &mut Vec<Effect<T>>,
    ) {
        let serial = |number: &ServerNo| match round.asked.get(number) {
            Some(Asked::Agreed(serial)) => *serial,
            _ => Serial::default(),
        };
        let led = |number: &ServerNo| self.primaries.values().filter(|it| *it == number).count();
        let best = members
            .iter()
            .filter(|number| self.alive.contains_key(number))
            .max_by_key(|number| {
                let wanted = round.avoid != Some(**number);
                (serial(number), wanted, std::cmp::Reverse((led(number), **number)))
            })
            .copied();
        let Some((primary, address)) = best.and_then(|it| Some((it, self.address_of(it)?))) else {
            // All are gone again: whoever waits finds out by asking anew.
            for waiter in round.waiters {
                let refusal =
                    Refusal::unavailable(format!("the members of {chunk} are gone again"));
                refuse(waiter.to, refusal, effects);
            }
            return;
        };
        let others: Vec<ServerNo> = members.iter().filter(|it| **it != primary).copied().collect();
        let request = ChunkRequest::Lead {
            chunk,
            version: round.version,
            others: others.iter().filter_map(|it| Some(self.state.server(*it)?.address)).collect(),
            bytes: self.state.chunk(chunk).map_or(0, |known| known.bytes),
        };
        // It may lead from now on, whether its answer comes or not.
        self.primaries.insert(chunk, primary);
        let call = self.call(address, Call::Lead(chunk, primary), request, CALL_PATIENCE, effects);
        round.stage = Stage::Leading(call);
        self.rounds.insert(chunk, round);
    }

    pub(super) fn lead_answered(
        &mut self,
        now: Time,
        chunk: ChunkId,
        call: CallId,
        number: ServerNo,
        leads: bool,
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.rounds.get(&chunk).is_none_or(|it| it.stage != Stage::Leading(call)) {
            return;
        }
        let Some(round) = self.rounds.remove(&chunk) else { return };
        if leads && let Some(primary) = self.address_of(number) {
            for waiter in round.waiters {
                let reply = self.granted(chunk, waiter.index, primary);
                effects.push(Effect::Reply { to: waiter.to, reply });
            }
        } else if !round.waiters.is_empty() {
            self.begin_round(now, chunk, true, &[], &[], effects);
            if let Some(next) = self.rounds.get_mut(&chunk) {
                next.avoid = Some(number);
                next.waiters = round.waiters;
                next.rests_until = now + ASK_AGAIN;
            }
            self.advance(now, chunk, effects);
        }
    }

    /// A primary can't reach members of its chunk, or they refuse.
    pub(super) fn members_failed(
        &mut self,
        now: Time,
        chunk: ChunkId,
        version: Version,
        silent: &[SocketAddrV4],
        refused: &[SocketAddrV4],
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.state.chunk(chunk).is_none_or(|known| known.version != version) {
            return;
        }
        let mut leaving: Vec<ServerNo> =
            refused.iter().filter_map(|address| self.number_at(*address)).collect();
        let silent: Vec<ServerNo> =
            silent.iter().filter_map(|address| self.number_at(*address)).collect();
        for number in silent {
            let Some(server) = self.alive.get_mut(&number) else { continue };
            // Twice in a row: the primary does not reach it, though we do.
            if server.silent.insert(chunk, version) == Some(Version(version.0.saturating_sub(1))) {
                leaving.push(number);
            }
        }
        self.begin_round(now, chunk, true, &[], &leaving, effects);
        self.advance(now, chunk, effects);
    }

    /// Whether `chunk` changes its members just now.
    pub(super) fn is_in_round(&self, chunk: ChunkId) -> bool {
        self.rounds.contains_key(&chunk)
    }

    /// A client's place in the queue for a lease.
    pub(super) fn waiter(now: Time, to: T, name: FileName, index: usize) -> Waiter<T> {
        Waiter { to, name, index, until: now + PATIENCE }
    }
}
