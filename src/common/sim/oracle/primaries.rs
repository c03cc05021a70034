//! No two servers serve one arc at one moment of true time.

use crate::kv::ring::{Arc, Point};
use crate::machine::Time;
use crate::sim::cluster::Cluster;
use crate::sim::network::Party;
use std::collections::BTreeMap;

/// Watches who serves what.
#[derive(Debug, Default)]
pub struct Primaries {
    /// What each server served when it was looked at last, and until when.
    serving: BTreeMap<usize, (Vec<Arc>, Time)>,
}

impl Primaries {
    /// Looks at the server, which has just been stepped.
    ///
    /// # Errors
    /// When it serves what another one serves as well.
    pub fn look(&mut self, cluster: &Cluster, server: usize) -> Result<(), String> {
        let (serves, until) = cluster.serves(server);
        let known = self.serving.get(&server);
        if known.is_some_and(|known| known.0 == serves && known.1 == until) {
            return Ok(());
        }
        for other in (0..cluster.servers()).filter(|other| *other != server) {
            for theirs in cluster.serves(other).0 {
                if let Some(ours) = serves.iter().find(|ours| overlap(**ours, theirs)) {
                    return Err(format!(
                        "{} serves {ours} while {} serves {theirs}",
                        cluster.name(Party::Server(server)),
                        cluster.name(Party::Server(other)),
                    ));
                }
            }
        }
        self.serving.insert(server, (serves, until));
        Ok(())
    }
}

fn overlap(one: Arc, other: Arc) -> bool {
    let has = |arc: Arc, point: Point| arc.contains(point);
    has(one, other.start) || has(other, one.start)
}
