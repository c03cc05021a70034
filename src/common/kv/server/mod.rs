//! A server as a machine.
//!
//! It keeps a lease with the viewleader and follows its view (`membership`),
//! answers clients and passes on what another server is primary for
//! (`requests`), and replicates what it is primary for (`replication`).
//!
//! # One client's operation
//! An operation that can't be answered at once becomes an [`OpId`] with a
//! deadline. It is *parked* while nobody can carry it out (no view yet, no
//! primary, a primary that is not serving yet), *forwarded* while another server
//! has it, or *writing* while replicas prepare it. A parked one is tried again
//! when the view changes and every [`RETRY`]. What the deadline finds parked was
//! never begun, so it is `unavailable`; a write that it finds forwarded or
//! writing has an unknown outcome.

mod membership;
mod replication;
mod requests;

use super::marks::Marks;
use super::messages::{Answer, InGroup, Op, Reply, Request};
use super::replica::Replica;
use super::ring::Point;
use super::table::Table;
use super::{Text, Version};
use crate::machine::{Machine, Time};
use crate::view::messages::{Heartbeat, HeartbeatReply, QueryView, Report};
use crate::view::{Epoch, View};
use crate::wire::{Identity, Refusal};
use rand::rngs::StdRng;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::Duration;

/// How long a lease a server asks for, unless told otherwise.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(4);

/// How many heartbeats a server sends in one lease.
pub const BEATS_PER_LEASE: u32 = 4;

// Two may be lost and the lease still holds.
const _: () = assert!(BEATS_PER_LEASE > 3);

/// How soon something that may succeed later is tried again.
pub const RETRY: Duration = Duration::from_millis(20);

/// How soon the replicas are told what is committed when there is nothing else
/// to tell them.
pub const TELL: Duration = Duration::from_millis(50);

/// How long a client's operation is tried. Longer than a lease, so that the
/// failure of one server is ridden out.
pub const PATIENCE: Duration = Duration::from_secs(8);

/// How long the viewleader may hold back the answer to "what is new?".
pub const WATCH: Duration = Duration::from_secs(10);

/// How many operations can be under way at one server.
pub const MAX_OPS: usize = 50_000;

/// Names an operation of a client at one server. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OpId(u64);

/// Names a call to another server. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CallId(u64);

/// What can happen to a server. `T` names a request to its shell.
#[derive(Debug)]
pub enum Input<T> {
    /// A request has come.
    Request {
        /// To be given back with the reply.
        from: T,
        /// What is asked.
        request: Request,
    },
    /// A call to another server has ended.
    Answered {
        /// Which call.
        call: CallId,
        /// What came of it.
        result: Result<Answer, CallError>,
    },
    /// A call to the viewleader has ended.
    FromView(ViewNews),
    /// Time has passed.
    Tick,
}

/// Why a call to another server brought no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    /// It was not sent, or it was refused before anything was done.
    NotSent,
    /// It was sent and the answer did not come.
    Lost,
}

/// What came of a call to the viewleader.
#[derive(Debug)]
pub enum ViewNews {
    /// The answer to a heartbeat.
    Beat(Result<HeartbeatReply, ViewError>),
    /// The answer to the question for the view.
    View(Result<Arc<View>, ViewError>),
    /// A report has arrived, or not.
    Report(Result<(), ViewError>),
}

/// Why a call to the viewleader brought no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ViewError {
    /// Nobody there.
    Lost,
    /// The viewleader does not do this, or not now.
    Refused(Refusal),
}

/// A call to the viewleader. One of each kind is under way at most.
#[derive(Clone, Debug, PartialEq)]
pub enum ViewCall {
    /// Renew the lease.
    Beat(Heartbeat),
    /// Tell the view once it is news.
    View(QueryView),
    /// Tell how far the groups are.
    Report(Report),
}

/// What a server asks for. Calls to one server are to be sent in their order.
#[derive(Debug)]
pub enum Effect<T> {
    /// Answer the request `to`.
    Reply {
        /// Which request.
        to: T,
        /// The answer.
        reply: Reply,
    },
    /// Close the connection of the request `to` without an answer to it.
    Close {
        /// Which request.
        to: T,
    },
    /// Call another server.
    Call {
        /// Where it listens.
        to: SocketAddrV4,
        /// To be given back with the result.
        call: CallId,
        /// What to say.
        request: Request,
    },
    /// Call the viewleader.
    CallView(ViewCall),
    /// Print a line on the standard output.
    Print(String),
    /// Something worth a line in the log.
    Note(String),
}

type Effects<T> = Vec<Effect<T>>;

/// How the outcome of an operation is told to whoever asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    /// `get`: a value without its version.
    Get,
    /// `getr` and `setr`.
    Own,
    /// The original's vote, commit and withdrawal.
    Original,
    /// Another server has passed the operation on.
    Server,
}

/// Where an operation stands.
#[derive(Debug)]
enum Stage {
    Parked,
    Forwarded { call: CallId, primary: SocketAddrV4 },
    Writing,
}

#[derive(Debug)]
struct Operation<T> {
    from: T,
    style: Style,
    op: Op,
    stage: Stage,
    deadline: Time,
}

/// What a call to another server was for.
#[derive(Debug)]
enum Purpose {
    Operation(OpId),
    Establish { group: InGroup, fellow: usize },
    Prepare { group: InGroup, fellow: usize, versions: Vec<Version> },
    Fetch { group: InGroup },
}

/// Which kind of viewleader this server follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Following {
    /// None has answered yet.
    Nobody,
    /// One of ours.
    Ringleader,
    /// The original's: no groups, each server on its own.
    Original(Epoch),
}

/// When the next call of each kind to the viewleader is due; `None` while one
/// is under way.
#[derive(Debug)]
struct Agenda {
    beat: Option<Time>,
    view: Option<Time>,
    report: Option<Time>,
}

/// A server.
#[derive(Debug)]
pub struct Server<T> {
    /// Where others reach it.
    address: SocketAddrV4,
    lease: Duration,
    rng: StdRng,
    /// Chosen when the first view is known.
    id: Option<Identity>,
    following: Following,
    agenda: Agenda,
    beat_sent: Time,
    leased_until: Time,
    view: Arc<View>,
    /// This server's own namespace, by place and key.
    local: BTreeMap<(Point, Text), Text>,
    table: Table,
    /// Its part in each of its groups, by the start of the arc.
    replicas: BTreeMap<Point, Replica>,
    marks: Marks,
    /// The keys for which this server has given its vote to an original client,
    /// and until when a `setr` without more is taken for its commit.
    voted: BTreeMap<Text, Time>,
    operations: BTreeMap<OpId, Operation<T>>,
    parked: BTreeSet<OpId>,
    retry_at: Time,
    calls: BTreeMap<CallId, Purpose>,
    last_op: OpId,
    last_call: CallId,
}

impl<T> Server<T> {
    /// A server that others reach at `address`, asks for leases of this length,
    /// and draws its identity from `rng`.
    pub fn new(address: SocketAddrV4, lease: Duration, rng: StdRng) -> Self {
        let now = Some(Time::default());
        Self {
            address,
            lease,
            rng,
            id: None,
            following: Following::Nobody,
            agenda: Agenda { beat: None, view: now, report: None },
            beat_sent: Time::default(),
            leased_until: Time::default(),
            view: Arc::default(),
            local: BTreeMap::new(),
            table: Table::default(),
            replicas: BTreeMap::new(),
            marks: Marks::default(),
            voted: BTreeMap::new(),
            operations: BTreeMap::new(),
            parked: BTreeSet::new(),
            retry_at: Time::default(),
            calls: BTreeMap::new(),
            last_op: OpId(0),
            last_call: CallId(0),
        }
    }

    fn call(
        &mut self,
        to: SocketAddrV4,
        request: Request,
        purpose: Purpose,
        out: &mut Effects<T>,
    ) -> CallId {
        self.last_call.0 += 1;
        self.calls.insert(self.last_call, purpose);
        out.push(Effect::Call { to, call: self.last_call, request });
        self.last_call
    }

    fn epoch(&self) -> Epoch {
        match self.following {
            Following::Original(epoch) => epoch,
            _ => self.view.epoch,
        }
    }

    fn tick(&mut self, now: Time, out: &mut Effects<T>) {
        self.call_viewleader(now, out);
        self.end_overdue(now, out);
        if now >= self.retry_at {
            self.retry_at = now + RETRY;
            self.remind_fellows(now, out);
            self.fetch_missing(out);
            self.retry_parked(now, out);
        }
    }
}

impl<T> Machine for Server<T> {
    type Input = Input<T>;
    type Effect = Effect<T>;

    fn step(&mut self, now: Time, input: Input<T>, out: &mut Effects<T>) {
        match input {
            Input::Request { from, request } => match request {
                Request::Public(request) => self.public(now, from, request, out),
                Request::Op(op) => self.begin(now, from, Style::Server, op, out),
                Request::Peer(request) => {
                    let reply = Reply::Peer(self.peer(request, out));
                    out.push(Effect::Reply { to: from, reply });
                }
            },
            Input::Answered { call, result } => match self.calls.remove(&call) {
                None => {}
                Some(Purpose::Operation(id)) => self.operation_answered(now, id, call, result, out),
                Some(Purpose::Establish { group, fellow }) => {
                    self.establish_answered(now, group, fellow, result, out);
                }
                Some(Purpose::Prepare { group, fellow, versions }) => {
                    self.prepare_answered(now, group, fellow, &versions, result, out);
                }
                Some(Purpose::Fetch { group }) => self.fetch_answered(now, group, result, out),
            },
            Input::FromView(news) => self.news(now, news, out),
            Input::Tick => self.tick(now, out),
        }
    }
}
