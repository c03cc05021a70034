//! Scripts that drive the viewleader alone.
//!
//! | command | meaning |
//! |---|---|
//! | `at 12s` | the clock shows this, until it is set again |
//! | `heartbeat ID [port=N] [host=IP] [lease=4s] [address=IP:PORT] [seen=N]` | ID is a number if it reads as one, else a text; a lease makes the dialect ours |
//! | `query_servers`, `lock_get LOCK ID`, `lock_release LOCK ID` | the original's |
//! | `query_view [after=N] [wait=10s]` | ours; its answer is shown as `view REVISION`, or as it is with the tag `[json]` |
//! | `report ID [ready=ARC[@N]] [established=ARC[@N]]` | ARC is the identity at which the arc starts, N the group's version: unless told otherwise, the one it has |
//! | `raw JSON` | a request as it stands |
//! | `tick` | time has passed |
//! | `slept 5s` | the process has not run for so long |
//! | `ending` | the process is about to end |
//! | `restart` | another viewleader, which remembers nothing, takes its place |
//! | `groups` | the view, for people |
//!
//! A reply is shown as its JSON. One that comes later than its request is shown
//! with the request's number, which is said when it has to wait.

use super::arguments::{Failure, exactly, given, option, positional, span};
use super::names::Names;
use goldenscript::{Command, Context, Runner};
use ringleader::kv::ring::Point;
use ringleader::machine::{Machine, Time};
use ringleader::view::View;
use ringleader::view::leader::{Effect, Input, Leader};
use ringleader::view::messages::{ViewReply, ViewRequest};
use ringleader::wire::Identity;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::net::Ipv4Addr;

/// One script's viewleader.
#[derive(Default)]
pub(crate) struct ViewleaderScript {
    now: Time,
    leader: Leader<u32>,
    requests: u32,
    names: Names,
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
            "restart" => {
                self.leader = Leader::default();
                Ok(String::new())
            }
            "groups" => {
                let view = self.view();
                self.names.learn(&view);
                Ok(self.names.view_lines(&view))
            }
            "raw" => {
                let [body] = exactly(command)?;
                self.ask(Ipv4Addr::LOCALHOST, body, as_json)
            }
            _ => {
                let request = self.request(command)?;
                let host = option(command, "host").unwrap_or("10.0.0.1").parse()?;
                self.ask(host, &request.to_string(), as_json)
            }
        }
    }
}

impl ViewleaderScript {
    /// The request that the command stands for.
    fn request(&mut self, command: &Command) -> Result<Value, Failure> {
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
                request
            }
            ("query_servers", []) => json!({"cmd": cmd}),
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
                let view = self.view();
                let groups = |key| -> Result<Vec<Value>, Failure> {
                    given(command, key).into_iter().map(|text| in_group(&view, text)).collect()
                };
                let (ready, established) = (groups("ready")?, groups("established")?);
                let requestor = identity(id);
                json!({"cmd": cmd, "requestor": requestor, "ready": ready, "established": established})
            }
            ("lock_get" | "lock_release", [lock, id]) => {
                json!({"cmd": cmd, "lockid": lock, "requestor": identity(id)})
            }
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

    /// Steps the machine. One line for each effect; what is not the answer to
    /// `asked` is shown with the number of the request that it answers.
    fn step(&mut self, input: Input<u32>, asked: Option<u32>, as_json: bool) -> String {
        let (mut effects, mut lines, mut answered) = (Vec::new(), String::new(), asked.is_none());
        self.leader.step(self.now, input, &mut effects);
        for effect in effects {
            let _ = match effect {
                Effect::Note(note) => writeln!(lines, "note: {note}"),
                Effect::Reply { to, reply } if Some(to) == asked => {
                    answered = true;
                    writeln!(lines, "{}", show(&reply, as_json))
                }
                Effect::Reply { to, reply } => {
                    writeln!(lines, "to request {to}: {}", show(&reply, as_json))
                }
            };
        }
        if let (Some(number), false) = (asked, answered) {
            let _ = writeln!(lines, "request {number} waits");
        }
        lines
    }

    /// The view, without letting time pass: asked for like by anybody.
    fn view(&mut self) -> View {
        let request = ViewRequest::QueryView(Default::default());
        let input = Input::Request { from: 0, host: Ipv4Addr::LOCALHOST, request };
        let mut effects = Vec::new();
        self.leader.step(self.now, input, &mut effects);
        let view = effects.into_iter().find_map(|effect| match effect {
            Effect::Reply { to: 0, reply: ViewReply::View(answer) } => Some(answer.view),
            _ => None,
        });
        view.map(|view| (*view).clone()).unwrap_or_default()
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
