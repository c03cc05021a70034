//! Links: calls from program to program, many at a time on one connection. What is
//! called and answered is a [`Dialect`]: servers speak one, viewleaders another.
//!
//! A link has a bounded queue. Whoever has put calls into it also writes them, as
//! much as there is in one write, unless somebody is writing already: then that one
//! takes them with it. So a call costs no change of threads, and the more there are
//! the fewer writes they cost. What can't be done at once is left to a thread of the
//! link: to connect, and to wait for another server that accepts no more for now.
//! While it is connected a second thread reads the answers, which come in the order
//! of the calls. Every call ends: with its answer, as not sent, or as lost.
//!
//! There can be two links to each address, since answers come in order: one for
//! calls that are answered at once (what replicas say to each other, reads), one
//! for writes that are passed on and wait for other servers. If both went over
//! one link, two servers could each hold back the acknowledgement that the other
//! one waits for.

use super::call;
use super::threads;
use crate::kv::server::{CallError, PATIENCE};
use crate::wire::{Decoder, append_frame};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddrV4, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
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

/// So many writes one does for others who queue calls meanwhile; then the thread of the
/// link takes over, so that nobody is kept from its own work for long.
const MAX_WRITES: usize = 8;

/// What is said over the links of one program.
pub trait Dialect: Send + Sync + 'static {
    /// Tells a call from others to whoever has made it.
    type Call: Copy + Send + 'static;
    /// What is asked.
    type Request: Serialize + Send + 'static;
    /// What is answered.
    type Answer: DeserializeOwned + Send + 'static;

    /// Whether calls wait until those before them are answered, and then go together:
    /// for calls that are answered as soon as they are read. So the more there is to
    /// say, the more goes with one write; a call that finds nothing before it does not
    /// wait.
    const GATHERS: bool;

    /// Which of the links to its address a call takes.
    fn lane(request: &Self::Request) -> Lane;
}

/// Calls that have ended, in the order in which they did, and what came of them.
pub type Ended<D> = Vec<(<D as Dialect>::Call, Result<<D as Dialect>::Answer, CallError>)>;

/// Takes calls that have ended.
pub type Inbox<D> = Arc<dyn Fn(Ended<D>) + Send + Sync>;

/// Which of the links to one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// For calls that are answered at once.
    Prompt,
    /// For calls that wait for others.
    Patient,
}

impl Lane {
    fn timeout(self) -> Duration {
        match self {
            Self::Prompt => PROMPT_TIMEOUT,
            Self::Patient => PATIENT_TIMEOUT,
        }
    }
}

/// The links that there are. A link ends only under this lock and with an empty
/// queue, so nothing is ever queued for one that has ended.
type Known<D> = Arc<Mutex<HashMap<(SocketAddrV4, Lane), Arc<Link<D>>>>>;

/// All links of one program.
pub struct Links<D: Dialect> {
    known: Known<D>,
    inbox: Inbox<D>,
}

impl<D: Dialect> Links<D> {
    /// No links yet; what becomes of calls goes to `inbox`.
    pub fn new(inbox: Inbox<D>) -> Self {
        Self { known: Known::default(), inbox }
    }

    /// Queues a call to the program at `to`. Never blocks. Returns the link, which is to
    /// be flushed; nothing if the call was not queued: then the inbox won't hear of it.
    pub fn queue(
        &self,
        to: SocketAddrV4,
        call: D::Call,
        request: D::Request,
    ) -> Option<Arc<Link<D>>> {
        let lane = D::lane(&request);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let link = match known.get(&(to, lane)) {
            Some(link) => Arc::clone(link),
            None if known.len() >= MAX_LINKS => return None,
            None => {
                let link = Arc::new(Link {
                    to,
                    lane,
                    inbox: Arc::clone(&self.inbox),
                    state: Mutex::new(State::new()),
                    work: Condvar::new(),
                });
                let (own, all) = (Arc::clone(&link), Arc::clone(&self.known));
                if let Err(error) = threads::start(format!("to {to}"), move || own.run(&all)) {
                    tracing::warn!("no thread for a link to {to}: {error}");
                    return None;
                }
                known.insert((to, lane), Arc::clone(&link));
                link
            }
        };
        let mut state = link.state();
        if state.queue.len() >= MAX_QUEUED {
            return None;
        }
        state.queue.push_back((call, request));
        drop(state);
        Some(link)
    }
}

/// One connection of a link.
struct Session<C> {
    stream: TcpStream,
    /// The calls that have been written and not answered, and when they were.
    unanswered: Mutex<VecDeque<(C, Instant)>>,
    broken: AtomicBool,
}

impl<C: Copy> Session<C> {
    /// Ends the connection: what is unanswered is lost.
    fn end<D: Dialect<Call = C>>(&self, inbox: &Inbox<D>) {
        self.broken.store(true, Ordering::SeqCst);
        let _ = self.stream.shutdown(Shutdown::Both);
        let lost = std::mem::take(&mut *self.unanswered());
        if !lost.is_empty() {
            inbox(lost.into_iter().map(|(call, _)| (call, Err(CallError::Lost))).collect());
        }
    }

    fn unanswered(&self) -> MutexGuard<'_, VecDeque<(C, Instant)>> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether calls of this dialect have to wait for answers now.
    fn gathers<D: Dialect<Call = C>>(&self) -> bool {
        D::GATHERS && !self.broken.load(Ordering::SeqCst) && !self.unanswered().is_empty()
    }
}

/// Adds a link to those that are to be flushed, once.
pub fn add<D: Dialect>(links: &mut Vec<Arc<Link<D>>>, link: Arc<Link<D>>) {
    if !links.iter().any(|known| Arc::ptr_eq(known, &link)) {
        links.push(link);
    }
}

/// Calls on their way to one program.
pub struct Link<D: Dialect> {
    to: SocketAddrV4,
    lane: Lane,
    inbox: Inbox<D>,
    state: Mutex<State<D>>,
    /// There is something to do for the link's own thread.
    work: Condvar,
}

struct State<D: Dialect> {
    queue: VecDeque<(D::Call, D::Request)>,
    session: Option<Arc<Session<D::Call>>>,
    /// Frames that were begun to be written, and were not accepted yet.
    rest: Vec<u8>,
    /// Somebody writes, and takes with it what is queued meanwhile.
    is_writing: bool,
    /// The thread of the link is needed: there is no connection, or it accepts no
    /// more for now. It is the one that writes then.
    needs_thread: bool,
    /// When a connection could not be made last.
    failed: Option<Instant>,
    /// When something was written last.
    used: Option<Instant>,
}

impl<D: Dialect> State<D> {
    fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            session: None,
            rest: Vec::new(),
            is_writing: false,
            needs_thread: false,
            failed: None,
            used: None,
        }
    }

    /// The connection, if it holds.
    fn connected(&self) -> Option<Arc<Session<D::Call>>> {
        let session = self.session.as_ref()?;
        (!session.broken.load(Ordering::SeqCst)).then(|| Arc::clone(session))
    }
}

impl<D: Dialect> Link<D> {
    fn state(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is queued, as far as it can be written at once.
    pub fn flush(&self) {
        let state = self.state();
        if state.is_writing || state.queue.is_empty() {
            return;
        }
        match state.connected() {
            Some(session) if session.gathers::<D>() => {}
            Some(session) => drop(self.write(state, &session, MAX_WRITES, call::send_now)),
            None => self.leave_to_thread(state),
        }
    }

    fn leave_to_thread(&self, mut state: MutexGuard<'_, State<D>>) {
        (state.is_writing, state.needs_thread) = (true, true);
        drop(state);
        self.work.notify_one();
    }

    /// Writes what is queued by `send`, which returns how much was accepted. If that
    /// is not all, or takes more than so many writes, the rest is for the link's thread.
    fn write<'a>(
        &'a self,
        mut state: MutexGuard<'a, State<D>>,
        session: &Session<D::Call>,
        writes: usize,
        send: impl Fn(&TcpStream, &[u8]) -> io::Result<usize>,
    ) -> MutexGuard<'a, State<D>> {
        state.is_writing = true;
        let mut frames = std::mem::take(&mut state.rest);
        for _ in 0..writes {
            let mut calls = Vec::new();
            while frames.len() < WRITE_BATCH_BYTES
                && let Some(call) = state.queue.pop_front()
            {
                // Encoded without the lock, so that others can go on queueing.
                drop(state);
                self.append(call, &mut calls, &mut frames);
                state = self.state();
            }
            if frames.is_empty() {
                break;
            }
            drop(state);
            let now = Instant::now();
            session.unanswered().extend(calls.into_iter().map(|call| (call, now)));
            match send(&session.stream, &frames) {
                Ok(count) if count < frames.len() => {
                    frames.drain(..count);
                    state = self.state();
                    state.rest = frames;
                    state.needs_thread = true;
                    self.work.notify_one();
                    return state;
                }
                Ok(_) if !session.broken.load(Ordering::SeqCst) => {}
                // Whatever has been written of it, it may have arrived.
                _ => session.end::<D>(&self.inbox),
            }
            frames.clear();
            frames.shrink_to(WRITE_BATCH_BYTES);
            state = self.state();
            state.used = Some(now);
            if session.broken.load(Ordering::SeqCst) || session.gathers::<D>() {
                break;
            }
        }
        state.is_writing = false;
        // Whoever brings the answers that are waited for writes the rest.
        if !state.queue.is_empty() && !session.gathers::<D>() {
            (state.is_writing, state.needs_thread) = (true, true);
            self.work.notify_one();
        }
        state
    }

    fn append(
        &self,
        (call, request): (D::Call, D::Request),
        calls: &mut Vec<D::Call>,
        frames: &mut Vec<u8>,
    ) {
        match append_frame(frames, &request) {
            Ok(()) => calls.push(call),
            Err(error) => {
                tracing::error!("a call to {} is too long: {error}", self.to);
                (self.inbox)(vec![(call, Err(CallError::NotSent))]);
            }
        }
    }

    /// What the thread of the link does: whatever takes time.
    fn run(self: Arc<Self>, known: &Known<D>) {
        loop {
            let mut state = self.state();
            if !state.needs_thread {
                let waited = self.work.wait_timeout_while(state, IDLE, |it| !it.needs_thread);
                let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                state = guard;
                if timeout.timed_out() && !state.needs_thread {
                    drop(state);
                    if self.may_end(known) {
                        break;
                    }
                    continue;
                }
            }
            state.needs_thread = false;
            match state.connected() {
                Some(session) => drop(self.write(state, &session, usize::MAX, call::send_all)),
                None => {
                    // What was begun on a connection that is gone is lost with it.
                    state.rest.clear();
                    let failed = state.failed;
                    drop(state);
                    self.connect_or_refuse(failed);
                }
            }
        }
        let session = self.state().session.take();
        if let Some(session) = session {
            session.end::<D>(&self.inbox);
        }
    }

    /// Makes the connection and writes what is queued, or ends it as not sent.
    fn connect_or_refuse(self: &Arc<Self>, failed: Option<Instant>) {
        let is_too_soon = failed.is_some_and(|failed| failed.elapsed() < BACK_OFF);
        let connected = if is_too_soon { None } else { Some(self.connect()) };
        let mut state = self.state();
        match connected {
            Some(Ok(session)) => {
                (state.session, state.failed) = (Some(Arc::clone(&session)), None);
                return drop(self.write(state, &session, usize::MAX, call::send_all));
            }
            Some(Err(error)) => {
                tracing::debug!("no link to {}: {error}", self.to);
                state.failed = Some(Instant::now());
            }
            None => {}
        }
        state.is_writing = false;
        let unsent = std::mem::take(&mut state.queue);
        drop(state);
        let unsent: Vec<_> =
            unsent.into_iter().map(|(call, _)| (call, Err(CallError::NotSent))).collect();
        if !unsent.is_empty() {
            (self.inbox)(unsent);
        }
    }

    /// Whether there is nothing to do for this link any more: then it is off the
    /// list.
    fn may_end(&self, known: &Known<D>) -> bool {
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self.state();
        let is_busy = !state.queue.is_empty() || state.is_writing || state.needs_thread;
        let is_in_use = is_busy || state.used.is_some_and(|used| used.elapsed() < IDLE);
        !is_in_use && known.remove(&(self.to, self.lane)).is_some()
    }

    fn connect(self: &Arc<Self>) -> io::Result<Arc<Session<D::Call>>> {
        let stream = call::connect(self.to, LINK_CONNECT_TIMEOUT)?;
        stream.set_read_timeout(Some(LOOK_UP))?;
        stream.set_write_timeout(Some(PROMPT_TIMEOUT))?;
        let session = Arc::new(Session {
            stream,
            unanswered: Mutex::default(),
            broken: AtomicBool::new(false),
        });
        let (reader, link) = (Arc::clone(&session), Arc::clone(self));
        threads::start(format!("back {}", self.to), move || {
            if let Err(error) = link.read_answers(&reader) {
                tracing::debug!("a link has ended: {error}");
            }
            reader.end::<D>(&link.inbox);
            // What has gathered behind it waits for nobody else.
            link.flush();
        })?;
        Ok(session)
    }

    fn read_answers(&self, session: &Session<D::Call>) -> io::Result<()> {
        let (mut decoder, limit) = (Decoder::new(), self.lane.timeout());
        loop {
            match (&session.stream).read(decoder.space()) {
                Ok(0) => return Ok(()),
                Ok(count) => decoder.filled(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if call::is_late(&error) => decoder.rest(),
                Err(error) => return Err(error),
            }
            let mut ended = Vec::new();
            let taken = take_answers::<D>(session, &mut decoder, &mut ended);
            if !ended.is_empty() {
                (self.inbox)(ended);
                if D::GATHERS {
                    self.flush();
                }
            }
            taken?;
            let oldest = session.unanswered().front().map(|(_, since)| *since);
            let is_late = oldest.is_some_and(|since| since.elapsed() > limit);
            if session.broken.load(Ordering::SeqCst) || is_late {
                return Err(io::Error::other("no answer in time"));
            }
        }
    }
}

/// Matches the answers that have come with their calls.
fn take_answers<D: Dialect>(
    session: &Session<D::Call>,
    decoder: &mut Decoder,
    ended: &mut Ended<D>,
) -> io::Result<()> {
    while let Some(body) = decoder.next_frame().map_err(io::Error::other)? {
        let Some((call, _)) = session.unanswered().pop_front() else {
            return Err(io::Error::other("an answer that nobody has asked for"));
        };
        // One that answers in other words has refused the call.
        ended.push((call, serde_json::from_slice(body).map_err(|_| CallError::NotSent)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::unbounded;
    use std::net::{Ipv4Addr, SocketAddr, TcpListener};

    /// How long what must happen may take.
    const WAIT: Duration = Duration::from_secs(20);

    struct Gathering;

    impl Dialect for Gathering {
        type Call = u8;
        type Request = String;
        type Answer = String;

        const GATHERS: bool = true;

        fn lane(_: &String) -> Lane {
            Lane::Prompt
        }
    }

    #[test]
    fn calls_that_gather_behind_one_whose_connection_ends_end_too() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("IPv4") };
        let (sender, ended) = unbounded();
        let links = Links::<Gathering>::new(Arc::new(move |calls| {
            calls.into_iter().for_each(|(call, _)| sender.send(call).unwrap());
        }));
        let call = |call| links.queue(address, call, "a call".into()).unwrap().flush();
        call(1);
        let (mut stream, _) = listener.accept().unwrap();
        drop(listener);
        stream.read_exact(&mut [0; 4]).unwrap();
        call(2);
        drop(stream);
        assert_eq!([(); 2].map(|()| ended.recv_timeout(WAIT)), [Ok(1), Ok(2)]);
    }
}
