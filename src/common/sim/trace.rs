//! The trace: every message and state change as one stable line.
//!
//! A line is written when a message is *sent*, such as
//! `s2 -> s3 prepare pear@7.1`; that it arrives shows in what it leads to. A
//! line that comes again within one command (heartbeats aside, much is repeated
//! until it is answered) is written once and marked `(repeated)`.

use super::names::Names;
use crate::kv::content::{Fence, Objection};
use crate::kv::messages::{Answer, InGroup, Op, Peer, Public, Request};
use crate::kv::{Entry, Version};
use std::collections::BTreeMap;

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// Clients and servers.
    Traffic,
    /// Members that come and go, and the machines' own notes.
    Members,
    /// The groups, as the viewleader changes them.
    Groups,
    /// Calls to the viewleader.
    ViewCalls,
    /// What viewleaders say to each other, and their notes.
    Viewleaders,
}

/// Collects lines.
#[derive(Debug, Default)]
pub struct Trace {
    /// Nothing is written when nobody reads it.
    pub is_on: bool,
    /// Whether to write about groups.
    pub with_groups: bool,
    /// Whether to write about calls to the viewleader.
    pub with_view_calls: bool,
    /// Whether to write about viewleaders among themselves.
    pub with_viewleaders: bool,
    lines: Vec<(String, bool)>,
    places: BTreeMap<String, usize>,
}

impl Trace {
    /// Writes a line. Returns whether it is news: not written before, whether
    /// or not it is shown.
    pub fn line(&mut self, about: About, line: String) {
        let shown = match about {
            About::Traffic | About::Members => true,
            About::Groups => self.with_groups,
            About::ViewCalls => self.with_view_calls,
            About::Viewleaders => self.with_viewleaders,
        };
        if !shown {
            return;
        }
        if let Some(place) = self.places.get(&line) {
            self.lines[*place].1 = true;
            return;
        }
        self.places.insert(line.clone(), self.lines.len());
        self.lines.push((line, false));
    }

    /// How many different lines there are.
    pub fn count(&self) -> usize {
        self.lines.len()
    }

    /// Takes all lines out.
    pub fn take(&mut self) -> String {
        self.places.clear();
        let lines = std::mem::take(&mut self.lines).into_iter();
        lines.map(|(line, again)| line + if again { " (repeated)\n" } else { "\n" }).collect()
    }
}

fn in_group(names: &Names, group: InGroup) -> String {
    format!("arc {}, {}", names.arc(group.start), group.version)
}

fn entries(names: &Names, entries: &[Entry]) -> String {
    entries.iter().map(|it| entry(names, it)).collect::<Vec<_>>().join(" ")
}

fn entry(names: &Names, entry: &Entry) -> String {
    let deleted = if entry.content.value.is_none() { "no " } else { "" };
    format!("{deleted}{}@{}", names.key(&entry.key), entry.version)
}

/// A request to a server in a few words.
pub fn request(names: &Names, request: &Request) -> String {
    let key = |key| names.key(key);
    match request {
        Request::Public(public) => match public {
            Public::Print(print) => format!("print {}", print.text.join(" ")),
            Public::Set(set) => format!("set {}={}", key(&set.key), set.val),
            Public::Get(get) => format!("get {}", key(&get.key)),
            Public::QueryAllKeys(_) => "query_all_keys".to_owned(),
            Public::SetrRequest(get) => format!("setr_request {}", key(&get.key)),
            Public::Setr(setr) if setr.direct => {
                let condition = condition(setr.if_version, setr.fence.as_ref());
                format!("setr {}={}{condition}", key(&setr.key), setr.val)
            }
            Public::Delr(delete) => {
                let condition = condition(delete.if_version, delete.fence.as_ref());
                format!("delr {}{condition}", key(&delete.key))
            }
            Public::Setr(setr) => format!("commit {}={}", key(&setr.key), setr.val),
            Public::SetrDeny(get) => format!("setr_deny {}", key(&get.key)),
            Public::Getr(get) => format!("getr {}", key(&get.key)),
            Public::Backup(place) => format!("backup from {}", place.from),
            Public::Load(load) => format!("load {}", entry(names, &load.entry)),
        },
        Request::Op(op) => match op {
            Op::PrimaryGet(get) => format!("get {}", key(&get.key)),
            Op::PrimarySet(write) => {
                let condition = condition(write.if_version, write.fence.as_ref());
                format!("set {}={}{condition}", key(&write.key), write.val)
            }
            Op::PrimaryDelete(delete) => {
                let condition = condition(delete.if_version, delete.fence.as_ref());
                format!("delete {}{condition}", key(&delete.key))
            }
            Op::PrimaryLoad(load) => format!("load {}", entry(names, &load.entry)),
            Op::PrimaryVote(vote) => {
                format!("vote on {} at {}", key(&vote.key), names.at(vote.via))
            }
            Op::PrimaryDeny(vote) => format!("deny {} at {}", key(&vote.key), names.at(vote.via)),
            Op::PrimaryCommit(commit) => {
                format!("commit {}={} at {}", key(&commit.key), commit.val, names.at(commit.via))
            }
        },
        Request::Peer(peer) => match peer {
            Peer::Establish(group) => format!("follow {}", in_group(names, *group)),
            Peer::Prepare(prepare) if prepare.entries.is_empty() => {
                let (arc, committed) = (names.arc(prepare.start), prepare.committed);
                format!("arc {arc} is committed up to {committed}")
            }
            Peer::Prepare(prepare) => format!("prepare {}", entries(names, &prepare.entries)),
            Peer::Fetch(fetch) => {
                let group = InGroup { start: fetch.start, version: fetch.version };
                let more = if fetch.after.is_some() { ", next page" } else { "" };
                let held = fetch.held.iter().map(|(k, version)| format!("{}@{version}", key(k)));
                match held.collect::<Vec<_>>().as_slice() {
                    [] => format!("fetch {}{more}", in_group(names, group)),
                    held => {
                        format!(
                            "fetch {}{more}, holding {}",
                            in_group(names, group),
                            held.join(" ")
                        )
                    }
                }
            }
        },
    }
}

fn condition(if_version: Option<Version>, fence: Option<&Fence>) -> String {
    let at = if_version.map(|version| format!(" if at {version}"));
    let under = fence.map(|fence| format!(" under {}:{}", fence.lock, fence.token));
    at.into_iter().chain(under).collect()
}

/// The answer to `asked` in a few words; `None` when it is not worth a line.
pub fn answer(names: &Names, asked: &Request, answer: &Answer) -> Option<String> {
    let key = match asked {
        Request::Op(op) => names.key(op.key()),
        _ => "",
    };
    Some(match answer {
        Answer::Value { version, value } => format!("value {key}={value}@{version}"),
        Answer::Absent {} => format!("absent {key}"),
        Answer::Done { version } => format!("done {key}@{version}"),
        Answer::Vote { ok, .. } => format!("{} to {}", yes(*ok), request(names, asked)),
        Answer::Refused(objection) => match objection {
            Objection::Conflict { version: Some(version) } => {
                format!("{key} is at {version}: {}", request(names, asked))
            }
            Objection::Conflict { version: None } => format!("no {key}: {}", request(names, asked)),
            Objection::Fenced { token } => {
                format!("{key} has seen {token}: {}", request(names, asked))
            }
            Objection::Burnt {} => format!("burnt: {}", request(names, asked)),
            Objection::TooManyFences {} => format!("too many fences: {}", request(names, asked)),
        },
        Answer::NoVote {} => format!("no vote for {}", request(names, asked)),
        Answer::NotPrimary {} => format!("not primary: {}", request(names, asked)),
        Answer::Restoring {} => format!("restoring: {}", request(names, asked)),
        Answer::NotLoading {} => format!("not loading: {}", request(names, asked)),
        Answer::Unknown {} => format!("unknown: {}", request(names, asked)),
        Answer::Behind {} => format!("behind: {}", request(names, asked)),
        Answer::Stale {} => format!("stale: {}", request(names, asked)),
        Answer::Follows { prepared } => {
            let what = request(names, asked).replacen("follow", "follows", 1);
            match prepared.as_slice() {
                [] => what,
                held => format!("{what}, holding {}", entries(names, held)),
            }
        }
        Answer::Prepared {} => match asked {
            Request::Peer(Peer::Prepare(prepare)) if prepare.entries.is_empty() => return None,
            Request::Peer(Peer::Prepare(prepare)) => {
                format!("prepared {}", entries(names, &prepare.entries))
            }
            _ => "prepared".to_owned(),
        },
        Answer::Full { server } => {
            let server = server.map(|server| names.at(server)).unwrap_or_default();
            format!("{server} is full: {}", request(names, asked))
        }
        Answer::Page { page, .. } => {
            let arc = match asked {
                Request::Peer(Peer::Fetch(fetch)) => names.arc(fetch.start),
                _ => String::new(),
            };
            let mut words = match page.entries.as_slice() {
                [] => format!("page of arc {arc}: nothing"),
                held => format!("page of arc {arc}: {}", entries(names, held)),
            };
            for key in &page.gone {
                words = format!("{words}, no {}", names.key(key));
            }
            if page.next.is_some() { words + " and more" } else { words }
        }
    })
}

fn yes(ok: bool) -> &'static str {
    if ok { "yes" } else { "no" }
}
