//! The faults of a run, and how they end.

mod council;

use super::{FIRST, Judgement, NEVER, Options, Run, names_at, server};
use crate::kv::ring::{Point, RING_POINTS};
use crate::kv::server::DEFAULT_LEASE;
use crate::machine::Time;
use crate::sim::cluster::{End, Start};
use crate::sim::network::{Party, Wall};
use crate::view::{Group, Revision};
use crate::wire::Identity;
use council::Council;
use rand::RngExt;
use rand::rngs::StdRng;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

/// Whoever was away has renewed its lease after so long, or has lost it.
const SHAKY: Duration = Duration::from_secs(3);

/// After a disk was lost, it takes so long until the others have noticed.
const QUIET: Duration = Duration::from_secs(6);

/// How long a fault lasts, in milliseconds: up to more than two leases.
const SPAN_MS: Range<u64> = 50..10_000;

/// About when the lease of a server runs out that was well until now.
const ABOUT_A_LEASE_MS: Range<u64> = 2900..4200;

/// How long the leases of a server are that has short ones.
const SHORT_LEASE_MS: Range<u64> = 1500..4000;

/// How soon a fault follows that was waiting for what has just happened, in milliseconds.
const SOON_MS: Range<u64> = 5..60;

/// How soon somebody sees to a full disk, in milliseconds.
const SEEN_TO_MS: Range<u64> = 300..2000;

/// For how long somebody sleeps at a time who dozes, in milliseconds: shorter than servers
/// wait for an answer to a heartbeat.
const NAP_MS: Range<u64> = 200..700;

/// For how long it is awake then, in milliseconds: for a few ticks of its own.
const AWAKE_MS: Range<u64> = 20..120;

/// For how long it dozes in all, in milliseconds: longer than an election and a lease.
const DOZE_MS: Range<u64> = 6000..12_000;

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A server dies, and is started again over its disk a while later.
    Kill,
    /// Several servers die at the same moment.
    KillSeveral,
    /// Every server dies at the same moment, and each is started again at its time.
    KillAll,
    /// The machine of a server loses power: what was not synced may be gone.
    FailPower,
    /// A server is lost with its disk.
    Lose,
    /// A server is lost with its disk, and another one takes its address.
    Replace,
    /// A server's disk is damaged (a bit has flipped, or can't be read): the server
    /// refuses to start over it, and starts over an empty one.
    Damage,
    /// A server is stopped and a copy of its disk is made; later, when it has been
    /// started again, the copy is put back in the place of the disk.
    Restore,
    /// A server's disk fails to sync, or a viewleader's, which ends it.
    FailSync,
    /// A server's disk has no room for a while.
    Fill,
    /// A server's disk, or a viewleader's, stores nothing for a while.
    Stall,
    /// A server stands still for a while, often longer than its lease.
    Pause,
    /// A server can reach nobody, nor be reached, for a while.
    Cut,
    /// What goes from one party to another is lost, and not what comes back.
    CutOneWay,
    /// A server can't reach the viewleaders.
    CutFromViewleader,
    /// Everybody is in one of two halves: servers, viewleaders, clients.
    Split,
    /// Most of the ring is one side, the rest with the viewleaders the other.
    SplitMajority,
    /// Nobody can reach a viewleader.
    CutViewleader,
    /// A viewleader can't reach the others, and everybody else can reach it.
    CutFromFellows,
    /// A viewleader is cut off from the others with some of the servers and clients, and
    /// sleeps, and is awake for a moment again and again: so it takes long to find out that
    /// another one was elected.
    DozeApart,
    /// A client can reach nobody.
    CutClient,
    /// A server is added.
    Join,
    /// Several servers are added at once.
    JoinSeveral,
    /// A server is told to leave.
    Drain,
    /// A viewleader dies, and is started again a while later.
    KillViewleader,
    /// All viewleaders die at the same moment, and each is started again at its time.
    KillViewleaders,
    /// A viewleader is told to end, and is started again a while later.
    EndViewleader,
    /// A viewleader stands still for a while.
    PauseViewleader,
    /// A viewleader is lost with its disk, and replaced; when that is done, it may be
    /// that all of them lose their power and one its disk.
    LoseViewleader,
    /// A viewleader is added.
    AddViewleader,
    /// A viewleader is removed.
    RemoveViewleader,
}

impl Fault {
    /// Each of them.
    pub const ALL: [Self; 31] = [
        Self::Kill,
        Self::KillSeveral,
        Self::KillAll,
        Self::FailPower,
        Self::Lose,
        Self::Replace,
        Self::Damage,
        Self::Restore,
        Self::FailSync,
        Self::Fill,
        Self::Stall,
        Self::Pause,
        Self::Cut,
        Self::CutOneWay,
        Self::CutFromViewleader,
        Self::Split,
        Self::SplitMajority,
        Self::CutViewleader,
        Self::CutFromFellows,
        Self::DozeApart,
        Self::CutClient,
        Self::Join,
        Self::JoinSeveral,
        Self::Drain,
        Self::KillViewleader,
        Self::KillViewleaders,
        Self::EndViewleader,
        Self::PauseViewleader,
        Self::LoseViewleader,
        Self::AddViewleader,
        Self::RemoveViewleader,
    ];

    /// How likely it is, beside others.
    fn weight(self) -> u32 {
        match self {
            Self::Join | Self::Kill => 4,
            Self::Pause | Self::Cut | Self::KillViewleader => 3,
            Self::KillAll | Self::KillSeveral | Self::Lose | Self::Drain | Self::JoinSeveral => 2,
            _ if self.is_of_a_group() => 2,
            _ => 1,
        }
    }

    /// Whether it happens only where there are several viewleaders.
    pub(super) fn is_of_a_group(self) -> bool {
        matches!(
            self,
            Self::CutFromFellows
                | Self::DozeApart
                | Self::KillViewleaders
                | Self::EndViewleader
                | Self::LoseViewleader
                | Self::AddViewleader
                | Self::RemoveViewleader
        )
    }
}

/// What is to be undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Down,
    /// Down, and it will come back over this old copy of its disk, or an empty one.
    DownOver {
        copy: Option<usize>,
    },
    Paused,
    /// Asleep, or awake for a moment, and both again and again until then.
    Dozing {
        is_awake: bool,
        until: Time,
    },
    Full,
    Stalled,
}

/// What is wrong now, and what will be.
#[derive(Debug)]
pub(super) struct Troubles {
    /// When a fault happens, the next one last.
    plan: Vec<Time>,
    /// What follows from something that has happened: when, and to which server.
    sequels: Vec<(Time, Fault, usize)>,
    /// Who is in trouble, and until when. A server by its last life.
    parties: BTreeMap<Party, (Trouble, Time)>,
    /// The walls that stand, until when, and whether they stand around clients only.
    walls: Vec<(Wall, Time, bool)>,
    /// Who was in trouble just now, and may lose its lease yet, by disk.
    shaky: BTreeMap<usize, Time>,
    /// No other faults until then.
    quiet_until: Time,
    /// Which addresses the lost have left.
    vacant: Vec<u8>,
    last_host: u8,
    /// Copies of disks that were put aside: whose, and where.
    copies: BTreeMap<usize, usize>,
    /// Where viewleaders stand.
    pub(super) council: Council,
    /// The places that were chosen for newcomers.
    places: BTreeSet<Point>,
    due: Time,
}

impl Troubles {
    pub(super) fn draw(rng: &mut StdRng, options: &Options) -> Self {
        let moments =
            FIRST.since(Time::default()).as_millis() as u64..options.busy.as_millis() as u64;
        let count = if options.kinds.is_empty() { 0 } else { options.faults };
        let mut plan: Vec<Time> =
            (0..count).map(|_| Time::from_millis(rng.random_range(moments.clone()))).collect();
        plan.sort_unstable();
        plan.reverse();
        Self {
            due: plan.last().copied().unwrap_or(NEVER),
            plan,
            sequels: Vec::new(),
            parties: BTreeMap::new(),
            walls: Vec::new(),
            shaky: BTreeMap::new(),
            quiet_until: Time::default(),
            vacant: Vec::new(),
            last_host: 1,
            copies: BTreeMap::new(),
            council: Council::of(options.viewleaders),
            places: BTreeSet::new(),
        }
    }

    /// When the next thing begins or ends.
    pub(super) fn due(&self) -> Time {
        self.due
    }

    fn note_due(&mut self) {
        let parties = self.parties.values().map(|(_, until)| *until);
        let walls = self.walls.iter().map(|(_, until, _)| *until);
        let sequels = self.sequels.iter().map(|(time, ..)| *time);
        let ends = parties.chain(walls).chain(sequels).chain(self.plan.last().copied());
        self.due = ends.min().unwrap_or(NEVER);
    }
}

impl Run {
    /// Undoes what is over, and does what is next.
    pub(super) fn meddle(&mut self) {
        self.undo(false);
        let now = self.cluster.now();
        while let Some(at) = self.troubles.sequels.iter().position(|(time, ..)| *time <= now) {
            let (_, fault, victim) = self.troubles.sequels.swap_remove(at);
            if self.cluster.is_alive(victim) {
                self.harm(fault, victim);
            }
        }
        while self.troubles.plan.last().is_some_and(|time| *time <= now) {
            self.troubles.plan.pop();
            self.do_harm();
        }
        self.troubles.note_due();
    }

    /// This fault follows, if it is of the kinds that this run has and there is time.
    fn is_followed_by(&mut self, fault: Fault, victim: usize, after_ms: Range<u64>) {
        let after = Duration::from_millis(self.rng.random_range(after_ms));
        let time = self.cluster.now() + after;
        let is_in_time = time < Time::default() + self.options.busy;
        if self.options.kinds.contains(&fault) && is_in_time && self.rng.random_bool(0.5) {
            self.troubles.sequels.push((time, fault, victim));
            self.troubles.note_due();
        }
    }

    /// There is a new view. When somebody has left it, arcs become one before long, in
    /// which something is pending if a disk stores nothing meanwhile; and when they have,
    /// those that start again then go by what they have just written down.
    pub(super) fn follow_view(&mut self) {
        let (view, alive) = (self.cluster.view(), self.alive());
        let now = (view.members.len(), view.groups.len());
        let before = std::mem::replace(&mut self.counted, now);
        if alive.is_empty() {
            return;
        }
        let victim = alive[self.rng.random_range(0..alive.len())];
        if now.0 < before.0 {
            self.is_followed_by(Fault::Stall, victim, SOON_MS);
        }
        if now.1 < before.1 {
            self.is_followed_by(Fault::KillSeveral, victim, SOON_MS);
        }
    }

    /// Nothing is wrong any more, and everybody is there.
    pub(super) fn heal(&mut self) -> Judgement {
        self.say(|_| "everything heals".to_owned());
        self.troubles.plan.clear();
        self.troubles.sequels.clear();
        self.cluster.mend_disks();
        self.undo(true);
        self.troubles.note_due();
        Ok(())
    }

    /// Those that have ended by themselves: if a disk failed, it is well again when they
    /// come back.
    pub(super) fn take_ended(&mut self) {
        for (party, end) in self.cluster.ended() {
            if end == End::DiskFailed {
                let span = self.span();
                self.is_in_trouble_for(party, Trouble::Down, span);
                self.troubles.note_due();
            }
        }
    }

    fn span(&mut self) -> Duration {
        // What is over about when a lease is, is worth a look.
        let range = if self.rng.random_bool(0.25) { ABOUT_A_LEASE_MS } else { SPAN_MS };
        Duration::from_millis(self.rng.random_range(range))
    }

    /// Starts a new server, on a vacant address or on a new one.
    pub(super) fn join(&mut self) {
        let vacant = &mut self.troubles.vacant;
        let host = if vacant.is_empty() || self.rng.random_bool(0.5) {
            self.troubles.last_host += 1;
            self.troubles.last_host
        } else {
            vacant.remove(self.rng.random_range(0..vacant.len()))
        };
        let lazy = self.rng.random_range(0..100) < self.options.lazy;
        let place = self.options.edges && self.rng.random_bool(0.6);
        let place = place.then(|| self.place_at_an_edge()).flatten();
        let disk = place.map(|point| self.cluster.disk_of_newcomer(&names_at(point)[0], lazy));
        self.start(host, disk, lazy);
    }

    /// A place right at a key, or right behind one, where nobody has been yet.
    fn place_at_an_edge(&mut self) -> Option<Point> {
        let key = &self.keys[self.rng.random_range(0..self.keys.len())];
        let step = self.rng.random_range(0..2);
        let point = Point::at((Point::of(key).number() + step) % RING_POINTS);
        self.troubles.places.insert(point).then_some(point)
    }

    fn start(&mut self, host: u8, disk: Option<usize>, lazy: bool) -> usize {
        let (clock, seed, batch) = (self.clock(), self.rng.random(), self.options.batch);
        let is_short = self.options.leases && self.rng.random_bool(0.5);
        let short = Duration::from_millis(self.rng.random_range(SHORT_LEASE_MS));
        let lease = if is_short { short } else { DEFAULT_LEASE };
        let name = format!("s{host}");
        self.cluster.start(Start { name: &name, host, disk, seed, clock, lazy, batch, lease })
    }

    /// Starts a server that has died again, over its disk or another one.
    fn start_again(&mut self, index: usize, over: Trouble) {
        let (host, disk) = (self.cluster.host(index), self.cluster.disk(index));
        let lazy = self.cluster.is_lazy(disk);
        let old_copy = self.troubles.copies.get(&disk).copied();
        let disk = match (over, old_copy) {
            (Trouble::DownOver { copy }, _) => copy,
            // The copy is of an earlier life only if there was one since.
            (_, Some(copy))
                if self.cluster.starts(disk) > self.cluster.starts(copy)
                    && self.cluster.now() >= self.troubles.quiet_until
                    && self.can_spare(index)
                    && self.rng.random_bool(0.5) =>
            {
                self.say(|_| "an old copy of the disk is put back".to_owned());
                self.troubles.copies.remove(&disk);
                self.copies.lost(&self.cluster, disk);
                self.be_quiet();
                Some(copy)
            }
            _ => Some(disk),
        };
        let new = self.start(host, disk, lazy);
        self.cluster.take_place(index, new);
        self.troubles.shaky.insert(self.cluster.disk(new), self.cluster.now() + SHAKY);
    }

    /// How many servers there are, or will be again.
    fn count(&self) -> usize {
        let is_down = |trouble| matches!(trouble, Trouble::Down | Trouble::DownOver { .. });
        let troubles = self.troubles.parties.iter();
        let down = troubles
            .filter(|(party, (trouble, _))| matches!(party, Party::Server(_)) && is_down(*trouble));
        self.alive().len() + down.count()
    }

    /// Whether every group keeps a healthy ready replica of its target, or one
    /// that held it last, without the disk of `victim`.
    fn can_spare(&self, victim: usize) -> bool {
        // What lives may be about to lead what it held; and what has died may be in a slow log
        // as who leads it.
        let is_log_slow =
            self.troubles.parties.keys().any(|party| matches!(party, Party::Viewleader(_)));
        let may_lead = self.cluster.is_alive(victim) || is_log_slow;
        let (view, victim) = (self.cluster.view(), self.cluster.disk(victim));
        let has_wall = !self.troubles.walls.iter().all(|(.., is_of_clients)| *is_of_clients);
        let healthy = |id: &Identity| {
            self.alive().into_iter().any(|server| {
                let disk = self.cluster.disk(server);
                // Who waits to be let in, or is about to die, is on its way out: others may go
                // on without it.
                let is_well = self.cluster.is_up(server)
                    && self.cluster.is_leased(server)
                    && !self.cluster.is_disk_failing(disk)
                    && !self.troubles.shaky.contains_key(&disk);
                is_well && disk != victim && self.cluster.identity(server) == Some(id)
            })
        };
        let is_there = |id: &Identity| {
            let disk = self.cluster.disk_of(id);
            let is_back = |at: &usize| {
                let comes = self.troubles.parties.get(&server(*at));
                self.cluster.is_alive(*at)
                    || comes.is_some_and(|(trouble, _)| *trouble == Trouble::Down)
            };
            self.copies.is_whole(id)
                && disk != Some(victim)
                && (0..self.cluster.servers())
                    .any(|at| Some(self.cluster.disk(at)) == disk && is_back(&at))
        };
        let kept = |group: &Group| {
            let target = view.target_of(group.start);
            if group.is_lost() {
                let is_held =
                    group.held_by.iter().any(|it| self.cluster.disk_of(&it.id) == Some(victim));
                let is_elsewhere = group.held_by.iter().any(|holder| is_there(&holder.id));
                is_elsewhere && !(may_lead && is_held)
            } else {
                target.iter().any(|id| group.ready.contains(id) && healthy(id))
            }
        };
        let is_known = view.revision > Revision(0) && self.cluster.leader().is_some();
        is_known && !has_wall && view.groups.iter().all(kept)
    }

    fn draw_fault(&mut self) -> Fault {
        let kinds = &self.options.kinds;
        let mut at = self.rng.random_range(0..kinds.iter().map(|kind| kind.weight()).sum());
        for kind in kinds {
            match at.checked_sub(kind.weight()) {
                Some(rest) => at = rest,
                None => return *kind,
            }
        }
        Fault::Kill
    }

    fn do_harm(&mut self) {
        let alive = self.alive();
        if alive.is_empty() {
            return;
        }
        let fault = self.draw_fault();
        let mut victim = alive[self.rng.random_range(0..alive.len())];
        // To drain a server whose disk is full is what an operator does.
        if fault == Fault::Drain
            && let Some(full) = alive.iter().find(|at| self.is_full(**at))
            && self.rng.random_bool(0.7)
        {
            victim = *full;
        }
        self.harm(fault, victim);
    }

    fn harm(&mut self, fault: Fault, victim: usize) {
        if self.cluster.now() < self.troubles.quiet_until {
            return;
        }
        let span = self.span();
        let is_possible = self.is_possible(fault, victim);
        self.say(|run| {
            let name = run.cluster.name_of(victim);
            format!("{fault:?} ({name}, {span:?}){}", if is_possible { "" } else { ": not now" })
        });
        if is_possible && self.inflict(fault, victim, span) {
            *self.tally.faults.entry(fault).or_default() += 1;
        }
    }

    fn is_full(&self, at: usize) -> bool {
        let trouble = self.troubles.parties.get(&server(at));
        trouble.is_some_and(|(trouble, _)| *trouble == Trouble::Full)
    }

    fn is_possible(&self, fault: Fault, victim: usize) -> bool {
        let is_free = |party| !self.troubles.parties.contains_key(&party);
        let is_lazy = self.cluster.is_lazy(self.cluster.disk(victim));
        match fault {
            Fault::Kill | Fault::Pause | Fault::Fill | Fault::FailSync | Fault::Stall => {
                is_free(server(victim))
            }
            // What was not synced is lost: the others must have it.
            Fault::FailPower => is_free(server(victim)) && (!is_lazy || self.can_spare(victim)),
            Fault::Lose | Fault::Replace | Fault::Damage | Fault::Restore => {
                is_free(server(victim)) && self.can_spare(victim)
            }
            Fault::Join | Fault::JoinSeveral => self.count() < self.options.max_servers,
            Fault::Drain => self.count() > 3 && self.cluster.leader().is_some(),
            _ if fault.is_about_viewleaders() => self.can_harm_viewleaders(fault),
            _ => true,
        }
    }

    /// Returns whether anybody was harmed.
    fn inflict(&mut self, fault: Fault, victim: usize, span: Duration) -> bool {
        let party = server(victim);
        match fault {
            Fault::Kill => self.kill(victim, Trouble::Down, span),
            Fault::KillSeveral | Fault::KillAll => {
                let likely = if fault == Fault::KillAll { 1.0 } else { 0.5 };
                for other in self.alive() {
                    if other == victim || self.rng.random_bool(likely) {
                        let span = self.span();
                        self.kill(other, Trouble::Down, span);
                    }
                }
            }
            Fault::FailPower => {
                self.cluster.fail_power(victim);
                self.is_in_trouble_for(party, Trouble::Down, span);
                if self.cluster.is_lazy(self.cluster.disk(victim)) {
                    self.copies.lost(&self.cluster, self.cluster.disk(victim));
                    self.be_quiet();
                }
            }
            Fault::Lose | Fault::Replace => {
                self.lose(victim);
                self.troubles.vacant.push(self.cluster.host(victim));
                if fault == Fault::Replace {
                    self.join();
                }
            }
            Fault::Damage => {
                self.lose(victim);
                self.is_in_trouble_for(party, Trouble::DownOver { copy: None }, span);
            }
            Fault::Restore => self.restore(victim, span),
            Fault::FailSync => {
                let other = self.pick_viewleader().filter(|_| self.rng.random_bool(0.3));
                self.cluster.break_disk(other.map_or(party, Party::Viewleader));
            }
            Fault::Fill => {
                self.cluster.fill_disk(victim);
                self.is_in_trouble_for(party, Trouble::Full, span);
                self.is_followed_by(Fault::Drain, victim, SEEN_TO_MS);
            }
            Fault::Stall => {
                let other = self.pick_viewleader().filter(|_| self.rng.random_bool(0.3));
                let party = other.map_or(party, Party::Viewleader);
                self.cluster.hold_disk(party);
                self.is_in_trouble_for(party, Trouble::Stalled, span);
            }
            Fault::Pause => {
                self.cluster.pause(party);
                self.is_in_trouble_for(party, Trouble::Paused, span);
            }
            Fault::Join => self.join(),
            Fault::JoinSeveral => {
                while self.count() < self.options.max_servers {
                    self.join();
                }
            }
            Fault::Drain => {
                self.cluster.drain(victim);
                // It may not hear that the others go on without it.
                if self.is_full(victim) && self.rng.random_bool(0.5) {
                    self.raise_wall(Fault::CutFromViewleader, party, span);
                }
            }
            Fault::Cut
            | Fault::CutOneWay
            | Fault::CutFromViewleader
            | Fault::Split
            | Fault::SplitMajority
            | Fault::CutViewleader
            | Fault::CutFromFellows
            | Fault::CutClient => return self.raise_wall(fault, party, span),
            Fault::KillViewleader
            | Fault::KillViewleaders
            | Fault::EndViewleader
            | Fault::PauseViewleader
            | Fault::DozeApart
            | Fault::LoseViewleader
            | Fault::AddViewleader
            | Fault::RemoveViewleader => return self.harm_viewleaders(fault, span),
        }
        true
    }

    fn kill(&mut self, victim: usize, trouble: Trouble, span: Duration) {
        self.cluster.kill(server(victim));
        self.is_in_trouble_for(server(victim), trouble, span);
        // Somebody makes a copy of the disk, which may be put back after a later life.
        let disk = self.cluster.disk(victim);
        let is_copied = self.options.kinds.contains(&Fault::Restore) && self.rng.random_bool(0.5);
        if is_copied && !self.troubles.copies.contains_key(&disk) {
            let copy = self.cluster.copy_disk(disk);
            self.troubles.copies.insert(disk, copy);
        }
    }

    fn lose(&mut self, victim: usize) {
        self.cluster.kill(server(victim));
        self.copies.lost(&self.cluster, self.cluster.disk(victim));
        self.be_quiet();
    }

    fn be_quiet(&mut self) {
        self.troubles.quiet_until = self.cluster.now() + QUIET;
    }

    /// Stops the server and puts a copy of its disk aside; or, when there is one, puts
    /// it back in the place of the disk.
    fn restore(&mut self, victim: usize, span: Duration) {
        let disk = self.cluster.disk(victim);
        match self.troubles.copies.remove(&disk) {
            None => {
                self.kill(victim, Trouble::Down, span / 4);
                let copy = self.cluster.copy_disk(disk);
                self.troubles.copies.entry(disk).or_insert(copy);
                // It is put back before long, or there would be nothing to see.
                let soon = self.cluster.now() + span / 2;
                if self.troubles.plan.len() < 20 {
                    self.troubles.plan.push(soon);
                    self.troubles.plan.sort_unstable_by(|a, b| b.cmp(a));
                }
            }
            Some(copy) => {
                self.lose(victim);
                let trouble = Trouble::DownOver { copy: Some(copy) };
                self.is_in_trouble_for(server(victim), trouble, span);
            }
        }
    }

    /// Everybody in two sides, and what is lost between them.
    /// Returns whether there are any.
    fn raise_wall(&mut self, fault: Fault, party: Party, span: Duration) -> bool {
        let servers: Vec<Party> = self.alive().into_iter().map(server).collect();
        let clients: Vec<Party> = (0..self.clients.count()).map(Party::Client).collect();
        let viewleaders: Vec<Party> =
            (0..self.cluster.viewleaders()).map(Party::Viewleader).collect();
        let everybody = servers.iter().chain(&clients).chain(&viewleaders);
        let everybody: Vec<Party> = everybody.copied().collect();
        let picked = self.pick_viewleader().map(Party::Viewleader);
        // Who can send to somebody that can't answer may be a viewleader as well.
        let turns = viewleaders.len() > 1 && fault == Fault::CutOneWay;
        let party = picked.filter(|_| turns && self.rng.random_bool(0.4)).unwrap_or(party);
        let mut one_way = false;
        let this_side: BTreeSet<Party> = match fault {
            Fault::CutViewleader | Fault::CutFromFellows => picked.into_iter().collect(),
            Fault::CutClient => clients
                .get(self.rng.random_range(0..clients.len().max(1)))
                .copied()
                .into_iter()
                .collect(),
            Fault::Split | Fault::SplitMajority | Fault::DozeApart => {
                let most = if fault == Fault::SplitMajority { 0.8 } else { 0.5 };
                let is_in = |of: &Party, rng: &mut StdRng| match of {
                    _ if *of == party => true,
                    Party::Viewleader(_) => fault == Fault::Split && rng.random_bool(0.5),
                    Party::Server(_) => rng.random_bool(most),
                    Party::Client(_) => rng.random_bool(0.5),
                };
                everybody.iter().filter(|of| is_in(of, &mut self.rng)).copied().collect()
            }
            _ => [party].into(),
        };
        let other_side: BTreeSet<Party> = match fault {
            Fault::CutFromViewleader => viewleaders.into_iter().collect(),
            Fault::CutFromFellows => {
                one_way = self.rng.random_bool(0.3);
                viewleaders.into_iter().filter(|of| !this_side.contains(of)).collect()
            }
            Fault::CutOneWay => {
                one_way = true;
                everybody
                    .iter()
                    .filter(|of| **of != party && self.rng.random_bool(0.6))
                    .copied()
                    .collect()
            }
            _ => everybody.iter().filter(|of| !this_side.contains(of)).copied().collect(),
        };
        let turned = one_way && self.rng.random_bool(0.5);
        let mut pairs = BTreeSet::new();
        for one in &this_side {
            for other in &other_side {
                if !one_way || !turned {
                    pairs.insert((*one, *other));
                }
                if !one_way || turned {
                    pairs.insert((*other, *one));
                }
            }
        }
        if pairs.is_empty() {
            return false;
        }
        let until = self.cluster.now() + span;
        // Who can't reach clients has its lease all the same.
        let is_client = |party: &Party| matches!(party, Party::Client(_));
        let is_of_clients = this_side.iter().all(is_client) || other_side.iter().all(is_client);
        for party in this_side.iter().chain(&other_side).filter(|_| !is_of_clients) {
            if let Party::Server(index) = party {
                self.troubles.shaky.insert(self.cluster.disk(*index), until + SHAKY);
            }
        }
        let wall = self.cluster.raise_wall(pairs);
        self.troubles.walls.push((wall, until, is_of_clients));
        true
    }

    fn is_in_trouble_for(&mut self, party: Party, trouble: Trouble, span: Duration) {
        let end = self.cluster.now() + span;
        self.troubles.parties.insert(party, (trouble, end));
        if let Party::Server(index) = party {
            self.troubles.shaky.insert(self.cluster.disk(index), end + SHAKY);
        }
    }

    /// Undoes the troubles whose time is up, or all.
    fn undo(&mut self, all: bool) {
        let now = self.cluster.now();
        self.troubles.shaky.retain(|_, until| *until > now);
        for (wall, until, is_of_clients) in std::mem::take(&mut self.troubles.walls) {
            if all || until <= now {
                self.say(|_| "a wall is pulled down".to_owned());
                self.cluster.pull_down(wall);
            } else {
                self.troubles.walls.push((wall, until, is_of_clients));
            }
        }
        let over = self.troubles.parties.iter().filter(|(_, (_, until))| all || *until <= now);
        for (party, trouble) in over.map(|(p, (t, _))| (*p, *t)).collect::<Vec<_>>() {
            self.troubles.parties.remove(&party);
            self.say(|run| format!("{} is well again", run.cluster.name(party)));
            match (trouble, party) {
                (Trouble::Down, Party::Viewleader(site)) => self.cluster.start_viewleader(site),
                (Trouble::Down | Trouble::DownOver { .. }, Party::Server(index)) => {
                    self.start_again(index, trouble);
                }
                (Trouble::Paused, _) => self.cluster.resume(party),
                (Trouble::Dozing { is_awake: true, until }, _) if !all && now < until => {
                    self.doze(party, until);
                }
                (Trouble::Dozing { until, .. }, _) => {
                    self.cluster.resume(party);
                    let awake = Duration::from_millis(self.rng.random_range(AWAKE_MS));
                    if !all && now < until {
                        let trouble = Trouble::Dozing { is_awake: true, until };
                        self.is_in_trouble_for(party, trouble, awake);
                    }
                }
                (Trouble::Full, Party::Server(index)) => self.cluster.clear_disk(index),
                (Trouble::Stalled, _) => self.cluster.release_disk(party),
                _ => {}
            }
        }
    }

    /// The party falls asleep, to be awake for moments until then.
    fn doze(&mut self, party: Party, until: Time) {
        let nap = Duration::from_millis(self.rng.random_range(NAP_MS));
        self.cluster.pause(party);
        self.is_in_trouble_for(party, Trouble::Dozing { is_awake: false, until }, nap);
    }

    /// Everything goes down at the same moment, and comes back bit by bit.
    pub(super) fn lose_power(&mut self) -> Judgement {
        self.say(|_| "the power fails".to_owned());
        let sites = self.sites_in_use().into_iter().map(Party::Viewleader);
        let parties = self.alive().into_iter().map(server).chain(sites);
        for party in parties.collect::<Vec<_>>() {
            // What all machines have not synced is lost for good, and may be: there
            // the programs are killed, and the machines stay.
            self.cluster.kill(party);
            let span = self.span();
            self.is_in_trouble_for(party, Trouble::Down, span);
        }
        self.troubles.note_due();
        let end = self.cluster.now() + Duration::from_millis(SPAN_MS.end);
        self.go_on_until(end)
    }
}
