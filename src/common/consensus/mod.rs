//! A log that several processes agree upon.
//!
//! A *group* of nodes keeps copies of one log of commands, and each of them
//! applies the commands in the order of the log. What a majority has on its disks
//! is *committed*: it stays where it is whoever fails, and as long as a majority
//! of the nodes run and reach each other, the group goes on. So whatever is
//! decided by applying commands survives the loss of any minority. The protocol is
//! Raft (Ongaro and Ousterhout, USENIX ATC 2014; Ongaro's dissertation for
//! pre-votes, check-quorum, read indexes and changes of membership), and the part
//! that elects, replicates and commits is the library `raft`, which does no I/O.
//! Here is what it leaves to its user:
//!
//! * [`log`]: what is kept on the disk and in memory, and how it is read back;
//! * [`message`]: what nodes say to each other, as JSON: no byte from the network
//!   reaches the library's own parser;
//! * [`roster`]: who is in the group, and where;
//! * [`founding`]: how a group comes to be, and what a process does that is in none;
//! * [`reshaping`]: how nodes are added and removed while the group runs;
//! * [`member`]: a node of a group, around the library;
//! * [`node`]: the machine: a process that is in a group or waits to be;
//! * [`replica`]: a node and the state, and who leads: what a viewleader and a master are;
//! * [`confirming`]: what a leader may not answer before it is confirmed to be one;
//! * [`requests`]: what the processes of a group are asked as such.
//!
//! # What the owner does
//! [`node::Node`] neither knows nor holds what the commands mean. Its owner (a
//! [`replica::Replica`]) has the state and does what the effects say, in their order:
//!
//! * [`Effect::Apply`]: a command is committed: apply it. On the node that
//!   proposed it, it comes with the number that it was proposed under.
//! * [`Effect::Restore`]: forget the state and go on with this one.
//! * [`Effect::Lead`]: this node leads from now on, and everything that was ever
//!   committed is applied. Only now may it answer and propose.
//! * [`Effect::Follow`]: it does not lead (any more). What it has proposed may be
//!   committed yet, or never.
//! * [`Effect::Confirmed`]: when [`Input::Confirm`] was given, nobody else was
//!   leader, and everything committed by then is applied. An answer that is not
//!   itself in the log must wait for this: a leader that was cut off or asleep does
//!   not know that there is a newer one.
//!
//! # What must be durable before what
//! A node must not say what its disk does not know: a vote, or that it has an
//! entry. So messages that depend on a batch ([`Effect::Store`]) are sent when
//! [`Input::Stored`] says that it is durable. A leader sends new entries while its
//! own disk writes them; it counts itself among those that have them only when it
//! does. In a group of one, a command costs one batch.
//!
//! # Randomness
//! The library draws election time-outs from a generator of its own, whenever it
//! begins to wait anew. Before it looks at one, it is overwritten by one that is
//! drawn here, from the generator that the node was given.

pub mod confirming;
pub mod founding;
pub mod log;
pub mod member;
pub mod message;
pub mod node;
pub mod replica;
pub mod requests;
pub mod reshaping;
pub mod roster;

use crate::store;
use message::Envelope;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::net::SocketAddrV4;
use std::time::Duration;

/// The library's unit of time.
pub const TICK: Duration = Duration::from_millis(50);

/// A leader is heard at least once in so many ticks.
pub const HEARTBEAT_TICKS: usize = 2;

/// The shortest election time-out, in ticks. A leader that has not heard from a
/// majority for so long steps down.
pub const MIN_ELECTION_TICKS: usize = 15;

/// Election time-outs are shorter than this, in ticks.
pub const MAX_ELECTION_TICKS: usize = 27;

const _: () = assert!(MIN_ELECTION_TICKS >= 5 * HEARTBEAT_TICKS);

/// What the commands of a log act upon.
pub trait State: Serialize + DeserializeOwned + Default {
    /// One command.
    type Command: Serialize + DeserializeOwned;

    /// Carries out a command: the same commands in the same order lead to the same
    /// state.
    fn obey(&mut self, command: Self::Command);
}

/// Names a node for ever: drawn when its disk is empty, kept there, and never used
/// again. A process that comes back without its disk is another node, so it can't
/// break what the first one has promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

/// Names a group for ever: drawn when it is founded, and in every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupId(u64);

macro_rules! drawn_name {
    ($name:ident) => {
        impl $name {
            /// The name that was drawn as this number, which is not zero.
            pub fn drawn(number: u64) -> Self {
                Self(number.max(1))
            }
        }

        /// Sixteen hexadecimal digits.
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:016x}", self.0)
            }
        }

        // A text: not every reader of JSON keeps 64 bits of a number.
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                match u64::from_str_radix(&text, 16) {
                    Ok(number @ 1..) => Ok(Self(number)),
                    _ => Err(D::Error::custom("a name is a hexadecimal number above 0")),
                }
            }
        }
    };
}

drawn_name!(NodeId);
drawn_name!(GroupId);

/// What can happen to a node, beside messages from others ([`node::Node::receive`]).
#[derive(Debug)]
pub enum Input<C> {
    /// Replicate this command. Only a node that leads can.
    Propose {
        /// Comes back with [`Effect::Apply`].
        number: u64,
        /// The command.
        command: C,
    },
    /// Does this node lead? The answer is [`Effect::Confirmed`], or never comes.
    Confirm {
        /// Comes back with the answer. Later ones are greater.
        number: u64,
    },
    /// All batches up to this one are durable.
    Stored {
        /// Its number.
        batch: u64,
    },
    /// A message to this node did not get there.
    Lost(NodeId),
    /// What a node has said to the messages that it got.
    Receipt {
        /// Who sits where the message went to.
        to: NodeId,
        /// What it said.
        receipt: message::Receipt,
    },
    /// What came of [`Effect::Ask`]; nothing when nobody answers there.
    Heard {
        /// Who was asked.
        address: SocketAddrV4,
        /// The answer.
        hello: Option<message::Hello>,
    },
    /// Change the group. Only a node that leads can.
    Reshape {
        /// Comes back with [`Effect::Reshaped`].
        number: u64,
        /// How.
        change: reshaping::Wish,
    },
    /// Let somebody else lead: this process is about to end.
    Resign,
    /// Time has passed.
    Tick,
}

/// What a node asks for, to be done in this order.
#[derive(Debug)]
pub enum Effect<S: State> {
    /// Make these changes durable, all or none, after the batches before, and say
    /// so with [`Input::Stored`].
    Store {
        /// The number of the batch.
        batch: u64,
        /// What changes in the store.
        changes: Vec<store::Change>,
    },
    /// Send this. It may get lost, but not overtake what was sent to the same
    /// address before.
    Send {
        /// Where the other node listens.
        to: SocketAddrV4,
        /// The message.
        envelope: Box<Envelope>,
    },
    /// Ask who sits at this address, and come back with [`Input::Heard`].
    Ask {
        /// Where.
        address: SocketAddrV4,
        /// What to tell of oneself.
        hello: Box<message::Hello>,
    },
    /// Apply this command.
    Apply {
        /// Its place in the log.
        index: u64,
        /// The command.
        command: S::Command,
        /// The number under which this node has proposed it, in the time that it
        /// has been leader.
        number: Option<u64>,
    },
    /// Go on with this state instead.
    Restore {
        /// The place of the last command that it holds.
        index: u64,
        /// The state.
        state: S,
    },
    /// This node leads; everything up to `index` is applied.
    Lead {
        /// The place in the log from which on it leads.
        index: u64,
    },
    /// This node does not lead.
    Follow,
    /// This node led, when the confirmation with this number was asked for, and
    /// with every one before it.
    Confirmed {
        /// The number.
        number: u64,
    },
    /// What came of a change of the group.
    Reshaped {
        /// The number that it came with.
        number: u64,
        /// Done, or why not.
        outcome: Result<(), reshaping::Refused>,
    },
    /// Something worth a line in the log.
    Note(String),
    /// End this process: to go on could break what this node has promised.
    Die(String),
}
