//! The shell of a viewleader.

use super::connection::{Class, Service, Ticket};
use super::serve_group::{GroupShell, Program};
use super::{daemon, threads};
use crate::consensus::node::Settings;
use crate::consensus::replica::Input;
use crate::consensus::requests::{GroupReply, Kind};
use crate::store::Store;
use crate::view::leader::{self, Effect, Leader, Worker};
use crate::view::messages::ViewReply;
use crate::view::viewleader::Request;
use crate::wire::Refusal;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// How often a rebalancing worker looks.
const WORKER_GLANCE: Duration = Duration::from_millis(10);

type Reply = Ticket<ViewReply>;

/// A viewleader behind a listener.
pub struct ViewShell {
    group: Arc<GroupShell<Leader<Reply>, Self>>,
    done: Mutex<Vec<Worker>>,
}

impl ViewShell {
    /// A viewleader that goes on with what `store` holds, and its ticker.
    ///
    /// # Errors
    /// When the store can't be read, or the system has no room for a thread.
    pub fn start(
        settings: Settings,
        store: impl Store,
    ) -> Result<Arc<Self>, Box<dyn std::error::Error>> {
        let around = |group| Self { group, done: Mutex::default() };
        GroupShell::start(Kind::VIEWLEADER, settings, |_| (), store, around)
    }

    /// Answers those who wait for a view, so that their connections can end, and
    /// lets another viewleader lead.
    pub fn end(&self) {
        self.group.end();
    }

    /// Starts the thread of a rebalancing worker.
    fn start_worker(&self, worker: Worker) {
        let group = Arc::downgrade(&self.group);
        let started = threads::start(worker.name(), move || {
            while let Some(group) = Weak::upgrade(&group) {
                group.step(Input::Own(leader::Input::Work(worker)));
                if group.program().is_none_or(|shell| shell.is_done(worker)) {
                    return;
                }
                drop(group);
                std::thread::sleep(WORKER_GLANCE);
            }
        });
        if let Err(error) = started {
            tracing::error!("no thread for {}: {error}", worker.name());
        }
    }

    fn is_done(&self, worker: Worker) -> bool {
        let mut all = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.len();
        all.retain(|done| *done != worker);
        all.len() < before
    }
}

impl Program<Leader<Reply>> for ViewShell {
    fn perform(&self, effect: Effect<Reply>) {
        match effect {
            Effect::Reply { to, reply } => to.reply(reply),
            Effect::Note(note) => tracing::info!("{note}"),
            Effect::StartWorker(worker) => self.start_worker(worker),
            Effect::WorkerDone(worker, line) => {
                self.done.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
                line.iter().for_each(|line| daemon::print_line(line));
            }
            Effect::Append { .. } | Effect::Confirm { .. } => {
                unreachable!("the group does that")
            }
        }
    }

    fn reply(to: Reply, reply: GroupReply) {
        to.reply(ViewReply::Group(reply));
    }
}

impl Service for ViewShell {
    type Request = Request;
    type Reply = ViewReply;

    fn decode(&self, body: &[u8]) -> Result<Request, Refusal> {
        Request::decode(body)
    }

    fn class(&self, request: &Request) -> Class {
        match request {
            Request::View(_) => Class::Alone,
            Request::Group(_) => Class::Server,
        }
    }

    fn begin(&self, host: Ipv4Addr, request: Request, ticket: Reply) {
        self.group.step(match request {
            Request::View(request) => {
                Input::Own(leader::Input::Request { from: ticket, host, request })
            }
            Request::Group(request) => Input::Group { from: ticket, request },
        });
    }

    fn refused(&self, refusal: Refusal) -> ViewReply {
        ViewReply::Refused(refusal)
    }
}
