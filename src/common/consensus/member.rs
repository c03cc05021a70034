//! A node of a group, around the library.
//!
//! After each input, what the library has become ready for is drained: what is to
//! be stored becomes a batch, what is committed is applied, and messages are sent,
//! at once where a leader sends entries, otherwise once the batches that they
//! depend on are durable.

use super::log::{self, Body, KEPT_PART, Log, json};
use super::message::{Assembly, Envelope, Kind, Message, Receipt};
use super::roster::{Roster, RosterChange};
use super::{
    Effect, GroupId, HEARTBEAT_TICKS, MAX_ELECTION_TICKS, MIN_ELECTION_TICKS, NodeId, State, TICK,
};
use crate::machine::Time;
use crate::store::Change;
use raft::eraftpb::{self, Entry, HardState};
use raft::{Config, Progress, ProgressState, RawNode, ReadState, Ready, SnapshotStatus, StateRole};
use rand::RngExt;
use rand::rngs::StdRng;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddrV4;
use std::time::Duration;

/// How many bytes of entries one message carries, about.
const MAX_APPEND_BYTES: u64 = 1024 * 1024;

/// How many messages with entries can be on their way to one node.
const MAX_INFLIGHT: usize = 64;

/// A node that has not taken a snapshot for so long is sent one anew.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(10);

/// How many nodes' addresses are remembered beside those in the roster.
const MAX_ROUTES: usize = 100;

/// A learner that lacks no more entries than this has caught up.
const CAUGHT_UP: u64 = 64;

/// Handed to the store and not durable yet.
#[derive(Debug)]
struct Unstored {
    batch: u64,
    /// The library's number for what it holds.
    ready: u64,
    /// A snapshot in it ends here.
    snapshot: Option<u64>,
    /// To be sent when it is durable.
    messages: Vec<eraftpb::Message>,
}

/// What there is only while this node leads.
#[derive(Debug, Default)]
struct Reign {
    /// The entry that marks its beginning; what is committed up to it is what
    /// was there before.
    begins: u64,
    /// Whether that is applied, and the owner told.
    is_open: bool,
    /// What this node has proposed: the entry's index, and the number that the
    /// owner gave it.
    proposed: VecDeque<(u64, u64)>,
    /// Questions whether this node leads that a majority has answered: the
    /// index up to which the log must be applied, and the number.
    answered: VecDeque<(u64, u64)>,
    /// What it has proposed about where nodes are reached.
    moves: BTreeMap<NodeId, SocketAddrV4>,
    /// Since when a node has been waiting for a snapshot.
    snapshots: BTreeMap<NodeId, Time>,
    /// Since when there has been one that nobody takes.
    offered: Option<Time>,
}

/// How a node is, as the leader sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Where it is reached.
    pub address: SocketAddrV4,
    /// Whether it has a vote.
    pub votes: bool,
    /// Whether it has been heard from within the last election time-out.
    pub answers: bool,
    /// Whether it has (almost) all of the log.
    pub is_current: bool,
    /// Another node, with an empty disk, sits where this one did.
    pub stranger: Option<NodeId>,
}

/// Who a node is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) node: NodeId,
    pub(super) group: GroupId,
    /// Where it is reached.
    pub(super) address: SocketAddrV4,
    pub(super) snapshot_every: u64,
}

/// A node of a group.
pub struct Member<S: State> {
    node: NodeId,
    group: GroupId,
    /// Where this node is reached.
    address: SocketAddrV4,
    raft: RawNode<Log>,
    roster: Roster,
    applied: u64,
    snapshot_every: u64,
    last_batch: u64,
    unstored: VecDeque<Unstored>,
    /// Nothing is sent before this batch is durable: it holds a new term, or that a change
    /// of the roster is committed.
    term_batch: u64,
    /// The batch by which its disk knows of the last change of the roster.
    roster_batch: u64,
    /// Where in the log that change is, or a snapshot that holds it.
    reshaped: u64,
    /// The term, the vote and the commit that its disk does not know yet.
    unkept: Option<HardState>,
    reign: Option<Reign>,
    /// Where nodes were last heard from, if not where the roster says.
    routes: BTreeMap<NodeId, SocketAddrV4>,
    /// What nodes have said that is not "got it": somebody else sits there.
    strangers: BTreeMap<NodeId, Receipt>,
    assembly: Assembly,
    /// The text of the snapshot that the library is about to take.
    incoming: Option<(Body, S)>,
    rng: StdRng,
    next_tick: Time,
    is_removed: bool,
}

impl<S: State> Member<S> {
    /// A node that goes on with `log`.
    ///
    /// # Errors
    /// When the library does not take the log.
    pub(super) fn new(
        now: Time,
        identity: Identity,
        log: Log,
        roster: Roster,
        rng: StdRng,
    ) -> Result<Self, raft::Error> {
        let Identity { node, group, address, snapshot_every } = identity;
        let applied = log.snapshot_place().0;
        let config = Config {
            id: node.0,
            election_tick: MIN_ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            min_election_tick: MIN_ELECTION_TICKS,
            max_election_tick: MAX_ELECTION_TICKS,
            applied,
            max_size_per_msg: MAX_APPEND_BYTES,
            max_inflight_msgs: MAX_INFLIGHT,
            check_quorum: true,
            pre_vote: true,
            // What is committed goes with the next entries, or the next heartbeat: nobody
            // waits for the others to apply it, and it would double the messages.
            skip_bcast_commit: true,
            ..Config::default()
        };
        let raft = RawNode::new(&config, log, &slog::Logger::root(slog::Discard, slog::o!()))?;
        Ok(Self {
            node,
            group,
            address,
            raft,
            is_removed: roster.has_removed(node),
            roster,
            applied,
            snapshot_every,
            // The first may have been the name of a node that was in no group.
            last_batch: 1,
            unstored: VecDeque::new(),
            term_batch: 0,
            roster_batch: 0,
            reshaped: applied,
            unkept: None,
            reign: None,
            routes: BTreeMap::new(),
            strangers: BTreeMap::new(),
            assembly: Assembly::default(),
            incoming: None,
            rng,
            next_tick: now + TICK,
        })
    }

    // ---- what others see ----

    pub(super) fn group(&self) -> GroupId {
        self.group
    }

    pub(super) fn roster(&self) -> &Roster {
        &self.roster
    }

    pub(super) fn is_removed(&self) -> bool {
        self.is_removed
    }

    /// Whether this node leads and everything before its time is applied.
    pub(super) fn leads(&self) -> bool {
        self.reign.as_ref().is_some_and(|reign| reign.is_open)
    }

    /// Who leads, as far as this node knows.
    pub(super) fn leader(&self) -> Option<NodeId> {
        let leader = self.raft.raft.leader_id;
        (leader != 0).then_some(NodeId(leader))
    }

    /// Where `node` is reached.
    pub(super) fn route(&self, node: NodeId) -> Option<SocketAddrV4> {
        let seat = self.roster.seats.get(&node).map(|seat| seat.address);
        self.routes.get(&node).copied().or(seat)
    }

    /// How everybody is.
    pub(super) fn standings(&self) -> BTreeMap<NodeId, Standing> {
        let last = self.raft.raft.raft_log.last_index();
        let standing = |(node, seat): (&NodeId, &super::roster::Seat)| {
            let progress = self.raft.raft.prs().get(node.0);
            let is_self = *node == self.node;
            let standing = Standing {
                address: self.route(*node).unwrap_or(seat.address),
                votes: seat.votes,
                answers: is_self || progress.is_some_and(|progress| progress.recent_active),
                is_current: is_self || progress.is_some_and(|it| is_current(it, last)),
                stranger: match self.strangers.get(node) {
                    Some(Receipt::Stranger { node }) => Some(*node),
                    _ => None,
                },
            };
            (*node, standing)
        };
        self.roster.seats.iter().map(standing).collect()
    }

    /// Whether the disks of a majority, this node's among them, know that the last change
    /// of the roster is committed: of those that are left when any minority is gone, one
    /// does, and tells the others.
    pub(super) fn has_kept_roster(&self) -> bool {
        let is_kept = self.unstored.front().is_none_or(|first| first.batch > self.roster_batch);
        let knows = |node: &NodeId| {
            let progress = self.raft.raft.prs().get(node.0);
            *node == self.node || progress.is_some_and(|it| it.committed_index >= self.reshaped)
        };
        let all = self.roster.voters().count();
        is_kept && self.roster.voters().filter(knows).count() * 2 > all
    }

    /// Whether a change of the roster is on its way into the log, or may be.
    pub(super) fn is_reshaping(&self) -> bool {
        self.raft.raft.has_pending_conf()
    }

    // ---- what happens ----

    /// Stores who this is, before anything that depends on it.
    pub(super) fn store_person(&mut self, changes: Vec<Change>, effects: &mut Vec<Effect<S>>) {
        let number = self.unstored.back().map_or(0, |unstored| unstored.ready);
        self.term_batch = self.store(number, changes, None, effects);
    }

    /// Stands for election at once.
    pub(super) fn campaign(&mut self, effects: &mut Vec<Effect<S>>) {
        // An error is another node's victory.
        let _ = self.raft.campaign();
        self.drain(effects);
    }

    /// Whether nobody else has a vote.
    pub(super) fn is_alone(&self) -> bool {
        self.roster.voters().eq([self.node])
    }

    pub(super) fn propose(&mut self, number: u64, command: &S::Command, out: &mut Vec<Effect<S>>) {
        let Some(reign) = self.reign.as_mut().filter(|reign| reign.is_open) else { return };
        if self.raft.propose(Vec::new(), json(command)).is_ok() {
            reign.proposed.push_back((self.raft.raft.raft_log.last_index(), number));
        } else {
            // It hands over. The owner must not go on as if its command were in the log.
            self.step_down();
        }
        self.drain(out);
    }

    pub(super) fn change_roster(&mut self, change: RosterChange, effects: &mut Vec<Effect<S>>) {
        if self.leads() && !self.is_reshaping() {
            // One that is refused is proposed again when somebody looks.
            let _ = self.raft.propose_conf_change(json(&change), change.to_raft());
            self.drain(effects);
        }
    }

    pub(super) fn confirm(&mut self, number: u64, effects: &mut Vec<Effect<S>>) {
        if self.leads() {
            self.raft.read_index(number.to_string().into_bytes());
            self.drain(effects);
        }
    }

    /// Lets the best of the others lead; whether there is one.
    pub(super) fn hand_over(&mut self, effects: &mut Vec<Effect<S>>) -> bool {
        if self.reign.is_none() {
            return false;
        }
        let matched = |node: &NodeId| {
            let progress = self.raft.raft.prs().get(node.0);
            progress.filter(|progress| progress.recent_active).map(|progress| progress.matched)
        };
        let others = self.roster.voters().filter(|node| *node != self.node);
        let best = others.filter_map(|node| Some((matched(&node)?, node))).max();
        if let Some((_, heir)) = best {
            self.raft.transfer_leader(heir.0);
            self.drain(effects);
        }
        best.is_some()
    }

    pub(super) fn stored(&mut self, batch: u64, effects: &mut Vec<Effect<S>>) {
        let mut messages = Vec::new();
        while self.unstored.front().is_some_and(|first| first.batch <= batch)
            && let Some(first) = self.unstored.pop_front()
        {
            self.raft.on_persist_ready(first.ready);
            if let Some(index) = first.snapshot {
                self.raft.advance_apply_to(index);
            }
            messages.extend(first.messages);
        }
        self.send(messages, effects);
        self.drain(effects);
    }

    pub(super) fn lost(&mut self, node: NodeId, effects: &mut Vec<Effect<S>>) {
        if self.raft.raft.prs().get(node.0).is_some() {
            self.raft.report_unreachable(node.0);
            self.fail_snapshot(node);
            self.drain(effects);
        }
    }

    fn fail_snapshot(&mut self, node: NodeId) {
        let progress = self.raft.raft.prs().get(node.0);
        if progress.is_some_and(|progress| progress.state == ProgressState::Snapshot) {
            self.raft.report_snapshot(node.0, SnapshotStatus::Failure);
        }
    }

    /// Takes what another node has said to a message of this one.
    pub(super) fn receipt(&mut self, to: NodeId, receipt: Receipt, effects: &mut Vec<Effect<S>>) {
        match receipt {
            Receipt::Ok => {
                self.strangers.remove(&to);
            }
            Receipt::Removed => {
                self.leave(effects);
                self.drain(effects);
            }
            Receipt::Stranger { .. } | Receipt::Foreign { .. } => {
                let is_news = self.strangers.insert(to, receipt) != Some(receipt);
                if let Some(address) = self.route(to).filter(|_| is_news) {
                    effects.push(Effect::Note(match receipt {
                        Receipt::Foreign { group } => {
                            format!("what listens at {address} is of another group, {group}")
                        }
                        _ => format!(
                            "what listens at {address} has an empty disk: to let it take the \
                             place of what was there, add it"
                        ),
                    }));
                }
                self.lost(to, effects);
            }
        }
    }

    fn step_down(&mut self) {
        let term = self.raft.raft.term;
        self.raft.raft.become_follower(term, raft::INVALID_ID);
    }

    /// This node is out. The library's part of it is drained later.
    fn leave(&mut self, effects: &mut Vec<Effect<S>>) {
        if !self.is_removed {
            self.is_removed = true;
            self.step_down();
            effects.push(Effect::Note(
                "this node was removed from its group: end it, and start it over an empty data \
                 directory if it is to come back"
                    .into(),
            ));
        }
    }

    pub(super) fn tick(&mut self, now: Time, effects: &mut Vec<Effect<S>>) {
        if now < self.next_tick || self.is_removed {
            return;
        }
        // A process that has slept has not waited for anybody: one tick.
        let late = now.since(self.next_tick) >= TICK;
        self.next_tick = if late { now + TICK } else { self.next_tick + TICK };
        if self.reign.is_none() && !self.unstored.is_empty() {
            // Whoever waits for its own disk does not accuse the leader.
            return;
        }
        if self.raft.raft.election_elapsed == 0 {
            // It begins to wait anew: what it has drawn itself is never looked at.
            let ticks = self.rng.random_range(MIN_ELECTION_TICKS..MAX_ELECTION_TICKS);
            self.raft.raft.set_randomized_election_timeout(ticks);
        }
        self.raft.tick();
        self.watch_snapshots(now);
        self.drain(effects);
    }

    /// Sends snapshots anew to nodes that have not taken theirs.
    fn watch_snapshots(&mut self, now: Time) {
        let Some(reign) = &mut self.reign else { return };
        let progress = self.raft.raft.prs().iter();
        let waiting = progress.filter(|(_, progress)| progress.state == ProgressState::Snapshot);
        let waiting: Vec<NodeId> = waiting.map(|(node, _)| NodeId(*node)).collect();
        reign.snapshots.retain(|node, _| waiting.contains(node));
        for node in &waiting {
            reign.snapshots.entry(*node).or_insert(now);
        }
        if !waiting.is_empty() || !self.raft.store().has_offer() {
            reign.offered = None;
        } else if now.since(*reign.offered.get_or_insert(now)) > SNAPSHOT_PATIENCE {
            self.raft.mut_store().withdraw_offer();
        }
        let is_late = |since: &Time| now.since(*since) > SNAPSHOT_PATIENCE;
        let late: Vec<NodeId> =
            waiting.into_iter().filter(|it| is_late(&reign.snapshots[it])).collect();
        reign.snapshots.retain(|_, since| !is_late(since));
        for node in late {
            self.fail_snapshot(node);
        }
    }

    /// Takes a message of another node of this group.
    pub(super) fn receive(&mut self, envelope: Envelope, effects: &mut Vec<Effect<S>>) -> Receipt {
        let Envelope { from, address, mut message, .. } = envelope;
        if self.roster.has_removed(from) {
            return Receipt::Removed;
        }
        if self.is_removed {
            return Receipt::Ok;
        }
        if self.routes.len() < MAX_ROUTES || self.routes.contains_key(&from) {
            self.routes.insert(from, address);
        }
        let snapshot = match message.part.take() {
            None if message.kind() == Kind::Snapshot => return Receipt::Ok,
            None => None,
            Some(part) => {
                let (index, term) = (part.index, part.term);
                let Some(text) = self.assembly.take(part) else { return Receipt::Ok };
                match read_snapshot::<S>(&text) {
                    Ok((body, state)) => Some((index, term, text, body, state)),
                    Err(error) => {
                        effects.push(Effect::Note(format!("a snapshot from {address}: {error}")));
                        return Receipt::Ok;
                    }
                }
            }
        };
        let last = self.raft.raft.raft_log.last_index();
        if message.counts_upon() > last {
            effects.push(Effect::Die(format!(
                "the log of this node ends with entry {last}, and {address} counts upon {}: its \
                 disk has lost what it had stored; replace it: start over an empty data directory",
                message.counts_upon()
            )));
            return Receipt::Ok;
        }
        let mut message = match message.into_raft(from, self.node, last) {
            Ok(message) => message,
            Err(what) => {
                effects.push(Effect::Note(format!("a message from {address} is none: {what}")));
                return Receipt::Ok;
            }
        };
        if let Some((index, term, text, body, state)) = snapshot {
            let snapshot = message.mut_snapshot();
            snapshot.set_data(text.into_bytes().into());
            let metadata = snapshot.mut_metadata();
            (metadata.index, metadata.term) = (index, term);
            metadata.set_conf_state(body.roster.to_raft());
            self.incoming = Some((body, state));
        }
        // An error says that the sender is not known (any more).
        let _ = self.raft.step(message);
        self.drain(effects);
        self.incoming = None;
        Receipt::Ok
    }

    // ---- what comes of it ----

    /// Does what the library has become ready for.
    fn drain(&mut self, effects: &mut Vec<Effect<S>>) {
        while self.raft.has_ready() {
            let mut ready = self.raft.ready();
            self.follow_role(effects);
            let read = ready.take_read_states();
            let sent_now = ready.take_messages();
            let sent_later = ready.take_persisted_messages();
            let committed = ready.take_committed_entries();
            let number = ready.number();
            let (changes, reshapes) = self.changes_of(&ready, effects);
            let snapshot = Some(ready.snapshot().get_metadata().index).filter(|index| *index > 0);
            let is_new_term = ready.must_sync() && ready.hs().is_some();
            if !changes.is_empty() {
                let batch = self.store(number, changes, snapshot, effects);
                if reshapes {
                    self.roster_batch = batch;
                }
                // Who hears that it is out votes no more: this node must not begin again
                // with a roster on which it waits for that one.
                if is_new_term || reshapes {
                    self.term_batch = batch;
                }
            }
            self.raft.advance_append_async(ready);
            match self.unstored.back_mut() {
                None => self.raft.on_persist_ready(number),
                Some(last) => last.ready = number,
            }
            self.send_in_order(sent_now, true, effects);
            self.send_in_order(sent_later, false, effects);
            for entry in committed {
                self.apply(&entry, effects);
            }
            self.open_reign(effects);
            self.confirm_what_is_applied(read, effects);
        }
    }

    /// Says that this node led, once everything is applied that was committed
    /// when it was asked.
    fn confirm_what_is_applied(&mut self, read: Vec<ReadState>, effects: &mut Vec<Effect<S>>) {
        let applied = self.applied;
        let Some(reign) = &mut self.reign else { return };
        for ReadState { index, request_ctx } in read {
            let number = std::str::from_utf8(&request_ctx).ok().and_then(|text| text.parse().ok());
            reign.answered.extend(number.map(|number| (index, number)));
        }
        let mut last = None;
        while reign.answered.front().is_some_and(|(index, _)| *index <= applied) {
            last = reign.answered.pop_front().map(|(_, number)| number);
        }
        effects.extend(last.map(|number| Effect::Confirmed { number }));
    }

    /// Notices when this node has begun or ceased to lead.
    fn follow_role(&mut self, effects: &mut Vec<Effect<S>>) {
        let leads = self.raft.raft.state == StateRole::Leader;
        match &self.reign {
            None if leads => {
                let begins = self.raft.raft.raft_log.last_index();
                self.reign = Some(Reign { begins, ..Reign::default() });
            }
            Some(_) if !leads => {
                self.reign = None;
                self.raft.mut_store().withdraw_offer();
                effects.push(Effect::Follow);
            }
            _ => {}
        }
    }

    fn open_reign(&mut self, effects: &mut Vec<Effect<S>>) {
        let applied = self.applied;
        let Some(reign) = &mut self.reign else { return };
        if !reign.is_open && applied >= reign.begins {
            reign.is_open = true;
            effects.push(Effect::Lead { index: applied });
        }
    }

    /// What is to be stored of `ready`, and whether a change of the roster is committed
    /// with it.
    fn changes_of(&mut self, ready: &Ready, effects: &mut Vec<Effect<S>>) -> (Vec<Change>, bool) {
        let mut changes = Vec::new();
        if !ready.snapshot().is_empty()
            && let Some((body, state)) = self.incoming.take()
        {
            let metadata = ready.snapshot().get_metadata();
            let (index, term) = (metadata.index, metadata.term);
            (self.applied, self.reshaped) = (index, index);
            self.roster = body.roster.clone();
            self.raft.mut_store().restore((index, term), body, &mut changes);
            effects.push(Effect::Restore { index, state });
        }
        self.raft.mut_store().append(ready.entries(), &mut changes);
        if let Some(hard) = ready.hs() {
            self.unkept = Some(hard.clone());
        }
        // A commit alone is not worth a sync. But it is kept with the next entries, so that
        // whoever has acknowledged a change of the roster knows that those before it were
        // committed: two rosters that are counted upon differ by one node at most. And
        // after a change it is kept at once, before anybody is told that it is known here:
        // who begins with an older roster may wait for nodes whose disks are gone.
        let log = self.raft.store();
        let reshapes = self.unkept.as_ref().is_some_and(|hard| log.reshapes(hard.commit));
        let is_worth_it = ready.must_sync() || !changes.is_empty() || reshapes;
        if let Some(hard) = self.unkept.take_if(|_| is_worth_it) {
            self.raft.mut_store().keep_vote(&hard, &mut changes);
        }
        (changes, reshapes)
    }

    fn store(
        &mut self,
        ready: u64,
        changes: Vec<Change>,
        snapshot: Option<u64>,
        effects: &mut Vec<Effect<S>>,
    ) -> u64 {
        self.last_batch += 1;
        let batch = self.last_batch;
        self.unstored.push_back(Unstored { batch, ready, snapshot, messages: Vec::new() });
        effects.push(Effect::Store { batch, changes });
        batch
    }

    /// Sends messages, after what they depend on is durable: for `early` ones that
    /// is this node's term.
    fn send_in_order(
        &mut self,
        messages: Vec<eraftpb::Message>,
        early: bool,
        effects: &mut Vec<Effect<S>>,
    ) {
        let needed = if early { self.term_batch } else { self.last_batch };
        match self.unstored.iter_mut().rev().find(|unstored| unstored.batch <= needed) {
            Some(unstored) => unstored.messages.extend(messages),
            None => self.send(messages, effects),
        }
    }

    fn send(&self, messages: Vec<eraftpb::Message>, effects: &mut Vec<Effect<S>>) {
        for message in &messages {
            let to = NodeId(message.to);
            let Some(address) = self.route(to) else { continue };
            for message in Message::from_raft(message) {
                let (group, from) = (self.group, self.node);
                let envelope = Envelope { group, from, to, address: self.address, message };
                effects.push(Effect::Send { to: address, envelope: Box::new(envelope) });
            }
        }
    }

    fn apply(&mut self, entry: &Entry, effects: &mut Vec<Effect<S>>) {
        self.applied = entry.index;
        let number = self.number_of(entry.index);
        if let Some(change) = log::roster_change_in(entry) {
            self.reshaped = entry.index;
            self.apply_roster_change(change, effects);
        } else if let Some((node, address)) = log::moved_in(entry) {
            self.roster.relocate(node, address);
        } else if !entry.data.is_empty() {
            match serde_json::from_slice(&entry.data) {
                Ok(command) => effects.push(Effect::Apply { index: entry.index, command, number }),
                Err(error) => effects.push(Effect::Die(format!(
                    "entry {} of the log is no command ({error}): is another node of a newer \
                     version than this one?",
                    entry.index
                ))),
            }
        }
        self.raft.advance_apply_to(entry.index);
    }

    /// The number under which this node has proposed the entry, if it has.
    fn number_of(&mut self, index: u64) -> Option<u64> {
        let proposed = &mut self.reign.as_mut()?.proposed;
        let is_first = proposed.front().is_some_and(|(first, _)| *first == index);
        is_first.then(|| proposed.pop_front().map(|(_, number)| number)).flatten()
    }

    fn apply_roster_change(&mut self, change: RosterChange, effects: &mut Vec<Effect<S>>) {
        self.roster.apply(change);
        // Who is not on a snapshot's roster does not take it.
        self.raft.mut_store().withdraw_offer();
        if let Err(error) = self.raft.apply_conf_change(&change.to_raft()) {
            effects.push(Effect::Die(format!("the roster can't be changed: {error}")));
        }
        let node = change.node();
        let place = self.route(node).map_or_else(|| node.to_string(), |it| it.to_string());
        effects.push(Effect::Note(match change {
            RosterChange::Add { address, .. } => format!("{address} comes into the group"),
            RosterChange::Promote { .. } => format!("{place} has caught up and votes"),
            RosterChange::Remove { .. } => format!("{place} is out of the group"),
        }));
        if let RosterChange::Remove { node } = change {
            self.routes.remove(&node);
            self.strangers.remove(&node);
            if node == self.node {
                self.leave(effects);
            }
        }
    }

    /// Proposes what a leader sees to by itself: learners that have caught up get a
    /// vote, and who is reached elsewhere is written down.
    pub(super) fn look_after_roster(&mut self, effects: &mut Vec<Effect<S>>) {
        if !self.leads() {
            return;
        }
        let own = (self.node, self.address);
        let heard: Vec<_> = self.routes.iter().map(|(n, at)| (*n, *at)).chain([own]).collect();
        for (node, address) in heard {
            let seat = self.roster.seats.get(&node);
            if seat.is_some_and(|seat| seat.address != address)
                && let Some(reign) = &mut self.reign
                && reign.moves.insert(node, address) != Some(address)
            {
                let _ = self.raft.propose(json(&(node, address)), Vec::new());
            }
        }
        let standings = self.standings();
        let ready = standings.iter().find(|(_, it)| !it.votes && it.answers && it.is_current);
        if let Some((node, _)) = ready
            && !self.is_reshaping()
        {
            self.change_roster(RosterChange::Promote { node: *node }, effects);
        }
        self.drain(effects);
    }

    // ---- snapshots ----

    /// Whether the owner should hand over its state, with [`Member::snapshot`].
    pub(super) fn wants_snapshot(&self) -> bool {
        let is_long = self.applied >= self.raft.store().snapshot_place().0 + self.snapshot_every;
        is_long || self.raft.store().wants_offer()
    }

    /// Takes the owner's state, in which everything is applied that was to be.
    pub(super) fn snapshot(&mut self, state: &S, effects: &mut Vec<Effect<S>>) {
        let body = Body::of(&self.roster, state);
        let (applied, log) = (self.applied, self.raft.mut_store());
        if log.wants_offer() {
            log.offer(applied, &body);
        }
        if applied >= log.snapshot_place().0 + self.snapshot_every {
            let mut changes = Vec::new();
            log.compact(applied, self.snapshot_every / KEPT_PART, body, &mut changes);
            let number = self.unstored.back().map_or(0, |unstored| unstored.ready);
            self.store(number, changes, None, effects);
        }
    }
}

/// Whether a node is known to have something of the log, which ends at `last`, and to
/// lack no more than its last entries.
fn is_current(progress: &Progress, last: u64) -> bool {
    progress.matched > 0 && progress.matched + CAUGHT_UP >= last
}

/// The roster and the state in the text of a snapshot.
fn read_snapshot<S: State>(text: &str) -> Result<(Body, S), serde_json::Error> {
    let body: Body = serde_json::from_str(text)?;
    let state = serde_json::from_str(body.state.get())?;
    Ok((body, state))
}
