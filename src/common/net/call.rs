//! Calls: connect, ask, wait for the answer; and walks along several addresses.

use crate::consensus::requests::NotLeader;
use crate::wire::address::PortRange;
use crate::wire::{Decoder, HostPort, Reason, Refusal, append_frame};
use rustix::io::Errno;
use rustix::net::SendFlags;
use serde::Serialize;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a connection may take to be made; the original's figure.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How many addresses one walk tries at most.
pub const MAX_ADDRESSES: usize = 256;

/// How long a question that a viewleader answers at once is left with one of several:
/// one that is asleep would keep it, and another one leads within about a second.
const BRIEF: Duration = Duration::from_secs(1);

/// How often whoever waits for an answer looks whether that is in vain.
const GLANCE: Duration = Duration::from_millis(100);

/// While somebody has answered within this time, nobody asks anew who is called what: to
/// ask can take longer than a lease lasts.
const RESOLVE_AFTER: Duration = Duration::from_secs(10);

/// How many times one walk goes where it is sent.
const MAX_HINTS: u32 = 3;

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

/// Sends as much of `bytes` as the other end accepts at once, and returns how much
/// that was.
pub(super) fn send_now(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while sent < bytes.len() {
        match rustix::net::send(stream, &bytes[sent..], SendFlags::DONTWAIT) {
            Ok(count) => sent += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(sent)
}

/// Sends all of `bytes`, waiting for the other end as long as the stream's own limit
/// allows, and returns how many that were.
pub(super) fn send_all(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    stream.write_all(bytes).map(|()| bytes.len())
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
        self.call_unless(request, deadline, || false)
    }

    /// The same, and gives up as soon as it `is_vain` to wait.
    fn call_unless(
        &mut self,
        request: &impl Serialize,
        deadline: Instant,
        is_vain: impl Fn() -> bool,
    ) -> Result<Vec<u8>, CallFailure> {
        let mut frame = Vec::new();
        append_frame(&mut frame, request).map_err(|error| {
            CallFailure::NotSent(io::Error::new(ErrorKind::InvalidInput, error))
        })?;
        self.send(&frame, deadline)?;
        loop {
            match self.receive(deadline.min(Instant::now() + GLANCE)) {
                Err(CallFailure::Lost(error))
                    if is_late(&error) && Instant::now() < deadline && !is_vain() => {}
                received => return received,
            }
        }
    }

    /// Sends a whole frame, waits for the answer to it until `deadline`, and hands that
    /// to `take` where it stands.
    ///
    /// # Errors
    /// A [`CallFailure`]; the connection is then of no more use.
    pub fn exchange<R>(
        &mut self,
        frame: &[u8],
        deadline: Instant,
        take: impl FnOnce(&[u8]) -> R,
    ) -> Result<R, CallFailure> {
        self.send(frame, deadline)?;
        self.receive_with(deadline, take)
    }

    /// Sends whole frames until `deadline`. Each of them has an answer, to be taken
    /// with [`Caller::receive`].
    ///
    /// # Errors
    /// As [`Caller::call`].
    pub fn send(&mut self, frames: &[u8], deadline: Instant) -> Result<(), CallFailure> {
        let left = left_until(deadline).map_err(CallFailure::Lost)?;
        self.stream.set_write_timeout(Some(left)).map_err(CallFailure::NotSent)?;
        self.stream.write_all(frames).map_err(CallFailure::Lost)
    }

    /// Waits for the next answer until `deadline`.
    ///
    /// # Errors
    /// As [`Caller::call`].
    pub fn receive(&mut self, deadline: Instant) -> Result<Vec<u8>, CallFailure> {
        self.receive_with(deadline, <[u8]>::to_vec)
    }

    /// The same, and hands the answer to `take`.
    fn receive_with<R>(
        &mut self,
        deadline: Instant,
        take: impl FnOnce(&[u8]) -> R,
    ) -> Result<R, CallFailure> {
        while !self.decoder.has_frame() {
            let left = left_until(deadline).map_err(CallFailure::Lost)?;
            self.stream.set_read_timeout(Some(left)).map_err(CallFailure::Lost)?;
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
        let lost = |error| CallFailure::Lost(io::Error::other(error));
        match self.decoder.next_frame() {
            Ok(Some(body)) => Ok(take(body)),
            Ok(None) => Err(lost("half an answer".to_owned())),
            Err(error) => Err(lost(error.to_string())),
        }
    }
}

/// How long it is until `deadline`.
fn left_until(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        left if left.is_zero() => Err(ErrorKind::TimedOut.into()),
        left => Ok(left),
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
    /// Some answered, all with an error; this is the first one that says more than
    /// `not leader`, if there is one.
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
    /// The same, and at each but the last a second at most: for what is answered at once.
    Brief(Instant),
}

impl Patience {
    fn deadline(self, is_last: bool) -> Instant {
        let now = Instant::now();
        match self {
            Self::Each(limit) => now + limit,
            Self::Until(end) | Self::Brief(end) if is_last => end,
            Self::Until(end) => now + end.saturating_duration_since(now) / 2,
            Self::Brief(end) => now + BRIEF.min(end.saturating_duration_since(now) / 2),
        }
    }
}

/// Asks one address after the other until one answers without an error, and
/// gives the connection to it with the answer. Whoever does not lead may
/// say who does; that one is asked next. The request must be one that does no harm
/// if it is carried out more than once.
pub fn walk(
    addresses: &[SocketAddrV4],
    request: &impl Serialize,
    patience: Patience,
) -> (Walked, Option<Caller>) {
    walk_on(addresses, request, patience, &Company::default(), false)
}

/// The same for a request that is not to be carried out twice: nobody else is asked
/// once somebody may have carried it out, or says so.
pub fn walk_once(
    addresses: &[SocketAddrV4],
    request: &impl Serialize,
    patience: Patience,
) -> Walked {
    walk_on(addresses, request, patience, &Company::default(), true).0
}

fn walk_on(
    addresses: &[SocketAddrV4],
    request: &impl Serialize,
    patience: Patience,
    company: &Company,
    once: bool,
) -> (Walked, Option<Caller>) {
    let (mut refusals, mut failures) = (Vec::new(), Vec::new());
    let mut ahead: VecDeque<SocketAddrV4> = addresses.iter().copied().collect();
    let mut hinted = 0;
    while let Some(from) = ahead.pop_front() {
        let deadline = patience.deadline(ahead.is_empty());
        let asked = Caller::connect(from, deadline).and_then(|mut caller| {
            Ok((caller.call_unless(request, deadline, company.leaves(from))?, caller))
        });
        match asked {
            Ok((body, caller)) if !is_refusal(&body) => {
                company.answered(from);
                return (Walked::Answer { from, body }, Some(caller));
            }
            Ok((body, _)) => {
                let not_leader = not_leader(&body);
                let doubt = |it: &NotLeader| it.reason == Reason::UnknownOutcome;
                if once && not_leader.as_ref().is_some_and(doubt) {
                    return (Walked::Refused { from, body }, None);
                }
                let leader = not_leader.and_then(|it| it.leader);
                if let Some(leader) = leader.filter(|_| hinted < MAX_HINTS) {
                    hinted += 1;
                    ahead.retain(|address| *address != leader);
                    ahead.push_front(leader);
                }
                refusals.push((from, body));
            }
            Err(failure) if once && failure.was_sent() => {
                return (Walked::Silence(vec![(from, failure)]), None);
            }
            Err(failure) => failures.push((from, failure)),
        }
    }
    // What says most: not one that does not lead, and least of all one in no group.
    let says_little =
        |body: &[u8]| not_leader(body).map_or(0, |it| 1 + u8::from(it.note.is_some()));
    let refused = refusals.into_iter().min_by_key(|(_, body)| says_little(body));
    let refused = refused.map(|(from, body)| Walked::Refused { from, body });
    (refused.unwrap_or(Walked::Silence(failures)), None)
}

/// What the walkers of one server tell each other: who has answered one of them last,
/// and when. A viewleader that is asleep keeps whoever waits there for news; when
/// another one leads by now, and has answered a heartbeat, to wait on is in vain.
#[derive(Clone, Debug, Default)]
pub struct Company(Arc<Mutex<Option<(SocketAddrV4, Instant)>>>);

impl Company {
    fn last(&self) -> Option<(SocketAddrV4, Instant)> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answered(&self, from: SocketAddrV4) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((from, Instant::now()));
    }

    /// Whether somebody else has answered since this was asked for, for one who waits at
    /// `address`.
    fn leaves(&self, address: SocketAddrV4) -> impl Fn() -> bool {
        let began = Instant::now();
        move || self.last().is_some_and(|(other, at)| other != address && at > began)
    }
}

/// Walks along the viewleaders for a server, and stays with the one that
/// answers.
#[derive(Debug)]
pub struct Walker {
    hosts: Vec<HostPort>,
    range: PortRange,
    resolve: fn(&[HostPort], PortRange) -> io::Result<Vec<SocketAddrV4>>,
    /// Where they were when that was asked last.
    resolved: Vec<SocketAddrV4>,
    caller: Option<Caller>,
    company: Company,
}

impl Walker {
    /// A walker along `hosts`, in `company`.
    pub fn new(hosts: Vec<HostPort>, range: PortRange, company: Company) -> Self {
        let (resolve, resolved) = (addresses, Vec::new());
        Self { hosts, range, resolve, resolved, caller: None, company }
    }

    /// Asks until somebody answers without an error, at most `limit` at each
    /// address.
    pub fn ask(&mut self, request: &impl Serialize, limit: Duration) -> Walked {
        let mut asleep = None;
        if let Some(mut caller) = self.caller.take() {
            let from = caller.address;
            let deadline = Instant::now() + limit;
            match caller.call_unless(request, deadline, self.company.leaves(from)) {
                Ok(body) if !is_refusal(&body) => {
                    self.company.answered(from);
                    self.caller = Some(caller);
                    return Walked::Answer { from, body };
                }
                // An original closes after each reply.
                Err(CallFailure::Closed) | Ok(_) => {}
                Err(_) => asleep = Some(from),
            }
        }
        let mut addresses = self.addresses();
        // The others first.
        addresses.sort_by_key(|address| Some(*address) == asleep);
        if let Some((last, _)) = self.company.last() {
            addresses.sort_by_key(|address| *address != last);
        }
        let patience = Patience::Each(limit);
        let (walked, caller) = walk_on(&addresses, request, patience, &self.company, false);
        self.caller = caller;
        walked
    }

    /// Where to ask.
    fn addresses(&mut self) -> Vec<SocketAddrV4> {
        let has_answered = |(_, at): (_, Instant)| at.elapsed() < RESOLVE_AFTER;
        if self.resolved.is_empty() || !self.company.last().is_some_and(has_answered) {
            let found = (self.resolve)(&self.hosts, self.range);
            // Those that were found before will do.
            self.resolved = found.unwrap_or_else(|_| std::mem::take(&mut self.resolved));
        }
        self.resolved.clone()
    }
}

/// What a viewleader says that does not lead, if `body` is that.
pub fn not_leader(body: &[u8]) -> Option<NotLeader> {
    serde_json::from_slice(body).ok()
}

/// What `body` says no with, if it is a refusal of ours.
pub fn refusal(body: &[u8]) -> Option<Refusal> {
    serde_json::from_slice(body).ok()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    /// How long what must happen may take.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn listener() -> (TcpListener, SocketAddrV4) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let Ok(SocketAddr::V4(address)) = listener.local_addr() else { panic!("an address") };
        (listener, address)
    }

    fn walker(addresses: &[SocketAddrV4], company: &Company) -> Walker {
        let host =
            |at: &SocketAddrV4| HostPort { host: at.ip().to_string(), port: Some(at.port()) };
        let hosts = addresses.iter().map(host).collect();
        Walker::new(hosts, PortRange::VIEWLEADER, company.clone())
    }

    #[test]
    fn nobody_waits_for_one_that_is_asleep_while_another_one_answers() {
        // The first one takes connections, as the system does for a process that is
        // stopped, and never answers.
        let ((_asleep, first), (awake, second)) = (listener(), listener());
        thread::spawn(move || {
            while let Ok((mut stream, _)) = awake.accept() {
                let mut frame = Vec::new();
                append_frame(&mut frame, &"an answer").unwrap();
                let _ = stream.write_all(&frame);
                let _ = stream.read(&mut [0; 64]);
            }
        });
        let company = Company::default();
        let (done, outcome) = crossbeam_channel::bounded(1);
        let mut waits = walker(&[first, second], &company);
        thread::spawn(move || {
            let _ = done.send(waits.ask(&"what is new?", Duration::from_secs(3600)));
        });
        let mut beats = walker(&[second], &company);
        let deadline = Instant::now() + PATIENCE;
        let walked = loop {
            assert!(matches!(beats.ask(&"a beat", PATIENCE), Walked::Answer { .. }));
            match outcome.recv_timeout(GLANCE) {
                Ok(walked) => break walked,
                Err(_) => assert!(Instant::now() < deadline, "it waits where nobody answers"),
            }
        };
        assert!(matches!(walked, Walked::Answer { from, .. } if from == second), "{walked:?}");
    }

    #[test]
    fn while_a_connection_is_kept_nobody_asks_who_is_called_what() {
        let (listener, address) = listener();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut frame = Vec::new();
            append_frame(&mut frame, &"an answer").unwrap();
            while stream.read(&mut [0; 64]).is_ok_and(|count| count > 0) {
                stream.write_all(&frame).unwrap();
            }
        });
        let mut walker = walker(&[address], &Company::default());
        for _ in 0..3 {
            let walked = walker.ask(&"a beat", PATIENCE);
            assert!(matches!(walked, Walked::Answer { .. }), "{walked:?}");
            walker.resolve = |_, _| panic!("a resolver can take its time");
        }
        // Nor at once when it is gone: who has answered lately is where he was.
        walker.caller = None;
        assert!(matches!(walker.ask(&"a beat", GLANCE), Walked::Silence(_)));
    }

    /// Answers each connection once with `reply`, as long as the test runs.
    fn stand_in(reply: impl Serialize) -> SocketAddrV4 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!() };
        let mut frame = Vec::new();
        append_frame(&mut frame, &reply).unwrap();
        let work = move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 1024]);
                let _ = stream.write_all(&frame);
            }
        };
        crate::net::threads::start("stand-in", work).unwrap();
        address
    }

    #[test]
    fn what_may_have_been_done_is_not_asked_of_the_next_leader() {
        let patience = Patience::Each(Duration::from_secs(20));
        let leader = stand_in(serde_json::json!({"status": "ok"}));
        let request = serde_json::json!({"cmd": "rename"});
        let undone = stand_in(NotLeader::undone(Some(leader)));
        let walked = walk_once(&[undone], &request, patience);
        assert!(matches!(walked, Walked::Answer { from, .. } if from == leader), "{walked:?}");
        let doubtful = stand_in(NotLeader::in_doubt(Some(leader)));
        let walked = walk_once(&[doubtful, leader], &request, patience);
        assert!(matches!(walked, Walked::Refused { from, .. } if from == doubtful), "{walked:?}");
        let (walked, _) = walk(&[doubtful], &request, patience);
        assert!(matches!(walked, Walked::Answer { from, .. } if from == leader), "{walked:?}");
    }
}
