//! The file system as the programs of the original see it: by XML-RPC, through Python's
//! standard library, with stand-ins for the original's client library and chunkservers.
//! Where there is no Python, these tests say so and are skipped.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic; it has a clock, sockets and threads"
)]

mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;
use support::files::{System, chunk_files};
use support::process::{PATIENCE, Program, free_ports};
use support::systems::{Scripts, local};

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

/// Runs a script of tests/xml_rpc to its end.
fn run(scripts: &Scripts, script: &str, arguments: &[&str]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/xml_rpc");
    let mut command = scripts.python(&folder.join(script));
    let finished = Program::start(script, command.args(arguments)).finish(PATIENCE);
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(0), "done\n"), "{finished}");
}

/// Makes one call by the stand-in for the original's client library; gives what it
/// prints.
fn call(scripts: &Scripts, system: &System, arguments: &[&str]) -> String {
    let mut command = scripts.python(Path::new("gfs_client.py"));
    command.arg(url(system.at().port())).args(arguments);
    let finished = Program::start("gfs_client.py", &mut command).finish(PATIENCE);
    assert_eq!(finished.code, Some(0), "{arguments:?}: {finished}");
    finished.stdout.trim_end_matches('\n').to_owned()
}

#[test]
fn every_method_of_the_original_is_called_by_its_own_name() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let system = System::start(3, &[]);
    run(&scripts, "session.py", &[&url(system.at().port())]);
}

#[test]
fn what_can_not_be_carried_out_is_a_fault_and_touches_nothing() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let system = System::start(1, &[]);
    let list = || -> BTreeSet<_> {
        std::fs::read_dir(system.data.path()).unwrap().map(|it| it.unwrap().file_name()).collect()
    };
    let before = list();
    run(&scripts, "faults.py", &[&url(system.at().port()), &url(system.servers[0].port)]);
    assert_eq!(list(), before);
    assert_eq!(chunk_files(&system.folder(0)).len(), 0);
    assert_eq!(system.census().unwrap().files, 0);
}

#[test]
fn a_client_of_the_original_writes_and_reads_though_a_chunkserver_is_killed() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let mut system = System::start(4, &[]);
    let text: String = (0..20_000).map(|it| format!("{it:06} ")).collect();
    assert_eq!(call(&scripts, &system, &["create", "f"]), "successfully created f");
    // 140,000 bytes: across three chunks of 64,000.
    assert_eq!(call(&scripts, &system, &["write", "f", &text[..100_000], "0"]), "0");
    system.kill_server(0);
    assert_eq!(call(&scripts, &system, &["write", "f", &text[100_000..], "100000"]), "100000");
    let read = call(&scripts, &system, &["read", "f", "0", "140000"]);
    assert!(read == text[..text.len()], "{} characters were read", read.len());
    assert_eq!(call(&scripts, &system, &["read", "f", "63998", "4"]), &text[63_998..64_002]);
    // Ours sees the same file.
    let mut client = system.client();
    let stat = client.stat(&support::files::name("f")).unwrap();
    assert_eq!((stat.length, stat.file.chunks, stat.file.chunk_bytes), (140_000, 3, 64_000));
    system.start_server(0);
    system.wait_until_at_rest();
    assert_eq!(call(&scripts, &system, &["delete", "f"]), "successfully deleted f");
    assert_eq!(call(&scripts, &system, &["delete", "f"]), "file not found");
}

#[test]
fn a_client_of_the_original_can_ask_any_of_several_masters() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let system = System::with_masters(3, 1, &[]);
    let leader = system.leader();
    let asked = |master: usize, arguments: &[&str]| {
        let mut command = scripts.python(Path::new("gfs_client.py"));
        command.arg(url(system.masters[master].port)).args(arguments);
        let finished = Program::start("gfs_client.py", &mut command).finish(PATIENCE);
        assert_eq!(finished.code, Some(0), "{arguments:?}: {finished}");
        finished.stdout.trim_end_matches('\n').to_owned()
    };
    let (one, other) = ((leader + 1) % 3, (leader + 2) % 3);
    assert_eq!(asked(one, &["create", "f"]), "successfully created f");
    assert_eq!(asked(other, &["write", "f", "hello", "0"]), "0");
    assert_eq!(asked(leader, &["read", "f", "0", "5"]), "hello");
}

#[test]
fn chunkservers_of_the_original_take_part_and_what_one_held_is_copied_when_it_is_killed() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let mut system = System::start(0, &[]);
    let first = free_ports(4);
    let start = |port: u16| {
        let mut command = scripts.python(Path::new("chunkserver.py"));
        command.args(["127.0.0.1", &port.to_string()]).arg(system.path(&format!("old-{port}")));
        command.arg(url(system.at().port()));
        let mut program = Program::start("chunkserver.py", &mut command);
        program.listening();
        program
    };
    let mut servers: Vec<Program> = (first..first + 4).map(start).collect();
    system.wait_for("all four are here", |census| census.servers == 4);
    assert_eq!(call(&scripts, &system, &["create", "f"]), "successfully created f");
    let text = "a file among the originals. ".repeat(3_000);
    assert_eq!(call(&scripts, &system, &["write", "f", &text, "0"]), "0");
    assert!(call(&scripts, &system, &["read", "f", "0", "84000"]) == text);
    let census = system.census().unwrap();
    assert_eq!((census.chunks, census.copies), (2, 6));

    let killed = servers.remove(0);
    killed.signal("KILL");
    killed.finish(PATIENCE);
    // Nobody waits 35 s for it: a client says that it is gone.
    let gone = system.data.path().join("gone.py");
    let say = "import sys, xmlrpc.client as x\nx.ServerProxy(sys.argv[1], \
               allow_none=True).remove_chunkserver(sys.argv[2])\nprint('done')";
    std::fs::write(&gone, say).unwrap();
    run(&scripts, gone.to_str().unwrap(), &[&url(system.at().port()), &url(first)]);
    system.wait_for("three copies of both chunks", |census| {
        census.servers == 3 && census.copies == 6 && census.short.is_empty()
    });
    assert!(call(&scripts, &system, &["read", "f", "0", "84000"]) == text);
    assert_eq!(call(&scripts, &system, &["write", "f", "more", "84000"]), "84000");

    // The copies of a chunk stay with programs of one kind: ours take what is new.
    system.servers.push(support::files::Node { port: first + 3, program: None });
    servers.pop().unwrap().signal("KILL");
    system.servers[0].port = free_ports(1);
    system.start_server(0);
    system.wait_for("ours is here", |census| census.servers == 4);
    assert_eq!(call(&scripts, &system, &["create", "g"]), "successfully created g");
    assert_eq!(call(&scripts, &system, &["write", "g", "ours", "0"]), "0");
    assert_eq!(chunk_files(&system.folder(0)).len(), 1);
}

#[test]
fn a_connection_by_http_is_kept_or_closed_as_its_client_wants() {
    let system = System::start(0, &[]);
    let body = "<methodCall><methodName>system.listMethods</methodName></methodCall>";
    let request = |version: &str, fields: &str| {
        format!("POST /RPC2 HTTP/{version}\r\n{fields}Content-Length: {}\r\n\r\n{body}", body.len())
    };
    let exchange = |requests: &str| {
        let mut stream = TcpStream::connect(local(system.at().port())).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(requests.as_bytes()).unwrap();
        let mut replies = String::new();
        stream.read_to_string(&mut replies).unwrap();
        replies
    };
    let replies = exchange(&request("1.0", ""));
    assert!(replies.starts_with("HTTP/1.1 200 OK\r\n") && replies.contains("get_primary"));
    // Two in one write, the second one the last.
    let two = request("1.1", "") + &request("1.1", "Connection: close\r\n");
    assert_eq!(exchange(&two).matches("HTTP/1.1 200 OK").count(), 2);
    let kept = request("1.0", "Connection: keep-alive\r\n") + &request("1.0", "");
    let replies = exchange(&kept);
    assert_eq!(replies.matches("HTTP/1.1 200 OK").count(), 2);
    assert_eq!(replies.matches("Connection: keep-alive").count(), 1);
}
