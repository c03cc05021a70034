//! A file system with three masters, as real processes: the one that leads is killed and
//! stopped under load, disks are lost, and the file system stays as it was.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic; it has a clock, sockets and threads"
)]

mod support;

use ringleader::gfs::messages::{MasterRequest, Status};
use ringleader::net::files::Failure;
use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use support::files::{System, is_long, name};
use support::process::{PATIENCE, wait_until};

/// How many times the leader is harmed, and in the long form.
fn rounds() -> usize {
    if is_long() { 20 } else { 3 }
}

#[test]
fn nothing_acknowledged_is_lost_and_work_resumes_though_the_leading_master_is_killed() {
    let mut system = System::with_masters(3, 3, &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    // One makes files and moves them, two append to a file.
    let namer = {
        let (mut client, stop, done) = (system.client(), Arc::clone(&stop), Arc::clone(&done));
        thread::spawn(move || {
            let (mut there, mut unsure) = (Vec::new(), Vec::new());
            for number in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let (old, new) = (name(&format!("old/{number}")), name(&format!("new/{number}")));
                let create =
                    MasterRequest::Create { name: old.clone(), chunk_bytes: None, copies: Some(1) };
                let rename = MasterRequest::Rename { from: old, to: new };
                let created = client.ask::<Status>(&create, false);
                match created.and_then(|_| client.ask::<Status>(&rename, false)) {
                    Ok(_) => there.push(number),
                    Err(Failure::No(refusal)) => panic!("{number}: {refusal}"),
                    Err(_) => unsure.push(number),
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
            (there, unsure)
        })
    };
    let create = |file: &str| MasterRequest::Create {
        name: name(file),
        chunk_bytes: Some(64 * 1024),
        copies: None,
    };
    let writers: Vec<_> = (0..2)
        .map(|writer| {
            let (mut client, stop, done) = (system.client(), Arc::clone(&stop), Arc::clone(&done));
            let file = name(&format!("log/{writer}"));
            let _: Status = client.ask(&create(file.as_str()), false).unwrap();
            thread::spawn(move || {
                let mut written = Vec::new();
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let record = format!("<{writer}.{number}:{}>", "x".repeat(number * 37 % 900));
                    let offset = client.append(&file, record.as_bytes()).unwrap();
                    written.push((offset, record));
                    done.fetch_add(1, Ordering::Relaxed);
                }
                (file, written)
            })
        })
        .collect();
    for round in 0..rounds() {
        thread::sleep(Duration::from_secs(1));
        let leader = system.leader();
        // Every third time it only sleeps, and wakes up to somebody else leading.
        if round % 3 == 2 {
            let stopped = system.masters[leader].program.as_ref().unwrap();
            stopped.signal("STOP");
            thread::sleep(Duration::from_secs(3));
            stopped.signal("CONT");
        } else {
            system.kill_master(leader);
            system.leader();
            system.start_master(leader);
        }
        let before = done.load(Ordering::Relaxed);
        wait_until("work resumes", PATIENCE, || {
            (done.load(Ordering::Relaxed) > before + 20).then_some(())
        });
    }
    stop.store(true, Ordering::Relaxed);
    let (there, unsure) = namer.join().unwrap();
    let mut client = system.client();
    assert!(there.len() > 20, "only {} files", there.len());
    for number in there {
        assert!(client.exists(&name(&format!("new/{number}"))).unwrap(), "{number} is lost");
        assert!(!client.exists(&name(&format!("old/{number}"))).unwrap(), "{number} is half done");
    }
    for number in unsure {
        let old = client.exists(&name(&format!("old/{number}"))).unwrap();
        let new = client.exists(&name(&format!("new/{number}"))).unwrap();
        assert!(!(old && new), "{number} is there twice");
    }
    for writer in writers {
        let (file, written) = writer.join().unwrap();
        let length = client.stat(&file).unwrap().length;
        let mut content = Vec::new();
        while (content.len() as u64) < length {
            content.extend_from_slice(&client.read(&file, content.len() as u64, 1 << 20).unwrap());
        }
        for (offset, record) in &written {
            let place = *offset as usize..*offset as usize + record.len();
            assert!(&content[place] == record.as_bytes(), "{record} is not there");
        }
        let begun = content.split(|byte| *byte == b'<').skip(1).count();
        assert_eq!(begun, written.len(), "a record is there twice");
    }
    system.wait_until_at_rest();
}

#[test]
fn two_of_three_masters_go_on_and_one_alone_changes_nothing() {
    let mut system = System::with_masters(3, 1, &[]);
    let status = |system: &System, arguments: &[&str]| system.run(arguments).code;
    assert_eq!(status(&system, &["create", "a", "--copies", "1"]), Some(0));
    let leader = system.leader();
    system.kill_master(leader);
    assert_eq!(status(&system, &["create", "b", "--copies", "1"]), Some(0));
    let next = system.leader();
    system.kill_master(next);
    let alone = system.run(&["create", "c", "--timeout", "3"]);
    assert!(matches!(alone.code, Some(3 | 4)), "{alone}");
    let read = system.run(&["ls", "--timeout", "3"]);
    assert_eq!(read.code, Some(3), "{read}");
    system.start_master(leader);
    let names = |system: &System| -> BTreeSet<String> {
        system.run(&["ls"]).stdout.lines().map(str::to_owned).collect()
    };
    let seen = names(&system);
    assert!(seen.contains("a") && seen.contains("b"), "{seen:?}");
    system.start_master(next);
    assert_eq!(status(&system, &["mv", "a", "d"]), Some(0));
    assert!(names(&system).contains("d"));
}

#[test]
fn a_master_whose_disk_is_lost_comes_in_again_when_it_is_added() {
    let mut system = System::with_masters(3, 1, &[]);
    assert_eq!(system.run(&["create", "a", "--copies", "1"]).code, Some(0));
    let lost = (system.leader() + 1) % 3;
    system.kill_master(lost);
    fs::remove_dir_all(system.data.path().join(format!("master-{lost}"))).unwrap();
    system.start_master(lost);
    let address = support::systems::local(system.masters[lost].port).to_string();
    let added = system.run(&["master-add", &address]);
    assert_eq!(added.code, Some(0), "{added}");
    // Now it counts: with it, one of the others can be missed.
    let leader = system.leader();
    system.kill_master(leader);
    assert_eq!(system.run(&["create", "b", "--copies", "1"]).code, Some(0));
    let removed = system.run(&["master-remove", "127.0.0.1:1"]);
    assert_eq!(removed.code, Some(1), "{removed}");
}

#[test]
fn a_single_master_grows_to_three_while_it_works() {
    let mut system = System::start(1, &[]);
    assert_eq!(system.run(&["create", "a", "--copies", "1"]).code, Some(0));
    let first = support::process::free_ports(2);
    for (index, port) in [(1, first), (2, first + 1)] {
        system.masters.push(support::files::Node { port, program: None });
        system.join_master(index);
        let address = support::systems::local(port).to_string();
        let added = system.run(&["master-add", &address]);
        assert_eq!(added.code, Some(0), "{added}");
    }
    system.kill_master(0);
    assert_eq!(system.run(&["create", "b", "--copies", "1"]).code, Some(0));
    let names = system.run(&["ls"]).stdout;
    assert_eq!(names, "a\nb\n");
    let server = &system.servers[0];
    assert!(server.program.is_some());
}
