//! Backups of a running cluster, and restores after everything was lost: with real
//! processes.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, and it has threads"
)]

mod support;

use ringleader::backup::folder::Backup;
use ringleader::view::restoring::BackupId;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::keys::{assert_all, getr, pairs, setr, value_of, write_all};
use support::nodes::{Nodes, copy_folder};
use support::process::{Finished, PATIENCE, Program, run, wait_until};
use support::systems::{Reference, Scripts, System, our_client, view_of};
use support::traffic::Traffic;
use support::viewleaders::Viewleaders;
use support::wire::call;

const LEASE: f64 = 4.0;

fn client(nodes: &Nodes, arguments: &[&str]) -> Finished {
    run("client", &mut our_client(nodes.leader(), nodes.running()[0], arguments))
}

/// A client that tries for so many seconds.
fn patient_client(nodes: &Nodes, seconds: u64) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_client"));
    command.args(["--viewleader", &nodes.leader().to_string()]);
    command.args(["--timeout", &seconds.to_string()]);
    command
}

fn backup_to(nodes: &Nodes, folder: &Path) -> Finished {
    client(nodes, &["backup", folder.to_str().unwrap()])
}

fn restore_from(nodes: &Nodes, folder: &Path) -> Finished {
    client(nodes, &["restore", folder.to_str().unwrap()])
}

fn assert_done(finished: &Finished) {
    assert_eq!(finished.code, Some(0), "{finished}");
}

/// It has failed and says so.
fn assert_refused(finished: &Finished, word: &str) {
    assert_eq!(finished.code, Some(1), "{finished}");
    assert!(finished.stderr.contains(word), "{word:?} in {finished}");
}

/// The keys in a backup, with their values; those that are deleted are checked and
/// left out.
fn held(folder: &Path) -> BTreeMap<String, String> {
    let backup = Backup::open(folder).unwrap();
    let entries = backup.entries().map(|entry| {
        let entry = entry.unwrap();
        (entry.key.to_string(), entry.content.value.map(|value| value.to_string()))
    });
    let all: Vec<_> = entries.collect();
    assert_eq!(all.len() as u64, backup.manifest.keys);
    let held: BTreeMap<_, _> = all.into_iter().collect();
    assert_eq!(held.len() as u64, backup.manifest.keys, "each key once");
    held.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

/// The highest of the numbers that clients see: an epoch, a version, a token.
fn numbers(nodes: &Nodes, lock: &str) -> [u64; 3] {
    let token = client(nodes, &["lock_get", lock, "somebody"]).json()["token"].as_u64().unwrap();
    let written = call(nodes.running()[0], &setr("numbers", "some")).value();
    let version = written["version"].as_str().unwrap().split('.').next().unwrap().parse().unwrap();
    [nodes.epoch(), version, token]
}

#[test]
fn a_backup_under_load_restores_every_acknowledged_value_into_a_cluster_of_another_size() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("backup");
    let mut old = Nodes::start(4, LEASE);
    let known = pairs("before", 3000);
    write_all(old.at(0), &known);
    let fenced = client(&old, &["lock_get", "door", "old"]).json()["token"].as_u64().unwrap();
    let door = format!("door:{fenced}");
    assert_done(&client(&old, &["setr", "guarded", "old", "--fence", &door]));
    assert_done(&client(&old, &["setr", "gone", "soon"]));
    assert_done(&client(&old, &["delr", "gone", "--fence", &door]));

    // Clients write; a server joins and another one is killed meanwhile.
    let traffic = Traffic::start(old.running());
    traffic.wait_for_writes(200);
    let due: BTreeSet<String> = traffic.acknowledged().into_iter().collect();
    traffic.expect_gone(old.at(3));
    old.kill(3);
    old.join(1, &[]);
    let taken = backup_to(&old, &folder);
    assert_done(&taken);
    let after = traffic.end();

    let backup = held(&folder);
    // One more is deleted, and remembers a lock.
    assert_eq!(taken.json()["keys"], backup.len() as u64 + 1);
    for (key, value) in
        known.iter().cloned().chain(due.iter().map(|key| (key.clone(), value_of(key))))
    {
        assert_eq!(backup.get(&key), Some(&value), "{key} was acknowledged before");
    }
    for key in backup.keys().filter(|key| key.starts_with(&after.prefix)) {
        let is_known = after.acknowledged.contains(key) || after.in_doubt.contains(key);
        assert!(is_known, "{key} was never written");
    }

    // What is given after the backup was taken must not come again either.
    let version = client(&old, &["getr", "guarded"]).json()["version"].as_str().unwrap().to_owned();
    let latest = numbers(&old, "after");
    let late = format!("after:{}", latest[2]);
    drop(old);

    // Everything is lost: other ports, other disks, another number of servers.
    let new = Nodes::start(2, LEASE);
    let restored = restore_from(&new, &folder);
    assert_done(&restored);
    for address in new.running() {
        let pairs: Vec<_> = backup.clone().into_iter().collect();
        assert_all(address, &pairs);
        let reply = call(address, &getr("gone")).value();
        assert_eq!(reply["status"], "not_found", "{reply}");
    }
    for (old, new) in latest.into_iter().zip(numbers(&new, "door")) {
        assert!(new > old, "{new} after {old}");
    }

    // Nothing that an old client knows is worth anything, be it from before the backup
    // or from after it.
    for stale in [&door, &late] {
        for key in ["guarded", "another"] {
            let refused = client(&new, &["setr", key, "stale", "--fence", stale]);
            assert_refused(&refused, "before the cluster was restored");
            assert_eq!(refused.json()["reason"], "fenced");
        }
    }
    let refused = client(&new, &["setr", "guarded", "stale", "--if-version", &version]);
    assert_eq!(refused.json()["reason"], "conflict", "{refused}");
    assert_eq!(client(&new, &["lock_get", "after", "new"]).json()["status"], "granted");
    let token = client(&new, &["lock_get", "door", "somebody"]).json()["token"].clone();
    assert_done(&client(&new, &["setr", "guarded", "new", "--fence", &format!("door:{token}")]));

    // It was restored, and is in use.
    assert_refused(&restore_from(&new, &folder), "not empty");

    // Once more from the same backup: beyond the first restored cluster, too.
    let first = numbers(&new, "again");
    drop(new);
    let newer = Nodes::start(3, LEASE);
    assert_done(&restore_from(&newer, &folder));
    for (old, new) in first.into_iter().zip(numbers(&newer, "again")) {
        assert!(new > old, "{new} after {old}");
    }
}

#[test]
fn three_viewleaders_one_of_them_killed_take_a_restore_and_a_backup() {
    let place = tempfile::tempdir().unwrap();
    let (first, second) = (place.path().join("first"), place.path().join("second"));
    let old = Nodes::start(3, LEASE);
    let known = pairs("kept", 500);
    write_all(old.at(0), &known);
    assert_done(&backup_to(&old, &first));
    drop(old);

    let mut group = Viewleaders::start(3);
    let data = tempfile::tempdir().unwrap();
    let mut servers: Vec<Program> = (0..3)
        .map(|number| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
            command.args(["--listen", "127.0.0.1:0", "--viewleader", &group.all()]);
            command.arg("--data-dir").arg(data.path().join(number.to_string()));
            Program::start("server", &mut command)
        })
        .collect();
    let addresses: Vec<_> = servers.iter_mut().map(Program::listening).collect();
    let is_there = |group: &Viewleaders| {
        let view = view_of(group.at(group.leader_now()?))?;
        (view.own_members().count() == 3 && view.is_at_rest()).then_some(())
    };
    wait_until("all servers are there", PATIENCE, || is_there(&group));
    let leader = group.leader();
    group.end(leader, "KILL");
    assert_done(&group.client(&["restore", first.to_str().unwrap()]));
    addresses.iter().for_each(|address| assert_all(*address, &known));
    assert_done(&group.client(&["backup", second.to_str().unwrap()]));
    assert_eq!(held(&first), held(&second));
    let state: Value =
        serde_json::from_slice(&fs::read(second.join("viewleader.json")).unwrap()).unwrap();
    assert_eq!(state["view"]["members"].as_array().unwrap().len(), 3);
}

#[test]
fn nobody_is_served_while_a_cluster_is_being_restored_and_the_same_command_goes_on() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("backup");
    let old = Nodes::start(1, LEASE);
    write_all(old.at(0), &pairs("kept", 20));
    assert_done(&backup_to(&old, &folder));
    let manifest = Backup::open(&folder).unwrap().manifest;
    drop(old);

    // As after a restore that was killed as soon as it began to load.
    let mut new = Nodes::start(2, LEASE);
    let step = |name: &str| {
        let above = manifest.numbers.beyond(manifest.ended_ms);
        let id = manifest.backup.clone();
        let request = json!({"cmd": "restore", "backup": id, "step": name, "above": above});
        assert_eq!(call(new.leader(), &request).value()["status"], "ok");
    };
    step("begin");
    step("load");
    new.wait_until_at_rest_unserved();
    for request in [
        getr("kept 1"),
        setr("kept 1", "too early"),
        json!({"cmd": "delr", "key": "kept 1"}),
        json!({"cmd": "get", "key": "kept 1"}),
    ] {
        let reply = call(new.at(0), &request).value();
        assert_eq!(reply["reason"], "unavailable", "{request}: {reply}");
    }
    let vote = json!({"cmd": "setr_request", "key": "kept 1"});
    assert_eq!(call(new.at(1), &vote).value()["reply"], "no");
    assert_refused(&backup_to(&new, &place.path().join("half")), "being restored");
    assert!(!place.path().join("half").exists());
    // Another backup can't come between.
    let other = place.path().join("other");
    rename_backup(&folder, &other);
    assert_refused(&restore_from(&new, &other), "another backup");
    // A restart of all of it changes nothing.
    new.kill_everything();
    new.start_viewleader();
    new.restart(0);
    new.restart(1);
    new.wait_until_at_rest_unserved();
    assert_done(&restore_from(&new, &folder));
    assert_all(new.at(0), &pairs("kept", 20));
    // What was sent while it was loaded and comes late is not written.
    let late = json!({"cmd": "load", "backup": manifest.backup,
        "entry": {"key": "kept 1", "version": "1.1", "value": "late"}});
    assert_eq!(call(new.at(0), &late).value()["reason"], "invalid");
    assert_all(new.at(0), &pairs("kept", 20));
}

/// Copies a backup under another name of its own.
fn rename_backup(from: &Path, to: &Path) {
    use ringleader::backup::folder::Writer;
    let backup = Backup::open(from).unwrap();
    let mut writer = Writer::begin(to).unwrap();
    let entries: Vec<_> = backup.entries().map(Result::unwrap).collect();
    writer.append(&entries).unwrap();
    writer
        .finish(ringleader::backup::Manifest {
            backup: BackupId::drawn(1),
            files: Vec::new(),
            ..backup.manifest
        })
        .unwrap();
}

#[test]
fn wrong_use_is_refused_in_clear_words_and_harms_nothing() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("backup");
    let nodes = Nodes::start(2, LEASE);
    let known = pairs("kept", 50);
    write_all(nodes.at(0), &known);
    let token = client(&nodes, &["lock_get", "door", "me"]).json()["token"].clone();
    assert_done(&backup_to(&nodes, &folder));
    // Never over anything.
    assert_refused(&backup_to(&nodes, &folder), "is there already");
    // A cluster in use, named by mistake, does not even notice.
    let view = view_of(nodes.leader()).unwrap().revision;
    assert_refused(&restore_from(&nodes, &folder), "not empty");
    assert_done(&client(&nodes, &["delr", "kept 0"]));
    assert_eq!(view_of(nodes.leader()).unwrap().revision, view);
    let fence = format!("door:{token}");
    assert_done(&client(&nodes, &["setr", "kept 0", &known[0].1, "--fence", &fence]));
    assert_all(nodes.at(1), &known);

    let new = Nodes::start(1, LEASE);
    // Locks are held there: somebody uses it.
    assert_done(&client(&new, &["lock_get", "door", "me"]));
    assert_refused(&restore_from(&new, &folder), "locks are held");
    assert_done(&client(&new, &["lock_release", "door", "me"]));
    // Damaged, cut short, of another time, nothing at all.
    let copy = |name: &str| -> PathBuf {
        let to = place.path().join(name);
        copy_folder(&folder, &to);
        to
    };
    let damaged = copy("damaged");
    let file = damaged.join("keys-00001.jsonl");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replacen("the value", "tne value", 1)).unwrap();
    assert_refused(&restore_from(&new, &damaged), "damaged");
    let partial = copy("b.partial");
    fs::remove_file(partial.join("manifest.json")).unwrap();
    assert_refused(&restore_from(&new, &partial), "no whole backup");
    let lacking = copy("lacking");
    fs::remove_file(lacking.join("keys-00001.jsonl")).unwrap();
    assert_refused(&restore_from(&new, &lacking), "keys-00001");
    let later = copy("later");
    fs::write(later.join("manifest.json"), r#"{"format":9}"#).unwrap();
    assert_refused(&restore_from(&new, &later), "format 9");
    assert_refused(&restore_from(&new, &place.path().join("nowhere")), "nowhere");
    // After all that it can still be restored.
    assert_done(&restore_from(&new, &folder));
    assert_all(new.at(0), &known);
}

#[test]
fn a_backup_that_can_not_be_written_or_is_interrupted_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("backup");
    let mut nodes = Nodes::start(1, LEASE);
    write_all(nodes.at(0), &pairs("some", 2000));
    let names = || {
        let found = fs::read_dir(place.path()).unwrap();
        found.map(|it| it.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    // No file may be longer than 32 KiB: as on a disk that is full.
    let program = env!("CARGO_BIN_EXE_client");
    let line = format!(
        "trap '' XFSZ; ulimit -f 32; exec {program} --viewleader {} backup {}",
        nodes.leader(),
        folder.display()
    );
    let full = run("client", Command::new("bash").arg("-c").arg(line));
    assert_refused(&full, "there is no room");
    assert_eq!(names(), Vec::<String>::new());

    // The server sleeps, so the backup waits; and the user has no patience.
    nodes.signal(0, "STOP");
    let mut command = patient_client(&nodes, 60);
    command.args(["backup", folder.to_str().unwrap()]);
    let program = Program::start("client", &mut command);
    wait_until("it has begun", PATIENCE, || (!names().is_empty()).then_some(()));
    assert_eq!(names(), ["backup.partial"]);
    program.signal("INT");
    nodes.signal(0, "CONT");
    let finished = program.finish(PATIENCE);
    assert_eq!(finished.code, Some(130), "{finished}");
    assert_eq!(names(), Vec::<String>::new());

    // Killed, it leaves what nobody takes for a backup, and the next one goes ahead.
    nodes.signal(0, "STOP");
    let program = Program::start("client", &mut command);
    wait_until("it has begun", PATIENCE, || (!names().is_empty()).then_some(()));
    program.signal("KILL");
    program.finish(PATIENCE);
    nodes.signal(0, "CONT");
    assert_refused(&restore_from(&nodes, &place.path().join("backup.partial")), "no whole backup");
    nodes.wait_until_at_rest();
    assert_done(&backup_to(&nodes, &folder));
    assert_eq!(names(), ["backup"]);
}

#[test]
fn what_originals_keep_is_not_backed_up_and_one_is_told_so() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let reference = Reference::start(scripts, 1);
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("backup");
    let arguments = ["backup", folder.to_str().unwrap()];
    let finished =
        run("client", &mut our_client(reference.viewleader(), reference.servers()[0], &arguments));
    assert_refused(&finished, "original");
    assert!(!folder.exists());
}

#[test]
fn a_lost_arc_is_named_rather_than_left_out() {
    let place = tempfile::tempdir().unwrap();
    let mut nodes = Nodes::start(1, 1.0);
    write_all(nodes.at(0), &pairs("some", 5));
    let lost = nodes.at(0);
    nodes.kill(0);
    nodes.wait_until_out(0);
    nodes.join(1, &[]);
    wait_until("the newcomer is in", PATIENCE, || {
        view_of(nodes.leader())?.own_members().next().map(|_| ())
    });
    let folder = place.path().join("backup");
    let finished =
        run("client", patient_client(&nodes, 1).args(["backup", folder.to_str().unwrap()]));
    assert_eq!(finished.code, Some(3), "{finished}");
    assert!(finished.stderr.contains(&format!("held last by {lost}")), "{finished}");
    assert!(!folder.exists());
}
