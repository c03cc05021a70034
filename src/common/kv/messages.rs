//! What servers understand and answer.
//!
//! Three circles: [`Public`] for clients of both dialects, [`Op`] for what one
//! server passes on to the primary of a key, and [`Peer`] for what the replicas
//! of a group say to each other.

use super::content::{Fence, Objection};
use super::table::{Cursor, Page};
use super::{Entry, MAX_KEY_BYTES, MAX_VALUE_BYTES, Text, Version};
use crate::kv::ring::Point;
use crate::view::locks::MAX_LOCK_NAME_BYTES;
use crate::view::messages::Okay;
use crate::view::restoring::BackupId;
use crate::view::{Epoch, Revision};
use crate::wire::{self, Refusal};
use serde::{Deserialize, Serialize};
use std::net::SocketAddrV4;

/// How many keys one reply to `query_all_keys` lists at most when it is asked
/// for pages.
pub const MAX_KEYS_PAGE: usize = 10_000;

/// A request to a server.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Request {
    /// From a client.
    Public(Public),
    /// From a server that is not the primary of the key.
    Op(Op),
    /// From the primary of a group, or a replica that fetches.
    Peer(Peer),
}

/// What clients ask.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum Public {
    /// Print words on the server's output.
    Print(Print),
    /// Set a key in this server's own namespace, which is not replicated.
    Set(Set),
    /// The value in this server's own namespace, else the replicated one.
    Get(Get),
    /// Every key that this server holds.
    QueryAllKeys(QueryAllKeys),
    /// The original's vote on a replicated set.
    SetrRequest(Get),
    /// A replicated set; the commit, if this server has given its vote.
    Setr(Setr),
    /// The original's withdrawal of a vote.
    SetrDeny(Get),
    /// The replicated value, never this server's own.
    Getr(Get),
    /// Ours: deletes a replicated key.
    Delr(Delete),
    /// Ours, for a backup: what this server has as primary, a page at a time.
    Backup(Place),
    /// Ours, from a backup: a key of a cluster that is being restored.
    Load(Load),
}

/// The arguments of `print`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Print {
    /// The words.
    pub text: Vec<String>,
}

/// The arguments of `set`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Set {
    /// The key.
    pub key: Text,
    /// The value.
    pub val: Text,
}

/// The arguments of `get` and of others that name a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Get {
    /// The key.
    pub key: Text,
}

/// The arguments of `setr`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setr {
    /// The key.
    pub key: Text,
    /// The value.
    pub val: Text,
    /// Ours: no vote went before this. Without it, a `setr` at a server that has
    /// just voted for the key is taken for the original's commit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direct: bool,
    /// Ours: write only if the key is at this version; `0.0` is that of a key that
    /// there is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_version: Option<Version>,
    /// Ours: write only if the key has seen no newer token of this lock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<Fence>,
}

/// The arguments of `primary_set`: a write that may depend on something.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Write {
    /// The key.
    pub key: Text,
    /// The value.
    pub val: Text,
    /// As with [`Setr`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_version: Option<Version>,
    /// As with [`Setr`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<Fence>,
}

/// The arguments of `delr` and `primary_delete`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Delete {
    /// The key.
    pub key: Text,
    /// As with [`Setr`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_version: Option<Version>,
    /// As with [`Setr`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<Fence>,
}

/// The arguments of `query_all_keys`. The original has none; with either, the
/// reply is a page. Keys come in the order of their places on the ring.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QueryAllKeys {
    /// Ours: list only keys behind this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Text>,
    /// Ours: list at most this many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

/// A place on the way around the ring, from point 0 on: everything before it is done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The first point of which not everything is done.
    pub from: Point,
    /// Up to which of its keys it is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Text>,
}

/// The arguments of `load` and `primary_load`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// The backup from which the cluster is being restored.
    pub backup: BackupId,
    /// What was under the key. Its version is not taken over.
    pub entry: Entry,
}

/// What a server passes on to the primary of a key.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum Op {
    /// Read the key.
    PrimaryGet(Get),
    /// Write the key.
    PrimarySet(Write),
    /// Delete the key.
    PrimaryDelete(Delete),
    /// Write the key as it is in a backup.
    PrimaryLoad(Load),
    /// A vote of the original's kind.
    PrimaryVote(Vote),
    /// The commit that follows such a vote.
    PrimaryCommit(Commit),
    /// The withdrawal of such a vote.
    PrimaryDeny(Vote),
}

/// A vote, or its withdrawal, as it came to the server `via`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vote {
    /// The key.
    pub key: Text,
    /// The server that was asked.
    pub via: SocketAddrV4,
}

/// A commit, as it came to the server `via`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    /// The key.
    pub key: Text,
    /// The value.
    pub val: Text,
    /// The server that was asked.
    pub via: SocketAddrV4,
}

impl Op {
    /// Whether it is answered only once other servers have answered.
    pub fn is_write(&self) -> bool {
        match self {
            Self::PrimarySet(_)
            | Self::PrimaryDelete(_)
            | Self::PrimaryLoad(_)
            | Self::PrimaryCommit(_) => true,
            Self::PrimaryGet(_) | Self::PrimaryVote(_) | Self::PrimaryDeny(_) => false,
        }
    }

    /// The key that it is about.
    pub fn key(&self) -> &Text {
        match self {
            Self::PrimaryGet(get) => &get.key,
            Self::PrimarySet(write) => &write.key,
            Self::PrimaryDelete(delete) => &delete.key,
            Self::PrimaryLoad(load) => &load.entry.key,
            Self::PrimaryVote(vote) | Self::PrimaryDeny(vote) => &vote.key,
            Self::PrimaryCommit(commit) => &commit.key,
        }
    }
}

/// What replicas of one group say to each other. `start` names the arc and
/// `version` the version of its group; a receiver that is not in that version
/// answers [`Answer::Behind`] or [`Answer::Stale`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum Peer {
    /// The primary asks a replica to follow this version, and what it holds
    /// prepared that it does not know to be committed.
    Establish(InGroup),
    /// The primary has entries to be prepared.
    Prepare(Prepare),
    /// A replica that is not ready asks for committed entries.
    Fetch(Fetch),
}

/// The arguments of `establish`: one version of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InGroup {
    /// Where the arc starts.
    pub start: Point,
    /// The version of the group.
    pub version: Revision,
}

/// The arguments of `prepare`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prepare {
    /// Where the arc starts.
    pub start: Point,
    /// The version of the group.
    pub version: Revision,
    /// Every entry of the arc up to this version is committed.
    pub committed: Version,
    /// Every replica knows that everything up to this version is committed:
    /// deletions up to it may be forgotten.
    #[serde(default)]
    pub settled: Version,
    /// The entries; none when there is only news of what is committed.
    pub entries: Vec<Entry>,
}

/// The arguments of `fetch`: what is there in a stretch of the arc that the
/// caller has not?
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fetch {
    /// Where the arc starts.
    pub start: Point,
    /// The version of the group.
    pub version: Revision,
    /// Where the page before this one ended; from the beginning without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Cursor>,
    /// Where the stretch ends; at the end of the arc without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Cursor>,
    /// What the caller has of the stretch, from its disk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<(Text, Version)>,
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// A [`Refusal`] that says what is wrong with it.
    pub fn decode(body: &[u8]) -> Result<Self, Refusal> {
        let cmd = wire::command_of(body)?;
        let cmd = cmd.as_ref();
        let request = match cmd {
            "get" => Self::Public(Public::Get(wire::arguments(cmd, body)?)),
            "getr" => Self::Public(Public::Getr(wire::arguments(cmd, body)?)),
            "setr" => Self::Public(Public::Setr(wire::arguments(cmd, body)?)),
            "set" => Self::Public(Public::Set(wire::arguments(cmd, body)?)),
            "print" => Self::Public(Public::Print(wire::arguments(cmd, body)?)),
            "query_all_keys" => Self::Public(Public::QueryAllKeys(wire::arguments(cmd, body)?)),
            "delr" => Self::Public(Public::Delr(wire::arguments(cmd, body)?)),
            "backup" => Self::Public(Public::Backup(wire::arguments(cmd, body)?)),
            "load" => Self::Public(Public::Load(wire::arguments(cmd, body)?)),
            "setr_request" => Self::Public(Public::SetrRequest(wire::arguments(cmd, body)?)),
            "setr_deny" => Self::Public(Public::SetrDeny(wire::arguments(cmd, body)?)),
            "prepare" => Self::Peer(Peer::Prepare(wire::arguments(cmd, body)?)),
            "establish" => Self::Peer(Peer::Establish(wire::arguments(cmd, body)?)),
            "fetch" => Self::Peer(Peer::Fetch(wire::arguments(cmd, body)?)),
            "primary_get" => Self::Op(Op::PrimaryGet(wire::arguments(cmd, body)?)),
            "primary_set" => Self::Op(Op::PrimarySet(wire::arguments(cmd, body)?)),
            "primary_delete" => Self::Op(Op::PrimaryDelete(wire::arguments(cmd, body)?)),
            "primary_load" => Self::Op(Op::PrimaryLoad(wire::arguments(cmd, body)?)),
            "primary_vote" => Self::Op(Op::PrimaryVote(wire::arguments(cmd, body)?)),
            "primary_commit" => Self::Op(Op::PrimaryCommit(wire::arguments(cmd, body)?)),
            "primary_deny" => Self::Op(Op::PrimaryDeny(wire::arguments(cmd, body)?)),
            _ => {
                return Err(Refusal::invalid(format!(
                    "unknown command {cmd:?}: this is a server; it knows print, set, get, setr, \
                     getr, delr, query_all_keys, setr_request, setr_deny, backup, load"
                )));
            }
        };
        request.check()?;
        Ok(request)
    }

    fn fence(&self) -> Option<&Fence> {
        match self {
            Self::Public(Public::Setr(setr)) => setr.fence.as_ref(),
            Self::Public(Public::Delr(delete)) | Self::Op(Op::PrimaryDelete(delete)) => {
                delete.fence.as_ref()
            }
            Self::Op(Op::PrimarySet(write)) => write.fence.as_ref(),
            _ => None,
        }
    }

    /// Refuses keys and values over the limits, and versions that no primary
    /// gives.
    fn check(&self) -> Result<(), Refusal> {
        if let Self::Peer(Peer::Prepare(prepare)) = self
            && prepare.entries.iter().any(|entry| entry.version.number == 0)
        {
            return Err(Refusal::invalid("prepare: the versions of entries count from 1"));
        }
        let (key, value) = match self {
            Self::Public(Public::Set(Set { key, val }) | Public::Setr(Setr { key, val, .. }))
            | Self::Op(
                Op::PrimarySet(Write { key, val, .. }) | Op::PrimaryCommit(Commit { key, val, .. }),
            ) => (key.len(), val.len()),
            Self::Public(Public::Delr(delete)) => (delete.key.len(), 0),
            Self::Public(Public::Load(Load { entry, .. }))
            | Self::Op(Op::PrimaryLoad(Load { entry, .. })) => {
                let value = entry.content.value.as_ref();
                (entry.key.len(), value.map_or(0, |value| value.len()))
            }
            Self::Public(
                Public::Get(get)
                | Public::Getr(get)
                | Public::SetrRequest(get)
                | Public::SetrDeny(get),
            ) => (get.key.len(), 0),
            Self::Public(Public::Print(_) | Public::QueryAllKeys(_) | Public::Backup(_))
            | Self::Peer(_) => (0, 0),
            Self::Op(op) => (op.key().len(), 0),
        };
        if key > MAX_KEY_BYTES {
            return Err(Refusal::invalid(format!(
                "a key of {key} bytes is over the limit of {MAX_KEY_BYTES} bytes"
            )));
        }
        if let Some(fence) = self.fence()
            && fence.lock.len() > MAX_LOCK_NAME_BYTES
        {
            return Err(Refusal::invalid(format!(
                "the name of a lock of {} bytes is over the limit of {MAX_LOCK_NAME_BYTES} bytes",
                fence.lock.len()
            )));
        }
        if value > MAX_VALUE_BYTES {
            return Err(Refusal::invalid(format!(
                "a value of {value} bytes is over the limit of {MAX_VALUE_BYTES} bytes"
            )));
        }
        Ok(())
    }
}

/// A reply of a server.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Reply {
    /// The value of a key.
    Value {
        /// `ok`
        status: &'static str,
        /// The value.
        value: Text,
        /// Which write it was; only for `getr`.
        #[serde(skip_serializing_if = "Option::is_none")]
        version: Option<Version>,
    },
    /// A word: `ok` or `not_found`.
    Status {
        /// The word.
        status: &'static str,
        /// Which write it became; only for `setr`.
        #[serde(skip_serializing_if = "Option::is_none")]
        version: Option<Version>,
    },
    /// To `query_all_keys`.
    Keys {
        /// The keys, in the order of the ring.
        result: Vec<Text>,
        /// Whether there are more; only when a page was asked for.
        #[serde(skip_serializing_if = "Option::is_none")]
        more: Option<bool>,
    },
    /// To `backup`.
    Backup(BackupPage),
    /// To `setr_request`, yes.
    Voted {
        /// `ok`
        reply: &'static str,
        /// The epoch that the server knows.
        epoch: Epoch,
    },
    /// To `setr_request`, no.
    VoteRefused {
        /// `no`
        reply: &'static str,
    },
    /// To the original's commit and withdrawal: `{}`.
    Empty {},
    /// To another server.
    Peer(Answer),
    /// The request was not carried out.
    Refused(Refusal),
}

/// The answer to `backup`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BackupPage {
    /// Always `ok`.
    pub status: Okay,
    /// What was committed when this was asked, up the ring from the place that was
    /// asked for.
    pub entries: Vec<Entry>,
    /// Where to go on, at whoever is the primary there; nothing at the end of the ring.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Place>,
}

/// What servers answer each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// The value that was asked for.
    Value {
        /// Which write it was.
        version: Version,
        /// The value.
        value: Text,
    },
    /// There is no such key.
    Absent {},
    /// The write is committed.
    Done {
        /// Which write it became.
        version: Version,
    },
    /// What became of a vote or its withdrawal.
    Vote {
        /// Whether it was granted, or withdrawn.
        ok: bool,
        /// The primary's epoch.
        epoch: Epoch,
    },
    /// Nothing was written, since something that the write depends on is not so.
    Refused(Objection),
    /// A commit whose vote is gone: nothing was written.
    NoVote {},
    /// Nothing was done: not the primary of that key, or not serving yet.
    NotPrimary {},
    /// Nothing was written: this server, which holds the key, has a full disk.
    Full {
        /// Where it is.
        server: Option<SocketAddrV4>,
    },
    /// Nothing was done: the cluster is being restored from a backup.
    Restoring {},
    /// Nothing was loaded: the cluster is not being restored from that backup.
    NotLoading {},
    /// It may or may not be committed.
    Unknown {},
    /// The replica follows the version.
    Follows {
        /// What it holds prepared and does not know to be committed.
        prepared: Vec<Entry>,
    },
    /// The entries are prepared.
    Prepared {},
    /// The receiver does not know that version yet.
    Behind {},
    /// The receiver knows a newer version, or is not in the group.
    Stale {},
    /// What the caller lacks.
    Page {
        /// As much of it as fits.
        page: Page,
        /// How many keys are left, about.
        left: u64,
        /// Everything up to this version is committed, and is in a page or was
        /// prepared.
        committed: Version,
    },
}
