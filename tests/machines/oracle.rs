//! What clients may see: the oracle, which knows nothing of the machines.
//!
//! Every reply to a read or a write names the *version* of the value. Versions
//! are claimed to put all writes of a key into one order, so a history is
//! linearizable if it fits that order and the order of time:
//!
//! * an operation that began after another one had ended shows no older version;
//!   a write, a newer one;
//! * one version has one value, and one write has one version (no two writes are
//!   of the same value);
//! * a value that is read was written, by somebody who had begun to, and was not
//!   told that nothing was done.
//!
//! A write with an unknown outcome may take effect at any time later, or never.
//! When it does, the version under which it is read puts it in its place.

use std::collections::{BTreeMap, BTreeSet};

/// The version of a value, as the replies name it: (group's, number).
pub(crate) type Version = (u64, u64);

/// What is known of one key.
#[derive(Debug, Default)]
struct Known {
    /// The newest version that an operation which has ended has shown.
    newest: Version,
    /// The value of each version that has been shown.
    values: BTreeMap<Version, u64>,
    /// The version of each value that has been shown.
    versions: BTreeMap<u64, Version>,
    /// What somebody has begun to write, less what was refused.
    begun: BTreeSet<u64>,
}

/// An operation that has begun: the newest version shown before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun(Version);

/// Watches what clients do and see.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    keys: BTreeMap<String, Known>,
}

impl Oracle {
    /// Somebody begins to write `value`.
    pub(crate) fn write_begins(&mut self, key: &str, value: u64) -> Begun {
        let known = self.keys.entry(key.to_owned()).or_default();
        known.begun.insert(value);
        Begun(known.newest)
    }

    /// Somebody begins to read.
    pub(crate) fn read_begins(&mut self, key: &str) -> Begun {
        Begun(self.keys.entry(key.to_owned()).or_default().newest)
    }

    /// The write was refused: nothing was done, nor will be.
    ///
    /// # Errors
    /// What is wrong with that.
    pub(crate) fn refused(&mut self, key: &str, value: u64) -> Result<(), String> {
        let known = self.keys.entry(key.to_owned()).or_default();
        known.begun.remove(&value);
        match known.versions.get(&value) {
            Some(version) => {
                Err(format!("{key}={value} was refused, and had been seen as {version:?}"))
            }
            None => Ok(()),
        }
    }

    /// The write is acknowledged.
    ///
    /// # Errors
    /// What is wrong with that.
    pub(crate) fn written(
        &mut self,
        key: &str,
        begun: Begun,
        value: u64,
        version: Version,
    ) -> Result<(), String> {
        if version <= begun.0 {
            let before = begun.0;
            return Err(format!(
                "{key}={value} was written as {version:?}, and {before:?} had been seen before"
            ));
        }
        self.shown(key, value, version)
    }

    /// The read has found this, or nothing.
    ///
    /// # Errors
    /// What is wrong with that.
    pub(crate) fn read(
        &mut self,
        key: &str,
        begun: Begun,
        found: Option<(u64, Version)>,
    ) -> Result<(), String> {
        let (value, version) = found.unwrap_or_default();
        if version < begun.0 {
            let before = begun.0;
            return Err(format!(
                "{key} was read as {value} of {version:?}, and {before:?} had been seen before"
            ));
        }
        if found.is_some() { self.shown(key, value, version) } else { Ok(()) }
    }

    fn shown(&mut self, key: &str, value: u64, version: Version) -> Result<(), String> {
        let known = self.keys.entry(key.to_owned()).or_default();
        if !known.begun.contains(&value) {
            return Err(format!("{key} is {value}, which nobody has written, or was refused"));
        }
        let first = *known.values.entry(version).or_insert(value);
        if first != value {
            return Err(format!("{key} of {version:?} is both {first} and {value}"));
        }
        let first = *known.versions.entry(value).or_insert(version);
        if first != version {
            return Err(format!("{key}={value} is both {first:?} and {version:?}"));
        }
        known.newest = known.newest.max(version);
        Ok(())
    }
}
