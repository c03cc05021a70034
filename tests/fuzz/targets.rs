//! What is fuzzed, and what must hold whatever the bytes are.
//!
//! A target takes bytes and says in a word what became of them: new words tell the
//! search that it has got somewhere new. It panics if a claim does not hold, and
//! nothing that it calls may panic: a panic ends a daemon.

use rand::SeedableRng;
use rand::rngs::StdRng;
use ringleader::consensus::log;
use ringleader::consensus::message::{Hello, Receipt};
use ringleader::consensus::requests::{GroupRequest, Kind, NotLeader};
use ringleader::gfs::messages::{
    BeatReply, Census, ChunkReply, ChunkRequest, LeaseGranted, Listed, Located, MasterRequest,
    Packet, append_packet,
};
use ringleader::kv::disk::{Person, Recovered};
use ringleader::kv::messages::{Answer, Request};
use ringleader::kv::operation::{Command, Event, Next, Operation, Whom};
use ringleader::kv::server::{CallError, Effect as KvEffect, Input as KvInput, Server, Settings};
use ringleader::kv::server::{ViewCall, ViewError, ViewNews};
use ringleader::kv::{disk, server};
use ringleader::machine::{Machine, Time};
use ringleader::store::journal;
use ringleader::store::memory::MemoryStore;
use ringleader::store::{Change, Space, Store};
use ringleader::view;
use ringleader::view::leader::{Effect as ViewEffect, Input as ViewInput, Leader};
use ringleader::view::messages::{
    Health, HeartbeatReply, LockCall, RebalanceStatus, ViewAnswer, ViewRequest,
};
use ringleader::view::state::State;
use ringleader::wire::frame::HEADER_BYTES;
use ringleader::wire::{Decoder, HostPort, Identity, Refusal, append_frame, command_of};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::fmt::Debug;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// How many lines of an input are played at most.
const MAX_LINES: usize = 64;

/// Something that takes bytes from elsewhere.
pub(crate) struct Target {
    /// What its corpus is called.
    pub(crate) name: &'static str,
    /// What becomes of some bytes, in a word.
    pub(crate) run: fn(&[u8]) -> String,
}

/// All of them.
pub(crate) const TARGETS: [Target; 18] = [
    Target { name: "frames", run: frames },
    Target { name: "server_request", run: server_request },
    Target { name: "viewleader_request", run: viewleader_request },
    Target { name: "peer_answer", run: peer_answer },
    Target { name: "viewleader_answer", run: viewleader_answer },
    Target { name: "group_request", run: group_request },
    Target { name: "group_answer", run: group_answer },
    Target { name: "master_request", run: master_request },
    Target { name: "chunk_request", run: chunk_request },
    Target { name: "file_system_answer", run: file_system_answer },
    Target { name: "client", run: client },
    Target { name: "server", run: server },
    Target { name: "viewleader", run: viewleader },
    Target { name: "view_changes", run: view_changes },
    Target { name: "view_log", run: view_log },
    Target { name: "server_disk", run: server_disk },
    Target { name: "journal", run: journal },
    Target { name: "address", run: address },
];

/// Frames come out the same whatever pieces they arrive in. The first byte says in
/// which.
fn frames(bytes: &[u8]) -> String {
    let Some((&piece, stream)) = bytes.split_first() else { return "empty".to_owned() };
    let whole = decoded(stream, stream.len().max(1));
    assert_eq!(whole, decoded(stream, usize::from(piece).max(1)));
    let (bodies, error) = whole;
    let mut again = Vec::new();
    for body in &bodies {
        again.extend(i32::try_from(body.len()).unwrap().to_be_bytes());
        again.extend(body);
    }
    assert!(stream.starts_with(&again));
    format!("{} {error:?}", bodies.len().min(3))
}

fn decoded(stream: &[u8], piece: usize) -> (Vec<Vec<u8>>, Option<String>) {
    let (mut decoder, mut bodies) = (Decoder::new(), Vec::new());
    for mut part in stream.chunks(piece) {
        while !part.is_empty() {
            let space = decoder.space();
            let count = space.len().min(part.len());
            space[..count].copy_from_slice(&part[..count]);
            decoder.filled(count);
            part = &part[count..];
            loop {
                match decoder.next_frame() {
                    Ok(Some(body)) => bodies.push(body.to_vec()),
                    Ok(None) => break,
                    Err(error) => return (bodies, Some(word(&error.to_string()))),
                }
            }
        }
    }
    (bodies, None)
}

/// What is understood is written as something that is understood as the same.
fn server_request(bytes: &[u8]) -> String {
    there_and_back(bytes, Request::decode)
}

fn viewleader_request(bytes: &[u8]) -> String {
    there_and_back(bytes, ViewRequest::decode)
}

fn peer_answer(bytes: &[u8]) -> String {
    there_and_back(bytes, json::<Answer>)
}

fn viewleader_answer(bytes: &[u8]) -> String {
    [
        there_and_back(bytes, json::<HeartbeatReply>),
        there_and_back(bytes, json::<ViewAnswer>),
        there_and_back(bytes, json::<Health>),
        there_and_back(bytes, json::<RebalanceStatus>),
    ]
    .join(" ")
}

/// What viewleaders ask each other, and what masters do.
fn group_request(bytes: &[u8]) -> String {
    let read = |kind: Kind| {
        move |bytes: &[u8]| {
            let request = GroupRequest::decode(kind, &command_of(bytes)?, bytes)?;
            let request = request.map(|request| request.to(kind));
            request.ok_or_else(|| Refusal::invalid("it is not for a group"))
        }
    };
    [Kind::VIEWLEADER, Kind::MASTER].map(|kind| there_and_back(bytes, read(kind))).join(" ")
}

fn group_answer(bytes: &[u8]) -> String {
    [
        there_and_back(bytes, json::<Hello>),
        there_and_back(bytes, json::<Receipt>),
        there_and_back(bytes, json::<NotLeader>),
    ]
    .join(" ")
}

fn master_request(bytes: &[u8]) -> String {
    there_and_back_with_data(bytes, Packet::<MasterRequest>::request)
}

fn chunk_request(bytes: &[u8]) -> String {
    there_and_back_with_data(bytes, Packet::<ChunkRequest>::request)
}

fn file_system_answer(bytes: &[u8]) -> String {
    [
        there_and_back_with_data(bytes, Packet::<ChunkReply>::reply),
        there_and_back_with_data(bytes, Packet::<BeatReply>::reply),
        there_and_back_with_data(bytes, Packet::<Listed>::reply),
        there_and_back_with_data(bytes, Packet::<Located>::reply),
        there_and_back_with_data(bytes, Packet::<LeaseGranted>::reply),
        there_and_back_with_data(bytes, Packet::<Census>::reply),
    ]
    .join(" ")
}

fn there_and_back_with_data<M: Serialize + PartialEq + Debug>(
    bytes: &[u8],
    read: impl Fn(&[u8]) -> Result<Packet<M>, Refusal>,
) -> String {
    match read(bytes) {
        Ok(packet) => {
            let mut frame = Vec::new();
            let written = append_packet(&mut frame, &packet.message, &packet.data);
            written.expect("it fits in a frame");
            assert_eq!(read(&frame[HEADER_BYTES..]).expect("what we write is understood"), packet);
            word(&format!("{packet:?}"))
        }
        Err(error) => word(&format!("{error:?}")),
    }
}

fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(bytes)
}

fn there_and_back<T: Serialize + PartialEq + Debug, E: Debug>(
    bytes: &[u8],
    read: impl Fn(&[u8]) -> Result<T, E>,
) -> String {
    match read(bytes) {
        Ok(value) => {
            let written = serde_json::to_vec(&value).unwrap();
            assert_eq!(read(&written).expect("what we write is understood"), value);
            word(&format!("{value:?}"))
        }
        Err(error) => word(&format!("{error:?}")),
    }
}

/// A client's command, and what comes back, line by line: it ends, and says how.
fn client(bytes: &[u8]) -> String {
    let mut lines = bytes.split(|&byte| byte == b'\n').take(MAX_LINES);
    let from = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 38000);
    let lock = LockCall::new("l".to_owned(), Identity::text("me"));
    let command = match lines.next().unwrap_or_default() {
        b"setr" => Command::Setr(json(br#"{"key":"k","val":"v","if_version":"7.1"}"#).unwrap()),
        b"setr_original" => Command::Setr(json(br#"{"key":"k","val":"v"}"#).unwrap()),
        b"getr" => Command::Getr(json(br#"{"key":"k"}"#).unwrap()),
        b"delr" => Command::Delr(json(br#"{"key":"k"}"#).unwrap()),
        b"get" => Command::Get("k".into()),
        b"set" => Command::Set("k".into(), "v".into()),
        b"print" => Command::Print(vec!["word".to_owned()]),
        b"query_all_keys" => Command::QueryAllKeys,
        b"lock_get" => Command::LockGet(lock),
        b"lock_release" => Command::LockRelease(lock),
        b"status" => Command::Status,
        b"rebalance_status" => Command::RebalanceStatus,
        b"drain" => Command::Drain(from),
        _ => Command::QueryServers,
    };
    let mut operation = Operation::new(command);
    let mut next = operation.step(Event::Begin);
    let mut steps = 0;
    for line in lines {
        let from = match next {
            Next::Done(conclusion) => return format!("{:?} after {steps}", conclusion.verdict),
            Next::Ask(Whom::At(at), _) => at,
            Next::Ask(..) | Next::Wait(..) => from,
        };
        let silence = |sent, closed| Event::Silence { sent, closed, why: String::new() };
        next = operation.step(match (line, next) {
            (b"interrupt", _) => Event::Interrupted,
            (_, Next::Wait(..)) => Event::Waited,
            (b"silence", _) => silence(false, false),
            (b"closed", _) => silence(true, true),
            (b"late", _) => silence(true, false),
            _ => Event::Answer { from, body: line.to_vec() },
        });
        steps += 1;
    }
    match next {
        Next::Done(conclusion) => format!("{:?} after {steps}", conclusion.verdict),
        next => format!("{} after {steps}", word(&format!("{next:?}"))),
    }
}

/// A server between clients, others of its kind and a viewleader, each line from
/// one of them.
fn server(bytes: &[u8]) -> String {
    // Who it is in the views of the corpus.
    let id = Some(Identity::number(8_512_464_685_329_232_281));
    let settings = Settings {
        address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 38000),
        lease: Duration::from_secs(4),
        fetch_rate: server::DEFAULT_FETCH_RATE,
        synced: true,
        drawn: 7,
        batch: server::Batch::default(),
    };
    let recovered = Recovered {
        person: Person { id, synced: true, ..Person::default() },
        ..Recovered::default()
    };
    let mut server: Server<usize> = Server::new(settings, recovered, StdRng::seed_from_u64(1));
    let (mut now, mut said) = (Time::default(), Said::default());
    let mut calls = VecDeque::new();
    let mut stored = 0;
    let lines = bytes.split(|&byte| byte == b'\n').take(MAX_LINES);
    for (index, line) in [&b"tick 0"[..], b"stored"].into_iter().chain(lines).enumerate() {
        let (head, rest) = head_of(line);
        let view_error = || ViewError::Refused(Refusal::unavailable("not now"));
        let input = match head {
            b"tick" => {
                now = now + millis(rest);
                Some(KvInput::Tick)
            }
            b"beat" => json(rest).ok().map(|beat| KvInput::FromView(ViewNews::Beat(Ok(beat)))),
            b"view" => json::<ViewAnswer>(rest)
                .ok()
                .map(|answer| KvInput::FromView(ViewNews::View(Ok(answer.view)))),
            b"refused" => Some(KvInput::FromView(ViewNews::Beat(Err(view_error())))),
            b"unseen" => Some(KvInput::FromView(ViewNews::View(Err(ViewError::Lost)))),
            b"reported" => Some(KvInput::FromView(ViewNews::Report(Ok(())))),
            b"answer" => calls
                .pop_front()
                .zip(json(rest).ok())
                .map(|(call, answer)| KvInput::Answered { call, result: Ok(answer) }),
            b"lost" => calls
                .pop_front()
                .map(|call| KvInput::Answered { call, result: Err(CallError::Lost) }),
            b"stored" => Some(KvInput::Stored { batch: stored }),
            b"room" => Some(KvInput::Room(rest != b"0")),
            _ => match Request::decode(line) {
                Ok(request) => Some(KvInput::Request { from: index, request }),
                Err(refusal) => {
                    said.add(&format!("{:?}", refusal.reason));
                    None
                }
            },
        };
        let Some(input) = input else { continue };
        let mut effects = Vec::new();
        server.step(now, input, &mut effects);
        for effect in effects {
            match effect {
                KvEffect::Reply { reply, .. } => said.reply(&reply),
                KvEffect::Call { call, request, .. } => {
                    calls.push_back(call);
                    append_frame(&mut Vec::new(), &request).expect("it fits in a frame");
                    said.add(&format!("{request:?}"));
                }
                KvEffect::Store { batch, .. } => stored = batch,
                KvEffect::CallView(ViewCall::Report(_)) => said.add("report"),
                KvEffect::End => said.add("end"),
                _ => {}
            }
        }
    }
    said.words()
}

/// A viewleader between servers and clients, each line from one of them.
fn viewleader(bytes: &[u8]) -> String {
    let mut leader: Leader<usize> = Leader::new(Time::default(), State::default(), 0);
    let (mut now, mut said) = (Time::default(), Said::default());
    let mut workers = VecDeque::new();
    for (index, line) in bytes.split(|&byte| byte == b'\n').take(MAX_LINES).enumerate() {
        let (head, rest) = head_of(line);
        let input = match head {
            b"tick" => {
                now = now + millis(rest);
                Some(ViewInput::Tick)
            }
            b"work" => workers.front().map(|&worker| ViewInput::Work(worker)),
            b"slept" => Some(ViewInput::Slept(millis(rest))),
            _ => match ViewRequest::decode(line) {
                Ok(request) => {
                    let host = Ipv4Addr::new(10, 0, 0, u8::try_from(index).unwrap());
                    Some(ViewInput::Request { from: index, host, request })
                }
                Err(refusal) => {
                    said.add(&format!("{:?}", refusal.reason));
                    None
                }
            },
        };
        let mut effects = Vec::new();
        if let Some(input) = input {
            leader.step(now, input, &mut effects);
        }
        // The log takes what it is given, until there is no more.
        let mut effects = VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            match effect {
                ViewEffect::Append { index, .. } => {
                    let mut more = Vec::new();
                    leader.step(now, ViewInput::Committed { index }, &mut more);
                    effects.extend(more);
                }
                ViewEffect::Confirm { number } => {
                    let mut more = Vec::new();
                    leader.step(now, ViewInput::Confirmed { number }, &mut more);
                    effects.extend(more);
                }
                ViewEffect::Reply { reply, .. } => said.reply(&reply),
                ViewEffect::StartWorker(worker) => workers.push_back(worker),
                ViewEffect::WorkerDone(worker, _) => workers.retain(|other| *other != worker),
                ViewEffect::Note(_) => {}
            }
        }
    }
    let written = serde_json::to_vec(leader.state()).unwrap();
    assert_eq!(json::<State>(&written).expect("our own state"), *leader.state());
    said.words()
}

/// The changes of a viewleader's state, one on a line: whatever they are, they are
/// applied, and the state is read as it is written.
fn view_changes(bytes: &[u8]) -> String {
    let (mut state, mut said) = (State::default(), Said::default());
    for line in bytes.split(|&byte| byte == b'\n').take(MAX_LINES) {
        match json::<view::state::Change>(line) {
            Ok(change) => said.add(&format!("{:?}", state.apply(change))),
            Err(error) => said.add(&word(&error.to_string())),
        }
    }
    let written = serde_json::to_vec(&state).unwrap();
    assert_eq!(json::<State>(&written).expect("our own state"), state);
    said.words()
}

/// The log of a viewleader's group, as its disk has it: on each line `meta` and a
/// name or `log` and an index, and the record.
fn view_log(bytes: &[u8]) -> String {
    let mut store = MemoryStore::default();
    for line in bytes.split(|&byte| byte == b'\n').take(MAX_LINES) {
        let (space, rest) = head_of(line);
        let (key, value) = head_of(rest);
        let index = str::from_utf8(key).ok().and_then(|index| index.parse::<u64>().ok());
        let change = match (space, index) {
            (b"log", Some(index)) => Change::put(Space::Log, index.to_be_bytes(), value),
            // The store takes no empty key.
            _ if key.is_empty() => continue,
            _ => Change::put(Space::Meta, key, value),
        };
        store.commit(&[change]).unwrap();
    }
    match log::recover::<State>(&store) {
        Ok(recovered) => {
            let written = serde_json::to_vec(&recovered.state).unwrap();
            assert_eq!(json::<State>(&written).expect("our own state"), recovered.state);
            format!(
                "read {} {}",
                recovered.index.min(9),
                recovered.state.view().members.len().min(4)
            )
        }
        Err(error) => word(&error.to_string()),
    }
}

/// A server's disk with these records on it: on each line a space, a key and a
/// value, the latter two in hex.
fn server_disk(bytes: &[u8]) -> String {
    let mut store = MemoryStore::default();
    for line in bytes.split(|&byte| byte == b'\n').take(MAX_LINES) {
        let (head, rest) = head_of(line);
        let (key, value) = head_of(rest);
        let (Some(key), Some(value)) = (unhex(key), unhex(value)) else { continue };
        let space = if head == b"entry" { Space::Entries } else { Space::Meta };
        if !key.is_empty() && key.len() < 1000 {
            store.commit(&[Change::put(space, key, value)]).unwrap();
        }
    }
    match disk::recover(&store) {
        Ok(recovered) => format!("read {} {}", recovered.entries.len(), recovered.seats.len()),
        Err(error) => word(&error.to_string()),
    }
}

/// A journal: whatever it holds, its batches end inside of it, and what was found
/// whole is found whole again without the rest.
fn journal(bytes: &[u8]) -> String {
    let look = journal::Look::through(bytes, None);
    assert!(look.end <= bytes.len());
    let whole = journal::Look::through(&bytes[..look.end], None);
    assert_eq!((whole.end, whole.newest), (look.end, look.newest));
    assert_eq!(whole.rest, journal::Rest::Zeros);
    format!("{:?} {}", look.rest, look.newest.is_some())
}

/// What is read as an address is written as one that is read as the same.
fn address(bytes: &[u8]) -> String {
    match String::from_utf8_lossy(bytes).parse::<HostPort>() {
        Ok(address) => {
            assert_eq!(address.to_string().parse(), Ok(address.clone()));
            format!("{}", address.port.is_some())
        }
        Err(error) => word(&format!("{error:?}")),
    }
}

// ---- lines and words ----

/// The first word of a line, and what follows it.
fn head_of(line: &[u8]) -> (&[u8], &[u8]) {
    let end = line.iter().position(|&byte| byte == b' ').unwrap_or(line.len());
    (&line[..end], line.get(end + 1..).unwrap_or_default())
}

/// So many milliseconds, up to an hour.
fn millis(text: &[u8]) -> Duration {
    let number = std::str::from_utf8(text).ok().and_then(|text| text.trim().parse().ok());
    Duration::from_millis(number.unwrap_or(0_u64).min(3_600_000))
}

fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    text.chunks(2).map(|pair| Some(digit(pair[0])? * 16 + digit(*pair.get(1)?)?)).collect()
}

/// What a text says, less what it says it about: its letters up to a limit.
fn word(text: &str) -> String {
    let plain = text.split(['"', '\'', '`']).step_by(2).collect::<String>();
    plain.chars().filter(|letter| letter.is_ascii_alphabetic()).take(120).collect()
}

/// What a machine has said.
#[derive(Default)]
struct Said(std::collections::BTreeSet<String>);

impl Said {
    fn add(&mut self, text: &str) {
        self.0.insert(word(text).chars().take(16).collect());
    }

    fn reply(&mut self, reply: &(impl Serialize + Debug)) {
        append_frame(&mut Vec::new(), reply).expect("it fits in a frame");
        self.add(&format!("{reply:?}"));
    }

    fn words(self) -> String {
        self.0.into_iter().collect::<Vec<_>>().join(" ")
    }
}
