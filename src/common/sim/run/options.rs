//! The options of a run, all drawn from its seed.

use super::faults::Fault;
use crate::kv::MAX_BATCH_BYTES;
use crate::kv::server::Batch;
use crate::sim::chance::Weather;
use rand::RngExt;
use rand::rngs::StdRng;
use std::fmt;
use std::time::Duration;

/// By how many millionths a clock is fast or slow at most, so that no two differ
/// by more than [`crate::view::leader::DRIFT_PER_MILLE`].
const DRIFT_WITHIN: i64 = 9_800;

/// The same in a run that shows what breaks beyond it.
const DRIFT_BEYOND: i64 = 150_000;

/// What the clocks of a run are like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clocks {
    /// They differ by less than what leases allow for.
    #[default]
    Within,
    /// They differ by more: promises are void.
    Beyond,
}

/// What a run is like.
#[derive(Clone, Debug)]
pub struct Options {
    /// The clocks.
    pub clocks: Clocks,
    /// By how many millionths a clock is fast or slow at most.
    pub drift: i64,
    /// For how long there are clients and faults.
    pub busy: Duration,
    /// How often machines are told that time has passed.
    pub tick: Duration,
    /// How many viewleaders there are at first.
    pub viewleaders: usize,
    /// How many servers there are at first, one after the other or all at once.
    pub servers: usize,
    /// How many there are at most.
    pub max_servers: usize,
    /// How many servers of a hundred have a disk that is synced only now and then.
    pub lazy: u32,
    /// Whether some servers have shorter leases than others, in each of their lives anew.
    pub leases: bool,
    /// How many keys there are.
    pub keys: usize,
    /// Whether newcomers like to stand right at a key, or right behind one.
    pub edges: bool,
    /// How many clients write.
    pub writers: usize,
    /// How many clients read.
    pub readers: usize,
    /// How many clients write as the original's do.
    pub originals: usize,
    /// How many of a hundred writes depend on the key's version.
    pub conditions: u32,
    /// How many of a hundred writes are deletions.
    pub deletions: u32,
    /// How many clients want locks.
    pub lockers: usize,
    /// How many of a hundred writers and readers are the real client; the others ask
    /// any server.
    pub programs: u32,
    /// How long a client pauses between two requests at most, in milliseconds.
    pub think_ms: u64,
    /// How long a value is, about, in bytes.
    pub value_bytes: usize,
    /// How much servers put into one message.
    pub batch: Batch,
    /// The network and the disks.
    pub weather: Weather,
    /// How many faults there are.
    pub faults: usize,
    /// Of which kinds.
    pub kinds: Vec<Fault>,
    /// Whether everything loses power at once in the end.
    pub power: bool,
}

impl Options {
    /// Draws what a run is like.
    pub fn draw(rng: &mut StdRng, clocks: Clocks) -> Self {
        let one_of = |rng: &mut StdRng, of: &[f64]| of[rng.random_range(0..of.len())];
        let drift = match clocks {
            Clocks::Within => DRIFT_WITHIN,
            Clocks::Beyond => DRIFT_BEYOND,
        };
        let servers = rng.random_range(1..=5);
        let small = rng.random_bool(0.6);
        let batch = Batch {
            bytes: if small { rng.random_range(64..600) } else { MAX_BATCH_BYTES },
            held: if rng.random_bool(0.5) { rng.random_range(1..5) } else { 1000 },
        };
        let weather = Weather {
            late: one_of(rng, &[0.0, 0.0, 0.001, 0.01]),
            broken: one_of(rng, &[0.0, 0.0, 0.0005, 0.005]),
            twice: one_of(rng, &[0.0, 0.02, 0.1, 0.3]),
        };
        // Each run has some kinds of faults and not others: what a fault of one kind
        // hides from those of another is seen in a run that has not that one.
        let likely = one_of(rng, &[0.3, 0.6, 1.0]);
        let viewleaders = [1, 1, 1, 1, 3, 3, 3, 5][rng.random_range(0..8)];
        let is_possible = |fault: &&Fault| viewleaders > 1 || !fault.is_of_a_group();
        let kinds = Fault::ALL.iter().filter(is_possible);
        let kinds = kinds.filter(|_| rng.random_bool(likely)).copied().collect();
        Self {
            clocks,
            drift: if rng.random_bool(0.3) { 0 } else { drift },
            busy: Duration::from_secs(rng.random_range(8..=25)),
            tick: Duration::from_millis(rng.random_range(10..=40)),
            viewleaders,
            servers,
            max_servers: rng.random_range(servers.max(3)..=7),
            lazy: [0, 0, 0, 30, 100][rng.random_range(0..5)],
            leases: rng.random_bool(0.3),
            keys: rng.random_range(1..=12),
            edges: rng.random_bool(0.6),
            writers: rng.random_range(1..=6),
            readers: rng.random_range(1..=6),
            originals: rng.random_range(0..=2),
            conditions: [0, 0, 20, 50][rng.random_range(0..4)],
            deletions: [0, 0, 10, 40][rng.random_range(0..4)],
            lockers: rng.random_range(0..=5),
            programs: rng.random_range(0..=60),
            think_ms: 10f64.powf(rng.random_range(1.3..3.3)) as u64,
            value_bytes: rng.random_range(1..60),
            batch,
            weather,
            faults: rng.random_range(0..=14),
            kinds,
            power: rng.random_bool(0.3),
        }
    }
}

impl fmt::Display for Options {
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{self:?}");
        f.write_str(text.trim_start_matches("Options { ").trim_end_matches(" }"))
    }
}
