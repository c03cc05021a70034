//! What was acknowledged outlives the programs: kills of everything, old disks,
//! full disks, sleeps, and a viewleader that dies again and again.
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

use rand::RngExt;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;
use support::keys::{
    assert_all, assert_readable, getr, pairs, setr, value_of, wait_until_placed, write_all,
};
use support::nodes::{Nodes, copy_folder, is_long};
use support::process::{PATIENCE, run, wait_until, within};
use support::systems::{Listing, our_client, view_of};
use support::traffic::Traffic;
use support::wire::{Connection, Reply, call, frame};

/// The lease of servers that are to be killed.
const SHORT_LEASE: f64 = 1.0;

/// The same keys with other values.
fn rewritten(pairs: &[(String, String)], word: &str) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| (key.clone(), format!("{word}: {value}"))).collect()
}

/// Writes all `pairs`, each until it is acknowledged.
fn insist_on(address: SocketAddrV4, pairs: &[(String, String)]) {
    for (key, value) in pairs {
        wait_until("it is written", PATIENCE, || match call(address, &setr(key, value)) {
            Reply::Value(reply) if reply["status"] == "ok" => Some(()),
            _ => None,
        });
    }
}

// ---- everything is killed ----

/// Kills all programs at once under load and starts them again, several times.
fn everything_is_killed(name: &str, between: impl Fn(&mut Nodes)) {
    let mut nodes = Nodes::start(4, SHORT_LEASE);
    let mut known: Vec<(String, String)> = Vec::new();
    for round in 0..if is_long() { 10 } else { 3 } {
        let more = pairs(&format!("{name} {round}"), 200);
        write_all(nodes.at(round % 4), &more);
        known.extend(more);
        let traffic = Traffic::start(nodes.running());
        traffic.wait_for_writes(100);
        traffic.expect_silence(&nodes.running());
        nodes.kill_everything();
        between(&mut nodes);
        nodes.wait_until_at_rest();
        let (outcome, epoch) = (traffic.end(), nodes.epoch());
        nodes.assert_holds(&outcome);
        // The register's last acknowledged number, or a later one that was in doubt.
        let (register, last) = outcome.register.clone();
        let read = call(nodes.at(0), &getr(&register)).value();
        let found = read["value"].as_str().map_or(0, |value| value.parse().unwrap());
        assert!(found >= last, "{last} was acknowledged, {found} is there");
        nodes.running().iter().for_each(|address| assert_all(*address, &known));
        println!("{name} {round}: {} writes, epoch {epoch}", outcome.acknowledged.len());
        known.extend(outcome.acknowledged.into_iter().map(|key| (key.clone(), value_of(&key))));
    }
}

#[test]
fn what_was_acknowledged_is_there_after_everything_was_killed_and_started_within_the_lease() {
    everything_is_killed("within", |nodes| {
        nodes.start_viewleader();
        (0..4).for_each(|index| nodes.restart_unheard(index));
    });
}

#[test]
fn what_was_acknowledged_is_there_after_everything_was_killed_and_started_beyond_the_lease() {
    everything_is_killed("beyond", |nodes| {
        nodes.start_viewleader();
        wait_until("nobody is listed any more", PATIENCE, || (nodes.listed() == 0).then_some(()));
        (0..4).for_each(|index| nodes.restart_unheard(index));
    });
}

#[test]
fn what_was_acknowledged_is_there_after_servers_were_killed_and_started_one_by_one() {
    everything_is_killed("staggered", |nodes| {
        // Some come back in time and some do not.
        nodes.start_viewleader();
        nodes.restart(0);
        wait_until("the others are out", PATIENCE, || (nodes.listed() == 1).then_some(()));
        (1..4).for_each(|index| nodes.restart(index));
    });
}

/// What is left of the lease of the server at `address`, in milliseconds; `None`
/// when it is not listed.
fn lease_left(nodes: &Nodes, address: SocketAddrV4) -> Option<u64> {
    let status = nodes.ask("status");
    let servers = status["servers"].as_array().unwrap();
    servers.iter().find(|it| it["address"] == json!(address))?["lease_left_ms"].as_u64()
}

#[test]
fn a_server_that_comes_back_elsewhere_before_it_is_put_out_brings_what_it_held() {
    let mut nodes = Nodes::start(3, 4.0);
    let keys = pairs("key", 100);
    write_all(nodes.at(0), &keys);
    // Those that fail together are put out together, if their leases end within a quarter
    // of a lease: the first one's is to be over while the others' are waited for. So all
    // are stopped, and their leases compared; if they don't fit, the first one's heartbeats
    // are moved against the others'.
    let fits = |nodes: &Nodes| {
        let [first, second, third] = [0, 1, 2].map(|index| lease_left(nodes, nodes.at(index)));
        let (first, second, third) = (first?, second?, third?);
        (first + 300 < second.min(third) && second.max(third) < first + 900).then_some(())
    };
    wait_until("the first one's lease ends before the others'", PATIENCE, || {
        (0..3).for_each(|index| nodes.signal(index, "STOP"));
        let fit = fits(&nodes);
        if fit.is_none() {
            (1..3).for_each(|index| nodes.signal(index, "CONT"));
            thread::sleep(Duration::from_millis(rand::rng().random_range(0..1000)));
            nodes.signal(0, "CONT");
            nodes.wait_until_at_rest();
        }
        fit
    });
    nodes.kill_together(&[0, 1, 2]);
    let was_at = nodes.at(0);
    nodes.give_new_port(0);
    wait_until("the first lease is over", PATIENCE, || {
        lease_left(&nodes, was_at).is_none_or(|left| left == 0).then_some(())
    });
    nodes.restart(0);
    wait_until("the others are out", PATIENCE, || {
        let at = [was_at, nodes.at(1), nodes.at(2)];
        at.iter().all(|at| lease_left(&nodes, *at).is_none()).then_some(())
    });
    // Of the three disks this one is there, and it has everything.
    nodes.wait_until_at_rest();
    assert_all(nodes.at(0), &keys);
}

// ---- one sleeps ----

#[test]
fn a_server_that_slept_for_three_leases_answers_nothing_old_and_joins_again_by_itself() {
    let mut nodes = Nodes::start(4, SHORT_LEASE);
    let keys = pairs("key", 60);
    write_all(nodes.at(0), &keys);
    let sleeper = nodes.at(1);
    let traffic = Traffic::start(nodes.running());
    traffic.wait_for_writes(50);
    traffic.expect_gone(sleeper);
    nodes.signal(1, "STOP");
    thread::sleep(Duration::from_secs_f64(3.0 * SHORT_LEASE));
    let newer = rewritten(&keys, "newer");
    insist_on(nodes.at(0), &newer);
    // It finds these questions first thing when it wakes up.
    let mut questions: Vec<Connection> = newer
        .iter()
        .map(|(key, _)| {
            let mut connection = Connection::open(sleeper).unwrap();
            connection.send(&frame(getr(key).to_string().as_bytes()));
            connection
        })
        .collect();
    nodes.signal(1, "CONT");
    for (connection, (key, value)) in questions.iter_mut().zip(&newer) {
        if let Reply::Value(reply) = connection.receive() {
            let is_refused = reply["reason"] == "unavailable";
            assert!(is_refused || reply["value"] == *value, "{key}: {reply}");
        }
    }
    nodes.wait_until_at_rest();
    traffic.wait_for_writes(50);
    let outcome = traffic.end();
    nodes.assert_holds(&outcome);
    nodes.running().iter().for_each(|address| assert_all(*address, &newer));
}

// ---- one is started again ----

fn keys_moved(nodes: &Nodes) -> u64 {
    nodes.ask("rebalance_status")["keys_moved"].as_u64().unwrap()
}

#[test]
fn a_restart_within_the_lease_moves_nothing() {
    let mut nodes = Nodes::start(4, 4.0);
    let keys = pairs("key", 500);
    write_all(nodes.at(0), &keys);
    let before = (nodes.epoch(), nodes.ask("rebalance_status")["keys_moved"].clone());
    for index in 0..4 {
        nodes.kill(index);
        nodes.restart(index);
        nodes.wait_until_at_rest();
        wait_until("it serves again", PATIENCE, || {
            let reply = nodes.try_call(index, &getr("key 0"))?;
            (reply["value"] == value_of("key 0")).then_some(())
        });
    }
    nodes.wait_until_at_rest();
    let after = (nodes.epoch(), nodes.ask("rebalance_status")["keys_moved"].clone());
    assert_eq!(after, before, "epoch and keys moved");
    wait_until_placed(nodes.leader());
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
}

#[test]
fn a_restart_after_the_lease_moves_only_what_has_changed() {
    // Of three servers each holds everything, whatever its place.
    let mut nodes = Nodes::start(3, SHORT_LEASE);
    let mut keys = pairs("key", 1_000);
    write_all(nodes.at(0), &keys);
    nodes.kill(2);
    nodes.wait_until_out(2);
    let changed = rewritten(&keys[..20], "changed");
    insist_on(nodes.at(0), &changed);
    keys[..20].clone_from_slice(&changed);
    let new = pairs("new", 10);
    insist_on(nodes.at(1), &new);
    keys.extend(new);
    wait_until("the others are done", PATIENCE, || {
        (nodes.ask("rebalance_status")["moving"] == false).then_some(())
    });
    nodes.restart(2);
    nodes.wait_until_at_rest();
    let moved = keys_moved(&nodes);
    println!("{moved} keys have moved");
    assert!((30..=31).contains(&moved), "30 keys have changed, {moved} have moved");
    wait_until_placed(nodes.leader());
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
}

#[test]
fn a_write_that_only_a_dead_primary_has_on_its_disk_does_not_come_and_go() {
    const LEASE: f64 = 3.0;
    let mut nodes = Nodes::start(3, LEASE);
    let keys = pairs("key", 60);
    write_all(nodes.at(0), &keys);
    // The others are gone for a moment: what is written now reaches one disk, is
    // never committed and never acknowledged.
    nodes.kill_together(&[1, 2]);
    let unfinished = rewritten(&keys, "unfinished");
    let writers = unfinished.iter().map(|(key, value)| {
        let mut writer = Connection::open(nodes.at(0)).unwrap();
        writer.send(&frame(setr(key, value).to_string().as_bytes()));
        writer
    });
    let writers: Vec<Connection> = writers.collect();
    thread::sleep(Duration::from_millis(300));
    nodes.kill(0);
    drop(writers);
    nodes.restart_unheard(1);
    nodes.restart_unheard(2);
    nodes.wait_until_out(0);
    nodes.wait_until_at_rest();
    let one = nodes.at(1);
    let values = |address: SocketAddrV4| -> BTreeMap<String, Value> {
        let read = |key: &str| {
            wait_until("it is read", PATIENCE, || match call(address, &getr(key)) {
                Reply::Value(reply) if reply["status"] == "ok" => Some(reply["value"].clone()),
                _ => None,
            })
        };
        keys.iter().map(|(key, _)| (key.clone(), read(key))).collect()
    };
    let without = values(one);
    nodes.restart(0);
    nodes.wait_until_at_rest();
    let with = values(one);
    // Now its copies go again, and the others' are read.
    nodes.kill(0);
    nodes.wait_until_at_rest();
    let after = values(one);
    let changes: Vec<String> = keys
        .iter()
        .filter(|(key, _)| without[key] != with[key] || with[key] != after[key])
        .map(|(key, _)| format!("{key}: {}, then {}, then {}", without[key], with[key], after[key]))
        .collect();
    assert!(changes.is_empty(), "nobody wrote, and {} values changed: {changes:#?}", changes.len());
}

// ---- lost and found ----

/// All the keys' reads and writes through `address` are refused at once with an
/// error that names the arc and one of `holders` at least.
fn assert_refused_as_lost(address: SocketAddrV4, holders: &[SocketAddrV4]) {
    for request in [getr("key 0"), setr("key 1", "x"), getr("never written")] {
        let reply = wait_until("it is refused as lost", PATIENCE, || {
            let reply = call(address, &request).value();
            reply["error"].as_str().is_some_and(|it| it.contains("lost")).then_some(reply)
        });
        assert_eq!(reply["reason"], "unavailable", "{reply}");
        let error = reply["error"].as_str().unwrap();
        assert!(error.contains("the arc ["), "{error}");
        for holder in holders {
            assert!(error.contains(&holder.to_string()), "{holder} is not named: {error}");
        }
    }
}

#[test]
fn what_every_server_has_lost_is_refused_and_found_again_with_any_of_the_disks() {
    let mut nodes = Nodes::start(3, SHORT_LEASE);
    let keys = pairs("key", 300);
    write_all(nodes.at(0), &keys);
    let holders = nodes.running();
    nodes.kill_together(&[0, 1, 2]);
    wait_until("nobody is listed any more", PATIENCE, || (nodes.listed() == 0).then_some(()));
    let fresh = nodes.join(1, &[]);
    wait_until("it has joined", PATIENCE, || (nodes.listed() == 1).then_some(()));
    assert_refused_as_lost(nodes.at(fresh), &holders);

    let status = ["status", "--json"];
    let status = run("client", &mut our_client(nodes.leader(), nodes.at(fresh), &status));
    let lost = status.json()["lost"].clone();
    let lost = lost.as_array().unwrap();
    assert!(!lost.is_empty(), "{status}");
    for arc in lost {
        for holder in &holders {
            let named = arc["waits_for"].as_array().unwrap().contains(&json!(holder));
            assert!(named, "{holder} is not named: {arc}");
        }
    }

    // Service resumes by itself, with one disk of the three.
    nodes.restart(1);
    nodes.wait_until_at_rest();
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
    let newer = rewritten(&keys, "newer");
    write_all(nodes.at(fresh), &newer);
    // The other disks come too late to have a say.
    nodes.restart(0);
    nodes.restart(2);
    nodes.wait_until_at_rest();
    wait_until_placed(nodes.leader());
    nodes.running().iter().for_each(|address| assert_all(*address, &newer));
    nodes.assert_sound();
}

#[test]
fn of_servers_that_went_one_by_one_only_the_last_brings_back_what_is_lost() {
    let mut nodes = Nodes::start(3, SHORT_LEASE);
    let keys = pairs("key", 100);
    write_all(nodes.at(0), &keys);
    nodes.kill(0);
    nodes.wait_until_out(0);
    let newer = rewritten(&keys, "newer");
    insist_on(nodes.at(1), &newer);
    nodes.kill(1);
    nodes.wait_until_out(1);
    let newest = rewritten(&keys, "newest");
    insist_on(nodes.at(2), &newest);
    let last = nodes.at(2);
    nodes.kill(2);
    nodes.wait_until_out(2);
    nodes.restart(0);
    nodes.restart(1);
    wait_until("they have joined", PATIENCE, || (nodes.listed() == 2).then_some(()));
    assert_refused_as_lost(nodes.at(0), &[last]);
    nodes.restart(2);
    nodes.wait_until_at_rest();
    nodes.running().iter().for_each(|address| assert_all(*address, &newest));
}

// ---- the viewleader dies ----

/// Keeps asking for epoch and revision, which never go back, through restarts.
struct Watch {
    epoch: u64,
    revision: u64,
}

impl Watch {
    fn look(&mut self, nodes: &Nodes) {
        let status = nodes.ask("status");
        let now = |name: &str| status[name].as_u64().unwrap();
        let (epoch, revision) = (now("epoch"), now("revision"));
        assert!(epoch >= self.epoch, "the epoch went back from {} to {epoch}", self.epoch);
        assert!(revision >= self.revision, "{} went back to {revision}", self.revision);
        (self.epoch, self.revision) = (epoch, revision);
    }
}

#[test]
fn a_viewleader_that_is_killed_again_and_again_forgets_nothing() {
    let mut nodes = Nodes::start(4, SHORT_LEASE);
    let keys = pairs("key", 500);
    write_all(nodes.at(0), &keys);
    let traffic = Traffic::start(nodes.running());
    traffic.wait_for_writes(50);
    let lock =
        |cmd: &str, lock: &str, who: &str| json!({"cmd": cmd, "lockid": lock, "requestor": who});
    let leader = nodes.leader();
    let ask = |cmd: &str, name: &str, who: &str| call(leader, &lock(cmd, name, who)).value();
    assert_eq!(ask("lock_get", "door", "me")["status"], "granted");
    assert_eq!(ask("lock_get", "door", "you")["status"], "retry");
    let mut watch = Watch { epoch: 0, revision: 0 };
    let mut rng = rand::rng();
    for round in 0..if is_long() { 30 } else { 5 } {
        if round % 2 == 0 {
            nodes.join(1, &[]);
            traffic.use_servers(nodes.running());
        } else {
            let running = nodes.running();
            let victim = running[rng.random_range(0..running.len())];
            traffic.expect_gone(victim);
            let index = nodes.index_of(victim);
            nodes.kill(index);
        }
        for _ in 0..rng.random_range(1..4) {
            watch.look(&nodes);
            thread::sleep(Duration::from_millis(rng.random_range(0..500)));
            watch.look(&nodes);
            nodes.kill_viewleader();
            thread::sleep(Duration::from_millis(rng.random_range(0..200)));
            nodes.start_viewleader();
            watch.look(&nodes);
            assert_eq!(ask("lock_get", "door", "me")["status"], "granted", "it is still held");
            let queued = ask("lock_get", "door", "you");
            assert_eq!((&queued["status"], &queued["position"]), (&json!("retry"), &json!(1)));
        }
        // No second failure before all is well again: nobody's keys are to be lost.
        nodes.wait_until_at_rest();
    }
    traffic.wait_for_writes(50);
    nodes.wait_until_at_rest();
    watch.look(&nodes);
    let outcome = traffic.end();
    nodes.assert_holds(&outcome);
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
    assert_eq!(ask("lock_release", "door", "me")["status"], "ok");
    assert_eq!(ask("lock_get", "door", "you")["status"], "granted");
    // The workers' own lock is free: the next rebalancing is not held up.
    wait_until("nobody rebalances", PATIENCE, || {
        let granted = ask("lock_get", "rebalancing", "me")["status"] == "granted";
        ask("lock_release", "rebalancing", "me");
        granted.then_some(())
    });
}

// ---- old copies ----

/// A cluster of `count` in which the first server's directory was copied, and all
/// keys were written anew since then; with the copy and the keys.
fn with_an_old_copy(count: usize, lease: f64) -> (Nodes, PathBuf, Vec<(String, String)>) {
    let mut nodes = Nodes::start(count, lease);
    let keys = pairs("key", 100);
    write_all(nodes.at(0), &keys);
    nodes.kill(0);
    let copy = nodes.data().join("copy");
    copy_folder(nodes.folder(0), &copy);
    nodes.restart(0);
    nodes.wait_until_at_rest();
    let newer = rewritten(&keys, "newer");
    insist_on(nodes.at(0), &newer);
    (nodes, copy, newer)
}

/// Puts the copy in place of the directory of the first server.
fn put_back(nodes: &Nodes, copy: &Path) {
    fs::remove_dir_all(nodes.folder(0)).unwrap();
    copy_folder(copy, nodes.folder(0));
}

/// Whoever is asked, an answer is the newest or a refusal.
fn assert_nothing_old(nodes: &Nodes, keys: &[(String, String)]) {
    for (key, value) in keys {
        for address in nodes.running() {
            let Reply::Value(reply) = call(address, &getr(key)) else { continue };
            let is_refused = reply["reason"] == "unavailable";
            assert!(is_refused || reply["value"] == *value, "{key} from {address}: {reply}");
        }
    }
}

#[test]
fn an_old_copy_of_a_directory_that_is_put_back_within_the_lease_is_a_newcomers() {
    let (mut nodes, copy, keys) = with_an_old_copy(3, 4.0);
    let epoch = nodes.epoch();
    nodes.kill(0);
    put_back(&nodes, &copy);
    nodes.restart(0);
    assert_nothing_old(&nodes, &keys[..5]);
    nodes.wait_until_at_rest();
    assert!(nodes.epoch() > epoch, "it is a new member");
    assert_nothing_old(&nodes, &keys);
    wait_until_placed(nodes.leader());
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
}

#[test]
fn an_old_copy_that_is_put_back_after_the_lease_is_a_newcomers() {
    let (mut nodes, copy, keys) = with_an_old_copy(3, SHORT_LEASE);
    nodes.kill(0);
    nodes.wait_until_out(0);
    put_back(&nodes, &copy);
    nodes.restart(0);
    nodes.wait_until_at_rest();
    assert_nothing_old(&nodes, &keys);
    wait_until_placed(nodes.leader());
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
}

#[test]
fn an_old_copy_that_was_started_in_vain_before_is_a_newcomers_all_the_same() {
    let (mut nodes, copy, keys) = with_an_old_copy(3, 6.0);
    nodes.kill(0);
    // Its first starts reach nobody.
    nodes.kill_viewleader();
    put_back(&nodes, &copy);
    for _ in 0..2 {
        nodes.restart(0);
        nodes.kill(0);
    }
    nodes.start_viewleader();
    nodes.restart(0);
    nodes.wait_until_at_rest();
    assert_nothing_old(&nodes, &keys);
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
}

#[test]
fn an_old_copy_does_not_bring_back_what_is_lost() {
    let (mut nodes, copy, keys) = with_an_old_copy(3, SHORT_LEASE);
    nodes.kill_together(&[0, 1, 2]);
    wait_until("nobody is listed any more", PATIENCE, || (nodes.listed() == 0).then_some(()));
    put_back(&nodes, &copy);
    nodes.restart(0);
    wait_until("it has joined", PATIENCE, || (nodes.listed() == 1).then_some(()));
    wait_until("it knows the view", PATIENCE, || {
        let error = nodes.try_call(0, &getr("never written"))?;
        (error["error"].is_null() || error["error"].as_str()?.contains("lost")).then_some(())
    });
    assert_nothing_old(&nodes, &keys);
    nodes.restart(1);
    nodes.wait_until_at_rest();
    nodes.running().iter().for_each(|address| assert_all(*address, &keys));
}

// ---- two over one ----

#[test]
fn two_programs_never_run_over_one_data_directory() {
    let mut nodes = Nodes::start(1, SHORT_LEASE);
    write_all(nodes.at(0), &pairs("key", 10));
    let folders = [
        (env!("CARGO_BIN_EXE_server"), nodes.folder(0).to_owned()),
        (env!("CARGO_BIN_EXE_viewleader"), nodes.data().join("viewleader")),
    ];
    for (program, folder) in folders {
        let mut command = Command::new(program);
        command.args(["--listen", "127.0.0.1:0", "--data-dir"]).arg(&folder);
        let finished = run("the second", &mut command);
        assert!(finished.code.is_some_and(|code| code != 0), "{finished}");
        let said = &finished.stderr;
        assert!(said.contains("in use") && said.contains(&*folder.to_string_lossy()), "{said}");
    }
    // The first ones have not noticed.
    assert_readable(&nodes.running(), pairs("key", 10).iter().map(|(key, _)| key));
    nodes.assert_sound();
}

// ---- a full disk ----

const MIB: u64 = 1024 * 1024;

/// A file system in memory; gone when this is dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// One of so many bytes at `path`; `None`, with a notice, where that can't be.
    fn mount(path: PathBuf, bytes: u64) -> Option<Self> {
        fs::create_dir_all(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(&path);
        match mount.output() {
            Ok(output) if output.status.success() => Some(Self(path)),
            _ => {
                let _ = writeln!(std::io::stderr(), "skipped: no tmpfs can be mounted here");
                None
            }
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: the program that uses it may be about to end.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_refuses_writes_and_serves_reads_until_there_is_room() {
    let mut nodes = Nodes::start(3, 4.0);
    // 256 MiB are kept free for the engine: see src/common/store/disk.rs.
    let small = nodes.data().join("small");
    let Some(_disk) = Tmpfs::mount(small.clone(), 400 * MIB) else { return };
    let full = nodes.add(small.join("server"), &[]);
    nodes.wait_until_at_rest();
    let keys = pairs("key", 400);
    write_all(nodes.at(0), &keys);

    let ballast = small.join("ballast");
    let filled = Command::new("fallocate").args(["-l", "200M"]).arg(&ballast).status();
    assert!(filled.unwrap().success());
    let listing = Listing::of(nodes.leader()).unwrap();
    let full_at = nodes.at(full);
    let is_there = |key: &str| support::keys::replicas_of(key, &listing).contains(&full_at);
    // The first write finds out, and is in doubt until there is room.
    let (there, elsewhere): (Vec<_>, Vec<_>) =
        keys.iter().cloned().partition(|(key, _)| is_there(key));
    assert!(!there.is_empty() && !elsewhere.is_empty());
    let probe = there[0].0.clone();
    let prober = thread::spawn({
        let at = nodes.at(0);
        move || call(at, &setr(&probe, "in doubt"))
    });
    let at = nodes.at(1);
    let refusal = wait_until("a write is refused", PATIENCE, || {
        let reply = call(at, &setr(&there[1].0, "refused")).value();
        reply["error"].as_str().is_some_and(|error| error.contains("full")).then_some(reply)
    });
    assert_eq!(refusal["reason"], "unavailable", "{refusal}");
    let error = refusal["error"].as_str().unwrap();
    assert!(error.contains(&full_at.to_string()), "it does not say whose disk: {error}");
    // The full server itself may have refused before its heartbeat told of it.
    wait_until("the status says so", PATIENCE, || {
        let status = nodes.ask("status");
        let mut servers = status["servers"].as_array()?.iter();
        let entry = servers.find(|server| server["address"] == json!(full_at))?;
        (entry["notes"] == json!(["full"])).then_some(())
    });
    // Others take writes, and everybody reads.
    let newer = rewritten(&elsewhere, "newer");
    write_all(nodes.at(0), &newer);
    for address in nodes.running() {
        assert_all(address, &newer);
        assert_all(address, &there[2..]);
    }
    assert!(nodes.is_at_rest(), "a full disk is no failure");

    fs::remove_file(ballast).unwrap();
    wait_until("writes are taken again", PATIENCE, || {
        let reply = call(at, &setr(&there[1].0, "taken")).value();
        (reply["status"] == "ok").then_some(())
    });
    // Other primaries may hear of it a moment later.
    let all = rewritten(&keys, "newest");
    insist_on(nodes.at(2), &all);
    nodes.running().iter().for_each(|address| assert_all(*address, &all));
    let probed = prober.join().unwrap();
    println!("the first write: {probed:?}");
    nodes.wait_until_at_rest();
    wait_until_placed(nodes.leader());
    nodes.assert_sound();
    assert_eq!(nodes.ask("status")["servers"].to_string().matches("full").count(), 0);
    // The disk goes after the server that is on it.
    nodes.kill(full);
}

#[test]
fn a_server_with_a_full_disk_can_be_drained() {
    let mut nodes = Nodes::start(3, 4.0);
    let small = nodes.data().join("small");
    let Some(_disk) = Tmpfs::mount(small.clone(), 400 * MIB) else { return };
    let full = nodes.add(small.join("server"), &[]);
    nodes.wait_until_at_rest();
    let keys = pairs("key", 200);
    write_all(nodes.at(0), &keys);
    let ballast = small.join("ballast");
    let filled = Command::new("fallocate").args(["-l", "200M"]).arg(&ballast).status();
    assert!(filled.unwrap().success());
    // Some writes find the disk full: they are refused or in doubt.
    let at = nodes.at(0);
    let mut connection = Connection::open(at).unwrap();
    for (key, value) in rewritten(&keys, "in doubt") {
        connection.send(&frame(setr(&key, &value).to_string().as_bytes()));
    }
    wait_until("it is known to be full", PATIENCE, || {
        nodes.ask("status")["servers"].to_string().contains("\"full\"").then_some(())
    });
    call(nodes.leader(), &json!({"cmd": "drain", "server": nodes.at(full)})).value();
    let ended = within(PATIENCE, || {
        view_of(nodes.leader())?.own_members().all(|m| m.address != nodes.at(full)).then_some(())
    });
    let status = nodes.ask("status");
    assert!(ended.is_some(), "the refusal says to drain it: {status}");
    let ended = nodes.try_until_ended(full);
    assert_eq!(ended.and_then(|finished| finished.code), Some(0));
    nodes.wait_until_at_rest();
    insist_on(nodes.at(0), &rewritten(&keys, "newest"));
}
