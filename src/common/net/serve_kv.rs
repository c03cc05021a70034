//! The shell of a server.

use super::call::{self, CallFailure, Company, Walked, Walker};
use super::clock::Clock;
use super::connection::{Asked, Class, Service, Ticket};
use super::daemon;
use super::journal::Journal;
use super::links::{self, Dialect, Lane, Link, Links};
use super::threads;
use crate::kv::MAX_VALUE_BYTES;
use crate::kv::disk::{self, Record};
use crate::kv::messages::{Answer, Public, Reply, Request};
use crate::kv::server::{
    BEATS_PER_LEASE, CallError, CallId, Effect, Input, Server, Settings, ViewCall, ViewError,
    ViewNews, WATCH,
};
use crate::machine::Machine;
use crate::store::Store;
use crate::view::messages::{HeartbeatReply, ViewAnswer, ViewRequest};
use crate::wire::address::PortRange;
use crate::wire::{HostPort, Refusal};
use crossbeam_channel::{Receiver, Sender, bounded};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::de::DeserializeOwned;
use std::error::Error;
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

/// How often the machine is told that time has passed.
const TICK: Duration = Duration::from_millis(10);

/// How long a call to the viewleader may take beyond the time that it is meant
/// to take.
const VIEW_CALL_SLACK: Duration = Duration::from_secs(2);

type To = Ticket<Reply>;

/// A server behind a listener.
pub struct KvShell {
    clock: Clock,
    /// Reads that change nothing share it.
    machine: RwLock<Server<To>>,
    links: Links<BetweenServers>,
    journal: Journal,
    beats: Sender<ViewCall>,
    views: Sender<ViewCall>,
    reports: Sender<ViewCall>,
    left: Box<dyn Fn() + Send + Sync>,
}

impl KvShell {
    /// A server that goes on with what `store` holds and begins to look for its
    /// viewleader at `viewleaders`. `left` is called when it has left the cluster
    /// as it was told to.
    ///
    /// # Errors
    /// When the store can't be read, or the system has no room for threads.
    pub fn start(
        settings: Settings,
        viewleaders: &[HostPort],
        store: impl Store,
        left: impl Fn() + Send + Sync + 'static,
    ) -> Result<Arc<Self>, Box<dyn Error>> {
        let recovered = disk::recover(&store)?;
        tracing::info!("{} keys on the disk", recovered.entries.len());
        let rng = StdRng::from_rng(&mut rand::rng());
        let beat_limit = settings.lease / BEATS_PER_LEASE;
        let [beats, views, reports] = [(); 3].map(|()| bounded(1));
        let shell = Arc::new_cyclic(|this: &Weak<Self>| {
            let inbox = this.clone();
            Self {
                clock: Clock::default(),
                machine: RwLock::new(Server::new(settings, recovered, rng)),
                links: Links::new(Arc::new(move |ended| {
                    if let Some(shell) = inbox.upgrade() {
                        let answered = |(call, result)| Input::Answered { call, result };
                        shell.step_all(ended.into_iter().map(answered));
                    }
                })),
                journal: Journal::default(),
                beats: beats.0,
                views: views.0,
                reports: reports.0,
                left: Box::new(left),
            }
        });
        let (room, stored) = (Arc::downgrade(&shell), Arc::downgrade(&shell));
        shell.journal.start(
            store,
            move |is_room| {
                if let Some(shell) = room.upgrade() {
                    shell.step(Input::Room(is_room));
                }
            },
            move |batch| {
                if let Some(shell) = stored.upgrade() {
                    shell.step(Input::Stored { batch });
                    shell.journal.flush();
                }
            },
        )?;
        let company = Company::default();
        for (name, calls, limit) in [
            ("heartbeats", beats.1, beat_limit),
            ("views", views.1, WATCH + VIEW_CALL_SLACK),
            ("reports", reports.1, VIEW_CALL_SLACK),
        ] {
            let walker = Walker::new(viewleaders.to_vec(), PortRange::VIEWLEADER, company.clone());
            let shell = Arc::downgrade(&shell);
            threads::start(name, move || call_viewleader(&shell, &calls, walker, limit))?;
        }
        let ticked = Arc::downgrade(&shell);
        threads::start("ticker", move || {
            while let Some(shell) = ticked.upgrade() {
                shell.step(Input::Tick);
                std::thread::sleep(TICK);
            }
        })?;
        Ok(shell)
    }

    fn step(&self, input: Input<To>) {
        self.step_all([input]);
    }

    /// Takes what has come together: the machine is locked once.
    fn step_all(&self, inputs: impl IntoIterator<Item = Input<To>>) {
        let (mut effects, mut later) = (Vec::new(), Later::default());
        {
            let mut machine = self.machine.write().unwrap_or_else(PoisonError::into_inner);
            let now = self.clock.now();
            for input in inputs {
                machine.step(now, input, &mut effects);
            }
            // Calls and batches are queued under the lock, so that they stay in
            // their order.
            for effect in effects {
                match effect {
                    Effect::Call { to, call, request } => {
                        match self.links.queue(to, call, request) {
                            Some(link) => links::add(&mut later.links, link),
                            None => later.unsent.push(call),
                        }
                    }
                    Effect::Store { batch, records } => {
                        let changes = records.into_iter().map(Record::into_change).collect();
                        self.journal.submit(changes, batch);
                    }
                    effect => later.effects.push(effect),
                }
            }
        }
        later.finish(self);
    }
}

/// What servers say to each other. Writes that are passed on wait for other servers;
/// if they and what replicas say to each other went over one link, two servers could
/// each hold back the acknowledgement that the other one waits for.
struct BetweenServers;

impl Dialect for BetweenServers {
    type Call = CallId;
    type Request = Request;
    type Answer = Answer;

    // A primary gathers entries by itself, and other calls wait for more than a receipt.
    const GATHERS: bool = false;

    fn lane(request: &Request) -> Lane {
        match request {
            Request::Op(op) if op.is_write() => Lane::Patient,
            _ => Lane::Prompt,
        }
    }
}

/// What is done without the lock.
#[derive(Default)]
struct Later {
    /// Calls have been queued for these.
    links: Vec<Arc<Link<BetweenServers>>>,
    effects: Vec<Effect<To>>,
    unsent: Vec<CallId>,
}

impl Later {
    fn finish(self, shell: &KvShell) {
        for link in self.links {
            link.flush();
        }
        for effect in self.effects {
            match effect {
                Effect::Reply { to, reply } => to.reply(reply),
                Effect::Close { to } => to.close(),
                Effect::CallView(call) => {
                    let lane = match call {
                        ViewCall::Beat(_) => &shell.beats,
                        ViewCall::View(_) => &shell.views,
                        ViewCall::Report(_) => &shell.reports,
                    };
                    // One of each kind is under way at most, so there is room.
                    let _ = lane.try_send(call);
                }
                Effect::Print(line) => daemon::print_line(&line),
                Effect::Note(note) => tracing::info!("{note}"),
                Effect::End => (shell.left)(),
                Effect::Call { .. } | Effect::Store { .. } => unreachable!("they have been queued"),
            }
        }
        if !self.unsent.is_empty() {
            let result = || Err(CallError::NotSent);
            let unsent = self.unsent.into_iter();
            shell.step_all(unsent.map(|call| Input::Answered { call, result: result() }));
        }
    }
}

/// Makes the calls to the viewleader that come through `calls`.
fn call_viewleader(
    shell: &Weak<KvShell>,
    calls: &Receiver<ViewCall>,
    mut walker: Walker,
    limit: Duration,
) {
    while let Ok(call) = calls.recv() {
        let news = match call {
            ViewCall::Beat(beat) => {
                let reply = walker.ask(&ViewRequest::Heartbeat(beat), limit);
                ViewNews::Beat(read_answer::<HeartbeatReply>(reply))
            }
            ViewCall::View(query) => {
                let reply = walker.ask(&ViewRequest::QueryView(query), limit);
                ViewNews::View(read_answer::<ViewAnswer>(reply).map(|answer| answer.view))
            }
            ViewCall::Report(report) => {
                let reply = walker.ask(&ViewRequest::Report(report), limit);
                ViewNews::Report(read_answer::<serde::de::IgnoredAny>(reply).map(|_| ()))
            }
        };
        let Some(shell) = shell.upgrade() else { return };
        shell.step(Input::FromView(news));
    }
}

fn read_answer<A: DeserializeOwned>(walked: Walked) -> Result<A, ViewError> {
    let refused = |text: &str| ViewError::Refused(Refusal::unavailable(text));
    match walked {
        Walked::Answer { body, .. } => serde_json::from_slice(&body)
            .map_err(|error| refused(&format!("an answer that makes no sense: {error}"))),
        // Another one will lead soon.
        Walked::Refused { body, .. } if call::not_leader(&body).is_some() => Err(ViewError::Lost),
        Walked::Refused { body, .. } => Err(ViewError::Refused(
            serde_json::from_slice(&body)
                .unwrap_or_else(|_| Refusal::unavailable(String::from_utf8_lossy(&body))),
        )),
        // An original viewleader drops what it does not know.
        Walked::Silence(tried) => {
            let was_dropped = tried.iter().any(|(_, why)| matches!(why, CallFailure::Closed));
            Err(if was_dropped { refused("no answer") } else { ViewError::Lost })
        }
    }
}

impl Service for KvShell {
    type Request = Request;
    type Reply = Reply;

    fn decode(&self, body: &[u8]) -> Result<Request, Refusal> {
        Request::decode(body)
    }

    fn class(&self, request: &Request) -> Class {
        match request {
            Request::Public(Public::Get(_) | Public::Getr(_)) => Class::Read,
            Request::Public(Public::Setr(_) | Public::Load(_)) => Class::Write,
            Request::Public(_) => Class::Alone,
            Request::Op(_) | Request::Peer(_) => Class::Server,
        }
    }

    /// A value that another server has.
    fn weight(&self, request: &Request) -> usize {
        match request {
            Request::Public(Public::Get(_) | Public::Getr(_)) => MAX_VALUE_BYTES,
            _ => 0,
        }
    }

    fn answer(&self, request: &Request) -> Option<Reply> {
        let machine = self.machine.read().unwrap_or_else(PoisonError::into_inner);
        machine.answer_now(self.clock.now(), request)
    }

    fn begin(&self, _: Ipv4Addr, request: Request, ticket: To) {
        self.step(Input::Request { from: ticket, request });
    }

    fn begin_all(&self, _: Ipv4Addr, requests: Vec<Asked<Self>>) {
        let begin = |(request, from)| Input::Request { from, request };
        self.step_all(requests.into_iter().map(begin));
    }

    fn refused(&self, refusal: Refusal) -> Reply {
        Reply::Refused(refusal)
    }
}
