//! The shell of a master.

use super::connection::{Class, Service, Ticket};
use super::lanes::Lanes;
use super::original_master::{self, METHODS, Originals};
use super::serve_group::{GroupShell, Program};
use super::threads;
use super::xml_rpc::Method;
use crate::consensus::node;
use crate::consensus::replica;
use crate::consensus::requests::{GroupReply, Kind};
use crate::gfs::master::{CallId, Effect, Input, Leader, Settings};
use crate::gfs::messages::{
    ChunkReply, ChunkRequest, MasterReply, MasterRequest, Packet, Request, append_packet,
};
use crate::machine::Time;
use crate::store::Store;
use crate::wire::Refusal;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// About how many bytes a page of the longest names takes.
const PAGE_BYTES: usize = 1024 * 1024;

type Reply = Ticket<MasterReply>;

/// A master behind a listener.
pub struct MasterShell {
    group: Arc<GroupShell<Leader<Reply>, Self>>,
    chunkservers: Lanes,
    pub(super) originals: Originals,
}

impl MasterShell {
    /// A master that goes on with what `store` holds, and its ticker.
    ///
    /// # Errors
    /// When the store can't be read, or the system has no room for a thread.
    pub fn start(
        place: node::Settings,
        settings: Settings,
        store: impl Store,
    ) -> Result<Arc<Self>, Box<dyn std::error::Error>> {
        let by_the_day = |now: Time| {
            let day = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let origin = day.saturating_sub(now.since(Time::default()));
            Settings { day_ms: origin.as_millis() as u64, ..settings }
        };
        let around =
            |group| Self { group, chunkservers: Lanes::default(), originals: Originals::default() };
        GroupShell::start(Kind::MASTER, place, by_the_day, store, around)
    }

    /// Lets another master lead, if there are others.
    pub fn end(&self) {
        self.group.end();
    }

    /// Asks a chunkserver, and tells the machine what it has answered.
    fn call(&self, to: SocketAddrV4, call: CallId, request: ChunkRequest, patience: Duration) {
        let group = Arc::downgrade(&self.group);
        let heard = move |answer| {
            if let Some(group) = group.upgrade() {
                group.step(replica::Input::Own(Input::Answer { call, answer }));
            }
        };
        if self.originals.has(to) {
            let deadline = Instant::now() + patience;
            let ask = move || heard(original_master::translate(to, &request, deadline));
            // Each is asked now and then only, so a thread for each question is few.
            if let Err(error) = threads::start(format!("to {to}"), ask) {
                tracing::error!("no thread to ask {to}: {error}");
            }
            return;
        }
        let mut frame = Vec::new();
        if let Err(error) = append_packet(&mut frame, &request, &[]) {
            tracing::error!("a call to {to}: {error}");
        }
        self.chunkservers.call(to, frame, patience, move |body| {
            let packet = body.map(|body| Packet::<ChunkReply>::reply(&body));
            heard(packet.map(|it| it.map(|packet| packet.message)));
        });
    }

    /// Takes a request, as from a connection.
    pub(super) fn request(&self, request: MasterRequest, from: Reply) {
        self.group.step(replica::Input::Own(Input::Request { from, request }));
    }

    /// What the chunkserver at `address` calls itself, if this master leads and knows.
    pub(super) fn server_at(&self, address: SocketAddrV4) -> Option<Box<str>> {
        self.group.look(|leader| leader.server_at(address)).flatten()
    }
}

impl Program<Leader<Reply>> for MasterShell {
    fn perform(&self, effect: Effect<Reply>) {
        match effect {
            Effect::Reply { to, reply } => to.reply(reply),
            Effect::Note(note) => tracing::info!("{note}"),
            Effect::Call { to, call, request, patience } => {
                self.call(to, call, request, patience);
            }
            Effect::Append { .. } | Effect::Confirm { .. } => unreachable!("the group does that"),
        }
    }

    fn reply(to: Reply, reply: GroupReply) {
        to.reply(MasterReply::Group(reply));
    }
}

impl Service for MasterShell {
    type Request = Request;
    type Reply = MasterReply;

    fn decode(&self, body: &[u8]) -> Result<Request, Refusal> {
        Request::decode(body)
    }

    fn class(&self, request: &Request) -> Class {
        match request {
            Request::Group(_) => Class::Server,
            Request::Master(
                MasterRequest::Ls { .. }
                | MasterRequest::Stat { .. }
                | MasterRequest::Locate { .. }
                | MasterRequest::Census {},
            ) => Class::Read,
            Request::Master(MasterRequest::Create { .. }) => Class::Write,
            Request::Master(_) => Class::Alone,
        }
    }

    fn weight(&self, request: &Request) -> usize {
        match request {
            Request::Master(MasterRequest::Ls { .. }) => PAGE_BYTES,
            _ => 0,
        }
    }

    fn begin(&self, _: Ipv4Addr, request: Request, ticket: Reply) {
        match request {
            Request::Master(request) => self.request(request, ticket),
            Request::Group(request) => {
                self.group.step(replica::Input::Group { from: ticket, request });
            }
        }
    }

    fn leader_elsewhere(&self) -> Option<SocketAddrV4> {
        self.group.leader_elsewhere()
    }

    fn methods(&self) -> &'static [Method<Self>] {
        METHODS
    }

    fn refused(&self, refusal: Refusal) -> MasterReply {
        MasterReply::Refused(refusal)
    }
}
