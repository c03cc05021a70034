//! Restoring a backup into a new cluster: see [`crate::backup`] and
//! [`crate::view::restoring`].
//!
//! Every step may be taken again: a restore that was interrupted goes on when the same
//! command is given again, and loads all keys anew. Until it is done the cluster
//! serves nobody.

use super::ask::Asker;
use super::backup::{Cluster, Failure, RETRY, now_ms, require_servers};
use super::call::{self, Caller};
use super::display::Walk;
use crate::backup::Manifest;
use crate::backup::folder::Backup;
use crate::kv::Entry;
use crate::kv::messages::{Load, Place, Public};
use crate::kv::ring::Point;
use crate::view::View;
use crate::view::messages::{Okay, ViewRequest};
use crate::view::restoring::{Restoration, Restore, Step};
use crate::wire::append_frame;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Instant;

/// How many keys are loaded at once: so many share what a sync costs.
const BATCH_KEYS: usize = 1024;

/// How many bytes of keys and values are, or one more key.
const BATCH_BYTES: usize = 1024 * 1024;

/// What to do after an end in the middle.
const UNFINISHED: &str = "the cluster serves nobody until it is restored: give the same command \
                          again to go on, or start a new cluster with empty data directories";

/// Restores the cluster from the backup in `folder`.
///
/// # Errors
/// See [`Failure`].
pub fn load(asker: &Asker, folder: &Path, stop: &AtomicBool) -> Result<Manifest, Failure> {
    let backup = Backup::open(folder)?;
    let now_ms = now_ms();
    if now_ms < backup.manifest.ended_ms {
        return Err(Failure::No(
            "this machine's clock is behind the moment at which the backup was taken: set it \
             right first; it tells from where on the restored cluster counts its tokens and \
             versions, so that none comes again"
                .into(),
        ));
    }
    let mut restoring = Restoring { cluster: Cluster::new(asker, stop), backup: &backup };
    restoring.check_backup()?;
    restoring.begin(now_ms)?;
    restoring.load_all()?;
    restoring.step(Step::Finish {})?;
    Ok(backup.manifest)
}

struct Restoring<'a> {
    cluster: Cluster<'a>,
    backup: &'a Backup,
}

impl Restoring<'_> {
    fn step(&self, step: Step) -> Result<(), Failure> {
        #[derive(Deserialize)]
        struct Answer {
            #[expect(dead_code, reason = "that it is there is the answer")]
            status: Okay,
        }
        let restore = Restore { backup: self.backup.manifest.backup.clone(), step };
        self.cluster.ask_leader::<Answer>(ViewRequest::Restore(restore)).map(|_| ())
    }

    /// Reads all of the backup, before anything is done with the cluster.
    fn check_backup(&self) -> Result<(), Failure> {
        let bar = Walk::new(self.backup.manifest.keys, "keys checked");
        for (number, entry) in (0..).zip(self.backup.entries()) {
            entry?;
            if number % BATCH_KEYS as u64 == 0 {
                bar.show(number, number);
                self.cluster.go_on("nothing was done")?;
            }
        }
        bar.end();
        Ok(())
    }

    /// Makes the cluster one that is being restored, and sees that it is empty.
    fn begin(&mut self, now_ms: u64) -> Result<(), Failure> {
        let view = self.cluster.view()?;
        require_servers(&view)?;
        if view.restoring.is_none() {
            // A cluster that is in use by mistake is not to be disturbed.
            self.refuse_keys(view)?;
        }
        self.step(Step::Begin { above: self.backup.manifest.numbers.beyond(now_ms) })?;
        let view = self.wait_until_all_know()?;
        if !view.restoring.as_ref().is_some_and(|it| it.loads) {
            // Nobody writes any more: now it is certain.
            if let Err(failure) = self.refuse_keys(view) {
                self.step(Step::GiveUp {})?;
                return Err(failure);
            }
            self.step(Step::Load {})?;
        }
        Ok(())
    }

    /// Waits until every group is whole, under a version in which its servers know that
    /// the cluster is being restored.
    fn wait_until_all_know(&self) -> Result<Arc<View>, Failure> {
        let deadline = Instant::now() + self.cluster.asker.timeout;
        loop {
            let view = self.cluster.view()?;
            let is_ours = |it: &Restoration| it.backup == self.backup.manifest.backup;
            if !view.restoring.as_ref().is_some_and(is_ours) {
                return Err(Failure::No("somebody else has ended this restore".into()));
            }
            if view.is_at_rest() {
                return Ok(view);
            }
            if Instant::now() + RETRY >= deadline {
                let why = "not all servers are ready (client status)";
                return Err(Failure::No(format!("{why}; {UNFINISHED}")));
            }
            self.cluster.go_on(UNFINISHED)?;
            thread::sleep(RETRY);
        }
    }

    /// # Errors
    /// When there is a key in the cluster.
    fn refuse_keys(&mut self, mut view: Arc<View>) -> Result<(), Failure> {
        let mut place = Some(Place::default());
        while let Some(at) = place {
            let page = self.cluster.page(&mut view, &at)?;
            if let Some(Entry { key, .. }) = page.entries.first() {
                return Err(Failure::No(format!(
                    "the cluster is not empty: it has the key {key:?}; a backup is restored into a \
                     new cluster, whose programs were started with empty data directories"
                )));
            }
            place = page.next;
        }
        Ok(())
    }

    fn load_all(&mut self) -> Result<(), Failure> {
        let bar = Walk::new(self.backup.manifest.keys, "keys");
        let mut view = self.cluster.view()?;
        let (mut batch, mut bytes, mut keys) = (Vec::new(), 0, 0);
        let mut entries = self.backup.entries();
        loop {
            let entry = entries.next().transpose()?;
            let is_last = entry.is_none();
            bytes += entry.as_ref().map_or(0, Entry::bytes);
            batch.extend(entry);
            if is_last || batch.len() >= BATCH_KEYS || bytes >= BATCH_BYTES {
                self.cluster.go_on(UNFINISHED)?;
                keys += batch.len() as u64;
                self.load_batch(&mut view, std::mem::take(&mut batch))?;
                bytes = 0;
                bar.show(keys, keys);
            }
            if is_last {
                bar.end();
                return Ok(());
            }
        }
    }

    /// Loads these, and again those of which nothing is known: that does no harm.
    fn load_batch(&self, view: &mut Arc<View>, mut batch: Vec<Entry>) -> Result<(), Failure> {
        let deadline = Instant::now() + self.cluster.asker.timeout;
        loop {
            let mut shares: BTreeMap<Option<SocketAddrV4>, Vec<Entry>> = BTreeMap::new();
            for entry in batch {
                let primary = view.primary_of(Point::of(&entry.key));
                shares.entry(primary).or_default().push(entry);
            }
            let outcomes: Vec<_> = thread::scope(|scope| {
                let load = |(primary, share)| scope.spawn(move || self.load_at(primary, share));
                let threads: Vec<_> = shares.into_iter().map(load).collect();
                threads.into_iter().map(|thread| thread.join()).collect()
            });
            let (mut left, mut why) = (Vec::new(), String::new());
            for outcome in outcomes {
                #[expect(clippy::expect_used, reason = "a panic ends the process")]
                let outcome = outcome.expect("a thread that does not panic");
                let (rest, reason) = outcome?;
                left.extend(rest);
                why = reason.unwrap_or(why);
            }
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() + RETRY >= deadline {
                return Err(Failure::Nobody(format!("{why}; {UNFINISHED}")));
            }
            self.cluster.go_on(UNFINISHED)?;
            thread::sleep(RETRY);
            *view = self.cluster.view()?;
            batch = left;
        }
    }

    /// Loads these at `primary`. Returns those that are not known to be there, and why.
    fn load_at(
        &self,
        primary: Option<SocketAddrV4>,
        share: Vec<Entry>,
    ) -> Result<(Vec<Entry>, Option<String>), Failure> {
        let Some(primary) = primary else {
            return Ok((share, Some("an arc has no primary (client status)".into())));
        };
        let mut frames = Vec::new();
        for entry in &share {
            let (backup, entry) = (self.backup.manifest.backup.clone(), entry.clone());
            append_frame(&mut frames, &Public::Load(Load { backup, entry })).map_err(|error| {
                Failure::No(format!("a key of the backup fits in no message: {error}"))
            })?;
        }
        let deadline = Instant::now() + self.cluster.asker.timeout / 2;
        let connected = Caller::connect(primary, deadline);
        let sent = connected.and_then(|mut line| line.send(&frames, deadline).map(|()| line));
        let mut line = match sent {
            Ok(line) => line,
            Err(failure) => return Ok((share, Some(format!("{primary}: {failure}")))),
        };
        let (mut left, mut why) = (Vec::new(), None);
        let mut share = share.into_iter();
        while let Some(entry) = share.next() {
            match line.receive(deadline) {
                Ok(body) => match call::refusal(&body) {
                    None => {}
                    // Its primary may not have heard yet that keys are loaded now.
                    Some(refusal) => {
                        why = Some(format!("{primary}: {refusal}"));
                        left.push(entry);
                    }
                },
                Err(failure) => {
                    why = Some(format!("{primary}: {failure}"));
                    left.push(entry);
                    left.extend(share);
                    return Ok((left, why));
                }
            }
        }
        Ok((left, why))
    }
}
