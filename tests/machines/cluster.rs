//! A cluster in one thread: one viewleader, servers, clients, a virtual clock.
//!
//! The machines are the real ones; this is one more shell around them. It is an
//! event loop: the earliest event is taken, the machine that it concerns is
//! stepped, and what that machine asks for becomes later events. Nothing in it
//! depends on the machine that it runs on, so the same calls give the same run.
//!
//! What it keeps of the real shells, because the machines rely on it:
//!
//! * what is said crosses as JSON and is decoded by the other side;
//! * calls to one server arrive in their order, and every call ends: with its
//!   answer, as not sent (nobody listens), or as lost (too late, or whoever was
//!   asked has died);
//! * a machine is told every few milliseconds that time has passed.
//!
//! What it adds: each machine's clock has an origin and a rate of its own; a
//! party can be killed, or paused so that the world goes on without it.

use super::names::Names;
use super::network::{Body, Delay, Lane, Network, Parcel, Party, Rpc, Sent};
use super::trace::{self, About, Trace};
use rand::SeedableRng;
use rand::rngs::StdRng;
use ringleader::kv::messages::{Answer, Reply, Request};
use ringleader::kv::server::{
    self, BEATS_PER_LEASE, CallError, CallId, DEFAULT_LEASE, PATIENCE, Server, ViewCall, ViewError,
    ViewNews, WATCH,
};
use ringleader::machine::{Machine, Time};
use ringleader::view::View;
use ringleader::view::leader::{self, Leader};
use ringleader::view::messages::{ViewAnswer, ViewReply, ViewRequest};
use ringleader::wire::{Identity, Refusal};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How often a server is told that time has passed.
const SERVER_TICK: Duration = Duration::from_millis(10);

/// How often the viewleader is told so.
const VIEWLEADER_TICK: Duration = Duration::from_millis(20);

/// A viewleader that has not been stepped for longer than this has slept.
const SLEEP: Duration = Duration::from_millis(500);

/// How long a call that is answered at once may take.
const PROMPT_LIMIT: Duration = Duration::from_secs(2);

/// How soon a caller learns that nobody listens, or that the other side died.
const BAD_NEWS: Duration = Duration::from_millis(1);

/// The port of every server; they differ by their host.
const PORT: u16 = 38000;

/// A clock that starts anywhere and runs at its own rate.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Clock {
    /// What it shows when the world begins.
    pub(crate) origin: Duration,
    /// By how many millionths it is fast; negative when it is slow.
    pub(crate) fast_by: i64,
}

impl Clock {
    fn show(self, now: Time) -> Time {
        let micros = now.since(Time::default()).as_micros() as i64;
        let shown = micros
            + micros / 1_000_000 * self.fast_by
            + micros % 1_000_000 * self.fast_by / 1_000_000;
        Time::from_micros(shown as u64) + self.origin
    }
}

/// Names a client's request. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClientId(pub(crate) u64);

/// How a client's request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With this reply, as JSON.
    Reply(String),
    /// The connection was closed without a reply.
    Closed,
    /// Nobody listens there: nothing was sent.
    NotSent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    Paused,
    Dead,
}

/// A machine in its process.
struct Host<M> {
    machine: M,
    clock: Clock,
    state: State,
    /// What has come while it was paused.
    inbox: VecDeque<Event>,
}

impl<M> Host<M> {
    fn new(machine: M, clock: Clock) -> Self {
        Self { machine, clock, state: State::Up, inbox: VecDeque::new() }
    }
}

/// Who has asked a server for something.
enum Origin {
    Client(ClientId),
    Server { rpc: Rpc, caller: Party, asked: Rc<Request> },
}

/// Who has asked the viewleader for something; nobody when it is the cluster
/// itself, to see its view.
type ViewOrigin = Option<(Rpc, Party, Lane)>;

enum Event {
    Tick(Party),
    Arrival { from: Party, to: Party, lane: Lane, parcel: Parcel },
    Ended { rpc: Rpc, error: CallError },
    FromClient { at: usize, client: ClientId, body: Vec<u8> },
}

/// A call that has not ended for its caller.
struct Call {
    caller: usize,
    callee: Party,
    /// How the caller knows it; `None` for one to the viewleader, where its lane
    /// says which it is.
    id: Option<CallId>,
    lane: Lane,
}

struct Member {
    host: Host<Server<Origin>>,
    name: String,
    address: SocketAddrV4,
    /// Who it says it is; nobody before its first heartbeat.
    id: Option<Identity>,
}

/// All of it.
pub(crate) struct Cluster {
    now: Time,
    events: BTreeMap<(Time, u64), Event>,
    last_event: u64,
    network: Network,
    viewleader: Host<Leader<ViewOrigin>>,
    /// When the viewleader was stepped last.
    viewleader_stepped: Time,
    servers: Vec<Member>,
    calls: BTreeMap<Rpc, Call>,
    last_rpc: Rpc,
    last_client: ClientId,
    /// Where the clients are that have no answer yet.
    clients: BTreeMap<ClientId, usize>,
    outcomes: Vec<(ClientId, Outcome)>,
    view: Arc<View>,
    pub(crate) names: Names,
    pub(crate) trace: Trace,
}

impl Cluster {
    /// A viewleader on a network with these delays.
    pub(crate) fn new(delay: Delay) -> Self {
        let mut cluster = Self {
            now: Time::default(),
            events: BTreeMap::new(),
            last_event: 0,
            network: Network::new(delay),
            viewleader: Host::new(Leader::default(), Clock::default()),
            viewleader_stepped: Time::default(),
            servers: Vec::new(),
            calls: BTreeMap::new(),
            last_rpc: Rpc(0),
            last_client: ClientId(0),
            clients: BTreeMap::new(),
            outcomes: Vec::new(),
            view: Arc::default(),
            names: Names::default(),
            trace: Trace::default(),
        };
        cluster.at(cluster.now, Event::Tick(Party::Viewleader));
        cluster
    }

    /// The moment.
    pub(crate) fn now(&self) -> Time {
        self.now
    }

    /// The view as the viewleader has it.
    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    /// How many servers have been started.
    pub(crate) fn servers(&self) -> usize {
        self.servers.len()
    }

    /// Where the server listens, or listened.
    pub(crate) fn address(&self, server: usize) -> SocketAddrV4 {
        self.servers[server].address
    }

    /// Whether the server has not been killed.
    pub(crate) fn is_alive(&self, server: usize) -> bool {
        self.servers[server].host.state != State::Dead
    }

    /// Whether the server runs: neither killed nor paused.
    pub(crate) fn is_up(&self, server: usize) -> bool {
        self.servers[server].host.state == State::Up
    }

    /// Who the server says it is; nobody before its first heartbeat.
    pub(crate) fn identity(&self, server: usize) -> Option<&Identity> {
        self.servers[server].id.as_ref()
    }

    /// The party that is called `name`.
    pub(crate) fn party(&self, name: &str) -> Option<Party> {
        if name == "viewleader" {
            return Some(Party::Viewleader);
        }
        self.servers.iter().rposition(|server| server.name == name).map(Party::Server)
    }

    /// Starts a server at the `host`-th address, where nobody else must be alive,
    /// and returns its index. It draws its identity from a generator that is
    /// seeded with `seed`.
    pub(crate) fn start(&mut self, name: &str, host: u8, seed: u64, clock: Clock) -> usize {
        let address = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, host), PORT);
        assert!(self.index_at(address).is_none(), "somebody listens on {address}");
        self.names.address(address, name);
        let machine = Server::new(address, DEFAULT_LEASE, StdRng::seed_from_u64(seed));
        let index = self.servers.len();
        let host = Host::new(machine, clock);
        self.servers.push(Member { host, name: name.to_owned(), address, id: None });
        self.at(self.now, Event::Tick(Party::Server(index)));
        index
    }

    /// A viewleader that remembers nothing takes the place of the one there was.
    pub(crate) fn restart_viewleader(&mut self) {
        self.kill(Party::Viewleader);
        self.viewleader = Host::new(Leader::default(), Clock::default());
        self.view = Arc::default();
    }

    /// Ends a process. Whoever waits for it learns so; what it has sent already
    /// still arrives.
    pub(crate) fn kill(&mut self, party: Party) {
        let state = self.state_mut(party);
        if *state == State::Dead {
            return;
        }
        *state = State::Dead;
        if let Party::Server(index) = party {
            self.servers[index].host.inbox.clear();
            self.calls.retain(|_, call| call.caller != index);
            let clients = self.clients.iter().filter(|(_, at)| **at == index);
            for client in clients.map(|(client, _)| *client).collect::<Vec<_>>() {
                self.end(client, Outcome::Closed);
            }
        } else {
            self.viewleader.inbox.clear();
        }
        let broken = self.calls.iter().filter(|(_, call)| call.callee == party);
        for rpc in broken.map(|(rpc, _)| *rpc).collect::<Vec<_>>() {
            self.at(self.now + BAD_NEWS, Event::Ended { rpc, error: CallError::Lost });
        }
    }

    /// Stops a process, as a debugger or an overloaded host does. The world goes
    /// on; what it is sent waits.
    pub(crate) fn pause(&mut self, party: Party) {
        let state = self.state_mut(party);
        if *state == State::Up {
            *state = State::Paused;
        }
    }

    /// Lets a paused process go on. It finds what has come meanwhile.
    pub(crate) fn resume(&mut self, party: Party) {
        let state = self.state_mut(party);
        if *state != State::Paused {
            return;
        }
        *state = State::Up;
        let inbox = match party {
            Party::Viewleader => &mut self.viewleader.inbox,
            Party::Server(index) => &mut self.servers[index].host.inbox,
        };
        for event in std::mem::take(inbox) {
            self.at(self.now, event);
        }
    }

    /// Loses everything from and to `party` from now on.
    pub(crate) fn cut_off(&mut self, party: Party) {
        self.network.cut_off(party);
    }

    /// Ends that.
    pub(crate) fn heal(&mut self, party: Party) {
        self.network.heal(party);
    }

    /// From now on, what `from` sends to `to` waits; or only what it sends on one
    /// lane.
    pub(crate) fn hold(&mut self, from: Party, to: Party, only: Option<Lane>) {
        self.network.hold(from, to, only);
    }

    /// What `from` sends to `to` waits no more, nor does what has waited.
    pub(crate) fn release(&mut self, from: Party, to: Party) {
        for (lane, parcel) in self.network.release(from, to) {
            self.at(self.now, Event::Arrival { from, to, lane, parcel });
        }
    }

    /// Lets the first `count` of what waits through.
    pub(crate) fn deliver(&mut self, from: Party, to: Party, count: usize) {
        let Some(waiting) = self.network.waiting(from, to) else { return };
        let count = count.min(waiting.len());
        for (lane, parcel) in waiting.drain(..count).collect::<Vec<_>>() {
            self.at(self.now, Event::Arrival { from, to, lane, parcel });
        }
    }

    /// Puts a copy behind each of what waits.
    pub(crate) fn duplicate(&mut self, from: Party, to: Party) {
        let Some(waiting) = self.network.waiting(from, to) else { return };
        *waiting = waiting.iter().flat_map(|parcel| [parcel.clone(), parcel.clone()]).collect();
    }

    /// Loses what waits. Only a time-out tells whoever sent it.
    pub(crate) fn drop_waiting(&mut self, from: Party, to: Party) {
        if let Some(waiting) = self.network.waiting(from, to) {
            waiting.clear();
        }
    }

    /// What waits from `from` to `to`, in words.
    pub(crate) fn waiting(&mut self, from: Party, to: Party) -> Vec<String> {
        let waiting = self.network.waiting(from, to).map(std::mem::take).unwrap_or_default();
        let words = waiting.iter().map(|(_, parcel)| self.words(from, to, &parcel.words)).collect();
        if let Some(place) = self.network.waiting(from, to) {
            *place = waiting;
        }
        words
    }

    /// A client sends `body` to a server and waits.
    pub(crate) fn ask(&mut self, server: usize, body: &serde_json::Value) -> ClientId {
        self.last_client.0 += 1;
        let client = self.last_client;
        self.clients.insert(client, server);
        if self.is_alive(server) {
            let body = body.to_string().into_bytes();
            self.handle(Event::FromClient { at: server, client, body });
        } else {
            self.end(client, Outcome::NotSent);
        }
        client
    }

    /// Takes out which requests of clients have ended since, and how.
    pub(crate) fn outcomes(&mut self) -> Vec<(ClientId, Outcome)> {
        std::mem::take(&mut self.outcomes)
    }

    /// Lets the earliest event happen.
    pub(crate) fn step(&mut self) {
        let Some(((at, _), event)) = self.events.pop_first() else { return };
        self.now = self.now.max(at);
        self.handle(event);
    }

    /// Lets everything happen that happens until `end`.
    pub(crate) fn run_until(&mut self, end: Time) {
        while self.events.first_key_value().is_some_and(|((at, _), _)| *at <= end) {
            self.step();
        }
        self.now = self.now.max(end);
    }

    fn at(&mut self, time: Time, event: Event) {
        self.last_event += 1;
        self.events.insert((time, self.last_event), event);
    }

    fn state_mut(&mut self, party: Party) -> &mut State {
        match party {
            Party::Viewleader => &mut self.viewleader.state,
            Party::Server(index) => &mut self.servers[index].host.state,
        }
    }

    fn index_at(&self, address: SocketAddrV4) -> Option<usize> {
        let alive = |server: &Member| server.host.state != State::Dead;
        self.servers.iter().rposition(|server| server.address == address && alive(server))
    }

    fn name(&self, party: Party) -> &str {
        match party {
            Party::Viewleader => "viewleader",
            Party::Server(index) => &self.servers[index].name,
        }
    }

    /// A message of these words, as one line.
    fn words(&self, from: Party, to: Party, words: &str) -> String {
        format!("{} -> {} {words}", self.name(from), self.name(to))
    }

    /// Whom the event concerns; nobody when it is about a call that has ended.
    fn concerned(&self, event: &Event) -> Option<Party> {
        match event {
            Event::Tick(party) => Some(*party),
            Event::Arrival { to, .. } => Some(*to),
            Event::Ended { rpc, .. } => self.calls.get(rpc).map(|call| Party::Server(call.caller)),
            Event::FromClient { at, .. } => Some(Party::Server(*at)),
        }
    }

    fn handle(&mut self, event: Event) {
        let Some(party) = self.concerned(&event) else { return };
        match (*self.state_mut(party), event) {
            (State::Dead, Event::Arrival { parcel, .. }) => {
                let (rpc, error) = (parcel.rpc, CallError::Lost);
                self.at(self.now + BAD_NEWS, Event::Ended { rpc, error });
            }
            (State::Dead, _) => {}
            (State::Paused, Event::Tick(_)) => self.tick_again(party),
            (State::Paused, event) => match party {
                Party::Viewleader => self.viewleader.inbox.push_back(event),
                Party::Server(index) => self.servers[index].host.inbox.push_back(event),
            },
            (State::Up, event) => self.happen(event),
        }
    }

    fn tick_again(&mut self, party: Party) {
        let span = match party {
            Party::Viewleader => VIEWLEADER_TICK,
            Party::Server(_) => SERVER_TICK,
        };
        self.at(self.now + span, Event::Tick(party));
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick(party) => {
                match party {
                    Party::Viewleader => self.step_viewleader(leader::Input::Tick),
                    Party::Server(index) => self.step_server(index, server::Input::Tick),
                }
                self.tick_again(party);
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

    fn note(&mut self, about: About, line: impl FnOnce(&Self) -> String) {
        if self.trace.is_on {
            let line = line(self);
            self.trace.line(about, line);
        }
    }

    /// A client's request has ended.
    fn end(&mut self, client: ClientId, outcome: Outcome) {
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

    fn send(&mut self, from: Party, to: Party, lane: Lane, parcel: Parcel) {
        let about = match lane {
            Lane::Prompt | Lane::Patient => About::Traffic,
            Lane::Beat | Lane::View | Lane::Report => About::ViewCalls,
        };
        let words = parcel.words.clone();
        let suffix = match self.network.send(self.now, from, to, lane, parcel) {
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
    fn call(
        &mut self,
        caller: usize,
        callee: Party,
        id: Option<CallId>,
        lane: Lane,
        parcel: Parcel,
    ) {
        let limit = match lane {
            Lane::Prompt | Lane::Report => PROMPT_LIMIT,
            Lane::Patient => PATIENCE + PROMPT_LIMIT,
            Lane::Beat => DEFAULT_LEASE / BEATS_PER_LEASE,
            Lane::View => WATCH + PROMPT_LIMIT,
        };
        let rpc = parcel.rpc;
        self.calls.insert(rpc, Call { caller, callee, id, lane });
        self.at(self.now + limit, Event::Ended { rpc, error: CallError::Lost });
        self.send(Party::Server(caller), callee, lane, parcel);
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
            Err(refusal) => {
                let body = Body::Reply(to_json(&refusal).into_bytes().into());
                let words = format!("refused: {refusal}");
                self.send(Party::Server(at), caller, lane, Parcel { rpc, body, words });
            }
        }
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
            Effect::Print(line) => {
                self.note(About::Members, |c| format!("{} prints: {line}", c.name(me)));
            }
            Effect::Note(note) => self.note(About::Members, |cluster| {
                format!("{}: {}", cluster.name(me), cluster.names.rewrite(&note))
            }),
        }
    }

    fn call_server(&mut self, index: usize, to: SocketAddrV4, call: CallId, request: &Request) {
        let (rpc, lane) = (self.next_rpc(), Lane::of(request));
        let words =
            if self.trace.is_on { trace::request(&self.names, request) } else { String::new() };
        let Some(callee) = self.index_at(to) else {
            self.note(About::Traffic, |cluster| {
                let (me, to) = (cluster.name(Party::Server(index)), cluster.names.at(to));
                format!("{me} -> {to} {words} (nobody listens)")
            });
            let callee = Party::Viewleader;
            self.calls.insert(rpc, Call { caller: index, callee, id: Some(call), lane });
            self.at(self.now + BAD_NEWS, Event::Ended { rpc, error: CallError::NotSent });
            return;
        };
        let body = Body::Request(to_json(request).into_bytes().into());
        self.call(index, Party::Server(callee), Some(call), lane, Parcel { rpc, body, words });
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
        }
        let rpc = self.next_rpc();
        let body = Body::Request(to_json(&request).into_bytes().into());
        if self.viewleader.state == State::Dead {
            let callee = Party::Viewleader;
            self.calls.insert(rpc, Call { caller: index, callee, id: None, lane });
            self.at(self.now + BAD_NEWS, Event::Ended { rpc, error: CallError::NotSent });
            return;
        }
        let parcel = Parcel { rpc, body, words: words.to_owned() };
        self.call(index, Party::Viewleader, None, lane, parcel);
    }

    fn ask_viewleader(&mut self, from: (Rpc, Party, Lane), body: &[u8]) {
        let (rpc, caller, lane) = from;
        let host = match caller {
            Party::Server(index) => *self.servers[index].address.ip(),
            Party::Viewleader => Ipv4Addr::LOCALHOST,
        };
        match ViewRequest::decode(body) {
            Ok(request) => {
                let from = Some(from);
                self.step_viewleader(leader::Input::Request { from, host, request });
            }
            Err(refusal) => {
                let body = Body::Reply(to_json(&refusal).into_bytes().into());
                let words = format!("refused: {refusal}");
                self.send(Party::Viewleader, caller, lane, Parcel { rpc, body, words });
            }
        }
    }

    fn step_viewleader(&mut self, input: leader::Input<ViewOrigin>) {
        let now = self.viewleader.clock.show(self.now);
        let mut effects = Vec::new();
        let pause = now.since(std::mem::replace(&mut self.viewleader_stepped, now));
        if pause > SLEEP {
            self.viewleader.machine.step(now, leader::Input::Slept(pause), &mut effects);
        }
        self.viewleader.machine.step(now, input, &mut effects);
        // The cluster looks at the view after every step.
        let request = ViewRequest::QueryView(Default::default());
        let look = leader::Input::Request { from: None, host: Ipv4Addr::LOCALHOST, request };
        self.viewleader.machine.step(now, look, &mut effects);
        for effect in effects {
            match effect {
                leader::Effect::Reply { to: Some((rpc, caller, lane)), reply } => {
                    let body = Body::Reply(to_json(&reply).into_bytes().into());
                    let words = match &reply {
                        ViewReply::View(answer) => format!("view {}", answer.view.revision),
                        reply => to_json(reply),
                    };
                    self.send(Party::Viewleader, caller, lane, Parcel { rpc, body, words });
                }
                leader::Effect::Reply { to: None, reply: ViewReply::View(answer) } => {
                    self.see(answer.view);
                }
                // The changes of the view tell it better.
                leader::Effect::Reply { to: None, .. } | leader::Effect::Note(_) => {}
            }
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
