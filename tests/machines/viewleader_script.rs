//! Scripts that drive the viewleader alone.
//!
//! | command | meaning |
//! |---|---|
//! | `at 12s` | the clock shows this, until it is set again |
//! | `heartbeat ID [port=N] [host=IP] [lease=4s] [address=IP:PORT] [seen=N] [start=N] [lineage=N_..] [formerly=ID_..] [chosen=EPOCH] [full=true]` | ID is a number if it reads as one, else a text; a lease makes the dialect ours |
//! | `query_servers`, `lock_get LOCK ID`, `lock_release LOCK ID` | the original's |
//! | `lock_get LOCK ID [ttl=4s] [wait=1s] [shared=yes]`, `lock_keep LOCK ID [token=N]`, `lock_list` | ours |
//! | `query_view [after=N] [wait=10s]` | ours; its answer is shown as `view REVISION`, or as it is with the tag `[json]` |
//! | `report ID [ready=ARC[@N]] [established=ARC[@N]]` | ARC is the identity at which the arc starts, N the group's version: unless told otherwise, the one it has |
//! | `drain IP:PORT`, `rebalance_status` | ours |
//! | `raw JSON` | a request as it stands |
//! | `tick` | time has passed |
//! | `work` | the rebalancing workers look, until they find nothing more to do |
//! | `slept 5s` | the process has not run for so long |
//! | `ending` | the process is about to end |
//! | `hold_log`, `release_log` | from now on changes do not reach the log; now they do |
//! | `cut_off`, `heal` | from now on nobody confirms that it leads; now they do |
//! | `retire IP:PORT` | it leads no more: this one does |
//! | `restart` | the process is killed and started again over its log |
//! | `replace` | another viewleader, which remembers nothing, takes its place |
//! | `groups` | the view, for people |
//!
//! A reply is shown as its JSON. One that comes later than its request is shown
//! with the request's number, which is said when it has to wait.

use super::arguments::{Failure, exactly, given, option, positional, span};
use goldenscript::{Command, Context, Runner};
use ringleader::kv::ring::Point;
use ringleader::machine::{Machine, Time};
use ringleader::sim::disk::Disk;
use ringleader::sim::lone_log as log;
use ringleader::sim::names::Names;
use ringleader::view::View;
use ringleader::view::leader::{Effect, Input, Leader, Worker};
use ringleader::view::messages::{ViewReply, ViewRequest};
use ringleader::view::state::State;
use ringleader::wire::Identity;
use serde_json::{Value, json};
use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// One script's viewleader.
pub(crate) struct ViewleaderScript {
    now: Time,
    leader: Leader<u32>,
    log: Disk,
    is_log_held: bool,
    /// The last confirmation that did not come, while none do.
    unconfirmed: Option<Option<u64>>,
    workers: BTreeSet<Worker>,
    requests: u32,
    /// The view as it was seen last.
    view: Arc<View>,
    names: Names,
}

impl Default for ViewleaderScript {
    fn default() -> Self {
        Self {
            now: Time::default(),
            leader: Leader::new(Time::default(), State::default(), 0),
            log: Disk::default(),
            is_log_held: false,
            unconfirmed: None,
            workers: BTreeSet::new(),
            requests: 0,
            view: Arc::default(),
            names: Names::default(),
        }
    }
}

impl Runner for ViewleaderScript {
    type Command = Command;

    fn run(&mut self, command: &Command, context: &Context) -> Result<String, Failure> {
        let as_json = context.tags.contains("json");
        match command.name.as_str() {
            "at" => {
                let [moment] = exactly(command)?;
                let now = Time::default() + span(moment)?;
                if now < self.now {
                    return Err("time does not go backwards".into());
                }
                self.now = now;
                Ok(String::new())
            }
            "tick" => Ok(self.step(Input::Tick, None, as_json)),
            "slept" => {
                let [pause] = exactly(command)?;
                Ok(self.step(Input::Slept(span(pause)?), None, as_json))
            }
            "ending" => Ok(self.step(Input::Ending, None, as_json)),
            "work" => Ok(self.work()),
            "hold_log" => {
                self.is_log_held = true;
                Ok(String::new())
            }
            "release_log" => {
                self.is_log_held = false;
                Ok(self.commit())
            }
            "cut_off" => {
                self.unconfirmed = Some(None);
                Ok(String::new())
            }
            "heal" => {
                let number = self.unconfirmed.take().flatten();
                let confirmed = number.map(|number| Input::Confirmed { number });
                Ok(confirmed.map_or(String::new(), |input| self.step(input, None, as_json)))
            }
            "retire" => {
                let [next] = exactly(command)?;
                let fresh = Leader::new(self.now, State::default(), 0);
                let mut effects = Vec::new();
                std::mem::replace(&mut self.leader, fresh)
                    .retire(Some(next.parse()?), &mut effects);
                let mut lines = String::new();
                for effect in effects {
                    if let Effect::Reply { to, reply } = effect {
                        writeln!(lines, "to request {to}: {}", show(&reply, as_json))?;
                    }
                }
                Ok(lines)
            }
            "restart" => {
                self.log.crash(0);
                let recovered = log::recover(self.log.store())?;
                self.start(recovered.state, recovered.index);
                Ok(String::new())
            }
            "replace" => {
                self.log = Disk::default();
                self.start(State::default(), 0);
                Ok(String::new())
            }
            "groups" => {
                let lines = self.step(Input::Tick, None, as_json) + &self.look();
                self.names.learn(&self.view);
                Ok(lines + &self.names.view_lines(&self.view))
            }
            "raw" => {
                let [body] = exactly(command)?;
                self.ask(Ipv4Addr::LOCALHOST, body, as_json)
            }
            _ => {
                // A report is about the groups as they are.
                let lines = if command.name == "report" { self.look() } else { String::new() };
                let request = self.request(command)?;
                let host = option(command, "host").unwrap_or("10.0.0.1").parse()?;
                Ok(lines + &self.ask(host, &request.to_string(), as_json)?)
            }
        }
    }
}

impl ViewleaderScript {
    /// The request that the command stands for.
    fn request(&self, command: &Command) -> Result<Value, Failure> {
        let cmd = command.name.as_str();
        let arguments = positional(command);
        let number = |key| option(command, key).map(str::parse::<u64>).transpose();
        Ok(match (cmd, arguments.as_slice()) {
            ("heartbeat", [id]) => {
                let mut request = json!({"cmd": cmd, "requestor": identity(id)});
                request["port"] = number("port")?.unwrap_or(38000).into();
                if let Some(lease) = option(command, "lease") {
                    request["lease_ms"] = (span(lease)?.as_millis() as u64).into();
                }
                if let Some(address) = option(command, "address") {
                    request["address"] = address.into();
                }
                if let Some(seen) = number("seen")? {
                    request["seen"] = seen.into();
                }
                if let Some(text) = option(command, "start") {
                    request["start"] = start(text)?;
                }
                if let Some(starts) = option(command, "lineage") {
                    let starts: Result<Vec<_>, _> = starts.split('_').map(start).collect();
                    request["lineage"] = starts?.into();
                }
                if let Some(formerly) = option(command, "formerly") {
                    request["formerly"] = formerly.split('_').map(identity).collect();
                }
                if let Some(full) = option(command, "full") {
                    request["full"] = full.parse::<bool>()?.into();
                }
                if let Some(epoch) = number("chosen")? {
                    request["chosen_in"] = epoch.into();
                }
                request
            }
            ("query_servers" | "rebalance_status", []) => json!({"cmd": cmd}),
            ("drain", [server]) => json!({"cmd": cmd, "server": server}),
            ("query_view", []) => {
                let mut request = json!({"cmd": cmd});
                if let Some(after) = number("after")? {
                    request["after"] = after.into();
                }
                if let Some(wait) = option(command, "wait") {
                    request["wait_ms"] = (span(wait)?.as_millis() as u64).into();
                }
                request
            }
            ("report", [id]) => {
                let groups = |key| -> Result<Vec<Value>, Failure> {
                    given(command, key).into_iter().map(|text| in_group(&self.view, text)).collect()
                };
                let (ready, established) = (groups("ready")?, groups("established")?);
                let requestor = identity(id);
                json!({"cmd": cmd, "requestor": requestor, "ready": ready, "established": established})
            }
            ("lock_get" | "lock_release", [lock, id]) => {
                let mut request = json!({"cmd": cmd, "lockid": lock, "requestor": identity(id)});
                for (name, field) in [("ttl", "ttl_ms"), ("wait", "wait_ms")] {
                    if let Some(time) = option(command, name) {
                        request[field] = json!(span(time)?.as_millis() as u64);
                    }
                }
                if option(command, "shared").is_some() {
                    request["shared"] = json!(true);
                }
                request
            }
            ("lock_keep", [lock, id]) => {
                let request =
                    json!({"cmd": "lock_keep", "lockid": lock, "requestor": identity(id)});
                match number("token")? {
                    Some(token) => {
                        let mut request = request;
                        request["token"] = token.into();
                        request
                    }
                    None => request,
                }
            }
            ("lock_list", []) => json!({"cmd": "lock_list"}),
            _ => return Err(format!("there is no command such as {command}").into()),
        })
    }

    /// Sends a request as its JSON.
    fn ask(&mut self, host: Ipv4Addr, body: &str, as_json: bool) -> Result<String, Failure> {
        self.requests += 1;
        let from = self.requests;
        Ok(match ViewRequest::decode(body.as_bytes()) {
            Ok(request) => self.step(Input::Request { from, host, request }, Some(from), as_json),
            Err(refusal) => format!("{}\n", serde_json::to_string(&refusal)?),
        })
    }

    /// Starts the process with what it remembers.
    fn start(&mut self, state: State, index: u64) {
        self.leader = Leader::new(self.now, state, index);
        self.workers.clear();
    }

    /// Steps the machine, and again for what has reached the log, unless that is
    /// held. One line for each effect; what is not the answer to `asked` is shown
    /// with the number of the request that it answers.
    fn step(&mut self, input: Input<u32>, asked: Option<u32>, as_json: bool) -> String {
        let (mut inputs, mut lines) = (VecDeque::from([input]), String::new());
        let mut answered = asked.is_none();
        while let Some(input) = inputs.pop_front() {
            let mut effects = Vec::new();
            self.leader.step(self.now, input, &mut effects);
            for effect in effects {
                let _ = match effect {
                    Effect::Note(note) => writeln!(lines, "note: {note}"),
                    Effect::Reply { to: 0, reply: ViewReply::View(answer) } => {
                        self.view = answer.view;
                        Ok(())
                    }
                    Effect::Reply { to, reply } if Some(to) == asked => {
                        answered = true;
                        writeln!(lines, "{}", show(&reply, as_json))
                    }
                    Effect::Reply { to, reply } => {
                        writeln!(lines, "to request {to}: {}", show(&reply, as_json))
                    }
                    Effect::Append { index, change } => {
                        self.log.submit(vec![log::append(index, &change)], index, self.now);
                        if self.is_log_held {
                            writeln!(lines, "change {index} waits for the log")
                        } else {
                            self.log.keep_up_to(index);
                            inputs.push_back(Input::Committed { index });
                            Ok(())
                        }
                    }
                    Effect::Confirm { number } => {
                        match &mut self.unconfirmed {
                            Some(last) => *last = Some(number),
                            None => inputs.push_back(Input::Confirmed { number }),
                        }
                        Ok(())
                    }
                    Effect::StartWorker(worker) => {
                        self.workers.insert(worker);
                        writeln!(lines, "starts {}", worker.name())
                    }
                    Effect::WorkerDone(worker, line) => {
                        self.workers.remove(&worker);
                        let line = line.map(|line| format!(", printing {line:?}"));
                        writeln!(lines, "ends {}{}", worker.name(), line.unwrap_or_default())
                    }
                };
            }
        }
        if let (Some(number), false) = (asked, answered) {
            let _ = writeln!(lines, "request {number} waits");
        }
        lines
    }

    /// What waits for the log has reached it.
    fn commit(&mut self) -> String {
        match self.log.release() {
            None => String::new(),
            Some(index) => {
                self.log.keep_up_to(index);
                self.step(Input::Committed { index }, None, false)
            }
        }
    }

    /// The workers look, one after the other, until nothing comes of it twice.
    fn work(&mut self) -> String {
        let (mut lines, mut idle) = (String::new(), 0);
        while idle < 2 && !self.workers.is_empty() {
            lines += &self.look();
            let before = (self.view.revision, self.workers.clone());
            for worker in self.workers.clone() {
                lines += &self.step(Input::Work(worker), None, false);
            }
            lines += &self.look();
            let is_idle = before == (self.view.revision, self.workers.clone());
            idle = if is_idle { idle + 1 } else { 0 };
        }
        lines
    }

    /// Looks at the view, as anybody can: it is asked for, as request 0.
    fn look(&mut self) -> String {
        let request = ViewRequest::QueryView(Default::default());
        self.step(Input::Request { from: 0, host: Ipv4Addr::LOCALHOST, request }, None, false)
    }
}

fn show(reply: &ViewReply, as_json: bool) -> String {
    match reply {
        ViewReply::View(answer) if !as_json => format!("view {}", answer.view.revision),
        reply => serde_json::to_string(reply).expect("a reply can be written"),
    }
}

/// An identity as JSON: a number if it reads as one, letter by letter.
fn identity(text: &str) -> Value {
    text.parse::<serde_json::Number>().map_or_else(|_| text.into(), Value::Number)
}

/// `5-17`: the fifth start, which drew the number 17; `5` drew 0.
fn start(text: &str) -> Result<Value, Box<dyn std::error::Error>> {
    let (count, drawn) = text.split_once('-').unwrap_or((text, "0"));
    let (count, drawn): (u64, u64) = (count.parse()?, drawn.parse()?);
    Ok(json!({"count": count, "drawn": drawn}))
}

/// `ARC@N`: version N of the group whose arc starts where the identity ARC
/// stands.
fn in_group(view: &View, text: &str) -> Result<Value, Failure> {
    let (arc, version) = text.split_once('@').unwrap_or((text, ""));
    let start = Point::of(Identity::text(arc).as_str());
    let group = view.groups.iter().find(|group| group.start == start);
    let version = match (version, group) {
        ("", Some(group)) => group.version.0,
        ("", None) => return Err(format!("there is no arc {arc}").into()),
        (version, _) => version.parse()?,
    };
    Ok(json!([start, version]))
}
