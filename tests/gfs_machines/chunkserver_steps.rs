//! Single steps of a chunkserver, in orders that only a network makes.

use ringleader::gfs::chunkserver::{CallId, ChunkServer, Effect, Found, Input, Settings};
use ringleader::gfs::messages::{
    Apply, Beat, BeatReply, ChunkReply, ChunkRequest, Data, Packet,
};
use ringleader::gfs::{ChunkId, Serial, Version};
use ringleader::machine::{Machine, Time};
use std::net::{Ipv4Addr, SocketAddrV4};

const X: ChunkId = ChunkId::FIRST;

fn step(server: &mut ChunkServer<u32>, seconds: u64, input: Input<u32>) -> Vec<Effect<u32>> {
    let mut effects = Vec::new();
    server.step(Time::from_millis(seconds * 1000), input, &mut effects);
    effects
}

/// A chunkserver that holds X at v1.
fn server() -> ChunkServer<u32> {
    let settings = Settings {
        name: "a".into(),
        start: 1,
        address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9001),
        rack: "".into(),
        copy_rate: u64::MAX,
    };
    let found = Found { chunk: X, version: Version(1), ..Found::default() };
    ChunkServer::new(Time::default(), settings, vec![found], &mut Vec::new())
}

/// Sends a heartbeat.
fn beat(server: &mut ChunkServer<u32>, seconds: u64) -> CallId {
    let effects = step(server, seconds, Input::Tick);
    let beats = effects.iter().find_map(|effect| match effect {
        Effect::Beat { call, .. } => Some(*call),
        _ => None,
    });
    beats.expect("a heartbeat was due")
}

/// The answer to a heartbeat comes.
fn beaten(server: &mut ChunkServer<u32>, seconds: u64, call: CallId, fence: Option<Version>) {
    let reply = BeatReply {
        status: Beat::Ok,
        lease_ms: 4000,
        fences: fence.map(|below| (X, below)).into_iter().collect(),
        delete: Vec::new(),
        inventory: false,
    };
    step(server, seconds, Input::Beaten { call, answer: Some(Ok(reply)) });
}

fn ask(server: &mut ChunkServer<u32>, seconds: u64, message: ChunkRequest) -> Vec<Effect<u32>> {
    step(server, seconds, Input::Request { from: 1, request: Packet::bare(message) })
}

/// Whether it serves X.
fn serves(server: &mut ChunkServer<u32>, seconds: u64) -> bool {
    let effects = ask(server, seconds, ChunkRequest::Length { chunk: X, version: Version(0) });
    match effects.as_slice() {
        [Effect::Reply { reply: ChunkReply::Length { .. }, .. }] => true,
        [Effect::Reply { reply: ChunkReply::Refused(_), .. }] => false,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_fence_outlives_the_answer_to_a_heartbeat_that_was_sent_before_it() {
    let mut server = server();
    let call = beat(&mut server, 1);
    beaten(&mut server, 1, call, None);
    assert!(serves(&mut server, 1));
    // The master answers, then begins a round, and its fence is here first.
    let call = beat(&mut server, 2);
    ask(&mut server, 2, ChunkRequest::Fence { chunk: X, below: Version(3) });
    beaten(&mut server, 2, call, None);
    assert!(!serves(&mut server, 2), "it has agreed to serve X no more");
    // What it says to a later one is what holds.
    let call = beat(&mut server, 3);
    beaten(&mut server, 3, call, None);
    assert!(serves(&mut server, 3));
}

fn apply(version: u64) -> ChunkRequest {
    let (version, serial) = (Version(version), Serial(1));
    ChunkRequest::Apply(Apply { chunk: X, version, serial, offset: 0, pushed: None, mark: None })
}

#[test]
fn a_primary_lifts_the_fence_of_the_round_that_made_it_and_of_no_later_one() {
    let mut server = server();
    let call = beat(&mut server, 1);
    // The master had not heard by then that this member has agreed to v1.
    beaten(&mut server, 1, call, Some(Version(2)));
    assert!(!serves(&mut server, 1));
    ask(&mut server, 1, apply(1));
    assert!(serves(&mut server, 1), "v1 is in the log, and it is a member");
    // A round for v2 is under way, and what the primary of v1 says comes late.
    let call = beat(&mut server, 2);
    beaten(&mut server, 2, call, Some(Version(3)));
    ask(&mut server, 2, apply(1));
    assert!(!serves(&mut server, 2));
}

/// Makes it primary, though another member has still to establish itself: changes wait.
fn lead(server: &mut ChunkServer<u32>, seconds: u64, version: u64) -> Vec<Effect<u32>> {
    let others = vec![SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9002)];
    let version = Version(version);
    ask(server, seconds, ChunkRequest::Lead { chunk: X, version, others, bytes: 1000 })
}

fn write(server: &mut ChunkServer<u32>, seconds: u64) -> Vec<Effect<u32>> {
    let (version, pushed) = (Version(1), None);
    let message = ChunkRequest::Write { chunk: X, version, offset: 0, pushed };
    let request = Packet { message, data: Data::from(&b"x"[..]) };
    step(server, seconds, Input::Request { from: 7, request })
}

/// Whether the write was refused.
fn is_refused(effects: &[Effect<u32>]) -> bool {
    effects.iter().any(|it| matches!(it, Effect::Reply { to: 7, reply: ChunkReply::Refused(_) }))
}

#[test]
fn what_waited_when_a_lease_was_taken_away_is_not_done_under_a_later_one() {
    for (next, refused) in [(2, false), (3, true)] {
        let mut server = server();
        let call = beat(&mut server, 1);
        beaten(&mut server, 1, call, None);
        lead(&mut server, 1, 1);
        assert!(!is_refused(&write(&mut server, 1)), "it waits");
        for version in (2..=next).map(Version) {
            ask(&mut server, 1, ChunkRequest::Promise { chunk: X, version });
        }
        // After v2 without a primary the chunk may be another file's.
        assert_eq!(is_refused(&lead(&mut server, 1, next)), refused, "led under v{next}");
    }
}

#[test]
fn whose_lease_was_over_leads_nothing_when_it_gets_another_one() {
    let mut server = server();
    let call = beat(&mut server, 1);
    beaten(&mut server, 1, call, None);
    lead(&mut server, 1, 1);
    assert!(!is_refused(&write(&mut server, 1)), "it waits");
    let call = beat(&mut server, 6);
    beaten(&mut server, 6, call, None);
    assert!(is_refused(&write(&mut server, 6)), "the master may have given it up meanwhile");
}
