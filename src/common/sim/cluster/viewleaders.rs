//! The shells of viewleaders, and the way of servers to the one that leads.
//!
//! Each viewleader has a *site*: an address with a disk, on which it lives one life
//! after the other. What viewleaders say to each other goes as in `net::peers`: in
//! order to each address, and whoever sends something learns that it got there or that
//! it may not have. A server asks as `net::call::Walker` does.

use super::shells::{Call, Purpose, ShownView, read_view_reply, to_json};
use super::{Clock, Cluster, Event, Host, State};
use crate::consensus::NodeId;
use crate::consensus::founding::Entrance;
use crate::consensus::log;
use crate::consensus::message::{Envelope, Hello};
use crate::consensus::node::Settings;
use crate::consensus::requests::{GroupReply, GroupRequest, Kind, NotLeader};
use crate::kv::server::{self, CallError, ViewCall, ViewNews};
use crate::machine::{Machine, Time};
use crate::sim::disk::Disk;
use crate::sim::network::{Body, Lane, Parcel, Party, Rpc};
use crate::sim::trace::About;
use crate::view::Revision;
use crate::view::leader::{self, Worker};
use crate::view::messages::{Drain, ViewAnswer, ViewReply, ViewRequest};
use crate::view::restoring::Restore;
use crate::view::state;
use crate::view::viewleader::{self, Effect, Input, Request};
use crate::wire::Identity;
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::collections::{BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// A viewleader that has not been stepped for longer than this has slept.
const SLEEP: Duration = Duration::from_millis(500);

/// After how many entries a viewleader's log is compacted: much sooner than in
/// earnest, so that it happens in every longer run.
const SNAPSHOT_EVERY: u64 = 100;

/// The port of every viewleader; they differ by their host.
const PORT: u16 = 39000;

/// How many hints one walk follows, as in `net::call`.
pub const MAX_HINTS: u32 = 3;

/// Who has asked a viewleader for something; nobody when it is the cluster itself.
type Origin = Option<(Rpc, Party, Lane)>;

/// A viewleader's site, and the life that is lived there now.
pub(super) struct Viewleader {
    pub(super) host: Host<viewleader::Viewleader<Origin>>,
    pub(super) name: String,
    pub(super) address: SocketAddrV4,
    pub(super) disk: Disk,
    entrance: Entrance,
    /// When it was stepped last.
    stepped: Time,
    workers: BTreeSet<Worker>,
    /// Tells this life from the ones before.
    pub(super) life: usize,
    /// The last revision of its view that was looked at.
    seen: Revision,
}

/// A server's question on its way along the viewleaders.
pub(super) struct Walk {
    question: Rc<[u8]>,
    words: &'static str,
    asked: SocketAddrV4,
    ahead: VecDeque<SocketAddrV4>,
    hinted: u32,
    /// What says most of the refusals so far.
    refused: Option<Rc<[u8]>>,
    /// Whether it is with the one that answered last, and the walk has not begun.
    stays: bool,
}

/// What a viewleader says that does not lead, if `body` is that.
pub fn not_leader(body: &[u8]) -> Option<NotLeader> {
    serde_json::from_slice(body).ok()
}

fn address_of(site: usize) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 0, 1, site as u8 + 1), PORT)
}

impl Cluster {
    // ---- lives ----

    /// Starts a group of as many viewleaders as there are clocks.
    pub(super) fn found(&mut self, clocks: &[Clock]) {
        let addresses: Vec<SocketAddrV4> = (0..clocks.len()).map(address_of).collect();
        for (site, clock) in clocks.iter().enumerate() {
            let founders = if clocks.len() > 1 { &addresses[..] } else { &[] };
            let entrance = Entrance::with_founders(address_of(site), founders);
            let name =
                if clocks.len() > 1 { format!("v{}", site + 1) } else { "viewleader".into() };
            self.add_site(name, entrance.expect("a list of our own"), *clock);
        }
    }

    /// Starts a viewleader with an empty disk that waits to be added; its site.
    pub fn add_viewleader(&mut self, clock: Clock) -> usize {
        let name = format!("v{}", self.viewleaders.len() + 1);
        self.add_site(name, Entrance::Wait, clock)
    }

    fn add_site(&mut self, name: String, entrance: Entrance, clock: Clock) -> usize {
        let site = self.viewleaders.len();
        let (address, disk) = (address_of(site), Disk::default());
        self.names.address(address, &name);
        let (machine, first) = self.machine(site, 0, &entrance, &disk, clock);
        let (host, stepped) = (Host::new(machine, clock), clock.show(self.now));
        let (workers, seen) = (BTreeSet::new(), Revision::default());
        let viewleader =
            Viewleader { host, name, address, disk, entrance, stepped, workers, life: 0, seen };
        self.viewleaders.push(viewleader);
        self.perform_for_viewleader(site, first);
        self.at(self.now, Event::Tick(Party::Viewleader(site)));
        site
    }

    fn machine(
        &self,
        site: usize,
        life: usize,
        entrance: &Entrance,
        disk: &Disk,
        clock: Clock,
    ) -> (viewleader::Viewleader<Origin>, Vec<Effect<Origin>>) {
        let recovered = log::recover::<state::State>(disk.store());
        let recovered = recovered.expect("a disk that a viewleader has written");
        let (address, entrance) = (address_of(site), entrance.clone());
        let settings = Settings { address, entrance, snapshot_every: SNAPSHOT_EVERY };
        let drawn = self.view_seed ^ ((site as u64) << 56) ^ ((life as u64) << 32);
        let (now, rng, mut first) =
            (clock.show(self.now), StdRng::seed_from_u64(drawn), Vec::new());
        let machine =
            viewleader::Viewleader::start(now, (settings, ()), recovered, rng, &mut first);
        (machine.expect("a log that can be gone on with"), first)
    }

    /// Starts a viewleader again over its disk.
    pub fn start_viewleader(&mut self, site: usize) {
        self.kill(Party::Viewleader(site));
        let Viewleader { host, entrance, disk, life, .. } = &self.viewleaders[site];
        let (clock, life) = (host.clock, life + 1);
        let (machine, first) = self.machine(site, life, entrance, disk, clock);
        let stepped = clock.show(self.now);
        let viewleader = &mut self.viewleaders[site];
        viewleader.host = Host::new(machine, clock);
        (viewleader.life, viewleader.stepped) = (life, stepped);
        viewleader.seen = Revision::default();
        viewleader.workers.clear();
        self.perform_for_viewleader(site, first);
    }

    /// The viewleader dies, and its disk is lost.
    pub fn erase_viewleader(&mut self, site: usize) {
        self.kill(Party::Viewleader(site));
        self.viewleaders[site].disk = Disk::default();
    }

    /// At the site of one that was removed another one starts, with an empty disk, and
    /// waits to be added.
    pub fn renew_viewleader(&mut self, site: usize) {
        self.erase_viewleader(site);
        self.viewleaders[site].entrance = Entrance::Wait;
        self.start_viewleader(site);
    }

    /// The only viewleader dies, its disk with it, and another one takes its place.
    pub fn replace_viewleader(&mut self) {
        self.erase_viewleader(0);
        self.view = Arc::default();
        self.start_viewleader(0);
    }

    /// The viewleader is told to end: it hands over, and ends.
    pub fn end_viewleader(&mut self, site: usize) {
        self.step_viewleader(site, Input::Ending);
        self.kill(Party::Viewleader(site));
    }

    // ---- what others see ----

    /// How many sites of viewleaders there are.
    pub fn viewleaders(&self) -> usize {
        self.viewleaders.len()
    }

    /// The site of a viewleader that runs and leads, as far as it knows.
    pub fn leader(&self) -> Option<usize> {
        let leads = |it: &Viewleader| it.host.state == State::Up && it.host.machine.leads();
        self.viewleaders.iter().position(leads)
    }

    /// Where the viewleader listens.
    pub fn viewleader_address(&self, site: usize) -> SocketAddrV4 {
        self.viewleaders[site].address
    }

    /// Whether the viewleader has not been killed.
    pub fn is_viewleader_alive(&self, site: usize) -> bool {
        self.viewleaders[site].host.state != State::Dead
    }

    /// Whether a rebalancing is going on.
    pub fn has_workers(&self) -> bool {
        self.viewleaders.iter().any(|it| it.host.state == State::Up && !it.workers.is_empty())
    }

    /// Whether the viewleader has the latest view.
    pub fn has_latest_view(&self, site: usize) -> bool {
        let state = self.viewleaders[site].host.machine.state();
        state.is_some_and(|state| state.view().revision == self.view.revision)
    }

    /// What two of these viewleaders do not agree on, though they have the same view.
    pub fn differing(&self, mut sites: impl Iterator<Item = usize>) -> Option<String> {
        let state = |site: usize| self.viewleaders[site].host.machine.state();
        let first = sites.next()?;
        let other = sites.find(|site| state(*site) != state(first))?;
        let names = [first, other].map(|site| self.name(Party::Viewleader(site)));
        Some(format!("{} and {} do not agree", names[0], names[1]))
    }

    /// The places in the queues of locks that are kept for ever, as the leader has them:
    /// which lock, and whose place.
    pub fn places_for_ever(&self) -> Vec<(String, Identity)> {
        let leader = self.leader().and_then(|site| self.viewleaders[site].host.machine.state());
        let queues = leader.into_iter().flat_map(|state| state.locks().list(None));
        let places = queues.flat_map(|(lock, queue)| queue.iter().map(move |it| (lock, it)));
        let places = places.filter(|(_, place)| place.manner.ttl_ms.is_none());
        places.map(|(lock, place)| (lock.to_owned(), place.requestor.clone())).collect()
    }

    /// Takes out why viewleaders have ended that can't go on.
    pub fn broken(&mut self) -> Vec<String> {
        std::mem::take(&mut self.broken)
    }

    // ---- what happens ----

    pub(super) fn tick_viewleader(&mut self, site: usize) {
        self.step_viewleader(site, Input::Tick);
        for worker in self.viewleaders[site].workers.clone() {
            self.step_viewleader(site, Input::Own(leader::Input::Work(worker)));
        }
        self.tick_again(Party::Viewleader(site));
    }

    /// Somebody tells the viewleader that leads that the server is to leave.
    pub fn drain(&mut self, server: usize) {
        self.tell_leader(ViewRequest::Drain(Drain { server: self.servers[server].address }));
    }

    /// Somebody takes a step of restoring the cluster.
    pub fn restore(&mut self, restore: Restore) {
        self.tell_leader(ViewRequest::Restore(restore));
    }

    fn tell_leader(&mut self, request: ViewRequest) {
        let (from, host) = (None, Ipv4Addr::LOCALHOST);
        if let Some(site) = self.leader() {
            let input = leader::Input::Request { from, host, request };
            self.step_viewleader(site, Input::Own(input));
        }
    }

    pub(super) fn ask_viewleader(&mut self, site: usize, from: (Rpc, Party, Lane), body: &[u8]) {
        let host = match from.1 {
            Party::Server(index) => *self.servers[index].address.ip(),
            Party::Viewleader(other) => *self.viewleaders[other].address.ip(),
            Party::Client(_) => Ipv4Addr::LOCALHOST,
        };
        let input = match Request::decode(body) {
            Ok(Request::View(request)) => {
                Input::Own(leader::Input::Request { from: Some(from), host, request })
            }
            Ok(Request::Group(request)) => Input::Group { from: Some(from), request },
            Err(refusal) => return self.refuse(Party::Viewleader(site), from, &refusal),
        };
        self.step_viewleader(site, input);
    }

    pub(super) fn step_viewleader(&mut self, site: usize, input: Input<Origin>) {
        let viewleader = &mut self.viewleaders[site];
        let now = viewleader.host.clock.show(self.now);
        let mut effects = Vec::new();
        let pause = now.since(std::mem::replace(&mut viewleader.stepped, now));
        if pause > SLEEP {
            viewleader.host.machine.step(now, Input::Slept(pause), &mut effects);
        }
        viewleader.host.machine.step(now, input, &mut effects);
        self.perform_for_viewleader(site, effects);
        self.see(site);
    }

    fn perform_for_viewleader(&mut self, site: usize, effects: Vec<Effect<Origin>>) {
        let me = Party::Viewleader(site);
        for effect in effects {
            match effect {
                Effect::Own(effect) => self.perform_for_leader(site, effect),
                Effect::Group { to: Some(to), reply } => {
                    let words = match &reply {
                        _ if !self.trace.is_on => String::new(),
                        GroupReply::Receipt(_) => String::new(),
                        reply => self.names.rewrite(&to_json(reply)),
                    };
                    self.reply(me, to, to_json(&reply).into_bytes().into(), words);
                }
                Effect::Group { to: None, .. } => {}
                Effect::Store { batch, changes } => self.keep(me, changes, batch),
                Effect::Send { to, envelope } => self.send_envelope(me, to, *envelope),
                Effect::Ask { address, hello } => {
                    let words = format!("hello {}", hello.node);
                    let request = GroupRequest::Hello(*hello);
                    self.call_viewleader_at(me, address, Purpose::Hello(address), request, words);
                }
                Effect::Note(note) => self.note_of_viewleader(me, &note),
                Effect::Die(why) => {
                    self.broken.push(format!("{} ends: {why}", self.name(me)));
                    self.kill(me);
                }
            }
        }
    }

    fn note_of_viewleader(&mut self, me: Party, note: &str) {
        self.note(About::Viewleaders, |cluster| {
            format!("{}: {}", cluster.name(me), cluster.names.rewrite(note))
        });
    }

    fn perform_for_leader(&mut self, site: usize, effect: leader::Effect<Origin>) {
        let me = Party::Viewleader(site);
        match effect {
            leader::Effect::Reply { to: Some(to), reply } => {
                let body = match &reply {
                    ViewReply::View(answer) => self.view_body(answer),
                    reply => to_json(reply).into_bytes().into(),
                };
                let words = match &reply {
                    _ if !self.trace.is_on => String::new(),
                    ViewReply::View(answer) => format!("view {}", answer.view.revision),
                    reply => self.names.rewrite(&to_json(reply)),
                };
                self.reply(me, to, body, words);
            }
            leader::Effect::StartWorker(worker) => {
                self.viewleaders[site].workers.insert(worker);
            }
            leader::Effect::WorkerDone(worker, line) => {
                self.viewleaders[site].workers.remove(&worker);
                if let Some(line) = line {
                    let name = self.name(me).to_owned();
                    self.note(About::Members, |_| format!("{name} prints: {line}"));
                }
            }
            leader::Effect::Note(note) => self.note_of_viewleader(me, &note),
            leader::Effect::Reply { to: None, .. }
            | leader::Effect::Append { .. }
            | leader::Effect::Confirm { .. } => {}
        }
    }

    fn reply(&mut self, me: Party, to: (Rpc, Party, Lane), body: Rc<[u8]>, words: String) {
        let (rpc, caller, lane) = to;
        let parcel = Parcel { rpc, body: Body::Reply(body), words, is_harmless: false };
        self.send(me, caller, lane, parcel);
    }

    fn send_envelope(&mut self, me: Party, to: SocketAddrV4, envelope: Envelope) {
        if let Some(ballot) = envelope.ballot() {
            let known = log::last_ballot(self.disk_mut(me).store());
            let known = known.expect("a disk that a viewleader has written");
            if known != ballot && known.term <= ballot.term {
                let name = self.name(me);
                self.broken.push(format!("{name} tells of {ballot:?}, and its disk of {known:?}"));
            }
        }
        let purpose = Purpose::Message(envelope.to);
        let words = if self.trace.is_on { words_of(&envelope) } else { String::new() };
        let request = GroupRequest::Message(envelope);
        self.call_viewleader_at(me, to, purpose, request, words);
    }

    fn call_viewleader_at(
        &mut self,
        me: Party,
        to: SocketAddrV4,
        purpose: Purpose,
        request: GroupRequest,
        words: String,
    ) {
        let lane = if let Purpose::Hello(_) = purpose { Lane::Hello } else { Lane::Group };
        let (rpc, callee) = (self.next_rpc(), self.party_at(to));
        let call = Call { caller: me, callee, purpose, lane };
        if callee.is_none() {
            return self.call_nobody(rpc, call);
        }
        let request = to_json(&request.to(Kind::VIEWLEADER));
        let body = Body::Request(request.into_bytes().into());
        self.call(call, Parcel { rpc, body, words, is_harmless: true });
    }

    /// What a viewleader has sent to another one has got there, or not.
    pub(super) fn told_viewleader(
        &mut self,
        site: usize,
        to: NodeId,
        result: Result<&[u8], CallError>,
    ) {
        let receipt = result.map(|body| serde_json::from_slice(body).ok());
        match receipt {
            Ok(Some(receipt)) => self.step_viewleader(site, Input::Receipt { to, receipt }),
            Ok(None) => {}
            Err(_) => self.step_viewleader(site, Input::Lost(to)),
        }
    }

    pub(super) fn heard(
        &mut self,
        site: usize,
        address: SocketAddrV4,
        result: Result<&[u8], CallError>,
    ) {
        let hello = result.ok().and_then(|body| serde_json::from_slice::<Hello>(body).ok());
        self.step_viewleader(site, Input::Heard { address, hello });
    }

    // ---- servers on their way to the one that leads ----

    pub(super) fn call_viewleader(&mut self, index: usize, call: ViewCall) {
        let (lane, request, words) = match call {
            ViewCall::Beat(beat) => (Lane::Beat, ViewRequest::Heartbeat(beat), "heartbeat"),
            ViewCall::View(query) => (Lane::View, ViewRequest::QueryView(query), "query_view"),
            ViewCall::Report(report) => (Lane::Report, ViewRequest::Report(report), "report"),
        };
        if let ViewRequest::Heartbeat(beat) = &request {
            let server = &mut self.servers[index];
            self.names.identity(&beat.requestor, &server.name);
            server.id = Some(beat.requestor.clone());
            // Whoever comes over a copy of its disk later does not count.
            self.persons.entry(beat.requestor.clone()).or_insert(server.disk);
        }
        let question = to_json(&request).into_bytes().into();
        let mut ahead = self.addresses_for(index);
        let stays = self.stays.get(&(index, lane)).copied();
        let first = stays.or_else(|| ahead.pop_front());
        let Some(asked) = first else { return };
        let stays = stays.is_some();
        let walk = Walk { question, words, asked, ahead, hinted: 0, refused: None, stays };
        self.ask_on(index, lane, walk);
    }

    /// The viewleaders in the order in which they were named to the server.
    fn addresses_for(&self, index: usize) -> VecDeque<SocketAddrV4> {
        let mut addresses: VecDeque<_> = self.viewleaders.iter().map(|it| it.address).collect();
        addresses.rotate_left(index % addresses.len());
        addresses
    }

    fn ask_on(&mut self, index: usize, lane: Lane, walk: Walk) {
        let (rpc, callee) = (self.next_rpc(), self.party_at(walk.asked));
        let (body, words) = (Body::Request(Rc::clone(&walk.question)), walk.words.to_owned());
        let caller = Party::Server(index);
        let call = Call { caller, callee, purpose: Purpose::View(walk), lane };
        if callee.is_none() {
            return self.call_nobody(rpc, call);
        }
        let is_harmless = lane != Lane::View;
        self.call(call, Parcel { rpc, body, words, is_harmless });
    }

    /// The one that was asked has answered, or not.
    pub(super) fn walked(
        &mut self,
        index: usize,
        lane: Lane,
        mut walk: Walk,
        result: Result<&Rc<[u8]>, CallError>,
    ) {
        match result {
            Ok(body) if !is_refusal(body) => {
                self.stays.insert((index, lane), walk.asked);
                return self.viewleader_answered(index, lane, Ok(body));
            }
            _ if walk.stays => {
                walk.stays = false;
                self.stays.remove(&(index, lane));
                if result.is_err() {
                    // It may be asleep: the others first.
                    walk.ahead.retain(|address| *address != walk.asked);
                    walk.ahead.push_back(walk.asked);
                }
            }
            Ok(body) => {
                let said = not_leader(body);
                if let Some(leader) = said.as_ref().and_then(|it| it.leader)
                    && walk.hinted < MAX_HINTS
                {
                    walk.hinted += 1;
                    walk.ahead.retain(|address| *address != leader);
                    walk.ahead.push_front(leader);
                }
                if said.is_none() || walk.refused.is_none() {
                    walk.refused = Some(Rc::clone(body));
                }
            }
            Err(_) => {}
        }
        if let Some(next) = walk.ahead.pop_front() {
            walk.asked = next;
            return self.ask_on(index, lane, walk);
        }
        // Another one will lead soon.
        let refused = walk.refused.filter(|body| not_leader(body).is_none());
        self.viewleader_answered(index, lane, refused.as_ref().ok_or(CallError::Lost));
    }

    fn viewleader_answered(
        &mut self,
        index: usize,
        lane: Lane,
        result: Result<&Rc<[u8]>, CallError>,
    ) {
        let result = result.map(|body| &**body);
        let news = match lane {
            Lane::Beat => ViewNews::Beat(read_view_reply(result)),
            Lane::View => {
                let shown = |body: &&[u8]| {
                    self.shown.as_ref().is_some_and(|it| std::ptr::eq(*body, &*it.body))
                };
                let answer = match (&self.shown, result.as_ref().is_ok_and(shown)) {
                    (Some(shown), true) => Ok(shown.read.clone()),
                    _ => read_view_reply::<ViewAnswer>(result),
                };
                ViewNews::View(answer.map(|answer| answer.view))
            }
            _ => {
                let answer = read_view_reply::<serde_json::Value>(result);
                ViewNews::Report(answer.map(|_| ()))
            }
        };
        self.step_server(index, server::Input::FromView(news));
    }

    // ---- views ----

    /// The view as JSON, which is written and read once for all who ask.
    fn view_body(&mut self, answer: &ViewAnswer) -> Rc<[u8]> {
        if let Some(shown) = &self.shown
            && Arc::ptr_eq(&shown.view, &answer.view)
        {
            return Rc::clone(&shown.body);
        }
        let body: Rc<[u8]> = to_json(answer).into_bytes().into();
        let read = serde_json::from_slice(&body).expect("a view can be read");
        let view = Arc::clone(&answer.view);
        self.shown = Some(ShownView { view, body: Rc::clone(&body), read });
        body
    }

    /// Writes down what is new in the view of the viewleader.
    fn see(&mut self, site: usize) {
        let viewleader = &mut self.viewleaders[site];
        let Some(state) = viewleader.host.machine.state() else { return };
        let revision = state.view().revision;
        if std::mem::replace(&mut viewleader.seen, revision) == revision {
            return;
        }
        if state.view().revision == self.view.revision && *state.view() != *self.view {
            let name = &viewleader.name;
            self.broken.push(format!("{name} has another view {}", self.view.revision));
        }
        if state.view().revision <= self.view.revision {
            return;
        }
        let view = Arc::new(state.view().clone());
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

/// Whether `body` is a reply that says no.
fn is_refusal(body: &[u8]) -> bool {
    let is_there = |body| serde_json::from_slice::<Refused>(body).is_ok();
    is_there(body)
}

/// What every refusal has.
#[derive(serde::Deserialize)]
struct Refused {
    #[serde(rename = "error")]
    _error: serde::de::IgnoredAny,
}

/// A message between viewleaders in a few words.
fn words_of(envelope: &Envelope) -> String {
    let message = &serde_json::to_value(envelope).expect("messages can be written")["message"];
    let text = |name: &str| match &message[name] {
        serde_json::Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    let entries = message["entries"].as_array().map_or(0, Vec::len);
    let entries = if entries > 0 { format!(", {entries} entries") } else { String::new() };
    format!("{} t{} i{}{entries}", text("kind"), text("term"), text("index"))
}
