//! The file system with real processes: chunkservers are killed, stopped and
//! damaged, the master is killed, and files stay as they were.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic; it has a clock, sockets and threads"
)]

mod support;

use ringleader::gfs::messages::{MasterRequest, Status};
use ringleader::net::files::Failure;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::files::{System, bytes, chunk_files, is_long, name};
use support::process::{PATIENCE, Program, wait_until};
use support::systems::local;
use support::wire::call;

/// How long a transfer of the longest file may take on a busy machine.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(600);

#[test]
fn a_file_comes_out_as_it_went_in_though_a_chunkserver_is_killed_in_the_middle() {
    // 1 GiB in chunks of the default size, or somewhat less in smaller ones.
    let (length, chunk) = if is_long() { (1 << 30, 64 << 20) } else { (24_000_001, 1 << 20) };
    let mut system = System::start(4, &[]);
    let (local, back) = (system.path("in"), system.path("out"));
    let content = bytes(length);
    fs::write(&local, &content).unwrap();
    let (local, back) = (local.to_str().unwrap().to_owned(), back.to_str().unwrap().to_owned());
    let came_back = || fs::read(&back).unwrap() == content;

    let started = Instant::now();
    let put = system.begin(&["put", &local, "dir/file", "--chunk", &chunk.to_string()]);
    // Of a third of its chunks.
    let third = length.div_ceil(chunk) / 3;
    system.wait_for("some of it is there", |census| census.copies >= 3 * third);
    system.kill_server(0);
    let put = put.finish(TRANSFER_PATIENCE);
    assert_eq!(put.code, Some(0), "{put}");
    println!("{length} bytes in, a chunkserver killed: {:?}", started.elapsed());

    let started = Instant::now();
    let get = system.begin(&["get", "dir/file", &back]);
    let part = |it: &fs::DirEntry| it.file_name().to_string_lossy().contains(".part-");
    wait_until("some of it is out", PATIENCE, || {
        let found = fs::read_dir(system.data.path()).unwrap().map(|it| it.unwrap()).find(part);
        let length_now = found.and_then(|it| it.metadata().ok()).map_or(0, |it| it.len());
        (length_now >= length as u64 / 3).then_some(())
    });
    system.kill_server(1);
    let get = get.finish(TRANSFER_PATIENCE);
    assert_eq!(get.code, Some(0), "{get}");
    assert!(came_back(), "what came out is not what went in");
    println!("{length} bytes out, another one killed: {:?}", started.elapsed());

    // Who comes back is no trouble: what it missed goes, what it has counts.
    system.start_server(0);
    system.start_server(1);
    system.wait_until_at_rest();
    let get = system.begin(&["get", "dir/file", &back]).finish(TRANSFER_PATIENCE);
    assert_eq!(get.code, Some(0), "{get}");
    assert!(came_back());
}

#[test]
fn every_acknowledged_record_is_there_once_though_chunkservers_are_killed_and_stopped() {
    let (writers, rounds) = if is_long() { (16, 8) } else { (4, 3) };
    let mut system = System::start(4, &[]);
    let file = name("log");
    let request =
        MasterRequest::Create { name: file.clone(), chunk_bytes: Some(1 << 20), copies: None };
    let _: Status = system.client().ask(&request, false).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..writers)
        .map(|writer| {
            let (mut client, stop, file) = (system.client(), Arc::clone(&stop), file.clone());
            thread::spawn(move || {
                let mut written = Vec::new();
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let filling = "x".repeat(number * 37 % 900);
                    let record = format!("<{writer}.{number}:{filling}>");
                    let offset = client.append(&file, record.as_bytes()).unwrap();
                    written.push((offset, record));
                }
                written
            })
        })
        .collect();
    let started = Instant::now();
    for round in 0..rounds {
        thread::sleep(Duration::from_secs(1));
        system.kill_server(round % 3);
        thread::sleep(Duration::from_secs(1));
        system.start_server(round % 3);
        let stopped = system.servers[3].program.as_ref().unwrap();
        stopped.signal("STOP");
        thread::sleep(Duration::from_secs(6));
        stopped.signal("CONT");
        system.wait_for("all are here again", |census| census.servers == 4);
    }
    stop.store(true, Ordering::Relaxed);
    let written: Vec<(u64, String)> =
        writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect();
    system.wait_until_at_rest();

    let mut client = system.client();
    let length = client.stat(&file).unwrap().length;
    let mut content = Vec::new();
    while (content.len() as u64) < length {
        let piece = client.read(&file, content.len() as u64, 1 << 20).unwrap();
        assert!(!piece.is_empty());
        content.extend_from_slice(&piece);
    }
    assert!(written.len() > 100, "only {} records", written.len());
    println!("{} records in {:?}", written.len(), started.elapsed());
    for (offset, record) in &written {
        let begin = *offset as usize;
        assert!(
            &content[begin..begin + record.len()] == record.as_bytes(),
            "{record} is not there"
        );
    }
    let mut seen: BTreeMap<&[u8], usize> = BTreeMap::new();
    for part in content.split(|byte| *byte == b'<').skip(1) {
        *seen.entry(part.split(|byte| *byte == b':').next().unwrap()).or_default() += 1;
    }
    assert!(seen.values().all(|count| *count == 1), "a record is there twice");
    assert_eq!(seen.len(), written.len(), "a record is there that nobody was told of");
}

#[test]
fn a_flipped_bit_in_each_chunk_is_never_read_and_every_chunk_is_repaired() {
    let system = System::start(3, &["--scrub-rate", "100000000"]);
    let (local, back) = (system.path("in"), system.path("out"));
    let chunks = if is_long() { 100 } else { 20 };
    let content = bytes(150_000 * chunks);
    fs::write(&local, &content).unwrap();
    let (local, back) = (local.to_str().unwrap().to_owned(), back.to_str().unwrap().to_owned());
    let put = system.run(&["put", &local, "file", "--chunk", "150000"]);
    assert_eq!(put.code, Some(0), "{put}");
    let files = chunk_files(&system.folder(1));
    assert_eq!(files.len(), chunks);
    for (index, path) in files.iter().enumerate() {
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let (place, mut byte) = (7_001 * index as u64 % 150_000, [0]);
        file.read_exact_at(&mut byte, place).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << (index % 8))], place).unwrap();
    }
    for _ in 0..3 {
        let get = system.run(&["get", "file", &back]);
        assert_eq!(get.code, Some(0), "{get}");
        assert!(fs::read(&back).unwrap() == content, "damage was read");
    }
    let found = system.wait_for("every flip is found", |census| census.damaged.len() == chunks);
    assert!(found.damaged.iter().all(|(_, at)| at.port() == system.servers[1].port));
    system.wait_until_at_rest();
    assert_eq!(chunk_files(&system.folder(1)).len(), chunks);
    let get = system.run(&["get", "file", &back]);
    assert_eq!(get.code, Some(0), "{get}");
    assert!(fs::read(&back).unwrap() == content);
}

#[test]
fn what_a_copy_missed_while_its_chunkserver_was_away_is_never_read_from_it() {
    let mut system = System::start(3, &[]);
    let file = name("f");
    let request = MasterRequest::Create { name: file.clone(), chunk_bytes: None, copies: None };
    let mut client = system.client();
    let _: Status = client.ask(&request, false).unwrap();
    client.write(&file, 0, b"before").unwrap();
    system.kill_server(2);
    client.write(&file, 0, b"behind").unwrap();
    system.start_server(2);
    let deadline = Instant::now() + Duration::from_secs(8);
    while Instant::now() < deadline {
        // A new client each time: any of the three may be asked.
        assert_eq!(*system.client().read(&file, 0, 6).unwrap(), *b"behind");
    }
    assert_eq!(system.wait_until_at_rest().copies, 3);
    assert_eq!(chunk_files(&system.folder(2)).len(), 1, "what was stale is still there");
}

#[test]
fn hostile_names_are_refused_and_nothing_outside_is_touched() {
    let system = System::start(1, &[]);
    let list = |path: &Path| {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = list(system.data.path());
    let long = "x/".repeat(2048);
    let names = ["../../etc/passwd", "", "/", "a/../b", ".", "a\0b", "a\nb", "a//b", "a/", &long];
    for name in names {
        for request in [
            json!({"cmd": "create", "name": name}),
            json!({"cmd": "delete", "name": name}),
            json!({"cmd": "rename", "from": name, "to": "x"}),
            json!({"cmd": "snapshot", "from": "x", "to": name}),
            json!({"cmd": "lease", "name": name, "index": 0}),
            json!({"cmd": "locate", "name": name, "index": 0}),
        ] {
            let reply = call(system.at(), &request).value();
            assert_eq!(reply["reason"], "invalid", "{request}: {reply}");
        }
    }
    // A chunk's number is a number.
    let server = local(system.servers[0].port);
    let read = json!({"cmd": "read", "chunk": "../x", "version": 1, "offset": 0, "length": 1});
    assert_eq!(call(server, &read).value()["reason"], "invalid");
    assert_eq!(list(system.data.path()), before);
}

#[test]
fn what_a_killed_master_has_acknowledged_is_there_whole() {
    let mut system = System::start(1, &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let (mut client, stopped) = (system.client(), Arc::clone(&stop));
    client.timeout = Duration::from_secs(10);
    let worker = thread::spawn(move || {
        let (mut there, mut unsure) = (Vec::new(), Vec::new());
        for number in 0.. {
            if stopped.load(Ordering::Relaxed) {
                break;
            }
            let (old, new) = (name(&format!("old/{number}")), name(&format!("new/{number}")));
            let create =
                MasterRequest::Create { name: old.clone(), chunk_bytes: None, copies: Some(1) };
            let rename = MasterRequest::Rename { from: old, to: new };
            let created = client.ask::<Status>(&create, false);
            let moved = created.and_then(|_| client.ask::<Status>(&rename, false));
            match moved {
                Ok(_) => there.push(number),
                Err(Failure::No(refusal)) => panic!("{number}: {refusal}"),
                Err(_) => unsure.push(number),
            }
        }
        (there, unsure)
    });
    for round in 0..if is_long() { 20 } else { 8 } {
        thread::sleep(Duration::from_millis(150 + 37 * round));
        system.kill_master(0);
        system.start_master(0);
    }
    stop.store(true, Ordering::Relaxed);
    let (there, unsure) = worker.join().unwrap();
    assert!(there.len() > 20, "only {} files", there.len());
    println!("{} files made and moved, {} in doubt", there.len(), unsure.len());
    let mut client = system.client();
    for number in there {
        assert!(client.exists(&name(&format!("new/{number}"))).unwrap(), "{number} is lost");
        assert!(!client.exists(&name(&format!("old/{number}"))).unwrap(), "{number} is half done");
    }
    for number in unsure {
        let old = client.exists(&name(&format!("old/{number}"))).unwrap();
        let new = client.exists(&name(&format!("new/{number}"))).unwrap();
        assert!(!(old && new), "{number} is there twice");
    }
}

#[test]
fn the_client_says_how_it_went_by_its_exit_status() {
    let system = System::start(1, &[]);
    let status = |arguments: &[&str]| system.run(arguments).code;
    assert_eq!(status(&["create", "f", "--copies", "1"]), Some(0));
    assert_eq!(status(&["create", "f"]), Some(1));
    assert_eq!(status(&["stat", "g"]), Some(1));
    assert_eq!(status(&["create", "../g"]), Some(1));
    assert_eq!(status(&["fly"]), Some(2));
    assert_eq!(status(&["put", "/nothing/is/here", "g"]), Some(5));
    assert_eq!(status(&["rm", "f"]), Some(0));
    assert_eq!(status(&["undelete", "f"]), Some(0));
    assert_eq!(status(&["snapshot", "f", "g"]), Some(0));
    assert_eq!(status(&["mv", "g", "h"]), Some(0));
    assert_eq!(system.run(&["ls"]).stdout, "f\nh\n");
    assert_eq!(system.run(&["stat", "f", "--json"]).json()["length"], 0);
    let mut nobody = Command::new(env!("CARGO_BIN_EXE_gfs"));
    nobody.args(["--master", "127.0.0.1:1", "--timeout", "1", "ls"]);
    let finished = Program::start("gfs", &mut nobody).finish(PATIENCE);
    assert_eq!(finished.code, Some(3), "{finished}");
}
