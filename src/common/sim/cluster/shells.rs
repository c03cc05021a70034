//! The shells: what comes in is given to the machines, and what they ask for is
//! done.

use super::viewleaders::Walk;
use super::{BAD_NEWS, ClientId, Cluster, End, Event, LAZY_SYNC, Outcome};
use crate::consensus::NodeId;
use crate::kv::disk::Record;
use crate::kv::messages::{Answer, Reply, Request};
use crate::kv::server::{
    self, BEATS_PER_LEASE, CallError, CallId, DEFAULT_LEASE, PATIENCE, ViewError, WATCH,
};
use crate::machine::Machine;
use crate::sim::network::{Body, Lane, Parcel, Party, Rpc, Sent, Way};
use crate::sim::trace::{self, About};
use crate::store::Change;
use crate::view::View;
use crate::view::messages::ViewAnswer;
use crate::view::viewleader;
use crate::wire::Refusal;
use serde::de::DeserializeOwned;
use std::net::SocketAddrV4;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How long a call that is answered at once may take.
const PROMPT_LIMIT: Duration = Duration::from_secs(2);

/// How long a message between viewleaders may take to be acknowledged.
const EXCHANGE_LIMIT: Duration = Duration::from_secs(2);

/// How long whoever is asked who it is may take to answer.
const HELLO_LIMIT: Duration = Duration::from_secs(1);

/// Who has asked a server for something.
pub(super) enum Origin {
    /// A client beside the server.
    Client(ClientId),
    /// A client somewhere.
    Remote {
        rpc: Rpc,
        caller: Party,
    },
    Server {
        rpc: Rpc,
        caller: Party,
        asked: Rc<Request>,
    },
}

/// A view as it crosses the network.
pub(super) struct ShownView {
    pub(super) view: Arc<View>,
    pub(super) body: Rc<[u8]>,
    /// What is read from that.
    pub(super) read: ViewAnswer,
}

/// What a call is for.
pub(super) enum Purpose {
    /// A server has asked another one, and knows the call by this.
    Server(CallId),
    /// A server has asked a viewleader; the lane says for what.
    View(Walk),
    /// A viewleader has brought a message to this node.
    Message(NodeId),
    /// A viewleader has asked who is there.
    Hello(SocketAddrV4),
}

/// A call that has not ended for its caller.
pub(super) struct Call {
    pub(super) caller: Party,
    /// Nobody listened there when it was made, if nobody is.
    pub(super) callee: Option<Party>,
    pub(super) purpose: Purpose,
    pub(super) lane: Lane,
}

impl Cluster {
    pub(super) fn tick_again(&mut self, party: Party) {
        self.at(self.now + self.tick, Event::Tick(party));
    }

    /// Gives an event to the machine that it concerns, whose process runs.
    pub(super) fn happen(&mut self, event: Event) {
        match event {
            Event::Tick(Party::Viewleader(site)) => self.tick_viewleader(site),
            Event::Tick(Party::Server(index)) => {
                self.sync_lazily(index);
                self.step_server(index, server::Input::Tick);
                self.stepped = None;
                self.tick_again(Party::Server(index));
            }
            Event::Arrival { from, to, lane, parcel } => match (parcel.body, to) {
                (Body::Request(body), Party::Viewleader(site)) => {
                    self.ask_viewleader(site, (parcel.rpc, from, lane), &body);
                }
                (Body::Request(body), Party::Server(at)) => {
                    self.ask_server(at, parcel.rpc, from, lane, &body);
                }
                (Body::Request(_), Party::Client(_)) => {}
                (Body::Reply(body), _) => self.answered(parcel.rpc, Ok(&body)),
                (Body::Closed, _) => self.answered(parcel.rpc, Err(CallError::Lost)),
            },
            Event::Ended { rpc, error } => self.answered(rpc, Err(error)),
            Event::Stored { party, .. } if self.disk_mut(party).is_failing => {
                self.note(About::Members, |c| format!("the disk of {} fails", c.name(party)));
                self.ended.push((party, End::DiskFailed));
                self.kill(party);
            }
            Event::Stored { party, number, .. } => {
                if self.disk_mut(party).keep_up_to(number) {
                    match party {
                        Party::Viewleader(site) => {
                            let input = viewleader::Input::Stored { batch: number };
                            self.step_viewleader(site, input);
                        }
                        Party::Server(index) => {
                            self.step_server(index, server::Input::Stored { batch: number });
                        }
                        Party::Client(_) => {}
                    }
                }
            }
            Event::Tick(Party::Client(_)) | Event::Silent { .. } => {}
            Event::Room { at, is_room } => self.step_server(at, server::Input::Room(is_room)),
            Event::FromClient { at, client, body } => match Request::decode(&body) {
                Ok(request) => {
                    let words = trace::request(&self.names, &request);
                    self.note(About::Traffic, |c| {
                        format!("client {} -> {} {words}", client.0, c.servers[at].name)
                    });
                    let from = Origin::Client(client);
                    self.step_server(at, server::Input::Request { from, request });
                }
                Err(refusal) => self.end(client, Outcome::Reply(to_json(&refusal))),
            },
        }
    }

    /// A client's request has ended.
    pub(super) fn end(&mut self, client: ClientId, outcome: Outcome) {
        let Some(at) = self.clients.remove(&client) else { return };
        self.note(About::Traffic, |cluster| {
            let name = &cluster.servers[at].name;
            match &outcome {
                Outcome::Reply(reply) => {
                    format!("{name} -> client {} {}", client.0, cluster.names.rewrite(reply))
                }
                Outcome::Closed => format!("{name} -> client {} closed without a reply", client.0),
                Outcome::NotSent => format!("client {}: nobody listens at {name}", client.0),
            }
        });
        self.outcomes.push((client, outcome));
    }

    fn sync_lazily(&mut self, index: usize) {
        let member = &mut self.servers[index];
        if member.sync_at <= self.now {
            member.sync_at = self.now + LAZY_SYNC;
            self.disks[member.disk].sync();
        }
    }

    /// Queues a batch on the disk of `party`.
    pub(super) fn keep(&mut self, party: Party, changes: Vec<Change>, number: u64) {
        let span = self.chance.sync(party);
        let time = self.now + if self.disk_mut(party).is_lazy() { Duration::ZERO } else { span };
        if let Some(time) = self.disk_mut(party).submit(changes, number, time) {
            let life = self.life(party);
            self.at(time, Event::Stored { party, life, number });
        }
    }

    pub(super) fn send(&mut self, from: Party, to: Party, lane: Lane, parcel: Parcel) {
        let about = match lane {
            Lane::Prompt | Lane::Patient | Lane::Client => About::Traffic,
            Lane::Beat | Lane::View | Lane::Report => About::ViewCalls,
            Lane::Group | Lane::Hello => About::Viewleaders,
        };
        let words = parcel.words.clone();
        let sent = self.network.send(self.now, &mut *self.chance, (from, to, lane), parcel);
        let suffix = match sent {
            Sent::Arrives(at, parcel) => {
                let back = !matches!(parcel.body, Body::Request(_));
                let way = Way { from, to, lane, back };
                if parcel.is_harmless
                    && let Some(later) = self.chance.again(way)
                {
                    let parcel = parcel.clone();
                    self.at(at + later, Event::Arrival { from, to, lane, parcel });
                }
                self.at(at, Event::Arrival { from, to, lane, parcel });
                if self.chance.breaks(way) {
                    let (caller, callee) = if back { (to, from) } else { (from, to) };
                    self.break_connection(caller, callee, lane);
                    " (the connection breaks)"
                } else {
                    ""
                }
            }
            Sent::Held => " (held)",
            Sent::Lost => " (lost)",
        };
        if !words.is_empty() {
            self.note(about, |cluster| cluster.words(from, to, &words) + suffix);
        }
    }

    /// Makes a call to somebody who is there.
    pub(super) fn call(&mut self, call: Call, parcel: Parcel) {
        let limit = match call.lane {
            Lane::Prompt | Lane::Report => PROMPT_LIMIT,
            Lane::Patient => PATIENCE + PROMPT_LIMIT,
            Lane::Beat => DEFAULT_LEASE / BEATS_PER_LEASE,
            Lane::View => WATCH + PROMPT_LIMIT,
            Lane::Group => EXCHANGE_LIMIT,
            Lane::Hello => HELLO_LIMIT,
            Lane::Client => unreachable!("those who call so are no clients"),
        };
        let (rpc, caller, lane) = (parcel.rpc, call.caller, call.lane);
        let callee = call.callee.expect("somebody who is there");
        self.calls.insert(rpc, call);
        self.at(self.now + limit, Event::Ended { rpc, error: CallError::Lost });
        self.send(caller, callee, lane, parcel);
    }

    /// A call to where nobody listens.
    pub(super) fn call_nobody(&mut self, rpc: Rpc, call: Call) {
        self.calls.insert(rpc, call);
        self.at(self.now + BAD_NEWS, Event::Ended { rpc, error: CallError::NotSent });
    }

    pub(super) fn next_rpc(&mut self) -> Rpc {
        self.last_rpc.0 += 1;
        self.last_rpc
    }

    /// A call has ended for its caller.
    fn answered(&mut self, rpc: Rpc, result: Result<&Rc<[u8]>, CallError>) {
        let Some(Call { caller, purpose, lane, .. }) = self.calls.remove(&rpc) else { return };
        match (caller, purpose) {
            (Party::Server(index), Purpose::Server(call)) => {
                // A server that answers in other words has refused the call.
                let read = |body| serde_json::from_slice::<Answer>(body);
                let result = result.and_then(|body| read(body).map_err(|_| CallError::NotSent));
                self.step_server(index, server::Input::Answered { call, result });
            }
            (Party::Server(index), Purpose::View(walk)) => self.walked(index, lane, walk, result),
            (Party::Viewleader(site), Purpose::Message(node)) => {
                self.told_viewleader(site, node, result.map(|body| &**body));
            }
            (Party::Viewleader(site), Purpose::Hello(address)) => {
                self.heard(site, address, result.map(|body| &**body));
            }
            _ => unreachable!("nobody else calls so"),
        }
    }

    fn ask_server(&mut self, at: usize, rpc: Rpc, caller: Party, lane: Lane, body: &[u8]) {
        match Request::decode(body) {
            Ok(request) if lane == Lane::Client => {
                let from = Origin::Remote { rpc, caller };
                self.step_server(at, server::Input::Request { from, request });
            }
            Ok(request) => {
                let asked = Rc::new(request.clone());
                let from = Origin::Server { rpc, caller, asked };
                self.step_server(at, server::Input::Request { from, request });
            }
            Err(refusal) => self.refuse(Party::Server(at), (rpc, caller, lane), &refusal),
        }
    }

    pub(super) fn refuse(&mut self, me: Party, from: (Rpc, Party, Lane), refusal: &Refusal) {
        let (rpc, caller, lane) = from;
        let body = Body::Reply(to_json(refusal).into_bytes().into());
        let words = format!("refused: {refusal}");
        self.send(me, caller, lane, Parcel { rpc, body, words, is_harmless: false });
    }

    pub(super) fn step_server(&mut self, index: usize, input: server::Input<Origin>) {
        self.stepped = Some(index);
        let host = &mut self.servers[index].host;
        let mut effects = Vec::new();
        host.machine.step(host.clock.show(self.now), input, &mut effects);
        for effect in effects {
            self.perform(index, effect);
        }
    }

    fn perform(&mut self, index: usize, effect: server::Effect<Origin>) {
        use server::Effect;
        let me = Party::Server(index);
        match effect {
            Effect::Reply { to: Origin::Client(client), reply } => {
                self.end(client, Outcome::Reply(to_json(&reply)));
            }
            Effect::Close { to: Origin::Client(client) } => self.end(client, Outcome::Closed),
            Effect::Reply { to: Origin::Remote { rpc, caller }, reply } => {
                let json = to_json(&reply);
                let words =
                    if self.trace.is_on { self.names.rewrite(&json) } else { String::new() };
                let body = Body::Reply(json.into_bytes().into());
                self.send(
                    me,
                    caller,
                    Lane::Client,
                    Parcel { rpc, body, words, is_harmless: false },
                );
            }
            Effect::Close { to: Origin::Remote { rpc, caller } } => {
                let words = "closed without a reply".to_owned();
                let parcel = Parcel { rpc, body: Body::Closed, words, is_harmless: false };
                self.send(me, caller, Lane::Client, parcel);
            }
            Effect::Reply { to: Origin::Server { rpc, caller, asked }, reply } => {
                let words = match &reply {
                    Reply::Peer(answer) if self.trace.is_on => {
                        trace::answer(&self.names, &asked, answer).unwrap_or_default()
                    }
                    _ => String::new(),
                };
                let body = Body::Reply(to_json(&reply).into_bytes().into());
                let parcel = Parcel { rpc, body, words, is_harmless: false };
                self.send(me, caller, Lane::of(&asked), parcel);
            }
            Effect::Close { to: Origin::Server { rpc, caller, asked } } => {
                let words = "closed".to_owned();
                let parcel = Parcel { rpc, body: Body::Closed, words, is_harmless: false };
                self.send(me, caller, Lane::of(&asked), parcel);
            }
            Effect::Call { to, call, request } => self.call_server(index, to, call, &request),
            Effect::CallView(call) => self.call_viewleader(index, call),
            Effect::Store { batch, records } => {
                let changes = records.into_iter().map(Record::into_change).collect();
                self.keep(me, changes, batch);
            }
            Effect::End => {
                self.note(About::Members, |cluster| format!("{} ends", cluster.name(me)));
                self.ended.push((me, End::Left));
                self.kill(me);
            }
            Effect::Print(line) => {
                self.note(About::Members, |c| format!("{} prints: {line}", c.name(me)));
            }
            Effect::Note(note) => self.note(About::Members, |cluster| {
                format!("{}: {}", cluster.name(me), cluster.names.rewrite(&note))
            }),
        }
    }

    fn call_server(&mut self, index: usize, to: SocketAddrV4, id: CallId, request: &Request) {
        let (rpc, lane) = (self.next_rpc(), Lane::of(request));
        let is_traced = self.trace.is_on;
        let words = if is_traced { trace::request(&self.names, request) } else { String::new() };
        let callee = self.index_at(to).map(Party::Server);
        let call =
            Call { caller: Party::Server(index), callee, purpose: Purpose::Server(id), lane };
        if callee.is_none() {
            self.note(About::Traffic, |cluster| {
                let (me, to) = (cluster.name(Party::Server(index)), cluster.names.at(to));
                format!("{me} -> {to} {words} (nobody listens)")
            });
            return self.call_nobody(rpc, call);
        }
        let body = Body::Request(to_json(request).into_bytes().into());
        let is_harmless = matches!(request, Request::Peer(_));
        self.call(call, Parcel { rpc, body, words, is_harmless });
    }
}

pub(super) fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("messages can be written")
}

pub(super) fn read_view_reply<A: DeserializeOwned>(
    result: Result<&[u8], CallError>,
) -> Result<A, ViewError> {
    let body = result.map_err(|_| ViewError::Lost)?;
    let refused = |text: String| ViewError::Refused(Refusal::unavailable(text));
    let reply: serde_json::Value =
        serde_json::from_slice(body).map_err(|error| refused(error.to_string()))?;
    if reply.get("error").is_some() {
        let refusal = serde_json::from_value(reply).map_err(|error| refused(error.to_string()))?;
        return Err(ViewError::Refused(refusal));
    }
    // Not from the value: an identity is read as the text that stands there.
    serde_json::from_slice(body).map_err(|error| refused(error.to_string()))
}
