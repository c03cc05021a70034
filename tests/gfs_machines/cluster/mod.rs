//! A whole file system in one thread: the master, chunkservers and clients, with
//! a virtual clock, network and disks. All chance comes from one seed.
//!
//! Clients append records that name themselves to one file, exactly once, overwrite each
//! its own region of another one, take snapshots of the first and append to these, too, and
//! read back at any chunkserver they have ever heard of what was acknowledged. They append to
//! a third file that is now and then called otherwise, and made anew. They keep leases.
//! Chunkservers and the master are killed, paused and cut off from each other, both ways or
//! one; disks are slow, or full for a while, and say so or do not; and bits flip. What was
//! not durable is lost with a kill. At the end everything is healed, and must come to rest.
//!
//! While a bit is flipped and not found, or a disk has refused something, nothing else
//! begins to go wrong: three troubles at once may lose what three copies hold.

mod clients;
mod faults;
mod rest;

use clients::{Client, LOG, Snapshot, TABLE, Target, Turned};

use crate::memory_disk::MemoryDisk;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ringleader::consensus::replica::Lead;
use ringleader::gfs::chunkserver::{self, ChunkServer};
use ringleader::gfs::master::{self, Settings};
use ringleader::gfs::messages::{
    ChunkReply, ChunkRequest, Data, MasterReply, MasterRequest, Packet,
};
use ringleader::gfs::{ChunkId, FileName};
use ringleader::machine::{Machine, Time};
use ringleader::sim::lone_log as log;
use ringleader::store::Store;
use ringleader::store::memory::MemoryStore;
use ringleader::wire::Refusal;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// Names a request to whoever asked.
type Id = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    Master,
    Server(usize),
    Client(usize),
}

/// What a call is answered with; nothing if nobody answers.
#[derive(Clone, Debug)]
enum Answer {
    Master(MasterReply),
    Chunk(Packet<ChunkReply>),
    Silence,
}

#[derive(Clone, Debug)]
enum Ask {
    Master(MasterRequest),
    Chunk(Packet<ChunkRequest>),
}

enum Event {
    /// A request arrives, for this life of its addressee.
    Request {
        to: Who,
        id: Id,
        ask: Ask,
    },
    /// An answer arrives.
    Answer {
        id: Id,
        answer: Answer,
    },
    Tick(Who),
    /// The disk of a chunkserver has done a job, in this life.
    Stored {
        server: usize,
        life: u32,
        job: u64,
    },
    /// The master's log has a change.
    Logged {
        life: u32,
        index: u64,
    },
    Fault,
    Restart(Who),
    /// The disk of a chunkserver has room again.
    Room(usize),
    /// A chunkserver's scrub comes to a copy.
    Scrub(usize, ChunkId),
    Think(usize),
}

/// Who asked, in which life, and what it calls the call itself.
struct Asked {
    by: Who,
    life: u32,
    call: u64,
    to: Who,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Peer,
    Beat,
    Tell,
    Client,
    MasterCall,
}

struct Node {
    life: u32,
    is_up: bool,
    paused_until: Time,
    /// How fast its clock goes, in millionths.
    rate: u64,
}

struct ServerNode {
    machine: Option<ChunkServer<Id>>,
    disk: MemoryDisk,
    /// What its disk is to do until then may take long.
    slow_until: Time,
}

/// What came of a run.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Tally {
    pub(crate) appended: usize,
    pub(crate) read: usize,
    pub(crate) faults: usize,
    pub(crate) repeated: usize,
    pub(crate) overwritten: usize,
    pub(crate) snapshots: usize,
    pub(crate) damaged: usize,
    pub(crate) refused: usize,
    pub(crate) turns: usize,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.appended += other.appended;
        self.read += other.read;
        self.faults += other.faults;
        self.repeated += other.repeated;
        self.overwritten += other.overwritten;
        self.snapshots += other.snapshots;
        self.damaged += other.damaged;
        self.refused += other.refused;
        self.turns += other.turns;
    }
}

pub(crate) struct Cluster {
    now: Time,
    rng: StdRng,
    events: BTreeMap<(Time, u64), Event>,
    sequence: u64,
    nodes: BTreeMap<Who, Node>,
    master: Option<master::Leader<Id>>,
    log: MemoryStore,
    log_queue: Vec<(u64, Vec<ringleader::store::Change>)>,
    servers: Vec<ServerNode>,
    clients: Vec<Client>,
    asked: BTreeMap<Id, Asked>,
    cuts: BTreeSet<(Who, Who)>,
    /// Whether only what the first of them sends is lost.
    is_one_way: bool,
    cut_until: Time,
    /// Acknowledged records: place and content.
    acknowledged: Vec<(usize, u64, Vec<u8>)>,
    snapshots: Vec<Snapshot>,
    /// What each record was for: client, number.
    targets: BTreeMap<(u64, u64), Target>,
    turned: Vec<Turned>,
    /// How often the third file was called otherwise.
    turns: usize,
    /// Whether that has begun once more; and whether it is only to be made anew.
    turning: Option<bool>,
    healing: bool,
    verbose: bool,
    tally: Tally,
    failure: Option<String>,
}

const SERVERS: usize = 5;
const CLIENTS: usize = 4;
const CHUNK_BYTES: u64 = 2048;

fn address(server: usize) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, server as u8 + 1), 9001)
}

fn server_at(address: SocketAddrV4) -> usize {
    usize::from(address.ip().octets()[3]) - 1
}

fn file(name: &str) -> FileName {
    FileName::new(name).unwrap()
}

fn settings(rng: &mut StdRng) -> Settings {
    let deleted_at_once = [1, 2, 1000][rng.random_range(0..3)];
    Settings { repair_after: Duration::from_secs(5), deleted_at_once, ..Settings::default() }
}

impl Cluster {
    pub(crate) fn run(seed: u64, verbose: bool) -> Result<Tally, String> {
        let mut cluster = Self::new(seed, verbose);
        let result = cluster.all().map_err(|what| format!("seed {seed}: {what}"));
        result.map(|()| cluster.tally)
    }

    fn new(seed: u64, verbose: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut nodes = BTreeMap::new();
        let whos = (0..SERVERS).map(Who::Server).chain((0..CLIENTS).map(Who::Client));
        for who in whos.chain([Who::Master]) {
            let rate = rng.random_range(992_000..1_008_000);
            nodes.insert(who, Node { life: 0, is_up: false, paused_until: Time::default(), rate });
        }
        let mut cluster = Self {
            now: Time::from_millis(1000),
            rng,
            events: BTreeMap::new(),
            sequence: 0,
            nodes,
            master: None,
            log: MemoryStore::default(),
            log_queue: Vec::new(),
            servers: (0..SERVERS)
                .map(|_| ServerNode {
                    machine: None,
                    disk: MemoryDisk::default(),
                    slow_until: Time::default(),
                })
                .collect(),
            clients: Vec::new(),
            asked: BTreeMap::new(),
            cuts: BTreeSet::new(),
            is_one_way: false,
            cut_until: Time::default(),
            acknowledged: Vec::new(),
            snapshots: Vec::new(),
            targets: BTreeMap::new(),
            turned: Vec::new(),
            turns: 0,
            turning: Some(true),
            healing: false,
            verbose,
            tally: Tally::default(),
            failure: None,
        };
        cluster.start(Who::Master);
        (0..SERVERS).for_each(|server| cluster.start(Who::Server(server)));
        for name in 0..CLIENTS {
            cluster.nodes.get_mut(&Who::Client(name)).unwrap().is_up = true;
            cluster.clients.push(Client::new(name as u64 + 1));
        }
        cluster
    }

    fn all(&mut self) -> Result<(), String> {
        for (client, name) in [LOG, TABLE].into_iter().enumerate() {
            let chunk_bytes = Some(CHUNK_BYTES);
            let create = MasterRequest::Create { name: file(name), chunk_bytes, copies: None };
            self.ask_as(client, Who::Master, Ask::Master(create));
        }
        self.advance(Duration::from_secs(2))?;
        for client in 0..CLIENTS {
            self.at(Duration::from_millis(client as u64), Event::Think(client));
        }
        self.at(Duration::from_secs(1), Event::Fault);
        self.advance(Duration::from_secs(60))?;
        self.heal();
        // Every chunkserver has said once more what it holds.
        self.advance(Duration::from_secs(100))?;
        self.make_equal();
        self.advance(Duration::from_secs(20))?;
        self.check_rest()
    }

    /// What was in flight when a master was killed is made equal by the next one who writes
    /// to that chunk: here it is as if somebody did.
    fn make_equal(&mut self) {
        let chunks = self.master.iter().flat_map(|it| it.state().chunks());
        let chunks: Vec<_> = chunks.map(|(chunk, known)| (chunk, known.version)).collect();
        for (chunk, version) in chunks {
            let (silent, refused) = (Vec::new(), Vec::new());
            let request = MasterRequest::Failed { chunk, version, silent, refused };
            self.ask(Who::Client(0), 0, Kind::Client, Who::Master, Ask::Master(request));
        }
    }

    fn advance(&mut self, span: Duration) -> Result<(), String> {
        let end = self.now + span;
        while let Some(entry) = self.events.first_entry() {
            if entry.key().0 > end {
                break;
            }
            let ((time, _), event) = entry.remove_entry();
            self.now = time;
            self.handle(event);
            if let Some(failure) = self.failure.take() {
                return Err(format!("at {}: {failure}", self.now));
            }
        }
        self.now = end;
        Ok(())
    }

    fn at(&mut self, span: Duration, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + span, self.sequence), event);
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.verbose {
            println!("{} {}", self.now, what());
        }
    }

    /// The time by the clock of `who`.
    fn clock(&self, who: Who) -> Time {
        let micros = self.now.since(Time::default()).as_micros() as u64;
        Time::from_micros(micros / 1000 * self.nodes[&who].rate / 1000)
    }

    fn delay(&mut self) -> Duration {
        let slow = self.rng.random_range(0..50) == 0;
        Duration::from_micros(self.rng.random_range(100..if slow { 300_000 } else { 3000 }))
    }

    /// Whether what `from` sends to `to` is lost.
    fn is_cut(&self, from: Who, to: Who) -> bool {
        let back = self.cuts.contains(&(to, from)) && !self.is_one_way;
        self.now < self.cut_until && (self.cuts.contains(&(from, to)) || back)
    }

    fn ask(&mut self, by: Who, call: u64, kind: Kind, to: Who, ask: Ask) -> Id {
        self.sequence += 1;
        let id = self.sequence;
        let life = self.nodes[&by].life;
        self.asked.insert(id, Asked { by, life, call, to, kind });
        let (delay, back) = (self.delay(), self.delay());
        if !self.nodes[&to].is_up {
            self.at(back, Event::Answer { id, answer: Answer::Silence });
        } else {
            if !self.is_cut(by, to) {
                self.at(delay, Event::Request { to, id, ask });
            }
            let patience = if kind == Kind::Peer { 5 } else { 2 };
            let patience = if kind == Kind::Client { 16 } else { patience };
            self.at(Duration::from_secs(patience), Event::Answer { id, answer: Answer::Silence });
        }
        id
    }

    fn reply(&mut self, by: Who, id: Id, answer: Answer) {
        let Some(asked) = self.asked.get(&id) else { return };
        if !self.is_cut(by, asked.by) {
            let delay = self.delay();
            self.at(delay, Event::Answer { id, answer });
        }
    }

    fn handle(&mut self, event: Event) {
        let who = match &event {
            Event::Request { to, .. } => Some(*to),
            Event::Answer { id, .. } => self.asked.get(id).map(|asked| asked.by),
            Event::Tick(who) => Some(*who),
            Event::Stored { server, .. } | Event::Scrub(server, _) => Some(Who::Server(*server)),
            Event::Logged { .. } => Some(Who::Master),
            _ => None,
        };
        // Who is paused does it later.
        if let Some(until) =
            who.map(|who| self.nodes[&who].paused_until).filter(|it| *it > self.now)
        {
            let rest = until.since(self.now);
            return self.at(rest, event);
        }
        match event {
            Event::Request { to: Who::Master, id, ask: Ask::Master(request) } => {
                if self.nodes[&Who::Master].is_up {
                    self.step_master(master::Input::Request { from: id, request });
                }
            }
            Event::Request { to: Who::Server(server), id, ask: Ask::Chunk(request) } => {
                self.step_server(server, chunkserver::Input::Request { from: id, request });
            }
            Event::Request { .. } => {}
            Event::Answer { id, answer } => self.answered(id, answer),
            Event::Tick(who) => self.tick(who),
            Event::Stored { server, life, job } => {
                if self.nodes[&Who::Server(server)].life == life {
                    if !self.servers[server].disk.is_next(job) {
                        // A pause has mixed them up.
                        return self.at(Duration::from_millis(1), event);
                    }
                    let trouble = self.servers[server].disk.store(job);
                    self.step_server(server, chunkserver::Input::Stored { job, trouble });
                }
            }
            Event::Logged { life, index } => {
                if self.nodes[&Who::Master].life == life {
                    while self.log_queue.first().is_some_and(|(queued, _)| *queued <= index) {
                        let (_, changes) = self.log_queue.remove(0);
                        self.log.commit(&changes).unwrap();
                    }
                    self.step_master(master::Input::Committed { index });
                }
            }
            Event::Fault => self.fault(),
            Event::Restart(who) => self.start(who),
            Event::Room(server) => {
                self.servers[server].disk.has_room();
                let room = chunkserver::Input::Room { used: 1, free: 1_000_000, full: false };
                self.step_server(server, room);
            }
            Event::Scrub(server, chunk) => self.scrub(server, chunk),
            Event::Think(client) => self.think(client),
        }
    }

    fn answered(&mut self, id: Id, answer: Answer) {
        let Some(asked) = self.asked.remove(&id) else { return };
        let node = &self.nodes[&asked.by];
        if node.life != asked.life || !node.is_up {
            return;
        }
        let call = asked.call;
        match (asked.by, asked.kind) {
            (Who::Master, _) => {
                let answer = match answer {
                    Answer::Chunk(packet) => Some(refused(packet).map(|packet| packet.message)),
                    _ => None,
                };
                self.step_master(master::Input::Answer { call, answer });
            }
            (Who::Server(server), kind) => {
                let input = match (kind, answer) {
                    (Kind::Beat, Answer::Master(MasterReply::Beat(reply))) => {
                        chunkserver::Input::Beaten { call, answer: Some(Ok(reply)) }
                    }
                    (Kind::Beat, Answer::Master(MasterReply::Refused(refusal))) => {
                        chunkserver::Input::Beaten { call, answer: Some(Err(refusal)) }
                    }
                    (Kind::Beat, _) => chunkserver::Input::Beaten { call, answer: None },
                    (Kind::Tell, answer) => {
                        chunkserver::Input::Told { call, heard: !matches!(answer, Answer::Silence) }
                    }
                    (_, Answer::Chunk(packet)) => {
                        chunkserver::Input::Answer { call, answer: Some(refused(packet)) }
                    }
                    (_, _) => chunkserver::Input::Answer { call, answer: None },
                };
                self.step_server(server, input);
            }
            (Who::Client(client), _) => self.client_answered(client, id, asked.to, answer),
        }
    }

    fn tick(&mut self, who: Who) {
        let life_goes_on = self.nodes[&who].is_up;
        if life_goes_on {
            match who {
                Who::Master => self.step_master(master::Input::Tick),
                Who::Server(server) => self.step_server(server, chunkserver::Input::Tick),
                Who::Client(_) => {}
            }
        }
        self.at(Duration::from_millis(50), Event::Tick(who));
    }

    fn start(&mut self, who: Who) {
        let node = self.nodes.get_mut(&who).unwrap();
        if node.is_up {
            return;
        }
        node.is_up = true;
        let is_first = node.life == 0;
        node.life += 1;
        let life = node.life;
        self.say(|| format!("{who:?} starts, life {life}"));
        let now = self.clock(who);
        match who {
            Who::Master => {
                let recovered = log::recover(&self.log).unwrap();
                let settings = settings(&mut self.rng);
                let begun = master::Leader::begin(now, &settings, recovered.state, recovered.index);
                self.master = Some(begun);
            }
            Who::Server(server) => {
                let mut effects = Vec::new();
                let settings = chunkserver::Settings {
                    name: format!("server-{server}").into(),
                    start: u64::from(life),
                    address: address(server),
                    rack: "".into(),
                    copy_rate: 1_000_000,
                };
                let found = self.servers[server].disk.found();
                let machine = ChunkServer::new(now, settings, found, &mut effects);
                self.servers[server].machine = Some(machine);
                self.perform(server, effects);
            }
            Who::Client(_) => {}
        }
        if is_first {
            self.at(Duration::from_millis(1), Event::Tick(who));
        }
    }

    fn kill(&mut self, who: Who) {
        let node = self.nodes.get_mut(&who).unwrap();
        if !node.is_up {
            return;
        }
        node.is_up = false;
        node.life += 1;
        node.paused_until = Time::default();
        self.say(|| format!("{who:?} is killed"));
        match who {
            Who::Master => {
                let kept = self.rng.random_range(0..=self.log_queue.len());
                for (_, changes) in self.log_queue.drain(..).take(kept) {
                    self.log.commit(&changes).unwrap();
                }
                self.master = None;
            }
            Who::Server(server) => {
                self.servers[server].machine = None;
                self.servers[server].disk.crash(&mut self.rng);
            }
            Who::Client(_) => {}
        }
        // Whoever waits for it sees its connection close, most of the time.
        let waiting: Vec<Id> =
            self.asked.iter().filter(|(_, it)| it.to == who).map(|(id, _)| *id).collect();
        for id in waiting {
            let delay = self.delay();
            self.at(delay, Event::Answer { id, answer: Answer::Silence });
        }
    }

    fn step_master(&mut self, input: master::Input<Id>) {
        let now = self.clock(Who::Master);
        let mut effects = Vec::new();
        let Some(machine) = &mut self.master else { return };
        machine.step(now, input, &mut effects);
        for effect in effects {
            match effect {
                master::Effect::Reply { to, reply } => {
                    self.reply(Who::Master, to, Answer::Master(reply));
                }
                master::Effect::Append { index, change } => {
                    self.log_queue.push((index, vec![log::append(index, &change)]));
                    let delay = Duration::from_micros(self.rng.random_range(100..5_000));
                    let life = self.nodes[&Who::Master].life;
                    self.at(delay, Event::Logged { life, index });
                }
                // It leads alone here.
                master::Effect::Confirm { number } => {
                    self.step_master(master::Input::Confirmed { number });
                }
                master::Effect::Call { to, call, request, .. } => {
                    let ask = Ask::Chunk(Packet::bare(request));
                    self.ask(Who::Master, call, Kind::MasterCall, Who::Server(server_at(to)), ask);
                }
                master::Effect::Note(note) => self.say(|| format!("master: {note}")),
            }
        }
    }

    fn step_server(&mut self, server: usize, input: chunkserver::Input<Id>) {
        let now = self.clock(Who::Server(server));
        let mut effects = Vec::new();
        let Some(machine) = &mut self.servers[server].machine else { return };
        machine.step(now, input, &mut effects);
        self.perform(server, effects);
    }

    fn perform(&mut self, server: usize, effects: Vec<chunkserver::Effect<Id>>) {
        let me = Who::Server(server);
        for effect in effects {
            match effect {
                chunkserver::Effect::Reply { to, reply } => {
                    self.reply(me, to, Answer::Chunk(Packet::bare(reply)));
                }
                chunkserver::Effect::Read { to, chunk, .. }
                    if self.servers[server].disk.is_damaged(chunk) =>
                {
                    let refusal = Refusal::unavailable("it is damaged here");
                    let reply = ChunkReply::Refused(refusal);
                    self.reply(me, to, Answer::Chunk(Packet::bare(reply)));
                    self.step_server(server, chunkserver::Input::Damaged(chunk));
                }
                chunkserver::Effect::Read { to, chunk, offset, length, whole } => {
                    let read = self.servers[server].disk.read(chunk, offset, length);
                    let Some(data) = read else {
                        self.failure = Some(format!("{me:?} has not {chunk} {offset}+{length}"));
                        return;
                    };
                    let message = ChunkReply::Length { length: whole };
                    self.reply(me, to, Answer::Chunk(Packet { message, data: Data::from(data) }));
                }
                chunkserver::Effect::Disk { job, op } => {
                    let is_slow = self.now < self.servers[server].slow_until;
                    let longest = if is_slow { 9_000_000 } else { 3_000 };
                    let wait = Duration::from_micros(self.rng.random_range(50..longest));
                    let life = self.nodes[&me].life;
                    let due = self.servers[server].disk.queue(job, op, self.now + wait);
                    self.at(due.since(self.now), Event::Stored { server, life, job });
                }
                chunkserver::Effect::Call { to, call, request, .. } => {
                    let to = Who::Server(server_at(to));
                    self.ask(me, call, Kind::Peer, to, Ask::Chunk(request));
                }
                chunkserver::Effect::Beat { call, beat } => {
                    let ask = Ask::Master(MasterRequest::Heartbeat(beat));
                    self.ask(me, call, Kind::Beat, Who::Master, ask);
                }
                chunkserver::Effect::Tell { call, request } => {
                    self.ask(me, call, Kind::Tell, Who::Master, Ask::Master(request));
                }
                chunkserver::Effect::Note(note) => self.say(|| format!("{server}: {note}")),
            }
        }
    }
}

fn refused(packet: Packet<ChunkReply>) -> Result<Packet<ChunkReply>, Refusal> {
    match packet.message {
        ChunkReply::Refused(refusal) => Err(refusal),
        _ => Ok(packet),
    }
}
