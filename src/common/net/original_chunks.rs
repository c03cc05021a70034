//! What the programs of the original file system ask a chunkserver, by XML-RPC.
//!
//! Reads, appends and copies become requests to the machine. What the original's master
//! decides by calls (which version, which primary, until when) the master of this
//! chunkserver decides by messages of ours: such a call is carried out as far as it agrees
//! with that, and is a fault otherwise.
//!
//! # Appending
//! An original client pushes a piece along all replicas (`send_data`), naming the chunk
//! only, and has the primary apply whatever it holds for that chunk
//! (`apply_mutations`), its own piece and those of others. The result says for each
//! piece where it stands. So of two clients one may find its piece applied by the call
//! of the other: calls for one chunk take [`Turns`], and what was applied lately is told
//! to the next ones, too.

use super::connection::Ticket;
use super::serve_chunks::ChunkShell;
use super::xml_rpc::{self, Arguments, Method, Outcome, fault, number, text};
use crate::gfs::chunkserver::Waiting;
use crate::gfs::messages::{ChunkReply, ChunkRequest, Data, DataId, Packet};
use crate::gfs::{ChunkId, MAX_PIECE_BYTES, Version};
use crate::wire::{Reason, Refusal};
use dxr::{Fault, Value};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How much one call reads at most, in bytes; of a whole chunk, too.
const MAX_READ_BYTES: usize = 4 * MAX_PIECE_BYTES;

/// For how long it is told what another call has applied.
const TOLD_FOR: Duration = Duration::from_secs(10);

/// How many pieces of one chunk that is.
const MAX_TOLD: usize = 16;

/// How many chunks can be appended to at once.
const MAX_TURNS: usize = 1_024;

/// What a chunkserver is asked.
pub(super) const METHODS: &[Method<ChunkShell>] = &[
    Method {
        name: "create",
        signature: &["nil", "string", "int"],
        help: "create(filename, chunk_id): makes an empty copy of a chunk, at version 0.",
        run: create,
    },
    Method {
        name: "read",
        signature: &["string", "int", "int", "int"],
        help: "read(chunk_id, chunk_offset, amount): what is there; nil if it is damaged.",
        run: read,
    },
    Method {
        name: "send_data",
        signature: &["string", "int", "string", "int", "array"],
        help: "send_data(chunk_id, data, idx, replica_urls): keeps data for later, and passes it \
               on to those from replica_urls[idx] on.",
        run: send_data,
    },
    Method {
        name: "apply_mutations",
        signature: &["struct", "int", "array", "string", "array"],
        help: "apply_mutations(chunk_id, secondary_urls, primary_url, pieces): appends what was \
               sent for the chunk, on all replicas; where each piece stands.",
        run: apply_mutations,
    },
    Method {
        name: "get_data_for_chunk",
        signature: &["array", "int", "int"],
        help: "get_data_for_chunk(chunk_id, version): its name here, its data, its version.",
        run: get_data_for_chunk,
    },
    Method {
        name: "replicate_data",
        signature: &["string", "int", "int", "string"],
        help: "replicate_data(chunk_id, version, source_url): copies a chunk from there.",
        run: replicate_data,
    },
    Method {
        name: "update_version",
        signature: &["nil", "int", "int"],
        help: "update_version(chunk_id, version): the copy here has that version from now on.",
        run: update_version,
    },
    Method {
        name: "assign_primary",
        signature: &["nil", "int", "double"],
        help: "assign_primary(chunk_id, lease_end): this chunkserver leads the chunk, as its \
               master has said.",
        run: assign_primary,
    },
    Method {
        name: "remove_current_leases",
        signature: &["nil"],
        help: "remove_current_leases(): this chunkserver leads nothing any more.",
        run: |shell, _| shell.ask(ChunkRequest::Resign {}, Data::from([])).map(|_| Value::Nil),
    },
    Method {
        name: "get_chunks",
        signature: &["array"],
        help: "get_chunks(): the ids of the chunks here, and their versions.",
        run: get_chunks,
    },
];

impl ChunkShell {
    /// Begins a request to the machine, and waits for its answer.
    fn begin(&self, message: ChunkRequest, data: Data) -> impl FnOnce() -> Asked + use<> {
        let (ticket, awaited) = Ticket::new();
        self.request(Packet { message, data }, ticket);
        move || match awaited.wait() {
            None => Err(Refusal::unknown_outcome("no answer in time")),
            Some(answer) => match answer.reply {
                ChunkReply::Refused(refusal) => Err(refusal),
                reply => Ok((reply, answer.data)),
            },
        }
    }

    fn ask(&self, message: ChunkRequest, data: Data) -> Result<(ChunkReply, Vec<u8>), Fault> {
        self.begin(message, data)().map_err(fault)
    }

    /// The version of the copy here.
    fn version_of(&self, chunk: ChunkId) -> Option<Version> {
        let chunks = self.look(|machine, _| machine.chunks()).unwrap_or_default();
        chunks.into_iter().find(|(it, _)| *it == chunk).map(|(_, version)| version)
    }

    /// What stands there; nothing if it is damaged.
    fn bytes_of(
        &self,
        chunk: ChunkId,
        version: Version,
        offset: u64,
        amount: usize,
    ) -> Result<Option<Vec<u8>>, Fault> {
        let mut bytes = Vec::new();
        while bytes.len() < amount {
            let length = (amount - bytes.len()).min(MAX_PIECE_BYTES);
            let offset = offset + bytes.len() as u64;
            let read = ChunkRequest::Read { chunk, version, offset, length };
            match self.begin(read, Data::from([]))() {
                Ok((_, data)) if data.is_empty() => break,
                Ok((_, data)) => bytes.extend(data),
                Err(_) if self.look(|it, _| it.is_damaged(chunk)) == Some(true) => {
                    return Ok(None);
                }
                Err(refusal) => return Err(fault(refusal)),
            }
        }
        Ok(Some(bytes))
    }
}

type Asked = Result<(ChunkReply, Vec<u8>), Refusal>;

fn chunk(arguments: &mut Arguments) -> Result<ChunkId, Fault> {
    Ok(ChunkId(arguments.number()?))
}

fn create(shell: &ChunkShell, mut arguments: Arguments) -> Outcome {
    // The name is the master's: a chunk's file is named by its number.
    let (_, chunk) = (arguments.text()?, chunk(&mut arguments)?);
    let request = ChunkRequest::Make { chunk, version: Version(0), copy_of: None };
    shell.ask(request, Data::from([])).map(|_| Value::Nil)
}

fn read(shell: &ChunkShell, mut arguments: Arguments) -> Outcome {
    let (chunk, offset, amount) =
        (chunk(&mut arguments)?, arguments.number()?, arguments.number()?);
    let amount = usize::try_from(amount).unwrap_or(usize::MAX).min(MAX_READ_BYTES);
    // Whatever may be served here is what was acknowledged last: see `gfs`.
    let bytes = shell.bytes_of(chunk, Version(0), offset.min(i64::MAX as u64), amount)?;
    Ok(bytes.map_or(Value::Nil, |bytes| xml_rpc::data(&bytes)))
}

fn send_data(shell: &ChunkShell, mut arguments: Arguments) -> Outcome {
    let (chunk, data) = (chunk(&mut arguments)?, arguments.data()?);
    let (index, replicas) = (arguments.number()?, arguments.urls()?);
    if data.is_empty() || data.len() > MAX_PIECE_BYTES {
        let refusal = format!("a piece has from 1 to {MAX_PIECE_BYTES} bytes");
        return Err(fault(Refusal::invalid(refusal)));
    }
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    let chain = replicas.get(index..).unwrap_or_default().to_vec();
    let id = shell.turns.next_id();
    let push = ChunkRequest::Push { id, chain, chunk: Some(chunk) };
    match shell.begin(push, data)() {
        Ok((ChunkReply::Unreached { unreached }, _)) => {
            Ok(text(&format!("chunkserver failure_http://{unreached}")))
        }
        Ok(_) => Ok(text("success")),
        Err(refusal) if refusal.reason == Reason::UnknownOutcome => Ok(text("timed out")),
        Err(refusal) => Err(fault(refusal)),
    }
}

fn get_data_for_chunk(shell: &ChunkShell, mut arguments: Arguments) -> Outcome {
    let (chunk, version) = (chunk(&mut arguments)?, Version(arguments.number()?));
    let held = shell.version_of(chunk);
    if held.is_none() && shell.look(|it, _| it.is_damaged(chunk)) == Some(true) {
        return Ok(text("invalid checksum"));
    }
    let Some(held) = held.filter(|held| *held >= version) else {
        return Ok(text("stale replica"));
    };
    let Some(bytes) = shell.bytes_of(chunk, version, 0, MAX_READ_BYTES + 1)? else {
        return Ok(text("invalid checksum"));
    };
    if bytes.len() > MAX_READ_BYTES {
        let refusal = format!("{chunk} has more than {MAX_READ_BYTES} bytes: read it in parts");
        return Err(fault(Refusal::invalid(refusal)));
    }
    let name = text(&format!("chunk-{}", chunk.0));
    Ok(Value::Array(vec![name, xml_rpc::data(&bytes), number(held.0)]))
}

fn replicate_data(shell: &ChunkShell, mut arguments: Arguments) -> Outcome {
    let (chunk, version) = (chunk(&mut arguments)?, Version(arguments.number()?));
    let from = arguments.url()?;
    let request = ChunkRequest::Replicate { chunk, version, from };
    Ok(match shell.begin(request, Data::from([]))() {
        Ok(_) => text("success"),
        Err(refusal) => text(&refusal.error),
    })
}

fn update_version(shell: &ChunkShell, mut arguments: Arguments) -> Outcome {
    let (chunk, version) = (chunk(&mut arguments)?, Version(arguments.number()?));
    shell.ask(ChunkRequest::Promise { chunk, version }, Data::from([])).map(|_| Value::Nil)
}

fn assign_primary(shell: &ChunkShell, mut arguments: Arguments) -> Outcome {
    let (chunk, _lease_end) = (chunk(&mut arguments)?, arguments.seconds()?);
    match shell.look(|machine, now| machine.waiting_for(now, chunk)).flatten() {
        Some(_) => Ok(Value::Nil),
        None => Err(fault(Refusal::unavailable(format!(
            "a chunkserver leads {chunk} only when its own master says so: ask that for a primary"
        )))),
    }
}

fn get_chunks(shell: &ChunkShell, _: Arguments) -> Outcome {
    let chunks = shell.look(|machine, _| machine.chunks()).unwrap_or_default();
    let pair = |(chunk, version): (ChunkId, Version)| {
        Value::Array(vec![number(chunk.0), number(version.0)])
    };
    Ok(Value::Array(chunks.into_iter().map(pair).collect()))
}

// ---- appending ----

/// Whose turn it is to have applied what was sent for a chunk, and what was applied
/// lately.
pub(super) struct Turns {
    chunks: Mutex<BTreeMap<ChunkId, Arc<Mutex<Lately>>>>,
    /// What pieces that came here first are called.
    name: u64,
    last: AtomicU64,
}

/// Where pieces stand that were applied lately.
#[derive(Default)]
struct Lately(VecDeque<(Instant, Data, u64)>);

impl Turns {
    /// Nobody's turn. Pieces are named after `start`, which was drawn for this process.
    pub(super) fn new(start: u64) -> Self {
        Self { chunks: Mutex::default(), name: start, last: AtomicU64::new(0) }
    }

    fn next_id(&self) -> DataId {
        (self.name, self.last.fetch_add(1, Ordering::Relaxed))
    }

    fn at(&self, chunk: ChunkId) -> Result<Arc<Mutex<Lately>>, Refusal> {
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        if chunks.len() >= MAX_TURNS && !chunks.contains_key(&chunk) {
            chunks.retain(|_, turn| Arc::strong_count(turn) > 1);
        }
        if chunks.len() >= MAX_TURNS && !chunks.contains_key(&chunk) {
            return Err(Refusal::unavailable("too many chunks are appended to at once: try again"));
        }
        Ok(Arc::clone(chunks.entry(chunk).or_default()))
    }
}

fn apply_mutations(shell: &ChunkShell, mut arguments: Arguments) -> Outcome {
    // The master has said who the others are, and who leads.
    let (chunk, _, _) = (chunk(&mut arguments)?, arguments.urls()?, arguments.url()?);
    let given = arguments.pieces()?;
    let turn = shell.turns.at(chunk).map_err(fault)?;
    // Held until the pieces are on all replicas: whoever comes next is to hear of them.
    let mut lately = turn.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(waiting) = shell.look(|machine, now| machine.waiting_for(now, chunk)).flatten() else {
        return Ok(text("not primary"));
    };
    let Waiting { version, room, mut pieces } = waiting;
    let id = |data| (shell.turns.next_id(), data);
    let inline = pieces.len();
    pieces.extend(given.into_iter().map(id));
    let wanted: usize = pieces.iter().map(|(_, data)| data.len()).sum();
    if wanted as u64 > room {
        let refusal = format!(
            "{wanted} bytes are to be appended to {chunk} and {room} fit: add a chunk to the file"
        );
        return Err(fault(Refusal::invalid(refusal)));
    }
    let begun: Vec<_> = pieces
        .into_iter()
        .enumerate()
        .map(|(place, (id, data))| {
            let (pushed, with) = match place < inline {
                true => (Some(id), Data::from([])),
                false => (None, Data::clone(&data)),
            };
            let append = ChunkRequest::Append { chunk, version, pushed, mark: None };
            (data, shell.begin(append, with))
        })
        .collect();
    let mut failure = None;
    let now = Instant::now();
    lately.0.retain(|(at, ..)| now.duration_since(*at) < TOLD_FOR);
    let mut placed = BTreeMap::new();
    for (_, data, offset) in &lately.0 {
        placed.insert(key_of(data), number(*offset));
    }
    for (data, end) in begun {
        match end() {
            Ok((ChunkReply::Written { offset }, _)) => {
                placed.insert(key_of(&data), number(offset));
                lately.0.push_back((now, data, offset));
            }
            Ok(_) => failure = Some(Refusal::unavailable(format!("{chunk} is full"))),
            Err(refusal) => failure = Some(refusal),
        }
    }
    let surplus = lately.0.len().saturating_sub(MAX_TOLD);
    lately.0.drain(..surplus);
    match failure {
        None => Ok(Value::Struct(placed)),
        Some(refusal) if refusal.reason == Reason::UnknownOutcome => {
            Ok(text("failed applying mutation to secondary"))
        }
        Some(refusal) if refusal.reason == Reason::Unavailable => Ok(text("not primary")),
        Some(refusal) => Err(fault(refusal)),
    }
}

/// What a piece is called in the result: itself, with escapes where it is no text.
fn key_of(data: &[u8]) -> String {
    match xml_rpc::data(data) {
        Value::String(text) => text,
        _ => data.escape_ascii().to_string(),
    }
}
