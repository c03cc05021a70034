//! Leases: heartbeats renew them, and whoever lets one run out is put out.

use super::{Asker, Effect, Leader};
use crate::kv::ring::Point;
use crate::machine::Time;
use crate::view::messages::{Beat, Heartbeat, HeartbeatReply, ViewReply};
use crate::view::state::Change;
use crate::view::{Dialect, Group, Member};
use crate::wire::{Identity, Refusal};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// The lease of a server that names none: the original's.
pub const ORIGINAL_LEASE: Duration = Duration::from_secs(30);

/// The shortest lease that is granted.
pub const MIN_LEASE: Duration = Duration::from_millis(500);

/// The longest lease that is granted.
pub const MAX_LEASE: Duration = Duration::from_secs(300);

/// By how much two clocks' rates may differ: thousandths of a lease that the
/// viewleader waits longer than the server does.
pub const DRIFT_PER_MILLE: u32 = 20;

/// A member that has this part of its lease left, or less, has missed several
/// heartbeats.
const SUSPECT_PART: u32 = 4;

impl<T> Leader<T> {
    /// Puts out the members whose leases have run out: together with those that
    /// have missed several heartbeats as well, for which it waits a moment. Of
    /// servers that were killed together the last to be put out would else seem to
    /// be the only one that has everything.
    pub(super) fn expire(&mut self, now: Time, effects: &mut Vec<Effect<T>>) {
        let over = |end: &Time| *end <= now;
        if !self.leases.values().any(over) {
            return;
        }
        let is_suspect = |id: &Identity, end: Time| {
            let lease = self.view().member(id).map_or(ORIGINAL_LEASE, lease_of);
            end > now && end <= now + lease / SUSPECT_PART
        };
        let waited_for = |(id, end): (&Identity, &Time)| is_suspect(id, *end);
        let long_over = |(id, end): (&Identity, &Time)| {
            let lease = self.view().member(id).map_or(ORIGINAL_LEASE, lease_of);
            *end + lease / SUSPECT_PART <= now
        };
        if self.leases.iter().any(waited_for) && !self.leases.iter().any(long_over) {
            return;
        }
        let gone = self.leases.iter().filter(|(_, end)| over(end));
        let gone: Vec<Identity> = gone.map(|(id, _)| id.clone()).collect();
        for id in &gone {
            self.leases.remove(id);
            self.expelling.insert(id.clone());
        }
        self.propose(Change::Expel(gone), Asker::Nobody, effects);
    }

    /// Takes a heartbeat that has `arrived` and is confirmed by now.
    pub(super) fn heartbeat(
        &mut self,
        now: Time,
        arrived: Time,
        to: T,
        host: Ipv4Addr,
        beat: Heartbeat,
        effects: &mut Vec<Effect<T>>,
    ) {
        let id = beat.requestor.clone();
        let member = self.view().member(&id);
        let is_copy = match (member.and_then(|member| member.start), beat.start) {
            // Neither the process that is known nor one after it: an old copy of a
            // data directory, or two processes over copies.
            (Some(known), Some(start)) => start != known && !beat.lineage.contains(&known),
            _ => false,
        };
        // A lease that has run out is over, even while others are waited for.
        let is_over = self.leases.get(&id).is_some_and(|end| *end <= now);
        let is_going = self.expelling.contains(&id) || is_over;
        if is_going && beat.lease_ms.is_some() {
            // It comes again when it has been put out, and then brings what it holds.
            let reply = self.beat_reply(Beat::Retry, &beat);
            return effects.push(Effect::Reply { to, reply });
        }
        let denied = self.state.is_denied(&id) || is_going || is_copy;
        if denied {
            let reply = self.beat_reply(Beat::Deny, &beat);
            return effects.push(Effect::Reply { to, reply });
        }
        if beat.seen.is_some_and(|seen| seen > self.view().revision) {
            let reply = ViewReply::Refused(Refusal::unavailable(format!(
                "this viewleader is at revision {} and this server has seen a newer one: it has \
                 lost its state, or it is another cluster's; start it over its own data, or give \
                 the server an empty data directory",
                self.view().revision.0
            )));
            return effects.push(Effect::Reply { to, reply });
        }
        let address = beat.address.unwrap_or(SocketAddrV4::new(host, beat.port));
        let lease = wanted_lease(&beat);
        let leased_until = arrived + margin(lease);
        let is_restart = member.is_some_and(|m| m.start != beat.start && beat.start.is_some());
        let moved = member.is_some_and(|member| member.address != address);
        let change = match member {
            None => Change::Join {
                member: Member {
                    hash: Point::of(id.as_str()),
                    id,
                    address,
                    dialect: if beat.lease_ms.is_some() {
                        Dialect::Ringleader
                    } else {
                        Dialect::Original
                    },
                    lease_ms: lease.as_millis() as u64,
                    start: beat.start,
                    full: beat.full,
                    leaving: false,
                },
                lineage: beat.lineage.clone(),
                formerly: beat.formerly.clone(),
                chosen_in: beat.chosen_in,
            },
            Some(_) if self.view().members.iter().any(|m| m.address == address && m.id != id) => {
                let reply = self.beat_reply(Beat::Retry, &beat);
                return effects.push(Effect::Reply { to, reply });
            }
            Some(_) if is_restart => {
                let start = beat.start.unwrap_or_default();
                if moved {
                    let change = Change::Move { id: id.clone(), address };
                    self.propose(change, Asker::Nobody, effects);
                }
                Change::Restart { id, start, lease_ms: Some(lease.as_millis() as u64) }
            }
            Some(_) if moved => Change::Move { id, address },
            Some(member) if member.full != beat.full => Change::Full { id, full: beat.full },
            Some(_) => {
                self.renew(id, leased_until);
                let reply = self.beat_reply(Beat::Ok, &beat);
                return effects.push(Effect::Reply { to, reply });
            }
        };
        self.propose(change, Asker::Heartbeat { to, beat, leased_until }, effects);
    }

    /// A lease never ends earlier than was said before: a heartbeat that changes something takes
    /// its way through the log, and one that was sent later may have been answered meanwhile.
    pub(super) fn renew(&mut self, id: Identity, until: Time) {
        let end = self.leases.entry(id).or_insert(until);
        *end = until.max(*end);
    }

    /// Whether `id` has been put out and is not the last holder of anything.
    fn is_free(&self, id: &Identity) -> bool {
        let holds = |group: &Group| group.held_by.iter().any(|holder| holder.id == *id);
        self.state.is_denied(id) && !self.view().groups.iter().any(holds)
    }

    pub(super) fn beat_reply(&self, status: Beat, beat: &Heartbeat) -> ViewReply {
        let is_ours = status == Beat::Ok && beat.lease_ms.is_some();
        ViewReply::Heartbeat(HeartbeatReply {
            status,
            epoch: (status != Beat::Deny).then_some(self.view().epoch),
            lease_ms: is_ours.then(|| wanted_lease(beat).as_millis() as u64),
            revision: is_ours.then_some(self.view().revision),
            free: status == Beat::Deny && beat.lease_ms.is_some() && self.is_free(&beat.requestor),
            crowded: false,
        })
    }

    /// Asks a server that would join to choose its place again.
    pub(super) fn crowded_reply(&self) -> ViewReply {
        ViewReply::Heartbeat(HeartbeatReply {
            status: Beat::Retry,
            epoch: Some(self.view().epoch),
            lease_ms: None,
            revision: None,
            free: false,
            crowded: true,
        })
    }
}

pub(super) fn lease_of(member: &Member) -> Duration {
    Duration::from_millis(member.lease_ms)
}

fn wanted_lease(beat: &Heartbeat) -> Duration {
    beat.lease_ms
        .map_or(ORIGINAL_LEASE, |wanted| Duration::from_millis(wanted).clamp(MIN_LEASE, MAX_LEASE))
}

/// How long the viewleader waits for a lease to run out.
pub(super) fn margin(lease: Duration) -> Duration {
    lease + lease * DRIFT_PER_MILLE / 1000
}
