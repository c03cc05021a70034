//! Calls: connect, ask, wait for the answer; and walks along several addresses.

use crate::wire::address::PortRange;
use crate::wire::{Decoder, HostPort, append_frame};
use serde::Serialize;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// How long a connection may take to be made; the original's figure.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How many addresses one walk tries at most.
pub const MAX_ADDRESSES: usize = 256;

/// Why a call brought no answer.
#[derive(Debug)]
pub enum CallFailure {
    /// Nothing was sent: nobody listens there, or not in time.
    NotSent(io::Error),
    /// It was sent and the connection was closed before an answer.
    Closed,
    /// It was sent, and no answer came: too late, broken, or no frame at all.
    Lost(io::Error),
}

impl CallFailure {
    /// Whether the request may have been carried out.
    pub fn was_sent(&self) -> bool {
        !matches!(self, Self::NotSent(_))
    }
}

impl fmt::Display for CallFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotSent(error) if error.kind() == ErrorKind::TimedOut => {
                f.write_str("no connection in time")
            }
            Self::NotSent(error) => write!(f, "{error}"),
            Self::Closed => f.write_str("closed the connection without an answer"),
            Self::Lost(error) if is_late(error) => f.write_str("no answer in time"),
            Self::Lost(error) => write!(f, "{error}"),
        }
    }
}

/// Whether a time-out of a socket is behind this error.
pub(super) fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Connects to `address` within `limit`.
///
/// # Errors
/// When nobody listens there or the time is up.
pub fn connect(address: SocketAddrV4, limit: Duration) -> io::Result<TcpStream> {
    let limit = limit.min(CONNECT_TIMEOUT);
    if limit.is_zero() {
        return Err(ErrorKind::TimedOut.into());
    }
    let stream = TcpStream::connect_timeout(&SocketAddr::V4(address), limit)?;
    if stream.local_addr()? == stream.peer_addr()? {
        // A free port of the ephemeral range can be given to the caller itself.
        return Err(ErrorKind::ConnectionRefused.into());
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection to one address, for one call after the other.
#[derive(Debug)]
pub struct Caller {
    stream: TcpStream,
    decoder: Decoder,
    /// Where it is connected to.
    pub address: SocketAddrV4,
}

impl Caller {
    /// Connects to `address` until `deadline`.
    ///
    /// # Errors
    /// [`CallFailure::NotSent`].
    pub fn connect(address: SocketAddrV4, deadline: Instant) -> Result<Self, CallFailure> {
        let left = deadline.saturating_duration_since(Instant::now());
        let stream = connect(address, left).map_err(CallFailure::NotSent)?;
        Ok(Self { stream, decoder: Decoder::new(), address })
    }

    /// Sends `request` and waits for its answer until `deadline`.
    ///
    /// # Errors
    /// A [`CallFailure`]; the connection is then of no more use.
    pub fn call(
        &mut self,
        request: &impl Serialize,
        deadline: Instant,
    ) -> Result<Vec<u8>, CallFailure> {
        let mut frame = Vec::new();
        append_frame(&mut frame, request).map_err(|error| {
            CallFailure::NotSent(io::Error::new(ErrorKind::InvalidInput, error))
        })?;
        let left = || match deadline.saturating_duration_since(Instant::now()) {
            left if left.is_zero() => Err(CallFailure::Lost(ErrorKind::TimedOut.into())),
            left => Ok(left),
        };
        self.stream.set_write_timeout(Some(left()?)).map_err(CallFailure::NotSent)?;
        self.stream.write_all(&frame).map_err(CallFailure::Lost)?;
        loop {
            match self.decoder.next_frame() {
                Ok(Some(body)) => return Ok(body.to_vec()),
                Ok(None) => {}
                Err(error) => return Err(CallFailure::Lost(io::Error::other(error))),
            }
            self.stream.set_read_timeout(Some(left()?)).map_err(CallFailure::Lost)?;
            match self.stream.read(self.decoder.space()) {
                Ok(0) if self.decoder.is_between_frames() => return Err(CallFailure::Closed),
                Ok(0) => return Err(CallFailure::Lost(io::Error::other("half an answer"))),
                Ok(count) => self.decoder.filled(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(CallFailure::Closed);
                }
                Err(error) => return Err(CallFailure::Lost(error)),
            }
        }
    }
}

/// Addresses to be tried in turn: hosts in their order, and for a host without a
/// port the ports of `range`.
///
/// # Errors
/// When a host has no IPv4 address; none of them had any.
pub fn addresses(hosts: &[HostPort], range: PortRange) -> io::Result<Vec<SocketAddrV4>> {
    let mut found = Vec::new();
    let mut failure = None;
    for host in hosts {
        let before = found.len();
        match (host.host.as_str(), 0).to_socket_addrs() {
            Ok(resolved) => {
                let v4 = resolved.filter_map(|address| match address {
                    SocketAddr::V4(v4) => Some(*v4.ip()),
                    SocketAddr::V6(_) => None,
                });
                // One name, one host: the first address stands for it.
                for ip in v4.take(1) {
                    match host.port {
                        Some(port) => found.push(SocketAddrV4::new(ip, port)),
                        None => found.extend(range.ports().map(|port| SocketAddrV4::new(ip, port))),
                    }
                }
                if found.len() == before {
                    failure = Some(io::Error::other(format!("{host} has no IPv4 address")));
                }
            }
            Err(error) => failure = Some(io::Error::new(error.kind(), format!("{host}: {error}"))),
        }
    }
    found.truncate(MAX_ADDRESSES);
    match failure {
        Some(failure) if found.is_empty() => Err(failure),
        _ => Ok(found),
    }
}

/// What a walk has brought.
#[derive(Debug)]
pub enum Walked {
    /// An answer without `"error"`.
    Answer {
        /// Whose it is.
        from: SocketAddrV4,
        /// The answer.
        body: Vec<u8>,
    },
    /// Some answered, all with an error; this is the first one.
    Refused {
        /// Whose it is.
        from: SocketAddrV4,
        /// The refusal.
        body: Vec<u8>,
    },
    /// Nobody answered.
    Silence(Vec<(SocketAddrV4, CallFailure)>),
}

/// How long a walk waits at each address.
#[derive(Clone, Copy, Debug)]
pub enum Patience {
    /// This long.
    Each(Duration),
    /// Until then in all: at each address but the last, half of what is left.
    Until(Instant),
}

impl Patience {
    fn deadline(self, is_last: bool) -> Instant {
        let now = Instant::now();
        match self {
            Self::Each(limit) => now + limit,
            Self::Until(end) if is_last => end,
            Self::Until(end) => now + end.saturating_duration_since(now) / 2,
        }
    }
}

/// Asks one address after the other until one answers without an error, and
/// gives the connection to it with the answer. The request must be one that does
/// no harm if it is carried out more than once.
pub fn walk(
    addresses: &[SocketAddrV4],
    request: &impl Serialize,
    patience: Patience,
) -> (Walked, Option<Caller>) {
    let (mut refusal, mut failures) = (None, Vec::new());
    for (index, &from) in addresses.iter().enumerate() {
        let deadline = patience.deadline(index + 1 == addresses.len());
        let asked = Caller::connect(from, deadline)
            .and_then(|mut caller| Ok((caller.call(request, deadline)?, caller)));
        match asked {
            Ok((body, caller)) if !is_refusal(&body) => {
                return (Walked::Answer { from, body }, Some(caller));
            }
            Ok((body, _)) => refusal = refusal.or(Some(Walked::Refused { from, body })),
            Err(failure) => failures.push((from, failure)),
        }
    }
    (refusal.unwrap_or(Walked::Silence(failures)), None)
}

/// Walks along the viewleaders for a server, and stays with the one that
/// answers.
#[derive(Debug)]
pub struct Walker {
    hosts: Vec<HostPort>,
    range: PortRange,
    caller: Option<Caller>,
}

impl Walker {
    /// A walker along `hosts`.
    pub fn new(hosts: Vec<HostPort>, range: PortRange) -> Self {
        Self { hosts, range, caller: None }
    }

    /// Asks until somebody answers without an error, at most `limit` at each
    /// address.
    pub fn ask(&mut self, request: &impl Serialize, limit: Duration) -> Walked {
        if let Some(mut caller) = self.caller.take()
            && let Ok(body) = caller.call(request, Instant::now() + limit)
            && !is_refusal(&body)
        {
            let from = caller.address;
            self.caller = Some(caller);
            return Walked::Answer { from, body };
        }
        // An original closes after each reply: then, too, begin anew.
        let addresses = addresses(&self.hosts, self.range).unwrap_or_default();
        let (walked, caller) = walk(&addresses, request, Patience::Each(limit));
        self.caller = caller;
        walked
    }
}

/// Whether `body` is a reply that says no: an object with an `"error"`.
pub fn is_refusal(body: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Head {
        #[serde(default)]
        error: Option<serde::de::IgnoredAny>,
    }
    serde_json::from_slice::<Head>(body).is_ok_and(|head| head.error.is_some())
}
