//! Whole clusters of real programs: many keys, many clients, servers that die
//! and servers that join.
//!
//! Which server must hold which key is worked out here from the page on the
//! original, not with the project's own ring, so that a fault there can't hide
//! itself.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic; it has a clock, sockets and threads"
)]

mod support;
#[path = "cluster/traffic.rs"]
mod traffic;

use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;
use support::process::{PATIENCE, Program, wait_until, within};
use support::systems::{Listing, our_viewleader, view_of, wait_until_at_rest};
use support::wire::{Connection, call, frame};
use tempfile::TempDir;
use traffic::Traffic;

/// How many requests are under way on one connection.
const WINDOW: usize = 250;

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

// ---- the rule of the reference ----

/// Where `text` stands on the ring: its SHA-1 as an integer, modulo 10000.
fn place(text: &str) -> u64 {
    Sha1::digest(text).iter().fold(0, |rest, byte| (rest * 256 + u64::from(*byte)) % 10_000)
}

/// The replicas of `key`: the server with the highest hash not above the key's,
/// else the one with the highest of all, and the next two in ascending order.
fn replicas_of(key: &str, listing: &Listing) -> BTreeSet<SocketAddrV4> {
    let (servers, point) = (&listing.servers, place(key));
    let owner = servers.iter().rposition(|(_, hash)| *hash <= point);
    let owner = owner.unwrap_or(servers.len() - 1);
    (0..servers.len().min(3)).map(|step| servers[(owner + step) % servers.len()].0).collect()
}

/// The keys that the server at `address` lists, each of them once.
fn keys_of(address: SocketAddrV4) -> BTreeSet<String> {
    let reply = call(address, &json!({"cmd": "query_all_keys"})).value();
    let listed = reply["result"].as_array().unwrap();
    let keys: BTreeSet<String> =
        listed.iter().map(|key| key.as_str().unwrap().to_owned()).collect();
    assert_eq!(keys.len(), listed.len(), "{address} lists a key twice");
    keys
}

/// Waits until every key is on exactly the servers that the rule names, and
/// returns all keys. (A replica hears that a write is committed a moment after
/// the client does.)
fn assert_placed(cluster: &Cluster) -> BTreeSet<String> {
    let listing = Listing::of(cluster.leader).unwrap();
    assert!(listing.servers.is_sorted_by_key(|(_, hash)| *hash));
    assert_eq!(listing.servers.len(), cluster.servers.len());
    let mut wrong = String::new();
    let placed = within(PATIENCE, || {
        let held: BTreeMap<_, _> =
            cluster.addresses().into_iter().map(|at| (at, keys_of(at))).collect();
        let all: BTreeSet<String> = held.values().flatten().cloned().collect();
        let misplaced = all.iter().find_map(|key| {
            let due = replicas_of(key, &listing);
            let found: BTreeSet<_> =
                held.iter().filter(|(_, keys)| keys.contains(key)).map(|(at, _)| *at).collect();
            (due != found).then(|| format!("{key}: due at {due:?}, found at {found:?}"))
        });
        match misplaced {
            None => Some(all),
            Some(key) => {
                wrong = key;
                None
            }
        }
    });
    placed.unwrap_or_else(|| panic!("not where it must be: {wrong}"))
}

// ---- many calls ----

fn setr(key: &str, value: &str) -> Value {
    json!({"cmd": "setr", "key": key, "val": value, "direct": true})
}

fn getr(key: &str) -> Value {
    json!({"cmd": "getr", "key": key})
}

/// What is written under `key`, where it does not matter what.
fn value_of(key: &str) -> String {
    format!("the value of {key}")
}

/// Sends `requests` to `address`, many at a time, and returns the answers.
fn pipelined(address: SocketAddrV4, requests: impl Iterator<Item = Value>) -> Vec<Value> {
    let mut connection = Connection::open(address).unwrap();
    let requests: Vec<Value> = requests.collect();
    let mut replies = Vec::with_capacity(requests.len());
    for window in requests.chunks(WINDOW) {
        let frames = window.iter().flat_map(|request| frame(request.to_string().as_bytes()));
        connection.send(&frames.collect::<Vec<u8>>());
        replies.extend(window.iter().map(|_| connection.receive().value()));
    }
    replies
}

/// Asks every server for every key.
fn assert_readable_everywhere<'a>(
    cluster: &Cluster,
    keys: impl Iterator<Item = &'a String> + Clone + Send,
) {
    thread::scope(|scope| {
        for address in cluster.addresses() {
            let keys = keys.clone();
            scope.spawn(move || {
                let replies = pipelined(address, keys.clone().map(|key| getr(key)));
                for (key, reply) in keys.zip(replies) {
                    assert_eq!(reply["value"], value_of(key), "{key} from {address}: {reply}");
                }
            });
        }
    });
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
    let mut cluster = Cluster::start(5, 1.0);
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
    // A read is answered by the primary alone; whoever takes over shows its copy.
    for _ in 0..2 {
        let listing = Listing::of(cluster.leader).unwrap();
        let replicas = replicas_of("contended", &listing);
        let primary = primary_of("contended", &cluster);
        assert!(replicas.contains(&primary));
        cluster.kill(primary);
        let heir = wait_until("another replica serves", PATIENCE, || {
            let (found, _) = read("contended", cluster.servers[0].0)?;
            assert_eq!(found, *value, "after {primary} has gone");
            Some(primary_of("contended", &cluster))
        });
        assert!(replicas.contains(&heir) && heir != primary, "{heir} was no replica");
        cluster.wait_until_at_rest();
    }
    assert_placed(&cluster);
    for address in cluster.addresses() {
        assert_eq!(read("contended", address).unwrap().0, *value, "at {address}");
    }
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
    let began = std::time::Instant::now();
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
