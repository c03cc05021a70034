//! A client's command as a machine.
//!
//! Most commands are one question and one answer. `setr`, `getr` and `delr` first ask
//! the viewleader who holds the key: one of ours answers with its view, and the
//! key's primary is asked next; an original one does not know that question, and
//! then the client votes and commits at the replicas itself, as the original's
//! client does. `lock_get` asks again every five seconds until it is granted.
//!
//! Some requests must not be sent twice. Before such a one, whoever is to get it
//! is first asked something harmless, so that "nobody is there" can be told from
//! "it may have been done". Requests about locks have a number each, by which our
//! viewleaders know one that comes again; an original's must not be sent twice.

use super::Text;
use super::messages::{Delete, Get, MAX_KEYS_PAGE, Print, Public, QueryAllKeys, Set, Setr};
use super::ring::{self, Point};
use crate::consensus::requests::{GroupCommand, GroupRequest, Kind, NotLeader, Whom as Seat};
use crate::view::messages::{
    Drain, LockCall, LockKeep, LockList, QueryView, ViewAnswer, ViewRequest,
};
use crate::view::{Dialect, View};
use crate::wire::{Reason, Refusal};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::VecDeque;
use std::net::SocketAddrV4;
use std::time::Duration;

/// How long a client waits before it asks for a lock again; the original's.
pub const LOCK_RETRY: Duration = Duration::from_secs(5);

/// How many times a client with a time to live asks in it.
const SIGNS: u32 = 3;

/// How soon what `command` asks for is asked for again: sooner than every 5 s if its place
/// among those who wait were lost by then, since nobody would have heard of it.
fn lock_retry(command: &Command) -> Duration {
    let ttl = match command {
        Command::LockGet(LockCall { ttl_ms: Some(ttl), .. }) => Duration::from_millis(*ttl),
        _ => return LOCK_RETRY,
    };
    LOCK_RETRY.min(ttl / SIGNS)
}

/// Such a time, for people.
fn in_seconds(time: Duration) -> String {
    let tenths = (time.as_secs_f64() * 10.0).round().max(1.0);
    format!("{} s", tenths / 10.0)
}

/// How many times in a row a waiting client finds nobody there before it gives
/// up.
const MAX_SILENCE: u32 = 12;

/// What a user can ask for.
#[derive(Clone, Debug)]
pub enum Command {
    /// Print words on a server's output.
    Print(Vec<String>),
    /// Set a key in one server's own namespace.
    Set(Text, Text),
    /// Get a key from one server.
    Get(Text),
    /// List the keys that one server holds.
    QueryAllKeys,
    /// Set a replicated key.
    Setr(Setr),
    /// Get a replicated key.
    Getr(Get),
    /// Delete a replicated key.
    Delr(Delete),
    /// List the servers.
    QueryServers,
    /// Get a lock, waiting for it if need be.
    LockGet(LockCall),
    /// Release a lock, or leave its queue.
    LockRelease(LockCall),
    /// Give a sign of life for a lock.
    LockKeep(LockKeep),
    /// List locks.
    LockList(LockList),
    /// The cluster at a glance.
    Status,
    /// How far the rebalancing is.
    RebalanceStatus,
    /// Let a server leave once its data is elsewhere.
    Drain(SocketAddrV4),
    /// Let a viewleader come into the group of viewleaders.
    ViewleaderAdd(SocketAddrV4),
    /// Let one leave it.
    ViewleaderRemove(SocketAddrV4),
}

impl Command {
    /// The replicated key that it is about.
    fn key(&self) -> Option<&Text> {
        match self {
            Self::Setr(setr) => Some(&setr.key),
            Self::Getr(get) => Some(&get.key),
            Self::Delr(delete) => Some(&delete.key),
            _ => None,
        }
    }

    /// What to say to a server of ours, if it is about a replicated key.
    pub fn replicated(&self) -> Option<Public> {
        match self.clone() {
            Self::Setr(setr) => Some(Public::Setr(Setr { direct: true, ..setr })),
            Self::Getr(get) => Some(Public::Getr(get)),
            Self::Delr(delete) => Some(Public::Delr(delete)),
            _ => None,
        }
    }

    /// Whether the original's servers know it.
    fn is_originals(&self) -> bool {
        match self {
            Self::Setr(setr) => setr.if_version.is_none() && setr.fence.is_none(),
            Self::Delr(_) => false,
            _ => true,
        }
    }
}

/// Who is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whom {
    /// The first of the servers that the user has named which answers without
    /// an error.
    AnyServer,
    /// Likewise the viewleader.
    Viewleader,
    /// This one and no other.
    At(SocketAddrV4),
}

/// A request to whoever it is for.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Question {
    /// To a server.
    Server(Public),
    /// To the viewleader.
    View(ViewRequest),
    /// To it, about its group.
    Group(GroupCommand),
}

/// What has happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// It begins.
    Begin,
    /// Somebody has answered.
    Answer {
        /// Who.
        from: SocketAddrV4,
        /// What; it can be a refusal.
        body: Vec<u8>,
    },
    /// Nobody has.
    Silence {
        /// Somebody may have carried out the request.
        sent: bool,
        /// Somebody has taken the request and closed the connection.
        closed: bool,
        /// What was tried, in words.
        why: String,
    },
    /// The time that was asked for has passed.
    Waited,
    /// The user wants to end.
    Interrupted,
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Ask, and come back with what came of it.
    Ask(Whom, Question),
    /// Tell the user this, wait, and come back.
    Wait(String, Duration),
    /// It is over.
    Done(Conclusion),
}

/// How a command has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conclusion {
    /// The reply, one line of JSON, if there is one.
    pub reply: Option<String>,
    /// What to tell the user beside it.
    pub message: Option<String>,
    /// In a word.
    pub verdict: Verdict,
}

/// How a command has ended, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Done.
    Done,
    /// The system says no.
    No,
    /// Nobody answered.
    Nobody,
    /// It may or may not have been done.
    Unknown,
    /// The user has ended it.
    Interrupted,
}

/// A command under way.
#[derive(Debug)]
pub struct Operation {
    command: Command,
    stage: Stage,
    /// Why the viewleader's help had to be done without.
    alone: Option<String>,
}

#[derive(Debug)]
enum Stage {
    /// One question, whose answer is the reply. `once` is one that must not be
    /// sent twice.
    Asking { once: bool },
    /// A harmless question before `Asking { once: true }`.
    Probing(Question),
    /// A question that only our viewleaders answer, before one that they know when
    /// it comes again.
    ProbingForOurs(Question),
    /// Pages of keys.
    Listing { keys: Vec<Value>, pages: bool },
    /// The view, from one of ours.
    Viewing,
    /// The list of servers, from an original.
    AskingForServers,
    /// Servers of ours, one after the other until one answers.
    AtServers(VecDeque<SocketAddrV4>),
    /// An original's replicas, one after the other until one answers.
    Reading(VecDeque<SocketAddrV4>),
    /// Votes of an original's replicas.
    Voting(Ballot),
    /// The end of the vote.
    Closing(Ballot, Closing),
    /// Waiting for a lock.
    Locking {
        /// Somebody has answered at least once.
        heard: bool,
        /// How many times in a row nobody has.
        silences: u32,
    },
    /// Leaving the queue of a lock.
    Leaving,
}

/// A vote at an original's replicas.
#[derive(Debug)]
struct Ballot {
    epoch: Value,
    replicas: Vec<SocketAddrV4>,
    /// The index of the replica that is being asked.
    at: usize,
    refusal: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    Commit { failed: bool },
    Deny,
}

impl Operation {
    /// A command that has not begun.
    pub fn new(command: Command) -> Self {
        Self { command, stage: Stage::Asking { once: false }, alone: None }
    }

    /// Takes what has happened and says what is next.
    pub fn step(&mut self, event: Event) -> Next {
        match event {
            Event::Begin => self.begin(),
            Event::Answer { from, body } => self.answered(from, &body),
            Event::Silence { sent, closed, why } => self.silence(sent, closed, why),
            Event::Waited => self.ask_for_lock(),
            Event::Interrupted => self.interrupted(),
        }
    }

    fn begin(&mut self) -> Next {
        match self.command.clone() {
            Command::Print(text) => self.ask_once(Public::Print(Print { text })),
            Command::Set(key, val) => self.ask_once(Public::Set(Set { key, val })),
            Command::Get(key) => {
                Next::Ask(Whom::AnyServer, Question::Server(Public::Get(Get { key })))
            }
            Command::QueryAllKeys => {
                self.stage = Stage::Listing { keys: Vec::new(), pages: false };
                Next::Ask(Whom::AnyServer, page_after(None))
            }
            Command::Setr(_) | Command::Getr(_) | Command::Delr(_) => {
                self.stage = Stage::Viewing;
                let query = ViewRequest::QueryView(QueryView::default());
                Next::Ask(Whom::Viewleader, Question::View(query))
            }
            Command::QueryServers => {
                Next::Ask(Whom::Viewleader, Question::View(ViewRequest::QueryServers {}))
            }
            Command::Status => Next::Ask(Whom::Viewleader, Question::View(ViewRequest::Status {})),
            Command::RebalanceStatus => {
                Next::Ask(Whom::Viewleader, Question::View(ViewRequest::RebalanceStatus {}))
            }
            // Asking twice is as good as asking once.
            Command::Drain(server) => {
                let request = ViewRequest::Drain(Drain { server });
                Next::Ask(Whom::Viewleader, Question::View(request))
            }
            Command::ViewleaderAdd(address) => {
                let request = GroupRequest::Add(Seat { address }).to(Kind::VIEWLEADER);
                Next::Ask(Whom::Viewleader, Question::Group(request))
            }
            Command::ViewleaderRemove(address) => {
                let request = GroupRequest::Remove(Seat { address }).to(Kind::VIEWLEADER);
                Next::Ask(Whom::Viewleader, Question::Group(request))
            }
            Command::LockGet(_) => self.ask_for_lock(),
            // Asking twice is as good as asking once.
            Command::LockKeep(keep) => {
                Next::Ask(Whom::Viewleader, Question::View(ViewRequest::LockKeep(keep)))
            }
            Command::LockList(list) => {
                Next::Ask(Whom::Viewleader, Question::View(ViewRequest::LockList(list)))
            }
            Command::LockRelease(call) => {
                let release = Question::View(ViewRequest::LockRelease(call));
                self.stage = Stage::ProbingForOurs(release);
                Next::Ask(Whom::Viewleader, Question::View(ViewRequest::Status {}))
            }
        }
    }

    /// Sends `request` to a server that has just shown that it is there.
    fn ask_once(&mut self, request: Public) -> Next {
        let probe = match &request {
            // Only one of ours knows `getr`: an original would take a `setr`
            // without a vote for a value of its own.
            Public::Setr(Setr { key, .. }) | Public::Delr(Delete { key, .. }) => {
                Public::Getr(Get { key: Text::clone(key) })
            }
            _ => Public::Get(Get { key: "".into() }),
        };
        self.stage = Stage::Probing(Question::Server(request));
        Next::Ask(Whom::AnyServer, Question::Server(probe))
    }

    fn ask_for_lock(&mut self) -> Next {
        let Command::LockGet(call) = &self.command else { return self.begin() };
        if !matches!(self.stage, Stage::Locking { .. }) {
            self.stage = Stage::Locking { heard: false, silences: 0 };
        }
        // Asking twice is as good as asking once.
        Next::Ask(Whom::Viewleader, Question::View(ViewRequest::LockGet(call.clone())))
    }

    fn interrupted(&mut self) -> Next {
        let Command::LockGet(call) = &self.command else {
            return Next::Done(Conclusion::without_reply(Verdict::Interrupted, "interrupted"));
        };
        let request = call.request.map(|number| number.wrapping_add(1));
        let leave = Question::View(ViewRequest::LockRelease(LockCall { request, ..call.clone() }));
        self.stage = Stage::Leaving;
        Next::Ask(Whom::Viewleader, leave)
    }

    fn answered(&mut self, from: SocketAddrV4, body: &[u8]) -> Next {
        let reply: Value = match serde_json::from_slice(body) {
            Ok(reply) => reply,
            Err(error) => {
                return self.silence(true, false, format!("{from} answers no JSON: {error}"));
            }
        };
        let is_error = reply.get("error").is_some();
        match &mut self.stage {
            Stage::Asking { .. } => Next::Done(Conclusion::of(&reply, body)),
            Stage::ProbingForOurs(question) if is_error => {
                self.stage = Stage::Probing(question.clone());
                Next::Ask(Whom::Viewleader, Question::View(ViewRequest::QueryServers {}))
            }
            Stage::ProbingForOurs(question) => {
                let question = question.clone();
                self.stage = Stage::Asking { once: true };
                Next::Ask(Whom::Viewleader, question)
            }
            // For one server's own affairs it is enough that it is there.
            Stage::Probing(_)
                if is_error && !matches!(self.command, Command::Print(_) | Command::Set(..)) =>
            {
                Next::Done(Conclusion::of(&reply, body))
            }
            Stage::Probing(question) => {
                let question = question.clone();
                self.stage = Stage::Asking { once: true };
                Next::Ask(Whom::At(from), question)
            }
            Stage::Listing { keys, pages } => {
                let more = reply["more"] == true;
                let last = reply["result"].as_array().and_then(|page| page.last()).cloned();
                match (more, last) {
                    (true, Some(Value::String(last))) => {
                        take_page(keys, reply);
                        *pages = true;
                        Next::Ask(Whom::At(from), page_after(Some(last.into())))
                    }
                    _ if *pages && reply["result"].is_array() => {
                        take_page(keys, reply);
                        let whole = serde_json::json!({ "result": std::mem::take(keys) });
                        Next::Done(Conclusion::of(&whole, whole.to_string().as_bytes()))
                    }
                    // No page: shown as it is.
                    _ if is_error || *pages => Next::Done(Conclusion::of(&reply, body)),
                    // All of them; what told of pages is of no use to the user.
                    _ => {
                        let whole = serde_json::json!({ "result": reply["result"] });
                        Next::Done(Conclusion::of(&whole, whole.to_string().as_bytes()))
                    }
                }
            }
            Stage::Viewing => match serde_json::from_slice::<ViewAnswer>(body) {
                Ok(answer) if answer.view.own_members().next().is_some() => {
                    self.ask_primary(&answer.view)
                }
                Ok(answer) => self.ask_originals(&answer.view),
                // One of ours, and none of its group leads: that is no original.
                Err(_) if serde_json::from_slice::<NotLeader>(body).is_ok() => {
                    self.silence(false, false, format!("{from} does not lead, nor does another"))
                }
                Err(_) => self.ask_for_servers(),
            },
            Stage::AskingForServers => match serde_json::from_slice::<Servers>(body) {
                Ok(servers) => {
                    let (addresses, hashes): (Vec<_>, Vec<_>) = servers.result.into_iter().unzip();
                    self.vote_or_read(servers.epoch, &addresses, &hashes)
                }
                Err(_) => Next::Done(Conclusion::of(&reply, body)),
            },
            Stage::AtServers(rest) if is_unavailable(&reply) && !rest.is_empty() => {
                self.next_server()
            }
            Stage::AtServers(_) => Next::Done(Conclusion::of(&reply, body)),
            Stage::Reading(_) if is_error => self.next_original(),
            Stage::Reading(_) => Next::Done(Conclusion::of(&reply, body)),
            Stage::Voting(ballot) => {
                if reply["reply"] != "ok" {
                    ballot.refuse("the key is already being set by another client");
                } else if reply["epoch"] != ballot.epoch {
                    ballot.refuse(&format!("{from} has the wrong epoch: the view is changing"));
                }
                self.next_vote()
            }
            Stage::Closing(..) => self.next_closing(is_error),
            Stage::Locking { heard, silences } => {
                (*heard, *silences) = (true, 0);
                if reply["status"] != "retry" {
                    return Next::Done(Conclusion::of(&reply, body));
                }
                if let Command::LockGet(LockCall { request: Some(number), .. }) = &mut self.command
                {
                    // To ask again is to ask anew.
                    *number = number.wrapping_add(1);
                }
                let ahead = reply["position"].as_u64();
                let has_waited =
                    matches!(self.command, Command::LockGet(LockCall { wait_ms: Some(_), .. }));
                if let Some(ahead) = ahead.filter(|_| has_waited) {
                    // It was answered because it was time, and goes on waiting at once.
                    let why = format!("waiting for the lock ({ahead} ahead)");
                    return Next::Wait(why, Duration::ZERO);
                }
                let ahead = ahead.map_or(String::new(), |ahead| format!(" ({ahead} ahead)"));
                let again = lock_retry(&self.command);
                let why =
                    format!("waiting for the lock{ahead}; asking again in {}", in_seconds(again));
                Next::Wait(why, again)
            }
            Stage::Leaving => {
                let message = "interrupted: the lock is not waited for any more";
                Next::Done(Conclusion::without_reply(Verdict::Interrupted, message))
            }
        }
    }

    fn silence(&mut self, sent: bool, closed: bool, why: String) -> Next {
        let why = match &self.alone {
            Some(first) => format!("{first}; and {why}"),
            None => why,
        };
        let conclusion = |verdict, message| Next::Done(Conclusion::without_reply(verdict, message));
        match &mut self.stage {
            Stage::Asking { once: true } if sent => {
                conclusion(Verdict::Unknown, &format!("{why}; it may or may not have been done"))
            }
            Stage::Asking { .. } | Stage::Probing(_) | Stage::Listing { .. } => {
                conclusion(Verdict::Nobody, &why)
            }
            // An original drops what it does not know.
            Stage::ProbingForOurs(question) if closed => {
                self.stage = Stage::Probing(question.clone());
                Next::Ask(Whom::Viewleader, Question::View(ViewRequest::QueryServers {}))
            }
            Stage::ProbingForOurs(_) => conclusion(Verdict::Nobody, &why),
            // One that only our servers know goes to them, if there are any.
            Stage::Viewing if closed && self.command.is_originals() => self.ask_for_servers(),
            Stage::Viewing | Stage::AskingForServers => {
                // Groups with a live primary serve without a viewleader.
                self.alone = Some(why.clone());
                match self.command.replicated() {
                    Some(request @ Public::Getr(_)) => {
                        self.stage = Stage::Asking { once: false };
                        Next::Ask(Whom::AnyServer, Question::Server(request))
                    }
                    Some(request) => self.ask_once(request),
                    None => conclusion(Verdict::Nobody, &why),
                }
            }
            Stage::AtServers(_) if sent && !matches!(self.command, Command::Getr(_)) => {
                conclusion(Verdict::Unknown, &format!("{why}; it may or may not have been done"))
            }
            Stage::AtServers(rest) if rest.is_empty() => conclusion(Verdict::Nobody, &why),
            Stage::AtServers(_) => self.next_server(),
            Stage::Reading(rest) if rest.is_empty() => conclusion(Verdict::Nobody, &why),
            Stage::Reading(_) => self.next_original(),
            Stage::Voting(ballot) => {
                ballot.refuse(&why);
                self.next_vote()
            }
            Stage::Closing(..) => self.next_closing(true),
            Stage::Locking { heard, silences } => {
                *silences += 1;
                if !*heard || *silences > MAX_SILENCE {
                    return conclusion(Verdict::Nobody, &why);
                }
                let again = lock_retry(&self.command);
                Next::Wait(format!("{why}; asking again in {}", in_seconds(again)), again)
            }
            Stage::Leaving => conclusion(
                Verdict::Interrupted,
                &format!("interrupted, and the queue could not be left: {why}"),
            ),
        }
    }

    /// Asks the key's primary; if it is not there, the other servers.
    fn ask_primary(&mut self, view: &View) -> Next {
        let Some(key) = self.command.key() else { return self.begin() };
        let primary = view.primary_of(Point::of(key));
        let own = view.own_members().map(|member| member.address);
        let others = own.filter(|address| Some(*address) != primary);
        self.stage = Stage::AtServers(primary.into_iter().chain(others).collect());
        self.next_server()
    }

    fn next_server(&mut self) -> Next {
        let Some(request) = self.command.replicated() else { return self.begin() };
        let Stage::AtServers(rest) = &mut self.stage else { return self.begin() };
        match rest.pop_front() {
            Some(server) => Next::Ask(Whom::At(server), Question::Server(request)),
            None => Next::Done(Conclusion::without_reply(Verdict::Nobody, "there are no servers")),
        }
    }

    fn ask_for_servers(&mut self) -> Next {
        self.stage = Stage::AskingForServers;
        Next::Ask(Whom::Viewleader, Question::View(ViewRequest::QueryServers {}))
    }

    /// A viewleader of ours with servers of the original only.
    fn ask_originals(&mut self, view: &View) -> Next {
        let members = view.members.iter().filter(|member| member.dialect == Dialect::Original);
        let (addresses, hashes): (Vec<_>, Vec<_>) =
            members.map(|member| (member.address, member.hash)).unzip();
        self.vote_or_read(Value::from(view.epoch.0), &addresses, &hashes)
    }

    fn vote_or_read(&mut self, epoch: Value, addresses: &[SocketAddrV4], hashes: &[Point]) -> Next {
        if addresses.is_empty() {
            let message = "the viewleader knows no servers: start one";
            return Next::Done(Conclusion::without_reply(Verdict::Nobody, message));
        }
        if !self.command.is_originals() {
            let message = "these servers are the original's: they know no deletions, versions \
                           or fences";
            return Next::Done(Conclusion::without_reply(Verdict::No, message));
        }
        let Some(key) = self.command.key() else { return self.begin() };
        let target = ring::target_of(Point::of(key), hashes);
        let replicas: Vec<_> = target.into_iter().map(|index| addresses[index]).collect();
        if matches!(self.command, Command::Getr(_)) {
            self.stage = Stage::Reading(replicas.into());
            return self.next_original();
        }
        self.stage = Stage::Voting(Ballot { epoch, replicas, at: 0, refusal: None });
        self.ask_voter()
    }

    fn next_original(&mut self) -> Next {
        let Command::Getr(get) = self.command.clone() else { return self.begin() };
        let Stage::Reading(rest) = &mut self.stage else { return self.begin() };
        match rest.pop_front() {
            Some(server) => Next::Ask(Whom::At(server), Question::Server(Public::Get(get))),
            None => {
                let message = "no replica of the key answers";
                Next::Done(Conclusion::without_reply(Verdict::Nobody, message))
            }
        }
    }

    /// Asks the replica whose turn it is for its vote, or tells it how the vote
    /// has ended.
    fn ask_voter(&mut self) -> Next {
        let Command::Setr(setr) = self.command.clone() else { return self.begin() };
        let key = Text::clone(&setr.key);
        let (ballot, request) = match &self.stage {
            Stage::Voting(ballot) => (ballot, Public::SetrRequest(Get { key })),
            Stage::Closing(ballot, Closing::Commit { .. }) => {
                (ballot, Public::Setr(Setr { direct: false, ..setr }))
            }
            Stage::Closing(ballot, Closing::Deny) => (ballot, Public::SetrDeny(Get { key })),
            _ => return self.begin(),
        };
        Next::Ask(Whom::At(ballot.replicas[ballot.at]), Question::Server(request))
    }

    fn next_vote(&mut self) -> Next {
        if let Stage::Voting(ballot) = &mut self.stage {
            ballot.at += 1;
            if ballot.at == ballot.replicas.len() {
                ballot.at = 0;
                let closing = match ballot.refusal {
                    None => Closing::Commit { failed: false },
                    Some(_) => Closing::Deny,
                };
                let Stage::Voting(ballot) =
                    std::mem::replace(&mut self.stage, Stage::Asking { once: false })
                else {
                    return self.begin();
                };
                self.stage = Stage::Closing(ballot, closing);
            }
        }
        self.ask_voter()
    }

    fn next_closing(&mut self, has_failed: bool) -> Next {
        let Stage::Closing(ballot, closing) = &mut self.stage else { return self.begin() };
        ballot.at += 1;
        if let Closing::Commit { failed } = closing {
            *failed |= has_failed;
        }
        if ballot.at < ballot.replicas.len() {
            return self.ask_voter();
        }
        let reply = match (closing, ballot.refusal.take()) {
            (Closing::Commit { failed: false }, _) => serde_json::json!({ "status": "ok" }),
            (Closing::Commit { failed: true }, _) => refusal_reply(Refusal::unknown_outcome(
                "not every replica has taken the commit: read the key to find out",
            )),
            (Closing::Deny, why) => refusal_reply(Refusal::unavailable(why.unwrap_or_default())),
        };
        Next::Done(Conclusion::of(&reply, reply.to_string().as_bytes()))
    }
}

/// The original's answer to `query_servers`.
#[derive(Deserialize)]
struct Servers {
    result: Vec<(SocketAddrV4, Point)>,
    epoch: Value,
}

impl Ballot {
    fn refuse(&mut self, why: &str) {
        self.refusal.get_or_insert_with(|| why.to_owned());
    }
}

fn page_after(after: Option<Text>) -> Question {
    let limit = Some(MAX_KEYS_PAGE);
    Question::Server(Public::QueryAllKeys(QueryAllKeys { after, limit }))
}

fn take_page(keys: &mut Vec<Value>, mut reply: Value) {
    if let Some(page) = reply.get_mut("result").and_then(Value::as_array_mut) {
        keys.append(page);
    }
}

fn is_unavailable(reply: &Value) -> bool {
    serde_json::from_value::<Refusal>(reply.clone())
        .is_ok_and(|refusal| refusal.reason == Reason::Unavailable)
}

fn refusal_reply(refusal: Refusal) -> Value {
    serde_json::json!(refusal)
}

impl Conclusion {
    fn without_reply(verdict: Verdict, message: &str) -> Self {
        Self { reply: None, message: Some(message.to_owned()), verdict }
    }

    /// The end that `reply` brings; `body` is how it was written.
    fn of(reply: &Value, body: &[u8]) -> Self {
        // As it was written, unless that takes more than a line.
        let line = match std::str::from_utf8(body) {
            Ok(text) if !text.trim().contains('\n') => text.trim().to_owned(),
            _ => reply.to_string(),
        };
        let error = reply.get("error");
        let status = reply.get("status").and_then(Value::as_str);
        let verdict = match (error, status) {
            (Some(_), _) if reply["reason"] == "unknown_outcome" => Verdict::Unknown,
            (Some(_), _) | (None, Some("not_found" | "unknown" | "retry" | "deny")) => Verdict::No,
            _ => Verdict::Done,
        };
        let note = reply.get("note").and_then(Value::as_str);
        let message = error.map(|error| {
            let error = error.as_str().map_or(error.to_string(), str::to_owned);
            note.map_or(error.clone(), |note| format!("{error}: {note}"))
        });
        Self { reply: Some(line), message, verdict }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Identity;

    fn retry(ttl_ms: Option<u64>) -> Duration {
        let call = LockCall { ttl_ms, ..LockCall::new("door".to_owned(), Identity::text("me")) };
        lock_retry(&Command::LockGet(call))
    }

    #[test]
    fn who_waits_with_a_time_to_live_asks_again_before_that_is_over() {
        assert_eq!(retry(None), LOCK_RETRY);
        assert_eq!(retry(Some(60_000)), LOCK_RETRY);
        for ttl_ms in [300, 2_061, 3_687, 14_000] {
            assert!(retry(Some(ttl_ms)) * 2 < Duration::from_millis(ttl_ms));
        }
        assert_eq!(in_seconds(LOCK_RETRY), "5 s");
        assert_eq!(in_seconds(Duration::from_millis(687)), "0.7 s");
    }
}
