//! What the processes of a group are asked as such, on the port of everything else.
//!
//! The commands begin with what the group is of, so that a viewleader and a master that
//! are told of each other by mistake don't understand each other. For viewleaders:
//!
//! | command | from | reply |
//! |---|---|---|
//! | `viewleader_hello` | one that wants to know who is there | a [`Hello`] |
//! | `viewleader_message` | one of the group: an [`Envelope`] | a [`Receipt`] |
//! | `viewleader_add` | a client | `ok` once the one that was added votes |
//! | `viewleader_remove` | a client | `ok`, `unknown` |

use super::message::{Envelope, Hello, Receipt};
use super::reshaping::Wish;
use crate::wire::{self, Reason, Refusal};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddrV4;

/// What a group is of: its commands begin with that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(&'static str);

impl Kind {
    /// Viewleaders.
    pub const VIEWLEADER: Kind = Kind("viewleader");
    /// Masters of a file system.
    pub const MASTER: Kind = Kind("master");
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// What processes of a group ask each other, and what is asked about them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum GroupRequest {
    /// Who is there?
    Hello(Hello),
    /// From node to node.
    Message(Envelope),
    /// A process is to come into the group.
    Add(Whom),
    /// A process is to leave it.
    Remove(Whom),
}

/// The argument of the commands that add and remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whom {
    /// Where the process is reached.
    pub address: SocketAddrV4,
}

/// A request as it is sent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GroupCommand {
    cmd: String,
    #[serde(flatten)]
    request: GroupRequest,
}

impl GroupRequest {
    /// The request as it is sent to a group of this kind.
    pub fn to(self, Kind(kind): Kind) -> GroupCommand {
        let word = match self {
            Self::Hello(_) => "hello",
            Self::Message(_) => "message",
            Self::Add(_) => "add",
            Self::Remove(_) => "remove",
        };
        GroupCommand { cmd: format!("{kind}_{word}"), request: self }
    }

    /// Reads a request to a group of this kind; nothing if the command is none of these.
    ///
    /// # Errors
    /// A [`Refusal`] that says what is wrong with it.
    pub fn decode(Kind(kind): Kind, cmd: &str, body: &[u8]) -> Result<Option<Self>, Refusal> {
        let word = cmd.strip_prefix(kind).and_then(|rest| rest.strip_prefix('_'));
        Ok(Some(match word {
            Some("hello") => Self::Hello(wire::arguments(cmd, body)?),
            Some("message") => Self::Message(wire::arguments(cmd, body)?),
            Some("add") => Self::Add(wire::arguments(cmd, body)?),
            Some("remove") => Self::Remove(wire::arguments(cmd, body)?),
            _ => return Ok(None),
        }))
    }

    /// The wish that it is, if it is one.
    pub fn wish(&self) -> Option<Wish> {
        match self {
            Self::Add(whom) => Some(Wish::Add(whom.address)),
            Self::Remove(whom) => Some(Wish::Remove(whom.address)),
            Self::Hello(_) | Self::Message(_) => None,
        }
    }
}

/// What a process of a group answers to these.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum GroupReply {
    /// Who is here.
    Hello(Hello),
    /// What became of a message.
    Receipt(Receipt),
    /// What came of a wish.
    Status {
        /// `ok` or `unknown`.
        status: &'static str,
    },
    /// The request was not carried out.
    Refused(Refusal),
    /// Another process is to be asked.
    NotLeader(NotLeader),
}

/// The answer of a process that does not lead. The original's programs go on to the
/// next port upon the `error`; ours go where the leader is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotLeader {
    /// Always `not leader`.
    pub error: NotLeaderWord,
    /// `unavailable` if nothing was done, `unknown_outcome` if it may have been.
    pub reason: Reason,
    /// Where the leader is, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<SocketAddrV4>,
    /// Why this process will be of no use for longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// The words `not leader`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NotLeaderWord {
    /// `"not leader"`
    #[serde(rename = "not leader")]
    NotLeader,
}

impl NotLeader {
    /// Nothing was done.
    pub fn undone(leader: Option<SocketAddrV4>) -> Self {
        let (error, reason) = (NotLeaderWord::NotLeader, Reason::Unavailable);
        Self { error, reason, leader, note: None }
    }

    /// What was asked may have been done, or be done soon.
    pub fn in_doubt(leader: Option<SocketAddrV4>) -> Self {
        Self { reason: Reason::UnknownOutcome, ..Self::undone(leader) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_begins_with_what_the_group_is_of() {
        let request = GroupRequest::Add(Whom { address: "10.0.0.1:9000".parse().unwrap() });
        let sent = serde_json::to_string(&request.clone().to(Kind::MASTER)).unwrap();
        assert_eq!(sent, r#"{"cmd":"master_add","address":"10.0.0.1:9000"}"#);
        let read = |kind| GroupRequest::decode(kind, "master_add", sent.as_bytes());
        assert_eq!(read(Kind::MASTER), Ok(Some(request)));
        assert_eq!(read(Kind::VIEWLEADER), Ok(None));
        assert!(GroupRequest::decode(Kind::MASTER, "master_add", b"{}").is_err());
    }
}
