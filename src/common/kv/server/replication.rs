//! Prepare, commit, follow: see [`crate::kv::replica`] for the protocol.

use super::{CallError, Effect, Effects, OpId, Purpose, Server, TELL, Then};
use crate::kv::content::Content;
use crate::kv::disk::Record;
use crate::kv::messages::{Answer, Fetch, InGroup, Peer, Prepare, Reply, Request};
use crate::kv::replica::{Fellows, Fetched, MAX_PENDING, MAX_PREPARES, Pending, Replica};
use crate::kv::ring::Point;
use crate::kv::{Entry, Text, Version};
use crate::machine::Time;
use std::net::SocketAddrV4;
use std::ops::Bound;

/// Entries, or only news of what is committed, that were sent to a fellow.
pub(super) struct Sent {
    pub(super) group: InGroup,
    pub(super) fellow: usize,
    pub(super) versions: Vec<Version>,
    /// The watermark that went with them.
    pub(super) committed: Version,
}

/// Where to begin with sending what is pending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sending {
    /// Behind what each fellow has been sent already.
    GoesOn,
    /// With the first entry: who follows only now, or has not taken something, lacks
    /// some.
    BeginsAnew,
}

impl<T> Server<T> {
    /// This server's replica for `point`, if it is in that group.
    pub(super) fn replica_at(&self, point: Point) -> Option<&Replica> {
        let below = self.replicas.range(..=point).next_back();
        // Below the first start stands the arc that wraps: the last one.
        let (_, replica) = below.or_else(|| self.replicas.last_key_value())?;
        replica.arc.contains(point).then_some(replica)
    }

    /// A server in the group at `point` whose disk has no room.
    pub(super) fn full_disk(&self, point: Point) -> Option<SocketAddrV4> {
        if !self.has_room {
            return Some(self.settings.address);
        }
        let fellows = &self.replica_at(point)?.fellows;
        fellows.iter().find(|fellow| fellow.full && !fellow.aside).map(|fellow| fellow.address)
    }

    fn is_behind_with_storing(&self) -> bool {
        self.last_batch - self.stored_batch >= MAX_UNSTORED
    }

    /// Whether the group at `point` has room for another pending entry.
    pub(super) fn has_place(&self, point: Point) -> bool {
        !self.is_behind_with_storing()
            && self.replica_at(point).is_some_and(|replica| {
                let (count, bytes) = (replica.pending.len(), replica.pending_bytes);
                count == 0 || count < MAX_PENDING && bytes < self.settings.batch.bytes
            })
    }

    /// As primary of `point`: prepares a write everywhere that leaves `content`
    /// under `key`. The operation `op` is answered once it is committed.
    pub(super) fn write(
        &mut self,
        now: Time,
        (point, key): (Point, &Text),
        content: Content,
        op: OpId,
        out: &mut Effects<T>,
    ) {
        let Some(start) = self.replica_at(point).map(|replica| replica.arc.start) else { return };
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        let Some(primary) = replica.primary.as_mut() else { return };
        primary.made += 1;
        let version = Version { group: replica.version, number: primary.made };
        let entry = Entry { key: Text::clone(key), version, content };
        self.table.prepare(point, &entry);
        replica.push(version, pending(point, &entry, Some(op)));
        replica.committed = replica.watermark();
        let seat = Record::Seat(replica.seat());
        self.records.push(seat);
        self.keep_pending(vec![(point, entry)]);
        self.send_pending(now, start, Sending::GoesOn, out);
    }

    /// Sends the pending entries of the group at `start` to the fellows that follow
    /// and have not been sent them, as far as the messages that may be under way to
    /// each hold them.
    fn send_pending(&mut self, now: Time, start: Point, sending: Sending, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        let (group, committed) = (replica.in_group(), replica.watermark());
        let settled = replica.settled;
        let Some(primary) = replica.primary.as_mut() else { return };
        if sending == Sending::BeginsAnew {
            primary.dialogues.values_mut().for_each(|it| it.sent = Version::default());
            primary.unsent = false;
        }
        let following = primary.following;
        let mut is_told_to_all = true;
        let (mut requests, mut superseded) = (Vec::new(), Vec::new());
        for (fellow, to) in replica.fellows.iter().enumerate() {
            if to.aside {
                continue;
            }
            if !following.has(fellow) {
                primary.unsent = true;
                is_told_to_all = false;
                continue;
            }
            let dialogue = primary.dialogues.entry(fellow).or_default();
            let before = requests.len();
            let (mut entries, mut bytes) = (Vec::new(), 0);
            let behind = (Bound::Excluded(dialogue.sent), Bound::Unbounded);
            for (version, pending) in replica.pending.range_mut(behind) {
                if dialogue.under_way >= MAX_PREPARES {
                    break;
                }
                dialogue.sent = *version;
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
                if bytes >= self.settings.batch.bytes {
                    requests.push((to.address, fellow, std::mem::take(&mut entries)));
                    dialogue.under_way += 1;
                    bytes = 0;
                }
            }
            if !entries.is_empty() {
                requests.push((to.address, fellow, entries));
                dialogue.under_way += 1;
            }
            is_told_to_all &= requests.len() > before;
        }
        if is_told_to_all {
            primary.told = (committed, now);
        }
        for (to, fellow, entries) in requests {
            let versions = entries.iter().map(|entry| entry.version).collect();
            let InGroup { start, version } = group;
            let prepare = Prepare { start, version, committed, settled, entries };
            let purpose = Purpose::Prepare { group, fellow, versions, committed };
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
        self.note_if_deleted(start, point, &key);
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
        let mut news = Vec::new();
        if !primary.serving {
            for entry in prepared {
                let point = Point::of(&entry.key);
                if replica.arc.contains(point) && self.table.prepare(point, &entry) {
                    replica.push(entry.version, pending(point, &entry, None));
                    news.push((point, entry));
                }
            }
        }
        self.keep_pending(news);
        self.go_on_if_all_follow(now, group.start, out);
    }

    /// Once everybody follows: the union of what is pending is prepared
    /// everywhere, and when nothing of it is left, the primary serves.
    fn go_on_if_all_follow(&mut self, now: Time, start: Point, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        if replica.may_send() {
            let pending: Vec<_> = replica.pending.keys().copied().collect();
            self.send_pending(now, start, Sending::BeginsAnew, out);
            self.commit_if_everywhere(now, start, &pending, out);
        }
        self.serve_if_clear(now, start, out);
    }

    fn serve_if_clear(&mut self, now: Time, start: Point, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        if !replica.all_follow() {
            return;
        }
        if !replica.is_serving() && replica.pending.is_empty() && replica.fetched == Fetched::All {
            if let Some(primary) = replica.primary.as_mut() {
                primary.serving = true;
            }
            replica.committed = replica.watermark();
            self.records.push(Record::Seat(replica.seat()));
            self.retry_parked(now, out);
        }
        self.agenda.report = self.agenda.report.map(|_| now);
    }

    pub(super) fn prepare_answered(
        &mut self,
        now: Time,
        sent: Sent,
        result: Result<Answer, CallError>,
        out: &mut Effects<T>,
    ) {
        let Sent { group, fellow, versions, committed } = sent;
        let Some(replica) = self.replicas.get_mut(&group.start) else { return };
        if replica.version != group.version {
            return;
        }
        let is_prepared = matches!(result, Ok(Answer::Prepared {}));
        let dialogues = replica.primary.as_mut().map(|primary| &mut primary.dialogues);
        if let Some(dialogue) = dialogues.and_then(|all| all.get_mut(&fellow))
            && !versions.is_empty()
        {
            dialogue.under_way = dialogue.under_way.saturating_sub(1);
        }
        for version in &versions {
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
                primary.told.0 = Version::default();
            }
            return;
        }
        if let Some(primary) = replica.primary.as_mut() {
            let heard = primary.heard.entry(fellow).or_default();
            *heard = committed.max(*heard);
        }
        self.commit_if_everywhere(now, group.start, &versions, out);
        // What has come meanwhile goes now, together.
        let replica = self.replicas.get(&group.start).filter(|it| it.version == group.version);
        if replica.is_some_and(Replica::may_send) {
            self.send_pending(now, group.start, Sending::GoesOn, out);
        }
    }

    /// At the primary: forgets the deletions that have been settled.
    fn forget_if_settled(&mut self, start: Point) {
        let replica = self.replicas.get(&start).filter(|replica| replica.is_serving());
        let Some(replica) = replica.filter(|replica| !replica.deleted.is_empty()) else { return };
        let settled = replica.settled_by_all();
        if self.forget_deleted(start, settled)
            && let Some(primary) = self.replicas.get_mut(&start).and_then(|it| it.primary.as_mut())
        {
            primary.forgot = true;
        }
    }

    /// Remembers that what is committed of `key` is a deletion, if it is, to forget
    /// it when it is settled.
    fn note_if_deleted(&mut self, start: Point, point: Point, key: &Text) {
        let Some(held) = self.table.get(point, key) else { return };
        if held.content.is_forgettable()
            && let Some(replica) = self.replicas.get_mut(&start)
            && replica.fetched == Fetched::All
        {
            replica.deleted.insert(held.version, (point, Text::clone(key)));
        }
    }

    /// Finds the deletions in the arc at `start`, everything of which is here now.
    pub(super) fn find_deleted(&mut self, start: Point) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        let deleted = self.table.deleted(replica.arc);
        replica.deleted =
            deleted.map(|(version, point, key)| (version, (point, Text::clone(key)))).collect();
        let settled = replica.settled;
        self.forget_deleted(start, settled);
    }

    /// Forgets the deletions in the arc at `start` up to `settled`. Returns whether
    /// there were any.
    fn forget_deleted(&mut self, start: Point, settled: Version) -> bool {
        let Some(replica) = self.replicas.get_mut(&start) else { return false };
        replica.settled = replica.settled.max(settled);
        if replica.fetched != Fetched::All {
            return false;
        }
        let mut has_forgotten = false;
        while let Some(first) = replica.deleted.first_entry() {
            if *first.key() > replica.settled {
                break;
            }
            let (version, (point, key)) = first.remove_entry();
            if self.table.forget_deleted(point, &key, version) {
                self.records.push(Record::Drop { point, key });
                has_forgotten = true;
            }
        }
        has_forgotten
    }

    /// At the primary: commits those of `versions` that are on every disk.
    pub(super) fn commit_if_everywhere(
        &mut self,
        now: Time,
        start: Point,
        versions: &[Version],
        out: &mut Effects<T>,
    ) {
        let Some(replica) = self.replicas.get(&start).filter(|it| it.primary.is_some()) else {
            return;
        };
        if !replica.may_send() {
            return;
        }
        let serves = replica.is_serving();
        let done = versions.iter().filter(|version| replica.is_everywhere(**version));
        for version in done.copied().collect::<Vec<_>>() {
            self.commit(start, version, out);
        }
        if !serves {
            self.serve_if_clear(now, start, out);
        }
    }

    /// Asks again those who do not follow, sends again what was not taken, and
    /// tells what is committed when there is nothing else to tell.
    pub(super) fn remind_fellows(&mut self, now: Time, out: &mut Effects<T>) {
        for start in self.replicas.keys().copied().collect::<Vec<_>>() {
            self.ask_to_follow(start, out);
            self.forget_if_settled(start);
            let Some(replica) = self.replicas.get(&start) else { continue };
            let Some(primary) = &replica.primary else { continue };
            if primary.unsent && replica.may_send() {
                self.send_pending(now, start, Sending::BeginsAnew, out);
            } else if (primary.told.0 < replica.watermark() || primary.forgot)
                && primary.told.1 + TELL <= now
            {
                self.tell_watermark(now, start, out);
            }
        }
    }

    fn tell_watermark(&mut self, now: Time, start: Point, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        let (group, committed) = (replica.in_group(), replica.watermark());
        let (all, settled) = (replica.all_follow(), replica.settled);
        let Some(primary) = replica.primary.as_mut().filter(|_| all) else { return };
        primary.told = (committed, now);
        primary.forgot = false;
        let fellows: Vec<_> = replica.fellows.iter().map(|fellow| fellow.address).collect();
        for (fellow, to) in fellows.into_iter().enumerate() {
            let InGroup { start, version } = group;
            let entries = Vec::new();
            let prepare = Prepare { start, version, committed, settled, entries };
            let purpose = Purpose::Prepare { group, fellow, versions: Vec::new(), committed };
            self.call(to, Request::Peer(Peer::Prepare(prepare)), purpose, out);
        }
    }

    /// Answers another replica.
    pub(super) fn peer(&mut self, from: T, request: Peer, out: &mut Effects<T>) {
        let (start, version, to_primary) = match &request {
            Peer::Establish(group) => (group.start, group.version, false),
            Peer::Prepare(prepare) => (prepare.start, prepare.version, false),
            Peer::Fetch(fetch) => (fetch.start, fetch.version, true),
        };
        let replica = self.replicas.get(&start).filter(|replica| replica.version == version);
        let Some(replica) = replica.filter(|replica| replica.primary.is_some() == to_primary)
        else {
            let behind = version > self.view.revision;
            let answer = if behind { Answer::Behind {} } else { Answer::Stale {} };
            return out.push(Effect::Reply { to: from, reply: Reply::Peer(answer) });
        };
        let answer = match request {
            Peer::Establish(_) => {
                let pending = replica.pending.iter();
                let prepared = pending
                    .filter_map(|(version, p)| self.table.prepared(p.point, &p.key, *version))
                    .collect();
                Answer::Follows { prepared }
            }
            Peer::Prepare(prepare) => {
                let has_entries = !prepare.entries.is_empty();
                if has_entries && (!self.has_room || self.is_behind_with_storing()) {
                    let answer = Answer::Behind {};
                    return out.push(Effect::Reply { to: from, reply: Reply::Peer(answer) });
                }
                self.take_prepare(prepare, out);
                if has_entries {
                    return self.then(Then::Answer { to: from, answer: Answer::Prepared {} });
                }
                Answer::Prepared {}
            }
            Peer::Fetch(fetch) if replica.is_serving() => {
                let Fetch { after, until, held, .. } = fetch;
                let page = self.table.page(
                    replica.arc,
                    after.as_ref(),
                    until.as_ref(),
                    held,
                    self.settings.batch.bytes,
                );
                let reached = page.next.as_ref().or(until.as_ref());
                let left =
                    reached.map_or(0, |reached| self.table.count(replica.arc, Some(reached)));
                Answer::Page { page, left, committed: replica.watermark() }
            }
            Peer::Fetch(_) => Answer::NotPrimary {},
        };
        out.push(Effect::Reply { to: from, reply: Reply::Peer(answer) });
    }

    /// At a secondary: prepares entries, and commits what the watermark says.
    fn take_prepare(&mut self, prepare: Prepare, out: &mut Effects<T>) {
        let start = prepare.start;
        let Some(replica) = self.replicas.get_mut(&start) else { return };
        let mut news = Vec::new();
        for entry in prepare.entries {
            let point = Point::of(&entry.key);
            // What was settled here and comes once more, late, may have been deleted and
            // forgotten since: nothing that is held would tell that it is old.
            let is_settled = entry.version <= replica.settled;
            if !is_settled && replica.arc.contains(point) && self.table.prepare(point, &entry) {
                replica.push(entry.version, pending(point, &entry, None));
                news.push((point, entry));
            }
        }
        if replica.committed < prepare.committed && !news.is_empty() {
            replica.committed = prepare.committed;
            let seat = Record::Seat(replica.seat());
            self.records.push(seat);
        }
        self.keep_pending(news);
        self.commit_up_to(start, prepare.committed, out);
        self.forget_deleted(start, prepare.settled);
    }

    /// At a secondary: everything up to `committed` is committed.
    fn commit_up_to(&mut self, start: Point, committed: Version, out: &mut Effects<T>) {
        let Some(replica) = self.replicas.get(&start) else { return };
        let done = replica.pending.range(..=committed).map(|(version, _)| *version);
        for version in done.collect::<Vec<_>>() {
            self.commit(start, version, out);
        }
    }
}

/// How many batches can wait to be stored; until there are fewer, writes wait.
/// The shell's queue holds more.
const MAX_UNSTORED: u64 = 16 * 1024;

/// A pending entry that nobody has acknowledged yet.
fn pending(point: Point, entry: &Entry, op: Option<OpId>) -> Pending {
    Pending {
        point,
        key: Text::clone(&entry.key),
        bytes: entry.bytes(),
        asked: Fellows::default(),
        acknowledged: Fellows::default(),
        stored: false,
        op,
    }
}
