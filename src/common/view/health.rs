//! The cluster at a glance, for people.

use super::messages::{ArcHealth, Health, Okay, ServerHealth};
use super::{Dialect, Group, View};
use crate::wire::Identity;

impl View {
    /// Whether the group at `index` is exactly its target, led by the arc's
    /// owner, with all replicas ready.
    pub fn is_complete(&self, index: usize) -> bool {
        let group = &self.groups[index];
        let mut target = self.target_of(group.start);
        let led_by_owner = group.primary.as_ref() == target.first();
        let mut ready = group.ready.clone();
        let mut replicas: Vec<_> = group.replicas.iter().map(|seat| seat.id.clone()).collect();
        for list in [&mut target, &mut ready, &mut replicas] {
            list.sort_unstable();
        }
        led_by_owner && group.established && ready == target && replicas == target
    }

    /// How everybody is. `lease_left_ms` tells how much longer a lease runs.
    pub fn health(&self, lease_left_ms: impl Fn(&Identity) -> u64) -> Health {
        let servers = self.members.iter().map(|member| {
            let notes = [
                (member.leaving, "leaving"),
                (member.full, "full"),
                (member.dialect == Dialect::Original, "original"),
            ];
            let leads = |group: &&Group| group.primary.as_ref() == Some(&member.id);
            ServerHealth {
                address: member.address,
                hash: member.hash,
                lease_left_ms: lease_left_ms(&member.id),
                primary_of: self.groups.iter().filter(leads).count(),
                replica_of: self.groups.iter().filter(|group| group.seats(&member.id)).count(),
                notes: notes.iter().filter(|(is, _)| *is).map(|(_, note)| (*note).into()).collect(),
            }
        });
        let mut health = Health {
            status: Okay::Ok,
            epoch: self.epoch,
            revision: self.revision,
            servers: servers.collect(),
            arcs: self.groups.len(),
            complete: 0,
            short: Vec::new(),
            moving: Vec::new(),
            lost: Vec::new(),
            restoring: self.restoring.as_ref().map(|it| it.backup.clone()),
            viewleaders: Vec::new(),
        };
        for (index, group) in self.groups.iter().enumerate() {
            let arc = self.arc_health(index);
            if group.is_lost() {
                health.lost.push(arc);
            } else if arc.ready < arc.target {
                health.short.push(arc);
            } else if !self.is_complete(index) {
                health.moving.push(arc);
            } else {
                health.complete += 1;
            }
        }
        health
    }

    fn arc_health(&self, index: usize) -> ArcHealth {
        let (group, arc) = (&self.groups[index], self.arc(index));
        let unready = group.replicas.iter().filter(|seat| !group.ready.contains(&seat.id));
        let unready = unready.filter_map(|seat| self.member(&seat.id)).map(|member| member.address);
        let held = group.held_by.iter().map(|holder| holder.address);
        ArcHealth {
            arc: (arc.start, arc.end),
            ready: group.ready.len(),
            target: self.target_of(group.start).len(),
            waits_for: unready.chain(held).collect(),
        }
    }
}
