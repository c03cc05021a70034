//! What counts as written is where it must be.
//!
//! The protocol's invariant (PacificA's) is
//! committed(secondary) ⊆ committed(primary) ⊆ prepared(every replica). Seen from
//! outside: whatever a client was told, and whatever any replica of the group takes
//! for committed, or would if it started again over its disk, is on the disk of every
//! replica that the viewleader counts as ready, in that version or in a newer one; on the
//! disk of a dead one, too, as long as the viewleader counts on it. A deletion may be
//! forgotten: of what is not newer than a deletion of which nobody knows that it was not
//! made, nothing is enough, and only an older version is too little.

use crate::kv::Version;
use crate::kv::ring::Point;
use crate::sim::cluster::Cluster;
use crate::sim::linearizability::Outcome;
use crate::view::View;
use crate::wire::Identity;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// What is known of the deletions of a key.
#[derive(Debug, Default)]
struct Deletions {
    /// How many have begun of which the end is not known.
    open: usize,
    /// The newest that was made.
    newest: Option<Version>,
}

/// Watches where copies are.
#[derive(Debug, Default)]
pub struct Copies {
    /// The newest version of each key that a client was shown.
    shown: BTreeMap<String, Version>,
    /// The keys that were ever to be deleted: one that is not there may be forgotten.
    deleted: BTreeMap<String, Deletions>,
    /// Whose disks are lost: nobody expects anything of them.
    lost: BTreeSet<Identity>,
}

impl Copies {
    /// A client was shown `version` of the key.
    pub fn shown(&mut self, key: &str, version: Version) {
        let newest = self.shown.entry(key.to_owned()).or_default();
        *newest = version.max(*newest);
    }

    /// Somebody begins to delete the key.
    pub fn deletes(&mut self, key: &str) {
        self.deleted.entry(key.to_owned()).or_default().open += 1;
    }

    /// What came of that; nothing, when nobody knows.
    pub fn deleted(&mut self, key: &str, outcome: Option<&Outcome>) {
        let deletions = self.deleted.entry(key.to_owned()).or_default();
        match outcome {
            None | Some(Outcome::Done { version: None }) => return,
            Some(Outcome::Done { version }) => deletions.newest = deletions.newest.max(*version),
            Some(_) => {}
        }
        deletions.open = deletions.open.saturating_sub(1);
    }

    /// The disk is lost, or part of it: nothing is expected of those who have written
    /// to it.
    pub fn lost(&mut self, cluster: &Cluster, disk: usize) {
        self.lost.extend(cluster.writers_of(disk).cloned());
    }

    /// Whether what this server has stored is still there.
    pub fn is_whole(&self, id: &Identity) -> bool {
        !self.lost.contains(id)
    }

    /// Looks at every copy of the key.
    ///
    /// # Errors
    /// When a ready replica has not what counts as written.
    pub fn look(&self, cluster: &Cluster, key: &str) -> Result<(), String> {
        let view = cluster.view();
        let Some(index) = view.group_at(Point::of(key)) else { return Ok(()) };
        let group = &view.groups[index];
        let (mut needed, mut why) = (self.shown.get(key).copied(), "a client was told".to_owned());
        for seat in &group.replicas {
            let Some(server) = cluster.server_of(&seat.id) else { continue };
            let committed = cluster.committed(server, key);
            if committed > needed {
                needed = committed;
                why = format!("{} takes it for committed", cluster.names.of(&seat.id));
            }
            let disk = cluster.disk(server);
            if cluster.stored_version(disk, key) > needed
                && let Some(sealed) = cluster.sealed_version(disk, key, seat.since)
            {
                needed = Some(sealed);
                why = format!("{} would after a restart", cluster.names.of(&seat.id));
            }
        }
        // Whoever has been let in again says that its disk is whole, be it a copy.
        let disk_of = |id: &Identity| match cluster.server_of(id) {
            Some(server) if cluster.is_leased(server) => Some(cluster.disk(server)),
            _ => cluster.disk_of(id).filter(|_| self.is_whole(id)),
        };
        let lacks = |id: &&Identity| {
            let may_be_gone =
                self.deleted.get(key).is_some_and(|it| it.open > 0 || needed <= it.newest);
            disk_of(id).is_some_and(|disk| match cluster.stored_version(disk, key) {
                None => needed.is_some() && !may_be_gone,
                stored => stored < needed,
            })
        };
        match (needed, group.ready.iter().find(lacks)) {
            (Some(needed), Some(id)) => {
                let has = disk_of(id).and_then(|disk| cluster.stored_version(disk, key));
                let has = has.map_or("nothing".to_owned(), |version| version.to_string());
                Err(format!(
                    "{} is ready for {key} and has {has} on its disk; {why} of {needed}",
                    cluster.names.of(id)
                ))
            }
            _ => Ok(()),
        }
    }

    /// Looks at every copy of the key in a cluster at rest, where it was read as
    /// `found`, in that version.
    ///
    /// # Errors
    /// When it is not on exactly its target, in memory and on the disk.
    pub fn census(
        &self,
        cluster: &mut Cluster,
        key: &str,
        found: Option<&(String, Value)>,
    ) -> Result<(), String> {
        let target = target_of(cluster.view(), Point::of(key));
        for server in (0..cluster.servers()).filter(|at| cluster.is_alive(*at)).collect::<Vec<_>>()
        {
            let is_target = cluster.identity(server).is_some_and(|id| target.contains(id));
            let wanted = found.filter(|_| is_target);
            let is_listed = cluster.lists(server, key);
            let committed = cluster.committed(server, key).map(|version| version.to_string());
            let stored = cluster.stored(cluster.disk(server));
            let stored = stored.entries.iter().find(|(_, entry)| *entry.key == *key);
            let stored = stored.and_then(|(_, entry)| {
                Some((entry.version.to_string(), Value::from(&**entry.content.value.as_ref()?)))
            });
            // Of a deletion something may be left that says so.
            let is_of_it = wanted.is_none_or(|(version, _)| committed.as_ref() == Some(version));
            if is_listed != wanted.is_some() || stored.as_ref() != wanted || !is_of_it {
                let name = cluster.name_of(server);
                let listed = if is_listed { "lists" } else { "does not list" };
                return Err(format!(
                    "{name} {listed} {key}, takes {committed:?} for committed and has {stored:?} \
                     on its disk, not {wanted:?}"
                ));
            }
        }
        Ok(())
    }
}

/// Who is to have what is at `point` in a cluster at rest, reckoned without the product's own
/// rule: the member at the highest place not above it, or at the highest of all, and the
/// next two up the ring.
fn target_of(view: &View, point: Point) -> Vec<Identity> {
    let mut members: Vec<_> = view.members.iter().collect();
    members.sort_unstable_by_key(|member| member.hash);
    let (below, count) = (members.partition_point(|it| it.hash <= point), members.len());
    let owner = below.checked_sub(1).unwrap_or(count.saturating_sub(1));
    members.rotate_left(owner);
    members.iter().take(3).map(|member| member.id.clone()).collect()
}
