//! The machine: a process that is in a group, or waits to be.

use super::founding::{Entrance, Founding};
use super::log::{self, Body, Log, Recovered};
use super::member::{Identity, Member, Standing};
use super::message::{Envelope, Hello, Receipt};
use super::reshaping::{Refused, Reshaping};
use super::roster::Roster;
use super::{Effect, GroupId, Input, NodeId, State};
use crate::machine::{Machine, Time};
use crate::store::Change;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::net::SocketAddrV4;

/// What a node is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where others reach it.
    pub address: SocketAddrV4,
    /// How it comes into a group, if it is in none.
    pub entrance: Entrance,
    /// After how many entries the state is written down as a whole:
    /// [`log::SNAPSHOT_EVERY`].
    pub snapshot_every: u64,
}

/// A process that replicates a log, or waits to.
pub struct Node<S: State> {
    node: NodeId,
    address: SocketAddrV4,
    snapshot_every: u64,
    place: Place<S>,
    reshaping: Option<Reshaping>,
    rng: StdRng,
}

/// Where a node stands.
enum Place<S: State> {
    Outside(Founding),
    Inside(Box<Member<S>>),
}

impl<S: State> Node<S> {
    /// A node that goes on with what was read from its disk (all but the state,
    /// which is the owner's), and what it asks for.
    ///
    /// # Errors
    /// When the log can't be gone on with.
    pub fn start(
        now: Time,
        settings: Settings,
        recovered: Recovered<S>,
        mut rng: StdRng,
        effects: &mut Vec<Effect<S>>,
    ) -> Result<Self, raft::Error> {
        let Settings { address, entrance, snapshot_every } = settings;
        let Recovered { person, log, roster, .. } = recovered;
        let is_new = person.is_none();
        let (node, group) = person.unwrap_or_else(|| (NodeId::drawn(rng.random()), None));
        let founders = match &entrance {
            Entrance::Founders(founders) => founders.clone(),
            Entrance::Alone | Entrance::Wait => Vec::new(),
        };
        let founding = Founding::new(now, node, address, founders);
        let place = Place::Outside(founding);
        let mut machine = Self { node, address, snapshot_every, place, reshaping: None, rng };
        match group {
            Some(group) => machine.enter(now, group, log, roster, effects)?,
            None if entrance == Entrance::Alone => {
                let roster = Roster::of_founders([(node, address)]);
                machine.found(now, roster, effects);
            }
            None if is_new => {
                let changes = vec![log::write_person(node, None, &[])];
                effects.push(Effect::Store { batch: 1, changes });
            }
            None => {}
        }
        Ok(machine)
    }

    /// Goes on in `group`, with `log`.
    fn enter(
        &mut self,
        now: Time,
        group: GroupId,
        log: Log,
        roster: Roster,
        effects: &mut Vec<Effect<S>>,
    ) -> Result<(), raft::Error> {
        let mut member = self.member(now, group, log, roster)?;
        if member.is_alone() {
            member.campaign(effects);
        }
        self.place = Place::Inside(Box::new(member));
        Ok(())
    }

    fn member(
        &mut self,
        now: Time,
        group: GroupId,
        log: Log,
        roster: Roster,
    ) -> Result<Member<S>, raft::Error> {
        let rng = StdRng::from_rng(&mut self.rng);
        let Self { node, address, snapshot_every, .. } = *self;
        let identity = Identity { node, group, address, snapshot_every };
        Member::new(now, identity, log, roster, rng)
    }

    /// Founds a group with those on `roster`.
    fn found(&mut self, now: Time, roster: Roster, effects: &mut Vec<Effect<S>>) {
        let group = GroupId::drawn(self.rng.random());
        let mut log = Log::founded(&roster);
        let mut changes = vec![log::write_person(self.node, Some(group), self.founders())];
        log.restore((1, 1), Body::of(&roster, &S::default()), &mut changes);
        effects.push(Effect::Note(format!("founding the group {group}")));
        self.come_in(now, group, log, roster, changes, effects);
        if let Place::Inside(member) = &mut self.place {
            member.campaign(effects);
        }
    }

    /// Comes into `group` with a disk that knows nothing of it yet.
    fn come_in(
        &mut self,
        now: Time,
        group: GroupId,
        log: Log,
        roster: Roster,
        changes: Vec<Change>,
        effects: &mut Vec<Effect<S>>,
    ) {
        let member = self.member(now, group, log, roster);
        #[expect(clippy::expect_used, reason = "an empty log or one of ours")]
        let mut member = member.expect("a log that has just been made");
        member.store_person(changes, effects);
        self.place = Place::Inside(Box::new(member));
    }

    /// With whom it was to found a group, if it is in none.
    fn founders(&self) -> &[SocketAddrV4] {
        match &self.place {
            Place::Outside(founding) => founding.founders(),
            Place::Inside(_) => &[],
        }
    }

    // ---- what others see ----

    /// Who this is.
    pub fn id(&self) -> NodeId {
        self.node
    }

    /// What to say of oneself to whoever asks.
    pub fn hello(&self) -> Hello {
        match &self.place {
            Place::Outside(founding) => founding.hello(),
            Place::Inside(member) => Hello {
                node: self.node,
                group: Some(member.group()),
                address: self.address,
                founders: Vec::new(),
            },
        }
    }

    /// Whether it leads, with everything applied that was before its time.
    pub fn leads(&self) -> bool {
        matches!(&self.place, Place::Inside(member) if member.leads())
    }

    /// Whether it is a group of its own.
    pub fn is_alone(&self) -> bool {
        matches!(&self.place, Place::Inside(member) if member.is_alone())
    }

    /// Where the leader is, if this is another one and that is known.
    pub fn leader(&self) -> Option<SocketAddrV4> {
        match &self.place {
            Place::Outside(_) => None,
            Place::Inside(member) => {
                let leader = member.leader().filter(|leader| *leader != self.node)?;
                member.route(leader)
            }
        }
    }

    /// Why this process is of no use to anybody, if it is not.
    pub fn why_outside(&self) -> Option<String> {
        match &self.place {
            Place::Outside(founding) => Some(founding.why()),
            Place::Inside(member) if member.is_removed() => {
                Some("it was removed from its group".into())
            }
            Place::Inside(_) => None,
        }
    }

    /// How the nodes of the group are; only a leader knows.
    pub fn standings(&self) -> BTreeMap<NodeId, Standing> {
        match &self.place {
            Place::Inside(member) => member.standings(),
            Place::Outside(_) => BTreeMap::new(),
        }
    }

    /// Whether the owner is to hand over its state, with [`Node::snapshot`].
    pub fn wants_snapshot(&self) -> bool {
        matches!(&self.place, Place::Inside(member) if member.wants_snapshot())
    }

    // ---- what happens ----

    /// Takes the owner's state, in which everything is applied that was to be.
    pub fn snapshot(&mut self, state: &S, effects: &mut Vec<Effect<S>>) {
        if let Place::Inside(member) = &mut self.place {
            member.snapshot(state, effects);
        }
    }

    /// Takes a message that somebody has brought, and says what to answer.
    pub fn receive(
        &mut self,
        now: Time,
        envelope: Envelope,
        effects: &mut Vec<Effect<S>>,
    ) -> Receipt {
        if envelope.to != self.node {
            // What was at this address is not here any more.
            let group = self.hello().group;
            return match group.filter(|group| *group != envelope.group) {
                Some(group) => Receipt::Foreign { group },
                None => Receipt::Stranger { node: self.node },
            };
        }
        if let Place::Outside(_) = &self.place {
            let founders = self.founders();
            let changes = vec![log::write_person(self.node, Some(envelope.group), founders)];
            let (log, roster) = (Log::default(), Roster::default());
            effects.push(Effect::Note(format!("coming into the group {}", envelope.group)));
            self.come_in(now, envelope.group, log, roster, changes, effects);
        }
        match &mut self.place {
            Place::Inside(member) if member.group() == envelope.group => {
                let receipt = member.receive(envelope, effects);
                self.reshape(now, effects);
                receipt
            }
            Place::Inside(member) => Receipt::Foreign { group: member.group() },
            Place::Outside(_) => Receipt::Stranger { node: self.node },
        }
    }

    fn heard(
        &mut self,
        now: Time,
        address: SocketAddrV4,
        hello: Option<Hello>,
        effects: &mut Vec<Effect<S>>,
    ) {
        match &mut self.place {
            Place::Outside(founding) => {
                if let Some(roster) = founding.heard(address, hello, effects) {
                    self.found(now, roster, effects);
                }
            }
            Place::Inside(member) => {
                let Some(reshaping) = &mut self.reshaping else { return };
                if let Err(refused) = reshaping.heard(address, hello.as_ref(), member) {
                    self.end_reshaping(Err(refused), effects);
                }
            }
        }
    }

    /// Takes the next step of a change of the group.
    fn reshape(&mut self, now: Time, effects: &mut Vec<Effect<S>>) {
        let (Place::Inside(member), Some(reshaping)) = (&mut self.place, &mut self.reshaping)
        else {
            return;
        };
        let outcome = if member.leads() {
            reshaping.advance(now, member, effects)
        } else {
            Some(Err(Refused::NotLeader))
        };
        if let Some(outcome) = outcome {
            self.end_reshaping(outcome, effects);
        }
    }

    fn end_reshaping(&mut self, outcome: Result<(), Refused>, effects: &mut Vec<Effect<S>>) {
        if let Some(reshaping) = self.reshaping.take() {
            let (number, outcome) = reshaping.outcome(outcome);
            effects.push(Effect::Reshaped { number, outcome });
        }
    }
}

impl<S: State> Machine for Node<S> {
    type Input = Input<S::Command>;
    type Effect = Effect<S>;

    fn step(&mut self, now: Time, input: Self::Input, effects: &mut Vec<Effect<S>>) {
        let hello = self.hello();
        match (&mut self.place, input) {
            (_, Input::Heard { address, hello }) => self.heard(now, address, hello, effects),
            (Place::Outside(founding), Input::Tick) => founding.tick(now, effects),
            (Place::Outside(_), Input::Reshape { number, .. }) => {
                effects.push(Effect::Reshaped { number, outcome: Err(Refused::NotLeader) });
            }
            (Place::Outside(_), _) => {}
            (Place::Inside(member), input) => match input {
                Input::Propose { number, command } => member.propose(number, &command, effects),
                Input::Confirm { number } => member.confirm(number, effects),
                Input::Stored { batch } => member.stored(batch, effects),
                Input::Lost(node) => member.lost(node, effects),
                Input::Receipt { to, receipt } => member.receipt(to, receipt, effects),
                Input::Resign => {
                    member.hand_over(effects);
                }
                Input::Tick => {
                    member.tick(now, effects);
                    member.look_after_roster(effects);
                }
                Input::Reshape { number, change } => {
                    let refused = match &mut self.reshaping {
                        _ if !member.leads() => Some(Refused::NotLeader),
                        // Whoever asked first has gone.
                        Some(reshaping) if reshaping.is_for(change) => {
                            let number = reshaping.renumber(number);
                            let outcome = Err(Refused::Late);
                            return effects.push(Effect::Reshaped { number, outcome });
                        }
                        Some(_) => Some(Refused::Busy),
                        None => None,
                    };
                    match refused {
                        Some(refused) => {
                            effects.push(Effect::Reshaped { number, outcome: Err(refused) });
                        }
                        None => {
                            let reshaping = Reshaping::new(now, number, change, hello, effects);
                            self.reshaping = Some(reshaping);
                        }
                    }
                }
                Input::Heard { .. } => {}
            },
        }
        self.reshape(now, effects);
    }
}
