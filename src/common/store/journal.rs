//! A look through the journals before the engine opens them.
//!
//! The engine replays a journal up to the first thing that it can't parse and
//! cuts it there, torn or damaged (<https://github.com/fjall-rs/fjall/issues/311>);
//! it only complains when a batch that parses has the wrong checksum. So the two
//! share the work. This look parses the same bytes, and tells a torn tail, which
//! it cuts, from a damaged middle, which it refuses; after it, everything that is
//! left in the journals parses, and the engine checks the checksums of all of it.
//!
//! The format is drawn in [`super`]. We write it without compression and with
//! puts and removes alone, so anything else is no batch of ours.

use super::{Durability, StoreError};
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

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

/// The active journal after a look.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Active {
    pub(super) path: PathBuf,
    /// Where its last batch begins and ends, if it has one.
    pub(super) last: Option<(u64, u64)>,
}

/// Looks through all journals in `dir`, cuts what is torn and returns which
/// journal goes on. The caller must hold the store's lock.
///
/// # Errors
/// [`StoreError::Damaged`] with the journal, or [`StoreError::Failed`] when it
/// can't be read or cut.
pub(super) fn vet(dir: &Path, durability: Durability) -> Result<Active, StoreError> {
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
    let (mut active, count) = (None, journals.len());
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
        active = Some(Active { path, last: look.last.map(|at| (at as u64, look.end as u64)) });
    }
    active.ok_or_else(|| StoreError::Damaged { path: dir.into(), what: "it has no journal".into() })
}

/// Cuts the file at `path` off at `end`, durably.
pub(super) fn cut(path: &Path, end: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(end)?;
    file.sync_all()
}

/// What stands behind the batches of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// Nothing was ever written there.
    Zeros,
    /// The beginning of a batch, or pieces of one.
    Torn,
    /// Something that is no batch, and a batch.
    Damaged,
}

/// What is in a journal.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    /// Where its last batch begins.
    last: Option<usize>,
    /// Where its last batch ends.
    end: usize,
    /// The number of its last batch, or of the last batch before it.
    newest: Option<u64>,
    rest: Rest,
}

impl Look {
    /// Looks through `bytes`, whose batches come after the one with the number
    /// `newest`.
    fn through(bytes: &[u8], mut newest: Option<u64>) -> Self {
        let (mut last, mut end) = (None, 0);
        while let Some(batch) = Batch::at(bytes, end) {
            // A whole batch with the number of another was not torn.
            if !batch.comes_after(newest) {
                return Self { last, end, newest, rest: Rest::Damaged };
            }
            newest = Some(batch.number);
            last = Some(end);
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
        Self { last, end, newest, rest }
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
        let [tag] = take(&mut left)?;
        let _checksum: [u8; 8] = take(&mut left)?;
        let is_whole = count > 0 && tag == END && left.starts_with(TRAILER);
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

    /// A batch as the engine writes it, but for the checksum.
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
        bytes.push(END);
        bytes.extend(u64::MAX.to_le_bytes());
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
        let (mut bytes, [_, _, third]) = three_batches();
        let end = bytes.len();
        let whole = Look { last: Some(third), end, newest: Some(11), rest: Rest::Zeros };
        assert_eq!(Look::through(&bytes, None), whole);
        bytes.resize(end + 5000, 0);
        assert_eq!(Look::through(&bytes, Some(6)), whole);
        let empty = Look { last: None, end: 0, newest: Some(3), rest: Rest::Zeros };
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
        let (bytes, [_, _, third]) = three_batches();
        let mut parsed = 0;
        for at in 0..third {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                let look = Look::through(&flipped, None);
                match look.rest {
                    Rest::Damaged => {}
                    // It parses all the same: the checksum will tell.
                    Rest::Zeros => {
                        assert_eq!(look.end, bytes.len(), "bit {bit} of byte {at}");
                        parsed += 1;
                    }
                    Rest::Torn => panic!("bit {bit} of byte {at} looks torn"),
                }
            }
        }
        assert!(parsed > 0);
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
