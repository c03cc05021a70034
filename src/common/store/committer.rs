//! Group commit: one thread commits for all.
//!
//! To wait for the disk takes the same time for one change as for a thousand. So
//! whoever wants something committed submits it to a queue, which never blocks,
//! and goes on. The committer's thread takes what is queued, up to the limits
//! below, makes *one* batch of it, commits that, and hands what came of it to a
//! callback, together with the tags of all who were in the group. While it waits
//! for the disk the next group gathers: the more writers there are the larger the
//! groups, without anybody waiting for a group to fill. A single writer has the
//! disk's own latency.
//!
//! What was submitted by one thread is committed in that order, and callbacks
//! come in the order of the commits. A refusal concerns only what was refused:
//! what was submitted after it may be committed. Whoever submits changes that
//! build upon each other must stop at the first refusal; or have a committer that
//! waits while the disk is full ([`Committer::start_patient`]).

use super::{Change, Durability, SYNC_INTERVAL, Store, StoreError};
use crate::net::{daemon, threads};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How many submissions can be queued.
pub const MAX_QUEUED: usize = 16 * 1024;

/// How many bytes of changes can be queued. A submission that is larger on its
/// own is taken when nothing else is queued.
pub const MAX_QUEUED_BYTES: usize = 64 * 1024 * 1024;

/// How many submissions are committed together.
pub const MAX_GROUP: usize = 1024;

/// How many bytes of changes are committed together; a submission that is larger
/// is committed by itself. This bounds how long the first of a group waits for
/// the others to be written.
pub const MAX_GROUP_BYTES: usize = 4 * 1024 * 1024;

/// After a group of so many submissions the next one is waited for: where there are
/// many writers, most of them are about to come again.
const CROWD: usize = 4;

/// How long it is waited for. A commit costs the processor about as much, whether it
/// is one of few changes or of many; so the fewer of them there are, the more writers
/// are served, and each of them sooner.
const LINGER: Duration = Duration::from_micros(300);

/// How often a full disk is looked at again.
const ROOM_GLANCE: Duration = Duration::from_millis(200);

// A group can gather while another one is committed.
const _: () = assert!(2 * MAX_GROUP <= MAX_QUEUED && 2 * MAX_GROUP_BYTES <= MAX_QUEUED_BYTES);

struct Submission<T> {
    changes: Vec<Change>,
    bytes: usize,
    tag: T,
}

impl<T> Submission<T> {
    fn only_removes(&self) -> bool {
        self.changes.iter().all(|change| matches!(change, Change::Remove { .. }))
    }
}

/// What waits for the thread. (A channel would do; but a channel's receiver has one
/// submission at a time, and spins before it sleeps.)
struct Queue<T> {
    state: Mutex<Queued<T>>,
    changed: Condvar,
}

struct Queued<T> {
    submissions: VecDeque<Submission<T>>,
    bytes: usize,
    /// The thread sleeps, and nobody has woken it yet.
    is_asleep: bool,
    /// Nothing more will come.
    is_closed: bool,
}

impl<T> Queued<T> {
    /// Takes what only removes.
    fn take_removals(&mut self) -> VecDeque<Submission<T>> {
        let queued = std::mem::take(&mut self.submissions).into_iter();
        let (removals, rest) = queued.partition(Submission::only_removes);
        self.submissions = rest;
        self.bytes -=
            removals.iter().map(|submission: &Submission<T>| submission.bytes).sum::<usize>();
        removals
    }
}

impl<T> Queue<T> {
    fn state(&self) -> MutexGuard<'_, Queued<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the thread if it sleeps.
    fn wake(&self, mut state: MutexGuard<'_, Queued<T>>) {
        let is_asleep = std::mem::take(&mut state.is_asleep);
        drop(state);
        if is_asleep {
            self.changed.notify_one();
        }
    }
}

/// A thread that commits to a store what is submitted to it.
///
/// Dropping it commits and reports everything that is queued, syncs the store,
/// and closes it. (If the callback itself drops it, that happens afterwards.)
pub struct Committer<T> {
    queue: Arc<Queue<T>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Committer<T> {
    /// Starts a thread called `name` that commits to `store`.
    ///
    /// It calls `done` with the tags of a group and what came of it, in the order
    /// in which they were submitted. `done` should be quick, since nothing is
    /// committed meanwhile, and must not panic. With [`Durability::Interval`] a
    /// sync that fails between two groups is reported with no tags. After
    /// [`StoreError::Failed`] nothing is committed any more, and every group
    /// gets that error.
    ///
    /// # Errors
    /// When the system has no room for another thread.
    pub fn start<S: Store>(
        name: &str,
        store: S,
        done: impl Fn(Vec<T>, Result<(), StoreError>) + Send + 'static,
    ) -> io::Result<Self> {
        Self::start_with(name, store, None, done)
    }

    /// Starts one that refuses nothing because the disk is full: that waits, in its
    /// order, until there is room. What only removes is committed meanwhile, as far as
    /// the store takes it: that makes room. So nobody may have anything removed before it
    /// has heard that it is stored: what is put would come back. `room` takes whether
    /// there is any, when that changes. When it is dropped while the disk is full, what
    /// still waits is refused.
    ///
    /// # Errors
    /// When the system has no room for another thread.
    pub fn start_patient<S: Store>(
        name: &str,
        store: S,
        room: impl Fn(bool) + Send + 'static,
        done: impl Fn(Vec<T>, Result<(), StoreError>) + Send + 'static,
    ) -> io::Result<Self> {
        Self::start_with(name, store, Some(Box::new(room)), done)
    }

    fn start_with<S: Store>(
        name: &str,
        store: S,
        room: Option<Room>,
        done: impl Fn(Vec<T>, Result<(), StoreError>) + Send + 'static,
    ) -> io::Result<Self> {
        let (submissions, bytes) = (VecDeque::new(), 0);
        let state = Queued { submissions, bytes, is_asleep: false, is_closed: false };
        let queue = Arc::new(Queue { state: Mutex::new(state), changed: Condvar::new() });
        let own = Arc::clone(&queue);
        let worker =
            Worker { store, last_group: 0, done, room, queue: own, sync_due: None, failed: None };
        let thread = threads::start(name, move || worker.run())?;
        Ok(Self { queue, thread: Some(thread) })
    }

    /// Queues `changes`, which are committed all or none. Never blocks. `tag`
    /// comes back with the callback, once.
    ///
    /// # Errors
    /// The changes and the tag, if there is no room for them in the queue.
    pub fn submit(&self, changes: Vec<Change>, tag: T) -> Result<(), (Vec<Change>, T)> {
        let bytes = changes.iter().map(Change::bytes).sum();
        let mut state = self.queue.state();
        let is_full = state.submissions.len() >= MAX_QUEUED
            || state.bytes > 0 && state.bytes.saturating_add(bytes) > MAX_QUEUED_BYTES;
        if is_full {
            return Err((changes, tag));
        }
        state.bytes += bytes;
        state.submissions.push_back(Submission { changes, bytes, tag });
        self.queue.wake(state);
        Ok(())
    }
}

impl<T> Drop for Committer<T> {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        state.is_closed = true;
        self.queue.wake(state);
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// Takes whether the disk has room.
type Room = Box<dyn Fn(bool) + Send>;

struct Worker<S, T, D> {
    store: S,
    /// How many submissions the last group held.
    last_group: usize,
    done: D,
    /// Whom a patient one tells whether there is room.
    room: Option<Room>,
    queue: Arc<Queue<T>>,
    /// With [`Durability::Interval`], when what was committed must be synced.
    sync_due: Option<Instant>,
    /// Why nothing is committed any more.
    failed: Option<StoreError>,
}

impl<S: Store, T, D: Fn(Vec<T>, Result<(), StoreError>)> Worker<S, T, D> {
    fn run(mut self) {
        while let Some(group) = self.next() {
            self.commit(group);
        }
        self.sync();
    }

    /// What is committed together next, when there is something; nothing once there
    /// is no more.
    fn next(&mut self) -> Option<Vec<Submission<T>>> {
        let queue = Arc::clone(&self.queue);
        let mut state = queue.state();
        while state.submissions.is_empty() {
            if state.is_closed {
                return None;
            }
            state.is_asleep = true;
            let Some(due) = self.sync_due else {
                state = queue.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let rest = due.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                drop(state);
                self.sync();
                state = queue.state();
            } else {
                let waited = queue.changed.wait_timeout(state, rest);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state.is_asleep = false;
        if self.last_group >= CROWD && state.submissions.len() < MAX_GROUP {
            drop(state);
            std::thread::sleep(LINGER);
            state = queue.state();
        }
        let group = gather(&mut state);
        drop(state);
        self.last_group = group.len();
        if self.sync_due.is_some_and(|due| due <= Instant::now()) {
            self.sync();
        }
        Some(group)
    }

    fn commit(&mut self, mut group: Vec<Submission<T>>) {
        let mut batch = Vec::new();
        let mut lengths = Vec::with_capacity(group.len());
        for submission in &mut group {
            lengths.push(submission.changes.len());
            batch.append(&mut submission.changes);
        }
        let outcome = self.try_commit(&batch);
        let is_full = matches!(outcome, Err(StoreError::Full { .. }));
        if is_full && let Some(room) = self.room.take() {
            let mut changes = batch.into_iter();
            for (submission, length) in group.iter_mut().zip(lengths) {
                submission.changes.extend(changes.by_ref().take(length));
            }
            room(false);
            self.wait_for_room(group);
            room(true);
            self.room = Some(room);
        } else if is_full && group.len() > 1 {
            // There may be room for each that is small, or that removes.
            let mut batch = &batch[..];
            for (submission, length) in group.into_iter().zip(lengths) {
                let (changes, rest) = batch.split_at(length);
                batch = rest;
                let outcome = self.try_commit(changes);
                (self.done)(vec![submission.tag], outcome);
            }
        } else {
            (self.done)(group.into_iter().map(|submission| submission.tag).collect(), outcome);
        }
    }

    /// Commits what a full disk refused, each on its own, once there is room.
    fn wait_for_room(&mut self, group: Vec<Submission<T>>) {
        let queue = Arc::clone(&self.queue);
        let (mut removals, mut rest): (VecDeque<_>, VecDeque<_>) =
            group.into_iter().partition(Submission::only_removes);
        loop {
            removals.append(&mut queue.state().take_removals());
            let removed = self.commit_in_order(&mut removals);
            let Err(full) = removed.and_then(|()| self.commit_in_order(&mut rest)) else { return };
            if queue.state().is_closed {
                let tags = removals.into_iter().chain(rest).map(|submission| submission.tag);
                return (self.done)(tags.collect(), Err(full));
            }
            std::thread::sleep(ROOM_GLANCE);
        }
    }

    /// Commits them one after the other, as far as there is room.
    fn commit_in_order(
        &mut self,
        submissions: &mut VecDeque<Submission<T>>,
    ) -> Result<(), StoreError> {
        while let Some(first) = submissions.pop_front() {
            match self.try_commit(&first.changes) {
                Err(full @ StoreError::Full { .. }) => {
                    submissions.push_front(first);
                    return Err(full);
                }
                outcome => (self.done)(vec![first.tag], outcome),
            }
        }
        Ok(())
    }

    fn try_commit(&mut self, batch: &[Change]) -> Result<(), StoreError> {
        let outcome = self.unless_failed(|store| store.commit(batch));
        if outcome.is_ok() && self.store.durability() == Durability::Interval {
            self.sync_due.get_or_insert_with(|| Instant::now() + SYNC_INTERVAL);
        }
        outcome
    }

    /// Syncs the store and reports it if that fails.
    fn sync(&mut self) {
        self.sync_due = None;
        if self.failed.is_none()
            && let Err(error) = self.unless_failed(Store::sync)
        {
            (self.done)(Vec::new(), Err(error));
        }
    }

    /// Does `work`, unless the store has failed before.
    fn unless_failed(
        &mut self,
        work: impl FnOnce(&mut S) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        // Whoever waits must hear of it, even if the store panics.
        let outcome = daemon::catch(|| work(&mut self.store))
            .unwrap_or_else(|_| Err(StoreError::Failed { what: "it panicked".into() }));
        if let Err(error @ (StoreError::Failed { .. } | StoreError::Damaged { .. })) = &outcome {
            self.failed = Some(error.clone());
        }
        outcome
    }
}

/// Takes what is committed together out of the queue.
fn gather<T>(state: &mut Queued<T>) -> Vec<Submission<T>> {
    let mut bytes = 0;
    let fits = |submission: &&Submission<T>| {
        bytes += submission.bytes;
        bytes <= MAX_GROUP_BYTES
    };
    let count = state.submissions.iter().take(MAX_GROUP).take_while(fits).count().max(1);
    let group: Vec<_> = state.submissions.drain(..count).collect();
    state.bytes -= group.iter().map(|submission| submission.bytes).sum::<usize>();
    group
}

#[cfg(test)]
#[allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "these tests wait for a thread"
)]
mod tests {
    use super::*;
    use crate::store::Space;
    use crate::store::memory::MemoryStore;
    use crossbeam_channel::{Receiver, Sender, unbounded};
    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// What happens to a store in a test.
    #[derive(Default)]
    struct State {
        memory: MemoryStore,
        durability: Durability,
        commits: usize,
        syncs: usize,
        /// What the next commits come to, the next one last.
        outcomes: Vec<StoreError>,
        sync_fails: bool,
        /// Commits with a put are refused.
        is_full: bool,
        panics: bool,
    }

    /// A store that fails on demand, and whose commits wait for a permit.
    #[derive(Clone)]
    struct Trial {
        state: Arc<Mutex<State>>,
        permits: (Sender<()>, Receiver<()>),
        /// Each commit that has begun.
        begun: (Sender<()>, Receiver<()>),
    }

    impl Trial {
        fn new(change: impl FnOnce(&mut State)) -> Self {
            let mut state = State::default();
            change(&mut state);
            let state = Arc::new(Mutex::new(state));
            Self { state, permits: unbounded(), begun: unbounded() }
        }

        fn state(&self) -> MutexGuard<'_, State> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner)
        }

        fn permit(&self, commits: usize) {
            for _ in 0..commits {
                self.permits.0.send(()).unwrap();
            }
        }

        fn start(&self) -> (Committer<usize>, Receiver<Done>) {
            let (sender, done) = unbounded();
            let committer = Committer::start("committer", self.clone(), move |tags, outcome| {
                let _ = sender.send((tags, outcome));
            });
            (committer.unwrap(), done)
        }
    }

    type Done = (Vec<usize>, Result<(), StoreError>);

    impl Store for Trial {
        fn durability(&self) -> Durability {
            self.state().durability
        }

        fn commit(&mut self, batch: &[Change]) -> Result<(), StoreError> {
            self.begun.0.send(()).unwrap();
            self.permits.1.recv_timeout(PATIENCE).unwrap();
            let mut state = self.state();
            assert!(!state.panics, "as it was told");
            if state.is_full && batch.iter().any(|change| matches!(change, Change::Put { .. })) {
                return Err(StoreError::Full { free: 0, needed: 1 });
            }
            if let Some(error) = state.outcomes.pop() {
                return Err(error);
            }
            state.commits += 1;
            state.memory.commit(batch)
        }

        fn sync(&mut self) -> Result<(), StoreError> {
            let mut state = self.state();
            state.syncs += 1;
            if state.sync_fails { Err(broken()) } else { Ok(()) }
        }

        fn get(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
            self.state().memory.get(space, key)
        }

        fn scan(
            &self,
            space: Space,
            from: &[u8],
            take: &mut dyn FnMut(&[u8], &[u8]) -> bool,
        ) -> Result<(), StoreError> {
            self.state().memory.scan(space, from, take)
        }
    }

    fn broken() -> StoreError {
        StoreError::Failed { what: "as it was told".into() }
    }

    fn put(key: usize) -> Vec<Change> {
        vec![Change::put(Space::Entries, key.to_string(), "")]
    }

    fn next(done: &Receiver<Done>) -> Done {
        done.recv_timeout(PATIENCE).unwrap()
    }

    #[test]
    fn what_gathers_during_a_commit_is_one_group_in_the_order_it_was_submitted() {
        let trial = Trial::new(|_| {});
        let (committer, done) = trial.start();
        committer.submit(put(0), 0).unwrap();
        trial.begun.1.recv_timeout(PATIENCE).unwrap();
        for key in 1..=50 {
            committer.submit(put(key), key).unwrap();
        }
        trial.permit(2);
        assert_eq!(next(&done), (vec![0], Ok(())));
        assert_eq!(next(&done), ((1..=50).collect(), Ok(())));
        assert_eq!(trial.state().commits, 2);
    }

    #[test]
    fn a_group_is_bounded_in_number_and_in_bytes() {
        let trial = Trial::new(|_| {});
        let (committer, done) = trial.start();
        committer.submit(put(0), 0).unwrap();
        trial.begun.1.recv_timeout(PATIENCE).unwrap();
        for key in 1..=MAX_GROUP + 1 {
            committer.submit(put(key), key).unwrap();
        }
        let large = || vec![Change::put(Space::Entries, "large", vec![0; MAX_GROUP_BYTES / 2])];
        for tag in 2000..2003 {
            committer.submit(large(), tag).unwrap();
        }
        trial.permit(10);
        let groups: Vec<_> = (0..5).map(|_| next(&done).0).collect();
        let ends: Vec<_> = groups.iter().map(|group| (group[0], group[group.len() - 1])).collect();
        let expected = [(0, 0), (1, 1024), (1025, 2000), (2001, 2001), (2002, 2002)];
        assert_eq!(ends, expected);
    }

    #[test]
    fn dropping_it_commits_what_is_queued_and_syncs() {
        let trial = Trial::new(|_| {});
        let (committer, done) = trial.start();
        trial.permit(100);
        for key in 0..100 {
            committer.submit(put(key), key).unwrap();
        }
        drop(committer);
        let tags: Vec<_> = done.iter().flat_map(|(tags, outcome)| outcome.map(|()| tags)).collect();
        assert_eq!(tags.concat(), Vec::from_iter(0..100));
        assert_eq!(trial.state().syncs, 1);
    }

    #[test]
    fn a_full_queue_gives_back_what_it_has_no_room_for() {
        let trial = Trial::new(|_| {});
        let (committer, done) = trial.start();
        committer.submit(put(0), 0).unwrap();
        trial.begun.1.recv_timeout(PATIENCE).unwrap();
        for key in 1..=MAX_QUEUED {
            committer.submit(put(key), key).unwrap();
        }
        assert_eq!(committer.submit(put(7), 7), Err((put(7), 7)));
        trial.permit(MAX_QUEUED);
        while !next(&done).0.contains(&MAX_QUEUED) {}
        committer.submit(put(7), 7).unwrap();
    }

    #[test]
    fn the_queue_is_bounded_in_bytes_but_takes_anything_when_it_is_empty() {
        let trial = Trial::new(|_| {});
        let (committer, done) = trial.start();
        let huge = || vec![Change::put(Space::Entries, "huge", vec![0; MAX_QUEUED_BYTES + 1])];
        committer.submit(put(0), 0).unwrap();
        trial.begun.1.recv_timeout(PATIENCE).unwrap();
        committer.submit(huge(), 1).unwrap();
        assert!(committer.submit(put(2), 2).is_err());
        trial.permit(3);
        assert_eq!(next(&done).0, [0]);
        assert_eq!(next(&done).0, [1]);
        committer.submit(put(2), 2).unwrap();
        assert_eq!(next(&done).0, [2]);
    }

    #[test]
    fn a_failed_store_is_never_tried_again() {
        let trial = Trial::new(|state| state.outcomes = vec![broken()]);
        let (committer, done) = trial.start();
        trial.permit(9);
        for tag in 0..3 {
            committer.submit(put(tag), tag).unwrap();
            assert_eq!(next(&done), (vec![tag], Err(broken())));
        }
        drop(committer);
        let state = trial.state();
        assert_eq!((state.commits, state.syncs), (0, 0));
    }

    #[test]
    fn a_store_that_panics_has_failed() {
        let trial = Trial::new(|state| state.panics = true);
        let (committer, done) = trial.start();
        trial.permit(1);
        committer.submit(put(1), 1).unwrap();
        assert!(matches!(next(&done), (_, Err(StoreError::Failed { .. }))));
    }

    #[test]
    fn a_full_disk_refuses_each_on_its_own_and_is_tried_again() {
        let trial = Trial::new(|state| state.is_full = true);
        let (committer, done) = trial.start();
        committer.submit(put(0), 0).unwrap();
        trial.begun.1.recv_timeout(PATIENCE).unwrap();
        committer.submit(put(1), 1).unwrap();
        committer.submit(vec![Change::remove(Space::Entries, "1")], 2).unwrap();
        trial.permit(4);
        let full = StoreError::Full { free: 0, needed: 1 };
        assert_eq!(next(&done), (vec![0], Err(full.clone())));
        assert_eq!(next(&done), (vec![1], Err(full)));
        assert_eq!(next(&done), (vec![2], Ok(())));
        trial.state().is_full = false;
        trial.permit(1);
        committer.submit(put(3), 3).unwrap();
        assert_eq!(next(&done), (vec![3], Ok(())));
    }

    #[test]
    fn a_patient_one_refuses_nothing_and_lets_only_removals_overtake() {
        let trial = Trial::new(|state| state.is_full = true);
        let ((sender, done), (told, room)) = (unbounded(), unbounded());
        let committer = Committer::start_patient(
            "committer",
            trial.clone(),
            move |is_room| told.send(is_room).unwrap(),
            move |tags, outcome| sender.send((tags, outcome)).unwrap(),
        );
        let committer = committer.unwrap();
        trial.permit(10_000);
        for key in 0..3 {
            committer.submit(put(key), key).unwrap();
        }
        assert_eq!(room.recv_timeout(PATIENCE), Ok(false));
        committer.submit(put(3), 3).unwrap();
        committer.submit(vec![Change::remove(Space::Entries, "1")], 4).unwrap();
        committer.submit(put(1), 5).unwrap();
        assert_eq!(next(&done), (vec![4], Ok(())));
        assert!(done.try_recv().is_err(), "there was no room for it");
        trial.state().is_full = false;
        let mut tags = Vec::new();
        while tags.len() < 5 {
            let (more, outcome) = next(&done);
            assert_eq!(outcome, Ok(()));
            tags.extend(more);
        }
        assert_eq!(tags, [0, 1, 2, 3, 5]);
        assert_eq!(room.recv_timeout(PATIENCE), Ok(true));
        // It ends even while the disk is full.
        trial.state().is_full = true;
        committer.submit(put(6), 6).unwrap();
        assert_eq!(room.recv_timeout(PATIENCE), Ok(false));
        drop(committer);
        assert!(matches!(next(&done), (tags, Err(StoreError::Full { .. })) if tags == [6]));
    }

    #[test]
    fn with_an_interval_what_was_committed_is_synced_without_another_commit() {
        let trial = Trial::new(|state| state.durability = Durability::Interval);
        let (committer, done) = trial.start();
        trial.permit(2);
        committer.submit(put(1), 1).unwrap();
        assert_eq!(next(&done), (vec![1], Ok(())));
        let deadline = Instant::now() + PATIENCE;
        while trial.state().syncs == 0 {
            assert!(Instant::now() < deadline, "never synced");
            std::thread::sleep(SYNC_INTERVAL / 10);
        }
        // A sync that fails is reported even though nobody waits for it.
        trial.state().sync_fails = true;
        committer.submit(put(2), 2).unwrap();
        assert_eq!(next(&done), (vec![2], Ok(())));
        assert_eq!(next(&done), (vec![], Err(broken())));
    }

    #[test]
    fn the_callback_may_drop_it() {
        let trial = Trial::new(|_| {});
        let own: Arc<Mutex<Option<Committer<()>>>> = Arc::default();
        let (sender, done) = unbounded();
        let inner = Arc::clone(&own);
        let committer = Committer::start("committer", trial.clone(), move |_, outcome| {
            inner.lock().unwrap().take();
            sender.send(outcome).unwrap();
        });
        *own.lock().unwrap() = Some(committer.unwrap());
        own.lock().unwrap().as_ref().unwrap().submit(put(1), ()).unwrap();
        trial.permit(1);
        assert_eq!(done.recv_timeout(PATIENCE), Ok(Ok(())));
    }

    /// What the next test has done by a process of its own: nothing else in this one
    /// would survive a panic from here on.
    #[test]
    #[ignore = "run by the next one"]
    fn a_store_panics_in_a_daemon() {
        daemon::end_on_panic();
        let trial = Trial::new(|state| state.panics = true);
        let (committer, done) = trial.start();
        trial.permit(1);
        committer.submit(put(1), 1).unwrap();
        let (_, outcome) = next(&done);
        daemon::print_line(&format!("what came of it: {}", outcome.unwrap_err()));
        panic!("this is not caught");
    }

    #[test]
    fn a_daemon_says_what_came_of_a_store_that_panics_and_ends_of_other_panics() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["a_store_panics_in_a_daemon", "--ignored", "--nocapture"]);
        let output = child.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("what came of it: "), "{output:?}");
        assert!(!said.contains("test result"), "it went on: {output:?}");
        assert_eq!(output.status.code(), Some(101));
    }
}
