//! The viewleader's log on its disk: changes by their index, and now and then
//! the whole state, so that the log stays short.

use super::state::{Change, State};
use crate::store::{self, Space, Store, StoreError};
use byteorder::{BigEndian, ByteOrder};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// After this many changes the state is written down as a whole.
pub const SNAPSHOT_EVERY: u64 = 5_000;

/// Where the state is kept in [`Space::Meta`].
const SNAPSHOT: &[u8] = b"snapshot";

/// The state with the change `index` applied.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Snapshot {
    index: u64,
    state: State,
}

/// How `change` is written at its `index`.
pub fn append(index: u64, change: &Change) -> store::Change {
    store::Change::put(Space::Log, key(index), json(change))
}

/// What replaces the changes after `from` up to `index` by the `state` that they
/// have led to.
pub fn compact(from: u64, index: u64, state: State) -> Vec<store::Change> {
    let whole = store::Change::put(Space::Meta, SNAPSHOT, json(&Snapshot { index, state }));
    let parts = (from + 1..=index).map(|index| store::Change::remove(Space::Log, key(index)));
    std::iter::once(whole).chain(parts).collect()
}

/// What a log holds.
#[derive(Debug, Default)]
pub struct Recovered {
    /// The state, with all changes applied.
    pub state: State,
    /// The index of the last change.
    pub index: u64,
    /// The index up to which the changes are in a snapshot.
    pub compacted: u64,
}

/// Reads the log in `store`.
///
/// # Errors
/// When it can't be read, or is not what a viewleader wrote.
pub fn recover(store: &dyn Store) -> Result<Recovered, StoreError> {
    let strange = |what: String| StoreError::Damaged { path: PathBuf::from("the log"), what };
    let Snapshot { index, mut state } = match store.get(Space::Meta, SNAPSHOT)? {
        None => Snapshot::default(),
        Some(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| strange(format!("the snapshot is none: {error}")))?,
    };
    let (mut last, mut failure) = (index, None);
    store.scan(Space::Log, &key(index + 1), &mut |key, value| {
        let at = if key.len() == 8 { BigEndian::read_u64(key) } else { 0 };
        match serde_json::from_slice::<Change>(value) {
            Ok(change) if at == last + 1 => {
                state.apply(change);
                last = at;
            }
            Ok(_) => failure = Some(strange(format!("after change {last} comes {at}"))),
            Err(error) => failure = Some(strange(format!("change {at} is none: {error}"))),
        }
        failure.is_none()
    })?;
    match failure {
        Some(failure) => Err(failure),
        None => Ok(Recovered { state, index: last, compacted: index }),
    }
}

fn key(index: u64) -> [u8; 8] {
    index.to_be_bytes()
}

fn json(value: &impl Serialize) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "a change of ours that is no JSON is a bug")]
    serde_json::to_vec(value).expect("our changes are JSON")
}
