//! The contract between the logic and the world.
//!
//! Everything that decides something in this house is a *machine*: a struct
//! that owns all of its state and has one entry, [`Machine::step`]. A machine
//! reads no clock, opens no socket, starts no thread, and draws randomness
//! only from a generator it was given; it iterates over ordered maps only. So
//! the same inputs give the same effects, whether the shell around it speaks
//! TCP or is a simulator with a virtual clock and network.
//!
//! A *shell* (see [`crate::net`]) reads a frame, steps the machine under its
//! lock, queues what it asked for, and does the slow part (writing to sockets,
//! waiting) outside of it. The rule is executable: `clippy.toml` disallows the
//! clock, sockets, threads and hash maps everywhere but in the shells.

use std::fmt;
use std::ops::Add;
use std::time::Duration;

/// A moment on the monotonic clock of one process: microseconds since an
/// origin that means nothing to any other process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(u64);

impl Time {
    /// The moment `micros` microseconds after the origin.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// The moment `millis` milliseconds after the origin.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis * 1000)
    }

    /// How long after `earlier` this moment is; zero if it is not after it.
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Time;

    fn add(self, span: Duration) -> Time {
        let micros = u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        Time(self.0.saturating_add(micros))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}s", self.0 / 1_000_000, self.0 / 1000 % 1000)
    }
}

/// Logic with one entry: an input in, effects out.
pub trait Machine {
    /// What can happen to the machine.
    type Input;
    /// What the machine asks its shell to do. The order that effects need is
    /// documented on the effects themselves.
    type Effect;

    /// Takes one input at the moment `now` and appends to `effects` what the
    /// shell must do about it. `now` never goes backwards between two calls.
    fn step(&mut self, now: Time, input: Self::Input, effects: &mut Vec<Self::Effect>);
}
