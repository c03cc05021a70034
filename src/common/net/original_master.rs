//! What the programs of the original file system ask a master, by XML-RPC.
//!
//! Each call becomes one or more requests to the machine that answers everybody else.
//! An original client computes places in chunks by itself, so it is served only files
//! whose chunks have [`ORIGINAL_CHUNK_BYTES`]: those that it has made.
//!
//! An original chunkserver takes part as far as its calls reach. It knows no leases to
//! serve under, so nothing that holds only with them is promised of its chunks: the
//! copies of one chunk are either all with chunkservers of the original, and then
//! only where there are no others, or all with ours.

use super::connection::Ticket;
use super::http;
use super::serve_master::MasterShell;
use super::xml_rpc::{self, Arguments, Method, Outcome, fault, number, text, url};
use crate::gfs::messages::{
    BeatReply, ChunkReply, ChunkRequest, FailedPrimary, Heartbeat, LeaseGranted, Located,
    MasterReply, MasterRequest, Status,
};
use crate::gfs::{ChunkId, FileName, ORIGINAL_CHUNK_BYTES, Serial, Version};
use crate::wire::{Reason, Refusal};
use dxr::{Fault, Value};
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long an original chunkserver leads a chunk.
const ORIGINAL_PRIMARY: Duration = Duration::from_secs(30);

/// How many chunkservers of the original there can be.
const MAX_ORIGINALS: usize = 1_000;

/// What a master is asked.
pub(super) const METHODS: &[Method<MasterShell>] = &[
    Method {
        name: "create",
        signature: &["string", "string"],
        help: "create(filename): adds a chunk at the end of a file, which is made if it is not there.",
        run: create,
    },
    Method {
        name: "delete",
        signature: &["string", "string"],
        help: "delete(filename): deletes a file, which can be brought back for a while.",
        run: delete,
    },
    Method {
        name: "read",
        signature: &["array", "string", "int"],
        help: "read(filename, chunk_idx): the id of that chunk, and the URLs of its replicas.",
        run: read,
    },
    Method {
        name: "get_primary",
        signature: &["array", "string", "int", "boolean"],
        help: "get_primary(filename, chunk_idx, force_new_primary): the id of that chunk, the URL of \
               its primary, and those of its replicas.",
        run: get_primary,
    },
    Method {
        name: "heartbeat",
        signature: &["array", "string", "array"],
        help: "heartbeat(url, [[chunk_id, version], ...]): the ids of the chunks that the \
               chunkserver is to delete.",
        run: |shell, arguments| beat(shell, arguments, false),
    },
    Method {
        name: "link_with_master",
        signature: &["array", "string", "array"],
        help: "link_with_master(url, [[chunk_id, version], ...]): a chunkserver starts; the ids of \
               the chunks that it is to delete.",
        run: |shell, arguments| beat(shell, arguments, true),
    },
    Method {
        name: "remove_chunkserver",
        signature: &["nil", "string"],
        help: "remove_chunkserver(url): nobody answers there.",
        run: remove_chunkserver,
    },
    Method {
        name: "report_invalid_checksum",
        signature: &["nil", "int", "string"],
        help: "report_invalid_checksum(chunk_id, bad_url): the copy there is damaged.",
        run: report_invalid_checksum,
    },
];

fn name(arguments: &mut Arguments) -> Result<FileName, Fault> {
    let name = arguments.text()?;
    FileName::new(&name).map_err(|error| fault(Refusal::invalid(error.to_string())))
}

impl MasterShell {
    /// Asks the machine, and waits for its answer.
    fn ask(&self, request: MasterRequest) -> Result<MasterReply, Refusal> {
        let (ticket, awaited) = Ticket::new();
        self.request(request, ticket);
        match awaited.wait() {
            Some(MasterReply::Refused(refusal)) => Err(refusal),
            Some(MasterReply::NotLeader(reply)) => {
                let leader = reply.leader.map(|it| format!(": ask http://{it}"));
                let leader = leader.unwrap_or_else(|| ": try again".to_owned());
                Err(Refusal::unavailable(format!("this master does not lead{leader}")))
            }
            Some(reply) => Ok(reply),
            None => Err(Refusal::unknown_outcome("no answer in time")),
        }
    }

    /// How many chunks a file has, and where the one is that was asked for; nothing if
    /// there is no such file.
    fn locate(
        &self,
        name: &FileName,
        index: usize,
    ) -> Result<Option<(usize, Option<Located>)>, Fault> {
        let request = MasterRequest::Locate { name: name.clone(), index, count: None };
        match self.ask(request) {
            Ok(MasterReply::Located { chunk_bytes, .. }) if chunk_bytes != ORIGINAL_CHUNK_BYTES => {
                Err(fault(Refusal::invalid(format!(
                    "the chunks of {name} have {chunk_bytes} bytes: by XML-RPC only files can be \
                     used whose chunks have {ORIGINAL_CHUNK_BYTES}"
                ))))
            }
            Ok(MasterReply::Located { total, mut chunks, .. }) => Ok(Some((total, chunks.pop()))),
            Ok(_) => Err(strange()),
            Err(refusal) if refusal.reason == Reason::NotFound => Ok(None),
            Err(refusal) => Err(fault(refusal)),
        }
    }

    fn lease(
        &self,
        name: &FileName,
        index: usize,
        failed: Option<FailedPrimary>,
    ) -> Result<LeaseGranted, Refusal> {
        let request = MasterRequest::Lease { name: name.clone(), index: Some(index), failed };
        match self.ask(request)? {
            MasterReply::Lease(lease) => Ok(lease),
            _ => Err(Refusal::unavailable("an answer that is none")),
        }
    }
}

fn strange() -> Fault {
    fault(Refusal::unavailable("an answer that is none"))
}

fn urls(addresses: &[SocketAddrV4]) -> Value {
    Value::Array(addresses.iter().map(|address| url(*address)).collect())
}

fn create(shell: &MasterShell, mut arguments: Arguments) -> Outcome {
    let name = name(&mut arguments)?;
    let there = shell.locate(&name, 0)?;
    if there.is_none() {
        let chunk_bytes = Some(ORIGINAL_CHUNK_BYTES);
        let request = MasterRequest::Create { name: name.clone(), chunk_bytes, copies: None };
        shell.ask(request).map_err(fault)?;
    }
    let count = there.map_or(0, |(count, _)| count);
    shell.lease(&name, count, None).map_err(fault)?;
    Ok(text(&format!("successfully created {name}")))
}

fn delete(shell: &MasterShell, mut arguments: Arguments) -> Outcome {
    let name = name(&mut arguments)?;
    match shell.ask(MasterRequest::Delete { name: name.clone() }) {
        Ok(_) => Ok(text(&format!("successfully deleted {name}"))),
        Err(refusal) if refusal.reason == Reason::NotFound => Ok(text("file not found")),
        Err(refusal) => Err(fault(refusal)),
    }
}

fn index(arguments: &mut Arguments) -> Result<usize, Fault> {
    Ok(usize::try_from(arguments.number()?).unwrap_or(usize::MAX))
}

fn read(shell: &MasterShell, mut arguments: Arguments) -> Outcome {
    let (name, index) = (name(&mut arguments)?, index(&mut arguments)?);
    Ok(match shell.locate(&name, index)? {
        None => text("file not found"),
        Some((_, None)) => text("requested chunk idx out of range"),
        Some((_, Some(found))) => Value::Array(vec![number(found.chunk.0), urls(&found.replicas)]),
    })
}

fn get_primary(shell: &MasterShell, mut arguments: Arguments) -> Outcome {
    let (name, index) = (name(&mut arguments)?, index(&mut arguments)?);
    let is_forced = arguments.flag()?;
    let found = match shell.locate(&name, index)? {
        None => return Ok(text("file not found")),
        Some((_, None)) => return Ok(text("requested chunk idx out of range")),
        Some((_, Some(found))) => found,
    };
    let lease = shell.lease(&name, index, None).and_then(|lease| match is_forced {
        false => Ok(lease),
        true => {
            let failed = FailedPrimary { server: lease.primary, version: lease.version };
            shell.lease(&name, index, Some(failed))
        }
    });
    match lease {
        Ok(lease) => {
            shell.originals.renew(lease.primary, lease.chunk);
            let id = number(lease.chunk.0);
            Ok(Value::Array(vec![id, url(lease.primary), urls(&lease.replicas)]))
        }
        Err(_) if found.replicas.is_empty() => {
            Ok(text(&format!("no replicas remaining for chunk id {}", found.chunk.0)))
        }
        Err(refusal) => Err(fault(refusal)),
    }
}

fn beat(shell: &MasterShell, mut arguments: Arguments, is_link: bool) -> Outcome {
    let address = arguments.url()?;
    let holds = arguments.pairs()?;
    let start = shell.originals.heard(address, is_link).map_err(fault)?;
    let beat = Heartbeat {
        server: format!("http://{address}").into(),
        start,
        address: Some(address),
        holds: Some(holds.into_iter().map(|(id, it)| (ChunkId(id), Version(it))).collect()),
        original: true,
        ..Heartbeat::default()
    };
    match shell.ask(MasterRequest::Heartbeat(beat)).map_err(fault)? {
        MasterReply::Beat(BeatReply { delete, .. }) => {
            Ok(Value::Array(delete.iter().map(|(chunk, _)| number(chunk.0)).collect()))
        }
        _ => Err(strange()),
    }
}

fn remove_chunkserver(shell: &MasterShell, mut arguments: Arguments) -> Outcome {
    let address = arguments.url()?;
    shell.ask(MasterRequest::Unreached { address }).map_err(fault)?;
    Ok(Value::Nil)
}

fn report_invalid_checksum(shell: &MasterShell, mut arguments: Arguments) -> Outcome {
    let (chunk, address) = (ChunkId(arguments.number()?), arguments.url()?);
    if let Some(server) = shell.server_at(address) {
        shell.ask(MasterRequest::Damaged { server, chunk }).map_err(fault)?;
    }
    Ok(Value::Nil)
}

// ---- what a master asks a chunkserver of the original ----

/// The chunkservers of the original that have been heard of.
#[derive(Default)]
pub(super) struct Originals(Mutex<BTreeMap<SocketAddrV4, u64>>);

impl Originals {
    /// Notes a sign of life; gives the number of the life that it is of.
    fn heard(&self, address: SocketAddrV4, is_new: bool) -> Result<u64, Refusal> {
        let mut lives = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lives.len() >= MAX_ORIGINALS && !lives.contains_key(&address) {
            return Err(Refusal::unavailable("too many chunkservers of the original are known"));
        }
        let life = lives.entry(address).or_default();
        *life += u64::from(is_new);
        Ok(*life)
    }

    /// Whether an original chunkserver is there.
    pub(super) fn has(&self, address: SocketAddrV4) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&address)
    }

    /// The primary of a chunk is to lead it for the whole time from now on, if it counts
    /// time at all.
    fn renew(&self, primary: SocketAddrV4, chunk: ChunkId) {
        if self.has(primary) {
            let deadline = Instant::now() + crate::gfs::master::CALL_PATIENCE;
            if let Err(why) = assign(primary, chunk, deadline) {
                tracing::info!("{primary} was not made primary of {chunk} anew: {why}");
            }
        }
    }
}

/// Asks an original chunkserver what the machine wants to know; nothing if it does not
/// answer, or can't be asked that.
pub(super) fn translate(
    to: SocketAddrV4,
    request: &ChunkRequest,
    deadline: Instant,
) -> Option<Result<ChunkReply, Refusal>> {
    let call = |method: &str, arguments: Vec<Value>| call(to, method, arguments, deadline);
    let set_version = |chunk: &ChunkId, version: &Version| {
        call("update_version", vec![number(chunk.0), number(version.0)])
    };
    let agreed = ChunkReply::Agreed { serial: Serial::default() };
    let outcome = match request {
        ChunkRequest::Make { chunk, version, copy_of: None } => {
            let name = text(&format!("chunk-{}", chunk.0));
            call("create", vec![name, number(chunk.0)])
                .and_then(|_| set_version(chunk, version))
                .map(|_| agreed)
        }
        ChunkRequest::Promise { chunk, version } => set_version(chunk, version).map(|_| agreed),
        ChunkRequest::Lead { chunk, .. } => {
            assign(to, *chunk, deadline).map(|_| ChunkReply::Done(Status::Ok))
        }
        ChunkRequest::Replicate { chunk, version, from } => {
            let arguments = vec![number(chunk.0), number(version.0), url(*from)];
            match call("replicate_data", arguments) {
                Ok(Value::String(answer)) if answer == "success" => Ok(agreed),
                Ok(other) => Err(NoAnswer::Fault(format!("replicate_data: {other:?}"))),
                Err(error) => Err(error),
            }
        }
        // It can't be told to stop: whoever waits for that waits until it is gone.
        _ => return None,
    };
    match outcome {
        Ok(reply) => Some(Ok(reply)),
        Err(NoAnswer::Silence) => None,
        Err(NoAnswer::Fault(why)) => Some(Err(Refusal::unavailable(why))),
    }
}

/// Why an original chunkserver has not done what it was asked.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("no answer")]
    Silence,
    #[error("{0}")]
    Fault(String),
}

fn assign(to: SocketAddrV4, chunk: ChunkId, deadline: Instant) -> Result<Value, NoAnswer> {
    let day = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let end = Value::Double((day + ORIGINAL_PRIMARY).as_secs_f64());
    call(to, "assign_primary", vec![number(chunk.0), end], deadline)
}

fn call(
    to: SocketAddrV4,
    method: &str,
    arguments: Vec<Value>,
    deadline: Instant,
) -> Result<Value, NoAnswer> {
    let body = xml_rpc::write_call(method, arguments)
        .map_err(|error| NoAnswer::Fault(error.to_string()))?;
    let reply = http::post(to, &body, deadline).map_err(|error| {
        tracing::debug!("{method} at {to}: {error}");
        NoAnswer::Silence
    })?;
    xml_rpc::read_reply(&reply).map_err(|fault| NoAnswer::Fault(fault.to_string()))
}
