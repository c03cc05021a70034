//! One of several processes that keep one state together, as a machine.
//!
//! Every replica has the [`State`]: it applies the changes that the group's log says
//! are committed. The one that leads has a [`Lead`] over it (a viewleader's, a
//! master's), which answers requests and decides what to change; its changes go into
//! the log and come back to it committed, as they come to the others. Whoever does
//! not lead answers `not leader`, and says where the leader is.
//!
//! A process that was started without peers is a group of one: it leads from the
//! start, and a change costs it one batch on its disk.

use super::log::Recovered;
use super::message::{Envelope, Hello, Receipt};
use super::node::{self, Node};
use super::requests::{GroupReply, GroupRequest, NotLeader};
use super::reshaping::Refused;
use super::{NodeId, State};
use crate::machine::{Machine, Time};
use crate::store;
use crate::wire::Refusal;
use rand::rngs::StdRng;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddrV4;
use std::time::Duration;

/// How many wishes about the group can wait for their answer.
const MAX_WISHES: usize = 100;

/// What the one of a group that leads does while it leads: a machine over the state.
pub trait Lead: Machine + Sized {
    /// Names a request to the shell.
    type Asker;
    /// What the group keeps.
    type State: State;
    /// What may differ from process to process.
    type Settings;

    /// Begins to lead with `state`, in which everything up to `index` of the log is
    /// applied.
    fn begin(now: Time, settings: &Self::Settings, state: Self::State, index: u64) -> Self;

    /// The state, with all applied that is committed.
    fn state(&self) -> &Self::State;

    /// It leads no more: `leader` does, if that is known. Nobody is kept waiting, and
    /// the state goes on elsewhere.
    fn retire(self, leader: Option<SocketAddrV4>, effects: &mut Vec<Self::Effect>) -> Self::State;

    /// What it is told, as an input of its own; nothing if that is nothing to it.
    fn told(news: News) -> Option<Self::Input>;

    /// Sorts out what the group does for it.
    fn sort(effect: Self::Effect) -> Wanted<Self>;

    /// Answers what comes to a replica that does not lead.
    fn turn_away(input: Self::Input, not_leader: NotLeader, effects: &mut Vec<Self::Effect>);

    /// Adds to a reply what only the group knows.
    fn complete(_effect: &mut Self::Effect, _node: &Node<Self::State>) {}
}

/// What a leader is told by its group.
#[derive(Clone, Copy, Debug)]
pub enum News {
    /// The first changes that were appended and not yet committed, up to this one, are
    /// in the log to stay.
    Committed {
        /// The number of the last one.
        index: u64,
    },
    /// It led when this confirmation was asked for.
    Confirmed {
        /// The number.
        number: u64,
    },
    /// Time has passed.
    Tick,
    /// This process has not run for so long.
    Slept(Duration),
    /// The process is about to end.
    Ending,
}

/// What a leader asks for.
pub enum Wanted<L: Lead> {
    /// Append a change, and say [`News::Committed`].
    Append {
        /// Counts the changes of this leader.
        index: u64,
        /// The change.
        change: <L::State as State>::Command,
    },
    /// Find out whether it leads still, and say [`News::Confirmed`].
    Confirm {
        /// Greater than those before.
        number: u64,
    },
    /// Something for the shell.
    Own(L::Effect),
}

/// What can happen to a replica.
#[derive(Debug)]
pub enum Input<L: Lead> {
    /// Something for the one that leads.
    Own(L::Input),
    /// A request to the group as such.
    Group {
        /// To be given back with the reply.
        from: L::Asker,
        /// What is asked.
        request: Box<GroupRequest>,
    },
    /// All batches up to this one are durable.
    Stored {
        /// Its number.
        batch: u64,
    },
    /// A message to this node did not get there.
    Lost(NodeId),
    /// What a node has said to a message that it got.
    Receipt {
        /// To whom the message was.
        to: NodeId,
        /// What was said.
        receipt: Receipt,
    },
    /// What came of [`Effect::Ask`]; nothing when nobody answers there.
    Heard {
        /// Who was asked.
        address: SocketAddrV4,
        /// The answer.
        hello: Option<Hello>,
    },
    /// Time has passed.
    Tick,
    /// This process has not run for so long.
    Slept(Duration),
    /// The process is about to end: nobody is to be kept waiting, and another one
    /// is to lead.
    Ending,
}

/// What a replica asks for. Batches are to be stored in their order, and what is
/// sent to one address is to be sent in its order; anything else in any.
#[derive(Debug)]
pub enum Effect<L: Lead> {
    /// Something that the one that leads asks for.
    Own(L::Effect),
    /// Answer a request to the group.
    Group {
        /// Which request.
        to: L::Asker,
        /// The answer.
        reply: GroupReply,
    },
    /// Make these changes durable, all or none, and say so with [`Input::Stored`].
    Store {
        /// The number of the batch.
        batch: u64,
        /// What changes in the store.
        changes: Vec<store::Change>,
    },
    /// Bring this message to the process at `to`.
    Send {
        /// Where it listens.
        to: SocketAddrV4,
        /// The message.
        envelope: Box<Envelope>,
    },
    /// Ask who is at this address, and come back with [`Input::Heard`].
    Ask {
        /// Where.
        address: SocketAddrV4,
        /// What to tell of oneself.
        hello: Box<Hello>,
    },
    /// Something worth a line in the log.
    Note(String),
    /// End this process at once, and say why.
    Die(String),
}

/// What a replica does in its group.
enum Part<L: Lead> {
    Follows(Box<L::State>),
    Leads(Box<L>),
    /// Between the two, within a step.
    Changing,
}

/// One process of a group.
pub struct Replica<L: Lead> {
    settings: L::Settings,
    node: Node<L::State>,
    part: Part<L>,
    /// What the node has asked for and is not done.
    todo: VecDeque<super::Effect<L::State>>,
    /// Who waits for a wish about the group.
    wishes: BTreeMap<u64, L::Asker>,
    last_wish: u64,
}

impl<L: Lead> Replica<L> {
    /// A replica that goes on with what was on its disk, and what it asks for.
    ///
    /// # Errors
    /// When the log can't be gone on with.
    pub fn start(
        now: Time,
        (place, settings): (node::Settings, L::Settings),
        mut recovered: Recovered<L::State>,
        rng: StdRng,
        effects: &mut Vec<Effect<L>>,
    ) -> Result<Self, raft::Error> {
        let state = std::mem::take(&mut recovered.state);
        let mut first = Vec::new();
        let node = Node::start(now, place, recovered, rng, &mut first)?;
        let mut replica = Self {
            settings,
            node,
            part: Part::Follows(Box::new(state)),
            todo: first.into(),
            wishes: BTreeMap::new(),
            last_wish: 0,
        };
        replica.perform(now, effects);
        Ok(replica)
    }

    /// Whether it leads, and answers.
    pub fn leads(&self) -> bool {
        self.leader().is_some()
    }

    /// What it does while it leads, if it does.
    pub fn leader(&self) -> Option<&L> {
        match &self.part {
            Part::Leads(leader) => Some(leader),
            Part::Follows(_) | Part::Changing => None,
        }
    }

    /// Who leads, if this is another one and that is known.
    pub fn leader_elsewhere(&self) -> Option<SocketAddrV4> {
        self.node.leader().filter(|_| !self.leads())
    }

    /// Whether it is a group of its own.
    pub fn is_alone(&self) -> bool {
        self.node.is_alone()
    }

    /// The state as far as it is applied here.
    pub fn state(&self) -> Option<&L::State> {
        match &self.part {
            Part::Follows(state) => Some(state),
            Part::Leads(leader) => Some(leader.state()),
            Part::Changing => None,
        }
    }

    fn own(&mut self, now: Time, input: L::Input, effects: &mut Vec<Effect<L>>) {
        if self.leads() {
            return self.step_leader(now, input, effects);
        }
        let mut asked = Vec::new();
        L::turn_away(input, self.not_leader(), &mut asked);
        self.perform_for_leader(now, asked, effects);
    }

    fn group_request(
        &mut self,
        now: Time,
        from: L::Asker,
        request: GroupRequest,
        effects: &mut Vec<Effect<L>>,
    ) {
        let reply = match request {
            GroupRequest::Hello(_) => GroupReply::Hello(self.node.hello()),
            GroupRequest::Message(envelope) => {
                let mut asked = Vec::new();
                let receipt = self.node.receive(now, envelope, &mut asked);
                self.todo.extend(asked);
                GroupReply::Receipt(receipt)
            }
            request => return self.wish(now, from, &request, effects),
        };
        effects.push(Effect::Group { to: from, reply });
    }

    fn not_leader(&self) -> NotLeader {
        let note = self.node.why_outside().map(|why| format!("this process is in no group: {why}"));
        NotLeader { note, ..NotLeader::undone(self.node.leader()) }
    }

    /// Somebody wishes the group to be changed.
    fn wish(
        &mut self,
        now: Time,
        from: L::Asker,
        request: &GroupRequest,
        effects: &mut Vec<Effect<L>>,
    ) {
        let Some(change) = request.wish() else { return };
        let refusal = if !self.leads() {
            GroupReply::NotLeader(self.not_leader())
        } else if self.wishes.len() >= MAX_WISHES {
            GroupReply::Refused(Refusal::unavailable(Refused::Busy.to_string()))
        } else {
            self.last_wish += 1;
            self.wishes.insert(self.last_wish, from);
            let number = self.last_wish;
            return self.step_node(now, super::Input::Reshape { number, change });
        };
        effects.push(Effect::Group { to: from, reply: refusal });
    }

    fn answer_wish(
        &mut self,
        number: u64,
        outcome: Result<(), Refused>,
        effects: &mut Vec<Effect<L>>,
    ) {
        let Some(to) = self.wishes.remove(&number) else { return };
        let reply = match outcome {
            Ok(()) => GroupReply::Status { status: "ok" },
            Err(Refused::Unknown(_)) => GroupReply::Status { status: "unknown" },
            Err(Refused::NotLeader) => GroupReply::NotLeader(self.not_leader()),
            Err(
                refused @ (Refused::Busy
                | Refused::Nobody(_)
                | Refused::NoMajority(..)
                | Refused::Late),
            ) => GroupReply::Refused(Refusal::unavailable(refused.to_string())),
            Err(refused) => GroupReply::Refused(Refusal::invalid(refused.to_string())),
        };
        effects.push(Effect::Group { to, reply });
    }

    fn step_node(&mut self, now: Time, input: super::Input<<L::State as State>::Command>) {
        let mut asked = Vec::new();
        self.node.step(now, input, &mut asked);
        self.todo.extend(asked);
    }

    fn step_leader(&mut self, now: Time, input: L::Input, effects: &mut Vec<Effect<L>>) {
        let Part::Leads(leader) = &mut self.part else { return };
        let mut asked = Vec::new();
        leader.step(now, input, &mut asked);
        self.perform_for_leader(now, asked, effects);
    }

    fn tell_leader(&mut self, now: Time, news: News, effects: &mut Vec<Effect<L>>) {
        if let Some(input) = L::told(news) {
            self.step_leader(now, input, effects);
        }
    }

    fn perform_for_leader(
        &mut self,
        now: Time,
        asked: Vec<L::Effect>,
        effects: &mut Vec<Effect<L>>,
    ) {
        for effect in asked {
            match L::sort(effect) {
                Wanted::Append { index, change } => {
                    let input = super::Input::Propose { number: index, command: change };
                    self.step_node(now, input);
                }
                Wanted::Confirm { number } => {
                    self.step_node(now, super::Input::Confirm { number });
                }
                Wanted::Own(mut effect) => {
                    L::complete(&mut effect, &self.node);
                    effects.push(Effect::Own(effect));
                }
            }
        }
    }

    /// Does what the node has asked for, in its order, and what comes of that.
    fn perform(&mut self, now: Time, effects: &mut Vec<Effect<L>>) {
        loop {
            while let Some(effect) = self.todo.pop_front() {
                self.perform_for_node(now, effect, effects);
            }
            if !self.node.wants_snapshot() {
                return;
            }
            let mut asked = Vec::new();
            let state = match &self.part {
                Part::Follows(state) => state,
                Part::Leads(leader) => leader.state(),
                Part::Changing => return,
            };
            self.node.snapshot(state, &mut asked);
            self.todo.extend(asked);
        }
    }

    fn perform_for_node(
        &mut self,
        now: Time,
        effect: super::Effect<L::State>,
        effects: &mut Vec<Effect<L>>,
    ) {
        match effect {
            super::Effect::Store { batch, changes } => {
                effects.push(Effect::Store { batch, changes });
            }
            super::Effect::Send { to, envelope } => effects.push(Effect::Send { to, envelope }),
            super::Effect::Ask { address, hello } => {
                effects.push(Effect::Ask { address, hello });
            }
            super::Effect::Note(note) => effects.push(Effect::Note(note)),
            super::Effect::Die(why) => effects.push(Effect::Die(why)),
            super::Effect::Apply { command, number, .. } => match (&mut self.part, number) {
                (Part::Follows(state), _) => state.obey(command),
                (_, Some(index)) => self.tell_leader(now, News::Committed { index }, effects),
                (_, None) => unreachable!("a change that its leader has not proposed"),
            },
            super::Effect::Restore { state, .. } => {
                self.part = Part::Follows(Box::new(state));
            }
            super::Effect::Lead { index } => self.begin_to_lead(now, index, effects),
            super::Effect::Follow => self.cease_to_lead(now, effects),
            super::Effect::Confirmed { number } => {
                self.tell_leader(now, News::Confirmed { number }, effects);
            }
            super::Effect::Reshaped { number, outcome } => {
                self.answer_wish(number, outcome, effects);
            }
        }
    }

    fn begin_to_lead(&mut self, now: Time, index: u64, effects: &mut Vec<Effect<L>>) {
        match std::mem::replace(&mut self.part, Part::Changing) {
            Part::Follows(state) => {
                effects.push(Effect::Note("this process leads".into()));
                let leader = L::begin(now, &self.settings, *state, index);
                self.part = Part::Leads(Box::new(leader));
                // It looks at once at what there is to go on with.
                self.tell_leader(now, News::Tick, effects);
            }
            part => self.part = part,
        }
    }

    fn cease_to_lead(&mut self, now: Time, effects: &mut Vec<Effect<L>>) {
        match std::mem::replace(&mut self.part, Part::Changing) {
            Part::Leads(leader) => {
                effects.push(Effect::Note("this process leads no more".into()));
                let mut asked = Vec::new();
                let state = leader.retire(self.node.leader(), &mut asked);
                self.part = Part::Follows(Box::new(state));
                self.perform_for_leader(now, asked, effects);
            }
            part => self.part = part,
        }
    }
}

impl<L: Lead> Machine for Replica<L> {
    type Input = Input<L>;
    type Effect = Effect<L>;

    fn step(&mut self, now: Time, input: Input<L>, effects: &mut Vec<Effect<L>>) {
        match input {
            Input::Own(input) => self.own(now, input, effects),
            Input::Group { from, request } => self.group_request(now, from, *request, effects),
            Input::Stored { batch } => self.step_node(now, super::Input::Stored { batch }),
            Input::Lost(node) => self.step_node(now, super::Input::Lost(node)),
            Input::Receipt { to, receipt } => {
                self.step_node(now, super::Input::Receipt { to, receipt });
            }
            Input::Heard { address, hello } => {
                self.step_node(now, super::Input::Heard { address, hello });
            }
            Input::Tick => {
                self.step_node(now, super::Input::Tick);
                self.tell_leader(now, News::Tick, effects);
            }
            Input::Slept(span) => self.tell_leader(now, News::Slept(span), effects),
            Input::Ending => {
                self.tell_leader(now, News::Ending, effects);
                self.step_node(now, super::Input::Resign);
            }
        }
        self.perform(now, effects);
    }
}
