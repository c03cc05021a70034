//! The way of messages from one node of a group to the others: a [`Dialect`] of the
//! links. Every message is acknowledged, so messages to one address stay in their
//! order, and the sender learns of each that may not have arrived.

use super::links::{Dialect, Ended, Lane, Link, Links};
use crate::consensus::NodeId;
use crate::consensus::message::{Envelope, Receipt};
use crate::consensus::requests::{GroupCommand, GroupRequest, Kind};
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::sync::Arc;

/// What nodes say to each other. A call is known by the node that it is for.
pub struct BetweenNodes;

impl Dialect for BetweenNodes {
    type Call = NodeId;
    type Request = GroupCommand;
    type Answer = Receipt;

    const GATHERS: bool = true;

    fn lane(_: &GroupCommand) -> Lane {
        Lane::Prompt
    }
}

/// What has become of messages to a node.
#[derive(Clone, Copy, Debug)]
pub enum News {
    /// One may not have arrived.
    Lost(NodeId),
    /// One has, and this is what was said to it.
    Receipt(NodeId, Receipt),
}

/// All ways to others.
pub struct Peers {
    kind: Kind,
    links: Links<BetweenNodes>,
}

impl Peers {
    /// None yet, to others of this kind; what becomes of messages goes to `inbox`.
    pub fn new(kind: Kind, inbox: impl Fn(News) + Send + Sync + 'static) -> Self {
        let hear = move |ended: Ended<BetweenNodes>| latest(ended).into_iter().for_each(&inbox);
        Self { kind, links: Links::new(Arc::new(hear)) }
    }

    /// Queues a message to the node at `to`. Never blocks. Returns the link, which is to
    /// be flushed; nothing if the message was not queued: then nobody will hear of it.
    pub fn queue(&self, to: SocketAddrV4, envelope: Envelope) -> Option<Arc<Link<BetweenNodes>>> {
        let node = envelope.to;
        self.links.queue(to, node, GroupRequest::Message(envelope).to(self.kind))
    }
}

/// One word for each node is enough, the last one, and that one was lost.
fn latest(ended: Ended<BetweenNodes>) -> Vec<News> {
    let (mut receipts, mut lost) = (BTreeMap::new(), BTreeMap::new());
    for (node, result) in ended {
        match result {
            Ok(receipt) => drop(receipts.insert(node, News::Receipt(node, receipt))),
            Err(_) => drop(lost.insert(node, News::Lost(node))),
        }
    }
    receipts.into_values().chain(lost.into_values()).collect()
}
