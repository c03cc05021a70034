//! Upkeep of the engine: giving space back to the disk.
//!
//! Three things the engine leaves undone, that a thread of ours does:
//!
//! - *What was merged away.* Files that a merge has replaced are deleted when the
//!   engine next writes out a table from memory. A store that nobody writes to any
//!   more would keep them (5 times the live data were seen). So after merges we
//!   let them go.
//! - *What is left to merge.* The engine merges twice for each table that it
//!   writes out, whether that is enough or not. It makes commits wait while too
//!   many tables pile up, but while commits wait no table is written out, and so
//!   nothing is merged: they would wait for ever (that was seen, too). So we merge
//!   for as long as tables are piled up.
//! - *What was removed.* The engine merges when tables pile up or grow, not when
//!   what is in them is gone. A server that has given away nine tenths of its keys
//!   would keep their space until it has written as much again. So after many
//!   removals we look how much of a space's tables is garbage, and merge all of
//!   them if it is more than half. That takes the time to write what remains,
//!   and comes after at least as much was removed.

use super::disk::{self, Free, LOOK_AGAIN, MERGE_AT, RESERVE_BYTES};
use crate::net::threads;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use fjall::{AbstractTree as _, Database, Keyspace, PersistMode};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often files that were merged away are let go. They take room meanwhile,
/// which a merge makes at up to some 100 MiB a second.
const EVERY: Duration = Duration::from_millis(50);

/// After so many removals we look how much garbage there is.
const LOOK_AFTER_REMOVALS: usize = 20_000;

/// The thread that gives space back; it ends when this is dropped.
pub(super) struct Upkeep {
    /// How many there were since the last look.
    removals: Arc<AtomicUsize>,
    /// Taken when this is dropped.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Upkeep {
    /// Begins to look after the `spaces` of `engine`, on a disk that has as much
    /// room as `free` says.
    pub(super) fn start(engine: Database, spaces: Vec<Keyspace>, free: Free) -> io::Result<Self> {
        let removals = Arc::new(AtomicUsize::new(0));
        let (end, ended) = bounded(0);
        let worker = Worker { engine, spaces, free, removals: Arc::clone(&removals), ended };
        let thread = threads::start("upkeep", move || worker.run())?;
        Ok(Self { removals, end: Some(end), thread: Some(thread) })
    }

    /// So many keys were removed.
    pub(super) fn removed(&self, count: usize) {
        self.removals.fetch_add(count, Ordering::Relaxed);
    }

    /// Whether it has given up, since a merge has failed.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    engine: Database,
    spaces: Vec<Keyspace>,
    free: Free,
    removals: Arc<AtomicUsize>,
    ended: Receiver<()>,
}

impl Worker {
    fn run(self) {
        // Nobody knows what was removed before this start.
        self.spaces.iter().for_each(|space| self.squeeze(space));
        let mut merges = 0;
        let mut pause = EVERY;
        while self.wait(pause) {
            pause = EVERY;
            for space in &self.spaces {
                match self.merge_what_is_piled_up(space) {
                    Ok(false) => {}
                    Ok(true) => pause = LOOK_AGAIN,
                    Err(error) => {
                        tracing::error!("{}: a merge has failed: {error}", &**space.name());
                        return;
                    }
                }
            }
            let merges_now = self.engine.compactions_completed();
            if merges_now != merges || pause != EVERY {
                merges = merges_now;
                self.let_go();
            }
            if self.removals.load(Ordering::Relaxed) >= LOOK_AFTER_REMOVALS {
                self.removals.store(0, Ordering::Relaxed);
                for space in &self.spaces {
                    if self.write_out(space) {
                        self.squeeze(space);
                    }
                }
            }
        }
    }

    /// Does one merge if there is one to do and nobody does any; returns whether
    /// it did.
    fn merge_what_is_piled_up(&self, space: &Keyspace) -> Result<bool, fjall::LsmError> {
        let is_piled_up = space.tree.l0_run_count() >= MERGE_AT.into();
        let merges = is_piled_up && self.engine.active_compactions() == 0;
        if merges {
            // Values that newer ones hide are dropped: nobody reads them.
            space.tree.compact(disk::strategy(), self.engine.visible_seqno())?;
        }
        Ok(merges)
    }

    /// Waits and returns whether to go on.
    fn wait(&self, long: Duration) -> bool {
        self.ended.recv_timeout(long) == Err(RecvTimeoutError::Timeout)
    }

    /// Deletes the files that only earlier states of the tables refer to. Nobody
    /// reads those: all our reads are of the newest state.
    fn let_go(&self) {
        for space in &self.spaces {
            let newest = self.engine.visible_seqno();
            let mut states = space.tree.get_version_history_lock();
            if let Err(error) = states.maintenance(space.path(), newest) {
                tracing::warn!("old tables stay for now: {error}");
            }
        }
    }

    /// Writes what `space` has in memory to a table: removals there count, too.
    /// Returns whether all of it has been.
    fn write_out(&self, space: &Keyspace) -> bool {
        if let Err(error) = space.rotate_memtable() {
            tracing::warn!("{}: {error}", &**space.name());
            return false;
        }
        while space.tree.sealed_memtable_count() > 0 {
            let works = self.engine.persist(PersistMode::Buffer).is_ok();
            if !works || !self.wait(LOOK_AGAIN) {
                return false;
            }
        }
        true
    }

    /// Merges all tables of `space` if more than half of what is in them is
    /// garbage, and there is room for what is not.
    fn squeeze(&self, space: &Keyspace) {
        let (items, removals) = (space.tree.approximate_len() as u64, space.tree.tombstone_count());
        // Each removal hides a value, as a rule.
        let live = items.saturating_sub(2 * removals);
        if removals == 0 || live > items / 2 {
            return;
        }
        let bytes = (space.disk_space() as f64 * live as f64 / items as f64) as u64;
        let has_room = (self.free)().is_ok_and(|free| free >= RESERVE_BYTES / 2 + bytes);
        if !has_room {
            tracing::warn!("{}: no room to merge its tables", &**space.name());
            return;
        }
        match space.major_compact() {
            Ok(()) => self.let_go(),
            Err(error) => tracing::warn!("{}: not merged: {error}", &**space.name()),
        }
    }
}
