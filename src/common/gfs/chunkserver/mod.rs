//! A chunkserver as a machine: copies of chunks, and its part in each of them.
//!
//! What it must not forget (a copy's version, its serial, its length, its marks,
//! its data) goes to the disk by [`Effect::Disk`], in order for each chunk, and
//! counts when the shell says that it is durable. What it knows of the world
//! (its lease, what it may not serve, which chunks it leads) it forgets with the
//! process.
//!
//! * `copies.rs`: what a copy is, what it applies, promises and serves;
//! * `primary.rs`: leading a chunk;
//! * `catching_up.rs`: fetching what a copy has missed, or all of it.

mod catching_up;
mod copies;
mod primary;

use super::messages::{
    Beat, BeatReply, ChunkReply, ChunkRequest, Data, DataId, Heartbeat, MasterRequest, Packet,
    Status,
};
use super::{ChunkId, LEASE, Serial, Version};
use crate::machine::{Machine, Time};
use crate::wire::Refusal;
use catching_up::CatchUp;
use copies::Copy;
pub use copies::{Found, MAX_CLIENTS, MAX_KEPT_REGIONS};
use primary::Lead;
pub use primary::WINDOW;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddrV4;
use std::time::Duration;

/// How often the master hears of it: four times in a lease.
const BEAT_EVERY: Duration = Duration::from_millis(LEASE.as_millis() as u64 / 4);

/// How much pushed data is kept until it is used; beyond it the oldest goes.
pub const MAX_PUSHED_BYTES: usize = 256 * 1024 * 1024;

/// How many pieces of pushed data are kept.
pub const MAX_PUSHED: usize = 64 * 1024;

/// How many chunkservers data is passed on to at most.
pub const MAX_CHAIN: usize = 16;

/// How long another chunkserver may take to answer.
pub const PEER_PATIENCE: Duration = Duration::from_secs(5);

/// How long the master may take to answer a heartbeat.
pub const MASTER_PATIENCE: Duration = Duration::from_secs(2);

/// Names a call to the master or to another chunkserver.
pub type CallId = u64;

/// Names something that the disk does.
pub type JobId = u64;

/// What the disk is to do about one chunk.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Make a copy: empty, or with all that another chunk here has.
    Make {
        /// Which.
        chunk: ChunkId,
        /// Its version.
        version: Version,
        /// Its serial: that of the copy whose content it gets.
        serial: Serial,
        /// Whose content it gets.
        copy_of: Option<ChunkId>,
        /// Whose marks it gets: client, number, offset.
        marks: Vec<(u64, u64, u64)>,
        /// Whether it is still to be filled, and worthless until then.
        joining: bool,
    },
    /// From now on it has this version.
    Promise {
        /// Which.
        chunk: ChunkId,
        /// The version.
        version: Version,
    },
    /// Change it. Without data it becomes `offset` long, filled with zeros.
    Mutate {
        /// Which.
        chunk: ChunkId,
        /// The how-manieth change it is.
        serial: Serial,
        /// Where.
        offset: u64,
        /// What goes there.
        data: Data,
        /// Whose append it is: client, number.
        mark: Option<(u64, u64)>,
    },
    /// Put something there that it has missed; its serial stays.
    Patch {
        /// Which.
        chunk: ChunkId,
        /// Where.
        offset: u64,
        /// What.
        data: Data,
    },
    /// It has caught up: this is its serial and its length, and these are its
    /// marks: client, number, offset.
    Adopt {
        /// Which.
        chunk: ChunkId,
        /// Its version.
        version: Version,
        /// Its serial.
        serial: Serial,
        /// Its length.
        length: u64,
        /// Its marks.
        marks: Vec<(u64, u64, u64)>,
    },
    /// Delete it.
    Delete {
        /// Which.
        chunk: ChunkId,
    },
}

/// Why the disk did not do what it should: from then on it does nothing more for that
/// copy but delete it. A disk that fails altogether ends the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// There is no room.
    Full,
    /// The copy is damaged where it was to be changed.
    Damaged,
}

/// What can happen to a chunkserver. `T` names a request to its shell.
#[derive(Debug)]
pub enum Input<T> {
    /// A request has come.
    Request {
        /// To be given back with the reply.
        from: T,
        /// What is asked, with its data.
        request: Packet<ChunkRequest>,
    },
    /// Another chunkserver has answered a call, or has not.
    Answer {
        /// Which call.
        call: CallId,
        /// The answer.
        answer: Option<Result<Packet<ChunkReply>, Refusal>>,
    },
    /// The master has answered a heartbeat.
    Beaten {
        /// Which call.
        call: CallId,
        /// The answer, if there was one.
        answer: Option<Result<BeatReply, Refusal>>,
    },
    /// The master has answered anything else, or has not.
    Told {
        /// Which call.
        call: CallId,
        /// Whether it has.
        heard: bool,
    },
    /// The disk has done a job.
    Stored {
        /// Which.
        job: JobId,
        /// Why not.
        trouble: Option<Trouble>,
    },
    /// A copy was found to be damaged, by a read or by the scrub.
    Damaged(ChunkId),
    /// How much of the disk is in use and free, in bytes, and whether that is
    /// enough to go on.
    Room {
        /// In use.
        used: u64,
        /// Free.
        free: u64,
        /// Whether nothing more can be taken.
        full: bool,
    },
    /// Time has passed.
    Tick,
}

/// What a chunkserver asks for.
#[derive(Debug)]
pub enum Effect<T> {
    /// Answer the request `to`.
    Reply {
        /// Which request.
        to: T,
        /// The answer.
        reply: ChunkReply,
    },
    /// Read a part of a copy, check it, and answer the request with it; or refuse
    /// and say [`Input::Damaged`].
    Read {
        /// Which request.
        to: T,
        /// Which chunk.
        chunk: ChunkId,
        /// From where.
        offset: u64,
        /// How much: it is there.
        length: usize,
        /// How long the chunk is: part of the answer.
        whole: u64,
    },
    /// Do this, after what was asked for the same chunk before, and say
    /// [`Input::Stored`] when it is durable.
    Disk {
        /// To be given back.
        job: JobId,
        /// What.
        op: Op,
    },
    /// Call another chunkserver, and say [`Input::Answer`], once.
    Call {
        /// Where it is.
        to: SocketAddrV4,
        /// The name of the call.
        call: CallId,
        /// What is asked.
        request: Packet<ChunkRequest>,
        /// How long the answer may take.
        patience: Duration,
    },
    /// Send the master a heartbeat, and say [`Input::Beaten`], once.
    Beat {
        /// The name of the call.
        call: CallId,
        /// The heartbeat.
        beat: Heartbeat,
    },
    /// Tell the master something, and say [`Input::Told`], once.
    Tell {
        /// The name of the call.
        call: CallId,
        /// What.
        request: MasterRequest,
    },
    /// Something worth a line in the log.
    Note(String),
}

/// Who a chunkserver is.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What it calls itself, for as long as its disk lasts.
    pub name: Box<str>,
    /// Drawn at this start of the process.
    pub start: u64,
    /// Where it is reached.
    pub address: SocketAddrV4,
    /// Where it stands.
    pub rack: Box<str>,
    /// How many bytes a second it fetches at most for copies of whole chunks.
    pub copy_rate: u64,
}

/// What an original client, which names the chunk only, has pushed for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Waiting {
    /// The version under which the chunk is led here.
    pub version: Version,
    /// How many more bytes fit in the chunk.
    pub room: u64,
    /// The pieces.
    pub pieces: Vec<(DataId, Data)>,
}

/// Names a turn of catching up: what comes late of one before it is not taken for it.
type TurnId = u64;

/// What a call to another chunkserver is about.
#[derive(Debug)]
enum Call<T> {
    /// To pass pushed data on, for whoever pushed it.
    Push(T, SocketAddrV4),
    /// To apply this mutation.
    Apply(ChunkId, Version, Serial, SocketAddrV4),
    /// To have all that the primary has.
    Establish(ChunkId, Version, SocketAddrV4),
    /// What a copy here has missed.
    Missed(ChunkId, TurnId),
    /// A part that it has missed: from there.
    Fetch(ChunkId, TurnId, u64, usize),
}

/// What a job of the disk is about.
#[derive(Debug)]
enum Job<T> {
    /// A copy is made: the master waits for it.
    Made(ChunkId, T),
    /// A version is durable: the master waits.
    Promised(ChunkId, T),
    /// A mutation is durable: the primary waits, if it isn't us.
    Mutated(ChunkId, Serial, Option<T>),
    /// A part that was missed is durable.
    Patched(ChunkId, TurnId),
    /// A copy has caught up.
    Adopted(ChunkId, TurnId),
    Nothing,
}

/// A chunkserver.
#[derive(Debug)]
pub struct ChunkServer<T> {
    settings: Settings,
    copies: BTreeMap<ChunkId, Copy<T>>,
    leads: BTreeMap<ChunkId, Lead<T>>,
    catching_up: BTreeMap<ChunkId, CatchUp<T>>,
    /// Until when it may serve.
    lease_until: Time,
    /// What it may not serve below these versions, as the master said last.
    fences: BTreeMap<ChunkId, Version>,
    /// Those that have come since the last heartbeat was sent: its answer may not know them.
    new_fences: BTreeMap<ChunkId, Version>,
    pushed: BTreeMap<DataId, Data>,
    /// Their order, the oldest first.
    pushed_order: VecDeque<DataId>,
    pushed_bytes: usize,
    /// What was pushed for a chunk, and no client has named yet; some of it may have
    /// been used by now.
    pushed_for: BTreeMap<ChunkId, Vec<DataId>>,
    calls: BTreeMap<CallId, Call<T>>,
    jobs: BTreeMap<JobId, Job<T>>,
    last_id: u64,
    /// The heartbeat that is under way, and when it was sent.
    beating: Option<(CallId, Time)>,
    beat_due: Time,
    /// The next heartbeat says what it holds.
    says_all: bool,
    /// What was deleted as the master said, until it has heard of it.
    gone: BTreeSet<ChunkId>,
    /// Damage that the master has not heard of, and the call that tells it.
    damage: BTreeMap<ChunkId, Option<CallId>>,
    room: (u64, u64, bool),
    /// Copies of whole chunks fetch nothing more before then.
    fetch_from: Time,
}

impl<T> Machine for ChunkServer<T> {
    type Input = Input<T>;
    type Effect = Effect<T>;

    fn step(&mut self, now: Time, input: Input<T>, effects: &mut Vec<Effect<T>>) {
        match input {
            Input::Request { from, request } => self.request(now, from, request, effects),
            Input::Answer { call, answer } => self.answered(now, call, answer, effects),
            Input::Beaten { call, answer } => self.beaten(now, call, answer, effects),
            Input::Told { call, heard } => self.told(call, heard, effects),
            Input::Stored { job, trouble } => self.stored(now, job, trouble, effects),
            Input::Damaged(chunk) => self.damaged(chunk, effects),
            Input::Room { used, free, full } => self.room = (used, free, full),
            Input::Tick => self.tick(now, effects),
        }
    }
}

impl<T> ChunkServer<T> {
    /// A chunkserver over a disk that holds what was `found`. Copies that were
    /// still being filled are worth nothing, and go.
    pub fn new(
        now: Time,
        settings: Settings,
        found: Vec<Found>,
        effects: &mut Vec<Effect<T>>,
    ) -> Self {
        let mut server = Self {
            settings,
            copies: BTreeMap::new(),
            leads: BTreeMap::new(),
            catching_up: BTreeMap::new(),
            lease_until: Time::default(),
            fences: BTreeMap::new(),
            new_fences: BTreeMap::new(),
            pushed: BTreeMap::new(),
            pushed_order: VecDeque::new(),
            pushed_bytes: 0,
            pushed_for: BTreeMap::new(),
            calls: BTreeMap::new(),
            jobs: BTreeMap::new(),
            last_id: 0,
            beating: None,
            beat_due: now,
            says_all: true,
            gone: BTreeSet::new(),
            damage: BTreeMap::new(),
            room: (0, 0, false),
            fetch_from: now,
        };
        for copy in found {
            if copy.joining {
                server.disk(Op::Delete { chunk: copy.chunk }, Job::Nothing, effects);
            } else {
                let (chunk, damaged) = (copy.chunk, copy.damaged);
                server.copies.insert(chunk, Copy::found(copy));
                if damaged {
                    server.damaged(chunk, effects);
                }
            }
        }
        server
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn disk(&mut self, op: Op, job: Job<T>, effects: &mut Vec<Effect<T>>) {
        let id = self.next_id();
        self.jobs.insert(id, job);
        effects.push(Effect::Disk { job: id, op });
    }

    fn call(
        &mut self,
        to: SocketAddrV4,
        about: Call<T>,
        request: Packet<ChunkRequest>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let call = self.next_id();
        self.calls.insert(call, about);
        effects.push(Effect::Call { to, call, request, patience: PEER_PATIENCE });
    }

    /// Whether it may serve at all.
    fn is_leased(&self, now: Time) -> bool {
        now < self.lease_until
    }

    fn request(
        &mut self,
        now: Time,
        to: T,
        request: Packet<ChunkRequest>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Packet { message, data } = request;
        match message {
            ChunkRequest::Read { chunk, version, offset, length } => {
                self.read(now, to, chunk, version, Some((offset, length)), effects);
            }
            ChunkRequest::Length { chunk, version } => {
                self.read(now, to, chunk, version, None, effects);
            }
            ChunkRequest::Push { id, chain, chunk } => {
                self.push(to, id, chain, chunk, data, effects);
            }
            ChunkRequest::Write { chunk, version, offset, pushed } => {
                let what = primary::Kind::Write { offset };
                self.mutate(now, to, chunk, version, what, pushed, data, effects);
            }
            ChunkRequest::Append { chunk, version, pushed, mark } => {
                let what = primary::Kind::Append { mark };
                self.mutate(now, to, chunk, version, what, pushed, data, effects);
            }
            ChunkRequest::Apply(apply) => {
                self.is_member(apply.chunk, apply.version);
                self.apply(to, apply, data, effects);
            }
            ChunkRequest::Establish { chunk, version, serial, from } => {
                self.establish(now, to, chunk, version, serial, from, effects);
            }
            ChunkRequest::Missed { chunk, after } => self.missed(to, chunk, after, effects),
            ChunkRequest::Fetch { chunk, offset, length } => {
                self.fetch(to, chunk, offset, length, effects);
            }
            ChunkRequest::Make { chunk, version, copy_of } => {
                self.make(to, chunk, version, copy_of, effects);
            }
            ChunkRequest::Promise { chunk, version } => self.promise(to, chunk, version, effects),
            ChunkRequest::Fence { chunk, below } => {
                for fences in [&mut self.fences, &mut self.new_fences] {
                    let fence = fences.entry(chunk).or_default();
                    *fence = below.max(*fence);
                }
                effects.push(Effect::Reply { to, reply: ChunkReply::Done(Status::Ok) });
            }
            ChunkRequest::Lead { chunk, version, others, bytes } => {
                self.is_member(chunk, version);
                self.lead(now, to, chunk, version, others, bytes, effects);
            }
            ChunkRequest::Replicate { chunk, version, from } => {
                self.replicate(now, to, chunk, version, from, effects);
            }
            ChunkRequest::Resign {} => {
                self.lead_nothing("it was asked to lead nothing", effects);
                effects.push(Effect::Reply { to, reply: ChunkReply::Done(Status::Ok) });
            }
        }
    }

    /// Who says this knows that the copy here is a member's under `version`, by the master's
    /// log: so the fence of the round that made it one is over, and reads need not wait for the
    /// next heartbeat. Only that fence: a later round's is a higher one.
    fn is_member(&mut self, chunk: ChunkId, version: Version) {
        let holds = self.copies.get(&chunk).is_some_and(|copy| copy.version == version);
        if holds && self.fences.get(&chunk) == Some(&version.next()) {
            self.fences.remove(&chunk);
        }
    }

    // ---- what is here ----

    /// The copies that are whole, and their versions.
    pub fn chunks(&self) -> Vec<(ChunkId, Version)> {
        let whole = self.copies.iter().filter(|(_, copy)| copy.is_served());
        whole.map(|(chunk, copy)| (*chunk, copy.version)).collect()
    }

    /// Whether a copy is here that was found to be damaged.
    pub fn is_damaged(&self, chunk: ChunkId) -> bool {
        self.copies.get(&chunk).is_some_and(Copy::is_damaged)
    }

    /// What was pushed for `chunk` and not used, the first piece first; nothing unless
    /// this chunkserver leads the chunk now.
    pub fn waiting_for(&self, now: Time, chunk: ChunkId) -> Option<Waiting> {
        let lead = self.leads.get(&chunk).filter(|_| self.is_leased(now))?;
        let length = self.copies.get(&chunk)?.length;
        let ids = self.pushed_for.get(&chunk).into_iter().flatten();
        let pieces = ids.filter_map(|id| Some((*id, Data::clone(self.pushed.get(id)?))));
        Some(Waiting {
            version: lead.version(),
            room: lead.bytes().saturating_sub(length),
            pieces: pieces.collect(),
        })
    }

    /// Keeps data for later and passes it on.
    fn push(
        &mut self,
        to: T,
        id: DataId,
        mut chain: Vec<SocketAddrV4>,
        chunk: Option<ChunkId>,
        data: Data,
        effects: &mut Vec<Effect<T>>,
    ) {
        if chain.len() > MAX_CHAIN {
            let refusal = Refusal::invalid(format!("a chain has at most {MAX_CHAIN} chunkservers"));
            return refuse(to, refusal, effects);
        }
        self.pushed_bytes += data.len();
        if let Some(before) = self.pushed.insert(id, Data::clone(&data)) {
            self.pushed_bytes -= before.len();
        } else {
            self.pushed_order.push_back(id);
            chunk.into_iter().for_each(|chunk| self.pushed_for.entry(chunk).or_default().push(id));
        }
        while (self.pushed_bytes > MAX_PUSHED_BYTES || self.pushed.len() > MAX_PUSHED)
            && let Some(oldest) = self.pushed_order.pop_front()
        {
            self.take_pushed(oldest);
        }
        if chain.is_empty() {
            return effects.push(Effect::Reply { to, reply: ChunkReply::Done(Status::Ok) });
        }
        let next = chain.remove(0);
        let request = Packet { message: ChunkRequest::Push { id, chain, chunk }, data };
        self.call(next, Call::Push(to, next), request, effects);
    }

    fn take_pushed(&mut self, id: DataId) -> Option<Data> {
        let data = self.pushed.remove(&id)?;
        self.pushed_bytes -= data.len();
        if self.pushed_order.len() > 2 * self.pushed.len() + 16 {
            self.pushed_order.retain(|id| self.pushed.contains_key(id));
            self.pushed_for.retain(|_, ids| {
                ids.retain(|id| self.pushed.contains_key(id));
                !ids.is_empty()
            });
        }
        Some(data)
    }

    /// The data of a request: what came with it, or what was pushed.
    fn data_of(&mut self, pushed: Option<DataId>, data: Data) -> Result<Data, Refusal> {
        match pushed {
            None => Ok(data),
            Some(id) => self.take_pushed(id).ok_or_else(|| {
                Refusal::not_found("the pushed data is not here, or no longer: push it again")
            }),
        }
    }

    fn answered(
        &mut self,
        now: Time,
        call: CallId,
        answer: Option<Result<Packet<ChunkReply>, Refusal>>,
        effects: &mut Vec<Effect<T>>,
    ) {
        match self.calls.remove(&call) {
            None => {}
            Some(Call::Push(to, next)) => match answer {
                Some(Ok(packet)) => effects.push(Effect::Reply { to, reply: packet.message }),
                Some(Err(refusal)) => refuse(to, refusal, effects),
                None => {
                    let reply = ChunkReply::Unreached { unreached: next };
                    effects.push(Effect::Reply { to, reply });
                }
            },
            Some(Call::Apply(chunk, version, serial, member)) => {
                self.applied(now, chunk, version, serial, member, answer, effects);
            }
            Some(Call::Establish(chunk, version, member)) => {
                self.established(now, chunk, version, member, answer, effects);
            }
            Some(Call::Missed(chunk, turn)) => {
                self.missed_answered(now, chunk, turn, answer, effects);
            }
            Some(Call::Fetch(chunk, turn, offset, length)) => {
                self.fetched(chunk, turn, offset, length, answer, effects);
            }
        }
    }

    fn stored(
        &mut self,
        now: Time,
        job: JobId,
        trouble: Option<Trouble>,
        effects: &mut Vec<Effect<T>>,
    ) {
        match self.jobs.remove(&job) {
            None | Some(Job::Nothing) => {}
            Some(Job::Made(chunk, to)) => self.made(to, chunk, trouble, effects),
            Some(Job::Promised(chunk, to)) => self.promised(to, chunk, trouble, effects),
            Some(Job::Mutated(chunk, serial, to)) => {
                self.mutated(now, chunk, serial, to, trouble, effects);
            }
            Some(Job::Patched(chunk, turn)) => self.patched(now, chunk, turn, trouble, effects),
            Some(Job::Adopted(chunk, turn)) => self.adopted(now, chunk, turn, trouble, effects),
        }
    }

    // ---- the master ----

    fn tick(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        if self.beating.is_none() && now >= self.beat_due {
            self.beat(now, effects);
        }
        self.complain_again(effects);
        self.give_up_late(now, effects);
        self.go_on_catching_up(now, effects);
        let unheard: Vec<ChunkId> =
            self.damage.iter().filter(|(_, call)| call.is_none()).map(|(it, _)| *it).collect();
        for chunk in unheard {
            self.tell_damage(chunk, effects);
        }
    }

    fn beat(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let call = self.next_id();
        self.beating = Some((call, now));
        self.new_fences.clear();
        self.beat_due = now + BEAT_EVERY;
        let (used, free, full) = self.room;
        let served = self.copies.iter().filter(|(_, copy)| copy.is_served());
        let damaged = self.copies.iter().filter(|(_, copy)| self.says_all && copy.is_damaged());
        let beat = Heartbeat {
            server: self.settings.name.clone(),
            start: self.settings.start,
            address: Some(self.settings.address),
            rack: self.settings.rack.clone(),
            used,
            free,
            full,
            holds: self.says_all.then(|| served.map(|(id, copy)| (*id, copy.version)).collect()),
            leads: self.says_all && !self.leads.is_empty(),
            damaged: damaged.map(|(id, _)| *id).collect(),
            gone: self.gone.iter().copied().collect(),
            original: false,
        };
        effects.push(Effect::Beat { call, beat });
    }

    fn beaten(
        &mut self,
        now: Time,
        call: CallId,
        answer: Option<Result<BeatReply, Refusal>>,
        effects: &mut Vec<Effect<T>>,
    ) {
        let Some((_, sent)) = self.beating.take_if(|(beating, _)| *beating == call) else { return };
        match answer {
            None => {}
            Some(Err(refusal)) => {
                effects.push(Effect::Note(format!("the master refuses: {refusal}")));
            }
            Some(Ok(reply)) if reply.status == Beat::Link => {
                // Whatever this master or one before it has made us lead is over.
                self.lead_nothing("the master has to hear first what is here", effects);
                self.says_all = true;
                self.beat(now, effects);
            }
            Some(Ok(reply)) => {
                if !self.is_leased(now) {
                    // The master may have given it up meanwhile, and made us nobody's primary.
                    self.lead_nothing("the lease was over for a while", effects);
                }
                self.says_all = reply.inventory;
                self.gone.clear();
                self.fences = reply.fences.into_iter().collect();
                for (chunk, below) in std::mem::take(&mut self.new_fences) {
                    let fence = self.fences.entry(chunk).or_default();
                    *fence = below.max(*fence);
                }
                for (chunk, version) in reply.delete {
                    self.delete(chunk, version, effects);
                }
                // Only now: what it must not serve is known.
                self.lease_until = sent + Duration::from_millis(reply.lease_ms);
                self.go_on_leading(now, effects);
            }
        }
    }

    fn told(&mut self, call: CallId, heard: bool, effects: &mut Vec<Effect<T>>) {
        let about = self.damage.iter().find(|(_, telling)| **telling == Some(call));
        if let Some((&chunk, _)) = about {
            if heard {
                self.damage.remove(&chunk);
            } else {
                self.damage.insert(chunk, None);
            }
        } else if !heard {
            self.complaint_lost(call, effects);
        }
    }

    fn tell_damage(&mut self, chunk: ChunkId, effects: &mut Vec<Effect<T>>) {
        let call = self.next_id();
        self.damage.insert(chunk, Some(call));
        let request = MasterRequest::Damaged { server: self.settings.name.clone(), chunk };
        effects.push(Effect::Tell { call, request });
    }
}

fn refuse<T>(to: T, refusal: Refusal, effects: &mut Vec<Effect<T>>) {
    effects.push(Effect::Reply { to, reply: ChunkReply::Refused(refusal) });
}

#[cfg(test)]
mod tests;
