//! A server as a machine.
//!
//! It keeps a lease with the viewleader and follows its view (`membership`),
//! answers clients and passes on what another server is primary for
//! (`requests`), and replicates what it is primary for (`replication`); `backup` is for
//! backups.
//!
//! # One client's operation
//! An operation that can't be answered at once becomes an [`OpId`] with a
//! deadline. It is *parked* while nobody can carry it out (no view yet, no
//! primary, a primary that is not serving yet), *forwarded* while another server
//! has it, or *writing* while replicas prepare it. A parked one is tried again
//! when the view changes and every [`RETRY`]. What the deadline finds parked was
//! never begun, so it is `unavailable`; a write that it finds forwarded or
//! writing has an unknown outcome.

mod backup;
mod fetch;
mod inspect;
mod membership;
mod replication;
mod requests;
mod storage;

use super::disk::{Person, Record, Recovered};
use super::marks::Marks;
use super::messages::{Answer, InGroup, Op, Reply, Request};
use super::replica::Replica;
use super::ring::{Arc, Point};
use super::table::{Cursor, Table};
use super::{MAX_BATCH_BYTES, Text, Version};
use crate::machine::{Machine, Time};
use crate::view::messages::{Heartbeat, HeartbeatReply, Progress, QueryView, Report};
use crate::view::{Epoch, Revision, View};
use crate::wire::{Identity, Refusal};
use fetch::Asked;
use rand::rngs::StdRng;
use replication::Sent;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddrV4;
use std::sync;
use std::time::Duration;

/// How long a lease a server asks for, unless told otherwise.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(4);

/// How many bytes a second a server fetches at most when data moves, unless told
/// otherwise.
pub const DEFAULT_FETCH_RATE: u64 = 100 * 1024 * 1024;

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
    /// What was to be kept up to this batch is on the disk.
    Stored {
        /// The number of the last batch.
        batch: u64,
    },
    /// The disk has room for more, or has not.
    Room(bool),
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
    View(Result<sync::Arc<View>, ViewError>),
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

/// What a server asks for. Calls to one server are to be sent in their order,
/// and batches stored in theirs.
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
    /// Keep these, all or none, and say so with [`Input::Stored`].
    Store {
        /// The number of the batch.
        batch: u64,
        /// What to keep.
        records: Vec<Record>,
    },
    /// This server has left the cluster, as it was told to: end.
    End,
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
    Prepare { group: InGroup, fellow: usize, versions: Vec<Version>, committed: Version },
    Fetch { start: Point, since: Revision, held: Vec<(Text, Version)>, until: Option<Cursor> },
}

/// What waits until a batch is stored.
#[derive(Debug)]
enum Then<T> {
    /// Answer another server.
    Answer { to: T, answer: Answer },
    /// Count this server's own copy of a pending entry.
    Own { point: Point, version: Version },
    /// Everything in this arc has been fetched.
    Fetched { arc: Arc, since: Revision },
    /// The disk knows that it has.
    Sealed { arc: Arc, since: Revision },
    /// The identity may be told.
    Person,
}

/// How much one message between servers holds at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Bytes of keys and values, before JSON; [`MAX_BATCH_BYTES`] at most. One entry
    /// may exceed it on its own.
    pub bytes: usize,
    /// How many keys a replica names of those that it has already, in one question.
    pub held: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self { bytes: MAX_BATCH_BYTES, held: 1000 }
    }
}

/// What a server is started with.
#[derive(Debug)]
pub struct Settings {
    /// Where others reach it.
    pub address: SocketAddrV4,
    /// How long a lease it asks for.
    pub lease: Duration,
    /// How many bytes a second it fetches at most when data moves.
    pub fetch_rate: u64,
    /// Whether everything is synced before it is acknowledged.
    pub synced: bool,
    /// What tells this start from others over copies of the same disk.
    pub drawn: u64,
    /// How much it puts into one message.
    pub batch: Batch,
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
    settings: Settings,
    rng: StdRng,
    /// Who it is, once its disk knows it, too.
    id: Option<Identity>,
    person: Person,
    /// What is to be kept, gathered during one step.
    records: Vec<Record>,
    last_batch: u64,
    stored_batch: u64,
    /// What waits for a batch, in order.
    awaited: VecDeque<(u64, Then<T>)>,
    /// No view older than this is followed: the viewleader has told of it.
    not_before: Revision,
    has_room: bool,
    /// No page is asked for before.
    fetch_at: Time,
    /// What it has fetched from others so far; what of it the viewleader knows, and
    /// what the report that is under way tells.
    moved: Progress,
    told: Progress,
    telling: Progress,
    following: Following,
    /// In which epoch it chose its place on the ring, until it has joined there, and
    /// how often it has chosen.
    chosen_in: Option<Epoch>,
    choices: u32,
    /// The viewleader has taken it in under its present identity.
    joined: bool,
    /// It has been told to leave once it holds nothing.
    leaving: bool,
    agenda: Agenda,
    beat_sent: Time,
    leased_until: Time,
    view: sync::Arc<View>,
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
    /// A server that goes on with what its disk holds, and draws its identity
    /// from `rng` if it has none.
    pub fn new(settings: Settings, recovered: Recovered, rng: StdRng) -> Self {
        let now = Some(Time::default());
        let mut server = Self {
            settings,
            rng,
            id: None,
            person: Person::default(),
            records: Vec::new(),
            last_batch: 0,
            stored_batch: 0,
            awaited: VecDeque::new(),
            not_before: Revision(0),
            has_room: true,
            fetch_at: Time::default(),
            moved: Progress::default(),
            told: Progress::default(),
            telling: Progress::default(),
            following: Following::Nobody,
            chosen_in: None,
            choices: 0,
            joined: false,
            leaving: false,
            agenda: Agenda { beat: None, view: now, report: None },
            beat_sent: Time::default(),
            leased_until: Time::default(),
            view: sync::Arc::default(),
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
        };
        server.recover(recovered);
        server
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
            self.fetch_missing(now, out);
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
                Request::Peer(request) => self.peer(from, request, out),
            },
            Input::Answered { call, result } => match self.calls.remove(&call) {
                None => {}
                Some(Purpose::Operation(id)) => self.operation_answered(now, id, call, result, out),
                Some(Purpose::Establish { group, fellow }) => {
                    self.establish_answered(now, group, fellow, result, out);
                }
                Some(Purpose::Prepare { group, fellow, versions, committed }) => {
                    let sent = Sent { group, fellow, versions, committed };
                    self.prepare_answered(now, sent, result, out);
                }
                Some(Purpose::Fetch { start, since, held, until }) => {
                    let asked = Asked { start, since, held, until };
                    self.fetch_answered(now, asked, result, out);
                }
            },
            Input::FromView(news) => self.news(now, news, out),
            Input::Stored { batch } => self.stored(now, batch, out),
            Input::Room(room) => self.has_room = room,
            Input::Tick => self.tick(now, out),
        }
        self.store(now, out);
    }
}
