//! A connection: requests in, replies out, in order.
//!
//! One read may bring many requests. They are begun as far as their order allows,
//! and the thread reads on. What can be answered at once is collected and written
//! at once, so that a client which sends one request at a time costs one read and
//! one write for each, and one that pipelines costs less. Any other reply is written
//! by whoever brings it, unless one before it is still missing: to wake the thread
//! of the connection for that would cost more than to write it.
//!
//! Whoever brings a reply has other things to do and never waits for a client: what
//! a client does not accept is left to a thread of its own, and while that is at it
//! no more requests are read.
//!
//! What one connection holds is bounded, however much its client asks for and however
//! little it takes: by the number of requests, by how long their answers can be, and by
//! what is written out and waits to be sent.

use super::call::CallFailure;
use super::listen::Connections;
use super::xml_rpc::{self, Method};
use super::{call, http, threads};
use crate::wire::{Decoder, FrameError, Refusal, append_frame};
use serde::Serialize;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a frame may take from its first byte to its last.
pub const FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may stand idle between two frames.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// How long the other end may take to accept what is written to it.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a thread that reads looks up to see how late it is.
const LOOK_UP: Duration = Duration::from_secs(5);

/// How long an answer is waited for; every machine answers sooner by itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

/// How many requests of one connection can be under way at once.
const MAX_PIPELINED: usize = 1024;

/// How many bytes the answers to them may have in all, by what [`Service::weight`] says.
const MAX_AWAITED_BYTES: usize = 32 * 1024 * 1024;

/// Collected replies beyond this many bytes are written before more are taken.
const WRITE_BATCH_BYTES: usize = 256 * 1024;

/// A request, and where its answer goes.
pub type Asked<S> = (<S as Service>::Request, Ticket<<S as Service>::Reply>);

/// What stands behind the connections of one program.
pub trait Service: Send + Sync + 'static {
    /// What is asked.
    type Request;
    /// What is answered.
    type Reply: Serialize + Send + 'static;

    /// Reads a request.
    ///
    /// # Errors
    /// The refusal that is to be the answer.
    fn decode(&self, body: &[u8]) -> Result<Self::Request, Refusal>;

    /// Which requests of one connection it may overlap with.
    fn class(&self, request: &Self::Request) -> Class;

    /// About how many bytes the answer can take until it is written; nothing where it
    /// is short, or only points to what is here anyway.
    fn weight(&self, _request: &Self::Request) -> usize {
        0
    }

    /// The answer to a request that can be given at once and changes nothing.
    fn answer(&self, _request: &Self::Request) -> Option<Self::Reply> {
        None
    }

    /// Begins what `host` asks; the answer goes to `ticket`, now or later.
    fn begin(&self, host: Ipv4Addr, request: Self::Request, ticket: Ticket<Self::Reply>);

    /// Begins what came together, in this order.
    fn begin_all(&self, host: Ipv4Addr, requests: Vec<Asked<Self>>) {
        for (request, ticket) in requests {
            self.begin(host, request, ticket);
        }
    }

    /// The reply that says no.
    fn refused(&self, refusal: Refusal) -> Self::Reply;

    /// Appends a reply as a frame to `out`.
    ///
    /// # Errors
    /// When it would be too long, with `out` as it was.
    fn append(&self, out: &mut Vec<u8>, reply: &Self::Reply) -> Result<(), FrameError> {
        append_frame(out, reply)
    }

    /// Who answers such calls instead, if this is one of several and does not lead.
    fn leader_elsewhere(&self) -> Option<SocketAddrV4> {
        None
    }

    /// What it is asked by XML-RPC; nothing if it does not speak that.
    fn methods(&self) -> &'static [Method<Self>]
    where
        Self: Sized,
    {
        &[]
    }
}

/// Requests of one class that follow each other on a connection may be under
/// way together; before one of another class, those before it are finished. So
/// a read sees the writes that were sent before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// From another server, which has put its clients' requests in order.
    Server,
    /// Anything else: one at a time.
    Alone,
}

/// What a request leads to.
#[derive(Debug)]
enum Outcome<R> {
    Reply(R),
    /// No answer: the connection is closed.
    Close,
}

/// Takes what requests lead to, by the numbers of the requests.
trait Settle<R>: Send + Sync {
    fn settle(self: Arc<Self>, number: u64, outcome: Outcome<R>);
}

/// Where the answer to one request goes. Dropped unused, it closes the
/// connection, so that nobody waits for an answer that can't come.
pub struct Ticket<R> {
    /// Taken when it is used.
    replies: Option<Arc<dyn Settle<R>>>,
    number: u64,
}

impl<R: Send + 'static> Ticket<R> {
    /// A ticket, and the answer that is given to it.
    pub fn new() -> (Self, Awaited<R>) {
        let awaiting = Arc::new(Awaiting { outcome: Mutex::new(None), settled: Condvar::new() });
        let replies: Arc<dyn Settle<R>> = Arc::<Awaiting<R>>::clone(&awaiting);
        (Self { replies: Some(replies), number: 0 }, Awaited(awaiting))
    }
}

/// The answer to one request, which may still be to come.
pub struct Awaited<R>(Arc<Awaiting<R>>);

struct Awaiting<R> {
    outcome: Mutex<Option<Outcome<R>>>,
    settled: Condvar,
}

impl<R: Send> Settle<R> for Awaiting<R> {
    fn settle(self: Arc<Self>, _: u64, outcome: Outcome<R>) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.settled.notify_one();
    }
}

impl<R> Awaited<R> {
    /// Waits for it; nothing when there is none, or not in time.
    pub fn wait(self) -> Option<R> {
        let outcome = self.0.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let waited =
            self.0.settled.wait_timeout_while(outcome, ANSWER_TIMEOUT, |outcome| outcome.is_none());
        match waited.unwrap_or_else(PoisonError::into_inner).0.take() {
            Some(Outcome::Reply(reply)) => Some(reply),
            Some(Outcome::Close) | None => None,
        }
    }
}

impl<R> Ticket<R> {
    /// Answers.
    pub fn reply(mut self, reply: R) {
        self.settle(Outcome::Reply(reply));
    }

    /// Closes the connection instead of an answer.
    pub fn close(mut self) {
        self.settle(Outcome::Close);
    }

    fn settle(&mut self, outcome: Outcome<R>) {
        if let Some(replies) = self.replies.take() {
            replies.settle(self.number, outcome);
        }
    }
}

impl<R> Drop for Ticket<R> {
    fn drop(&mut self) {
        self.settle(Outcome::Close);
    }
}

impl<R> fmt::Debug for Ticket<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({})", self.number)
    }
}

/// What a connection has still to answer.
struct State<R> {
    /// The number of the oldest request that is not answered.
    first: u64,
    /// What became of it and those after it, as far as that is known.
    slots: VecDeque<Slot<R>>,
    /// How many bytes those can take.
    awaited: usize,
    /// Replies in their order, not written yet.
    out: Vec<u8>,
    /// Somebody writes, and takes what is put into `out` meanwhile.
    is_writing: bool,
    /// The thread of the connection will write: it is about to begin requests.
    is_corked: bool,
    /// The thread of the connection waits for a change.
    is_awaited: bool,
    /// There will be no answers beyond those in `out`.
    is_over: bool,
}

/// The place of one request among those that are not answered.
struct Slot<R> {
    outcome: Option<Outcome<R>>,
    /// How many bytes the answer can take.
    weight: usize,
}

impl<R> State<R> {
    /// Whether no more requests are to be begun.
    fn is_full(&self) -> bool {
        self.slots.len() >= MAX_PIPELINED
            || self.awaited >= MAX_AWAITED_BYTES
            || self.out.len() >= WRITE_BATCH_BYTES
    }

    /// Whether one that was full has room again: for so many that it is worth while.
    fn has_room(&self) -> bool {
        self.slots.len() <= MAX_PIPELINED / 2
            && self.awaited <= MAX_AWAITED_BYTES / 2
            && self.out.len() < WRITE_BATCH_BYTES
    }
}

/// The side of a connection that answers.
struct Replies<S: Service> {
    stream: Arc<TcpStream>,
    service: Arc<S>,
    state: Mutex<State<S::Reply>>,
    changed: Condvar,
}

impl<S: Service> Settle<S::Reply> for Replies<S> {
    fn settle(self: Arc<Self>, number: u64, outcome: Outcome<S::Reply>) {
        let mut state = self.state();
        let Some(place) = number.checked_sub(state.first) else { return };
        let Some(slot) = state.slots.get_mut(place as usize) else { return };
        slot.outcome = Some(outcome);
        if place > 0 || state.is_over {
            return;
        }
        self.collect(&mut state);
        if !state.is_corked {
            self.write(state, Manner::AtOnce);
        }
    }
}

/// How something is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// As much as is accepted at once; the rest is left to a thread of its own.
    AtOnce,
    /// All of it, however long it takes (up to [`WRITE_TIMEOUT`] for a part).
    Patiently,
}

impl<S: Service> Replies<S> {
    fn state(&self) -> MutexGuard<'_, State<S::Reply>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the replies that are next in order into `out`, as far as they go with one
    /// write. The others take less as they are.
    fn collect(&self, state: &mut State<S::Reply>) {
        while !state.is_over
            && state.out.len() < WRITE_BATCH_BYTES
            && let Some(outcome) = state.slots.front_mut().and_then(|slot| slot.outcome.take())
        {
            let weight = state.slots.pop_front().map_or(0, |slot| slot.weight);
            state.first += 1;
            state.awaited -= weight;
            let appended = match outcome {
                Outcome::Reply(reply) => append(&*self.service, &mut state.out, &reply),
                Outcome::Close => false,
            };
            if !appended {
                // What comes after it is not answered either.
                state.slots.clear();
                state.awaited = 0;
                state.is_over = true;
            }
        }
    }

    /// Writes what is collected, unless somebody does so already.
    fn write<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State<S::Reply>>, manner: Manner) {
        if state.is_writing {
            return;
        }
        state.is_writing = true;
        while !state.out.is_empty() {
            let mut out = std::mem::take(&mut state.out);
            drop(state);
            let written = match manner {
                Manner::AtOnce => call::send_now(&self.stream, &out),
                Manner::Patiently => call::send_all(&self.stream, &out),
            };
            state = self.state();
            match written {
                Ok(count) if count == out.len() => {
                    if state.out.is_empty() {
                        out.clear();
                        out.shrink_to(WRITE_BATCH_BYTES);
                        state.out = out;
                    }
                    self.collect(&mut state);
                }
                Ok(count) => {
                    out.drain(..count);
                    out.append(&mut state.out);
                    state.out = out;
                    // It goes on being the writer's turn: nobody else writes now.
                    return self.leave_to_thread(state);
                }
                Err(error) => {
                    tracing::debug!("a reply could not be written: {error}");
                    state.out.clear();
                    state.is_over = true;
                }
            }
        }
        state.is_writing = false;
        if state.is_over {
            // The thread of the connection reads: this wakes it.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        if state.is_awaited {
            self.changed.notify_all();
        }
    }

    /// The other end accepts no more for now: a thread waits for it.
    fn leave_to_thread(self: &Arc<Self>, mut state: MutexGuard<'_, State<S::Reply>>) {
        let replies = Arc::clone(self);
        let started = threads::start("late replies", move || {
            let mut state = replies.state();
            state.is_writing = false;
            replies.write(state, Manner::Patiently);
        });
        if let Err(error) = started {
            tracing::warn!("no thread for a client that reads slowly: {error}");
            (state.is_writing, state.is_over) = (false, true);
            state.out.clear();
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }

    /// Waits until `is_so`. Returns whether the connection goes on.
    fn wait_until(&self, is_so: impl Fn(&State<S::Reply>) -> bool) -> bool {
        let mut state = self.state();
        state.is_awaited = true;
        let (mut first, mut since) = (state.first, Instant::now());
        loop {
            let is_over = state.is_over && state.out.is_empty() && !state.is_writing;
            if is_over || is_so(&state) {
                break;
            }
            let waited = self.changed.wait_timeout(state, LOOK_UP);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.first != first {
                (first, since) = (state.first, Instant::now());
            }
            if since.elapsed() > ANSWER_TIMEOUT {
                state.is_over = true;
                break;
            }
        }
        state.is_awaited = false;
        !state.is_over
    }
}

/// Appends `reply`, or what is said instead of one that is too long. Returns whether
/// there was something to be said.
fn append<S: Service>(service: &S, out: &mut Vec<u8>, reply: &S::Reply) -> bool {
    let Err(error) = service.append(out, reply) else { return true };
    let refusal = Refusal::invalid(format!("the reply is too long ({error}): ask for less"));
    service.append(out, &service.refused(refusal)).is_ok()
}

/// Serves one connection until it ends. Errors of the stream end it: there is
/// nobody left to tell.
pub(super) fn serve<S: Service>(
    stream: &Arc<TcpStream>,
    host: Ipv4Addr,
    service: &Arc<S>,
    connections: &Connections,
) {
    match converse(stream, host, service, connections) {
        Ok(()) => {}
        Err(error) => tracing::debug!("connection from {host}: {error}"),
    }
    let _ = stream.shutdown(Shutdown::Both);
}

/// Serves frames, or HTTP: the first byte tells.
fn converse<S: Service>(
    stream: &Arc<TcpStream>,
    host: Ipv4Addr,
    service: &Arc<S>,
    connections: &Connections,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOOK_UP))?;
    stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let methods = service.methods();
    if !methods.is_empty() && first_byte(stream)?.is_some_and(http::begins_with) {
        let answer = |body: &[u8], is_passed_on: bool| {
            // Once is enough: two that take each other for the leader are both wrong.
            let leader = service.leader_elsewhere().filter(|_| !is_passed_on);
            let deadline = Instant::now() + ANSWER_TIMEOUT;
            match leader.map(|leader| http::post(leader, body, deadline)) {
                Some(Ok(reply)) => reply,
                None | Some(Err(CallFailure::NotSent(_))) => {
                    xml_rpc::answer(&**service, methods, body)
                }
                // What the leader may have carried out is not carried out once more.
                Some(Err(failure)) => xml_rpc::refuse(Refusal::unknown_outcome(format!(
                    "it was passed on to the one that leads, and may have been done: {failure}"
                ))),
            }
        };
        return http::serve(stream, connections, answer);
    }
    let state = State {
        first: 0,
        slots: VecDeque::new(),
        awaited: 0,
        out: Vec::new(),
        is_writing: false,
        is_corked: false,
        is_awaited: false,
        is_over: false,
    };
    let (stream, service) = (Arc::clone(stream), Arc::clone(service));
    let replies = Replies { stream, service, state: Mutex::new(state), changed: Condvar::new() };
    let replies = Arc::new(replies);
    let mut conversation = Conversation {
        replies: &replies,
        host,
        begun: 0,
        is_full: false,
        asked: Vec::new(),
        out: Vec::new(),
    };
    let outcome = conversation.run(connections);
    // Whoever still brings a reply is too late.
    replies.state().is_over = true;
    outcome
}

/// The byte that comes first, which stays where it is; nothing if none comes.
fn first_byte(stream: &TcpStream) -> io::Result<Option<u8>> {
    let (since, mut first) = (Instant::now(), [0]);
    loop {
        match stream.peek(&mut first) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(first[0])),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if call::is_late(&error) && since.elapsed() < IDLE_TIMEOUT => {}
            Err(error) => return Err(error),
        }
    }
}

/// The side of a connection that reads.
struct Conversation<'a, S: Service> {
    replies: &'a Arc<Replies<S>>,
    host: Ipv4Addr,
    /// How many requests have got a number.
    begun: u64,
    /// With the last of them there were as many as can be.
    is_full: bool,
    /// Requests that are to be begun together.
    asked: Vec<Asked<S>>,
    /// Replies that were given at once, while nothing else is unanswered or
    /// unwritten.
    out: Vec<u8>,
}

impl<S: Service> Conversation<'_, S> {
    fn run(&mut self, connections: &Connections) -> io::Result<()> {
        let service = Arc::clone(&self.replies.service);
        let mut decoder = Decoder::new();
        let mut class = Class::Alone;
        loop {
            let mut is_clear = self.cork();
            loop {
                let body = match decoder.next_frame() {
                    Ok(Some(body)) => body,
                    Ok(None) => break,
                    Err(error) => {
                        self.finish()?;
                        self.refuse(Refusal::invalid(error.to_string()), true);
                        return self.say_goodbye();
                    }
                };
                let request = service.decode(body);
                let next = request.as_ref().map_or(Class::Alone, |it| service.class(it));
                if !is_clear && (next != class || next == Class::Alone) {
                    self.finish()?;
                    is_clear = self.cork();
                }
                if !is_clear && self.is_full {
                    if !self.make_room()? {
                        return Ok(());
                    }
                    is_clear = self.cork();
                }
                class = next;
                match request {
                    Err(refusal) => self.refuse(refusal, is_clear),
                    Ok(request) => match service.answer(&request) {
                        Some(reply) => self.take(reply, is_clear),
                        None => {
                            let ticket = self.ticket(service.weight(&request));
                            self.asked.push((request, ticket));
                            is_clear = false;
                        }
                    },
                }
                if self.out.len() >= WRITE_BATCH_BYTES {
                    self.write_out()?;
                }
            }
            if !self.make_room()? {
                return Ok(());
            }
            if connections.is_stopping() || !self.read(&mut decoder)? {
                // Who has said all that it had to say may still be listening.
                return self.finish();
            }
        }
    }

    /// Nobody else writes from now on until [`Conversation::uncork`]. Returns whether
    /// there is nothing that is unanswered or unwritten.
    fn cork(&mut self) -> bool {
        let mut state = self.replies.state();
        state.is_corked = true;
        state.slots.is_empty() && state.out.is_empty() && !state.is_writing
    }

    fn uncork(&mut self) {
        let mut state = self.replies.state();
        state.is_corked = false;
        if !state.out.is_empty() || state.is_over {
            self.replies.write(state, Manner::Patiently);
        }
    }

    /// Begins what has been gathered, and waits while nothing more is to be begun.
    /// Returns whether the connection goes on.
    fn make_room(&mut self) -> io::Result<bool> {
        self.write_out()?;
        self.begin();
        self.uncork();
        let is_full = std::mem::take(&mut self.is_full) && self.replies.state().is_full();
        Ok(!is_full || self.replies.wait_until(State::has_room))
    }

    /// Where the answer to the next request goes, which can take `weight` bytes.
    fn ticket(&mut self, weight: usize) -> Ticket<S::Reply> {
        let mut state = self.replies.state();
        state.slots.push_back(Slot { outcome: None, weight });
        state.awaited += weight;
        self.is_full = state.is_full();
        drop(state);
        let number = self.begun;
        self.begun += 1;
        let replies: Arc<dyn Settle<S::Reply>> = Arc::<Replies<S>>::clone(self.replies);
        Ticket { replies: Some(replies), number }
    }

    /// Takes a reply that was given at once.
    fn take(&mut self, reply: S::Reply, is_clear: bool) {
        if is_clear {
            append(&*self.replies.service, &mut self.out, &reply);
        } else {
            self.ticket(0).reply(reply);
        }
    }

    fn refuse(&mut self, refusal: Refusal, is_clear: bool) {
        let reply = self.replies.service.refused(refusal);
        self.take(reply, is_clear);
    }

    /// Writes what was given at once.
    fn write_out(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            (&*self.replies.stream).write_all(&self.out)?;
            self.out.clear();
            self.out.shrink_to(WRITE_BATCH_BYTES);
        }
        Ok(())
    }

    /// Begins the requests that have been gathered.
    fn begin(&mut self) {
        if !self.asked.is_empty() {
            let asked = std::mem::take(&mut self.asked);
            self.replies.service.begin_all(self.host, asked);
        }
    }

    /// Waits until everything is answered and written.
    fn finish(&mut self) -> io::Result<()> {
        self.write_out()?;
        self.begin();
        self.uncork();
        let is_done = |state: &State<S::Reply>| {
            state.slots.is_empty() && state.out.is_empty() && !state.is_writing
        };
        if self.replies.wait_until(is_done) {
            Ok(())
        } else {
            Err(io::Error::other("closed without an answer"))
        }
    }

    /// Reads what has come; whether the stream goes on.
    fn read(&self, decoder: &mut Decoder) -> io::Result<bool> {
        let mut since = None;
        loop {
            let between = decoder.is_between_frames();
            match (&*self.replies.stream).read(decoder.space()) {
                Ok(0) if between => return Ok(false),
                Ok(0) => return Err(io::Error::other("closed in the middle of a message")),
                Ok(count) => {
                    decoder.filled(count);
                    if decoder.has_frame() {
                        return Ok(true);
                    }
                    if between {
                        since = None;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    decoder.rest();
                }
                Err(error) => return Err(error),
            }
            let (limit, what) = match between {
                false => (FRAME_TIMEOUT, "a message that took too long"),
                true if !self.replies.state().slots.is_empty() => {
                    (ANSWER_TIMEOUT, "a request that was not answered")
                }
                true => (IDLE_TIMEOUT, "idle for too long"),
            };
            if since.get_or_insert_with(Instant::now).elapsed() > limit {
                return Err(io::Error::new(ErrorKind::TimedOut, what));
            }
        }
    }

    /// The last words on a stream that has lost its step. What it still sends is
    /// read for a moment: closing on unread bytes would take the words away.
    fn say_goodbye(&mut self) -> io::Result<()> {
        self.write_out()?;
        let stream = &*self.replies.stream;
        stream.shutdown(Shutdown::Write)?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        let mut rest = [0; 4096];
        for _ in 0..64 {
            match (&mut &*stream).read(&mut rest) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::listen;
    use super::*;
    use std::net::{SocketAddr, TcpListener};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    /// How long what must happen may take.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// One of several that counts the calls which it carries out itself.
    struct Follower {
        leader: SocketAddrV4,
        calls: AtomicUsize,
    }

    impl Service for Follower {
        type Request = ();
        type Reply = ();

        fn decode(&self, _: &[u8]) -> Result<(), Refusal> {
            Ok(())
        }

        fn class(&self, (): &()) -> Class {
            Class::Alone
        }

        fn begin(&self, _: Ipv4Addr, (): (), ticket: Ticket<()>) {
            ticket.reply(());
        }

        fn refused(&self, _: Refusal) {}

        fn leader_elsewhere(&self) -> Option<SocketAddrV4> {
            Some(self.leader)
        }

        fn methods(&self) -> &'static [Method<Self>] {
            &[Method {
                name: "count",
                signature: &["int"],
                help: "Counts.",
                run: |follower, _| {
                    let before = follower.calls.fetch_add(1, Ordering::Relaxed);
                    Ok(xml_rpc::number(before as u64 + 1))
                },
            }]
        }
    }

    fn listener() -> (TcpListener, SocketAddrV4) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let Ok(SocketAddr::V4(address)) = listener.local_addr() else { panic!("an address") };
        (listener, address)
    }

    /// What a follower of `leader` answers, and how many calls it has carried out itself.
    fn ask_follower(leader: SocketAddrV4) -> (xml_rpc::Outcome, usize) {
        let (listener, address) = listener();
        let follower = Arc::new(Follower { leader, calls: AtomicUsize::new(0) });
        let connections = listen::serve(listener, 10, Arc::clone(&follower)).unwrap();
        let call = xml_rpc::write_call("count", vec![]).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        let head = format!("POST /RPC2 HTTP/1.0\r\nContent-Length: {}\r\n\r\n", call.len());
        stream.write_all(&[head.as_bytes(), &call].concat()).unwrap();
        let mut reply = String::new();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_to_string(&mut reply).unwrap();
        connections.stop();
        let (_, body) = reply.split_once("\r\n\r\n").unwrap();
        (xml_rpc::read_reply(body.as_bytes()), follower.calls.load(Ordering::Relaxed))
    }

    #[test]
    fn a_call_that_the_leader_may_have_carried_out_is_not_carried_out_here() {
        let (leader, address) = listener();
        thread::spawn(move || {
            // The call arrives, and there is no answer.
            let (mut stream, _) = leader.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
        });
        let (outcome, calls) = ask_follower(address);
        assert_eq!((outcome.unwrap_err().code(), calls), (4, 0));
    }

    #[test]
    fn a_call_that_can_not_have_reached_the_leader_is_answered_here() {
        let (_, address) = listener();
        let (outcome, calls) = ask_follower(address);
        assert_eq!((outcome, calls), (Ok(xml_rpc::number(1)), 1));
    }
}
