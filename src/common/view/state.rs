//! Members and groups, and the next step of each group towards its target.
//!
//! The *target* of an arc is what the ring says: its owner and the next two
//! servers. A group is changed on its own, one small step at a time, and every
//! step gives it a new version (see [`crate::view`]):
//!
//! * a member that failed leaves its groups; if it was the primary, a ready
//!   replica takes over;
//! * a member of the target that is not in the group enters, *not ready*: it
//!   receives every write from then on and fetches the rest;
//! * once the whole target is ready, the arc's owner becomes primary;
//! * once that primary is *established* (every replica, the old primary among
//!   them, follows the new version), whatever is not in the target leaves.
//!
//! No step removes the last ready replica, so joins and failures compose in any
//! order: at any moment the ready replicas hold everything that was ever
//! acknowledged, and a rebalancing is over when every group equals its target.
//! A group whose last ready replica fails is *lost*: it is kept, without a
//! primary, so that its arc is refused rather than served empty.

use super::{Dialect, Epoch, Group, Member, Revision, Seat, View};
use crate::kv::ring::Point;
use crate::wire::Identity;
use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddrV4;

/// How many servers there can be.
pub const MAX_MEMBERS: usize = 2_000;

/// How many denied identities are remembered; beyond it the oldest are
/// forgotten.
pub const MAX_DENIED: usize = 1_000_000;

/// The viewleader's memory of servers: everything but leases and locks.
#[derive(Debug, Default)]
pub struct State {
    view: View,
    denied: BTreeSet<Identity>,
    /// The denied in the order in which they were denied.
    denied_order: VecDeque<Identity>,
}

impl State {
    /// The view as it stands.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Whether this identity's lease has ever run out.
    pub fn is_denied(&self, id: &Identity) -> bool {
        self.denied.contains(id)
    }

    /// Takes `member` in: a new epoch, and arcs split at its place.
    ///
    /// # Panics
    /// If the identity is a member already, or was denied.
    pub fn join(&mut self, member: Member) {
        assert!(self.view.member(&member.id).is_none(), "{} is a member already", member.id);
        assert!(!self.is_denied(&member.id), "{} was denied", member.id);
        self.next_epoch();
        let (id, hash, dialect) = (member.id.clone(), member.hash, member.dialect);
        let members = &mut self.view.members;
        let place = members.partition_point(|other| (other.hash, &other.id) < (hash, &id));
        members.insert(place, member);
        if dialect == Dialect::Ringleader {
            self.split_at(hash, id);
            self.plan();
        }
    }

    /// Sets where the member `id` is reached.
    pub fn move_to(&mut self, id: &Identity, address: SocketAddrV4) {
        let member = self.view.members.iter_mut().find(|member| member.id == *id);
        if let Some(member) = member.filter(|member| member.address != address) {
            member.address = address;
            self.next_epoch();
        }
    }

    /// Puts the member `id` out, for good: its groups go on without it.
    pub fn expel(&mut self, id: &Identity) {
        let Some(place) = self.view.members.iter().position(|member| member.id == *id) else {
            return;
        };
        self.next_epoch();
        let gone = self.view.members.remove(place);
        if self.denied.insert(gone.id.clone()) {
            self.denied_order.push_back(gone.id.clone());
        }
        if self.denied_order.len() > MAX_DENIED
            && let Some(oldest) = self.denied_order.pop_front()
        {
            self.denied.remove(&oldest);
        }
        for index in 0..self.view.groups.len() {
            self.go_on_without(index, &gone);
        }
        self.plan();
    }

    /// `id` says that it holds every committed entry of the group at `start`,
    /// as of `version`. Believed only while that is the group's version: then
    /// it has been a replica all along and no write has passed it by.
    pub fn is_ready(&mut self, id: &Identity, start: Point, version: Revision) {
        let Some(group) = self.group_mut(start, version) else { return };
        if group.seats(id) && !group.ready.contains(id) {
            group.ready.push(id.clone());
            self.view.revision.0 += 1;
            self.plan();
        }
    }

    /// The primary `id` says that every replica of the group at `start` follows
    /// `version`.
    pub fn is_established(&mut self, id: &Identity, start: Point, version: Revision) {
        let Some(group) = self.group_mut(start, version) else { return };
        if group.primary.as_ref() == Some(id) && !group.established {
            group.established = true;
            self.view.revision.0 += 1;
            self.plan();
        }
    }

    fn next_epoch(&mut self) {
        self.view.epoch = Epoch(self.view.epoch.0 + 1);
        self.view.revision.0 += 1;
    }

    fn group_mut(&mut self, start: Point, version: Revision) -> Option<&mut Group> {
        self.view.groups.iter_mut().find(|group| group.start == start && group.version == version)
    }

    /// Makes `hash` the start of an arc of its own. The first member of all
    /// starts the ring: there is nothing that it could lack.
    fn split_at(&mut self, hash: Point, joiner: Identity) {
        let version = self.view.revision;
        let Some(index) = self.view.group_at(hash) else {
            self.view.groups.push(Group {
                start: hash,
                version,
                primary: Some(joiner.clone()),
                replicas: vec![Seat { id: joiner.clone(), since: version }],
                ready: vec![joiner],
                established: false,
                held_by: Vec::new(),
            });
            return;
        };
        let groups = &mut self.view.groups;
        if groups[index].start == hash {
            return;
        }
        // Both halves are new arcs, so both get a version of their own.
        groups[index].version = version;
        groups[index].established = false;
        let upper = Group { start: hash, ..groups[index].clone() };
        let place = groups.partition_point(|group| group.start < hash);
        groups.insert(place, upper);
    }

    /// Takes `gone` out of the group at `index`.
    fn go_on_without(&mut self, index: usize, gone: &Member) {
        let target = self.view.target_of(self.view.groups[index].start);
        let version = self.view.revision;
        let group = &mut self.view.groups[index];
        if !group.seats(&gone.id) {
            return;
        }
        group.version = version;
        group.established = false;
        group.replicas.retain(|seat| seat.id != gone.id);
        group.ready.retain(|id| *id != gone.id);
        if group.ready.is_empty() {
            group.primary = None;
            group.replicas.clear();
            group.held_by = vec![gone.address];
        } else if group.primary.as_ref() == Some(&gone.id) {
            let heir = target.iter().find(|id| group.ready.contains(id));
            group.primary = heir.or(group.ready.first()).cloned();
        }
    }

    /// Takes every group as far towards its target as can be without hearing
    /// from its replicas again.
    fn plan(&mut self) {
        let mut changed = false;
        let version = Revision(self.view.revision.0 + 1);
        for index in 0..self.view.groups.len() {
            let target = self.view.target_of(self.view.groups[index].start);
            if next_step(&mut self.view.groups[index], &target, version) {
                let group = &mut self.view.groups[index];
                group.version = version;
                group.established = false;
                changed = true;
            }
        }
        if changed {
            self.view.revision = version;
        }
    }
}

/// One step of `group` towards `target`, which makes it `version`; whether
/// there was one to take.
fn next_step(group: &mut Group, target: &[Identity], version: Revision) -> bool {
    if group.is_lost() {
        return false;
    }
    let before = group.replicas.len();
    group.replicas.retain(|seat| target.contains(&seat.id) || group.ready.contains(&seat.id));
    let mut changed = group.replicas.len() != before;
    for id in target {
        if !group.seats(id) {
            group.replicas.push(Seat { id: id.clone(), since: version });
            changed = true;
        }
    }
    if !target.iter().all(|id| group.ready.contains(id)) {
        return changed;
    }
    if group.primary.as_ref() != target.first() {
        group.primary = target.first().cloned();
        return true;
    }
    if group.established && group.replicas.len() > target.len() {
        group.replicas.retain(|seat| target.contains(&seat.id));
        group.ready.retain(|id| target.contains(id));
        changed = true;
    }
    changed
}
