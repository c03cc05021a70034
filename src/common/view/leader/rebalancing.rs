//! Rebalancing: the workers that let groups advance, and how far they are.

use super::{Asker, Effect, Leader};
use crate::machine::Time;
use crate::view::Revision;
use crate::view::locks::Grant;
use crate::view::messages::{LockCall, Okay, Progress, RebalanceStatus};
use crate::view::state::Change;
use crate::wire::Identity;

/// The lock that a rebalancing holds.
pub const REBALANCING: &str = "rebalancing";

/// A rebalancing worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Worker {
    /// Why it was started.
    pub cause: Cause,
    /// Tells it from the others.
    pub number: u64,
}

/// Why a rebalancing is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// A server has failed or left.
    Failed,
    /// A server was added.
    Added,
}

impl Worker {
    /// What its thread is called, after the original's workers.
    pub fn name(self) -> &'static str {
        match self.cause {
            Cause::Failed => "rebalancing_f",
            Cause::Added => "rebalancing_a",
        }
    }

    pub(super) fn lock_call(self) -> LockCall {
        let requestor = Identity::text(format!("{}-{}", self.name(), self.number));
        LockCall::new(REBALANCING.to_owned(), requestor)
    }
}

/// The rebalancing that is under way, or the last one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rebalance {
    pub(super) began: Time,
    pub(super) ended: Option<Time>,
    /// What has been moved by it.
    pub(super) moved: Progress,
}

impl<T> Leader<T> {
    pub(super) fn start_worker(&mut self, cause: Cause, effects: &mut Vec<Effect<T>>) {
        // One that has not had its turn yet will see to this, too.
        let waits = |worker: &&Worker| worker.cause == cause && !self.holds_lock(**worker);
        if self.workers.iter().any(|worker| waits(&worker)) {
            return;
        }
        self.last_worker += 1;
        let worker = Worker { cause, number: self.last_worker };
        self.workers.insert(worker);
        effects.push(Effect::StartWorker(worker));
    }

    fn holds_lock(&self, worker: Worker) -> bool {
        matches!(self.state.place_in_queue(&worker.lock_call()), Some(Grant::Granted { .. }))
    }

    /// One look of a worker: it takes the lock, lets the groups advance when
    /// something is new, and is done when all of them are at rest.
    pub(super) fn work(&mut self, now: Time, worker: Worker, effects: &mut Vec<Effect<T>>) {
        if !self.workers.contains(&worker) || !self.proposed.is_empty() {
            return;
        }
        match self.state.place_in_queue(&worker.lock_call()) {
            None => self.propose(Change::LockGet(worker.lock_call()), Asker::Nobody, effects),
            Some(Grant::Granted { .. }) if self.view().is_settled() => {
                let has_worked = self.advanced > Revision(0) || self.inherits_work;
                (self.advanced, self.inherits_work) = (Revision(0), false);
                self.rebalance.ended = Some(now);
                let Progress { keys, bytes, needed, .. } = self.rebalance.moved;
                let line = has_worked.then(|| {
                    let epoch = self.view().epoch;
                    format!(
                        "Rebalancing complete in {epoch}: {keys} keys, {bytes} bytes moved; the least \
                         was {needed} bytes"
                    )
                });
                // It says so when the lock is free for certain. Who leads next would
                // else find it taken, complete the work once more, and say so again.
                let release = Change::LockRelease(worker.lock_call());
                self.propose(release, Asker::Worker(worker, line), effects);
            }
            Some(Grant::Granted { .. }) if self.advanced < self.view().revision => {
                self.propose(Change::Advance, Asker::Nobody, effects);
                if self.advanced == Revision(0) {
                    self.rebalance = Rebalance { began: now, ..Rebalance::default() };
                }
                self.advanced = self.view().revision;
            }
            Some(_) => {}
        }
    }

    /// Adds what `id` has fetched since its last report to the rebalancing.
    pub(super) fn take_progress(&mut self, id: &Identity, now: Progress) {
        if self.view().member(id).is_none() {
            return;
        }
        self.progress.insert(id.clone(), now);
        let moved = &mut self.rebalance.moved;
        moved.keys += now.keys;
        moved.bytes += now.bytes;
        moved.needed += now.needed;
    }

    pub(super) fn rebalance_status(&self, now: Time) -> RebalanceStatus {
        let view = self.view();
        let Rebalance { began, ended, moved } = self.rebalance;
        let done = (0..view.groups.len()).filter(|index| view.is_complete(*index)).count();
        let here = |id: &Identity| view.member(id).is_some();
        let left =
            self.progress.iter().filter(|(id, _)| here(id)).map(|(_, progress)| progress.left);
        let (left, elapsed) = (left.sum::<u64>(), ended.unwrap_or(now).since(began));
        let elapsed_ms = elapsed.as_millis() as u64;
        RebalanceStatus {
            status: Okay::Ok,
            epoch: view.epoch,
            moving: !view.is_settled(),
            arcs: view.groups.len(),
            arcs_done: done,
            keys_moved: moved.keys,
            bytes_moved: moved.bytes,
            bytes_needed: moved.needed,
            keys_left: left,
            elapsed_ms,
            estimate_ms: (left > 0 && moved.keys > 0).then(|| elapsed_ms * left / moved.keys),
        }
    }
}
