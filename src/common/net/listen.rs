//! Listening: which port, how many connections, and how it ends.

use super::connection::{self, Service};
use super::threads;
use crate::wire::address::PortRange;
use crate::wire::{HostPort, Refusal, append_frame};
use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::net::{
    Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, ToSocketAddrs,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How many connections a program serves at once, unless told otherwise.
pub const MAX_CONNECTIONS: usize = 10_000;

/// How long the accept loop pauses when the system refuses it a connection (no
/// file descriptors left, for one).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long open connections get to finish what they are at when we stop.
const DRAIN: Duration = Duration::from_secs(2);

/// A refused connection is kept open until this many more are refused: closing
/// it at once could take the refusal away before it is read.
const REFUSED_KEPT: usize = 32;

/// Why a program can't listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The host is no address of this machine, or no address at all.
    #[error(
        "can't listen on {0}: no such address here ({1}); --listen takes an IPv4 address of this machine"
    )]
    NoSuchAddress(String, io::Error),
    /// Somebody listens there already.
    #[error(
        "can't listen on {0}: the port is taken; choose another with --listen IP:PORT (port 0: any free one)"
    )]
    Taken(SocketAddrV4),
    /// The whole range is taken.
    #[error("can't listen on {0}: all of ports {1} are taken; choose one with --listen IP:PORT")]
    AllTaken(Ipv4Addr, PortRange),
    /// The system says no.
    #[error("can't listen on {0}: {1}")]
    Io(SocketAddrV4, io::Error),
}

/// Listens at `at`: on its port, or on the first free one of `range`.
///
/// # Errors
/// A [`ListenError`] that says what to do.
pub fn bind(at: &HostPort, range: PortRange) -> Result<TcpListener, ListenError> {
    let no_such = |error| ListenError::NoSuchAddress(at.to_string(), error);
    let addresses = (at.host.as_str(), 0).to_socket_addrs().map_err(no_such)?;
    let ip = addresses.filter_map(|address| match address {
        SocketAddr::V4(v4) => Some(*v4.ip()),
        SocketAddr::V6(_) => None,
    });
    let ip = ip.into_iter().next();
    let ip = ip.ok_or_else(|| no_such(io::Error::other("it has no IPv4 address")))?;
    let try_port = |port| {
        let address = SocketAddrV4::new(ip, port);
        match TcpListener::bind(address) {
            Ok(listener) => Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Err(no_such(error)),
            Err(error) => Err(ListenError::Io(address, error)),
        }
    };
    if let Some(port) = at.port {
        return try_port(port)?.ok_or(ListenError::Taken(SocketAddrV4::new(ip, port)));
    }
    for port in range.ports() {
        if let Some(listener) = try_port(port)? {
            return Ok(listener);
        }
    }
    Err(ListenError::AllTaken(ip, range))
}

/// The open connections of one listener.
#[derive(Debug, Default)]
pub struct Connections {
    open: Mutex<HashMap<u64, Arc<TcpStream>>>,
    closed: Condvar,
    stopping: AtomicBool,
}

impl Connections {
    /// Whether no more requests are to be taken.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn add(&self, id: u64, stream: &Arc<TcpStream>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(id, Arc::clone(stream));
    }

    fn remove(&self, id: u64) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        self.closed.notify_all();
    }

    fn count(&self) -> usize {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Takes no more requests; waits a moment for those under way.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in open.values() {
            // An error means that it is closed already.
            let _ = stream.shutdown(Shutdown::Read);
        }
        let _ = self.closed.wait_timeout_while(open, DRAIN, |open| !open.is_empty());
    }
}

/// Removes a connection from the list however its thread ends.
struct Listed {
    connections: Arc<Connections>,
    id: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.connections.remove(self.id);
    }
}

/// Accepts connections for `service` on a thread of its own, at most `limit` at
/// once, each on its own thread.
///
/// # Errors
/// When the system has no room for the thread.
pub fn serve<S: Service>(
    listener: TcpListener,
    limit: usize,
    service: Arc<S>,
) -> io::Result<Arc<Connections>> {
    let connections = Arc::new(Connections::default());
    let shared = Arc::clone(&connections);
    threads::start("accept", move || accept(&listener, limit, &service, &shared))?;
    Ok(connections)
}

fn accept<S: Service>(
    listener: &TcpListener,
    limit: usize,
    service: &Arc<S>,
    connections: &Arc<Connections>,
) {
    let mut refused = VecDeque::new();
    for id in 0.. {
        let (stream, from) = match listener.accept() {
            Ok((stream, SocketAddr::V4(from))) => (Arc::new(stream), *from.ip()),
            Ok((_, SocketAddr::V6(_))) => continue,
            Err(error) => {
                tracing::warn!("can't accept a connection: {error}");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        if connections.is_stopping() {
            return;
        }
        if connections.count() >= limit {
            refuse(&stream, limit);
            refused.push_back(stream);
            if refused.len() > REFUSED_KEPT {
                refused.pop_front();
            }
            continue;
        }
        connections.add(id, &stream);
        let listed = Listed { connections: Arc::clone(connections), id };
        let service = Arc::clone(service);
        let started = threads::start(format!("from {from}"), move || {
            connection::serve(&stream, from, &service, &listed.connections);
        });
        if let Err(error) = started {
            tracing::warn!("no thread for a connection from {from}: {error}");
        }
    }
}

fn refuse(stream: &TcpStream, limit: usize) {
    tracing::warn!("{limit} connections are open: refusing one more");
    let refusal = Refusal::unavailable(format!(
        "{limit} connections are open, as many as are allowed here: close some, or try again later"
    ));
    let mut frame = Vec::new();
    if append_frame(&mut frame, &refusal).is_ok() {
        // It fits in the socket's buffer, so it does not block; whoever has
        // gone already misses it.
        let _ = (&*stream).write_all(&frame);
        let _ = stream.shutdown(Shutdown::Write);
    }
}
