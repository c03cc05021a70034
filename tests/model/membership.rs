//! A server that starts, and that hears of a view: `kv/server/storage.rs`,
//! `kv/server/membership.rs`.

use super::super::Bug;
use super::{GroupVersion, Message, Node, Pending, Primary, Replica, State, Write};
use std::collections::BTreeMap;

impl State {
    pub(super) fn start(&mut self, node: Node) {
        let server = self.server_mut(node);
        server.start += 1;
        server.up = true;
        let Some(seat) = server.seat else {
            server.old = server.kept;
            return;
        };
        server.not_before = seat.since;
        let mut replica = Replica {
            version: 0,
            since: seat.since,
            fellows: Vec::new(),
            primary: None,
            pending: BTreeMap::new(),
            fetched: seat.complete,
            committed: seat.committed,
        };
        match server.kept {
            None => {}
            Some(entry) if !seat.complete => server.old = Some(entry),
            Some(entry) if entry <= seat.committed => server.committed = Some(entry),
            Some(entry) => {
                server.prepared.insert(entry);
                replica.pending.insert(entry, Pending::default());
            }
        }
        server.replica = Some(replica);
    }

    pub(super) fn learn(&mut self, node: Node, version: GroupVersion, bug: Option<Bug>) {
        let view = self.views[usize::from(version)].clone();
        let server = self.server_mut(node);
        let id = server.id(node);
        server.follows = version;
        if view.member(id).is_none() {
            server.replica.iter_mut().for_each(|replica| replica.primary = None);
            return;
        }
        let Some(since) = view.seat(id) else {
            let dropped = server.replica.take();
            if let Some(replica) = dropped {
                (server.kept, server.committed, server.old) = (None, None, None);
                server.prepared.clear();
                server.seat = None;
                // The primary after this one has committed what this one had pending.
                let told = replica.pending.iter().filter(|(_, pending)| pending.op);
                let told: Vec<Write> = told.map(|(&write, _)| write).collect();
                told.into_iter().for_each(|write| self.tell_client(write));
            }
            return;
        };
        let held = server.replica.take();
        let continued = held
            .filter(|held| held.since == since || bug == Some(Bug::ForgetsWhenItEnteredItsSeat));
        let mut replica = continued.unwrap_or_else(|| {
            server.age();
            let fetched = view.ready.contains(&id);
            if fetched {
                server.committed = server.old.take();
            }
            Replica {
                version: 0,
                since,
                fellows: Vec::new(),
                primary: None,
                pending: BTreeMap::new(),
                fetched,
                committed: Write::default(),
            }
        });
        replica.since = since;
        let was_serving = replica.primary.as_ref().is_some_and(|primary| primary.serving);
        replica.version = version;
        let others = view.replicas.iter().filter(|(other, _)| *other != id);
        replica.fellows = others.map(|(other, _)| other.node).collect();
        replica.pending.values_mut().for_each(|pending| pending.acknowledged.clear());
        replica.primary = (view.primary == Some(id))
            .then(|| Primary { serving: was_serving, ..Primary::default() });
        let fellows: Vec<Node> =
            replica.primary.iter().flat_map(|_| replica.fellows.iter().copied()).collect();
        server.replica = Some(replica);
        server.keep_seat();
        for to in fellows {
            self.messages.insert(Message::Establish { version, to });
        }
        self.go_on(node, bug);
    }
}
