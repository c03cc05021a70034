//! What the viewleader does: `view/state.rs`, `view/leader/leases.rs`.

use super::super::{Bounds, Bug};
use super::{GroupVersion, Id, Member, Message, Node, State, View};

impl State {
    pub(super) fn touch(&mut self, change: impl FnOnce(&mut View, GroupVersion)) {
        let mut view = self.view().clone();
        view.established = false;
        change(&mut view, self.version() + 1);
        self.views.push(view);
    }

    pub(super) fn beat(&mut self, node: Node, bounds: &Bounds) {
        let id = self.server(node).id(node);
        let start = self.server(node).start;
        if self.is_denied(id) {
            // Denied for good: it comes as a new one, over the same disk.
            let server = self.server_mut(node);
            server.life += 1;
            server.age();
            (server.replica, server.seat) = (None, None);
            (server.joined, server.believes) = (false, false);
            return;
        }
        let may_change = self.views.len() <= usize::from(bounds.versions);
        match self.view().member(id).copied() {
            Some(member) if member.start != start => {
                if !may_change {
                    return;
                }
                // It was started again inside its lease: its groups get a new version.
                let renew = |view: &mut View| {
                    let members = view.members.iter_mut().filter(|member| member.id == id);
                    members.for_each(|member| member.start = start);
                };
                if self.view().seat(id).is_some() {
                    self.touch(|view, _| renew(view));
                } else {
                    renew(self.view_mut());
                }
            }
            Some(_) => {}
            None => {
                let formerly = Id { node, life: id.life - 1 };
                let found = self.view().held_by.contains(&formerly);
                if found && !may_change {
                    return;
                }
                self.view_mut().members.push(Member { id, start, leaving: false });
                self.view_mut().members.sort_unstable();
                if found {
                    // It was among the last that held the lost group.
                    self.touch(|view, version| {
                        view.primary = Some(id);
                        view.replicas = vec![(id, version)];
                        view.ready = vec![id];
                        view.held_by.clear();
                    });
                    self.found_again = true;
                }
            }
        }
        let version = self.version();
        let server = self.server_mut(node);
        if !server.joined {
            server.joined = true;
            server.not_before = server.not_before.max(version);
        }
        server.believes = true;
    }

    pub(super) fn expel(&mut self, nodes: &[Node], bounds: &Bounds, bug: Option<Bug>) {
        let view = self.view();
        let gone: Vec<Id> = view.members.iter().map(|member| member.id).collect();
        let gone: Vec<Id> = gone.into_iter().filter(|id| nodes.contains(&id.node)).collect();
        let concerned = view.replicas.iter().any(|(id, _)| gone.contains(id));
        for id in gone.iter().filter(|_| bug != Some(Bug::ExpelsBeforeTheLeaseEnds)) {
            let server = self.server_mut(id.node);
            server.believes &= server.life != id.life;
        }
        self.view_mut().members.retain(|member| !gone.contains(&member.id));
        if !concerned {
            return;
        }
        let target = self.view().target(bounds);
        self.touch(|view, version| {
            let holders = view.ready.iter().copied().filter(|id| gone.contains(id)).collect();
            view.replicas.retain(|(id, _)| !gone.contains(id));
            view.ready.retain(|id| !gone.contains(id));
            if view.ready.is_empty() {
                view.primary = None;
                view.replicas.clear();
                view.held_by = holders;
                if bug == Some(Bug::ServesALostArcEmpty) && !target.is_empty() {
                    view.primary = Some(target[0]);
                    view.replicas = vec![(target[0], version)];
                    view.ready = vec![target[0]];
                    view.held_by.clear();
                }
            } else if view.primary.is_some_and(|id| gone.contains(&id)) {
                let heir = target.iter().find(|id| view.ready.contains(id));
                view.primary = heir.or(view.ready.first()).copied();
            }
        });
        // In the view that is left behind they are still members.
        let before = self.views.len() - 2;
        let members = gone.iter().map(|&id| Member { id, start: 0, leaving: false });
        self.views[before].members.extend(members);
        self.views[before].members.sort_unstable();
    }

    pub(super) fn advance(&mut self, bounds: &Bounds, bug: Option<Bug>) {
        let target = self.view().target(bounds);
        let version = self.version() + 1;
        let mut view = self.view().clone();
        if view.primary.is_some() && next_step(&mut view, &target, version, bug) {
            view.established = false;
            self.views.push(view);
        }
        let view = self.view();
        let free = view.members.iter().filter(|m| m.leaving && view.seat(m.id).is_none());
        let free: Vec<Node> = free.map(|member| member.id.node).collect();
        if !free.is_empty() {
            self.expel(&free, bounds, bug);
        }
    }

    /// A report of how far the group is at this server.
    pub(super) fn report(&mut self, node: Node, bug: Option<Bug>) {
        let server = self.server(node);
        let id = server.id(node);
        let Some(replica) = server.replica.as_ref().filter(|_| server.up && server.joined) else {
            return;
        };
        let version = replica.version;
        if version == 0 {
            return;
        }
        let is_ready = replica.fetched || bug == Some(Bug::ReportsReadyBeforeItHasFetched);
        let counted = self.views[usize::from(version)].ready.contains(&id);
        let all = replica.fellows.len();
        let established = replica
            .primary
            .as_ref()
            .is_some_and(|primary| primary.serving && primary.following.len() == all);
        if is_ready && !counted {
            self.messages.insert(Message::Ready { id, version });
        }
        if established && !self.views[usize::from(version)].established {
            self.messages.insert(Message::Established { id, version });
        }
    }
}

/// One step of the group towards `target`, which makes it `version`.
fn next_step(view: &mut View, target: &[Id], version: GroupVersion, bug: Option<Bug>) -> bool {
    let before = view.replicas.len();
    let ready = view.ready.clone();
    view.replicas.retain(|(id, _)| target.contains(id) || ready.contains(id));
    let mut changed = view.replicas.len() != before;
    for &id in target {
        if view.seat(id).is_none() {
            view.replicas.push((id, version));
            changed = true;
        }
    }
    if !target.iter().all(|id| view.ready.contains(id)) {
        return changed;
    }
    if view.primary != target.first().copied() {
        view.primary = target.first().copied();
        if bug == Some(Bug::DropsTheSourceTooEarly) {
            view.replicas.retain(|(id, _)| target.contains(id));
            view.ready.retain(|id| target.contains(id));
        }
        return true;
    }
    if view.established && view.replicas.len() > target.len() {
        view.replicas.retain(|(id, _)| target.contains(id));
        view.ready.retain(|id| target.contains(id));
        changed = true;
    }
    changed
}
