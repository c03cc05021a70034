//! What a server keeps on its disk, and how it is written there.
//!
//! Every entry is kept under its place and key, newest version only; every seat
//! in a group with the revision since which it is held; and the server's
//! identity. What is on the disk of a server that starts again means:
//!
//! * in the arc of a *complete* seat everything that was committed is there, and
//!   what lies above the seat's watermark may or may not be committed;
//! * anything else was right once: it is compared with what the group's primary
//!   has before it counts again.

use super::content::{Content, Fences};
use super::ring::{Arc, Point};
use super::{Entry, Text, Version};
use crate::store::{Change, Space, Store, StoreError};
use crate::view::{Revision, Start};
use crate::wire::Identity;
use byteorder::{BigEndian, ByteOrder};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where the identity is kept in [`Space::Meta`].
const IDENTITY: &[u8] = b"identity";

/// What the keys of seats begin with in [`Space::Meta`].
const SEAT: &[u8] = b"seat/";

/// How many of its starts a disk remembers. More than can be made in vain between
/// two that reach a viewleader, one hopes: beyond it the server is a newcomer.
pub const MAX_LINEAGE: usize = 64;

/// How many former identities a disk remembers, the latest ones.
pub const MAX_FORMERLY: usize = 64;

/// One thing to be kept, or to be kept no more.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A value.
    Entry {
        /// Where its key stands.
        point: Point,
        /// The value.
        entry: Entry,
    },
    /// No value for this key.
    Drop {
        /// Where the key stands.
        point: Point,
        /// The key.
        key: Text,
    },
    /// A seat in a group.
    Seat(Seat),
    /// No seat in the group whose arc starts here.
    NoSeat(Point),
    /// Who the server is.
    Identity(Person),
}

/// A seat in a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// Where the arc starts.
    pub start: Point,
    /// Where it ends.
    pub end: Point,
    /// The revision at which the server entered.
    pub since: Revision,
    /// Everything that was committed is here.
    pub complete: bool,
    /// Everything up to this version is committed.
    pub committed: Version,
}

impl Seat {
    /// The arc of the group.
    pub fn arc(&self) -> Arc {
        Arc { start: self.start, end: self.end }
    }
}

/// Who a server is, as its disk tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Person {
    /// Its identity, once it has chosen one.
    pub id: Option<Identity>,
    /// The identities before that one, the latest last, under which older entries
    /// may have been written: those since everything was last at rest.
    #[serde(default)]
    pub formerly: Vec<Identity>,
    /// How many times a server was started over this disk.
    pub starts: u64,
    /// The latest of these starts, the present one last. By them the viewleader
    /// tells the disk that a member wrote last from an old copy of it.
    #[serde(default)]
    pub lineage: Vec<Start>,
    /// Whether everything that was acknowledged since was synced: a server whose
    /// durability was weaker may have lost some.
    pub synced: bool,
}

impl Person {
    /// Gives up its identity, to draw another.
    pub fn becomes_another(&mut self) {
        self.formerly.extend(self.id.take());
        let surplus = self.formerly.len().saturating_sub(MAX_FORMERLY);
        self.formerly.drain(..surplus);
    }
}

/// All that a disk holds.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Who wrote it.
    pub person: Person,
    /// The seats that were held.
    pub seats: Vec<Seat>,
    /// The entries, with their places.
    pub entries: Vec<(Point, Entry)>,
}

impl Record {
    /// How it is written.
    pub fn into_change(self) -> Change {
        match self {
            Self::Entry { point, entry } => {
                let key = entry_key(point, &entry.key);
                Change::Put { space: Space::Entries, key, value: entry_value(&entry) }
            }
            Self::Drop { point, key } => {
                Change::Remove { space: Space::Entries, key: entry_key(point, &key) }
            }
            Self::Seat(seat) => {
                Change::Put { space: Space::Meta, key: seat_key(seat.start), value: json(&seat) }
            }
            Self::NoSeat(start) => Change::Remove { space: Space::Meta, key: seat_key(start) },
            Self::Identity(person) => {
                Change::Put { space: Space::Meta, key: IDENTITY.to_vec(), value: json(&person) }
            }
        }
    }
}

fn entry_key(point: Point, key: &str) -> Vec<u8> {
    [&point.number().to_be_bytes(), key.as_bytes()].concat()
}

/// Says that a key was deleted, rather than that a value follows.
const DELETED: u8 = 1;

/// Says that fences stand before the value: their length in four bytes, and JSON.
const FENCED: u8 = 2;

/// The two numbers of the version, eight bytes each; a byte of [`DELETED`] and
/// [`FENCED`]; fences, if any; the value.
fn entry_value(entry: &Entry) -> Vec<u8> {
    let Content { value, fences } = &entry.content;
    let mut bytes = vec![0; 17];
    BigEndian::write_u64(&mut bytes, entry.version.group.0);
    BigEndian::write_u64(&mut bytes[8..], entry.version.number);
    if !fences.is_empty() {
        bytes[16] |= FENCED;
        let fences = json(fences);
        bytes.extend_from_slice(&(fences.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&fences);
    }
    match value {
        Some(value) => bytes.extend_from_slice(value.as_bytes()),
        None => bytes[16] |= DELETED,
    }
    bytes
}

fn seat_key(start: Point) -> Vec<u8> {
    [SEAT, &start.number().to_be_bytes()].concat()
}

fn json(value: &impl Serialize) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "a record of ours that is no JSON is a bug")]
    serde_json::to_vec(value).expect("our records are JSON")
}

/// Reads all that `store` holds.
///
/// # Errors
/// When it can't be read, or is not what a server wrote.
pub fn recover(store: &dyn Store) -> Result<Recovered, StoreError> {
    let mut recovered = Recovered::default();
    let mut strange = None;
    store.scan(Space::Meta, &[], &mut |key, value| {
        let read = if key == IDENTITY {
            serde_json::from_slice(value).map(|person| recovered.person = person)
        } else if key.starts_with(SEAT) {
            serde_json::from_slice(value).map(|seat| recovered.seats.push(seat))
        } else {
            Ok(())
        };
        if let Err(error) = read {
            strange = Some(format!("{}: {error}", String::from_utf8_lossy(key)));
        }
        strange.is_none()
    })?;
    store.scan(Space::Entries, &[], &mut |key, value| {
        match read_entry(key, value) {
            Some(entry) => recovered.entries.push(entry),
            None => strange = Some(format!("an entry of {} bytes", value.len())),
        }
        strange.is_none()
    })?;
    match strange {
        Some(what) => Err(StoreError::Damaged {
            path: PathBuf::from("the store"),
            what: format!("it holds what no server wrote: {what}"),
        }),
        None => Ok(recovered),
    }
}

/// The version of `key` in `store`, if it is there.
///
/// # Errors
/// When it can't be read.
pub fn read_version(store: &dyn Store, key: &str) -> Result<Option<Version>, StoreError> {
    let at = entry_key(Point::of(key), key);
    let value = store.get(Space::Entries, &at)?;
    let entry = value.and_then(|value| read_entry(&at, &value));
    Ok(entry.map(|(_, entry)| entry.version))
}

fn read_entry(key: &[u8], value: &[u8]) -> Option<(Point, Entry)> {
    let (place, key) = key.split_at_checked(2)?;
    let (version, rest) = value.split_at_checked(16)?;
    let (form, mut rest) = rest.split_first()?;
    let point = Point::new(BigEndian::read_u16(place))?;
    let version = Version {
        group: Revision(BigEndian::read_u64(version)),
        number: BigEndian::read_u64(&version[8..]),
    };
    let mut fences = Fences::default();
    if form & FENCED != 0 {
        let (length, behind) = rest.split_at_checked(4)?;
        let (json, behind) = behind.split_at_checked(BigEndian::read_u32(length) as usize)?;
        fences = serde_json::from_slice(json).ok()?;
        rest = behind;
    }
    let (key, value) = (str::from_utf8(key).ok()?, str::from_utf8(rest).ok()?);
    let value = (form & DELETED == 0).then(|| value.into());
    Some((point, Entry { key: key.into(), version, content: Content { value, fences } }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::content::Fence;
    use crate::view::Token;

    #[test]
    fn every_kind_of_entry_is_read_as_it_was_written() {
        let fence = Fence { lock: "a lock".into(), token: Token(7) };
        let fences = Fences::default().with(&fence).unwrap();
        for value in [None, Some("".into()), Some("ключ".into())] {
            for fences in [Fences::default(), fences.clone()] {
                let version = Version { group: Revision(3), number: u64::MAX };
                let content = Content { value: value.clone(), fences };
                let entry = Entry { key: "k".into(), version, content };
                let key = entry_key(Point::at(9), &entry.key);
                let bytes = entry_value(&entry);
                assert_eq!(read_entry(&key, &bytes), Some((Point::at(9), entry)));
                assert_eq!(read_entry(&key, &bytes[..16]), None);
            }
        }
    }
}
