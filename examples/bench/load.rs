//! The load: clients that each have a connection and a thread, and one call, or one
//! pipeline of calls, under way at a time.
//!
//! Both sides of a comparison are driven by this code. It ends after a number of
//! operations or a time, whichever comes first; what was done while it warmed up is
//! not counted. The clients take the operations in small portions from one heap, so
//! that all of them end together, however unevenly they are served.

use hdrhistogram::Histogram;
use std::io;
use std::ops::Range;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How many operations a client takes from the heap at a time.
const PORTION: u64 = 8;

/// Beside the operations that count, this part of them is for warming up.
const WARM_UP_PART: u64 = 10;

/// Whatever takes longer counts as this, in microseconds.
const LONGEST_MICROS: u64 = 60_000_000;

/// The stack of a client's thread, in bytes.
const STACK_BYTES: usize = 256 * 1024;

/// One client: a connection to one side, and what it asks there.
pub(crate) trait Client: Send {
    /// Carries out the operation `number` to its end; `depth` of them from there on
    /// when they are sent together. Numbers only tell operations apart.
    ///
    /// # Errors
    /// When an answer is not the one that was to come.
    fn call(&mut self, number: u64, depth: usize) -> io::Result<()>;
}

impl<C: Client + ?Sized> Client for Box<C> {
    fn call(&mut self, number: u64, depth: usize) -> io::Result<()> {
        (**self).call(number, depth)
    }
}

/// How much is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// How many clients there are.
    pub(crate) clients: usize,
    /// How many calls one client has under way.
    pub(crate) depth: usize,
    /// How many operations there are, warming up aside.
    pub(crate) operations: u64,
    /// How many there are for warming up.
    pub(crate) warm_ups: u64,
    /// For how long at most.
    pub(crate) limit: Duration,
}

impl Load {
    /// So many clients with one call each.
    pub(crate) fn of(clients: usize, operations: u64, limit: Duration) -> Self {
        Self { clients, depth: 1, operations, warm_ups: operations / WARM_UP_PART, limit }
    }
}

/// What a load has shown.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Operations that were counted.
    pub(crate) operations: u64,
    /// The time that they took together.
    pub(crate) span: Duration,
    /// The time that each took, in microseconds; with a pipeline, all of one.
    pub(crate) latency: Histogram<u64>,
}

impl Outcome {
    /// Operations in a second.
    pub(crate) fn rate(&self) -> f64 {
        self.operations as f64 / self.span.as_secs_f64()
    }
}

/// Puts `load` on one side: `connect` makes the client with a number. `started` is
/// called when warming up is over.
///
/// # Errors
/// The first that a client met.
pub(crate) fn drive<C: Client>(
    load: Load,
    connect: impl Fn(usize) -> io::Result<C> + Sync,
    started: impl FnOnce(),
) -> io::Result<Outcome> {
    let clients = (0..load.clients).map(&connect).collect::<io::Result<Vec<C>>>()?;
    let gate = Barrier::new(load.clients + 1);
    let (warm, counted) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for mut client in clients {
            let (gate, warm, counted) = (&gate, &warm, &counted);
            let work = move || {
                let warm_ups = load.warm_ups;
                let brief = Load { limit: load.limit / 4, ..load };
                let warmed = take_part(&mut client, warm, 0..warm_ups, brief);
                // One that has failed must not keep the others waiting.
                gate.wait();
                gate.wait();
                warmed?;
                let numbers = warm_ups..warm_ups + load.operations;
                take_part(&mut client, counted, numbers, load)
            };
            threads.push(thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, work)?);
        }
        gate.wait();
        started();
        gate.wait();
        let mut all = Parts::new();
        let mut failed = None;
        for thread in threads {
            match thread.join().map_err(|_| io::Error::other("a client panicked"))? {
                Ok(parts) => all.add(&parts),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(all.into_outcome()),
        }
    })
}

/// What one client has done, or all of them together.
struct Parts {
    operations: u64,
    from: Option<Instant>,
    until: Option<Instant>,
    latency: Histogram<u64>,
}

impl Parts {
    fn new() -> Self {
        #[expect(clippy::expect_used, reason = "the bounds are fine")]
        let latency = Histogram::new_with_bounds(1, LONGEST_MICROS, 3).expect("a histogram");
        Self { operations: 0, from: None, until: None, latency }
    }

    fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.from = self.from.into_iter().chain(other.from).min();
        self.until = self.until.max(other.until);
        // It resizes itself, so it can't fail.
        let _ = self.latency.add(&other.latency);
    }

    fn into_outcome(self) -> Outcome {
        let span = self.until.zip(self.from).map_or(Duration::ZERO, |(until, from)| until - from);
        Outcome { operations: self.operations, span, latency: self.latency }
    }
}

/// Takes operations with `numbers` from `heap` until there are none, or the time is over.
fn take_part(
    client: &mut impl Client,
    heap: &AtomicU64,
    numbers: Range<u64>,
    load: Load,
) -> io::Result<Parts> {
    let mut parts = Parts::new();
    let begun = Instant::now();
    let mut now = begun;
    parts.from = Some(begun);
    let step = load.depth as u64;
    let portion = PORTION.max(step);
    loop {
        let first = numbers.start + heap.fetch_add(portion, Ordering::Relaxed);
        if first >= numbers.end {
            break;
        }
        for number in (first..(first + portion).min(numbers.end)).step_by(load.depth) {
            client.call(number, load.depth)?;
            let then = std::mem::replace(&mut now, Instant::now());
            parts.latency.saturating_record((now - then).as_micros() as u64);
            parts.operations += step;
            parts.until = Some(now);
            if now - begun > load.limit {
                return Ok(parts);
            }
        }
    }
    Ok(parts)
}

/// Spreads `number` over everything: operations of all clients hit keys at random,
/// the same on both sides (SplitMix64; Steele, Lea, Flood, OOPSLA 2014).
pub(crate) fn scatter(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ (mixed >> 31)
}
