//! Whatever comes over the wire, a program answers as it must or closes, and
//! serves others meanwhile and afterwards.
//!
//! Every test here runs against real programs. While it does, a [`Witness`] goes
//! on with good requests on a connection of its own, and a [`Target`] that has
//! been through the worst must still be the same process, without a panic in its
//! log.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic; it has a clock, sockets and threads"
)]

mod support;
#[path = "bad_input/table.rs"]
mod table;

use ringleader::gfs::MAX_PIECE_BYTES;
use ringleader::gfs::messages::{MasterRequest, Status};
use ringleader::kv::ring::Point;
use ringleader::view::Group;
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use support::files::{self, System};
use support::process::{PATIENCE, Program, wait_until};
use support::systems::{local, our_server, our_viewleader, view_of, wait_until_at_rest};
use support::wire::{Connection, Reply, call, frame, frame_announcing};
use table::{Case, MAX_FRAME, MAX_KEY, MAX_VALUE, Must};
use tempfile::TempDir;

/// What an original client can read, in bytes.
const OLD_CLIENT_READS: usize = 8191;

// ---- the program under test ----

/// A program under test, and what it needs to work.
struct Target {
    program: Program,
    address: SocketAddrV4,
    /// The viewleader's address, or its own if it is one.
    leader: SocketAddrV4,
    /// A request that must always be answered, and with what.
    good: Value,
    answer: Value,
    _viewleader: Option<Program>,
    _data: Option<TempDir>,
}

impl Target {
    fn viewleader() -> Self {
        let mut program = our_viewleader(0);
        let address = program.listening();
        // A lock that is held is a fact that nothing in this file changes.
        let good = json!({"cmd": "lock_get", "lockid": "witnessed", "requestor": "witness"});
        let answer = call(address, &good).value();
        assert_eq!(answer["status"], "granted");
        Self { program, address, leader: address, good, answer, _viewleader: None, _data: None }
    }

    /// A server that is a cluster by itself.
    fn server() -> Self {
        let data = tempfile::tempdir().unwrap();
        let mut viewleader = our_viewleader(0);
        let leader = viewleader.listening();
        let mut program = our_server(leader, 0, data.path());
        let address = program.listening();
        wait_until_at_rest(leader, 1);
        let set = json!({"cmd": "setr", "key": "witnessed", "val": "yes", "direct": true});
        assert_eq!(call(address, &set).value()["status"], "ok");
        let good = json!({"cmd": "getr", "key": "witnessed"});
        let answer = call(address, &good).value();
        assert_eq!(answer["value"], "yes");
        Self {
            program,
            address,
            leader,
            good,
            answer,
            _viewleader: Some(viewleader),
            _data: Some(data),
        }
    }

    fn both() -> [Self; 2] {
        [Self::viewleader(), Self::server()]
    }

    fn connect(&self) -> Connection {
        Connection::open(self.address).expect("it accepts connections")
    }

    fn witness(&self) -> Witness {
        Witness::start(self.address, self.good.clone(), self.answer.clone())
    }

    fn assert_answers_on(&self, connection: &mut Connection) -> Result<(), String> {
        match connection.call(&self.good) {
            Reply::Value(answer) if answer == self.answer => Ok(()),
            other => Err(format!("a good request afterwards brought {other:?}")),
        }
    }

    /// The last words on a program that has been through the worst.
    fn assert_unharmed(mut self) {
        self.assert_answers_on(&mut self.connect()).unwrap();
        self.program.assert_running();
        self.program.signal("TERM");
        let finished = self.program.finish(PATIENCE);
        assert_eq!(finished.code, Some(0), "{finished}");
        assert!(!finished.stderr.contains("panicked"), "{finished}");
    }
}

/// Goes on with good requests on one connection while a test does its worst.
struct Witness {
    served: Arc<(Mutex<u64>, Condvar)>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Witness {
    /// How long it rests between two requests: others work on this machine, too.
    const REST: Duration = Duration::from_millis(1);

    fn start(address: SocketAddrV4, request: Value, answer: Value) -> Self {
        let served = Arc::new((Mutex::new(0), Condvar::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (counter, end) = (Arc::clone(&served), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut connection = Connection::open(address).expect("it accepts connections");
            while !end.load(Ordering::Relaxed) {
                assert_eq!(connection.call(&request), Reply::Value(answer.clone()));
                *counter.0.lock().unwrap() += 1;
                counter.1.notify_all();
                thread::sleep(Self::REST);
            }
        });
        Self { served, stop, thread: Some(thread) }
    }

    fn count(&self) -> u64 {
        *self.served.0.lock().unwrap()
    }

    /// Waits until a request has been answered that was sent after this call.
    fn assert_served(&self) -> Result<(), String> {
        let (count, progress) = &*self.served;
        let count = count.lock().unwrap();
        // The next one may have been sent before.
        let enough = *count + 2;
        let waited = progress.wait_timeout_while(count, PATIENCE, |count| *count < enough);
        match waited.unwrap().1.timed_out() {
            true => Err("meanwhile, others were not served".to_owned()),
            false => Ok(()),
        }
    }

    /// How many requests it was answered, all of them well.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.count()
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

// ---- the table ----

/// Sends what `case` sends and says what is wrong with what comes back.
fn verdict(target: &Target, case: &Case) -> Result<(), String> {
    let mut connection = target.connect();
    connection.send(&case.bytes);
    match &case.must {
        Must::Refuse(words) => {
            assert_refused(connection.receive(), words)?;
            target.assert_answers_on(&mut connection)
        }
        Must::RefuseAndClose(words) => {
            assert_refused(connection.receive(), words)?;
            assert_closed(&mut connection)
        }
        Must::Close => {
            connection.end_sending();
            assert_closed(&mut connection)
        }
    }
}

fn assert_refused(reply: Reply, words: &str) -> Result<(), String> {
    let Reply::Value(reply) = reply else { return Err(format!("no refusal: {reply:?}")) };
    let length = reply.to_string().len();
    if length > OLD_CLIENT_READS {
        return Err(format!("a refusal of {length} bytes: an original client can't read it"));
    }
    let error = reply["error"].as_str().unwrap_or_default();
    if reply["reason"] == "invalid" && error.contains(words) {
        return Ok(());
    }
    Err(format!("a refusal with {words:?} was due, not {reply}"))
}

fn assert_closed(connection: &mut Connection) -> Result<(), String> {
    match connection.receive() {
        Reply::Closed => Ok(()),
        other => Err(format!("the connection was to be closed; there was {other:?}")),
    }
}

/// Goes through the rows of `cases`, one after the other.
fn run_table(target: &Target, cases: &[Case]) {
    let witness = target.witness();
    let mut wrong = Vec::new();
    for case in cases {
        let outcome = verdict(target, case).and_then(|()| witness.assert_served());
        if let Err(why) = outcome {
            wrong.push(format!("{}: {why}", case.what));
        }
    }
    let served = witness.end();
    assert!(served >= 2 * cases.len() as u64, "{served} requests of others were served");
    assert!(
        wrong.is_empty(),
        "{} of {} rows are wrong:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

fn whole_table(target: Target, commands: &[table::Command]) {
    let mut cases = table::broken_frames();
    cases.extend(table::no_requests());
    cases.extend(commands.iter().flat_map(table::Command::bad));
    run_table(&target, &cases);
    // That they were refused means something only if their like are not.
    for command in commands {
        if let Reply::Value(reply) = call(target.address, &command.good()) {
            assert_ne!(reply["reason"], "invalid", "{}: {reply}", command.cmd);
        }
    }
    target.assert_unharmed();
}

#[test]
fn a_viewleader_answers_every_bad_input_as_it_must() {
    whole_table(Target::viewleader(), table::VIEWLEADER);
}

#[test]
fn a_server_answers_every_bad_input_as_it_must() {
    whole_table(Target::server(), table::SERVER);
}

#[test]
fn a_program_says_what_it_is_to_who_takes_it_for_another() {
    for (target, commands, words) in [
        (Target::viewleader(), table::SERVER, "this is a viewleader"),
        (Target::server(), table::VIEWLEADER, "this is a server"),
    ] {
        for command in commands {
            let reply = call(target.address, &command.good());
            assert_refused(reply, words).unwrap_or_else(|why| panic!("{}: {why}", command.cmd));
        }
        target.assert_unharmed();
    }
}

/// The group of `key` at `viewleader`, and where its primary listens.
fn group_of(key: &str, viewleader: SocketAddrV4) -> (Group, SocketAddrV4) {
    let view = view_of(viewleader).unwrap();
    let group = view.groups[view.group_at(Point::of(key)).unwrap()].clone();
    let primary = view.member(group.primary.as_ref().unwrap()).unwrap().address;
    (group, primary)
}

#[test]
fn a_fetch_from_beyond_the_ring_is_refused() {
    let target = Target::server();
    let (group, _) = group_of("k", target.leader);
    let Group { start, version, .. } = group;
    let fetch = |point: u32| json!({"cmd": "fetch", "start": start, "version": version, "after": {"point": point, "key": ""}});
    assert_eq!(call(target.address, &fetch(9_999)).value()["answer"], "page");
    for point in [10_000, 65_535] {
        assert_refused(call(target.address, &fetch(point)), "fetch: ").unwrap();
    }
    target.assert_unharmed();
}

#[test]
fn an_entry_with_a_number_that_no_primary_gives_harms_no_group() {
    let data = tempfile::tempdir().unwrap();
    let mut viewleader = our_viewleader(0);
    let leader = viewleader.listening();
    let start = |name| our_server_with(leader, &data.path().join(name), &["--lease", "1"]);
    let mut servers = ["a", "b", "c"].map(start);
    let addresses = servers.each_mut().map(Program::listening);
    wait_until_at_rest(leader, 3);
    let (group, primary) = group_of("k", leader);
    let secondary = *addresses.iter().find(|address| **address != primary).unwrap();
    // Right in everything but one: writes are counted from 1.
    let version = format!("{}.0", group.version.0);
    let prepare = json!({
        "cmd": "prepare", "start": group.start, "version": group.version, "committed": "0.0",
        "entries": [{"key": "k", "version": version, "value": "v"}],
    });
    let prepared = call(secondary, &prepare);

    // What may have been sown comes up when another one takes over.
    for (server, address) in servers.iter().zip(addresses) {
        if address == primary {
            server.signal("KILL");
        }
    }
    let set = json!({"cmd": "setr", "key": "k", "val": "w", "direct": true});
    wait_until("the group is served again", PATIENCE, || {
        (call(secondary, &set).value()["status"] == "ok").then_some(())
    });
    for (server, address) in servers.iter_mut().zip(addresses) {
        assert!(!server.stderr().contains("panicked"), "{address} has panicked");
        if address != primary {
            server.assert_running();
        }
    }
    assert_refused(prepared, "prepare: ").unwrap();
}

/// Starts a server on any port with further `flags`.
fn our_server_with(viewleader: SocketAddrV4, data: &Path, flags: &[&str]) -> Program {
    let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
    command.args(["--listen", "127.0.0.1:0", "--viewleader", &viewleader.to_string()]);
    Program::start("server", command.arg("--data-dir").arg(data).args(flags))
}

#[test]
fn what_is_just_within_the_limits_is_served() {
    let target = Target::server();
    let mut connection = target.connect();
    let key = "k".repeat(MAX_KEY);
    // JSON writes this letter as six.
    for value in ["v".repeat(MAX_VALUE), "\u{1}".repeat(MAX_VALUE), String::new()] {
        let set = json!({"cmd": "setr", "key": key, "val": value, "direct": true});
        assert_eq!(connection.call(&set).value()["status"], "ok");
        let reply = connection.call(&json!({"cmd": "getr", "key": key})).value();
        assert!(reply["value"] == *value, "another value came back");
    }
    let mut body = b"{\"cmd\":\"getr\",\"key\":\"witnessed\",\"more\":\"".to_vec();
    body.resize(MAX_FRAME - 2, b'x');
    body.extend_from_slice(b"\"}");
    connection.send(&frame(&body));
    assert_eq!(connection.receive(), Reply::Value(target.answer.clone()));
    target.assert_unharmed();
}

#[test]
fn fields_that_nobody_knows_are_ignored_however_deep_they_are() {
    let deep = ["[".repeat(100_000), "]".repeat(100_000)].concat();
    for target in Target::both() {
        let good = target.good.to_string();
        let body = format!("{{\"server\":null,\"more\":{deep},{}", &good[1..]);
        let mut connection = target.connect();
        connection.send(&frame(body.as_bytes()));
        assert_eq!(connection.receive(), Reply::Value(target.answer.clone()));
        target.assert_unharmed();
    }
}

#[test]
fn a_reply_over_the_limit_is_refused_and_can_be_had_in_pages() {
    let target = Target::server();
    let count = MAX_FRAME / MAX_KEY + 1;
    let mut connection = target.connect();
    let keys: Vec<String> = (0..count).map(|number| format!("{number:0MAX_KEY$}")).collect();
    for key in &keys {
        assert_eq!(
            connection.call(&json!({"cmd": "set", "key": key, "val": ""})).value()["status"],
            "ok"
        );
    }
    let all = json!({"cmd": "query_all_keys"});
    assert_refused(connection.call(&all), "the reply is too long").unwrap();
    let mut listed = Vec::new();
    let mut page = connection.call(&json!({"cmd": "query_all_keys", "limit": 10_000})).value();
    while page["more"] == true {
        listed.extend(page["result"].as_array().unwrap().clone());
        let after = listed.last();
        page = connection.call(&json!({"cmd": "query_all_keys", "after": after})).value();
    }
    listed.extend(page["result"].as_array().unwrap().clone());
    listed.retain(|key| *key != "witnessed");
    let mut listed: Vec<&str> = listed.iter().map(|key| key.as_str().unwrap()).collect();
    listed.sort_unstable();
    assert!(listed == keys, "{} keys of {count} are listed", listed.len());
    target.assert_unharmed();
}

// ---- connections that go nowhere ----

#[test]
fn a_connection_dropped_in_the_middle_harms_nobody() {
    for target in Target::both() {
        let witness = target.witness();
        let good = frame(target.good.to_string().as_bytes());
        for length in 0..good.len() {
            let mut connection = target.connect();
            connection.send(&good[..length]);
        }
        // And one that asks much and does not wait for the answers.
        for _ in 0..10 {
            target.connect().send(&good.repeat(500));
        }
        witness.assert_served().unwrap();
        witness.end();
        target.assert_unharmed();
    }
}

#[test]
fn a_torn_message_behind_good_ones_takes_none_of_their_answers() {
    for target in Target::both() {
        let mut connection = target.connect();
        let good = frame(target.good.to_string().as_bytes());
        connection.send(&[good.repeat(3), good[..10].to_vec()].concat());
        connection.end_sending();
        for _ in 0..3 {
            assert_eq!(connection.receive(), Reply::Value(target.answer.clone()));
        }
        assert_closed(&mut connection).unwrap();
        target.assert_unharmed();
    }
}

/// Sends `bytes`, one at a time and one for each `pace`, and returns when it
/// was cut off, or what it was answered.
fn send_slowly(address: SocketAddrV4, bytes: &[u8], pace: Duration) -> Result<Duration, Vec<u8>> {
    let mut stream = TcpStream::connect(address).unwrap();
    // Waiting for what must not come is the pause between two bytes.
    stream.set_read_timeout(Some(pace)).unwrap();
    stream.set_nodelay(true).unwrap();
    let begun = Instant::now();
    let mut piece = [0; 4096];
    for byte in bytes {
        let read = stream.write_all(&[*byte]).and_then(|()| stream.read(&mut piece));
        match read {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) | Ok(0) => return Ok(begun.elapsed()),
            Ok(length) => return Err(piece[..length].to_vec()),
        }
    }
    // All is sent: the answer or the cut comes in its time.
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    match stream.read(&mut piece) {
        Ok(0) | Err(_) => Ok(begun.elapsed()),
        Ok(length) => Err(piece[..length].to_vec()),
    }
}

#[test]
fn a_message_that_comes_a_byte_a_second_is_cut_after_ten_while_others_are_served() {
    let targets = Target::both();
    thread::scope(|scope| {
        for target in &targets {
            let good = frame(target.good.to_string().as_bytes());
            // Some never say more than that, which is too slow, too.
            for (bytes, pace) in [(good.len(), 1000), (1, 1), (5, 100)] {
                let bytes = good[..bytes].to_vec();
                scope.spawn(move || {
                    let witness = target.witness();
                    let cut = send_slowly(target.address, &bytes, Duration::from_millis(pace));
                    let after = cut.expect("no answer");
                    let allowed = Duration::from_secs(9)..Duration::from_secs(20);
                    assert!(allowed.contains(&after), "cut after {after:?}");
                    witness.assert_served().unwrap();
                    assert!(witness.end() > 100);
                });
            }
            // Slow is not too slow: this one takes some three seconds.
            scope.spawn(move || {
                let pace = Duration::from_secs(3) / good.len() as u32;
                let answer = send_slowly(target.address, &good, pace).expect_err("an answer");
                assert!(serde_json::from_slice::<Value>(&answer[4..]).unwrap() == target.answer);
            });
        }
    });
    targets.into_iter().for_each(Target::assert_unharmed);
}

#[test]
fn three_hundred_idle_connections_keep_nobody_from_being_served() {
    for target in Target::both() {
        let witness = target.witness();
        let mut idle: Vec<Connection> = (0..300).map(|_| target.connect()).collect();
        // Some have been served, some have said half a word, some nothing.
        for (index, connection) in idle.iter_mut().enumerate() {
            match index % 3 {
                0 => target.assert_answers_on(connection).unwrap(),
                1 => connection.send(&[0, 0]),
                _ => {}
            }
        }
        witness.assert_served().unwrap();
        target.assert_answers_on(&mut target.connect()).unwrap();
        // Whoever was idle can go on.
        target.assert_answers_on(&mut idle[0]).unwrap();
        target.assert_answers_on(&mut idle[2]).unwrap();
        drop(idle);
        witness.assert_served().unwrap();
        witness.end();
        target.assert_unharmed();
    }
}

#[test]
fn a_connection_over_the_limit_is_refused_clearly_until_another_one_closes() {
    const LIMIT: usize = 8;
    let data = tempfile::tempdir().unwrap();
    let limited = |binary: &str| {
        let mut command = Command::new(binary);
        command.args(["--listen", "127.0.0.1:0", "--max-connections", &LIMIT.to_string()]);
        command
    };
    let mut viewleader = limited(env!("CARGO_BIN_EXE_viewleader"));
    viewleader.arg("--data-dir").arg(data.path().join("viewleader"));
    let mut server = limited(env!("CARGO_BIN_EXE_server"));
    // Its viewleader is not there: it has no other connections.
    server.args(["--viewleader", "127.0.0.1:1", "--data-dir"]).arg(data.path().join("server"));
    for (command, good) in [
        (&mut viewleader, json!({"cmd": "query_servers"})),
        (&mut server, json!({"cmd": "set", "key": "a", "val": "b"})),
    ] {
        let mut program = Program::start("limited", command);
        let address = program.listening();
        let is_served = |connection: &mut Connection| match connection.call(&good) {
            Reply::Value(reply) if reply.get("error").is_none() => Ok(()),
            other => Err(other),
        };
        let mut open: Vec<Connection> =
            (0..LIMIT).map(|_| Connection::open(address).unwrap()).collect();
        open.iter_mut().for_each(|connection| is_served(connection).unwrap());
        // More of them than are kept in mind.
        for _ in 0..50 {
            let refusal = is_served(&mut Connection::open(address).unwrap()).unwrap_err().value();
            assert_eq!(refusal["reason"], "unavailable");
            let error = refusal["error"].as_str().unwrap();
            assert!(error.contains("8 connections are open"), "{error}");
        }
        open.iter_mut().for_each(|connection| is_served(connection).unwrap());
        drop(open.pop());
        let mut again = wait_until("there is room again", PATIENCE, || {
            let mut connection = Connection::open(address)?;
            is_served(&mut connection).ok()?;
            Some(connection)
        });
        is_served(&mut again).unwrap();
        program.assert_running();
        assert!(!program.stderr().contains("panicked"));
    }
}

// ---- many calls on one connection ----

/// Requests to a server, each with what its answer must have.
fn numbered_requests(count: usize) -> Vec<(Value, Value)> {
    let mut requests = Vec::new();
    let ok = json!({"status": "ok"});
    for number in 0..count.div_ceil(5) {
        let (key, value) = (format!("key {}", number % 17), format!("value {number}"));
        let found = json!({"status": "ok", "value": value});
        let setr = json!({"cmd": "setr", "key": key, "val": value, "direct": true});
        requests.push((setr, ok.clone()));
        requests.push((json!({"cmd": "getr", "key": key}), found.clone()));
        let own = format!("own {}", number % 17);
        requests.push((json!({"cmd": "set", "key": own, "val": value}), ok.clone()));
        requests.push((json!({"cmd": "get", "key": own}), found));
        // A refusal has its place in the order, too.
        requests.push((json!({"cmd": "get", "no key": number}), json!({"reason": "invalid"})));
    }
    requests.truncate(count);
    requests
}

/// Requests to a viewleader, likewise.
fn lock_requests(count: usize) -> Vec<(Value, Value)> {
    let mut requests = Vec::new();
    for number in 0..count.div_ceil(5) {
        let lock = format!("lock {number}");
        for (cmd, who, status) in [
            ("lock_get", "first", "granted"),
            ("lock_get", "second", "retry"),
            ("lock_release", "first", "ok"),
            ("lock_release", "first", "unknown"),
            ("lock_get", "second", "granted"),
        ] {
            let request = json!({"cmd": cmd, "lockid": lock, "requestor": who});
            requests.push((request, json!({ "status": status })));
        }
    }
    requests.truncate(count);
    requests
}

fn assert_answer_has(reply: Reply, number: usize, fields: &Value) {
    let reply = reply.value();
    for (name, value) in fields.as_object().unwrap() {
        assert_eq!(reply[name], *value, "answer {number}: {reply}");
    }
}

fn targets_and_requests() -> [(Target, Vec<(Value, Value)>); 2] {
    [(Target::viewleader(), lock_requests(1000)), (Target::server(), numbered_requests(1000))]
}

#[test]
fn a_thousand_calls_one_after_the_other_on_one_connection_are_answered() {
    for (target, requests) in targets_and_requests() {
        let mut connection = target.connect();
        for (number, (request, fields)) in requests.iter().enumerate() {
            assert_answer_has(connection.call(request), number, fields);
        }
        target.assert_unharmed();
    }
}

#[test]
fn a_thousand_requests_in_one_write_are_answered_in_order() {
    for (target, requests) in targets_and_requests() {
        let stream: Vec<u8> = requests
            .iter()
            .flat_map(|(request, _)| frame(request.to_string().as_bytes()))
            .collect();
        let mut connection = target.connect();
        connection.send(&stream);
        for (number, (_, fields)) in requests.iter().enumerate() {
            assert_answer_has(connection.receive(), number, fields);
        }
        // And once more, where the last one has lost its step.
        let lost = frame_announcing(-1, b"");
        connection.send(&[&stream[..], &lost].concat());
        for _ in &requests {
            connection.receive().value();
        }
        assert_refused(connection.receive(), "negative").unwrap();
        assert_closed(&mut connection).unwrap();
        target.assert_unharmed();
    }
}

/// How much memory `program` takes, in KiB.
fn memory_of(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Sends `requests` to `program` and takes no answer for a while, which must cost it
/// little and nobody else anything. Gives the connection, on which all answers come.
fn ask_and_not_listen(
    program: &Program,
    address: SocketAddrV4,
    requests: &[Value],
    good: &Value,
) -> Connection {
    const MOST: u64 = 64 * 1024;
    const WHILE: Duration = Duration::from_secs(2);
    let frames = requests.iter().flat_map(|request| frame(request.to_string().as_bytes()));
    let witness = Witness::start(address, good.clone(), call(address, good).value());
    let before = memory_of(program);
    let mut connection = Connection::open(address).unwrap();
    connection.send(&frames.collect::<Vec<u8>>());
    let begun = Instant::now();
    while begun.elapsed() < WHILE {
        let more = memory_of(program).saturating_sub(before);
        assert!(more < MOST, "{more} KiB for answers that nobody takes");
        witness.assert_served().unwrap();
    }
    witness.end();
    connection
}

#[test]
fn large_values_that_nobody_takes_cost_a_server_little() {
    let data = tempfile::tempdir().unwrap();
    let mut viewleader = our_viewleader(0);
    let leader = viewleader.listening();
    let mut servers = ["a", "b"].map(|name| our_server(leader, 0, &data.path().join(name)));
    let address = servers.each_mut().map(Program::listening)[0];
    wait_until_at_rest(leader, 2);
    // One that is read here, and one for which the other server is asked.
    let key = |here: bool| {
        let keys = (0..).map(|number| format!("key {number}"));
        keys.into_iter().find(|key| (group_of(key, leader).1 == address) == here).unwrap()
    };
    let get = [true, false].map(|here| json!({"cmd": "getr", "key": key(here)}));
    let value = "v".repeat(MAX_VALUE);
    for get in &get {
        let set = json!({"cmd": "setr", "key": get["key"], "val": value, "direct": true});
        assert_eq!(call(address, &set).value()["status"], "ok");
        assert_eq!(call(address, get).value()["status"], "ok");
    }
    let [here, there] = get;
    let behind = [vec![there.clone()], vec![here; 199]].concat();
    let good = json!({"cmd": "getr", "key": "small"});
    for requests in [behind, vec![there; 200]] {
        let mut connection = ask_and_not_listen(&servers[0], address, &requests, &good);
        for _ in requests {
            assert!(connection.receive().value()["value"] == *value, "another value came back");
        }
    }
    servers.iter_mut().for_each(Program::assert_running);
}

#[test]
fn pieces_of_files_that_nobody_takes_cost_a_chunkserver_little() {
    let system = System::start(1, &[]);
    let (mut client, name) = (system.client(), files::name("f"));
    let create = MasterRequest::Create { name: name.clone(), chunk_bytes: None, copies: Some(1) };
    let _: Status = client.ask(&create, false).unwrap();
    client.write_piece(&name, 0, 0, &files::bytes(MAX_PIECE_BYTES)).unwrap();
    let locate = json!({"cmd": "locate", "name": "f", "index": 0});
    let located = call(system.at(), &locate).value();
    let (chunk, version) = (&located["chunks"][0]["chunk"], &located["chunks"][0]["version"]);
    let ask = |cmd| json!({"cmd": cmd, "chunk": chunk, "version": version});
    let mut read = ask("read");
    (read["offset"], read["length"]) = (json!(0), json!(MAX_PIECE_BYTES));
    let server = &system.servers[0];
    let program = server.program.as_ref().unwrap();
    ask_and_not_listen(program, local(server.port), &vec![read; 200], &ask("length"));
}
