//! Groups of viewleaders as real processes: leaders killed and stopped under load,
//! disks lost, members added and removed, wrong beginnings.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic and print, and has a clock and threads"
)]

mod support;

use ringleader::store::disk::DiskStore;
use ringleader::store::{Change, Durability, Space, Store};
use ringleader::wire::address::PortRange;
use serde_json::{Value, json};
use std::net::SocketAddrV4;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use support::process::{PATIENCE, Program, free_ports, run, wait_until};
use support::systems::{Listing, Scripts, local, view_of};
use support::traffic::Traffic;
use support::viewleaders::Viewleaders;
use support::wire::{Connection, Reply, call};
use tempfile::TempDir;

/// Servers of a group of viewleaders.
struct Servers {
    viewleaders: String,
    programs: Vec<Program>,
    addresses: Vec<SocketAddrV4>,
    data: TempDir,
}

impl Servers {
    fn start(group: &Viewleaders, count: usize) -> Self {
        let mut servers = Self {
            viewleaders: group.all(),
            programs: Vec::new(),
            addresses: Vec::new(),
            data: tempfile::tempdir().unwrap(),
        };
        for _ in 0..count {
            servers.add();
        }
        servers.wait_until_at_rest(group);
        servers
    }

    /// One more, which listens.
    fn add(&mut self) -> SocketAddrV4 {
        let folder = self.data.path().join(format!("server-{}", self.programs.len()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
        command.args(["--listen", "127.0.0.1:0", "--viewleader", &self.viewleaders]);
        let mut program = Program::start("server", command.arg("--data-dir").arg(folder));
        let address = program.listening();
        self.programs.push(program);
        self.addresses.push(address);
        address
    }

    fn wait_until_at_rest(&self, group: &Viewleaders) {
        wait_until("every group is at its target", PATIENCE, || {
            let view = view_of(group.at(group.leader_now()?))?;
            let own = view.own_members().count();
            (own == self.addresses.len() && view.is_at_rest()).then_some(())
        });
    }

    fn assert_sound(&mut self) {
        for program in &mut self.programs {
            program.assert_running();
            assert!(!program.stderr().contains("panicked"), "{}", program.stderr());
        }
    }
}

/// Clients that take one lock in turn, each through whichever viewleader answers,
/// and repeat what has no answer.
struct LockUsers {
    shared: Arc<LockShared>,
    threads: Vec<JoinHandle<()>>,
}

struct LockShared {
    viewleaders: Vec<SocketAddrV4>,
    end: AtomicBool,
    /// Whether somebody holds the lock.
    held: AtomicBool,
    grants: AtomicUsize,
    /// When the lock was granted last, and the longest that it was not since then.
    last: Mutex<(Instant, Duration)>,
    next_request: AtomicU64,
}

impl LockUsers {
    fn start(group: &Viewleaders, count: usize) -> Self {
        let shared = Arc::new(LockShared {
            viewleaders: group.ports().ports().map(local).collect(),
            end: AtomicBool::new(false),
            held: AtomicBool::new(false),
            grants: AtomicUsize::new(0),
            last: Mutex::new((Instant::now(), Duration::ZERO)),
            next_request: AtomicU64::new(1),
        });
        let threads = (0..count).map(|user| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.use_lock(&format!("user {user}")))
        });
        Self { threads: threads.collect(), shared }
    }

    fn grants(&self) -> usize {
        self.shared.grants.load(Ordering::SeqCst)
    }

    /// Waits until the lock has been granted `count` times more.
    fn wait_for_grants(&self, count: usize) {
        let goal = self.grants() + count;
        wait_until("the lock is granted", PATIENCE, || (self.grants() >= goal).then_some(()));
    }

    /// The longest that nobody was granted the lock since this was asked last.
    fn longest_gap(&self) -> Duration {
        std::mem::take(&mut self.shared.last.lock().unwrap().1)
    }

    /// # Panics
    /// If one of them has seen what it must not.
    fn end(self) -> usize {
        self.shared.end.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|user| user.join().expect("nothing wrong"));
        self.shared.grants.load(Ordering::SeqCst)
    }
}

impl LockShared {
    fn use_lock(&self, user: &str) {
        while !self.end.load(Ordering::SeqCst) {
            if self.ask("lock_get", user)["status"] != "granted" {
                thread::sleep(Duration::from_millis(2));
                continue;
            }
            assert!(!self.held.swap(true, Ordering::SeqCst), "the lock was granted twice");
            self.grants.fetch_add(1, Ordering::SeqCst);
            {
                let (last, longest) = &mut *self.last.lock().unwrap();
                *longest = (*longest).max(last.elapsed());
                *last = Instant::now();
            }
            thread::sleep(Duration::from_millis(1));
            assert!(self.held.swap(false, Ordering::SeqCst), "held by somebody else");
            // Exactly once: whoever held it has released it, however often it asked.
            assert_eq!(self.ask("lock_release", user)["status"], "ok");
        }
    }

    /// Asks until somebody answers. Each question has a number, the same one when
    /// it is asked again.
    fn ask(&self, cmd: &str, user: &str) -> Value {
        let number = self.next_request.fetch_add(1, Ordering::SeqCst);
        let request = json!({"cmd": cmd, "lockid": "door", "requestor": user, "request": number});
        let deadline = Instant::now() + PATIENCE;
        loop {
            for viewleader in &self.viewleaders {
                if let Reply::Value(reply) = call(*viewleader, &request)
                    && reply["error"].is_null()
                {
                    return reply;
                }
            }
            assert!(Instant::now() < deadline, "nobody answers {request}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn servers_and_locks_go_on_when_the_viewleader_that_leads_is_killed_under_load() {
    let mut group = Viewleaders::start(3);
    let mut servers = Servers::start(&group, 4);
    let traffic = Traffic::start(servers.addresses.clone());
    let users = LockUsers::start(&group, 4);
    traffic.wait_for_writes(50);
    users.wait_for_grants(20);
    for round in 1..=3 {
        users.longest_gap();
        let leader = group.leader();
        let killed = Instant::now();
        group.end(leader, "KILL");
        users.wait_for_grants(10);
        let gap = users.longest_gap();
        let joined = servers.add();
        wait_until("a server joins", PATIENCE, || {
            Listing::of(group.at(group.leader_now()?))?.has(joined).then_some(())
        });
        let changed = killed.elapsed();
        println!("round {round}: no lock for {gap:?}; a server has joined after {changed:?}");
        traffic.wait_for_writes(50);
        group.restart(leader);
        servers.wait_until_at_rest(&group);
        group.wait_until_voting(&[0, 1, 2]);
    }
    users.end();
    let outcome = traffic.end();
    assert_eq!(outcome.refused, Vec::<String>::new(), "a request failed");
    assert!(outcome.in_doubt.is_empty() && outcome.hung_up == 0, "a request was in doubt");
    println!("the longest that a key could not be read: {:?}", outcome.longest_gap);
    group.assert_sound();
    servers.assert_sound();
}

#[test]
fn a_rebalancing_that_the_next_leader_completes_is_told_once() {
    let mut group = Viewleaders::start(3);
    let mut servers = Servers::start(&group, 3);
    let count = |printed: &str| printed.matches("Rebalancing complete").count();
    let leader = group.leader();
    let printed = |group: &Viewleaders| (0..3).map(|i| count(&group.printed(i))).sum::<usize>();
    // Whoever has the lock after the workers finds that they have told all.
    let wait_for_workers = |group: &Viewleaders| {
        for (cmd, done) in [("lock_get", "granted"), ("lock_release", "ok")] {
            let request = json!({"cmd": cmd, "lockid": "rebalancing", "requestor": "me"});
            wait_until("the workers are done", PATIENCE, || {
                let reply = call(group.at(group.leader()), &request);
                matches!(reply, Reply::Value(reply) if reply["status"] == done).then_some(())
            });
        }
    };
    wait_for_workers(&group);
    let before =
        wait_until("it is told", PATIENCE, || Some(printed(&group)).filter(|told| *told > 0));
    servers.add();
    wait_until("the server has joined", PATIENCE, || {
        Listing::of(group.at(leader))?.has(servers.addresses[3]).then_some(())
    });
    let told = count(&group.end(leader, "KILL").stdout);
    servers.wait_until_at_rest(&group);
    wait_until("the rebalancing is told", PATIENCE, || {
        (told + printed(&group) > before).then_some(())
    });
    wait_for_workers(&group);
    assert_eq!(told + printed(&group), before + 1);
}

#[test]
fn a_leader_that_was_asleep_does_not_answer_for_the_next_one() {
    let group = Viewleaders::start(3);
    let old = group.leader();
    let others: Vec<usize> = (0..3).filter(|index| *index != old).collect();
    // It has taken the question before it falls asleep, or finds it when it wakes.
    let mut line = Connection::open(group.at(old)).unwrap();
    assert!(line.call(&json!({"cmd": "query_servers"})).value()["error"].is_null());
    group.signal(old, "STOP");
    let ask = |requestor: &str, at: usize| {
        let request = json!({"cmd": "lock_get", "lockid": "door", "requestor": requestor});
        call(group.at(at), &request)
    };
    let request = json!({"cmd": "lock_get", "lockid": "door", "requestor": "late"});
    let body = serde_json::to_vec(&request).unwrap();
    line.send(&support::wire::frame(&body));
    wait_until("another one grants the lock", PATIENCE, || {
        let grants = |at: &usize| matches!(ask("first", *at), Reply::Value(reply) if reply["status"] == "granted");
        others.iter().any(grants).then_some(())
    });
    group.signal(old, "CONT");
    let late = line.receive().value();
    assert_ne!(late["status"], "granted", "{late}");
    let servers = line.call(&json!({"cmd": "query_servers"})).value();
    assert_eq!(servers["error"], "not leader", "{servers}");
    let hint = wait_until("it knows who leads", PATIENCE, || {
        let reply = call(group.at(old), &json!({"cmd": "query_servers"})).value();
        reply["leader"].as_str().map(str::to_owned)
    });
    assert!(others.iter().any(|other| group.at(*other).to_string() == hint), "{hint}");
}

#[test]
fn originals_work_on_a_group_whose_leader_is_killed() {
    let Some(scripts) = Scripts::stand_ins() else { return };
    let mut group = Viewleaders::start(3);
    let first = free_ports(4);
    let ports = PortRange { first, count: 4 };
    let mut originals: Vec<Program> =
        (0..3).map(|_| scripts.server(group.ports(), ports)).collect();
    let listed = |group: &Viewleaders, count: usize| {
        wait_until("the originals are listed", PATIENCE, || {
            (Listing::of(group.at(group.leader_now()?))?.servers.len() == count).then_some(())
        });
    };
    listed(&group, 3);
    let client = |group: &Viewleaders, arguments: &[&str]| {
        let mut command = scripts.client(group.ports(), ports, arguments);
        run("client.py", &mut command)
    };
    let works = |group: &Viewleaders, arguments: &[&str]| {
        wait_until("client.py is served", PATIENCE, || {
            let finished = client(group, arguments);
            (finished.code == Some(0)).then(|| finished.json())
        })
    };
    assert_eq!(works(&group, &["setr", "pear", "yellow"])["status"], "ok");
    assert_eq!(works(&group, &["lock_get", "door", "me"])["status"], "granted");
    for _ in 0..2 {
        let leader = group.leader();
        group.end(leader, "KILL");
        assert_eq!(works(&group, &["getr", "pear"])["value"], "yellow");
        assert_eq!(works(&group, &["setr", "apple", "green"])["status"], "ok");
        assert_eq!(works(&group, &["lock_get", "door", "me"])["status"], "granted");
        listed(&group, 3);
        for original in &mut originals {
            original.assert_running();
        }
        group.restart(leader);
        group.wait_until_voting(&[0, 1, 2]);
    }
    assert_eq!(works(&group, &["lock_release", "door", "me"])["status"], "ok");
}

#[test]
fn a_viewleader_whose_disk_is_gone_is_replaced_with_one_command_while_clients_work() {
    let mut group = Viewleaders::start(3);
    let mut servers = Servers::start(&group, 3);
    let traffic = Traffic::start(servers.addresses.clone());
    let users = LockUsers::start(&group, 3);
    users.wait_for_grants(20);
    // Once a follower's disk, once the leader's.
    for round in 0..2 {
        let leader = group.leader();
        let lost = if round == 0 { (leader + 1) % 3 } else { leader };
        group.end(lost, "KILL");
        group.lose_disk(lost);
        group.restart(lost);
        let address = group.at(lost).to_string();
        wait_until("it says that it waits", PATIENCE, || {
            group.said(lost).contains("waits to be added").then_some(())
        });
        wait_until("the leader says so", PATIENCE, || {
            let health = group.health();
            let one = health.iter().find(|one| one["address"] == *address)?;
            one["notes"].to_string().contains("its disk was lost").then_some(())
        });
        let itself = call(group.at(lost), &json!({"cmd": "status"})).value();
        assert_eq!(itself["error"], "not leader");
        assert!(itself["note"].to_string().contains("waits to be added"), "{itself}");
        let added = group.client(&["viewleader_add", &address]);
        assert_eq!(added.code, Some(0), "{added}");
        group.wait_until_voting(&[0, 1, 2]);
        users.wait_for_grants(20);
        traffic.wait_for_writes(20);
    }
    // The group does without one of the others now: those that came hold everything.
    let leader = group.leader();
    group.end(leader, "KILL");
    users.wait_for_grants(10);
    users.end();
    let outcome = traffic.end();
    assert_eq!(outcome.refused, Vec::<String>::new());
    group.assert_sound();
    servers.assert_sound();
}

#[test]
fn viewleaders_are_added_and_removed_while_clients_work() {
    let mut group = Viewleaders::new(4);
    group.run(0, &[]);
    let mut servers = Servers::start(&group, 3);
    let traffic = Traffic::start(servers.addresses.clone());
    let users = LockUsers::start(&group, 3);
    for index in 1..4 {
        group.run(index, &["--join"]);
        let added = group.client(&["viewleader_add", &group.at(index).to_string()]);
        assert_eq!(added.code, Some(0), "{added}");
        users.wait_for_grants(10);
    }
    group.wait_until_voting(&[0, 1, 2, 3]);
    // To add it again changes nothing.
    let again = group.client(&["viewleader_add", &group.at(3).to_string()]);
    assert_eq!(again.code, Some(0), "{again}");
    // The one that leads, and another.
    for index in [group.leader(), (group.leader() + 1) % 4] {
        let removed = group.client(&["viewleader_remove", &group.at(index).to_string()]);
        assert_eq!(removed.code, Some(0), "{removed}");
        users.wait_for_grants(10);
        wait_until("it knows that it is out", PATIENCE, || {
            group.said(index).contains("was removed").then_some(())
        });
        let reply = call(group.at(index), &json!({"cmd": "query_servers"})).value();
        assert_eq!(reply["error"], "not leader");
        group.end(index, "TERM");
    }
    let unknown = group.client(&["viewleader_remove", "127.0.0.1:1"]);
    assert_eq!(unknown.code, Some(1), "{unknown}");
    users.end();
    let outcome = traffic.end();
    assert_eq!(outcome.refused, Vec::<String>::new());
    group.assert_sound();
    servers.assert_sound();
}

#[test]
fn without_a_majority_nothing_is_removed_and_nothing_granted() {
    let mut group = Viewleaders::start(3);
    let leader = group.leader();
    let others: Vec<usize> = (0..3).filter(|index| *index != leader).collect();
    group.end(others[0], "KILL");
    wait_until("the leader notices", PATIENCE, || {
        let address = group.at(others[0]).to_string();
        let health = group.health();
        health.iter().any(|one| one["address"] == *address && one["answers"] == false).then_some(())
    });
    // Two of three answer; one of two would be no majority.
    let removed = group.client(&["viewleader_remove", &group.at(others[1]).to_string()]);
    assert_eq!(removed.code, Some(1), "{removed}");
    assert!(removed.stderr.contains("no majority"), "{removed}");
    group.end(others[1], "KILL");
    wait_until("the last one steps down", PATIENCE, || {
        group.said(leader).contains("leads no more").then_some(())
    });
    let request = json!({"cmd": "lock_get", "lockid": "door", "requestor": "me"});
    assert_eq!(call(group.at(leader), &request).value()["error"], "not leader");
    group.restart(others[1]);
    group.leader();
}

#[test]
fn a_group_is_founded_once_all_have_come_however_late_and_goes_on_after_all_have_ended() {
    let mut group = Viewleaders::new(3);
    let peers = group.all();
    for index in [2, 0] {
        group.run(index, &["--peers", &peers]);
    }
    let late = group.at(1).to_string();
    wait_until("they say who is missing", PATIENCE, || {
        let says = |index| group.said(index).contains(&format!("{late} is missing"));
        (says(0) && says(2)).then_some(())
    });
    let status = group.client_within("2", &["query_servers"]);
    assert_eq!(status.code, Some(1), "{status}");
    assert!(status.stderr.contains("is missing"), "{status}");
    group.run(1, &["--peers", &peers]);
    group.wait_until_voting(&[0, 1, 2]);
    let request = json!({"cmd": "lock_get", "lockid": "door", "requestor": "me"});
    assert_eq!(call(group.at(group.leader()), &request).value()["status"], "granted");
    for index in 0..3 {
        group.end(index, "KILL");
    }
    // The list counts at the first start only.
    group.run(0, &[]);
    group.restart(1);
    group.restart(2);
    group.wait_until_voting(&[0, 1, 2]);
    let request = json!({"cmd": "lock_get", "lockid": "door", "requestor": "another"});
    assert_eq!(call(group.at(group.leader()), &request).value()["status"], "retry");
}

#[test]
fn a_wrong_list_is_refused_in_a_clear_sentence() {
    let mut group = Viewleaders::new(3);
    // Without itself, twice the same: it does not even start.
    let without = group.list([1, 2].into_iter());
    let finished = run("viewleader", &mut group.command(0, &["--peers", &without]));
    assert_eq!(finished.code, Some(1), "{finished}");
    assert!(finished.stderr.contains("is not in the list"), "{finished}");
    let twice = group.list([0, 1, 1].into_iter());
    let finished = run("viewleader", &mut group.command(0, &["--peers", &twice]));
    assert!(finished.stderr.contains("twice"), "{finished}");
    // Other lists than the others': nobody founds anything.
    let (all, two) = (group.all(), group.list([0, 1].into_iter()));
    group.run(0, &["--peers", &all]);
    group.run(1, &["--peers", &two]);
    group.run(2, &["--peers", &all]);
    wait_until("they say so", PATIENCE, || {
        let says = |index| group.said(index).contains("was started with other --peers");
        (says(0) && says(1) && says(2)).then_some(())
    });
    assert_eq!(group.leader_now(), None);
    group.end(1, "TERM");
    group.run(1, &["--peers", &all]);
    group.wait_until_voting(&[0, 1, 2]);
}

#[test]
fn over_a_disk_that_is_in_a_group_a_list_with_a_stranger_is_refused_and_an_old_one_is_not() {
    let mut group = Viewleaders::new(4);
    let founders = group.list(0..3);
    (0..3).for_each(|index| group.run(index, &["--peers", &founders]));
    group.wait_until_voting(&[0, 1, 2]);
    group.end(0, "TERM");
    // Whoever takes it for a way to exchange a member, or has the wrong disk.
    let with_stranger = group.list([0, 1, 3].into_iter());
    let finished = run("viewleader", &mut group.command(0, &["--peers", &with_stranger]));
    assert_eq!(finished.code, Some(1), "{finished}");
    let stranger = format!("{} of --peers was never among them", group.at(3));
    assert!(finished.stderr.contains(&stranger), "{finished}");
    assert!(finished.stderr.contains("viewleader_add"), "{finished}");
    // The members have changed since; the list of the beginning still starts it.
    group.run(0, &["--peers", &founders]);
    group.run(3, &["--join"]);
    let added = group.client(&["viewleader_add", &group.at(3).to_string()]);
    assert_eq!(added.code, Some(0), "{added}");
    let removed = group.client(&["viewleader_remove", &group.at(2).to_string()]);
    assert_eq!(removed.code, Some(0), "{removed}");
    group.wait_until_voting(&[0, 1, 3]);
    group.end(2, "TERM");
    group.end(0, "KILL");
    group.restart(0);
    wait_until("it says that the list does not count", PATIENCE, || {
        group.said(0).contains("--peers does not count any more").then_some(())
    });
    group.wait_until_voting(&[0, 1, 3]);
    group.end(0, "TERM");
    group.run(0, &["--peers", &with_stranger]);
    group.wait_until_voting(&[0, 1, 3]);
    assert!(!group.said(0).contains("--peers does not count"), "{}", group.said(0));
}

#[test]
fn a_viewleader_of_its_own_is_not_made_one_of_three_by_a_list() {
    let mut group = Viewleaders::new(3);
    group.run(0, &[]);
    group.leader();
    group.end(0, "TERM");
    let finished = run("viewleader", &mut group.command(0, &["--peers", &group.all()]));
    assert_eq!(finished.code, Some(1), "{finished}");
    assert!(finished.stderr.contains("was never among them"), "{finished}");
    group.restart(0);
    group.leader();
}

#[test]
fn two_groups_do_not_mix() {
    let mut ours = Viewleaders::new(1);
    ours.run(0, &[]);
    let mut theirs = Viewleaders::new(1);
    theirs.run(0, &[]);
    let added = ours.client(&["viewleader_add", &theirs.at(0).to_string()]);
    assert_eq!(added.code, Some(1), "{added}");
    assert!(added.stderr.contains("of another group"), "{added}");
    let nobody = ours.client(&["viewleader_add", "127.0.0.1:1"]);
    assert_eq!(nobody.code, Some(1), "{nobody}");
    assert!(nobody.stderr.contains("nobody answers"), "{nobody}");
    let last = ours.client(&["viewleader_remove", &ours.at(0).to_string()]);
    assert!(last.stderr.contains("the only node"), "{last}");
    // A message of a stranger changes nothing.
    let message = json!({
        "cmd": "viewleader_message", "group": "1", "from": "2", "to": "3",
        "address": "127.0.0.1:1", "message": {"kind": "vote", "term": 99},
    });
    let said = call(ours.at(0), &message).value();
    assert_eq!(said["status"], "foreign", "{said}");
    assert_eq!(ours.leader(), 0);
}

#[test]
fn a_viewleader_that_is_asked_to_end_lets_another_one_lead_at_once() {
    let mut group = Viewleaders::start(3);
    let users = LockUsers::start(&group, 2);
    users.wait_for_grants(20);
    users.longest_gap();
    let leader = group.leader();
    assert_eq!(group.end(leader, "TERM").code, Some(0));
    users.wait_for_grants(20);
    println!("no lock for {:?}", users.longest_gap());
    users.end();
    group.assert_sound();
}

#[test]
fn a_data_directory_from_before_there_were_groups_is_refused_in_a_clear_sentence() {
    let data = tempfile::tempdir().unwrap();
    let mut store = DiskStore::open(&data.path().join("store"), Durability::Always).unwrap();
    let old = br#"{"index":7,"state":{}}"#.to_vec();
    store.commit(&[Change::put(Space::Meta, "snapshot", old)]).unwrap();
    drop(store);
    let mut command = Command::new(env!("CARGO_BIN_EXE_viewleader"));
    command.args(["--listen", "127.0.0.1:0"]).arg("--data-dir").arg(data.path());
    let finished = run("viewleader", &mut command);
    assert_eq!(finished.code, Some(1), "{finished}");
    assert!(finished.stderr.contains("start with an empty data directory"), "{finished}");
}
