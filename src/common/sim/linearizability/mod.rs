//! Were these operations those of *one* register for each key?
//!
//! A history says what each client asked for and was answered, and when it began
//! and ended. It is *linearizable* (Herlihy and Wing, 1990) if every operation
//! can be given one moment between its beginning and its end such that, done one
//! after the other at those moments, all of them get the answers that they got.
//!
//! To find such moments is a search ([`search`]), after Wing and Gong (1993), with
//! Lowe's memory of what was tried (2017) and Horn and Kroening's undoing (2015),
//! as in Porcupine. Linearizability is local: a history is linearizable if that of
//! each key is, so each key is searched on its own.
//!
//! An operation whose outcome is not known may take effect at any moment after it
//! began, or never. One that was refused never does. Versions, where answers name
//! them, are claimed to grow in the order in which writes take effect, so they are
//! checked and make the search short. The search is bounded; a key for which the
//! bound does not suffice is *undecided*, which is not fine.
//!
//! ```
//! use ringleader::sim::linearizability::{Call, MAX_STEPS, Operation, Outcome, check};
//!
//! let wrote = Outcome::Done { version: None };
//! let history = [
//!     Operation::new(1, "pear", Call::Write { value: "green".into() }, 10).ended(20, wrote),
//!     Operation::new(2, "pear", Call::Read, 30).ended(40, Outcome::Missing),
//! ];
//! let verdict = check(&history, MAX_STEPS);
//! assert!(!verdict.is_fine());
//! println!("{verdict}"); // says which key, and shows the operations that prove it
//! ```

#[cfg(test)]
mod random_tests;
mod register;
mod search;
#[cfg(test)]
mod tests;

use crate::kv::{Text, Version};
use crate::view::Token;
use search::{Answer, search};
use std::collections::BTreeMap;
use std::fmt;

/// How many steps a search takes for one prefix of one key's history before it
/// gives up. A history that is fine takes about one for each operation.
pub const MAX_STEPS: u64 = 1_000_000;

/// How many operations a failure prints, the latest ones.
const PRINTED: usize = 60;

/// What a client asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// The value, please.
    Read,
    /// Let it be this.
    Write {
        /// The new value.
        value: Text,
    },
    /// Let it be this, if it has not changed.
    CompareAndSet {
        /// The version that it must have; none: it must be missing.
        expected: Option<Version>,
        /// The new value.
        value: Text,
    },
    /// Let there be none.
    Delete,
    /// Let it be this, if no newer token of the lock was seen.
    WriteUnder {
        /// The lock.
        lock: Text,
        /// The token that came with it.
        token: Token,
        /// The new value.
        value: Text,
    },
}

/// What a client was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A read found this.
    Found {
        /// The value.
        value: Text,
        /// Its version, if the answer names it.
        version: Option<Version>,
    },
    /// A read, or a deletion, found nothing.
    Missing,
    /// It was written, or deleted.
    Done {
        /// The version that this made, if the answer names it.
        version: Option<Version>,
    },
    /// A compare-and-set found something else, and did nothing.
    Mismatch {
        /// The version that it found, if the answer names it.
        found: Option<Version>,
    },
    /// A newer token of the lock was seen, perhaps with a write that was not made;
    /// nothing was done.
    Fenced,
    /// Nothing was done, nor will be.
    Refused,
}

/// One operation of one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Whose it is; for the print.
    pub client: u64,
    /// The key.
    pub key: Text,
    /// What was asked for.
    pub call: Call,
    /// When it began, on the one clock of the history.
    pub began: u64,
    /// When it ended, and how. None: the outcome is not known.
    pub end: Option<(u64, Outcome)>,
}

impl Operation {
    /// An operation that began at `began` and whose outcome is not known.
    pub fn new(client: u64, key: impl Into<Text>, call: Call, began: u64) -> Self {
        Self { client, key: key.into(), call, began, end: None }
    }

    /// The same, ended at `at` with `outcome`.
    ///
    /// # Panics
    /// When that is before it began: the clock that made the history is not one.
    #[must_use]
    pub fn ended(mut self, at: u64, outcome: Outcome) -> Self {
        assert!(self.began <= at, "an operation ended at {at}, and began at {}", self.began);
        self.end = Some((at, outcome));
        self
    }
}

/// What is to be said of a history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// How many operations it has.
    pub operations: usize,
    /// How many keys.
    pub keys: usize,
    /// The keys that were no register, in order.
    pub failures: Vec<Failure>,
    /// The keys for which the bound on the search did not suffice, in order.
    pub undecided: Vec<Text>,
}

/// A key that was no register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The key.
    pub key: Text,
    /// How many operations the history has for it.
    pub operations: usize,
    /// The operations that had begun when the first end was seen that no register
    /// can have given, in the order of their beginning; what ended later has no end.
    pub prefix: Vec<Operation>,
    /// Whether every shorter prefix is known to be fine.
    pub smallest: bool,
}

impl Verdict {
    /// Every key was a register.
    pub fn is_fine(&self) -> bool {
        self.failures.is_empty() && self.undecided.is_empty()
    }
}

/// Looks at each key of the history, in at most `steps` steps for each prefix of
/// it that is tried ([`MAX_STEPS`]). Operations may come in any order. One that
/// ended at the moment at which another began counts as concurrent with it.
pub fn check(history: &[Operation], steps: u64) -> Verdict {
    let mut keys: BTreeMap<&Text, Vec<&Operation>> = BTreeMap::new();
    for operation in history {
        keys.entry(&operation.key).or_default().push(operation);
    }
    let mut verdict = Verdict { operations: history.len(), keys: keys.len(), ..Verdict::default() };
    for (key, mut operations) in keys {
        operations.sort_by_key(|operation| (operation.began, operation.client));
        match search(&operations, steps) {
            Answer::Fine => {}
            Answer::Undecided => verdict.undecided.push(key.clone()),
            Answer::Bad => verdict.failures.push(smallest_prefix(key, &operations, steps)),
        }
    }
    verdict
}

/// The first prefix of a history that is known not to be linearizable. What
/// continues a bad prefix is bad, so the search for it can halve.
fn smallest_prefix(key: &Text, operations: &[&Operation], steps: u64) -> Failure {
    let mut ends: Vec<u64> = operations.iter().filter_map(|o| Some(o.end.as_ref()?.0)).collect();
    ends.sort_unstable();
    ends.dedup();
    let (mut fine, mut bad) = (0, ends.len().saturating_sub(1));
    let mut smallest = true;
    while fine < bad {
        let middle = fine.midpoint(bad);
        let prefix = prefix_until(operations, ends[middle]);
        match search(&prefix.iter().collect::<Vec<_>>(), steps) {
            Answer::Bad => bad = middle,
            Answer::Fine => fine = middle + 1,
            Answer::Undecided => {
                smallest = false;
                fine = middle + 1;
            }
        }
    }
    let prefix = ends.get(bad).map_or_else(Vec::new, |&end| prefix_until(operations, end));
    Failure { key: key.clone(), operations: operations.len(), prefix, smallest }
}

/// The history as it was known at the moment `until`.
fn prefix_until(operations: &[&Operation], until: u64) -> Vec<Operation> {
    let begun = operations.iter().filter(|operation| operation.began <= until);
    let cut = begun.map(|&operation| {
        let end = operation.end.clone().filter(|&(at, _)| at <= until);
        Operation { end, ..operation.clone() }
    });
    cut.collect()
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if !self.failures.is_empty() {
            "not linearizable"
        } else if !self.undecided.is_empty() {
            "undecided"
        } else {
            "linearizable"
        };
        write!(f, "{word}: {} operations, {} keys", self.operations, self.keys)?;
        for key in &self.undecided {
            write!(f, "\nkey {key:?}: undecided, the search was given up")?;
        }
        for failure in &self.failures {
            write!(f, "\n{failure}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shown, of) = (self.prefix.len(), self.operations);
        let first = if self.smallest { "the first" } else { "at most the first" };
        write!(f, "key {:?}: not linearizable, as {first} {shown} of {of} show", self.key)?;
        let skipped = shown.saturating_sub(PRINTED);
        if skipped > 0 {
            write!(f, "\n  ... {skipped} before")?;
        }
        for operation in &self.prefix[skipped..] {
            write!(f, "\n  {operation}")?;
        }
        let last = self.prefix.iter().filter(|o| o.end.is_some()).max_by_key(|o| o.end_time());
        match last {
            Some(last) => write!(f, "\n  no register answers this: {last}"),
            None => Ok(()),
        }
    }
}

impl Operation {
    /// When it ended; the end of time if that is not known.
    fn end_time(&self) -> u64 {
        self.end.as_ref().map_or(u64::MAX, |&(at, _)| at)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {} from {}", self.client, self.began)?;
        match &self.end {
            Some((at, _)) => write!(f, " to {at}: ")?,
            None => f.write_str(" on: ")?,
        }
        match &self.call {
            Call::Read => f.write_str("read")?,
            Call::Write { value } => write!(f, "write {value:?}")?,
            Call::CompareAndSet { expected: Some(version), value } => {
                write!(f, "write {value:?} if at {version}")?;
            }
            Call::CompareAndSet { expected: None, value } => {
                write!(f, "write {value:?} if missing")?;
            }
            Call::Delete => f.write_str("delete")?,
            Call::WriteUnder { lock, token, value } => {
                write!(f, "write {value:?} under {lock}:{token}")?;
            }
        }
        match &self.end {
            None => f.write_str(" -> unknown"),
            Some((_, outcome)) => write!(f, " -> {outcome}"),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = match self {
            Self::Found { value, version } => {
                write!(f, "{value:?}")?;
                version
            }
            Self::Done { version } => {
                f.write_str("done")?;
                version
            }
            Self::Mismatch { found } => {
                f.write_str("mismatch")?;
                found
            }
            Self::Missing => return f.write_str("missing"),
            Self::Fenced => return f.write_str("fenced"),
            Self::Refused => return f.write_str("refused"),
        };
        version.map_or(Ok(()), |version| write!(f, " at {version}"))
    }
}
