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
//!   them, follows the new version), whatever is not in the target leaves;
//! * a member that is to leave and whose disk is full is set aside where another
//!   replica is ready, so that nothing waits for its disk;
//! * once two neighbours are complete and have the same target, they become one
//!   group: arcs that were split for a server that has left are whole again.
//!
//! Each step gives the group a version that no other group has or had, so an
//! entry's version says which group it was written in.
//!
//! No step removes the last ready replica, so joins and failures compose in any
//! order: at any moment the ready replicas hold everything that was ever
//! acknowledged, and a rebalancing is over when every group equals its target.
//!
//! A group whose last ready replicas fail is *lost*. It is kept, without a
//! primary, so that its arc is refused rather than served empty; when a server
//! joins over the disk of one of those replicas, it leads the group, once whoever had
//! been set aside in it follows.

mod restoring;

use super::answered::{Answer, Answered};
use super::locks::{Grant, Locks};
use super::messages::LockCall;
use super::restoring::{BackupId, NotRestored, Restore};
use super::{Dialect, Epoch, Group, Holder, Member, Revision, Seat, Start, Token, View};
use crate::consensus;
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
    /// A server comes in.
    Join {
        /// The server.
        member: Member,
        /// The starts over its disk before this one.
        lineage: Vec<Start>,
        /// Who wrote what is on its disk.
        formerly: Vec<Identity>,
        /// The epoch in which it chose its place, if that is to be the present one.
        chosen_in: Option<Epoch>,
    },
    /// A member has been started again over its own disk, inside its lease.
    Restart {
        /// Who.
        id: Identity,
        /// Which start it is.
        start: Start,
        /// How long its leases are now, in milliseconds; as before, where an older log
        /// does not say.
        #[serde(default)]
        lease_ms: Option<u64>,
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
    /// A requestor has given no sign of life.
    LockExpire {
        /// The lock.
        lock: String,
        /// Who holds it or waits for it.
        requestor: Identity,
        /// Of which grant it was last heard; of none while it waits.
        token: Option<Token>,
    },
    /// The next step of restoring the cluster from a backup.
    Restore(Restore),
}

impl Change {
    /// The lock and the requestor whose place it is about, if it is about one.
    pub fn place(&self) -> Option<(&str, &Identity)> {
        match self {
            Self::LockGet(call) | Self::LockRelease(call) => Some((&call.lockid, &call.requestor)),
            Self::LockExpire { lock, requestor, .. } => Some((lock, requestor)),
            _ => None,
        }
    }
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
    /// Somebody has come or gone since it chose its place.
    Crowded,
    /// There is no such member.
    Unknown,
    /// It is the last one that stays: there is nowhere to move its data to.
    Last,
    /// What came of asking for a lock.
    Lock(Grant),
    /// The cluster is not restored.
    NotRestored(NotRestored),
}

/// The viewleader's memory, leases aside.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    view: View,
    denied: BTreeSet<Identity>,
    /// The denied in the order in which they were denied.
    denied_order: VecDeque<Identity>,
    locks: Locks,
    answered: Answered,
    /// The backup from which the cluster was restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    restored: Option<BackupId>,
}

impl consensus::State for State {
    type Command = Change;

    fn obey(&mut self, command: Change) {
        self.apply(command);
    }
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
        self.locks.place(&call.lockid, &call.requestor, call.manner())
    }

    /// Whether the request with this number, if it has one, is remembered: it does
    /// nothing when it comes again.
    pub fn remembers(&self, request: Option<u64>) -> bool {
        request.is_none() || self.answered.get(request).is_some()
    }

    /// All locks.
    pub fn locks(&self) -> &Locks {
        &self.locks
    }

    /// Applies `change`. One that can't be applied any more changes nothing.
    pub fn apply(&mut self, change: Change) -> Outcome {
        match change {
            Change::Join { member, lineage, formerly, chosen_in } => {
                return self.join(member, &lineage, &formerly, chosen_in);
            }
            Change::Restart { id, start, lease_ms } => self.restart(&id, start, lease_ms),
            Change::Move { id, address } => self.move_to(&id, address),
            Change::Expel(ids) => self.expel(&ids),
            Change::Full { id, full } => self.set_full(&id, full),
            Change::Drain(address) => return self.drain(address),
            Change::Ready { id, start, version } => self.is_ready(&id, start, version),
            Change::Established { id, start, version } => self.is_established(&id, start, version),
            Change::Advance => self.advance(),
            Change::LockGet(call) => return Outcome::Lock(self.get_lock(&call)),
            Change::Restore(restore) => return self.restore(&restore),
            Change::LockRelease(call) if self.release_lock(&call) => {}
            Change::LockRelease(_) => return Outcome::Unknown,
            Change::LockExpire { lock, requestor, token } => {
                let is_over = self.locks.expire(&lock, &requestor, token);
                return if is_over { Outcome::Done } else { Outcome::Unknown };
            }
        }
        Outcome::Done
    }

    fn get_lock(&mut self, call: &LockCall) -> Grant {
        let grant = match (self.answered.get(call.request), self.place_in_queue(call)) {
            (Some(Answer::Asked(grant)), None) => return grant.without_place(),
            (_, Some(place)) => place,
            _ => self.locks.get(&call.lockid, &call.requestor, call.manner()),
        };
        self.answered.remember(call.request, Answer::Asked(grant));
        grant
    }

    /// Whether the requestor held the lock or waited for it.
    fn release_lock(&mut self, call: &LockCall) -> bool {
        if let Some(Answer::Released(known)) = self.answered.get(call.request) {
            return known;
        }
        let known = self.locks.release(&call.lockid, &call.requestor);
        self.answered.remember(call.request, Answer::Released(known));
        known
    }

    /// Takes `member` in: a new epoch, and arcs split at its place.
    fn join(
        &mut self,
        member: Member,
        lineage: &[Start],
        formerly: &[Identity],
        chosen_in: Option<Epoch>,
    ) -> Outcome {
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
        if chosen_in.is_some_and(|epoch| epoch != self.view.epoch) {
            return Outcome::Crowded;
        }
        self.next_epoch();
        let (id, hash, dialect) = (member.id.clone(), member.hash, member.dialect);
        let members = &mut self.view.members;
        let place = members.partition_point(|other| (other.hash, &other.id) < (hash, &id));
        members.insert(place, member);
        if dialect == Dialect::Ringleader {
            self.split_at(hash, &id);
            self.find_again(formerly, lineage, &id);
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
    ///
    /// Its leases may be longer than before: whoever leads next waits for as long.
    fn restart(&mut self, id: &Identity, start: Start, lease_ms: Option<u64>) {
        let member = self.view.members.iter_mut().find(|member| member.id == *id);
        let Some(member) = member.filter(|member| member.start != Some(start)) else { return };
        member.start = Some(start);
        member.lease_ms = lease_ms.unwrap_or(member.lease_ms);
        self.view.revision.0 += 1;
        let View { groups, revision, .. } = &mut self.view;
        for group in groups.iter_mut().filter(|group| group.seats(id)) {
            touch(group, revision);
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
        if can_be_ready(group, id) {
            group.ready.push(id.clone());
            self.view.revision.0 += 1;
        }
    }

    fn is_established(&mut self, id: &Identity, start: Point, version: Revision) {
        let Some(group) = self.group_mut(start, version) else { return };
        if can_be_established(group, id) {
            group.established = true;
            self.view.revision.0 += 1;
        }
    }

    /// Whether what a server reports would change anything. It is reported again and
    /// again until the view shows it, and that may be never: the log is spared that.
    pub fn is_news(&self, change: &Change) -> bool {
        let is_so = |start, version, so: &dyn Fn(&Group) -> bool| {
            let group = self.view.groups.iter().find(|it| is_of_version(it, start, version));
            group.is_some_and(so)
        };
        match change {
            Change::Ready { id, start, version } => {
                is_so(*start, *version, &|group| can_be_ready(group, id))
            }
            Change::Established { id, start, version } => {
                is_so(*start, *version, &|group| can_be_established(group, id))
            }
            _ => true,
        }
    }

    fn next_epoch(&mut self) {
        self.view.epoch = Epoch(self.view.epoch.0 + 1);
        self.view.revision.0 += 1;
    }

    fn group_mut(&mut self, start: Point, version: Revision) -> Option<&mut Group> {
        self.view.groups.iter_mut().find(|group| is_of_version(group, start, version))
    }

    /// Makes `hash` the start of an arc of its own. The first member of all
    /// starts the ring: there is nothing that it could lack.
    fn split_at(&mut self, hash: Point, joiner: &Identity) {
        let index = self.view.group_at(hash);
        let View { groups, revision, .. } = &mut self.view;
        let Some(index) = index else {
            let mut whole = Group {
                start: hash,
                version: Revision(0),
                primary: Some(joiner.clone()),
                replicas: Vec::new(),
                ready: vec![joiner.clone()],
                established: false,
                held_by: Vec::new(),
            };
            touch(&mut whole, revision);
            whole.replicas.push(Seat::new(joiner.clone(), whole.version));
            return groups.push(whole);
        };
        if groups[index].start == hash {
            return;
        }
        // Both halves are new arcs, so both get a version of their own.
        touch(&mut groups[index], revision);
        let mut upper = Group { start: hash, ..groups[index].clone() };
        touch(&mut upper, revision);
        let place = groups.partition_point(|group| group.start < hash);
        groups.insert(place, upper);
    }

    /// `id` has joined over a disk that was written by `formerly`: where one of
    /// these was among the last holders of a lost group, the group goes on with it.
    fn find_again(&mut self, formerly: &[Identity], lineage: &[Start], id: &Identity) {
        let wrote_it = |holder: &Holder| {
            let is_known = holder.start.is_some_and(|start| lineage.contains(&start));
            formerly.contains(&holder.id) && is_known
        };
        let View { groups, revision, .. } = &mut self.view;
        for group in groups.iter_mut().filter(|group| group.is_lost()) {
            if group.held_by.iter().any(wrote_it) {
                touch(group, revision);
                group.primary = Some(id.clone());
                group.replicas.insert(0, Seat::new(id.clone(), group.version));
                group.ready = vec![id.clone()];
                group.held_by.clear();
            }
        }
    }

    /// Takes `gone` out of the group at `index`.
    fn go_on_without(&mut self, index: usize, gone: &[Member]) {
        let target = self.view.target_of(self.view.groups[index].start);
        let View { groups, revision, .. } = &mut self.view;
        let group = &mut groups[index];
        let is_gone = |id: &Identity| gone.iter().any(|member| member.id == *id);
        if !group.replicas.iter().any(|seat| is_gone(&seat.id)) {
            return;
        }
        touch(group, revision);
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
        if group.is_lost() {
            return;
        }
        if group.ready.is_empty() {
            group.primary = None;
            // One set aside may not know yet that it leads no more: it has to follow whoever
            // leads next.
            group.replicas.retain(|seat| seat.aside);
            group.held_by = holders;
        } else if group.primary.as_ref().is_some_and(is_gone) {
            promote(group, &target);
        }
    }

    /// Takes every group as far towards its target as can be without hearing
    /// from its replicas again, and lets those go that were to leave and hold
    /// nothing any more.
    fn advance(&mut self) {
        let stuck = self.view.members.iter().filter(|member| member.full && member.leaving);
        let stuck: Vec<Identity> = stuck.map(|member| member.id.clone()).collect();
        for index in 0..self.view.groups.len() {
            let target = self.view.target_of(self.view.groups[index].start);
            let View { groups, revision, .. } = &mut self.view;
            let group = &mut groups[index];
            let next = Revision(revision.0 + 1);
            let has_changed = set_aside(group, &target, &stuck);
            if next_step(group, &target, next) || has_changed {
                touch(group, revision);
            }
        }
        while let Some(index) = self.view.first_divided() {
            self.merge_with_next(index);
        }
        let holds = |id: &Identity| self.view.groups.iter().any(|group| group.seats(id));
        let leaving =
            self.view.members.iter().filter(|member| member.leaving && !holds(&member.id));
        let leaving: Vec<_> = leaving.map(|member| member.id.clone()).collect();
        self.expel(&leaving);
    }

    /// Makes one group of the one at `index` and the next one around the ring. Both
    /// have the same replicas, all of them ready.
    fn merge_with_next(&mut self, index: usize) {
        let View { groups, revision, .. } = &mut self.view;
        let next = groups[(index + 1) % groups.len()].clone();
        let group = &mut groups[index];
        touch(group, revision);
        for seat in &mut group.replicas {
            let other = next.seat(&seat.id).map_or(seat.since, |other| other.since);
            seat.since = seat.since.max(other);
        }
        groups.retain(|group| group.start != next.start);
    }
}

fn is_of_version(group: &Group, start: Point, version: Revision) -> bool {
    group.start == start && group.version == version
}

fn can_be_ready(group: &Group, id: &Identity) -> bool {
    group.seat(id).is_some_and(|seat| !seat.aside && !group.ready.contains(id))
}

fn can_be_established(group: &Group, id: &Identity) -> bool {
    group.primary.as_ref() == Some(id) && !group.established
}

/// Gives `group` a version that is the next `revision`, and which its primary has
/// yet to establish.
fn touch(group: &mut Group, revision: &mut Revision) {
    revision.0 += 1;
    group.version = *revision;
    group.established = false;
}

/// Makes a ready replica the primary, one of `target` if there is one.
fn promote(group: &mut Group, target: &[Identity]) {
    let heir = target.iter().find(|id| group.ready.contains(id));
    group.primary = heir.or(group.ready.first()).cloned();
}

/// Sets those of the `stuck` aside that `group` can do without: they are to leave
/// and can store nothing, so whatever waits for them would wait for ever. Returns
/// whether there were any.
fn set_aside(group: &mut Group, target: &[Identity], stuck: &[Identity]) -> bool {
    let is_stuck = |id: &Identity| stuck.contains(id) && !target.contains(id);
    if group.ready.iter().all(is_stuck) || !group.ready.iter().any(is_stuck) {
        return false;
    }
    group.ready.retain(|id| !is_stuck(id));
    for seat in group.replicas.iter_mut().filter(|seat| is_stuck(&seat.id)) {
        seat.aside = true;
    }
    if group.primary.as_ref().is_some_and(is_stuck) {
        promote(group, target);
    }
    // What was established was the version before this one.
    group.established = false;
    true
}

/// One step of `group` towards `target`, which makes it `version`; whether
/// there was one to take.
fn next_step(group: &mut Group, target: &[Identity], version: Revision) -> bool {
    if group.is_lost() {
        return false;
    }
    let before = group.replicas.len();
    let Group { replicas, ready, established, .. } = group;
    replicas.retain(|seat| match seat.aside {
        // It may have been the primary: it stays until it has stopped.
        true => !*established,
        false => target.contains(&seat.id) || ready.contains(&seat.id),
    });
    let mut changed = group.replicas.len() != before;
    for id in target {
        if !group.seats(id) {
            group.replicas.push(Seat::new(id.clone(), version));
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
