//! What a server does for a backup, and while its cluster is being restored from one:
//! see [`crate::backup`] and [`crate::view::restoring`].

use super::Server;
use crate::kv::messages::{Answer, BackupPage, Load, Op, Place, Reply};
use crate::kv::ring::{Arc, Point};
use crate::kv::table::Cursor;
use crate::machine::Time;
use crate::view::messages::Okay;
use crate::wire::Refusal;

impl<T> Server<T> {
    /// What to answer while the cluster is being restored: nobody takes what is not
    /// loaded yet for missing, and nobody writes what would be loaded over.
    pub(super) fn refusal_while_restoring(&self, op: &Op) -> Option<Answer> {
        let restoring = self.view.restoring.as_ref();
        match op {
            Op::PrimaryLoad(Load { backup, .. }) => {
                let loads = restoring.is_some_and(|it| it.loads && it.backup == *backup);
                (!loads).then_some(Answer::NotLoading {})
            }
            _ if restoring.is_none() => None,
            Op::PrimaryVote(_) | Op::PrimaryDeny(_) => {
                Some(Answer::Vote { ok: false, epoch: self.view.epoch })
            }
            Op::PrimaryCommit(_) => Some(Answer::NoVote {}),
            Op::PrimaryGet(_) | Op::PrimarySet(_) | Op::PrimaryDelete(_) => {
                Some(Answer::Restoring {})
            }
        }
    }

    /// What this server has from `place` on up the ring, as far as it is the primary
    /// there, or as one message holds.
    pub(super) fn backup(&self, now: Time, place: &Place) -> Reply {
        let replica = self.replica_at(place.from).filter(|replica| replica.is_serving());
        let Some(replica) = replica.filter(|_| self.has_lease(now)) else {
            return Reply::Refused(Refusal::unavailable(format!(
                "this server is not the primary at {}, or does not serve yet: ask for the view \
                 again",
                place.from
            )));
        };
        // The ring is walked from 0 up: an arc that wraps is met twice.
        let length = replica.arc.length() - place.from.distance_from(replica.arc.start);
        let end = Point::new(place.from.number().saturating_add(length));
        let arc = Arc { start: place.from, end: end.unwrap_or_default() };
        let after = place.after.as_ref().map(|key| Cursor { point: place.from, key: key.clone() });
        let bytes = self.settings.batch.bytes;
        let page = self.table.page(arc, after.as_ref(), None, Vec::new(), bytes);
        let next = match page.next {
            Some(Cursor { point, key }) => Some(Place { from: point, after: Some(key) }),
            None => end.map(|end| Place { from: end, after: None }),
        };
        Reply::Backup(BackupPage { status: Okay::Ok, entries: page.entries, next })
    }
}
