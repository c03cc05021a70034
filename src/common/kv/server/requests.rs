//! What clients ask, and what is passed on for them.

use super::{
    CallError, CallId, Effect, Effects, Following, MAX_OPS, OpId, Operation, PATIENCE, Purpose,
    RETRY, Server, Stage, Style,
};
use crate::kv::content::{Content, Fence, Fences, MAX_FENCES, Objection};
use crate::kv::marks::Ruling;
use crate::kv::messages::{
    Answer, Commit, Delete, Get, Load, MAX_KEYS_PAGE, Op, Public, QueryAllKeys, Reply, Request,
    Set, Setr, Vote, Write,
};
use crate::kv::ring::Point;
use crate::kv::table::Versioned;
use crate::kv::{MAX_BATCH_BYTES, Text, Version};
use crate::machine::Time;
use crate::wire::Refusal;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::Duration;

/// How long a server remembers that it gave its vote to an original client, so
/// that a late commit is not taken for a write of its own.
const VOTE_MEMORY: Duration = Duration::from_secs(60);

/// How many such votes it remembers.
const MAX_VOTES: usize = 100_000;

/// What a write depends on.
#[derive(Clone, Copy, Debug, Default)]
struct Condition<'a> {
    if_version: Option<Version>,
    fence: Option<&'a Fence>,
    exists: bool,
}

/// What trying an operation here and now leads to.
enum Attempt {
    /// This is the answer.
    Answer(Answer),
    /// It is a write, and it has begun.
    Writing,
    /// This server can't carry it out, at least not now.
    NotHere,
}

impl<T> Server<T> {
    /// Answers a client, or begins what it asks.
    pub(super) fn public(&mut self, now: Time, from: T, request: Public, out: &mut Effects<T>) {
        let status = |status| Reply::Status { status, version: None };
        let is_original = matches!(self.following, Following::Original(_));
        let via = self.settings.address;
        let reply = match request {
            Public::Print(print) => {
                out.push(Effect::Print(print.text.join(" ")));
                status("ok")
            }
            Public::Set(Set { key, val }) => {
                self.local.insert((Point::of(&key), key), val);
                status("ok")
            }
            Public::Get(get) => match self.own_value(&get.key) {
                Some(reply) => reply,
                None if is_original => status("not_found"),
                None => return self.begin(now, from, Style::Get, Op::PrimaryGet(get), out),
            },
            Public::QueryAllKeys(query) => self.keys(query),
            request if is_original => self.public_under_original(now, request),
            Public::Getr(get) => {
                return self.begin(now, from, Style::Own, Op::PrimaryGet(get), out);
            }
            Public::Setr(Setr { key, val, direct, if_version, fence }) => {
                let is_commit = !direct && self.voted.get(&key).is_some_and(|until| *until > now);
                let (style, op) = if is_commit {
                    (Style::Original, Op::PrimaryCommit(Commit { key, val, via }))
                } else {
                    (Style::Own, Op::PrimarySet(Write { key, val, if_version, fence }))
                };
                return self.begin(now, from, style, op, out);
            }
            Public::Delr(delete) => {
                return self.begin(now, from, Style::Own, Op::PrimaryDelete(delete), out);
            }
            Public::Backup(place) => self.backup(now, &place),
            Public::Load(load) => {
                return self.begin(now, from, Style::Own, Op::PrimaryLoad(load), out);
            }
            Public::SetrRequest(Get { key }) => {
                let op = Op::PrimaryVote(Vote { key, via });
                return self.begin(now, from, Style::Original, op, out);
            }
            Public::SetrDeny(Get { key }) => {
                let op = Op::PrimaryDeny(Vote { key, via });
                return self.begin(now, from, Style::Original, op, out);
            }
        };
        out.push(Effect::Reply { to: from, reply });
    }

    /// The answer to a read that this server can give as it stands, without a step:
    /// many can be given at the same time.
    pub fn answer_now(&self, now: Time, request: &Request) -> Option<Reply> {
        let (get, style) = match request {
            Request::Public(Public::Get(get)) => (get, Style::Get),
            Request::Public(Public::Getr(get)) => (get, Style::Own),
            _ => return None,
        };
        if let (Style::Get, Some(reply)) = (style, self.own_value(&get.key)) {
            return Some(reply);
        }
        if matches!(self.following, Following::Original(_)) {
            return None;
        }
        found(self.read(now, &get.key)?, style).ok()
    }

    /// The value of `key` in this server's own namespace.
    fn own_value(&self, key: &Text) -> Option<Reply> {
        if self.local.is_empty() {
            return None;
        }
        let value = self.local.get(&(Point::of(key), Text::clone(key)))?;
        Some(Reply::Value { status: "ok", value: Text::clone(value), version: None })
    }

    /// Under an original viewleader there are no groups: each server keeps what
    /// the client commits to it, as the original's do.
    fn public_under_original(&mut self, now: Time, request: Public) -> Reply {
        let via = self.settings.address;
        match request {
            Public::SetrRequest(Get { key }) => {
                if self.marks.vote(now, &key, via) {
                    Reply::Voted { reply: "ok", epoch: self.epoch() }
                } else {
                    Reply::VoteRefused { reply: "no" }
                }
            }
            Public::Setr(Setr { key, val, direct: false, if_version: None, fence: None }) => {
                self.marks.deny(now, &key, via);
                self.local.insert((Point::of(&key), key), val);
                Reply::Empty {}
            }
            Public::SetrDeny(Get { key }) => {
                self.marks.deny(now, &key, via);
                Reply::Empty {}
            }
            _ => Reply::Refused(Refusal::unavailable(
                "this server follows an original viewleader, which keeps no groups: vote and \
                 commit at every replica instead",
            )),
        }
    }

    /// The keys that this server holds, its own and the replicated, once each.
    fn keys(&self, query: QueryAllKeys) -> Reply {
        let is_page = query.after.is_some() || query.limit.is_some();
        let limit = match query.limit {
            Some(limit) => limit.min(MAX_KEYS_PAGE),
            None if is_page => MAX_KEYS_PAGE,
            None => usize::MAX,
        };
        let after = query.after.as_ref().map(|key| (Point::of(key), key));
        let behind = match after {
            Some((point, key)) => Bound::Excluded((point, Text::clone(key))),
            None => Bound::Unbounded,
        };
        let own = self.local.range((behind, Bound::Unbounded));
        let mut own = own.map(|((point, key), _)| (*point, key)).peekable();
        let shared = self.table.keys_after(after.map(|(point, key)| (point, &**key)));
        let mut shared = shared.peekable();
        let (mut result, mut bytes) = (Vec::new(), 0);
        let next = std::iter::from_fn(|| match (own.peek(), shared.peek()) {
            (Some(ours), Some(theirs)) if ours == theirs => {
                own.next();
                shared.next()
            }
            (Some(ours), Some(theirs)) if ours > theirs => shared.next(),
            (Some(_), _) => own.next(),
            (None, _) => shared.next(),
        });
        let mut more = false;
        for (_, key) in next {
            if result.len() >= limit || is_page && bytes >= MAX_BATCH_BYTES {
                more = true;
                break;
            }
            bytes += key.len();
            result.push(Text::clone(key));
        }
        Reply::Keys { result, more: is_page.then_some(more) }
    }

    /// Carries out `op` for `from`: at once if that is possible.
    pub(super) fn begin(&mut self, now: Time, from: T, style: Style, op: Op, out: &mut Effects<T>) {
        if let Op::PrimaryGet(get) = &op
            && let Some(answer) = self.read(now, &get.key)
        {
            return self.answer(now, from, style, &op, answer, out);
        }
        if self.operations.len() >= MAX_OPS {
            let refusal = Refusal::unavailable(format!(
                "{MAX_OPS} operations are under way at this server: try again later"
            ));
            return out.push(Effect::Reply { to: from, reply: Reply::Refused(refusal) });
        }
        self.last_op.0 += 1;
        let (id, deadline) = (self.last_op, now + PATIENCE);
        let operation = Operation { from, style, op, stage: Stage::Parked, deadline };
        self.operations.insert(id, operation);
        self.attempt(now, id, out);
    }

    /// The answer to a read, if this server is the one to give it now.
    fn read(&self, now: Time, key: &Text) -> Option<Answer> {
        let point = Point::of(key);
        let serves = self.replica_at(point)?.is_serving() && self.has_lease(now);
        (serves && self.view.restoring.is_none()).then(|| match self.table.get(point, key) {
            Some(Versioned { version, content: Content { value: Some(value), .. } }) => {
                Answer::Value { version: *version, value: Text::clone(value) }
            }
            Some(_) | None => Answer::Absent {},
        })
    }

    /// Tries the operation `id`: here, else at the primary, else later.
    fn attempt(&mut self, now: Time, id: OpId, out: &mut Effects<T>) {
        let Some(operation) = self.operations.get(&id) else { return };
        let (op, style) = (operation.op.clone(), operation.style);
        let point = Point::of(op.key());
        let stage = match self.attempt_here(now, id, point, &op, out) {
            Attempt::Answer(answer) => return self.end(now, id, answer, out),
            Attempt::Writing => Stage::Writing,
            // Whoever passed it on decides where to try next.
            Attempt::NotHere if style == Style::Server => {
                return self.end(now, id, Answer::NotPrimary {}, out);
            }
            Attempt::NotHere => {
                if let Some(refusal) = self.refusal_if_hopeless(point) {
                    return self.refuse(id, refusal, out);
                }
                match self
                    .view
                    .primary_of(point)
                    .filter(|primary| *primary != self.settings.address)
                {
                    None => Stage::Parked,
                    Some(primary) => {
                        let purpose = Purpose::Operation(id);
                        let call = self.call(primary, Request::Op(op), purpose, out);
                        Stage::Forwarded { call, primary }
                    }
                }
            }
        };
        // A write to a group of one is over already.
        if let Some(operation) = self.operations.get_mut(&id) {
            operation.stage = stage;
            if matches!(operation.stage, Stage::Parked) {
                self.parked.insert(id);
            }
        }
    }

    fn attempt_here(
        &mut self,
        now: Time,
        id: OpId,
        point: Point,
        op: &Op,
        out: &mut Effects<T>,
    ) -> Attempt {
        let serves = self.replica_at(point).is_some_and(|replica| replica.is_serving());
        if !serves || !self.has_lease(now) {
            return Attempt::NotHere;
        }
        if let Some(answer) = self.refusal_while_restoring(op) {
            return Attempt::Answer(answer);
        }
        if op.is_write()
            && let Some(server) = self.full_disk(point)
        {
            return Attempt::Answer(Answer::Full { server: Some(server) });
        }
        if op.is_write() && !self.has_place(point) {
            return Attempt::NotHere;
        }
        let (key, value, condition) = match op {
            Op::PrimaryGet(get) => {
                return self.read(now, &get.key).map_or(Attempt::NotHere, Attempt::Answer);
            }
            Op::PrimaryVote(vote) => {
                let ok = self.marks.vote(now, &vote.key, vote.via);
                return Attempt::Answer(Answer::Vote { ok, epoch: self.view.epoch });
            }
            Op::PrimaryDeny(vote) => {
                let ok = self.marks.deny(now, &vote.key, vote.via);
                return Attempt::Answer(Answer::Vote { ok, epoch: self.view.epoch });
            }
            Op::PrimaryCommit(commit) => {
                match self.marks.commit(now, &commit.key, commit.via, &commit.val) {
                    Ruling::Write => {}
                    Ruling::Wait => return Attempt::NotHere,
                    Ruling::Written(version) => return Attempt::Answer(Answer::Done { version }),
                    Ruling::NoVote => return Attempt::Answer(Answer::NoVote {}),
                }
                (&commit.key, Some(&commit.val), Condition::default())
            }
            Op::PrimarySet(Write { key, val, if_version, fence }) => {
                let fence = fence.as_ref();
                (key, Some(val), Condition { if_version: *if_version, fence, exists: false })
            }
            Op::PrimaryDelete(Delete { key, if_version, fence }) => {
                let fence = fence.as_ref();
                (key, None, Condition { if_version: *if_version, fence, exists: true })
            }
            Op::PrimaryLoad(Load { entry, .. }) => {
                self.write(now, (point, &entry.key), entry.content.clone(), id, out);
                return Attempt::Writing;
            }
        };
        let fences = match self.check(point, key, &condition) {
            Ok(fences) => fences,
            Err(attempt) => return attempt,
        };
        let content = Content { value: value.map(Text::clone), fences };
        self.write(now, (point, key), content, id, out);
        Attempt::Writing
    }

    /// What a key is to remember of locks after a write of it, if what the write
    /// depends on is so. It is so or not by the last write before it, committed or
    /// not: that one comes first, whatever becomes of it. But only what is committed
    /// may be told.
    fn check(&self, point: Point, key: &str, condition: &Condition<'_>) -> Result<Fences, Attempt> {
        let (newest, is_committed) = self.table.newest(point, key);
        let fences = newest.map(|held| held.content.fences.clone()).unwrap_or_default();
        let version = newest.filter(|held| held.value().is_some()).map(|held| held.version);
        let object = |objection| Err(Attempt::Answer(Answer::Refused(objection)));
        if let Some(fence) = condition.fence
            && !self.view.burnt.is_none()
            && fence.token <= self.view.burnt
        {
            return object(Objection::Burnt {});
        }
        // A newer token was granted, whatever becomes of the write that brought it.
        if let Some(fence) = condition.fence
            && let Some(token) = fences.newest(&fence.lock).filter(|seen| *seen > fence.token)
        {
            return object(Objection::Fenced { token });
        }
        let is_there = condition.if_version.is_none_or(|at| at == version.unwrap_or_default());
        let exists = version.is_some() || !condition.exists;
        match (is_there, exists) {
            (true, true) => {}
            _ if !is_committed => return Err(Attempt::NotHere),
            (false, _) => return object(Objection::Conflict { version }),
            (true, false) => return Err(Attempt::Answer(Answer::Absent {})),
        }
        let Some(fence) = condition.fence else { return Ok(fences) };
        fences.with(fence).map_or_else(|| object(Objection::TooManyFences {}), Ok)
    }

    /// Why it is no use to wait for somebody who serves `point`, if it is none.
    fn refusal_if_hopeless(&self, point: Point) -> Option<Refusal> {
        let Some(index) = self.view.group_at(point) else {
            return Some(Refusal::unavailable(
                "this server has not joined a cluster yet: is the viewleader there?",
            ));
        };
        let group = &self.view.groups[index];
        group.is_lost().then(|| {
            let held: Vec<String> =
                group.held_by.iter().map(|holder| holder.address.to_string()).collect();
            Refusal::unavailable(format!(
                "the arc {} is lost: no server with its data is there; it was held last by {}",
                self.view.arc(index),
                held.join(", ")
            ))
        })
    }

    /// Tries again what is parked.
    pub(super) fn retry_parked(&mut self, now: Time, out: &mut Effects<T>) {
        for id in std::mem::take(&mut self.parked) {
            self.attempt(now, id, out);
        }
    }

    /// A read that waits for a server which is not the primary any more is asked
    /// of the new one: reading twice does no harm.
    pub(super) fn refer_reads(&mut self, now: Time, out: &mut Effects<T>) {
        let referred = |operation: &Operation<T>| match (&operation.stage, &operation.op) {
            (Stage::Forwarded { primary, .. }, Op::PrimaryGet(get)) => {
                self.view.primary_of(Point::of(&get.key)) != Some(*primary)
            }
            _ => false,
        };
        let ids = self.operations.iter().filter(|(_, operation)| referred(operation));
        for id in ids.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.attempt(now, id, out);
        }
    }

    /// The server that an operation was passed on to has answered, or not.
    pub(super) fn operation_answered(
        &mut self,
        now: Time,
        id: OpId,
        call: CallId,
        result: Result<Answer, CallError>,
        out: &mut Effects<T>,
    ) {
        let Some(operation) = self.operations.get_mut(&id) else { return };
        match operation.stage {
            Stage::Forwarded { call: current, .. } if current == call => {}
            _ => return,
        }
        match (result, &operation.op) {
            (Ok(Answer::NotPrimary {}) | Err(CallError::NotSent), _)
            | (Err(CallError::Lost), Op::PrimaryGet(_) | Op::PrimaryDeny(_)) => {
                operation.stage = Stage::Parked;
                self.parked.insert(id);
                self.retry_at = self.retry_at.min(now + RETRY);
            }
            (Err(CallError::Lost), Op::PrimaryVote(_)) => {
                let epoch = self.view.epoch;
                self.end(now, id, Answer::Vote { ok: false, epoch }, out);
            }
            (Err(CallError::Lost), _) => self.end(now, id, Answer::Unknown {}, out),
            (Ok(answer), _) => self.end(now, id, answer, out),
        }
    }

    /// The write that the operation `id` asked for is committed.
    pub(super) fn end_written(
        &mut self,
        id: OpId,
        key: &Text,
        version: Version,
        out: &mut Effects<T>,
    ) {
        // Another write of the key is not what its mark waits for.
        let is_commit = |operation: &Operation<T>| matches!(operation.op, Op::PrimaryCommit(_));
        if self.operations.get(&id).is_some_and(is_commit) {
            self.marks.written(key, version);
        }
        self.end(Time::default(), id, Answer::Done { version }, out);
    }

    /// The write that `id`, if anything, asked for is out of this server's hands.
    pub(super) fn end_unknown(&mut self, id: Option<OpId>, out: &mut Effects<T>) {
        if let Some(id) = id {
            self.end(Time::default(), id, Answer::Unknown {}, out);
        }
    }

    /// Ends operations whose time is up. Their deadlines are in their order.
    pub(super) fn end_overdue(&mut self, now: Time, out: &mut Effects<T>) {
        while let Some((id, operation)) = self.operations.first_key_value() {
            if operation.deadline > now {
                return;
            }
            let (id, epoch) = (*id, self.view.epoch);
            let begun = !matches!(operation.stage, Stage::Parked);
            match &operation.op {
                Op::PrimaryVote(_) | Op::PrimaryDeny(_) => {
                    self.end(now, id, Answer::Vote { ok: false, epoch }, out);
                }
                op if op.is_write() && begun => self.end(now, id, Answer::Unknown {}, out),
                op => {
                    let refusal = self.refusal_of_overdue(Point::of(op.key()));
                    self.refuse(id, refusal, out);
                }
            }
        }
    }

    fn refusal_of_overdue(&self, point: Point) -> Refusal {
        let arc = self.view.group_at(point).map(|index| self.view.arc(index));
        let arc = arc.map_or("of the key".to_owned(), |arc| arc.to_string());
        let why = match self.view.primary_of(point) {
            Some(primary) => format!("the arc {arc} is not served by its primary {primary}"),
            None => format!("the arc {arc} has no primary"),
        };
        Refusal::unavailable(format!("{why}; tried for {} s: try again later", PATIENCE.as_secs()))
    }

    fn refuse(&mut self, id: OpId, refusal: Refusal, out: &mut Effects<T>) {
        self.parked.remove(&id);
        let Some(operation) = self.operations.remove(&id) else { return };
        let to = operation.from;
        out.push(match operation.op {
            // An original client takes any answer to its commit for success.
            Op::PrimaryCommit(_) => Effect::Close { to },
            _ => Effect::Reply { to, reply: Reply::Refused(refusal) },
        });
    }

    fn end(&mut self, now: Time, id: OpId, answer: Answer, out: &mut Effects<T>) {
        self.parked.remove(&id);
        if let Some(Operation { from, style, op, .. }) = self.operations.remove(&id) {
            self.answer(now, from, style, &op, answer, out);
        }
    }

    /// Tells `to` what became of its operation, in its style.
    fn answer(
        &mut self,
        now: Time,
        to: T,
        style: Style,
        op: &Op,
        answer: Answer,
        out: &mut Effects<T>,
    ) {
        let own = style == Style::Own;
        if style == Style::Server {
            return out.push(Effect::Reply { to, reply: Reply::Peer(answer) });
        }
        let answer = match found(answer, style) {
            Ok(reply) => return out.push(Effect::Reply { to, reply }),
            Err(other) => other,
        };
        let reply = match answer {
            Answer::Done { version } if own => {
                Reply::Status { status: "ok", version: Some(version) }
            }
            Answer::Done { .. } => {
                self.voted.remove(op.key());
                Reply::Empty {}
            }
            Answer::Vote { ok, epoch } => self.vote_reply(now, op, ok, epoch),
            Answer::Unknown {} if own => Reply::Refused(Refusal::unknown_outcome(
                "the write may or may not have been made, now or soon: read the key to find out",
            )),
            Answer::Restoring {} if own || style == Style::Get => {
                Reply::Refused(Refusal::unavailable(
                    "nothing was done: the cluster is being restored from a backup; try again \
                     when that is done",
                ))
            }
            Answer::NotLoading {} if own => Reply::Refused(Refusal::invalid(
                "nothing was written: the cluster is not being restored from that backup",
            )),
            Answer::Refused(objection) if own => Reply::Refused(refusal_of(op, &objection)),
            Answer::Full { server } if own => {
                let server = server.map_or_else(|| "a server".to_owned(), |it| it.to_string());
                Reply::Refused(Refusal::unavailable(format!(
                    "nothing was written: the disk of {server}, which holds the key, is full; \
                     make room there, or drain that server"
                )))
            }
            _ => return out.push(Effect::Close { to }),
        };
        out.push(Effect::Reply { to, reply });
    }

    fn vote_reply(&mut self, now: Time, op: &Op, ok: bool, epoch: crate::view::Epoch) -> Reply {
        match op {
            Op::PrimaryVote(vote) if ok => {
                remember_vote(&mut self.voted, now, &vote.key);
                Reply::Voted { reply: "ok", epoch }
            }
            Op::PrimaryVote(_) => Reply::VoteRefused { reply: "no" },
            op => {
                if ok {
                    self.voted.remove(op.key());
                }
                Reply::Empty {}
            }
        }
    }
}

/// Tells a client what a read has found; any other answer comes back.
fn found(answer: Answer, style: Style) -> Result<Reply, Answer> {
    match answer {
        Answer::Value { version, value } => {
            let version = (style == Style::Own).then_some(version);
            Ok(Reply::Value { status: "ok", value, version })
        }
        Answer::Absent {} => Ok(Reply::Status { status: "not_found", version: None }),
        other => Err(other),
    }
}

/// Tells a client why its write was not made.
fn refusal_of(op: &Op, objection: &Objection) -> Refusal {
    match objection {
        Objection::Conflict { version: Some(version) } => Refusal::conflict(format!(
            "nothing was written: the key is at version {version}; read it and try again"
        )),
        Objection::Conflict { version: None } => {
            Refusal::conflict("nothing was written: there is no such key")
        }
        Objection::Fenced { token } => {
            let fence = match op {
                Op::PrimarySet(write) => write.fence.as_ref(),
                Op::PrimaryDelete(delete) => delete.fence.as_ref(),
                _ => None,
            };
            let lock = fence.map_or("", |fence| &*fence.lock);
            Refusal::fenced(format!(
                "nothing was written: a later holder of the lock {lock:?} has written the key, with \
                 token {token}; this one's lock is lost: get it again"
            ))
        }
        Objection::Burnt {} => Refusal::fenced(
            "nothing was written: the token is from before the cluster was restored from a \
             backup; get the lock again",
        ),
        Objection::TooManyFences {} => Refusal::invalid(format!(
            "the key remembers the tokens of {MAX_FENCES} locks already, the most that it can: \
             use one of them, or another key"
        )),
    }
}

fn remember_vote(voted: &mut BTreeMap<Text, Time>, now: Time, key: &Text) {
    if voted.len() >= MAX_VOTES {
        voted.retain(|_, until| *until > now);
    }
    voted.insert(Text::clone(key), now + VOTE_MEMORY);
}
