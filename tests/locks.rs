//! The lock service with real processes: tokens, times to live, and commands that
//! run under a lock.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, and it has threads"
)]

mod support;

use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;
use support::keys::{getr, setr};
use support::nodes::Nodes;
use support::process::{Finished, PATIENCE, Program, run, wait_until};
use support::systems::our_client;
use support::wire::call;

/// Runs our client to its end.
fn client(nodes: &Nodes, arguments: &[&str]) -> Finished {
    run("client", &mut our_client(nodes.leader(), nodes.at(0), arguments))
}

/// Starts a client that runs `script` under the lock `door`.
fn under_the_lock(nodes: &Nodes, ttl: &str, script: &str) -> Program {
    let arguments = ["lock_run", "door", "--ttl", ttl, "--", "sh", "-c", script];
    Program::start("client", &mut our_client(nodes.leader(), nodes.at(0), &arguments))
}

fn token_of(finished: &Finished) -> u64 {
    finished.json()["token"].as_u64().unwrap_or_else(|| panic!("no token: {finished}"))
}

/// The only lock there is.
fn door(nodes: &Nodes) -> Value {
    let reply = call(nodes.leader(), &json!({"cmd": "lock_list"})).value();
    reply["locks"][0].clone()
}

fn wait_until_held_by(nodes: &Nodes, count: usize) {
    wait_until("the lock is held", PATIENCE, || {
        (door(nodes)["holders"].as_array().map_or(0, Vec::len) == count).then_some(())
    });
}

fn wait_for_file(path: &Path) {
    wait_until("the command has begun", PATIENCE, || path.exists().then_some(()));
}

#[test]
fn a_command_under_a_lock_knows_its_token_and_its_exit_status_is_passed_on() {
    let nodes = Nodes::start(1, 4.0);
    let first = token_of(&client(&nodes, &["lock_get", "door", "ann"]));
    assert_eq!(client(&nodes, &["lock_release", "door", "ann"]).code, Some(0));
    let script = r#"echo "$RINGLEADER_LOCK $RINGLEADER_TOKEN"; exit 42"#;
    let finished = client(&nodes, &["lock_run", "door", "--", "sh", "-c", script]);
    assert_eq!(finished.code, Some(42), "{finished}");
    let token: u64 = finished.stdout.trim().strip_prefix("door ").unwrap().parse().unwrap();
    assert!(token > first, "{token} after {first}");
    assert!(door(&nodes).is_null(), "it is given back");
    let finished = client(&nodes, &["lock_run", "door", "--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(finished.code, Some(128 + 9), "{finished}");
    let finished = client(&nodes, &["lock_run", "door", "--", "/no/such/command"]);
    assert_eq!(finished.code, Some(127), "{finished}");
    assert!(door(&nodes).is_null(), "it is given back then, too");
}

#[test]
fn commands_under_one_lock_run_one_after_the_other() {
    let nodes = Nodes::start(1, 4.0);
    let log = nodes.data().join("log");
    let script = format!("echo begin >> {0}; sleep 0.1; echo end >> {0}", log.display());
    let commands: Vec<_> = (0..6).map(|_| under_the_lock(&nodes, "5", &script)).collect();
    for command in commands {
        let finished = command.finish(PATIENCE);
        assert_eq!(finished.code, Some(0), "{finished}");
    }
    assert_eq!(fs::read_to_string(log).unwrap(), "begin\nend\n".repeat(6));
}

#[test]
fn a_lock_is_kept_alive_for_as_long_as_its_command_runs() {
    let nodes = Nodes::start(1, 4.0);
    let begun = nodes.data().join("begun");
    let command = under_the_lock(&nodes, "0.6", &format!("touch {}; sleep 3", begun.display()));
    wait_for_file(&begun);
    let other = ["lock_run", "door", "--ttl", "1", "--", "true"];
    let other = Program::start("client", &mut our_client(nodes.leader(), nodes.at(0), &other));
    let finished = command.finish(PATIENCE);
    assert_eq!(finished.code, Some(0), "it was not ended for want of signs of life: {finished}");
    assert_eq!(other.finish(PATIENCE).code, Some(0));
}

#[test]
fn when_the_lock_can_not_be_kept_the_command_and_what_it_has_started_are_ended() {
    let mut nodes = Nodes::start(1, 4.0);
    let (begun, alive) = (nodes.data().join("begun"), nodes.data().join("alive"));
    // It does not heed SIGTERM, and neither does its child.
    let script = format!(
        "trap '' TERM; (while :; do touch {1}; sleep 0.05; done) & touch {0}; wait",
        begun.display(),
        alive.display()
    );
    let command = under_the_lock(&nodes, "1", &script);
    wait_for_file(&begun);
    nodes.kill_viewleader();
    let finished = command.finish(PATIENCE);
    assert_eq!(finished.code, Some(4), "{finished}");
    assert!(finished.stderr.contains("about to be lost"), "{finished}");
    wait_until("its child is gone, too", PATIENCE, || {
        fs::remove_file(&alive).ok();
        thread::sleep(Duration::from_millis(300));
        (!alive.exists()).then_some(())
    });
}

#[test]
fn a_client_that_dies_while_it_waits_leaves_the_queue_and_one_that_holds_loses_the_lock() {
    let nodes = Nodes::start(1, 4.0);
    let (begun, stay) = (nodes.data().join("begun"), nodes.data().join("stay"));
    fs::write(&stay, "").unwrap();
    // It is to outlive its client, and not the test.
    let script =
        format!("touch {}; while [ -e {} ]; do sleep 0.1; done", begun.display(), stay.display());
    let mut holder = under_the_lock(&nodes, "3", &script);
    wait_for_file(&begun);
    let mut waiter = under_the_lock(&nodes, "3", "true");
    wait_until("it waits", PATIENCE, || {
        holder.assert_running();
        waiter.assert_running();
        (door(&nodes)["waiting"].as_array().map_or(0, Vec::len) == 1).then_some(())
    });
    waiter.signal("KILL");
    waiter.finish(PATIENCE);
    wait_until("it has left the queue", PATIENCE, || {
        door(&nodes)["waiting"].as_array()?.is_empty().then_some(())
    });
    let first = door(&nodes)["holders"][0]["token"].as_u64().unwrap();
    holder.signal("KILL");
    let next = client(&nodes, &["lock_get", "door", "next", "--wait"]);
    assert!(token_of(&next) > first, "{next}");
    fs::remove_file(&stay).unwrap();
    holder.finish(PATIENCE);
}

#[test]
fn locks_and_tokens_survive_the_viewleader() {
    let mut nodes = Nodes::start(1, 4.0);
    let token = token_of(&client(&nodes, &["lock_get", "door", "ann", "--ttl", "30"]));
    nodes.kill_viewleader();
    nodes.start_viewleader();
    wait_until("it leads", PATIENCE, || door(&nodes)["holders"].as_array().map(drop));
    assert_eq!(token_of(&client(&nodes, &["lock_get", "door", "ann", "--ttl", "30"])), token);
    let keep = ["lock_keep", "door", "ann", &token.to_string()];
    assert_eq!(client(&nodes, &keep).code, Some(0));
    assert_eq!(client(&nodes, &["lock_keep", "door", "ann", "77777"]).code, Some(1));
    assert_eq!(client(&nodes, &["lock_release", "door", "ann"]).code, Some(0));
    assert!(token_of(&client(&nodes, &["lock_get", "door", "bob"])) > token);
}

#[test]
fn a_holder_that_slept_past_its_time_is_fenced_off() {
    let nodes = Nodes::start(3, 4.0);
    assert_eq!(call(nodes.at(0), &setr("k", "first")).value()["status"], "ok");
    let late = token_of(&client(&nodes, &["lock_get", "door", "ann", "--ttl", "0.5"]));
    let next = token_of(&client(&nodes, &["lock_get", "door", "bob", "--wait"]));
    assert!(next > late);
    let write = |value: &str, token: u64| {
        client(&nodes, &["setr", "k", value, "--fence", &format!("door:{token}")])
    };
    assert_eq!(write("bob's", next).code, Some(0));
    let refused = write("ann's", late);
    assert_eq!(refused.code, Some(1));
    assert_eq!(refused.json()["reason"], "fenced");
    assert_eq!(call(nodes.at(1), &getr("k")).value()["value"], "bob's");
}

#[test]
fn many_share_a_lock_and_one_who_waits_alone_is_next() {
    let nodes = Nodes::start(1, 4.0);
    let shared = |name: &str| client(&nodes, &["lock_get", "door", name, "--shared"]);
    let (first, second) = (token_of(&shared("a")), token_of(&shared("b")));
    assert!(second > first);
    wait_until_held_by(&nodes, 2);
    let arguments = ["lock_get", "door", "writer", "--wait"];
    let writer = Program::start("client", &mut our_client(nodes.leader(), nodes.at(0), &arguments));
    wait_until("it waits", PATIENCE, || {
        (door(&nodes)["waiting"].as_array().map_or(0, Vec::len) == 1).then_some(())
    });
    let arguments = ["lock_get", "door", "c", "--shared", "--wait"];
    let late = Program::start("client", &mut our_client(nodes.leader(), nodes.at(0), &arguments));
    wait_until("it waits, too", PATIENCE, || {
        (door(&nodes)["waiting"].as_array().map_or(0, Vec::len) == 2).then_some(())
    });
    for name in ["a", "b"] {
        assert_eq!(client(&nodes, &["lock_release", "door", name]).code, Some(0));
    }
    let granted = writer.finish(PATIENCE);
    assert!(token_of(&granted) > second, "{granted}");
    assert_eq!(client(&nodes, &["lock_release", "door", "writer"]).code, Some(0));
    assert!(token_of(&late.finish(PATIENCE)) > token_of(&granted));
}
