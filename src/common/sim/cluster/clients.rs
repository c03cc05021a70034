//! Clients that have to reach servers and the viewleader over the network.
//!
//! Every call is a connection of its own. It ends with an answer, or with
//! [`Silence`]: whether something may have been done is what matters about it.

use super::{BAD_NEWS, Cluster, Event};
use crate::sim::network::{Body, Lane, Parcel, Party, Rpc};
use crate::sim::trace::About;
use std::net::SocketAddrV4;
use std::time::Duration;

/// Why a call brought no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// Nobody could be reached: nothing was sent.
    NotSent,
    /// It was sent, and the connection was closed without an answer.
    Closed,
    /// It was sent, and no answer came.
    Lost,
}

/// What came of a call.
pub type Answered = Result<Vec<u8>, Silence>;

pub(super) struct ClientCall {
    pub(super) client: usize,
    /// Nobody listened there when it was made, if nobody is.
    pub(super) callee: Option<Party>,
}

impl Cluster {
    /// The client asks whoever listens at `to`, and waits for `limit` at most. What
    /// is harmless may come twice.
    pub fn client_asks(
        &mut self,
        client: usize,
        to: SocketAddrV4,
        (body, words): (Vec<u8>, String),
        is_harmless: bool,
        limit: Duration,
    ) -> Rpc {
        let rpc = self.next_rpc();
        let callee = self.party_at(to);
        self.client_calls.insert(rpc, ClientCall { client, callee });
        let from = Party::Client(client);
        let Some(to) = callee else {
            self.note(About::Traffic, |_| format!("client {client}: nobody listens: {words}"));
            let silence = Silence::NotSent;
            self.at(self.now + BAD_NEWS.min(limit), Event::Silent { rpc, silence });
            return rpc;
        };
        if self.network.is_blocked(from, to) || self.network.is_blocked(to, from) {
            self.note(About::Traffic, |c| {
                format!("client {client} can't reach {}: {words}", c.name(to))
            });
            self.at(self.now + limit, Event::Silent { rpc, silence: Silence::NotSent });
            return rpc;
        }
        self.at(self.now + limit, Event::Silent { rpc, silence: Silence::Lost });
        let body = Body::Request(body.into());
        self.send(from, to, Lane::Client, Parcel { rpc, body, words, is_harmless });
        rpc
    }

    /// Takes out which calls of clients have ended since, and how.
    pub fn answers(&mut self) -> Vec<(Rpc, Answered)> {
        std::mem::take(&mut self.answers)
    }

    pub(super) fn client_is_sent(&mut self, parcel: Parcel) {
        match parcel.body {
            Body::Reply(body) => self.client_answered(parcel.rpc, Ok(body.to_vec())),
            Body::Closed => self.client_answered(parcel.rpc, Err(Silence::Closed)),
            Body::Request(_) => {}
        }
    }

    pub(super) fn client_answered(&mut self, rpc: Rpc, answer: Answered) {
        if self.client_calls.remove(&rpc).is_some() {
            self.answers.push((rpc, answer));
        }
    }
}
