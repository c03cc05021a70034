//! The protocol as a small model, in which every order of events is tried.
//!
//! One group of one arc with one key, three or four servers, a viewleader that never
//! forgets. A message may arrive late, twice, in any order or never; a server may
//! crash and start over its disk, stop to believe in its lease at any moment, be put
//! out and come back under a new identity. [`protocol`] says what each of them does,
//! in the words of `view/state.rs`, `kv/replica.rs` and `kv/server/`; here stand what
//! must hold, how far the search goes, and the list of deliberate bugs that it must
//! find.
//!
//! What is left out: the arithmetic of leases (here: whoever is put out has stopped to
//! believe), arcs that split and become one again, pages (one key is one page), full
//! disks and who is set aside for one, deletions that are forgotten, conditions and
//! fences, old copies of disks, the vote and commit of the original, and disks that
//! lose what they have synced. The viewleader takes one step at a time, as its log makes it do.
//!
//! `make model` searches the large bounds; `make test` the small ones.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic and print")]

#[path = "model/protocol.rs"]
mod protocol;

use protocol::{Action, State};
use stateright::{Checker, DiscoveryClassification, HasDiscoveries, Model, Property};
use std::collections::BTreeSet;

/// How far a search goes.
#[derive(Clone, Debug)]
struct Bounds {
    /// How many servers there are; all but the last are members at first.
    servers: u8,
    /// How many replicas a group should have.
    replicas: usize,
    /// Up to which version the group may come.
    versions: u8,
    /// How many writes are begun.
    writes: u8,
    /// How many crashes there are.
    crashes: u8,
    /// How many identities a server may have.
    lives: u8,
    /// Whether servers may be told to leave.
    drains: bool,
}

/// A deliberate mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    ExpelsBeforeTheLeaseEnds,
    SkipsOneAcknowledgement,
    TakesPreparesOfOldVersions,
    ServesBeforeItHasPreparedAnew,
    ServesBeforeOthersFollow,
    ReportsReadyBeforeItHasFetched,
    AcknowledgesBeforeTheDisk,
    DropsTheSourceTooEarly,
    ServesALostArcEmpty,
    BelievesOldReports,
    ForgetsWhenItEnteredItsSeat,
}

/// What is searched.
#[derive(Clone)]
struct Protocol {
    bounds: Bounds,
    bug: Option<Bug>,
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::first(&self.bounds)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        state.actions(&self.bounds, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let next = state.after(&action, &self.bounds, self.bug);
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one serves", |_, state: &State| {
                state.servers.iter().filter(|server| server.serves()).count() <= 1
            }),
            Property::always("reads are never older than what was seen", |_, state: &State| {
                !state.stale
            }),
            Property::always("no two writes have one version", |_, state: &State| !state.collision),
            Property::always(
                "what was seen is on the disk of every ready replica",
                |_, state: &State| {
                    let view = state.view();
                    view.ready.iter().chain(&view.held_by).all(|id| {
                        let server = &state.servers[usize::from(id.node)];
                        server.life != id.life || server.kept >= state.seen
                    })
                },
            ),
            Property::always(
                "no replica knows more to be committed than its primary",
                |_, state| committed_is_within(state),
            ),
            Property::sometimes("a write is acknowledged", |_, state: &State| {
                state.acknowledged.is_some()
            }),
            Property::sometimes(
                "the joiner serves what was acknowledged before",
                |_, state: &State| {
                    let joiner = &state.servers[state.servers.len() - 1];
                    joiner.serves() && joiner.committed.is_some() && joiner.committed == state.seen
                },
            ),
            Property::sometimes("a lost group is found again with its data", |_, state: &State| {
                let serving = state.servers.iter().find(|server| server.serves());
                state.found_again && serving.is_some_and(|it| it.committed.is_some())
            }),
        ]
    }
}

/// committed(secondary) ⊆ committed(primary), within one version.
fn committed_is_within(state: &State) -> bool {
    let parts = || state.servers.iter().filter_map(|it| it.replica.as_ref().map(|part| (it, part)));
    parts().filter(|(_, part)| part.primary.as_ref().is_some_and(|it| it.serving)).all(
        |(primary, leads)| {
            let version = leads.version;
            let others = parts().filter(|(_, part)| part.version == version);
            others.into_iter().all(|(other, _)| other.committed <= primary.committed)
        },
    )
}

/// Tries everything within `bounds`, or until a claim is broken; returns the claims
/// that are, and which of the things that must be possible were seen.
fn search(bounds: &Bounds, bug: Option<Bug>) -> (Vec<&'static str>, Vec<&'static str>) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let protocol = Protocol { bounds: bounds.clone(), bug };
    let checker = protocol.checker().threads(threads).finish_when(HasDiscoveries::AnyFailures);
    let checker = checker.spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{states} states, {depth} deep, {bounds:?}, {bug:?}");
    let (mut broken, mut seen) = (Vec::new(), Vec::new());
    for (name, path) in checker.discoveries() {
        match checker.discovery_classification(name) {
            DiscoveryClassification::Example => seen.push(name),
            DiscoveryClassification::Counterexample => {
                println!("  not so: {name}");
                for action in path.into_actions() {
                    println!("    {action:?}");
                }
                broken.push(name);
            }
        }
    }
    (broken, seen)
}

/// # Panics
/// If a claim does not hold, or one of the things that must be possible is not.
fn assert_holds(all: &[Bounds], possible: usize) {
    let mut seen = BTreeSet::new();
    for bounds in all {
        let (broken, possible) = search(bounds, None);
        assert!(broken.is_empty(), "{bounds:?}: {broken:?}");
        seen.extend(possible);
    }
    assert_eq!(seen.len(), possible, "possible is only {seen:?}");
}

/// Two replicas of three servers, one write, and two changes of the group.
const SMALL: Bounds =
    Bounds { servers: 3, replicas: 2, versions: 3, writes: 1, crashes: 0, lives: 1, drains: false };

/// One replica that moves from server to server.
const MOVING: Bounds = Bounds { replicas: 1, versions: 5, ..SMALL };

#[test]
fn a_small_model_keeps_its_promises() {
    let crashing = Bounds { versions: 2, crashes: 1, ..SMALL };
    let returning = Bounds { replicas: 1, lives: 2, ..SMALL };
    let four = Bounds { servers: 4, replicas: 3, versions: 2, ..SMALL };
    assert_holds(&[SMALL, crashing, returning, four], 3);
}

#[test]
#[ignore = "it takes minutes: make model"]
fn a_large_model_keeps_its_promises() {
    let large = [
        Bounds { crashes: 1, lives: 2, ..SMALL },
        Bounds { writes: 2, ..SMALL },
        Bounds { versions: 4, ..SMALL },
        Bounds { drains: true, ..SMALL },
        Bounds { servers: 4, replicas: 3, ..SMALL },
        MOVING,
    ];
    assert_holds(&large, 3);
}

#[test]
fn every_deliberate_bug_is_found() {
    let crashing = Bounds { crashes: 1, ..SMALL };
    for (bug, bounds) in [
        (Bug::ExpelsBeforeTheLeaseEnds, &SMALL),
        (Bug::SkipsOneAcknowledgement, &SMALL),
        (Bug::TakesPreparesOfOldVersions, &SMALL),
        (Bug::ServesBeforeItHasPreparedAnew, &SMALL),
        (Bug::ServesBeforeOthersFollow, &SMALL),
        (Bug::ReportsReadyBeforeItHasFetched, &SMALL),
        (Bug::AcknowledgesBeforeTheDisk, &crashing),
        (Bug::DropsTheSourceTooEarly, &MOVING),
        (Bug::ServesALostArcEmpty, &SMALL),
        (Bug::BelievesOldReports, &MOVING),
        (Bug::ForgetsWhenItEnteredItsSeat, &MOVING),
    ] {
        let (broken, _) = search(bounds, Some(bug));
        assert!(!broken.is_empty(), "{bug:?} goes unfound");
    }
}
