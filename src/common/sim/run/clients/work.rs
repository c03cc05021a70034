//! What clients do all day, and what is written down of it.

use super::super::{Failure, Judgement, NEVER, Run, outcome_of_read, version_of};
use super::shell::TIMEOUT;
use super::{Job, State, Step, Task, Trade};
use crate::kv::Text;
use crate::kv::content::Fence;
use crate::kv::messages::{Delete, Get, Setr};
use crate::kv::operation::{self, Command, Conclusion, Event, Verdict};
use crate::kv::ring::Point;
use crate::machine::Time;
use crate::sim::linearizability::{Call, Operation, Outcome};
use crate::view::Revision;
use rand::RngExt;
use serde_json::Value;
use std::time::Duration;

/// How long a program that asks any server waits: longer than that tries.
const PATIENCE: Duration = Duration::from_secs(15);

/// A message that has not arrived after so long never will: later than any pause and
/// any delay.
const LATEST: Duration = Duration::from_secs(16);

/// The same once everything is well: what is late and comes twice takes 8 s.
const LATEST_OF_THE_WELL: Duration = Duration::from_secs(10);

impl Run {
    /// Gives clients their answers, and lets those begin something who have nothing
    /// to do.
    pub(in crate::sim::run) fn serve_clients(&mut self) -> Judgement {
        let answers = self.cluster.answers();
        let now = self.cluster.now();
        if answers.is_empty() && self.clients.due > now {
            return Ok(());
        }
        for (rpc, answered) in answers {
            if let Some((client, event)) = self.walked(rpc, answered) {
                self.go_on(client, event)?;
            }
            if let Some(Err(what)) = self.clients.told_to_wait.take() {
                return self.fails("locks", what);
            }
        }
        for client in 0..self.clients.all.len() {
            if self.clients.all[client].due() > now {
                continue;
            }
            match &mut self.clients.all[client].state {
                State::Idle { then, .. } => {
                    let job = then.take();
                    let job = job.unwrap_or_else(|| self.next_job(client));
                    self.begin(client, job)?;
                }
                State::Busy(task) if matches!(task.step, Step::Glancing { .. }) => {
                    self.walk_again(client);
                }
                State::Busy(task) => {
                    let is_impatient = self.rng.random_bool(0.05);
                    if let (true, Job::Lock(wish)) = (is_impatient, &task.job) {
                        self.locks.leaves(&wish.lock, &wish.who);
                    }
                    let event = if is_impatient { Event::Interrupted } else { Event::Waited };
                    self.go_on(client, event)?;
                }
            }
        }
        self.clients.due = self.clients.all.iter().map(super::Client::due).min().unwrap_or(NEVER);
        Ok(())
    }

    /// The operator is to have the viewleader at `site` added, or removed.
    pub(in crate::sim::run) fn wish_for_viewleader(&mut self, site: usize, add: bool) {
        let job = Job::Reshape { site, add, late: false };
        let operator = self.clients.all.iter().rposition(|it| it.trade == Trade::Operator);
        let Some(operator) = operator else { return };
        match &mut self.clients.all[operator].state {
            State::Idle { next, then: then @ None } => {
                (*next, *then) = (self.cluster.now(), Some(job));
                self.clients.due = self.cluster.now();
            }
            _ => self.clients.wishes.push_back(job),
        }
    }

    /// Asks all viewleaders again.
    fn walk_again(&mut self, client: usize) {
        let idle = State::Idle { next: NEVER, then: None };
        let mut state = std::mem::replace(&mut self.clients.all[client].state, idle);
        if let State::Busy(task) = &mut state {
            let now = Step::Waiting { until: self.cluster.now() };
            if let Step::Glancing { mut walk, .. } = std::mem::replace(&mut task.step, now) {
                task.step = Step::Asking { rpc: self.walk_anew(client, &mut walk), walk };
            }
        }
        self.clients.all[client].state = state;
    }

    fn next_job(&mut self, client: usize) -> Job {
        let key = Text::clone(&self.keys[self.rng.random_range(0..self.keys.len())]);
        match self.clients.all[client].trade {
            Trade::Reader => Job::Ask { key, call: Call::Read },
            Trade::Original => Job::Ask { key, call: Call::Write { value: self.value(client) } },
            Trade::Writer => self.next_write(client, key),
            Trade::Operator | Trade::Witness => unreachable!("they do what they are told"),
            Trade::Locker => Job::Lock(self.wish_for_lock(client)),
        }
    }

    /// A value that nobody has written yet.
    pub(super) fn value(&mut self, client: usize) -> Text {
        let (size, number) = (self.options.value_bytes, self.clients.all[client].jobs);
        format!("{client}-{number}:{:.<size$}", "").into()
    }

    /// Writes, deletes, or changes what it was told of last, if that is still so; and
    /// looks now and then, to know of something.
    fn next_write(&mut self, client: usize, key: Text) -> Job {
        let value = self.value(client);
        let percent = self.rng.random_range(0..100);
        if self.rng.random_range(0..100) < self.options.deletions {
            return Job::Ask { key, call: Call::Delete };
        }
        if percent >= self.options.conditions {
            return Job::Ask { key, call: Call::Write { value } };
        }
        match self.clients.all[client].known.take() {
            Some((key, expected)) => {
                Job::Ask { key, call: Call::CompareAndSet { expected, value } }
            }
            None => Job::Ask { key, call: Call::Read },
        }
    }

    pub(super) fn begin(&mut self, client: usize, job: Job) -> Judgement {
        let command = match &job {
            Job::Hold => return self.hold(client),
            Job::Ask { key, call } => self.command_of(key, call),
            Job::Reshape { site, add, .. } => {
                let address = self.cluster.viewleader_address(*site);
                let command = if *add { Command::ViewleaderAdd } else { Command::ViewleaderRemove };
                command(address)
            }
            Job::Lock(wish) => {
                self.locks.asks(self.cluster.now(), wish.claim());
                Command::LockGet(wish.call())
            }
            Job::Keep => match &self.clients.all[client].held {
                Some(held) => Command::LockKeep(held.sign_of_life()),
                None => return Ok(()),
            },
            Job::Unlock { wish, .. } => {
                self.locks.leaves(&wish.lock, &wish.who);
                Command::LockRelease(wish.release())
            }
        };
        let who = &mut self.clients.all[client];
        who.jobs += 1;
        let is_original = who.trade == Trade::Original;
        let is_program = who.is_program;
        let (began, now) = (self.tell_moment(), self.cluster.now());
        let question = command.replicated().filter(|_| !is_program);
        let mut task = Task {
            program: is_program.then(|| operation::Operation::new(command)),
            is_original,
            commits: 0,
            group: self.group_of(&job),
            was_silent: false,
            began,
            asked_at: now,
            deadline: now + TIMEOUT,
            step: Step::Waiting { until: NEVER },
            job,
        };
        let Some(question) = question else {
            let conclusion = self.drive(client, &mut task, Event::Begin);
            return self.keep_or_conclude(client, task, conclusion);
        };
        let question = serde_json::to_string(&question).expect("questions can be written");
        let servers = self.named_servers().into_iter().take(1).collect();
        let walk = self.walk(client, question, servers, false, now + PATIENCE);
        let Some((rpc, walk)) = walk else { return Ok(()) };
        task.step = Step::Asking { rpc, walk };
        self.keep_or_conclude(client, task, None)
    }

    fn command_of(&mut self, key: &Text, call: &Call) -> Command {
        let setr = |val: &Text| Setr {
            key: Text::clone(key),
            val: Text::clone(val),
            direct: true,
            if_version: None,
            fence: None,
        };
        match call {
            Call::Read => Command::Getr(Get { key: Text::clone(key) }),
            Call::Write { value } => Command::Setr(setr(value)),
            Call::CompareAndSet { expected, value } => {
                let if_version = Some(expected.unwrap_or_default());
                Command::Setr(Setr { if_version, ..setr(value) })
            }
            Call::WriteUnder { lock, token, value } => {
                let fence = Some(Fence { lock: Text::clone(lock), token: *token });
                Command::Setr(Setr { fence, ..setr(value) })
            }
            Call::Delete => {
                self.copies.deletes(key);
                let (key, if_version, fence) = (Text::clone(key), None, None);
                Command::Delr(Delete { key, if_version, fence })
            }
        }
    }

    /// Tells the client's task what has happened.
    fn go_on(&mut self, client: usize, event: Event) -> Judgement {
        let idle = State::Idle { next: NEVER, then: None };
        let state = std::mem::replace(&mut self.clients.all[client].state, idle);
        let State::Busy(mut task) = state else { return Ok(()) };
        let conclusion = match (&task.program, event) {
            (Some(_), event) => self.drive(client, &mut task, event),
            (None, Event::Answer { body, .. }) => Some(Conclusion {
                reply: Some(String::from_utf8_lossy(&body).into_owned()),
                message: None,
                verdict: Verdict::Done,
            }),
            (None, Event::Silence { sent, .. }) => {
                let verdict = if sent { Verdict::Unknown } else { Verdict::Nobody };
                Some(Conclusion { reply: None, message: None, verdict })
            }
            (None, _) => None,
        };
        self.keep_or_conclude(client, *task, conclusion)
    }

    fn keep_or_conclude(
        &mut self,
        client: usize,
        task: Task,
        conclusion: Option<Conclusion>,
    ) -> Judgement {
        // A client that dies never hears how its request ended.
        let dies = conclusion.is_none()
            && matches!(task.job, Job::Ask { .. })
            && self.clients.all[client].held.is_none()
            && self.rng.random_bool(0.001);
        let Some(conclusion) = conclusion else {
            let state = if dies {
                self.write_down(client, &task, None);
                self.pause(client)
            } else {
                State::Busy(Box::new(task))
            };
            self.clients.all[client].state = state;
            return Ok(());
        };
        self.clients.all[client].state = self.pause(client);
        let reply: Value = conclusion
            .reply
            .as_deref()
            .and_then(|it| serde_json::from_str(it).ok())
            .unwrap_or_default();
        match task.job.clone() {
            Job::Lock(wish) => self.lock_concluded(client, wish, &task, &reply),
            Job::Hold => Ok(()),
            Job::Keep => self.keep_concluded(client, &task, &reply),
            Job::Unlock { wish, late } => {
                let late = late || task.was_silent && wish.request.is_none();
                // Whether it is done is only known when somebody says so; and what was
                // asked in vain before may be heard after that.
                if reply["status"].is_null() {
                    let job = Job::Unlock { wish, late };
                    self.then(client, Duration::from_millis(500), job);
                } else if late {
                    let wish = wish.released_anew(&mut self.rng);
                    self.then(client, self.latest(), Job::Unlock { wish, late: false });
                }
                Ok(())
            }
            Job::Reshape { site, add, late } => {
                let late = late || task.was_silent;
                let is_done = reply["status"] == "ok" || !add && reply["status"] == "unknown";
                if !is_done {
                    let job = Job::Reshape { site, add, late };
                    self.then(client, Duration::from_millis(500), job);
                    return Ok(());
                }
                self.viewleader_changed(site, add);
                let then = self.clients.wishes.pop_front();
                // A removal has no number: one that comes late removes whoever is at
                // that address then.
                let pause = if late { self.latest() } else { Duration::ZERO };
                let next = if then.is_some() { self.cluster.now() + pause } else { NEVER };
                self.clients.all[client].state = State::Idle { next, then };
                if !late {
                    self.put_new_group_to_the_test();
                }
                Ok(())
            }
            Job::Ask { key, call } => {
                let outcome = self.outcome_of(&call, &conclusion, &reply)?;
                self.learn(client, &key, &outcome);
                self.write_down(client, &task, outcome);
                if self.clients.all[client].held.is_some() {
                    self.then(client, Duration::ZERO, Job::Hold);
                }
                self.look_at_key(&key)
            }
        }
    }

    /// After how long nothing arrives any more that is on its way now.
    fn latest(&self) -> Duration {
        let is_well = self.cluster.now() >= Time::default() + self.options.busy;
        if is_well { LATEST_OF_THE_WELL } else { LATEST }
    }

    /// The client remembers what it was told of the key.
    fn learn(&mut self, client: usize, key: &Text, outcome: &Option<Outcome>) {
        let version = match outcome {
            Some(Outcome::Found { version, .. } | Outcome::Done { version }) => *version,
            Some(Outcome::Missing) => None,
            _ => return,
        };
        self.clients.all[client].known = Some((Text::clone(key), version));
    }

    fn look_at_key(&mut self, key: &str) -> Judgement {
        match self.copies.look(&self.cluster, key) {
            Ok(()) => Ok(()),
            Err(what) => self.fails("copies", what),
        }
    }

    /// The client does nothing for a while.
    pub(super) fn pause(&mut self, client: usize) -> State {
        let think = self.rng.random_range(0..self.clients.all[client].thinks_ms);
        State::Idle { next: self.cluster.now() + Duration::from_millis(think), then: None }
    }

    pub(super) fn then(&mut self, client: usize, after: Duration, job: Job) {
        let next: Time = self.cluster.now() + after;
        self.clients.all[client].state = State::Idle { next, then: Some(job) };
    }

    /// What is known of an operation; nothing when it may or may not have been done.
    fn outcome_of(
        &mut self,
        call: &Call,
        conclusion: &Conclusion,
        reply: &Value,
    ) -> Result<Option<Outcome>, Failure> {
        if *call == Call::Read {
            return Ok(outcome_of_read(reply));
        }
        match (conclusion.verdict, reply["reason"].as_str(), reply["status"].as_str()) {
            (_, Some("unavailable"), _) | (Verdict::Nobody, ..) => {
                self.tally.refused += 1;
                Ok(Some(Outcome::Refused))
            }
            (_, Some("unknown_outcome"), _) | (Verdict::Unknown, ..) => Ok(None),
            (_, Some("conflict"), _) => Ok(Some(Outcome::Mismatch { found: None })),
            (_, Some("fenced"), _) => {
                self.tally.fenced += 1;
                Ok(Some(Outcome::Fenced))
            }
            (_, None, Some("not_found")) if *call == Call::Delete => Ok(Some(Outcome::Missing)),
            (Verdict::Done, None, Some("ok")) => {
                Ok(Some(Outcome::Done { version: version_of(reply) }))
            }
            _ => self.fails("client", format!("{call:?} was answered {conclusion:?}")),
        }
    }

    /// The version of the group of the key that the job is about.
    fn group_of(&self, job: &Job) -> Option<Revision> {
        let Job::Ask { key, .. } = job else { return None };
        let view = self.cluster.view();
        view.group_at(Point::of(key)).map(|index| view.groups[index].version)
    }

    /// Adds the task to the history.
    fn write_down(&mut self, client: usize, task: &Task, outcome: Option<Outcome>) {
        let Job::Ask { key, call } = &task.job else { return };
        // A read that was not answered says nothing.
        if outcome.is_none() && *call == Call::Read {
            return;
        }
        if *call == Call::Delete {
            self.copies.deleted(key, outcome.as_ref());
        }
        let shown = match &outcome {
            Some(Outcome::Done { version }) => {
                self.tally.written += 1;
                version.filter(|_| *call != Call::Delete)
            }
            Some(Outcome::Found { version, .. }) => {
                self.tally.read += 1;
                *version
            }
            Some(Outcome::Missing) => {
                self.tally.read += 1;
                None
            }
            None => {
                self.tally.unknown += 1;
                None
            }
            _ => None,
        };
        if let Some(version) = shown {
            self.copies.shown(key, version);
        }
        // The commits of an original come to each replica, and nothing in them says whose
        // they are: one that comes under the vote of another client is a write of its own,
        // and so is one that comes to a primary which knows nothing of the first ones, or after a
        // denial that was meant for an earlier vote of the same client.
        let is_alone = !self.other_votes(client, task);
        let is_of_one = is_alone && !task.was_silent && task.group == self.group_of(&task.job);
        let again = if is_of_one { 0 } else { task.commits.saturating_sub(1) };
        let write = Operation::new(client as u64, Text::clone(key), call.clone(), task.began);
        self.history.extend(vec![write; again]);
        let operation = Operation::new(client as u64, Text::clone(key), call.clone(), task.began);
        let end = self.tell_moment();
        if task.is_original {
            // What was not answered may be there for long.
            let over = if task.was_silent || outcome.is_none() { u64::MAX } else { end };
            let voted = self.clients.all[client].voted.entry(Text::clone(key)).or_default();
            *voted = over.max(*voted);
        }
        self.history.push(match outcome {
            Some(outcome) => operation.ended(end, outcome),
            None => operation,
        });
    }

    /// Whether another client may have voted for the key of the task while that went on, or
    /// something that was said for an earlier vote of this one was still on its way.
    fn other_votes(&self, client: usize, task: &Task) -> bool {
        let Job::Ask { key, .. } = &task.job else { return false };
        let is_at_it = |state: &State| match state {
            State::Busy(other) => {
                other.is_original
                    && matches!(&other.job, Job::Ask { key: theirs, .. } if theirs == key)
            }
            State::Idle { .. } => false,
        };
        self.clients.all.iter().enumerate().any(|(other, it)| {
            let votes = other != client && is_at_it(&it.state);
            votes || it.voted.get(key).is_some_and(|end| *end > task.began)
        })
    }
}
