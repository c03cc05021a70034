//! A cluster in one thread: viewleaders, servers, clients, a virtual clock.
//!
//! The machines are the real ones; this is one more shell around them. It is an
//! event loop: the earliest event is taken, the machine that it concerns is
//! stepped, and what that machine asks for becomes later events (`shells`, and for
//! viewleaders `viewleaders`). What else can happen to messages and disks is in
//! `meddling`.
//! Nothing in it depends on the machine that it runs on, so the same calls give
//! the same run.
//!
//! What it keeps of the real shells, because the machines rely on it:
//!
//! * what is said crosses as JSON and is decoded by the other side;
//! * calls to one server arrive in their order, and every call ends: with its
//!   answer, as not sent (nobody listens), or as lost (too late, or whoever was
//!   asked has died);
//! * servers look for the viewleader that leads: they stay with the one that answered
//!   last, and walk along all of them when it does not, by the hints that they get;
//! * a process writes to a disk, which stores its batches in their order, tells it
//!   when one is stored, and outlives it;
//! * a machine is told every few milliseconds that time has passed.
//!
//! What it adds: each machine's clock has an origin and a rate of its own; a
//! process can be killed and started again over its disk, or paused so that the
//! world goes on without it.
//!
//! There are clients of two kinds: one that stands beside a server ([`Cluster::ask`],
//! for scripts), and one that has to reach it over the network
//! ([`Cluster::client_asks`]).

mod clients;
mod meddling;
mod shells;
mod viewleaders;

pub use clients::{Answered, Silence};
pub use viewleaders::{MAX_HINTS, not_leader};

use crate::kv::Version;
use crate::kv::disk::{self, Person, Record, Seat};
use crate::kv::ring::{Arc, Point};
use crate::kv::server::{Batch, CallError, DEFAULT_FETCH_RATE, Server, Settings};
use crate::machine::Time;
use crate::sim::chance::Chance;
use crate::sim::disk::Disk;
use crate::sim::names::Names;
use crate::sim::network::{Lane, Network, Parcel, Party, Rpc};
use crate::sim::trace::{About, Trace};
use crate::view::{Revision, View};
use crate::wire::Identity;
use clients::ClientCall;
use rand::SeedableRng;
use rand::rngs::StdRng;
use shells::{Call, Origin, ShownView};
use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync;
use std::time::Duration;
use viewleaders::Viewleader;

/// How soon a caller learns that nobody listens, or that the other side died.
const BAD_NEWS: Duration = Duration::from_millis(1);

/// The port of every server; they differ by their host.
const PORT: u16 = 38000;

/// How often a machine is told that time has passed, unless told otherwise.
pub const TICK: Duration = Duration::from_millis(10);

/// How often a disk that is synced only now and then is.
const LAZY_SYNC: Duration = Duration::from_millis(700);

/// A clock that starts anywhere and runs at its own rate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// What it shows when the world begins.
    pub origin: Duration,
    /// By how many millionths it is fast; negative when it is slow.
    pub fast_by: i64,
}

impl Clock {
    fn show(self, now: Time) -> Time {
        let micros = now.since(Time::default()).as_micros() as i64;
        let (seconds, rest) = (micros / 1_000_000, micros % 1_000_000);
        let shown = micros + seconds * self.fast_by + rest * self.fast_by / 1_000_000;
        Time::from_micros(shown as u64) + self.origin
    }
}

/// Names a client's request. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(pub u64);

/// How a client's request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With this reply, as JSON.
    Reply(String),
    /// The connection was closed without a reply.
    Closed,
    /// Nobody listens there: nothing was sent.
    NotSent,
}

/// What a server is started with.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// What it is called.
    pub name: &'a str,
    /// It listens on 10.0.0.HOST, where nobody else must be alive.
    pub host: u8,
    /// The index of its disk, which no other process must be using; a new disk
    /// without it.
    pub disk: Option<usize>,
    /// It draws its identity from a generator with this seed.
    pub seed: u64,
    /// Its clock.
    pub clock: Clock,
    /// Whether its disk, when it is a new one, is synced only now and then.
    pub lazy: bool,
    /// How much one message holds.
    pub batch: Batch,
    /// How long its leases are.
    pub lease: Duration,
}

/// Why a server or a viewleader has ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to leave, and has left.
    Left,
    /// Its disk failed.
    DiskFailed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    Paused,
    Dead,
}

/// A machine in its process.
struct Host<M> {
    machine: M,
    clock: Clock,
    state: State,
    /// What has come while it was paused.
    inbox: VecDeque<Event>,
}

impl<M> Host<M> {
    fn new(machine: M, clock: Clock) -> Self {
        Self { machine, clock, state: State::Up, inbox: VecDeque::new() }
    }
}

enum Event {
    Tick(Party),
    Arrival { from: Party, to: Party, lane: Lane, parcel: Parcel },
    Ended { rpc: Rpc, error: CallError },
    Stored { party: Party, life: usize, number: u64 },
    Room { at: usize, is_room: bool },
    Silent { rpc: Rpc, silence: Silence },
    FromClient { at: usize, client: ClientId, body: Vec<u8> },
}

/// One life of a server.
struct Member {
    host: Host<Server<Origin>>,
    name: String,
    address: SocketAddrV4,
    disk: usize,
    /// Who it says it is; nobody before its first heartbeat.
    id: Option<Identity>,
    /// When its disk is synced next, if that is only now and then.
    sync_at: Time,
}

/// All of it.
pub struct Cluster {
    now: Time,
    chance: Box<dyn Chance>,
    events: BTreeMap<(Time, u64), Event>,
    last_event: u64,
    network: Network,
    viewleaders: Vec<Viewleader>,
    /// Everything that viewleaders draw comes from this.
    view_seed: u64,
    /// Why viewleaders have ended that can't go on.
    broken: Vec<String>,
    servers: Vec<Member>,
    disks: Vec<Disk>,
    /// Whose disk each identity that was ever told is on.
    persons: BTreeMap<Identity, usize>,
    calls: BTreeMap<Rpc, Call>,
    last_rpc: Rpc,
    last_client: ClientId,
    /// Where the clients are that have no answer yet.
    clients: BTreeMap<ClientId, usize>,
    outcomes: Vec<(ClientId, Outcome)>,
    client_calls: BTreeMap<Rpc, ClientCall>,
    answers: Vec<(Rpc, Answered)>,
    view: sync::Arc<View>,
    /// With which viewleader a server stays, on each lane.
    stays: BTreeMap<(usize, Lane), SocketAddrV4>,
    /// The view as it crosses the network, once for all who ask for it.
    shown: Option<ShownView>,
    tick: Duration,
    /// The server that was stepped last, unless it was only told the time.
    stepped: Option<usize>,
    /// Who has ended by itself, and why.
    ended: Vec<(Party, End)>,
    /// Everything that has happened, in a number.
    digest: u64,
    /// What everything is called.
    pub names: Names,
    /// What happens, as lines.
    pub trace: Trace,
}

impl Cluster {
    /// A viewleader with an empty disk, and nobody else.
    pub fn new(chance: Box<dyn Chance>) -> Self {
        Self::with_viewleaders(chance, &[Clock::default()], 0)
    }

    /// A group of viewleaders with empty disks and these clocks, and nobody else. What
    /// they draw comes from `seed`.
    pub fn with_viewleaders(chance: Box<dyn Chance>, clocks: &[Clock], seed: u64) -> Self {
        let mut cluster = Self {
            now: Time::default(),
            chance,
            events: BTreeMap::new(),
            last_event: 0,
            network: Network::default(),
            viewleaders: Vec::new(),
            view_seed: seed,
            broken: Vec::new(),
            servers: Vec::new(),
            disks: Vec::new(),
            persons: BTreeMap::new(),
            calls: BTreeMap::new(),
            last_rpc: Rpc(0),
            last_client: ClientId(0),
            clients: BTreeMap::new(),
            outcomes: Vec::new(),
            client_calls: BTreeMap::new(),
            answers: Vec::new(),
            view: sync::Arc::default(),
            stays: BTreeMap::new(),
            shown: None,
            tick: TICK,
            stepped: None,
            ended: Vec::new(),
            digest: 0,
            names: Names::default(),
            trace: Trace::default(),
        };
        cluster.found(clocks);
        cluster
    }

    /// From now on, machines are told this often that time has passed.
    pub fn tick_every(&mut self, tick: Duration) {
        self.tick = tick;
    }

    /// A number that is the same for the same run, and hardly ever for two others.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// The server that the last event was about, unless that was a tick.
    pub fn stepped(&self) -> Option<usize> {
        self.stepped
    }

    /// Takes out who has ended by itself.
    pub fn ended(&mut self) -> Vec<(Party, End)> {
        std::mem::take(&mut self.ended)
    }

    /// The arcs that the server would answer reads of now: it takes itself for their
    /// primary, and its lease for live; and until when that runs on its clock.
    pub fn serves(&self, server: usize) -> (Vec<Arc>, Time) {
        let Member { host, .. } = &self.servers[server];
        let until = host.machine.leased_until();
        let is_leased = host.state != State::Dead && self.clock(server) < until;
        (host.machine.serves().filter(|_| is_leased).collect(), until)
    }

    /// Whether the server takes its lease for live.
    pub fn is_leased(&self, server: usize) -> bool {
        self.clock(server) < self.servers[server].host.machine.leased_until()
    }

    /// The server that lives and is this one.
    pub fn server_of(&self, id: &Identity) -> Option<usize> {
        let is_it =
            |member: &Member| member.host.state != State::Dead && member.id.as_ref() == Some(id);
        self.servers.iter().rposition(is_it)
    }

    /// What the server is called.
    pub fn name_of(&self, server: usize) -> &str {
        &self.servers[server].name
    }

    /// The reply of a server that has it at once.
    fn reply_at_once(&mut self, server: usize, body: &serde_json::Value) -> Option<String> {
        let client = self.ask(server, body);
        let ended = std::mem::take(&mut self.outcomes);
        ended.into_iter().find_map(|(id, outcome)| match outcome {
            Outcome::Reply(reply) if id == client => Some(reply),
            _ => None,
        })
    }

    /// Whether the server lists the key among those that it holds.
    pub fn lists(&mut self, server: usize, key: &str) -> bool {
        let query = serde_json::json!({"cmd": "query_all_keys"});
        let reply = self.reply_at_once(server, &query).unwrap_or_default();
        reply.contains(&format!("\"{key}\""))
    }

    /// What the server reads under the key, as its primary.
    pub fn read_at_primary(&mut self, server: usize, key: &str) -> Option<String> {
        self.reply_at_once(server, &serde_json::json!({"cmd": "getr", "key": key}))
    }

    /// The version of the key that the server takes for committed.
    pub fn committed(&self, server: usize, key: &str) -> Option<Version> {
        self.servers[server].host.machine.committed(key)
    }

    /// How many entries are pending at the server.
    pub fn pending(&self, server: usize) -> usize {
        self.servers[server].host.machine.pending()
    }

    /// Whether the server follows the latest view.
    pub fn is_up_to_date(&self, server: usize) -> bool {
        self.servers[server].host.machine.revision() == self.view.revision
    }

    /// Whether everything that the server has given to its disk is on it.
    pub fn has_stored_all(&self, server: usize) -> bool {
        self.disks[self.disk(server)].queued() == 0
    }

    /// Where the server listens, or listened.
    pub fn address(&self, server: usize) -> SocketAddrV4 {
        self.servers[server].address
    }

    /// What the server's clock shows.
    fn clock(&self, server: usize) -> Time {
        self.servers[server].host.clock.show(self.now)
    }

    /// The moment.
    pub fn now(&self) -> Time {
        self.now
    }

    /// The latest view that any viewleader has.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// How many lives of servers there have been.
    pub fn servers(&self) -> usize {
        self.servers.len()
    }

    /// Where the server listens, or listened: 10.0.0.HOST.
    pub fn host(&self, server: usize) -> u8 {
        self.servers[server].address.ip().octets()[3]
    }

    /// The server's disk.
    pub fn disk(&self, server: usize) -> usize {
        self.servers[server].disk
    }

    /// Whether the server has not been killed.
    pub fn is_alive(&self, server: usize) -> bool {
        self.servers[server].host.state != State::Dead
    }

    /// Whether the server runs: neither killed nor paused.
    pub fn is_up(&self, server: usize) -> bool {
        self.servers[server].host.state == State::Up
    }

    /// Who the server says it is; nobody before its first heartbeat.
    pub fn identity(&self, server: usize) -> Option<&Identity> {
        self.servers[server].id.as_ref()
    }

    /// Whose disk the identity is on.
    pub fn disk_of(&self, id: &Identity) -> Option<usize> {
        self.persons.get(id).copied()
    }

    /// Who has written to the disk, under whichever identity.
    pub fn writers_of(&self, disk: usize) -> impl Iterator<Item = &Identity> {
        self.persons.iter().filter(move |(_, at)| **at == disk).map(|(id, _)| id)
    }

    /// What the server is called.
    pub fn name(&self, party: Party) -> &str {
        match party {
            Party::Viewleader(site) => &self.viewleaders[site].name,
            Party::Server(index) => &self.servers[index].name,
            Party::Client(_) => "client",
        }
    }

    /// The party that is called `name`, in its last life.
    pub fn party(&self, name: &str) -> Option<Party> {
        let site = self.viewleaders.iter().position(|viewleader| viewleader.name == name);
        if let Some(site) = site {
            return Some(Party::Viewleader(site));
        }
        self.servers.iter().rposition(|server| server.name == name).map(Party::Server)
    }

    /// The version of the key that is on the disk, if it is there.
    pub fn stored_version(&self, disk: usize, key: &str) -> Option<Version> {
        let read = disk::read_version(self.disks[disk].store(), key);
        read.expect("a disk that servers have written")
    }

    /// The version of the key that is on the disk, if whoever starts over it in the seat
    /// that it has since then takes it for committed.
    pub fn sealed_version(&self, disk: usize, key: &str, since: Revision) -> Option<Version> {
        let version = self.stored_version(disk, key)?;
        let point = Point::of(key);
        let is_sealed = |seat: &Seat| {
            let is_it = seat.complete && seat.since == since && seat.arc().contains(point);
            is_it && version <= seat.committed
        };
        self.stored(disk).seats.iter().any(is_sealed).then_some(version)
    }

    /// Whether the disk is synced only now and then.
    pub fn is_lazy(&self, disk: usize) -> bool {
        self.disks[disk].is_lazy()
    }

    /// How many times a server was started over the disk, as that tells.
    pub fn starts(&self, disk: usize) -> u64 {
        self.stored(disk).person.starts
    }

    /// A copy of the disk, to be put back one day; its index.
    pub fn copy_disk(&mut self, disk: usize) -> usize {
        let copy = self.disks[disk].copy();
        self.disks.push(copy);
        self.disks.len() - 1
    }

    /// A disk on which a server has chosen its place, and nothing else; its index.
    pub fn disk_of_newcomer(&mut self, id: &str, lazy: bool) -> usize {
        let mut disk = if lazy { Disk::lazy() } else { Disk::default() };
        let person = Person { id: Some(Identity::text(id)), synced: true, ..Person::default() };
        disk.submit(vec![Record::Identity(person).into_change()], 1, self.now);
        disk.keep_up_to(1);
        disk.sync();
        self.disks.push(disk);
        self.disks.len() - 1
    }

    /// Everything on the disk.
    pub fn stored(&self, disk: usize) -> disk::Recovered {
        disk::recover(self.disks[disk].store()).expect("a disk that servers have written")
    }

    /// Starts a server and returns its index.
    pub fn start(&mut self, start: Start<'_>) -> usize {
        let Start { name, host, seed, clock, batch, lease, .. } = start;
        let address = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, host), PORT);
        assert!(self.index_at(address).is_none(), "somebody listens on {address}");
        let disk = start.disk.unwrap_or_else(|| {
            self.disks.push(if start.lazy { Disk::lazy() } else { Disk::default() });
            self.disks.len() - 1
        });
        self.names.address(address, name);
        let index = self.servers.len();
        let settings = Settings {
            address,
            lease,
            fetch_rate: DEFAULT_FETCH_RATE,
            synced: !self.disks[disk].is_lazy(),
            drawn: index as u64,
            batch,
        };
        let machine = Server::new(settings, self.stored(disk), StdRng::seed_from_u64(seed));
        let host = Host::new(machine, clock);
        let (name, sync_at) = (name.to_owned(), self.now + LAZY_SYNC);
        self.servers.push(Member { host, name, address, disk, id: None, sync_at });
        self.at(self.now, Event::Tick(Party::Server(index)));
        index
    }

    /// Ends a process. Whoever waits for it learns so; what it has sent already
    /// still arrives.
    pub fn kill(&mut self, party: Party) {
        if *self.state_mut(party) == State::Dead {
            return;
        }
        *self.state_mut(party) = State::Dead;
        self.inbox_mut(party).clear();
        let queued = self.disk_mut(party).queued();
        let kept = self.chance.kept(queued);
        self.disk_mut(party).crash(kept);
        self.calls.retain(|_, call| call.caller != party);
        if let Party::Server(index) = party {
            let clients = self.clients.iter().filter(|(_, at)| **at == index);
            for client in clients.map(|(client, _)| *client).collect::<Vec<_>>() {
                self.end(client, Outcome::Closed);
            }
        }
        let broken = self.calls.iter().filter(|(_, call)| call.callee == Some(party));
        for rpc in broken.map(|(rpc, _)| *rpc).collect::<Vec<_>>() {
            self.at(self.now + BAD_NEWS, Event::Ended { rpc, error: CallError::Lost });
        }
        let broken = self.client_calls.iter().filter(|(_, call)| call.callee == Some(party));
        for rpc in broken.map(|(rpc, _)| *rpc).collect::<Vec<_>>() {
            self.at(self.now + BAD_NEWS, Event::Silent { rpc, silence: Silence::Closed });
        }
    }

    /// The machine of the server loses its power: the process dies, and its disk
    /// keeps what was synced, and maybe more.
    pub fn fail_power(&mut self, server: usize) {
        self.kill(Party::Server(server));
        let disk = self.servers[server].disk;
        let kept = self.chance.kept(self.disks[disk].unsynced());
        self.disks[disk].lose_power(kept);
    }

    /// Stops a process, as a debugger or an overloaded host does. The world goes
    /// on; what it is sent waits.
    pub fn pause(&mut self, party: Party) {
        let state = self.state_mut(party);
        if *state == State::Up {
            *state = State::Paused;
        }
    }

    /// Lets a paused process go on. It finds what has come meanwhile.
    pub fn resume(&mut self, party: Party) {
        let state = self.state_mut(party);
        if *state != State::Paused {
            return;
        }
        *state = State::Up;
        for event in std::mem::take(self.inbox_mut(party)) {
            self.at(self.now, event);
        }
    }

    /// A client sends `body` to a server and waits.
    pub fn ask(&mut self, server: usize, body: &serde_json::Value) -> ClientId {
        self.last_client.0 += 1;
        let client = self.last_client;
        self.clients.insert(client, server);
        if self.is_alive(server) {
            let body = body.to_string().into_bytes();
            self.handle(Event::FromClient { at: server, client, body });
        } else {
            self.end(client, Outcome::NotSent);
        }
        client
    }

    /// Takes out which requests of clients have ended since, and how.
    pub fn outcomes(&mut self) -> Vec<(ClientId, Outcome)> {
        std::mem::take(&mut self.outcomes)
    }

    /// Lets the earliest event happen.
    pub fn step(&mut self) {
        let Some(((at, number), event)) = self.events.pop_first() else { return };
        self.now = self.now.max(at);
        self.stepped = None;
        self.mix(number);
        self.handle(event);
    }

    /// Lets the time pass until `end`, before which nothing happens.
    pub fn wait_until(&mut self, end: Time) {
        self.now = self.now.max(end);
        self.stepped = None;
    }

    /// When the earliest event happens.
    pub fn next_event(&self) -> Time {
        self.events.first_key_value().map_or(self.now, |((at, _), _)| *at)
    }

    /// Makes `number` and the moment part of the digest (FNV-1a, by words).
    fn mix(&mut self, number: u64) {
        let micros = self.now.since(Time::default()).as_micros() as u64;
        for word in [micros, number] {
            self.digest = (self.digest ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
        }
    }

    /// Lets everything happen that happens until `end`.
    pub fn run_until(&mut self, end: Time) {
        while self.events.first_key_value().is_some_and(|((at, _), _)| *at <= end) {
            self.step();
        }
        self.now = self.now.max(end);
    }

    fn at(&mut self, time: Time, event: Event) {
        self.last_event += 1;
        self.events.insert((time, self.last_event), event);
    }

    fn state_mut(&mut self, party: Party) -> &mut State {
        match party {
            Party::Viewleader(site) => &mut self.viewleaders[site].host.state,
            Party::Server(index) => &mut self.servers[index].host.state,
            Party::Client(_) => unreachable!("clients are no processes of the cluster"),
        }
    }

    fn inbox_mut(&mut self, party: Party) -> &mut VecDeque<Event> {
        match party {
            Party::Viewleader(site) => &mut self.viewleaders[site].host.inbox,
            Party::Server(index) => &mut self.servers[index].host.inbox,
            Party::Client(_) => unreachable!("clients are no processes of the cluster"),
        }
    }

    fn disk_mut(&mut self, party: Party) -> &mut Disk {
        match party {
            Party::Viewleader(site) => &mut self.viewleaders[site].disk,
            Party::Server(index) => &mut self.disks[self.servers[index].disk],
            Party::Client(_) => unreachable!("clients have no disk"),
        }
    }

    /// Tells one life of `party` from another.
    fn life(&self, party: Party) -> usize {
        match party {
            Party::Viewleader(site) => self.viewleaders[site].life,
            Party::Server(index) | Party::Client(index) => index,
        }
    }

    fn index_at(&self, address: SocketAddrV4) -> Option<usize> {
        let alive = |server: &Member| server.host.state != State::Dead;
        self.servers.iter().rposition(|server| server.address == address && alive(server))
    }

    /// Who lives and listens at `address`.
    fn party_at(&self, address: SocketAddrV4) -> Option<Party> {
        let alive = |it: &Viewleader| it.address == address && it.host.state != State::Dead;
        let viewleader = self.viewleaders.iter().position(alive).map(Party::Viewleader);
        viewleader.or_else(|| self.index_at(address).map(Party::Server))
    }

    /// A message of these words, as one line.
    fn words(&self, from: Party, to: Party, words: &str) -> String {
        let name = |party| match party {
            Party::Client(number) => format!("client {number}"),
            party => self.name(party).to_owned(),
        };
        format!("{} -> {} {words}", name(from), name(to))
    }

    fn note(&mut self, about: About, line: impl FnOnce(&Self) -> String) {
        if self.trace.is_on {
            let line = line(self);
            self.trace.line(about, line);
        }
    }

    /// Whom the event concerns; nobody when it is about a call that has ended or
    /// a life that is over.
    fn concerned(&self, event: &Event) -> Option<Party> {
        match event {
            Event::Tick(party) => Some(*party),
            Event::Arrival { to, .. } => Some(*to),
            Event::Ended { rpc, .. } => self.calls.get(rpc).map(|call| call.caller),
            Event::Stored { party, life, .. } => (self.life(*party) == *life).then_some(*party),
            Event::FromClient { at, .. } | Event::Room { at, .. } => Some(Party::Server(*at)),
            Event::Silent { .. } => None,
        }
    }

    fn handle(&mut self, event: Event) {
        let event = match event {
            Event::Silent { rpc, silence } => return self.client_answered(rpc, Err(silence)),
            Event::Arrival { to: Party::Client(_), parcel, .. } => {
                return self.client_is_sent(parcel);
            }
            event => event,
        };
        let Some(party) = self.concerned(&event) else { return };
        match (*self.state_mut(party), event) {
            (State::Dead, Event::Arrival { parcel, .. }) => {
                let (rpc, error) = (parcel.rpc, CallError::Lost);
                self.at(self.now + BAD_NEWS, Event::Ended { rpc, error });
                self.at(self.now + BAD_NEWS, Event::Silent { rpc, silence: Silence::Closed });
            }
            // One tick of a viewleader goes on through all of its lives.
            (State::Dead, Event::Tick(Party::Viewleader(_))) => self.tick_again(party),
            (State::Dead, _) => {}
            (State::Paused, Event::Tick(_)) => self.tick_again(party),
            (State::Paused, event) => self.inbox_mut(party).push_back(event),
            (State::Up, event) => self.happen(event),
        }
    }
}
