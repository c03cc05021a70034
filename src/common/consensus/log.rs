//! The log: on the disk, in memory, and read back.
//!
//! On the disk ([`crate::store`]) there are, in [`Space::Log`], the entries by
//! their index, and in [`Space::Meta`]:
//!
//! | key | what |
//! |---|---|
//! | `node` | who this is, and its group; written first of all |
//! | `vote` | the term, the vote in it, and how far the log was committed |
//! | `snapshot` | the state and the roster with everything up to some index, and where the log begins |
//!
//! How far the log is committed is written along with whatever else is, since it
//! can be found out again. After [`SNAPSHOT_EVERY`] entries the state is written
//! down as a whole, and the log is cut; some entries before the snapshot stay, for
//! nodes that are a little behind.
//!
//! In memory there is the whole of the log from where it begins, which is what the
//! library reads ([`raft::Storage`]).

use super::message::Ballot;
use super::roster::{Roster, RosterChange};
use super::{GroupId, NodeId, State};
use crate::store::{Change, Space, Store, StoreError};
use byteorder::{BigEndian, ByteOrder};
use raft::eraftpb::{self, Entry, EntryType, HardState};
use raft::{GetEntriesContext, RaftState, StorageError};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::cell::Cell;
use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddrV4;
use std::path::PathBuf;

/// After this many entries the state is written down as a whole.
pub const SNAPSHOT_EVERY: u64 = 5_000;

/// Of the entries between two snapshots, one in so many stays in the log before a
/// snapshot.
pub(super) const KEPT_PART: u64 = 5;

const NODE: &[u8] = b"node";
const VOTE: &[u8] = b"vote";
const SNAPSHOT: &[u8] = b"snapshot";

/// A place in the log: an index, and the term of the entry there.
type Place = (u64, u64);

/// One entry of the log, as it is written and as it travels. One with nothing in
/// it marks the beginning of a leader's term.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    index: u64,
    term: u64,
    /// A command of the owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    command: Option<Box<RawValue>>,
    /// A change of the roster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    roster: Option<RosterChange>,
    /// A node is reached elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    moved: Option<Moved>,
}

/// Where a node is reached from now on.
pub(super) type Moved = (NodeId, SocketAddrV4);

impl PartialEq for Record {
    fn eq(&self, other: &Self) -> bool {
        let text = |record: &Self| record.command.as_ref().map(|it| it.get().to_owned());
        let rest = |record: &Self| (record.place(), record.roster, record.moved);
        text(self) == text(other) && rest(self) == rest(other)
    }
}

impl Record {
    pub(super) fn place(&self) -> Place {
        (self.index, self.term)
    }

    pub(super) fn from_raft(entry: &Entry) -> Self {
        let mut record =
            Self { index: entry.index, term: entry.term, command: None, roster: None, moved: None };
        if entry.get_entry_type() == EntryType::EntryNormal {
            let text = String::from_utf8_lossy(&entry.data).into_owned();
            record.command = RawValue::from_string(text).ok();
            record.moved = moved_in(entry);
        } else {
            record.roster = roster_change_in(entry);
        }
        record
    }

    pub(super) fn into_raft(self) -> Entry {
        let mut entry = Entry { index: self.index, term: self.term, ..Entry::default() };
        if let Some(command) = self.command {
            entry.data = command.get().as_bytes().to_vec().into();
        }
        if let Some(change) = self.roster {
            // The library looks into the data of its own proposals only.
            entry.set_entry_type(EntryType::EntryConfChangeV2);
            entry.context = json(&change).into();
        }
        if let Some(moved) = self.moved {
            entry.context = json(&moved).into();
        }
        entry
    }
}

/// The change of the roster that `entry` is, if it is one.
pub(super) fn roster_change_in(entry: &Entry) -> Option<RosterChange> {
    let is_one = entry.get_entry_type() == EntryType::EntryConfChangeV2;
    is_one.then(|| serde_json::from_slice(&entry.context).ok()).flatten()
}

/// Who is reached elsewhere from `entry` on, if it says so.
pub(super) fn moved_in(entry: &Entry) -> Option<Moved> {
    let is_one = entry.get_entry_type() == EntryType::EntryNormal && !entry.context.is_empty();
    is_one.then(|| serde_json::from_slice(&entry.context).ok()).flatten()
}

/// Who this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Person {
    node: NodeId,
    group: Option<GroupId>,
    /// The list of founders with which it was started when it came into the group.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    founders: Vec<SocketAddrV4>,
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Vote {
    term: u64,
    vote: u64,
    commit: u64,
}

/// What a snapshot holds beside its place: this is what travels.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Body {
    pub(super) roster: Roster,
    pub(super) state: Box<RawValue>,
}

impl Body {
    pub(super) fn of(roster: &Roster, state: &impl Serialize) -> Self {
        #[expect(clippy::expect_used, reason = "a state of ours that is no JSON is a bug")]
        let state = serde_json::value::to_raw_value(state).expect("a state is JSON");
        Self { roster: roster.clone(), state }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Snapshot {
    /// The last entry that it holds.
    place: Place,
    /// The entry before the first one in the log.
    base: Place,
    body: Body,
}

/// The log, as the library sees it.
#[derive(Debug, Default)]
pub struct Log {
    hard: HardState,
    /// The roster with which the library begins.
    conf: eraftpb::ConfState,
    /// The entry before the first one.
    base: Place,
    entries: VecDeque<Entry>,
    /// The place of the snapshot on the disk.
    snapshot: Place,
    /// A snapshot for a node that needs one.
    offer: Option<eraftpb::Snapshot>,
    /// A node needs one, and there is none.
    is_wanted: Cell<bool>,
}

/// What a store holds.
#[derive(Debug, Default)]
pub struct Recovered<S> {
    /// Who this is; nobody yet on an empty disk.
    pub(super) person: Option<(NodeId, Option<GroupId>)>,
    pub(super) log: Log,
    pub(super) roster: Roster,
    /// Who it has heard of.
    pub(super) heard: Heard,
    /// The state at the snapshot. What was committed after it comes as
    /// [`super::Effect::Apply`].
    pub state: S,
    /// The last index that the state holds.
    pub index: u64,
}

/// Whom a node that is in a group has heard of, as far as its disk tells.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Where those are that were in the group last.
    pub(super) present: BTreeSet<SocketAddrV4>,
    /// Where any were, those with whom it was to be founded included.
    pub(super) ever: BTreeSet<SocketAddrV4>,
}

impl Heard {
    fn of(roster: &Roster, log: &Log, founders: &[SocketAddrV4]) -> Self {
        let addresses = |roster: &Roster| -> BTreeSet<SocketAddrV4> {
            roster.seats.values().map(|seat| seat.address).collect()
        };
        let mut roster = roster.clone();
        let mut ever: BTreeSet<_> =
            addresses(&roster).into_iter().chain(founders.iter().copied()).collect();
        for entry in &log.entries {
            if let Some(change) = roster_change_in(entry) {
                roster.apply(change);
            } else if let Some((node, address)) = moved_in(entry) {
                roster.relocate(node, address);
            }
            ever.extend(addresses(&roster));
        }
        Self { present: addresses(&roster), ever }
    }
}

/// What makes `node` the one whose disk this is.
pub(super) fn write_person(
    node: NodeId,
    group: Option<GroupId>,
    founders: &[SocketAddrV4],
) -> Change {
    Change::put(Space::Meta, NODE, json(&Person { node, group, founders: founders.to_vec() }))
}

/// Reads what is in `store`.
///
/// # Errors
/// When it can't be read, or is not what a node wrote.
pub fn recover<S: State>(store: &dyn Store) -> Result<Recovered<S>, StoreError> {
    let Some(person) = read::<Person>(store, NODE)? else {
        refuse_others(store)?;
        return Ok(Recovered::default());
    };
    let vote = read::<Vote>(store, VOTE)?.unwrap_or_default();
    let mut log = Log::default();
    let (mut roster, mut state) = (Roster::default(), S::default());
    if let Some(snapshot) = read::<Snapshot>(store, SNAPSHOT)? {
        (log.base, log.snapshot) = (snapshot.base, snapshot.place);
        roster = snapshot.body.roster;
        state = serde_json::from_str(snapshot.body.state.get())
            .map_err(|error| damaged(format!("the state in the snapshot is none: {error}")))?;
    }
    log.read_entries(store)?;
    if log.last().0 < vote.commit.max(log.snapshot.0) {
        let (end, commit) = (log.last().0, vote.commit.max(log.snapshot.0));
        return Err(damaged(format!("it ends with entry {end}, and {commit} was committed")));
    }
    log.hard.term = vote.term.max(log.last().1);
    log.hard.vote = if log.hard.term == vote.term { vote.vote } else { 0 };
    log.hard.commit = vote.commit.max(log.snapshot.0);
    log.conf = roster.to_raft();
    let index = log.snapshot.0;
    let heard = Heard::of(&roster, &log, &person.founders);
    Ok(Recovered { person: Some((person.node, person.group)), log, roster, heard, state, index })
}

/// The last vote that is in `store`.
///
/// # Errors
/// When it can't be read, or is not what a node wrote.
pub fn last_ballot(store: &dyn Store) -> Result<Ballot, StoreError> {
    let Vote { term, vote, .. } = read(store, VOTE)?.unwrap_or_default();
    Ok(Ballot { term, vote: NodeId(vote) })
}

fn damaged(what: String) -> StoreError {
    StoreError::Damaged { path: PathBuf::from("the log"), what }
}

fn read<T: for<'a> Deserialize<'a>>(
    store: &dyn Store,
    key: &[u8],
) -> Result<Option<T>, StoreError> {
    let Some(bytes) = store.get(Space::Meta, key)? else { return Ok(None) };
    let name = String::from_utf8_lossy(key);
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| damaged(format!("the record {name:?} is none: {error}")))
}

/// A store without a node must be empty: before there were nodes, a viewleader
/// wrote a log of another format.
fn refuse_others(store: &dyn Store) -> Result<(), StoreError> {
    for space in [Space::Meta, Space::Log] {
        let mut is_empty = true;
        store.scan(space, &[], &mut |_, _| {
            is_empty = false;
            false
        })?;
        if !is_empty {
            return Err(damaged(
                "it was written by a version from before viewleaders could be replicated, and \
                 can't be read by this one: start with an empty data directory, and the servers, \
                 too"
                .into(),
            ));
        }
    }
    Ok(())
}

impl Log {
    /// The log of a group's founder: the roster stands before its first entry.
    pub(super) fn founded(roster: &Roster) -> Self {
        let mut log = Self { base: (1, 1), snapshot: (1, 1), ..Self::default() };
        (log.hard.term, log.hard.commit) = (1, 1);
        log.conf = roster.to_raft();
        log
    }

    fn read_entries(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        let (mut before, mut failure) = (self.base, None);
        store.scan(Space::Log, &key(before.0 + 1), &mut |key, value| {
            let at = if key.len() == 8 { BigEndian::read_u64(key) } else { 0 };
            match serde_json::from_slice::<Record>(value) {
                Ok(record)
                    if record.index == at && at == before.0 + 1 && record.term >= before.1 =>
                {
                    before = record.place();
                    self.entries.push_back(record.into_raft());
                }
                Ok(_) => failure = Some(format!("after entry {} comes {at}", before.0)),
                Err(error) => failure = Some(format!("entry {at} is none: {error}")),
            }
            failure.is_none()
        })?;
        failure.map_or(Ok(()), |what| Err(damaged(what)))
    }

    /// The place of the last entry.
    pub(super) fn last(&self) -> Place {
        self.entries.back().map_or(self.base, |entry| (entry.index, entry.term))
    }

    /// The place of the snapshot on the disk.
    pub(super) fn snapshot_place(&self) -> Place {
        self.snapshot
    }

    /// Appends entries, in place of those that were there, and says what changes
    /// on the disk.
    pub(super) fn append(&mut self, entries: &[Entry], changes: &mut Vec<Change>) {
        let Some(first) = entries.first() else { return };
        assert!(first.index > self.base.0 && first.index <= self.last().0 + 1, "a gap in the log");
        let last = self.last().0;
        self.entries.truncate((first.index - self.base.0 - 1) as usize);
        self.entries.extend(entries.iter().cloned());
        for entry in entries {
            let record = Record::from_raft(entry);
            changes.push(Change::put(Space::Log, key(entry.index), json(&record)));
        }
        let replaced = self.last().0 + 1..=last;
        changes.extend(replaced.map(|index| Change::remove(Space::Log, key(index))));
    }

    /// Whether a change of the roster is committed up to `commit`, and the disk has not
    /// been told.
    pub(super) fn reshapes(&self, commit: u64) -> bool {
        let told = self.hard.commit.saturating_sub(self.base.0);
        let news = self.entries.iter().skip(told as usize);
        news.take_while(|it| it.index <= commit).any(|it| roster_change_in(it).is_some())
    }

    /// Keeps term, vote and commit.
    pub(super) fn keep_vote(&mut self, hard: &HardState, changes: &mut Vec<Change>) {
        self.hard = hard.clone();
        let vote = Vote { term: hard.term, vote: hard.vote, commit: hard.commit };
        changes.push(Change::put(Space::Meta, VOTE, json(&vote)));
    }

    /// Goes on from a snapshot at `place`; what was there before is gone.
    pub(super) fn restore(&mut self, place: Place, body: Body, changes: &mut Vec<Change>) {
        let old = self.base.0 + 1..=self.last().0;
        changes.extend(old.map(|index| Change::remove(Space::Log, key(index))));
        self.entries.clear();
        (self.base, self.snapshot, self.offer) = (place, place, None);
        let snapshot = Snapshot { place, base: place, body };
        changes.push(Change::put(Space::Meta, SNAPSHOT, json(&snapshot)));
    }

    /// Replaces what led to a snapshot at `index`, which is applied, by that,
    /// leaving `kept` entries before it.
    pub(super) fn compact(&mut self, index: u64, kept: u64, body: Body, changes: &mut Vec<Change>) {
        let place = (index, self.term_at(index).unwrap_or(self.base.1));
        let cut = index.saturating_sub(kept).max(self.base.0);
        let base = (cut, self.term_at(cut).unwrap_or(self.base.1));
        let old = self.base.0 + 1..=cut;
        changes.extend(old.clone().map(|index| Change::remove(Space::Log, key(index))));
        self.entries.drain(..old.count());
        (self.base, self.snapshot, self.offer) = (base, place, None);
        let snapshot = Snapshot { place, base, body };
        changes.push(Change::put(Space::Meta, SNAPSHOT, json(&snapshot)));
    }

    /// Whether a node needs a snapshot.
    pub(super) fn wants_offer(&self) -> bool {
        self.is_wanted.get()
    }

    /// Has a snapshot at `index`, which is applied, for the node that needs one.
    pub(super) fn offer(&mut self, index: u64, body: &Body) {
        self.is_wanted.set(false);
        let mut snapshot = eraftpb::Snapshot::default();
        snapshot.set_data(json(body).into());
        let term = self.term_at(index).unwrap_or(self.base.1);
        let metadata = snapshot.mut_metadata();
        (metadata.index, metadata.term) = (index, term);
        metadata.set_conf_state(body.roster.to_raft());
        self.offer = Some(snapshot);
    }

    /// Whether there is one.
    pub(super) fn has_offer(&self) -> bool {
        self.offer.is_some()
    }

    /// Nobody needs a snapshot any more: its memory is given back.
    pub(super) fn withdraw_offer(&mut self) {
        self.offer = None;
    }

    fn term_at(&self, index: u64) -> Option<u64> {
        let offset = index.checked_sub(self.base.0)?;
        match offset.checked_sub(1) {
            None => Some(self.base.1),
            Some(offset) => self.entries.get(offset as usize).map(|entry| entry.term),
        }
    }
}

impl raft::Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard.clone(), self.conf.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.base.0 {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last().0 + 1 {
            return Err(StorageError::Unavailable.into());
        }
        let offset = |index: u64| (index - self.base.0 - 1) as usize;
        let mut entries: Vec<_> = self.entries.range(offset(low)..offset(high)).cloned().collect();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        let missing =
            if index < self.base.0 { StorageError::Compacted } else { StorageError::Unavailable };
        self.term_at(index).ok_or(missing.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.base.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last().0)
    }

    fn snapshot(&self, request_index: u64, _: u64) -> raft::Result<eraftpb::Snapshot> {
        let at_least = request_index.max(self.base.0);
        match &self.offer {
            Some(offer) if offer.get_metadata().index >= at_least => Ok(offer.clone()),
            _ => {
                self.is_wanted.set(true);
                Err(StorageError::SnapshotTemporarilyUnavailable.into())
            }
        }
    }
}

fn key(index: u64) -> [u8; 8] {
    index.to_be_bytes()
}

pub(super) fn json(value: &impl Serialize) -> Vec<u8> {
    #[expect(clippy::expect_used, reason = "a record of ours that is no JSON is a bug")]
    serde_json::to_vec(value).expect("our records are JSON")
}
