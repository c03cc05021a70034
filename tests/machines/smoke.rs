//! Runs of random chance: delays, kills, pauses and joins, and clients all along.
//!
//! Everything about a run comes from its seed. It has two phases. In the first
//! one, clients write and read while servers are killed, paused and started; the
//! [`Oracle`] watches what clients see. In the second, everything that is alive
//! runs on undisturbed, and must come to rest: every group at its target, every
//! key on exactly the servers of its target, and readable from each server.
//!
//! Nothing is lost on the network, only late. A fault never takes the last
//! healthy ready replica of a group: what happens then is another story, which
//! the scripts tell.

use super::cluster::{ClientId, Clock, Cluster, Outcome};
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
const TO_REST: Duration = Duration::from_secs(40);

/// After this long, a client takes its request for lost.
const CLIENT_PATIENCE: Duration = Duration::from_secs(15);

/// Who was away has renewed its lease after so long, or has lost it.
const SHAKY: Duration = Duration::from_secs(3);

/// The most servers that are alive at a time.
const MAX_ALIVE: usize = 7;

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
    /// A server dies.
    Kill,
    /// A server dies, and another one is started at once.
    Replace,
    /// A server stands still for a while.
    Pause,
    /// A server is cut off for a while, and does not know it.
    Cut,
    /// A server is started.
    Join,
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

struct Run {
    cluster: Cluster,
    rng: StdRng,
    oracle: Oracle,
    clients: Vec<Client>,
    requests: BTreeMap<ClientId, Request>,
    last_value: u64,
    /// Who is paused or cut off, and until when.
    away: BTreeMap<Party, Time>,
    /// Who is so, or was just now, and may lose its lease yet.
    shaky: BTreeMap<usize, Time>,
    /// Which addresses the dead have left.
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
    let outcome = run.be_busy().and_then(|()| run.come_to_rest());
    let now = run.cluster.now();
    outcome.map(|()| run.tally).map_err(|what| format!("seed {seed} at {now}: {what}"))
}

impl Run {
    fn new(seed: u64, narrate: bool) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut cluster = Cluster::new(random_delays(&mut rng));
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
            away: BTreeMap::new(),
            shaky: BTreeMap::new(),
            vacant: Vec::new(),
            tally: Tally::default(),
            narrate,
        };
        for _ in 0..run.rng.random_range(1..=5) {
            run.start();
        }
        run
    }

    /// Starts a server, on a vacant address or on a new one.
    fn start(&mut self) {
        let number = self.cluster.servers() + 1;
        let host = if self.vacant.is_empty() || self.rng.random_bool(0.5) {
            100 + number as u8
        } else {
            self.vacant.remove(self.rng.random_range(0..self.vacant.len()))
        };
        let clock = Clock {
            origin: Duration::from_secs(self.rng.random_range(0..1000)),
            fast_by: self.rng.random_range(-5000..=5000),
        };
        let seed = self.rng.random();
        self.cluster.start(&format!("s{number}"), host, seed, clock);
    }

    /// Clients and faults.
    fn be_busy(&mut self) -> Result<(), String> {
        let end = Time::default() + BUSY;
        let count = self.rng.random_range(0..=10);
        let moments = 1000..BUSY.as_millis() as u64;
        let mut faults: Vec<Time> =
            (0..count).map(|_| Time::from_millis(self.rng.random_range(moments.clone()))).collect();
        faults.sort_unstable();
        faults.reverse();
        while self.cluster.now() < end {
            self.cluster.step();
            self.narrate();
            self.take_outcomes()?;
            self.bring_back(false);
            while faults.last().is_some_and(|time| *time <= self.cluster.now()) {
                faults.pop();
                self.do_harm();
            }
            self.ask()?;
        }
        self.bring_back(true);
        Ok(())
    }

    fn narrate(&mut self) {
        if self.narrate {
            let text = self.cluster.trace.take();
            for line in text.lines() {
                println!("{} {line}", self.cluster.now());
            }
        }
    }

    fn say(&mut self, what: &str) {
        if self.narrate {
            println!("{} *** {what}", self.cluster.now());
        }
    }

    fn alive(&self) -> Vec<usize> {
        (0..self.cluster.servers()).filter(|server| self.cluster.is_alive(*server)).collect()
    }

    /// Whether every group keeps a healthy ready replica of its target without
    /// `victim`.
    fn can_spare(&self, victim: usize) -> bool {
        let view = self.cluster.view();
        let others = (0..self.cluster.servers()).filter(|server| *server != victim);
        let is_here =
            |server: &usize| self.cluster.is_up(*server) && !self.shaky.contains_key(server);
        let others: Vec<usize> = others.filter(is_here).collect();
        let healthy =
            |id: &Identity| others.iter().any(|server| self.cluster.identity(*server) == Some(id));
        let kept = view.groups.iter().all(|group| {
            let target = view.target_of(group.start);
            target.iter().any(|id| group.ready.contains(id) && healthy(id))
        });
        !view.groups.is_empty() && kept
    }

    fn do_harm(&mut self) {
        let alive = self.alive();
        let victim = alive[self.rng.random_range(0..alive.len())];
        let party = Party::Server(victim);
        let fault = match self.rng.random_range(0..20) {
            0..4 => Fault::Kill,
            4..6 => Fault::Replace,
            6..9 => Fault::Pause,
            9..12 => Fault::Cut,
            12..18 => Fault::Join,
            _ => Fault::PauseViewleader,
        };
        let span = Duration::from_millis(self.rng.random_range(50..9000));
        let is_free = !self.away.contains_key(&party);
        match fault {
            Fault::Join if alive.len() < MAX_ALIVE => self.start(),
            Fault::Kill | Fault::Replace if self.can_spare(victim) => {
                self.cluster.kill(party);
                self.away.remove(&party);
                self.shaky.remove(&victim);
                self.cluster.heal(party);
                self.vacant.push(self.cluster.address(victim).ip().octets()[3]);
                if matches!(fault, Fault::Replace) {
                    self.start();
                }
            }
            Fault::Pause if is_free && self.can_spare(victim) => {
                self.cluster.pause(party);
                self.is_away_for(victim, span);
            }
            Fault::Cut if is_free && self.can_spare(victim) => {
                self.cluster.cut_off(party);
                self.is_away_for(victim, span);
            }
            Fault::PauseViewleader => {
                self.cluster.pause(Party::Viewleader);
                self.away.insert(Party::Viewleader, self.cluster.now() + span);
            }
            _ => return,
        }
        self.say(&format!("{fault:?} of s{}, {span:?}", victim + 1));
        self.tally.faults += 1;
    }

    fn is_away_for(&mut self, server: usize, span: Duration) {
        let back = self.cluster.now() + span;
        self.away.insert(Party::Server(server), back);
        self.shaky.insert(server, back + SHAKY);
    }

    /// Lets those go on whose time is up, or all.
    fn bring_back(&mut self, all: bool) {
        let now = self.cluster.now();
        self.shaky.retain(|_, until| *until > now);
        let done = self.away.iter().filter(|(_, until)| all || **until <= now);
        for party in done.map(|(party, _)| *party).collect::<Vec<_>>() {
            self.away.remove(&party);
            self.say(&format!("{party:?} is back"));
            self.cluster.heal(party);
            self.cluster.resume(party);
        }
    }

    /// Lets the clients that have nothing to do begin something.
    fn ask(&mut self) -> Result<(), String> {
        let now = self.cluster.now();
        for client in 0..self.clients.len() {
            let Client { next, stops, .. } = self.clients[client];
            if next.is_none_or(|next| next > now || next > stops) {
                continue;
            }
            self.clients[client].next = None;
            let alive = self.alive();
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
            self.cluster.step();
            self.narrate();
            self.take_outcomes()?;
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
            self.cluster.step();
            self.narrate();
            self.take_outcomes()?;
        }
        self.requests.clear();
        self.check_every_key()
    }

    fn check_every_key(&mut self) -> Result<(), String> {
        for number in 0..KEYS {
            let key = format!("key{number}");
            let mut exists = false;
            for server in self.alive() {
                let body = json!({"cmd": "getr", "key": key});
                let begun = self.oracle.read_begins(&key);
                let reply = self.reply_of(server, &body)?;
                let client = 0;
                let (doing, until) = (Doing::Reading, self.cluster.now());
                let request = Request { client, key: key.clone(), doing, begun, until };
                exists = reply.contains("version");
                self.judge(&request, &Outcome::Reply(reply.clone()))?;
                if reply.contains("error") {
                    return Err(format!("{key} can't be read at s{}: {reply}", server + 1));
                }
            }
            let target = self.cluster.view().target_of(Point::of(&key));
            for server in self.alive() {
                let keys = self.reply_of(server, &json!({"cmd": "query_all_keys"}))?;
                let id = self.cluster.identity(server);
                let wanted = exists && target.iter().any(|target| Some(target) == id);
                if keys.contains(&format!("\"{key}\"")) != wanted {
                    let has = if wanted { "lacks" } else { "still has" };
                    return Err(format!("s{} {has} {key}", server + 1));
                }
            }
        }
        Ok(())
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
            self.narrate();
        }
        Err(format!("no reply to {body} from s{}", server + 1))
    }
}

fn version(text: &str) -> Version {
    let (group, number) = text.split_once('.').expect("a version");
    (group.parse().expect("a number"), number.parse().expect("a number"))
}

/// Every connection has a pace of its own each way, from a tenth of a millisecond
/// to some tens of them. In half of the runs something is now and then up to
/// seconds late, and everything behind it, too: between servers, so late that the
/// caller has given up; of the viewleader's views and reports, so late that they
/// are old; of heartbeats, not so late that a lease is lost by it.
fn random_delays(rng: &mut StdRng) -> super::network::Delay {
    let mut rng = StdRng::seed_from_u64(rng.random());
    let rare = [0.0, 0.0, 0.001, 0.01][rng.random_range(0..4)];
    let mut paces: BTreeMap<Way, f64> = BTreeMap::new();
    Box::new(move |way| {
        let pace = paces.entry(way).or_insert_with(|| 10f64.powf(rng.random_range(2.0..4.7)));
        let mut micros = *pace * rng.random_range(0.5..1.5);
        let (likelier, latest) = match way.lane {
            Lane::Prompt | Lane::Patient => (1.0, 3e6),
            Lane::View | Lane::Report => (10.0, 3e6),
            Lane::Beat => (10.0, 8e5),
        };
        if rng.random_bool(rare * likelier) {
            micros += rng.random_range(0.0..latest);
        }
        Duration::from_micros(micros as u64)
    })
}
