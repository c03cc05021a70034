//! The way of messages from one node of a group to the others.
//!
//! For each address there is a queue and a thread, which writes what is queued and
//! waits until it is acknowledged. So messages to one address stay in their order,
//! none is written on a second connection while it may still arrive on the first,
//! and the sender learns of each that may not have arrived. Nobody waits for a peer
//! but its own thread.

use super::call::Caller;
use super::threads;
use crate::consensus::NodeId;
use crate::consensus::message::{Envelope, Receipt};
use crate::consensus::requests::{GroupRequest, Kind};
use crate::wire::append_frame;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddrV4;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many messages can be queued for one address. What does not fit is lost,
/// which the protocol bears.
const MAX_QUEUED: usize = 1024;

/// How many addresses there can be.
const MAX_PEERS: usize = 100;

/// How long messages may take to be written and acknowledged.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// After a connection could not be made, none is tried for this long.
const BACK_OFF: Duration = Duration::from_millis(100);

/// A thread that has had nothing to do for this long ends.
const IDLE: Duration = Duration::from_secs(60);

/// One write takes at most about this many bytes.
const WRITE_BATCH_BYTES: usize = 1024 * 1024;

/// What has become of messages to a node.
#[derive(Clone, Copy, Debug)]
pub enum News {
    /// One may not have arrived.
    Lost(NodeId),
    /// One has, and this is what was said to it.
    Receipt(NodeId, Receipt),
}

/// Takes the news.
pub type Inbox = Arc<dyn Fn(News) + Send + Sync>;

/// A queue ends only under this lock and when it is empty.
type Queues = Arc<Mutex<HashMap<SocketAddrV4, Sender<Envelope>>>>;

/// All ways to others.
pub struct Peers {
    kind: Kind,
    queues: Queues,
    inbox: Inbox,
}

impl Peers {
    /// None yet, to others of this kind; what becomes of messages goes to `inbox`.
    pub fn new(kind: Kind, inbox: Inbox) -> Self {
        Self { kind, queues: Queues::default(), inbox }
    }

    /// Queues a message to the node at `to`. Never blocks. Returns whether it was
    /// queued; only then the inbox will hear of it.
    pub fn send(&self, to: SocketAddrV4, envelope: Envelope) -> bool {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.get(&to) {
            return queue.try_send(envelope).is_ok();
        }
        if queues.len() >= MAX_PEERS {
            return false;
        }
        let (sender, queue) = bounded(MAX_QUEUED);
        let (inbox, shared) = (Arc::clone(&self.inbox), Arc::clone(&self.queues));
        let kind = self.kind;
        let way = Way { kind, to, queue, queues: shared, inbox, caller: None, failed: None };
        match threads::start(format!("to {to}"), move || way.run()) {
            Ok(_) => {
                let queued = sender.try_send(envelope).is_ok();
                queues.insert(to, sender);
                queued
            }
            Err(error) => {
                tracing::warn!("no thread for messages to {to}: {error}");
                false
            }
        }
    }
}

struct Way {
    kind: Kind,
    to: SocketAddrV4,
    queue: Receiver<Envelope>,
    queues: Queues,
    inbox: Inbox,
    caller: Option<Caller>,
    /// When a connection could not be made last.
    failed: Option<Instant>,
}

impl Way {
    fn run(mut self) {
        loop {
            let mut envelope = match self.queue.recv_timeout(IDLE) {
                Ok(envelope) => Some(envelope),
                Err(RecvTimeoutError::Timeout) if !self.may_end() => continue,
                Err(_) => return,
            };
            let (mut frames, mut nodes) = (Vec::new(), Vec::new());
            while let Some(next) = envelope.take() {
                let node = next.to;
                match append_frame(&mut frames, &GroupRequest::Message(next).to(self.kind)) {
                    Ok(()) => nodes.push(node),
                    Err(error) => tracing::error!("a message to {} is too long: {error}", self.to),
                }
                if frames.len() < WRITE_BATCH_BYTES {
                    envelope = self.queue.try_recv().ok();
                }
            }
            self.exchange(&frames, &nodes);
        }
    }

    /// Whether there is nothing to do any more: then it is off the list.
    fn may_end(&self) -> bool {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        self.queue.is_empty() && queues.remove(&self.to).is_some()
    }

    /// Brings frames to these nodes.
    fn exchange(&mut self, frames: &[u8], nodes: &[NodeId]) {
        let deadline = Instant::now() + EXCHANGE_TIMEOUT;
        let caller = self.caller.take().or_else(|| self.connect());
        let mut receipts = Vec::new();
        if let Some(mut caller) = caller
            && caller.send(frames, deadline).is_ok()
        {
            while receipts.len() < nodes.len()
                && let Ok(body) = caller.receive(deadline)
            {
                receipts.push(serde_json::from_slice::<Receipt>(&body).ok());
            }
            if receipts.len() == nodes.len() {
                self.caller = Some(caller);
            }
        }
        // One word for each node is enough: the last one, and that one was lost.
        let last: HashMap<NodeId, Receipt> = nodes
            .iter()
            .zip(&receipts)
            .filter_map(|(node, receipt)| Some((*node, (*receipt)?)))
            .collect();
        let lost: BTreeSet<NodeId> = nodes[receipts.len()..].iter().copied().collect();
        last.into_iter().for_each(|(node, receipt)| (self.inbox)(News::Receipt(node, receipt)));
        lost.into_iter().for_each(|node| (self.inbox)(News::Lost(node)));
    }

    fn connect(&mut self) -> Option<Caller> {
        if self.failed.is_some_and(|failed| failed.elapsed() < BACK_OFF) {
            return None;
        }
        let caller = Caller::connect(self.to, Instant::now() + CONNECT_TIMEOUT);
        self.failed = caller.is_err().then(Instant::now);
        caller.map_err(|error| tracing::debug!("no way to {}: {error}", self.to)).ok()
    }
}
