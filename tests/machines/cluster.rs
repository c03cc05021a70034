//! A cluster in one thread: one viewleader, servers, clients, a virtual clock.
//!
//! The machines are the real ones; this is one more shell around them. It is an
//! event loop: the earliest event is taken, the machine that it concerns is
//! stepped, and what that machine asks for becomes later events (`shells`).
//! Nothing in it depends on the machine that it runs on, so the same calls give
//! the same run.
//!
//! What it keeps of the real shells, because the machines rely on it:
//!
//! * what is said crosses as JSON and is decoded by the other side;
//! * calls to one server arrive in their order, and every call ends: with its
//!   answer, as not sent (nobody listens), or as lost (too late, or whoever was
//!   asked has died);
//! * a process writes to a disk, which stores its batches in their order, tells it
//!   when one is stored, and outlives it;
//! * a machine is told every few milliseconds that time has passed.
//!
//! What it adds: each machine's clock has an origin and a rate of its own; a
//! process can be killed and started again over its disk, or paused so that the
//! world goes on without it.

mod shells;

use super::chance::Chance;
use super::disk::Disk;
use super::names::Names;
use super::network::{Lane, Network, Parcel, Party, Rpc};
use super::trace::{About, Trace};
use rand::SeedableRng;
use rand::rngs::StdRng;
use ringleader::kv::disk;
use ringleader::kv::server::{CallError, DEFAULT_FETCH_RATE, DEFAULT_LEASE, Server, Settings};
use ringleader::machine::Time;
use ringleader::view::View;
use ringleader::view::leader::{Leader, Worker};
use ringleader::view::log;
use ringleader::wire::Identity;
use shells::{Call, Origin, ViewOrigin};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

/// How soon a caller learns that nobody listens, or that the other side died.
const BAD_NEWS: Duration = Duration::from_millis(1);

/// The port of every server; they differ by their host.
const PORT: u16 = 38000;

/// A clock that starts anywhere and runs at its own rate.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Clock {
    /// What it shows when the world begins.
    pub(crate) origin: Duration,
    /// By how many millionths it is fast; negative when it is slow.
    pub(crate) fast_by: i64,
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
pub(crate) struct ClientId(pub(crate) u64);

/// How a client's request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With this reply, as JSON.
    Reply(String),
    /// The connection was closed without a reply.
    Closed,
    /// Nobody listens there: nothing was sent.
    NotSent,
}

/// What a server is started with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start<'a> {
    /// What it is called.
    pub(crate) name: &'a str,
    /// It listens on 10.0.0.HOST, where nobody else must be alive.
    pub(crate) host: u8,
    /// The index of its disk, which no other process must be using; a new disk
    /// without it.
    pub(crate) disk: Option<usize>,
    /// It draws its identity from a generator with this seed.
    pub(crate) seed: u64,
    /// Its clock.
    pub(crate) clock: Clock,
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
}

/// The one life of the viewleader that is lived now.
struct Viewleader {
    host: Host<Leader<ViewOrigin>>,
    disk: Disk,
    /// When it was stepped last.
    stepped: Time,
    workers: BTreeSet<Worker>,
    /// The index up to which its log is compacted.
    compacted: u64,
    /// Tells this life from the ones before.
    life: usize,
}

/// All of it.
pub(crate) struct Cluster {
    now: Time,
    chance: Box<dyn Chance>,
    events: BTreeMap<(Time, u64), Event>,
    last_event: u64,
    network: Network,
    viewleader: Viewleader,
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
    view: Arc<View>,
    pub(crate) names: Names,
    pub(crate) trace: Trace,
}

impl Cluster {
    /// A viewleader with an empty disk, and nobody else.
    pub(crate) fn new(chance: Box<dyn Chance>) -> Self {
        let mut cluster = Self {
            now: Time::default(),
            chance,
            events: BTreeMap::new(),
            last_event: 0,
            network: Network::default(),
            viewleader: Viewleader::over(Disk::default(), Time::default(), 0),
            servers: Vec::new(),
            disks: Vec::new(),
            persons: BTreeMap::new(),
            calls: BTreeMap::new(),
            last_rpc: Rpc(0),
            last_client: ClientId(0),
            clients: BTreeMap::new(),
            outcomes: Vec::new(),
            view: Arc::default(),
            names: Names::default(),
            trace: Trace::default(),
        };
        cluster.at(cluster.now, Event::Tick(Party::Viewleader));
        cluster
    }

    /// The moment.
    pub(crate) fn now(&self) -> Time {
        self.now
    }

    /// The view as the viewleader has it.
    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// How many lives of servers there have been.
    pub(crate) fn servers(&self) -> usize {
        self.servers.len()
    }

    /// Where the server listens, or listened: 10.0.0.HOST.
    pub(crate) fn host(&self, server: usize) -> u8 {
        self.servers[server].address.ip().octets()[3]
    }

    /// The server's disk.
    pub(crate) fn disk(&self, server: usize) -> usize {
        self.servers[server].disk
    }

    /// Whether the server has not been killed.
    pub(crate) fn is_alive(&self, server: usize) -> bool {
        self.servers[server].host.state != State::Dead
    }

    /// Whether the server runs: neither killed nor paused.
    pub(crate) fn is_up(&self, server: usize) -> bool {
        self.servers[server].host.state == State::Up
    }

    /// Who the server says it is; nobody before its first heartbeat.
    pub(crate) fn identity(&self, server: usize) -> Option<&Identity> {
        self.servers[server].id.as_ref()
    }

    /// Whose disk the identity is on.
    pub(crate) fn disk_of(&self, id: &Identity) -> Option<usize> {
        self.persons.get(id).copied()
    }

    /// Whether the viewleader runs.
    pub(crate) fn has_viewleader(&self) -> bool {
        self.viewleader.host.state == State::Up
    }

    /// What the server is called.
    pub(crate) fn name(&self, party: Party) -> &str {
        match party {
            Party::Viewleader => "viewleader",
            Party::Server(index) => &self.servers[index].name,
        }
    }

    /// The party that is called `name`, in its last life.
    pub(crate) fn party(&self, name: &str) -> Option<Party> {
        if name == "viewleader" {
            return Some(Party::Viewleader);
        }
        self.servers.iter().rposition(|server| server.name == name).map(Party::Server)
    }

    /// Everything on the disk.
    pub(crate) fn stored(&self, disk: usize) -> disk::Recovered {
        disk::recover(self.disks[disk].store()).expect("a disk that servers have written")
    }

    /// Starts a server and returns its index.
    pub(crate) fn start(&mut self, start: Start<'_>) -> usize {
        let Start { name, host, seed, clock, .. } = start;
        let address = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, host), PORT);
        assert!(self.index_at(address).is_none(), "somebody listens on {address}");
        let disk = start.disk.unwrap_or_else(|| {
            self.disks.push(Disk::default());
            self.disks.len() - 1
        });
        self.names.address(address, name);
        let index = self.servers.len();
        let settings = Settings {
            address,
            lease: DEFAULT_LEASE,
            fetch_rate: DEFAULT_FETCH_RATE,
            synced: true,
            drawn: index as u64,
        };
        let machine = Server::new(settings, self.stored(disk), StdRng::seed_from_u64(seed));
        let host = Host::new(machine, clock);
        self.servers.push(Member { host, name: name.to_owned(), address, disk, id: None });
        self.at(self.now, Event::Tick(Party::Server(index)));
        index
    }

    /// Starts the viewleader again over its disk.
    pub(crate) fn start_viewleader(&mut self) {
        self.kill(Party::Viewleader);
        let disk = std::mem::take(&mut self.viewleader.disk);
        self.viewleader = Viewleader::over(disk, self.now, self.viewleader.life + 1);
        self.view = Arc::default();
    }

    /// The viewleader dies, its disk with it, and another one takes its place.
    pub(crate) fn replace_viewleader(&mut self) {
        self.kill(Party::Viewleader);
        self.viewleader.disk = Disk::default();
        self.start_viewleader();
    }

    /// Ends a process. Whoever waits for it learns so; what it has sent already
    /// still arrives.
    pub(crate) fn kill(&mut self, party: Party) {
        if *self.state_mut(party) == State::Dead {
            return;
        }
        *self.state_mut(party) = State::Dead;
        self.inbox_mut(party).clear();
        let queued = self.disk_mut(party).queued();
        let kept = self.chance.kept(queued);
        self.disk_mut(party).crash(kept);
        if let Party::Server(index) = party {
            self.calls.retain(|_, call| call.caller != index);
            let clients = self.clients.iter().filter(|(_, at)| **at == index);
            for client in clients.map(|(client, _)| *client).collect::<Vec<_>>() {
                self.end(client, Outcome::Closed);
            }
        }
        let broken = self.calls.iter().filter(|(_, call)| call.callee == party);
        for rpc in broken.map(|(rpc, _)| *rpc).collect::<Vec<_>>() {
            self.at(self.now + BAD_NEWS, Event::Ended { rpc, error: CallError::Lost });
        }
    }

    /// Stops a process, as a debugger or an overloaded host does. The world goes
    /// on; what it is sent waits.
    pub(crate) fn pause(&mut self, party: Party) {
        let state = self.state_mut(party);
        if *state == State::Up {
            *state = State::Paused;
        }
    }

    /// Lets a paused process go on. It finds what has come meanwhile.
    pub(crate) fn resume(&mut self, party: Party) {
        let state = self.state_mut(party);
        if *state != State::Paused {
            return;
        }
        *state = State::Up;
        for event in std::mem::take(self.inbox_mut(party)) {
            self.at(self.now, event);
        }
    }

    /// Loses everything from and to `party` from now on.
    pub(crate) fn cut_off(&mut self, party: Party) {
        self.network.cut_off(party);
    }

    /// Ends that.
    pub(crate) fn heal(&mut self, party: Party) {
        self.network.heal(party);
    }

    /// From now on, what `from` sends to `to` waits; or only what it sends on one
    /// lane.
    pub(crate) fn hold(&mut self, from: Party, to: Party, only: Option<Lane>) {
        self.network.hold(from, to, only);
    }

    /// What `from` sends to `to` waits no more, nor does what has waited.
    pub(crate) fn release(&mut self, from: Party, to: Party) {
        for (lane, parcel) in self.network.release(from, to) {
            self.at(self.now, Event::Arrival { from, to, lane, parcel });
        }
    }

    /// Lets up to `count` messages through of those that wait and have `words` in
    /// them.
    pub(crate) fn deliver(&mut self, from: Party, to: Party, count: usize, words: &str) {
        let Some(waiting) = self.network.waiting(from, to) else { return };
        let (mut through, mut rest) = (Vec::new(), Vec::new());
        for (lane, parcel) in std::mem::take(waiting) {
            let is_wanted = through.len() < count && parcel.words.contains(words);
            if is_wanted { &mut through } else { &mut rest }.push((lane, parcel));
        }
        *waiting = rest;
        for (lane, parcel) in through {
            self.at(self.now, Event::Arrival { from, to, lane, parcel });
        }
    }

    /// Puts a copy behind each of what waits.
    pub(crate) fn duplicate(&mut self, from: Party, to: Party) {
        let Some(waiting) = self.network.waiting(from, to) else { return };
        *waiting = waiting.iter().flat_map(|parcel| [parcel.clone(), parcel.clone()]).collect();
    }

    /// Loses what waits. Only a time-out tells whoever sent it.
    pub(crate) fn drop_waiting(&mut self, from: Party, to: Party) {
        if let Some(waiting) = self.network.waiting(from, to) {
            waiting.clear();
        }
    }

    /// What waits from `from` to `to`, in words.
    pub(crate) fn waiting(&mut self, from: Party, to: Party) -> Vec<String> {
        let waiting = self.network.waiting(from, to).map(std::mem::take).unwrap_or_default();
        let words = waiting.iter().map(|(_, parcel)| self.words(from, to, &parcel.words)).collect();
        if let Some(place) = self.network.waiting(from, to) {
            *place = waiting;
        }
        words
    }

    /// From now on, what `party` writes does not reach its disk.
    pub(crate) fn hold_disk(&mut self, party: Party) {
        self.disk_mut(party).hold();
    }

    /// Now it does, and what has waited, too.
    pub(crate) fn release_disk(&mut self, party: Party) {
        if let Some(number) = self.disk_mut(party).release() {
            let life = self.life(party);
            self.at(self.now, Event::Stored { party, life, number });
        }
    }

    /// The server's disk has no room: nothing that it writes is stored, and it is
    /// told so.
    pub(crate) fn fill_disk(&mut self, server: usize) {
        self.hold_disk(Party::Server(server));
        self.handle(Event::Room { at: server, is_room: false });
    }

    /// The server's disk has room again.
    pub(crate) fn clear_disk(&mut self, server: usize) {
        self.handle(Event::Room { at: server, is_room: true });
        self.release_disk(Party::Server(server));
    }

    /// A client sends `body` to a server and waits.
    pub(crate) fn ask(&mut self, server: usize, body: &serde_json::Value) -> ClientId {
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
    pub(crate) fn outcomes(&mut self) -> Vec<(ClientId, Outcome)> {
        std::mem::take(&mut self.outcomes)
    }

    /// Lets the earliest event happen.
    pub(crate) fn step(&mut self) {
        let Some(((at, _), event)) = self.events.pop_first() else { return };
        self.now = self.now.max(at);
        self.handle(event);
    }

    /// Lets everything happen that happens until `end`.
    pub(crate) fn run_until(&mut self, end: Time) {
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
            Party::Viewleader => &mut self.viewleader.host.state,
            Party::Server(index) => &mut self.servers[index].host.state,
        }
    }

    fn inbox_mut(&mut self, party: Party) -> &mut VecDeque<Event> {
        match party {
            Party::Viewleader => &mut self.viewleader.host.inbox,
            Party::Server(index) => &mut self.servers[index].host.inbox,
        }
    }

    fn disk_mut(&mut self, party: Party) -> &mut Disk {
        match party {
            Party::Viewleader => &mut self.viewleader.disk,
            Party::Server(index) => &mut self.disks[self.servers[index].disk],
        }
    }

    /// Tells one life of `party` from another.
    fn life(&self, party: Party) -> usize {
        match party {
            Party::Viewleader => self.viewleader.life,
            Party::Server(index) => index,
        }
    }

    fn index_at(&self, address: SocketAddrV4) -> Option<usize> {
        let alive = |server: &Member| server.host.state != State::Dead;
        self.servers.iter().rposition(|server| server.address == address && alive(server))
    }

    /// A message of these words, as one line.
    fn words(&self, from: Party, to: Party, words: &str) -> String {
        format!("{} -> {} {words}", self.name(from), self.name(to))
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
            Event::Ended { rpc, .. } => self.calls.get(rpc).map(|call| Party::Server(call.caller)),
            Event::Stored { party, life, .. } => (self.life(*party) == *life).then_some(*party),
            Event::FromClient { at, .. } | Event::Room { at, .. } => Some(Party::Server(*at)),
        }
    }

    fn handle(&mut self, event: Event) {
        let Some(party) = self.concerned(&event) else { return };
        match (*self.state_mut(party), event) {
            (State::Dead, Event::Arrival { parcel, .. }) => {
                let (rpc, error) = (parcel.rpc, CallError::Lost);
                self.at(self.now + BAD_NEWS, Event::Ended { rpc, error });
            }
            // One tick of the viewleader goes on through all of its lives.
            (State::Dead, Event::Tick(Party::Viewleader)) => self.tick_again(party),
            (State::Dead, _) => {}
            (State::Paused, Event::Tick(_)) => self.tick_again(party),
            (State::Paused, event) => self.inbox_mut(party).push_back(event),
            (State::Up, event) => self.happen(event),
        }
    }
}

impl Viewleader {
    /// A life of the viewleader that goes on with what is on `disk`.
    fn over(disk: Disk, now: Time, life: usize) -> Self {
        let recovered = log::recover(disk.store()).expect("a disk that a viewleader has written");
        let machine = Leader::new(now, recovered.state, recovered.index);
        Self {
            host: Host::new(machine, Clock::default()),
            disk,
            stepped: now,
            workers: BTreeSet::new(),
            compacted: recovered.compacted,
            life,
        }
    }
}
