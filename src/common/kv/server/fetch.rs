//! Fetching: how a replica that is not ready gets what was committed before it
//! entered, in pages, in the order of the ring, and no more than it lacks.

use super::{CallError, Effects, Purpose, Server, Then};
use crate::kv::disk::Record;
use crate::kv::messages::{Answer, Fetch, InGroup, Peer, Request};
use crate::kv::replica::Fetched;
use crate::kv::ring::{Arc, Point};
use crate::kv::table::Cursor;
use crate::kv::{Entry, Text, Version};
use crate::machine::Time;
use crate::view::Revision;
use std::collections::BTreeSet;
use std::time::Duration;

/// A page that was asked for.
pub(super) struct Asked {
    pub(super) start: Point,
    pub(super) since: Revision,
    pub(super) held: Vec<(Text, Version)>,
    pub(super) until: Option<Cursor>,
}

impl<T> Server<T> {
    /// Asks the primaries for the next pages of what this server lacks, as fast
    /// as it may.
    pub(super) fn fetch_missing(&mut self, now: Time, out: &mut Effects<T>) {
        for start in self.replicas.keys().copied().collect::<Vec<_>>() {
            let Some(replica) = self.replicas.get_mut(&start) else { continue };
            let Fetched::UpTo(after) = &replica.fetched else { continue };
            let Some(primary) = self.view.primary_of(start) else { continue };
            if replica.fetching || replica.primary.is_some() || now < self.fetch_at {
                continue;
            }
            replica.fetching = true;
            let (held, until) =
                self.table.old(replica.arc, after.as_ref(), self.settings.batch.held);
            let since = replica.since;
            let InGroup { start, version } = replica.in_group();
            let (after, until) = (after.clone(), until.clone());
            let fetch = Fetch { start, version, after, until: until.clone(), held: held.clone() };
            let purpose = Purpose::Fetch { start, since, held, until };
            self.call(primary, Request::Peer(Peer::Fetch(fetch)), purpose, out);
        }
    }

    pub(super) fn fetch_answered(
        &mut self,
        now: Time,
        asked: Asked,
        result: Result<Answer, CallError>,
        out: &mut Effects<T>,
    ) {
        let Asked { start, since, held, until } = asked;
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        // What is committed stays right under later versions, in the same seat.
        if replica.since != since || !matches!(replica.fetched, Fetched::UpTo(_)) {
            return;
        }
        replica.fetching = false;
        let Ok(Answer::Page { page, left, committed }) = result else { return };
        let arc = replica.arc;
        replica.committed = replica.committed.max(committed);
        let reached = page.next.or(until);
        replica.left = left;
        let bytes: usize = page.entries.iter().map(Entry::bytes).sum();
        self.moved.keys += page.entries.len() as u64;
        self.moved.bytes += bytes as u64;
        self.fetch_at = self.fetch_at.max(now) + page_time(bytes, self.settings.fetch_rate);
        // First what is news: it replaces what was held. Then the rest of what was
        // held is right, or gone.
        for entry in page.entries {
            let point = Point::of(&entry.key);
            if arc.contains(point) {
                if self.table.replace(point, entry.clone()) {
                    self.moved.needed += entry.bytes() as u64;
                }
                // A newer one that was prepared meanwhile stays on the disk.
                if self.table.is_newest(point, &entry.key, entry.version) {
                    self.records.push(Record::Entry { point, entry });
                }
            }
        }
        let gone: BTreeSet<&Text> = page.gone.iter().collect();
        let place = |key: &Text| (Point::of(key).distance_from(arc.start), Text::clone(key));
        let end = reached.as_ref().map(|cursor| place(&cursor.key));
        for (key, _) in held {
            let point = Point::of(&key);
            // The arc may have been split since: what is in the other part is fetched there,
            // and this page's news of it were not taken.
            let is_answered =
                arc.contains(point) && end.as_ref().is_none_or(|end| place(&key) <= *end);
            if !is_answered {
                continue;
            }
            if self.table.settle_old(point, &key, !gone.contains(&key)) {
                self.records.push(Record::Drop { point, key });
            }
        }
        match reached.filter(|cursor| arc.contains(cursor.point)) {
            Some(cursor) => {
                if let Some(replica) = self.replicas.get_mut(&start) {
                    replica.fetched = Fetched::UpTo(Some(cursor));
                }
                self.fetch_missing(now, out);
            }
            None => {
                if let Some(replica) = self.replicas.get_mut(&start) {
                    replica.fetched = Fetched::Storing;
                }
                self.then(Then::Fetched { arc, since });
            }
        }
    }

    /// Everything in `arc` that was fetched is on the disk: now the disk may say
    /// that the seat is complete; or the seats, if the arc has been split
    /// meanwhile.
    pub(super) fn fetch_stored(&mut self, arc: Arc, since: Revision) {
        for replica in self.replicas.values_mut() {
            let is_part = replica.since == since && arc.contains(replica.arc.start);
            if is_part && replica.fetched == Fetched::Storing {
                replica.fetched = Fetched::Sealing;
                self.records.push(Record::Seat(replica.seat()));
            }
        }
        self.then(Then::Sealed { arc, since });
    }

    /// The disk knows that the seats in `arc` are complete: they are ready. Not
    /// before: a server that starts again must not be less than it was taken for.
    pub(super) fn seat_sealed(&mut self, now: Time, arc: Arc, since: Revision) {
        let mut sealed = Vec::new();
        for (start, replica) in &mut self.replicas {
            let is_part = replica.since == since && arc.contains(replica.arc.start);
            if is_part && replica.fetched == Fetched::Sealing {
                replica.fetched = Fetched::All;
                replica.left = 0;
                self.agenda.report = self.agenda.report.map(|_| now);
                sealed.push(*start);
            }
        }
        sealed.into_iter().for_each(|start| self.find_deleted(start));
    }
}

/// How long a page of so many bytes takes at `rate` bytes a second.
fn page_time(bytes: usize, rate: u64) -> Duration {
    Duration::from_micros(bytes as u64 * 1_000_000 / rate.max(1))
}
