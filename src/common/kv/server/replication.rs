//! Prepare, commit, follow, fetch: see [`crate::kv::replica`] for the protocol.

use super::{CallError, Effects, OpId, Purpose, Server, TELL};
use crate::kv::messages::{Answer, Fetch, InGroup, Peer, Prepare, Request, Set};
use crate::kv::replica::{Fellows, Fetched, MAX_PENDING, Pending, Replica};
use crate::kv::ring::Point;
use crate::kv::{Entry, MAX_BATCH_BYTES, Text, Version};
use crate::machine::Time;

impl<T> Server<T> {
    /// This server's replica for `point`, if it is in that group.
    pub(super) fn replica_at(&self, point: Point) -> Option<&Replica> {
        let below = self.replicas.range(..=point).next_back();
        // Below the first start stands the arc that wraps: the last one.
        let (_, replica) = below.or_else(|| self.replicas.last_key_value())?;
        replica.arc.contains(point).then_some(replica)
    }

    /// Whether the group at `point` has room for another pending entry.
    pub(super) fn has_room(&self, point: Point) -> bool {
        self.replica_at(point).is_some_and(|replica| {
            let (count, bytes) = (replica.pending.len(), replica.pending_bytes);
            count == 0 || count < MAX_PENDING && bytes < MAX_BATCH_BYTES
        })
    }

    /// As primary of `point`: prepares a write everywhere. The operation `op`
    /// is answered once it is committed.
    pub(super) fn write(
        &mut self,
        now: Time,
        point: Point,
        set: &Set,
        op: OpId,
        out: &mut Effects<T>,
    ) {
        let Some(start) = self.replica_at(point).map(|replica| replica.arc.start) else { return };
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        let Some(primary) = replica.primary.as_mut() else { return };
        primary.made += 1;
        let version = Version { group: replica.version, number: primary.made };
        let entry = Entry { key: Text::clone(&set.key), version, value: Text::clone(&set.val) };
        self.table.prepare(point, &entry);
        replica.push(version, pending(point, &entry, Some(op)));
        if replica.fellows.is_empty() {
            self.commit(start, version, out);
        } else {
            self.send_pending(now, start, Some(version), out);
        }
    }

    /// Sends the pending entries of the group at `start`, from `from` on, to the
    /// fellows that follow and have not been sent them.
    fn send_pending(
        &mut self,
        now: Time,
        start: Point,
        from: Option<Version>,
        out: &mut Effects<T>,
    ) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        let (group, committed) = (replica.in_group(), replica.watermark());
        let Some(primary) = replica.primary.as_mut() else { return };
        if from.is_none() {
            primary.unsent = false;
        }
        primary.told = (committed, now);
        let following = primary.following;
        let (mut requests, mut superseded) = (Vec::new(), Vec::new());
        for (fellow, to) in replica.fellows.iter().enumerate() {
            if !following.has(fellow) {
                primary.unsent = true;
                continue;
            }
            let (mut entries, mut bytes) = (Vec::new(), 0);
            for (version, pending) in replica.pending.range_mut(from.unwrap_or_default()..) {
                if pending.asked.has(fellow) {
                    continue;
                }
                let entry = self.table.prepared(pending.point, &pending.key, *version);
                let Some(entry) = entry else {
                    superseded.push(*version);
                    continue;
                };
                bytes += entry.bytes();
                pending.asked.add(fellow);
                entries.push(entry);
                if bytes >= MAX_BATCH_BYTES {
                    requests.push((to.address, fellow, std::mem::take(&mut entries)));
                    bytes = 0;
                }
            }
            if !entries.is_empty() {
                requests.push((to.address, fellow, entries));
            }
        }
        for (to, fellow, entries) in requests {
            let versions = entries.iter().map(|entry| entry.version).collect();
            let InGroup { start, version } = group;
            let prepare = Prepare { start, version, committed, entries };
            let purpose = Purpose::Prepare { group, fellow, versions };
            self.call(to, Request::Peer(Peer::Prepare(prepare)), purpose, out);
        }
        // A newer value of the same key is committed: nobody can see these.
        for version in superseded {
            self.commit(start, version, out);
        }
    }

    /// Commits the pending entry `version` and answers who waits for it.
    fn commit(&mut self, start: Point, version: Version, out: &mut Effects<T>) {
        let taken = self.replicas.get_mut(&start).and_then(|replica| replica.take(version));
        let Some(Pending { point, key, op, .. }) = taken else { return };
        self.table.commit(point, &key, version);
        if let Some(op) = op {
            self.end_written(op, &key, version, out);
        }
    }

    /// A new version of the group at `start` begins: as its primary, asks the
    /// others to follow.
    pub(super) fn begin_version(&mut self, now: Time, start: Point, out: &mut Effects<T>) {
        self.ask_to_follow(start, out);
        self.go_on_if_all_follow(now, start, out);
    }

    fn ask_to_follow(&mut self, start: Point, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        let group = replica.in_group();
        let Some(primary) = replica.primary.as_mut() else { return };
        let mut asks = Vec::new();
        for (fellow, to) in replica.fellows.iter().enumerate() {
            if !primary.following.has(fellow) && !primary.asked.has(fellow) {
                primary.asked.add(fellow);
                asks.push((to.address, fellow));
            }
        }
        for (to, fellow) in asks {
            let purpose = Purpose::Establish { group, fellow };
            self.call(to, Request::Peer(Peer::Establish(group)), purpose, out);
        }
    }

    pub(super) fn establish_answered(
        &mut self,
        now: Time,
        group: InGroup,
        fellow: usize,
        result: Result<Answer, CallError>,
        out: &mut Effects<T>,
    ) {
        let Some(replica) = self.replicas.get_mut(&group.start) else { return };
        if replica.version != group.version {
            return;
        }
        let Some(primary) = replica.primary.as_mut() else { return };
        let Ok(Answer::Follows { prepared }) = result else {
            primary.asked.remove(fellow);
            return;
        };
        primary.following.add(fellow);
        primary.unsent = true;
        if !primary.serving {
            for entry in prepared {
                let point = Point::of(&entry.key);
                if replica.arc.contains(point) && self.table.prepare(point, &entry) {
                    replica.push(entry.version, pending(point, &entry, None));
                }
            }
        }
        self.go_on_if_all_follow(now, group.start, out);
    }

    /// Once everybody follows: the union of what is pending is prepared
    /// everywhere, and when nothing of it is left, the primary serves.
    fn go_on_if_all_follow(&mut self, now: Time, start: Point, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        if replica.is_serving() || replica.all_follow() {
            if replica.fellows.is_empty() {
                for version in replica.pending.keys().copied().collect::<Vec<_>>() {
                    self.commit(start, version, out);
                }
            } else {
                self.send_pending(now, start, None, out);
            }
        }
        self.serve_if_clear(now, start, out);
    }

    fn serve_if_clear(&mut self, now: Time, start: Point, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        if !replica.all_follow() {
            return;
        }
        if !replica.is_serving() && replica.pending.is_empty() {
            if let Some(primary) = replica.primary.as_mut() {
                primary.serving = true;
            }
            self.retry_parked(now, out);
        }
        self.agenda.report = self.agenda.report.map(|_| now);
    }

    pub(super) fn prepare_answered(
        &mut self,
        now: Time,
        group: InGroup,
        fellow: usize,
        versions: &[Version],
        result: Result<Answer, CallError>,
        out: &mut Effects<T>,
    ) {
        let Some(replica) = self.replicas.get_mut(&group.start) else { return };
        if replica.version != group.version {
            return;
        }
        let is_prepared = matches!(result, Ok(Answer::Prepared {}));
        for version in versions {
            let Some(pending) = replica.pending.get_mut(version) else { continue };
            if is_prepared {
                pending.acknowledged.add(fellow);
            } else {
                pending.asked.remove(fellow);
            }
        }
        if !is_prepared {
            if let Some(primary) = replica.primary.as_mut() {
                primary.unsent = true;
            }
            return;
        }
        let done = versions.iter().filter(|version| replica.is_acknowledged(**version));
        for version in done.copied().collect::<Vec<_>>() {
            self.commit(group.start, version, out);
        }
        let serves = self.replicas.get(&group.start).is_some_and(Replica::is_serving);
        if !serves {
            self.serve_if_clear(now, group.start, out);
        }
    }

    /// Asks again those who do not follow, sends again what was not taken, and
    /// tells what is committed when there is nothing else to tell.
    pub(super) fn remind_fellows(&mut self, now: Time, out: &mut Effects<T>) {
        for start in self.replicas.keys().copied().collect::<Vec<_>>() {
            self.ask_to_follow(start, out);
            let Some(replica) = self.replicas.get(&start) else { continue };
            let Some(primary) = &replica.primary else { continue };
            if primary.unsent && (primary.serving || replica.all_follow()) {
                self.send_pending(now, start, None, out);
            } else if primary.told.0 < replica.watermark() && primary.told.1 + TELL <= now {
                self.tell_watermark(now, start, out);
            }
        }
    }

    fn tell_watermark(&mut self, now: Time, start: Point, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        let (group, committed) = (replica.in_group(), replica.watermark());
        let all = replica.all_follow();
        let Some(primary) = replica.primary.as_mut().filter(|_| all) else { return };
        primary.told = (committed, now);
        let fellows: Vec<_> = replica.fellows.iter().map(|fellow| fellow.address).collect();
        for (fellow, to) in fellows.into_iter().enumerate() {
            let InGroup { start, version } = group;
            let prepare = Prepare { start, version, committed, entries: Vec::new() };
            let purpose = Purpose::Prepare { group, fellow, versions: Vec::new() };
            self.call(to, Request::Peer(Peer::Prepare(prepare)), purpose, out);
        }
    }

    /// Answers another replica.
    pub(super) fn peer(&mut self, request: Peer, out: &mut Effects<T>) -> Answer {
        let (start, version, to_primary) = match &request {
            Peer::Establish(group) => (group.start, group.version, false),
            Peer::Prepare(prepare) => (prepare.start, prepare.version, false),
            Peer::Fetch(fetch) => (fetch.start, fetch.version, true),
        };
        let replica = self.replicas.get_mut(&start).filter(|replica| replica.version == version);
        let Some(replica) = replica.filter(|replica| replica.primary.is_some() == to_primary)
        else {
            let behind = version > self.view.revision;
            return if behind { Answer::Behind {} } else { Answer::Stale {} };
        };
        match request {
            Peer::Establish(_) => {
                let pending = replica.pending.iter();
                let prepared = pending
                    .filter_map(|(version, p)| self.table.prepared(p.point, &p.key, *version))
                    .collect();
                Answer::Follows { prepared }
            }
            Peer::Prepare(prepare) => {
                for entry in &prepare.entries {
                    let point = Point::of(&entry.key);
                    if replica.arc.contains(point) && self.table.prepare(point, entry) {
                        replica.push(entry.version, pending(point, entry, None));
                    }
                }
                self.commit_up_to(start, prepare.committed, out);
                Answer::Prepared {}
            }
            Peer::Fetch(fetch) if replica.is_serving() => {
                let (entries, next) = self.table.page(replica.arc, fetch.after.as_ref());
                Answer::Page { entries, next }
            }
            Peer::Fetch(_) => Answer::NotPrimary {},
        }
    }

    /// At a secondary: everything up to `committed` is committed.
    fn commit_up_to(&mut self, start: Point, committed: Version, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get(&start) else { return };
        let done = replica.pending.range(..=committed).map(|(version, _)| *version);
        for version in done.collect::<Vec<_>>() {
            self.commit(start, version, out);
        }
    }

    /// Asks the primaries for the next pages of what this server lacks.
    pub(super) fn fetch_missing(&mut self, out: &mut Effects<T>) {
        for start in self.replicas.keys().copied().collect::<Vec<_>>() {
            let Some(replica) = self.replicas.get_mut(&start) else { continue };
            let Fetched::UpTo(after) = &replica.fetched else { continue };
            let Some(primary) = self.view.primary_of(start) else { continue };
            if replica.fetching || replica.primary.is_some() {
                continue;
            }
            replica.fetching = true;
            let group = replica.in_group();
            let InGroup { start, version } = group;
            let fetch = Fetch { start, version, after: after.clone() };
            self.call(primary, Request::Peer(Peer::Fetch(fetch)), Purpose::Fetch { group }, out);
        }
    }

    pub(super) fn fetch_answered(
        &mut self,
        now: Time,
        group: InGroup,
        result: Result<Answer, CallError>,
        out: &mut Effects<T>,
    ) {
        let Some(replica) = self.replicas.get_mut(&group.start) else { return };
        if replica.version != group.version {
            return;
        }
        replica.fetching = false;
        let Ok(Answer::Page { entries, next }) = result else { return };
        for entry in entries {
            let point = Point::of(&entry.key);
            if replica.arc.contains(point) {
                self.table.insert(point, entry);
            }
        }
        replica.fetched = next.map_or(Fetched::All, |cursor| Fetched::UpTo(Some(cursor)));
        if replica.fetched == Fetched::All {
            self.agenda.report = self.agenda.report.map(|_| now);
        }
        self.fetch_missing(out);
    }
}

/// A pending entry that nobody has acknowledged yet.
fn pending(point: Point, entry: &Entry, op: Option<OpId>) -> Pending {
    Pending {
        point,
        key: Text::clone(&entry.key),
        bytes: entry.bytes(),
        asked: Fellows::default(),
        acknowledged: Fellows::default(),
        op,
    }
}
