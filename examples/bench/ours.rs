//! Our side: a cluster of the release programs, and clients that speak its wire.

use super::load::{Client, scatter};
use super::programs::{Daemon, loopback, loopbacks, our_folder};
use super::rows::{key, value};
use ringleader::kv::messages::{Get, Public, Setr};
use ringleader::kv::ring::Point;
use ringleader::view::View;
use ringleader::view::messages::{LockCall, RebalanceStatus, ViewAnswer};
use ringleader::wire::{Decoder, Identity, append_frame};
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The lease of a server in benchmarks that don't kill, in seconds: a machine whose
/// cores are all busy is not to lose one.
pub(crate) const LONG_LEASE: f64 = 10.0;

/// Viewleaders and servers that run.
pub(crate) struct Cluster {
    folder: PathBuf,
    flags: Vec<String>,
    viewleaders: Vec<Daemon>,
    /// The servers, in the order in which they came.
    pub(crate) servers: Vec<Daemon>,
}

impl Cluster {
    /// Starts `viewleaders` and `servers` with their data in `folder`, and waits until
    /// nothing moves. `flags` are for the servers.
    ///
    /// # Errors
    /// When they don't come to rest.
    pub(crate) fn start(
        folder: &Path,
        viewleaders: usize,
        servers: usize,
        flags: &[&str],
    ) -> io::Result<Self> {
        let addresses = loopbacks(viewleaders);
        let peers = addresses.iter().map(SocketAddrV4::to_string).collect::<Vec<_>>().join(",");
        let start = |(index, address): (usize, &SocketAddrV4)| {
            let mut command = Command::new(our_folder()?.join("viewleader"));
            command.args(["--listen", &address.to_string()]);
            command.arg("--data-dir").arg(folder.join(format!("viewleader{index}")));
            if viewleaders > 1 {
                command.args(["--peers", &peers]);
            }
            Daemon::start("viewleader", command, *address)
        };
        let leaders = addresses.iter().enumerate().map(start).collect::<io::Result<Vec<_>>>()?;
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let (folder, own) = (folder.to_owned(), Vec::new());
        let mut cluster = Self { folder, flags, viewleaders: leaders, servers: own };
        for _ in 0..servers {
            cluster.join()?;
        }
        cluster.wait_until_at_rest()?;
        Ok(cluster)
    }

    /// Starts one server more.
    ///
    /// # Errors
    /// When it does not come to serve.
    pub(crate) fn join(&mut self) -> io::Result<()> {
        let address = loopback();
        let daemon = self.launch(self.servers.len(), address)?;
        self.servers.push(daemon);
        Ok(())
    }

    fn launch(&self, index: usize, address: SocketAddrV4) -> io::Result<Daemon> {
        let mut command = Command::new(our_folder()?.join("server"));
        let at: Vec<String> = self.viewleaders.iter().map(|it| it.address.to_string()).collect();
        command.args(["--listen", &address.to_string(), "--viewleader", &at.join(",")]);
        command.arg("--data-dir").arg(self.folder.join(format!("server{index}")));
        command.args(&self.flags);
        Daemon::start("server", command, address)
    }

    /// Where the viewleaders listen.
    pub(crate) fn viewleaders(&self) -> Vec<SocketAddrV4> {
        self.viewleaders.iter().map(|daemon| daemon.address).collect()
    }

    /// All processes.
    pub(crate) fn processes(&self) -> Vec<u32> {
        self.viewleaders.iter().chain(&self.servers).map(Daemon::id).collect()
    }

    /// Which viewleader leads, as it says itself.
    ///
    /// # Errors
    /// When none does.
    pub(crate) fn leader(&self) -> io::Result<SocketAddrV4> {
        let leads = |at: &SocketAddrV4| {
            let asked = Connection::open(*at).and_then(|mut it| it.ask(&json!({"cmd": "status"})));
            asked.is_ok_and(|answer| answer["error"].is_null())
        };
        let leader = self.viewleaders().into_iter().find(leads);
        leader.ok_or_else(|| io::Error::other("no viewleader leads"))
    }

    /// The view.
    ///
    /// # Errors
    /// When no viewleader leads.
    pub(crate) fn view(&self) -> io::Result<Arc<View>> {
        let answer = Connection::open(self.leader()?)?.ask(&json!({"cmd": "query_view"}))?;
        let answer: ViewAnswer = serde_json::from_value(answer).map_err(io::Error::other)?;
        Ok(answer.view)
    }

    /// How far the rebalancing is.
    ///
    /// # Errors
    /// When no viewleader leads.
    pub(crate) fn rebalancing(&self) -> io::Result<RebalanceStatus> {
        let answer = Connection::open(self.leader()?)?.ask(&json!({"cmd": "rebalance_status"}))?;
        serde_json::from_value(answer).map_err(io::Error::other)
    }

    /// Kills a server and starts it again over its disk. Returns when it was started.
    ///
    /// # Errors
    /// When it does not come to serve.
    pub(crate) fn restart(&mut self, index: usize) -> io::Result<Instant> {
        let address = self.servers[index].address;
        drop(self.servers.remove(index));
        let begun = Instant::now();
        let daemon = self.launch(index, address)?;
        self.servers.insert(index, daemon);
        Ok(begun)
    }

    /// Waits until every server is there and every group is at its target.
    ///
    /// # Errors
    /// When that does not come.
    pub(crate) fn wait_until_at_rest(&self) -> io::Result<()> {
        let Some(first) = self.servers.first() else {
            return self.viewleaders[0].wait_until(|| self.leader());
        };
        first.wait_until(|| {
            let view = self.view()?;
            let is_whole = view.own_members().count() == self.servers.len();
            let all_placed = (0..view.groups.len()).all(|index| view.is_complete(index));
            let is_at_rest = is_whole && !view.groups.is_empty() && all_placed;
            if is_at_rest { Ok(()) } else { Err(io::Error::other("keys are still moving")) }
        })
    }

    /// Writes `keys` keys.
    ///
    /// # Errors
    /// When one can't be written.
    pub(crate) fn fill(&self, keys: u64) -> io::Result<()> {
        let mut client = Kv::connect(&self.requests(Ask::Setr, keys)?)?;
        client.in_order = true;
        const DEPTH: u64 = 256;
        for first in (0..keys).step_by(DEPTH as usize) {
            client.call(first, DEPTH.min(keys - first) as usize)?;
        }
        Ok(())
    }
}

/// One connection with one thread's calls on it.
pub(crate) struct Connection {
    stream: TcpStream,
    decoder: Decoder,
    out: Vec<u8>,
}

impl Connection {
    pub(crate) fn open(at: SocketAddrV4) -> io::Result<Self> {
        let stream = TcpStream::connect(at)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream, decoder: Decoder::new(), out: Vec::new() })
    }

    /// Asks, and takes the answer as JSON.
    pub(crate) fn ask(&mut self, request: &Value) -> io::Result<Value> {
        append_frame(&mut self.out, request).map_err(io::Error::other)?;
        self.flush()?;
        let body = self.reply()?;
        serde_json::from_slice(body).map_err(io::Error::other)
    }

    /// Sends a frame that was made before, and makes sure that it is not refused.
    pub(crate) fn exchange(&mut self, frame: &[u8]) -> io::Result<()> {
        self.stream.write_all(frame)?;
        let body = self.reply()?;
        if !body.starts_with(br#"{"error""#) {
            return Ok(());
        }
        Err(io::Error::other(String::from_utf8_lossy(body).into_owned()))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    fn reply(&mut self) -> io::Result<&[u8]> {
        while !self.decoder.has_frame() {
            match self.stream.read(self.decoder.space())? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.decoder.filled(count),
            }
        }
        let frame = self.decoder.next_frame().map_err(io::Error::other)?;
        frame.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn expect_ok(&mut self) -> io::Result<()> {
        let body = self.reply()?;
        if body.starts_with(br#"{"status":"ok""#) {
            return Ok(());
        }
        Err(io::Error::other(String::from_utf8_lossy(body).into_owned()))
    }
}

/// What a client asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ask {
    Get,
    Getr,
    Setr,
}

/// What is asked about each key, and at which server. It is made before the load begins:
/// what that costs is not to be taken from the processors that the servers need.
pub(crate) struct Requests {
    pub(crate) servers: Vec<SocketAddrV4>,
    /// For each key its primary, by the index of the server, and the frame.
    pub(crate) made: Vec<(usize, Vec<u8>)>,
}

impl Cluster {
    /// `ask` for each of so many keys.
    ///
    /// # Errors
    /// When no viewleader leads, or an arc has no primary.
    pub(crate) fn requests(&self, ask: Ask, keys: u64) -> io::Result<Arc<Requests>> {
        let view = self.view()?;
        let servers: Vec<_> = view.own_members().map(|member| member.address).collect();
        let value = value();
        let make = |number| {
            let key = key(number);
            let primary = view.primary_of(Point::of(&key));
            let at = servers.iter().position(|server| Some(*server) == primary);
            let at = at.ok_or(io::ErrorKind::NotFound)?;
            let key = key.into();
            let request = match ask {
                Ask::Get => Public::Get(Get { key }),
                Ask::Getr => Public::Getr(Get { key }),
                Ask::Setr => Public::Setr(Setr {
                    key,
                    val: value.as_str().into(),
                    direct: true,
                    if_version: None,
                    fence: None,
                }),
            };
            let mut frame = Vec::new();
            append_frame(&mut frame, &request).map_err(io::Error::other)?;
            frame.shrink_to_fit();
            Ok((at, frame))
        };
        let made = (0..keys).map(make).collect::<io::Result<_>>()?;
        Ok(Arc::new(Requests { servers, made }))
    }
}

/// A client of the servers, with a connection to each; a key is asked for at its
/// primary.
pub(crate) struct Kv {
    connections: Vec<Connection>,
    requests: Arc<Requests>,
    in_order: bool,
    /// Where the calls under way have been sent.
    asked: Vec<usize>,
}

impl Kv {
    pub(crate) fn connect(requests: &Arc<Requests>) -> io::Result<Self> {
        let connections = requests.servers.iter().map(|at| Connection::open(*at));
        let connections = connections.collect::<io::Result<_>>()?;
        let (requests, asked) = (Arc::clone(requests), Vec::new());
        Ok(Self { connections, requests, in_order: false, asked })
    }
}

impl Client for Kv {
    fn call(&mut self, number: u64, depth: usize) -> io::Result<()> {
        self.asked.clear();
        let keys = self.requests.made.len() as u64;
        for number in number..number + depth as u64 {
            let number = if self.in_order { number } else { scatter(number) };
            let (at, frame) = &self.requests.made[(number % keys) as usize];
            self.connections[*at].out.extend_from_slice(frame);
            self.asked.push(*at);
        }
        for server in self.connections.iter_mut().filter(|server| !server.out.is_empty()) {
            server.flush()?;
        }
        for at in &self.asked {
            self.connections[*at].expect_ok()?;
        }
        Ok(())
    }
}

/// A client of the leading viewleader that gets and gives back one lock.
pub(crate) struct Locker {
    connection: Connection,
    lock: String,
    name: Identity,
    request: u64,
}

impl Locker {
    pub(crate) fn connect(leader: SocketAddrV4, lock: String, name: &str) -> io::Result<Self> {
        let connection = Connection::open(leader)?;
        Ok(Self { connection, lock, name: Identity::text(name), request: rand::random() })
    }

    fn ask(&mut self, cmd: &str, wait_ms: Option<u64>) -> io::Result<Value> {
        self.request = self.request.wrapping_add(1);
        let call = LockCall {
            request: Some(self.request),
            wait_ms,
            ttl_ms: Some(60_000),
            ..LockCall::new(self.lock.clone(), self.name.clone())
        };
        let mut request = serde_json::to_value(call).map_err(io::Error::other)?;
        request["cmd"] = cmd.into();
        self.connection.ask(&request)
    }
}

impl Client for Locker {
    fn call(&mut self, _: u64, _: usize) -> io::Result<()> {
        loop {
            let answer = self.ask("lock_get", Some(10_000))?;
            match answer["status"].as_str() {
                Some("granted") => break,
                Some("retry") => {}
                _ => return Err(io::Error::other(answer.to_string())),
            }
        }
        let answer = self.ask("lock_release", None)?;
        if answer["status"] == "ok" { Ok(()) } else { Err(io::Error::other(answer.to_string())) }
    }
}
