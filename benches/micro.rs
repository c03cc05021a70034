//! The small things that every request passes: frames, the ring, the log, and a step of
//! the machine. `cargo bench`; the comparison with other programs is `make bench`.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a benchmark may panic, and touches disks and clocks"
)]

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use rand::SeedableRng;
use rand::rngs::StdRng;
use ringleader::kv::disk::{self, Record};
use ringleader::kv::messages::{Get, Public, Request, Setr};
use ringleader::kv::ring::Point;
use ringleader::kv::server::{Batch, Effect, Input, Server, Settings, ViewCall, ViewNews};
use ringleader::machine::{Machine, Time};
use ringleader::store::disk::DiskStore;
use ringleader::store::memory::MemoryStore;
use ringleader::store::{Change, Durability, Space, Store};
use ringleader::view::{Revision, View};
use ringleader::wire::{Decoder, Identity, append_frame};
use serde_json::json;
use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

const ADDRESS: &str = "127.0.0.1:38000";

fn value() -> String {
    "0123456789".repeat(10)
}

fn setr(key: &str) -> Request {
    Request::Public(Public::Setr(Setr {
        key: key.into(),
        val: value().as_str().into(),
        direct: true,
        if_version: None,
        fence: None,
    }))
}

fn frames(criterion: &mut Criterion) {
    let mut frame = Vec::new();
    append_frame(&mut frame, &setr("key:0000001")).unwrap();
    criterion.bench_function("frame: write a setr", |bencher| {
        let (request, mut out) = (setr("key:0000001"), Vec::new());
        bencher.iter(|| {
            out.clear();
            append_frame(&mut out, black_box(&request)).unwrap();
        });
    });
    criterion.bench_function("frame: read a setr", |bencher| {
        let mut decoder = Decoder::new();
        bencher.iter(|| {
            decoder.space()[..frame.len()].copy_from_slice(black_box(&frame));
            decoder.filled(frame.len());
            Request::decode(decoder.next_frame().unwrap().unwrap()).unwrap()
        });
    });
}

fn ring(criterion: &mut Criterion) {
    criterion.bench_function("ring: the place of a key", |bencher| {
        bencher.iter(|| Point::of(black_box("key:0000001")));
    });
}

fn log(criterion: &mut Criterion) {
    let batch = |number: u64| {
        let change =
            |at: u64| Change::put(Space::Entries, format!("key:{:07}", number * 16 + at), value());
        (0..16).map(change).collect::<Vec<_>>()
    };
    for durability in [Durability::None, Durability::Always] {
        let folder = tempfile::tempdir().unwrap();
        let mut store = DiskStore::open(folder.path(), durability).unwrap();
        let mut number = 0;
        criterion.bench_function(&format!("log: 16 changes, {durability}"), |bencher| {
            let next = || {
                number += 1;
                batch(number)
            };
            bencher.iter_batched(
                next,
                |batch| store.commit(&batch).unwrap(),
                BatchSize::SmallInput,
            );
        });
    }
}

/// A server that is alone in its cluster and serves all keys, and its next batch.
struct Alone {
    server: Server<u64>,
    now: Time,
    effects: Vec<Effect<u64>>,
}

impl Alone {
    fn new() -> Self {
        let settings = Settings {
            address: ADDRESS.parse().unwrap(),
            lease: Duration::from_secs(3600),
            fetch_rate: u64::MAX,
            synced: true,
            drawn: 7,
            batch: Batch::default(),
        };
        let recovered = disk::recover(&MemoryStore::default()).unwrap();
        let server = Server::new(settings, recovered, StdRng::seed_from_u64(7));
        let mut alone = Self { server, now: Time::default(), effects: Vec::new() };
        for _ in 0..100 {
            alone.now = alone.now + Duration::from_millis(10);
            alone.step(Input::Tick);
        }
        alone.step(Input::Request { from: 0, request: setr("key") });
        let request = Request::Public(Public::Getr(Get { key: "key".into() }));
        assert!(alone.server.answer_now(alone.now, &request).is_some(), "it serves");
        alone
    }

    /// A step, and what follows from it at once.
    fn step(&mut self, input: Input<u64>) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            self.server.step(self.now, input, &mut self.effects);
            for effect in std::mem::take(&mut self.effects) {
                match effect {
                    Effect::Store { batch, records } => {
                        black_box(records.into_iter().map(Record::into_change).collect::<Vec<_>>());
                        inputs.push_back(Input::Stored { batch });
                    }
                    Effect::CallView(ViewCall::Beat(beat)) => {
                        let reply = json!({"status": "ok", "epoch": 1, "lease_ms": 3_600_000, "revision": 2});
                        let reply = serde_json::from_value(reply).unwrap();
                        inputs.push_back(Input::FromView(ViewNews::Beat(Ok(reply))));
                        let view = Arc::new(view_of(&beat.requestor));
                        inputs.push_back(Input::FromView(ViewNews::View(Ok(view))));
                    }
                    // The first one; the others wait for news, and there are none.
                    Effect::CallView(ViewCall::View(query))
                        if query.after.unwrap_or_default() == Revision(0) =>
                    {
                        let empty = View { revision: Revision(1), ..View::default() };
                        inputs.push_back(Input::FromView(ViewNews::View(Ok(Arc::new(empty)))));
                    }
                    _ => {}
                }
            }
        }
    }
}

/// All keys are with `id`.
fn view_of(id: &Identity) -> View {
    let place = Point::of(&id.to_string());
    serde_json::from_value(json!({
        "epoch": 1,
        "revision": 2,
        "members": [{
            "id": id, "address": ADDRESS, "hash": place, "dialect": "ringleader",
            "lease_ms": 3_600_000,
        }],
        "groups": [{
            "start": place, "version": 2, "primary": id, "ready": [id], "established": true,
            "replicas": [{"id": id, "since": 2}],
        }],
    }))
    .unwrap()
}

fn machine(criterion: &mut Criterion) {
    let mut alone = Alone::new();
    let get = Request::Public(Public::Getr(Get { key: "key".into() }));
    criterion.bench_function("machine: a read", |bencher| {
        bencher.iter(|| alone.server.answer_now(alone.now, black_box(&get)).unwrap());
    });
    criterion.bench_function("machine: a write, without its disk", |bencher| {
        bencher.iter(|| alone.step(Input::Request { from: 1, request: setr("key") }));
    });
}

criterion_group!(benches, frames, ring, log, machine);
criterion_main!(benches);
