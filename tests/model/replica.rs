//! What arrives, at a replica and elsewhere: `kv/server/replication.rs`, `fetch.rs`.

use super::super::Bug;
use super::{GroupVersion, Message, Node, Pending, Replica, State, Write, watermark};
use std::collections::BTreeSet;

impl State {
    pub(super) fn fetch(&mut self, node: Node) {
        let server = self.server(node);
        let Some(replica) = &server.replica else { return };
        let (version, since, start) = (replica.version, replica.since, server.start);
        if version > 0 {
            self.messages.insert(Message::Fetch { version, since, from: node, start });
        }
    }

    pub(super) fn deliver(&mut self, message: Message, bug: Option<Bug>) {
        match message {
            Message::Ready { id, version } => {
                let current = self.version();
                let trusted = version == current || bug == Some(Bug::BelievesOldReports);
                let view = self.view_mut();
                if trusted && view.seat(id).is_some() && !view.ready.contains(&id) {
                    view.ready.push(id);
                }
            }
            Message::Established { id, version } => {
                if version == self.version() && self.view().primary == Some(id) {
                    self.view_mut().established = true;
                }
            }
            Message::Establish { version, to } => {
                let Some(replica) = self.part_in(to, version, false) else { return };
                let prepared = replica.pending.keys().copied();
                let prepared =
                    prepared.filter(|it| self.server(to).prepared.contains(it)).collect();
                self.messages.insert(Message::Follows { version, from: to, prepared });
            }
            Message::Follows { version, from, prepared } => {
                for node in self.primaries_of(version) {
                    self.takes_follower(node, from, &prepared, bug);
                }
            }
            Message::Prepare { version, to, committed, entry } => {
                self.takes_prepare(version, to, committed, entry, bug);
            }
            Message::Prepared { version, from, entry } => {
                for node in self.primaries_of(version) {
                    let replica = self.server_mut(node).replica.as_mut();
                    let pending = replica.and_then(|replica| replica.pending.get_mut(&entry));
                    if let Some(pending) = pending {
                        pending.acknowledged.insert(from);
                        self.commit_if_everywhere(node, bug);
                    }
                }
            }
            Message::Fetch { version, since, from, start } => {
                for node in self.primaries_of(version) {
                    let server = self.server(node);
                    let Some(replica) = &server.replica else { continue };
                    if replica.primary.as_ref().is_some_and(|primary| primary.serving) {
                        let (value, committed) = (server.committed, watermark(replica));
                        let to = from;
                        self.messages.insert(Message::Page { since, to, start, value, committed });
                    }
                }
            }
            Message::Page { since, to, start, value, committed } => {
                self.takes_page(since, to, start, value, committed);
            }
        }
    }

    /// Takes away the messages that nobody will heed any more, for there are fewer
    /// states without them: those of versions that their receiver has left behind, and
    /// those that tell it what it knows.
    pub(super) fn forget_what_comes_too_late(&mut self, bug: Option<Bug>) {
        let messages = std::mem::take(&mut self.messages);
        let heeded = messages.iter().filter(|message| self.is_heeded(message, &messages, bug));
        self.messages = heeded.cloned().collect();
    }

    pub(super) fn is_heeded(
        &self,
        message: &Message,
        messages: &BTreeSet<Message>,
        bug: Option<Bug>,
    ) -> bool {
        let unfenced = bug == Some(Bug::TakesPreparesOfOldVersions);
        // Whether it will never be in that version again.
        let is_past = |node: Node, version: GroupVersion| {
            let server = self.server(node);
            !server.up || server.follows > version
        };
        // The primary of a version, while it is in it; whether it may yet be.
        let primary_in = |version: GroupVersion| {
            let id = self.views[usize::from(version)].primary?;
            let replica = self.part_in(id.node, version, true)?;
            (self.server(id.node).life == id.life).then_some((replica, replica.primary.as_ref()?))
        };
        let knows = |node: Node, entry: Write| {
            let server = self.server(node);
            server.prepared.contains(&entry) || server.committed >= Some(entry)
        };
        match message {
            Message::Ready { version, .. } => {
                *version == self.version() || bug == Some(Bug::BelievesOldReports)
            }
            Message::Established { version, .. } => *version == self.version(),
            Message::Establish { version, to } => {
                let answers = |it: &Message| matches!(it, Message::Follows { version: v, from, .. } if v == version && from == to);
                let answered = messages.iter().any(answers);
                let wanted = primary_in(*version).is_some_and(|(_, it)| !it.following.contains(to));
                !is_past(*to, *version) && wanted && !answered
            }
            Message::Follows { version, from, .. } => {
                primary_in(*version).is_some_and(|(_, it)| !it.following.contains(from))
            }
            Message::Prepare { version, to, committed, entry } => {
                if unfenced {
                    return true;
                }
                let Some((replica, _)) = primary_in(*version) else {
                    // From a primary that is gone; it may arrive all the same.
                    return !is_past(*to, *version);
                };
                let acknowledged = |entry: &Write| {
                    let answer = Message::Prepared { version: *version, from: *to, entry: *entry };
                    let pending = replica.pending.get(entry);
                    pending.is_none_or(|it| it.acknowledged.contains(to))
                        || messages.contains(&answer)
                };
                let part = self.part_in(*to, *version, false);
                let commits =
                    part.is_none_or(|it| it.pending.range(..=*committed).next().is_some());
                let news = entry.is_some_and(|entry| !knows(*to, entry) || !acknowledged(&entry));
                !is_past(*to, *version) && (news || commits)
            }
            Message::Prepared { version, from, entry } => {
                let waits = |replica: &Replica| {
                    replica.pending.get(entry).is_some_and(|it| !it.acknowledged.contains(from))
                };
                primary_in(*version).is_some_and(|(replica, _)| waits(replica))
            }
            Message::Fetch { version, from, start, since } => {
                let asker = self.server(*from);
                let awaited = |it: &Replica| it.since == *since && !it.fetched;
                let asks = asker.start == *start && asker.replica.as_ref().is_some_and(awaited);
                let primary = self.views[usize::from(*version)].primary;
                asks && primary.is_some_and(|id| !is_past(id.node, *version))
            }
            Message::Page { since, to, start, .. } => {
                let asker = self.server(*to);
                let awaited = |it: &Replica| it.since == *since && !it.fetched;
                asker.start == *start && asker.replica.as_ref().is_some_and(awaited)
            }
        }
    }

    /// This server's part in this version, as its primary or not.
    pub(super) fn part_in(
        &self,
        node: Node,
        version: GroupVersion,
        as_primary: bool,
    ) -> Option<&Replica> {
        let server = self.server(node);
        let replica = server.replica.as_ref().filter(|_| server.up && server.joined)?;
        (replica.version == version && replica.primary.is_some() == as_primary).then_some(replica)
    }

    pub(super) fn primaries_of(&self, version: GroupVersion) -> Vec<Node> {
        let nodes = 0..self.servers.len() as Node;
        nodes.filter(|&node| self.part_in(node, version, true).is_some()).collect()
    }

    pub(super) fn takes_follower(
        &mut self,
        node: Node,
        from: Node,
        prepared: &[Write],
        bug: Option<Bug>,
    ) {
        let server = self.server_mut(node);
        let Some(mut replica) = server.replica.take() else { return };
        if let Some(primary) = replica.primary.as_mut() {
            primary.following.insert(from);
            if !primary.serving {
                for &entry in prepared {
                    if server.prepare(entry) {
                        replica.pending.insert(entry, Pending::default());
                    }
                }
            }
        }
        server.kept = server.kept.max(server.newest());
        server.replica = Some(replica);
        self.go_on(node, bug);
    }

    pub(super) fn takes_prepare(
        &mut self,
        version: GroupVersion,
        to: Node,
        committed: Write,
        entry: Option<Write>,
        bug: Option<Bug>,
    ) {
        let unfenced = bug == Some(Bug::TakesPreparesOfOldVersions)
            && self.server(to).replica.as_ref().is_some_and(|it| it.primary.is_none());
        if self.part_in(to, version, false).is_none() && !(unfenced && self.server(to).up) {
            return;
        }
        let server = self.server_mut(to);
        let Some(mut replica) = server.replica.take() else { return };
        if let Some(entry) = entry
            && server.prepare(entry)
        {
            replica.pending.insert(entry, Pending::default());
            replica.committed = replica.committed.max(committed);
            if bug != Some(Bug::AcknowledgesBeforeTheDisk) {
                server.kept = server.kept.max(server.newest());
            }
        }
        let done: Vec<Write> = replica.pending.range(..=committed).map(|(&it, _)| it).collect();
        server.replica = Some(replica);
        server.keep_seat();
        done.into_iter().for_each(|write| self.commit(to, write));
        if let Some(entry) = entry {
            self.messages.insert(Message::Prepared { version, from: to, entry });
        }
    }

    pub(super) fn takes_page(
        &mut self,
        since: GroupVersion,
        to: Node,
        start: u8,
        value: Option<Write>,
        committed: Write,
    ) {
        let server = self.server_mut(to);
        let Some(mut replica) = server.replica.take() else { return };
        let awaited = replica.since == since && !replica.fetched && server.start == start;
        if awaited && server.up {
            replica.committed = replica.committed.max(committed);
            replica.fetched = true;
            server.old = None;
            if server.committed < value {
                server.committed = value;
                server.prepared.retain(|&other| Some(other) > value);
            }
            server.kept = server.newest();
        }
        server.replica = Some(replica);
        server.keep_seat();
    }
}
