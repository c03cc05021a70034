//! Refusals: what a program answers when it does not do what was asked.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How much of a request a refusal quotes at most, with its own words, in
/// characters: an original's client reads no long replies.
const MAX_ERROR_CHARS: usize = 300;

/// A reply that says no. The text under `"error"` is for people and is what the
/// programs of the original look for; `"reason"` is for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What went wrong and what to do about it.
    pub error: String,
    /// What the caller can do next.
    pub reason: Reason,
}

/// Refusals named by what the caller can do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The request can't be right: mend it, asking again does not help.
    Invalid,
    /// What it is about is not there.
    NotFound,
    /// Nothing was done; the same request may succeed later.
    Unavailable,
    /// It may or may not have been done, now or soon: read to find out.
    UnknownOutcome,
    /// Nothing was done, since the key is not as the request says: read it again.
    Conflict,
    /// Nothing was done, since the lock is a later holder's: get it again.
    Fenced,
}

impl Refusal {
    /// A refusal of a request that can't be right. The text is cut where it
    /// quotes too much of the request.
    pub fn invalid(error: impl Into<String>) -> Self {
        let mut error = error.into();
        if let Some((end, _)) = error.char_indices().nth(MAX_ERROR_CHARS) {
            error.truncate(end);
            error.push_str("...");
        }
        Self { error, reason: Reason::Invalid }
    }

    /// A refusal since what was asked for is not there.
    pub fn not_found(error: impl Into<String>) -> Self {
        Self { reason: Reason::NotFound, ..Self::invalid(error) }
    }

    /// A refusal of a request that was not carried out and may be tried again.
    pub fn unavailable(error: impl Into<String>) -> Self {
        Self { error: error.into(), reason: Reason::Unavailable }
    }

    /// A refusal of a request that depends on something that is not so.
    pub fn conflict(error: impl Into<String>) -> Self {
        Self { error: error.into(), reason: Reason::Conflict }
    }

    /// A refusal of a request under a lock that is another's by now.
    pub fn fenced(error: impl Into<String>) -> Self {
        let Self { error, .. } = Self::invalid(error);
        Self { error, reason: Reason::Fenced }
    }

    /// The answer to a request that may or may not have taken effect.
    pub fn unknown_outcome(error: impl Into<String>) -> Self {
        Self { error: error.into(), reason: Reason::UnknownOutcome }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)
    }
}

impl std::error::Error for Refusal {}
