//! The shell of the viewleader.

use super::clock::Clock;
use super::connection::{Class, Service, Ticket};
use super::threads;
use crate::machine::{Machine, Time};
use crate::view::leader::{Effect, Input, Leader};
use crate::view::messages::{ViewReply, ViewRequest};
use crate::wire::Refusal;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often the machine is told that time has passed.
const TICK: Duration = Duration::from_millis(20);

/// A pause between two ticks that is longer than this was a sleep of the whole
/// process: stopped, swapped out, or its machine suspended.
const SLEEP: Duration = Duration::from_millis(500);

type Reply = Ticket<ViewReply>;

/// A viewleader behind a listener.
#[derive(Debug, Default)]
pub struct ViewShell {
    clock: Clock,
    /// The machine, and when it was stepped last.
    machine: Mutex<(Leader<Reply>, Time)>,
}

impl ViewShell {
    /// A viewleader that nobody has called yet, and its ticker.
    ///
    /// # Errors
    /// When the system has no room for a thread.
    pub fn start() -> io::Result<Arc<Self>> {
        let shell = Arc::new(Self::default());
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
        {
            let mut guard = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
            let (machine, stepped) = &mut *guard;
            let now = self.clock.now();
            let pause = now.since(*stepped);
            if pause > SLEEP {
                tracing::warn!("this process has slept for {} ms", pause.as_millis());
                machine.step(now, Input::Slept(pause), &mut effects);
            }
            machine.step(now, input, &mut effects);
            *stepped = now;
        }
        for effect in effects {
            match effect {
                Effect::Reply { to, reply } => to.reply(reply),
                Effect::Note(note) => tracing::info!("{note}"),
            }
        }
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
