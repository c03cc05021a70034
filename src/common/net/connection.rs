//! A connection: requests in, replies out, in order.
//!
//! One read may bring many requests. They are begun as far as their order
//! allows, their replies are collected in the order of the requests, and what
//! has been collected is written at once before the thread reads again. So a
//! client that sends one request at a time costs one read and one write for
//! each, and one that pipelines costs less.

use super::listen::Connections;
use crate::wire::{Decoder, Refusal, append_frame};
use serde::Serialize;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
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

/// Collected replies beyond this many bytes are written before more are taken.
const WRITE_BATCH_BYTES: usize = 256 * 1024;

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

    /// Begins what `host` asks; the answer goes to `ticket`, now or later.
    fn begin(&self, host: Ipv4Addr, request: Self::Request, ticket: Ticket<Self::Reply>);

    /// The reply that says no.
    fn refused(&self, refusal: Refusal) -> Self::Reply;
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

type Slot<R> = (Mutex<Option<Outcome<R>>>, Condvar);

/// Where the answer to one request goes. Dropped unused, it closes the
/// connection, so that nobody waits for an answer that can't come.
#[derive(Debug)]
pub struct Ticket<R>(Arc<Slot<R>>);

impl<R> Ticket<R> {
    /// Answers.
    pub fn reply(self, reply: R) {
        self.settle(Outcome::Reply(reply));
    }

    /// Closes the connection instead of an answer.
    pub fn close(self) {
        self.settle(Outcome::Close);
    }

    fn settle(&self, outcome: Outcome<R>) {
        let mut slot = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            *slot = Some(outcome);
            self.0.1.notify_one();
        }
    }
}

impl<R> Drop for Ticket<R> {
    fn drop(&mut self) {
        self.settle(Outcome::Close);
    }
}

/// Serves one connection until it ends. Errors of the stream end it: there is
/// nobody left to tell.
pub(super) fn serve<S: Service>(
    stream: &TcpStream,
    host: Ipv4Addr,
    service: &S,
    connections: &Connections,
) {
    let mut conversation =
        Conversation { stream, host, service, waiting: VecDeque::new(), out: Vec::new() };
    match conversation.run(connections) {
        Ok(()) => {}
        Err(error) => tracing::debug!("connection from {host}: {error}"),
    }
    let _ = stream.shutdown(Shutdown::Both);
}

struct Conversation<'a, S: Service> {
    stream: &'a TcpStream,
    host: Ipv4Addr,
    service: &'a S,
    /// Requests that are under way, in order.
    waiting: VecDeque<Arc<Slot<S::Reply>>>,
    /// Replies that are collected and not written.
    out: Vec<u8>,
}

impl<S: Service> Conversation<'_, S> {
    fn run(&mut self, connections: &Connections) -> io::Result<()> {
        self.stream.set_nodelay(true)?;
        self.stream.set_read_timeout(Some(LOOK_UP))?;
        self.stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let mut decoder = Decoder::new();
        let mut class = Class::Alone;
        loop {
            loop {
                let body = match decoder.next_frame() {
                    Ok(Some(body)) => body,
                    Ok(None) => break,
                    Err(error) => {
                        self.finish_waiting()?;
                        self.collect(Refusal::invalid(error.to_string()))?;
                        return self.say_goodbye();
                    }
                };
                let request = self.service.decode(body);
                let next = request.as_ref().map_or(Class::Alone, |it| self.service.class(it));
                if next != class || next == Class::Alone || self.waiting.len() >= MAX_PIPELINED {
                    self.finish_waiting()?;
                }
                class = next;
                match request {
                    Ok(request) => {
                        let slot = Arc::new((Mutex::new(None), Condvar::new()));
                        self.waiting.push_back(Arc::clone(&slot));
                        self.service.begin(self.host, request, Ticket(slot));
                    }
                    Err(refusal) => self.collect(refusal)?,
                }
            }
            self.finish_waiting()?;
            self.write()?;
            if connections.is_stopping() || !self.read(&mut decoder)? {
                return Ok(());
            }
        }
    }

    /// Reads what has come; whether the stream goes on.
    fn read(&self, decoder: &mut Decoder) -> io::Result<bool> {
        let mut since = None;
        loop {
            let between = decoder.is_between_frames();
            let limit = if between { IDLE_TIMEOUT } else { FRAME_TIMEOUT };
            match (&mut &*self.stream).read(decoder.space()) {
                Ok(0) if between => return Ok(false),
                Ok(0) => return Err(io::Error::other("closed in the middle of a message")),
                Ok(count) => {
                    let begins = between;
                    decoder.filled(count);
                    if decoder.has_frame() {
                        return Ok(true);
                    }
                    if begins {
                        since = None;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error),
            }
            if since.get_or_insert_with(Instant::now).elapsed() > limit {
                let what =
                    if between { "idle for too long" } else { "a message that took too long" };
                return Err(io::Error::new(ErrorKind::TimedOut, what));
            }
        }
    }

    /// Waits for the requests that are under way and collects their replies.
    fn finish_waiting(&mut self) -> io::Result<()> {
        while let Some(slot) = self.waiting.pop_front() {
            let state = slot.0.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = slot.1.wait_timeout_while(state, ANSWER_TIMEOUT, |state| state.is_none());
            let outcome = waited.unwrap_or_else(PoisonError::into_inner).0.take();
            match outcome {
                Some(Outcome::Reply(reply)) => self.collect_reply(&reply)?,
                Some(Outcome::Close) | None => {
                    self.write()?;
                    return Err(io::Error::other("closed without an answer"));
                }
            }
        }
        Ok(())
    }

    fn collect(&mut self, refusal: Refusal) -> io::Result<()> {
        let reply = self.service.refused(refusal);
        self.collect_reply(&reply)
    }

    fn collect_reply(&mut self, reply: &S::Reply) -> io::Result<()> {
        if let Err(error) = append_frame(&mut self.out, reply) {
            let refusal =
                Refusal::invalid(format!("the reply is too long ({error}): ask for less"));
            append_frame(&mut self.out, &self.service.refused(refusal))
                .map_err(io::Error::other)?;
        }
        if self.out.len() >= WRITE_BATCH_BYTES { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            (&mut &*self.stream).write_all(&self.out)?;
            self.out.clear();
            self.out.shrink_to(WRITE_BATCH_BYTES);
        }
        Ok(())
    }

    /// The last words on a stream that has lost its step. What it still sends is
    /// read for a moment: closing on unread bytes would take the words away.
    fn say_goodbye(&mut self) -> io::Result<()> {
        self.write()?;
        self.stream.shutdown(Shutdown::Write)?;
        self.stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        let mut rest = [0; 4096];
        for _ in 0..64 {
            match (&mut &*self.stream).read(&mut rest) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        Ok(())
    }
}
