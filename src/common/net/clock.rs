//! The clock that machines are told the time of.

use crate::machine::Time;
use std::time::Instant;

/// A monotonic clock; its origin is the moment it was made.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// The time now.
    pub fn now(self) -> Time {
        Time::from_micros(self.0.elapsed().as_micros() as u64)
    }
}
