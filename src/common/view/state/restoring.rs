//! The steps of a restore, as the log has them: see [`crate::view::restoring`].

use super::{Outcome, State, touch};
use crate::view::leader::REBALANCING;
use crate::view::restoring::{
    BackupId, MAX_NUMBER, NotRestored, Numbers, Restoration, Restore, Step,
};
use crate::view::{Epoch, Revision, Token, View};

impl State {
    /// How far it has counted.
    pub fn numbers(&self) -> Numbers {
        let View { epoch, revision, .. } = self.view;
        Numbers { epoch, revision, token: self.locks.last_token() }
    }

    pub(super) fn restore(&mut self, restore: &Restore) -> Outcome {
        let Restore { backup, step } = restore;
        let outcome = match step {
            Step::Begin { above } => self.begin_restoring(backup, *above),
            Step::Load {} => self.begin_loading(backup),
            Step::Finish {} => self.finish_restoring(backup),
            Step::GiveUp {} => self.give_restoring_up(backup),
        };
        outcome.map_or_else(Outcome::NotRestored, |()| Outcome::Done)
    }

    fn begin_restoring(&mut self, backup: &BackupId, above: u64) -> Result<(), NotRestored> {
        match (&self.view.restoring, &self.restored) {
            // It goes on where it was.
            (Some(under_way), _) if under_way.backup == *backup => return Ok(()),
            (Some(_), _) => return Err(NotRestored::AnotherOne),
            (None, Some(before)) if before == backup => return Err(NotRestored::Already),
            (None, Some(_)) => return Err(NotRestored::NotNew),
            (None, None) => {}
        }
        // The workers of the viewleader hold theirs in any cluster.
        if self.locks.list(None).any(|(lock, _)| lock != REBALANCING) {
            return Err(NotRestored::LocksHeld);
        }
        if self.view.groups.is_empty() {
            return Err(NotRestored::NoServers);
        }
        let Numbers { epoch, revision, token } = self.numbers();
        let first = above.min(MAX_NUMBER).max(epoch.0).max(revision.0).max(token.0) + 1;
        self.view.epoch = Epoch(first);
        self.view.revision = Revision(first);
        self.locks.burn(Token(first));
        self.view.burnt = Token(first);
        self.view.restoring = Some(Restoration { backup: backup.clone(), loads: false });
        let View { groups, revision, .. } = &mut self.view;
        groups.iter_mut().for_each(|group| touch(group, revision));
        Ok(())
    }

    fn begin_loading(&mut self, backup: &BackupId) -> Result<(), NotRestored> {
        let under_way = self.view.restoring.as_mut().filter(|it| it.backup == *backup);
        under_way.ok_or(NotRestored::OutOfStep)?.loads = true;
        self.view.revision.0 += 1;
        Ok(())
    }

    fn finish_restoring(&mut self, backup: &BackupId) -> Result<(), NotRestored> {
        match &self.view.restoring {
            Some(under_way) if under_way.backup == *backup && under_way.loads => {}
            None if self.restored.as_ref() == Some(backup) => return Ok(()),
            _ => return Err(NotRestored::OutOfStep),
        }
        self.view.restoring = None;
        self.view.revision.0 += 1;
        self.restored = Some(backup.clone());
        Ok(())
    }

    fn give_restoring_up(&mut self, backup: &BackupId) -> Result<(), NotRestored> {
        match &self.view.restoring {
            Some(under_way) if under_way.backup != *backup || under_way.loads => {
                return Err(NotRestored::OutOfStep);
            }
            Some(_) => self.view.revision.0 += 1,
            None => {}
        }
        self.view.restoring = None;
        Ok(())
    }
}
