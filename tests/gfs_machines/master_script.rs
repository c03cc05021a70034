//! Scripts that drive the master alone.
//!
//! Chunkservers `a`, `b`, `c`, ... are stand-ins at 10.0.0.1, 10.0.0.2, ...: they
//! do at once what they are told, unless they are `silent`.
//!
//! * `join a [rack=R] [used=N] [free=N] [original=true]`: a new process links, of ours or of
//!   the original; `beat a`: a heartbeat; `inventory a`: it says all that it holds, which is on
//!   its way until `arrive [answer=lost]`
//! * `pass 5s`: time goes by, with a tick and all heartbeats twice a second; `at 5s`,
//!   `tick`: without heartbeats
//! * `silent a`, `loud a`: it answers no calls, and sends no heartbeats; `deaf a`: it
//!   answers no calls; `mute a`: it does what it is told, and its answers are lost;
//!   `stuck a`: it does not answer when it is to fetch something
//! * `serial a CHUNK N`: its copy has so many mutations, or will have if it makes one;
//!   `lose a CHUNK`: it has none; `spoil a CHUNK`: it is damaged, which is said with all that
//!   it holds; `read a CHUNK`: whether it would serve it
//! * `create`, `rm`, `undelete`, `mv`, `snapshot`, `ls`, `stat`, `locate`, `lease`,
//!   `census`, `failed`, `damaged`: requests
//! * `restart`: the master is killed and starts again; `hold_log`, `release_log`
//! * `hold_lead`, `hold_copies`, `release`: until then nobody answers who is to be primary, or
//!   to make a copy
//! * `deletes_at_once N`: what one answer orders at most, from the next start on

use crate::arguments::{Failure, exactly, given, option, positional, span};
use goldenscript::{Command, Context, Runner};
use ringleader::consensus::replica::Lead;
use ringleader::gfs::master::{CallId, Effect, Input, Leader, Settings};
use ringleader::gfs::messages::{
    Beat, BeatReply, ChunkReply, ChunkRequest, FailedPrimary, Heartbeat, MasterReply,
    MasterRequest, Packet, Status,
};
use ringleader::gfs::{ChunkId, FileName, Serial, Version};
use ringleader::machine::{Machine, Time};
use ringleader::sim::disk::Disk;
use ringleader::sim::lone_log as log;
use ringleader::wire::Refusal;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

/// A chunkserver that does what it is told.
#[derive(Default)]
struct StandIn {
    holds: BTreeMap<ChunkId, (Version, Serial)>,
    copies: BTreeMap<ChunkId, Version>,
    start: u64,
    rack: String,
    used: u64,
    free: u64,
    is_deaf: bool,
    is_mute: bool,
    is_stuck: bool,
    is_gone: bool,
    is_original: bool,
    is_primary: bool,
    gone: Vec<ChunkId>,
    damaged: BTreeSet<ChunkId>,
    /// How many mutations a copy has that it has not made yet.
    to_have: BTreeMap<ChunkId, Serial>,
    lease_until: Time,
    fences: BTreeMap<ChunkId, Version>,
}

impl StandIn {
    fn answer(&mut self, request: &ChunkRequest) -> Option<Result<ChunkReply, Refusal>> {
        let is_fetching = matches!(request, ChunkRequest::Establish { .. });
        let is_stuck = self.is_stuck && is_fetching;
        // One of the original can be told neither to fetch nor to stop.
        let is_unknown =
            self.is_original && (is_fetching || matches!(request, ChunkRequest::Fence { .. }));
        if self.is_deaf || self.is_gone || is_stuck || is_unknown {
            return None;
        }
        let answer = self.obey(request);
        Some(answer).filter(|_| !self.is_mute)
    }

    fn obey(&mut self, request: &ChunkRequest) -> Result<ChunkReply, Refusal> {
        match request {
            ChunkRequest::Make { chunk, version, .. } => {
                self.holds.insert(*chunk, (*version, Serial(0)));
                Ok(ChunkReply::Agreed { serial: Serial(0) })
            }
            ChunkRequest::Promise { chunk, version } => {
                if let Some(copied) = self.copies.remove(chunk) {
                    let serial = self.to_have.remove(chunk).unwrap_or_default();
                    self.holds.insert(*chunk, (copied, serial));
                }
                match self.holds.get_mut(chunk) {
                    Some((held, serial)) if *held <= *version => {
                        *held = *version;
                        Ok(ChunkReply::Agreed { serial: *serial })
                    }
                    _ => Err(Refusal::unavailable("I have no such copy")),
                }
            }
            ChunkRequest::Replicate { chunk, version, .. } => {
                self.damaged.remove(chunk);
                match self.is_original {
                    true => drop(self.holds.insert(*chunk, (*version, Serial(0)))),
                    false => drop(self.copies.insert(*chunk, *version)),
                }
                Ok(ChunkReply::Agreed { serial: Serial(0) })
            }
            ChunkRequest::Establish { chunk, serial, .. } => match self.holds.get_mut(chunk) {
                Some((_, held)) if *held <= *serial => {
                    *held = *serial;
                    Ok(ChunkReply::Agreed { serial: *serial })
                }
                _ => Err(Refusal::unavailable("I have no such copy, or more")),
            },
            ChunkRequest::Lead { .. } => {
                self.is_primary = true;
                Ok(ChunkReply::Done(Status::Ok))
            }
            ChunkRequest::Fence { chunk, below } => {
                self.fences.insert(*chunk, *below);
                Ok(ChunkReply::Done(Status::Ok))
            }
            _ => Ok(ChunkReply::Done(Status::Ok)),
        }
    }

    /// Which version of `chunk` it would serve.
    fn serves(&self, now: Time, chunk: ChunkId) -> Option<Version> {
        let fence = self.fences.get(&chunk).copied().unwrap_or_default();
        let (version, _) = self.holds.get(&chunk)?;
        (now < self.lease_until && *version >= fence).then_some(*version)
    }

    fn take(&mut self, now: Time, reply: &BeatReply) {
        match reply.status {
            Beat::Ok => {
                self.fences = reply.fences.iter().copied().collect();
                self.lease_until = now + Duration::from_millis(reply.lease_ms);
            }
            Beat::Link => self.is_primary = false,
        }
        for (chunk, version) in &reply.delete {
            // The original's know only the number of what they are to delete.
            if self.holds.get(chunk).is_some_and(|(held, _)| self.is_original || held <= version) {
                self.holds.remove(chunk);
            }
            self.damaged.remove(chunk);
            self.gone.push(*chunk);
        }
    }
}

/// What is to be answered later, and those answers.
struct Held {
    what: fn(&ChunkRequest) -> bool,
    answers: Vec<Input<u32>>,
}

impl Held {
    fn new(what: fn(&ChunkRequest) -> bool) -> Option<Self> {
        Some(Self { what, answers: Vec::new() })
    }
}

pub(crate) struct MasterScript {
    now: Time,
    master: Leader<u32>,
    log: Disk,
    is_log_held: bool,
    held: Option<Held>,
    inventory: Option<(char, Heartbeat)>,
    requests: u32,
    servers: BTreeMap<char, StandIn>,
    answer: Option<BeatReply>,
    settings: Settings,
}

impl Default for MasterScript {
    fn default() -> Self {
        let (now, settings) = (Time::default(), Settings::default());
        let master = Leader::begin(now, &settings, Default::default(), 0);
        Self {
            now,
            master,
            log: Disk::default(),
            is_log_held: false,
            held: None,
            inventory: None,
            requests: 0,
            servers: BTreeMap::new(),
            answer: None,
            settings,
        }
    }
}

fn address(name: char) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, name as u8 - b'a' + 1), 9001)
}

fn name_of(address: SocketAddrV4) -> char {
    (b'a' + address.ip().octets()[3] - 1) as char
}

/// Addresses in a text, by their names.
fn named(mut text: String) -> String {
    for name in 'a'..='h' {
        text = text.replace(&address(name).to_string(), &name.to_string());
    }
    text
}

impl Runner for MasterScript {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &Context) -> Result<String, Failure> {
        let words = positional(command);
        let server = || -> Result<char, Failure> {
            words.first().and_then(|it| it.chars().next()).ok_or_else(|| "which server?".into())
        };
        Ok(match command.name.as_str() {
            "at" => {
                let [moment] = exactly(command)?;
                self.now = Time::default() + span(moment)?;
                String::new()
            }
            "tick" => self.step(Input::Tick, None),
            "pass" => {
                let [span_] = exactly(command)?;
                self.pass(span(span_)?)
            }
            "join" => {
                let it = self.servers.entry(server()?).or_default();
                it.start += 1;
                it.is_primary = false;
                (it.is_gone, it.is_deaf, it.is_mute) = (false, false, false);
                it.is_original = option(command, "original").is_some();
                it.rack = option(command, "rack").unwrap_or(&it.rack).to_owned();
                it.used = option(command, "used").map_or(Ok(it.used), str::parse)?;
                it.free =
                    option(command, "free").map_or(Ok(1000 - it.used.min(999)), str::parse)?;
                self.beat(server()?, true)
            }
            "beat" => self.beat(server()?, false),
            "inventory" => {
                let beat = self.heartbeat(server()?, true).ok_or("nobody")?;
                self.inventory = Some((server()?, beat));
                String::new()
            }
            "arrive" => {
                let (name, beat) = self.inventory.take().ok_or("none is on its way")?;
                match option(command, "answer") {
                    None => self.hear(name, beat),
                    Some(_) => {
                        let request = MasterRequest::Heartbeat(beat);
                        self.step(Input::Request { from: 0, request }, None)
                    }
                }
            }
            "silent" => {
                self.servers.entry(server()?).or_default().is_gone = true;
                String::new()
            }
            "deaf" => {
                self.servers.entry(server()?).or_default().is_deaf = true;
                String::new()
            }
            "mute" => {
                let it = self.servers.entry(server()?).or_default();
                (it.is_gone, it.is_mute) = (false, true);
                String::new()
            }
            "stuck" => {
                self.servers.entry(server()?).or_default().is_stuck = true;
                String::new()
            }
            "loud" => {
                let it = self.servers.entry(server()?).or_default();
                (it.is_gone, it.is_deaf, it.is_mute) = (false, false, false);
                it.is_stuck = false;
                String::new()
            }
            "read" => {
                let (name, chunk) = (server()?, words.get(1).ok_or("which chunk?")?.parse()?);
                match self.servers.entry(name).or_default().serves(self.now, ChunkId(chunk)) {
                    Some(version) => format!("{name} serves {version}\n"),
                    None => format!("{name} does not serve it\n"),
                }
            }
            "serial" | "lose" => {
                let chunk = ChunkId(words.get(1).ok_or("which chunk?")?.parse()?);
                let it = self.servers.entry(server()?).or_default();
                match words.get(2) {
                    None => drop(it.holds.remove(&chunk)),
                    Some(serial) => {
                        let serial = Serial(serial.parse()?);
                        match it.holds.get_mut(&chunk) {
                            Some(held) => held.1 = serial,
                            None => drop(it.to_have.insert(chunk, serial)),
                        }
                    }
                }
                String::new()
            }
            "spoil" => {
                let chunk = ChunkId(words.get(1).ok_or("which chunk?")?.parse()?);
                let it = self.servers.entry(server()?).or_default();
                it.holds.remove(&chunk).ok_or("it has no copy")?;
                it.damaged.insert(chunk);
                String::new()
            }
            "restart" => {
                self.log.crash(0);
                let recovered = log::recover(self.log.store())?;
                self.master =
                    Leader::begin(self.now, &self.settings, recovered.state, recovered.index);
                String::new()
            }
            "deletes_at_once" => {
                let [count] = exactly(command)?;
                self.settings.deleted_at_once = count.parse()?;
                String::new()
            }
            "hold_log" => {
                self.is_log_held = true;
                self.log.hold();
                String::new()
            }
            "release_log" => {
                self.is_log_held = false;
                match self.log.release() {
                    None => String::new(),
                    Some(index) => {
                        self.log.keep_up_to(index);
                        self.step(Input::Committed { index }, None)
                    }
                }
            }
            "hold_lead" => {
                self.held = Held::new(|it| matches!(it, ChunkRequest::Lead { .. }));
                String::new()
            }
            "hold_copies" => {
                self.held = Held::new(|it| matches!(it, ChunkRequest::Replicate { .. }));
                String::new()
            }
            "release" => {
                let held = self.held.take().ok_or("nothing is held")?.answers;
                held.into_iter().map(|answer| self.step(answer, None)).collect()
            }
            "raw" => {
                let [body] = exactly(command)?;
                match Packet::<MasterRequest>::request(body.as_bytes()) {
                    Ok(packet) => self.ask(packet.message),
                    Err(refusal) => format!("{}\n", serde_json::to_string(&refusal)?),
                }
            }
            _ => {
                let request = request(command)?;
                self.ask(request)
            }
        })
    }
}

fn request(command: &Command) -> Result<MasterRequest, Failure> {
    let words = positional(command);
    let file = |place: usize| -> Result<FileName, Failure> {
        Ok(FileName::new(words.get(place).ok_or("a name is missing")?)?)
    };
    let version_of = |text: &str| -> Result<(String, Version), Failure> {
        let (what, version) = text.split_once('@').ok_or("write X@VERSION")?;
        Ok((what.to_owned(), Version(version.parse()?)))
    };
    let servers = |key| -> Vec<SocketAddrV4> {
        given(command, key).iter().filter_map(|it| it.chars().next()).map(address).collect()
    };
    Ok(match command.name.as_str() {
        "create" => MasterRequest::Create {
            name: file(0)?,
            chunk_bytes: option(command, "chunk").map(str::parse).transpose()?,
            copies: option(command, "copies").map(str::parse).transpose()?,
        },
        "rm" => MasterRequest::Delete { name: file(0)? },
        "undelete" => MasterRequest::Undelete { name: file(0)? },
        "mv" => MasterRequest::Rename { from: file(0)?, to: file(1)? },
        "snapshot" => MasterRequest::Snapshot { from: file(0)?, to: file(1)? },
        "stat" => MasterRequest::Stat { name: file(0)? },
        "ls" => MasterRequest::Ls {
            under: words.first().map(|it| FileName::new(it)).transpose()?,
            after: option(command, "after").map(FileName::new).transpose()?,
            limit: option(command, "limit").map(str::parse).transpose()?,
        },
        "locate" => MasterRequest::Locate {
            name: file(0)?,
            index: words.get(1).map_or(Ok(0), |it| it.parse())?,
            count: option(command, "count").map(str::parse).transpose()?,
        },
        "lease" => MasterRequest::Lease {
            name: file(0)?,
            index: words.get(1).map(|it| it.parse()).transpose()?,
            failed: match option(command, "failed") {
                None => None,
                Some(text) => {
                    let (server, version) = version_of(text)?;
                    let server = address(server.chars().next().ok_or("which server?")?);
                    Some(FailedPrimary { server, version })
                }
            },
        },
        "census" => MasterRequest::Census {},
        "failed" => {
            let (chunk, version) = version_of(words.first().ok_or("which chunk?")?)?;
            MasterRequest::Failed {
                chunk: ChunkId(chunk.parse()?),
                version,
                silent: servers("silent"),
                refused: servers("refused"),
            }
        }
        "damaged" => MasterRequest::Damaged {
            server: words.first().copied().unwrap_or_default().into(),
            chunk: ChunkId(words.get(1).ok_or("which chunk?")?.parse()?),
        },
        other => return Err(format!("there is no command {other}").into()),
    })
}

impl MasterScript {
    fn ask(&mut self, request: MasterRequest) -> String {
        self.requests += 1;
        let from = self.requests;
        self.step(Input::Request { from, request }, Some(from))
    }

    /// What a chunkserver says of itself, and of all that it holds if it links.
    fn heartbeat(&mut self, name: char, links: bool) -> Option<Heartbeat> {
        let it = self.servers.get_mut(&name)?;
        let says_all = links || it.is_original;
        Some(Heartbeat {
            server: name.to_string().into(),
            start: it.start,
            address: Some(address(name)),
            rack: it.rack.as_str().into(),
            used: it.used,
            free: it.free,
            full: false,
            holds: says_all.then(|| it.holds.iter().map(|(id, (v, _))| (*id, *v)).collect()),
            leads: says_all && it.is_primary,
            damaged: it.damaged.iter().filter(|_| links).copied().collect(),
            gone: std::mem::take(&mut it.gone),
            original: it.is_original,
        })
    }

    /// A heartbeat, and a second one with all that it holds if it is asked to.
    fn beat(&mut self, name: char, links: bool) -> String {
        match self.heartbeat(name, links) {
            Some(beat) => self.hear(name, beat),
            None => "nobody\n".into(),
        }
    }

    /// A heartbeat arrives, and its answer.
    fn hear(&mut self, name: char, beat: Heartbeat) -> String {
        let says_all = beat.holds.is_some();
        self.answer = None;
        let mut lines =
            self.step(Input::Request { from: 0, request: MasterRequest::Heartbeat(beat) }, None);
        if let Some(reply) = self.answer.take() {
            if let Some(it) = self.servers.get_mut(&name) {
                it.take(self.now, &reply);
            }
            for (chunk, below) in &reply.fences {
                let _ = writeln!(lines, "{name} may not serve {chunk} below {below}");
            }
            for (chunk, version) in &reply.delete {
                let _ = writeln!(lines, "{name} deletes {chunk} up to {version}");
            }
            if reply.status == Beat::Link && says_all {
                let _ = writeln!(lines, "{name} is to lead nothing any more");
            }
            if reply.status == Beat::Link || (reply.inventory && !says_all) {
                lines += &self.beat(name, true);
            }
        }
        lines
    }

    fn pass(&mut self, span: Duration) -> String {
        const STEP: Duration = Duration::from_millis(500);
        let (end, mut lines) = (self.now + span, String::new());
        while self.now < end {
            self.now = (self.now + STEP).min(end);
            let before = lines.len();
            let names: Vec<char> = self.servers.keys().copied().collect();
            for name in names {
                if !self.servers[&name].is_gone {
                    lines += &self.beat(name, false);
                }
            }
            lines += &self.step(Input::Tick, None);
            if lines.len() > before {
                let said = lines.split_off(before);
                let _ = writeln!(lines, "at {}:", self.now);
                for line in said.lines() {
                    let _ = writeln!(lines, "  {line}");
                }
            }
        }
        lines
    }

    /// Steps the machine, and again for what comes of it. One line for each effect.
    fn step(&mut self, input: Input<u32>, asked: Option<u32>) -> String {
        let (mut inputs, mut lines) = (VecDeque::from([input]), String::new());
        let mut answered = asked.is_none();
        while let Some(input) = inputs.pop_front() {
            let mut effects = Vec::new();
            self.master.step(self.now, input, &mut effects);
            for effect in effects {
                match effect {
                    Effect::Note(note) => drop(writeln!(lines, "note: {}", named(note))),
                    Effect::Reply { to: 0, reply: MasterReply::Beat(reply) } => {
                        self.answer = Some(reply);
                    }
                    Effect::Reply { to, reply } => {
                        let shown = named(serde_json::to_string(&reply).expect("JSON"));
                        if Some(to) == asked {
                            answered = true;
                            let _ = writeln!(lines, "{shown}");
                        } else {
                            let _ = writeln!(lines, "to request {to}: {shown}");
                        }
                    }
                    Effect::Append { index, change } => {
                        self.log.submit(vec![log::append(index, &change)], index, self.now);
                        if self.is_log_held {
                            let _ = writeln!(lines, "change {index} waits for the log");
                        } else {
                            self.log.keep_up_to(index);
                            inputs.push_back(Input::Committed { index });
                        }
                    }
                    Effect::Confirm { number } => inputs.push_back(Input::Confirmed { number }),
                    Effect::Call { to, call, request, .. } => {
                        let answer = self.call(to, call, &request, &mut lines);
                        match &mut self.held {
                            Some(held) if (held.what)(&request) => held.answers.push(answer),
                            _ => inputs.push_back(answer),
                        }
                    }
                }
            }
        }
        if let (Some(number), false) = (asked, answered) {
            let _ = writeln!(lines, "request {number} waits");
        }
        lines
    }

    fn call(
        &mut self,
        to: SocketAddrV4,
        call: CallId,
        request: &ChunkRequest,
        lines: &mut String,
    ) -> Input<u32> {
        let name = name_of(to);
        let answer = self.servers.get_mut(&name).and_then(|it| it.answer(request));
        let said = match &answer {
            None => "no answer".to_owned(),
            Some(Ok(ChunkReply::Agreed { serial })) => format!("agreed at {}", serial.0),
            Some(Ok(_)) => "ok".to_owned(),
            Some(Err(refusal)) => format!("refused: {refusal}"),
        };
        let what = match request {
            ChunkRequest::Make { chunk, version, copy_of: None } => {
                format!("make {chunk} {version}")
            }
            ChunkRequest::Make { chunk, version, copy_of: Some(of) } => {
                format!("make {chunk} {version} as a copy of {of}")
            }
            ChunkRequest::Promise { chunk, version } => format!("promise {chunk} {version}"),
            ChunkRequest::Fence { chunk, below } => format!("fence {chunk} below {below}"),
            ChunkRequest::Lead { chunk, version, others, .. } => {
                let others: Vec<String> =
                    others.iter().map(|it| name_of(*it).to_string()).collect();
                format!("lead {chunk} {version} with [{}]", others.join(" "))
            }
            ChunkRequest::Replicate { chunk, version, from } => {
                format!("replicate {chunk} {version} from {}", name_of(*from))
            }
            ChunkRequest::Establish { chunk, version, serial, from } => {
                format!("establish {chunk} {version} at {} from {}", serial.0, name_of(*from))
            }
            other => named(json!(other).to_string()),
        };
        let _ = writeln!(lines, "{name} <- {what}: {said}");
        Input::Answer { call, answer }
    }
}
