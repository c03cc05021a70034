//! What the viewleader understands and answers.
//!
//! `heartbeat`, `query_servers`, `lock_get` and `lock_release` are the
//! original's, field by field. The fields and commands that are ours come on
//! top: an original server never sends them and never sees them answered.

use super::locks::{MAX_LOCK_NAME_BYTES, MAX_TTL_MS, MIN_TTL_MS, Manner};
use super::restoring::{BackupId, MAX_NUMBER, Numbers, Restore, Step};
use super::{Epoch, Revision, Start, Token, View};
use crate::consensus::requests::{GroupReply, NotLeader};
use crate::kv::ring::Point;
use crate::wire::{self, Identity, Refusal};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddrV4};
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
    /// Ours: a sign of life of one who holds a lock, or waits for it.
    LockKeep(LockKeep),
    /// Ours: who holds which lock, and who waits.
    LockList(LockList),
    /// A server is to leave once its data is elsewhere; ours.
    Drain(Drain),
    /// How far is the rebalancing? Ours.
    RebalanceStatus {},
    /// How is everybody? Ours.
    Status {},
    /// How far has the cluster counted? Ours, for a backup.
    Numbers {},
    /// A step of restoring the cluster from a backup; ours.
    Restore(Restore),
}

/// The arguments of `drain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// Where the server is reached.
    pub server: SocketAddrV4,
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
    /// Ours: which start of the server this is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// Ours: the starts before this one over the same disk, the latest ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lineage: Vec<Start>,
    /// Ours, from a server that joins: the identities under which what is on its
    /// disk was written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub formerly: Vec<Identity>,
    /// Ours, from a server that has just drawn its identity: the epoch in which it
    /// chose its place on the ring. If somebody has come or gone since, it is to
    /// choose again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen_in: Option<Epoch>,
    /// Ours: the server's disk has no room.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
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
    /// What the reporter has fetched from others since its last report.
    #[serde(default)]
    pub progress: Progress,
}

/// How far the data that a server needs has moved to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Keys that were fetched.
    pub keys: u64,
    /// Their bytes, keys and values.
    pub bytes: u64,
    /// Bytes of what is fetched that could not be done without: each key once,
    /// and none that was there already.
    pub needed: u64,
    /// Keys that are left to fetch, about.
    pub left: u64,
}

/// The arguments of `lock_get` and `lock_release`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockCall {
    /// The name of the lock.
    pub lockid: String,
    /// Who asks.
    pub requestor: Identity,
    /// Ours: drawn for this request, and the same when it is repeated because no
    /// answer came: then it is carried out once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<u64>,
    /// Ours: hold it together with others who share it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// Ours: for how long, in milliseconds, the lock or the place in its queue is
    /// kept without a sign of life; for ever without this, as the original does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
    /// Ours: for how long, in milliseconds, the answer may be held back until the
    /// lock is granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
}

impl LockCall {
    /// A call that is not repeated, for a lock that is held alone and for ever.
    pub fn new(lockid: String, requestor: Identity) -> Self {
        let (shared, ttl_ms, wait_ms) = (false, None, None);
        Self { lockid, requestor, request: None, shared, ttl_ms, wait_ms }
    }

    /// How the lock is to be held.
    pub fn manner(&self) -> Manner {
        let ttl_ms = self.ttl_ms.map(|ttl| ttl.clamp(MIN_TTL_MS, MAX_TTL_MS));
        Manner { shared: self.shared, ttl_ms }
    }
}

/// The arguments of `lock_keep`: a sign of life of one who holds a lock or waits
/// for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LockKeep {
    /// The name of the lock.
    pub lockid: String,
    /// Who holds it.
    pub requestor: Identity,
    /// The token of the grant; none while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
}

/// The arguments of `lock_list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LockList {
    /// Only locks behind this one, in the order of their names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
}

/// How many locks and places one reply to `lock_list` tells of, about.
pub const MAX_LISTED: usize = 5_000;

/// One lock, as `lock_list` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListedLock {
    /// Its name.
    pub lock: String,
    /// Who holds it.
    pub holders: Vec<ListedPlace>,
    /// Who waits for it, in order.
    pub waiting: Vec<ListedPlace>,
}

/// A place in the queue of a lock, as `lock_list` shows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListedPlace {
    /// Whose it is.
    pub requestor: Identity,
    /// The token of the grant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
    /// It is held, or to be held, together with others.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// How much longer it is kept without a sign of life, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_ms: Option<u64>,
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
                let at = heartbeat
                    .address
                    .unwrap_or(SocketAddrV4::new(Ipv4Addr::LOCALHOST, heartbeat.port));
                if heartbeat.port == 0 || at.port() == 0 || at.ip().is_unspecified() {
                    return Err(Refusal::invalid(
                        "heartbeat: nobody can be reached at port 0 or at 0.0.0.0",
                    ));
                }
                Self::Heartbeat(heartbeat)
            }
            "query_servers" => Self::QueryServers {},
            "query_view" => Self::QueryView(wire::arguments(&cmd, body)?),
            "report" => Self::Report(wire::arguments(&cmd, body)?),
            "lock_get" => Self::LockGet(lock_call(&cmd, body)?),
            "lock_release" => Self::LockRelease(lock_call(&cmd, body)?),
            "lock_keep" => Self::LockKeep(wire::arguments(&cmd, body)?),
            "lock_list" => Self::LockList(wire::arguments(&cmd, body)?),
            "rebalance_status" => Self::RebalanceStatus {},
            "status" => Self::Status {},
            "drain" => Self::Drain(wire::arguments(&cmd, body)?),
            "numbers" => Self::Numbers {},
            "restore" => Self::Restore(restore(&cmd, body)?),
            _ => {
                return Err(Refusal::invalid(format!(
                    "unknown command {cmd:?}: this is a viewleader; it knows heartbeat, \
                     query_servers, lock_get, lock_release, lock_keep, lock_list, query_view, \
                     report, status, rebalance_status, drain, numbers, restore"
                )));
            }
        })
    }
}

fn restore(cmd: &str, body: &[u8]) -> Result<Restore, Refusal> {
    let restore: Restore = wire::arguments(cmd, body)?;
    match restore.step {
        Step::Begin { above } if above > MAX_NUMBER => {
            Err(Refusal::invalid(format!("{cmd}: {above} is beyond all numbers")))
        }
        _ => Ok(restore),
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
        /// With `granted`: what tells this grant from all before it.
        #[serde(skip_serializing_if = "Option::is_none")]
        token: Option<Token>,
    },
    /// To `lock_list`.
    Locks {
        /// `ok`
        status: &'static str,
        /// The locks, by their names.
        locks: Vec<ListedLock>,
        /// Whether there are more behind the last one.
        more: bool,
    },
    /// To `rebalance_status`.
    Rebalance(RebalanceStatus),
    /// To `status`.
    Health(Health),
    /// To `numbers`.
    Numbers(NumbersAnswer),
    /// The request was not carried out.
    Refused(Refusal),
    /// Another viewleader is to be asked.
    NotLeader(NotLeader),
    /// To what viewleaders ask each other.
    Group(GroupReply),
}

/// How far a rebalancing is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RebalanceStatus {
    /// Always `ok`.
    pub status: Okay,
    /// The epoch by now.
    pub epoch: Epoch,
    /// Whether anything is left to move.
    pub moving: bool,
    /// How many arcs there are.
    pub arcs: usize,
    /// How many of them are where they belong.
    pub arcs_done: usize,
    /// Keys that have been moved by this rebalancing, or by the last one.
    pub keys_moved: u64,
    /// Their bytes.
    pub bytes_moved: u64,
    /// The bytes that could not be done without.
    pub bytes_needed: u64,
    /// Keys that are left to move, about.
    pub keys_left: u64,
    /// For how long, in milliseconds, it has been going on.
    pub elapsed_ms: u64,
    /// How much longer it will take, in milliseconds, going by what has been.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate_ms: Option<u64>,
}

/// The cluster at a glance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Always `ok`.
    pub status: Okay,
    /// The epoch by now.
    pub epoch: Epoch,
    /// The revision by now.
    pub revision: Revision,
    /// The servers, by their place on the ring.
    pub servers: Vec<ServerHealth>,
    /// How many arcs there are.
    pub arcs: usize,
    /// How many are complete: all of their target, and nobody else.
    pub complete: usize,
    /// The arcs with fewer ready replicas than they should have.
    pub short: Vec<ArcHealth>,
    /// The arcs that have enough ready replicas and are about to change.
    pub moving: Vec<ArcHealth>,
    /// The arcs that nobody can serve.
    pub lost: Vec<ArcHealth>,
    /// The backup that it is being restored from; until that is done it serves nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restoring: Option<BackupId>,
    /// The viewleaders, the one that leads and answers among them.
    #[serde(default)]
    pub viewleaders: Vec<ViewleaderHealth>,
}

/// One viewleader at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewleaderHealth {
    /// Where it is reached.
    pub address: SocketAddrV4,
    /// What it does in the group.
    pub role: Role,
    /// Whether the one that leads has heard from it lately.
    pub answers: bool,
    /// What is out of the ordinary.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What a viewleader does in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It leads.
    Leader,
    /// It has a vote.
    Follower,
    /// It has none yet: it is catching up.
    Learner,
}

/// One server at a glance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerHealth {
    /// Where it is reached.
    pub address: SocketAddrV4,
    /// Its place on the ring.
    pub hash: Point,
    /// How much longer its lease runs, in milliseconds.
    pub lease_left_ms: u64,
    /// Of how many arcs it is the primary.
    pub primary_of: usize,
    /// Of how many arcs it is a replica.
    pub replica_of: usize,
    /// What is out of the ordinary: `leaving`, `full`, `original`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// One arc at a glance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ArcHealth {
    /// Its first point, and the first one after it.
    pub arc: (Point, Point),
    /// How many replicas are ready.
    pub ready: usize,
    /// How many there should be.
    pub target: usize,
    /// The servers that it waits for: those that are to become ready, or, for a
    /// lost one, those that held it last.
    pub waits_for: Vec<SocketAddrV4>,
}

impl ViewReply {
    /// A reply of one word.
    pub fn status(status: &'static str) -> Self {
        Self::Status { status, position: None, token: None }
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
    /// Ours, to a server of ours: the revision by now. The server goes by no
    /// older view.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<Revision>,
    /// Ours, with `deny`: the server holds nothing that is not elsewhere. One that
    /// was told to leave may end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub free: bool,
    /// Ours, with `retry`: somebody has come or gone since the server chose its
    /// place on the ring. It is to choose again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub crowded: bool,
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

/// The answer to `numbers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumbersAnswer {
    /// Always `ok`.
    pub status: Okay,
    /// How far the cluster has counted.
    pub numbers: Numbers,
}

/// The word `ok`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Okay {
    /// `"ok"`
    Ok,
}
