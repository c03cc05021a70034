//! Data moves while servers come and go: nothing is lost, no more moves than
//! must, and it ends.
//!
//! With `RINGLEADER_LONG` set (`make test-long`) the tests take their full size.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic and tell; it has a clock, sockets and threads"
)]

mod support;

use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::keys::{
    assert_all, assert_readable, getr, keys_of, pairs, setr, value_of, wait_until_placed, write_all,
};
use support::nodes::{Nodes, is_long};
use support::process::{PATIENCE, run, wait_until};
use support::systems::{Listing, our_client, view_of};
use support::traffic::{Outcome, Traffic};
use support::wire::{Connection, Reply, call};

/// What a server counts for an entry beside its key and its value.
const ENVELOPE_BYTES: usize = 64;

/// The lease of servers that are to be killed.
const SHORT_LEASE: f64 = 1.0;

/// One of two sizes.
fn sized(ordinary: usize, long: usize) -> usize {
    if is_long() { long } else { ordinary }
}

/// How long a key may be unreadable, in the long form, which runs alone: the
/// lease and a second, and what a busy machine may add.
const LONGEST_GAP: Duration = Duration::from_secs(2 + 3);

fn report(what: &str, outcome: &Outcome) {
    println!(
        "{what}: {} writes, {} in doubt, {} refused; a key was unreadable for {:?} at most",
        outcome.acknowledged.len(),
        outcome.in_doubt.len(),
        outcome.refused.len(),
        outcome.longest_gap
    );
    if is_long() {
        assert!(outcome.longest_gap <= LONGEST_GAP, "unreadable for {:?}", outcome.longest_gap);
    }
}

// ---- any number of servers ----

/// Lets `change` happen to a cluster of `count` servers that holds many keys, with
/// readers and writers at work, and checks that it took nothing away.
fn among_readers_and_writers(
    what: &str,
    mut nodes: Nodes,
    change: impl FnOnce(&mut Nodes, &Traffic),
) {
    let keys = pairs("before", sized(2_000, 20_000));
    write_all(nodes.running()[0], &keys);
    let traffic = Traffic::start(nodes.running());
    traffic.wait_for_writes(50);
    change(&mut nodes, &traffic);
    traffic.wait_for_writes(50);
    nodes.wait_until_at_rest();
    let outcome = traffic.end();
    report(what, &outcome);
    nodes.assert_holds(&outcome);
    let placed = wait_until_placed(nodes.leader());
    assert!(keys.iter().all(|(key, _)| placed.contains(key)), "a key is nowhere");
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
    nodes.assert_sound();
}

#[test]
fn growing_from_1_to_12_one_by_one_and_shrinking_to_3_by_kills_loses_nothing() {
    let nodes = Nodes::start(1, SHORT_LEASE);
    among_readers_and_writers("grow and shrink", nodes, |nodes, traffic| {
        for _ in 1..12 {
            nodes.join(1, &[]);
            traffic.use_servers(nodes.running());
            nodes.wait_until_at_rest();
        }
        traffic.wait_for_writes(50);
        // Each time another place of the ring.
        for round in 0..9 {
            let running = nodes.running();
            let victim = running[round * 5 % running.len()];
            traffic.expect_gone(victim);
            let index = nodes.index_of(victim);
            nodes.kill(index);
            nodes.wait_until_at_rest();
        }
        assert_eq!(nodes.running().len(), 3);
    });
}

#[test]
fn growing_from_1_to_12_all_at_once_loses_nothing() {
    let nodes = Nodes::start(1, 4.0);
    among_readers_and_writers("all at once", nodes, |nodes, traffic| {
        nodes.join(11, &[]);
        traffic.use_servers(nodes.running());
        nodes.wait_until_at_rest();
    });
}

#[test]
fn two_of_six_servers_killed_at_the_same_instant_take_nothing_with_them() {
    let nodes = Nodes::start(6, SHORT_LEASE);
    among_readers_and_writers("two of six", nodes, |nodes, traffic| {
        // Next to each other on the ring: some keys are left with one replica.
        let listing = Listing::of(nodes.leader()).unwrap();
        let victims = [1, 2].map(|place| listing.servers[place].0);
        victims.iter().for_each(|victim| traffic.expect_gone(*victim));
        let indexes = victims.map(|victim| nodes.index_of(victim));
        nodes.kill_together(&indexes);
        nodes.wait_until_at_rest();
    });
}

// ---- joins and failures at the same time ----

/// A value that takes time to move.
const LARGE: usize = 16 * 1024;

/// So slowly that a join of some megabytes takes seconds.
const SLOWLY: [&str; 2] = ["--rebalance-rate", "800000"];

/// A cluster of four with some large values.
fn laden() -> (Nodes, Vec<(String, String)>) {
    let nodes = Nodes::start(4, SHORT_LEASE);
    let keys: Vec<_> = (0..sized(400, 2_000))
        .map(|number| (format!("large {number}"), format!("{number} {}", "x".repeat(LARGE))))
        .collect();
    for part in keys.chunks(100) {
        write_all(nodes.at(0), part);
    }
    (nodes, keys)
}

/// Waits until the server with this index is in some group and not ready, and
/// names the primary of that group and another ready replica of it.
fn wait_until_it_fetches(nodes: &Nodes, joiner: usize) -> [SocketAddrV4; 2] {
    let at = nodes.at(joiner);
    wait_until("data moves to the new server", PATIENCE, || {
        let view = view_of(nodes.leader())?;
        let id = &view.own_members().find(|member| member.address == at)?.id;
        let address = |id| view.member(id).map(|member| member.address);
        let moved = nodes.ask("rebalance_status")["keys_moved"].as_u64()?;
        view.groups.iter().filter(|group| group.seats(id) && !group.ready.contains(id)).find_map(
            |group| {
                let primary = group.primary.as_ref()?;
                let other = group.ready.iter().find(|other| *other != primary)?;
                (moved > 0).then(|| Some([address(primary)?, address(other)?]))?
            },
        )
    })
}

/// Whom a failure during a join strikes.
#[derive(Clone, Copy, Debug)]
enum Struck {
    Joiner,
    /// The primary is the one that the data comes from.
    Source,
    Secondary,
    JoinerAndSource,
}

fn a_failure_during_a_join(struck: Struck) {
    let (mut nodes, keys) = laden();
    let traffic = Traffic::start(nodes.running());
    traffic.wait_for_writes(20);
    let joiner = nodes.join(1, &SLOWLY);
    let [primary, other] = wait_until_it_fetches(&nodes, joiner);
    let joiner_at = nodes.at(joiner);
    let victims = match struck {
        Struck::Joiner => vec![joiner_at],
        Struck::Source => vec![primary],
        Struck::Secondary => vec![other],
        Struck::JoinerAndSource => vec![joiner_at, primary],
    };
    victims.iter().for_each(|victim| traffic.expect_gone(*victim));
    let indexes: Vec<usize> = victims.iter().map(|victim| nodes.index_of(*victim)).collect();
    nodes.kill_together(&indexes);
    traffic.wait_for_writes(20);
    nodes.wait_until_at_rest();
    let outcome = traffic.end();
    report(&format!("a join, and the end of its {struck:?}"), &outcome);
    nodes.assert_holds(&outcome);
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
}

#[test]
fn a_joiner_that_is_killed_while_it_fetches_takes_nothing_with_it() {
    a_failure_during_a_join(Struck::Joiner);
}

#[test]
fn the_primary_that_a_joiner_fetches_from_takes_nothing_with_it() {
    a_failure_during_a_join(Struck::Source);
}

#[test]
fn a_secondary_that_is_killed_during_a_join_takes_nothing_with_it() {
    a_failure_during_a_join(Struck::Secondary);
}

#[test]
fn a_joiner_and_its_source_that_are_killed_at_once_take_nothing_with_them() {
    a_failure_during_a_join(Struck::JoinerAndSource);
}

#[test]
fn a_join_while_a_failed_server_still_has_its_lease_ends_and_loses_nothing() {
    let (mut nodes, keys) = laden();
    let traffic = Traffic::start(nodes.running());
    traffic.wait_for_writes(20);
    let victim = nodes.at(1);
    traffic.expect_gone(victim);
    nodes.kill(1);
    // Nobody has noticed yet: the new server's groups are made with the dead one.
    nodes.join(2, &[]);
    traffic.use_servers(nodes.running());
    traffic.wait_for_writes(20);
    nodes.wait_until_at_rest();
    let outcome = traffic.end();
    report("joins during a failure", &outcome);
    nodes.assert_holds(&outcome);
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
}

// ---- no more than must ----

/// What a rebalancing has told when it was complete.
#[derive(Debug)]
struct Line {
    keys: u64,
    bytes: u64,
    least: u64,
}

/// All `Rebalancing complete` lines so far.
fn lines(nodes: &mut Nodes) -> Vec<Line> {
    let printed = nodes.printed();
    let lines = printed.lines().filter(|line| line.starts_with("Rebalancing complete"));
    let read = lines.map(|line| {
        let number = |unit: &str| {
            let (before, _) = line.split_once(unit)?;
            before.rsplit(' ').next()?.parse().ok()
        };
        let read = || {
            let (_, least) = line.split_once("the least was ")?;
            let least = least.strip_suffix(" bytes")?.parse().ok()?;
            Some(Line { keys: number(" keys,")?, bytes: number(" bytes moved;")?, least })
        };
        read().unwrap_or_else(|| panic!("a strange line: {line}"))
    });
    read.collect()
}

/// Which keys each server holds.
fn held(nodes: &Nodes) -> BTreeMap<SocketAddrV4, BTreeSet<String>> {
    nodes.running().into_iter().map(|address| (address, keys_of(address))).collect()
}

/// Lets `change` happen, waits until all is at rest, and checks what the
/// rebalancing says that it has moved against what is held by whom before and
/// after.
fn assert_moves_the_least(
    nodes: &mut Nodes,
    what: &str,
    size: impl Fn(&str) -> usize,
    change: impl FnOnce(&mut Nodes),
) {
    let (before, told) = (held(nodes), lines(nodes).len());
    change(nodes);
    nodes.wait_until_at_rest();
    wait_until("it is told that the rebalancing is complete", PATIENCE, || {
        (lines(nodes).len() > told).then_some(())
    });
    wait_until_placed(nodes.leader());
    let (mut keys, mut bytes) = (0, 0);
    for (address, now) in held(nodes) {
        let none = BTreeSet::new();
        for key in now.difference(before.get(&address).unwrap_or(&none)) {
            keys += 1;
            bytes += (key.len() + size(key) + ENVELOPE_BYTES) as u64;
        }
    }
    let told: Vec<Line> = lines(nodes).drain(told..).collect();
    let sum = |part: fn(&Line) -> u64| told.iter().map(part).sum::<u64>();
    let (told_keys, told_bytes, least) = (sum(|l| l.keys), sum(|l| l.bytes), sum(|l| l.least));
    println!("{what}: {keys} keys, {bytes} bytes had to move; it tells of {told:?}");
    assert!(told_keys >= keys, "{what}: {keys} keys have moved, it tells of {told_keys}");
    assert!(told_bytes >= bytes, "{what}: {bytes} bytes had to move, it tells of {told_bytes}");
    let allowed = |bytes: u64| bytes + bytes / 20;
    assert!(told_bytes <= allowed(bytes), "{what}: {told_bytes} bytes moved, {bytes} had to");
    assert!(told_bytes <= allowed(least), "{what}: {told_bytes} bytes moved, {least} by its count");
}

/// A cluster of `count` with some thousand keys, and how long their values are.
fn with_keys(count: usize, keys: usize) -> (Nodes, Vec<(String, String)>) {
    let nodes = Nodes::start(count, SHORT_LEASE);
    let keys: Vec<_> = (0..keys)
        .map(|number| (format!("key {number}"), format!("{number} {}", "v".repeat(500))))
        .collect();
    write_all(nodes.at(0), &keys);
    (nodes, keys)
}

fn size_in(keys: &[(String, String)]) -> impl Fn(&str) -> usize {
    let sizes: BTreeMap<String, usize> =
        keys.iter().map(|(key, value)| (key.clone(), value.len())).collect();
    move |key| sizes[key]
}

#[test]
fn a_rebalancing_moves_no_more_than_the_keys_whose_group_has_gained_a_member() {
    let (mut nodes, keys) = with_keys(3, sized(1_500, 20_000));
    let size = size_in(&keys);
    assert_moves_the_least(&mut nodes, "a fourth", &size, |nodes| {
        nodes.join(1, &[]);
    });
    // Nothing moves while somebody else holds the lock: else the first one of the two
    // could have been given what is the second one's already.
    let lock = |cmd| json!({"cmd": cmd, "lockid": "rebalancing", "requestor": "a test"});
    assert_moves_the_least(&mut nodes, "two more at once", &size, |nodes| {
        wait_until("the lock is granted", PATIENCE, || {
            let reply = call(nodes.leader(), &lock("lock_get")).value();
            (reply["status"] == "granted").then_some(())
        });
        nodes.join(2, &[]);
        wait_until("both are members", PATIENCE, || (nodes.listed() == 6).then_some(()));
        call(nodes.leader(), &lock("lock_release")).value();
    });
    assert_moves_the_least(&mut nodes, "a failure", &size, |nodes| nodes.kill(1));
    let leaving = nodes.at(2);
    assert_moves_the_least(&mut nodes, "one is drained", &size, |nodes| {
        call(nodes.leader(), &json!({"cmd": "drain", "server": leaving})).value();
        nodes.wait_until_ended(2);
    });
}

#[test]
fn a_viewleader_that_was_started_again_counts_only_what_has_moved_since() {
    let (mut nodes, keys) = with_keys(3, 1_000);
    let size = size_in(&keys);
    nodes.join(1, &[]);
    nodes.wait_until_at_rest();
    nodes.kill_viewleader();
    nodes.start_viewleader();
    nodes.wait_until_at_rest();
    assert_moves_the_least(&mut nodes, "after a restart", &size, |nodes| {
        nodes.join(1, &[]);
    });
}

#[test]
fn a_server_that_slept_and_joined_again_fetches_only_what_it_lacks_and_counts_only_that() {
    let (mut nodes, _) = with_keys(3, 1_000);
    let sleeper = nodes.join(1, &[]);
    nodes.wait_until_at_rest();
    let asleep = nodes.at(sleeper);
    let fetched = keys_of(asleep);
    assert!(fetched.len() > 300, "the newcomer had to fetch, not only {} keys", fetched.len());
    nodes.signal(sleeper, "STOP");
    nodes.wait_until_out(sleeper);
    wait_until("the others are at rest", PATIENCE, || {
        (nodes.ask("rebalance_status")["moving"] == false).then_some(())
    });
    let awake = nodes.running().into_iter().filter(|address| *address != asleep);
    let mut before: BTreeMap<_, _> = awake.map(|address| (address, keys_of(address))).collect();
    // Nobody has written since: its copies are as good as ever.
    before.insert(asleep, fetched);
    nodes.signal(sleeper, "CONT");
    nodes.wait_until_at_rest();
    wait_until_placed(nodes.leader());
    let lacked: usize =
        held(&nodes).iter().map(|(address, now)| now.difference(&before[address]).count()).sum();
    let status = nodes.ask("rebalance_status");
    println!("{lacked} keys were lacked; it tells: {status}");
    let moved = status["keys_moved"].as_u64().unwrap() as usize;
    assert!(moved <= lacked + lacked / 20, "{moved} keys moved, {lacked} had to: {status}");
}

// ---- meanwhile ----

/// Asks the viewleader over and over until `end`, and returns the longest time
/// that an answer took and how many there were.
fn query_until(leader: SocketAddrV4, end: &AtomicBool) -> (Duration, usize) {
    let (mut longest, mut count) = (Duration::ZERO, 0);
    while !end.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let reply = call(leader, &json!({"cmd": "query_servers"}));
        assert!(matches!(&reply, Reply::Value(reply) if reply["result"].is_array()), "{reply:?}");
        longest = longest.max(asked.elapsed());
        count += 1;
        thread::sleep(Duration::from_millis(2));
    }
    (longest, count)
}

#[test]
fn the_viewleader_answers_all_through_a_rebalancing() {
    let mut nodes = Nodes::start(3, 4.0);
    let keys = pairs("key", sized(5_000, 1_000_000));
    keys.chunks(20_000).for_each(|part| write_all(nodes.at(0), part));
    let (leader, end) = (nodes.leader(), AtomicBool::new(false));
    thread::scope(|scope| {
        let asker = scope.spawn(|| query_until(leader, &end));
        nodes.join(2, &[]);
        nodes.wait_until_at_rest();
        end.store(true, Ordering::Relaxed);
        let (longest, count) = asker.join().unwrap();
        println!("{count} answers during the rebalancing, the slowest took {longest:?}");
        assert!(count > 0);
    });
    nodes.assert_sound();
    let moved = nodes.ask("rebalance_status")["keys_moved"].as_u64().unwrap();
    assert!(moved > 0);
}

// ---- leaving on purpose ----

/// Writes and reads through one server until that hangs up, and returns how many
/// answers it got.
fn until_it_hangs_up(server: SocketAddrV4, end: &AtomicBool) -> usize {
    let mut connection = Connection::open(server).unwrap();
    for number in 0.. {
        let key = format!("through the leaving one {number}");
        for request in [setr(&key, &value_of(&key)), getr(&key)] {
            match connection.call(&request) {
                Reply::Value(reply) if reply["status"] == "ok" => {}
                // What was on its way when it closed its connections.
                Reply::Closed => return number,
                other => panic!("{request} through the leaving {server}: {other:?}"),
            }
        }
        if end.load(Ordering::Relaxed) {
            break;
        }
    }
    panic!("{server} has not hung up")
}

#[test]
fn a_server_that_is_drained_leaves_without_one_failed_request() {
    let mut nodes = Nodes::start(5, 4.0);
    let keys = pairs("before", sized(1_000, 20_000));
    write_all(nodes.at(0), &keys);
    let leaving = nodes.at(2);
    // A client that goes by the view turns to no server that is not listed.
    let others: Vec<_> = nodes.running().into_iter().filter(|at| *at != leaving).collect();
    let traffic = Traffic::start(others);
    traffic.wait_for_writes(100);
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let stubborn = scope.spawn(|| until_it_hangs_up(leaving, &end));
        let drained = call(nodes.leader(), &json!({"cmd": "drain", "server": leaving}));
        let ended = nodes.try_until_ended(2);
        end.store(true, Ordering::Relaxed);
        assert_eq!(drained, Reply::Value(json!({"status": "ok"})));
        let ended = ended.expect("it ends by itself");
        assert_eq!(ended.code, Some(0), "{ended}");
        let answered = stubborn.join().unwrap();
        assert!(answered > 0);
    });
    traffic.wait_for_writes(100);
    nodes.wait_until_at_rest();
    let outcome = traffic.end();
    report("a drain", &outcome);
    assert_eq!(outcome.refused, Vec::<String>::new(), "operations that were refused");
    assert_eq!(outcome.in_doubt, BTreeSet::new(), "writes with an unknown outcome");
    assert_eq!(outcome.hung_up, 0);
    nodes.assert_holds(&outcome);
    assert_readable(&nodes.running(), keys.iter().map(|(key, _)| key));
}

#[test]
fn the_client_drains_a_server() {
    let mut nodes = Nodes::start(2, SHORT_LEASE);
    let (leaving, staying) = (nodes.at(1).to_string(), nodes.at(0));
    let drained = run("client", &mut our_client(nodes.leader(), staying, &["drain", &leaving]));
    assert_eq!(drained.code, Some(0), "{drained}");
    assert_eq!(nodes.wait_until_ended(1).code, Some(0));
    nodes.wait_until_at_rest();
}

#[test]
fn a_drained_server_can_come_back_over_its_disk() {
    let mut nodes = Nodes::start(4, SHORT_LEASE);
    let keys = pairs("key", 200);
    write_all(nodes.at(0), &keys);
    let leaving = nodes.at(1);
    call(nodes.leader(), &json!({"cmd": "drain", "server": leaving})).value();
    assert_eq!(nodes.wait_until_ended(1).code, Some(0));
    let newer: Vec<(String, String)> =
        keys.iter().map(|(key, value)| (key.clone(), format!("newer: {value}"))).collect();
    write_all(nodes.at(0), &newer);
    nodes.restart(1);
    nodes.wait_until_at_rest();
    wait_until_placed(nodes.leader());
    nodes.running().iter().for_each(|address| assert_all(*address, &newer));
    nodes.assert_sound();
}

#[test]
fn a_server_that_nobody_knows_can_not_be_drained() {
    let nodes = Nodes::start(1, 4.0);
    let reply = call(nodes.leader(), &json!({"cmd": "drain", "server": "192.0.2.1:4711"})).value();
    assert_eq!(reply, json!({"status": "unknown"}));
    let status = nodes.ask("status");
    assert!(status["servers"][0]["notes"].is_null(), "{status}");
}
