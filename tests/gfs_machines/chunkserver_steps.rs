//! Single steps of a chunkserver, in orders that only a network makes.

use ringleader::gfs::chunkserver::{
    CallId, ChunkServer, Effect, Found, Input, JobId, Op, Settings,
};
use ringleader::gfs::messages::{
    Apply, Beat, BeatReply, ChunkReply, ChunkRequest, Data, MissedReply, Packet,
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

#[test]
fn who_says_all_that_it_holds_says_whether_it_leads_and_leads_nothing_once_it_was_told_to_link() {
    let said = |effects: &[Effect<u32>]| {
        effects.iter().find_map(|effect| match effect {
            Effect::Beat { call, beat } => Some((*call, beat.holds.is_some(), beat.leads)),
            _ => None,
        })
    };
    let mut server = server();
    let call = beat(&mut server, 1);
    beaten(&mut server, 1, call, None);
    lead(&mut server, 1, 1);
    let (call, ..) = said(&step(&mut server, 2, Input::Tick)).expect("a heartbeat was due");
    let reply = |status, inventory| BeatReply {
        status,
        lease_ms: 4000,
        fences: Vec::new(),
        delete: Vec::new(),
        inventory,
    };
    let answer = Some(Ok(reply(Beat::Ok, true)));
    step(&mut server, 2, Input::Beaten { call, answer });
    // The next master may be the one that hears this.
    let (call, says_all, leads) = said(&step(&mut server, 3, Input::Tick)).expect("a heartbeat");
    assert!(says_all && leads);
    let answer = Some(Ok(reply(Beat::Link, true)));
    let effects = step(&mut server, 3, Input::Beaten { call, answer });
    let (_, says_all, leads) = said(&effects).expect("it links at once");
    assert!(says_all && !leads);
    assert!(is_refused(&write(&mut server, 3)));
}

/// The only call to another chunkserver.
fn called(effects: &[Effect<u32>]) -> CallId {
    let call = effects.iter().find_map(|effect| match effect {
        Effect::Call { call, .. } => Some(*call),
        _ => None,
    });
    call.expect("another chunkserver was asked")
}

/// What the disk is to do.
fn ops(effects: &[Effect<u32>]) -> Vec<(JobId, Op)> {
    let ops = effects.iter().filter_map(|effect| match effect {
        Effect::Disk { job, op } => Some((*job, op.clone())),
        _ => None,
    });
    ops.collect()
}

fn answer(
    server: &mut ChunkServer<u32>,
    call: CallId,
    message: ChunkReply,
    data: &[u8],
) -> Vec<Effect<u32>> {
    let packet = Packet { message, data: Data::from(data) };
    step(server, 1, Input::Answer { call, answer: Some(Ok(packet)) })
}

#[test]
fn a_copy_that_is_begun_anew_counts_only_what_was_fetched_for_it() {
    const Y: ChunkId = ChunkId(2000);
    let mut server = server();
    let from = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9002);
    let replicate = ChunkRequest::Replicate { chunk: Y, version: Version(1), from };
    let missed = ChunkReply::Missed(MissedReply {
        version: Version(1),
        serial: Serial(1),
        length: 3,
        regions: vec![(0, 3)],
        marks: Vec::new(),
    });
    let asked = ask(&mut server, 1, replicate.clone());
    let fetches = answer(&mut server, called(&asked), missed.clone(), b"");
    let patches = answer(&mut server, called(&fetches), ChunkReply::Length { length: 3 }, b"abc");
    let patch = ops(&patches)[0].0;
    // The disk is slow, and the master has it made anew.
    let asked = ask(&mut server, 1, replicate);
    answer(&mut server, called(&asked), missed, b"");
    let effects = step(&mut server, 1, Input::Stored { job: patch, trouble: None });
    assert_eq!(ops(&effects), [], "what it was to fetch for the second one is not there yet");
}
