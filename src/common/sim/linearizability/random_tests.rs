//! Histories by chance: those of a real register are fine, what is changed in them
//! is found, and two other ways to decide agree: `todc-utils`, and trying all orders.

use super::search::try_all_orders;
use super::*;
use crate::view::Revision;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use todc_utils::specifications::Specification;
use todc_utils::{Action, History, WGLChecker};

/// How the histories of a register come about.
#[derive(Clone, Copy)]
struct Kind {
    clients: u64,
    operations: usize,
    /// How many different values there are; 0: each write has one of its own.
    values: u64,
    /// Answers name versions, and there are compare-and-sets.
    versions: bool,
    /// Of 1,000 operations, how many have an unknown outcome.
    unknown: u32,
}

/// A register, one that is right.
#[derive(Default)]
struct Register {
    held: Option<(Text, Version)>,
    writes: u64,
}

impl Register {
    fn make(&mut self, value: Option<Text>) -> Version {
        // Versions have gaps, as they do when a group changes.
        self.writes += 3;
        let version = Version { group: Revision(1), number: self.writes };
        self.held = value.map(|value| (value, version));
        version
    }

    fn answer(&mut self, call: &Call) -> (Outcome, Option<Version>) {
        let held = self.held.as_ref().map(|&(_, version)| version);
        let made = match call {
            Call::Read => None,
            Call::Write { value } => Some(self.make(Some(value.clone()))),
            Call::CompareAndSet { expected, value } if *expected == held => {
                Some(self.make(Some(value.clone())))
            }
            Call::CompareAndSet { .. } => return (Outcome::Mismatch { found: None }, None),
            Call::Delete => Some(self.make(None)),
            Call::WriteUnder { .. } => unreachable!("these registers know no locks"),
        };
        let outcome = match (made, &self.held) {
            (Some(version), _) => Outcome::Done { version: Some(version) },
            (None, Some((value, version))) => {
                Outcome::Found { value: value.clone(), version: Some(*version) }
            }
            (None, None) => Outcome::Missing,
        };
        (outcome, made)
    }
}

/// Where a client stands.
enum Client {
    Idle,
    /// Has begun this one.
    Begun(usize),
    /// And it has taken effect.
    Answered(usize, Outcome),
}

/// Runs a register with clients that begin, are served and end at random.
fn run_register(rng: &mut StdRng, kind: Kind) -> Vec<Operation> {
    let mut register = Register::default();
    let mut history: Vec<Operation> = Vec::new();
    let mut clients: Vec<Client> = (0..kind.clients).map(|_| Client::Idle).collect();
    let mut late: Vec<usize> = Vec::new();
    let mut seen: Vec<Version> = Vec::new();
    let mut clock = 0;
    while history.len() < kind.operations
        || clients.iter().any(|client| !matches!(client, Client::Idle))
    {
        clock += rng.random_range(0..3);
        if !late.is_empty() && rng.random_ratio(1, 100) {
            let index = late.swap_remove(rng.random_range(0..late.len()));
            register.answer(&history[index].call);
        }
        let who = rng.random_range(0..clients.len());
        clients[who] = match std::mem::replace(&mut clients[who], Client::Idle) {
            Client::Idle if history.len() < kind.operations => {
                let value = match kind.values {
                    0 => format!("v{}", history.len()),
                    values => format!("v{}", rng.random_range(0..values)),
                };
                let call = random_call(rng, kind, value.into(), &seen);
                history.push(Operation::new(who as u64, "k", call, clock));
                Client::Begun(history.len() - 1)
            }
            Client::Idle => Client::Idle,
            Client::Begun(index) if rng.random_ratio(kind.unknown, 1000) => {
                late.push(index);
                Client::Idle
            }
            Client::Begun(index) => {
                let (outcome, made) = register.answer(&history[index].call);
                seen.extend(made);
                Client::Answered(index, outcome)
            }
            Client::Answered(..) if rng.random_ratio(kind.unknown, 1000) => Client::Idle,
            Client::Answered(index, outcome) => {
                history[index].end = Some((clock, outcome));
                Client::Idle
            }
        };
    }
    if !kind.versions {
        history.iter_mut().for_each(forget_version);
    }
    history
}

fn random_call(rng: &mut StdRng, kind: Kind, value: Text, seen: &[Version]) -> Call {
    match rng.random_range(0..20) {
        0..10 => Call::Read,
        10..12 if kind.versions => {
            let latest = &seen[seen.len().saturating_sub(3)..];
            Call::CompareAndSet { expected: latest.choose(rng).copied(), value }
        }
        12 => Call::Delete,
        _ => Call::Write { value },
    }
}

fn forget_version(operation: &mut Operation) {
    if let Some((
        _,
        Outcome::Found { version, .. }
        | Outcome::Done { version }
        | Outcome::Mismatch { found: version },
    )) = &mut operation.end
    {
        *version = None;
    }
}

/// Changes the answers of some operations.
fn lie(rng: &mut StdRng, history: &mut [Operation], kind: Kind) {
    let values = kind.values.max(1);
    let lies = rng.random_range(0..3);
    for _ in 0..lies {
        let index = rng.random_range(0..history.len());
        let version = kind.versions.then(|| Version {
            group: Revision(1),
            number: 3 * rng.random_range(1..history.len() as u64 + 1),
        });
        let Some((_, outcome)) = &mut history[index].end else { continue };
        match outcome {
            Outcome::Found { value, version: known } => {
                if rng.random() {
                    *value = format!("v{}", rng.random_range(0..values)).into();
                } else {
                    *known = version;
                }
            }
            Outcome::Missing => {
                *outcome = Outcome::Found { value: "v0".into(), version };
            }
            Outcome::Done { version: known } => *known = version,
            Outcome::Mismatch { .. } => *outcome = Outcome::Done { version },
            Outcome::Refused | Outcome::Fenced => {}
        }
    }
}

#[test]
fn histories_of_a_register_are_fine() {
    for seed in 0..60 {
        let mut rng = StdRng::seed_from_u64(seed);
        let kind = Kind {
            clients: rng.random_range(1..50),
            operations: rng.random_range(1..800),
            values: [0, 0, 3][rng.random_range(0..3)],
            versions: rng.random_ratio(3, 4),
            unknown: [0, 10, 50][rng.random_range(0..3)],
        };
        let history = run_register(&mut rng, kind);
        let verdict = check(&history, MAX_STEPS);
        assert!(verdict.failures.is_empty(), "seed {seed}: {verdict}");
        // Where nothing tells one write from another, a search may be given up.
        assert!(verdict.is_fine() || kind.values > 0 && !kind.versions, "seed {seed}: {verdict}");
    }
}

#[test]
fn thousands_of_operations_of_fifty_clients_take_few_steps() {
    for versions in [true, false] {
        let kind = Kind { clients: 50, operations: 5000, values: 0, versions, unknown: 20 };
        let history = run_register(&mut StdRng::seed_from_u64(1), kind);
        let steps = if versions { 3 * 5000 } else { MAX_STEPS };
        let verdict = check(&history, steps);
        assert!(verdict.is_fine(), "{versions}: {verdict}");
    }
}

#[test]
fn one_answer_that_is_older_than_another_is_found_among_thousands() {
    for seed in 0..20 {
        let mut rng = StdRng::seed_from_u64(seed);
        let kind = Kind { clients: 30, operations: 2000, values: 0, versions: true, unknown: 10 };
        let mut history = run_register(&mut rng, kind);
        // A read that began after another one had ended gets the answer before that one's.
        let reads: Vec<usize> = (0..history.len())
            .filter(|&i| matches!(history[i].end, Some((_, Outcome::Found { .. }))))
            .collect();
        let shown = |i: usize| match &history[i].end {
            Some((_, Outcome::Found { version, .. })) => *version,
            _ => None,
        };
        let late = reads[rng.random_range(reads.len() / 2..reads.len())];
        let began = history[late].began;
        let before: Vec<usize> =
            reads.iter().copied().filter(|&i| history[i].end_time() < began).collect();
        let newest = before.iter().map(|&i| shown(i)).max().expect("reads before");
        let old = before.into_iter().rfind(|&i| shown(i) < newest).expect("an older one");
        let answer = history[old].end.clone().expect("it ended").1;
        let end = history[late].end_time();
        history[late].end = Some((end, answer));
        let verdict = check(&history, MAX_STEPS);
        assert_eq!(verdict.failures.len(), 1, "seed {seed}: {verdict}");
        let failure = &verdict.failures[0];
        let last = failure.prefix.iter().filter(|o| o.end.is_some()).max_by_key(|o| o.end_time());
        assert!(last.is_some_and(|last| last.end_time() <= end), "seed {seed}: {verdict}");
    }
}

#[test]
fn a_search_that_is_too_long_is_undecided_and_not_fine() {
    // Writes that nothing tells apart, and at the end a read that none explains.
    let mut history: Vec<Operation> = (0..24)
        .map(|i| {
            let value = format!("v{i}").into();
            Operation::new(i, "k", Call::Write { value }, 0).ended(1000, DONE)
        })
        .collect();
    for i in 0..24 {
        let value = format!("v{}", i % 12).into();
        let outcome = Outcome::Found { value, version: None };
        let began = 10 + 20 * i;
        history.push(Operation::new(90, "k", Call::Read, began).ended(began + 10, outcome));
    }
    let verdict = check(&history, 1000);
    assert_eq!(verdict.undecided.len(), 1, "{verdict}");
    assert!(!verdict.is_fine());
    assert!(verdict.to_string().starts_with("undecided: 48 operations, 1 keys\n"), "{verdict}");
}

const DONE: Outcome = Outcome::Done { version: None };

/// The register once more, for the other checker: each operation says what it
/// was answered, where that is known.
struct Spec;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct SpecState {
    held: Option<(Text, Option<u64>)>,
    newest: u64,
}

impl SpecState {
    fn make(&self, value: Option<&Text>, version: Option<Version>) -> (bool, Self) {
        let number = version.map(|version| version.number);
        let grows = number.is_none_or(|number| number > self.newest);
        let held = value.map(|value| (value.clone(), number));
        (grows, Self { held, newest: number.unwrap_or(self.newest) })
    }
}

impl Specification for Spec {
    type State = SpecState;
    type Operation = (Call, Option<Outcome>);

    fn init() -> SpecState {
        SpecState::default()
    }

    fn apply((call, outcome): &Self::Operation, state: &SpecState) -> (bool, SpecState) {
        let number = |version: &Option<Version>| version.map(|version| version.number);
        let held = state.held.as_ref().and_then(|held| held.1);
        match (call, outcome) {
            (Call::Write { value }, Some(Outcome::Done { version })) => {
                state.make(Some(value), *version)
            }
            (Call::Write { value }, None) => state.make(Some(value), None),
            (Call::Delete, Some(Outcome::Done { version })) => state.make(None, *version),
            (Call::Delete, None) => state.make(None, None),
            (Call::Read | Call::Delete, Some(Outcome::Missing)) => {
                (state.held.is_none(), state.clone())
            }
            (Call::Read, None) => (true, state.clone()),
            (Call::Read, Some(Outcome::Found { value, version })) => {
                (state.held == Some((value.clone(), number(version))), state.clone())
            }
            (Call::CompareAndSet { expected, value }, Some(Outcome::Done { version })) => {
                let (grows, after) = state.make(Some(value), *version);
                (grows && number(expected) == held, after)
            }
            (Call::CompareAndSet { expected, .. }, Some(Outcome::Mismatch { .. })) => {
                (number(expected) != held, state.clone())
            }
            _ => (false, state.clone()),
        }
    }
}

/// What the other checker says. An unknown outcome is one at the very end there.
fn other_checker(history: &[Operation]) -> bool {
    let mut events = Vec::new();
    for (process, operation) in history.iter().enumerate() {
        let outcome = operation.end.clone().map(|(_, outcome)| outcome);
        let operation_there = (operation.call.clone(), outcome);
        events.push((operation.began, 0, process, Action::Call(operation_there.clone())));
        events.push((operation.end_time(), 1, process, Action::Response(operation_there)));
    }
    events.sort_by_key(|&(at, is_end, process, _)| (at, is_end, process));
    let actions = events.into_iter().map(|(_, _, process, action)| (process, action));
    WGLChecker::<Spec>::is_linearizable(History::from_actions(actions.collect()))
}

#[test]
fn another_checker_agrees() {
    let (mut fine, mut bad) = (0, 0);
    for seed in 0..6000 {
        let mut rng = StdRng::seed_from_u64(seed);
        // It has no versions that are not known yet: versions or unknown outcomes.
        let versions = rng.random();
        let kind = Kind {
            clients: rng.random_range(1..6),
            operations: rng.random_range(2..14),
            values: 3,
            versions,
            unknown: if versions { 0 } else { 100 },
        };
        let mut history = run_register(&mut rng, kind);
        lie(&mut rng, &mut history, kind);
        let theirs = other_checker(&history);
        let ours = check(&history, MAX_STEPS);
        assert_eq!(ours.is_fine(), theirs, "seed {seed}: {ours}\n{history:#?}");
        assert!(ours.undecided.is_empty());
        if theirs { fine += 1 } else { bad += 1 }
    }
    assert!(fine > 1000 && bad > 1000, "{fine} fine, {bad} bad");
}

#[test]
fn trying_all_orders_agrees() {
    let (mut fine, mut bad) = (0, 0);
    for seed in 0..4000 {
        let mut rng = StdRng::seed_from_u64(seed);
        let kind = Kind {
            clients: rng.random_range(1..6),
            operations: rng.random_range(2..8),
            values: rng.random_range(1..4),
            versions: true,
            unknown: 250,
        };
        let mut history = run_register(&mut rng, kind);
        lie(&mut rng, &mut history, kind);
        if rng.random() {
            let index = rng.random_range(0..history.len());
            forget_version(&mut history[index]);
        }
        let all = try_all_orders(&history);
        let ours = check(&history, MAX_STEPS);
        assert_eq!(ours.is_fine(), all, "seed {seed}: {ours}\n{history:#?}");
        if all { fine += 1 } else { bad += 1 }
    }
    assert!(fine > 800 && bad > 800, "{fine} fine, {bad} bad");
}
