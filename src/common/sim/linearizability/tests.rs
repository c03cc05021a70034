//! Histories by hand: one for each thing that can be wrong, and what is right though
//! it looks strange.

use super::*;
use crate::view::Revision;

fn version(number: u64) -> Version {
    Version { group: Revision(1), number }
}

fn write(client: u64, value: &str, began: u64) -> Operation {
    Operation::new(client, "k", Call::Write { value: value.into() }, began)
}

fn replace(client: u64, expected: u64, value: &str, began: u64) -> Operation {
    let expected = Some(version(expected));
    Operation::new(client, "k", Call::CompareAndSet { expected, value: value.into() }, began)
}

fn delete(client: u64, began: u64) -> Operation {
    Operation::new(client, "k", Call::Delete, began)
}

fn read(client: u64, began: u64) -> Operation {
    Operation::new(client, "k", Call::Read, began)
}

fn done(number: u64) -> Outcome {
    Outcome::Done { version: Some(version(number)) }
}

fn found(value: &str, number: u64) -> Outcome {
    Outcome::Found { value: value.into(), version: Some(version(number)) }
}

fn found_unversioned(value: &str) -> Outcome {
    Outcome::Found { value: value.into(), version: None }
}

const UNVERSIONED: Outcome = Outcome::Done { version: None };

#[track_caller]
fn fine(history: &[Operation]) {
    let verdict = check(history, MAX_STEPS);
    assert!(verdict.is_fine(), "{verdict}");
}

/// Asserts that `history` is bad, and that the first `prefix` operations show it.
#[track_caller]
fn bad(history: &[Operation], prefix: usize) -> String {
    let verdict = check(history, MAX_STEPS);
    assert_eq!(verdict.failures.len(), 1, "{verdict}");
    assert_eq!(verdict.failures[0].prefix.len(), prefix, "{verdict}");
    assert!(verdict.failures[0].smallest);
    verdict.to_string()
}

mod anomalies {
    use super::*;

    #[test]
    fn a_stale_read() {
        let print = bad(
            &[
                write(1, "a", 0).ended(10, done(1)),
                write(1, "b", 20).ended(30, done(2)),
                read(2, 40).ended(50, found("a", 1)),
                read(2, 60).ended(70, found("b", 2)),
            ],
            3,
        );
        let expected = "\
not linearizable: 4 operations, 1 keys
key \"k\": not linearizable, as the first 3 of 4 show
  client 1 from 0 to 10: write \"a\" -> done at 1.1
  client 1 from 20 to 30: write \"b\" -> done at 1.2
  client 2 from 40 to 50: read -> \"a\" at 1.1
  no register answers this: client 2 from 40 to 50: read -> \"a\" at 1.1";
        assert_eq!(print, expected);
    }

    #[test]
    fn a_stale_read_without_versions() {
        bad(
            &[
                write(1, "a", 0).ended(10, UNVERSIONED),
                write(1, "b", 20).ended(30, UNVERSIONED),
                read(2, 40).ended(50, found_unversioned("a")),
            ],
            3,
        );
    }

    #[test]
    fn a_lost_update() {
        bad(
            &[
                write(1, "a", 0).ended(10, done(1)),
                read(1, 20).ended(30, Outcome::Missing),
                read(1, 40).ended(50, found("a", 1)),
            ],
            2,
        );
    }

    #[test]
    fn two_updates_from_one_version() {
        bad(
            &[
                write(1, "0", 0).ended(10, UNVERSIONED),
                read(1, 20).ended(30, found("0", 1)),
                read(2, 20).ended(30, found("0", 1)),
                replace(1, 1, "1", 40).ended(60, done(2)),
                replace(2, 1, "1", 50).ended(70, done(3)),
            ],
            5,
        );
    }

    #[test]
    fn a_compare_and_set_that_succeeded_twice() {
        bad(
            &[
                write(1, "a", 0).ended(10, done(1)),
                replace(1, 1, "b", 20).ended(30, UNVERSIONED),
                replace(1, 1, "b", 40).ended(50, UNVERSIONED),
            ],
            3,
        );
    }

    #[test]
    fn a_compare_and_set_that_found_what_was_not_there() {
        let mismatch = |found| Outcome::Mismatch { found };
        let wrote = write(1, "a", 0).ended(10, done(1));
        bad(&[wrote.clone(), replace(1, 1, "b", 20).ended(30, mismatch(None))], 2);
        bad(&[wrote.clone(), replace(1, 2, "b", 20).ended(30, mismatch(Some(version(3))))], 2);
        fine(&[wrote, replace(1, 2, "b", 20).ended(30, mismatch(Some(version(1))))]);
        let call = Call::CompareAndSet { expected: None, value: "b".into() };
        bad(&[Operation::new(1, "k", call, 0).ended(10, mismatch(None))], 1);
    }

    #[test]
    fn a_version_that_a_compare_and_set_has_shown_not_to_be() {
        bad(
            &[
                write(1, "a", 0).ended(10, UNVERSIONED),
                replace(1, 7, "b", 20).ended(30, Outcome::Mismatch { found: None }),
                read(1, 40).ended(50, found("a", 7)),
            ],
            3,
        );
    }

    #[test]
    fn a_read_of_an_aborted_write() {
        bad(
            &[
                write(1, "a", 0).ended(10, done(1)),
                write(1, "b", 20).ended(30, Outcome::Refused),
                read(2, 40).ended(50, found("b", 2)),
            ],
            3,
        );
    }

    #[test]
    fn a_write_that_was_read_and_then_refused() {
        bad(
            &[
                write(1, "b", 20).ended(90, Outcome::Refused),
                read(2, 40).ended(50, found("b", 2)),
                read(2, 100).ended(110, Outcome::Missing),
            ],
            2,
        );
    }

    #[test]
    fn split_brain() {
        // Two primaries, each of which answers from its own state.
        bad(
            &[
                write(1, "a", 0).ended(10, done(1)),
                write(1, "b", 20).ended(30, done(2)),
                write(2, "c", 20).ended(35, UNVERSIONED),
                read(1, 40).ended(50, found_unversioned("b")),
                read(2, 40).ended(51, found_unversioned("c")),
            ],
            5,
        );
    }

    #[test]
    fn one_version_of_two_values() {
        bad(
            &[
                write(1, "a", 0).ended(100, UNVERSIONED),
                write(2, "b", 0).ended(100, UNVERSIONED),
                read(3, 10).ended(20, found("a", 7)),
                read(4, 30).ended(40, found("b", 7)),
            ],
            4,
        );
    }

    #[test]
    fn a_read_that_goes_back_in_time() {
        // The write is still under way: the first read may see it, but then no
        // later one may not.
        bad(
            &[
                write(1, "a", 0).ended(10, done(1)),
                write(1, "b", 20).ended(100, done(2)),
                read(2, 30).ended(40, found("b", 2)),
                read(3, 50).ended(60, found("a", 1)),
            ],
            4,
        );
    }

    #[test]
    fn a_value_out_of_nowhere() {
        bad(&[write(1, "a", 0).ended(10, done(1)), read(2, 20).ended(30, found("z", 2))], 2);
    }

    #[test]
    fn a_value_before_its_time() {
        bad(&[read(2, 0).ended(10, found("a", 1)), write(1, "a", 20).ended(30, done(1))], 1);
    }

    #[test]
    fn a_deleted_value_that_returns() {
        bad(
            &[
                write(1, "a", 0).ended(10, done(1)),
                delete(1, 20).ended(30, done(2)),
                read(2, 40).ended(50, found("a", 1)),
            ],
            3,
        );
    }

    #[test]
    fn versions_that_do_not_grow() {
        bad(&[write(1, "a", 0).ended(10, done(2)), write(1, "b", 20).ended(30, done(1))], 2);
    }

    #[test]
    fn an_answer_to_another_question() {
        bad(&[read(1, 0).ended(10, UNVERSIONED)], 1);
    }

    #[test]
    fn what_is_wrong_with_one_key_is_told_of_that_key() {
        let of = |key: &str, operation: Operation| Operation { key: key.into(), ..operation };
        let verdict = check(
            &[
                of("x", write(1, "a", 0).ended(10, done(1))),
                of("y", read(1, 20).ended(30, found("a", 1))),
                of("x", read(1, 40).ended(50, found("a", 1))),
            ],
            MAX_STEPS,
        );
        let keys: Vec<&str> = verdict.failures.iter().map(|failure| &*failure.key).collect();
        assert_eq!(keys, ["y"], "{verdict}");
    }
}

mod registers {
    use super::*;

    #[test]
    fn concurrent_writes_may_take_effect_in_any_order() {
        fine(&[
            write(1, "1", 0).ended(100, UNVERSIONED),
            write(2, "2", 1).ended(100, UNVERSIONED),
            write(3, "3", 2).ended(100, UNVERSIONED),
            read(4, 10).ended(20, found_unversioned("3")),
            read(4, 30).ended(40, found_unversioned("2")),
            read(4, 50).ended(60, found_unversioned("1")),
        ]);
    }

    #[test]
    fn what_ends_when_another_begins_is_concurrent_with_it() {
        fine(&[
            write(1, "a", 0).ended(10, done(1)),
            write(1, "b", 20).ended(30, done(2)),
            read(2, 30).ended(40, found("a", 1)),
        ]);
    }

    #[test]
    fn an_unknown_write_takes_effect_late_or_never() {
        let history = |seen: Outcome| {
            [
                write(1, "a", 0).ended(10, done(1)),
                write(2, "b", 20),
                read(3, 40).ended(50, found("a", 1)),
                write(3, "c", 60).ended(70, done(5)),
                read(3, 80).ended(90, seen),
            ]
        };
        fine(&history(found("b", 9)));
        fine(&history(found("c", 5)));
        bad(&history(found("b", 3)), 5);
    }

    #[test]
    fn an_unknown_write_takes_effect_once() {
        bad(
            &[
                write(2, "b", 0),
                read(3, 10).ended(20, found_unversioned("b")),
                write(3, "c", 30).ended(40, UNVERSIONED),
                read(3, 50).ended(60, found_unversioned("b")),
            ],
            4,
        );
    }

    #[test]
    fn a_write_of_what_is_there_may_still_be_needed_later() {
        fine(&[
            write(1, "a", 0),
            read(2, 16).ended(19, found_unversioned("a")),
            delete(3, 18).ended(21, UNVERSIONED),
            read(2, 20).ended(26, Outcome::Missing),
            write(3, "a", 21).ended(25, UNVERSIONED),
            read(1, 24).ended(28, found_unversioned("a")),
        ]);
    }

    #[test]
    fn an_unknown_write_has_no_effect_before_it_began() {
        bad(&[read(3, 0).ended(10, found("b", 1)), write(2, "b", 20)], 1);
    }

    #[test]
    fn an_unknown_write_can_be_what_made_another_fail() {
        fine(&[
            write(1, "a", 0).ended(10, done(1)),
            write(2, "b", 20),
            replace(3, 1, "c", 30).ended(40, Outcome::Mismatch { found: None }),
        ]);
    }

    #[test]
    fn an_unknown_write_can_be_what_let_another_unknown_one_succeed() {
        fine(&[write(1, "a", 0), replace(2, 5, "b", 10), read(3, 20).ended(30, found("b", 6))]);
        bad(&[replace(2, 5, "b", 10), read(3, 20).ended(30, found("b", 6))], 2);
    }

    #[test]
    fn an_unknown_deletion_explains_what_is_missing() {
        let wrote = write(1, "a", 0).ended(10, done(1));
        fine(&[wrote.clone(), delete(2, 20), read(3, 30).ended(40, Outcome::Missing)]);
        fine(&[wrote, delete(2, 20), read(3, 30).ended(40, found("a", 1))]);
    }

    /// As of an original client whose commits take effect up to three times: each value is
    /// written once, and perhaps twice more, and shown at three versions between others.
    #[test]
    fn a_value_that_is_shown_at_three_versions_is_found_to_be_written_three_times_at_once() {
        const VALUES: u64 = 30;
        let mut history = Vec::new();
        for value in 0..VALUES {
            let name = format!("v{value}");
            history.push(write(value, &name, 0).ended(1_000, UNVERSIONED));
            history.extend([write(value, &name, 0), write(value, &name, 0)]);
            for round in 0..3 {
                let number = round * VALUES + value + 1;
                history.push(read(99, 10 * number).ended(10 * number + 5, found(&name, number)));
            }
        }
        let verdict = check(&history, 10 * history.len() as u64);
        assert!(verdict.is_fine(), "{verdict}");
    }

    fn under(client: u64, token: u64, value: &str, began: u64) -> Operation {
        let (lock, token) = ("l".into(), Token(token));
        Operation::new(client, "k", Call::WriteUnder { lock, token, value: value.into() }, began)
    }

    #[test]
    fn a_write_under_an_old_token_is_not_made_after_one_under_a_newer_one() {
        let newer = under(1, 5, "a", 0).ended(10, done(1));
        bad(&[newer.clone(), under(2, 4, "b", 20).ended(30, done(2))], 2);
        fine(&[newer.clone(), under(2, 5, "b", 20).ended(30, done(2))]);
        fine(&[newer.clone(), under(2, 4, "b", 20).ended(30, Outcome::Fenced)]);
        // It may come first while both are under way, and after one that was not made.
        fine(&[newer, under(2, 4, "b", 5).ended(30, UNVERSIONED)]);
        fine(&[under(1, 5, "a", 0), under(2, 4, "b", 20).ended(30, done(2))]);
    }

    #[test]
    fn nothing_is_fenced_off_before_a_newer_token_is_seen() {
        bad(&[under(2, 4, "b", 20).ended(30, Outcome::Fenced)], 1);
        fine(&[under(1, 5, "a", 25), under(2, 4, "b", 20).ended(30, Outcome::Fenced)]);
        bad(&[under(1, 5, "a", 35), under(2, 4, "b", 20).ended(30, Outcome::Fenced)], 1);
    }
}
