//! What a failure costs, and what a start; and how much memory connections take.

use super::super::load::Client;
use super::super::ours::{Ask, Cluster, Connection, Kv};
use super::super::programs::memory;
use super::{Effort, Figure, Goal, key};
use ringleader::kv::ring::Point;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use std::io;
use std::time::{Duration, Instant};

/// The lease of the servers that are killed, in seconds.
const LEASE: f64 = 2.0;

/// How many keys a server has that starts again.
const KEYS: u64 = 1_000_000;

/// How many connections stand idle.
const CONNECTIONS: usize = 10_000;

/// How often a key is asked for.
const GLANCE: Duration = Duration::from_millis(2);

/// How long an arc may go without service before this gives up.
const PATIENCE: Duration = Duration::from_secs(60);

/// Kills the primary of a key with `kill -9` and asks for the key at another server
/// until it is there again, and can be written.
pub(crate) fn kill(effort: &Effort) -> io::Result<Vec<Figure>> {
    let name = "time without service after kill -9 of one server";
    if !effort.wants(name) {
        return Ok(Vec::new());
    }
    let mut gaps = Vec::new();
    for _ in 0..effort.rounds {
        let folder = tempfile::tempdir()?;
        let mut cluster = Cluster::start(folder.path(), 1, 4, &["--lease", &LEASE.to_string()])?;
        cluster.fill(100)?;
        let view = cluster.view()?;
        let victim = cluster.servers[0].address;
        let key = (0..100).map(key).find(|it| view.primary_of(Point::of(it)) == Some(victim));
        let key = key.ok_or_else(|| io::Error::other("a server without keys"))?;
        let mut other = Connection::open(cluster.servers[1].address)?;
        let victim = cluster.servers.remove(0);
        victim.signal("KILL");
        let killed = Instant::now();
        let set = json!({"cmd": "setr", "key": key, "val": "again", "direct": true});
        let get = json!({"cmd": "getr", "key": key});
        for request in [get, set] {
            while other.ask(&request)?["status"] != "ok" {
                if killed.elapsed() > PATIENCE {
                    return Err(io::Error::other("never served again"));
                }
                std::thread::sleep(GLANCE);
            }
        }
        gaps.push(killed.elapsed().as_secs_f64());
    }
    let against = format!("its lease of {LEASE} s, and 1 s");
    Ok(vec![Figure::single(name, against, gaps, "s", Goal::AtMost(LEASE + 1.0), "")])
}

/// Starts a server with many keys again.
pub(crate) fn recovery(effort: &Effort) -> io::Result<Vec<Figure>> {
    let name = format!("start with {KEYS} keys until the first read");
    if !effort.wants(&name) {
        return Ok(Vec::new());
    }
    let folder = tempfile::tempdir()?;
    let mut cluster = Cluster::start(folder.path(), 1, 1, &["--lease", "60"])?;
    cluster.fill(KEYS)?;
    let mut spans = Vec::new();
    for _ in 0..effort.rounds.min(3) {
        let begun = cluster.restart(0)?;
        let get = json!({"cmd": "getr", "key": key(KEYS - 1)});
        let mut server = Connection::open(cluster.servers[0].address)?;
        while server.ask(&get)?["status"] != "ok" {
            std::thread::sleep(GLANCE);
        }
        spans.push(begun.elapsed().as_secs_f64());
    }
    let note = "after kill -9";
    Ok(vec![Figure::single(name, "", spans, "s", Goal::AtMost(5.0), note)])
}

/// Connections that say nothing, and one more that is served.
pub(crate) fn idle(effort: &Effort) -> io::Result<Vec<Figure>> {
    let name = format!("{CONNECTIONS} idle connections on one server");
    if !effort.wants(&name) {
        return Ok(Vec::new());
    }
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit { current: limit.maximum, maximum: limit.maximum };
    setrlimit(Resource::Nofile, all)?;
    let folder = tempfile::tempdir()?;
    let cluster = Cluster::start(folder.path(), 1, 1, &["--lease", "60"])?;
    cluster.fill(100)?;
    let server = &cluster.servers[0];
    // Some are the cluster's own.
    let open = || Connection::open(server.address);
    let mut connections = (0..CONNECTIONS - 16).map(|_| open()).collect::<io::Result<Vec<_>>>()?;
    // Each has been served once: so all of its memory is there.
    for connection in &mut connections {
        connection.ask(&json!({"cmd": "getr", "key": key(1)}))?;
    }
    Kv::connect(&cluster.requests(Ask::Getr, 100)?)?.call(0, 1)?;
    let used = memory(server.id(), "VmRSS");
    Ok(vec![Figure::single(name, "memory", vec![used], "MiB", Goal::AtMost(500.0), "")])
}
