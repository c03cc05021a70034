//! The shell of the viewleader.

use super::clock::Clock;
use super::connection::{Class, Service, Ticket};
use super::journal::Journal;
use super::{daemon, threads};
use crate::machine::{Machine, Time};
use crate::store::Store;
use crate::view::leader::{Effect, Input, Leader, Worker};
use crate::view::log::{self, SNAPSHOT_EVERY};
use crate::view::messages::{ViewReply, ViewRequest};
use crate::wire::Refusal;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// How often the machine is told that time has passed.
const TICK: Duration = Duration::from_millis(20);

/// How often a rebalancing worker looks.
const WORKER_GLANCE: Duration = Duration::from_millis(10);

/// A pause between two ticks that is longer than this was a sleep of the whole
/// process: stopped, swapped out, or its machine suspended.
const SLEEP: Duration = Duration::from_millis(500);

type Reply = Ticket<ViewReply>;

/// A viewleader behind a listener.
pub struct ViewShell {
    clock: Clock,
    inner: Mutex<Inner>,
    log: Journal,
    this: Weak<Self>,
}

struct Inner {
    machine: Leader<Reply>,
    stepped: Time,
    /// The index up to which the log is compacted.
    compacted: u64,
    done: Vec<Worker>,
}

impl ViewShell {
    /// A viewleader that goes on with what `store` holds, and its ticker.
    ///
    /// # Errors
    /// When the store can't be read, or the system has no room for a thread.
    pub fn start(store: impl Store) -> Result<Arc<Self>, Box<dyn std::error::Error>> {
        let clock = Clock::default();
        let recovered = log::recover(&store)?;
        let machine = Leader::new(clock.now(), recovered.state, recovered.index);
        let inner = Inner {
            machine,
            stepped: clock.now(),
            compacted: recovered.compacted,
            done: Vec::new(),
        };
        let shell = Arc::new_cyclic(|this| Self {
            clock,
            inner: Mutex::new(inner),
            log: Journal::default(),
            this: Weak::clone(this),
        });
        let committed = Arc::downgrade(&shell);
        shell.log.start(
            store,
            |_| {},
            move |index| {
                if let Some(shell) = committed.upgrade() {
                    shell.step(Input::Committed { index });
                    shell.log.flush();
                }
            },
        )?;
        let ticked = Arc::downgrade(&shell);
        threads::start("ticker", move || {
            while let Some(shell) = ticked.upgrade() {
                shell.step(Input::Tick);
                std::thread::sleep(TICK);
            }
        })?;
        Ok(shell)
    }

    /// Answers those who wait for a view, so that their connections can end.
    pub fn end(&self) {
        self.step(Input::Ending);
    }

    fn step(&self, input: Input<Reply>) {
        let mut effects = Vec::new();
        let mut later = Vec::new();
        {
            let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.clock.now();
            let pause = now.since(inner.stepped);
            if pause > SLEEP {
                tracing::warn!("this process has slept for {} ms", pause.as_millis());
                inner.machine.step(now, Input::Slept(pause), &mut effects);
            }
            inner.machine.step(now, input, &mut effects);
            inner.stepped = now;
            // Changes are queued under the lock, so that they stay in order.
            for effect in effects {
                match effect {
                    Effect::Append { index, change } => {
                        self.log.submit(vec![log::append(index, &change)], index);
                    }
                    Effect::WorkerDone(worker, line) => {
                        inner.done.push(worker);
                        later.push(Effect::WorkerDone(worker, line));
                    }
                    effect => later.push(effect),
                }
            }
            self.compact(&mut inner);
        }
        for effect in later {
            match effect {
                Effect::Reply { to, reply } => to.reply(reply),
                Effect::Note(note) => tracing::info!("{note}"),
                Effect::StartWorker(worker) => self.start_worker(worker),
                Effect::WorkerDone(_, line) => {
                    line.iter().for_each(|line| daemon::print_line(line))
                }
                Effect::Append { .. } => unreachable!("changes have been queued"),
            }
        }
    }

    fn compact(&self, inner: &mut Inner) {
        let (index, state) = match inner.machine.applied() {
            index if index >= inner.compacted + SNAPSHOT_EVERY => inner.machine.snapshot(),
            _ => return,
        };
        self.log.submit(log::compact(inner.compacted, index, state), index);
        inner.compacted = index;
    }

    /// Starts the thread of a rebalancing worker.
    fn start_worker(&self, worker: Worker) {
        let shell = Weak::clone(&self.this);
        let started = threads::start(worker.name(), move || {
            while let Some(shell) = shell.upgrade() {
                shell.step(Input::Work(worker));
                if shell.is_done(worker) {
                    return;
                }
                drop(shell);
                std::thread::sleep(WORKER_GLANCE);
            }
        });
        if let Err(error) = started {
            tracing::error!("no thread for {}: {error}", worker.name());
        }
    }

    fn is_done(&self, worker: Worker) -> bool {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let before = inner.done.len();
        inner.done.retain(|done| *done != worker);
        inner.done.len() < before
    }
}

impl Service for ViewShell {
    type Request = ViewRequest;
    type Reply = ViewReply;

    fn decode(&self, body: &[u8]) -> Result<ViewRequest, Refusal> {
        ViewRequest::decode(body)
    }

    fn class(&self, _: &ViewRequest) -> Class {
        Class::Alone
    }

    fn begin(&self, host: Ipv4Addr, request: ViewRequest, ticket: Reply) {
        self.step(Input::Request { from: ticket, host, request });
    }

    fn refused(&self, refusal: Refusal) -> ViewReply {
        ViewReply::Refused(refusal)
    }
}
