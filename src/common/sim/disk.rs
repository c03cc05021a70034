//! Disks, which outlive the processes that write to them.
//!
//! A process queues numbered batches; one after the other they are stored, each
//! as a whole. Whoever dies leaves what was stored, and of what was queued as many
//! batches as the run's [`super::chance::Chance`] says: none was acknowledged, and
//! any number of them, from the first one on, may have made it. That is what a
//! torn write comes to: the store cuts a batch that is there in part.
//!
//! A disk whose server runs with less than `always` tells it at once that a batch
//! is stored, and syncs now and then. The death of the process loses nothing of
//! that; the loss of power loses everything from some batch after the last sync on.

use crate::machine::Time;
use crate::store::memory::MemoryStore;
use crate::store::{Change, Store};
use std::collections::VecDeque;

/// One disk.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    store: MemoryStore,
    queue: VecDeque<(Vec<Change>, u64)>,
    /// When the last batch in the queue will be stored.
    last: Time,
    /// Batches wait until it is released.
    is_held: bool,
    /// The next sync fails.
    pub is_failing: bool,
    /// What was synced last and what was stored since, of a disk that is synced
    /// only now and then.
    unsynced: Option<(MemoryStore, Vec<Vec<Change>>)>,
}

impl Disk {
    /// An empty disk that is synced only now and then.
    pub fn lazy() -> Self {
        Self { unsynced: Some(Default::default()), ..Self::default() }
    }

    /// Whether it is synced only now and then.
    pub fn is_lazy(&self) -> bool {
        self.unsynced.is_some()
    }

    /// What is stored.
    pub fn store(&self) -> &MemoryStore {
        &self.store
    }

    /// A copy of what is stored, as somebody puts it aside.
    pub fn copy(&self) -> Self {
        let unsynced = self.unsynced.is_some().then(|| (self.store.clone(), Vec::new()));
        Self { store: self.store.clone(), unsynced, ..Self::default() }
    }

    /// Queues a batch, which is to be stored at `time`, or once the one before it
    /// is. Returns when, or nothing while the disk is held.
    pub fn submit(&mut self, changes: Vec<Change>, number: u64, time: Time) -> Option<Time> {
        self.queue.push_back((changes, number));
        self.last = self.last.max(time);
        (!self.is_held).then_some(self.last)
    }

    /// Stores the batches up to `number`. Returns whether there were any.
    pub fn keep_up_to(&mut self, number: u64) -> bool {
        let count = self.queue.iter().take_while(|(_, queued)| *queued <= number).count();
        self.keep(count);
        count > 0
    }

    /// The number of the batch that is stored next.
    pub fn first_queued(&self) -> Option<u64> {
        self.queue.front().map(|(_, number)| *number)
    }

    /// How many batches wait.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// How many batches the loss of power could lose.
    pub fn unsynced(&self) -> usize {
        self.unsynced.as_ref().map_or(0, |(_, since)| since.len())
    }

    /// Syncs what is stored.
    pub fn sync(&mut self) {
        if let Some((synced, since)) = &mut self.unsynced {
            since.drain(..).for_each(|changes| commit(synced, &changes));
        }
    }

    /// The process that wrote has died, and the first `kept` of its batches made
    /// it.
    pub fn crash(&mut self, kept: usize) {
        self.keep(kept);
        self.queue.clear();
        (self.is_held, self.is_failing) = (false, false);
    }

    /// The power has failed: of what was stored since the last sync, the first
    /// `kept` batches are there.
    pub fn lose_power(&mut self, kept: usize) {
        if let Some((synced, since)) = &mut self.unsynced {
            since.drain(..).take(kept).for_each(|changes| commit(synced, &changes));
            self.store = synced.clone();
        }
    }

    /// From now on, batches wait.
    pub fn hold(&mut self) {
        self.is_held = true;
    }

    /// They wait no more. Returns the number up to which they are stored then. (What
    /// shortens a log has the number of what it takes the place of.)
    pub fn release(&mut self) -> Option<u64> {
        self.is_held = false;
        self.queue.iter().map(|(_, number)| *number).max()
    }

    fn keep(&mut self, count: usize) {
        for (changes, _) in self.queue.drain(..count) {
            commit(&mut self.store, &changes);
            if let Some((_, since)) = &mut self.unsynced {
                since.push(changes);
            }
        }
    }
}

fn commit(store: &mut MemoryStore, changes: &[Change]) {
    store.commit(changes).expect("memory has room");
}
