//! Links: calls from server to server, many at a time on one connection.
//!
//! A link has a bounded queue, a thread that writes what is queued (as much as
//! there is in one write) and, while it is connected, a thread that reads the
//! answers, which come in the order of the calls. Every call ends: with its
//! answer, as not sent, or as lost.
//!
//! There are two links to each server, since answers come in order: one for
//! calls that are answered at once (what replicas say to each other, reads), one
//! for writes that are passed on and wait for other servers. If both went over
//! one link, two servers could each hold back the acknowledgement that the other
//! one waits for.

use super::call;
use super::threads;
use crate::kv::messages::{Answer, Op, Request};
use crate::kv::server::{CallError, CallId, PATIENCE};
use crate::wire::{Decoder, append_frame};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many calls can be queued for one link.
const MAX_QUEUED: usize = 16 * 1024;

/// How many links there can be.
const MAX_LINKS: usize = 8 * 1024;

/// How long a call that is answered at once may take.
const PROMPT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a call that waits for other servers may take: somewhat longer than
/// the other server's own patience.
const PATIENT_TIMEOUT: Duration = PATIENCE.saturating_add(Duration::from_secs(2));

/// How long a connection may take to be made.
const LINK_CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// After a connection could not be made, none is tried for this long.
const BACK_OFF: Duration = Duration::from_millis(50);

/// A link that has had nothing to do for this long ends.
const IDLE: Duration = Duration::from_secs(60);

/// How often a reader looks up to see whether an answer is late.
const LOOK_UP: Duration = Duration::from_millis(100);

/// One write takes at most about this many bytes.
const WRITE_BATCH_BYTES: usize = 256 * 1024;

/// What becomes of a call.
pub type Result = std::result::Result<Answer, CallError>;

/// Takes what becomes of calls.
pub type Inbox = Arc<dyn Fn(CallId, Result) + Send + Sync>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Lane {
    Prompt,
    Patient,
}

impl Lane {
    fn of(request: &Request) -> Self {
        match request {
            Request::Op(Op::PrimarySet(_) | Op::PrimaryCommit(_)) => Self::Patient,
            _ => Self::Prompt,
        }
    }

    fn timeout(self) -> Duration {
        match self {
            Self::Prompt => PROMPT_TIMEOUT,
            Self::Patient => PATIENT_TIMEOUT,
        }
    }
}

type Call = (CallId, Request);

/// The queues of the links that there are. A link ends only under this lock and
/// with an empty queue, so nothing is ever queued for one that has ended.
type Queues = Arc<Mutex<HashMap<(SocketAddrV4, Lane), Sender<Call>>>>;

/// All links of one server.
pub struct Links {
    queues: Queues,
    inbox: Inbox,
}

impl Links {
    /// No links yet; what becomes of calls goes to `inbox`.
    pub fn new(inbox: Inbox) -> Self {
        Self { queues: Queues::default(), inbox }
    }

    /// Queues a call to the server at `to`. Never blocks. Returns whether it was
    /// queued; only then the inbox will hear of it.
    pub fn call(&self, to: SocketAddrV4, call: CallId, request: Request) -> bool {
        let lane = Lane::of(&request);
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.get(&(to, lane)) {
            return queue.try_send((call, request)).is_ok();
        }
        if queues.len() >= MAX_LINKS {
            return false;
        }
        let (sender, queue) = bounded(MAX_QUEUED);
        let (inbox, shared) = (Arc::clone(&self.inbox), Arc::clone(&self.queues));
        let writer = Writer { to, lane, queue, queues: shared, inbox, session: None, failed: None };
        match threads::start(format!("to {to}"), move || writer.run()) {
            Ok(_) => {
                let queued = sender.try_send((call, request)).is_ok();
                queues.insert((to, lane), sender);
                queued
            }
            Err(error) => {
                tracing::warn!("no thread for a link to {to}: {error}");
                false
            }
        }
    }
}

/// One connection of a link.
struct Session {
    stream: TcpStream,
    /// The calls that have been written and not answered, and when they were.
    unanswered: Mutex<VecDeque<(CallId, Instant)>>,
    broken: AtomicBool,
}

impl Session {
    /// Ends the connection: what is unanswered is lost.
    fn end(&self, inbox: &Inbox) {
        self.broken.store(true, Ordering::SeqCst);
        let _ = self.stream.shutdown(Shutdown::Both);
        let lost = std::mem::take(&mut *self.unanswered());
        for (call, _) in lost {
            inbox(call, Err(CallError::Lost));
        }
    }

    fn unanswered(&self) -> std::sync::MutexGuard<'_, VecDeque<(CallId, Instant)>> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Writer {
    to: SocketAddrV4,
    lane: Lane,
    queue: Receiver<Call>,
    queues: Queues,
    inbox: Inbox,
    session: Option<Arc<Session>>,
    /// When a connection could not be made last.
    failed: Option<Instant>,
}

impl Writer {
    fn run(mut self) {
        let mut frames = Vec::new();
        let mut calls = Vec::new();
        loop {
            match self.queue.recv_timeout(IDLE) {
                Ok(call) => self.take(call, &mut calls, &mut frames),
                Err(RecvTimeoutError::Timeout) if !self.may_end() => continue,
                Err(_) => break,
            }
            while frames.len() < WRITE_BATCH_BYTES
                && let Ok(call) = self.queue.try_recv()
            {
                self.take(call, &mut calls, &mut frames);
            }
            self.write(&mut calls, &frames);
            frames.clear();
            frames.shrink_to(WRITE_BATCH_BYTES);
        }
        if let Some(session) = self.session {
            session.end(&self.inbox);
        }
    }

    /// Whether there is nothing to do for this link any more: then it is off the
    /// list.
    fn may_end(&self) -> bool {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        self.queue.is_empty() && queues.remove(&(self.to, self.lane)).is_some()
    }

    fn take(&self, (call, request): Call, calls: &mut Vec<CallId>, frames: &mut Vec<u8>) {
        match append_frame(frames, &request) {
            Ok(()) => calls.push(call),
            Err(error) => {
                tracing::error!("a call to {} is too long: {error}", self.to);
                (self.inbox)(call, Err(CallError::NotSent));
            }
        }
    }

    fn write(&mut self, calls: &mut Vec<CallId>, frames: &[u8]) {
        let Some(session) = self.connected() else {
            for call in calls.drain(..) {
                (self.inbox)(call, Err(CallError::NotSent));
            }
            return;
        };
        let now = Instant::now();
        session.unanswered().extend(calls.drain(..).map(|call| (call, now)));
        if (&session.stream).write_all(frames).is_err() || session.broken.load(Ordering::SeqCst) {
            // Whatever has been written of it, it may have arrived.
            session.end(&self.inbox);
        }
    }

    /// The connection, made anew if need be.
    fn connected(&mut self) -> Option<Arc<Session>> {
        if let Some(session) = &self.session {
            if !session.broken.load(Ordering::SeqCst) {
                return Some(Arc::clone(session));
            }
            self.session = None;
        }
        if self.failed.is_some_and(|failed| failed.elapsed() < BACK_OFF) {
            return None;
        }
        match self.connect() {
            Ok(session) => {
                self.failed = None;
                self.session = Some(Arc::clone(&session));
                Some(session)
            }
            Err(error) => {
                tracing::debug!("no link to {}: {error}", self.to);
                self.failed = Some(Instant::now());
                None
            }
        }
    }

    fn connect(&self) -> io::Result<Arc<Session>> {
        let stream = call::connect(self.to, LINK_CONNECT_TIMEOUT)?;
        stream.set_read_timeout(Some(LOOK_UP))?;
        stream.set_write_timeout(Some(PROMPT_TIMEOUT))?;
        let session = Arc::new(Session {
            stream,
            unanswered: Mutex::default(),
            broken: AtomicBool::new(false),
        });
        let (reader, inbox, limit) =
            (Arc::clone(&session), Arc::clone(&self.inbox), self.lane.timeout());
        threads::start(format!("back {}", self.to), move || {
            if let Err(error) = read_answers(&reader, &inbox, limit) {
                tracing::debug!("a link has ended: {error}");
            }
            reader.end(&inbox);
        })?;
        Ok(session)
    }
}

fn read_answers(session: &Session, inbox: &Inbox, limit: Duration) -> io::Result<()> {
    let mut decoder = Decoder::new();
    loop {
        match (&session.stream).read(decoder.space()) {
            Ok(0) => return Ok(()),
            Ok(count) => decoder.filled(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if call::is_late(&error) => {}
            Err(error) => return Err(error),
        }
        while let Some(body) = decoder.next_frame().map_err(io::Error::other)? {
            let Some((call, _)) = session.unanswered().pop_front() else {
                return Err(io::Error::other("an answer that nobody has asked for"));
            };
            // A server that answers in other words has refused the call.
            let answer = serde_json::from_slice(body).map_err(|_| CallError::NotSent);
            inbox(call, answer);
        }
        let oldest = session.unanswered().front().map(|(_, since)| *since);
        if session.broken.load(Ordering::SeqCst) || oldest.is_some_and(|at| at.elapsed() > limit) {
            return Err(io::Error::other("no answer in time"));
        }
    }
}
