//! Keys that move while clients go on.

use super::super::load::{Load, Outcome, drive};
use super::super::ours::{self, Ask, Cluster, Kv};
use super::{Effort, Figure, Goal};
use std::io;
use std::time::{Duration, Instant};

/// How many clients read, and as many write, while keys move.
const CLIENTS: usize = 8;

/// How many keys move by in the row about clients; at [`SLOW_RATE`] that takes seconds.
const KEYS: u64 = 100_000;

/// How many bytes a second each server fetches then.
const SLOW_RATE: &str = "2000000";

/// More operations than one turn has time for.
const MANY: u64 = 100_000_000;

/// How often it is looked at.
const GLANCE: Duration = Duration::from_millis(5);

/// Reads and writes during a rebalancing against before it.
pub(crate) fn clients(effort: &Effort) -> io::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (ask, word) in [(Ask::Getr, "getr"), (Ask::Setr, "setr")] {
        let name = format!("{word} during a rebalancing, {CLIENTS} clients");
        if !effort.wants(&name) {
            continue;
        }
        let (mut ratios, mut spans) = (Vec::new(), Vec::new());
        for _ in 0..effort.rounds.min(3) {
            let folder = tempfile::tempdir()?;
            let lease = ours::LONG_LEASE.to_string();
            let flags = ["--lease", &lease, "--rebalance-rate", SLOW_RATE];
            let mut cluster = Cluster::start(folder.path(), 1, 3, &flags)?;
            cluster.fill(KEYS)?;
            let load = Load::of(CLIENTS, MANY, effort.turn);
            let before = put(load, &cluster, ask)?;
            cluster.join()?;
            cluster.wait_until_moving()?;
            let begun = Instant::now();
            let during = put(load, &cluster, ask)?;
            let share = if cluster.rebalancing()?.moving { 1.0 } else { 0.0 };
            cluster.wait_until_at_rest()?;
            spans.push(begun.elapsed().as_secs_f64() * share);
            ratios.push(during.rate() / before.rate());
        }
        let note = match spans.iter().all(|span| *span > 0.0) {
            true => "no request failed; keys moved all the time",
            false => "no request failed; the keys had moved before the turn ended",
        };
        figures.push(Figure::single(
            name,
            "the same before it",
            ratios,
            "x",
            Goal::AtLeast(0.8),
            note,
        ));
    }
    Ok(figures)
}

/// An error is a request that failed.
fn put(load: Load, cluster: &Cluster, ask: Ask) -> io::Result<Outcome> {
    let requests = cluster.requests(ask, KEYS)?;
    drive(load, |_| Kv::connect(&requests), || {})
}

/// The time and the bytes of a rebalancing, and how they grow with the keys.
pub(crate) fn growth(effort: &Effort) -> io::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut spans: Vec<(u64, f64)> = Vec::new();
    for keys in [10_000, 100_000, 1_000_000] {
        let name = format!("bytes moved by a join, {keys} keys");
        if !effort.wants(&name) {
            continue;
        }
        let folder = tempfile::tempdir()?;
        let lease = ours::LONG_LEASE.to_string();
        let flags = ["--lease", &lease, "--durability", "interval"];
        let mut cluster = Cluster::start(folder.path(), 1, 3, &flags)?;
        cluster.fill(keys)?;
        let begun = Instant::now();
        cluster.join()?;
        cluster.wait_until_moving()?;
        cluster.wait_until_at_rest()?;
        let span = begun.elapsed().as_secs_f64();
        let told = cluster.rebalancing()?;
        let ratio = told.bytes_moved as f64 / told.bytes_needed.max(1) as f64;
        let note =
            format!("{} keys and {} bytes in {span:.1} s", told.keys_moved, told.bytes_moved);
        let least = "the least that the change of groups needs";
        figures.push(Figure::single(name, least, vec![ratio], "x", Goal::AtMost(1.05), note));
        spans.push((keys, span));
    }
    for pair in spans.windows(2) {
        let [(few, short), (many, long)] = pair else { continue };
        let growth = (long / short) / (*many as f64 / *few as f64);
        figures.push(Figure::single(
            format!("time of a rebalancing, {many} keys against {few}"),
            "growth of the keys",
            vec![growth],
            "x",
            Goal::AtMost(1.0),
            format!("{long:.2} s against {short:.2} s"),
        ));
    }
    Ok(figures)
}

impl Cluster {
    /// Waits until keys move, or have moved.
    fn wait_until_moving(&self) -> io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            let is_known = self.view()?.own_members().count() == self.servers.len();
            if is_known {
                return Ok(());
            }
            std::thread::sleep(GLANCE);
        }
        Err(io::Error::other("the newcomer did not join"))
    }
}
