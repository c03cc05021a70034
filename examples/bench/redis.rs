//! Redis, and a client for it: its wire is lines and counted strings
//! (<https://redis.io/docs/latest/develop/reference/protocol-spec/>).

use super::load::{Client, scatter};
use super::programs::{Daemon, loopback};
use super::rows::{VALUE_BYTES, key, value};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Starts a server with nothing on its disk: no snapshots, no log.
pub(crate) fn start(folder: &Path, primary: Option<SocketAddrV4>) -> io::Result<Daemon> {
    let address = loopback();
    let mut command = Command::new("redis-server");
    command.args(["--port", &address.port().to_string(), "--bind", "127.0.0.1"]);
    command.args(["--save", "", "--appendonly", "no", "--maxclients", "20000"]);
    command.args(["--repl-diskless-sync-delay", "0"]);
    command.arg("--dir").arg(folder);
    if let Some(primary) = primary {
        let (host, port) = (primary.ip().to_string(), primary.port().to_string());
        command.args(["--replicaof", &host, &port]);
    }
    Daemon::start("redis-server", command, address)
}

/// What ends a line, and a string.
const LINE_END: &str = "\r\n";

/// What a client asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    /// `GET`
    Get,
    /// `SET`, then `WAIT 1 0`: until one replica has it.
    SetAndWait,
}

/// What is asked about each of so many keys, made before the load begins, as ours is.
pub(crate) struct Requests {
    ask: Ask,
    made: Vec<Vec<u8>>,
}

impl Requests {
    /// `ask` for each of so many keys.
    pub(crate) fn new(ask: Ask, keys: u64) -> Arc<Self> {
        let value = value();
        let make = |number| {
            let (key, mut out) = (key(number), Vec::new());
            match ask {
                Ask::Get => push(&mut out, &["GET", &key]),
                Ask::SetAndWait => {
                    push(&mut out, &["SET", &key, &value]);
                    push(&mut out, &["WAIT", "1", "0"]);
                }
            }
            out
        };
        Arc::new(Self { ask, made: (0..keys).map(make).collect() })
    }
}

/// A command with its arguments.
fn push(out: &mut Vec<u8>, words: &[&str]) {
    // Writing to memory can't fail.
    let _ = write!(out, "*{}{LINE_END}", words.len());
    for word in words {
        let _ = write!(out, "${}{LINE_END}{word}{LINE_END}", word.len());
    }
}

/// One connection.
pub(crate) struct Redis {
    stream: BufReader<TcpStream>,
    out: Vec<u8>,
    line: String,
    body: Vec<u8>,
    requests: Arc<Requests>,
}

impl Redis {
    pub(crate) fn connect(at: SocketAddrV4, requests: &Arc<Requests>) -> io::Result<Self> {
        let stream = TcpStream::connect(at)?;
        stream.set_nodelay(true)?;
        let (out, line, body) = (Vec::new(), String::new(), Vec::new());
        let (stream, requests) = (BufReader::new(stream), Arc::clone(requests));
        Ok(Self { stream, out, line, body, requests })
    }

    /// Writes every key once.
    pub(crate) fn fill(&mut self) -> io::Result<()> {
        let value = value();
        for number in 0..self.requests.made.len() as u64 {
            self.ask(&["SET", &key(number), &value])?;
        }
        Ok(())
    }

    /// Sends a command and takes the answer's line.
    pub(crate) fn ask(&mut self, words: &[&str]) -> io::Result<&str> {
        push(&mut self.out, words);
        self.flush()?;
        self.reply()?;
        Ok(&self.line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.get_mut().write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// Takes the line of the next answer, and the string behind it; returns how long
    /// that is.
    fn reply(&mut self) -> io::Result<usize> {
        self.line.clear();
        self.stream.read_line(&mut self.line)?;
        self.line.truncate(self.line.trim_end().len());
        let line = &self.line;
        if line.is_empty() || line.starts_with('-') {
            return Err(io::Error::other(format!("an answer that was not expected: {line:?}")));
        }
        let Some(length) = line.strip_prefix('$') else { return Ok(0) };
        let length: usize = length.parse().map_err(|_| io::Error::other("no such key"))?;
        self.body.resize(length + LINE_END.len(), 0);
        self.stream.read_exact(&mut self.body)?;
        Ok(length)
    }
}

impl Client for Redis {
    fn call(&mut self, number: u64, depth: usize) -> io::Result<()> {
        let keys = self.requests.made.len() as u64;
        for number in number..number + depth as u64 {
            self.out.extend_from_slice(&self.requests.made[(scatter(number) % keys) as usize]);
        }
        self.flush()?;
        for _ in 0..depth {
            let length = self.reply()?;
            match self.requests.ask {
                Ask::Get if length != VALUE_BYTES => return Err(io::Error::other("another value")),
                Ask::Get => {}
                Ask::SetAndWait => {
                    self.reply()?;
                    if self.line != ":1" {
                        return Err(io::Error::other(format!("WAIT: {}", self.line)));
                    }
                }
            }
        }
        Ok(())
    }
}
