//! What the viewleader understands and answers.
//!
//! `heartbeat`, `query_servers`, `lock_get` and `lock_release` are the
//! original's, field by field. The fields and commands that are ours come on
//! top: an original server never sends them and never sees them answered.

use super::locks::MAX_LOCK_NAME_BYTES;
use super::{Epoch, Revision, View};
use crate::kv::ring::Point;
use crate::wire::{self, Identity, Refusal};
use serde::{Deserialize, Serialize};
use std::net::SocketAddrV4;
use std::sync;

/// A request to the viewleader.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum ViewRequest {
    /// A server is alive and wants its lease renewed.
    Heartbeat(Heartbeat),
    /// Who is there? The original's list of addresses and hashes.
    QueryServers {},
    /// The whole view, with its groups; ours.
    QueryView(QueryView),
    /// A server tells how far its groups are; ours.
    Report(Report),
    /// A requestor asks for a lock, for the first time or again.
    LockGet(LockCall),
    /// A requestor gives a lock back or leaves its queue.
    LockRelease(LockCall),
}

/// The arguments of `heartbeat`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Where the server listens; its host is the sender's, unless it says
    /// otherwise with `address`.
    pub port: u16,
    /// Who the server is.
    pub requestor: Identity,
    /// Ours: where others can reach the server. Without it, the viewleader
    /// takes the address it sees, as the original does, and a server on its own
    /// host is then 127.0.0.1 to everyone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddrV4>,
    /// Ours: how long a lease the server wants, in milliseconds. Its presence
    /// says that the server speaks our dialect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_ms: Option<u64>,
    /// Ours: the newest revision that the server has seen. A viewleader that
    /// never came that far has lost its state, or is not the server's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<Revision>,
}

/// The arguments of `query_view`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QueryView {
    /// Answer once the revision is beyond this one, at once without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Revision>,
    /// Answer after this many milliseconds at the latest, with whatever the
    /// view is then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
}

/// The arguments of `report`: groups by the start of their arc and the version
/// that the statement holds for. One about an older version is ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Who reports.
    pub requestor: Identity,
    /// Here the reporter holds every committed entry.
    #[serde(default)]
    pub ready: Vec<(Point, Revision)>,
    /// Here the reporter is the primary, and every replica follows the version.
    #[serde(default)]
    pub established: Vec<(Point, Revision)>,
}

/// The arguments of `lock_get` and `lock_release`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockCall {
    /// The name of the lock.
    pub lockid: String,
    /// Who asks.
    pub requestor: Identity,
}

impl ViewRequest {
    /// Reads a request.
    ///
    /// # Errors
    /// A [`Refusal`] that says what is wrong with it.
    pub fn decode(body: &[u8]) -> Result<Self, Refusal> {
        let cmd = wire::command_of(body)?;
        Ok(match cmd.as_ref() {
            "heartbeat" => {
                let heartbeat: Heartbeat = wire::arguments(&cmd, body)?;
                if heartbeat.port == 0 {
                    return Err(Refusal::invalid("heartbeat: a server can't be reached at port 0"));
                }
                Self::Heartbeat(heartbeat)
            }
            "query_servers" => Self::QueryServers {},
            "query_view" => Self::QueryView(wire::arguments(&cmd, body)?),
            "report" => Self::Report(wire::arguments(&cmd, body)?),
            "lock_get" => Self::LockGet(lock_call(&cmd, body)?),
            "lock_release" => Self::LockRelease(lock_call(&cmd, body)?),
            _ => {
                return Err(Refusal::invalid(format!(
                    "unknown command {cmd:?}: this is a viewleader; it knows heartbeat, \
                     query_servers, query_view, report, lock_get, lock_release"
                )));
            }
        })
    }
}

fn lock_call(cmd: &str, body: &[u8]) -> Result<LockCall, Refusal> {
    let call: LockCall = wire::arguments(cmd, body)?;
    if call.lockid.len() > MAX_LOCK_NAME_BYTES {
        return Err(Refusal::invalid(format!(
            "{cmd}: a name of {} bytes is over the limit of {MAX_LOCK_NAME_BYTES}",
            call.lockid.len()
        )));
    }
    Ok(call)
}

/// A reply of the viewleader.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum ViewReply {
    /// To `heartbeat`: the lease is renewed, or not and why.
    Heartbeat(HeartbeatReply),
    /// To `query_servers`.
    Servers {
        /// Address and hash of each server, by hash.
        result: Vec<(SocketAddrV4, Point)>,
        /// The epoch in which this holds.
        epoch: Epoch,
    },
    /// To `query_view`.
    View(ViewAnswer),
    /// To `report`, `lock_get`, `lock_release`: a word.
    Status {
        /// `ok`, `granted`, `retry` or `unknown`.
        status: &'static str,
        /// With `retry`: how many are before the requestor, the holder included.
        #[serde(skip_serializing_if = "Option::is_none")]
        position: Option<usize>,
    },
    /// The request was not carried out.
    Refused(Refusal),
}

impl ViewReply {
    /// A reply of one word.
    pub fn status(status: &'static str) -> Self {
        Self::Status { status, position: None }
    }
}

/// The answer to `heartbeat`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatReply {
    /// Whether the lease is renewed.
    pub status: Beat,
    /// The epoch; missing with `deny`, as in the original.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
    /// Ours, to a server of ours: how long the lease is that was granted. It
    /// runs from the moment at which the heartbeat was sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_ms: Option<u64>,
}

/// What a heartbeat brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Beat {
    /// The lease is renewed.
    Ok,
    /// The lease of this identity has run out: it is denied for good.
    Deny,
    /// Another identity holds a live lease on this address.
    Retry,
}

/// The answer to `query_view`: `{"status":"ok",...}` and the view.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ViewAnswer {
    /// Always `ok`; what tells this reply from an original's.
    pub status: Okay,
    /// The view, shared by all who asked for it.
    pub view: sync::Arc<View>,
}

/// The word `ok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Okay {
    /// `"ok"`
    Ok,
}
