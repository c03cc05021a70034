//! The shell of a server.

use super::call::{CallFailure, Walked, Walker};
use super::clock::Clock;
use super::connection::{Class, Service, Ticket};
use super::daemon;
use super::links::Links;
use super::threads;
use crate::kv::messages::{Public, Reply, Request};
use crate::kv::server::{
    BEATS_PER_LEASE, CallError, Effect, Input, Server, ViewCall, ViewError, ViewNews, WATCH,
};
use crate::machine::Machine;
use crate::view::messages::{HeartbeatReply, ViewAnswer, ViewRequest};
use crate::wire::address::PortRange;
use crate::wire::{HostPort, Refusal};
use crossbeam_channel::{Receiver, Sender, bounded};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::de::DeserializeOwned;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// How often the machine is told that time has passed.
const TICK: Duration = Duration::from_millis(10);

/// How long a call to the viewleader may take beyond the time that it is meant
/// to take.
const VIEW_CALL_SLACK: Duration = Duration::from_secs(2);

type To = Ticket<Reply>;

/// What a server is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where others reach it.
    pub address: SocketAddrV4,
    /// How long a lease it asks for.
    pub lease: Duration,
    /// Where to look for the viewleader.
    pub viewleaders: Vec<HostPort>,
}

/// A server behind a listener.
pub struct KvShell {
    clock: Clock,
    machine: Mutex<Server<To>>,
    links: Links,
    beats: Sender<ViewCall>,
    views: Sender<ViewCall>,
    reports: Sender<ViewCall>,
}

impl KvShell {
    /// A server that begins to look for its viewleader.
    ///
    /// # Errors
    /// When the system has no room for its threads.
    pub fn start(settings: &Settings) -> io::Result<Arc<Self>> {
        let rng = StdRng::from_rng(&mut rand::rng());
        let [beats, views, reports] = [(); 3].map(|()| bounded(1));
        let shell = Arc::new_cyclic(|this: &Weak<Self>| {
            let inbox = this.clone();
            Self {
                clock: Clock::default(),
                machine: Mutex::new(Server::new(settings.address, settings.lease, rng)),
                links: Links::new(Arc::new(move |call, result| {
                    if let Some(shell) = inbox.upgrade() {
                        shell.step(Input::Answered { call, result });
                    }
                })),
                beats: beats.0,
                views: views.0,
                reports: reports.0,
            }
        });
        let beat_limit = settings.lease / BEATS_PER_LEASE;
        for (name, calls, limit) in [
            ("heartbeats", beats.1, beat_limit),
            ("views", views.1, WATCH + VIEW_CALL_SLACK),
            ("reports", reports.1, VIEW_CALL_SLACK),
        ] {
            let walker = Walker::new(settings.viewleaders.clone(), PortRange::VIEWLEADER);
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
        let mut effects = Vec::new();
        let (mut later, mut unsent) = (Vec::new(), Vec::new());
        {
            let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.clock.now();
            machine.step(now, input, &mut effects);
            // Calls are queued under the lock, so that they go out in order.
            for effect in effects {
                match effect {
                    Effect::Call { to, call, request } => {
                        if !self.links.call(to, call, request) {
                            unsent.push(call);
                        }
                    }
                    effect => later.push(effect),
                }
            }
        }
        for effect in later {
            match effect {
                Effect::Reply { to, reply } => to.reply(reply),
                Effect::Close { to } => to.close(),
                Effect::CallView(call) => {
                    let lane = match call {
                        ViewCall::Beat(_) => &self.beats,
                        ViewCall::View(_) => &self.views,
                        ViewCall::Report(_) => &self.reports,
                    };
                    // One of each kind is under way at most, so there is room.
                    let _ = lane.try_send(call);
                }
                Effect::Print(line) => daemon::print_line(&line),
                Effect::Note(note) => tracing::info!("{note}"),
                Effect::Call { .. } => unreachable!("calls have been queued"),
            }
        }
        for call in unsent {
            self.step(Input::Answered { call, result: Err(CallError::NotSent) });
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
            Request::Public(Public::Setr(_)) => Class::Write,
            Request::Public(_) => Class::Alone,
            Request::Op(_) | Request::Peer(_) => Class::Server,
        }
    }

    fn begin(&self, _: Ipv4Addr, request: Request, ticket: To) {
        self.step(Input::Request { from: ticket, request });
    }

    fn refused(&self, refusal: Refusal) -> Reply {
        Reply::Refused(refusal)
    }
}
