//! Catching up: fetching from another copy what this one has missed, or all of it.
//!
//! A copy says which mutation it has last, and is told which regions those after
//! it have changed. It fetches the regions *as they are by now*, puts them on its
//! disk, and then takes over the serial that it was told. What was changed in
//! between comes with the next turn. So a chunk can be copied while it is written
//! to; the last bit is fetched when its members are settled in a round and its
//! new primary establishes itself.

use super::copies::{Copy, Last, Worth};
use super::{Call, ChunkServer, Effect, Job, MAX_KEPT_REGIONS, Op, Trouble, TurnId, refuse};
use crate::gfs::messages::{ChunkReply, ChunkRequest, MissedReply, Packet};
use crate::gfs::{CHUNK_BYTES, ChunkId, MAX_PIECE_BYTES, Serial, Version};
use crate::machine::Time;
use crate::wire::Refusal;
use std::collections::VecDeque;
use std::net::SocketAddrV4;
use std::time::Duration;

/// How many parts are fetched at once.
const FETCHES: usize = 4;

/// After so many turns a copy of a chunk that is being written to is near enough.
const MAX_TURNS: u32 = 8;

/// How long it is waited before a primary is asked again for what it has not on
/// its disk yet.
const ASK_AGAIN: Duration = Duration::from_millis(5);

/// A copy that nobody takes in for so long goes again.
const TAKE_IN: Duration = Duration::from_secs(30);

/// How long all of it may take: the master waits somewhat longer.
const PATIENCE: Duration = Duration::from_secs(80);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It has asked what it has missed.
    Asking,
    /// It asks when this moment has come.
    Resting(Time),
    Fetching,
    Adopting,
    /// It has all; the master is to take it in.
    Over,
}

/// A copy that is catching up.
#[derive(Debug)]
pub(super) struct CatchUp<T> {
    /// Who waits for it.
    to: Option<T>,
    from: SocketAddrV4,
    version: Version,
    /// What it must have in the end; as near as can be, if nothing is given.
    target: Option<Serial>,
    stage: Stage,
    turn: TurnId,
    /// What it was told last.
    told: MissedReply,
    todo: VecDeque<(u64, usize)>,
    /// Parts that are being fetched, or are on their way to the disk.
    under_way: usize,
    turns: u32,
    until: Time,
}

impl<T> CatchUp<T> {
    /// Whether it has all that it can have.
    pub(super) fn is_over(&self) -> bool {
        self.stage == Stage::Over
    }
}

impl<T> ChunkServer<T> {
    /// A new primary wants this member to have all that it has.
    #[expect(clippy::too_many_arguments, reason = "a request, taken apart")]
    pub(super) fn establish(
        &mut self,
        now: Time,
        to: T,
        chunk: ChunkId,
        version: Version,
        serial: Serial,
        from: SocketAddrV4,
        effects: &mut Vec<Effect<T>>,
    ) {
        let copy = match self.served(chunk) {
            Ok(copy) => copy,
            Err(refusal) => return refuse(to, refusal, effects),
        };
        if copy.version != version || copy.serial > serial {
            let (held, has) = (copy.version, copy.serial.0);
            let refusal = format!("the copy of {chunk} here is {held} at {has}");
            return refuse(to, Refusal::unavailable(refusal), effects);
        }
        if copy.durable == serial {
            return effects.push(Effect::Reply { to, reply: ChunkReply::Agreed { serial } });
        }
        self.catch_up(now, to, chunk, version, Some(serial), from, effects);
    }

    /// The master wants a copy of a chunk here.
    pub(super) fn replicate(
        &mut self,
        now: Time,
        to: T,
        chunk: ChunkId,
        version: Version,
        from: SocketAddrV4,
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.room.2 {
            return refuse(to, Refusal::unavailable("the disk is full"), effects);
        }
        if self.copies.get(&chunk).is_some_and(Copy::is_served) {
            return refuse(to, Refusal::unavailable(format!("{chunk} is here")), effects);
        }
        if self.copies.remove(&chunk).is_some() {
            self.disk(Op::Delete { chunk }, Job::Nothing, effects);
        }
        self.copies.insert(chunk, Copy::new(version, Worth::Joining));
        let (serial, marks) = (Serial::default(), Vec::new());
        let op = Op::Make { chunk, version, serial, copy_of: None, marks, joining: true };
        self.disk(op, Job::Nothing, effects);
        self.catch_up(now, to, chunk, version, None, from, effects);
    }

    #[expect(clippy::too_many_arguments, reason = "what both kinds have in common")]
    fn catch_up(
        &mut self,
        now: Time,
        to: T,
        chunk: ChunkId,
        version: Version,
        target: Option<Serial>,
        from: SocketAddrV4,
        effects: &mut Vec<Effect<T>>,
    ) {
        let until = now + PATIENCE;
        let job = CatchUp {
            to: Some(to),
            from,
            version,
            target,
            stage: Stage::Asking,
            turn: TurnId::default(),
            told: MissedReply::default(),
            todo: VecDeque::new(),
            under_way: 0,
            turns: 0,
            until,
        };
        if let Some(before) = self.catching_up.insert(chunk, job)
            && let Some(to) = before.to
        {
            refuse(to, Refusal::unavailable("begun anew"), effects);
        }
        self.ask_what_is_missed(chunk, effects);
    }

    fn ask_what_is_missed(&mut self, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        let turn = self.next_id();
        let Some(copy) = self.copies.get(&chunk) else { return };
        let Some(job) = self.catching_up.get_mut(&chunk) else { return };
        (job.stage, job.turn) = (Stage::Asking, turn);
        let is_empty = copy.worth == Worth::Joining && job.turns == 0;
        let after = (!is_empty).then_some(copy.serial);
        let (from, request) = (job.from, ChunkRequest::Missed { chunk, after });
        self.call(from, Call::Missed(chunk, turn), Packet::bare(request), effects);
    }

    pub(super) fn missed_answered(
        &mut self,
        now: Time,
        chunk: ChunkId,
        turn: TurnId,
        answer: Option<Result<Packet<ChunkReply>, Refusal>>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(copy) = self.copies.get(&chunk) else { return };
        let has = copy.serial;
        let Some(job) = self.catching_up.get_mut(&chunk) else { return };
        if job.turn != turn {
            return;
        }
        let told = match answer {
            Some(Ok(Packet { message: ChunkReply::Missed(told), .. })) => told,
            Some(Err(refusal)) => {
                return self.fail_catching_up(chunk, &refusal.to_string(), effects);
            }
            _ => return self.fail_catching_up(chunk, "the other copy does not answer", effects),
        };
        if told.version < job.version {
            return self.fail_catching_up(chunk, "the other copy is older", effects);
        }
        if !can_be(&told) {
            return self.fail_catching_up(chunk, "the other copy tells what can't be", effects);
        }
        let is_first = job.turns == 0;
        job.turns += 1;
        if job.target.is_some_and(|target| told.serial < target) && told.serial <= has {
            // It is not on the primary's own disk yet.
            job.stage = Stage::Resting(now + ASK_AGAIN);
            return;
        }
        job.todo = told.regions.iter().flat_map(|region| pieces(*region)).collect();
        job.told = told;
        job.stage = Stage::Fetching;
        if job.target.is_none() && !is_first && job.todo.is_empty() && job.told.serial == has {
            return self.caught_up(now, chunk, effects);
        }
        self.fetch_more(now, chunk, effects);
    }

    fn fetch_more(&mut self, now: Time, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        loop {
            let Some(job) = self.catching_up.get_mut(&chunk) else { return };
            if job.stage != Stage::Fetching {
                return;
            }
            if job.todo.is_empty() && job.under_way == 0 {
                return self.adopt(chunk, effects);
            }
            let may_fetch = job.target.is_some() || now >= self.fetch_from;
            if job.under_way >= FETCHES || !may_fetch {
                return;
            }
            let Some((offset, length)) = job.todo.pop_front() else { return };
            job.under_way += 1;
            if job.target.is_none() {
                let pause = length as f64 / self.settings.copy_rate.max(1) as f64;
                self.fetch_from = self.fetch_from.max(now) + Duration::from_secs_f64(pause);
            }
            let (from, request) = (job.from, ChunkRequest::Fetch { chunk, offset, length });
            let about = Call::Fetch(chunk, job.turn, offset, length);
            self.call(from, about, Packet::bare(request), effects);
        }
    }

    pub(super) fn fetched(
        &mut self,
        chunk: ChunkId,
        turn: TurnId,
        offset: u64,
        length: usize,
        answer: Option<Result<Packet<ChunkReply>, Refusal>>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if self.catching_up.get(&chunk).is_none_or(|job| job.turn != turn) {
            return;
        }
        match answer {
            Some(Ok(Packet { message: ChunkReply::Length { .. }, data }))
                if data.len() == length =>
            {
                self.disk(Op::Patch { chunk, offset, data }, Job::Patched(chunk, turn), effects);
            }
            Some(Err(refusal)) => self.fail_catching_up(chunk, &refusal.to_string(), effects),
            _ => self.fail_catching_up(chunk, "the other copy does not answer", effects),
        }
    }

    pub(super) fn patched(
        &mut self,
        now: Time,
        chunk: ChunkId,
        turn: TurnId,
        trouble: Option<Trouble>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if trouble.is_some() {
            return self.fail_catching_up(chunk, "the disk does not take it", effects);
        }
        if let Some(job) = self.catching_up.get_mut(&chunk).filter(|job| job.turn == turn) {
            job.under_way = job.under_way.saturating_sub(1);
            self.fetch_more(now, chunk, effects);
        }
    }

    /// Takes over the serial that it was told, and what comes with it.
    fn adopt(&mut self, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        let (Some(job), Some(copy)) =
            (self.catching_up.get_mut(&chunk), self.copies.get_mut(&chunk))
        else {
            return;
        };
        job.stage = Stage::Adopting;
        let told = std::mem::take(&mut job.told);
        copy.serial = told.serial;
        copy.length = copy.length.max(told.length);
        let serial = told.serial;
        for appended in &told.marks {
            let (number, offset) = (appended.mark.number, appended.offset);
            copy.marks.insert(appended.mark.client, Last { number, offset, serial });
        }
        // Known as one: whoever is behind us fetches all of what we have fetched.
        for (offset, bytes) in told.regions {
            copy.regions.push_back((serial, offset, bytes));
        }
        while copy.regions.len() > MAX_KEPT_REGIONS {
            copy.regions.pop_front();
        }
        let marks = told.marks.iter().map(|it| (it.mark.client, it.mark.number, it.offset));
        let (version, length) = (copy.version, copy.length);
        let op = Op::Adopt { chunk, version, serial, length, marks: marks.collect() };
        let about = Job::Adopted(chunk, job.turn);
        self.disk(op, about, effects);
    }

    pub(super) fn adopted(
        &mut self,
        now: Time,
        chunk: ChunkId,
        turn: TurnId,
        trouble: Option<Trouble>,
        effects: &mut Vec<Effect<T>>,
    ) {
        if trouble.is_some() {
            self.fail_catching_up(chunk, "the disk does not take it", effects);
            // Its serial would promise too much.
            return self.damaged(chunk, effects);
        }
        let job = self.catching_up.get_mut(&chunk).filter(|job| job.turn == turn);
        let (Some(job), Some(copy)) = (job, self.copies.get_mut(&chunk)) else { return };
        copy.durable = copy.serial;
        copy.shown = copy.length;
        let is_done = match job.target {
            Some(target) => copy.serial >= target,
            None => job.turns >= MAX_TURNS,
        };
        if is_done {
            self.caught_up(now, chunk, effects);
        } else {
            job.stage = Stage::Resting(now);
            self.go_on_catching_up(now, effects);
        }
    }

    fn caught_up(&mut self, now: Time, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        let serial = self.copies.get(&chunk).map_or(Serial::default(), |copy| copy.durable);
        let Some(job) = self.catching_up.get_mut(&chunk) else { return };
        job.stage = Stage::Over;
        job.until = now + TAKE_IN;
        let is_member = job.target.is_some();
        if let Some(to) = job.to.take() {
            effects.push(Effect::Reply { to, reply: ChunkReply::Agreed { serial } });
        }
        if is_member {
            self.catching_up.remove(&chunk);
        }
    }

    pub(super) fn fail_catching_up(
        &mut self,
        chunk: ChunkId,
        why: &str,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(job) = self.catching_up.remove(&chunk) else { return };
        if let Some(to) = job.to {
            refuse(to, Refusal::unavailable(format!("{chunk} was not fetched: {why}")), effects);
        }
        self.drop_half_copied(chunk, effects);
    }

    /// What was half copied is worth nothing.
    pub(super) fn drop_half_copied(&mut self, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        if self.copies.get(&chunk).is_some_and(|copy| copy.worth == Worth::Joining) {
            self.copies.remove(&chunk);
            self.disk(Op::Delete { chunk }, Job::Nothing, effects);
        }
    }

    /// Goes on with what had to wait.
    pub(super) fn go_on_catching_up(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let chunks: Vec<ChunkId> = self.catching_up.keys().copied().collect();
        for chunk in chunks {
            let Some(job) = self.catching_up.get(&chunk) else { continue };
            match job.stage {
                _ if job.until <= now => self.fail_catching_up(chunk, "it took too long", effects),
                Stage::Resting(until) if until <= now => self.ask_what_is_missed(chunk, effects),
                Stage::Fetching => self.fetch_more(now, chunk, effects),
                _ => {}
            }
        }
    }
}

/// Whether a copy can have these regions.
fn can_be(told: &MissedReply) -> bool {
    let is_within = |(offset, bytes): &(u64, u64)| {
        offset.checked_add(*bytes).is_some_and(|end| end <= told.length)
    };
    told.length <= *CHUNK_BYTES.end()
        && told.regions.len() <= MAX_KEPT_REGIONS
        && told.regions.iter().all(is_within)
}

/// A region in pieces that fit in a message.
fn pieces((offset, length): (u64, u64)) -> impl Iterator<Item = (u64, usize)> {
    let end = offset + length;
    (offset..end)
        .step_by(MAX_PIECE_BYTES)
        .map(move |begin| (begin, (end - begin).min(MAX_PIECE_BYTES as u64) as usize))
}
