//! What every daemon does: it says where it listens, ends when it is asked to,
//! and says in one line why it can't start.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic; it has a clock and sockets"
)]

mod support;

use ringleader::wire::address::PortRange;
use serde_json::json;
use std::fs;
use std::net::{SocketAddrV4, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use support::process::{Finished, PATIENCE, Program, free_ports, run, wait_until};
use support::systems::{Listing, local, our_server, our_viewleader, wait_until_at_rest};
use support::wire::{Connection, Reply, call, frame};

/// "Within seconds", on a machine that has other things to do, too.
const SECONDS: Duration = Duration::from_secs(8);

/// Nobody listens there.
const NOBODY: &str = "127.0.0.1:1";

/// A viewleader with its data in a folder of `data`.
fn viewleader(data: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_viewleader"));
    command.arg("--data-dir").arg(data.join("viewleader")).args(flags);
    command
}

/// A server that has no viewleader, with its data in `data`.
fn server(data: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
    command.args(["--viewleader", NOBODY]).arg("--data-dir").arg(data).args(flags);
    command
}

/// Both daemons with `flags`, and a request that each of them answers whoever
/// else is there.
fn both(data: &Path, flags: &[&str]) -> [(&'static str, Command, serde_json::Value); 2] {
    [
        ("viewleader", viewleader(data, flags), json!({"cmd": "query_servers"})),
        ("server", server(data, flags), json!({"cmd": "query_all_keys"})),
    ]
}

// ---- it starts ----

#[test]
fn a_daemon_says_where_it_listens_once_it_serves_there() {
    let data = tempfile::tempdir().unwrap();
    for (name, mut command, request) in both(data.path(), &["--listen", "127.0.0.1:0"]) {
        let mut program = Program::start(name, &mut command);
        let address = program.listening();
        // At once: whoever has read the line need not try twice.
        assert!(call(address, &request).value()["result"].is_array());
        assert_eq!(program.stdout(), format!("listening on {address}\n"), "nothing else is said");
    }
}

#[test]
fn a_daemon_listens_on_the_port_and_address_that_it_is_told() {
    let data = tempfile::tempdir().unwrap();
    for listen in ["127.0.0.1", "0.0.0.0", "localhost"] {
        for (name, mut command, request) in both(data.path(), &[]) {
            let port = free_ports(1);
            let mut program =
                Program::start(name, command.args(["--listen", &format!("{listen}:{port}")]));
            assert_eq!(program.listening().port(), port);
            assert!(call(local(port), &request).value()["result"].is_array());
        }
    }
}

/// Starts `command` under limits of open files, a soft and a hard one.
fn under_limits(name: &str, command: &Command, soft: u32, hard: u32) -> Program {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$0\" \"$@\"")]);
    Program::start(name, shell.arg(command.get_program()).args(command.get_args()))
}

#[test]
fn a_daemon_takes_as_many_open_files_as_it_may_and_says_if_they_are_too_few() {
    let data = tempfile::tempdir().unwrap();
    for (name, command, _) in both(data.path(), &["--listen", "127.0.0.1:0"]) {
        let mut program = under_limits(name, &command, 256, 1000);
        program.listening();
        let limits = fs::read_to_string(format!("/proc/{}/limits", program.id())).unwrap();
        let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        let numbers: Vec<&str> = files.split_whitespace().skip(3).take(2).collect();
        assert_eq!(numbers, ["1000", "1000"], "{name}");
        wait_until("it says that they are too few", PATIENCE, || {
            program.stderr().contains("--max-connections").then_some(())
        });
    }
    let flags = ["--listen", "127.0.0.1:0", "--max-connections", "100"];
    for (name, command, _) in both(&data.path().join("few"), &flags) {
        let mut program = under_limits(name, &command, 256, 1000);
        program.listening();
        assert!(!program.stderr().contains("--max-connections"), "{}", program.stderr());
    }
}

#[test]
fn a_daemon_names_its_version_and_helps() {
    let data = tempfile::tempdir().unwrap();
    for (name, mut command, _) in both(data.path(), &["--version"]) {
        let finished = run(name, &mut command);
        assert_eq!(finished.code, Some(0), "{finished}");
        assert_eq!(finished.stdout, format!("{name} {}\n", env!("CARGO_PKG_VERSION")));
    }
    for (name, mut command, _) in both(data.path(), &["--help"]) {
        let finished = run(name, &mut command);
        assert_eq!(finished.code, Some(0), "{finished}");
        assert!(finished.stdout.contains("--listen <IP[:PORT]>"), "{finished}");
        assert!(finished.stdout.contains("listening on IP:PORT"), "{finished}");
    }
}

#[test]
fn a_daemon_takes_the_first_free_port_of_its_range() {
    let data = tempfile::tempdir().unwrap();
    for (index, range) in [PortRange::VIEWLEADER, PortRange::SERVER].into_iter().enumerate() {
        // The range lies among the ports that systems give to outgoing
        // connections: whichever of it can be had is held, and two are let go.
        let mut held = wait_until("some ports of the range are free", PATIENCE, || {
            let held: Vec<(u16, TcpListener)> = range
                .ports()
                .filter_map(|port| Some((port, TcpListener::bind(local(port)).ok()?)))
                .collect();
            (held.len() >= 4).then_some(held)
        });
        let (second, _) = held.remove(3);
        let (first, _) = held.remove(1);
        let start = |name: &str| {
            let folder = data.path().join(name);
            let [leader, server] = both(&folder, &["--listen", "127.0.0.1"]);
            let (name, mut command, _) = if index == 0 { leader } else { server };
            Program::start(name, &mut command)
        };
        let mut programs = [start("first"), start("second")];
        let mut ports = programs.each_mut().map(|program| program.listening().port());
        // They were started together: either may have been the first.
        ports.sort_unstable();
        assert_eq!(ports, [first, second]);
        if held.len() + 2 == usize::from(range.count) {
            let finished = start("third").finish(PATIENCE);
            assert_refuses_to_start(&finished, &[&format!("all of ports {range} are taken")]);
        }
    }
}

// ---- it ends ----

#[test]
fn a_daemon_ends_cleanly_on_sigterm_and_on_sigint() {
    let data = tempfile::tempdir().unwrap();
    for signal in ["TERM", "INT"] {
        for (name, mut command, request) in both(data.path(), &["--listen", "127.0.0.1:0"]) {
            let mut program = Program::start(name, &mut command);
            let address = program.listening();
            // Connections in whatever state are no reason to stay.
            let [mut idle, mut torn, mut waiting] =
                [(); 3].map(|()| Connection::open(address).unwrap());
            idle.call(&request).value();
            torn.send(&[0, 0]);
            // One is answered at once, the other waits for news that do not come.
            for slow in [
                json!({"cmd": "getr", "key": "k"}),
                json!({"cmd": "query_view", "after": 0, "wait_ms": 60_000}),
            ] {
                waiting.send(&frame(slow.to_string().as_bytes()));
            }
            idle.call(&request).value();
            program.signal(signal);
            let finished = program.finish(SECONDS);
            assert_eq!(finished.code, Some(0), "{finished}");
            assert!(!finished.stderr.contains("panicked"), "{finished}");
            assert_eq!(idle.receive(), Reply::Closed);
            assert_eq!(call(address, &request), Reply::Refused, "{name} still listens");
        }
    }
}

#[test]
fn a_signal_that_comes_at_the_very_start_is_not_missed() {
    let data = tempfile::tempdir().unwrap();
    for (name, mut command, _) in both(data.path(), &["--listen", "127.0.0.1:0"]) {
        for _ in 0..5 {
            let mut program = Program::start(name, &mut command);
            program.listening();
            program.signal("TERM");
            let finished = program.finish(SECONDS);
            assert_eq!(finished.code, Some(0), "{finished}");
        }
    }
}

// ---- it can't start ----

/// A refusal to start: one line that begins with the program's name and holds
/// all of `words`, nothing on standard output, and a status that is not zero.
fn assert_refuses_to_start(finished: &Finished, words: &[&str]) {
    assert!(finished.code.is_some_and(|code| code != 0), "{finished}");
    assert_eq!(finished.stdout, "", "{finished}");
    let lines: Vec<&str> = finished.stderr.lines().collect();
    let [line] = lines[..] else { panic!("not one line: {finished}") };
    assert!(line.starts_with("viewleader: ") || line.starts_with("server: "), "{line}");
    for word in words {
        assert!(line.contains(word), "it does not say {word:?}: {line}");
    }
}

#[test]
fn a_daemon_whose_port_is_taken_says_so() {
    let data = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (name, mut command, _) in both(data.path(), &["--listen", &address]) {
        let finished = run(name, &mut command);
        assert_refuses_to_start(&finished, &[&address, "taken", "--listen"]);
    }
}

#[test]
fn a_daemon_that_is_told_an_address_that_is_not_here_says_so() {
    let data = tempfile::tempdir().unwrap();
    // 203.0.113.0/24 is set aside for documentation (RFC 5737).
    for listen in ["203.0.113.7", "203.0.113.7:4711", "no-such-host.invalid:4711"] {
        for (name, mut command, _) in both(data.path(), &["--listen", listen]) {
            let finished = run(name, &mut command);
            assert_refuses_to_start(&finished, &[listen, "no such address", "--listen"]);
        }
    }
}

#[test]
fn a_daemon_that_is_told_nonsense_says_how_it_is_used() {
    let data = tempfile::tempdir().unwrap();
    for flags in [
        &["--listen", "here:there"][..],
        &["--listen", ""],
        &["--listen", "::1"],
        &["--max-connections", "many"],
        &["--no-such-flag"],
        &["word"],
    ] {
        for (name, mut command, _) in both(data.path(), flags) {
            let finished = run(name, &mut command);
            assert_eq!(finished.code, Some(2), "{flags:?}: {finished}");
            assert_eq!(finished.stdout, "", "{flags:?}: {finished}");
            assert!(finished.stderr.contains("error: "), "{flags:?}: {finished}");
        }
    }
    for lease in ["0", "-1", "0.4", "301", "inf", "NaN", "long"] {
        let finished = run("server", &mut server(data.path(), &[&format!("--lease={lease}")]));
        assert_eq!(finished.code, Some(2), "{lease}: {finished}");
        assert!(finished.stderr.contains("a lease has from 0.5 to 300 seconds"), "{finished}");
    }
}

#[test]
fn a_server_that_cannot_use_its_data_directory_says_so() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("a file");
    fs::write(&file, "not a directory").unwrap();
    let refuses = |folder: &Path, words: &[&str]| {
        let finished = run("server", &mut server(folder, &["--listen", "127.0.0.1:0"]));
        let folder = folder.display().to_string();
        assert_refuses_to_start(&finished, &[words, &[&folder, "--data-dir"]].concat());
    };
    refuses(&file, &[]);
    refuses(&file.join("within"), &["ot a directory"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "not a directory");
    if let Some(sealed) = sealed_folder(data.path()) {
        refuses(&sealed, &[]);
        refuses(&sealed.join("within"), &[]);
    }
}

/// A directory in which nothing can be made, by whoever runs this.
fn sealed_folder(parent: &Path) -> Option<std::path::PathBuf> {
    let sealed = parent.join("sealed");
    fs::create_dir(&sealed).unwrap();
    let mut permissions = fs::metadata(&sealed).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&sealed, permissions).unwrap();
    // A superuser is not kept out by permissions; on Linux there is a place
    // that is closed to everybody.
    let candidates = [sealed, "/proc/self/fd".into(), "/sys/kernel".into()];
    candidates.into_iter().find(|folder| {
        let probe = folder.join("probe");
        let is_sealed = folder.is_dir() && fs::create_dir(&probe).is_err();
        if !is_sealed {
            let _ = fs::remove_dir(probe);
        }
        is_sealed
    })
}

#[test]
fn two_servers_never_run_over_one_data_directory() {
    let data = tempfile::tempdir().unwrap();
    let folder = data.path().join("made/on/the/way");
    let flags = ["--listen", "127.0.0.1:0"];
    for signal in ["TERM", "KILL"] {
        let mut first = Program::start("server", &mut server(&folder, &flags));
        let address = first.listening();
        let finished = run("server", &mut server(&folder, &flags));
        let shown = folder.display().to_string();
        assert_refuses_to_start(&finished, &[&shown, "in use by another", "--data-dir"]);
        // The second one has not disturbed the first one.
        assert!(call(address, &json!({"cmd": "query_all_keys"})).value()["result"].is_array());
        first.signal(signal);
        first.finish(SECONDS);
        // It is free again, however the first one ended: the next round shows it.
    }
}

// ---- it is listed ----

#[test]
fn a_server_whose_viewleader_is_not_there_keeps_running_and_joins_when_it_appears() {
    let data = tempfile::tempdir().unwrap();
    let port = free_ports(1);
    let mut server = our_server(local(port), 0, data.path());
    let address = server.listening();
    // Its own namespace works by itself; what is replicated is refused.
    let ok = json!({"status": "ok"});
    assert_eq!(call(address, &json!({"cmd": "set", "key": "a", "val": "b"})).value(), ok);
    assert_eq!(call(address, &json!({"cmd": "get", "key": "a"})).value()["value"], "b");
    let setr = json!({"cmd": "setr", "key": "k", "val": "v", "direct": true});
    let refusal = call(address, &setr).value();
    assert_eq!(refusal["reason"], "unavailable", "{refusal}");
    assert!(refusal["error"].as_str().unwrap().contains("viewleader"), "{refusal}");
    server.assert_running();

    let mut viewleader = our_viewleader(port);
    assert_eq!(viewleader.listening(), local(port));
    wait_until_at_rest(local(port), 1);
    assert!(Listing::of(local(port)).unwrap().has(address));
    assert_eq!(call(address, &setr).value()["status"], "ok");
    let getr = json!({"cmd": "getr", "key": "k"});
    assert_eq!(call(address, &getr).value()["value"], "v");
    server.assert_running();
}

#[test]
fn a_server_is_listed_where_it_says_it_is_reached_else_where_it_calls_from() {
    let mut viewleader = our_viewleader(0);
    let leader = viewleader.listening();
    let elsewhere: SocketAddrV4 = "192.0.2.7:4711".parse().unwrap();
    for (beat, listed_as) in [
        (json!({"cmd": "heartbeat", "port": 4712, "requestor": 0.25}), local(4712)),
        (
            json!({"cmd": "heartbeat", "port": 4713, "requestor": "b", "address": elsewhere}),
            elsewhere,
        ),
    ] {
        let before = Listing::of(leader).unwrap();
        let reply = call(leader, &beat).value();
        let after = Listing::of(leader).unwrap();
        assert_eq!(reply, json!({"status": "ok", "epoch": after.epoch}));
        assert!(after.epoch > before.epoch);
        assert!(after.has(listed_as), "not under {listed_as}");
        assert_eq!(after.servers.len(), before.servers.len() + 1);
    }
    // int(hashlib.sha1(b"0.25").hexdigest(), 16) % 10000
    let listing = Listing::of(leader).unwrap();
    assert!(listing.servers.contains(&(local(4712), 1579)));
}

#[test]
fn a_server_tells_the_viewleader_what_it_is_told_to_advertise() {
    let data = tempfile::tempdir().unwrap();
    let mut viewleader = our_viewleader(0);
    let leader = viewleader.listening();
    let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
    command.args(["--listen", "127.0.0.1:0", "--viewleader", &leader.to_string()]);
    command.args(["--advertise", "192.0.2.7:4711", "--data-dir"]).arg(data.path());
    let mut server = Program::start("server", &mut command);
    server.listening();
    wait_until("it is listed under that address", PATIENCE, || {
        Listing::of(leader)?.has("192.0.2.7:4711".parse().unwrap()).then_some(())
    });
    server.assert_running();
}

#[test]
fn a_server_that_listens_on_all_addresses_is_reached_where_it_is_listed() {
    let data = tempfile::tempdir().unwrap();
    let mut viewleader = our_viewleader(0);
    let leader = viewleader.listening();
    let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
    command.args(["--listen", "0.0.0.0:0", "--viewleader", &leader.to_string()]);
    let mut server = Program::start("server", command.arg("--data-dir").arg(data.path()));
    let bound = server.listening();
    assert!(bound.ip().is_unspecified());
    wait_until_at_rest(leader, 1);
    let (listed, _) = Listing::of(leader).unwrap().servers[0];
    assert_eq!(listed.port(), bound.port());
    assert!(!listed.ip().is_unspecified(), "{listed} is no address");
    assert!(call(listed, &json!({"cmd": "query_all_keys"})).value()["result"].is_array());
}
