//! A master alone, over a disk of which a kill leaves any number of the batches that
//! were under way, and a workload of names: files are made, deleted, brought back, moved
//! and copied. After each kill, what was acknowledged must be there, what was not may be
//! there as a whole or not at all, and nothing else.
//!
//! What the names ought to be is worked out here, apart from the product: see [`Names`].

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ringleader::consensus::founding::Entrance;
use ringleader::consensus::replica::{Effect, Input, Replica};
use ringleader::consensus::{log, node};
use ringleader::gfs::master::{self, Leader, Settings};
use ringleader::gfs::messages::{MasterReply, MasterRequest};
use ringleader::gfs::state::State;
use ringleader::gfs::{CHUNK_BYTES, FileName};
use ringleader::machine::{Machine, Time};
use ringleader::sim::disk::Disk;
use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// How many kills one run has.
pub(crate) const KILLS: usize = 10;

/// How many requests are under way at once.
const PIPELINED: usize = 6;

/// Files and folders that collide with each other often.
const NAMES: [&str; 8] = ["a", "b", "c", "d", "d/x", "d/y", "e", "e/d/x"];

/// After how many entries the log is written down as a whole: much sooner than in
/// earnest.
const SNAPSHOT_EVERY: u64 = 20;

#[derive(Clone, Debug)]
enum Op {
    /// The number, which no other file has, is told by the size of its chunks.
    Create(&'static str, u64),
    Delete(&'static str),
    Undelete(&'static str),
    Rename(&'static str, &'static str),
    Snapshot(&'static str, &'static str),
}

/// What files there are, by their names, and what was deleted.
#[derive(Clone, Debug, Default, PartialEq)]
struct Names {
    files: BTreeMap<String, u64>,
    deleted: Vec<(String, u64)>,
}

impl Names {
    fn is_free(&self, name: &str) -> bool {
        let clash = |other: &String| {
            other == name
                || other.starts_with(&format!("{name}/"))
                || name.starts_with(&format!("{other}/"))
        };
        !self.files.keys().any(clash)
    }

    /// Carries out `op`; whether it can be.
    fn apply(&mut self, op: &Op) -> bool {
        match op {
            Op::Create(name, number) => {
                let can = self.is_free(name);
                if can {
                    self.files.insert((*name).to_owned(), *number);
                }
                can
            }
            Op::Delete(name) => {
                let file = self.files.remove(*name);
                file.map(|number| self.deleted.push(((*name).to_owned(), number))).is_some()
            }
            Op::Undelete(name) => {
                let last = self.deleted.iter().rposition(|(deleted, _)| deleted == name);
                let Some(place) = last.filter(|_| self.is_free(name)) else { return false };
                let (name, number) = self.deleted.remove(place);
                self.files.insert(name, number);
                true
            }
            Op::Rename(from, to) | Op::Snapshot(from, to) => {
                let moved: Vec<(String, String, u64)> = self
                    .files
                    .iter()
                    .filter_map(|(name, number)| {
                        let rest = name.strip_prefix(from)?;
                        let is_in = rest.is_empty() || rest.starts_with('/');
                        is_in.then(|| (name.clone(), format!("{to}{rest}"), *number))
                    })
                    .collect();
                let is_within = to == from || to.starts_with(&format!("{from}/"));
                if moved.is_empty() || is_within || !self.is_free(to) {
                    return false;
                }
                for (old, new, number) in moved {
                    if matches!(op, Op::Rename(..)) {
                        self.files.remove(&old);
                    }
                    self.files.insert(new, number);
                }
                true
            }
        }
    }

    /// What a master holds.
    fn of(state: &State) -> Self {
        let number = |chunk_bytes: u64| chunk_bytes - CHUNK_BYTES.start();
        let files = state.files_after(None);
        let deleted = state.deleted();
        Self {
            files: files.map(|(name, it)| (name.to_string(), number(it.chunk_bytes))).collect(),
            deleted: deleted.map(|it| (it.name.to_string(), number(it.file.chunk_bytes))).collect(),
        }
    }
}

struct World {
    now: Time,
    rng: StdRng,
    disk: Disk,
    master: Replica<Leader<u64>>,
    /// What is there for certain.
    names: Names,
    /// What was asked for and not answered, in order.
    under_way: VecDeque<(u64, Op)>,
    last_request: u64,
    acknowledged: usize,
}

/// One run; how many requests were acknowledged.
pub(crate) fn run(seed: u64) -> Result<usize, String> {
    let mut rng = StdRng::seed_from_u64(seed);
    let disk = Disk::default();
    let (master, first) = start(Time::default(), &disk, &mut rng);
    let mut world = World {
        now: Time::default(),
        rng,
        disk,
        master,
        names: Names::default(),
        under_way: VecDeque::new(),
        last_request: 0,
        acknowledged: 0,
    };
    world.perform(first)?;
    for _ in 0..KILLS {
        let steps = world.rng.random_range(1..200);
        for _ in 0..steps {
            world.go_on()?;
        }
        world.kill()?;
    }
    Ok(world.acknowledged)
}

fn start(
    now: Time,
    disk: &Disk,
    rng: &mut StdRng,
) -> (Replica<Leader<u64>>, Vec<Effect<Leader<u64>>>) {
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9000);
    let entrance = Entrance::Alone;
    let place = node::Settings { address, entrance, snapshot_every: SNAPSHOT_EVERY };
    let recovered = log::recover(disk.store()).unwrap();
    let (rng, mut first) = (StdRng::from_rng(rng), Vec::new());
    let settings = (place, Settings::default());
    let master = Replica::start(now, settings, recovered, rng, &mut first).unwrap();
    (master, first)
}

impl World {
    /// One thing happens: a request, the disk, or time.
    fn go_on(&mut self) -> Result<(), String> {
        self.now = self.now + Duration::from_millis(self.rng.random_range(0..20));
        match self.rng.random_range(0..4) {
            0 | 1 if self.under_way.len() < PIPELINED && self.master.leads() => self.ask(),
            3 => self.step(Input::Tick),
            _ => self.store_some(),
        }
    }

    fn ask(&mut self) -> Result<(), String> {
        let name = |rng: &mut StdRng| NAMES[rng.random_range(0..NAMES.len())];
        let (one, other) = (name(&mut self.rng), name(&mut self.rng));
        self.last_request += 1;
        let op = match self.rng.random_range(0..10) {
            0..4 => Op::Create(one, self.last_request),
            4 | 5 => Op::Delete(one),
            6 => Op::Undelete(one),
            7 | 8 => Op::Rename(one, other),
            // It looks at what is there as it comes, not only in its turn.
            _ if self.under_way.is_empty() => Op::Snapshot(one, other),
            _ => Op::Delete(other),
        };
        let file = |name: &str| FileName::new(name).unwrap();
        let request = match op {
            Op::Create(name, number) => MasterRequest::Create {
                name: file(name),
                chunk_bytes: Some(CHUNK_BYTES.start() + number),
                copies: None,
            },
            Op::Delete(name) => MasterRequest::Delete { name: file(name) },
            Op::Undelete(name) => MasterRequest::Undelete { name: file(name) },
            Op::Rename(from, to) => MasterRequest::Rename { from: file(from), to: file(to) },
            Op::Snapshot(from, to) => MasterRequest::Snapshot { from: file(from), to: file(to) },
        };
        self.under_way.push_back((self.last_request, op));
        self.step(Input::Own(master::Input::Request { from: self.last_request, request }))
    }

    /// Some of what is queued is on the disk now.
    fn store_some(&mut self) -> Result<(), String> {
        let count = self.rng.random_range(0..=self.disk.queued().min(3));
        for _ in 0..count {
            let Some(batch) = self.disk.first_queued() else { break };
            self.disk.keep_up_to(batch);
            self.step(Input::Stored { batch })?;
        }
        Ok(())
    }

    fn step(&mut self, input: Input<Leader<u64>>) -> Result<(), String> {
        let mut effects = Vec::new();
        self.master.step(self.now, input, &mut effects);
        self.perform(effects)
    }

    fn perform(&mut self, effects: Vec<Effect<Leader<u64>>>) -> Result<(), String> {
        for effect in effects {
            match effect {
                Effect::Store { batch, changes } => {
                    self.disk.submit(changes, batch, self.now);
                }
                Effect::Own(master::Effect::Reply { to, reply }) => self.answered(to, &reply)?,
                Effect::Die(why) => return Err(why),
                _ => {}
            }
        }
        Ok(())
    }

    fn answered(&mut self, to: u64, reply: &MasterReply) -> Result<(), String> {
        let Some((number, op)) = self.under_way.pop_front() else {
            return Err(format!("request {to} is answered twice"));
        };
        if number != to {
            return Err(format!("request {to} is answered before {number}"));
        }
        let could = self.names.apply(&op);
        let done = matches!(reply, MasterReply::Done(_));
        self.acknowledged += usize::from(done);
        match done == could {
            true => Ok(()),
            false => Err(format!("{op:?} was answered {reply:?}, with {:?}", self.names)),
        }
    }

    /// It is killed, and starts over what is on its disk.
    fn kill(&mut self) -> Result<(), String> {
        let kept = self.rng.random_range(0..=self.disk.queued());
        self.disk.crash(kept);
        let (master, first) = start(self.now, &self.disk, &mut self.rng);
        self.master = master;
        let mut unanswered = std::mem::take(&mut self.under_way);
        self.perform(first)?;
        while !self.master.leads() {
            self.store_some()?;
        }
        let there = self.master.state().map(Names::of).unwrap_or_default();
        while self.names != there {
            let Some((_, op)) = unanswered.pop_front() else {
                return Err(format!("after a kill there is {there:?}, not {:?}", self.names));
            };
            self.names.apply(&op);
        }
        Ok(())
    }
}
