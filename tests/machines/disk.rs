//! Disks, which outlive the processes that write to them.
//!
//! A process queues numbered batches; one after the other they are stored, each
//! as a whole. Whoever dies leaves what was stored, and of what was queued as many
//! batches as the run's [`super::chance::Chance`] says: none was acknowledged, and
//! any number of them, from the first one on, may have made it.

use ringleader::machine::Time;
use ringleader::store::memory::MemoryStore;
use ringleader::store::{Change, Store};
use std::collections::VecDeque;

/// One disk.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    store: MemoryStore,
    queue: VecDeque<(Vec<Change>, u64)>,
    /// When the last batch in the queue will be stored.
    last: Time,
    /// Batches wait until it is released.
    is_held: bool,
}

impl Disk {
    /// What is stored.
    pub(crate) fn store(&self) -> &MemoryStore {
        &self.store
    }

    /// Queues a batch, which is to be stored at `time`, or once the one before it
    /// is. Returns when, or nothing while the disk is held.
    pub(crate) fn submit(&mut self, changes: Vec<Change>, number: u64, time: Time) -> Option<Time> {
        self.queue.push_back((changes, number));
        self.last = self.last.max(time);
        (!self.is_held).then_some(self.last)
    }

    /// Stores the batches up to `number`. Returns whether there were any.
    pub(crate) fn keep_up_to(&mut self, number: u64) -> bool {
        let count = self.queue.iter().take_while(|(_, queued)| *queued <= number).count();
        self.keep(count);
        count > 0
    }

    /// How many batches wait.
    pub(crate) fn queued(&self) -> usize {
        self.queue.len()
    }

    /// The process that wrote has died, and the first `kept` of its batches made
    /// it.
    pub(crate) fn crash(&mut self, kept: usize) {
        self.keep(kept);
        self.queue.clear();
        self.is_held = false;
    }

    /// From now on, batches wait.
    pub(crate) fn hold(&mut self) {
        self.is_held = true;
    }

    /// They wait no more. Returns the number of the last one.
    pub(crate) fn release(&mut self) -> Option<u64> {
        self.is_held = false;
        self.queue.back().map(|(_, number)| *number)
    }

    fn keep(&mut self, count: usize) {
        for (changes, _) in self.queue.drain(..count) {
            self.store.commit(&changes).expect("memory has room");
        }
    }
}
