//! The shell of a chunkserver.

use super::call::{Company, Walked, Walker, not_leader};
use super::clock::Clock;
use super::connection::{Class, Service, Ticket};
use super::lanes::Lanes;
use super::original_chunks::{METHODS, Turns};
use super::xml_rpc::Method;
use super::{daemon, threads};
use crate::gfs::chunkserver::{ChunkServer, Effect, Input, MASTER_PATIENCE, Settings};
use crate::gfs::messages::{
    BeatReply, ChunkReply, ChunkRequest, MasterRequest, Packet, append_packet,
};
use crate::gfs::vault::{Opened, ReadTrouble, Vault};
use crate::gfs::{BLOCK_BYTES, ChunkId, MAX_PIECE_BYTES};
use crate::machine::{Machine, Time};
use crate::store::Store;
use crate::wire::address::PortRange;
use crate::wire::{FrameError, HostPort, Refusal};
use crossbeam_channel::{Receiver, Sender, bounded};
use serde::Serialize;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

/// How often the machine is told that time has passed.
const TICK: Duration = Duration::from_millis(10);

/// How often the room on the disk is looked at.
const ROOM_GLANCE: Duration = Duration::from_millis(200);

/// How much the master can be told at once.
const MAX_TOLD: usize = 1024;

/// How much the scrub reads at a time.
const SCRUB_BYTES: usize = 16 * BLOCK_BYTES;

/// How long the scrub rests when it has seen everything.
const SCRUB_REST: Duration = Duration::from_secs(1);

/// An answer with its data.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Answer {
    pub(super) reply: ChunkReply,
    #[serde(skip)]
    pub(super) data: Vec<u8>,
}

type Reply = Ticket<Answer>;

/// A chunkserver behind a listener.
pub struct ChunkShell {
    clock: Clock,
    machine: Mutex<Option<ChunkServer<Reply>>>,
    vault: OnceLock<Vault>,
    peers: Lanes,
    beats: Sender<(u64, MasterRequest)>,
    told: Sender<(u64, MasterRequest)>,
    /// Those of clients of the original at the chunks that are led here.
    pub(super) turns: Turns,
    this: Weak<Self>,
}

impl ChunkShell {
    /// A chunkserver over what is in `dir` and `store`, of the masters at `masters`.
    /// It is called as it was before, or else as `settings` say, and scrubs its
    /// disk at `scrub_rate` bytes a second.
    ///
    /// # Errors
    /// When the disk can't be read, or the system has no room for a thread.
    pub fn start(
        mut settings: Settings,
        masters: &[HostPort],
        dir: &Path,
        store: impl Store,
        scrub_rate: u64,
    ) -> Result<Arc<Self>, Box<dyn std::error::Error>> {
        let ((beats, to_beat), (told, to_tell)) = (bounded(MAX_TOLD), bounded(MAX_TOLD));
        let clock = Clock::default();
        let shell = Arc::new_cyclic(|this| Self {
            clock,
            machine: Mutex::new(None),
            vault: OnceLock::new(),
            peers: Lanes::default(),
            beats,
            told,
            turns: Turns::new(settings.start),
            this: Weak::clone(this),
        });
        let stored = Arc::downgrade(&shell);
        let (vault, Opened { name, found }) =
            Vault::open(dir, store, &settings.name, move |job, trouble| {
                if let Some(shell) = stored.upgrade() {
                    shell.step(Input::Stored { job, trouble });
                }
            })?;
        tracing::info!("{name} holds {} copies", found.len());
        settings.name = name;
        let _ = shell.vault.set(vault);
        let mut effects = Vec::new();
        let machine = ChunkServer::new(clock.now(), settings, found, &mut effects);
        *shell.machine.lock().unwrap_or_else(PoisonError::into_inner) = Some(machine);
        shell.submit(&mut effects);
        shell.perform(effects);
        let start = |name: &str, work: fn(&Self), every: Duration| {
            let shell = Arc::downgrade(&shell);
            threads::start(name, move || {
                while let Some(shell) = shell.upgrade() {
                    work(&shell);
                    drop(shell);
                    std::thread::sleep(every);
                }
            })
        };
        start("room", Self::look_at_room, ROOM_GLANCE)?;
        start("ticker", |shell| shell.step(Input::Tick), TICK)?;
        for (name, queue) in [("beats", to_beat), ("tells", to_tell)] {
            let (shell, masters) = (Arc::downgrade(&shell), masters.to_vec());
            threads::start(name, move || speak_to_master(&shell, masters, &queue))?;
        }
        let scrubbed = Arc::downgrade(&shell);
        threads::start("scrub", move || scrub(&scrubbed, scrub_rate))?;
        Ok(shell)
    }

    fn step(&self, input: Input<Reply>) {
        let mut effects = Vec::new();
        {
            let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(machine) = machine.as_mut() else { return };
            machine.step(self.clock.now(), input, &mut effects);
            self.submit(&mut effects);
        }
        self.perform(effects);
    }

    /// Queues what goes to the disk. Under the machine's lock, so that it stays in
    /// order.
    fn submit(&self, effects: &mut Vec<Effect<Reply>>) {
        let Some(vault) = self.vault.get() else { return };
        let is_job = |effect: &mut Effect<Reply>| matches!(effect, Effect::Disk { .. });
        for effect in effects.extract_if(.., is_job) {
            if let Effect::Disk { job, op } = effect {
                vault.submit(job, op);
            }
        }
    }

    /// Takes a request, as from a connection.
    pub(super) fn request(&self, request: Packet<ChunkRequest>, from: Reply) {
        self.step(Input::Request { from, request });
    }

    /// Asks the machine what is here now.
    pub(super) fn look<R>(&self, what: impl FnOnce(&ChunkServer<Reply>, Time) -> R) -> Option<R> {
        let machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        machine.as_ref().map(|machine| what(machine, self.clock.now()))
    }

    fn perform(&self, effects: Vec<Effect<Reply>>) {
        for effect in effects {
            match effect {
                Effect::Reply { to, reply } => to.reply(Answer { reply, data: Vec::new() }),
                Effect::Read { to, chunk, offset, length, whole } => {
                    self.read(to, chunk, offset, length, whole);
                }
                Effect::Disk { .. } => unreachable!("jobs have been queued"),
                Effect::Call { to, call, request, patience } => {
                    let mut frame = Vec::new();
                    if let Err(error) = append_packet(&mut frame, &request.message, &request.data) {
                        tracing::error!("a call to {to}: {error}");
                    }
                    let shell = Weak::clone(&self.this);
                    self.peers.call(to, frame, patience, move |body| {
                        let answer = body.map(|body| Packet::<ChunkReply>::reply(&body));
                        if let Some(shell) = shell.upgrade() {
                            shell.step(Input::Answer { call, answer });
                        }
                    });
                }
                Effect::Beat { call, beat } => {
                    let request = MasterRequest::Heartbeat(beat);
                    if self.beats.try_send((call, request)).is_err() {
                        daemon::die("the thread of the heartbeats is gone");
                    }
                }
                Effect::Tell { call, request } => {
                    if self.told.try_send((call, request)).is_err() {
                        self.step(Input::Told { call, heard: false });
                    }
                }
                Effect::Note(note) => tracing::info!("{note}"),
            }
        }
    }

    fn read(&self, to: Reply, chunk: ChunkId, offset: u64, length: usize, whole: u64) {
        let Some(vault) = self.vault.get() else { return };
        match vault.read(chunk, offset, length) {
            Ok(data) => to.reply(Answer { reply: ChunkReply::Length { length: whole }, data }),
            Err(trouble) => {
                let refusal = Refusal::unavailable(match trouble {
                    ReadTrouble::Gone => format!("{chunk} is no longer here: ask another"),
                    ReadTrouble::Damaged => format!("{chunk} is damaged here: ask another"),
                    ReadTrouble::NotNow => {
                        format!("{chunk} can't be read here at the moment: ask another")
                    }
                });
                if trouble == ReadTrouble::Damaged {
                    self.step(Input::Damaged(chunk));
                }
                to.reply(Answer { reply: ChunkReply::Refused(refusal), data: Vec::new() });
            }
        }
    }

    fn look_at_room(&self) {
        if let Some(vault) = self.vault.get() {
            let (used, free, full) = vault.room();
            self.step(Input::Room { used, free, full });
        }
    }

    fn heard(&self, call: u64, is_beat: bool, answer: Option<Vec<u8>>) {
        let input = if is_beat {
            let answer =
                answer.map(|body| Packet::<BeatReply>::reply(&body).map(|packet| packet.message));
            Input::Beaten { call, answer }
        } else {
            Input::Told { call, heard: answer.is_some() }
        };
        self.step(input);
    }
}

/// Passes on what the master is to hear, one thing after the other.
fn speak_to_master(
    shell: &Weak<ChunkShell>,
    masters: Vec<HostPort>,
    queue: &Receiver<(u64, MasterRequest)>,
) {
    let mut walker = Walker::new(masters, PortRange::MASTER, Company::default());
    for (call, request) in queue {
        let walked = walker.ask(&request, MASTER_PATIENCE);
        let body = match walked {
            Walked::Answer { body, .. } => Some(body),
            // A master that does not lead has not heard it.
            Walked::Refused { body, .. } => Some(body).filter(|it| not_leader(it).is_none()),
            Walked::Silence(_) => None,
        };
        let Some(shell) = shell.upgrade() else { return };
        shell.heard(call, matches!(request, MasterRequest::Heartbeat(_)), body);
    }
}

/// Reads everything in its turn, slowly.
fn scrub(shell: &Weak<ChunkShell>, rate: u64) {
    let chunks = || Some(shell.upgrade()?.vault.get()?.chunks());
    while let Some(chunks) = chunks() {
        for (chunk, length) in chunks {
            for offset in (0..length).step_by(SCRUB_BYTES) {
                let Some(shell) = shell.upgrade() else { return };
                let part = SCRUB_BYTES.min((length - offset) as usize);
                let read = shell.vault.get().map(|vault| vault.read(chunk, offset, part));
                if let Some(Err(ReadTrouble::Damaged)) = read {
                    shell.step(Input::Damaged(chunk));
                }
                drop(shell);
                std::thread::sleep(Duration::from_secs_f64(part as f64 / rate.max(1) as f64));
                // What can't be read now has its turn again.
                if !matches!(read, Some(Ok(_))) {
                    break;
                }
            }
        }
        std::thread::sleep(SCRUB_REST);
    }
}

impl Service for ChunkShell {
    type Request = Packet<ChunkRequest>;
    type Reply = Answer;

    fn decode(&self, body: &[u8]) -> Result<Packet<ChunkRequest>, Refusal> {
        Packet::request(body)
    }

    fn class(&self, request: &Packet<ChunkRequest>) -> Class {
        match request.message {
            ChunkRequest::Read { .. } | ChunkRequest::Length { .. } => Class::Read,
            ChunkRequest::Write { .. } | ChunkRequest::Append { .. } => Class::Write,
            _ => Class::Alone,
        }
    }

    fn weight(&self, request: &Packet<ChunkRequest>) -> usize {
        match request.message {
            ChunkRequest::Read { length, .. } => length.min(MAX_PIECE_BYTES),
            _ => 0,
        }
    }

    fn begin(&self, _: Ipv4Addr, request: Packet<ChunkRequest>, ticket: Reply) {
        self.request(request, ticket);
    }

    fn methods(&self) -> &'static [Method<Self>] {
        METHODS
    }

    fn refused(&self, refusal: Refusal) -> Answer {
        Answer { reply: ChunkReply::Refused(refusal), data: Vec::new() }
    }

    fn append(&self, out: &mut Vec<u8>, answer: &Answer) -> Result<(), FrameError> {
        append_packet(out, &answer.reply, &answer.data)
    }
}
