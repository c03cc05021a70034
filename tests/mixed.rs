//! Ours and the original's programs in one system, in every combination that a
//! holder of the originals meets who swaps them one at a time.
//!
//! The original's part is played by the stand-ins of tests/reference; without a
//! Python these tests say so and pass.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use ringleader::wire::address::PortRange;
use serde_json::{Value, json};
use std::process::Command;
use support::process::{Finished, PATIENCE, Program, free_ports, run, wait_until};
use support::systems::{
    Listing, Ours, Reference, Scripts, System, local, only, our_client, our_server, our_viewleader,
    wait_until_settled,
};
use support::wire::{Reply, call};

/// The one line of JSON that client.py prints for `arguments`.
fn reply_of(client: &mut Command) -> Value {
    run("client.py", client).json()
}

/// Runs our client and checks its exit status.
fn expect(status: i32, client: &mut Command) -> Finished {
    let finished = run("client", client);
    assert_eq!(finished.code, Some(status), "{client:?}: {finished}");
    finished
}

fn lock_request(cmd: &str, requestor: &str) -> Value {
    json!({"cmd": cmd, "lockid": "door", "requestor": requestor})
}

/// Starts `client`, which asks for the lock "door" while another holds it, and
/// waits until it says that it waits.
fn start_to_wait_for_the_lock(client: &mut Command) -> Program {
    let mut waiting = Program::start("client", client);
    wait_until("the client says that it waits for the lock", PATIENCE, || {
        waiting.assert_running();
        waiting.stderr().to_lowercase().contains("wait").then_some(())
    });
    waiting
}

#[test]
fn an_original_client_works_on_our_cluster_with_all_its_commands() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    // Nobody listens on the first port of either range: the client walks on.
    let first = free_ports(6);
    let viewleaders = PortRange { first, count: 2 };
    let servers = PortRange { first: first + 2, count: 4 };
    let ours = Ours::start_on(first + 1, &[first + 3, first + 4, first + 5]);
    let client =
        |arguments: &[&str]| reply_of(&mut scripts.client(viewleaders, servers, arguments));

    assert_eq!(client(&["print", "hello", "world"])["status"], "ok");
    wait_until("the words are printed", PATIENCE, || {
        ours.printed(0).lines().any(|line| line == "hello world").then_some(())
    });
    assert_eq!(client(&["set", "apple", "green"])["status"], "ok");
    assert_eq!(client(&["get", "apple"])["value"], "green");
    assert_eq!(client(&["get", "nothing"])["status"], "not_found");
    assert_eq!(client(&["setr", "pear", "yellow"]), json!({"status": "ok"}));
    assert_eq!(client(&["getr", "pear"])["value"], "yellow");
    assert_eq!(client(&["getr", "nothing"])["status"], "not_found");
    // Twice: the first vote must not linger.
    assert_eq!(client(&["setr", "pear", "brown"]), json!({"status": "ok"}));
    assert_eq!(client(&["getr", "pear"])["value"], "brown");
    let keys = client(&["query_all_keys"]);
    let mut keys: Vec<&str> = keys["result"].as_array().unwrap().iter().map(text).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["apple", "pear"]);
    assert_eq!(client(&["query_servers"])["result"].as_array().unwrap().len(), 3);
    assert_eq!(client(&["lock_get", "door", "me"])["status"], "granted");
    assert_eq!(client(&["lock_release", "door", "me"])["status"], "ok");
    assert_eq!(client(&["lock_release", "door", "me"])["status"], "unknown");
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

#[test]
fn an_original_client_on_our_cluster_is_granted_a_lock_once_its_holder_lets_go() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let mut viewleader = our_viewleader(0);
    let address = viewleader.listening();
    assert_eq!(call(address, &lock_request("lock_get", "first")).value()["status"], "granted");
    let mut client =
        scripts.client(only(address.port()), PortRange::SERVER, &["lock_get", "door", "second"]);
    let waiting = start_to_wait_for_the_lock(&mut client);
    assert_eq!(call(address, &lock_request("lock_release", "first")).value()["status"], "ok");
    assert_eq!(waiting.finish(PATIENCE).json()["status"], "granted");
    // It holds it really.
    assert_eq!(call(address, &lock_request("lock_get", "first")).value()["status"], "retry");
}

#[test]
fn our_client_works_on_an_original_system_with_all_its_commands() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let reference = Reference::start(scripts, 3);
    let client = |status: i32, arguments: &[&str]| {
        let mut command = our_client(reference.viewleader(), reference.servers()[0], arguments);
        expect(status, &mut command).json()
    };

    assert_eq!(client(0, &["print", "hello", "world"])["status"], "ok");
    wait_until("the words are printed", PATIENCE, || {
        reference.printed(0).lines().any(|line| line == "hello world").then_some(())
    });
    assert_eq!(client(0, &["set", "apple", "green"])["status"], "ok");
    assert_eq!(client(0, &["get", "apple"])["value"], "green");
    assert_eq!(client(1, &["get", "nothing"])["status"], "not_found");
    assert_eq!(client(0, &["query_all_keys"])["result"], json!(["apple"]));
    assert_eq!(client(0, &["query_servers"])["result"].as_array().unwrap().len(), 3);
    assert_eq!(client(0, &["setr", "pear", "yellow"])["status"], "ok");
    for server in reference.servers() {
        let held = call(*server, &json!({"cmd": "get", "key": "pear"})).value();
        assert_eq!(held["value"], "yellow", "on {server}");
    }
    assert_eq!(client(0, &["getr", "pear"])["value"], "yellow");
    assert_eq!(client(1, &["getr", "nothing"])["status"], "not_found");
    assert_eq!(client(0, &["lock_get", "door", "me"])["status"], "granted");
    assert_eq!(client(0, &["lock_release", "door", "me"])["status"], "ok");
    assert_eq!(client(1, &["lock_release", "door", "me"])["status"], "unknown");
}

#[test]
fn our_client_is_told_no_by_original_servers_that_have_a_vote_pending() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let reference = Reference::start(scripts, 3);
    for server in reference.servers() {
        let vote = call(*server, &json!({"cmd": "setr_request", "key": "pear"})).value();
        assert_eq!(vote["reply"], "ok");
    }
    expect(1, &mut reference_client(&reference, &["setr", "pear", "yellow"]));
    expect(1, &mut reference_client(&reference, &["getr", "pear"]));
}

/// Our client on an original system.
fn reference_client(reference: &Reference, arguments: &[&str]) -> Command {
    our_client(reference.viewleader(), reference.servers()[0], arguments)
}

#[test]
fn our_client_is_granted_a_lock_of_an_original_viewleader_once_its_holder_lets_go() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let reference = Reference::start(scripts, 0);
    let viewleader = reference.viewleader();
    assert_eq!(call(viewleader, &lock_request("lock_get", "first")).value()["status"], "granted");
    // There are no servers: a lock needs none.
    let mut client = our_client(viewleader, local(1), &["lock_get", "door", "second"]);
    let waiting = start_to_wait_for_the_lock(&mut client);
    assert_eq!(call(viewleader, &lock_request("lock_release", "first")).value()["status"], "ok");
    let finished = waiting.finish(PATIENCE);
    assert_eq!(finished.code, Some(0), "{finished}");
    assert_eq!(finished.json()["status"], "granted");
}

#[test]
fn our_client_leaves_the_queue_of_an_original_viewleader_when_interrupted() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let reference = Reference::start(scripts, 0);
    let viewleader = reference.viewleader();
    assert_eq!(call(viewleader, &lock_request("lock_get", "first")).value()["status"], "granted");
    let mut client = our_client(viewleader, local(1), &["lock_get", "door", "second"]);
    let waiting = start_to_wait_for_the_lock(&mut client);
    waiting.signal("INT");
    let finished = waiting.finish(PATIENCE);
    assert_ne!(finished.code, Some(0), "{finished}");
    // Whoever is not in the queue is a stranger, over whom this viewleader stumbles.
    assert_eq!(call(viewleader, &lock_request("lock_release", "second")), Reply::Closed);
}

#[test]
fn an_original_server_joins_our_viewleader_and_is_listed_next_to_ours() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let ours = Ours::start(2);
    let before = Listing::of(ours.viewleader()).unwrap();
    let mut original = scripts.server(only(ours.viewleader().port()), only(0));
    let address = original.listening();
    let after = wait_until("the original server is listed", PATIENCE, || {
        Listing::of(ours.viewleader()).filter(|listing| listing.has(address))
    });
    assert_eq!(after.servers.len(), 3);
    assert!(ours.servers().iter().all(|server| after.has(*server)));
    assert!(after.servers.is_sorted_by_key(|(_, hash)| *hash));
    assert!(after.epoch > before.epoch, "a server came, and the epoch stayed");
    // It learns the epoch by its heartbeats, and votes with it as ours do.
    wait_until_settled(ours.viewleader(), &[ours.servers(), &[address]].concat());
    // Ours go on serving their keys by themselves.
    expect(0, &mut ours.client(&["setr", "pear", "yellow"]));
    assert_eq!(expect(0, &mut ours.client(&["getr", "pear"])).json()["value"], "yellow");
}

#[test]
fn our_server_serves_original_clients_among_original_servers() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let ports = free_ports(4);
    let (viewleaders, ours_alone) = (only(ports), only(ports + 1));
    let mut viewleader = scripts.viewleader(viewleaders);
    let viewleader_address = viewleader.listening();
    let data = tempfile::tempdir().unwrap();
    let mut ours = our_server(viewleader_address, ports + 1, data.path());
    let mut originals = [ports + 2, ports + 3].map(|port| scripts.server(viewleaders, only(port)));
    let [second, third] = originals.each_mut().map(Program::listening);
    let servers = [ours.listening(), second, third];
    wait_until_settled(viewleader_address, &servers);
    let client =
        |arguments: &[&str]| reply_of(&mut scripts.client(viewleaders, ours_alone, arguments));

    assert_eq!(client(&["set", "apple", "green"])["status"], "ok");
    assert_eq!(client(&["get", "apple"])["value"], "green");
    for value in ["yellow", "brown"] {
        assert_eq!(client(&["setr", "pear", value]), json!({"status": "ok"}));
        assert_eq!(client(&["getr", "pear"])["value"], value);
        for server in servers {
            let held = call(server, &json!({"cmd": "get", "key": "pear"})).value();
            assert_eq!(held["value"], value, "on {server}");
        }
    }
    let vote = json!({"cmd": "setr_request", "key": "pear"});
    assert_eq!(call(servers[0], &vote).value()["reply"], "ok");
    assert!(client(&["setr", "pear", "green"])["error"].is_string(), "a vote was pending on ours");
    assert_eq!(client(&["getr", "pear"])["value"], "brown");
    // Our client finds its way there, too.
    let mut getr = our_client(viewleader_address, servers[0], &["getr", "pear"]);
    assert_eq!(expect(0, &mut getr).json()["value"], "brown");
}
