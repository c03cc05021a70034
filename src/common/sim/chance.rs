//! What is left to chance in a run: how long things take, and what a crash
//! leaves.

use super::network::{Lane, Party, Way};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

/// Decides what nobody in the cluster decides.
pub trait Chance {
    /// How long a message takes on its way.
    fn delay(&mut self, way: Way) -> Duration;

    /// How long the disk of `party` takes to store a batch.
    fn sync(&mut self, party: Party) -> Duration;

    /// From now on no disk is so slow that an election may take longer than those who
    /// stand for it wait.
    fn mend_disks(&mut self) {}

    /// How many of the `queued` batches, from the first one on, have made it to
    /// the disk of a process that has died.
    fn kept(&mut self, queued: usize) -> usize;

    /// Whether the connection on which something is sent breaks.
    fn breaks(&mut self, _: Way) -> bool {
        false
    }

    /// How many of the `count` messages on a connection that breaks still arrive,
    /// from the first one on.
    fn saved(&mut self, count: usize) -> usize {
        count
    }

    /// How much later a message that does no harm a second time comes once more;
    /// nothing when it does not.
    fn again(&mut self, _: Way) -> Option<Duration> {
        None
    }
}

/// Nothing is left to chance: for scripts.
#[derive(Debug)]
pub struct Steady;

impl Chance for Steady {
    fn delay(&mut self, _: Way) -> Duration {
        Duration::from_millis(1)
    }

    fn sync(&mut self, _: Party) -> Duration {
        Duration::ZERO
    }

    fn kept(&mut self, _: usize) -> usize {
        0
    }
}

/// How bad the network and the disks of a run are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    /// How likely something is up to seconds late.
    pub late: f64,
    /// How likely a connection breaks with a message.
    pub broken: f64,
    /// How likely a message that does no harm a second time comes twice.
    pub twice: f64,
}

/// Every connection has a pace of its own each way, from a tenth of a millisecond
/// to some tens of them, and so has every disk. As likely as its [`Weather`] says
/// something is up to seconds late, and everything behind it, too: between
/// servers, so late that the caller has given up; of the viewleader's views and
/// reports, so late that they are old; of heartbeats, not so late that a lease is
/// lost by it; between viewleaders, seldom, since nobody leads for long where each
/// heartbeat may be too late.
#[derive(Debug)]
pub struct Random {
    rng: StdRng,
    weather: Weather,
    ways: BTreeMap<Way, f64>,
    disks: BTreeMap<Party, f64>,
    are_disks_mended: bool,
}

/// The powers of ten between which the pace of a disk is, in microseconds.
const DISK_PACES: Range<f64> = 2.0..4.5;

/// The same for a log that is slow.
const SLOW_LOG_PACES: Range<f64> = 5.0..5.8;

impl Random {
    /// Everything about it comes from `rng` and `weather`.
    pub fn new(rng: &mut StdRng, weather: Weather) -> Self {
        let rng = StdRng::seed_from_u64(rng.random());
        let (ways, disks) = (BTreeMap::new(), BTreeMap::new());
        Self { rng, weather, ways, disks, are_disks_mended: false }
    }

    /// Micros about `pace`, and once in a while up to `latest` more.
    fn micros(&mut self, pace: f64, late: f64, latest: f64) -> Duration {
        let mut micros = pace * self.rng.random_range(0.5..1.5);
        if late > 0.0 && self.rng.random_bool(late) {
            micros += self.rng.random_range(0.0..latest);
        }
        Duration::from_micros(micros as u64)
    }
}

impl Chance for Random {
    fn delay(&mut self, way: Way) -> Duration {
        let rng = &mut self.rng;
        let paces = 2.0..4.7;
        let pace = match way.lane {
            Lane::Client => 10f64.powf(rng.random_range(paces)),
            _ => *self.ways.entry(way).or_insert_with(|| 10f64.powf(rng.random_range(paces))),
        };
        let (likelier, latest) = match way.lane {
            Lane::Prompt | Lane::Patient | Lane::Client | Lane::Hello => (1.0, 3e6),
            Lane::Group => (0.1, 2e6),
            Lane::View | Lane::Report => (10.0, 3e6),
            Lane::Beat => (10.0, 8e5),
        };
        self.micros(pace, self.weather.late * likelier, latest)
    }

    fn sync(&mut self, party: Party) -> Duration {
        let rng = &mut self.rng;
        let is_mended = self.are_disks_mended;
        // What happens while the viewleader's log is slow is worth a look.
        let pace = || {
            let is_slow = matches!(party, Party::Viewleader(_)) && rng.random_bool(0.3);
            let paces = if is_slow && !is_mended { SLOW_LOG_PACES } else { DISK_PACES };
            10f64.powf(rng.random_range(paces))
        };
        let pace = *self.disks.entry(party).or_insert_with(pace);
        self.micros(pace, self.weather.late, 1e6)
    }

    fn mend_disks(&mut self) {
        self.are_disks_mended = true;
        let slowest = 10f64.powf(DISK_PACES.end);
        self.disks.values_mut().for_each(|pace| *pace = pace.min(slowest));
    }

    fn kept(&mut self, queued: usize) -> usize {
        self.rng.random_range(0..=queued)
    }

    fn breaks(&mut self, _: Way) -> bool {
        self.weather.broken > 0.0 && self.rng.random_bool(self.weather.broken)
    }

    fn saved(&mut self, count: usize) -> usize {
        self.rng.random_range(0..=count)
    }

    fn again(&mut self, _: Way) -> Option<Duration> {
        let comes = self.weather.twice > 0.0 && self.rng.random_bool(self.weather.twice);
        comes.then(|| Duration::from_micros(10f64.powf(self.rng.random_range(2.0..6.7)) as u64))
    }
}
