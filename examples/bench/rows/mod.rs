//! The rows of the table: what is measured, against whom, and what is to be reached.

pub(crate) mod failing;
pub(crate) mod files;
pub(crate) mod kv;
pub(crate) mod locks;
pub(crate) mod moving;
pub(crate) mod sizes;

use super::load::{Client, Load, drive};
use super::programs::{cpu_seconds, peak_memory};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::io;
use std::time::Duration;

/// How long the value of every key is.
pub(crate) const VALUE_BYTES: usize = 100;

/// The value that every key has.
pub(crate) fn value() -> String {
    "0123456789".repeat(VALUE_BYTES / 10)
}

/// The key with a number.
pub(crate) fn key(number: u64) -> String {
    format!("key:{number:07}")
}

/// How much is done, and for which figures.
#[derive(Clone, Debug)]
pub(crate) struct Effort {
    /// How often each side has its turn; the sides alternate.
    pub(crate) rounds: usize,
    /// For how long one side is asked in one turn.
    pub(crate) turn: Duration,
    /// Only figures whose name holds this.
    pub(crate) row: String,
    /// The other side does not take part: for a profile of ours.
    pub(crate) alone: bool,
}

/// One side in one turn, or in the median of several.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Side {
    /// Operations in a second.
    pub(crate) rate: f64,
    /// The latency that half, 99 and 99.9 of a hundred calls stay within, in
    /// milliseconds.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    /// Processor time of the programs for one operation, in microseconds.
    pub(crate) cpu: f64,
    /// The memory they have used at most, in MiB.
    pub(crate) memory: f64,
}

/// What is to be reached.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Goal {
    /// So much or more.
    AtLeast(f64),
    /// So much or less.
    AtMost(f64),
}

impl Goal {
    fn is_reached_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }

    /// Whether more is better.
    pub(crate) fn is_minimum(self) -> bool {
        matches!(self, Self::AtLeast(_))
    }

    /// In words.
    pub(crate) fn words(self) -> String {
        match self {
            Self::AtLeast(bound) => format!("at least {bound}"),
            Self::AtMost(bound) => format!("at most {bound}"),
        }
    }
}

/// What came of one row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// Such as `getr, 50 clients`; no other figure has it.
    pub(crate) name: String,
    /// The other side, or what it is measured by.
    pub(crate) against: String,
    /// Both sides, the medians of all turns, where there are two programs.
    pub(crate) sides: Option<(Side, Side)>,
    /// The quantity that the goal is about, in each round.
    pub(crate) measured: Vec<f64>,
    /// Its unit; `x` for a ratio.
    pub(crate) unit: String,
    pub(crate) goal: Goal,
    /// What else there is to know.
    pub(crate) note: String,
}

impl Figure {
    /// A figure that is no comparison of two programs.
    pub(crate) fn single(
        name: impl Into<String>,
        against: impl Into<String>,
        measured: Vec<f64>,
        unit: &str,
        goal: Goal,
        note: impl Into<String>,
    ) -> Self {
        let (name, against, note) = (name.into(), against.into(), note.into());
        let unit = unit.to_owned();
        let figure = Self { name, against, sides: None, measured, unit, goal, note };
        println!("{}", figure.line());
        figure
    }

    /// The median of what was measured.
    pub(crate) fn value(&self) -> f64 {
        median(&self.measured)
    }

    /// Whether the goal is reached.
    pub(crate) fn is_reached(&self) -> bool {
        self.goal.is_reached_by(self.value())
    }

    /// What was measured, and what was to be reached.
    pub(crate) fn verdict(&self) -> String {
        let verdict = if self.is_reached() { "reached" } else { "MISSED" };
        let (value, unit, goal) = (self.value(), &self.unit, self.goal.words());
        format!("{value:.2} {unit} ({goal}: {verdict})")
    }

    /// A line for somebody who watches.
    pub(crate) fn line(&self) -> String {
        let Self { name, against, sides, note, .. } = self;
        let sides = sides.map_or(String::new(), |(ours, theirs)| {
            format!(
                " {:.0}/s against {:.0}/s; p50 {:.2}/{:.2} ms, p99 {:.2}/{:.2} ms, cpu {:.1}/{:.1} us",
                ours.rate,
                theirs.rate,
                ours.p50,
                theirs.p50,
                ours.p99,
                theirs.p99,
                ours.cpu,
                theirs.cpu
            )
        });
        format!("{name} | {against} | {}{sides} {note}", self.verdict())
    }
}

/// The middle of some numbers.
pub(crate) fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    }
}

/// Puts `load` on the programs with these processes.
pub(crate) fn measure<C: Client>(
    load: Load,
    processes: &[u32],
    connect: impl Fn(usize) -> io::Result<C> + Sync,
) -> io::Result<Side> {
    let before = Cell::new(0.0);
    let outcome = drive(load, connect, || before.set(cpu_seconds(processes)))?;
    let cpu = cpu_seconds(processes) - before.get();
    let at = |quantile: f64| outcome.latency.value_at_quantile(quantile) as f64 / 1000.0;
    Ok(Side {
        rate: outcome.rate(),
        p50: at(0.5),
        p99: at(0.99),
        p999: at(0.999),
        cpu: cpu * 1e6 / outcome.operations.max(1) as f64,
        memory: peak_memory(processes),
    })
}

impl Effort {
    /// Whether the row with this name is wanted.
    pub(crate) fn wants(&self, name: &str) -> bool {
        name.contains(&self.row)
    }
}

/// Lets both sides have their turns, and compares them.
pub(crate) fn compare(
    name: impl Into<String>,
    against: impl Into<String>,
    to_reach: f64,
    effort: &Effort,
    ours: impl Fn() -> io::Result<Side>,
    theirs: impl Fn() -> io::Result<Side>,
) -> io::Result<Option<Figure>> {
    let name = name.into();
    if !effort.wants(&name) {
        return Ok(None);
    }
    let (mut own, mut other) = (Vec::new(), Vec::new());
    for _ in 0..effort.rounds {
        own.push(ours()?);
        other.push(if effort.alone { Side::default() } else { theirs()? });
    }
    let ratio = |(ours, theirs): (&Side, &Side)| ours.rate / theirs.rate;
    let figure = Figure {
        name,
        against: against.into(),
        sides: Some((middle(&own), middle(&other))),
        measured: own.iter().zip(&other).map(ratio).collect(),
        unit: "x".to_owned(),
        goal: Goal::AtLeast(to_reach),
        note: String::new(),
    };
    println!("{}", figure.line());
    Ok(Some(figure))
}

/// The median of each quantity.
fn middle(sides: &[Side]) -> Side {
    let of = |get: fn(&Side) -> f64| median(&sides.iter().map(get).collect::<Vec<_>>());
    Side {
        rate: of(|side| side.rate),
        p50: of(|side| side.p50),
        p99: of(|side| side.p99),
        p999: of(|side| side.p999),
        cpu: of(|side| side.cpu),
        memory: of(|side| side.memory),
    }
}
