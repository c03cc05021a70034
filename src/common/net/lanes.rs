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
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::collections::HashMap;
use std::net::SocketAddrV4;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many calls to one address are under way at once.
pub const MAX_LANES: usize = 16;

/// How many calls to one address can wait.
const MAX_QUEUED: usize = 16 * 1024;

/// To how many addresses there can be lanes.
const MAX_PEERS: usize = 8 * 1024;

/// A lane that has had nothing to do for this long ends; at once, if it has no
/// connection.
const IDLE: Duration = Duration::from_secs(30);

/// How long a connection may take to be made.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

type Done = Box<dyn FnOnce(Option<Vec<u8>>) + Send>;

struct Call {
    frame: Vec<u8>,
    until: Instant,
    done: Done,
}

/// An address that has lanes.
struct Peer {
    queue: Sender<Call>,
    calls: Receiver<Call>,
    lanes: usize,
    /// Calls that are queued or under way.
    load: usize,
}

/// Connections to all peers. Lanes begin and end under this lock, and the last one only
/// with an empty queue: then nothing is left of its peer.
#[derive(Clone, Default)]
pub struct Lanes(Arc<Mutex<HashMap<SocketAddrV4, Peer>>>);

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
        let call = Call { frame, until: Instant::now() + patience, done: Box::new(done) };
        match self.queue(to, call) {
            Ok(None) => {}
            Ok(Some(calls)) => {
                let lanes = self.clone();
                let started = threads::start(format!("to {to}"), move || lanes.run(to, &calls));
                if let Err(error) = started {
                    tracing::warn!("no thread for calls to {to}: {error}");
                    self.give_up(to);
                }
            }
            Err(call) => (call.done)(None),
        }
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<SocketAddrV4, Peer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a call. Returns what another lane is to take calls from, if there is to
    /// be one.
    ///
    /// # Errors
    /// The call, if there is no room for it.
    fn queue(&self, to: SocketAddrV4, call: Call) -> Result<Option<Receiver<Call>>, Call> {
        let mut peers = self.peers();
        if peers.len() >= MAX_PEERS && !peers.contains_key(&to) {
            return Err(call);
        }
        let peer = peers.entry(to).or_insert_with(Peer::new);
        if peer.queue.len() >= MAX_QUEUED {
            return Err(call);
        }
        peer.queue.send(call).map_err(|refused| refused.into_inner())?;
        peer.load += 1;
        let is_enough = peer.lanes >= peer.load.min(MAX_LANES);
        Ok((!is_enough).then(|| {
            peer.lanes += 1;
            peer.calls.clone()
        }))
    }

    /// What a lane does.
    fn run(&self, to: SocketAddrV4, calls: &Receiver<Call>) {
        let (mut caller, mut idle) = (None, IDLE);
        loop {
            let Ok(call) = calls.recv_timeout(idle) else {
                if self.may_end(to) {
                    return;
                }
                continue;
            };
            let answer = exchange(to, &mut caller, &call);
            idle = if caller.is_some() { IDLE } else { Duration::ZERO };
            if let Some(peer) = self.peers().get_mut(&to) {
                peer.load -= 1;
            }
            (call.done)(answer);
        }
    }

    /// Whether there is nothing to do for a lane any more: then it is not counted.
    fn may_end(&self, to: SocketAddrV4) -> bool {
        let mut peers = self.peers();
        let Some(peer) = peers.get_mut(&to) else { return true };
        if !peer.calls.is_empty() {
            return false;
        }
        peer.lanes -= 1;
        if peer.lanes == 0 {
            peers.remove(&to);
        }
        true
    }

    /// There is no thread for a lane: if it is the only one, nobody takes what is
    /// queued.
    fn give_up(&self, to: SocketAddrV4) {
        let left = {
            let mut peers = self.peers();
            let Some(peer) = peers.get_mut(&to) else { return };
            peer.lanes -= 1;
            if peer.lanes > 0 { None } else { peers.remove(&to) }
        };
        for call in left.iter().flat_map(|peer| peer.calls.try_iter()) {
            (call.done)(None);
        }
    }
}

impl Peer {
    fn new() -> Self {
        let (queue, calls) = unbounded();
        Self { queue, calls, lanes: 0, load: 0 }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::net::{Ipv4Addr, TcpListener};

    /// How long what must happen may take.
    const WAIT: Duration = Duration::from_secs(20);

    #[test]
    fn nothing_is_kept_of_an_address_at_which_nobody_is() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let (lanes, (sender, ended)) = (Lanes::default(), bounded(100));
        for last in 1..=100 {
            let sender = sender.clone();
            let to = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, last), port);
            lanes.call(to, Vec::new(), WAIT, move |answer| sender.send(answer).unwrap());
        }
        for _ in 0..100 {
            assert_eq!(ended.recv_timeout(WAIT), Ok(None));
        }
        let deadline = Instant::now() + WAIT;
        while !lanes.0.lock().unwrap().is_empty() {
            assert!(Instant::now() < deadline, "peers are kept");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_call_for_which_there_is_no_thread_ends() {
        let (lanes, (sender, ended)) = (Lanes::default(), bounded(1));
        let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1);
        let done = Box::new(move |answer| sender.send(answer).unwrap());
        let call = Call { frame: Vec::new(), until: Instant::now() + WAIT, done };
        assert!(matches!(lanes.queue(to, call), Ok(Some(_))));
        lanes.give_up(to);
        assert_eq!(ended.try_recv(), Ok(None));
        assert!(lanes.0.lock().unwrap().is_empty());
    }
}
