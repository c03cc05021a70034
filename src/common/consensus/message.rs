//! What nodes say to each other.
//!
//! The library's messages are types that a protobuf compiler has made, and the
//! parser for them has a known weakness (RUSTSEC-2024-0437). So what travels are
//! the types below, as JSON like everything else; they are checked
//! ([`Message::into_raft`]) before the library sees them, and what it could not
//! bear is refused: it takes its peers to be right, and panics if they are not.
//!
//! A snapshot may be longer than a frame. It travels in parts, one message each,
//! which the receiver puts together.

use super::log::Record;
use super::{GroupId, NodeId};
use raft::eraftpb;
use raft::eraftpb::MessageType;
use serde::{Deserialize, Serialize};
use std::net::SocketAddrV4;

/// How much of a snapshot one message carries at most, in bytes.
pub const PART_BYTES: usize = 4 * 1024 * 1024;

/// How long a snapshot can be, in bytes.
pub const MAX_SNAPSHOT_BYTES: usize = 512 * 1024 * 1024;

/// A message and where it belongs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// The group that both are in: another one's message is refused.
    pub group: GroupId,
    /// Who says it.
    pub from: NodeId,
    /// To whom: whoever else sits at that address now is not meant.
    pub to: NodeId,
    /// Where the sender is reached.
    pub address: SocketAddrV4,
    /// What.
    pub message: Message,
}

impl Envelope {
    /// The vote that its sender has given, if it tells of one.
    pub fn ballot(&self) -> Option<Ballot> {
        let term = self.message.term;
        match self.message.kind {
            // Who asks for votes has given itself the first one.
            Kind::Vote => Some(Ballot { term, vote: self.from }),
            Kind::Voted if !self.message.reject => Some(Ballot { term, vote: self.to }),
            _ => None,
        }
    }
}

/// A vote: one in each term, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ballot {
    /// In which term.
    pub term: u64,
    /// For whom.
    pub vote: NodeId,
}

/// What a process says to an [`Envelope`] that was brought to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Receipt {
    /// It has got it.
    Ok,
    /// The sender is in that group no more.
    Removed,
    /// Here sits somebody else, who is in no group.
    Stranger {
        /// Who.
        node: NodeId,
    },
    /// Here sits somebody of another group.
    Foreign {
        /// Which.
        group: GroupId,
    },
}

/// Who somebody is: what is asked of, and answered by, a process at an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Its node.
    pub node: NodeId,
    /// The group that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
    /// Where it is reached.
    pub address: SocketAddrV4,
    /// If it is in no group: those with whom it is to found one, itself included.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub founders: Vec<SocketAddrV4>,
}

/// What one node says to another. The fields mean what they mean to the library;
/// those that a kind of message does not use are absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    kind: Kind,
    #[serde(default, skip_serializing_if = "is_zero")]
    term: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    log_term: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    index: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    entries: Vec<Record>,
    #[serde(default, skip_serializing_if = "is_zero")]
    commit: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    commit_term: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    request_snapshot: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    reject: bool,
    #[serde(default, skip_serializing_if = "is_zero")]
    reject_hint: u64,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    context: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) part: Option<Part>,
}

/// A part of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The place of the last entry that the snapshot holds.
    pub index: u64,
    /// And its term.
    pub term: u64,
    /// Where in the text this part begins, in bytes.
    pub offset: usize,
    /// The length of the whole text, in bytes.
    pub total: usize,
    /// The part.
    pub text: String,
}

/// The kinds of messages that travel. The library has others, for within a
/// process and for what is not used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    Append,
    Appended,
    Vote,
    Voted,
    PreVote,
    PreVoted,
    Heartbeat,
    HeartbeatSeen,
    Snapshot,
    TakeOver,
}

/// The kinds, as the library calls them.
const KINDS: [(Kind, MessageType); 10] = [
    (Kind::Append, MessageType::MsgAppend),
    (Kind::Appended, MessageType::MsgAppendResponse),
    (Kind::Vote, MessageType::MsgRequestVote),
    (Kind::Voted, MessageType::MsgRequestVoteResponse),
    (Kind::PreVote, MessageType::MsgRequestPreVote),
    (Kind::PreVoted, MessageType::MsgRequestPreVoteResponse),
    (Kind::Heartbeat, MessageType::MsgHeartbeat),
    (Kind::HeartbeatSeen, MessageType::MsgHeartbeatResponse),
    (Kind::Snapshot, MessageType::MsgSnapshot),
    (Kind::TakeOver, MessageType::MsgTimeoutNow),
];

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Message {
    /// The messages that stand for one of the library's; none for a kind that does
    /// not travel.
    pub(super) fn from_raft(message: &eraftpb::Message) -> Vec<Self> {
        let Some((kind, _)) = KINDS.iter().find(|(_, kind)| *kind == message.get_msg_type()) else {
            return Vec::new();
        };
        let whole = Self {
            kind: *kind,
            term: message.term,
            log_term: message.log_term,
            index: message.index,
            entries: message.get_entries().iter().map(Record::from_raft).collect(),
            commit: message.commit,
            commit_term: message.commit_term,
            request_snapshot: message.request_snapshot,
            reject: message.reject,
            reject_hint: message.reject_hint,
            context: String::from_utf8_lossy(&message.context).into_owned(),
            part: None,
        };
        if *kind != Kind::Snapshot {
            return vec![whole];
        }
        let snapshot = message.get_snapshot();
        let text = std::str::from_utf8(&snapshot.data).unwrap_or_default();
        let part = |(offset, piece): (usize, &str)| Part {
            index: snapshot.get_metadata().index,
            term: snapshot.get_metadata().term,
            offset,
            total: text.len(),
            text: piece.to_owned(),
        };
        let parts = pieces(text).into_iter().map(part);
        parts.map(|part| Self { part: Some(part), ..whole.clone() }).collect()
    }

    /// The library's message, from `from` to `to`, for a node whose log ends at
    /// `last_index`. A snapshot comes without its content.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn into_raft(
        self,
        from: NodeId,
        to: NodeId,
        last_index: u64,
    ) -> Result<eraftpb::Message, String> {
        let mut message = eraftpb::Message::default();
        let kind = KINDS.iter().find(|(kind, _)| *kind == self.kind);
        message.set_msg_type(kind.map(|(_, kind)| *kind).unwrap_or_default());
        if self.term == 0 {
            return Err("no term".into());
        }
        let mut before = (self.index, self.log_term);
        for record in &self.entries {
            let (index, term) = record.place();
            if index != before.0.wrapping_add(1) || term < before.1 || term > self.term {
                return Err(format!("entry {index} of term {term} after {before:?}"));
            }
            before = (index, term);
        }
        if self.kind == Kind::Appended && !self.reject && self.index > last_index {
            return Err(format!("it has {}, and the log ends at {last_index}", self.index));
        }
        message.from = from.0;
        message.to = to.0;
        message.term = self.term;
        message.log_term = self.log_term;
        message.index = self.index;
        let entries: Vec<_> = self.entries.into_iter().map(Record::into_raft).collect();
        message.set_entries(entries.into());
        message.commit = self.commit;
        message.commit_term = self.commit_term;
        message.request_snapshot = self.request_snapshot;
        message.reject = self.reject;
        message.reject_hint = self.reject_hint;
        message.context = self.context.into_bytes().into();
        Ok(message)
    }

    /// Up to which index it says that entries are committed which the receiver has
    /// acknowledged: its log must reach so far.
    pub(super) fn counts_upon(&self) -> u64 {
        if self.kind == Kind::Heartbeat { self.commit } else { 0 }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }
}

/// Cuts a text into pieces of at most [`PART_BYTES`], each with its place.
fn pieces(text: &str) -> Vec<(usize, &str)> {
    let mut pieces = Vec::new();
    let mut offset = 0;
    loop {
        let end = (offset + PART_BYTES).min(text.len());
        let end = (0..=end).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
        pieces.push((offset, &text[offset..end]));
        offset = end;
        if offset >= text.len() {
            return pieces;
        }
    }
}

/// Puts the parts of a snapshot together.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    place: (u64, u64),
    text: String,
}

impl Assembly {
    /// Takes a part; the whole text with the last one. A part that does not follow
    /// the one before is dropped, and so is what there was.
    pub(super) fn take(&mut self, part: Part) -> Option<String> {
        if part.offset == 0 {
            *self = Self { place: (part.index, part.term), text: String::new() };
        }
        let follows = self.place == (part.index, part.term) && self.text.len() == part.offset;
        if !follows || part.total > MAX_SNAPSHOT_BYTES {
            self.text.clear();
            return None;
        }
        self.text.push_str(&part.text);
        (self.text.len() == part.total).then(|| std::mem::take(&mut self.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_snapshot_travels_in_parts() {
        let text = "äöü".repeat(PART_BYTES / 4);
        let mut message = eraftpb::Message::default();
        message.set_msg_type(MessageType::MsgSnapshot);
        message.term = 3;
        message.mut_snapshot().set_data(text.clone().into_bytes().into());
        message.mut_snapshot().mut_metadata().index = 7;
        let parts = Message::from_raft(&message);
        assert_eq!(parts.len(), 2);
        let part = |index: usize| parts[index].part.clone().unwrap();
        let mut assembly = Assembly::default();
        assert_eq!(assembly.take(part(1)), None, "the second part alone");
        assert_eq!(assembly.take(part(0)), None);
        assert_eq!(assembly.take(part(1)), Some(text));
        assert_eq!(assembly.take(part(1)), None, "the second part again");
    }

    #[test]
    fn entries_with_a_gap_are_refused() {
        let text = r#"{"kind":"append","term":2,"index":4,"log_term":1,
            "entries":[{"index":5,"term":1},{"index":7,"term":1}]}"#;
        let message: Message = serde_json::from_str(text).unwrap();
        let (from, to) = (NodeId::drawn(1), NodeId::drawn(2));
        assert!(message.into_raft(from, to, 9).is_err());
    }
}
