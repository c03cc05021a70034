//! How the client ends: the exit status, what it prints, and how long it takes
//! when nobody answers.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic; it has a clock, sockets and threads"
)]

mod support;

use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use support::process::{Finished, PATIENCE, Program, free_ports, run, wait_until};
use support::systems::{Listing, Ours, System, local, our_viewleader, wait_until_at_rest};
use support::wire::{call, frame};

/// The exit statuses.
const DONE: i32 = 0;
const NO: i32 = 1;
const USAGE: i32 = 2;
const NOBODY: i32 = 3;
const UNKNOWN: i32 = 4;

/// What `--timeout` says where nobody answers.
const TIMEOUT: Duration = Duration::from_secs(1);

/// What a process may take to start and end on a busy machine.
const SLACK: Duration = Duration::from_secs(4);

/// Commands that a viewleader alone answers.
const TO_VIEWLEADER: [&[&str]; 3] =
    [&["query_servers"], &["lock_get", "door", "me"], &["lock_release", "door", "me"]];

/// Commands that a server alone answers.
const TO_SERVER: [&[&str]; 4] =
    [&["print", "hello"], &["set", "k", "v"], &["get", "k"], &["query_all_keys"]];

/// Commands for which both are asked.
const TO_BOTH: [&[&str]; 2] = [&["setr", "k", "v"], &["getr", "k"]];

/// The client, with nothing from this process's environment that it knows.
fn client(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_client"));
    command.env_remove("RINGLEADER_SERVER").env_remove("RINGLEADER_VIEWLEADER");
    command.args(arguments);
    command
}

/// The client that is to look for both programs at these addresses.
fn client_at(viewleader: SocketAddrV4, server: SocketAddrV4, arguments: &[&str]) -> Command {
    let mut command = client(&["--timeout", &TIMEOUT.as_secs_f64().to_string()]);
    command.args(["--viewleader", &viewleader.to_string(), "--server", &server.to_string()]);
    command.args(arguments);
    command
}

/// Runs a client that must end with `status` within the time-out.
fn expect(status: i32, command: &mut Command) -> Finished {
    let finished = Program::start("client", command).finish(TIMEOUT + SLACK);
    assert_eq!(finished.code, Some(status), "{command:?}: {finished}");
    finished
}

/// Nobody answered: nothing on standard output, and one line on standard error
/// that names one of `addresses`.
fn expect_nobody(command: &mut Command, addresses: &[SocketAddrV4]) {
    let finished = expect(NOBODY, command);
    assert_eq!(finished.stdout, "", "{command:?}: {finished}");
    assert_one_message(&finished);
    let is_named = addresses.iter().any(|at| finished.stderr.contains(&at.to_string()));
    assert!(is_named, "{command:?} does not say that {addresses:?} is silent: {finished}");
}

fn assert_one_message(finished: &Finished) {
    let lines: Vec<&str> = finished.stderr.lines().collect();
    let [line] = lines[..] else { panic!("not one line: {finished}") };
    assert!(line.starts_with("client: ") && line.len() > 20, "{finished}");
}

// ---- strangers ----

/// Somebody who listens and is none of ours.
struct Stranger {
    address: SocketAddrV4,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stranger {
    /// Somebody who does this with each connection, one at a time.
    fn who(mut greets: impl FnMut(TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = local(listener.local_addr().unwrap().port());
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                greets(stream.unwrap());
            }
        });
        Self { address, end, thread: Some(thread) }
    }

    fn who_never_answers() -> Self {
        let mut kept = Vec::new();
        Self::who(move |stream| kept.push(stream))
    }

    fn who_hangs_up() -> Self {
        Self::who(drop)
    }

    /// Somebody who takes a request and hangs up.
    fn who_listens_and_hangs_up() -> Self {
        Self::who(|mut stream| {
            let _ = read_request(&mut stream);
        })
    }

    /// Somebody who speaks another language.
    fn who_answers(bytes: &'static [u8]) -> Self {
        Self::who(move |mut stream| {
            let _ = read_request(&mut stream);
            let _ = stream.write_all(bytes);
        })
    }

    /// A server that knows no keys, and dies of every request to set one.
    fn who_dies_of_writes() -> Self {
        Self::who(|mut stream| {
            while let Some(request) = read_request(&mut stream) {
                if request["cmd"] == "setr" || request["cmd"] == "set" {
                    return;
                }
                let _ = stream.write_all(&frame(br#"{"status":"not_found"}"#));
            }
        })
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        // It notices at its next connection.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_request(stream: &mut TcpStream) -> Option<Value> {
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut body = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut body).ok()?;
    serde_json::from_slice(&body).ok()
}

// ---- nobody answers ----

/// Goes through all commands, all at once, with `silent` in the place of both
/// programs.
fn nobody_answers_at(silent: SocketAddrV4) {
    thread::scope(|scope| {
        for arguments in TO_VIEWLEADER.iter().chain(&TO_SERVER).chain(&TO_BOTH) {
            scope.spawn(move || {
                expect_nobody(&mut client_at(silent, silent, arguments), &[silent]);
            });
        }
    });
}

#[test]
fn where_nobody_listens_every_command_says_so_with_status_3() {
    nobody_answers_at(local(free_ports(1)));
}

#[test]
fn where_nobody_answers_every_command_says_so_with_status_3_within_its_time() {
    nobody_answers_at(Stranger::who_never_answers().address);
}

#[test]
fn where_somebody_hangs_up_at_once_every_command_says_so_with_status_3() {
    nobody_answers_at(Stranger::who_hangs_up().address);
}

#[test]
fn where_somebody_takes_the_request_and_hangs_up_every_command_says_so_with_status_3() {
    nobody_answers_at(Stranger::who_listens_and_hangs_up().address);
}

#[test]
fn where_somebody_speaks_another_language_every_command_says_so_with_status_3() {
    let strangers = [
        &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
        b"220 mail.example.com ESMTP\r\n",
        b"\0\0\0\x05hello",
        b"\0\0\0\x10{}",
        b"\xff\xff\xff\xff",
    ]
    .map(Stranger::who_answers);
    thread::scope(|scope| {
        for stranger in &strangers {
            scope.spawn(|| nobody_answers_at(stranger.address));
        }
    });
}

#[test]
fn without_a_viewleader_the_message_is_about_the_viewleader() {
    let ours = Ours::start(1);
    let server = ours.servers()[0];
    expect(DONE, &mut client_at(ours.viewleader(), server, &["setr", "k", "v"]));
    for silent in [Stranger::who_never_answers(), Stranger::who_hangs_up()] {
        let silent = silent.address;
        thread::scope(|scope| {
            for arguments in TO_VIEWLEADER {
                let mut command = client_at(silent, server, arguments);
                scope.spawn(move || expect_nobody(&mut command, &[silent]));
            }
            for arguments in TO_SERVER {
                scope.spawn(move || expect(DONE, &mut client_at(silent, server, arguments)));
            }
            // A server that serves is enough for these, if there is time to ask it.
            for arguments in TO_BOTH {
                let mut command = client_at(silent, server, arguments);
                scope.spawn(move || {
                    let finished = run("client", &mut command);
                    if finished.code != Some(DONE) {
                        expect_nobody(&mut command, &[silent]);
                    }
                });
            }
        });
    }
}

#[test]
fn without_a_server_the_message_is_about_the_server() {
    let mut viewleader = our_viewleader(0);
    let leader = viewleader.listening();
    let never = Stranger::who_never_answers();
    for silent in [local(free_ports(1)), never.address] {
        for arguments in TO_SERVER {
            expect_nobody(&mut client_at(leader, silent, arguments), &[silent]);
        }
        // The viewleader answers: it knows no servers.
        for arguments in TO_BOTH {
            let finished = expect(NOBODY, &mut client_at(leader, silent, arguments));
            assert_one_message(&finished);
            assert!(finished.stderr.contains("no servers"), "{finished}");
        }
        expect(DONE, &mut client_at(leader, silent, &["query_servers"]));
        expect(DONE, &mut client_at(leader, silent, &["lock_get", "door", "me"]));
        expect(DONE, &mut client_at(leader, silent, &["lock_release", "door", "me"]));
    }
}

/// Starts a viewleader, and a server that keeps its lease for minutes.
fn listed_server(data: &Path) -> (Program, SocketAddrV4, Program, SocketAddrV4) {
    let mut viewleader = our_viewleader(0);
    let leader = viewleader.listening();
    let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
    command.args(["--listen", "127.0.0.1:0", "--viewleader", &leader.to_string()]);
    command.args(["--lease", "300", "--data-dir"]).arg(data);
    let mut server = Program::start("server", &mut command);
    let address = server.listening();
    wait_until_at_rest(leader, 1);
    (viewleader, leader, server, address)
}

#[test]
fn a_server_that_is_listed_and_gone_is_nobody() {
    let data = tempfile::tempdir().unwrap();
    let (_viewleader, leader, server, address) = listed_server(data.path());
    server.signal("KILL");
    server.finish(PATIENCE);
    assert!(Listing::of(leader).unwrap().has(address));
    for arguments in TO_SERVER.iter().chain(&TO_BOTH) {
        expect_nobody(&mut client_at(leader, address, arguments), &[address]);
    }
}

#[test]
fn a_server_that_is_listed_and_hangs_is_nobody_and_a_write_that_reached_it_is_unknown() {
    let data = tempfile::tempdir().unwrap();
    let (_viewleader, leader, server, address) = listed_server(data.path());
    server.signal("STOP");
    for arguments in TO_SERVER.iter().chain(&[&["getr", "k"][..]]) {
        expect_nobody(&mut client_at(leader, address, arguments), &[address]);
    }
    // Whether it was sent depends on whether it was asked before if it is there:
    // what was sent must never be called "not done".
    let mut setr = client_at(leader, address, &["setr", "k", "v"]);
    let finished = run("client", &mut setr);
    match finished.code {
        Some(NOBODY) => {
            expect_nobody(&mut setr, &[address]);
            server.signal("CONT");
            let getr = json!({"cmd": "getr", "key": "k"});
            assert_eq!(call(address, &getr).value()["status"], "not_found");
        }
        _ => assert_unknown(&finished, address),
    }
}

// ---- the outcome is unknown ----

fn assert_unknown(finished: &Finished, address: SocketAddrV4) {
    assert_eq!(finished.code, Some(UNKNOWN), "{finished}");
    assert_one_message(finished);
    assert!(finished.stderr.contains("may or may not"), "{finished}");
    assert!(finished.stderr.contains(&address.to_string()), "{finished}");
}

#[test]
fn a_write_to_a_server_that_dies_of_it_is_unknown_with_status_4() {
    let server = Stranger::who_dies_of_writes();
    let nobody = local(free_ports(1));
    for arguments in [["set", "k", "v"], ["setr", "k", "v"]] {
        let finished = expect(UNKNOWN, &mut client_at(nobody, server.address, &arguments));
        assert_unknown(&finished, server.address);
        assert_eq!(finished.stdout, "", "{finished}");
    }
    let finished = expect(NO, &mut client_at(nobody, server.address, &["getr", "k"]));
    assert_eq!(finished.json(), json!({"status": "not_found"}));
}

// ---- somebody answers ----

#[test]
fn what_is_done_ends_with_status_0_and_what_is_refused_with_status_1() {
    let ours = Ours::start(1);
    let (leader, server) = (ours.viewleader(), ours.servers()[0]);
    let long_key = "k".repeat(20_000);
    for (status, arguments, reply) in [
        (NO, &["get", "k"][..], json!({"status": "not_found"})),
        (NO, &["getr", "k"], json!({"status": "not_found"})),
        (DONE, &["set", "k", "own"], json!({"status": "ok"})),
        (DONE, &["get", "k"], json!({"status": "ok", "value": "own"})),
        (NO, &["getr", "k"], json!({"status": "not_found"})),
        (DONE, &["setr", "k", "shared"], json!({"status": "ok"})),
        (DONE, &["getr", "k"], json!({"status": "ok", "value": "shared"})),
        (DONE, &["get", "k"], json!({"status": "ok", "value": "own"})),
        (DONE, &["setr", "", ""], json!({"status": "ok"})),
        (DONE, &["getr", ""], json!({"status": "ok", "value": ""})),
        (DONE, &["setr", "-k", "--v"], json!({"status": "ok"})),
        (DONE, &["getr", "-k"], json!({"status": "ok", "value": "--v"})),
        (DONE, &["setr", "ключ", "a\nb \"c\""], json!({"status": "ok"})),
        (DONE, &["getr", "ключ"], json!({"value": "a\nb \"c\""})),
        (DONE, &["print", "-n", "hello", "--world"], json!({"status": "ok"})),
        (DONE, &["lock_get", "door", "me"], json!({"status": "granted"})),
        (NO, &["lock_release", "door", "you"], json!({"status": "unknown"})),
        (DONE, &["lock_release", "door", "me"], json!({"status": "ok"})),
        (NO, &["lock_release", "door", "me"], json!({"status": "unknown"})),
        (NO, &["get", &long_key], json!({"reason": "invalid"})),
        (NO, &["setr", &long_key, "v"], json!({"reason": "invalid"})),
    ] {
        let finished = expect(status, &mut client_at(leader, server, arguments));
        assert_eq!(finished.stdout.lines().count(), 1, "{arguments:?}: {finished}");
        let printed = finished.json();
        for (field, value) in reply.as_object().unwrap() {
            assert_eq!(printed[field], *value, "{arguments:?}: {finished}");
        }
        // What went well needs no further words; a refusal has some.
        let is_refusal = printed.get("error").is_some();
        assert_eq!(finished.stderr.is_empty(), !is_refusal, "{arguments:?}: {finished}");
    }
    let keys = expect(DONE, &mut client_at(leader, server, &["query_all_keys"])).json();
    let mut keys = keys["result"].as_array().unwrap().clone();
    keys.sort_by_key(Value::to_string);
    assert_eq!(json!(keys), json!(["", "-k", "k", "ключ"]));
    wait_until("the words are printed", PATIENCE, || {
        ours.printed(0).lines().any(|line| line == "-n hello --world").then_some(())
    });
}

#[test]
fn the_first_of_several_addresses_that_answers_is_enough() {
    let ours = Ours::start(1);
    let silent = local(free_ports(1)).to_string();
    let hangs_up = Stranger::who_hangs_up().address.to_string();
    let list = |address: SocketAddrV4| {
        [&silent, &hangs_up, &address.to_string()].map(|it| it.as_str()).join(",")
    };
    let (leaders, servers) = (list(ours.viewleader()), list(ours.servers()[0]));
    for arguments in [
        &["query_servers"][..],
        &["set", "k", "v"],
        &["get", "k"],
        &["setr", "k", "v"],
        &["getr", "k"],
        &["lock_get", "door", "me"],
    ] {
        let mut command = client(&["--viewleader", &leaders, "--server", &servers]);
        expect(DONE, command.args(arguments));
    }
}

#[test]
fn the_environment_says_where_to_look_and_the_command_line_knows_better() {
    let ours = Ours::start(1);
    let (leader, server) = (ours.viewleader().to_string(), ours.servers()[0].to_string());
    let silent = local(free_ports(1));
    let with = |leader: &str, server: &str, arguments: &[&str]| {
        let mut command = client(arguments);
        command.env("RINGLEADER_VIEWLEADER", leader).env("RINGLEADER_SERVER", server);
        command
    };
    let commands: [&[&str]; 4] =
        [&["query_servers"], &["set", "k", "v"], &["setr", "k", "v"], &["getr", "k"]];
    for arguments in commands {
        expect(DONE, &mut with(&leader, &server, arguments));
        expect_nobody(&mut with(&silent.to_string(), &silent.to_string(), arguments), &[silent]);
        let flags = ["--viewleader", &leader, "--server", &server];
        let arguments = [&flags[..], arguments].concat();
        expect(DONE, &mut with(&silent.to_string(), &silent.to_string(), &arguments));
    }
    // A server reads where its viewleader is in the same way.
    let data = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
    command.env("RINGLEADER_VIEWLEADER", &leader).args(["--listen", "127.0.0.1:0"]);
    let mut second = Program::start("server", command.arg("--data-dir").arg(data.path()));
    second.listening();
    wait_until_at_rest(ours.viewleader(), 2);
}

// ---- usage ----

#[test]
fn wrong_usage_ends_with_status_2_and_says_what_is_right() {
    for arguments in [
        &[][..],
        &["fly"],
        &["get"],
        &["get", "k", "more"],
        &["set", "k"],
        &["set", "k", "v", "more"],
        &["setr", "k"],
        &["getr"],
        &["print"],
        &["lock_get", "door"],
        &["lock_release"],
        &["query_servers", "more"],
        &["query_all_keys", "more"],
        &["--no-such-flag", "get", "k"],
        &["--server", "get", "k"],
        &["--server", "a:b:c", "get", "k"],
        &["--server", "host:port", "get", "k"],
        &["--server", "host:70000", "get", "k"],
        &["--viewleader", "", "query_servers"],
        &["--viewleader", "here,,there", "query_servers"],
        &["--timeout", "0", "get", "k"],
        &["--timeout=-1", "get", "k"],
        &["--timeout", "soon", "get", "k"],
        &["--timeout", "NaN", "get", "k"],
        &["--timeout", "inf", "get", "k"],
        &["completions", "no-such-shell"],
    ] {
        let finished = expect(USAGE, &mut client(arguments));
        assert_eq!(finished.stdout, "", "{arguments:?}: {finished}");
        assert!(
            finished.stderr.contains("error: ") || finished.stderr.contains("Usage: client"),
            "{arguments:?}: {finished}"
        );
    }
}

#[test]
fn the_help_of_every_command_says_what_it_takes() {
    let whole = expect(DONE, &mut client(&["--help"])).stdout;
    for words in ["0 done", "--server", "--viewleader", "--timeout", "RINGLEADER_SERVER"] {
        assert!(whole.contains(words), "no {words:?} in: {whole}");
    }
    for (command, takes) in [
        ("print", "<TEXT>"),
        ("set", "<KEY> <VALUE>"),
        ("get", "<KEY>"),
        ("query_all_keys", ""),
        ("setr", "<KEY> <VALUE>"),
        ("getr", "<KEY>"),
        ("query_servers", ""),
        ("lock_get", "<LOCK> <CLIENT>"),
        ("lock_release", "<LOCK> <CLIENT>"),
        ("completions", "<SHELL>"),
    ] {
        assert!(whole.contains(&format!("  {command} ")), "no {command} in: {whole}");
        let help = expect(DONE, &mut client(&[command, "--help"])).stdout;
        let (about, usage) = help.split_once("Usage: client ").expect("a line on its usage");
        assert!(about.trim().len() > 10, "{command} does not say what it is: {help}");
        let usage = usage.lines().next().unwrap();
        assert!(usage.starts_with(command) && usage.contains(takes), "{help}");
    }
    let version = expect(DONE, &mut client(&["--version"])).stdout;
    assert_eq!(version, format!("client {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_can_be_had_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = expect(DONE, &mut client(&["completions", shell])).stdout;
        assert!(script.contains("query_all_keys"), "{shell}: {script}");
    }
}
