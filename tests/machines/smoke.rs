//! Runs of random chance: faults of every kind, and clients all along.
//!
//! Everything about a run comes from its seed. It has three phases. In the first
//! one, clients write and read while servers and the viewleader crash and are
//! started again, stand still, are cut off, run out of disk, join, are told to leave,
//! or are lost with their disks; the [`Oracle`] watches what clients see. In the second,
//! everything that was there is there again and runs undisturbed: it must come to
//! rest, with every key on exactly the servers of its target, on their disks as
//! well, and readable from each server. In the third, which some runs have, all of
//! it loses power at once; afterwards it must come to rest with the same data.
//!
//! A disk is lost for good only while each group has a healthy ready replica
//! elsewhere, and nothing else happens until the others have noticed: what
//! happens when all disks of a group are lost is another story, which the scripts
//! tell.

use super::chance::Chance;
use super::cluster::{ClientId, Clock, Cluster, Outcome, Start};
use super::network::{Lane, Party, Way};
use super::oracle::{Begun, Oracle, Version};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ringleader::kv::ring::Point;
use ringleader::machine::Time;
use ringleader::wire::Identity;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// How many keys there are; one client writes each.
const KEYS: usize = 5;

/// How many clients read.
const READERS: usize = 8;

/// How long there are clients and faults.
const BUSY: Duration = Duration::from_secs(25);

/// How soon after the last fault everything must be at rest.
const TO_REST: Duration = Duration::from_secs(60);

/// After this long, a client takes its request for lost.
const CLIENT_PATIENCE: Duration = Duration::from_secs(15);

/// Whoever was away has renewed its lease after so long, or has lost it.
const SHAKY: Duration = Duration::from_secs(3);

/// After a disk was lost, it takes so long until the others have noticed.
const QUIET: Duration = Duration::from_secs(6);

/// The most servers that there are at a time.
const MAX_SERVERS: usize = 7;

#[derive(Clone, Copy, Debug)]
enum Doing {
    Writing { value: u64 },
    Reading,
}

/// A request that is under way.
#[derive(Debug)]
struct Request {
    client: usize,
    key: String,
    doing: Doing,
    begun: Begun,
    until: Time,
}

/// One client, with one request at a time.
#[derive(Debug)]
struct Client {
    /// The key that it writes; a reader has none.
    writes: Option<String>,
    /// How long it pauses between two requests at most, in milliseconds.
    thinks_ms: u64,
    /// When it stops.
    stops: Time,
    /// When it begins the next one; `None` while one is under way.
    next: Option<Time>,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    /// A server dies, and is started again over its disk a while later.
    Crash,
    /// A server is lost with its disk.
    Lose,
    /// A server is lost with its disk, and another one takes its address.
    Replace,
    /// A server stands still for a while.
    Pause,
    /// A server is cut off for a while, and does not know it.
    Cut,
    /// A server's disk has no room for a while.
    Fill,
    /// A server is added.
    Join,
    /// A server is told to leave.
    Drain,
    /// The viewleader dies, and is started again a while later.
    CrashViewleader,
    /// The viewleader stands still for a while.
    PauseViewleader,
}

/// How much was done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) written: usize,
    pub(crate) read: usize,
    pub(crate) refused: usize,
    pub(crate) unknown: usize,
    pub(crate) faults: usize,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.written += other.written;
        self.read += other.read;
        self.refused += other.refused;
        self.unknown += other.unknown;
        self.faults += other.faults;
    }
}

/// What has happened to a party, to be undone at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Down,
    Paused,
    Cut,
    Full,
}

struct Run {
    cluster: Cluster,
    rng: StdRng,
    oracle: Oracle,
    clients: Vec<Client>,
    requests: BTreeMap<ClientId, Request>,
    last_value: u64,
    /// Who is in trouble, and until when. A server by its last life.
    troubles: BTreeMap<Party, (Trouble, Time)>,
    /// Who was in trouble just now, and may lose its lease yet, by disk.
    shaky: BTreeMap<usize, Time>,
    /// No other faults until then.
    quiet_until: Time,
    /// Which addresses the lost have left.
    vacant: Vec<u8>,
    tally: Tally,
    narrate: bool,
}

/// One run; `narrate` prints its trace.
///
/// # Errors
/// What went wrong, and when.
pub(crate) fn run(seed: u64, narrate: bool) -> Result<Tally, String> {
    let mut run = Run::new(seed, narrate);
    let outcome = run.be_busy().and_then(|()| run.come_to_rest()).and_then(|()| {
        if run.rng.random_bool(0.3) {
            run.lose_power().and_then(|()| run.come_to_rest())
        } else {
            Ok(())
        }
    });
    let now = run.cluster.now();
    outcome.map(|()| run.tally).map_err(|what| format!("seed {seed} at {now}: {what}"))
}

impl Run {
    fn new(seed: u64, narrate: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut cluster = Cluster::new(Box::new(Random::new(&mut rng)));
        cluster.trace.is_on = narrate;
        cluster.trace.with_groups = true;
        let writers = (0..KEYS).map(|key| Some(format!("key{key}")));
        let clients = writers.chain((0..READERS).map(|_| None));
        let start = Time::from_millis(1000);
        let clients = clients.map(|writes| Client {
            writes,
            thinks_ms: 10f64.powf(rng.random_range(1.0..3.3)) as u64,
            stops: Time::from_millis(rng.random_range(5000..BUSY.as_millis() as u64)),
            next: Some(start),
        });
        let clients = clients.collect();
        let mut run = Self {
            cluster,
            rng,
            oracle: Oracle::default(),
            clients,
            requests: BTreeMap::new(),
            last_value: 0,
            troubles: BTreeMap::new(),
            shaky: BTreeMap::new(),
            quiet_until: Time::default(),
            vacant: Vec::new(),
            tally: Tally::default(),
            narrate,
        };
        for _ in 0..run.rng.random_range(1..=5) {
            run.join();
        }
        run
    }

    fn clock(&mut self) -> Clock {
        Clock {
            origin: Duration::from_secs(self.rng.random_range(0..1000)),
            fast_by: self.rng.random_range(-5000..=5000),
        }
    }

    /// Starts a new server, on a vacant address or on a new one.
    fn join(&mut self) {
        let number = self.cluster.servers() + 1;
        let host = if self.vacant.is_empty() || self.rng.random_bool(0.5) {
            100 + number as u8
        } else {
            self.vacant.remove(self.rng.random_range(0..self.vacant.len()))
        };
        let (clock, seed) = (self.clock(), self.rng.random());
        let name = format!("s{number}");
        self.cluster.start(Start { name: &name, host, disk: None, seed, clock });
    }

    /// Starts a server that has died again, over its disk.
    fn start_again(&mut self, server: usize) {
        let (host, disk) = (self.cluster.host(server), self.cluster.disk(server));
        let name = self.cluster.name(Party::Server(server)).to_owned();
        let (clock, seed) = (self.clock(), self.rng.random());
        self.cluster.start(Start { name: &name, host, disk: Some(disk), seed, clock });
        self.shaky.insert(disk, self.cluster.now() + SHAKY);
    }

    /// Clients and faults.
    fn be_busy(&mut self) -> Result<(), String> {
        let end = Time::default() + BUSY;
        let count = self.rng.random_range(0..=12);
        let moments = 1000..BUSY.as_millis() as u64;
        let mut faults: Vec<Time> =
            (0..count).map(|_| Time::from_millis(self.rng.random_range(moments.clone()))).collect();
        faults.sort_unstable();
        faults.reverse();
        while self.cluster.now() < end {
            self.step()?;
            self.undo(false);
            while faults.last().is_some_and(|time| *time <= self.cluster.now()) {
                faults.pop();
                self.do_harm();
            }
            self.ask()?;
        }
        self.undo(true);
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        self.cluster.step();
        if self.narrate {
            let text = self.cluster.trace.take();
            for line in text.lines() {
                println!("{} {line}", self.cluster.now());
            }
        }
        self.take_outcomes()
    }

    fn say(&mut self, what: &str) {
        if self.narrate {
            println!("{} *** {what}", self.cluster.now());
        }
    }

    fn alive(&self) -> Vec<usize> {
        (0..self.cluster.servers()).filter(|server| self.cluster.is_alive(*server)).collect()
    }

    /// How many servers there are, or will be again.
    fn count(&self) -> usize {
        let down = self.troubles.iter().filter(|(party, (trouble, _))| {
            matches!(party, Party::Server(_)) && *trouble == Trouble::Down
        });
        self.alive().len() + down.count()
    }

    /// Whether every group keeps a healthy ready replica of its target, or one
    /// that held it last, without the disk of `victim`.
    fn can_spare(&self, victim: usize) -> bool {
        let (view, victim) = (self.cluster.view(), self.cluster.disk(victim));
        let healthy = |id: &Identity| {
            self.alive().into_iter().any(|server| {
                let disk = self.cluster.disk(server);
                let is_well = self.cluster.is_up(server) && !self.shaky.contains_key(&disk);
                is_well && disk != victim && self.cluster.identity(server) == Some(id)
            })
        };
        let is_there = |id: &Identity| {
            let disk = self.cluster.disk_of(id);
            disk != Some(victim)
                && self.alive().into_iter().any(|server| Some(self.cluster.disk(server)) == disk)
        };
        let kept = view.groups.iter().all(|group| {
            let target = view.target_of(group.start);
            if group.is_lost() {
                group.held_by.iter().any(|holder| is_there(&holder.id))
            } else {
                target.iter().any(|id| group.ready.contains(id) && healthy(id))
            }
        });
        !view.groups.is_empty() && kept && self.cluster.has_viewleader()
    }

    fn do_harm(&mut self) {
        let alive = self.alive();
        if self.cluster.now() < self.quiet_until || alive.is_empty() {
            return;
        }
        let victim = alive[self.rng.random_range(0..alive.len())];
        let party = Party::Server(victim);
        let fault = match self.rng.random_range(0..24) {
            0..6 => Fault::Crash,
            6..8 => Fault::Lose,
            8..9 => Fault::Replace,
            9..12 => Fault::Pause,
            12..15 => Fault::Cut,
            15..16 => Fault::Fill,
            16..20 => Fault::Join,
            20..21 => Fault::Drain,
            21..23 => Fault::CrashViewleader,
            _ => Fault::PauseViewleader,
        };
        let span = Duration::from_millis(self.rng.random_range(50..9000));
        let is_free = !self.troubles.contains_key(&party);
        let is_viewleader_free = !self.troubles.contains_key(&Party::Viewleader);
        self.say(&format!("{fault:?} of {}, {span:?}", self.cluster.name(party)));
        match fault {
            Fault::Join if self.count() < MAX_SERVERS => self.join(),
            Fault::Crash if is_free => {
                self.cluster.kill(party);
                self.is_in_trouble_for(party, Trouble::Down, span);
            }
            Fault::Lose | Fault::Replace if is_free && self.can_spare(victim) => {
                self.cluster.kill(party);
                self.vacant.push(self.cluster.host(victim));
                self.quiet_until = self.cluster.now() + QUIET;
                if matches!(fault, Fault::Replace) {
                    self.join();
                }
            }
            Fault::Pause if is_free => {
                self.cluster.pause(party);
                self.is_in_trouble_for(party, Trouble::Paused, span);
            }
            Fault::Cut if is_free => {
                self.cluster.cut_off(party);
                self.is_in_trouble_for(party, Trouble::Cut, span);
            }
            Fault::Fill if is_free => {
                self.cluster.fill_disk(victim);
                self.is_in_trouble_for(party, Trouble::Full, span);
            }
            Fault::Drain if self.count() > 3 && self.cluster.has_viewleader() => {
                self.cluster.drain(victim);
            }
            Fault::CrashViewleader if is_viewleader_free => {
                self.cluster.kill(Party::Viewleader);
                self.is_in_trouble_for(Party::Viewleader, Trouble::Down, span / 2);
            }
            Fault::PauseViewleader if is_viewleader_free => {
                self.cluster.pause(Party::Viewleader);
                self.is_in_trouble_for(Party::Viewleader, Trouble::Paused, span);
            }
            _ => return self.say("not now"),
        }
        self.tally.faults += 1;
    }

    fn is_in_trouble_for(&mut self, party: Party, trouble: Trouble, span: Duration) {
        let end = self.cluster.now() + span;
        self.troubles.insert(party, (trouble, end));
        if let Party::Server(server) = party {
            self.shaky.insert(self.cluster.disk(server), end + SHAKY);
        }
    }

    /// Undoes the troubles whose time is up, or all.
    fn undo(&mut self, all: bool) {
        let now = self.cluster.now();
        self.shaky.retain(|_, until| *until > now);
        let over = self.troubles.iter().filter(|(_, (_, until))| all || *until <= now);
        for (party, trouble) in over.map(|(p, (t, _))| (*p, *t)).collect::<Vec<_>>() {
            self.troubles.remove(&party);
            self.say(&format!("{} is well again", self.cluster.name(party)));
            match (trouble, party) {
                (Trouble::Down, Party::Viewleader) => self.cluster.start_viewleader(),
                (Trouble::Down, Party::Server(server)) => self.start_again(server),
                (Trouble::Paused, _) => self.cluster.resume(party),
                (Trouble::Cut, _) => self.cluster.heal(party),
                (Trouble::Full, Party::Server(server)) => self.cluster.clear_disk(server),
                (Trouble::Full, Party::Viewleader) => {}
            }
        }
    }

    /// Everything goes down at the same moment, and comes back bit by bit.
    fn lose_power(&mut self) -> Result<(), String> {
        self.say("the power fails");
        let (now, servers) = (self.cluster.now(), self.alive());
        let parties = servers.into_iter().map(Party::Server).chain([Party::Viewleader]);
        let mut back: Vec<(Time, Party)> = Vec::new();
        for party in parties {
            self.cluster.kill(party);
            back.push((now + Duration::from_millis(self.rng.random_range(0..9000)), party));
        }
        back.sort_unstable();
        for (time, party) in back {
            while self.cluster.now() < time {
                self.step()?;
            }
            match party {
                Party::Viewleader => self.cluster.start_viewleader(),
                Party::Server(server) => self.start_again(server),
            }
        }
        Ok(())
    }

    /// Lets the clients that have nothing to do begin something.
    fn ask(&mut self) -> Result<(), String> {
        let now = self.cluster.now();
        let alive = self.alive();
        for client in 0..self.clients.len() {
            let Client { next, stops, .. } = self.clients[client];
            if next.is_none_or(|next| next > now || next > stops) || alive.is_empty() {
                continue;
            }
            self.clients[client].next = None;
            let server = alive[self.rng.random_range(0..alive.len())];
            let (key, doing, begun, body) = match self.clients[client].writes.clone() {
                Some(key) => {
                    self.last_value += 1;
                    let value = self.last_value;
                    let text = value.to_string();
                    let body = json!({"cmd": "setr", "key": key, "val": text, "direct": true});
                    let begun = self.oracle.write_begins(&key, value);
                    (key, Doing::Writing { value }, begun, body)
                }
                None => {
                    let key = format!("key{}", self.rng.random_range(0..KEYS));
                    let begun = self.oracle.read_begins(&key);
                    let body = json!({"cmd": "getr", "key": key});
                    (key, Doing::Reading, begun, body)
                }
            };
            let id = self.cluster.ask(server, &body);
            let until = now + CLIENT_PATIENCE;
            self.requests.insert(id, Request { client, key, doing, begun, until });
            self.take_outcomes()?;
        }
        let late = self.requests.iter().filter(|(_, request)| request.until <= now);
        for id in late.map(|(id, _)| *id).collect::<Vec<_>>() {
            if let Some(request) = self.requests.remove(&id) {
                self.tally.unknown += 1;
                self.clients[request.client].next = Some(now);
            }
        }
        Ok(())
    }

    fn take_outcomes(&mut self) -> Result<(), String> {
        for (id, outcome) in self.cluster.outcomes() {
            // Whoever has given up does not hear the answer.
            let Some(request) = self.requests.remove(&id) else { continue };
            let think = self.rng.random_range(0..self.clients[request.client].thinks_ms);
            let next = self.cluster.now() + Duration::from_millis(think);
            self.clients[request.client].next = Some(next);
            self.judge(&request, &outcome)?;
        }
        Ok(())
    }

    fn judge(&mut self, request: &Request, outcome: &Outcome) -> Result<(), String> {
        let Outcome::Reply(reply) = outcome else {
            self.tally.unknown += 1;
            return Ok(());
        };
        let reply: Value = serde_json::from_str(reply).map_err(|error| error.to_string())?;
        if let Some(reason) = reply["reason"].as_str() {
            match reason {
                "unavailable" => {
                    self.tally.refused += 1;
                    if let Doing::Writing { value } = request.doing {
                        self.oracle.refused(&request.key, value)?;
                    }
                }
                "unknown_outcome" => self.tally.unknown += 1,
                _ => return Err(format!("{reply} to {request:?}")),
            }
            return Ok(());
        }
        let version = reply["version"].as_str().map(version);
        let Request { key, begun, .. } = request;
        match (request.doing, reply["status"].as_str(), version) {
            (Doing::Writing { value }, Some("ok"), Some(version)) => {
                self.tally.written += 1;
                self.oracle.written(key, *begun, value, version)
            }
            (Doing::Reading, Some("ok"), Some(version)) => {
                self.tally.read += 1;
                let value = reply["value"].as_str().and_then(|value| value.parse().ok());
                let value = value.ok_or("a value that nobody writes")?;
                self.oracle.read(key, *begun, Some((value, version)))
            }
            (Doing::Reading, Some("not_found"), _) => {
                self.tally.read += 1;
                self.oracle.read(key, *begun, None)
            }
            _ => Err(format!("{reply} to {request:?}")),
        }
    }

    /// No faults any more: everything must come to rest, and be where it belongs.
    fn come_to_rest(&mut self) -> Result<(), String> {
        let deadline = self.cluster.now() + TO_REST;
        let is_member = |run: &Self, server: &usize| {
            let view = run.cluster.view();
            run.cluster.identity(*server).is_some_and(|id| view.member(id).is_some())
        };
        loop {
            self.step()?;
            let alive = self.alive();
            let view = self.cluster.view();
            let all_in = alive.iter().all(|server| is_member(self, server));
            if all_in && view.members.len() == alive.len() && view.is_at_rest() {
                break;
            }
            if self.cluster.now() > deadline {
                let groups = self.cluster.names.view_lines(self.cluster.view());
                return Err(format!("no rest:\n{groups}"));
            }
        }
        // The replicas hear of the last commits, and those who left of the view.
        let end = self.cluster.now() + CLIENT_PATIENCE;
        while self.cluster.now() < end {
            self.step()?;
        }
        self.requests.clear();
        (0..KEYS).try_for_each(|number| self.check_key(&format!("key{number}")))
    }

    /// The key is read alike everywhere, and is on exactly the disks of its target.
    fn check_key(&mut self, key: &str) -> Result<(), String> {
        let mut found: Option<(String, Value)> = None;
        for server in self.alive() {
            let body = json!({"cmd": "getr", "key": key});
            let begun = self.oracle.read_begins(key);
            let reply = self.reply_of(server, &body)?;
            let (doing, until) = (Doing::Reading, self.cluster.now());
            let request = Request { client: 0, key: key.to_owned(), doing, begun, until };
            self.judge(&request, &Outcome::Reply(reply.clone()))?;
            if reply.contains("error") {
                return Err(format!("{key} can't be read at {}: {reply}", self.name(server)));
            }
            let reply: Value = serde_json::from_str(&reply).map_err(|error| error.to_string())?;
            let version = reply["version"].as_str().map(str::to_owned);
            found = version.map(|version| (version, reply["value"].clone()));
        }
        let target = self.cluster.view().target_of(Point::of(key));
        for server in self.alive() {
            let keys = self.reply_of(server, &json!({"cmd": "query_all_keys"}))?;
            let id = self.cluster.identity(server);
            let is_target = target.iter().any(|target| Some(target) == id);
            let wanted = found.clone().filter(|_| is_target);
            let stored = self.cluster.stored(self.cluster.disk(server));
            let stored = stored.entries.iter().find(|(_, entry)| *entry.key == *key);
            let stored =
                stored.map(|(_, entry)| (entry.version.to_string(), Value::from(&*entry.value)));
            if keys.contains(&format!("\"{key}\"")) != wanted.is_some() || stored != wanted {
                let name = self.name(server);
                return Err(format!(
                    "{name} has {key} as {stored:?}, and not as {wanted:?}; {keys}"
                ));
            }
        }
        Ok(())
    }

    fn name(&self, server: usize) -> &str {
        self.cluster.name(Party::Server(server))
    }

    /// The reply to a request, with nothing else going on.
    fn reply_of(&mut self, server: usize, body: &Value) -> Result<String, String> {
        let id = self.cluster.ask(server, body);
        let deadline = self.cluster.now() + CLIENT_PATIENCE;
        while self.cluster.now() < deadline {
            for (ended, outcome) in self.cluster.outcomes() {
                match outcome {
                    Outcome::Reply(reply) if ended == id => return Ok(reply),
                    outcome if ended == id => return Err(format!("{outcome:?} to {body}")),
                    _ => {}
                }
            }
            self.cluster.step();
        }
        Err(format!("no reply to {body} from {}", self.name(server)))
    }
}

fn version(text: &str) -> Version {
    let (group, number) = text.split_once('.').expect("a version");
    (group.parse().expect("a number"), number.parse().expect("a number"))
}

/// Every connection has a pace of its own each way, from a tenth of a millisecond
/// to some tens of them, and so has every disk. In half of the runs something is
/// now and then up to seconds late, and everything behind it, too: between
/// servers, so late that the caller has given up; of the viewleader's views and
/// reports, so late that they are old; of heartbeats, not so late that a lease is
/// lost by it.
struct Random {
    rng: StdRng,
    rare: f64,
    ways: BTreeMap<Way, f64>,
    disks: BTreeMap<Party, f64>,
}

impl Random {
    fn new(rng: &mut StdRng) -> Self {
        let mut rng = StdRng::seed_from_u64(rng.random());
        let rare = [0.0, 0.0, 0.001, 0.01][rng.random_range(0..4)];
        Self { rng, rare, ways: BTreeMap::new(), disks: BTreeMap::new() }
    }
}

impl Chance for Random {
    fn delay(&mut self, way: Way) -> Duration {
        let rng = &mut self.rng;
        let pace = *self.ways.entry(way).or_insert_with(|| 10f64.powf(rng.random_range(2.0..4.7)));
        let mut micros = pace * rng.random_range(0.5..1.5);
        let (likelier, latest) = match way.lane {
            Lane::Prompt | Lane::Patient => (1.0, 3e6),
            Lane::View | Lane::Report => (10.0, 3e6),
            Lane::Beat => (10.0, 8e5),
        };
        if rng.random_bool(self.rare * likelier) {
            micros += rng.random_range(0.0..latest);
        }
        Duration::from_micros(micros as u64)
    }

    fn sync(&mut self, party: Party) -> Duration {
        let rng = &mut self.rng;
        let pace =
            *self.disks.entry(party).or_insert_with(|| 10f64.powf(rng.random_range(2.0..4.5)));
        let mut micros = pace * rng.random_range(0.5..1.5);
        if rng.random_bool(self.rare) {
            micros += rng.random_range(0.0..1e6);
        }
        Duration::from_micros(micros as u64)
    }

    fn kept(&mut self, queued: usize) -> usize {
        self.rng.random_range(0..=queued)
    }
}
