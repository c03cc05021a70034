//! The state of the model: one group of one arc with one key, and what each of the
//! programs may do next. Names are those of the source: `view/state.rs`,
//! `kv/replica.rs`, `kv/server/`.

mod leader;
mod membership;
mod primary;
mod replica;

use super::{Bounds, Bug};
use std::collections::{BTreeMap, BTreeSet};

/// A server, by number.
pub(crate) type Node = u8;

/// A version of the group; it is also its place in the history of views.
pub(crate) type GroupVersion = u8;

/// Which write: the version of the group, and a number. It stands for the value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Write(pub(crate) GroupVersion, pub(crate) u8);

/// An identity: a server has a new one after it was denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Id {
    pub(crate) node: Node,
    pub(crate) life: u8,
}

// ---- the viewleader ----

/// A member of the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Member {
    pub(crate) id: Id,
    start: u8,
    leaving: bool,
}

/// The group in one version, with the members of that moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct View {
    pub(crate) members: Vec<Member>,
    pub(crate) primary: Option<Id>,
    pub(crate) replicas: Vec<(Id, GroupVersion)>,
    pub(crate) ready: Vec<Id>,
    pub(crate) established: bool,
    pub(crate) held_by: Vec<Id>,
}

impl View {
    fn member(&self, id: Id) -> Option<&Member> {
        self.members.iter().find(|member| member.id == id)
    }

    fn seat(&self, id: Id) -> Option<GroupVersion> {
        self.replicas.iter().find(|(other, _)| *other == id).map(|&(_, since)| since)
    }

    /// The identities that should hold the arc, its owner first: the last servers, so
    /// that those who join take over.
    fn target(&self, bounds: &Bounds) -> Vec<Id> {
        let own = |leaving: bool| {
            let ids = self.members.iter().filter(|member| leaving || !member.leaving);
            let mut ids: Vec<Id> = ids.map(|member| member.id).collect();
            ids.sort_unstable_by(|one, other| other.cmp(one));
            ids.truncate(bounds.replicas);
            ids
        };
        let stay = own(false);
        if stay.is_empty() { own(true) } else { stay }
    }

    fn is_at_rest(&self, bounds: &Bounds) -> bool {
        let mut target = self.target(bounds);
        let led = self.primary.is_some() && self.primary == target.first().copied();
        let (mut replicas, mut ready): (Vec<Id>, Vec<Id>) =
            (self.replicas.iter().map(|&(id, _)| id).collect(), self.ready.clone());
        for list in [&mut target, &mut replicas, &mut ready] {
            list.sort_unstable();
        }
        let nobody_leaves = self.members.iter().all(|member| !member.leaving);
        led && self.established && replicas == target && ready == target && nobody_leaves
    }
}

// ---- a server ----

/// What a primary knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Primary {
    pub(crate) serving: bool,
    following: BTreeSet<Node>,
    made: u8,
}

/// A prepared entry that is not known to be committed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Pending {
    acknowledged: BTreeSet<Node>,
    /// A client waits for it.
    op: bool,
}

/// A server's part in the group.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Replica {
    pub(crate) version: GroupVersion,
    since: GroupVersion,
    fellows: Vec<Node>,
    pub(crate) primary: Option<Primary>,
    pending: BTreeMap<Write, Pending>,
    pub(crate) fetched: bool,
    committed: Write,
}

/// What a server's disk says of its seat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct DiskSeat {
    since: GroupVersion,
    complete: bool,
    committed: Write,
}

/// One server: what a crash leaves, and what it doesn't.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Server {
    // On the disk.
    pub(crate) life: u8,
    start: u8,
    seat: Option<DiskSeat>,
    /// The newest entry.
    pub(crate) kept: Option<Write>,
    // In memory.
    pub(crate) up: bool,
    joined: bool,
    /// It may still believe that its lease runs: until it is put out, at the latest.
    /// (That it stops earlier takes nothing from what others may do.)
    pub(crate) believes: bool,
    follows: GroupVersion,
    not_before: GroupVersion,
    pub(crate) replica: Option<Replica>,
    pub(crate) committed: Option<Write>,
    prepared: BTreeSet<Write>,
    old: Option<Write>,
}

impl Server {
    fn id(&self, node: Node) -> Id {
        Id { node, life: self.life }
    }

    /// Whether it answers reads and takes writes.
    pub(crate) fn serves(&self) -> bool {
        let primary = self.replica.as_ref().and_then(|replica| replica.primary.as_ref());
        self.up && self.believes && primary.is_some_and(|primary| primary.serving)
    }

    fn newest(&self) -> Option<Write> {
        self.prepared.last().copied().max(self.committed)
    }

    fn forget(&mut self) {
        *self = Self {
            life: self.life,
            start: self.start,
            seat: self.seat,
            kept: self.kept,
            ..Self::default()
        };
    }

    fn keep_seat(&mut self) {
        self.seat = self.replica.as_ref().map(|replica| DiskSeat {
            since: replica.since,
            complete: replica.fetched,
            committed: replica.committed,
        });
    }

    /// From now on nothing is known to be right.
    fn age(&mut self) {
        self.old = self.newest().or(self.old);
        self.committed = None;
        self.prepared.clear();
    }

    /// The prepared entry becomes the committed one; older ones are superseded.
    fn commit(&mut self, write: Write) {
        if self.prepared.contains(&write) {
            self.committed = Some(write);
        }
        self.prepared.retain(|&other| other > write);
    }

    /// Takes an entry to be prepared.
    fn prepare(&mut self, write: Write) -> bool {
        self.committed.is_none_or(|committed| committed < write) && self.prepared.insert(write)
    }
}

// ---- what is said ----

/// What has been said. It stays: it may arrive at any time, often, or never.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Message {
    Establish { version: GroupVersion, to: Node },
    Follows { version: GroupVersion, from: Node, prepared: Vec<Write> },
    Prepare { version: GroupVersion, to: Node, committed: Write, entry: Option<Write> },
    Prepared { version: GroupVersion, from: Node, entry: Write },
    Fetch { version: GroupVersion, since: GroupVersion, from: Node, start: u8 },
    Page { since: GroupVersion, to: Node, start: u8, value: Option<Write>, committed: Write },
    Ready { id: Id, version: GroupVersion },
    Established { id: Id, version: GroupVersion },
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    /// The group in each of its versions; the first is never followed.
    pub(crate) views: Vec<View>,
    pub(crate) servers: Vec<Server>,
    pub(crate) messages: BTreeSet<Message>,
    /// What was written, and how many writes and crashes may still come.
    made: BTreeSet<Write>,
    writes: u8,
    crashes: u8,
    /// The newest write that a client was told of, or could have read.
    pub(crate) seen: Option<Write>,
    /// The newest write that was acknowledged.
    pub(crate) acknowledged: Option<Write>,
    /// Something older could be read after that.
    pub(crate) stale: bool,
    /// Two writes have one version.
    pub(crate) collision: bool,
    /// For the tests of the model itself: what has come about.
    pub(crate) found_again: bool,
}

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// A heartbeat that changes something, and its answer.
    Beat(Node),
    /// A server hears of this view.
    Learn(Node, GroupVersion),
    Crash(Node),
    Start(Node),
    /// A client writes here.
    Write(Node),
    /// The primary tells what is committed.
    Tell(Node),
    /// A replica that is not ready asks for what it lacks.
    Fetch(Node),
    /// What is not this server's goes, now that all is at rest.
    Tidy(Node),
    /// These are put out.
    Expel(Vec<Node>),
    /// A rebalancing worker goes on.
    Advance,
    /// A server is told to leave.
    Drain(Node),
    /// A message arrives.
    Deliver(Message),
}

impl State {
    /// All servers but the last are members, and the first of them have the group, in
    /// which nothing was written yet. The last one may join.
    pub(crate) fn first(bounds: &Bounds) -> Self {
        let ids: Vec<Id> = (0..bounds.servers - 1).map(|node| Id { node, life: 1 }).collect();
        let members = ids.iter().map(|&id| Member { id, start: 1, leaving: false }).collect();
        let members: Vec<Member> = members;
        let ready: Vec<Id> = ids.iter().copied().take(bounds.replicas).collect();
        let view = View {
            members: members.clone(),
            primary: ready.last().copied(),
            replicas: ready.iter().map(|&id| (id, 1)).collect(),
            ready: ready.clone(),
            established: true,
            held_by: Vec::new(),
        };
        let servers = (0..bounds.servers).map(|node| {
            let id = Id { node, life: 1 };
            let mut server = Server { life: 1, start: 1, up: true, ..Server::default() };
            if members.iter().any(|member| member.id == id) {
                (server.joined, server.believes, server.follows) = (true, true, 1);
            }
            if ready.contains(&id) {
                let others = ready.iter().map(|other| other.node).filter(|&other| other != node);
                let fellows: Vec<Node> = others.collect();
                let following = fellows.iter().copied().collect();
                let primary = Primary { serving: true, following, made: 0 };
                server.replica = Some(Replica {
                    version: 1,
                    since: 1,
                    fellows,
                    primary: (ready.last() == Some(&id)).then_some(primary),
                    pending: BTreeMap::new(),
                    fetched: true,
                    committed: Write(1, 0),
                });
                server.keep_seat();
            }
            server
        });
        Self {
            views: vec![View::default(), view],
            servers: servers.collect(),
            messages: BTreeSet::new(),
            made: BTreeSet::new(),
            writes: bounds.writes,
            crashes: bounds.crashes,
            seen: None,
            acknowledged: None,
            stale: false,
            collision: false,
            found_again: false,
        }
    }

    /// The view as it stands.
    pub(crate) fn view(&self) -> &View {
        &self.views[self.views.len() - 1]
    }

    fn view_mut(&mut self) -> &mut View {
        let last = self.views.len() - 1;
        &mut self.views[last]
    }

    fn version(&self) -> GroupVersion {
        (self.views.len() - 1) as GroupVersion
    }

    fn server(&self, node: Node) -> &Server {
        &self.servers[usize::from(node)]
    }

    fn server_mut(&mut self, node: Node) -> &mut Server {
        &mut self.servers[usize::from(node)]
    }

    // ---- what can happen ----

    /// What can happen next; some of it changes nothing.
    pub(crate) fn actions(&self, bounds: &Bounds, actions: &mut Vec<Action>) {
        let may_change = self.views.len() <= usize::from(bounds.versions);
        for (node, server) in (0..).zip(&self.servers) {
            if !server.up {
                actions.push(Action::Start(node));
                continue;
            }
            let is_denied = self.is_denied(server.id(node));
            if is_denied && server.life < bounds.lives || !is_denied && !server.joined {
                actions.push(Action::Beat(node));
            }
            if server.joined {
                let from = (server.follows + 1).max(server.not_before);
                actions.extend((from..=self.version()).map(|view| Action::Learn(node, view)));
                let is_idle = server.replica.is_none() && server.kept.is_some();
                if is_idle && server.follows == self.version() && self.view().is_at_rest(bounds) {
                    actions.push(Action::Tidy(node));
                }
            }
            if self.crashes > 0 {
                actions.push(Action::Crash(node));
            }
            if server.serves() {
                actions.extend((self.writes > 0).then_some(Action::Write(node)));
                actions.push(Action::Tell(node));
            }
            if server.replica.as_ref().is_some_and(|it| !it.fetched && it.primary.is_none()) {
                actions.push(Action::Fetch(node));
            }
        }
        if may_change {
            let members: Vec<Node> = self.view().members.iter().map(|it| it.id.node).collect();
            for some in 1..1_u8 << self.servers.len() {
                let some: Vec<Node> =
                    members.iter().copied().filter(|node| some & 1 << node != 0).collect();
                actions.push(Action::Expel(some));
            }
            actions.push(Action::Advance);
            if bounds.drains {
                let stays = self.view().members.iter().filter(|member| !member.leaving);
                let stays: Vec<Node> = stays.map(|member| member.id.node).collect();
                let may_go = stays.iter().filter(|_| stays.len() > 1);
                actions.extend(may_go.map(|&node| Action::Drain(node)));
            }
        }
        actions.extend(self.messages.iter().cloned().map(Action::Deliver));
    }

    fn is_denied(&self, id: Id) -> bool {
        let was_member = self.views.iter().any(|view| view.member(id).is_some());
        was_member && self.view().member(id).is_none()
    }

    /// The state after `action`.
    pub(crate) fn after(&self, action: &Action, bounds: &Bounds, bug: Option<Bug>) -> Self {
        let mut next = self.clone();
        next.act(action, bounds, bug);
        for node in 0..bounds.servers {
            next.report(node, bug);
        }
        next.forget_what_comes_too_late(bug);
        // Whatever a server would answer now, a client may have been told.
        for server in next.servers.iter().filter(|server| server.serves()) {
            next.stale |= server.committed < next.seen;
            next.seen = next.seen.max(server.committed);
        }
        next
    }

    fn act(&mut self, action: &Action, bounds: &Bounds, bug: Option<Bug>) {
        match action {
            Action::Beat(node) => self.beat(*node, bounds),
            Action::Learn(node, view) => self.learn(*node, *view, bug),
            Action::Crash(node) => {
                self.crashes -= 1;
                self.server_mut(*node).forget();
            }
            Action::Start(node) => self.start(*node),
            Action::Write(node) => self.write(*node, bug),
            Action::Tell(node) => self.tell(*node),
            Action::Fetch(node) => self.fetch(*node),
            Action::Tidy(node) => {
                let server = self.server_mut(*node);
                (server.kept, server.old) = (None, None);
            }
            Action::Expel(nodes) => self.expel(nodes, bounds, bug),
            Action::Advance => self.advance(bounds, bug),
            Action::Drain(node) => {
                let members = &mut self.view_mut().members;
                let member = members.iter_mut().find(|member| member.id.node == *node);
                member.into_iter().for_each(|member| member.leaving = true);
            }
            Action::Deliver(message) => self.deliver(message.clone(), bug),
        }
    }
}

/// The version up to which everything is committed, as the primary knows.
fn watermark(replica: &Replica) -> Write {
    let made = replica.primary.as_ref().map_or(0, |primary| primary.made);
    match replica.pending.first_key_value() {
        Some((first, _)) => Write(first.0, first.1 - 1),
        None => Write(replica.version, made),
    }
}
