//! The file system against what the machine can do, against itself, and MooseFS.

use super::super::load::{Client, Load, drive};
use super::super::moosefs::MooseFs;
use super::super::ours::Connection;
use super::super::programs::{Daemon, loopback, our_folder};
use super::{Effort, Figure, Goal, Side, compare, measure};
use ringleader::gfs::FileName;
use ringleader::gfs::messages::{MasterRequest, Status};
use ringleader::net::files::FileClient;
use ringleader::net::transfer::{self, Bar};
use ringleader::wire::{HostPort, append_frame};
use serde_json::json;
use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// How many bytes are written and read in one turn, against what the machine can do.
const BYTES: usize = 256 * 1024 * 1024;

/// How many against MooseFS.
const FILE_BYTES: usize = 1024 * 1024 * 1024;

/// How often they are written at most: all copies stay on the disk until the end.
const MAX_WRITE_ROUNDS: usize = 3;

/// In pieces of this size.
const PIECE: usize = 1024 * 1024;

/// A record that is appended.
const RECORD: [u8; 100] = [b'r'; 100];

/// More operations than one turn has time for.
const MANY: u64 = 100_000_000;

/// How long a file may take.
const FILE_PATIENCE: Duration = Duration::from_secs(600);

/// How long one operation is tried.
const PATIENCE: Duration = Duration::from_secs(30);

/// A master and three chunkservers.
struct System {
    master: Daemon,
    servers: Vec<Daemon>,
}

impl System {
    fn start(folder: &Path) -> io::Result<Self> {
        let at = loopback();
        let mut command = Command::new(our_folder()?.join("master"));
        command.args(["--listen", &at.to_string()]);
        command.arg("--data-dir").arg(folder.join("master"));
        let master = Daemon::start("master", command, at)?;
        let start = |number: usize| {
            let own = loopback();
            let mut command = Command::new(our_folder()?.join("chunkserver"));
            command.args(["127.0.0.1", &own.port().to_string(), "--master", &at.to_string()]);
            command.arg("--data-dir").arg(folder.join(format!("chunks{number}")));
            Daemon::start("chunkserver", command, own)
        };
        let servers = (0..3).map(start).collect::<io::Result<Vec<_>>>()?;
        let system = Self { master, servers };
        system.master.wait_until(|| {
            let census = Connection::open(at)?.ask(&json!({"cmd": "census"}))?;
            if census["servers"] == 3 { Ok(()) } else { Err(io::Error::other("too few are here")) }
        })?;
        Ok(system)
    }

    fn client(&self) -> FileClient {
        let at = self.master.address;
        let master = HostPort { host: at.ip().to_string(), port: Some(at.port()) };
        FileClient::new(vec![master], PATIENCE, rand::random())
    }

    fn processes(&self) -> Vec<u32> {
        self.servers.iter().chain([&self.master]).map(Daemon::id).collect()
    }

    fn create(&self, name: &str) -> io::Result<FileName> {
        let name = file_name(name)?;
        let create = MasterRequest::Create { name: name.clone(), chunk_bytes: None, copies: None };
        let _: Status = self.client().ask(&create, false).map_err(failed)?;
        Ok(name)
    }
}

fn file_name(name: &str) -> io::Result<FileName> {
    FileName::new(name).map_err(io::Error::other)
}

fn failed(failure: impl Debug) -> io::Error {
    io::Error::other(format!("{failure:?}"))
}

fn megabytes_per_second(bytes: usize, begun: Instant) -> f64 {
    bytes as f64 / 1e6 / begun.elapsed().as_secs_f64()
}

/// What the disk takes of three copies at the same time, each synced at its end: the
/// rate of one of them.
fn disk_limit(folder: &Path) -> io::Result<f64> {
    let begun = Instant::now();
    let copy = |number: usize| -> io::Result<()> {
        let path = folder.join(format!("limit{number}"));
        let (mut file, piece) = (File::create(&path)?, piece());
        for _ in 0..BYTES / PIECE {
            file.write_all(&piece)?;
        }
        file.sync_all()?;
        std::fs::remove_file(path)
    };
    thread::scope(|scope| {
        let copies: Vec<_> = (0..3).map(|number| scope.spawn(move || copy(number))).collect();
        copies.into_iter().try_for_each(|it| it.join().map_err(|_| io::Error::other("panic"))?)
    })?;
    Ok(megabytes_per_second(BYTES, begun))
}

/// What one connection on this machine brings.
fn network_limit() -> io::Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let at = listener.local_addr()?;
    thread::scope(|scope| {
        scope.spawn(move || -> io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            let piece = piece();
            (0..BYTES / PIECE).try_for_each(|_| stream.write_all(&piece))
        });
        let (mut stream, mut piece) = (TcpStream::connect(at)?, vec![0; PIECE]);
        let begun = Instant::now();
        for _ in 0..BYTES / PIECE {
            stream.read_exact(&mut piece)?;
        }
        Ok(megabytes_per_second(BYTES, begun))
    })
}

/// Puts whole files into the system, as `gfs put` does: every piece is durable when it
/// is acknowledged.
struct Putter<'a> {
    system: &'a System,
    local: File,
    name: FileName,
}

impl Client for Putter<'_> {
    fn call(&mut self, _: u64, pieces: usize) -> io::Result<()> {
        let (length, bar) = ((pieces * PIECE) as u64, Bar::new(0, false));
        let new = || self.system.client();
        transfer::put(&new, &self.local, length, &self.name, None, None, &bar).map_err(failed)
    }
}

/// Reads whole files, as `gfs cat` does.
struct Reader<'a>(&'a System, FileName);

impl Client for Reader<'_> {
    fn call(&mut self, _: u64, pieces: usize) -> io::Result<()> {
        let (mut length, wanted) = (0, pieces * PIECE);
        let new = || self.0.client();
        let take = |piece: &[u8]| {
            length += piece.len();
            Ok(())
        };
        transfer::read_all(&new, &self.1, wanted as u64, take).map_err(failed)?;
        if length == wanted { Ok(()) } else { Err(io::Error::other("not all of it is there")) }
    }
}

/// One client that does something with all pieces of a file, once.
fn whole(bytes: usize) -> Load {
    let pieces = bytes / PIECE;
    Load { warm_ups: 0, depth: pieces, ..Load::of(1, pieces as u64, FILE_PATIENCE) }
}

/// The same, one piece after the other.
fn pieces_of(bytes: usize) -> Load {
    Load { depth: 1, ..whole(bytes) }
}

fn piece() -> Vec<u8> {
    vec![b'x'; PIECE]
}

/// A file on this machine's disk, to be put into the system.
fn local(folder: &Path, bytes: usize) -> io::Result<File> {
    let path = folder.join("local");
    let (mut file, piece) = (File::create(&path)?, piece());
    (0..bytes / PIECE).try_for_each(|_| file.write_all(&piece))?;
    File::open(path)
}

fn write(system: &System, local: &File, name: &FileName, bytes: usize) -> io::Result<Side> {
    let connect = |_| Ok(Putter { system, local: local.try_clone()?, name: name.clone() });
    measure(whole(bytes), &system.processes(), connect)
}

fn read(system: &System, name: &FileName, bytes: usize) -> io::Result<Side> {
    measure(whole(bytes), &system.processes(), |_| Ok(Reader(system, name.clone())))
}

/// What so many pieces in a second are in MB.
fn megabytes(side: Side) -> f64 {
    side.rate * PIECE as f64 / 1e6
}

/// One client that writes and reads, against the disk and the network.
pub(crate) fn limits(effort: &Effort) -> io::Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let system = System::start(folder.path())?;
    let (mut written, mut got) = (Vec::new(), Vec::new());
    let mut notes = [String::new(), String::new()];
    let local = local(folder.path(), BYTES)?;
    for round in 0..effort.rounds.min(3) {
        let name = file_name(&format!("file{round}"))?;
        let own = megabytes(write(&system, &local, &name, BYTES)?);
        let limit = disk_limit(folder.path())?;
        notes[0] = format!("{own:.0} MB/s, disk {limit:.0} MB/s for each of three copies");
        written.push(own / limit);
        let (own, limit) = (megabytes(read(&system, &name, BYTES)?), network_limit()?);
        notes[1] = format!("{own:.0} MB/s, loopback {limit:.0} MB/s");
        got.push(own / limit);
    }
    let [first, second] = notes;
    let disk = "three synced streams to the disk";
    let loopback = "a stream over loopback";
    Ok(vec![
        Figure::single(
            "file write, 3 copies, 1 client",
            disk,
            written,
            "x",
            Goal::AtLeast(0.7),
            first,
        ),
        Figure::single("file read, 1 client", loopback, got, "x", Goal::AtLeast(0.8), second),
    ])
}

/// One client that appends to a file.
struct Appender(FileClient, FileName);

impl Client for Appender {
    fn call(&mut self, _: u64, _: usize) -> io::Result<()> {
        self.0.append(&self.1, &RECORD).map(drop).map_err(failed)
    }
}

/// Records from sixteen clients against one.
pub(crate) fn appends(effort: &Effort) -> io::Result<Vec<Figure>> {
    let name = "record append, 16 clients on one file";
    if !effort.wants(name) {
        return Ok(Vec::new());
    }
    let folder = tempfile::tempdir()?;
    let system = System::start(folder.path())?;
    let mut ratios = Vec::new();
    let mut note = String::new();
    for round in 0..effort.rounds {
        let rate = |clients: usize| -> io::Result<f64> {
            let file = system.create(&format!("records{round}.{clients}"))?;
            let load = Load::of(clients, MANY, effort.turn);
            let connect = |_| Ok(Appender(system.client(), file.clone()));
            Ok(drive(load, connect, || {})?.rate())
        };
        let (one, many) = (rate(1)?, rate(16)?);
        note = format!("{many:.0}/s against {one:.0}/s of 100 bytes, durable on 3 copies");
        ratios.push(many / one);
    }
    let goal = Goal::AtLeast(0.8);
    Ok(vec![Figure::single(name, "1 client", ratios, "x", goal, note)])
}

/// One client that writes, reads and appends, against MooseFS with as many copies.
pub(crate) fn against_moosefs(effort: &Effort) -> io::Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let system = System::start(folder.path())?;
    let moosefs = if effort.alone { None } else { Some(MooseFs::start(folder.path())?) };
    // Only asked for when the other side takes part.
    let theirs = || moosefs.as_ref().ok_or_else(|| io::Error::other("MooseFS is left out"));
    let other = moosefs.as_ref().map_or(Vec::new(), MooseFs::processes);
    let new_name = |what: &str| format!("{what}-{}", rand::random::<u32>());
    let pieces = pieces_of(FILE_BYTES);
    let local = local(folder.path(), FILE_BYTES)?;
    let mut figures = Vec::new();

    let few = Effort { rounds: effort.rounds.min(MAX_WRITE_ROUNDS), ..effort.clone() };
    let write_theirs = |name: &str| {
        let theirs = theirs()?;
        measure(pieces, &other, |_| theirs.writer(name, piece(), pieces.operations))
    };
    figures.extend(compare(
        "file write of 1 GiB, 3 copies, synced at the end, 1 client",
        "MooseFS",
        1.8,
        &few,
        || write(&system, &local, &file_name(&new_name("written"))?, FILE_BYTES),
        || write_theirs(&new_name("written")),
    )?);

    let name = "file read of 1 GiB, 1 client";
    if effort.wants(name) {
        let file = file_name("read")?;
        write(&system, &local, &file, FILE_BYTES)?;
        if !effort.alone {
            write_theirs("read")?;
        }
        figures.extend(compare(
            name,
            "MooseFS",
            3.0,
            effort,
            || read(&system, &file, FILE_BYTES),
            || {
                let theirs = theirs()?;
                measure(pieces, &other, |_| theirs.reader("read", PIECE))
            },
        )?);
    }

    let name = "append of 100 bytes, durable, 1 client";
    if effort.wants(name) {
        moosefs.iter().try_for_each(MooseFs::sync_each_write)?;
        let load = Load::of(1, MANY, effort.turn);
        figures.extend(compare(
            name,
            "MooseFS, O_APPEND and fsync",
            2.0,
            effort,
            || {
                let file = system.create(&new_name("records"))?;
                let connect = |_| Ok(Appender(system.client(), file.clone()));
                measure(load, &system.processes(), connect)
            },
            || {
                let (theirs, file) = (theirs()?, new_name("records"));
                measure(load, &other, |_| theirs.appender(&file, &RECORD))
            },
        )?);
    }
    Ok(figures)
}

/// Somebody who asks the master: the same thing each time, or for a new file.
struct Asker {
    connection: Connection,
    frame: Vec<u8>,
    creates: Option<usize>,
}

impl Client for Asker {
    fn call(&mut self, number: u64, _: usize) -> io::Result<()> {
        if let Some(client) = self.creates {
            let create = json!({"cmd": "create", "name": format!("new/{client}/{number}")});
            self.frame.clear();
            append_frame(&mut self.frame, &create).map_err(io::Error::other)?;
        }
        self.connection.exchange(&self.frame)
    }
}

/// Operations on metadata.
pub(crate) fn metadata(effort: &Effort) -> io::Result<Vec<Figure>> {
    let folder = tempfile::tempdir()?;
    let system = System::start(folder.path())?;
    let name = system.create("looked/at")?;
    system.client().write(&name, 0, &RECORD).map_err(failed)?;
    let (at, mut look) = (system.master.address, Vec::new());
    let locate = json!({"cmd": "locate", "name": "looked/at", "index": 0});
    append_frame(&mut look, &locate).map_err(io::Error::other)?;
    let mut figures = Vec::new();
    for (what, creates, to_reach) in
        [("lookups", false, 100_000.0), ("durable creates", true, 5_000.0)]
    {
        let name = format!("master: {what}, 50 clients");
        if !effort.wants(&name) {
            continue;
        }
        let mut rates = Vec::new();
        for round in 0..effort.rounds {
            let load = Load::of(50, MANY, effort.turn);
            let connect = |client: usize| {
                let creates = creates.then_some(round * 1000 + client);
                Ok(Asker { connection: Connection::open(at)?, frame: look.clone(), creates })
            };
            rates.push(drive(load, connect, || {})?.rate());
        }
        let paper = "the paper's 202 to 533/s";
        figures.push(Figure::single(name, paper, rates, "/s", Goal::AtLeast(to_reach), ""));
    }
    Ok(figures)
}
