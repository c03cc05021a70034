//! A new cluster that takes over from one that is gone: what is counted, and from
//! where on.
//!
//! # What must not come again
//! Epochs, versions and tokens were seen by clients of the old cluster, and some of
//! these still run: one may hold a lock of which nobody else knows any more, or be
//! about to write `--if-version`. So a restored cluster must give no number that the
//! old one ever gave, *also after the backup was taken*, and the backup can't tell
//! how far that went. Nor may two restores of the same backup give the same.
//!
//! So the new cluster counts on from a number that can't have been reached: the time
//! of the restore in milliseconds since 1970, times [`NUMBERS_PER_MS`]. A cluster
//! counts from 1, or from such a number, and each number costs it a change that is
//! synced on a majority of its viewleaders; to reach the number of a later moment it
//! would have to make more than a million of them in every second of its life. A hundred
//! thousand is out of its reach. That rests on one assumption: a clock that is not
//! behind the one of an earlier restore. One that is behind the backup itself is
//! noticed and refused; and whatever the clock says, the numbers are also
//! [`LEAST_JUMP`] beyond all that the backup knows.
//!
//! Such numbers stay below 2^53 until the year 2248, so programs that read JSON's
//! numbers as floating point read them right.
//!
//! # What is burnt
//! The state says so, and every server knows it from its view: no token up to that
//! number is good for a fence, whatever a key has seen.
//!
//! # While it lasts
//! From [`Step::Begin`] to [`Step::Finish`] no server reads or writes for clients,
//! so nobody takes what is not loaded yet for missing, and nobody writes what would be
//! loaded over. All groups get a new version with the beginning: once these are
//! established, every primary knows. Then it is looked whether the cluster is as
//! empty as it must be, and only then ([`Step::Load`]) keys are taken. A load that
//! comes late, after the end, is refused by every primary that has served anybody
//! since: it serves nobody before its view shows the end.

use super::{Epoch, Revision, Token};
use serde::{Deserialize, Serialize};
use std::fmt;

/// How many numbers there are for each millisecond.
pub const NUMBERS_PER_MS: u64 = 1 << 10;

/// How far beyond everything that the backup knows a restored cluster begins at
/// least: if a million locks were granted a second it would take twelve days to get
/// there, and at what disks can do, months.
pub const LEAST_JUMP: u64 = 1 << 40;

/// No cluster is told to begin beyond this one.
pub const MAX_NUMBER: u64 = 1 << 62;

/// How far a cluster has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    /// The changes of membership.
    pub epoch: Epoch,
    /// The changes of the view; no version of a key was given under a later one.
    pub revision: Revision,
    /// The newest token.
    pub token: Token,
}

impl Numbers {
    /// From where on a cluster is to count that takes over at `now_ms`, in
    /// milliseconds since 1970, from one that had counted so far.
    pub fn beyond(self, now_ms: u64) -> u64 {
        let known = self.epoch.0.max(self.revision.0).max(self.token.0);
        let by_clock = now_ms.saturating_mul(NUMBERS_PER_MS);
        by_clock.max(known.saturating_add(LEAST_JUMP)).min(MAX_NUMBER)
    }
}

/// Names a backup for ever: drawn when it is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId(String);

impl BackupId {
    /// The name that was drawn as this number.
    pub fn drawn(number: u64) -> Self {
        Self(format!("{number:016x}"))
    }
}

impl TryFrom<String> for BackupId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_name = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_name
            .then_some(Self(text))
            .ok_or_else(|| "a backup's name has 16 hexadecimal digits".into())
    }
}

impl From<BackupId> for String {
    fn from(BackupId(name): BackupId) -> Self {
        name
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A cluster that is being restored: it takes nothing but what is loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restoration {
    /// From which backup.
    pub backup: BackupId,
    /// It was empty, and keys are loaded.
    pub loads: bool,
}

/// The arguments of `restore`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// From which backup.
    pub backup: BackupId,
    /// What is next.
    #[serde(flatten)]
    pub step: Step,
}

/// The steps of a restore. Each may be asked for again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// From now on nothing is served, and all is counted from beyond this number.
    Begin {
        /// See [`Numbers::beyond`].
        above: u64,
    },
    /// The cluster was found to be empty: keys may be loaded.
    Load {},
    /// Everything is loaded: the cluster serves.
    Finish {},
    /// The cluster was found not to be empty: it serves as before.
    GiveUp {},
}

/// Why a step of a restore is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotRestored {
    /// Another backup is being restored.
    AnotherOne,
    /// It has been done.
    Already,
    /// It was restored from another backup.
    NotNew,
    /// Somebody holds a lock, or waits for one.
    LocksHeld,
    /// There is no server to load anything into.
    NoServers,
    /// It does not stand at this step.
    OutOfStep,
}

impl fmt::Display for NotRestored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AnotherOne => {
                "this cluster is being restored from another backup: go on with that one, or \
                 start a new cluster with empty data directories"
            }
            Self::Already => "this cluster has been restored from this backup already",
            Self::NotNew => {
                "this cluster was restored from another backup: only a new one, with empty data \
                 directories, can be restored"
            }
            Self::LocksHeld => {
                "locks are held in this cluster (client lock_list), so it is in use: only a new \
                 one, with empty data directories, can be restored"
            }
            Self::NoServers => "there is no server to load the backup into: start some first",
            Self::OutOfStep => "this cluster is not being restored from that backup",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(epoch: u64, revision: u64, token: u64) -> Numbers {
        Numbers { epoch: Epoch(epoch), revision: Revision(revision), token: Token(token) }
    }

    #[test]
    fn a_later_restore_is_beyond_whatever_the_one_before_it_can_have_given() {
        let backup = numbers(5, 60, 7);
        let now_ms = 1_790_000_000_000;
        let first = backup.beyond(now_ms);
        // A million changes in each second of an hour, of the cluster as it was and as
        // it was restored first.
        let (hour_ms, per_ms) = (3_600_000, 1000);
        assert!(first > 60 + hour_ms * per_ms);
        assert!(backup.beyond(now_ms + hour_ms) > first + hour_ms * per_ms);
    }

    #[test]
    fn a_clock_that_is_far_behind_does_not_bring_old_numbers_back() {
        let ahead = 1 << 60;
        for backup in [numbers(ahead, 1, 1), numbers(1, ahead, 1), numbers(1, 1, ahead)] {
            assert_eq!(backup.beyond(0), ahead + LEAST_JUMP);
        }
        assert_eq!(numbers(0, 0, u64::MAX).beyond(u64::MAX), MAX_NUMBER);
    }

    #[test]
    fn a_restored_clusters_numbers_are_exact_in_floating_point_until_2248() {
        let start_of_2248_ms = 8_772_969_600_000;
        assert!(numbers(0, 0, 0).beyond(start_of_2248_ms) < 1 << 53);
    }
}
