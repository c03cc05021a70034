//! What an observer may see of a server from outside: for oracles, which judge
//! what it does and take no part in it.

use super::Server;
use crate::kv::Version;
use crate::kv::ring::{Arc, Point};
use crate::machine::Time;
use crate::view::Revision;

impl<T> Server<T> {
    /// The arcs for which it takes itself for the primary, and would answer reads
    /// while its lease is live.
    pub fn serves(&self) -> impl Iterator<Item = Arc> {
        self.replicas.values().filter(|replica| replica.is_serving()).map(|replica| replica.arc)
    }

    /// Until when it takes its lease for live.
    pub fn leased_until(&self) -> Time {
        self.leased_until
    }

    /// The version of `key` that it takes for committed, if there is one.
    pub fn committed(&self, key: &str) -> Option<Version> {
        self.table.get(Point::of(key), key).map(|held| held.version)
    }

    /// The revision of the view that it follows.
    pub fn revision(&self) -> Revision {
        self.view.revision
    }

    /// How many entries it holds prepared and does not know to be committed, in
    /// all of its groups.
    pub fn pending(&self) -> usize {
        self.replicas.values().map(|replica| replica.pending.len()).sum()
    }
}
