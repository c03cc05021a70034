//! The shell of a client's command: asks, waits, and comes back.

use super::call::{self, CallFailure, Caller, Patience, Walked};
use crate::kv::operation::{Conclusion, Event, Next, Operation, Question, Verdict, Whom};
use crate::view::messages::ViewRequest;
use crate::wire::HostPort;
use crate::wire::address::PortRange;
use crossbeam_channel::Receiver;
use std::fmt::Write;
use std::io::ErrorKind;
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

/// How soon viewleaders are asked again when none of them leads.
const LEADER_GLANCE: Duration = Duration::from_millis(50);

/// Where a command looks for servers and viewleaders, and for how long.
#[derive(Clone, Debug)]
pub struct Asker {
    /// The servers that the user has named.
    pub servers: Vec<HostPort>,
    /// The viewleaders that the user has named.
    pub viewleaders: Vec<HostPort>,
    /// How long a command may take, waiting for a lock aside.
    pub timeout: Duration,
}

impl Asker {
    /// Carries out `operation`. `tell` takes what the user should know meanwhile;
    /// a message through `interrupts` ends the command early.
    pub fn run(
        &self,
        mut operation: Operation,
        interrupts: &Receiver<()>,
        mut tell: impl FnMut(&str),
    ) -> Conclusion {
        let mut event = Event::Begin;
        let mut deadline = Instant::now() + self.timeout;
        let mut last_told = None;
        loop {
            event = match operation.step(event) {
                Next::Done(conclusion) => return conclusion,
                Next::Ask(whom, question) => self.ask(whom, &question, deadline),
                Next::Wait(why, span) => {
                    if last_told.as_ref() != Some(&why) {
                        tell(&why);
                    }
                    last_told = Some(why);
                    let interrupted = interrupts.recv_timeout(span).is_ok();
                    deadline = Instant::now() + self.timeout;
                    if interrupted { Event::Interrupted } else { Event::Waited }
                }
            };
        }
    }

    pub(super) fn ask(&self, whom: Whom, question: &Question, deadline: Instant) -> Event {
        let (kind, hosts, range) = match whom {
            Whom::AnyServer => ("server", &self.servers, PortRange::SERVER),
            Whom::Viewleader => ("viewleader", &self.viewleaders, PortRange::VIEWLEADER),
            Whom::At(server) => return ask_at(server, question, deadline),
        };
        let addresses = match call::addresses(hosts, range) {
            Ok(addresses) => addresses,
            Err(error) => {
                let why = format!("no {kind} can be found: {error}");
                return Event::Silence { sent: false, closed: false, why };
            }
        };
        let deadline = match question {
            // Without the view a server can be asked all the same: leave it time.
            Question::View(ViewRequest::QueryView(_)) => {
                let now = Instant::now();
                now + deadline.saturating_duration_since(now) / 2
            }
            _ => deadline,
        };
        let walked = loop {
            let patience = match question {
                Question::View(ViewRequest::QueryView(_)) => Patience::Brief(deadline),
                _ => Patience::Until(deadline),
            };
            let walked = call::walk(&addresses, question, patience).0;
            let again = match &walked {
                // None leads now; one will soon.
                Walked::Refused { body, .. } => is_worth_waiting(body),
                _ => false,
            };
            if !again || Instant::now() + LEADER_GLANCE >= deadline {
                break walked;
            }
            std::thread::sleep(LEADER_GLANCE);
        };
        match walked {
            Walked::Answer { from, body } | Walked::Refused { from, body } => {
                Event::Answer { from, body }
            }
            Walked::Silence(tried) => Event::Silence {
                sent: tried.iter().any(|(_, failure)| failure.was_sent()),
                closed: tried.iter().any(|(_, failure)| matches!(failure, CallFailure::Closed)),
                why: silence_of(kind, hosts, range, &tried),
            },
        }
    }
}

/// Whether this is the answer of a viewleader in whose group another one leads, or
/// will soon. (It may have been carried out even so: what a client asks of
/// viewleaders may be asked again.)
fn is_worth_waiting(body: &[u8]) -> bool {
    call::not_leader(body).is_some_and(|answer| answer.note.is_none())
}

fn ask_at(server: SocketAddrV4, question: &Question, deadline: Instant) -> Event {
    let asked = Caller::connect(server, deadline).and_then(|mut it| it.call(question, deadline));
    match asked {
        Ok(body) => Event::Answer { from: server, body },
        Err(failure) => {
            let closed = matches!(failure, CallFailure::Closed);
            Event::Silence { sent: failure.was_sent(), closed, why: format!("{server}: {failure}") }
        }
    }
}

/// Says in a line that nobody answered, and what to do about it.
fn silence_of(
    kind: &str,
    hosts: &[HostPort],
    range: PortRange,
    tried: &[(SocketAddrV4, CallFailure)],
) -> String {
    let hosts: Vec<String> = hosts.iter().map(HostPort::to_string).collect();
    let mut why = format!("no {kind} answers at {}", hosts.join(", "));
    if hosts.iter().any(|host| !host.contains(':')) {
        let _ = write!(why, " (ports {range})");
    }
    let refused = |failure: &CallFailure| match failure {
        CallFailure::NotSent(error) => error.kind() == ErrorKind::ConnectionRefused,
        _ => false,
    };
    let others: Vec<String> = tried
        .iter()
        .filter(|(_, failure)| !refused(failure))
        .take(3)
        .map(|(address, failure)| format!("{address}: {failure}"))
        .collect();
    if others.is_empty() {
        why.push_str(": nobody listens there");
    } else {
        let _ = write!(why, ": {}", others.join("; "));
    }
    let _ = write!(why, "; is it running, and is --{kind} right?");
    why
}

/// The exit status of a command that has ended so.
pub fn exit_status(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Done => 0,
        Verdict::No => 1,
        Verdict::Nobody => 3,
        Verdict::Unknown => 4,
        Verdict::Interrupted => 130,
    }
}
