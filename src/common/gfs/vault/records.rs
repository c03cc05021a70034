//! What a vault keeps in its store, and how it is written.
//!
//! ```text
//! Entries   0 chunk            version serial length joining     a copy
//!           1 chunk group      up to 16 checksums                of 1 MiB of it
//!           2 chunk client     number offset                     its last append
//!           3 chunk slot       serial offset length              one of the last mutations
//! Log       number             chunk offset data                 to be written again
//! ```
//!
//! All numbers are big-endian, 8 bytes; group 4, slot 1, a checksum 4.

use crate::gfs::chunkserver::{Found, MAX_KEPT_REGIONS};
use crate::gfs::{BLOCK_BYTES, ChunkId, Serial, Version};
use crate::store::{Change, Space, Store, StoreError};
use byteorder::{BigEndian, ByteOrder};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

/// How many checksums stand together.
pub(super) const GROUP: usize = 16;

/// How many of the last mutations are kept on the disk.
pub(super) const SLOTS: u64 = 128;

// All that can be missing of a copy that fell behind within a window.
const _: () = assert!(SLOTS as usize >= crate::gfs::chunkserver::WINDOW);
const _: () = assert!(SLOTS as usize <= MAX_KEPT_REGIONS);

const COPY: u8 = 0;
const SUMS: u8 = 1;
const MARK: u8 = 2;
const REGION: u8 = 3;

/// A copy as it is read.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub(super) found: Found,
    pub(super) sums: Vec<u32>,
}

/// What stands with a copy.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Head {
    pub(super) version: Version,
    pub(super) serial: Serial,
    pub(super) length: u64,
    pub(super) joining: bool,
}

fn key(kind: u8, chunk: ChunkId, rest: &[u8]) -> Vec<u8> {
    let mut key = vec![kind];
    key.extend_from_slice(&chunk.0.to_be_bytes());
    key.extend_from_slice(rest);
    key
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

pub(super) fn put_head(chunk: ChunkId, head: Head) -> Change {
    let Head { version, serial, length, joining } = head;
    let value = numbers(&[version.0, serial.0, length, u64::from(joining)]);
    Change::put(Space::Entries, key(COPY, chunk, &[]), value)
}

/// The groups of checksums that the blocks from `first` to `last` are in.
pub(super) fn put_sums(chunk: ChunkId, sums: &[u32], first: usize, last: usize) -> Vec<Change> {
    let put = |group: usize| {
        let end = sums.len().min((group + 1) * GROUP);
        let part = sums.get(group * GROUP..end).unwrap_or_default();
        let value: Vec<u8> = part.iter().flat_map(|sum| sum.to_be_bytes()).collect();
        Change::put(Space::Entries, key(SUMS, chunk, &(group as u32).to_be_bytes()), value)
    };
    (first / GROUP..=last / GROUP).map(put).collect()
}

pub(super) fn put_mark(chunk: ChunkId, client: u64, number: u64, offset: u64) -> Change {
    let value = numbers(&[number, offset]);
    Change::put(Space::Entries, key(MARK, chunk, &client.to_be_bytes()), value)
}

pub(super) fn put_region(chunk: ChunkId, serial: Serial, offset: u64, length: u64) -> Change {
    let slot = (serial.0 % SLOTS) as u8;
    let value = numbers(&[serial.0, offset, length]);
    Change::put(Space::Entries, key(REGION, chunk, &[slot]), value)
}

pub(super) fn put_redo(number: u64, chunk: ChunkId, offset: u64, data: &[u8]) -> Change {
    let mut value = numbers(&[chunk.0, offset]);
    value.extend_from_slice(data);
    Change::put(Space::Log, number.to_be_bytes(), value)
}

pub(super) fn remove_redo(number: u64) -> Change {
    Change::remove(Space::Log, number.to_be_bytes())
}

pub(super) fn remove_regions(chunk: ChunkId) -> impl Iterator<Item = Change> {
    (0..SLOTS).map(move |slot| Change::remove(Space::Entries, key(REGION, chunk, &[slot as u8])))
}

/// All that stands of a copy with so many blocks and these clients.
pub(super) fn remove_copy(
    chunk: ChunkId,
    blocks: usize,
    clients: impl Iterator<Item = u64>,
) -> Vec<Change> {
    let groups = (0..blocks.div_ceil(GROUP) as u32)
        .map(|group| Change::remove(Space::Entries, key(SUMS, chunk, &group.to_be_bytes())));
    let marks = clients
        .map(|client| Change::remove(Space::Entries, key(MARK, chunk, &client.to_be_bytes())));
    let head = Change::remove(Space::Entries, key(COPY, chunk, &[]));
    std::iter::once(head).chain(groups).chain(marks).chain(remove_regions(chunk)).collect()
}

/// A record that is to be written again: its number, chunk, place and data.
pub(super) fn redo<'a>(key: &[u8], value: &'a [u8]) -> io::Result<(u64, ChunkId, u64, &'a [u8])> {
    if key.len() != 8 || value.len() < 16 {
        return Err(io::Error::other("a record is none of ours"));
    }
    let (head, data) = value.split_at(16);
    let (chunk, offset) = (BigEndian::read_u64(head), BigEndian::read_u64(&head[8..]));
    Ok((BigEndian::read_u64(key), ChunkId(chunk), offset, data))
}

/// Reads all copies.
pub(super) fn read(store: &dyn Store) -> Result<BTreeMap<ChunkId, Read>, StoreError> {
    let (mut copies, mut strange) = (BTreeMap::<ChunkId, Read>::new(), None);
    store.scan(Space::Entries, &[COPY], &mut |key, value| {
        if read_one(&mut copies, key, value).is_none() {
            strange = Some(format!("an entry of {} and {} bytes", key.len(), value.len()));
        }
        strange.is_none()
    })?;
    if let Some(what) = strange {
        return Err(StoreError::Damaged { path: PathBuf::from("the chunks' records"), what });
    }
    for (chunk, Read { found, sums }) in &mut copies {
        let blocks = found.length.div_ceil(BLOCK_BYTES as u64) as usize;
        if sums.len() != blocks {
            tracing::error!("{chunk} has {blocks} blocks and {} checksums", sums.len());
            found.damaged = true;
        }
        found.chunk = *chunk;
        found.regions.sort_unstable();
    }
    Ok(copies)
}

/// Takes one entry; nothing if it is none of ours.
fn read_one(copies: &mut BTreeMap<ChunkId, Read>, key: &[u8], value: &[u8]) -> Option<()> {
    let (&kind, rest) = key.split_first()?;
    let (chunk, rest) = rest.split_at_checked(8)?;
    let chunk = ChunkId(BigEndian::read_u64(chunk));
    if kind != SUMS && !value.len().is_multiple_of(8) {
        return None;
    }
    let numbers: Vec<u64> = value.chunks_exact(8).map(BigEndian::read_u64).collect();
    match (kind, rest.len(), numbers.as_slice()) {
        (COPY, 0, &[version, serial, length, joining]) => {
            let found = &mut copies.entry(chunk).or_default().found;
            (found.version, found.serial) = (Version(version), Serial(serial));
            (found.length, found.joining) = (length, joining != 0);
        }
        (SUMS, 4, _) if value.len().is_multiple_of(4) => {
            let Read { found, sums } = copies.get_mut(&chunk)?;
            // Those of a group that lacks are not those of the next one.
            let place = BigEndian::read_u32(rest) as usize * GROUP;
            found.damaged |= sums.len() != place;
            sums.resize(sums.len().max(place), 0);
            sums.truncate(place);
            sums.extend(value.chunks_exact(4).map(BigEndian::read_u32));
        }
        (MARK, 8, &[number, offset]) => {
            let client = BigEndian::read_u64(rest);
            copies.get_mut(&chunk)?.found.marks.push((client, number, offset));
        }
        (REGION, 1, &[serial, offset, length]) => {
            copies.get_mut(&chunk)?.found.regions.push((Serial(serial), offset, length));
        }
        _ => return None,
    }
    Some(())
}
