//! What is left to chance in a run: how long things take, and what a crash
//! leaves.

use super::network::{Party, Way};
use std::time::Duration;

/// Decides what nobody in the cluster decides.
pub(crate) trait Chance {
    /// How long a message takes on its way.
    fn delay(&mut self, way: Way) -> Duration;

    /// How long the disk of `party` takes to store a batch.
    fn sync(&mut self, party: Party) -> Duration;

    /// How many of the `queued` batches, from the first one on, have made it to
    /// the disk of a process that has died.
    fn kept(&mut self, queued: usize) -> usize;
}

/// Nothing is left to chance: for scripts.
#[derive(Debug)]
pub(crate) struct Steady;

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
