//! The lock service.

use super::super::etcd::{self, Etcd};
use super::super::load::Load;
use super::super::ours::{Cluster, Locker};
use super::super::programs::Daemon;
use super::{Effort, Figure, compare, measure};
use std::io;

/// More operations than one turn has time for.
const MANY: u64 = 100_000_000;

/// A lock is got and given back, durably, at three viewleaders: each client one of
/// its own, and all of them the same.
pub(crate) fn against_etcd(effort: &Effort) -> io::Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let cluster = Cluster::start(folder.path(), 3, 0, &[])?;
    let members = if effort.alone { Vec::new() } else { etcd::start(folder.path(), 3)? };
    let own = cluster.processes();
    let other: Vec<u32> = members.iter().map(Daemon::id).collect();
    let mut figures = Vec::new();
    let rows = [(1, false, 2.0), (50, false, 4.0), (20, true, 10.0)];
    for (clients, contended, to_reach) in rows {
        let load = Load::of(clients, MANY, effort.turn);
        let lock = |client: usize| {
            if contended { "door".to_owned() } else { format!("door {client}") }
        };
        let name = match (clients, contended) {
            (clients, true) => format!("one lock, {clients} clients"),
            (1, false) => "lock and release, 1 client".to_owned(),
            (clients, false) => format!("lock and release, {clients} clients"),
        };
        figures.extend(compare(
            name,
            "etcd lock, unlock",
            to_reach,
            effort,
            || {
                let leader = cluster.leader()?;
                measure(load, &own, |client| {
                    Locker::connect(leader, lock(client), &format!("client {client}"))
                })
            },
            || {
                measure(load, &other, |client| {
                    let member = &members[client % members.len()];
                    Etcd::connect(member.address, etcd::Ask::Lock(lock(client)), 1)
                })
            },
        )?);
    }
    Ok(figures)
}
