//! Writes that depend on something, and deletions: with real processes, through
//! kills and moves.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, and it has threads"
)]

mod support;

use serde_json::{Value, json};
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use support::keys::{assert_all, getr, keys_of, pairs, setr, write_all};
use support::nodes::Nodes;
use support::process::{PATIENCE, run, wait_until};
use support::systems::our_client;
use support::wire::{Reply, call};

/// The lease of servers that are to be killed.
const SHORT_LEASE: f64 = 1.0;

fn delr(key: &str) -> Value {
    json!({"cmd": "delr", "key": key})
}

/// Deletes every key of `pairs` through the server at `address`.
fn delete_all(address: SocketAddrV4, pairs: &[(String, String)]) {
    for (key, _) in pairs {
        let reply = call(address, &delr(key)).value();
        assert_eq!(reply["status"], "ok", "{key} through {address}: {reply}");
    }
}

/// None of these is there, whoever is asked.
fn assert_gone(nodes: &Nodes, pairs: &[(String, String)]) {
    for address in nodes.running() {
        for (key, _) in pairs {
            let reply = call(address, &getr(key)).value();
            assert_eq!(reply["status"], "not_found", "{key} from {address}: {reply}");
        }
        let listed = keys_of(address);
        assert!(!pairs.iter().any(|(key, _)| listed.contains(key)), "{address}: {listed:?}");
    }
}

#[test]
fn deletions_that_two_servers_pass_on_to_each_other_do_not_wait_for_each_other() {
    const KEYS: usize = 400;
    let nodes = Nodes::start(2, SHORT_LEASE);
    let pairs = pairs("crossing", KEYS);
    write_all(nodes.at(0), &pairs);
    // About half of what each is asked is the other's to do, and each needs the other's
    // acknowledgement for its own half.
    let halves = [&pairs[..KEYS / 2], &pairs[KEYS / 2..]];
    thread::scope(|scope| {
        for (index, half) in halves.into_iter().enumerate() {
            for part in half.chunks(KEYS / 16) {
                let address = nodes.at(index);
                scope.spawn(move || delete_all(address, part));
            }
        }
    });
    assert_gone(&nodes, &pairs);
}

// ---- conditions ----

/// Adds 1 to the counter `key`, depending on the version that was read. Returns
/// whether it is known to have been done; `None` if that is not known.
fn try_to_add_one(address: SocketAddrV4, key: &str) -> Option<bool> {
    let Reply::Value(held) = call(address, &getr(key)) else { return Some(false) };
    if held["error"].is_string() {
        return Some(false);
    }
    let count: u64 = held["value"].as_str().map_or(0, |value| value.parse().unwrap());
    let version = held["version"].as_str().unwrap_or("0.0");
    let request = json!({
        "cmd": "setr", "key": key, "val": (count + 1).to_string(), "direct": true,
        "if_version": version,
    });
    match call(address, &request) {
        Reply::Value(reply) if reply["status"] == "ok" => Some(true),
        Reply::Value(reply) if reply["reason"] == "unknown_outcome" => None,
        Reply::Value(reply) => {
            let reason = reply["reason"].as_str().unwrap_or_else(|| panic!("{reply}"));
            assert!(matches!(reason, "conflict" | "unavailable"), "{reply}");
            Some(false)
        }
        _ => None,
    }
}

#[test]
fn clients_that_count_by_versions_lose_nothing_while_servers_are_killed() {
    const CLIENTS: usize = 6;
    const COUNT: u64 = 120;
    let mut nodes = Nodes::start(5, SHORT_LEASE);
    let (done, doubtful) = (AtomicU64::new(0), AtomicU64::new(0));
    let addresses = nodes.running();
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (addresses, done, doubtful) = (&addresses, &done, &doubtful);
            scope.spawn(move || {
                // These two are not killed.
                let address = addresses[client % 2];
                while done.load(Ordering::SeqCst) < COUNT {
                    match try_to_add_one(address, "counter") {
                        Some(true) => done.fetch_add(1, Ordering::SeqCst),
                        Some(false) => 0,
                        None => doubtful.fetch_add(1, Ordering::SeqCst),
                    };
                }
            });
        }
        for victim in [2, 3] {
            let before = done.load(Ordering::SeqCst);
            wait_until("they count", PATIENCE, || {
                (done.load(Ordering::SeqCst) > before + 5).then_some(())
            });
            nodes.kill(victim);
        }
    });
    let (done, doubtful) = (done.into_inner(), doubtful.into_inner());
    nodes.wait_until_at_rest();
    let reply = call(nodes.at(0), &getr("counter")).value();
    let count: u64 = reply["value"].as_str().unwrap().parse().unwrap();
    assert!((done..=done + doubtful).contains(&count), "{count}, {done} done, {doubtful} in doubt");
    nodes.assert_sound();
}

#[test]
fn the_client_tells_by_its_exit_status_that_a_condition_is_not_so() {
    let nodes = Nodes::start(3, 4.0);
    let expect = |status: i32, arguments: &[&str], word: &str| {
        let finished = run("client", &mut our_client(nodes.leader(), nodes.at(0), arguments));
        assert_eq!(finished.code, Some(status), "{arguments:?}: {finished}");
        let all = finished.to_string();
        assert!(all.contains(word), "{arguments:?}: no {word} in {all}");
        finished
    };
    expect(0, &["setr", "k", "one", "--if-absent"], "ok");
    expect(1, &["setr", "k", "two", "--if-absent"], "the key is at version");
    let version = expect(0, &["getr", "k"], "one").json()["version"].as_str().unwrap().to_owned();
    expect(0, &["setr", "k", "two", "--if-version", &version], "ok");
    expect(1, &["setr", "k", "three", "--if-version", &version], "conflict");
    expect(1, &["delr", "k", "--if-version", &version], "conflict");
    expect(0, &["setr", "k", "three", "--fence", "a:lock:7"], "ok");
    expect(1, &["setr", "k", "four", "--fence", "a:lock:6"], "fenced");
    expect(0, &["delr", "k", "--fence", "a:lock:7"], "ok");
    expect(1, &["delr", "k"], "not_found");
    expect(1, &["getr", "k"], "not_found");
    expect(1, &["setr", "k", "five", "--fence", "a:lock:6"], "fenced");
    expect(2, &["setr", "k", "v", "--if-version", "seven"], "is no version such as");
    expect(2, &["setr", "k", "v", "--fence", "lock"], "LOCK:TOKEN");
    expect(2, &["setr", "k", "v", "--if-absent", "--if-version", "1.1"], "cannot be used with");
}

// ---- deletions ----

#[test]
fn what_was_deleted_stays_deleted_through_kills_joins_and_returning_disks() {
    let mut nodes = Nodes::start(4, SHORT_LEASE);
    let (kept, deleted) = (pairs("kept", 150), pairs("deleted", 150));
    write_all(nodes.at(0), &kept);
    write_all(nodes.at(0), &deleted);
    // One is away while they are deleted, and comes back with all of them.
    nodes.kill(3);
    nodes.wait_until_out(3);
    nodes.wait_until_at_rest();
    delete_all(nodes.at(1), &deleted);
    assert_gone(&nodes, &deleted);
    nodes.restart(3);
    nodes.wait_until_at_rest();
    assert_gone(&nodes, &deleted);
    nodes.join(2, &[]);
    nodes.wait_until_at_rest();
    nodes.kill(0);
    nodes.wait_until_out(0);
    nodes.wait_until_at_rest();
    assert_gone(&nodes, &deleted);
    nodes.running().iter().for_each(|address| assert_all(*address, &kept));
    // A new value is a new value.
    let again: Vec<_> = deleted.iter().map(|(key, _)| (key.clone(), "again".to_owned())).collect();
    write_all(nodes.at(1), &again);
    nodes.running().iter().for_each(|address| assert_all(*address, &again));
    nodes.assert_sound();
}

#[test]
fn a_deletion_that_was_acknowledged_is_there_after_everything_was_killed() {
    let mut nodes = Nodes::start(3, SHORT_LEASE);
    let keys = pairs("key", 60);
    write_all(nodes.at(0), &keys);
    delete_all(nodes.at(2), &keys[..30]);
    nodes.kill_everything();
    nodes.start_viewleader();
    (0..3).for_each(|index| nodes.restart_unheard(index));
    nodes.wait_until_at_rest();
    assert_gone(&nodes, &keys[..30]);
    nodes.running().iter().for_each(|address| assert_all(*address, &keys[30..]));
    nodes.assert_sound();
}

#[test]
fn keys_that_are_written_and_deleted_again_and_again_leave_nothing_in_the_list() {
    let nodes = Nodes::start(3, 4.0);
    for round in 0..20 {
        for number in 0..10 {
            let key = format!("{round} {number}");
            assert_eq!(call(nodes.at(0), &setr(&key, "v")).value()["status"], "ok");
            assert_eq!(call(nodes.at(1), &delr(&key)).value()["status"], "ok");
        }
    }
    for address in nodes.running() {
        assert!(keys_of(address).is_empty());
    }
}
