//! Redis, and a client for it: its wire is lines and counted strings
//! (<https://redis.io/docs/latest/develop/reference/protocol-spec/>).

use super::load::{Client, scatter};
use super::programs::{Daemon, loopback};
use super::rows::{key, value};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::path::Path;
use std::process::Command;

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

/// One connection.
pub(crate) struct Redis {
    stream: BufReader<TcpStream>,
    out: Vec<u8>,
    body: Vec<u8>,
    ask: Ask,
    keys: u64,
    value: String,
}

impl Redis {
    pub(crate) fn connect(at: SocketAddrV4, ask: Ask, keys: u64) -> io::Result<Self> {
        let stream = TcpStream::connect(at)?;
        stream.set_nodelay(true)?;
        let (out, body) = (Vec::new(), Vec::new());
        Ok(Self { stream: BufReader::new(stream), out, body, ask, keys, value: value() })
    }

    /// Writes every key once.
    pub(crate) fn fill(&mut self) -> io::Result<()> {
        for number in 0..self.keys {
            let value = self.value.clone();
            self.ask(&["SET", &key(number), &value])?;
        }
        Ok(())
    }

    /// Sends a command and takes the answer's line.
    pub(crate) fn ask(&mut self, words: &[&str]) -> io::Result<String> {
        self.push(words);
        self.flush()?;
        let (line, _) = self.reply()?;
        Ok(line)
    }

    fn push(&mut self, words: &[&str]) {
        // Writing to memory can't fail.
        let _ = write!(self.out, "*{}{LINE_END}", words.len());
        for word in words {
            let _ = write!(self.out, "${}{LINE_END}{word}{LINE_END}", word.len());
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.get_mut().write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// The line of the next answer, and how long the string behind it is.
    fn reply(&mut self) -> io::Result<(String, usize)> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let line = line.trim_end();
        if line.is_empty() || line.starts_with('-') {
            return Err(io::Error::other(format!("an answer that was not expected: {line:?}")));
        }
        let Some(length) = line.strip_prefix('$') else { return Ok((line.to_owned(), 0)) };
        let length: usize = length.parse().map_err(|_| io::Error::other("no such key"))?;
        self.body.resize(length + LINE_END.len(), 0);
        self.stream.read_exact(&mut self.body)?;
        Ok((String::new(), length))
    }
}

impl Client for Redis {
    fn call(&mut self, number: u64, depth: usize) -> io::Result<()> {
        for number in number..number + depth as u64 {
            let key = key(scatter(number) % self.keys);
            match self.ask {
                Ask::Get => self.push(&["GET", &key]),
                Ask::SetAndWait => {
                    let value = std::mem::take(&mut self.value);
                    self.push(&["SET", &key, &value]);
                    self.push(&["WAIT", "1", "0"]);
                    self.value = value;
                }
            }
        }
        self.flush()?;
        for _ in 0..depth {
            match self.ask {
                Ask::Get => {
                    if self.reply()?.1 != self.value.len() {
                        return Err(io::Error::other("another value"));
                    }
                }
                Ask::SetAndWait => {
                    self.reply()?;
                    let (replicas, _) = self.reply()?;
                    if replicas != ":1" {
                        return Err(io::Error::other(format!("WAIT: {replicas}")));
                    }
                }
            }
        }
        Ok(())
    }
}
