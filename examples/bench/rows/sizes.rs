//! How the cost of a read and of a write grows: with the keys, the servers, the
//! connections. Each size is compared with the smallest one, in turns.

use super::super::load::Load;
use super::super::ours::{Ask, Cluster, Kv, LONG_LEASE};
use super::kv::{KEYS, MANY, plural};
use super::{Effort, Figure, compare, measure};
use std::io;

/// How many servers there are, where that is not the question.
const SERVERS: usize = 3;

/// How many clients, likewise.
const CLIENTS: usize = 50;

/// By how much the keys grow.
const MORE_KEYS: [u64; 2] = [10, 100];

/// To how many servers the cluster grows.
const MORE_SERVERS: [usize; 2] = [6, 12];

/// How many clients are compared with [`CLIENTS`]; each has a connection to each server.
const OTHER_CLIENTS: [usize; 3] = [1, 200, 1_000];

/// What is asked, and how much of the rate of the smallest size is to be left. (A goal of
/// ours: all servers share the processors of one machine.)
const ASKED: [(Ask, &str, f64); 2] = [(Ask::Getr, "getr", 0.5), (Ask::Setr, "setr", 0.4)];

/// A cluster with so many keys in it.
struct Filled {
    cluster: Cluster,
    keys: u64,
    _folder: tempfile::TempDir,
}

impl Filled {
    fn new(servers: usize, keys: u64) -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        let lease = LONG_LEASE.to_string();
        let cluster = Cluster::start(folder.path(), 1, servers, &["--lease", &lease])?;
        cluster.fill(keys)?;
        Ok(Self { cluster, keys, _folder: folder })
    }
}

/// One size against another.
fn grown(
    what: &str,
    against: &str,
    effort: &Effort,
    (large, clients): (&Filled, usize),
    (small, fewer): (&Filled, usize),
) -> io::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (ask, word, to_reach) in ASKED {
        let side = |of: &Filled, clients: usize| {
            let requests = of.cluster.requests(ask, of.keys)?;
            let load = Load::of(clients, MANY, effort.turn);
            measure(load, &of.cluster.processes(), |_| Kv::connect(&requests))
        };
        figures.extend(compare(
            format!("growth: {word}, {what}"),
            against,
            // Fewer clients wait for their answers: at least their share of the rate.
            if clients < fewer { clients as f64 / fewer as f64 } else { to_reach },
            effort,
            || side(large, clients),
            || side(small, fewer),
        )?);
    }
    Ok(figures)
}

/// Keys, servers and connections, one after the other.
pub(crate) fn all(effort: &Effort) -> io::Result<Vec<Figure>> {
    let small = Filled::new(SERVERS, KEYS)?;
    let mut figures = Vec::new();
    for times in MORE_KEYS {
        let large = Filled::new(SERVERS, KEYS * times)?;
        let (what, against) = (format!("{} keys", large.keys), format!("{KEYS} keys"));
        figures.extend(grown(&what, &against, effort, (&large, CLIENTS), (&small, CLIENTS))?);
    }
    for servers in MORE_SERVERS {
        let large = Filled::new(servers, KEYS)?;
        let (what, against) = (format!("{servers} servers"), format!("{SERVERS} servers"));
        figures.extend(grown(&what, &against, effort, (&large, CLIENTS), (&small, CLIENTS))?);
    }
    for clients in OTHER_CLIENTS {
        let (what, against) = (plural(clients), plural(CLIENTS));
        figures.extend(grown(&what, &against, effort, (&small, clients), (&small, CLIENTS))?);
    }
    Ok(figures)
}
