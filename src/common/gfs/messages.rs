//! What the master and the chunkservers understand and answer.
//!
//! A message is one frame: a JSON object, and right behind it, in the same frame,
//! as many raw bytes as its `"bytes"` announces. What has no data has no
//! `"bytes"`. So data is neither quoted nor copied on its way through JSON, and a
//! program without any use for data needs to know nothing of it.

use super::{ChunkId, FileName, Serial, Version};
use crate::consensus::requests::{GroupReply, GroupRequest, Kind, NotLeader};
use crate::wire::frame::HEADER_BYTES;
use crate::wire::{FrameError, MAX_FRAME_BYTES, Refusal, append_frame, command_of};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddrV4;
use std::sync::Arc;

/// Raw bytes of a message: shared rather than copied.
pub type Data = Arc<[u8]>;

/// A message and its raw bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Packet<M> {
    /// What stands in the JSON.
    pub message: M,
    /// What stands behind it.
    pub data: Data,
}

impl<M> Packet<M> {
    /// A message without data.
    pub fn bare(message: M) -> Self {
        Self { message, data: Data::from([]) }
    }
}

#[derive(Deserialize)]
struct Announced {
    #[serde(default)]
    bytes: usize,
}

#[derive(Serialize)]
struct WithBytes<'a, M> {
    #[serde(flatten)]
    message: &'a M,
    bytes: usize,
}

/// Divides the body of a frame into its JSON and the bytes behind it.
///
/// # Errors
/// When there is no JSON, or not as many bytes as it announces.
pub fn divide(body: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let mut values = serde_json::Deserializer::from_slice(body).into_iter::<Announced>();
    let bytes = match values.next() {
        Some(Ok(_)) if !body.trim_ascii_start().starts_with(b"{") => return Ok((body, &[])),
        Some(Ok(head)) => head.bytes,
        // Whoever reads the JSON says what is wrong with it.
        _ => return Ok((body, &[])),
    };
    let end = values.byte_offset();
    let (json, data) = body.split_at(end);
    if data.len() != bytes && !(bytes == 0 && data.iter().all(u8::is_ascii_whitespace)) {
        return Err(Refusal::invalid(format!(
            "{} bytes follow the JSON and its \"bytes\" says {bytes}",
            data.len()
        )));
    }
    Ok((json, if bytes == 0 { &[] } else { data }))
}

impl<M: DeserializeOwned> Packet<M> {
    /// Reads a request.
    ///
    /// # Errors
    /// The refusal that is to be the answer.
    pub fn request(body: &[u8]) -> Result<Self, Refusal> {
        let (json, data) = divide(body)?;
        let cmd = command_of(json)?;
        let message = serde_json::from_slice(json)
            .map_err(|error| Refusal::invalid(format!("{cmd}: {error}")))?;
        Ok(Self { message, data: data.into() })
    }

    /// Reads a reply.
    ///
    /// # Errors
    /// The refusal that it is, or one that says that it can't be understood.
    pub fn reply(body: &[u8]) -> Result<Self, Refusal> {
        let (json, data) = divide(body)?;
        if let Ok(refusal) = serde_json::from_slice::<Refusal>(json) {
            return Err(refusal);
        }
        let message = serde_json::from_slice(json)
            .map_err(|error| Refusal::unavailable(format!("an answer that is none: {error}")))?;
        Ok(Self { message, data: data.into() })
    }
}

/// Appends `message` with `data` as one frame to `out`.
///
/// # Errors
/// [`FrameError::TooLong`], with `out` as it was.
pub fn append_packet(
    out: &mut Vec<u8>,
    message: &impl Serialize,
    data: &[u8],
) -> Result<(), FrameError> {
    if data.is_empty() {
        return append_frame(out, message);
    }
    let begin = out.len();
    append_frame(out, &WithBytes { message, bytes: data.len() })?;
    let length = out.len() - begin - HEADER_BYTES + data.len();
    match i32::try_from(length) {
        Ok(announced) if length <= MAX_FRAME_BYTES => {
            out[begin..begin + HEADER_BYTES].copy_from_slice(&announced.to_be_bytes());
            out.extend_from_slice(data);
            Ok(())
        }
        _ => {
            out.truncate(begin);
            Err(FrameError::TooLong(length))
        }
    }
}

// ---- the master ----

/// Anything that a master is asked.
#[derive(Clone, Debug)]
pub enum Request {
    /// By clients and chunkservers, for the one that leads.
    Master(MasterRequest),
    /// By masters, or about them.
    Group(Box<GroupRequest>),
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// A [`Refusal`] that says what is wrong with it.
    pub fn decode(body: &[u8]) -> Result<Self, Refusal> {
        let (json, _) = divide(body)?;
        match GroupRequest::decode(Kind::MASTER, &command_of(json)?, json)? {
            Some(request) => Ok(Self::Group(Box::new(request))),
            None => Packet::request(body).map(|packet| Self::Master(packet.message)),
        }
    }
}

/// A request to the master.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum MasterRequest {
    /// Make a file without content.
    Create {
        /// Its name.
        name: FileName,
        /// The size of its chunks; [`super::DEFAULT_CHUNK_BYTES`] if none is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        chunk_bytes: Option<u64>,
        /// How many copies of each chunk; the master's own figure if none is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        copies: Option<u8>,
    },
    /// Delete a file.
    Delete {
        /// Which.
        name: FileName,
    },
    /// Bring back the file of this name that was deleted last.
    Undelete {
        /// Which.
        name: FileName,
    },
    /// Call a file, or all that lies under a name, otherwise.
    Rename {
        /// What it is called.
        from: FileName,
        /// What it is to be called.
        to: FileName,
    },
    /// Copy a file, or all that lies under a name, as it is at this moment.
    Snapshot {
        /// What.
        from: FileName,
        /// What the copy is to be called.
        to: FileName,
    },
    /// List what lies under a name, a page at a time.
    Ls {
        /// Under what; everything if nothing is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        under: Option<FileName>,
        /// From the first name after this one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<FileName>,
        /// How many at most.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<usize>,
    },
    /// What there is to know of a file.
    Stat {
        /// Which.
        name: FileName,
    },
    /// Where chunks of a file are.
    Locate {
        /// Of which.
        name: FileName,
        /// From this chunk on.
        index: usize,
        /// How many at most; one if nothing is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        count: Option<usize>,
    },
    /// Who takes changes of a chunk. Makes the chunk if it is the next one.
    Lease {
        /// Of which file.
        name: FileName,
        /// Which chunk; the last one if none is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        index: Option<usize>,
        /// Who did not take them, if somebody was asked already.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failed: Option<FailedPrimary>,
    },
    /// Whether all is well.
    Census {},
    /// A chunkserver is alive.
    Heartbeat(Heartbeat),
    /// A primary can't reach members of its chunk.
    Failed {
        /// Whose chunk.
        chunk: ChunkId,
        /// Under which version.
        version: Version,
        /// Who does not answer.
        silent: Vec<SocketAddrV4>,
        /// Who refuses.
        refused: Vec<SocketAddrV4>,
    },
    /// A client of the original can't reach a chunkserver.
    Unreached {
        /// Where it should be.
        address: SocketAddrV4,
    },
    /// A chunkserver's copy of a chunk is damaged.
    Damaged {
        /// The chunkserver, by its own name.
        server: Box<str>,
        /// The chunk.
        chunk: ChunkId,
    },
}

/// A primary that a client could not use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedPrimary {
    /// Where it is.
    pub server: SocketAddrV4,
    /// The version under which it was primary.
    pub version: Version,
}

/// A chunkserver's sign of life, and what it holds if it was asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// What it calls itself, for as long as its disk lasts.
    pub server: Box<str>,
    /// Drawn at each start of the process.
    pub start: u64,
    /// Where it is reached.
    pub address: Option<SocketAddrV4>,
    /// Where it stands: copies of a chunk are spread over different racks.
    #[serde(default)]
    pub rack: Box<str>,
    /// How many bytes of its disk are in use.
    #[serde(default)]
    pub used: u64,
    /// How many are free.
    #[serde(default)]
    pub free: u64,
    /// Whether it can't take any more.
    #[serde(default)]
    pub full: bool,
    /// All copies that it holds and may serve: given when it was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holds: Option<Vec<(ChunkId, Version)>>,
    /// Whether it is primary of any chunk, said together with what it holds: a master that has
    /// not made it so tells it first to lead nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leads: bool,
    /// Copies that are damaged, said together with what it holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<ChunkId>,
    /// What it has deleted since it was told to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<ChunkId>,
    /// Whether it is a program of the original, which knows of no lease and says with
    /// each sign of life what it holds. Never on the wire: such a program speaks
    /// otherwise.
    #[serde(skip)]
    pub original: bool,
}

/// What the master answers to a heartbeat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BeatReply {
    /// `ok`, or `link`: say first what you hold, and lead nothing any more.
    pub status: Beat,
    /// How long it may serve, counted from when the heartbeat was sent.
    pub lease_ms: u64,
    /// What it must not serve below these versions, as long as they are named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fences: Vec<(ChunkId, Version)>,
    /// What it must delete, unless it has a higher version by now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub delete: Vec<(ChunkId, Version)>,
    /// Whether the next heartbeat is to say what it holds.
    #[serde(default)]
    pub inventory: bool,
}

/// How a heartbeat was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Beat {
    /// It is known.
    Ok,
    /// It is not known, or no longer: it has to say what it holds.
    Link,
}

/// One file of a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listed {
    /// Its name.
    pub name: FileName,
    /// How many chunks it has.
    pub chunks: usize,
    /// How large they are.
    pub chunk_bytes: u64,
    /// When it was made, in milliseconds since 1970.
    pub made_ms: u64,
}

/// Where a chunk is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Located {
    /// Which one of the file.
    pub index: usize,
    /// Which chunk.
    pub chunk: ChunkId,
    /// Its version; 0 if it was never written to.
    pub version: Version,
    /// Who can be asked for it now.
    pub replicas: Vec<SocketAddrV4>,
    /// For how long, counted from when the question was sent.
    pub valid_ms: u64,
}

/// Who takes changes of a chunk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeaseGranted {
    /// Which one of the file.
    pub index: usize,
    /// Which chunk.
    pub chunk: ChunkId,
    /// The version under which it is to be called.
    pub version: Version,
    /// How large the file's chunks are.
    pub chunk_bytes: u64,
    /// Who is to be asked.
    pub primary: SocketAddrV4,
    /// All members, the primary among them.
    pub replicas: Vec<SocketAddrV4>,
}

/// Whether all is well.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Census {
    /// Chunkservers that are alive.
    pub servers: usize,
    /// Files.
    pub files: usize,
    /// Files that were deleted and can be brought back.
    pub deleted: usize,
    /// Chunks, those of deleted files too.
    pub chunks: usize,
    /// Copies of them that can be read.
    pub copies: usize,
    /// Chunks with fewer copies than they should have and can have.
    pub short: Vec<ChunkId>,
    /// Chunks of which no copy can be read now.
    pub lost: Vec<ChunkId>,
    /// Copies that are to be deleted and are still there.
    pub orphans: usize,
    /// Copies that are being made.
    pub copying: usize,
    /// Copies that were found damaged since the master started, and where.
    pub damaged: Vec<(ChunkId, SocketAddrV4)>,
}

/// What the master answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum MasterReply {
    /// It is done.
    Done(Status),
    /// A page of names.
    Listed {
        /// The names.
        files: Vec<Listed>,
        /// Whether there are more after them.
        more: bool,
    },
    /// One file.
    Stat {
        /// The file.
        file: Listed,
        /// How many copies its chunks are to have.
        copies: u8,
    },
    /// Where chunks are.
    Located {
        /// How many chunks the file has.
        total: usize,
        /// How large they are.
        chunk_bytes: u64,
        /// Those that were asked for.
        chunks: Vec<Located>,
    },
    /// Who takes changes.
    Lease(LeaseGranted),
    /// Whether all is well.
    Census(Census),
    /// To a heartbeat.
    Beat(BeatReply),
    /// Nothing was done: another master leads.
    NotLeader(NotLeader),
    /// To what masters ask each other.
    Group(GroupReply),
    /// No.
    Refused(Refusal),
}

/// `{"status":"ok"}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Status {
    /// It is done.
    Ok,
}

// ---- the chunkservers ----

/// The name of data that was pushed: who pushed it, and the how-manieth it was.
pub type DataId = (u64, u64);

/// Who appends, and the how-manieth append it is: what makes it exactly once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Drawn by the client.
    pub client: u64,
    /// Counts up; the next append begins when this one is answered.
    pub number: u64,
}

/// A request to a chunkserver.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum ChunkRequest {
    /// A client reads. Answered with as much as there is.
    Read {
        /// Which chunk.
        chunk: ChunkId,
        /// The version that the client knows: an older copy is not read.
        version: Version,
        /// From where in the chunk.
        offset: u64,
        /// How much at most.
        length: usize,
    },
    /// A client asks how long a chunk is.
    Length {
        /// Which chunk.
        chunk: ChunkId,
        /// The version that the client knows.
        version: Version,
    },
    /// Data for later, to be kept and passed on along the chain.
    Push {
        /// What it will be called by.
        id: DataId,
        /// Who is to get it after this one, in this order.
        chain: Vec<SocketAddrV4>,
        /// For which chunk, if whoever has it used will not name the data.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        chunk: Option<ChunkId>,
    },
    /// A client writes at a place.
    Write {
        /// Which chunk.
        chunk: ChunkId,
        /// Under which version.
        version: Version,
        /// Where in the chunk.
        offset: u64,
        /// What was pushed; else it comes with this request.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pushed: Option<DataId>,
    },
    /// A client appends a record.
    Append {
        /// To which chunk.
        chunk: ChunkId,
        /// Under which version.
        version: Version,
        /// What was pushed; else it comes with this request.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pushed: Option<DataId>,
        /// Who wants it exactly once.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mark: Option<Mark>,
    },
    /// A primary has put a mutation in its place.
    Apply(Apply),
    /// A new primary wants this member to have all that it has.
    Establish {
        /// Which chunk.
        chunk: ChunkId,
        /// Under which version.
        version: Version,
        /// The primary's serial.
        serial: Serial,
        /// Where the primary is.
        from: SocketAddrV4,
    },
    /// A copy that is behind asks what it has missed.
    Missed {
        /// Which chunk.
        chunk: ChunkId,
        /// The last one that it has; nothing if it has nothing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<Serial>,
    },
    /// A copy that is behind asks for a part.
    Fetch {
        /// Which chunk.
        chunk: ChunkId,
        /// From where.
        offset: u64,
        /// How much.
        length: usize,
    },
    /// The master wants a chunk made, empty or as a copy of one that is there.
    Make {
        /// Which.
        chunk: ChunkId,
        /// Its first version.
        version: Version,
        /// What it is to be a copy of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        copy_of: Option<ChunkId>,
    },
    /// The master wants older versions refused.
    Promise {
        /// Of which chunk.
        chunk: ChunkId,
        /// Older than this one.
        version: Version,
    },
    /// The master wants nothing served below a version.
    Fence {
        /// Of which chunk.
        chunk: ChunkId,
        /// Below this one.
        below: Version,
    },
    /// The master makes this chunkserver the primary.
    Lead {
        /// Of which chunk.
        chunk: ChunkId,
        /// Under which version.
        version: Version,
        /// The other members.
        others: Vec<SocketAddrV4>,
        /// How long the chunk can be. (`"bytes"` announces data.)
        #[serde(rename = "limit")]
        bytes: u64,
    },
    /// The master wants a copy of a chunk here.
    Replicate {
        /// Which.
        chunk: ChunkId,
        /// In which version.
        version: Version,
        /// Who has it.
        from: SocketAddrV4,
    },
    /// This chunkserver is to lead nothing any more.
    Resign {},
}

/// A mutation in its place. Its data comes with it, or was pushed before. Without
/// any data the chunk becomes `offset` long, filled with zeros.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Apply {
    /// Which chunk.
    pub chunk: ChunkId,
    /// Under which version.
    pub version: Version,
    /// The how-manieth mutation it is.
    pub serial: Serial,
    /// Where in the chunk.
    pub offset: u64,
    /// What was pushed; else it comes with this request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pushed: Option<DataId>,
    /// Whose append it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
}

/// An append that was made: whose, and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appended {
    /// Whose.
    pub mark: Mark,
    /// Where in the chunk.
    pub offset: u64,
}

/// What a copy that was behind has missed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MissedReply {
    /// The version of whoever answers.
    pub version: Version,
    /// The last mutation that it has applied.
    pub serial: Serial,
    /// How long the chunk is.
    pub length: u64,
    /// What to fetch: offset and length.
    pub regions: Vec<(u64, u64)>,
    /// The last append of every client that numbers them.
    pub marks: Vec<Appended>,
}

/// What a chunkserver answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ChunkReply {
    /// What a copy has missed.
    Missed(MissedReply),
    /// Where a write or an append stands in the chunk.
    Written {
        /// Where.
        offset: u64,
    },
    /// A member has applied all mutations up to this one, or promises.
    Agreed {
        /// The last one that it has applied.
        serial: Serial,
    },
    /// How long the chunk is; with what was read.
    Length {
        /// In bytes.
        length: u64,
    },
    /// The record does not fit: the chunk is closed, and the next one is to take
    /// it.
    Closed {
        /// Always so.
        closed: bool,
    },
    /// Pushed data could not be passed on as far as it should.
    Unreached {
        /// Who did not take it.
        unreached: SocketAddrV4,
    },
    /// It is done.
    Done(Status),
    /// No.
    Refused(Refusal),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_bytes_follow_the_json_in_the_same_frame() {
        let append = ChunkRequest::Append {
            chunk: ChunkId(7),
            version: Version(1),
            pushed: None,
            mark: Some(Mark { client: u64::MAX, number: 3 }),
        };
        let mut frame = Vec::new();
        append_packet(&mut frame, &append, b"{\0\xff").unwrap();
        let body = &frame[HEADER_BYTES..];
        assert_eq!(i32::from_be_bytes(frame[..4].try_into().unwrap()), body.len() as i32);
        let packet = Packet::<ChunkRequest>::request(body).unwrap();
        assert_eq!(packet, Packet { message: append, data: Data::from(*b"{\0\xff") });
    }

    #[test]
    fn what_is_asked_without_data_announces_none() {
        let (chunk, version, others) = (ChunkId(7), Version(1), Vec::new());
        let lead = ChunkRequest::Lead { chunk, version, others, bytes: 4096 };
        let mut frame = Vec::new();
        append_packet(&mut frame, &lead, &[]).unwrap();
        let packet = Packet::<ChunkRequest>::request(&frame[HEADER_BYTES..]).unwrap();
        assert_eq!(packet, Packet::bare(lead));
    }

    #[test]
    fn bytes_that_were_not_announced_are_refused() {
        let request = |body: &[u8]| Packet::<ChunkRequest>::request(body).unwrap_err().error;
        let announced = br#"{"cmd":"push","id":[1,2],"chain":[],"bytes":3}ab"#;
        assert!(request(announced).contains("2 bytes follow"), "{}", request(announced));
        let silent = br#"{"cmd":"push","id":[1,2],"chain":[]}ab"#;
        assert!(request(silent).contains("2 bytes follow"));
        assert!(request(b"[1]").contains("not a JSON object"));
        assert!(request(br#"{"cmd":"fly"}"#).contains("fly"));
    }
}
