//! The way of a machine's batches to its store, in their order.

use super::daemon;
use crate::store::committer::Committer;
use crate::store::{Change, Durability, Space, Store, StoreError};
use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// How often a full disk is looked at again.
const ROOM_GLANCE: Duration = Duration::from_millis(200);

type Batch = (Vec<Change>, u64);

/// Takes numbered batches, never blocks, and tells when they are stored.
///
/// What the committer's queue can't take yet waits here; how much that can be is
/// bounded by the machine, which takes no more writes while too much is unstored.
#[derive(Default)]
pub struct Journal {
    committer: OnceLock<Committer<u64>>,
    backlog: Mutex<VecDeque<Batch>>,
}

impl Journal {
    /// Begins to commit to `store`. `stored` takes the number of the last batch
    /// that is stored; `room` whether the disk has room, when that changes. A
    /// store that fails ends this process: what was acknowledged is on the other
    /// replicas' disks.
    ///
    /// # Errors
    /// When the system has no room for a thread.
    pub fn start(
        &self,
        store: impl Store,
        room: impl Fn(bool) + Send + 'static,
        stored: impl Fn(u64) + Send + 'static,
    ) -> io::Result<()> {
        let patient = Patient { store, room };
        let committer =
            Committer::start("committer", patient, move |batches: Vec<u64>, result| {
                if let Err(error) = result {
                    daemon::die(&format!(
                        "{error}; ending, since what was written last is uncertain"
                    ));
                }
                if let Some(last) = batches.into_iter().max() {
                    stored(last);
                }
            })?;
        let _ = self.committer.set(committer);
        Ok(())
    }

    /// Queues `changes` as the batch `number`. Calls must be in the order of the
    /// numbers.
    pub fn submit(&self, changes: Vec<Change>, number: u64) {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner).push_back((changes, number));
        self.flush();
    }

    /// Passes on what has waited, as far as there is room for it.
    pub fn flush(&self) {
        let Some(committer) = self.committer.get() else { return };
        let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((changes, number)) = backlog.pop_front() {
            if let Err(refused) = committer.submit(changes, number) {
                backlog.push_front(refused);
                return;
            }
        }
    }
}

/// A store that waits while its disk is full, and says so.
struct Patient<S, R> {
    store: S,
    room: R,
}

impl<S: Store, R: Fn(bool) + Send + 'static> Store for Patient<S, R> {
    fn durability(&self) -> Durability {
        self.store.durability()
    }

    fn commit(&mut self, batch: &[Change]) -> Result<(), StoreError> {
        let mut was_full = false;
        loop {
            match self.store.commit(batch) {
                Err(error @ StoreError::Full { .. }) => {
                    if !was_full {
                        tracing::error!("{error}: taking no writes until there is room");
                        (self.room)(false);
                        was_full = true;
                    }
                    std::thread::sleep(ROOM_GLANCE);
                }
                result => {
                    if was_full {
                        tracing::warn!("the disk has room again");
                        (self.room)(true);
                    }
                    return result;
                }
            }
        }
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.store.sync()
    }

    fn get(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.get(space, key)
    }

    fn scan(
        &self,
        space: Space,
        from: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        self.store.scan(space, from, take)
    }
}
