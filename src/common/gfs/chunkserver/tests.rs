//! What a chunkserver does about a disk that refuses, and about requests that can't be.

use super::*;
use crate::gfs::messages::{Apply, MissedReply};
use crate::gfs::{CHUNK_BYTES, MAX_PIECE_BYTES};
use crate::wire::Reason;
use std::net::Ipv4Addr;

const CHUNK: ChunkId = ChunkId(7);
const VERSION: Version = Version(3);
const NOW: Time = Time::from_millis(1000);

const fn address(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

/// A chunkserver that holds what was `found`.
fn server(found: Vec<Found>) -> ChunkServer<u32> {
    let settings = Settings {
        name: "me".into(),
        start: 1,
        address: address(9001),
        rack: "".into(),
        copy_rate: 1_000_000_000,
    };
    ChunkServer::new(NOW, settings, found, &mut Vec::new())
}

/// One that holds a copy of a hundred bytes.
fn server_with_a_copy() -> ChunkServer<u32> {
    let serial = Serial(1);
    server(vec![Found {
        chunk: CHUNK,
        version: VERSION,
        serial,
        length: 100,
        regions: vec![(serial, 0, 100)],
        ..Found::default()
    }])
}

fn step(server: &mut ChunkServer<u32>, input: Input<u32>) -> Vec<Effect<u32>> {
    let mut effects = Vec::new();
    server.step(NOW, input, &mut effects);
    effects
}

fn ask(server: &mut ChunkServer<u32>, request: ChunkRequest, data: &[u8]) -> Vec<Effect<u32>> {
    let request = Packet { message: request, data: Data::from(data) };
    step(server, Input::Request { from: 1, request })
}

/// The job that the disk is given.
fn job(effects: &[Effect<u32>]) -> Option<JobId> {
    effects.iter().find_map(|effect| match effect {
        Effect::Disk { job, .. } => Some(*job),
        _ => None,
    })
}

/// The call of another chunkserver.
fn call(effects: &[Effect<u32>]) -> Option<CallId> {
    effects.iter().find_map(|effect| match effect {
        Effect::Call { call, .. } => Some(*call),
        _ => None,
    })
}

fn refusal(effects: &[Effect<u32>]) -> Option<Reason> {
    effects.iter().find_map(|effect| match effect {
        Effect::Reply { reply: ChunkReply::Refused(refusal), .. } => Some(refusal.reason),
        _ => None,
    })
}

/// What the disk was to do could not be done.
fn refused(server: &mut ChunkServer<u32>, effects: &[Effect<u32>]) -> Vec<Effect<u32>> {
    let job = job(effects).expect("a job");
    step(server, Input::Stored { job, trouble: Some(Trouble::Full) })
}

fn missed(server: &mut ChunkServer<u32>, call: CallId, told: MissedReply) -> Vec<Effect<u32>> {
    let answer = Some(Ok(Packet::bare(ChunkReply::Missed(told))));
    step(server, Input::Answer { call, answer })
}

#[test]
fn a_version_that_the_disk_has_not_is_not_promised_and_the_copy_counts_no_more() {
    let mut server = server_with_a_copy();
    let promise = ChunkRequest::Promise { chunk: CHUNK, version: Version(4) };
    let effects = ask(&mut server, promise, &[]);
    let effects = refused(&mut server, &effects);
    assert_eq!(refusal(&effects), Some(Reason::Unavailable));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Tell { .. })));
    assert_eq!(server.chunks(), []);
}

#[test]
fn a_copy_whose_disk_does_not_take_its_serial_has_not_caught_up() {
    let mut server = server_with_a_copy();
    let establish = ChunkRequest::Establish {
        chunk: CHUNK,
        version: VERSION,
        serial: Serial(2),
        from: address(9002),
    };
    let effects = ask(&mut server, establish, &[]);
    let told =
        MissedReply { version: VERSION, serial: Serial(2), length: 100, ..MissedReply::default() };
    let effects = missed(&mut server, call(&effects).expect("a call"), told);
    let effects = refused(&mut server, &effects);
    assert_eq!(refusal(&effects), Some(Reason::Unavailable));
    assert_eq!(server.chunks(), []);
}

#[test]
fn no_mutation_goes_beyond_the_largest_chunk() {
    for offset in [*CHUNK_BYTES.end(), 1 << 62, u64::MAX - 1] {
        let mut server = server_with_a_copy();
        let apply = |offset| {
            let serial = Serial(2);
            ChunkRequest::Apply(Apply {
                chunk: CHUNK,
                version: VERSION,
                serial,
                offset,
                pushed: None,
                mark: None,
            })
        };
        let effects = ask(&mut server, apply(offset), b"data");
        assert_eq!((refusal(&effects), job(&effects)), (Some(Reason::Invalid), None), "{offset}");
        assert!(job(&ask(&mut server, apply(100), b"data")).is_some());
    }
}

#[test]
fn what_a_copy_is_told_to_fetch_is_in_the_chunk() {
    let most = *CHUNK_BYTES.end();
    let told = |length, regions| MissedReply {
        version: VERSION,
        serial: Serial(2),
        length,
        regions,
        marks: Vec::new(),
    };
    for wrong in [
        told(100, vec![(0, 101)]),
        told(100, vec![(50, 50), (101, 0)]),
        told(100, vec![(u64::MAX, u64::MAX)]),
        told(most + 1, vec![(0, 100)]),
        told(100, vec![(0, 1); MAX_KEPT_REGIONS + 1]),
    ] {
        let mut server = server(Vec::new());
        let replicate =
            ChunkRequest::Replicate { chunk: CHUNK, version: VERSION, from: address(9002) };
        let effects = ask(&mut server, replicate, &[]);
        let effects = missed(&mut server, call(&effects).expect("a call"), wrong.clone());
        assert_eq!(
            (refusal(&effects), call(&effects)),
            (Some(Reason::Unavailable), None),
            "{wrong:?}"
        );
    }
    let mut server = server(Vec::new());
    let replicate = ChunkRequest::Replicate { chunk: CHUNK, version: VERSION, from: address(9002) };
    let effects = ask(&mut server, replicate, &[]);
    let whole = told(2 * MAX_PIECE_BYTES as u64, vec![(0, 2 * MAX_PIECE_BYTES as u64)]);
    let effects = missed(&mut server, call(&effects).expect("a call"), whole);
    assert_eq!((refusal(&effects), call(&effects).is_some()), (None, true));
}

#[test]
fn what_was_told_to_a_copy_before_it_was_begun_anew_is_not_taken_for_what_it_has_missed() {
    let mut server = server(Vec::new());
    let replicate =
        || ChunkRequest::Replicate { chunk: CHUNK, version: VERSION, from: address(9002) };
    let before = call(&ask(&mut server, replicate(), &[])).expect("a call");
    let now = call(&ask(&mut server, replicate(), &[])).expect("a call");
    let told = |regions| MissedReply {
        version: VERSION,
        serial: Serial(2),
        length: 100,
        regions,
        marks: Vec::new(),
    };
    let effects = missed(&mut server, before, told(vec![(50, 50)]));
    assert!(effects.is_empty(), "{effects:?}");
    let effects = missed(&mut server, now, told(vec![(0, 100)]));
    assert!(call(&effects).is_some());
}
