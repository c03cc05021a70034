//! Nodes in one thread, with a virtual clock, network and disks.
//!
//! One more shell around the real machines. Messages cross as JSON, in their order
//! between two nodes, and may be lost; a disk stores batches in their order and
//! outlives its node; a node that is paused finds later what has come meanwhile.

use super::oracle::Oracle;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ringleader::consensus::founding::Entrance;
use ringleader::consensus::log;
use ringleader::consensus::message::{Envelope, Hello, Receipt};
use ringleader::consensus::node::{Node, Settings};
use ringleader::consensus::reshaping::Wish;
use ringleader::consensus::{self, Effect, Input, NodeId};
use ringleader::machine::{Machine, Time};
use ringleader::sim::disk::Disk;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// How often a node is told that time has passed.
const TICK: Duration = Duration::from_millis(10);

/// After how many entries the log is compacted: much sooner than in earnest.
const SNAPSHOT_EVERY: u64 = 30;

/// Numbers, in the order in which they were applied.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Numbers(pub(crate) Vec<u64>);

impl consensus::State for Numbers {
    type Command = u64;

    fn obey(&mut self, command: u64) {
        self.0.push(command);
    }
}

/// How long things take, and what gets lost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    pub(crate) delay: (u64, u64),
    pub(crate) sync: (u64, u64),
    /// Of a thousand messages, so many are lost.
    pub(crate) lost: u32,
    /// Of a thousand batches, so many take half a second more.
    pub(crate) stalls: u32,
}

impl Weather {
    pub(crate) const FAIR: Self = Self { delay: (1, 2), sync: (2, 3), lost: 0, stalls: 0 };
}

enum Event {
    Tick { at: usize },
    Stored { at: usize, life: u32, batch: u64 },
    Deliver { to: usize, from: usize, body: String },
    Heard { at: usize, life: u32, address: SocketAddrV4, hello: Option<Hello> },
    Input { at: usize, life: u32, input: Input<u64> },
}

/// A place with a disk, where a node runs or not.
pub(crate) struct Site {
    pub(crate) name: String,
    entrance: Entrance,
    disk: Disk,
    life: u32,
    pub(crate) node: Option<Node<Numbers>>,
    pub(crate) state: Vec<u64>,
    index: u64,
    is_paused: bool,
    inbox: Vec<Event>,
    /// Confirmations that were asked for, and what was acknowledged by then.
    confirming: BTreeMap<u64, BTreeSet<u64>>,
}

/// All of it.
pub(crate) struct World {
    pub(crate) now: Time,
    pub(crate) weather: Weather,
    pub(crate) rng: StdRng,
    events: BTreeMap<(Time, u64), Event>,
    last_event: u64,
    pub(crate) sites: Vec<Site>,
    /// When the last message between two sites arrives.
    busy: BTreeMap<(usize, usize), Time>,
    /// Sites that are cut off from all others.
    pub(crate) cut: BTreeSet<usize>,
    pub(crate) oracle: Oracle,
    /// The names of nodes and groups, for people.
    names: BTreeMap<String, String>,
    /// What has happened, in words.
    pub(crate) lines: Vec<String>,
    /// The first thing that must not be.
    pub(crate) failure: Option<String>,
    last_confirm: u64,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            now: Time::default(),
            weather: Weather::FAIR,
            rng: StdRng::seed_from_u64(seed),
            events: BTreeMap::new(),
            last_event: 0,
            sites: Vec::new(),
            busy: BTreeMap::new(),
            cut: BTreeSet::new(),
            oracle: Oracle::default(),
            names: BTreeMap::new(),
            lines: Vec::new(),
            failure: None,
            last_confirm: 0,
        }
    }

    pub(crate) fn address(at: usize) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, at as u8 + 1), 39000)
    }

    pub(crate) fn site(&self, name: &str) -> Option<usize> {
        self.sites.iter().position(|site| site.name == name)
    }

    /// A new site, where nothing runs yet.
    pub(crate) fn add_site(&mut self, name: &str, entrance: Entrance) -> usize {
        let at = self.sites.len();
        self.names.insert(Self::address(at).to_string(), name.to_owned());
        self.sites.push(Site {
            name: name.to_owned(),
            entrance,
            disk: Disk::default(),
            life: 0,
            node: None,
            state: Vec::new(),
            index: 0,
            is_paused: false,
            inbox: Vec::new(),
            confirming: BTreeMap::new(),
        });
        self.at(self.now, Event::Tick { at });
        at
    }

    // ---- nodes come and go ----

    pub(crate) fn start(&mut self, at: usize) {
        let rng = StdRng::from_rng(&mut self.rng);
        let (now, site) = (self.now, &mut self.sites[at]);
        assert!(site.node.is_none(), "{} runs", site.name);
        let recovered = match log::recover::<Numbers>(site.disk.store()) {
            Ok(recovered) => recovered,
            Err(error) => {
                return self.fail(format!("the disk of {}: {error}", self.sites[at].name));
            }
        };
        (site.index, site.state) = (recovered.index, recovered.state.0.clone());
        let (entrance, snapshot_every) = (site.entrance.clone(), SNAPSHOT_EVERY);
        let settings = Settings { address: Self::address(at), entrance, snapshot_every };
        let mut effects = Vec::new();
        let node = Node::start(now, settings, recovered, rng, &mut effects).expect("a log");
        let (id, name) = (node.id(), site.name.clone());
        site.node = Some(node);
        let lives = self.names.values().filter(|known| known.starts_with(&name)).count();
        let name = if lives > 1 { format!("{name}{lives}") } else { name };
        self.names.entry(id.to_string()).or_insert(name);
        let (index, state) = (self.sites[at].index, self.sites[at].state.clone());
        let held = self.oracle.holds(index, &state);
        self.check(held);
        self.perform(at, effects);
    }

    /// The process dies; the first `kept` of the batches that wait make it.
    pub(crate) fn kill(&mut self, at: usize, kept: usize) {
        let site = &mut self.sites[at];
        site.node = None;
        site.life += 1;
        site.is_paused = false;
        site.inbox.clear();
        site.confirming.clear();
        let kept = kept.min(site.disk.queued());
        site.disk.crash(kept);
    }

    /// The disk is gone, too.
    pub(crate) fn erase(&mut self, at: usize) {
        self.kill(at, 0);
        self.sites[at].disk = Disk::default();
    }

    pub(crate) fn is_up(&self, at: usize) -> bool {
        self.sites[at].node.is_some() && !self.sites[at].is_paused
    }

    pub(crate) fn pause(&mut self, at: usize) {
        self.sites[at].is_paused = true;
    }

    pub(crate) fn resume(&mut self, at: usize) {
        self.sites[at].is_paused = false;
        for event in std::mem::take(&mut self.sites[at].inbox) {
            self.at(self.now, event);
        }
    }

    pub(crate) fn hold_disk(&mut self, at: usize) {
        self.sites[at].disk.hold();
    }

    pub(crate) fn release_disk(&mut self, at: usize) {
        if let Some(batch) = self.sites[at].disk.release() {
            let life = self.sites[at].life;
            self.at(self.now, Event::Stored { at, life, batch });
        }
    }

    // ---- what is asked of them ----

    pub(crate) fn leads(&self, at: usize) -> bool {
        self.sites[at].node.as_ref().is_some_and(Node::leads)
    }

    /// The site that leads, if exactly one thinks so.
    pub(crate) fn leader(&self) -> Option<usize> {
        let mut leaders = (0..self.sites.len()).filter(|at| self.leads(*at));
        leaders.next().filter(|_| leaders.next().is_none())
    }

    pub(crate) fn propose(&mut self, at: usize, number: u64) {
        self.step(at, Input::Propose { number, command: number });
    }

    pub(crate) fn confirm(&mut self, at: usize) {
        self.last_confirm += 1;
        let number = self.last_confirm;
        if self.leads(at) {
            let known = self.oracle.acknowledged.clone();
            self.sites[at].confirming.insert(number, known);
            self.step(at, Input::Confirm { number });
        }
    }

    pub(crate) fn wish(&mut self, at: usize, number: u64, change: Wish) {
        self.step(at, Input::Reshape { number, change });
    }

    // ---- time ----

    pub(crate) fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        while self.failure.is_none()
            && let Some(entry) = self.events.first_entry()
            && entry.key().0 <= end
        {
            let ((time, _), event) = entry.remove_entry();
            self.now = self.now.max(time);
            self.happen(event);
        }
        self.now = end;
    }

    fn at(&mut self, time: Time, event: Event) {
        self.last_event += 1;
        self.events.insert((time, self.last_event), event);
    }

    fn happen(&mut self, event: Event) {
        let at = match &event {
            Event::Tick { at }
            | Event::Stored { at, .. }
            | Event::Heard { at, .. }
            | Event::Input { at, .. } => *at,
            Event::Deliver { to, .. } => *to,
        };
        if let Event::Tick { at } = event {
            self.at(self.now + TICK, Event::Tick { at });
        }
        let site = &mut self.sites[at];
        if site.is_paused && !matches!(event, Event::Tick { .. }) {
            site.inbox.push(event);
            return;
        }
        if site.is_paused || site.node.is_none() {
            if let Event::Deliver { to, from, body } = event {
                self.undelivered(from, to, &body);
            }
            return;
        }
        let this_life = site.life;
        let is_now = |life: u32| life == this_life;
        match event {
            Event::Tick { at } => self.step(at, Input::Tick),
            Event::Stored { life, batch, .. }
                if is_now(life) && self.sites[at].disk.keep_up_to(batch) =>
            {
                self.step(at, Input::Stored { batch });
            }
            Event::Heard { life, address, hello, .. } if is_now(life) => {
                self.step(at, Input::Heard { address, hello });
            }
            Event::Input { life, input, .. } if is_now(life) => self.step(at, input),
            Event::Deliver { to, from, body } => self.deliver(from, to, &body),
            _ => {}
        }
    }

    fn deliver(&mut self, from: usize, to: usize, body: &str) {
        let envelope: Envelope = serde_json::from_str(body).expect("an envelope");
        let (node, now) = (envelope.to, self.now);
        let mut effects = Vec::new();
        let receipt =
            self.sites[to].node.as_mut().map(|it| it.receive(now, envelope, &mut effects));
        self.perform(to, effects);
        if let Some(receipt) = receipt.filter(|receipt| *receipt != Receipt::Ok) {
            let life = self.sites[from].life;
            let input = Input::Receipt { to: node, receipt };
            self.at(now + Duration::from_millis(1), Event::Input { at: from, life, input });
        }
    }

    fn undelivered(&mut self, from: usize, _: usize, body: &str) {
        let envelope: Envelope = serde_json::from_str(body).expect("an envelope");
        self.lost(from, envelope.to);
    }

    fn lost(&mut self, from: usize, node: NodeId) {
        let (life, input) = (self.sites[from].life, Input::Lost(node));
        let time = self.now + Duration::from_millis(1);
        self.at(time, Event::Input { at: from, life, input });
    }

    fn step(&mut self, at: usize, input: Input<u64>) {
        let now = self.now;
        let mut effects = Vec::new();
        if let Some(node) = &mut self.sites[at].node {
            node.step(now, input, &mut effects);
        }
        self.perform(at, effects);
    }

    fn between(&mut self, (low, high): (u64, u64)) -> Duration {
        Duration::from_millis(self.rng.random_range(low..=high))
    }

    fn by_chance(&mut self, per_mille: u32) -> bool {
        per_mille > 0 && self.rng.random_range(0..1000) < per_mille
    }

    /// Whether what one says can reach the other.
    fn reaches(&self, from: usize, to: usize) -> bool {
        !self.cut.contains(&from) && !self.cut.contains(&to)
    }

    fn perform(&mut self, at: usize, effects: Vec<Effect<Numbers>>) {
        for effect in effects {
            self.perform_one(at, effect);
        }
        let site = &mut self.sites[at];
        if let Some(node) = site.node.as_mut().filter(|node| node.wants_snapshot()) {
            let mut more = Vec::new();
            node.snapshot(&Numbers(site.state.clone()), &mut more);
            self.perform(at, more);
        }
    }

    fn perform_one(&mut self, at: usize, effect: Effect<Numbers>) {
        let name = self.sites[at].name.clone();
        match effect {
            Effect::Store { batch, changes } => {
                let stall = if self.by_chance(self.weather.stalls) { 500 } else { 0 };
                let time = self.now + self.between(self.weather.sync);
                let time = time + Duration::from_millis(stall);
                let site = &mut self.sites[at];
                let life = site.life;
                if let Some(time) = site.disk.submit(changes, batch, time) {
                    self.at(time, Event::Stored { at, life, batch });
                }
            }
            Effect::Send { to, envelope } => self.send(at, to, &envelope),
            Effect::Ask { address, .. } => {
                let to = usize::from(address.ip().octets()[3]) - 1;
                let is_there = to < self.sites.len() && self.is_up(to) && self.reaches(at, to);
                let node = is_there.then(|| self.sites[to].node.as_ref()).flatten();
                let (hello, life) = (node.map(Node::hello), self.sites[at].life);
                let time = self.now + self.between(self.weather.delay);
                self.at(time, Event::Heard { at, life, address, hello });
            }
            Effect::Apply { index, command, number } => {
                let checked = self.oracle.applies(index, command);
                self.check(checked);
                let site = &mut self.sites[at];
                site.state.push(command);
                site.index = index;
                if number.is_some() {
                    self.oracle.acknowledged.insert(command);
                    self.say(format!("{name} has {command} committed"));
                }
                if number.is_some_and(|number| number != command) {
                    self.fail(format!("{command} comes back as {number:?}"));
                }
            }
            Effect::Restore { index, state } => {
                let held = self.oracle.holds(index, &state.0);
                self.check(held);
                self.say(format!("{name} goes on from a snapshot of {} numbers", state.0.len()));
                (self.sites[at].index, self.sites[at].state) = (index, state.0);
            }
            Effect::Lead { .. } => {
                // Whatever was ever acknowledged is applied.
                let known: BTreeSet<u64> = self.sites[at].state.iter().copied().collect();
                let missing = self.oracle.acknowledged.difference(&known).next().copied();
                if let Some(missing) = missing {
                    self.fail(format!("{name} leads and has not heard of {missing}"));
                }
                self.say(format!("{name} leads"));
            }
            Effect::Follow => {
                self.sites[at].confirming.clear();
                self.say(format!("{name} leads no more"));
            }
            Effect::Confirmed { number } => self.confirmed(at, number),
            Effect::Reshaped { number, outcome } => {
                let outcome =
                    outcome.map_or_else(|refused| refused.to_string(), |()| "done".into());
                self.say(format!("{name}: wish {number}: {outcome}"));
            }
            Effect::Note(note) => self.say(format!("{name}: {note}")),
            Effect::Die(why) => {
                self.say(format!("{name} dies: {why}"));
                self.kill(at, 0);
            }
        }
    }

    /// Whoever is confirmed to lead knows everything that was acknowledged when it
    /// asked.
    fn confirmed(&mut self, at: usize, number: u64) {
        let site = &mut self.sites[at];
        let known: BTreeSet<u64> = site.state.iter().copied().collect();
        let later = site.confirming.split_off(&(number + 1));
        let asked = std::mem::replace(&mut site.confirming, later);
        let due = asked.into_values().flatten();
        let missing: BTreeSet<u64> = due.filter(|due| !known.contains(due)).collect();
        let name = site.name.clone();
        if !missing.is_empty() {
            self.fail(format!("{name} is confirmed to lead and has not heard of {missing:?}"));
        }
        self.say(format!("{name} is confirmed to lead"));
    }

    fn send(&mut self, from: usize, to: SocketAddrV4, envelope: &Envelope) {
        let to = usize::from(to.ip().octets()[3]) - 1;
        let arrives = to < self.sites.len() && self.reaches(from, to);
        if !arrives || self.by_chance(self.weather.lost) {
            return self.lost(from, envelope.to);
        }
        let body = serde_json::to_string(envelope).expect("an envelope");
        let soon = self.now + self.between(self.weather.delay);
        let busy = self.busy.entry((from, to)).or_default();
        *busy = soon.max(*busy);
        let time = *busy;
        self.at(time, Event::Deliver { to, from, body });
    }

    // ---- for people ----

    fn check(&mut self, held: Result<(), String>) {
        if let Err(what) = held {
            self.fail(what);
        }
    }

    fn fail(&mut self, what: String) {
        self.lines.push(format!("BROKEN: {what}"));
        self.failure.get_or_insert(what);
    }

    fn say(&mut self, line: String) {
        let mut line = line;
        for (id, name) in &self.names {
            line = line.replace(id, name);
        }
        // Groups are drawn; which one it is says nothing.
        if let Some(start) = line.find("the group ")
            && let Some(id) = line.get(start + 10..start + 26)
            && id.chars().all(|digit| digit.is_ascii_hexdigit())
        {
            line = line.replace(id, "G");
        }
        self.lines.push(line);
    }

    /// How every node is, one line each.
    pub(crate) fn look(&self) -> Vec<String> {
        let look = |site: &Site| match &site.node {
            None => format!("{} is down", site.name),
            Some(node) => {
                let role = match (node.leads(), node.why_outside()) {
                    (true, _) => "leads",
                    (_, Some(_)) => "is outside",
                    _ => "follows",
                };
                let first = site.state.first().map_or(String::new(), |it| format!(": {it}"));
                let last = site.state.last().filter(|_| site.state.len() > 1);
                let last = last.map_or(String::new(), |last| format!("..{last}"));
                format!("{} {role}, {} numbers{first}{last}", site.name, site.state.len())
            }
        };
        self.sites.iter().map(look).collect()
    }
}
