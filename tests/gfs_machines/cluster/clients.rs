//! The clients of a run, what each of them does and what it was told, which is what the
//! check at rest ([`rest`](super::rest)) looks for.

use super::{Answer, Ask, CHUNK_BYTES, CLIENTS, Cluster, Event, Id, Kind, Who, file, server_at};
use rand::RngExt;
use ringleader::gfs::FileName;
use ringleader::gfs::messages::{
    ChunkReply, ChunkRequest, Data, FailedPrimary, LeaseGranted, Located, Mark, MasterReply,
    MasterRequest, Packet,
};
use ringleader::machine::Time;
use ringleader::wire::Reason;
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug)]
pub(super) enum Doing {
    Idle,
    Leasing,
    Mutating(LeaseGranted),
    Locating(&'static str),
    Reading(u64, Wanted),
    /// A snapshot that is asked for, and how many records it must have.
    Snapshotting(FileName, usize),
    /// The third file is to be called otherwise, or to be made anew.
    Turning,
}

/// What a client writes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Target {
    Log,
    Table,
    Snapshot(usize),
    Turn,
}

/// What a reader must find.
#[derive(Clone, Debug)]
pub(super) enum Wanted {
    /// This record.
    Record(Vec<u8>),
    /// What this client has written over its region: this write of it, or a later one.
    Region(usize, u64),
}

/// A snapshot of the log that was taken.
pub(super) struct Snapshot {
    pub(super) name: FileName,
    /// So many records were acknowledged when it was asked for: it has them all.
    pub(super) has: usize,
    /// The number of each client's last record by the time it was taken: it has no
    /// later ones.
    pub(super) last: Vec<u64>,
    /// What was appended to it since, and acknowledged.
    pub(super) acknowledged: Vec<(usize, u64, Vec<u8>)>,
}

/// A record of the third file that was acknowledged: it is in the file that was called so at
/// some time between sending it and hearing so.
pub(super) struct Turned {
    pub(super) record: (usize, u64, Vec<u8>),
    /// How often the file had been called otherwise by then for certain, and perhaps.
    pub(super) between: (usize, usize),
}

pub(super) struct Client {
    pub(super) name: u64,
    number: u64,
    /// The chunk of each file that it tries; the last one, if it knows none.
    tails: BTreeMap<FileName, usize>,
    /// The leases that it has.
    leases: BTreeMap<(FileName, usize), LeaseGranted>,
    failed: Option<FailedPrimary>,
    doing: Doing,
    id: Id,
    /// What it is to append, or to write over its region.
    pub(super) record: Vec<u8>,
    /// What that is for.
    target: Target,
    /// How often the third file had been called otherwise when it sent that.
    turns: usize,
    /// The last write over its region that it has begun, and that was acknowledged.
    begun: u64,
    pub(super) written: u64,
    /// Where chunks are, and until when that is good by its clock.
    cached: BTreeMap<(&'static str, usize), (Located, Time)>,
    /// When it asked last, by its clock.
    asked_at: Time,
}

/// Records are appended to this file.
pub(super) const LOG: &str = "log";

/// Each client has a region of this one.
pub(super) const TABLE: &str = "table";

/// This one is called otherwise now and then.
pub(super) const TURN: &str = "turn";

/// How long a region is.
pub(super) const REGION: usize = 64;

/// How many snapshots are taken in one run at most.
const SNAPSHOTS: usize = 4;

/// How often the third file is called otherwise at most.
const TURNS: usize = 6;

/// What stands in the region of a client after its write `number`.
fn region(client: usize, number: u64) -> Vec<u8> {
    let mut region = format!("[{client}.{number:09}]").into_bytes().repeat(REGION);
    region.truncate(REGION);
    region
}

/// What the third file is called when it is called otherwise the next time after `turns`.
pub(super) fn turned(turns: usize) -> FileName {
    file(&format!("turned/{turns}"))
}

impl Client {
    pub(super) fn new(name: u64) -> Self {
        Self {
            name,
            number: 0,
            tails: BTreeMap::new(),
            leases: BTreeMap::new(),
            failed: None,
            doing: Doing::Idle,
            id: 0,
            record: Vec::new(),
            target: Target::Log,
            turns: 0,
            begun: 0,
            written: 0,
            cached: BTreeMap::new(),
            asked_at: Time::default(),
        }
    }
}

impl Cluster {
    pub(super) fn think(&mut self, client: usize) {
        let pause = Duration::from_millis(self.rng.random_range(1..40));
        let is_idle = matches!(self.clients[client].doing, Doing::Idle);
        if !is_idle {
            return;
        }
        let is_free = self.clients[client].record.is_empty();
        let reads = self.rng.random_range(0..3) == 0 && !self.acknowledged.is_empty();
        let snapshots = self.rng.random_range(0..400) == 0 && self.snapshots.len() < SNAPSHOTS;
        let turns = self.rng.random_range(0..400) == 0 && self.turns < TURNS && !self.healing;
        if is_free && (turns || self.turning.is_some()) && self.nobody_turns() {
            self.turn(client);
        } else if reads && is_free {
            self.begin_read(client);
        } else if snapshots && is_free && !self.healing {
            self.begin_snapshot(client);
        } else if !self.healing || !is_free {
            self.lease(client);
        } else {
            self.at(pause, Event::Think(client));
        }
    }

    fn begin_snapshot(&mut self, client: usize) {
        self.sequence += 1;
        let to = file(&format!("snapshots/{}", self.sequence));
        self.clients[client].doing = Doing::Snapshotting(to.clone(), self.acknowledged.len());
        let request = MasterRequest::Snapshot { from: file(LOG), to };
        self.ask_as(client, Who::Master, Ask::Master(request));
    }

    fn nobody_turns(&self) -> bool {
        !self.clients.iter().any(|it| matches!(it.doing, Doing::Turning))
    }

    /// Calls the third file otherwise, or makes it anew.
    fn turn(&mut self, client: usize) {
        self.clients[client].doing = Doing::Turning;
        let request = match self.turning.get_or_insert(false) {
            false => MasterRequest::Rename { from: file(TURN), to: turned(self.turns) },
            true => {
                let chunk_bytes = Some(CHUNK_BYTES);
                MasterRequest::Create { name: file(TURN), chunk_bytes, copies: None }
            }
        };
        self.ask_as(client, Who::Master, Ask::Master(request));
    }

    fn name_of(&self, target: Target) -> FileName {
        match target {
            Target::Log => file(LOG),
            Target::Table => file(TABLE),
            Target::Snapshot(place) => self.snapshots[place].name.clone(),
            Target::Turn => file(TURN),
        }
    }

    pub(super) fn ask_as(&mut self, client: usize, to: Who, ask: Ask) {
        let id = self.ask(Who::Client(client), 0, Kind::Client, to, ask);
        self.clients[client].id = id;
        self.clients[client].asked_at = self.clock(Who::Client(client));
    }

    fn lease(&mut self, client: usize) {
        let length = self.rng.random_range(8..200);
        let snapshot = self.rng.random_range(0..SNAPSHOTS);
        let target = match self.rng.random_range(0..16) {
            0..4 => Target::Table,
            4 if snapshot < self.snapshots.len() => Target::Snapshot(snapshot),
            5 | 6 => Target::Turn,
            _ => Target::Log,
        };
        let keeps = self.rng.random_range(0..2) == 0;
        let it = &mut self.clients[client];
        if it.record.is_empty() {
            it.target = target;
            if target == Target::Table {
                it.begun += 1;
                it.record = region(client, it.begun);
            } else {
                it.number += 1;
                it.record = format!("<{}.{}:", it.name, it.number).into_bytes();
                it.record.resize(length.max(it.record.len()), b'x');
                it.record.push(b'>');
                self.targets.insert((it.name, it.number), target);
            }
        }
        let target = it.target;
        let name = self.name_of(target);
        let it = &mut self.clients[client];
        let index = match target {
            Target::Table => Some(0),
            _ => it.tails.get(&name).copied(),
        };
        let kept = index.and_then(|index| it.leases.get(&(name.clone(), index)).cloned());
        if let Some(lease) = kept.filter(|_| keeps && it.failed.is_none()) {
            return self.mutate(client, lease);
        }
        it.doing = Doing::Leasing;
        let failed = it.failed.take();
        self.ask_as(client, Who::Master, Ask::Master(MasterRequest::Lease { name, index, failed }));
    }

    fn mutate(&mut self, client: usize, lease: LeaseGranted) {
        let it = &mut self.clients[client];
        it.turns = self.turns;
        let mark = Some(Mark { client: it.name, number: it.number });
        let (chunk, version, pushed) = (lease.chunk, lease.version, None);
        let offset = (client * REGION) as u64;
        let message = match it.target {
            Target::Table => ChunkRequest::Write { chunk, version, offset, pushed },
            _ => ChunkRequest::Append { chunk, version, pushed, mark },
        };
        let data = Data::from(it.record.as_slice());
        let to = Who::Server(server_at(lease.primary));
        it.doing = Doing::Mutating(lease);
        self.ask_as(client, to, Ask::Chunk(Packet { message, data }));
    }

    fn begin_read(&mut self, client: usize) {
        let (name, index, offset, wanted) = match self.rng.random_range(0..4) {
            0 => {
                let writer = self.rng.random_range(0..CLIENTS);
                let wanted = Wanted::Region(writer, self.clients[writer].written);
                (TABLE, 0, (writer * REGION) as u64, wanted)
            }
            _ => {
                let pick = self.rng.random_range(0..self.acknowledged.len());
                let (index, offset, record) = self.acknowledged[pick].clone();
                (LOG, index, offset, Wanted::Record(record))
            }
        };
        let knows = self.rng.random_range(0..4) != 0;
        let now = self.clock(Who::Client(client));
        let cached = self.clients[client].cached.get(&(name, index)).cloned();
        match cached.filter(|(_, until)| knows && *until > now).map(|(located, _)| located) {
            Some(located) if !located.replicas.is_empty() => {
                // It may have changed since: whoever answers must be right all the same.
                self.read_at(client, located, offset, wanted);
            }
            _ => {
                self.clients[client].doing = Doing::Locating(name);
                let request = MasterRequest::Locate { name: file(name), index, count: None };
                self.ask_as(client, Who::Master, Ask::Master(request));
            }
        }
    }

    fn read_at(&mut self, client: usize, located: Located, offset: u64, wanted: Wanted) {
        let place = self.rng.random_range(0..located.replicas.len());
        let to = Who::Server(server_at(located.replicas[place]));
        let length = match &wanted {
            Wanted::Record(record) => record.len(),
            Wanted::Region(..) => REGION,
        };
        let (chunk, version) = (located.chunk, located.version);
        let message = ChunkRequest::Read { chunk, version, offset, length };
        self.clients[client].doing = Doing::Reading(offset, wanted);
        self.ask_as(client, to, Ask::Chunk(Packet::bare(message)));
    }

    /// Whether a reader may find this.
    pub(super) fn is_right(&self, found: &[u8], wanted: &Wanted) -> bool {
        match wanted {
            Wanted::Record(record) => found == *record,
            Wanted::Region(_, 0) => true,
            Wanted::Region(writer, at_least) => {
                (*at_least..=self.clients[*writer].begun).any(|it| found == region(*writer, it))
            }
        }
    }

    pub(super) fn client_answered(&mut self, client: usize, id: Id, from: Who, answer: Answer) {
        if self.clients[client].id != id {
            return;
        }
        let doing = std::mem::replace(&mut self.clients[client].doing, Doing::Idle);
        let mut pause = Duration::from_millis(self.rng.random_range(1..40));
        match (doing, answer) {
            (Doing::Leasing, Answer::Master(MasterReply::Lease(lease))) => {
                let name = self.name_of(self.clients[client].target);
                let it = &mut self.clients[client];
                it.tails.insert(name.clone(), lease.index);
                it.leases.insert((name, lease.index), lease.clone());
                return self.mutate(client, lease);
            }
            (Doing::Leasing, Answer::Master(MasterReply::Refused(refusal)))
                if refusal.reason != Reason::Unavailable
                    && self.clients[client].target == Target::Turn =>
            {
                // It is called otherwise by now, or was made anew and has fewer chunks.
                let name = self.name_of(self.clients[client].target);
                self.clients[client].tails.remove(&name);
            }
            (Doing::Mutating(lease), Answer::Chunk(packet)) => match packet.message {
                ChunkReply::Written { .. } if self.clients[client].target == Target::Table => {
                    let it = &mut self.clients[client];
                    it.record.clear();
                    it.written = it.begun;
                    self.tally.overwritten += 1;
                }
                ChunkReply::Written { offset } => {
                    let it = &mut self.clients[client];
                    let (target, turns) = (it.target, it.turns);
                    let record = std::mem::take(&mut it.record);
                    self.say(|| {
                        let text =
                            String::from_utf8_lossy(&record[..record.len().min(8)]).into_owned();
                        format!("client {client}: {text} at {}+{offset} {target:?}", lease.index)
                    });
                    let record = (lease.index, offset, record);
                    match target {
                        Target::Snapshot(place) => {
                            self.snapshots[place].acknowledged.push(record);
                        }
                        Target::Turn => {
                            let perhaps = usize::from(self.turning == Some(false));
                            let between = (turns, self.turns + perhaps);
                            self.turned.push(Turned { record, between });
                        }
                        _ => self.acknowledged.push(record),
                    }
                    self.tally.appended += 1;
                }
                ChunkReply::Closed { .. } => {
                    let name = self.name_of(self.clients[client].target);
                    self.clients[client].tails.insert(name, lease.index + 1);
                }
                ChunkReply::Refused(_) => {
                    self.tally.repeated += 1;
                    self.clients[client].leases.retain(|_, it| it.chunk != lease.chunk);
                    let failed = FailedPrimary { server: lease.primary, version: lease.version };
                    self.clients[client].failed = Some(failed);
                    pause = Duration::from_millis(100);
                }
                other => self.failure = Some(format!("a change was answered {other:?}")),
            },
            (Doing::Mutating(lease), _) => {
                self.tally.repeated += 1;
                self.clients[client].leases.retain(|_, it| it.chunk != lease.chunk);
                let failed = FailedPrimary { server: lease.primary, version: lease.version };
                self.clients[client].failed = Some(failed);
            }
            (Doing::Locating(name), Answer::Master(MasterReply::Located { chunks, .. })) => {
                for located in chunks {
                    let it = &mut self.clients[client];
                    let until = it.asked_at + Duration::from_millis(located.valid_ms);
                    it.cached.insert((name, located.index), (located, until));
                }
            }
            (Doing::Snapshotting(name, has), Answer::Master(MasterReply::Done(_))) => {
                self.say(|| format!("{name} is taken"));
                let last = self.clients.iter().map(|client| client.number).collect();
                self.snapshots.push(Snapshot { name, has, last, acknowledged: Vec::new() });
                self.tally.snapshots += 1;
            }
            (Doing::Turning, Answer::Master(reply)) => {
                // What is refused otherwise was made before, and nobody had heard of it.
                let is_made = !matches!(
                    reply,
                    MasterReply::Refused(refusal) if refusal.reason == Reason::Unavailable
                );
                match self.turning {
                    Some(false) if is_made => {
                        self.say(|| format!("{} is there", turned(self.turns)));
                        (self.turns, self.turning) = (self.turns + 1, Some(true));
                        self.tally.turns += 1;
                    }
                    Some(true) if is_made => self.turning = None,
                    _ => {}
                }
            }
            (Doing::Reading(offset, wanted), Answer::Chunk(packet)) => match packet.message {
                ChunkReply::Length { .. } if self.is_right(&packet.data, &wanted) => {
                    self.tally.read += 1;
                }
                ChunkReply::Length { length } => {
                    let got = String::from_utf8_lossy(&packet.data).into_owned();
                    let wanted = match wanted {
                        Wanted::Record(it) => String::from_utf8_lossy(&it).into_owned(),
                        Wanted::Region(writer, it) => format!("write {it} of {writer}"),
                    };
                    self.failure = Some(format!(
                        "{from:?} returned {got:?} of {length} bytes for {wanted:?} at {offset}"
                    ));
                }
                _ => {}
            },
            _ => pause = Duration::from_millis(200),
        }
        self.at(pause, Event::Think(client));
    }
}
