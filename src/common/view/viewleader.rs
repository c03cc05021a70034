//! One viewleader of a group: a [`Replica`] whose leader is a [`Leader`].

use super::leader::{self, Leader};
use super::messages::{Role, ViewReply, ViewRequest, ViewleaderHealth};
use super::state::State;
use crate::consensus::node::Node;
use crate::consensus::replica::{self, Lead, News, Replica, Wanted};
use crate::consensus::requests::{GroupRequest, Kind, NotLeader};
use crate::consensus::{NodeId, member::Standing};
use crate::machine::Time;
use crate::wire::{self, Refusal};
use std::net::SocketAddrV4;

/// One viewleader of a group. `T` names a request to its shell.
pub type Viewleader<T> = Replica<Leader<T>>;

/// What can happen to a viewleader.
pub type Input<T> = replica::Input<Leader<T>>;

/// What a viewleader asks for.
pub type Effect<T> = replica::Effect<Leader<T>>;

/// Anything that a viewleader is asked.
#[derive(Clone, Debug)]
pub enum Request {
    /// By servers and clients, for the one that leads.
    View(ViewRequest),
    /// By viewleaders, or about them.
    Group(Box<GroupRequest>),
}

impl Request {
    /// Reads a request.
    ///
    /// # Errors
    /// A [`Refusal`] that says what is wrong with it.
    pub fn decode(body: &[u8]) -> Result<Self, Refusal> {
        let cmd = wire::command_of(body)?;
        match GroupRequest::decode(Kind::VIEWLEADER, &cmd, body)? {
            Some(request) => Ok(Self::Group(Box::new(request))),
            None => ViewRequest::decode(body).map(Self::View),
        }
    }
}

impl<T> Lead for Leader<T> {
    type Asker = T;
    type State = State;
    type Settings = ();

    fn begin(now: Time, (): &(), state: State, index: u64) -> Self {
        Self::new(now, state, index)
    }

    fn state(&self) -> &State {
        Self::state(self)
    }

    fn retire(self, leader: Option<SocketAddrV4>, effects: &mut Vec<leader::Effect<T>>) -> State {
        Self::retire(self, leader, effects)
    }

    fn told(news: News) -> Option<leader::Input<T>> {
        Some(match news {
            News::Committed { index } => leader::Input::Committed { index },
            News::Confirmed { number } => leader::Input::Confirmed { number },
            News::Tick => leader::Input::Tick,
            News::Slept(span) => leader::Input::Slept(span),
            News::Ending => leader::Input::Ending,
        })
    }

    fn sort(effect: leader::Effect<T>) -> Wanted<Self> {
        match effect {
            leader::Effect::Append { index, change } => Wanted::Append { index, change },
            leader::Effect::Confirm { number } => Wanted::Confirm { number },
            effect => Wanted::Own(effect),
        }
    }

    fn turn_away(
        input: leader::Input<T>,
        not_leader: NotLeader,
        effects: &mut Vec<leader::Effect<T>>,
    ) {
        if let leader::Input::Request { from, .. } = input {
            let reply = ViewReply::NotLeader(not_leader);
            effects.push(leader::Effect::Reply { to: from, reply });
        }
    }

    fn complete(effect: &mut leader::Effect<T>, node: &Node<State>) {
        if let leader::Effect::Reply { reply: ViewReply::Health(health), .. } = effect {
            health.viewleaders = viewleaders(node);
        }
    }
}

/// How the viewleaders are, by their addresses.
fn viewleaders(node: &Node<State>) -> Vec<ViewleaderHealth> {
    let health = |(id, standing): (NodeId, Standing)| {
        let role = match standing.votes {
            _ if id == node.id() => Role::Leader,
            true => Role::Follower,
            false => Role::Learner,
        };
        let address = standing.address;
        let replaced = standing.stranger.map(|_| {
            format!(
                "its disk was lost: what is there now waits for client viewleader_add {address}"
            )
        });
        let behind = (!standing.is_current).then(|| "behind".to_owned());
        let notes = replaced.into_iter().chain(behind).collect();
        ViewleaderHealth { address, role, answers: standing.answers, notes }
    };
    let mut all: Vec<_> = node.standings().into_iter().map(health).collect();
    all.sort_by_key(|viewleader| viewleader.address);
    all
}
