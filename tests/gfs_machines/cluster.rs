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
use ringleader::wire::{Reason, Refusal};
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

#[derive(Debug)]
enum Doing {
    Idle,
    Leasing,
    Mutating(LeaseGranted),
    Locating(&'static str),
    Reading(u64, Wanted),
    /// A snapshot that is asked for, and how many records it must have.
    Snapshotting(FileName, usize),
    /// The third file is to be called otherwise, or to be made anew.
    Turning,
}

/// What a client writes to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    Log,
    Table,
    Snapshot(usize),
    Turn,
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
    /// What was appended to it since, and acknowledged.
    acknowledged: Vec<(usize, u64, Vec<u8>)>,
}

/// A record of the third file that was acknowledged: it is in the file that was called so at
/// some time between sending it and hearing so.
struct Turned {
    record: (usize, u64, Vec<u8>),
    /// How often the file had been called otherwise by then for certain, and perhaps.
    between: (usize, usize),
}

struct Client {
    name: u64,
    number: u64,
    /// The chunk of each file that it tries; the last one, if it knows none.
    tails: BTreeMap<FileName, usize>,
    /// The leases that it has.
    leases: BTreeMap<(FileName, usize), LeaseGranted>,
    failed: Option<FailedPrimary>,
    doing: Doing,
    id: Id,
    /// What it is to append, or to write over its region.
    record: Vec<u8>,
    /// What that is for.
    target: Target,
    /// How often the third file had been called otherwise when it sent that.
    turns: usize,
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

/// Records are appended to this file.
const LOG: &str = "log";

/// Each client has a region of this one.
const TABLE: &str = "table";

/// This one is called otherwise now and then.
const TURN: &str = "turn";

/// How long a region is.
const REGION: usize = 64;

/// How many snapshots are taken in one run at most.
const SNAPSHOTS: usize = 4;

/// How often the third file is called otherwise at most.
const TURNS: usize = 6;

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

/// What the third file is called when it is called otherwise the next time after `turns`.
fn turned(turns: usize) -> FileName {
    file(&format!("turned/{turns}"))
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
            cluster.clients.push(Client {
                name: name as u64 + 1,
                number: 0,
                tails: BTreeMap::new(),
                leases: BTreeMap::new(),
                failed: None,
                doing: Doing::Idle,
                id: 0,
                record: Vec::new(),
                target: Target::Log,
                turns: 0,
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
        match self.rng.random_range(0..17) {
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
                self.is_one_way = self.rng.random_range(0..2) == 0;
                let how = if self.is_one_way { "one way" } else { "both ways" };
                self.say(|| format!("{server:?} and {other:?} are cut off {how} for {span:?}"));
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
            14 | 15 => {
                self.say(|| format!("the disk of {server:?} is slow for {span:?}"));
                let Who::Server(server) = server else { return };
                self.servers[server].slow_until = self.now + span;
            }
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
            self.servers[server].slow_until = Time::default();
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
        let turns = self.rng.random_range(0..400) == 0 && self.turns < TURNS && !self.healing;
        if is_free && (turns || self.turning.is_some()) && self.nobody_turns() {
            self.turn(client);
        } else if reads && is_free {
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

    fn nobody_turns(&self) -> bool {
        !self.clients.iter().any(|it| matches!(it.doing, Doing::Turning))
    }

    /// Calls the third file otherwise, or makes it anew.
    fn turn(&mut self, client: usize) {
        self.clients[client].doing = Doing::Turning;
        let request = match self.turning.get_or_insert(false) {
            false => MasterRequest::Rename { from: file(TURN), to: turned(self.turns) },
            true => {
                let chunk_bytes = Some(CHUNK_BYTES);
                MasterRequest::Create { name: file(TURN), chunk_bytes, copies: None }
            }
        };
        self.ask_as(client, Who::Master, Ask::Master(request));
    }

    fn name_of(&self, target: Target) -> FileName {
        match target {
            Target::Log => file(LOG),
            Target::Table => file(TABLE),
            Target::Snapshot(place) => self.snapshots[place].name.clone(),
            Target::Turn => file(TURN),
        }
    }

    fn ask_as(&mut self, client: usize, to: Who, ask: Ask) {
        let id = self.ask(Who::Client(client), 0, Kind::Client, to, ask);
        self.clients[client].id = id;
        self.clients[client].asked_at = self.clock(Who::Client(client));
    }

    fn lease(&mut self, client: usize) {
        let length = self.rng.random_range(8..200);
        let snapshot = self.rng.random_range(0..SNAPSHOTS);
        let target = match self.rng.random_range(0..16) {
            0..4 => Target::Table,
            4 if snapshot < self.snapshots.len() => Target::Snapshot(snapshot),
            5 | 6 => Target::Turn,
            _ => Target::Log,
        };
        let keeps = self.rng.random_range(0..2) == 0;
        let it = &mut self.clients[client];
        if it.record.is_empty() {
            it.target = target;
            if target == Target::Table {
                it.begun += 1;
                it.record = region(client, it.begun);
            } else {
                it.number += 1;
                it.record = format!("<{}.{}:", it.name, it.number).into_bytes();
                it.record.resize(length.max(it.record.len()), b'x');
                it.record.push(b'>');
                self.targets.insert((it.name, it.number), target);
            }
        }
        let target = it.target;
        let name = self.name_of(target);
        let it = &mut self.clients[client];
        let index = match target {
            Target::Table => Some(0),
            _ => it.tails.get(&name).copied(),
        };
        let kept = index.and_then(|index| it.leases.get(&(name.clone(), index)).cloned());
        if let Some(lease) = kept.filter(|_| keeps && it.failed.is_none()) {
            return self.mutate(client, lease);
        }
        it.doing = Doing::Leasing;
        let failed = it.failed.take();
        self.ask_as(client, Who::Master, Ask::Master(MasterRequest::Lease { name, index, failed }));
    }

    fn mutate(&mut self, client: usize, lease: LeaseGranted) {
        let it = &mut self.clients[client];
        it.turns = self.turns;
        let mark = Some(Mark { client: it.name, number: it.number });
        let (chunk, version, pushed) = (lease.chunk, lease.version, None);
        let offset = (client * REGION) as u64;
        let message = match it.target {
            Target::Table => ChunkRequest::Write { chunk, version, offset, pushed },
            _ => ChunkRequest::Append { chunk, version, pushed, mark },
        };
        let data = Data::from(it.record.as_slice());
        let to = Who::Server(server_at(lease.primary));
        it.doing = Doing::Mutating(lease);
        self.ask_as(client, to, Ask::Chunk(Packet { message, data }));
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
                let name = self.name_of(self.clients[client].target);
                let it = &mut self.clients[client];
                it.tails.insert(name.clone(), lease.index);
                it.leases.insert((name, lease.index), lease.clone());
                return self.mutate(client, lease);
            }
            (Doing::Leasing, Answer::Master(MasterReply::Refused(refusal)))
                if refusal.reason != Reason::Unavailable
                    && self.clients[client].target == Target::Turn =>
            {
                // It is called otherwise by now, or was made anew and has fewer chunks.
                let name = self.name_of(self.clients[client].target);
                self.clients[client].tails.remove(&name);
            }
            (Doing::Mutating(lease), Answer::Chunk(packet)) => match packet.message {
                ChunkReply::Written { .. } if self.clients[client].target == Target::Table => {
                    let it = &mut self.clients[client];
                    it.record.clear();
                    it.written = it.begun;
                    self.tally.overwritten += 1;
                }
                ChunkReply::Written { offset } => {
                    let it = &mut self.clients[client];
                    let (target, turns) = (it.target, it.turns);
                    let record = std::mem::take(&mut it.record);
                    self.say(|| {
                        let text =
                            String::from_utf8_lossy(&record[..record.len().min(8)]).into_owned();
                        format!("client {client}: {text} at {}+{offset} {target:?}", lease.index)
                    });
                    let record = (lease.index, offset, record);
                    match target {
                        Target::Snapshot(place) => {
                            self.snapshots[place].acknowledged.push(record);
                        }
                        Target::Turn => {
                            let perhaps = usize::from(self.turning == Some(false));
                            let between = (turns, self.turns + perhaps);
                            self.turned.push(Turned { record, between });
                        }
                        _ => self.acknowledged.push(record),
                    }
                    self.tally.appended += 1;
                }
                ChunkReply::Closed { .. } => {
                    let name = self.name_of(self.clients[client].target);
                    self.clients[client].tails.insert(name, lease.index + 1);
                }
                ChunkReply::Refused(_) => {
                    self.tally.repeated += 1;
                    self.clients[client].leases.retain(|_, it| it.chunk != lease.chunk);
                    let failed = FailedPrimary { server: lease.primary, version: lease.version };
                    self.clients[client].failed = Some(failed);
                    pause = Duration::from_millis(100);
                }
                other => self.failure = Some(format!("a change was answered {other:?}")),
            },
            (Doing::Mutating(lease), _) => {
                self.tally.repeated += 1;
                self.clients[client].leases.retain(|_, it| it.chunk != lease.chunk);
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
                self.snapshots.push(Snapshot { name, has, last, acknowledged: Vec::new() });
                self.tally.snapshots += 1;
            }
            (Doing::Turning, Answer::Master(reply)) => {
                // What is refused otherwise was made before, and nobody had heard of it.
                let is_made = !matches!(
                    reply,
                    MasterReply::Refused(refusal) if refusal.reason == Reason::Unavailable
                );
                match self.turning {
                    Some(false) if is_made => {
                        self.say(|| format!("{} is there", turned(self.turns)));
                        (self.turns, self.turning) = (self.turns + 1, Some(true));
                        self.tally.turns += 1;
                    }
                    Some(true) if is_made => self.turning = None,
                    _ => {}
                }
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
        if self.turning.is_some() {
            return Err("a file can't be renamed or made".to_owned());
        }
        if let Some(client) = self.clients.iter().find(|it| !it.record.is_empty()) {
            return Err(format!("client {} can't go on", client.name));
        }
        // Of a chunk that nobody has written to yet there may be empty copies, which wait for
        // the first one who does: its round was lost with the master.
        for (chunk, known) in state.chunks().filter(|(_, known)| !known.members.is_empty()) {
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
        let begun = self.check_records(&contents, &self.acknowledged, "the log")?;
        self.check_targets(&begun, LOG, |_, target| target == Target::Log)?;
        for (place, snapshot) in self.snapshots.iter().enumerate() {
            let name = snapshot.name.as_str();
            let contents = self.content_of(state, &snapshot.name)?;
            self.check_records(&contents, &self.acknowledged[..snapshot.has], name)?;
            let begun = self.check_records(&contents, &snapshot.acknowledged, name)?;
            self.check_targets(&begun, name, |(client, number), target| match target {
                Target::Log => number <= snapshot.last[client as usize - 1],
                target => target == Target::Snapshot(place),
            })?;
        }
        self.check_turned(state)?;
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

    /// Checks that all these records were for the file that they stand in.
    fn check_targets(
        &self,
        begun: &BTreeSet<(u64, u64)>,
        name: &str,
        fits: impl Fn((u64, u64), Target) -> bool,
    ) -> Result<(), String> {
        match begun.iter().find(|it| !fits(**it, self.targets[*it])) {
            Some((client, number)) => {
                let target = self.targets[&(*client, *number)];
                Err(format!("{name} has {client}.{number}, which was for {target:?}"))
            }
            None => Ok(()),
        }
    }

    /// Checks the third file, under all the names that it had.
    fn check_turned(&self, state: &State) -> Result<(), String> {
        let names = (0..self.turns).map(turned).chain([file(TURN)]);
        let mut contents = Vec::new();
        for name in names {
            let content = self.content_of(state, &name)?;
            let begun = self.check_records(&content, &[], name.as_str())?;
            self.check_targets(&begun, name.as_str(), |_, target| target == Target::Turn)?;
            contents.push(content);
        }
        for Turned { record: (index, offset, record), between: (first, last) } in &self.turned {
            let begin = *offset as usize;
            let there = |content: &Vec<Vec<u8>>| {
                content.get(*index).and_then(|it| it.get(begin..begin + record.len()))
                    == Some(record)
            };
            if !contents[*first..=*last].iter().any(there) {
                let text = String::from_utf8_lossy(record).into_owned();
                let place = contents.iter().position(there);
                return Err(format!(
                    "{text:?} was acknowledged at {index}+{offset}, after the file was called \
                     otherwise {first} to {last} times, and is in {place:?}"
                ));
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
