//! Leading a chunk: giving mutations their order, and waiting until every member
//! has them.
//!
//! A new primary first *establishes* itself: every other member fetches what it
//! has missed. Until then, and while [`WINDOW`] mutations are under way, what
//! clients want waits in a queue. When a member does not answer, or refuses,
//! nothing more is acknowledged and nothing begun: the master is told, and the
//! round that it begins ends with this chunkserver leading again, or another. In
//! the first case what was pending is acknowledged once the new members have it.

use super::copies::Last;
use super::{Call, CallId, ChunkServer, Effect, refuse};
use crate::gfs::messages::{
    Apply, ChunkReply, ChunkRequest, Data, DataId, Mark, MasterRequest, Packet, Status,
};
use crate::gfs::{CHUNK_BYTES, ChunkId, MAX_PIECE_BYTES, Serial, Version};
use crate::machine::Time;
use crate::wire::Refusal;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddrV4;
use std::time::Duration;

/// How many mutations of one chunk are under way at once: a member that fell
/// behind is behind by no more.
pub const WINDOW: usize = 64;

/// How many mutations can wait for their turn.
const MAX_QUEUED: usize = 1_024;

/// After so long a client is told that its mutation may or may not have been made.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);

/// What a client wants.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Write { offset: u64 },
    Append { mark: Option<Mark> },
}

#[derive(Debug)]
struct Wanted<T> {
    to: T,
    kind: Kind,
    pushed: Option<DataId>,
    data: Data,
    until: Time,
}

/// A mutation that not all members have yet.
#[derive(Debug)]
struct Pending<T> {
    /// Who waits for it: more than one if it was sent again.
    to: Vec<T>,
    /// What they are to be told.
    reply: ChunkReply,
    /// The members that have not answered.
    left: BTreeSet<SocketAddrV4>,
    /// Whether it is durable here.
    mine: bool,
    /// For members that have not got what was pushed.
    apply: Apply,
    data: Data,
    until: Time,
}

/// What a primary knows of its chunk.
#[derive(Debug)]
pub(super) struct Lead<T> {
    version: Version,
    others: Vec<SocketAddrV4>,
    /// How long the chunk can be.
    bytes: u64,
    /// Who has not yet got all that we had when we began to lead.
    establishing: BTreeSet<SocketAddrV4>,
    pending: BTreeMap<Serial, Pending<T>>,
    queue: VecDeque<Wanted<T>>,
    /// Who has failed us: nothing goes on. And the call that tells the master.
    silent: BTreeSet<SocketAddrV4>,
    refused: BTreeSet<SocketAddrV4>,
    telling: Option<CallId>,
}

impl<T> Lead<T> {
    pub(super) fn version(&self) -> Version {
        self.version
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn has_failed(&self) -> bool {
        !self.silent.is_empty() || !self.refused.is_empty()
    }

    fn all_waiting(&mut self) -> Vec<T> {
        let pending = std::mem::take(&mut self.pending).into_values().flat_map(|it| it.to);
        let queued = std::mem::take(&mut self.queue).into_iter().map(|it| it.to);
        pending.chain(queued).collect()
    }
}

impl<T> ChunkServer<T> {
    /// The master makes us primary.
    #[expect(clippy::too_many_arguments, reason = "a request, taken apart")]
    pub(super) fn lead(
        &mut self,
        now: Time,
        to: T,
        chunk: ChunkId,
        version: Version,
        others: Vec<SocketAddrV4>,
        bytes: u64,
        effects: &mut Vec<Effect<T>>,
    ) {
        let began_at = match self.served(chunk) {
            Ok(copy) if copy.version == version => copy.serial,
            Ok(copy) => {
                let refusal = format!("the copy of {chunk} here is {}", copy.version);
                return refuse(to, Refusal::unavailable(refusal), effects);
            }
            Err(refusal) => return refuse(to, refusal, effects),
        };
        effects.push(Effect::Reply { to, reply: ChunkReply::Done(Status::Ok) });
        if self.leads.get(&chunk).is_some_and(|before| before.version.next() < version) {
            // Nobody led in between: what waits may be meant for a file whose chunk this was.
            self.drop_lead(chunk, "the lease was taken away", effects);
        }
        let before = self.leads.remove(&chunk);
        let (mut pending, queue) = before.map(|it| (it.pending, it.queue)).unwrap_or_default();
        // Whoever is a member now gets them by catching up, or has them.
        pending.values_mut().for_each(|it| it.left.clear());
        let lead = Lead {
            version,
            establishing: others.iter().copied().collect(),
            others: others.clone(),
            bytes: bytes.min(*CHUNK_BYTES.end()),
            pending,
            queue,
            silent: BTreeSet::new(),
            refused: BTreeSet::new(),
            telling: None,
        };
        self.leads.insert(chunk, lead);
        for member in others {
            let from = self.settings.address;
            let request = ChunkRequest::Establish { chunk, version, serial: began_at, from };
            let about = Call::Establish(chunk, version, member);
            self.call(member, about, Packet::bare(request), effects);
        }
        self.go_on(now, chunk, effects);
    }

    pub(super) fn established(
        &mut self,
        now: Time,
        chunk: ChunkId,
        version: Version,
        member: SocketAddrV4,
        answer: Option<Result<Packet<ChunkReply>, Refusal>>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let lead = self.leads.get_mut(&chunk).filter(|lead| lead.version == version);
        let Some(lead) = lead else { return };
        match answer {
            Some(Ok(_)) => {
                lead.establishing.remove(&member);
                self.go_on(now, chunk, effects);
            }
            answer => self.member_failed(chunk, member, answer.is_some(), effects),
        }
    }

    /// A client wants a mutation.
    #[expect(clippy::too_many_arguments, reason = "a request, taken apart")]
    pub(super) fn mutate(
        &mut self,
        now: Time,
        to: T,
        chunk: ChunkId,
        version: Version,
        kind: Kind,
        pushed: Option<DataId>,
        data: Data,
        effects: &mut Vec<Effect<T>>,
    ) {
        let held = self.copies.get(&chunk).map(|copy| copy.version);
        let lead = self.leads.get_mut(&chunk).filter(|it| it.version == version);
        let refusal = match lead {
            _ if now >= self.lease_until => "it has no lease",
            _ if self.room.2 => "its disk is full",
            Some(lead) if held == Some(version) || lead.has_failed() => {
                if lead.queue.len() < MAX_QUEUED {
                    let until = now + PATIENCE;
                    lead.queue.push_back(Wanted { to, kind, pushed, data, until });
                    return self.go_on(now, chunk, effects);
                }
                "too much waits already"
            }
            _ => "it is not the primary under this version",
        };
        let refusal =
            Refusal::unavailable(format!("this chunkserver can't change {chunk}: {refusal}"));
        refuse(to, refusal, effects);
    }

    /// Begins what waits, as far as it can begin.
    fn begin_queued(&mut self, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        loop {
            let held = self.copies.get(&chunk).map(|copy| copy.version);
            let Some(lead) = self.leads.get_mut(&chunk) else { return };
            let can_begin = lead.establishing.is_empty()
                && lead.pending.len() < WINDOW
                && !lead.has_failed()
                && held == Some(lead.version);
            if !can_begin {
                return;
            }
            let Some(wanted) = lead.queue.pop_front() else { return };
            self.begin(chunk, wanted, effects);
        }
    }

    fn begin(&mut self, chunk: ChunkId, wanted: Wanted<T>, effects: &mut Vec<Effect<T>>) {
        let Wanted { to, kind, pushed, data, until } = wanted;
        let data = match self.data_of(pushed, data) {
            Ok(data) => data,
            Err(refusal) => return refuse(to, refusal, effects),
        };
        let (Some(lead), Some(copy)) = (self.leads.get_mut(&chunk), self.copies.get_mut(&chunk))
        else {
            return;
        };
        let bytes = data.len() as u64;
        if data.is_empty() || data.len() > MAX_PIECE_BYTES {
            let refusal = format!("a mutation has from 1 to {MAX_PIECE_BYTES} bytes");
            return refuse(to, Refusal::invalid(refusal), effects);
        }
        let written = |offset| ChunkReply::Written { offset };
        let (offset, data, mark, reply) = match kind {
            Kind::Write { offset } => {
                if offset.checked_add(bytes).is_none_or(|end| end > lead.bytes) {
                    let refusal = format!("{chunk} has at most {} bytes", lead.bytes);
                    return refuse(to, Refusal::invalid(refusal), effects);
                }
                (offset, data, None, written(offset))
            }
            Kind::Append { mark } => {
                let last = mark.and_then(|mark| Some((mark, *copy.marks.get(&mark.client)?)));
                match last {
                    Some((mark, Last { number, offset, serial })) if number == mark.number => {
                        // It was made before: under way still, or acknowledged.
                        let reply = written(offset);
                        return match lead.pending.get_mut(&serial) {
                            Some(pending) => pending.to.push(to),
                            None => effects.push(Effect::Reply { to, reply }),
                        };
                    }
                    Some((mark, last)) if last.number > mark.number => {
                        let refusal = format!(
                            "append {} of this client comes after its append {}",
                            mark.number, last.number
                        );
                        return refuse(to, Refusal::invalid(refusal), effects);
                    }
                    _ => {}
                }
                let is_new = mark.is_some() && last.is_none();
                let is_crowded = is_new && copy.marks.len() >= super::MAX_CLIENTS;
                if bytes > lead.bytes {
                    let refusal = format!("a record has at most {} bytes here", lead.bytes);
                    return refuse(to, Refusal::invalid(refusal), effects);
                }
                if copy.length + bytes <= lead.bytes && !is_crowded {
                    (copy.length, data, mark, written(copy.length))
                } else if copy.length >= lead.bytes {
                    let reply = ChunkReply::Closed { closed: true };
                    return effects.push(Effect::Reply { to, reply });
                } else {
                    (lead.bytes, Data::from([]), None, ChunkReply::Closed { closed: true })
                }
            }
        };
        let serial = copy.serial.next();
        let pushed = pushed.filter(|_| !data.is_empty());
        let (version, others) = (lead.version, lead.others.clone());
        let apply = Apply { chunk, version, serial, offset, pushed, mark };
        let pending = Pending {
            to: vec![to],
            reply,
            left: others.iter().copied().collect(),
            mine: false,
            apply: apply.clone(),
            data: Data::clone(&data),
            until,
        };
        lead.pending.insert(serial, pending);
        for member in others {
            let with = if pushed.is_some() { Data::from([]) } else { Data::clone(&data) };
            let message = ChunkRequest::Apply(apply.clone());
            let about = Call::Apply(chunk, version, serial, member);
            self.call(member, about, Packet { message, data: with }, effects);
        }
        self.change(chunk, offset, data, mark, None, effects);
    }

    /// A member has answered to a mutation, or has not.
    #[expect(clippy::too_many_arguments, reason = "a call and its answer")]
    pub(super) fn applied(
        &mut self,
        now: Time,
        chunk: ChunkId,
        version: Version,
        serial: Serial,
        member: SocketAddrV4,
        answer: Option<Result<Packet<ChunkReply>, Refusal>>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let lead = self.leads.get_mut(&chunk).filter(|lead| lead.version == version);
        let Some(lead) = lead else { return };
        let Some(pending) = lead.pending.get_mut(&serial) else { return };
        match answer {
            Some(Ok(_)) => {
                pending.left.remove(&member);
                self.go_on(now, chunk, effects);
            }
            // What was pushed is not there: it gets it from us, once.
            Some(Err(refusal))
                if pending.apply.pushed.is_some()
                    && refusal.reason == crate::wire::Reason::NotFound =>
            {
                let apply = Apply { pushed: None, ..pending.apply.clone() };
                let message = ChunkRequest::Apply(apply);
                let data = Data::clone(&pending.data);
                let about = Call::Apply(chunk, version, serial, member);
                self.call(member, about, Packet { message, data }, effects);
            }
            answer => self.member_failed(chunk, member, answer.is_some(), effects),
        }
    }

    /// Goes on with all chunks: the lease is live again.
    pub(super) fn go_on_leading(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let chunks: Vec<ChunkId> = self.leads.keys().copied().collect();
        for chunk in chunks {
            self.go_on(now, chunk, effects);
        }
    }

    /// Answers what every member has, and begins what can begin; under a live
    /// lease only.
    pub(super) fn go_on(&mut self, now: Time, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        if self.is_leased(now) {
            self.acknowledge(chunk, effects);
            self.begin_queued(chunk, effects);
        }
    }

    /// Answers, in their order, those whose mutations every member has.
    fn acknowledge(&mut self, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        let Some(copy) = self.copies.get(&chunk) else { return };
        let (durable, held) = (copy.durable, copy.version);
        let Some(lead) = self.leads.get_mut(&chunk) else { return };
        // A promise of ours to refuse this version stops us, too.
        if !lead.establishing.is_empty() || held != lead.version || lead.has_failed() {
            return;
        }
        while let Some(mut first) = lead.pending.first_entry() {
            let serial = *first.key();
            let pending = first.get_mut();
            pending.mine = durable >= serial;
            if !pending.mine || !pending.left.is_empty() {
                return;
            }
            let pending = first.remove();
            for to in pending.to {
                effects.push(Effect::Reply { to, reply: pending.reply.clone() });
            }
        }
    }

    // ---- when it fails ----

    fn member_failed(
        &mut self,
        chunk: ChunkId,
        member: SocketAddrV4,
        has_answered: bool,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some(lead) = self.leads.get_mut(&chunk) else { return };
        let is_new =
            if has_answered { lead.refused.insert(member) } else { lead.silent.insert(member) };
        if is_new {
            let how = if has_answered { "refuses" } else { "does not answer" };
            effects.push(Effect::Note(format!("{member} {how} about {chunk}")));
            self.complain(chunk, effects);
        }
    }

    fn complain(&mut self, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        let call = self.next_id();
        let Some(lead) = self.leads.get_mut(&chunk) else { return };
        lead.telling = Some(call);
        let request = MasterRequest::Failed {
            chunk,
            version: lead.version,
            silent: lead.silent.iter().copied().collect(),
            refused: lead.refused.iter().copied().collect(),
        };
        effects.push(Effect::Tell { call, request });
    }

    /// The master did not hear of it.
    pub(super) fn complaint_lost(&mut self, call: CallId, _effects: &mut Vec<Effect<T>>) {
        for lead in self.leads.values_mut().filter(|lead| lead.telling == Some(call)) {
            lead.telling = None;
        }
    }

    pub(super) fn complain_again(&mut self, effects: &mut Vec<Effect<T>>) {
        let unheard = self.leads.iter().filter(|(_, it)| it.has_failed() && it.telling.is_none());
        let unheard: Vec<ChunkId> = unheard.map(|(chunk, _)| *chunk).collect();
        for chunk in unheard {
            self.complain(chunk, effects);
        }
    }

    /// Nobody waits for longer than a client does.
    pub(super) fn give_up_late(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        for (chunk, lead) in &mut self.leads {
            for pending in lead.pending.values_mut().filter(|it| it.until <= now) {
                for to in pending.to.drain(..) {
                    let refusal = format!("not every member of {chunk} has it yet");
                    refuse(to, Refusal::unknown_outcome(refusal), effects);
                }
            }
            let mut queue = VecDeque::new();
            for wanted in lead.queue.drain(..) {
                if wanted.until <= now {
                    let refusal = format!("{chunk} can't be changed now: try again");
                    refuse(wanted.to, Refusal::unavailable(refusal), effects);
                } else {
                    queue.push_back(wanted);
                }
            }
            lead.queue = queue;
        }
    }

    pub(super) fn drop_lead(&mut self, chunk: ChunkId, why: &str, effects: &mut Vec<Effect<T>>) {
        let Some(mut lead) = self.leads.remove(&chunk) else { return };
        for to in lead.all_waiting() {
            let refusal = format!("{chunk} may or may not have been changed: {why}");
            refuse(to, Refusal::unknown_outcome(refusal), effects);
        }
    }

    pub(super) fn lead_nothing(&mut self, why: &str, effects: &mut Vec<Effect<T>>) {
        let chunks: Vec<ChunkId> = self.leads.keys().copied().collect();
        for chunk in chunks {
            self.drop_lead(chunk, why, effects);
        }
    }
}
