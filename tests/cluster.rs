//! Whole clusters of real programs: many keys, many clients, servers that die
//! and servers that join.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic; it has a clock, sockets and threads"
)]

mod support;

use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};
use support::keys::{
    assert_readable, getr, keys_of, pipelined, place, setr, value_of, wait_until_placed,
};
use support::process::{PATIENCE, Program, wait_until};
use support::systems::{Listing, our_viewleader, view_of, wait_until_at_rest};
use support::traffic::Traffic;
use support::wire::{Connection, Reply, call, frame};
use tempfile::TempDir;

// ---- a cluster ----

/// A viewleader and servers that come and go.
struct Cluster {
    viewleader: Program,
    leader: SocketAddrV4,
    servers: Vec<(SocketAddrV4, Program)>,
    /// The servers' leases, in seconds: how soon a failure is noticed.
    lease: f64,
    started: usize,
    data: TempDir,
}

impl Cluster {
    /// Starts `count` servers, all together, and waits until they are at rest.
    fn start(count: usize, lease: f64) -> Self {
        let data = tempfile::tempdir().unwrap();
        let mut viewleader = our_viewleader(0);
        let leader = viewleader.listening();
        let mut cluster = Self { viewleader, leader, servers: Vec::new(), lease, started: 0, data };
        let mut programs: Vec<Program> = (0..count).map(|_| cluster.new_server()).collect();
        let addresses: Vec<_> = programs.iter_mut().map(Program::listening).collect();
        cluster.servers = addresses.into_iter().zip(programs).collect();
        cluster.wait_until_at_rest();
        cluster
    }

    fn new_server(&mut self) -> Program {
        self.started += 1;
        let folder = self.data.path().join(format!("server-{}", self.started));
        let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
        command.args(["--listen", "127.0.0.1:0", "--viewleader", &self.leader.to_string()]);
        command.args(["--lease", &self.lease.to_string()]).arg("--data-dir").arg(folder);
        Program::start("server", &mut command)
    }

    /// Starts one more server and waits until it is in and all is at rest.
    fn add(&mut self) -> SocketAddrV4 {
        let mut program = self.new_server();
        let address = program.listening();
        self.servers.push((address, program));
        self.wait_until_at_rest();
        address
    }

    /// Kills the server at `address`, at once.
    fn kill(&mut self, address: SocketAddrV4) {
        let index = self.servers.iter().position(|(server, _)| *server == address).unwrap();
        let (_, program) = self.servers.remove(index);
        program.signal("KILL");
        assert_eq!(program.finish(PATIENCE).code, None, "a signal was to end it");
    }

    fn wait_until_at_rest(&self) {
        wait_until_at_rest(self.leader, self.servers.len());
    }

    fn addresses(&self) -> Vec<SocketAddrV4> {
        self.servers.iter().map(|(address, _)| *address).collect()
    }

    /// Nobody has ended, panicked, or been put out for no reason.
    fn assert_sound(&mut self) {
        let servers = self.servers.iter_mut().map(|(_, server)| server);
        for program in servers.chain([&mut self.viewleader]) {
            program.assert_running();
            let said = program.stderr();
            assert!(!said.contains("panicked") && !said.contains("joining again"), "{said}");
        }
    }
}

/// Waits until every key is on exactly the servers that the rule names, and
/// returns all keys.
fn assert_placed(cluster: &Cluster) -> BTreeSet<String> {
    let listing = Listing::of(cluster.leader).unwrap();
    assert_eq!(listing.servers.len(), cluster.servers.len());
    wait_until_placed(cluster.leader)
}

/// Asks every server for every key.
fn assert_readable_everywhere<'a>(
    cluster: &Cluster,
    keys: impl Iterator<Item = &'a String> + Clone + Send,
) {
    assert_readable(&cluster.addresses(), keys);
}

// ---- the tests ----

/// Writes ten thousand keys over four connections, each to another server, and
/// finds each of them on its three servers and from every server.
fn ten_thousand_keys_on(count: usize) {
    const KEYS: usize = 10_000;
    let mut cluster = Cluster::start(count, 4.0);
    let keys: Vec<String> = (0..KEYS).map(|number| format!("key {number}")).collect();
    let addresses = cluster.addresses();
    thread::scope(|scope| {
        for (part, address) in keys.chunks(KEYS / 4).zip(addresses.iter().step_by(count / 4)) {
            scope.spawn(move || {
                let requests = part.iter().map(|key| setr(key, &value_of(key)));
                for (key, reply) in part.iter().zip(pipelined(*address, requests)) {
                    assert_eq!(reply["status"], "ok", "{key} through {address}: {reply}");
                }
            });
        }
    });
    let placed = assert_placed(&cluster);
    assert!(keys.iter().collect::<BTreeSet<_>>() == placed.iter().collect());
    let copies: usize = addresses.iter().map(|address| keys_of(*address).len()).sum();
    assert_eq!(copies, 3 * KEYS);
    assert_readable_everywhere(&cluster, keys.iter());
    cluster.assert_sound();
}

#[test]
fn ten_thousand_keys_on_five_servers_are_each_on_three_and_readable_from_all() {
    ten_thousand_keys_on(5);
}

#[test]
fn ten_thousand_keys_on_twelve_servers_are_each_on_three_and_readable_from_all() {
    ten_thousand_keys_on(12);
}

/// A value and its version, from the server at `address`.
fn read(key: &str, address: SocketAddrV4) -> Option<(String, (u64, u64))> {
    let reply = call(address, &getr(key)).value();
    Some((reply["value"].as_str()?.to_owned(), version_in(&reply)))
}

/// Versions are told as in "7.42", and later ones are greater.
fn version_in(reply: &Value) -> (u64, u64) {
    let version = reply["version"].as_str().unwrap_or_else(|| panic!("no version: {reply}"));
    let (group, number) = version.split_once('.').unwrap();
    (group.parse().unwrap(), number.parse().unwrap())
}

#[test]
fn fifty_clients_that_write_one_key_are_all_answered_and_every_replica_keeps_the_last() {
    const CLIENTS: usize = 50;
    const ROUNDS: usize = 4;
    let mut cluster = Cluster::start(3, 1.0);
    let addresses = cluster.addresses();
    let together = Barrier::new(CLIENTS);
    let writes: BTreeMap<(u64, u64), String> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (together, address) = (&together, addresses[client % addresses.len()]);
                scope.spawn(move || {
                    let mut connection = Connection::open(address).unwrap();
                    let rounds = (0..ROUNDS).map(|round| {
                        together.wait();
                        let value = format!("from {client} in {round}");
                        let reply = connection.call(&setr("contended", &value)).value();
                        assert_eq!(reply["status"], "ok", "{value}: {reply}");
                        (version_in(&reply), value)
                    });
                    rounds.collect::<Vec<_>>()
                })
            })
            .collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(writes.len(), CLIENTS * ROUNDS, "no two writes have the same version");
    let (version, value) = writes.last_key_value().unwrap();
    let last = Some((value.clone(), *version));
    for address in &addresses {
        assert_eq!(read("contended", *address), last, "at {address}");
        let plain = call(*address, &json!({"cmd": "get", "key": "contended"})).value();
        assert_eq!(plain["value"], *value);
    }
    cluster.assert_sound();
    // A read is answered by the primary alone, from its own copy. All three are
    // replicas: whoever takes over shows its copy.
    for left in [2, 1] {
        let primary = primary_of("contended", &cluster);
        cluster.kill(primary);
        let survivor = cluster.servers[0].0;
        let found = wait_until("another replica serves", PATIENCE, || read("contended", survivor));
        assert_eq!(found.0, *value, "with {left} replicas left");
        cluster.wait_until_at_rest();
        assert_ne!(primary_of("contended", &cluster), primary);
    }
    assert_eq!(read("contended", cluster.servers[0].0), last, "at the last one");
}

/// Which server leads the group of `key`, by the view.
fn primary_of(key: &str, cluster: &Cluster) -> SocketAddrV4 {
    wait_until("the group has a primary", PATIENCE, || {
        let view = view_of(cluster.leader)?;
        let point = place(key);
        let above = view.groups.partition_point(|group| u64::from(group.start.number()) <= point);
        let group = &view.groups[above.checked_sub(1).unwrap_or(view.groups.len() - 1)];
        Some(view.member(group.primary.as_ref()?)?.address)
    })
}

/// Writes through every server until each has answered well for keys from all
/// around the ring.
fn assert_goes_on(cluster: &Cluster, round: &str) {
    let began = Instant::now();
    for number in 0..100 {
        let address = cluster.servers[number % cluster.servers.len()].0;
        let key = format!("after {round} {number}");
        wait_until("writes are served again", PATIENCE, || {
            let reply = call(address, &setr(&key, &value_of(&key))).value();
            (reply["status"] == "ok").then_some(())
        });
    }
    let interruption = began.elapsed();
    assert!(interruption < Duration::from_secs(20), "interrupted for {interruption:?}");
}

#[test]
fn a_server_that_is_killed_among_readers_and_writers_takes_no_acknowledged_write_with_it() {
    let mut cluster = Cluster::start(5, 1.0);
    let traffic = Traffic::start(cluster.addresses());
    traffic.wait_for_writes(200);

    // The first writer's own server: it has to find another one.
    let victim = cluster.servers[0].0;
    traffic.expect_gone(victim);
    cluster.kill(victim);
    assert_goes_on(&cluster, "the failure");
    traffic.wait_for_writes(200);
    cluster.wait_until_at_rest();
    assert_eq!(cluster.servers.len(), 4);
    assert_readable_everywhere(&cluster, traffic.acknowledged().iter());

    let joined = cluster.add();
    traffic.use_servers(cluster.addresses());
    assert_goes_on(&cluster, "the join");
    traffic.wait_for_writes(200);

    let outcome = traffic.end();
    assert_readable_everywhere(&cluster, outcome.acknowledged.iter());
    let placed = assert_placed(&cluster);
    let share = keys_of(joined).len();
    assert!(share > 0, "the new server has got nothing of {}", placed.len());
    outcome.assert_explains(&placed);
    cluster.assert_sound();
}

#[test]
fn two_of_seven_servers_that_are_killed_at_once_take_no_acknowledged_write_with_them() {
    let mut cluster = Cluster::start(7, 1.0);
    let traffic = Traffic::start(cluster.addresses());
    traffic.wait_for_writes(200);
    // Next to each other on the ring: some keys are left with one replica.
    let listing = Listing::of(cluster.leader).unwrap();
    let victims = [listing.servers[2].0, listing.servers[3].0];
    victims.iter().for_each(|victim| traffic.expect_gone(*victim));
    victims.iter().for_each(|victim| cluster.kill(*victim));
    assert_goes_on(&cluster, "the failures");
    traffic.wait_for_writes(200);
    cluster.wait_until_at_rest();
    let outcome = traffic.end();
    assert_readable_everywhere(&cluster, outcome.acknowledged.iter());
    outcome.assert_explains(&assert_placed(&cluster));
    cluster.assert_sound();
}

#[test]
fn a_primary_that_slept_for_longer_than_its_lease_answers_nothing_old() {
    let mut cluster = Cluster::start(3, 1.0);
    let sleeper = primary_of("k", &cluster);
    let other = cluster.addresses().into_iter().find(|address| *address != sleeper).unwrap();
    assert_eq!(call(other, &setr("k", "old")).value()["status"], "ok");
    let before = read("k", sleeper).unwrap();
    assert_eq!(before.0, "old");

    let program = cluster.servers.iter().find(|(address, _)| *address == sleeper);
    let (_, program) = program.unwrap();
    program.signal("STOP");
    wait_until("somebody else takes the write", PATIENCE, || {
        (call(other, &setr("k", "new")).value()["status"] == "ok").then_some(())
    });
    // It finds these questions first thing when it wakes up.
    let mut questions: Vec<Connection> = (0..20)
        .map(|_| {
            let mut connection = Connection::open(sleeper).unwrap();
            connection.send(&frame(getr("k").to_string().as_bytes()));
            connection
        })
        .collect();
    program.signal("CONT");
    for connection in &mut questions {
        if let Reply::Value(reply) = connection.receive() {
            let is_refused = reply["reason"] == "unavailable";
            assert!(is_refused || reply["value"] == "new", "{reply}");
        }
    }
    // It comes back, as a new one that holds what the others hold.
    cluster.wait_until_at_rest();
    assert_placed(&cluster);
    for address in cluster.addresses() {
        let (value, version) = read("k", address).unwrap();
        assert!(value == "new" && version > before.1, "{value} at {address}");
    }
    for (_, program) in &mut cluster.servers {
        program.assert_running();
        assert!(!program.stderr().contains("panicked"));
    }
}

#[test]
fn servers_that_join_one_by_one_among_readers_and_writers_lose_and_refuse_nothing() {
    let mut cluster = Cluster::start(3, 4.0);
    let traffic = Traffic::start(cluster.addresses());
    for _ in 3..6 {
        traffic.wait_for_writes(100);
        cluster.add();
        traffic.use_servers(cluster.addresses());
    }
    traffic.wait_for_writes(100);
    let outcome = traffic.end();
    assert_readable_everywhere(&cluster, outcome.acknowledged.iter());
    let placed = assert_placed(&cluster);
    outcome.assert_explains(&placed);
    // Reads and writes go on meanwhile: a join is no reason to refuse one.
    assert_eq!(outcome.in_doubt, BTreeSet::new(), "writes with an unknown outcome");
    assert_eq!(outcome.refused, Vec::<String>::new(), "operations that were refused");
    cluster.assert_sound();
}
