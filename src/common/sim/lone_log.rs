//! A log of changes for a leader that is driven alone, a viewleader's or a master's, as
//! the scripts and random runs do: changes by their index, and now and then the whole
//! state. The log that a group replicates is `consensus`, which has tests of its own.

use crate::consensus::State;
use crate::store::{self, Space, Store, StoreError};
use byteorder::{BigEndian, ByteOrder};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where the state is kept in [`Space::Meta`].
const SNAPSHOT: &[u8] = b"snapshot";

/// The state with the change `index` applied.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Snapshot<S> {
    index: u64,
    state: S,
}

/// How `change` is written at its `index`.
pub fn append(index: u64, change: &impl Serialize) -> store::Change {
    store::Change::put(Space::Log, key(index), json(change))
}

/// What replaces the changes after `from` up to `index` by the `state` that they
/// have led to.
pub fn compact(from: u64, index: u64, state: impl Serialize) -> Vec<store::Change> {
    let whole = store::Change::put(Space::Meta, SNAPSHOT, json(&Snapshot { index, state }));
    let parts = (from + 1..=index).map(|index| store::Change::remove(Space::Log, key(index)));
    std::iter::once(whole).chain(parts).collect()
}

/// What a log holds.
#[derive(Debug, Default)]
pub struct Recovered<S> {
    /// The state, with all changes applied.
    pub state: S,
    /// The index of the last change.
    pub index: u64,
    /// The index up to which the changes are in a snapshot.
    pub compacted: u64,
}

/// Reads the log in `store`.
///
/// # Errors
/// When it can't be read, or is not what such a leader wrote.
pub fn recover<S: State>(store: &dyn Store) -> Result<Recovered<S>, StoreError> {
    let strange = |what: String| StoreError::Damaged { path: PathBuf::from("the log"), what };
    let Snapshot::<S> { index, mut state } = match store.get(Space::Meta, SNAPSHOT)? {
        None => Snapshot::default(),
        Some(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| strange(format!("the snapshot is none: {error}")))?,
    };
    let (mut last, mut failure) = (index, None);
    store.scan(Space::Log, &key(index + 1), &mut |key, value| {
        let at = if key.len() == 8 { BigEndian::read_u64(key) } else { 0 };
        match serde_json::from_slice::<S::Command>(value) {
            Ok(change) if at == last + 1 => {
                state.obey(change);
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
