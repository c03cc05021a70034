//! The replicated key-value store.
//!
//! Every key stands on the [`ring`]; the servers of its arc's group keep it.
//! Writes follow PacificA (MSR-TR-2008-25): the group's primary gives a write
//! the next version, every replica *prepares* it, and when all have, it is
//! *committed* and answered. So any one surviving replica knows every
//! acknowledged write. Reads are answered by the primary alone, while its lease
//! is live. The invariant, in the paper's words:
//!
//! > committed(secondary) ⊆ committed(primary) ⊆ prepared(every replica)
//!
//! In this folder: [`ring`] places names; [`content`] is what a write leaves and
//! what it can depend on; [`table`] holds it; [`replica`] is
//! one server's part in one group; [`marks`] carries the original's vote and
//! commit; [`server`] is the machine that puts them together; [`operation`] is
//! the client's side; [`messages`] is what servers understand.

pub mod content;
pub mod disk;
pub mod marks;
pub mod messages;
pub mod operation;
pub mod replica;
pub mod ring;
pub mod server;
pub mod table;

use crate::view::Revision;
use crate::wire::MAX_FRAME_BYTES;
use content::{Content, Fences};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;
use std::sync;

/// The longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 16 * 1024;

/// The longest value, in bytes.
pub const MAX_VALUE_BYTES: usize = 1024 * 1024;

/// How many bytes of keys and values one message between servers holds at most,
/// before JSON (one entry may exceed it on its own).
pub const MAX_BATCH_BYTES: usize = 1024 * 1024;

/// JSON writes one byte of text as at most this many (`\u0000`).
const JSON_GROWTH: usize = 6;

/// What a message needs beside keys and values, at most.
const ENVELOPE_BYTES: usize = 64 * 1024;

// Whatever one server accepts, it can pass on: a full batch and one entry more
// fit in a frame, however JSON writes them.
const _: () = assert!(
    JSON_GROWTH * (MAX_BATCH_BYTES + MAX_KEY_BYTES + MAX_VALUE_BYTES) + ENVELOPE_BYTES
        <= MAX_FRAME_BYTES
);

/// A key or a value: text that is shared rather than copied.
pub type Text = sync::Arc<str>;

/// The version of a value: under which version of its group it was written, and
/// the how-manieth write it was there. Later writes of a key have higher ones,
/// and no two writes ever have the same. Written as `7.42`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The version of the group.
    pub group: Revision,
    /// Counts from 1 under each version of the group.
    pub number: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.group.0, self.number)
    }
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('.');
        let numbers = parts.and_then(|(group, number)| {
            Some(Self { group: Revision(group.parse().ok()?), number: number.parse().ok()? })
        });
        numbers.ok_or_else(|| format!("{text:?} is no version such as 7.42"))
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Version;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a version such as \"7.42\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Version, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(Visitor)
    }
}

/// One version of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Text,
    /// Which write of the key this is.
    pub version: Version,
    /// What was written.
    pub content: Content,
}

impl Entry {
    /// What it counts for against [`MAX_BATCH_BYTES`].
    pub fn bytes(&self) -> usize {
        self.key.len() + self.content.bytes() + 64
    }
}

/// How an entry is written in a message.
#[derive(Serialize, Deserialize)]
struct WireEntry {
    key: Text,
    version: Version,
    /// `null` when the key was deleted. It must be there: nothing is deleted for
    /// want of a field.
    #[serde(deserialize_with = "Option::deserialize")]
    value: Option<Text>,
    #[serde(default, skip_serializing_if = "Fences::is_empty")]
    fences: Fences,
}

impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { key, version, content: Content { value, fences } } = self.clone();
        WireEntry { key, version, value, fences }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let WireEntry { key, version, value, fences } = WireEntry::deserialize(deserializer)?;
        Ok(Self { key, version, content: Content { value, fences } })
    }
}
