//! A look through a store before the engine opens it.
//!
//! The engine replays a journal up to the first thing that it can't parse and
//! cuts it there, torn or damaged (<https://github.com/fjall-rs/fjall/issues/311>);
//! and it opens a list of tables without a look at its checksum. So we look
//! ourselves, parse the same bytes and check the same checksums: what is torn is
//! cut, and what is damaged is refused.
//!
//! The format is drawn in [`super`]. We write journals without compression and
//! with puts and removes alone, so anything else is no batch of ours.

use super::{Durability, StoreError};
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

const BEGIN: u8 = 1;
const ITEM: u8 = 2;
const END: u8 = 3;
const PUT: u8 = 0;
const REMOVE: u8 = 1;
const TRAILER: &[u8] = b"FJL\x03";

/// A batch has a larger number than the batch before it, by at most this: there
/// are never so many batches in one journal, and chance rarely hits a window of
/// this size out of 2^64.
const MAX_NUMBERS_AHEAD: u64 = 1 << 40;

/// Looks through all journals in `dir` and cuts what is torn. The caller must hold
/// the store's lock.
///
/// # Errors
/// [`StoreError::Damaged`] with the journal, or [`StoreError::Failed`] when it
/// can't be read or cut.
pub(super) fn vet(dir: &Path, durability: Durability) -> Result<(), StoreError> {
    let fail = |path: &Path, error: io::Error| StoreError::Failed {
        what: format!("{}: {error}", path.display()),
    };
    let mut journals = Vec::new();
    for file in fs::read_dir(dir).map_err(|error| fail(dir, error))? {
        let path = file.map_err(|error| fail(dir, error))?.path();
        let number = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".jnl"));
        if let Some(number) = number.and_then(|number| number.parse::<u64>().ok()) {
            journals.push((number, path));
        }
    }
    journals.sort_unstable();
    let count = journals.len();
    if count == 0 {
        return Err(StoreError::Damaged { path: dir.into(), what: "it has no journal".into() });
    }
    let mut newest = None;
    for (index, (_, path)) in journals.into_iter().enumerate() {
        let is_active = index + 1 == count;
        let bytes = fs::read(&path).map_err(|error| fail(&path, error))?;
        let look = Look::through(&bytes, newest);
        newest = look.newest;
        // A journal is synced before the next one is begun, and each batch
        // before the next one if it must be. Else there may be holes.
        let may_cut = match look.rest {
            Rest::Zeros => true,
            Rest::Torn => is_active,
            Rest::Damaged => is_active && durability != Durability::Always,
        };
        if !may_cut {
            let what = format!("no batch at byte {}, but more behind it", look.end);
            return Err(StoreError::Damaged { path, what });
        }
        if look.rest != Rest::Zeros {
            tracing::warn!("{} was torn: cut at byte {}", path.display(), look.end);
            cut(&path, look.end as u64).map_err(|error| fail(&path, error))?;
        }
    }
    Ok(())
}

/// Checks the list of tables of the space in `dir`.
///
/// # Errors
/// [`StoreError::Damaged`] with the list, or [`StoreError::Failed`] when it can't
/// be read.
pub(super) fn vet_list(dir: &Path) -> Result<(), StoreError> {
    let read = |path: &Path| match fs::read(path) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(StoreError::Damaged { path: path.into(), what: "it is gone".into() })
        }
        Err(error) => Err(StoreError::Failed { what: format!("{}: {error}", path.display()) }),
    };
    let current = dir.join("current");
    let bytes = read(&current)?;
    let mut left = &bytes[..];
    let Some((number, sum)) = take(&mut left).zip(take(&mut left)) else {
        return Err(StoreError::Damaged { path: current, what: "it is cut off".into() });
    };
    let list = dir.join(format!("v{}", u64::from_le_bytes(number)));
    if xxh3_128(&read(&list)?) != u128::from_le_bytes(sum) {
        return Err(StoreError::Damaged { path: list, what: "it has another checksum".into() });
    }
    Ok(())
}

/// Cuts the file at `path` off at `end`, durably.
fn cut(path: &Path, end: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(end)?;
    file.sync_all()
}

/// What stands behind the batches of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing was ever written there.
    Zeros,
    /// The beginning of a batch, or pieces of one.
    Torn,
    /// Something that is no batch, and a batch.
    Damaged,
}

/// What is in a journal.
#[derive(Debug, PartialEq, Eq)]
pub struct Look {
    /// Where its last batch ends.
    pub end: usize,
    /// The number of its last batch, or of the last batch before it.
    pub newest: Option<u64>,
    /// What stands behind that.
    pub rest: Rest,
}

impl Look {
    /// Looks through `bytes`, whose batches come after the one with the number
    /// `newest`.
    pub fn through(bytes: &[u8], mut newest: Option<u64>) -> Self {
        let mut end = 0;
        while let Some(batch) = Batch::at(bytes, end) {
            // A whole batch with the number of another was not torn.
            if !batch.comes_after(newest) {
                return Self { end, newest, rest: Rest::Damaged };
            }
            newest = Some(batch.number);
            end = batch.end;
        }
        let has_batch = |at| {
            bytes[at] == BEGIN
                && Batch::at(bytes, at).is_some_and(|batch| batch.comes_after(newest))
        };
        let rest = if bytes[end..].iter().all(|byte| *byte == 0) {
            Rest::Zeros
        } else if (end..bytes.len()).any(has_batch) {
            Rest::Damaged
        } else {
            Rest::Torn
        };
        Self { end, newest, rest }
    }
}

/// A batch that parses.
struct Batch {
    number: u64,
    /// Where it ends.
    end: usize,
}

impl Batch {
    /// The batch that begins at `at`, if one does and it is whole.
    fn at(bytes: &[u8], at: usize) -> Option<Self> {
        let mut left = &bytes[at..];
        if take::<1>(&mut left)? != [BEGIN] {
            return None;
        }
        let count = u32::from_le_bytes(take(&mut left)?);
        let number = u64::from_le_bytes(take(&mut left)?);
        let items = left;
        for _ in 0..count {
            let [tag, kind, compression] = take(&mut left)?;
            if tag != ITEM || !matches!(kind, PUT | REMOVE) || compression != 0 {
                return None;
            }
            let _space: [u8; 8] = take(&mut left)?;
            let key = u16::from_le_bytes(take(&mut left)?) as usize;
            let value = u32::from_le_bytes(take(&mut left)?);
            let stored = u32::from_le_bytes(take(&mut left)?);
            if key == 0 || value != stored || (kind == REMOVE && value != 0) {
                return None;
            }
            left = left.get(key + value as usize..)?;
        }
        let items = &items[..items.len() - left.len()];
        let [tag] = take(&mut left)?;
        let sum = u64::from_le_bytes(take(&mut left)?);
        let is_whole =
            count > 0 && tag == END && left.starts_with(TRAILER) && sum == xxh3_64(items);
        is_whole.then(|| Self { number, end: bytes.len() - left.len() + TRAILER.len() })
    }

    fn comes_after(&self, newest: Option<u64>) -> bool {
        newest
            .is_none_or(|newest| self.number > newest && self.number - newest <= MAX_NUMBERS_AHEAD)
    }
}

fn take<const N: usize>(left: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = left.split_first_chunk()?;
    *left = rest;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A batch as the engine writes it.
    fn batch(number: u64, items: &[(&str, Option<&str>)]) -> Vec<u8> {
        let mut bytes = vec![BEGIN];
        bytes.extend((items.len() as u32).to_le_bytes());
        bytes.extend(number.to_le_bytes());
        for (key, value) in items {
            bytes.extend([ITEM, if value.is_some() { PUT } else { REMOVE }, 0]);
            let value = value.unwrap_or_default();
            bytes.extend(1_u64.to_le_bytes());
            bytes.extend((key.len() as u16).to_le_bytes());
            bytes.extend([(value.len() as u32).to_le_bytes(); 2].as_flattened());
            bytes.extend(key.as_bytes());
            bytes.extend(value.as_bytes());
        }
        let sum = xxh3_64(&bytes[13..]);
        bytes.push(END);
        bytes.extend(sum.to_le_bytes());
        bytes.extend(TRAILER);
        bytes
    }

    fn three_batches() -> (Vec<u8>, [usize; 3]) {
        let mut bytes = batch(7, &[("a", Some("one")), ("b", None)]);
        let second = bytes.len();
        bytes.extend(batch(8, &[("c", Some("")), ("d", Some("two, and somewhat longer"))]));
        let third = bytes.len();
        bytes.extend(batch(11, &[("e", Some("three"))]));
        (bytes, [0, second, third])
    }

    #[test]
    fn a_journal_may_end_in_zeros_that_were_never_written() {
        let (mut bytes, _) = three_batches();
        let end = bytes.len();
        let whole = Look { end, newest: Some(11), rest: Rest::Zeros };
        assert_eq!(Look::through(&bytes, None), whole);
        bytes.resize(end + 5000, 0);
        assert_eq!(Look::through(&bytes, Some(6)), whole);
        let empty = Look { end: 0, newest: Some(3), rest: Rest::Zeros };
        assert_eq!(Look::through(&bytes[end..], Some(3)), empty);
    }

    #[test]
    fn wherever_a_journal_was_cut_what_stands_behind_the_last_whole_batch_is_torn() {
        let (bytes, [_, second, third]) = three_batches();
        for length in 0..bytes.len() {
            for zeros in [0, 4096] {
                let mut cut = bytes[..length].to_vec();
                cut.resize(length + zeros, 0);
                let look = Look::through(&cut, None);
                let end = [0, second, third].into_iter().rfind(|at| *at <= length).unwrap();
                assert_eq!(look.end, end, "cut at {length}");
                let rest = if length == end { Rest::Zeros } else { Rest::Torn };
                assert_eq!(look.rest, rest, "cut at {length}");
            }
        }
    }

    #[test]
    fn a_flipped_bit_before_the_last_batch_never_makes_a_journal_shorter() {
        let (bytes, [_, second, third]) = three_batches();
        for at in 0..third {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                let look = Look::through(&flipped, None);
                // The number of a batch has no checksum; it may still be in order.
                let is_number =
                    [0, second].iter().any(|batch| (batch + 5..batch + 13).contains(&at));
                let is_in_order = look.rest == Rest::Zeros && look.end == bytes.len();
                assert!(
                    look.rest == Rest::Damaged || (is_number && is_in_order),
                    "bit {bit} of byte {at}"
                );
            }
        }
    }

    #[test]
    fn zeros_in_place_of_a_page_are_damage_if_a_batch_stands_behind_them() {
        let (mut bytes, [_, second, third]) = three_batches();
        bytes[second..third].fill(0);
        let look = Look::through(&bytes, None);
        assert_eq!((look.end, look.rest), (second, Rest::Damaged));
        bytes[third] = 0;
        assert_eq!(Look::through(&bytes, None).rest, Rest::Torn);
    }

    #[test]
    fn numbers_that_go_back_are_damage_even_in_the_next_journal() {
        let (bytes, _) = three_batches();
        let look = Look::through(&bytes, Some(7));
        assert_eq!((look.end, look.rest), (0, Rest::Damaged));
    }
}
