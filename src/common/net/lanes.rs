//! Calls to chunkservers: several at a time to each, over connections that are
//! kept for a while.
//!
//! A call that waits for somebody's disk holds its connection, so there are up to
//! [`MAX_LANES`] of them to one address, each with a thread that takes the next
//! call when it has the answer to the last. Calls are not answered in order, nor
//! need they be: mutations are numbered. Every call ends, with its answer or
//! without.

use super::call::Caller;
use super::threads;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::collections::HashMap;
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many calls to one address are under way at once.
pub const MAX_LANES: usize = 16;

/// How many calls to one address can wait.
const MAX_QUEUED: usize = 16 * 1024;

/// A lane that has had nothing to do for this long ends.
const IDLE: Duration = Duration::from_secs(30);

/// How long a connection may take to be made.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

type Done = Box<dyn FnOnce(Option<Vec<u8>>) + Send>;

struct Call {
    frame: Vec<u8>,
    until: Instant,
    done: Done,
}

#[derive(Clone)]
struct Peer {
    queue: Sender<Call>,
    calls: Receiver<Call>,
    lanes: Arc<AtomicUsize>,
    /// Calls that are queued or under way.
    load: Arc<AtomicUsize>,
}

/// Connections to all peers.
#[derive(Default)]
pub struct Lanes(Mutex<HashMap<SocketAddrV4, Peer>>);

impl Lanes {
    /// Sends `frame` to `to`; `done` takes the body of the answer, or nothing if
    /// none came within `patience`. Never blocks.
    pub fn call(
        &self,
        to: SocketAddrV4,
        frame: Vec<u8>,
        patience: Duration,
        done: impl FnOnce(Option<Vec<u8>>) + Send + 'static,
    ) {
        let peer = {
            let mut peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            peers.entry(to).or_insert_with(Peer::new).clone()
        };
        let call = Call { frame, until: Instant::now() + patience, done: Box::new(done) };
        let load = peer.load.fetch_add(1, Ordering::AcqRel) + 1;
        if let Err(refused) = peer.queue.try_send(call) {
            peer.load.fetch_sub(1, Ordering::AcqRel);
            return (refused.into_inner().done)(None);
        }
        let lanes = peer.lanes.load(Ordering::Acquire);
        if lanes < load.min(MAX_LANES) {
            peer.lanes.fetch_add(1, Ordering::AcqRel);
            let lane = peer.clone();
            if threads::start(format!("to {to}"), move || lane.run(to)).is_err() {
                peer.lanes.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }
}

impl Peer {
    fn new() -> Self {
        let (queue, calls) = bounded(MAX_QUEUED);
        Self { queue, calls, lanes: Arc::default(), load: Arc::default() }
    }

    fn run(&self, to: SocketAddrV4) {
        let mut caller = None;
        while let Ok(call) = self.calls.recv_timeout(IDLE) {
            let answer = exchange(to, &mut caller, &call);
            self.load.fetch_sub(1, Ordering::AcqRel);
            (call.done)(answer);
        }
        self.lanes.fetch_sub(1, Ordering::AcqRel);
        // Somebody may have counted on this lane at the last moment.
        while let Ok(call) = self.calls.try_recv() {
            let answer = exchange(to, &mut caller, &call);
            self.load.fetch_sub(1, Ordering::AcqRel);
            (call.done)(answer);
        }
    }
}

fn exchange(to: SocketAddrV4, caller: &mut Option<Caller>, call: &Call) -> Option<Vec<u8>> {
    if caller.is_none() {
        *caller = Caller::connect(to, call.until.min(Instant::now() + CONNECT_PATIENCE)).ok();
    }
    let answer = caller.as_mut()?.exchange(&call.frame, call.until, <[u8]>::to_vec);
    if answer.is_err() {
        *caller = None;
    }
    answer.ok()
}
