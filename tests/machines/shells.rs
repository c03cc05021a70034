//! The shells: what comes in is given to the machines, and what they ask for is
//! done.

use super::{BAD_NEWS, ClientId, Cluster, Event, Outcome, State};
use crate::network::{Body, Lane, Parcel, Party, Rpc, Sent};
use crate::trace::{self, About};
use ringleader::kv::disk::Record;
use ringleader::kv::messages::{Answer, Reply, Request};
use ringleader::kv::server::{
    self, BEATS_PER_LEASE, CallError, CallId, DEFAULT_LEASE, PATIENCE, ViewCall, ViewError,
    ViewNews, WATCH,
};
use ringleader::machine::Machine;
use ringleader::store::Change;
use ringleader::view::View;
use ringleader::view::leader;
use ringleader::view::log;
use ringleader::view::messages::{Drain, ViewAnswer, ViewReply, ViewRequest};
use ringleader::wire::Refusal;
use serde::de::DeserializeOwned;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How often a machine is told that time has passed, and a rebalancing worker
/// looks.
const TICK: Duration = Duration::from_millis(10);

/// A viewleader that has not been stepped for longer than this has slept.
const SLEEP: Duration = Duration::from_millis(500);

/// How long a call that is answered at once may take.
const PROMPT_LIMIT: Duration = Duration::from_secs(2);

/// After how many changes the viewleader's log is compacted: much sooner than in
/// earnest, so that it happens in every longer run.
const SNAPSHOT_EVERY: u64 = 100;

/// Who has asked a server for something.
pub(super) enum Origin {
    Client(ClientId),
    Server { rpc: Rpc, caller: Party, asked: Rc<Request> },
}

/// Who has asked the viewleader for something; nobody when it is the cluster
/// itself, to see its view.
pub(super) type ViewOrigin = Option<(Rpc, Party, Lane)>;

/// A call that has not ended for its caller.
pub(super) struct Call {
    pub(super) caller: usize,
    pub(super) callee: Party,
    /// How the caller knows it; `None` for one to the viewleader, where its lane
    /// says which it is.
    pub(super) id: Option<CallId>,
    pub(super) lane: Lane,
}

impl Cluster {
    pub(super) fn tick_again(&mut self, party: Party) {
        self.at(self.now + TICK, Event::Tick(party));
    }

    /// Gives an event to the machine that it concerns, whose process runs.
    pub(super) fn happen(&mut self, event: Event) {
        match event {
            Event::Tick(Party::Viewleader) => {
                self.step_viewleader(leader::Input::Tick);
                for worker in self.viewleader.workers.clone() {
                    self.step_viewleader(leader::Input::Work(worker));
                }
                self.tick_again(Party::Viewleader);
            }
            Event::Tick(Party::Server(index)) => {
                self.step_server(index, server::Input::Tick);
                self.tick_again(Party::Server(index));
            }
            Event::Arrival { from, to: Party::Viewleader, lane, parcel } => {
                if let Body::Request(body) = &parcel.body {
                    self.ask_viewleader((parcel.rpc, from, lane), body);
                }
            }
            Event::Arrival { from, to: Party::Server(at), lane, parcel } => match parcel.body {
                Body::Request(body) => self.ask_server(at, parcel.rpc, from, lane, &body),
                Body::Reply(body) => self.answered(parcel.rpc, Ok(&body)),
                Body::Closed => self.answered(parcel.rpc, Err(CallError::Lost)),
            },
            Event::Ended { rpc, error } => self.answered(rpc, Err(error)),
            Event::Stored { party, number, .. } => {
                if self.disk_mut(party).keep_up_to(number) {
                    match party {
                        Party::Viewleader => {
                            self.step_viewleader(leader::Input::Committed { index: number });
                        }
                        Party::Server(index) => {
                            self.step_server(index, server::Input::Stored { batch: number });
                        }
                    }
                }
            }
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

    /// Queues a batch on the disk of `party`.
    fn keep(&mut self, party: Party, changes: Vec<Change>, number: u64) {
        let time = self.now + self.chance.sync(party);
        if let Some(time) = self.disk_mut(party).submit(changes, number, time) {
            let life = self.life(party);
            self.at(time, Event::Stored { party, life, number });
        }
    }

    fn send(&mut self, from: Party, to: Party, lane: Lane, parcel: Parcel) {
        let about = match lane {
            Lane::Prompt | Lane::Patient => About::Traffic,
            Lane::Beat | Lane::View | Lane::Report => About::ViewCalls,
        };
        let words = parcel.words.clone();
        let sent = self.network.send(self.now, &mut *self.chance, (from, to, lane), parcel);
        let suffix = match sent {
            Sent::Arrives(at, parcel) => {
                self.at(at, Event::Arrival { from, to, lane, parcel });
                ""
            }
            Sent::Held => " (held)",
            Sent::Lost => " (lost)",
        };
        if !words.is_empty() {
            self.note(about, |cluster| cluster.words(from, to, &words) + suffix);
        }
    }

    /// Makes a call of the server `caller`.
    fn call(&mut self, call: Call, parcel: Parcel) {
        let limit = match call.lane {
            Lane::Prompt | Lane::Report => PROMPT_LIMIT,
            Lane::Patient => PATIENCE + PROMPT_LIMIT,
            Lane::Beat => DEFAULT_LEASE / BEATS_PER_LEASE,
            Lane::View => WATCH + PROMPT_LIMIT,
        };
        let (rpc, caller, callee) = (parcel.rpc, Party::Server(call.caller), call.callee);
        let lane = call.lane;
        self.calls.insert(rpc, call);
        self.at(self.now + limit, Event::Ended { rpc, error: CallError::Lost });
        self.send(caller, callee, lane, parcel);
    }

    /// A call to where nobody listens.
    fn call_nobody(&mut self, rpc: Rpc, call: Call) {
        self.calls.insert(rpc, call);
        self.at(self.now + BAD_NEWS, Event::Ended { rpc, error: CallError::NotSent });
    }

    fn next_rpc(&mut self) -> Rpc {
        self.last_rpc.0 += 1;
        self.last_rpc
    }

    /// A call has ended for its caller.
    fn answered(&mut self, rpc: Rpc, result: Result<&[u8], CallError>) {
        let Some(call) = self.calls.remove(&rpc) else { return };
        let input = match call.id {
            Some(call) => {
                // A server that answers in other words has refused the call.
                let read = |body| serde_json::from_slice::<Answer>(body);
                let result = result.and_then(|body| read(body).map_err(|_| CallError::NotSent));
                server::Input::Answered { call, result }
            }
            None => server::Input::FromView(match call.lane {
                Lane::Beat => ViewNews::Beat(read_view_reply(result)),
                Lane::View => {
                    let answer = read_view_reply::<ViewAnswer>(result);
                    ViewNews::View(answer.map(|answer| answer.view))
                }
                _ => {
                    let answer = read_view_reply::<serde_json::Value>(result);
                    ViewNews::Report(answer.map(|_| ()))
                }
            }),
        };
        self.step_server(call.caller, input);
    }

    fn ask_server(&mut self, at: usize, rpc: Rpc, caller: Party, lane: Lane, body: &[u8]) {
        match Request::decode(body) {
            Ok(request) => {
                let asked = Rc::new(request.clone());
                let from = Origin::Server { rpc, caller, asked };
                self.step_server(at, server::Input::Request { from, request });
            }
            Err(refusal) => self.refuse(Party::Server(at), (rpc, caller, lane), &refusal),
        }
    }

    fn refuse(&mut self, me: Party, from: (Rpc, Party, Lane), refusal: &Refusal) {
        let (rpc, caller, lane) = from;
        let body = Body::Reply(to_json(refusal).into_bytes().into());
        let words = format!("refused: {refusal}");
        self.send(me, caller, lane, Parcel { rpc, body, words });
    }

    fn step_server(&mut self, index: usize, input: server::Input<Origin>) {
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
            Effect::Reply { to: Origin::Server { rpc, caller, asked }, reply } => {
                let words = match &reply {
                    Reply::Peer(answer) if self.trace.is_on => {
                        trace::answer(&self.names, &asked, answer).unwrap_or_default()
                    }
                    _ => String::new(),
                };
                let body = Body::Reply(to_json(&reply).into_bytes().into());
                self.send(me, caller, Lane::of(&asked), Parcel { rpc, body, words });
            }
            Effect::Close { to: Origin::Server { rpc, caller, asked } } => {
                let words = "closed".to_owned();
                let parcel = Parcel { rpc, body: Body::Closed, words };
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
        let call = Call { caller: index, callee: Party::Viewleader, id: Some(id), lane };
        let Some(callee) = self.index_at(to) else {
            self.note(About::Traffic, |cluster| {
                let (me, to) = (cluster.name(Party::Server(index)), cluster.names.at(to));
                format!("{me} -> {to} {words} (nobody listens)")
            });
            return self.call_nobody(rpc, call);
        };
        let body = Body::Request(to_json(request).into_bytes().into());
        let call = Call { callee: Party::Server(callee), ..call };
        self.call(call, Parcel { rpc, body, words });
    }

    fn call_viewleader(&mut self, index: usize, call: ViewCall) {
        let (lane, request, words) = match call {
            ViewCall::Beat(beat) => (Lane::Beat, ViewRequest::Heartbeat(beat), "heartbeat"),
            ViewCall::View(query) => (Lane::View, ViewRequest::QueryView(query), "query_view"),
            ViewCall::Report(report) => (Lane::Report, ViewRequest::Report(report), "report"),
        };
        if let ViewRequest::Heartbeat(beat) = &request {
            let server = &mut self.servers[index];
            self.names.identity(&beat.requestor, &server.name);
            server.id = Some(beat.requestor.clone());
            self.persons.insert(beat.requestor.clone(), server.disk);
        }
        let rpc = self.next_rpc();
        let call = Call { caller: index, callee: Party::Viewleader, id: None, lane };
        if self.viewleader.host.state == State::Dead {
            return self.call_nobody(rpc, call);
        }
        let body = Body::Request(to_json(&request).into_bytes().into());
        self.call(call, Parcel { rpc, body, words: words.to_owned() });
    }

    /// Somebody tells the viewleader that the server is to leave.
    pub(crate) fn drain(&mut self, server: usize) {
        let server = self.servers[server].address;
        let request = ViewRequest::Drain(Drain { server });
        let host = Ipv4Addr::LOCALHOST;
        self.step_viewleader(leader::Input::Request { from: None, host, request });
    }

    fn ask_viewleader(&mut self, from: (Rpc, Party, Lane), body: &[u8]) {
        let host = match from.1 {
            Party::Server(index) => *self.servers[index].address.ip(),
            Party::Viewleader => Ipv4Addr::LOCALHOST,
        };
        match ViewRequest::decode(body) {
            Ok(request) => {
                let from = Some(from);
                self.step_viewleader(leader::Input::Request { from, host, request });
            }
            Err(refusal) => self.refuse(Party::Viewleader, from, &refusal),
        }
    }

    fn step_viewleader(&mut self, input: leader::Input<ViewOrigin>) {
        let viewleader = &mut self.viewleader;
        let now = viewleader.host.clock.show(self.now);
        let mut effects = Vec::new();
        let pause = now.since(std::mem::replace(&mut viewleader.stepped, now));
        if pause > SLEEP {
            viewleader.host.machine.step(now, leader::Input::Slept(pause), &mut effects);
        }
        viewleader.host.machine.step(now, input, &mut effects);
        // The cluster looks at the view after every step.
        let request = ViewRequest::QueryView(Default::default());
        let look = leader::Input::Request { from: None, host: Ipv4Addr::LOCALHOST, request };
        viewleader.host.machine.step(now, look, &mut effects);
        for effect in effects {
            self.perform_for_viewleader(effect);
        }
        let machine = &self.viewleader.host.machine;
        if machine.applied() >= self.viewleader.compacted + SNAPSHOT_EVERY {
            let (index, state) = machine.snapshot();
            let changes = log::compact(self.viewleader.compacted, index, state);
            self.viewleader.compacted = index;
            self.keep(Party::Viewleader, changes, index);
        }
    }

    fn perform_for_viewleader(&mut self, effect: leader::Effect<ViewOrigin>) {
        use leader::Effect;
        match effect {
            Effect::Reply { to: Some((rpc, caller, lane)), reply } => {
                let body = Body::Reply(to_json(&reply).into_bytes().into());
                let words = match &reply {
                    ViewReply::View(answer) => format!("view {}", answer.view.revision),
                    reply => to_json(reply),
                };
                self.send(Party::Viewleader, caller, lane, Parcel { rpc, body, words });
            }
            Effect::Reply { to: None, reply: ViewReply::View(answer) } => self.see(answer.view),
            Effect::Append { index, change } => {
                self.keep(Party::Viewleader, vec![log::append(index, &change)], index);
            }
            Effect::StartWorker(worker) => {
                self.viewleader.workers.insert(worker);
            }
            Effect::WorkerDone(worker, line) => {
                self.viewleader.workers.remove(&worker);
                if let Some(line) = line {
                    self.note(About::Members, |_| format!("viewleader prints: {line}"));
                }
            }
            // The changes of the view tell it better.
            Effect::Reply { to: None, .. } | Effect::Note(_) => {}
        }
    }

    /// Writes down what is new in the view.
    fn see(&mut self, view: Arc<View>) {
        if view.revision == self.view.revision {
            return;
        }
        if self.trace.is_on {
            let (members, groups) = self.names.changes(&self.view, &view);
            for line in members {
                self.trace.line(About::Members, format!("viewleader: {line}"));
            }
            for line in groups {
                self.trace.line(About::Groups, format!("viewleader: {line}"));
            }
        }
        self.view = view;
    }
}

fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("messages can be written")
}

fn read_view_reply<A: DeserializeOwned>(result: Result<&[u8], CallError>) -> Result<A, ViewError> {
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
