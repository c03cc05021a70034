//! A whole file system in one thread: the master, chunkservers and clients, with
//! a virtual clock, network and disks. All chance comes from one seed.
//!
//! Clients append records that name themselves to one file, exactly once, overwrite each
//! its own region of another one, take snapshots of the first, and read back at any
//! chunkserver they have ever heard of what was acknowledged. Chunkservers and the
//! master are killed, paused and cut off from each other, disks are full for a while, and
//! say so or do not, and bits flip; what was not durable is lost with a kill. At the end
//! everything is healed, and must come to rest.
//!
//! While a bit is flipped and not found, or a disk has refused something, nothing else
//! begins to go wrong: three troubles at once may lose what three copies hold.

use crate::memory_disk::MemoryDisk;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ringleader::consensus::replica::Lead;
use ringleader::gfs::chunkserver::{self, ChunkServer};
use ringleader::gfs::master::{self, Settings};
use ringleader::gfs::messages::FailedPrimary;
use ringleader::gfs::messages::{
    ChunkReply, ChunkRequest, Data, LeaseGranted, Located, Mark, MasterReply, MasterRequest, Packet,
};
use ringleader::gfs::state::State;
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
}

#[derive(Debug)]
enum Doing {
    Idle,
    Leasing,
    Mutating(LeaseGranted),
    Locating(&'static str),
    Reading(u64, Wanted),
    /// A snapshot that is asked for, and how many records it must have.
    Snapshotting(FileName, usize),
}

/// What a reader must find.
#[derive(Clone, Debug)]
enum Wanted {
    /// This record.
    Record(Vec<u8>),
    /// What this client has written over its region: this write of it, or a later one.
    Region(usize, u64),
}

/// A snapshot of the log that was taken.
struct Snapshot {
    name: FileName,
    /// So many records were acknowledged when it was asked for: it has them all.
    has: usize,
    /// The number of each client's last record by the time it was taken: it has no
    /// later ones.
    last: Vec<u64>,
}

struct Client {
    name: u64,
    number: u64,
    /// The chunk of the file that it tries.
    index: usize,
    failed: Option<FailedPrimary>,
    doing: Doing,
    id: Id,
    /// What it is to append, or to write over its region.
    record: Vec<u8>,
    /// Whether it overwrites.
    overwrites: bool,
    /// The last write over its region that it has begun, and that was acknowledged.
    begun: u64,
    written: u64,
    /// Where chunks are, and until when that is good by its clock.
    cached: BTreeMap<(&'static str, usize), (Located, Time)>,
    /// When it asked last, by its clock.
    asked_at: Time,
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
    cut_until: Time,
    /// Acknowledged records: place and content.
    acknowledged: Vec<(usize, u64, Vec<u8>)>,
    snapshots: Vec<Snapshot>,
    healing: bool,
    verbose: bool,
    tally: Tally,
    failure: Option<String>,
}

const SERVERS: usize = 5;
const CLIENTS: usize = 4;
const CHUNK_BYTES: u64 = 2048;

/// Records are appended to this file.
const LOG: &str = "log";

/// Each client has a region of this one.
const TABLE: &str = "table";

/// How long a region is.
const REGION: usize = 64;

/// How many snapshots are taken in one run at most.
const SNAPSHOTS: usize = 4;

fn address(server: usize) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, server as u8 + 1), 9001)
}

fn server_at(address: SocketAddrV4) -> usize {
    usize::from(address.ip().octets()[3]) - 1
}

fn file(name: &str) -> FileName {
    FileName::new(name).unwrap()
}

/// What stands in the region of a client after its write `number`.
fn region(client: usize, number: u64) -> Vec<u8> {
    let mut region = format!("[{client}.{number:09}]").into_bytes().repeat(REGION);
    region.truncate(REGION);
    region
}

fn settings() -> Settings {
    Settings { repair_after: Duration::from_secs(5), ..Settings::default() }
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
                .map(|_| ServerNode { machine: None, disk: MemoryDisk::default() })
                .collect(),
            clients: Vec::new(),
            asked: BTreeMap::new(),
            cuts: BTreeSet::new(),
            cut_until: Time::default(),
            acknowledged: Vec::new(),
            snapshots: Vec::new(),
            healing: false,
            verbose,
            tally: Tally::default(),
            failure: None,
        };
        cluster.start(Who::Master);
        (0..SERVERS).for_each(|server| cluster.start(Who::Server(server)));
        for name in 0..CLIENTS {
            cluster.nodes.get_mut(&Who::Client(name)).unwrap().is_up = true;
            cluster.clients.push(Client {
                name: name as u64 + 1,
                number: 0,
                index: 0,
                failed: None,
                doing: Doing::Idle,
                id: 0,
                record: Vec::new(),
                overwrites: false,
                begun: 0,
                written: 0,
                cached: BTreeMap::new(),
                asked_at: Time::default(),
            });
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
        self.check_rest()
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

    fn is_cut(&self, a: Who, b: Who) -> bool {
        self.now < self.cut_until && (self.cuts.contains(&(a, b)) || self.cuts.contains(&(b, a)))
    }

    // ---- messages ----

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

    // ---- the machines ----

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
                let begun =
                    master::Leader::begin(now, &settings(), recovered.state, recovered.index);
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
                    let wait = Duration::from_micros(self.rng.random_range(50..3_000));
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

    // ---- faults ----

    fn fault(&mut self) {
        if self.healing {
            return;
        }
        if self.servers.iter().any(|server| server.disk.has_trouble()) {
            return self.at(Duration::from_secs(1), Event::Fault);
        }
        self.tally.faults += 1;
        let server = Who::Server(self.rng.random_range(0..SERVERS));
        let span = Duration::from_millis(self.rng.random_range(50..9_000));
        match self.rng.random_range(0..15) {
            0..4 => {
                self.kill(server);
                self.at(span, Event::Restart(server));
            }
            4..6 => {
                self.say(|| format!("{server:?} is paused for {span:?}"));
                self.nodes.get_mut(&server).unwrap().paused_until = self.now + span;
            }
            6 | 7 => {
                let other = match self.rng.random_range(0..3) {
                    0 => Who::Master,
                    _ => Who::Server(self.rng.random_range(0..SERVERS)),
                };
                self.say(|| format!("{server:?} and {other:?} are cut off for {span:?}"));
                self.cuts = BTreeSet::from([(server, other)]);
                self.cut_until = self.now + span;
            }
            8 => {
                self.kill(Who::Master);
                self.at(span / 4, Event::Restart(Who::Master));
            }
            9 => {
                self.say(|| format!("the disk of {server:?} is full for {span:?}"));
                let Who::Server(server) = server else { return };
                let room = chunkserver::Input::Room { used: 1_000_000, free: 1, full: true };
                self.step_server(server, room);
                self.at(span, Event::Room(server));
            }
            10 | 11 => self.damage(),
            12 | 13 => self.refuse(span),
            _ => {
                // All at once.
                for server in (0..SERVERS).map(Who::Server) {
                    self.kill(server);
                    let span = Duration::from_millis(self.rng.random_range(50..6_000));
                    self.at(span, Event::Restart(server));
                }
            }
        }
        let next = Duration::from_millis(self.rng.random_range(200..6_000));
        self.at(next, Event::Fault);
    }

    /// One of three copies that are all in order, and where it is.
    fn whole_copy(&mut self) -> Option<(ChunkId, usize)> {
        let calm = self.now >= self.cut_until
            && self.nodes.values().all(|node| node.is_up && node.paused_until <= self.now);
        let master = self.master.as_ref().filter(|_| calm)?;
        let whole = |known: &ringleader::gfs::state::Chunk| known.members.len() == 3;
        let chunks: Vec<(ChunkId, usize)> = master
            .state()
            .chunks()
            .filter(|(_, known)| whole(known))
            .flat_map(|(chunk, known)| {
                let places = known.members.iter();
                let addresses = places.map(|it| master.state().server(*it).unwrap().address);
                addresses.map(move |address| (chunk, server_at(address))).collect::<Vec<_>>()
            })
            .filter(|(chunk, server)| self.servers[*server].disk.holds(*chunk))
            .collect();
        let count = chunks.len();
        (count > 0).then(|| chunks[self.rng.random_range(0..count)])
    }

    /// A bit flips.
    fn damage(&mut self) {
        let Some((chunk, server)) = self.whole_copy() else { return };
        self.say(|| format!("a bit flips in {chunk} on {server}"));
        self.tally.damaged += 1;
        self.servers[server].disk.damage(chunk);
        let soon = Duration::from_millis(self.rng.random_range(1..2_000));
        self.at(soon, Event::Scrub(server, chunk));
    }

    /// A disk has no room for a copy for a while, as none has said before.
    fn refuse(&mut self, span: Duration) {
        let Some((chunk, server)) = self.whole_copy() else { return };
        self.say(|| format!("there is no room for {chunk} on {server} for {span:?}"));
        self.tally.refused += 1;
        self.servers[server].disk.refuse(chunk);
        self.at(span, Event::Room(server));
    }

    fn scrub(&mut self, server: usize, chunk: ChunkId) {
        if !self.servers[server].disk.is_damaged(chunk) {
            return;
        }
        if self.nodes[&Who::Server(server)].is_up {
            self.step_server(server, chunkserver::Input::Damaged(chunk));
        }
        // Until it is gone, it is found each time.
        self.at(Duration::from_millis(500), Event::Scrub(server, chunk));
    }

    fn heal(&mut self) {
        self.say(|| "healing".to_owned());
        self.healing = true;
        self.cut_until = Time::default();
        let whos: Vec<Who> = self.nodes.keys().copied().collect();
        for who in whos {
            self.nodes.get_mut(&who).unwrap().paused_until = Time::default();
            if !matches!(who, Who::Client(_)) {
                self.start(who);
            }
        }
        for server in 0..SERVERS {
            self.at(Duration::from_millis(1), Event::Room(server));
        }
    }

    // ---- the clients ----

    fn think(&mut self, client: usize) {
        let pause = Duration::from_millis(self.rng.random_range(1..40));
        let is_idle = matches!(self.clients[client].doing, Doing::Idle);
        if !is_idle {
            return;
        }
        let is_free = self.clients[client].record.is_empty();
        let reads = self.rng.random_range(0..3) == 0 && !self.acknowledged.is_empty();
        let snapshots = self.rng.random_range(0..400) == 0 && self.snapshots.len() < SNAPSHOTS;
        if reads && is_free {
            self.begin_read(client);
        } else if snapshots && is_free && !self.healing {
            self.begin_snapshot(client);
        } else if !self.healing || !is_free {
            self.lease(client);
        } else {
            self.at(pause, Event::Think(client));
        }
    }

    fn begin_snapshot(&mut self, client: usize) {
        self.sequence += 1;
        let to = file(&format!("snapshots/{}", self.sequence));
        self.clients[client].doing = Doing::Snapshotting(to.clone(), self.acknowledged.len());
        let request = MasterRequest::Snapshot { from: file(LOG), to };
        self.ask_as(client, Who::Master, Ask::Master(request));
    }

    fn ask_as(&mut self, client: usize, to: Who, ask: Ask) {
        let id = self.ask(Who::Client(client), 0, Kind::Client, to, ask);
        self.clients[client].id = id;
        self.clients[client].asked_at = self.clock(Who::Client(client));
    }

    fn lease(&mut self, client: usize) {
        let length = self.rng.random_range(8..200);
        let overwrites = self.rng.random_range(0..4) == 0;
        let it = &mut self.clients[client];
        if it.record.is_empty() {
            it.overwrites = overwrites;
            if overwrites {
                it.begun += 1;
                it.record = region(client, it.begun);
            } else {
                it.number += 1;
                it.record = format!("<{}.{}:", it.name, it.number).into_bytes();
                it.record.resize(length.max(it.record.len()), b'x');
                it.record.push(b'>');
            }
        }
        it.doing = Doing::Leasing;
        let (name, index) = if it.overwrites { (TABLE, 0) } else { (LOG, it.index) };
        let failed = it.failed.take();
        let request = MasterRequest::Lease { name: file(name), index: Some(index), failed };
        self.ask_as(client, Who::Master, Ask::Master(request));
    }

    fn begin_read(&mut self, client: usize) {
        let (name, index, offset, wanted) = match self.rng.random_range(0..4) {
            0 => {
                let writer = self.rng.random_range(0..CLIENTS);
                let wanted = Wanted::Region(writer, self.clients[writer].written);
                (TABLE, 0, (writer * REGION) as u64, wanted)
            }
            _ => {
                let pick = self.rng.random_range(0..self.acknowledged.len());
                let (index, offset, record) = self.acknowledged[pick].clone();
                (LOG, index, offset, Wanted::Record(record))
            }
        };
        let knows = self.rng.random_range(0..4) != 0;
        let now = self.clock(Who::Client(client));
        let cached = self.clients[client].cached.get(&(name, index)).cloned();
        match cached.filter(|(_, until)| knows && *until > now).map(|(located, _)| located) {
            Some(located) if !located.replicas.is_empty() => {
                // It may have changed since: whoever answers must be right all the same.
                self.read_at(client, located, offset, wanted);
            }
            _ => {
                self.clients[client].doing = Doing::Locating(name);
                let request = MasterRequest::Locate { name: file(name), index, count: None };
                self.ask_as(client, Who::Master, Ask::Master(request));
            }
        }
    }

    fn read_at(&mut self, client: usize, located: Located, offset: u64, wanted: Wanted) {
        let place = self.rng.random_range(0..located.replicas.len());
        let to = Who::Server(server_at(located.replicas[place]));
        let length = match &wanted {
            Wanted::Record(record) => record.len(),
            Wanted::Region(..) => REGION,
        };
        let (chunk, version) = (located.chunk, located.version);
        let message = ChunkRequest::Read { chunk, version, offset, length };
        self.clients[client].doing = Doing::Reading(offset, wanted);
        self.ask_as(client, to, Ask::Chunk(Packet::bare(message)));
    }

    /// Whether a reader may find this.
    fn is_right(&self, found: &[u8], wanted: &Wanted) -> bool {
        match wanted {
            Wanted::Record(record) => found == *record,
            Wanted::Region(_, 0) => true,
            Wanted::Region(writer, at_least) => {
                (*at_least..=self.clients[*writer].begun).any(|it| found == region(*writer, it))
            }
        }
    }

    fn client_answered(&mut self, client: usize, id: Id, from: Who, answer: Answer) {
        if self.clients[client].id != id {
            return;
        }
        let doing = std::mem::replace(&mut self.clients[client].doing, Doing::Idle);
        let mut pause = Duration::from_millis(self.rng.random_range(1..40));
        match (doing, answer) {
            (Doing::Leasing, Answer::Master(MasterReply::Lease(lease))) => {
                let it = &self.clients[client];
                let mark = Some(Mark { client: it.name, number: it.number });
                let (chunk, version, pushed) = (lease.chunk, lease.version, None);
                let offset = (client * REGION) as u64;
                let message = match it.overwrites {
                    true => ChunkRequest::Write { chunk, version, offset, pushed },
                    false => ChunkRequest::Append { chunk, version, pushed, mark },
                };
                let data = Data::from(it.record.as_slice());
                let to = Who::Server(server_at(lease.primary));
                self.clients[client].doing = Doing::Mutating(lease);
                return self.ask_as(client, to, Ask::Chunk(Packet { message, data }));
            }
            (Doing::Mutating(lease), Answer::Chunk(packet)) => match packet.message {
                ChunkReply::Written { .. } if self.clients[client].overwrites => {
                    let it = &mut self.clients[client];
                    it.record.clear();
                    it.written = it.begun;
                    self.tally.overwritten += 1;
                }
                ChunkReply::Written { offset } => {
                    let record = std::mem::take(&mut self.clients[client].record);
                    self.say(|| {
                        let text =
                            String::from_utf8_lossy(&record[..record.len().min(8)]).into_owned();
                        format!("client {client}: {text} at {}+{offset}", lease.index)
                    });
                    self.acknowledged.push((lease.index, offset, record));
                    self.tally.appended += 1;
                }
                ChunkReply::Closed { .. } => self.clients[client].index += 1,
                ChunkReply::Refused(_) => {
                    self.tally.repeated += 1;
                    let failed = FailedPrimary { server: lease.primary, version: lease.version };
                    self.clients[client].failed = Some(failed);
                    pause = Duration::from_millis(100);
                }
                other => self.failure = Some(format!("a change was answered {other:?}")),
            },
            (Doing::Mutating(lease), _) => {
                self.tally.repeated += 1;
                let failed = FailedPrimary { server: lease.primary, version: lease.version };
                self.clients[client].failed = Some(failed);
            }
            (Doing::Locating(name), Answer::Master(MasterReply::Located { chunks, .. })) => {
                for located in chunks {
                    let it = &mut self.clients[client];
                    let until = it.asked_at + Duration::from_millis(located.valid_ms);
                    it.cached.insert((name, located.index), (located, until));
                }
            }
            (Doing::Snapshotting(name, has), Answer::Master(MasterReply::Done(_))) => {
                self.say(|| format!("{name} is taken"));
                let last = self.clients.iter().map(|client| client.number).collect();
                self.snapshots.push(Snapshot { name, has, last });
                self.tally.snapshots += 1;
            }
            (Doing::Reading(offset, wanted), Answer::Chunk(packet)) => match packet.message {
                ChunkReply::Length { .. } if self.is_right(&packet.data, &wanted) => {
                    self.tally.read += 1;
                }
                ChunkReply::Length { length } => {
                    let got = String::from_utf8_lossy(&packet.data).into_owned();
                    let wanted = match wanted {
                        Wanted::Record(it) => String::from_utf8_lossy(&it).into_owned(),
                        Wanted::Region(writer, it) => format!("write {it} of {writer}"),
                    };
                    self.failure = Some(format!(
                        "{from:?} returned {got:?} of {length} bytes for {wanted:?} at {offset}"
                    ));
                }
                _ => {}
            },
            _ => pause = Duration::from_millis(200),
        }
        self.at(pause, Event::Think(client));
    }

    // ---- at rest ----

    fn check_rest(&mut self) -> Result<(), String> {
        let master = self.master.as_ref().ok_or("there is no master")?;
        let state = master.state();
        if let Some(client) = self.clients.iter().find(|it| !it.record.is_empty()) {
            return Err(format!("client {} can't go on", client.name));
        }
        for (chunk, known) in state.chunks() {
            for server in 0..SERVERS {
                let is_member = known
                    .members
                    .iter()
                    .any(|it| server_at(state.server(*it).unwrap().address) == server);
                if self.servers[server].disk.holds(chunk) && !is_member {
                    return Err(format!("server {server} keeps an orphan of {chunk}"));
                }
            }
        }
        let contents = self.content_of(state, &file(LOG))?;
        self.check_records(&contents, &self.acknowledged, "the log")?;
        for Snapshot { name, has, last } in &self.snapshots {
            let contents = self.content_of(state, name)?;
            let begun = self.check_records(&contents, &self.acknowledged[..*has], name.as_str())?;
            for (client, number) in begun {
                if number > last[client as usize - 1] {
                    return Err(format!("{name} has {client}.{number}, which came after it"));
                }
            }
        }
        let table = self.content_of(state, &file(TABLE))?;
        for (client, it) in self.clients.iter().enumerate().filter(|(_, it)| it.written > 0) {
            let found = table[0].get(client * REGION..(client + 1) * REGION).unwrap_or_default();
            if !self.is_right(found, &Wanted::Region(client, it.written)) {
                let found = String::from_utf8_lossy(found).into_owned();
                return Err(format!("the region of {client} is {found}, not write {}", it.written));
            }
        }
        Ok(())
    }

    /// What all members of each chunk of a file hold.
    fn content_of(&self, state: &State, name: &FileName) -> Result<Vec<Vec<u8>>, String> {
        let file = state.file(name).ok_or_else(|| format!("{name} is gone"))?;
        file.chunks.iter().map(|chunk| self.content_of_chunk(state, *chunk)).collect()
    }

    fn content_of_chunk(&self, state: &State, chunk: ChunkId) -> Result<Vec<u8>, String> {
        let known = state.chunk(chunk).ok_or_else(|| format!("{chunk} is gone"))?;
        if known.members.is_empty() {
            // Nobody wrote to it since it was asked for: it reads as what it is a copy of.
            let source = known.copy_of.map(|source| self.content_of_chunk(state, source));
            return source.unwrap_or(Ok(Vec::new()));
        }
        if known.members.len() != 3 {
            return Err(format!("{chunk} has the members {:?}", known.members));
        }
        let places = known.members.iter();
        let places = places.map(|number| server_at(state.server(*number).unwrap().address));
        let mut same: Option<(usize, Vec<u8>)> = None;
        for server in places {
            let (version, bytes) = self.servers[server].disk.content(chunk);
            let (first, content) = same.get_or_insert_with(|| (server, bytes.clone()));
            // A round may have come to nothing: a promise remains.
            if version < known.version || bytes != *content {
                return Err(format!(
                    "{chunk} is {} and not the same on server {server} ({version}, {} bytes) and \
                     {first} ({} bytes)",
                    known.version,
                    bytes.len(),
                    content.len()
                ));
            }
        }
        Ok(same.map(|(_, content)| content).unwrap_or_default())
    }

    /// Checks that these records stand in a file where they should, and none twice; gives
    /// all that stand there: client and number.
    fn check_records(
        &self,
        contents: &[Vec<u8>],
        records: &[(usize, u64, Vec<u8>)],
        name: &str,
    ) -> Result<BTreeSet<(u64, u64)>, String> {
        for (index, offset, record) in records {
            let begin = *offset as usize;
            let there = contents.get(*index).and_then(|it| it.get(begin..begin + record.len()));
            if there != Some(record) {
                let text = String::from_utf8_lossy(record).into_owned();
                return Err(format!(
                    "{text:?} was acknowledged at {index}+{offset} and is not there in {name}"
                ));
            }
        }
        let all: Vec<u8> = contents.concat();
        let mut seen = BTreeSet::new();
        for part in all.split(|byte| *byte == b'<').skip(1) {
            let title = part.split(|byte| *byte == b':').next().unwrap_or_default();
            let title = String::from_utf8_lossy(title).into_owned();
            let numbers = title
                .split_once('.')
                .and_then(|(client, number)| Some((client.parse().ok()?, number.parse().ok()?)));
            let Some(numbers) = numbers else {
                return Err(format!("{title:?} is no record of {name}"));
            };
            if !seen.insert(numbers) {
                return Err(format!("record {title} is there twice in {name}"));
            }
        }
        Ok(seen)
    }
}

fn refused(packet: Packet<ChunkReply>) -> Result<Packet<ChunkReply>, Refusal> {
    match packet.message {
        ChunkReply::Refused(refusal) => Err(refusal),
        _ => Ok(packet),
    }
}
