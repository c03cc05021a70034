//! The shell of one of several processes that keep one state together: what a
//! viewleader's and a master's have in common.
//!
//! Batches go to the log and messages to the others in the order in which the machine
//! has asked for them: that is queued under its lock. What its leader asks for goes to
//! the program around this, without the lock.

use super::call::{CallFailure, Caller};
use super::clock::Clock;
use super::journal::Journal;
use super::links::{self, Link};
use super::peers::{BetweenNodes, News, Peers};
use super::{daemon, threads};
use crate::consensus::message::Hello;
use crate::consensus::node::Settings;
use crate::consensus::replica::{Effect, Input, Lead, Replica};
use crate::consensus::requests::{GroupReply, GroupRequest, Kind};
use crate::consensus::{State, log};
use crate::machine::{Machine, Time};
use crate::store::Store;
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::net::SocketAddrV4;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How often the machine is told that time has passed.
const TICK: Duration = Duration::from_millis(20);

/// A pause between two steps that is longer than this was a sleep of the whole
/// process: stopped, swapped out, or its machine suspended.
const SLEEP: Duration = Duration::from_millis(500);

/// How long whoever is asked who it is may take to answer.
const HELLO_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a process that is alone may take until it leads, or one that ends until
/// another one does.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often we look at what we wait for.
const GLANCE: Duration = Duration::from_millis(2);

/// What the program does for the one that leads, and whom it answers.
pub(super) trait Program<L: Lead>: Send + Sync + 'static {
    /// Does what the leader has asked for.
    fn perform(&self, effect: L::Effect);

    /// Answers a request to the group.
    fn reply(to: L::Asker, reply: GroupReply);
}

/// One of the group, behind the listener of the program `P`.
pub(super) struct GroupShell<L: Lead, P> {
    kind: Kind,
    pub(super) clock: Clock,
    inner: Mutex<Inner<L>>,
    log: Journal,
    peers: Peers,
    program: Weak<P>,
    this: Weak<Self>,
}

struct Inner<L: Lead> {
    machine: Replica<L>,
    stepped: Time,
}

impl<L, P> GroupShell<L, P>
where
    L: Lead + Send + 'static,
    L::State: Send,
    <L::State as State>::Command: Send,
    L::Settings: Send,
    L::Asker: Send,
    L::Effect: Send,
    P: Program<L>,
{
    /// One that goes on with what `store` holds, its ticker, and the program around
    /// it, which `around` makes.
    ///
    /// # Errors
    /// When the store can't be read, or the system has no room for a thread.
    pub(super) fn start(
        kind: Kind,
        place: Settings,
        settings: impl FnOnce(Time) -> L::Settings,
        store: impl Store,
        around: impl FnOnce(Arc<Self>) -> P,
    ) -> Result<Arc<P>, Box<dyn std::error::Error>> {
        let clock = Clock::default();
        let recovered = log::recover(&store)?;
        if let Some(note) = recovered.check(&place.entrance, kind)? {
            tracing::warn!("{note}");
        }
        let rng = StdRng::from_rng(&mut rand::rng());
        let (now, mut first) = (clock.now(), Vec::new());
        let settings = (place, settings(now));
        let machine = Replica::start(now, settings, recovered, rng, &mut first)?;
        let mut made = None;
        let program = Arc::new_cyclic(|program| {
            let shell = Arc::new_cyclic(|this: &Weak<Self>| {
                let inbox = this.clone();
                let hear = move |news| {
                    if let Some(shell) = inbox.upgrade() {
                        shell.step(match news {
                            News::Lost(node) => Input::Lost(node),
                            News::Receipt(to, receipt) => Input::Receipt { to, receipt },
                        });
                    }
                };
                Self {
                    kind,
                    clock,
                    inner: Mutex::new(Inner { machine, stepped: now }),
                    log: Journal::default(),
                    peers: Peers::new(kind, hear),
                    program: Weak::clone(program),
                    this: Weak::clone(this),
                }
            });
            made = Some(Arc::clone(&shell));
            around(shell)
        });
        if let Some(shell) = made {
            shell.begin(store, first)?;
        }
        Ok(program)
    }

    /// Begins to work: only now the program around it is there.
    ///
    /// # Errors
    /// When the system has no room for a thread.
    fn begin(&self, store: impl Store, first: Vec<Effect<L>>) -> std::io::Result<()> {
        let stored = Weak::clone(&self.this);
        self.log.start(
            store,
            |_| {},
            move |batch| {
                if let Some(shell) = stored.upgrade() {
                    shell.step(Input::Stored { batch });
                    shell.log.flush();
                }
            },
        )?;
        let later = self.perform(first);
        self.finish(later);
        let ticked = Weak::clone(&self.this);
        threads::start("ticker", move || {
            while let Some(shell) = ticked.upgrade() {
                shell.step(Input::Tick);
                drop(shell);
                std::thread::sleep(TICK);
            }
        })?;
        if self.inner().machine.is_alone() {
            self.wait_until(Replica::leads);
        }
        Ok(())
    }

    /// Answers those who wait, so that their connections can end, and lets another one
    /// lead.
    pub(super) fn end(&self) {
        self.step(Input::Ending);
        if !self.inner().machine.is_alone() {
            self.wait_until(|machine| !machine.leads());
        }
    }

    fn wait_until(&self, is_so: impl Fn(&Replica<L>) -> bool) {
        let deadline = Instant::now() + CHANGE_TIMEOUT;
        while !is_so(&self.inner().machine) && Instant::now() < deadline {
            std::thread::sleep(GLANCE);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner<L>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The program around it.
    pub(super) fn program(&self) -> Option<Arc<P>> {
        self.program.upgrade()
    }

    /// Who leads, if this is another one and that is known.
    pub(super) fn leader_elsewhere(&self) -> Option<SocketAddrV4> {
        self.inner().machine.leader_elsewhere()
    }

    /// Asks the one that leads here, if one does.
    pub(super) fn look<R>(&self, what: impl FnOnce(&L) -> R) -> Option<R> {
        self.inner().machine.leader().map(what)
    }

    pub(super) fn step(&self, input: Input<L>) {
        let mut effects = Vec::new();
        let later = {
            let mut inner = self.inner();
            let now = self.clock.now();
            let pause = now.since(inner.stepped);
            if pause > SLEEP {
                tracing::warn!("this process has slept for {} ms", pause.as_millis());
                inner.machine.step(now, Input::Slept(pause), &mut effects);
            }
            inner.machine.step(now, input, &mut effects);
            inner.stepped = now;
            self.perform(effects)
        };
        self.finish(later);
    }

    /// Queues what must stay in order, under the lock; the rest is for later.
    fn perform(&self, effects: Vec<Effect<L>>) -> Later<L> {
        let mut later = Later { links: Vec::new(), effects: Vec::new(), unsent: Vec::new() };
        for effect in effects {
            match effect {
                Effect::Store { batch, changes } => self.log.submit(changes, batch),
                Effect::Send { to, envelope } => {
                    let node = envelope.to;
                    match self.peers.queue(to, *envelope) {
                        Some(link) => links::add(&mut later.links, link),
                        None => later.unsent.push(Input::Lost(node)),
                    }
                }
                // What this process has promised ends here.
                Effect::Die(why) => daemon::die(&why),
                effect => later.effects.push(effect),
            }
        }
        later
    }

    fn finish(&self, later: Later<L>) {
        later.links.iter().for_each(|link| link.flush());
        for effect in later.effects {
            match effect {
                Effect::Own(effect) => {
                    if let Some(program) = self.program.upgrade() {
                        program.perform(effect);
                    }
                }
                Effect::Group { to, reply } => P::reply(to, reply),
                Effect::Note(note) => tracing::info!("{note}"),
                Effect::Ask { address, hello } => self.ask(address, *hello),
                Effect::Store { .. } | Effect::Send { .. } | Effect::Die(_) => {
                    unreachable!("they have been done under the lock")
                }
            }
        }
        for input in later.unsent {
            self.step(input);
        }
    }

    /// Asks who is at `address`, on a thread of its own.
    fn ask(&self, address: SocketAddrV4, hello: Hello) {
        let (shell, kind) = (Weak::clone(&self.this), self.kind);
        let started = threads::start(format!("hello {address}"), move || {
            let hello = say_hello(address, hello, kind).ok();
            if let Some(shell) = shell.upgrade() {
                shell.step(Input::Heard { address, hello });
            }
        });
        if let Err(error) = started {
            tracing::error!("no thread to ask {address}: {error}");
        }
    }
}

/// What is done without the lock.
struct Later<L: Lead> {
    links: Vec<Arc<Link<BetweenNodes>>>,
    effects: Vec<Effect<L>>,
    unsent: Vec<Input<L>>,
}

fn say_hello(address: SocketAddrV4, hello: Hello, kind: Kind) -> Result<Hello, CallFailure> {
    let deadline = Instant::now() + HELLO_TIMEOUT;
    let request = GroupRequest::Hello(hello).to(kind);
    let body = Caller::connect(address, deadline)?.call(&request, deadline)?;
    serde_json::from_slice(&body).map_err(|error| CallFailure::Lost(error.into()))
}
