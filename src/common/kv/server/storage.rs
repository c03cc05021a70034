//! What is kept on the disk, and what waits until it is there.

use super::{Effect, Effects, Server, Then};
use crate::kv::disk::{MAX_LINEAGE, Person, Record, Recovered};
use crate::kv::messages::Reply;
use crate::kv::replica::{Fellows, Fetched, Pending, Replica};
use crate::kv::ring::Point;
use crate::kv::{Entry, Text, Version};
use crate::machine::Time;
use crate::view::{Revision, Start};
use std::collections::BTreeMap;

impl<T> Server<T> {
    /// Takes over what the disk holds. A server that synced everything goes on as
    /// who it was; any other may have lost something, and comes as a new one.
    pub(super) fn recover(&mut self, recovered: Recovered) {
        let Recovered { mut person, seats, entries } = recovered;
        if !person.synced && person.id.is_some() {
            person.becomes_another();
        }
        let goes_on = person.id.is_some();
        for seat in seats {
            self.not_before = self.not_before.max(seat.since);
            let replica = Replica {
                arc: seat.arc(),
                version: Revision(0),
                since: seat.since,
                fellows: Vec::new(),
                primary: None,
                pending: BTreeMap::new(),
                pending_bytes: 0,
                fetched: if seat.complete { Fetched::All } else { Fetched::UpTo(None) },
                fetching: false,
                left: 0,
                committed: seat.committed,
                settled: Version::default(),
                deleted: BTreeMap::new(),
                counted_ready: false,
                counted_established: false,
            };
            self.replicas.insert(seat.start, replica);
        }
        for (point, entry) in entries {
            let below = self.replicas.range_mut(..=point).next_back().map(|(start, _)| *start);
            let start = below.or_else(|| self.replicas.keys().next_back().copied());
            let replica = start.and_then(|start| self.replicas.get_mut(&start));
            let held = replica.filter(|it| it.arc.contains(point) && it.fetched == Fetched::All);
            match held.filter(|_| goes_on) {
                None => self.table.load_old(point, entry),
                Some(replica) if entry.version <= replica.committed => {
                    self.table.insert(point, entry);
                }
                Some(replica) => {
                    self.table.prepare(point, &entry);
                    let pending = Pending {
                        point,
                        key: Text::clone(&entry.key),
                        bytes: entry.bytes(),
                        asked: Fellows::default(),
                        acknowledged: Fellows::default(),
                        stored: true,
                        op: None,
                    };
                    replica.push(entry.version, pending);
                }
            }
        }
        if !goes_on {
            self.replicas.clear();
        }
        for start in self.replicas.keys().copied().collect::<Vec<_>>() {
            self.find_deleted(start);
        }
        self.person = person;
        self.person.starts += 1;
        let start = Start { count: self.person.starts, drawn: self.settings.drawn };
        self.person.lineage.push(start);
        let surplus = self.person.lineage.len().saturating_sub(MAX_LINEAGE);
        self.person.lineage.drain(..surplus);
        self.person.synced = self.settings.synced;
        self.keep_person();
    }

    /// Writes down who this server is; it is told to nobody before that is kept.
    pub(super) fn keep_person(&mut self) {
        self.id = None;
        let person: Person = self.person.clone();
        self.records.push(Record::Identity(person));
        self.then(Then::Person);
    }

    /// What is to happen once everything up to now is stored.
    pub(super) fn then(&mut self, then: Then<T>) {
        let batch = if self.records.is_empty() { self.last_batch } else { self.last_batch + 1 };
        self.awaited.push_back((batch, then));
    }

    /// Keeps entries that are pending, and counts this server's own copies of them
    /// once they are stored.
    pub(super) fn keep_pending(&mut self, entries: Vec<(Point, Entry)>) {
        let places = entries.iter().map(|(point, entry)| (*point, entry.version));
        let places: Vec<_> = places.collect();
        for (point, entry) in entries {
            // The disk keeps the newest only. One that a newer one has overtaken is
            // superseded by it, whatever becomes of either, once that is stored.
            if self.table.is_newest(point, &entry.key, entry.version) {
                self.records.push(Record::Entry { point, entry });
            }
        }
        for (point, version) in places {
            self.then(Then::Own { point, version });
        }
    }

    /// Gives the records of this step to the shell, and does what waits for
    /// nothing any more.
    pub(super) fn store(&mut self, now: Time, out: &mut Effects<T>) {
        if !self.records.is_empty() {
            self.last_batch += 1;
            let records = std::mem::take(&mut self.records);
            out.push(Effect::Store { batch: self.last_batch, records });
        }
        let batch = self.stored_batch;
        self.stored(now, batch, out);
    }

    /// The batches up to `batch` are on the disk.
    pub(super) fn stored(&mut self, now: Time, batch: u64, out: &mut Effects<T>) {
        self.stored_batch = batch;
        while self.awaited.front().is_some_and(|(awaited, _)| *awaited <= batch) {
            let Some((_, then)) = self.awaited.pop_front() else { return };
            match then {
                Then::Answer { to, answer } => {
                    out.push(Effect::Reply { to, reply: Reply::Peer(answer) });
                }
                Then::Own { point, version } => self.own_stored(now, point, version, out),
                Then::Fetched { arc, since } => self.fetch_stored(arc, since),
                Then::Sealed { arc, since } => self.seat_sealed(now, arc, since),
                Then::Person => self.person_stored(now),
            }
        }
    }

    fn own_stored(&mut self, now: Time, point: Point, version: Version, out: &mut Effects<T>) {
        let Some(start) = self.replica_at(point).map(|replica| replica.arc.start) else { return };
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        if let Some(pending) = replica.pending.get_mut(&version) {
            pending.stored = true;
            self.commit_if_everywhere(now, start, &[version], out);
        }
    }
}
