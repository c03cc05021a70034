//! etcd, and a client for it: gRPC, which is HTTP/2 (RFC 9113) around protocol
//! buffers, one call at a time on a connection.
//!
//! Only what such a client needs is here: it writes header fields as literals, which
//! every HPACK decoder understands (RFC 7541, 6.2.2), and takes an answer that has a
//! message for a good one, since gRPC answers errors with trailers alone.

use super::load::{Client, scatter};
use super::programs::{Daemon, loopbacks};
use super::rows::{key, value};
use byteorder::{BigEndian, ByteOrder};
use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A time to live that outlasts any load, in seconds.
const TTL: u64 = 3600;

/// Starts `count` members of one cluster; every write is synced, as always with etcd.
pub(crate) fn start(folder: &Path, count: usize) -> io::Result<Vec<Daemon>> {
    let (clients, peers) = (loopbacks(count), loopbacks(count));
    let url = |address: &SocketAddrV4| format!("http://{address}");
    let all: Vec<String> =
        peers.iter().enumerate().map(|(index, peer)| format!("m{index}={}", url(peer))).collect();
    let start = |index: usize| {
        let mut command = Command::new("etcd");
        command.args(["--name", &format!("m{index}"), "--log-level", "error"]);
        command.arg("--data-dir").arg(folder.join(format!("m{index}")));
        command.args(["--listen-client-urls", &url(&clients[index])]);
        command.args(["--advertise-client-urls", &url(&clients[index])]);
        command.args(["--listen-peer-urls", &url(&peers[index])]);
        command.args(["--initial-advertise-peer-urls", &url(&peers[index])]);
        command.args(["--initial-cluster", &all.join(","), "--initial-cluster-state", "new"]);
        Daemon::launch("etcd", command, clients[index])
    };
    let daemons = (0..count).map(start).collect::<io::Result<Vec<_>>>()?;
    for daemon in &daemons {
        daemon.wait_until(|| Grpc::connect(daemon.address)?.put("ready", "yes"))?;
    }
    Ok(daemons)
}

/// A connection on which calls are made.
pub(crate) struct Grpc {
    stream: BufReader<TcpStream>,
    authority: String,
    /// The number of the next call's stream.
    next: u32,
    /// What has come since the other end was last told that it may send more.
    taken: usize,
    out: Vec<u8>,
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
/// Of DATA and HEADERS: the last frame of a stream; of SETTINGS and PING: an answer.
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

impl Grpc {
    pub(crate) fn connect(at: SocketAddrV4) -> io::Result<Self> {
        let stream = TcpStream::connect(at)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let (stream, authority) = (BufReader::new(stream), at.to_string());
        let mut grpc = Self { stream, authority, next: 1, taken: 0, out: Vec::new() };
        grpc.out.extend_from_slice(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        grpc.push_frame(SETTINGS, 0, 0, &[]);
        grpc.flush()?;
        Ok(grpc)
    }

    fn push_frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut head = [0; 9];
        BigEndian::write_u24(&mut head, payload.len() as u32);
        (head[3], head[4]) = (kind, flags);
        BigEndian::write_u32(&mut head[5..], stream);
        self.out.extend_from_slice(&head);
        self.out.extend_from_slice(payload);
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.get_mut().write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// Calls `path` with `message` and returns the answer's message.
    pub(crate) fn call(&mut self, path: &str, message: &[u8]) -> io::Result<Vec<u8>> {
        let stream = self.next;
        self.next += 2;
        // :method POST, :scheme http from the static table; the others as literals.
        let mut head = vec![0x83, 0x86];
        literal(&mut head, &[0x04], path);
        literal(&mut head, &[0x01], &self.authority);
        literal(&mut head, &[0x0f, 0x10], "application/grpc");
        literal(&mut head, b"\0\x02te", "trailers");
        self.push_frame(HEADERS, END_HEADERS, stream, &head);
        let mut body = vec![0; 5];
        BigEndian::write_u32(&mut body[1..], message.len() as u32);
        body.extend_from_slice(message);
        self.push_frame(DATA, END_STREAM, stream, &body);
        if self.taken > 16 * 1024 {
            let taken = std::mem::take(&mut self.taken) as u32;
            self.push_frame(WINDOW_UPDATE, 0, 0, &taken.to_be_bytes());
        }
        self.flush()?;
        let mut answer = Vec::new();
        loop {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head)?;
            let mut payload = vec![0; BigEndian::read_u24(&head) as usize];
            self.stream.read_exact(&mut payload)?;
            let (kind, flags) = (head[3], head[4]);
            let at = BigEndian::read_u32(&head[5..]) & 0x7fff_ffff;
            match kind {
                DATA => {
                    self.taken += payload.len();
                    answer.extend_from_slice(&payload);
                }
                SETTINGS | PING if flags & END_STREAM == 0 => {
                    let echo = if kind == PING { payload } else { Vec::new() };
                    self.push_frame(kind, END_STREAM, 0, &echo);
                    self.flush()?;
                }
                RST_STREAM | GOAWAY => return Err(io::Error::other("the call was broken off")),
                _ => {}
            }
            if at == stream && matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0 {
                break;
            }
        }
        if answer.len() < 5 {
            return Err(io::Error::other(format!("{path}: an error")));
        }
        answer.drain(..5);
        Ok(answer)
    }

    /// Puts one key.
    pub(crate) fn put(&mut self, key: &str, value: &str) -> io::Result<()> {
        let mut message = Vec::new();
        field(&mut message, 1, key.as_bytes());
        field(&mut message, 2, value.as_bytes());
        self.call("/etcdserverpb.KV/Put", &message).map(drop)
    }

    /// Reads one key, linearizably.
    fn range(&mut self, key: &str) -> io::Result<Vec<u8>> {
        let mut message = Vec::new();
        field(&mut message, 1, key.as_bytes());
        self.call("/etcdserverpb.KV/Range", &message)
    }

    /// A lease.
    fn grant(&mut self) -> io::Result<u64> {
        let mut message = Vec::new();
        number(&mut message, 1, TTL);
        let answer = self.call("/etcdserverpb.Lease/LeaseGrant", &message)?;
        find(&answer, 2).map(|(lease, _)| lease).ok_or_else(|| io::Error::other("no lease"))
    }
}

fn literal(out: &mut Vec<u8>, name: &[u8], value: &str) {
    out.extend_from_slice(name);
    out.push(value.len() as u8);
    out.extend_from_slice(value.as_bytes());
}

fn varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn number(out: &mut Vec<u8>, tag: u64, number: u64) {
    varint(out, tag << 3);
    varint(out, number);
}

fn field(out: &mut Vec<u8>, tag: u64, bytes: &[u8]) {
    varint(out, tag << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// The number of the field `tag` of a message, or how long its bytes are, and these.
fn find(mut message: &[u8], tag: u64) -> Option<(u64, &[u8])> {
    fn read(message: &mut &[u8]) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let (first, rest) = message.split_first()?;
            *message = rest;
            number |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }
    loop {
        let head = read(&mut message)?;
        let number = read(&mut message)?;
        let bytes = match head & 7 {
            2 => message.split_off(..number as usize)?,
            _ => &[],
        };
        if head >> 3 == tag {
            return Some((number, bytes));
        }
    }
}

/// What a client asks.
#[derive(Clone, Debug)]
pub(crate) enum Ask {
    Put,
    Range,
    /// Gets and gives back a lock of this name.
    Lock(String),
}

/// A client with one connection.
pub(crate) struct Etcd {
    grpc: Grpc,
    ask: Ask,
    keys: u64,
    value: String,
    lease: u64,
}

impl Etcd {
    pub(crate) fn connect(at: SocketAddrV4, ask: Ask, keys: u64) -> io::Result<Self> {
        let mut grpc = Grpc::connect(at)?;
        let lease = if matches!(ask, Ask::Lock(_)) { grpc.grant()? } else { 0 };
        Ok(Self { grpc, ask, keys, value: value(), lease })
    }
}

impl Client for Etcd {
    fn call(&mut self, at: u64, _: usize) -> io::Result<()> {
        let key = key(scatter(at) % self.keys);
        match &self.ask {
            Ask::Put => self.grpc.put(&key, &self.value),
            Ask::Range => {
                let answer = self.grpc.range(&key)?;
                let is_it = answer.windows(self.value.len()).any(|it| it == self.value.as_bytes());
                if is_it { Ok(()) } else { Err(io::Error::other("another value")) }
            }
            Ask::Lock(lock) => {
                let mut message = Vec::new();
                field(&mut message, 1, lock.as_bytes());
                number(&mut message, 2, self.lease);
                let answer = self.grpc.call("/v3lockpb.Lock/Lock", &message)?;
                let (_, held) = find(&answer, 2).ok_or_else(|| io::Error::other("no lock"))?;
                message.clear();
                field(&mut message, 1, held);
                self.grpc.call("/v3lockpb.Lock/Unlock", &message).map(drop)
            }
        }
    }
}
