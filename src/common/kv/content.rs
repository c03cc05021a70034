//! What a write leaves under its key, and what it can depend on.
//!
//! A write leaves a value, or, if it was a deletion, none. A *deleted* key is
//! kept like a value, with its version, as long as a replica of its group may
//! still hold an older write of it prepared: else that one could come back. Then
//! it is forgotten (see [`crate::kv::replica`]).
//!
//! # Fences
//! A client that holds a lock can pause, lose the lock without knowing, and go on
//! writing. So every grant of a lock carries a *token*, larger than any before it,
//! and a write can carry lock and token: its *fence*. A key remembers the largest
//! token that it has seen for a lock, and refuses a fenced write with a smaller
//! one (M. Kleppmann, "How to do distributed locking", 2016). What a key has seen
//! is part of what is kept under it, through every later write and deletion, so it
//! is on every replica and moves with the key. A deleted key that was ever fenced
//! is therefore not forgotten.

use super::{Text, Version};
use crate::view::Token;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Of how many locks a key remembers tokens.
pub const MAX_FENCES: usize = 16;

/// What is kept under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// The value; `None` when the key was deleted.
    pub value: Option<Text>,
    /// What it has seen of locks.
    pub fences: Fences,
}

impl Content {
    /// A value that no lock stands before.
    pub fn of(value: Text) -> Self {
        Self { value: Some(value), fences: Fences::default() }
    }

    /// The key was deleted, and nothing of it has to be remembered for ever.
    pub fn is_forgettable(&self) -> bool {
        self.value.is_none() && self.fences.is_empty()
    }

    /// How many bytes of text it holds.
    pub fn bytes(&self) -> usize {
        self.value.as_ref().map_or(0, |value| value.len()) + self.fences.bytes()
    }
}

/// The newest token that a key has seen of each lock; nearly always of none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fences(Option<Arc<BTreeMap<Text, Token>>>);

impl Fences {
    /// Whether no lock was ever seen.
    pub fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(|seen| seen.is_empty())
    }

    /// The newest token that was seen of `lock`.
    pub fn newest(&self, lock: &str) -> Option<Token> {
        self.0.as_ref()?.get(lock).copied()
    }

    /// These, and `fence` seen, too; `None` if there is no room for another lock.
    pub fn with(&self, fence: &Fence) -> Option<Self> {
        let mut seen = self.0.as_deref().cloned().unwrap_or_default();
        let newest = seen.entry(Text::clone(&fence.lock)).or_default();
        *newest = fence.token.max(*newest);
        (seen.len() <= MAX_FENCES).then(|| Self(Some(Arc::new(seen))))
    }

    fn bytes(&self) -> usize {
        let seen = self.0.iter().flat_map(|seen| seen.keys());
        seen.map(|lock| lock.len() + size_of::<Token>()).sum()
    }
}

/// The lock that a write is made under, and the token of the grant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The lock.
    pub lock: Text,
    /// The token that came with it.
    pub token: Token,
}

/// Why a write is not made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "objection", rename_all = "snake_case")]
pub enum Objection {
    /// The key is not at the version that the write depends on.
    Conflict {
        /// Where it is; `None` when there is no such key.
        version: Option<Version>,
    },
    /// The key has seen a newer token of the lock.
    Fenced {
        /// That token.
        token: Token,
    },
    /// The token is from before the cluster was restored from a backup.
    Burnt {},
    /// The key remembers the tokens of [`MAX_FENCES`] locks already.
    TooManyFences {},
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(lock: &str, token: u64) -> Fence {
        Fence { lock: lock.into(), token: Token(token) }
    }

    #[test]
    fn a_key_remembers_the_newest_token_of_each_lock() {
        let seen = Fences::default().with(&fence("a", 5)).unwrap();
        let seen = seen.with(&fence("b", 2)).unwrap().with(&fence("a", 4)).unwrap();
        assert_eq!(seen.newest("a"), Some(Token(5)));
        assert_eq!(seen.newest("b"), Some(Token(2)));
        assert_eq!(seen.newest("c"), None);
    }

    #[test]
    fn there_is_room_for_so_many_locks() {
        let mut seen = Fences::default();
        for number in 0..MAX_FENCES {
            seen = seen.with(&fence(&number.to_string(), 1)).unwrap();
        }
        assert_eq!(seen.with(&fence("one more", 1)), None);
        assert!(seen.with(&fence("3", 2)).is_some());
    }
}
