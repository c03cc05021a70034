//! The register that a key is to be, and what an operation does to it or shows of it.
//!
//! Values are numbers here. The version of what the register holds may not be known
//! yet: an operation with unknown outcome has made it, and an answer may show it later.

use super::{Call, Operation, Outcome};
use crate::kv::{Text, Version};
use crate::view::Token;
use std::collections::BTreeMap;

/// A value, by number.
pub(super) type Value = usize;

/// The register.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct State {
    /// What it holds.
    pub(super) value: Option<Value>,
    /// The version of that, if an answer has shown it.
    pub(super) version: Option<Version>,
    /// No later version is as low as this.
    pub(super) floor: Version,
    /// What the version is not, where it has not been shown.
    pub(super) excluded: Vec<Version>,
    /// The newest token of each lock under which it was written.
    pub(super) fences: BTreeMap<Text, Token>,
}

/// What an operation does, or has been answered.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Effect {
    /// Shows a value.
    Shows(Value, Option<Version>),
    /// Shows that there is none.
    ShowsNothing,
    /// Writes.
    Writes(Value, Option<Version>),
    /// Writes if the version is this one, or there is none.
    Replaces(Option<Version>, Value, Option<Version>),
    /// Shows that the version is not this one, or that there is one; and which.
    Differs(Option<Version>, Option<Version>),
    /// Writes under this token, if it has seen no newer one.
    WritesUnder(Text, Token, Value, Option<Version>),
    /// Deletes.
    Deletes(Option<Version>),
    /// An answer that does not fit the question: no register gives it.
    Absurd,
}

impl Effect {
    /// What the operation comes to; none if it can't be told from one that was
    /// never made.
    pub(super) fn of(operation: &Operation, values: &Values) -> Option<Self> {
        let outcome = match &operation.end {
            None => None,
            Some((_, Outcome::Refused)) => return None,
            Some((end, Outcome::Fenced)) => {
                let Call::WriteUnder { lock, token, .. } = &operation.call else {
                    return Some(Self::Absurd);
                };
                return (!values.has_newer(lock, *token, *end)).then_some(Self::Absurd);
            }
            Some((_, outcome)) => Some(outcome),
        };
        Some(match (&operation.call, outcome) {
            (Call::Read, None) => return None,
            (Call::Read, Some(Outcome::Found { value, version })) => {
                Self::Shows(values.number(value), *version)
            }
            (Call::Read | Call::Delete, Some(Outcome::Missing)) => Self::ShowsNothing,
            (Call::Write { value }, None) => Self::Writes(values.number(value), None),
            (Call::Write { value }, Some(Outcome::Done { version })) => {
                Self::Writes(values.number(value), *version)
            }
            (Call::CompareAndSet { expected, value }, None) => {
                Self::Replaces(*expected, values.number(value), None)
            }
            (Call::CompareAndSet { expected, value }, Some(Outcome::Done { version })) => {
                Self::Replaces(*expected, values.number(value), *version)
            }
            (Call::CompareAndSet { expected, .. }, Some(Outcome::Mismatch { found })) => {
                Self::Differs(*expected, *found)
            }
            (Call::WriteUnder { lock, token, value }, outcome) => {
                let version = match outcome {
                    None => None,
                    Some(Outcome::Done { version }) => *version,
                    _ => return Some(Self::Absurd),
                };
                Self::WritesUnder(Text::clone(lock), *token, values.number(value), version)
            }
            (Call::Delete, None) => Self::Deletes(None),
            (Call::Delete, Some(Outcome::Done { version })) => Self::Deletes(*version),
            _ => Self::Absurd,
        })
    }

    /// It only looks.
    pub(super) fn is_read(&self) -> bool {
        matches!(self, Self::Shows(..) | Self::ShowsNothing | Self::Differs(..))
    }

    /// The value that it shows.
    pub(super) fn shown(&self) -> Option<Value> {
        if let Self::Shows(value, _) = *self { Some(value) } else { None }
    }

    /// The value that it writes.
    pub(super) fn written(&self) -> Option<Value> {
        match *self {
            Self::Writes(value, _)
            | Self::Replaces(_, value, _)
            | Self::WritesUnder(_, _, value, _) => Some(value),
            _ => None,
        }
    }

    /// The version that it makes or shows.
    pub(super) fn version(&self) -> Option<Version> {
        match *self {
            Self::Shows(_, version)
            | Self::Writes(_, version)
            | Self::Replaces(_, _, version)
            | Self::Differs(_, version)
            | Self::WritesUnder(_, _, _, version)
            | Self::Deletes(version) => version,
            Self::ShowsNothing | Self::Absurd => None,
        }
    }
}

impl State {
    /// The register afterwards, if it can do this.
    pub(super) fn after(&self, effect: &Effect) -> Option<Self> {
        match *effect {
            Effect::Shows(value, version) => {
                (self.value == Some(value)).then_some(())?;
                version.map_or_else(|| Some(self.clone()), |version| self.at(version))
            }
            Effect::ShowsNothing => self.value.is_none().then(|| self.clone()),
            Effect::Writes(value, version) => self.made(Some(value), version),
            Effect::WritesUnder(ref lock, token, value, version) => {
                let is_newest = self.fences.get(lock).is_none_or(|seen| *seen <= token);
                let mut after = is_newest.then(|| self.made(Some(value), version)).flatten()?;
                after.fences.insert(Text::clone(lock), token);
                Some(after)
            }
            Effect::Deletes(version) => self.made(None, version),
            Effect::Replaces(expected, value, version) => {
                let before = match expected {
                    None => self.value.is_none().then(|| self.clone()),
                    Some(expected) => self.value.and_then(|_| self.at(expected)),
                };
                before?.made(Some(value), version)
            }
            Effect::Differs(None, found) => {
                self.value?;
                found.map_or_else(|| Some(self.clone()), |found| self.at(found))
            }
            Effect::Differs(Some(expected), found) => match found {
                Some(found) => {
                    (self.value.is_some() && found != expected).then_some(())?;
                    self.at(found)
                }
                None => self.not_at(expected),
            },
            Effect::Absurd => None,
        }
    }

    /// The same, now that its version is shown to be this.
    pub(super) fn at(&self, version: Version) -> Option<Self> {
        match self.version {
            Some(known) => (known == version).then(|| self.clone()),
            None => (version > self.floor && !self.excluded.contains(&version)).then(|| Self {
                value: self.value,
                version: Some(version),
                floor: version,
                excluded: Vec::new(),
                fences: self.fences.clone(),
            }),
        }
    }

    /// The same, now that its version is shown not to be this.
    pub(super) fn not_at(&self, version: Version) -> Option<Self> {
        let mut after = self.clone();
        let open = self.value.is_some() && self.version.is_none() && version > self.floor;
        if open && !self.excluded.contains(&version) {
            after.excluded.push(version);
            after.excluded.sort_unstable();
        }
        (self.value.is_none() || self.version != Some(version)).then_some(after)
    }

    /// The register with something new in it, or nothing.
    pub(super) fn made(&self, value: Option<Value>, version: Option<Version>) -> Option<Self> {
        version.is_none_or(|version| version > self.floor).then(|| Self {
            value,
            version: value.and(version),
            floor: version.unwrap_or(self.floor),
            excluded: Vec::new(),
            fences: self.fences.clone(),
        })
    }
}

/// Numbers for values. Those that no answer shows can't be told apart, and have
/// one number together.
pub(super) struct Values<'a> {
    numbers: BTreeMap<&'a str, Value>,
    /// Under which tokens of which locks there were writes, and when they began.
    under: Vec<(&'a str, Token, u64)>,
}

impl<'a> Values<'a> {
    pub(super) fn shown_by(operations: &[&'a Operation]) -> Self {
        let (mut numbers, mut under) = (BTreeMap::new(), Vec::new());
        for operation in operations {
            if let Call::WriteUnder { lock, token, .. } = &operation.call {
                under.push((&**lock, *token, operation.began));
            }
            if let Some((_, Outcome::Found { value, .. })) = &operation.end {
                let next = numbers.len();
                numbers.entry(&**value).or_insert(next);
            }
        }
        Self { numbers, under }
    }

    /// Whether a write under a newer token of the lock had begun by then.
    fn has_newer(&self, lock: &str, token: Token, by: u64) -> bool {
        self.under.iter().any(|(of, other, began)| *of == lock && *other > token && *began <= by)
    }

    /// How many numbers there are.
    pub(super) fn count(&self) -> usize {
        self.numbers.len() + 1
    }

    pub(super) fn number(&self, value: &str) -> Value {
        self.numbers.get(value).copied().unwrap_or(self.numbers.len())
    }
}
