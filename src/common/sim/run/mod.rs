//! Runs of random chance: faults of every kind, and clients all along.
//!
//! Everything about a run comes from its seed: first its [`Options`], then what
//! happens. It has three phases. In the first one, for safety, clients write, read
//! and lock ([`clients`]) while processes, disks, clocks, the network and the
//! membership do their worst ([`faults`]), and the oracles watch. In the second, for
//! liveness, everything that was there is there again and runs undisturbed: within
//! [`TO_REST`] every client must have its answer, every group must be at its target,
//! nothing may be pending, the rebalancing must be complete, and each key must be on
//! exactly the servers of its target; and then it must do what it is there for, each
//! key written and read and each lock granted. In the third, which some runs have, all of
//! it loses power at once, and must come to rest with the same data, and be of use.
//!
//! A disk is lost for good only while each group has a healthy ready replica
//! elsewhere, and nothing else happens until the others have noticed: what
//! happens when all disks of a group are lost is another story, which the scripts
//! tell.
//!
//! The same seed gives the same run, to the bit: [`Report::digest`] says so.

mod clients;
mod faults;
mod options;

pub use faults::Fault;
pub use options::{Clocks, Options};

use super::chance::Random;
use super::cluster::{Clock, Cluster};
use super::linearizability::{self, Call, MAX_STEPS, Operation, Outcome};
use super::network::Party;
use super::oracle::copies::Copies;
use super::oracle::locks::Locks;
use super::oracle::primaries::Primaries;
use crate::kv::ring::{Point, RING_POINTS};
use crate::kv::{Text, Version};
use crate::machine::Time;
use crate::view::Revision;
use clients::Clients;
use faults::Troubles;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::AddAssign;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::time::Duration;

/// How soon after the last fault everything must be at rest.
pub const TO_REST: Duration = Duration::from_secs(90);

/// How long everything must stay at rest.
const STILL: Duration = Duration::from_millis(500);

/// Never.
const NEVER: Time = Time::from_micros(u64::MAX);

/// When the first client begins.
const FIRST: Time = Time::from_millis(1000);

/// How much was done.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Runs.
    pub runs: u64,
    /// How long the runs took on their own clocks.
    pub virtual_time: Duration,
    /// Writes that were acknowledged.
    pub written: u64,
    /// Reads that were answered.
    pub read: u64,
    /// Writes that were refused.
    pub refused: u64,
    /// Writes of which the outcome is not known.
    pub unknown: u64,
    /// Writes that were refused for a newer token.
    pub fenced: u64,
    /// Locks that were granted.
    pub granted: u64,
    /// Faults, by their kinds.
    pub faults: BTreeMap<Fault, u64>,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.runs += other.runs;
        self.virtual_time += other.virtual_time;
        self.written += other.written;
        self.read += other.read;
        self.refused += other.refused;
        self.unknown += other.unknown;
        self.fenced += other.fenced;
        self.granted += other.granted;
        for (fault, count) in other.faults {
            *self.faults.entry(fault).or_default() += count;
        }
    }
}

/// What was wrong with a run.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Who says so: the name of an oracle.
    pub oracle: &'static str,
    /// When, on the run's clock.
    pub at: Time,
    /// What it says.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}: {}", self.oracle, self.at, self.what)
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What was drawn from it.
    pub options: Options,
    /// What went wrong, if something did.
    pub failure: Option<Failure>,
    /// How much was done.
    pub tally: Tally,
    /// All that happened, in a number: the same for the same run.
    pub digest: u64,
    /// The last lines of the trace, as many as were asked for.
    pub lines: VecDeque<String>,
}

type Judgement = Result<(), Failure>;

struct Run {
    cluster: Cluster,
    rng: StdRng,
    options: Options,
    keys: Vec<Text>,
    clients: Clients,
    troubles: Troubles,
    history: Vec<Operation>,
    /// The last moment of the history.
    moment: u64,
    primaries: Primaries,
    copies: Copies,
    locks: Locks,
    /// The revision at which copies were looked at last.
    looked: Revision,
    /// How many servers and arcs there were then.
    counted: (usize, usize),
    tally: Tally,
    /// The trace, if anybody wants to read it, and how many lines of it are kept.
    lines: VecDeque<String>,
    kept_lines: usize,
}

/// Runs `seed`, and keeps up to `lines` of the end of its trace.
pub fn run(seed: u64, clocks: Clocks, lines: usize) -> Report {
    let mut rng = StdRng::seed_from_u64(seed);
    let options = Options::draw(&mut rng, clocks);
    let mut run = Run::new(rng, options, lines);
    let judgement = catch_unwind(AssertUnwindSafe(|| run.through()));
    let at = run.cluster.now();
    let failure = match judgement {
        Ok(judgement) => judgement.err(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            let what = text.unwrap_or("for no reason that can be told").to_owned();
            Some(Failure { oracle: "panic", at, what })
        }
    };
    run.take_lines();
    run.tally.runs = 1;
    run.tally.virtual_time = at.since(Time::default());
    let digest = run.cluster.digest();
    let Run { options, tally, lines, .. } = run;
    Report { seed, options, failure, tally, digest, lines }
}

/// Keys at the ends of the ring, at any place, close to each other, and at the same
/// place: pages end between those.
fn draw_keys(rng: &mut StdRng, count: usize) -> Vec<Text> {
    let mut keys: Vec<Text> = Vec::new();
    while keys.len() < count {
        let last = keys.last().map(|key| Point::of(key).number());
        let number = match (rng.random_range(0..10), last) {
            (0, _) => 0,
            (1, _) => RING_POINTS - 1,
            (2..4, Some(last)) => last + 1,
            (4..6, Some(last)) => last,
            _ => rng.random_range(0..RING_POINTS),
        };
        let names = names_at(Point::at(number % RING_POINTS));
        let name = &*names[rng.random_range(0..NAMES_AT_POINT)];
        if !keys.iter().any(|key| &**key == name) {
            keys.push(Text::from(name));
        }
    }
    keys
}

fn draw_clock(rng: &mut StdRng, options: &Options) -> Clock {
    let drift = options.drift;
    Clock {
        origin: Duration::from_secs(rng.random_range(0..1000)),
        fast_by: rng.random_range(-drift..=drift),
    }
}

/// How many names stand at each point.
const NAMES_AT_POINT: usize = 2;

/// Some names for each point of the ring, so that keys and servers can be put where
/// one wants them.
fn names_at(point: Point) -> &'static [String] {
    static NAMES: OnceLock<Vec<Vec<String>>> = OnceLock::new();
    let names = NAMES.get_or_init(|| {
        let mut names: Vec<Vec<String>> = vec![Vec::new(); RING_POINTS.into()];
        let mut left = names.len() * NAMES_AT_POINT;
        for number in 0.. {
            let name = format!("n{number}");
            let place = &mut names[usize::from(Point::of(&name).number())];
            if place.len() < NAMES_AT_POINT {
                place.push(name);
                left -= 1;
            }
            if left == 0 {
                break;
            }
        }
        names
    });
    &names[usize::from(point.number())]
}

impl Run {
    fn new(mut rng: StdRng, options: Options, lines: usize) -> Self {
        let chance = Box::new(Random::new(&mut rng, options.weather));
        let clocks: Vec<Clock> =
            (0..options.viewleaders).map(|_| draw_clock(&mut rng, &options)).collect();
        let mut cluster = Cluster::with_viewleaders(chance, &clocks, rng.random());
        cluster.trace.is_on = lines > 0;
        cluster.trace.with_groups = true;
        cluster.trace.with_viewleaders = true;
        cluster.tick_every(options.tick);
        let keys = draw_keys(&mut rng, options.keys);
        let clients = Clients::draw(&mut rng, &options);
        let troubles = Troubles::draw(&mut rng, &options);
        let mut run = Self {
            cluster,
            rng,
            keys,
            clients,
            troubles,
            history: Vec::new(),
            moment: 0,
            primaries: Primaries::default(),
            copies: Copies::default(),
            locks: Locks::default(),
            looked: Revision(0),
            counted: (0, 0),
            tally: Tally::default(),
            lines: VecDeque::new(),
            kept_lines: lines,
            options,
        };
        for _ in 0..run.options.servers {
            run.join();
        }
        run
    }

    /// A clock as the options say.
    fn clock(&mut self) -> Clock {
        draw_clock(&mut self.rng, &self.options)
    }

    /// All three phases.
    fn through(&mut self) -> Judgement {
        let end = Time::default() + self.options.busy;
        self.go_on_until(end)?;
        self.heal()?;
        self.come_to_rest_and_use()?;
        if self.options.power {
            self.lose_power()?;
            self.come_to_rest_and_use()?;
        }
        self.judge_history()
    }

    fn fails<T>(&self, oracle: &'static str, what: String) -> Result<T, Failure> {
        Err(Failure { oracle, at: self.cluster.now(), what })
    }

    /// Lets everything happen until `end`, faults and clients, too.
    fn go_on_until(&mut self, end: Time) -> Judgement {
        while self.cluster.now() < end {
            let due = self.clients.due().min(self.troubles.due()).min(end);
            if self.cluster.next_event() > due && self.cluster.now() < due {
                self.cluster.wait_until(due);
            } else {
                self.cluster.step();
            }
            self.look()?;
            self.take_ended();
            if let Some(why) = self.cluster.broken().pop() {
                return self.fails("viewleaders", why);
            }
            let now = self.cluster.now();
            if self.troubles.due() <= now {
                self.meddle();
            }
            self.serve_clients()?;
        }
        Ok(())
    }

    /// Looks at what the last event has led to.
    fn look(&mut self) -> Judgement {
        self.take_lines();
        if let Some(server) = self.cluster.stepped()
            && let Err(what) = self.primaries.look(&self.cluster, server)
        {
            return self.fails("primaries", what);
        }
        if self.cluster.view().revision != self.looked {
            self.looked = self.cluster.view().revision;
            self.follow_view();
            for key in &self.keys {
                if let Err(what) = self.copies.look(&self.cluster, key) {
                    return self.fails("copies", what);
                }
            }
        }
        Ok(())
    }

    /// Takes the lines that the trace has, each with the moment.
    fn take_lines(&mut self) {
        if self.kept_lines == 0 {
            return;
        }
        let (now, text) = (self.cluster.now(), self.cluster.trace.take());
        for line in text.lines() {
            self.lines.push_back(format!("{now} {line}"));
        }
        let surplus = self.lines.len().saturating_sub(self.kept_lines);
        self.lines.drain(..surplus);
    }

    fn say(&mut self, what: impl FnOnce(&Self) -> String) {
        if self.kept_lines > 0 {
            self.take_lines();
            let line = format!("{} *** {}", self.cluster.now(), what(self));
            self.lines.push_back(line);
        }
    }

    fn alive(&self) -> Vec<usize> {
        (0..self.cluster.servers()).filter(|server| self.cluster.is_alive(*server)).collect()
    }

    /// The next moment of the history: never twice the same.
    fn tell_moment(&mut self) -> u64 {
        let micros = self.cluster.now().since(Time::default()).as_micros() as u64;
        self.moment = micros.max(self.moment + 1);
        self.moment
    }

    /// Why the cluster is not at rest, if it is not.
    fn unrest(&self) -> Option<String> {
        let (view, alive) = (self.cluster.view(), self.alive());
        let is_member = |server: &usize| {
            self.cluster.identity(*server).is_some_and(|id| view.member(id).is_some())
        };
        let council = &self.troubles.council;
        let is_behind = |site: &usize| !self.cluster.has_latest_view(*site);
        let pending: usize = alive.iter().map(|server| self.cluster.pending(*server)).sum();
        if self.cluster.leader().is_none() {
            Some("no viewleader leads".to_owned())
        } else if council.is_changing() {
            Some("the group of viewleaders is not as it is to be".to_owned())
        } else if let Some(site) = council.members().find(is_behind) {
            Some(format!("{} has an old view", self.cluster.name(Party::Viewleader(site))))
        } else if let Some(difference) = self.cluster.differing(council.members()) {
            Some(difference)
        } else if let Some(out) = alive.iter().find(|server| !is_member(server)) {
            Some(format!("{} is not in", self.cluster.name_of(*out)))
        } else if let Some(late) = alive.iter().find(|at| !self.cluster.is_leased(**at)) {
            Some(format!("the lease of {} is over", self.cluster.name_of(*late)))
        } else if view.members.len() > alive.len() {
            Some("somebody is counted who is not there".to_owned())
        } else if !view.is_at_rest() {
            Some("groups are not at their target".to_owned())
        } else if self.cluster.has_workers() {
            Some("a rebalancing is not over".to_owned())
        } else if let Some(late) = alive.iter().find(|at| !self.cluster.is_up_to_date(**at)) {
            Some(format!("{} has an old view", self.cluster.name_of(*late)))
        } else if let Some(slow) = alive.iter().find(|at| !self.cluster.has_stored_all(**at)) {
            Some(format!("the disk of {} is behind", self.cluster.name_of(*slow)))
        } else if pending > 0 {
            Some(format!("{pending} entries are pending"))
        } else {
            self.clients.unanswered().map(|client| format!("client {client} has no answer"))
        }
    }

    /// No faults any more: everything must come to rest, and work; what was written then is
    /// where it belongs as well.
    fn come_to_rest_and_use(&mut self) -> Judgement {
        self.come_to_rest()?;
        self.put_to_use()?;
        self.come_to_rest()
    }

    /// Everything must come to rest, and be where it belongs.
    fn come_to_rest(&mut self) -> Judgement {
        let deadline = self.cluster.now() + TO_REST;
        let (mut since, mut said) = (self.cluster.now(), String::new());
        while self.cluster.now().since(since) < STILL {
            self.go_on_until(self.cluster.now() + Duration::from_millis(100))?;
            let Some(unrest) = self.unrest() else { continue };
            since = self.cluster.now();
            if said != unrest {
                self.say(|_| format!("no rest: {unrest}"));
                said.clone_from(&unrest);
            }
            if since > deadline {
                let groups = self.cluster.names.view_lines(self.cluster.view());
                return self.fails("liveness", format!("no rest: {unrest}\n{groups}"));
            }
        }
        // All have given back what they had asked for.
        let places = self.cluster.places_for_ever();
        if let Some((lock, whose)) = places.first().filter(|(lock, _)| lock.starts_with("lock-")) {
            return self
                .fails("locks", format!("{lock} is left to {whose}, who has given it back"));
        }
        self.keys.clone().iter().try_for_each(|key| self.check_key(key))
    }

    /// The key can be read, and is on exactly its target.
    fn check_key(&mut self, key: &Text) -> Judgement {
        let view = self.cluster.view();
        let primary = view.group_at(Point::of(key)).map(|index| &view.groups[index]);
        let primary = primary.and_then(|group| group.primary.clone());
        let Some(server) = primary.and_then(|id| self.cluster.server_of(&id)) else {
            return self.fails("liveness", format!("{key} has no primary"));
        };
        let began = self.tell_moment();
        let reply = self.cluster.read_at_primary(server, key).unwrap_or_default();
        let reply: Value = serde_json::from_str(&reply).unwrap_or_default();
        let found = match (reply["status"].as_str(), reply["version"].as_str()) {
            (Some("ok"), Some(version)) => Some((version.to_owned(), reply["value"].clone())),
            (Some("not_found"), _) => None,
            _ => return self.fails("liveness", format!("{key} can't be read at rest: {reply}")),
        };
        let outcome = outcome_of_read(&reply);
        let read = Operation::new(u64::MAX, Text::clone(key), Call::Read, began);
        let end = self.tell_moment();
        self.history.extend(outcome.map(|outcome| read.ended(end, outcome)));
        match self.copies.census(&mut self.cluster, key, found.as_ref()) {
            Ok(()) => Ok(()),
            Err(what) => self.fails("census", what),
        }
    }

    fn judge_history(&mut self) -> Judgement {
        let verdict = linearizability::check(&self.history, MAX_STEPS);
        if verdict.is_fine() {
            return Ok(());
        }
        self.fails("linearizability", verdict.to_string())
    }
}

/// What a reply to `getr` or `get` says; nothing when it does not answer.
fn outcome_of_read(reply: &Value) -> Option<Outcome> {
    match reply["status"].as_str()? {
        "ok" => {
            let value = Text::from(reply["value"].as_str()?);
            Some(Outcome::Found { value, version: version_of(reply) })
        }
        "not_found" => Some(Outcome::Missing),
        _ => None,
    }
}

fn version_of(reply: &Value) -> Option<Version> {
    serde_json::from_value(reply["version"].clone()).ok()
}

/// Who is who in a trace.
fn server(index: usize) -> Party {
    Party::Server(index)
}
