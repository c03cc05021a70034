//! What may vary, what may differ, and how a reply of ours stands to the
//! reference's.
//!
//! [`normalised`] takes out what may vary from run to run: epochs, hashes,
//! addresses, the order of keys, the wording of errors. What is then not the same
//! must be a reply that [`DIFFERENCES`] expects for that very call, to the
//! letter, with a sentence that stands in the README.

use serde_json::{Value, json};
use std::fmt;

/// How a reply of ours stands to the reference's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Same,
    Different,
    Better,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Same => "same",
            Verdict::Different => "different",
            Verdict::Better => "better",
        })
    }
}

/// A difference that is meant.
pub(crate) struct Difference {
    pub(crate) verdict: Verdict,
    /// A sentence of the README, to the letter.
    pub(crate) sentence: &'static str,
    /// The calls in which it shows, and what ours replies there.
    pub(crate) replies: &'static [(&'static str, &'static str)],
}

impl Difference {
    /// Whether it may show in this call.
    pub(crate) fn is_expected_in(&self, call: &str) -> bool {
        self.replies.iter().any(|(where_it_shows, _)| *where_it_shows == call)
    }
}

const ERROR: &str = r#"{"error":"TEXT"}"#;

/// Every difference that may show, each with its sentence of the README.
pub(crate) const DIFFERENCES: &[Difference] = &[
    Difference {
        verdict: Verdict::Better,
        sentence: "A message may have up to 16 MiB; the original drops the connection at 8192 \
                   bytes, whoever sends them.",
        replies: &[
            ("server 2: set, a message over 8192 bytes", r#"{"status":"ok"}"#),
            (
                "server 2: get, a reply over 8192 bytes",
                r#"{"status":"ok","value":"vvvvvvvv... (9000 characters)"}"#,
            ),
        ],
    },
    Difference {
        verdict: Verdict::Better,
        sentence: "A connection carries any number of calls, pipelined ones too, and answers them \
                   in order; the original answers one and closes.",
        replies: &[("server 2: two calls on a connection", r#"[{"status":"ok"},{"status":"ok"}]"#)],
    },
    Difference {
        verdict: Verdict::Better,
        sentence: "A message that can't be understood is answered with an `error` that says what \
                   is wrong with it; the original drops the connection without a word.",
        replies: &[
            ("server 2: a negative length", ERROR),
            ("server 2: an empty message", ERROR),
            ("server 2: not JSON", ERROR),
            ("server 2: JSON, but no object", ERROR),
            ("server 2: no cmd", ERROR),
            ("server 2: an unknown cmd", ERROR),
            ("server 2: set without val", ERROR),
            ("server 2: get, the key a list", ERROR),
            ("viewleader: a negative length", ERROR),
            ("viewleader: not JSON", ERROR),
            ("viewleader: no cmd", ERROR),
            ("viewleader: an unknown cmd", ERROR),
            ("viewleader: lock_get without requestor", ERROR),
            ("viewleader: heartbeat without port", ERROR),
        ],
    },
    Difference {
        verdict: Verdict::Different,
        sentence: "Keys and values are text, and anything else is refused with an `error`; the \
                   original keeps whatever JSON it is given.",
        replies: &[("server 2: set, the key a number", ERROR)],
    },
    Difference {
        verdict: Verdict::Better,
        sentence: "`lock_release` by somebody who neither holds the lock nor waits for it is \
                   answered `{\"status\":\"unknown\"}`; the original's handler crashes there.",
        replies: &[
            ("viewleader: lock_release by a stranger", r#"{"status":"unknown"}"#),
            ("viewleader: lock_release by a, free again", r#"{"status":"unknown"}"#),
        ],
    },
    Difference {
        verdict: Verdict::Better,
        sentence: "A committed `setr` is on every replica before it is answered, whichever servers \
                   were told, and every server finds it; in the original a server has only what it \
                   was sent itself.",
        replies: &[(
            "server 1: get, committed through server 0",
            r#"{"status":"ok","value":"by one"}"#,
        )],
    },
    Difference {
        verdict: Verdict::Better,
        sentence: "A `setr` without a vote before it is a whole replicated set and is answered \
                   `{\"status\":\"ok\"}`; the original stores the value on that one server and \
                   answers `{}`.",
        replies: &[("server 0: setr without a vote", r#"{"status":"ok"}"#)],
    },
    Difference {
        verdict: Verdict::Better,
        sentence: "A plain `set` writes a namespace of its own and never changes what `getr` \
                   returns; in the original it overwrites that server's replica.",
        replies: &[("client getr plum", r#"{"status":"ok","value":"by setr"}"#)],
    },
    Difference {
        verdict: Verdict::Better,
        sentence: "A vote (`setr_request`) runs out after 10 s, so a client that dies before it \
                   commits locks nothing; in the original the key stays locked for ever.",
        replies: &[(
            "server 0: setr_request after a client died",
            r#"{"epoch":"EPOCH","reply":"ok"}"#,
        )],
    },
];

/// Ours says the same and more.
pub(crate) const FURTHER_FIELDS: &str = "A reply may have further fields beside the original's, which the \
                              original's programs don't look at.";

/// What the reference's client printed is no reply that could be read.
pub(crate) const OWN_WORDS: &str = "The client prints the reply as one line of JSON on standard output and \
                         everything else on standard error; the original's client prints in its \
                         own words.";

/// `value` with a word in the place of everything that may vary.
pub(crate) fn normalised(value: Value) -> Value {
    /// Longer texts are cut, with their length told.
    const LONG: usize = 60;
    match value {
        Value::String(text) if text.len() > LONG => {
            let start: String = text.chars().take(8).collect();
            json!(format!("{start}... ({} characters)", text.chars().count()))
        }
        Value::Object(fields) => fields
            .into_iter()
            .map(|(name, field)| {
                let field = match (name.as_str(), field) {
                    ("epoch", Value::Number(_)) => json!("EPOCH"),
                    ("error", Value::String(_)) => json!("TEXT"),
                    ("result", Value::Array(rows)) => normalised_rows(rows),
                    (_, field) => normalised(field),
                };
                (name, field)
            })
            .collect(),
        Value::Array(values) => values.into_iter().map(normalised).collect(),
        other => other,
    }
}

/// The rows of `query_servers`, if they are in order, or the keys of
/// `query_all_keys`, in order.
fn normalised_rows(mut rows: Vec<Value>) -> Value {
    let servers = !rows.is_empty() && rows.iter().all(|row| row[0].is_string() && row[1].is_u64());
    if servers && rows.is_sorted_by_key(|row| row[1].as_u64()) {
        return rows.iter().map(|_| json!(["IP:PORT", "HASH"])).collect();
    }
    if !servers {
        rows.sort_by_key(Value::to_string);
    }
    Value::Array(rows)
}

/// Whether `actual` says all that `expected` says, and perhaps more.
fn covers(expected: &Value, actual: &Value) -> bool {
    match (expected, actual) {
        (Value::Object(expected), Value::Object(actual)) => expected
            .iter()
            .all(|(name, field)| actual.get(name).is_some_and(|other| covers(field, other))),
        (Value::Array(expected), Value::Array(actual)) => {
            expected.len() == actual.len()
                && expected.iter().zip(actual).all(|(field, other)| covers(field, other))
        }
        _ => expected == actual,
    }
}

/// How `ours` stands to `reference`, with the sentence that explains it, if one
/// does.
pub(crate) fn judge(
    call: &str,
    reference: &Value,
    ours: &Value,
) -> (Verdict, Option<&'static str>) {
    if ours == reference {
        return (Verdict::Same, None);
    }
    for difference in DIFFERENCES {
        for (where_it_shows, reply) in difference.replies {
            let expected: Value = serde_json::from_str(reply).unwrap();
            // Where the reference says as much, this is not the difference.
            let only_ours = covers(&expected, ours) && !covers(&expected, reference);
            if *where_it_shows == call && only_ours {
                return (difference.verdict, Some(difference.sentence));
            }
        }
    }
    if reference.is_object() && covers(reference, ours) {
        return (Verdict::Different, Some(FURTHER_FIELDS));
    }
    // What could be read as a reply would not be a text.
    let of_the_client = call.starts_with("client ");
    if of_the_client && reference.is_string() && ours.is_object() && ours.get("error").is_none() {
        return (Verdict::Different, Some(OWN_WORDS));
    }
    (Verdict::Different, None)
}

#[test]
fn a_difference_that_nobody_expects_is_unexplained() {
    let ok = json!({"status": "ok"});
    let not_found = json!({"status": "not_found"});
    let more = json!({"status": "ok", "version": 7});
    let error = json!({"error": "TEXT"});
    assert_eq!(judge("server 0: set", &ok, &ok), (Verdict::Same, None));
    assert_eq!(judge("server 0: set", &ok, &more), (Verdict::Different, Some(FURTHER_FIELDS)));
    assert_eq!(judge("server 0: set", &more, &ok), (Verdict::Different, None));
    assert_eq!(judge("server 0: set", &ok, &not_found), (Verdict::Different, None));
    assert_eq!(judge("server 0: set", &json!("(closed)"), &ok), (Verdict::Different, None));
    // Expected there, but not this reply.
    assert_eq!(judge("server 2: not JSON", &json!("(closed)"), &ok), (Verdict::Different, None));
    let (verdict, sentence) = judge("server 2: not JSON", &json!("(closed)"), &error);
    assert_eq!((verdict, sentence.is_some()), (Verdict::Better, true));
    assert_eq!(
        judge("client get a", &json!("Found: 1"), &ok),
        (Verdict::Different, Some(OWN_WORDS))
    );
    assert_eq!(judge("client get a", &json!("Found: 1"), &error), (Verdict::Different, None));
}

#[test]
fn what_may_vary_is_no_difference_and_what_may_not_is_one() {
    let listing = |first: u64, second: u64| {
        normalised(json!({"result": [["127.0.0.1:1", first], ["127.0.0.1:2", second]], "epoch": 3}))
    };
    assert_eq!(listing(5, 60), listing(1, 2));
    assert_ne!(listing(60, 5), listing(1, 2), "the order of the hashes counts");
    let keys = |keys: [&str; 2]| normalised(json!({"result": keys}));
    assert_eq!(keys(["a", "b"]), keys(["b", "a"]));
    assert_ne!(keys(["a", "b"]), keys(["a", "c"]));
    assert_eq!(normalised(json!({"error": "one"})), normalised(json!({"error": "other"})));
    let long = |letter: &str, count| normalised(json!(letter.repeat(count)));
    assert_ne!(long("v", 8000), long("v", 9000));
    assert_ne!(long("v", 8000), long("w", 8000));
}
