//! Members, groups and locks, as they are kept in the viewleader's log.
//!
//! [`State::apply`] takes one [`Change`] after the other and depends on nothing
//! else: whoever applies the same changes has the same state. Leases are not in
//! it: they are a matter of clocks, and live with the [`super::leader`].
//!
//! # The steps of a group
//! The *target* of an arc is what the ring says: its owner and the next two
//! servers. A group is changed on its own, in small steps, and every step gives
//! it a new version (see [`crate::view`]).
//!
//! What can't wait happens at once: a member that failed leaves its groups, and
//! if it was the primary, a ready replica takes over. What moves data happens
//! when a rebalancing worker says [`Change::Advance`]:
//!
//! * a member of the target that is not in the group enters, *not ready*: it
//!   receives every write from then on and fetches the rest;
//! * once the whole target is ready, the arc's owner becomes primary;
//! * once that primary is *established* (every replica, the old primary among
//!   them, follows the new version), whatever is not in the target leaves.
//!
//! No step removes the last ready replica, so joins and failures compose in any
//! order: at any moment the ready replicas hold everything that was ever
//! acknowledged, and a rebalancing is over when every group equals its target.
//!
//! A group whose last ready replicas fail is *lost*. It is kept, without a
//! primary, so that its arc is refused rather than served empty; when a server
//! joins over the disk of one of those replicas, it leads the group.

use super::locks::{Grant, Locks};
use super::messages::LockCall;
use super::{Dialect, Epoch, Group, Holder, Member, Revision, Seat, Start, View};
use crate::kv::ring::Point;
use crate::wire::Identity;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddrV4;

/// How many servers there can be.
pub const MAX_MEMBERS: usize = 2_000;

/// How many denied identities are remembered; beyond it the oldest are
/// forgotten.
pub const MAX_DENIED: usize = 100_000;

/// One change of the state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Change {
    /// A server comes in; with the identity under which its disk was written
    /// before, if there is one.
    Join {
        /// The server.
        member: Member,
        /// The starts over its disk before this one.
        lineage: Vec<Start>,
        /// Who wrote what is on its disk.
        formerly: Option<Identity>,
    },
    /// A member has been started again over its own disk, inside its lease.
    Restart {
        /// Who.
        id: Identity,
        /// Which start it is.
        start: Start,
    },
    /// A member is reached elsewhere.
    Move {
        /// Who.
        id: Identity,
        /// Where.
        address: SocketAddrV4,
    },
    /// The leases of these members have run out.
    Expel(Vec<Identity>),
    /// A member's disk has no room, or has again.
    Full {
        /// Who.
        id: Identity,
        /// Whether it is full.
        full: bool,
    },
    /// A member is to leave once its data is elsewhere.
    Drain(SocketAddrV4),
    /// A replica holds every committed entry of the group at `start`, as of
    /// `version`.
    Ready {
        /// Who.
        id: Identity,
        /// Where the arc starts.
        start: Point,
        /// The version for which it says so.
        version: Revision,
    },
    /// Every replica of the group at `start` follows `version` of its primary.
    Established {
        /// The primary.
        id: Identity,
        /// Where the arc starts.
        start: Point,
        /// The version.
        version: Revision,
    },
    /// A rebalancing worker takes every group as far as it can go by now.
    Advance,
    /// A requestor asks for a lock.
    LockGet(LockCall),
    /// A requestor gives a lock back, or leaves its queue.
    LockRelease(LockCall),
}

/// What a change has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done, or was already.
    Done,
    /// Another member is reached at that address.
    Taken,
    /// The identity is denied.
    Denied,
    /// There is no room for another member.
    Full,
    /// There is no such member.
    Unknown,
    /// It is the last one that stays: there is nowhere to move its data to.
    Last,
    /// What came of asking for a lock.
    Lock(Grant),
}

/// The viewleader's memory, leases aside.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    view: View,
    denied: BTreeSet<Identity>,
    /// The denied in the order in which they were denied.
    denied_order: VecDeque<Identity>,
    locks: Locks,
}

impl State {
    /// The view as it stands.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Whether this identity is denied for good: its lease has run out, or it
    /// has left.
    pub fn is_denied(&self, id: &Identity) -> bool {
        self.denied.contains(id)
    }

    /// What asking for `lock` would come to without a change of the state, if
    /// there would be none.
    pub fn place_in_queue(&self, call: &LockCall) -> Option<Grant> {
        self.locks.place(&call.lockid, &call.requestor)
    }

    /// Who holds `lock` and who waits for it, in order.
    pub fn waiting_for(&self, lock: &str) -> Vec<Identity> {
        self.locks.queue(lock)
    }

    /// Applies `change`. One that can't be applied any more changes nothing.
    pub fn apply(&mut self, change: Change) -> Outcome {
        match change {
            Change::Join { member, lineage, formerly } => {
                return self.join(member, &lineage, formerly.as_ref());
            }
            Change::Restart { id, start } => self.restart(&id, start),
            Change::Move { id, address } => self.move_to(&id, address),
            Change::Expel(ids) => self.expel(&ids),
            Change::Full { id, full } => self.set_full(&id, full),
            Change::Drain(address) => return self.drain(address),
            Change::Ready { id, start, version } => self.is_ready(&id, start, version),
            Change::Established { id, start, version } => self.is_established(&id, start, version),
            Change::Advance => self.advance(),
            Change::LockGet(call) => {
                return Outcome::Lock(self.locks.get(&call.lockid, &call.requestor));
            }
            Change::LockRelease(call) => {
                let known = self.locks.release(&call.lockid, &call.requestor);
                return if known { Outcome::Done } else { Outcome::Unknown };
            }
        }
        Outcome::Done
    }

    /// Takes `member` in: a new epoch, and arcs split at its place.
    fn join(&mut self, member: Member, lineage: &[Start], formerly: Option<&Identity>) -> Outcome {
        if self.is_denied(&member.id) {
            return Outcome::Denied;
        }
        if self.view.members.iter().any(|m| m.address == member.address && m.id != member.id) {
            return Outcome::Taken;
        }
        if self.view.member(&member.id).is_some() {
            return Outcome::Done;
        }
        if self.view.members.len() >= MAX_MEMBERS {
            return Outcome::Full;
        }
        self.next_epoch();
        let (id, hash, dialect) = (member.id.clone(), member.hash, member.dialect);
        let members = &mut self.view.members;
        let place = members.partition_point(|other| (other.hash, &other.id) < (hash, &id));
        members.insert(place, member);
        if dialect == Dialect::Ringleader {
            self.split_at(hash, &id);
            if let Some(formerly) = formerly {
                self.find_again(formerly, lineage, &id);
            }
        }
        Outcome::Done
    }

    /// Sets where the member `id` is reached.
    fn move_to(&mut self, id: &Identity, address: SocketAddrV4) {
        let member = self.view.members.iter_mut().find(|member| member.id == *id);
        if let Some(member) = member.filter(|member| member.address != address) {
            member.address = address;
            self.next_epoch();
        }
    }

    /// The member `id` goes on over its disk. Its groups get a new version: what
    /// is pending in them is prepared anew, and what it sent before it was
    /// started again is refused.
    fn restart(&mut self, id: &Identity, start: Start) {
        let member = self.view.members.iter_mut().find(|member| member.id == *id);
        let Some(member) = member.filter(|member| member.start != Some(start)) else { return };
        member.start = Some(start);
        self.view.revision.0 += 1;
        let version = self.view.revision;
        for group in self.view.groups.iter_mut().filter(|group| group.seats(id)) {
            touch(group, version);
        }
    }

    fn set_full(&mut self, id: &Identity, full: bool) {
        let member = self.view.members.iter_mut().find(|member| member.id == *id);
        if let Some(member) = member {
            member.full = full;
            self.view.revision.0 += 1;
        }
    }

    fn drain(&mut self, address: SocketAddrV4) -> Outcome {
        let others = self.view.own_members().filter(|member| member.address != address);
        let stays = others.filter(|member| !member.leaving).count();
        let member = self.view.members.iter_mut().find(|member| member.address == address);
        let Some(member) = member.filter(|member| member.dialect == Dialect::Ringleader) else {
            return Outcome::Unknown;
        };
        if stays == 0 {
            return Outcome::Last;
        }
        if !member.leaving {
            member.leaving = true;
            self.next_epoch();
        }
        Outcome::Done
    }

    /// Puts members out, for good: their groups go on without them. Those that
    /// fail together leave together, so that of a group that loses all its ready
    /// replicas every one is known to hold all of it.
    fn expel(&mut self, ids: &[Identity]) {
        let (gone, members): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.view.members).into_iter().partition(|m| ids.contains(&m.id));
        self.view.members = members;
        if gone.is_empty() {
            return;
        }
        self.next_epoch();
        for member in &gone {
            if self.denied.insert(member.id.clone()) {
                self.denied_order.push_back(member.id.clone());
            }
            if self.denied_order.len() > MAX_DENIED
                && let Some(oldest) = self.denied_order.pop_front()
            {
                self.denied.remove(&oldest);
            }
        }
        for index in 0..self.view.groups.len() {
            self.go_on_without(index, &gone);
        }
    }

    /// `id` says that it holds every committed entry of the group at `start`, as
    /// of `version`. Believed only while that is the group's version: then it has
    /// been a replica all along and no write has passed it by.
    fn is_ready(&mut self, id: &Identity, start: Point, version: Revision) {
        let Some(group) = self.group_mut(start, version) else { return };
        if group.seats(id) && !group.ready.contains(id) {
            group.ready.push(id.clone());
            self.view.revision.0 += 1;
        }
    }

    fn is_established(&mut self, id: &Identity, start: Point, version: Revision) {
        let Some(group) = self.group_mut(start, version) else { return };
        if group.primary.as_ref() == Some(id) && !group.established {
            group.established = true;
            self.view.revision.0 += 1;
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
    fn split_at(&mut self, hash: Point, joiner: &Identity) {
        let version = self.view.revision;
        let Some(index) = self.view.group_at(hash) else {
            self.view.groups.push(Group {
                start: hash,
                version,
                primary: Some(joiner.clone()),
                replicas: vec![Seat { id: joiner.clone(), since: version }],
                ready: vec![joiner.clone()],
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
        touch(&mut groups[index], version);
        let upper = Group { start: hash, ..groups[index].clone() };
        let place = groups.partition_point(|group| group.start < hash);
        groups.insert(place, upper);
    }

    /// `id` has joined over the disk of `formerly`: where that was among the last
    /// holders of a lost group, the group goes on with it.
    fn find_again(&mut self, formerly: &Identity, lineage: &[Start], id: &Identity) {
        let version = self.view.revision;
        let wrote_it = |holder: &Holder| {
            holder.id == *formerly && holder.start.is_some_and(|start| lineage.contains(&start))
        };
        for group in self.view.groups.iter_mut().filter(|group| group.is_lost()) {
            if group.held_by.iter().any(wrote_it) {
                touch(group, version);
                group.primary = Some(id.clone());
                group.replicas = vec![Seat { id: id.clone(), since: version }];
                group.ready = vec![id.clone()];
                group.held_by.clear();
            }
        }
    }

    /// Takes `gone` out of the group at `index`.
    fn go_on_without(&mut self, index: usize, gone: &[Member]) {
        let target = self.view.target_of(self.view.groups[index].start);
        let version = self.view.revision;
        let group = &mut self.view.groups[index];
        let is_gone = |id: &Identity| gone.iter().any(|member| member.id == *id);
        if !group.replicas.iter().any(|seat| is_gone(&seat.id)) {
            return;
        }
        touch(group, version);
        let was_ready = gone.iter().filter(|member| group.ready.contains(&member.id));
        let holders: Vec<Holder> = was_ready
            .map(|Member { id, address, start, .. }| Holder {
                id: id.clone(),
                address: *address,
                start: *start,
            })
            .collect();
        group.replicas.retain(|seat| !is_gone(&seat.id));
        group.ready.retain(|id| !is_gone(id));
        if group.ready.is_empty() {
            group.primary = None;
            group.replicas.clear();
            group.held_by = holders;
        } else if group.primary.as_ref().is_some_and(is_gone) {
            let heir = target.iter().find(|id| group.ready.contains(id));
            group.primary = heir.or(group.ready.first()).cloned();
        }
    }

    /// Takes every group as far towards its target as can be without hearing
    /// from its replicas again, and lets those go that were to leave and hold
    /// nothing any more.
    fn advance(&mut self) {
        let mut changed = false;
        let version = Revision(self.view.revision.0 + 1);
        for index in 0..self.view.groups.len() {
            let target = self.view.target_of(self.view.groups[index].start);
            let group = &mut self.view.groups[index];
            if next_step(group, &target, version) {
                touch(group, version);
                changed = true;
            }
        }
        if changed {
            self.view.revision = version;
        }
        let holds = |id: &Identity| self.view.groups.iter().any(|group| group.seats(id));
        let leaving =
            self.view.members.iter().filter(|member| member.leaving && !holds(&member.id));
        let leaving: Vec<_> = leaving.map(|member| member.id.clone()).collect();
        self.expel(&leaving);
    }
}

/// Gives `group` the version `version`, which its primary has yet to establish.
fn touch(group: &mut Group, version: Revision) {
    group.version = version;
    group.established = false;
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
