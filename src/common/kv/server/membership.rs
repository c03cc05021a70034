//! The lease with the viewleader, and the view.

use super::{
    BEATS_PER_LEASE, Effect, Effects, Following, Server, ViewCall, ViewError, ViewNews, WATCH,
};
use crate::kv::marks::Marks;
use crate::kv::replica::{Fellow, Fetched, Primary, Replica};
use crate::kv::ring::{self, Point, RING_POINTS};
use crate::kv::table::Table;
use crate::machine::Time;
use crate::view::messages::{Beat, Heartbeat, HeartbeatReply, QueryView, Report};
use crate::view::{Group, Revision, View};
use crate::wire::Identity;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How soon the viewleader is called again after it could not be reached.
pub(super) const RETRY_VIEWLEADER: Duration = Duration::from_millis(200);

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
            // The first question is answered at once: the identity depends on it.
            let known = (self.view.revision > Revision(0)).then_some(self.view.revision);
            let query = QueryView {
                after: known.or(self.id.as_ref().map(|_| Revision(0))),
                wait_ms: Some(WATCH.as_millis() as u64),
            };
            out.push(Effect::CallView(ViewCall::View(query)));
        }
        let Some(id) = self.id.clone() else { return };
        if due(self.agenda.beat) {
            self.agenda.beat = None;
            self.beat_sent = now;
            out.push(Effect::CallView(ViewCall::Beat(Heartbeat {
                port: self.address.port(),
                requestor: id.clone(),
                address: Some(self.address),
                lease_ms: Some(self.lease.as_millis() as u64),
                seen: Some(self.view.revision),
            })));
        }
        if due(self.agenda.report) {
            let report = self.report(id);
            if !report.ready.is_empty() || !report.established.is_empty() {
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
        }
    }

    /// Takes what a call to the viewleader has brought.
    pub(super) fn news(&mut self, now: Time, news: ViewNews, out: &mut Effects<T>) {
        match news {
            ViewNews::Beat(result) => self.beat_answered(now, result, out),
            ViewNews::View(Ok(view)) => {
                self.agenda.view = Some(now);
                self.choose_identity(now, &view);
                self.install(now, view, out);
            }
            ViewNews::View(Err(error)) => {
                self.agenda.view = Some(now + RETRY_VIEWLEADER);
                if matches!(error, ViewError::Refused(_)) {
                    // The original knows no such question: join all the same.
                    self.agenda.view = Some(now + WATCH);
                    self.choose_identity(now, &View::default());
                }
            }
            ViewNews::Report(_) => self.agenda.report = Some(now + REPORT_AGAIN),
        }
        self.call_viewleader(now, out);
    }

    fn choose_identity(&mut self, now: Time, view: &View) {
        if self.id.is_none() {
            let taken: Vec<Point> = view.members.iter().map(|member| member.hash).collect();
            self.id = Some(ring::choose_identity(&taken, &mut self.rng));
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
        self.agenda.beat = Some(self.beat_sent + self.lease / BEATS_PER_LEASE);
        match result {
            Err(ViewError::Lost) => self.agenda.beat = Some(now + RETRY_VIEWLEADER),
            Err(ViewError::Refused(refusal)) => {
                out.push(Effect::Note(format!("the viewleader refuses the heartbeat: {refusal}")));
            }
            Ok(HeartbeatReply { status: Beat::Ok, epoch, lease_ms: Some(lease_ms) }) => {
                if self.following != Following::Ringleader {
                    out.push(Effect::Note(format!("joined in {}", epoch.unwrap_or_default())));
                }
                self.following = Following::Ringleader;
                self.leased_until = self.beat_sent + Duration::from_millis(lease_ms);
            }
            Ok(HeartbeatReply { status: Beat::Ok, epoch, lease_ms: None }) => {
                if !matches!(self.following, Following::Original(_)) {
                    out.push(Effect::Note("joined an original viewleader".to_owned()));
                }
                self.following = Following::Original(epoch.unwrap_or_default());
            }
            Ok(HeartbeatReply { status: Beat::Retry, .. }) => {
                out.push(Effect::Note(format!(
                    "another server holds a lease on {}: waiting for it to run out",
                    self.address
                )));
            }
            Ok(HeartbeatReply { status: Beat::Deny, .. }) => self.start_over(now, out),
        }
    }

    /// The lease has run out and others have taken over: what this server holds
    /// may be old. It goes on as a new one, with nothing.
    fn start_over(&mut self, now: Time, out: &mut Effects<T>) {
        out.push(Effect::Note("the lease ran out: joining again as a new server".to_owned()));
        let replicas = std::mem::take(&mut self.replicas);
        for op in replicas.values().flat_map(|replica| replica.pending.values()) {
            self.end_unknown(op.op, out);
        }
        self.table = Table::default();
        self.marks = Marks::default();
        self.leased_until = Time::default();
        self.id = None;
        self.choose_identity(now, &Arc::clone(&self.view));
    }

    /// Follows `view`, if it is newer than the one that is followed.
    fn install(&mut self, now: Time, view: Arc<View>, out: &mut Effects<T>) {
        if view.revision <= self.view.revision {
            return;
        }
        self.view = view;
        let Some(id) = self.id.clone() else { return };
        let view = Arc::clone(&self.view);
        let mut before = std::mem::take(&mut self.replicas);
        let held: Vec<Point> = before.values().flat_map(|replica| replica.arc.points()).collect();
        let mut kept = vec![false; usize::from(RING_POINTS)];
        let mut changed = Vec::new();
        for (index, group) in view.groups.iter().enumerate() {
            if !group.seats(&id) {
                continue;
            }
            let (mut replica, is_continued) = take_part(&mut before, &view, index, &id);
            if is_continued {
                replica.arc.points().for_each(|point| kept[usize::from(point.number())] = true);
            }
            if !is_continued || replica.version != group.version {
                changed.push(group.start);
            }
            follow(&mut replica, &view, group, &id);
            self.replicas.insert(group.start, replica);
        }
        for point in held.into_iter().filter(|point| !kept[usize::from(point.number())]) {
            self.table.clear(point);
        }
        for pending in before.values().flat_map(|replica| replica.pending.values()) {
            self.end_unknown(pending.op, out);
        }
        for start in changed {
            self.begin_version(now, start, out);
        }
        self.refer_reads(now, out);
        self.retry_parked(now, out);
        self.fetch_missing(out);
        self.agenda.report = self.agenda.report.map(|_| now);
    }
}

/// This server's replica for the group at `index` of `view`: the one it had, or
/// a part of it, if it has been in the group ever since; else an empty one.
/// Also says which of the two it is.
fn take_part(
    before: &mut BTreeMap<Point, Replica>,
    view: &View,
    index: usize,
    id: &Identity,
) -> (Replica, bool) {
    let group = &view.groups[index];
    let arc = view.arc(index);
    let since = group.seat(id).map_or(Revision(0), |seat| seat.since);
    let whole = before.iter().find(|(_, replica)| replica.arc.contains(group.start));
    let whole = whole.filter(|(_, replica)| replica.since == since);
    let whole = whole.map(|(start, replica)| (*start, replica.arc));
    let continued = match whole {
        Some((start, held)) if held == arc => before.remove(&start),
        Some((start, _)) => before.get_mut(&start).map(|whole| whole.part(arc)),
        None => None,
    };
    if let Some(replica) = continued {
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
        fetched: if group.ready.contains(id) { Fetched::All } else { Fetched::UpTo(None) },
        fetching: false,
        counted_ready: false,
        counted_established: false,
    };
    (empty, false)
}

/// Makes `replica` follow `group`.
fn follow(replica: &mut Replica, view: &View, group: &Group, id: &Identity) {
    replica.counted_ready = group.ready.contains(id);
    replica.counted_established = group.established;
    let others = group.replicas.iter().filter(|seat| seat.id != *id);
    let others = others.filter_map(|seat| view.member(&seat.id));
    replica.fellows =
        others.map(|member| Fellow { id: member.id.clone(), address: member.address }).collect();
    if replica.version == group.version {
        return;
    }
    replica.version = group.version;
    replica.fetching = false;
    for pending in replica.pending.values_mut() {
        (pending.asked, pending.acknowledged) = Default::default();
    }
    let was_serving = replica.is_serving();
    replica.primary = (group.primary.as_ref() == Some(id))
        .then(|| Primary { serving: was_serving, ..Primary::default() });
}
