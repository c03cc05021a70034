//! Backups: a cluster's state and data in a folder, and how a new cluster takes over
//! from there.
//!
//! # What a backup promises
//! It is taken while clients read and write. It holds, for each key, a value that was
//! committed at some moment between the start of the backup and its end (or that the
//! key was not there at that moment). So nothing is missing that was acknowledged
//! before the start, and nothing is in it that was never written. It is **not** a
//! snapshot of one instant: of two keys that are written together, the backup may have
//! the one as it was before and the other as it was after.
//!
//! It holds what is replicated: values, and what keys have seen of locks. What
//! `client set` keeps on one server alone is that server's memory and not in a backup,
//! and neither is anything of a server of the original.
//!
//! # What is in the folder
//! | file | holds |
//! |---|---|
//! | `keys-00001.jsonl`, ... | one key in each line: `{"key":K,"version":V,"value":VAL}`, and `"fences"`; in the order of the ring, 64 MiB or so in each file |
//! | `viewleader.json` | members, groups and locks when the backup ended, for people |
//! | `manifest.json` | how far the cluster had counted, when that was, and each file's length and checksum |
//!
//! It is written to `DIR.partial`, everything is synced, the manifest comes last, and
//! only then the folder gets its name. So whatever is called `DIR` is whole, and what
//! was cut short has no manifest. Checksums are CRC-32C; a restore checks all of them
//! before it touches a cluster.
//!
//! # A restored cluster
//! It is a new one: new viewleaders and servers, any number of each, with empty data
//! directories. `client restore DIR` loads the values. Nothing that clients of the old
//! cluster may remember means anything in it: see [`crate::view::restoring`].

pub mod folder;

use crate::view::restoring::{BackupId, Numbers};
use crate::view::{View, messages::ListedLock};
use serde::{Deserialize, Serialize};

/// The format that is written, and the only one that is read.
pub const FORMAT: u32 = 1;

/// What a backup is, beside its files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its name.
    pub backup: BackupId,
    /// The program that took it.
    pub taken_by: String,
    /// When it was begun, in milliseconds since 1970.
    pub began_ms: u64,
    /// When it was ended.
    pub ended_ms: u64,
    /// How far the cluster had counted at its end.
    pub numbers: Numbers,
    /// How many keys there are in it.
    pub keys: u64,
    /// The keys of its files' lines, their values and fences, in bytes.
    pub bytes: u64,
    /// Its files.
    pub files: Vec<FileSum>,
}

/// One file of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSum {
    /// What it is called.
    pub name: String,
    /// How long it is.
    pub bytes: u64,
    /// Its CRC-32C.
    pub crc32c: u32,
    /// How many keys there are in it.
    pub keys: u64,
}

/// What is written down of the viewleaders' state, for people.
#[derive(Debug, Serialize)]
pub struct ViewleaderState<'a> {
    /// How far it had counted.
    pub numbers: Numbers,
    /// Members and groups.
    pub view: &'a View,
    /// The locks, and who held them or waited.
    pub locks: &'a [ListedLock],
}
