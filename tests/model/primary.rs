//! What a primary does: `kv/server/replication.rs`.

use super::super::Bug;
use super::{Message, Node, Pending, State, Write, watermark};

impl State {
    pub(super) fn write(&mut self, node: Node, bug: Option<Bug>) {
        self.writes -= 1;
        let server = self.server_mut(node);
        let Some(replica) = server.replica.as_mut() else { return };
        let Some(primary) = replica.primary.as_mut() else { return };
        primary.made += 1;
        let write = Write(replica.version, primary.made);
        replica.pending.insert(write, Pending { op: true, ..Pending::default() });
        replica.committed = watermark(replica);
        server.prepared.insert(write);
        server.kept = server.newest();
        server.keep_seat();
        self.collision |= !self.made.insert(write);
        self.send_pending(node);
        self.commit_if_everywhere(node, bug);
    }

    /// Sends what is pending to those who follow. (What has been said stays.)
    pub(super) fn send_pending(&mut self, node: Node) {
        let Some(replica) = self.server(node).replica.clone() else { return };
        let Some(primary) = &replica.primary else { return };
        let (version, committed) = (replica.version, watermark(&replica));
        for &to in &primary.following {
            for &entry in replica.pending.keys() {
                if self.server(node).prepared.contains(&entry) {
                    let entry = Some(entry);
                    self.messages.insert(Message::Prepare { version, to, committed, entry });
                }
            }
        }
        for &entry in replica.pending.keys() {
            if !self.server(node).prepared.contains(&entry) && !primary.following.is_empty() {
                self.commit(node, entry);
            }
        }
    }

    pub(super) fn tell(&mut self, node: Node) {
        let Some(replica) = self.server(node).replica.clone() else { return };
        let Some(primary) = &replica.primary else { return };
        if primary.following.len() == replica.fellows.len() {
            let (version, committed) = (replica.version, watermark(&replica));
            for &to in &replica.fellows {
                self.messages.insert(Message::Prepare { version, to, committed, entry: None });
            }
        }
    }

    pub(super) fn commit(&mut self, node: Node, write: Write) {
        let server = self.server_mut(node);
        let pending = server.replica.as_mut().and_then(|replica| replica.pending.remove(&write));
        if let Some(pending) = pending {
            server.commit(write);
            if pending.op {
                self.tell_client(write);
            }
        }
    }

    pub(super) fn tell_client(&mut self, write: Write) {
        self.seen = self.seen.max(Some(write));
        self.acknowledged = self.acknowledged.max(Some(write));
    }

    /// Once everybody follows: what is pending is prepared everywhere, and when
    /// nothing of it is left, the primary serves.
    pub(super) fn go_on(&mut self, node: Node, bug: Option<Bug>) {
        let Some(replica) = &self.server(node).replica else { return };
        let Some(primary) = &replica.primary else { return };
        if primary.serving || primary.following.len() == replica.fellows.len() {
            self.send_pending(node);
            self.commit_if_everywhere(node, bug);
        }
        self.serve_if_clear(node, bug);
    }

    pub(super) fn commit_if_everywhere(&mut self, node: Node, bug: Option<Bug>) {
        let Some(replica) = &self.server(node).replica else { return };
        let Some(primary) = &replica.primary else { return };
        let fellows = replica.fellows.len();
        if !primary.serving && primary.following.len() < fellows {
            return;
        }
        let needed = fellows - usize::from(bug == Some(Bug::SkipsOneAcknowledgement)).min(fellows);
        let done = replica.pending.iter().filter(|(_, it)| it.acknowledged.len() >= needed);
        let done: Vec<Write> = done.map(|(&write, _)| write).collect();
        done.into_iter().for_each(|write| self.commit(node, write));
        self.serve_if_clear(node, bug);
    }

    pub(super) fn serve_if_clear(&mut self, node: Node, bug: Option<Bug>) {
        let server = self.server_mut(node);
        let Some(replica) = server.replica.as_mut() else { return };
        let Some(primary) = replica.primary.as_ref() else { return };
        let all_follow = primary.following.len() == replica.fellows.len()
            || bug == Some(Bug::ServesBeforeOthersFollow);
        let clear = replica.pending.is_empty() || bug == Some(Bug::ServesBeforeItHasPreparedAnew);
        if primary.serving || !all_follow || !clear || !replica.fetched {
            return;
        }
        let committed = watermark(replica);
        replica.committed = committed;
        replica.primary.iter_mut().for_each(|primary| primary.serving = true);
        server.keep_seat();
    }
}
