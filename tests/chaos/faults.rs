//! What harm is done, and when.

use super::LEASE;
use super::network::End;
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use std::fmt;
use std::time::Duration;

/// The first programs, by number, are the viewleaders; the servers follow.
pub(crate) const VIEWLEADERS: usize = 3;

/// In a schedule, the number of the viewleader that leads at that moment.
const LEADER: usize = usize::MAX;

/// How many servers there are at most at a time.
pub(crate) const MAX_SERVERS: usize = 8;

/// How many servers run at least when one is told to leave.
pub(crate) const MIN_SERVERS: usize = 4;

/// The servers, by number, whose disks are small enough to be filled.
pub(crate) const SMALL_DISKS: [usize; 2] = [VIEWLEADERS, VIEWLEADERS + 1];

/// How long nothing new happens, at most, in milliseconds.
const MAX_QUIET_MS: u64 = 3000;

/// For how long harm is done, at most, in leases.
const MAX_LEASES: u64 = 3;

/// How much later what is sent arrives, in milliseconds: more than a heartbeat's pace, and
/// nearly a lease.
const DELAYS_MS: [u64; 4] = [20, 150, 600, 1800];

/// One kind of harm, and to whom.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// `kill -9`, all at the same instant; started again in the end.
    Kill(Vec<usize>),
    /// SIGSTOP; SIGCONT in the end.
    Pause(usize),
    /// Links are cut.
    Cut(Cut),
    /// Of a hundred packets between any two, so many are lost.
    Lose(u32),
    /// Everything from and to this program takes so many milliseconds longer, each way.
    Delay(usize, u64),
    /// The disk is full.
    Fill(usize),
    /// One more server.
    Join,
    /// A server is told to leave.
    Drain(usize),
    /// A viewleader is killed and its disk erased; started again as it was, it is let in
    /// with one command.
    Erase(usize),
    /// A viewleader is removed from the group; then it is killed, its disk erased, and
    /// another one in its place joins.
    Replace(usize),
}

/// Which links are cut. Clients still reach everybody, unless it says otherwise:
/// an old primary that answers them must be seen.
#[derive(Clone, Debug)]
pub(crate) enum Cut {
    /// All between this program and the others.
    Alone(usize),
    /// The same, and those between it and the clients.
    Away(usize),
    /// Those from this program to the others: it hears, and is not heard.
    Mute(usize),
    /// Those to this program from the others: it is heard, and does not hear.
    Deaf(usize),
    /// All between these and the rest.
    Halves(Vec<usize>),
}

/// Harm with its time.
pub(crate) struct Planned {
    /// When, from the beginning.
    pub(crate) at: Duration,
    /// How long until it is made good.
    pub(crate) lasts: Duration,
    /// What.
    pub(crate) fault: Fault,
}

impl Fault {
    /// What is counted as one kind.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Kill(who) if who == &[LEADER] => "leader killed",
            Self::Kill(who) if who.len() == 1 && leads(who[0]) => "viewleader killed",
            Self::Kill(who) if who.iter().all(|it| leads(*it)) => "two viewleaders killed",
            Self::Kill(who) if who.iter().any(|it| leads(*it)) => "all killed",
            Self::Kill(who) if who.len() > 1 => "several servers killed",
            Self::Kill(_) => "server killed",
            Self::Pause(LEADER) => "leader paused",
            Self::Pause(_) => "server paused",
            Self::Cut(Cut::Alone(LEADER) | Cut::Away(LEADER)) => "leader cut off",
            Self::Cut(Cut::Alone(who) | Cut::Away(who)) if leads(*who) => "viewleader cut off",
            Self::Cut(Cut::Halves(who)) if who.contains(&LEADER) => "cut in two, the leader",
            Self::Cut(Cut::Alone(_) | Cut::Away(_)) => "server cut off",
            Self::Cut(Cut::Mute(_) | Cut::Deaf(_)) => "cut off one way",
            Self::Cut(Cut::Halves(_)) => "cut in two",
            Self::Lose(_) => "packets lost",
            Self::Delay(who, _) if leads(*who) => "viewleader's links slow",
            Self::Delay(..) => "server's links slow",
            Self::Fill(_) => "disk full",
            Self::Join => "join",
            Self::Drain(_) => "drain",
            Self::Erase(_) => "viewleader's disk erased",
            Self::Replace(_) => "viewleader replaced",
        }
    }

    /// The same, with the number of the one that leads now.
    pub(crate) fn resolved(&self, leader: usize) -> Self {
        let it = |who: &usize| if *who == LEADER { leader } else { *who };
        match self {
            Self::Kill(who) => Self::Kill(who.iter().map(it).collect()),
            Self::Pause(who) => Self::Pause(it(who)),
            Self::Cut(Cut::Alone(who)) => Self::Cut(Cut::Alone(it(who))),
            Self::Cut(Cut::Away(who)) => Self::Cut(Cut::Away(it(who))),
            Self::Cut(Cut::Mute(who)) => Self::Cut(Cut::Mute(it(who))),
            Self::Cut(Cut::Deaf(who)) => Self::Cut(Cut::Deaf(it(who))),
            Self::Cut(Cut::Halves(who)) => Self::Cut(Cut::Halves(who.iter().map(it).collect())),
            Self::Delay(who, ms) => Self::Delay(it(who), *ms),
            Self::Erase(who) => Self::Erase(it(who)),
            Self::Replace(who) => Self::Replace(it(who)),
            Self::Lose(_) | Self::Fill(_) | Self::Join | Self::Drain(_) => self.clone(),
        }
    }
}

/// Whether the program with this number is a viewleader.
pub(crate) fn leads(number: usize) -> bool {
    number < VIEWLEADERS || number == LEADER
}

impl Cut {
    /// The links that it cuts, each from one end to the other, with these programs.
    pub(crate) fn links(&self, present: &[usize]) -> Vec<(End, End)> {
        let (ones, out, back) = match self {
            Self::Alone(one) | Self::Away(one) => (vec![*one], true, true),
            Self::Mute(one) => (vec![*one], true, false),
            Self::Deaf(one) => (vec![*one], false, true),
            Self::Halves(ones) => (ones.clone(), true, true),
        };
        let mut others: Vec<End> = present
            .iter()
            .filter(|other| !ones.contains(other))
            .map(|&it| End::Program(it))
            .collect();
        if matches!(self, Self::Away(_)) {
            others.push(End::Clients);
        }
        let mut links = Vec::new();
        for one in ones.into_iter().filter(|one| present.contains(one)).map(End::Program) {
            links.extend(others.iter().filter(|_| out).map(|&other| (one, other)));
            links.extend(others.iter().filter(|_| back).map(|&other| (other, one)));
        }
        links
    }
}

/// Draws what is to happen in `span` to the viewleaders and `servers` servers.
/// Without `can_cut`, only what needs no network of its own.
pub(crate) fn schedule(
    rng: &mut StdRng,
    span: Duration,
    servers: usize,
    can_cut: bool,
) -> Vec<Planned> {
    let mut plan = Vec::new();
    let mut at = Duration::from_secs(1);
    while at < span {
        let lease_ms = u64::try_from(LEASE.as_millis()).unwrap();
        let lasts = Duration::from_millis(rng.random_range(200..MAX_LEASES * lease_ms));
        plan.push(Planned { at, lasts, fault: draw(rng, servers, can_cut) });
        at += Duration::from_millis(rng.random_range(100..MAX_QUIET_MS));
    }
    plan
}

fn draw(rng: &mut StdRng, servers: usize, can_cut: bool) -> Fault {
    let servers = VIEWLEADERS..VIEWLEADERS + servers;
    // Now and then one that has joined.
    let server = rng.random_range(servers.start..=servers.end);
    let program = rng.random_range(0..=servers.end);
    let count = rng.random_range(2..=servers.len());
    let several = servers.clone().sample(rng, count);
    // The one that leads more often than the others.
    let viewleader = [LEADER, 0, 1, 2][rng.random_range(0..4)];
    match rng.random_range(0..if can_cut { 29 } else { 14 }) {
        0 | 1 => Fault::Kill(vec![server]),
        2 => Fault::Kill(several),
        3 if rng.random_ratio(1, 2) => Fault::Kill((0..servers.end).collect()),
        3 | 4 => Fault::Kill(vec![LEADER]),
        5 | 6 => Fault::Pause(server),
        7 => Fault::Pause(LEADER),
        8 => Fault::Join,
        9 => Fault::Drain(server),
        10 => Fault::Kill(vec![viewleader]),
        11 => Fault::Kill((0..VIEWLEADERS).filter(|it| *it != program % VIEWLEADERS).collect()),
        12 => Fault::Erase(viewleader),
        13 => Fault::Replace(viewleader),
        14 | 15 => Fault::Cut(Cut::Alone(server)),
        16 => Fault::Cut(Cut::Away(program)),
        17 | 18 => Fault::Cut(Cut::Alone(LEADER)),
        19 => Fault::Cut(Cut::Away(LEADER)),
        20 | 21 => Fault::Cut(Cut::Mute(program)),
        22 => Fault::Cut(Cut::Deaf(program)),
        23 => Fault::Cut(Cut::Halves(several)),
        24 => Fault::Cut(Cut::Halves([several, vec![LEADER]].concat())),
        25 => Fault::Lose([2, 10, 30][rng.random_range(0..3)]),
        26 => Fault::Delay(program, DELAYS_MS[rng.random_range(0..DELAYS_MS.len())]),
        27 => Fault::Delay(LEADER, DELAYS_MS[rng.random_range(0..DELAYS_MS.len())]),
        _ => Fault::Fill(SMALL_DISKS[rng.random_range(0..SMALL_DISKS.len())]),
    }
}

/// The name of a program.
pub(crate) fn name(number: usize) -> String {
    match number {
        LEADER => "the leader".to_owned(),
        number if number < VIEWLEADERS => format!("viewleader-{}", number + 1),
        number => format!("server-{}", number + 1 - VIEWLEADERS),
    }
}

fn names(numbers: &[usize]) -> String {
    numbers.iter().map(|&number| name(number)).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(who) => write!(f, "kill {}", names(who)),
            Self::Pause(who) => write!(f, "pause {}", name(*who)),
            Self::Cut(Cut::Alone(who)) => write!(f, "cut {} off the others", name(*who)),
            Self::Cut(Cut::Away(who)) => write!(f, "cut {} off everybody", name(*who)),
            Self::Cut(Cut::Mute(who)) => write!(f, "nobody hears {}", name(*who)),
            Self::Cut(Cut::Deaf(who)) => write!(f, "{} hears nobody", name(*who)),
            Self::Cut(Cut::Halves(who)) => write!(f, "cut {} off the rest", names(who)),
            Self::Lose(percent) => write!(f, "lose {percent} of 100 packets"),
            Self::Delay(who, ms) => write!(f, "all from and to {} {ms} ms later", name(*who)),
            Self::Fill(who) => write!(f, "fill the disk of {}", name(*who)),
            Self::Join => f.write_str("a server joins"),
            Self::Drain(who) => write!(f, "tell {} to leave", name(*who)),
            Self::Erase(who) => write!(f, "erase the disk of {}", name(*who)),
            Self::Replace(who) => write!(f, "replace {}", name(*who)),
        }
    }
}
