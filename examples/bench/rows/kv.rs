//! Reads and writes of the key-value store.

use super::super::load::Load;
use super::super::ours::{self, Cluster, Kv};
use super::super::plot::{self, Curve};
use super::super::programs::Daemon;
use super::super::{bare, etcd, redis};
use super::{Effort, Figure, Goal, compare, measure};
use std::io;
use std::path::Path;

/// How many keys there are.
pub(super) const KEYS: u64 = 10_000;

/// More operations than one turn has time for.
pub(super) const MANY: u64 = 100_000_000;

fn lease() -> String {
    ours::LONG_LEASE.to_string()
}

/// `get` and `getr` at one server against `GET` of Redis, one call at a time and
/// pipelined.
pub(crate) fn reads_of_one(effort: &Effort) -> io::Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let cluster = Cluster::start(folder.path(), 1, 1, &["--lease", &lease()])?;
    cluster.fill(KEYS)?;
    let redis = redis::start(folder.path(), None)?;
    let gets = redis::Requests::new(redis::Ask::Get, KEYS);
    redis::Redis::connect(redis.address, &gets)?.fill()?;
    let (own, other) = (cluster.processes(), [redis.id()]);
    let mut figures = Vec::new();
    let rows = [(1, 1, 0.9), (50, 1, 1.4), (200, 1, 1.0), (50, 16, 1.0)];
    for ask in [ours::Ask::Getr, ours::Ask::Get] {
        let requests = cluster.requests(ask, KEYS)?;
        for (clients, depth, to_reach) in rows {
            let load = Load { depth, ..Load::of(clients, MANY, effort.turn) };
            let word = if matches!(ask, ours::Ask::Get) { "get" } else { "getr" };
            let pipelined = if depth > 1 { ", 16 pipelined" } else { "" };
            figures.extend(compare(
                format!("{word}, {}{pipelined}", plural(clients)),
                "Redis GET",
                to_reach,
                effort,
                || measure(load, &own, |_| Kv::connect(&requests)),
                || measure(load, &other, |_| redis::Redis::connect(redis.address, &gets)),
            )?);
        }
    }
    Ok(figures)
}

/// How much of what a thread for each connection can do at all is left to `getr`.
pub(crate) fn shape(effort: &Effort) -> io::Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let cluster = Cluster::start(folder.path(), 1, 1, &["--lease", &lease()])?;
    cluster.fill(KEYS)?;
    let bare = bare::start()?;
    let requests = cluster.requests(ours::Ask::Getr, KEYS)?;
    let to_bare = requests.to(bare.address);
    let (own, other) = (cluster.processes(), [bare.id()]);
    let mut figures = Vec::new();
    for clients in [1, 50, 200] {
        let load = Load::of(clients, MANY, effort.turn);
        figures.extend(compare(
            format!("shape: getr, {}", plural(clients)),
            "a thread for each connection that only reads and writes",
            0.8,
            effort,
            || measure(load, &own, |_| Kv::connect(&requests)),
            || measure(load, &other, |_| Kv::connect(&to_bare)),
        )?);
    }
    Ok(figures)
}

/// How many clients, in words.
pub(super) fn plural(clients: usize) -> String {
    if clients == 1 { "1 client".to_owned() } else { format!("{clients} clients") }
}

/// Linearizable reads and durable writes with three replicas against etcd.
pub(crate) fn against_etcd(effort: &Effort) -> io::Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let cluster = Cluster::start(folder.path(), 1, 3, &["--lease", &lease()])?;
    cluster.fill(KEYS)?;
    let members = if effort.alone { Vec::new() } else { etcd::start(folder.path(), 3)? };
    if let Some(first) = members.first() {
        let mut filler = etcd::Grpc::connect(first.address)?;
        (0..KEYS).try_for_each(|number| filler.put(&super::key(number), &super::value()))?;
    }
    let own = cluster.processes();
    let other: Vec<u32> = members.iter().map(Daemon::id).collect();
    let mut figures = Vec::new();
    let rows = [
        ("getr", "etcd linearizable range", 1, 8.0),
        ("getr", "etcd linearizable range", 50, 8.0),
        ("getr", "etcd linearizable range", 200, 8.0),
        ("setr", "etcd put", 1, 1.5),
        ("setr", "etcd put", 50, 4.0),
        ("setr", "etcd put", 200, 4.0),
    ];
    for (word, against, clients, to_reach) in rows {
        let load = Load::of(clients, MANY, effort.turn);
        let (ask, peer) = match word {
            "getr" => (ours::Ask::Getr, etcd::Ask::Range),
            _ => (ours::Ask::Setr, etcd::Ask::Put),
        };
        let requests = cluster.requests(ask, KEYS)?;
        let name = format!("{word}, 3 servers, {}", plural(clients));
        let figure = compare(
            name.clone(),
            against,
            to_reach,
            effort,
            || measure(load, &own, |_| Kv::connect(&requests)),
            || {
                measure(load, &other, |client| {
                    let member = &members[client % members.len()];
                    etcd::Etcd::connect(member.address, peer.clone(), KEYS)
                })
            },
        )?;
        let sides = figure.as_ref().and_then(|figure| figure.sides);
        figures.extend(figure);
        if let Some((ours, theirs)) = sides.filter(|_| word == "setr") {
            let note = format!("{:.2} ms against {:.2} ms", ours.p99, theirs.p99);
            let (name, ratio) = (format!("p99 of {name}"), vec![ours.p99 / theirs.p99]);
            figures.push(Figure::single(name, against, ratio, "x", Goal::AtMost(0.5), note));
        }
    }
    Ok(figures)
}

/// Writes that wait for two copies in memory and for no disk, against Redis.
pub(crate) fn writes_in_memory(effort: &Effort) -> io::Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let flags = ["--durability", "none", "--lease", &lease()];
    let cluster = Cluster::start(folder.path(), 1, 2, &flags)?;
    let primary = redis::start(folder.path(), None)?;
    let second = tempfile::tempdir()?;
    let sets = redis::Requests::new(redis::Ask::SetAndWait, KEYS);
    let requests = cluster.requests(ours::Ask::Setr, KEYS)?;
    let replica = redis::start(second.path(), Some(primary.address))?;
    replica.wait_until(|| {
        let mut redis = redis::Redis::connect(primary.address, &sets)?;
        redis.ask(&["SET", "ready", "yes"])?;
        let answer = redis.ask(&["WAIT", "1", "100"])?;
        if answer == ":1" { Ok(()) } else { Err(io::Error::other("no replica")) }
    })?;
    let (own, other) = (cluster.processes(), [primary.id(), replica.id()]);
    let mut figures = Vec::new();
    for clients in [1, 50, 200] {
        let load = Load::of(clients, MANY, effort.turn);
        figures.extend(compare(
            format!("setr, 2 servers, no fsync, {}", plural(clients)),
            "Redis SET, WAIT 1",
            1.0,
            effort,
            || measure(load, &own, |_| Kv::connect(&requests)),
            || measure(load, &other, |_| redis::Redis::connect(primary.address, &sets)),
        )?);
    }
    Ok(figures)
}

/// With how many clients the curves are drawn.
const CURVE: [usize; 10] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000];

/// Throughput and latency against the number of clients, as pictures.
pub(crate) fn curves(effort: &Effort) -> io::Result<Vec<Figure>> {
    if !effort.row.is_empty() || effort.alone {
        return Ok(Vec::new());
    }
    let folder = tempfile::tempdir()?;
    let cluster = Cluster::start(folder.path(), 1, 3, &["--lease", &lease()])?;
    cluster.fill(KEYS)?;
    let members = etcd::start(folder.path(), 3)?;
    let mut filler = etcd::Grpc::connect(members[0].address)?;
    (0..KEYS).try_for_each(|number| filler.put(&super::key(number), &super::value()))?;
    let own = cluster.processes();
    let other: Vec<u32> = members.iter().map(Daemon::id).collect();
    let pictures = [
        ("getr", ours::Ask::Getr, etcd::Ask::Range, "linearizable reads, 3 servers"),
        ("setr", ours::Ask::Setr, etcd::Ask::Put, "durable writes, 3 copies"),
    ];
    for (word, ask, peer, title) in pictures {
        let (mut mine, mut theirs) = (Vec::new(), Vec::new());
        let requests = cluster.requests(ask, KEYS)?;
        for clients in CURVE {
            let load = Load::of(clients, MANY, effort.turn / 2);
            let side = measure(load, &own, |_| Kv::connect(&requests))?;
            mine.push((clients, side));
            let side = measure(load, &other, |client| {
                let member = &members[client % members.len()];
                etcd::Etcd::connect(member.address, peer.clone(), KEYS)
            })?;
            theirs.push((clients, side));
        }
        let curves = [
            Curve { name: word.to_owned(), points: mine },
            Curve { name: "etcd".to_owned(), points: theirs },
        ];
        let path = format!("docs/{word}.svg");
        plot::draw(Path::new(&path), title, &curves)
            .map_err(|error| io::Error::other(error.to_string()))?;
        println!("{path} is drawn");
    }
    Ok(Vec::new())
}
