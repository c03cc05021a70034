//! The shell of the viewleader.

use super::clock::Clock;
use super::connection::{Class, Service, Ticket};
use super::threads;
use crate::machine::Machine;
use crate::view::leader::{Effect, Input, Leader};
use crate::view::messages::{ViewReply, ViewRequest};
use crate::wire::Refusal;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often the machine is told that time has passed.
const TICK: Duration = Duration::from_millis(20);

type Reply = Ticket<ViewReply>;

/// A viewleader behind a listener.
#[derive(Debug, Default)]
pub struct ViewShell {
    clock: Clock,
    machine: Mutex<Leader<Reply>>,
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
            let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
            machine.step(self.clock.now(), input, &mut effects);
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
