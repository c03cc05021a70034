//! The lease with the viewleader, and the view.

use super::{
    BEATS_PER_LEASE, Effect, Effects, Following, RETRY, Server, Settings, Then, ViewCall,
    ViewError, ViewNews, WATCH,
};
use crate::kv::Version;
use crate::kv::disk::Record;
use crate::kv::marks::Marks;
use crate::kv::replica::{Fellow, Fetched, Primary, Replica};
use crate::kv::ring::{self, Point, RING_POINTS};
use crate::machine::Time;
use crate::view::messages::{Beat, Heartbeat, HeartbeatReply, Progress, QueryView, Report};
use crate::view::{Group, Member, Revision, Start, View};
use crate::wire::Identity;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How soon the viewleader is called again after it could not be reached.
pub(super) const RETRY_VIEWLEADER: Duration = Duration::from_millis(200);

/// How often a server chooses its place at most before it takes the one it has.
const MAX_CHOICES: u32 = 32;

/// How soon a report is made again when the view does not show it.
const REPORT_AGAIN: Duration = Duration::from_millis(100);

impl<T> Server<T> {
    /// Whether this server can be sure that nobody else has taken over its role.
    pub(super) fn has_lease(&self, now: Time) -> bool {
        now < self.leased_until
    }

    /// Makes the calls to the viewleader that are due.
    pub(super) fn call_viewleader(&mut self, now: Time, out: &mut Effects<T>) {
        let due = |time: Option<Time>| time.is_some_and(|time| time <= now);
        if due(self.agenda.view) {
            self.agenda.view = None;
            // Before it has joined it asks for the view as it is: its identity
            // depends on it.
            let after = self.joined.then_some(self.view.revision);
            let query = QueryView { after, wait_ms: Some(WATCH.as_millis() as u64) };
            out.push(Effect::CallView(ViewCall::View(query)));
        }
        let Some(id) = self.id.clone() else { return };
        if due(self.agenda.beat) {
            self.agenda.beat = None;
            self.beat_sent = now;
            let Settings { address, lease, drawn, .. } = self.settings;
            out.push(Effect::CallView(ViewCall::Beat(Heartbeat {
                port: address.port(),
                requestor: id.clone(),
                address: Some(address),
                lease_ms: Some(lease.as_millis() as u64),
                seen: Some(self.view.revision.max(self.not_before)),
                start: Some(Start { count: self.person.starts, drawn }),
                lineage: self.person.lineage.clone(),
                formerly: self.person.formerly.clone(),
                chosen_in: self.chosen_in,
                full: !self.has_room,
            })));
        }
        if due(self.agenda.report) {
            self.telling = self.progress();
            let report = self.report(id);
            let is_news = self.telling != self.told;
            if !report.ready.is_empty() || !report.established.is_empty() || is_news {
                self.agenda.report = None;
                out.push(Effect::CallView(ViewCall::Report(report)));
            }
        }
    }

    /// What the viewleader does not know yet of how far the groups are.
    fn report(&self, requestor: Identity) -> Report {
        let place = |replica: &Replica| (replica.arc.start, replica.version);
        let news = |is_news: fn(&Replica) -> bool| {
            self.replicas.values().filter(|replica| is_news(replica)).map(place).collect()
        };
        Report {
            requestor,
            ready: news(|r| r.fetched == Fetched::All && !r.counted_ready),
            established: news(|r| r.is_serving() && r.all_follow() && !r.counted_established),
            progress: Progress {
                keys: self.telling.keys - self.told.keys,
                bytes: self.telling.bytes - self.told.bytes,
                needed: self.telling.needed - self.told.needed,
                left: self.telling.left,
            },
        }
    }

    fn progress(&self) -> Progress {
        Progress { left: self.replicas.values().map(|replica| replica.left).sum(), ..self.moved }
    }

    /// Takes what a call to the viewleader has brought.
    pub(super) fn news(&mut self, now: Time, news: ViewNews, out: &mut Effects<T>) {
        match news {
            ViewNews::Beat(result) => self.beat_answered(now, result, out),
            ViewNews::View(Ok(view)) if self.joined => {
                self.agenda.view = Some(now);
                self.install(now, view, out);
            }
            ViewNews::View(Ok(view)) => {
                self.agenda.view = Some(now + RETRY);
                self.choose_identity(&view);
            }
            ViewNews::View(Err(error)) => {
                self.agenda.view = Some(now + RETRY_VIEWLEADER);
                if matches!(error, ViewError::Refused(_)) {
                    // The original knows no such question: join all the same.
                    self.agenda.view = Some(now + WATCH);
                    self.choose_identity(&View::default());
                }
            }
            ViewNews::Report(Ok(())) => {
                self.told = self.telling;
                self.agenda.report = Some(now + REPORT_AGAIN);
            }
            ViewNews::Report(Err(_)) => self.agenda.report = Some(now + REPORT_AGAIN),
        }
        self.call_viewleader(now, out);
    }

    fn choose_identity(&mut self, view: &View) {
        if self.person.id.is_none() {
            let taken: Vec<Point> = view.members.iter().map(|member| member.hash).collect();
            self.person.id = Some(ring::choose_identity(&taken, &mut self.rng));
            // A place that was chosen at the same moment as another's may be next to
            // it, so it is chosen again; but not for ever.
            self.choices += 1;
            self.chosen_in = (self.choices < MAX_CHOICES).then_some(view.epoch);
            self.keep_person();
        }
    }

    /// The disk knows who this server is: now others may.
    pub(super) fn person_stored(&mut self, now: Time) {
        if self.id.is_none() && self.person.id.is_some() {
            self.id = self.person.id.clone();
            self.agenda.beat = Some(now);
            self.agenda.report = Some(now);
        }
    }

    fn beat_answered(
        &mut self,
        now: Time,
        result: Result<HeartbeatReply, ViewError>,
        out: &mut Effects<T>,
    ) {
        self.agenda.beat = Some(self.beat_sent + self.settings.lease / BEATS_PER_LEASE);
        match result {
            Err(ViewError::Lost) => self.agenda.beat = Some(now + RETRY_VIEWLEADER),
            Err(ViewError::Refused(refusal)) => {
                out.push(Effect::Note(format!("the viewleader refuses the heartbeat: {refusal}")));
            }
            Ok(HeartbeatReply {
                status: Beat::Ok,
                epoch,
                lease_ms: Some(lease_ms),
                revision,
                ..
            }) => {
                if !self.joined {
                    out.push(Effect::Note(format!("joined in {}", epoch.unwrap_or_default())));
                    self.joined = true;
                    (self.chosen_in, self.choices) = (None, 0);
                    self.not_before = self.not_before.max(revision.unwrap_or_default());
                    self.agenda.view = self.agenda.view.map(|_| now);
                }
                self.following = Following::Ringleader;
                self.leased_until = self.beat_sent + Duration::from_millis(lease_ms);
            }
            Ok(HeartbeatReply { status: Beat::Ok, epoch, lease_ms: None, .. }) => {
                if !matches!(self.following, Following::Original(_)) {
                    out.push(Effect::Note("joined an original viewleader".to_owned()));
                }
                self.following = Following::Original(epoch.unwrap_or_default());
            }
            Ok(HeartbeatReply { status: Beat::Retry, crowded: true, .. }) => {
                self.person.id = None;
                self.id = None;
                self.agenda.view = self.agenda.view.map(|_| now);
            }
            Ok(HeartbeatReply { status: Beat::Retry, .. }) => {
                out.push(Effect::Note(format!(
                    "not yet: there is a lease on {} that has to run out first",
                    self.settings.address
                )));
            }
            Ok(HeartbeatReply { status: Beat::Deny, free, .. }) => self.start_over(now, free, out),
        }
    }

    /// The viewleader does not know this identity any more. If it was to leave, and
    /// nothing depends on what it holds, it has left. Else its lease has run out and others
    /// have taken over: what it holds may be old. It goes on as a new one, and has it compared.
    fn start_over(&mut self, now: Time, is_free: bool, out: &mut Effects<T>) {
        let has_left = std::mem::take(&mut self.leaving) && is_free;
        // Nobody is put out for a lease that runs still, so its groups have let it go one by
        // one, and what it had pending is committed (as in `install`); it may only not have
        // seen the views in which they did.
        let has_handed_over = has_left && self.has_lease(now);
        if has_left {
            out.push(Effect::Note("everything is elsewhere: leaving the cluster".to_owned()));
            out.push(Effect::End);
        } else {
            out.push(Effect::Note("the lease ran out: joining again as a new server".to_owned()));
        }
        for (start, replica) in std::mem::take(&mut self.replicas) {
            for (version, pending) in replica.pending {
                match pending.op {
                    Some(op) if has_handed_over => self.end_written(op, &pending.key, version, out),
                    op => self.end_unknown(op, out),
                }
            }
            self.records.push(Record::NoSeat(start));
        }
        Point::all().for_each(|point| self.table.age(point));
        self.marks = Marks::default();
        self.leased_until = Time::default();
        self.joined = false;
        self.person.becomes_another();
        let view = Arc::clone(&self.view);
        self.choose_identity(&view);
    }

    /// Follows `view`, if it is newer than the one that is followed.
    fn install(&mut self, now: Time, view: Arc<View>, out: &mut Effects<T>) {
        if view.revision <= self.view.revision || view.revision < self.not_before {
            return;
        }
        self.view = view;
        let Some(id) = self.id.clone() else { return };
        let view = Arc::clone(&self.view);
        let Some(member) = view.member(&id) else {
            // It has been put out, and will be told with its next heartbeat. What it
            // holds may be all that is left of a lost group: nothing is dropped.
            self.replicas.values_mut().for_each(|replica| replica.primary = None);
            return;
        };
        self.leaving |= member.leaving;
        let mut before = std::mem::take(&mut self.replicas);
        let held: Vec<Point> = before.values().flat_map(|replica| replica.arc.points()).collect();
        let starts: Vec<Point> = before.keys().copied().collect();
        let mut kept = vec![false; usize::from(RING_POINTS)];
        let (mut changed, mut trusted) = (Vec::new(), Vec::new());
        for (index, group) in view.groups.iter().enumerate() {
            if !group.seats(&id) {
                continue;
            }
            let (mut replica, is_continued) = take_part(&mut before, &view, index, &id);
            if replica.fetched == Fetched::Storing {
                // It may be part of an arc of which the rest is yet to come.
                let (arc, since) = (replica.arc, replica.since);
                self.then(Then::Fetched { arc, since });
            }
            for point in replica.arc.points() {
                kept[usize::from(point.number())] = true;
                if is_continued {
                    continue;
                }
                self.table.age(point);
                if replica.fetched == Fetched::All {
                    // The very first server, or the last that held a lost group.
                    self.table.trust_old(point);
                }
            }
            if !is_continued || replica.version != group.version {
                changed.push(group.start);
            }
            if !is_continued && replica.fetched == Fetched::All {
                trusted.push(group.start);
            }
            follow(&mut replica, &view, group, &id);
            self.records.push(Record::Seat(replica.seat()));
            self.replicas.insert(group.start, replica);
        }
        // What is not this server's any more goes; what its disk holds of other
        // arcs is kept for comparison until everything is where it belongs.
        let at_rest = view.is_at_rest();
        let others = Point::all().filter(|_| at_rest);
        let surplus = held.into_iter().chain(others);
        for point in surplus.filter(|point| !kept[usize::from(point.number())]) {
            let dropped = self.table.clear(point).map(|key| Record::Drop { point, key });
            self.records.extend(dropped);
        }
        let gone = starts.iter().filter(|start| !self.replicas.contains_key(start));
        self.records.extend(gone.map(|start| Record::NoSeat(*start)));
        if at_rest && !self.person.formerly.is_empty() {
            // Nothing is left of what it wrote under another name.
            self.person.formerly.clear();
            self.records.push(Record::Identity(self.person.clone()));
        }
        // A replica is dropped only once the primary after it is established, and
        // that has committed what this one had pending.
        for replica in before.into_values() {
            for (version, pending) in replica.pending {
                if let Some(op) = pending.op {
                    self.end_written(op, &pending.key, version, out);
                }
            }
        }
        for start in trusted {
            self.find_deleted(start);
        }
        for start in changed {
            self.begin_version(now, start, out);
        }
        self.refer_reads(now, out);
        self.retry_parked(now, out);
        self.fetch_missing(now, out);
        self.agenda.report = self.agenda.report.map(|_| now);
    }
}

/// This server's replica for the group at `index` of `view`: the one it had, or
/// made of parts of those it had, if it has been in the group ever since; else an
/// empty one. Also says which of the two it is.
fn take_part(
    before: &mut BTreeMap<Point, Replica>,
    view: &View,
    index: usize,
    id: &Identity,
) -> (Replica, bool) {
    let group = &view.groups[index];
    let arc = view.arc(index);
    let since = group.seat(id).map_or(Revision(0), |seat| seat.since);
    let is_ready = group.ready.contains(id);
    if let Some(replica) = continued(before, arc, since, is_ready) {
        return (replica, true);
    }
    let empty = Replica {
        arc,
        version: Revision(0),
        since,
        fellows: Vec::new(),
        primary: None,
        pending: BTreeMap::new(),
        pending_bytes: 0,
        // The very first server has nothing to fetch, and nobody to fetch from.
        fetched: if is_ready { Fetched::All } else { Fetched::UpTo(None) },
        fetching: false,
        left: 0,
        committed: Version::default(),
        settled: Version::default(),
        deleted: BTreeMap::new(),
        counted_ready: false,
        counted_established: false,
    };
    (empty, false)
}

/// What this server had of `arc`, if it had all of it and has been in its group
/// ever since. Whoever is counted as ready has: it became so under a view that it
/// followed, and can't have left since without losing that. Any other has if its
/// seat is still the one that it had.
fn continued(
    before: &mut BTreeMap<Point, Replica>,
    arc: ring::Arc,
    since: Revision,
    is_ready: bool,
) -> Option<Replica> {
    let mut pieces: Vec<(Point, ring::Arc)> = Vec::new();
    let (mut from, mut left) = (arc.start, arc.length());
    while left > 0 {
        let (start, held) = before.iter().find(|(_, replica)| replica.arc.contains(from))?;
        if !is_ready && held.since != since {
            return None;
        }
        let here = held.arc.length() - from.distance_from(held.arc.start);
        let length = here.min(left);
        left -= length;
        let end = if left == 0 { arc.end } else { held.arc.end };
        pieces.push((*start, ring::Arc { start: from, end }));
        from = end;
    }
    let parts = pieces.into_iter().filter_map(|(start, piece)| {
        if before.get(&start)?.arc == piece {
            return before.remove(&start);
        }
        Some(before.get_mut(&start)?.part(piece))
    });
    let mut whole = parts.reduce(Replica::and)?;
    whole.since = since;
    Some(whole)
}

/// Makes `replica` follow `group`.
fn follow(replica: &mut Replica, view: &View, group: &Group, id: &Identity) {
    replica.counted_ready = group.ready.contains(id);
    replica.counted_established = group.established;
    let others = group.replicas.iter().filter(|seat| seat.id != *id);
    let others = others.filter_map(|seat| Some((seat.aside, view.member(&seat.id)?)));
    replica.fellows = others
        .map(|(aside, Member { id, address, full, .. })| Fellow {
            id: id.clone(),
            address: *address,
            full: *full,
            aside,
        })
        .collect();
    if replica.version == group.version {
        return;
    }
    replica.version = group.version;
    for pending in replica.pending.values_mut() {
        (pending.asked, pending.acknowledged) = Default::default();
    }
    let was_serving = replica.is_serving();
    replica.primary = (group.primary.as_ref() == Some(id))
        .then(|| Primary { serving: was_serving, ..Primary::default() });
}
