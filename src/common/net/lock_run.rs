//! A command that runs while a lock is held.
//!
//! The lock is held with a time to live and kept alive from here, by a clock that
//! counts from when each sign of life was *sent*. When none has got through for
//! three quarters of that time the command is told to end (SIGTERM), and shortly
//! before all of it has passed it is killed: it has ended before the lock can be
//! anybody else's. The command and whatever it has started are one process group,
//! unless it reads from a terminal, which belongs to the group of this program.
//!
//! What has left the machine before the end, a write on its way to a store, is the
//! store's to refuse: the command finds the token of its grant in its environment
//! ([`TOKEN`]).

use super::ask::{Asker, exit_status};
use super::clock::Clock;
use super::threads;
use crate::kv::operation::{Command, Conclusion, Operation, Verdict};
use crate::machine::Time;
use crate::view::Token;
use crate::view::messages::{LockCall, LockKeep};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, never};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ExitStatus};
use std::time::Duration;

/// The name of the lock, in the command's environment.
pub const LOCK: &str = "RINGLEADER_LOCK";

/// The token of the grant, in the command's environment.
pub const TOKEN: &str = "RINGLEADER_TOKEN";

/// So many signs of life are sent in one time to live.
const SIGNS: u32 = 4;

/// A command is told to end when this part of the time to live is left, and killed
/// when that one is.
const TERM_PART: u32 = 4;
const KILL_PART: u32 = 20;

/// How often the clock is looked at: a wait stands still while the machine is
/// suspended, and the lock does not wait.
const GLANCE: Duration = Duration::from_millis(200);

/// What happens while the command runs.
#[derive(Debug)]
enum Event {
    /// It has ended.
    Ended(io::Result<ExitStatus>),
    /// A sign of life that was sent then has got through.
    Kept(Time),
    /// The lock is not held any more.
    Lost,
    /// The user wants to end.
    Signal(i32),
}

/// Gets the lock that `call` asks for, with its time to live, runs `command` and
/// gives the lock back. Returns the exit status to end with: the command's; 128 and
/// the signal's number if one ended it; or that of a client whose lock was lost.
///
/// # Errors
/// When the command can't be run or awaited.
pub fn run(
    asker: &Asker,
    call: LockCall,
    command: &[OsString],
    tell: impl Fn(&str),
) -> io::Result<u8> {
    let ttl = Duration::from_millis(call.manner().ttl_ms.unwrap_or_default());
    let (events, happened) = bounded(16);
    forward_signals(events.clone())?;
    let token = match get(asker, &call, &happened, &tell) {
        Ok(token) => token,
        Err(verdict) => return Ok(exit_status(verdict)),
    };
    let keep = LockKeep {
        lockid: call.lockid.clone(),
        requestor: call.requestor.clone(),
        token: Some(token),
    };
    // The grant may be as old as the question for it: from here on time is known.
    let clock = Clock::default();
    let begun = clock.now();
    let outcome = match sign_of_life(asker, &keep) {
        Some(true) => {
            let program = start(&call.lockid, token, command);
            program.and_then(|child| {
                watch(asker, keep, child, (clock, begun), ttl, (events, happened), &tell)
            })
        }
        _ => {
            tell("the lock was lost before the command could begin");
            Ok(exit_status(Verdict::Unknown))
        }
    };
    let release = Operation::new(Command::LockRelease(LockCall {
        request: call.request.map(|number| number.wrapping_add(1 << 32)),
        ..call
    }));
    let conclusion = asker.run(release, &never(), &tell);
    if let Some(message) = conclusion.message.filter(|_| conclusion.verdict != Verdict::Done) {
        tell(&format!("the lock could not be given back: {message}"));
    }
    outcome
}

fn forward_signals(events: Sender<Event>) -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    threads::start("signals", move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// Waits for the lock; tells what came of it if that is not the lock.
fn get(
    asker: &Asker,
    call: &LockCall,
    happened: &Receiver<Event>,
    tell: &impl Fn(&str),
) -> Result<Token, Verdict> {
    let (interrupt, interrupts) = bounded(1);
    let operation = Operation::new(Command::LockGet(call.clone()));
    let conclusion = std::thread::scope(|scope| {
        let (done, is_done) = bounded::<()>(1);
        scope.spawn(move || {
            crossbeam_channel::select! {
                recv(happened) -> _ => { let _ = interrupt.send(()); }
                recv(is_done) -> _ => {}
            }
        });
        let conclusion = asker.run(operation, &interrupts, tell);
        drop(done);
        conclusion
    });
    let Conclusion { reply, message, verdict } = conclusion;
    let token = reply.as_deref().and_then(|reply| {
        let reply: Value = serde_json::from_str(reply).ok()?;
        Some(Token(reply["token"].as_u64()?))
    });
    token.ok_or_else(|| {
        let why = message.or(reply).unwrap_or_default();
        tell(&format!("no lock, so the command was not run: {why}"));
        if verdict == Verdict::Done { Verdict::No } else { verdict }
    })
}

/// Sends one sign of life. Returns whether the lock is held still; `None` when
/// nobody answers.
fn sign_of_life(asker: &Asker, keep: &LockKeep) -> Option<bool> {
    let operation = Operation::new(Command::LockKeep(keep.clone()));
    let conclusion = asker.run(operation, &never(), |_| {});
    match conclusion.verdict {
        Verdict::Done => Some(true),
        Verdict::No if conclusion.reply.is_some_and(|reply| reply.contains("\"unknown\"")) => {
            Some(false)
        }
        _ => None,
    }
}

fn start(lock: &str, token: Token, command: &[OsString]) -> io::Result<Program> {
    let (name, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut program = std::process::Command::new(name);
    program.args(arguments).env(LOCK, lock).env(TOKEN, token.to_string());
    let is_group = !io::stdin().is_terminal();
    if is_group {
        program.process_group(0);
    }
    let child = program.spawn().map_err(|error| {
        io::Error::new(error.kind(), format!("can't run {}: {error}", name.display()))
    })?;
    Ok(Program { child, is_group })
}

/// A command that runs.
#[derive(Debug)]
struct Program {
    child: Child,
    is_group: bool,
}

/// Sends signals to a command, or to all of its group.
#[derive(Clone, Copy, Debug)]
struct Target {
    id: u32,
    is_group: bool,
}

impl Target {
    fn signal(self, signal: Signal) {
        let Some(pid) = Pid::from_raw(self.id as i32) else { return };
        // It may have ended a moment ago.
        let _ = match self.is_group {
            true => kill_process_group(pid, signal),
            false => kill_process(pid, signal),
        };
    }
}

/// Keeps the lock alive until the command ends, and ends it before the lock does.
fn watch(
    asker: &Asker,
    keep: LockKeep,
    program: Program,
    (clock, begun): (Clock, Time),
    ttl: Duration,
    (events, happened): (Sender<Event>, Receiver<Event>),
    tell: &impl Fn(&str),
) -> io::Result<u8> {
    let Program { mut child, is_group } = program;
    let target = Target { id: child.id(), is_group };
    let ended = events.clone();
    threads::start("command", move || {
        let _ = ended.send(Event::Ended(child.wait()));
    })?;
    let (stop, stopped) = bounded::<()>(0);
    let patient = Asker { timeout: ttl / SIGNS, ..asker.clone() };
    threads::start("keeper", move || keep_alive(&patient, &keep, clock, ttl, &events, &stopped))?;
    let (mut end, mut is_lost) = (begun + ttl, false);
    let status = loop {
        let part = if is_lost { KILL_PART } else { TERM_PART };
        let wait = end.since(clock.now()).saturating_sub(ttl / part);
        match happened.recv_timeout(wait.min(GLANCE)) {
            Ok(Event::Ended(status)) => break status?,
            Ok(Event::Kept(sent)) if !is_lost => end = sent + ttl,
            Ok(Event::Kept(_)) => {}
            Ok(Event::Lost) if !is_lost => {
                is_lost = true;
                tell("the lock is lost: ending the command");
                target.signal(Signal::KILL);
            }
            Ok(Event::Lost) => {}
            Ok(Event::Signal(SIGINT)) => target.signal(Signal::INT),
            Ok(Event::Signal(_)) => target.signal(Signal::TERM),
            Err(RecvTimeoutError::Timeout) if wait > GLANCE => {}
            Err(RecvTimeoutError::Timeout) if is_lost => {
                target.signal(Signal::KILL);
                // Not again and again: it has only to be waited for now.
                end = end + ttl;
            }
            Err(_) => {
                is_lost = true;
                tell("no viewleader answers and the lock is about to be lost: ending the command");
                target.signal(Signal::TERM);
            }
        }
    };
    drop(stop);
    Ok(match status.code() {
        _ if is_lost => exit_status(Verdict::Unknown),
        Some(code) => code as u8,
        None => 128 + status.signal().unwrap_or_default() as u8,
    })
}

/// Sends signs of life until told to stop.
fn keep_alive(
    asker: &Asker,
    keep: &LockKeep,
    clock: Clock,
    ttl: Duration,
    events: &Sender<Event>,
    stopped: &Receiver<()>,
) {
    loop {
        let sent = clock.now();
        let event = match sign_of_life(asker, keep) {
            Some(true) => Some(Event::Kept(sent)),
            Some(false) => Some(Event::Lost),
            None => None,
        };
        if event.is_some_and(|event| events.send(event).is_err()) {
            return;
        }
        let rest = (ttl / SIGNS).saturating_sub(clock.now().since(sent));
        match stopped.recv_timeout(rest) {
            Err(RecvTimeoutError::Timeout) => {}
            _ => return,
        }
    }
}
