//! Runs of random chance: faults of all kinds while numbers are proposed, then all
//! is healed, and everything acknowledged must be everywhere.

use super::world::{Weather, World};
use rand::RngExt;
use ringleader::consensus::founding::Entrance;
use ringleader::consensus::reshaping::Wish;
use std::ops::AddAssign;
use std::time::Duration;

/// How many rounds of faults there are in a run.
const ROUNDS: u32 = 60;

/// How long all may take to come to rest in the end.
const RECOVERY: Duration = Duration::from_secs(60);

/// What has happened in runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    acknowledged: usize,
    leaders: usize,
    snapshots: usize,
    confirmed: usize,
    added: usize,
    removed: usize,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.acknowledged += other.acknowledged;
        self.leaders += other.leaders;
        self.snapshots += other.snapshots;
        self.confirmed += other.confirmed;
        self.added += other.added;
        self.removed += other.removed;
    }
}

struct Run {
    world: World,
    next: u64,
    wishes: u64,
    /// Sites whose disk was erased and not replaced yet, or that were never added.
    outside: Vec<usize>,
    printed: bool,
    /// Nodes are killed and started again at once, many times a second.
    flickers: bool,
    tally: Tally,
}

/// Runs a seed.
pub(crate) fn run(seed: u64, print: bool) -> Result<Tally, String> {
    let mut world = World::new(seed);
    let size = if world.rng.random_bool(0.3) { 5 } else { 3 };
    let all: Vec<_> = (0..size).map(World::address).collect();
    for (at, name) in ["a", "b", "c", "d", "e"].iter().take(size).enumerate() {
        let entrance = Entrance::with_founders(World::address(at), &all)?;
        world.add_site(name, entrance);
        world.start(at);
    }
    let tally = Tally::default();
    let outside = Vec::new();
    let mut run =
        Run { world, next: 0, wishes: 0, outside, printed: print, flickers: false, tally };
    run.world.run_for(Duration::from_secs(5));
    for _ in 0..ROUNDS {
        run.fault();
        run.traffic(10);
        run.check()?;
    }
    run.recover()?;
    Ok(run.tally)
}

impl Run {
    fn pick(&mut self, what: impl Fn(&World, usize) -> bool) -> Option<usize> {
        let fit: Vec<_> = (0..self.world.sites.len()).filter(|at| what(&self.world, *at)).collect();
        (!fit.is_empty()).then(|| fit[self.world.rng.random_range(0..fit.len())])
    }

    /// How many sites, those outside aside, run and are reached.
    fn healthy(&self) -> usize {
        let world = &self.world;
        let is_well =
            |at: &usize| world.is_up(*at) && !world.cut.contains(at) && !self.outside.contains(at);
        (0..world.sites.len()).filter(is_well).count()
    }

    /// Who has come into the group by now is outside no more.
    fn see_who_came_in(&mut self) {
        let Some(leader) = self.world.leader() else { return };
        let node = |at: usize| self.world.sites[at].node.as_ref();
        let standings = node(leader).map(|node| node.standings()).unwrap_or_default();
        let votes = |at: &usize| {
            node(*at).is_some_and(|it| standings.get(&it.id()).is_some_and(|it| it.votes))
        };
        let inside: Vec<_> = self.outside.iter().copied().filter(votes).collect();
        self.outside.retain(|at| !inside.contains(at));
    }

    fn fault(&mut self) {
        self.see_who_came_in();
        let outside = self.outside.clone();
        match self.world.rng.random_range(0..18) {
            16 => self.flickers = true,
            17 => self.flickers = false,
            0 | 1 => {
                if let Some(at) = self.pick(|world, at| world.is_up(at)) {
                    let kept = self.world.rng.random_range(0..4);
                    self.world.kill(at, kept);
                }
            }
            2..=4 => {
                if let Some(at) = self.pick(|world, at| world.sites[at].node.is_none()) {
                    self.world.start(at);
                }
            }
            5 => {
                if let Some(at) = self.world.leader() {
                    self.world.cut.insert(at);
                }
            }
            6 => {
                if let Some(at) = self.pick(|world, at| world.is_up(at)) {
                    self.world.cut.insert(at);
                }
            }
            7 => self.world.cut.clear(),
            8 => {
                if let Some(at) = self.pick(|world, at| world.is_up(at)) {
                    self.world.pause(at);
                }
            }
            9 => self.wake_all(),
            10 => {
                let weather = [
                    Weather::FAIR,
                    Weather { delay: (0, 80), sync: (0, 50), lost: 20, stalls: 20 },
                    Weather { delay: (1, 5), sync: (1, 300), lost: 0, stalls: 100 },
                    Weather { delay: (1, 5), sync: (1, 5), lost: 200, stalls: 0 },
                ];
                self.world.weather = weather[self.world.rng.random_range(0..weather.len())];
            }
            // A disk is lost only while the others could do without it.
            11 if self.outside.is_empty() && self.healthy() == self.world.sites.len() => {
                if let Some(at) = self.pick(|world, at| world.is_up(at)) {
                    self.world.erase(at);
                    self.world.start(at);
                    self.outside.push(at);
                }
            }
            12 if self.world.sites.len() < 6 && outside.is_empty() => {
                let name = format!("n{}", self.world.sites.len());
                let at = self.world.add_site(&name, Entrance::Wait);
                self.world.start(at);
                self.outside.push(at);
            }
            13 | 14 => self.add_who_is_outside(),
            15 if outside.is_empty() && self.world.sites.len() > 3 => {
                if let Some(at) = self.pick(|_, _| true) {
                    self.wish(Wish::Remove(World::address(at)));
                }
            }
            _ => {}
        }
    }

    fn wake_all(&mut self) {
        for at in 0..self.world.sites.len() {
            self.world.resume(at);
        }
    }

    fn wish(&mut self, wish: Wish) {
        if let Some(leader) = self.world.leader() {
            self.wishes += 1;
            self.world.wish(leader, self.wishes, wish);
        }
    }

    fn add_who_is_outside(&mut self) {
        for at in self.outside.clone() {
            self.wish(Wish::Add(World::address(at)));
        }
    }

    /// Numbers are proposed, and leaders asked whether they lead, for so many
    /// tenths of a second.
    fn traffic(&mut self, tenths: u32) {
        for _ in 0..tenths {
            for at in 0..self.world.sites.len() {
                if self.world.leads(at) && self.world.is_up(at) {
                    self.next += 1;
                    self.world.propose(at, self.next);
                    self.world.confirm(at);
                }
            }
            for _ in 0..5 {
                self.world.run_for(Duration::from_millis(20));
                self.flicker();
            }
        }
    }

    fn flicker(&mut self) {
        if self.flickers
            && self.world.rng.random_bool(0.3)
            && let Some(at) = self.pick(|world, at| world.is_up(at))
        {
            let kept = self.world.rng.random_range(0..4);
            self.world.kill(at, kept);
            self.world.start(at);
        }
    }

    fn check(&mut self) -> Result<(), String> {
        for line in std::mem::take(&mut self.world.lines) {
            if self.printed {
                println!("{} {line}", self.world.now);
            }
            self.tally.leaders += usize::from(line.ends_with(" leads"));
            self.tally.snapshots += usize::from(line.contains("goes on from a snapshot"));
            self.tally.confirmed += usize::from(line.ends_with("is confirmed to lead"));
            self.tally.added += usize::from(line.ends_with("has caught up and votes"));
            self.tally.removed += usize::from(line.ends_with("is out of the group"));
            if line.contains(" dies: ") {
                return Err(line);
            }
        }
        self.world.failure.clone().map_or(Ok(()), Err)
    }

    /// All is healed; then all must be as it should, within a while.
    fn recover(&mut self) -> Result<(), String> {
        self.world.weather = Weather::FAIR;
        self.flickers = false;
        self.world.cut.clear();
        self.wake_all();
        for at in 0..self.world.sites.len() {
            if self.world.sites[at].node.is_none() {
                self.world.start(at);
            }
        }
        let end = self.world.now + RECOVERY;
        while self.world.now < end {
            self.traffic(10);
            self.check()?;
        }
        self.world.run_for(Duration::from_secs(5));
        self.check()?;
        let Some(leader) = self.world.leader() else { return Err("nobody leads".into()) };
        let whole = self.world.sites[leader].state.clone();
        let missing = self.world.oracle.acknowledged.iter().find(|it| !whole.contains(it));
        if let Some(missing) = missing {
            return Err(format!("{missing} was acknowledged, and is gone"));
        }
        self.tally.acknowledged += self.world.oracle.acknowledged.len();
        let standings = self.world.sites[leader].node.as_ref().map(|node| node.standings());
        let roster = standings.unwrap_or_default();
        for site in &self.world.sites {
            // Who was removed need not know it.
            let inside = site.node.as_ref().is_some_and(|node| roster.contains_key(&node.id()));
            if inside && site.state != whole {
                let (has, all) = (site.state.len(), whole.len());
                return Err(format!("{} has {has} numbers of {all}", site.name));
            }
        }
        Ok(())
    }
}
