//! The table of bad inputs: what is sent, and what must come back.
//!
//! The limits are written out as numbers here: a table that took them from the
//! programs would follow a slip in them.

use crate::support::wire::{frame, frame_announcing};
use serde_json::{Map, Value, json};

/// The longest body of a frame, in bytes.
pub(crate) const MAX_FRAME: usize = 16_777_216;
/// The longest key, in bytes.
pub(crate) const MAX_KEY: usize = 16_384;
/// The longest value, in bytes.
pub(crate) const MAX_VALUE: usize = 1_048_576;
/// A megabyte, where much less is allowed.
const MEGABYTE: usize = 1_048_576;

/// What an input must bring.
#[derive(Debug)]
pub(crate) enum Must {
    /// A refusal with these words in it; the connection goes on.
    Refuse(String),
    /// A refusal with these words in it, and then the end of the connection: the
    /// stream has lost its step.
    RefuseAndClose(String),
    /// The end of the connection without a word.
    Close,
}

/// One row of the table.
pub(crate) struct Case {
    /// For people.
    pub(crate) what: String,
    /// What is sent; if it must bring [`Must::Close`], it is all that is sent.
    pub(crate) bytes: Vec<u8>,
    /// What must come back.
    pub(crate) must: Must,
}

/// A body that must be refused.
fn refused(what: impl Into<String>, body: &[u8], words: impl Into<String>) -> Case {
    Case { what: what.into(), bytes: frame(body), must: Must::Refuse(words.into()) }
}

/// Streams that are no frames.
pub(crate) fn broken_frames() -> Vec<Case> {
    let lost = |what: &str, bytes: Vec<u8>, words: &str| Case {
        what: what.to_owned(),
        bytes,
        must: Must::RefuseAndClose(words.to_owned()),
    };
    let torn =
        |what: &str, bytes: Vec<u8>| Case { what: what.to_owned(), bytes, must: Must::Close };
    let over = i32::try_from(MAX_FRAME + 1).unwrap();
    let too_long = "a message of 16777217 bytes is over the limit of 16777216 bytes";
    let good = br#"{"cmd":"query_servers"}"#;
    vec![
        lost("length -1", frame_announcing(-1, b""), "negative length -1"),
        lost("length -1 with a body", frame_announcing(-1, good), "negative length -1"),
        lost("the lowest length", frame_announcing(i32::MIN, b""), "negative length -2147483648"),
        lost("a length over the limit", frame_announcing(over, b""), too_long),
        lost("a body over the limit", frame(&vec![b' '; MAX_FRAME + 1]), too_long),
        lost("the highest length", frame_announcing(i32::MAX, b"{}"), "2147483647 bytes"),
        lost("HTTP", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(), "over the limit"),
        lost("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), "over the limit"),
        torn("nothing at all", Vec::new()),
        torn("half a header", vec![0, 0]),
        torn("a header alone", frame_announcing(100, b"")),
        torn("shorter than announced", frame_announcing(100, good)),
        torn("one byte short", frame_announcing(good.len() as i32 + 1, good)),
        torn("a megabyte of sixteen", frame_announcing(MAX_FRAME as i32, &vec![b'['; MEGABYTE])),
    ]
}

/// Bodies that are no request to anybody.
pub(crate) fn no_requests() -> Vec<Case> {
    let mut cases = vec![refused("length zero", b"", "empty message")];
    for body in [
        "   ",
        "hello",
        "{",
        "{\"cmd\":\"query_servers\"",
        "{'cmd':'get'}",
        "{\"cmd\":\"get\",\"key\":\"a\"} and more",
        "{\"cmd\":\"get\",\"key\":\"a\"}{\"cmd\":\"get\",\"key\":\"a\"}",
        "{\"cmd\":\"get\",}",
        "{\"cmd\":\"get\",\"key\":NaN}",
        "{cmd:\"get\"}",
        "\u{feff}{\"cmd\":\"get\",\"key\":\"a\"}",
        "\0\0\0\0",
        "[1, 2",
    ] {
        cases.push(refused(format!("no JSON: {body:?}"), body.as_bytes(), "not JSON"));
    }
    for body in ["[]", "[{\"cmd\":\"get\"}]", "5", "-1e300", "\"get\"", "\"\"", "null", "true"] {
        cases.push(refused(format!("no object: {body}"), body.as_bytes(), "not a JSON object"));
    }
    for body in ["{}", "{\"key\":\"a\"}", "{\"CMD\":\"get\"}", "{\"cmd\":null}"] {
        cases.push(refused(format!("no cmd: {body}"), body.as_bytes(), "without \"cmd\""));
    }
    for cmd in ["5", "1.5", "true", "[\"get\"]", "{\"get\":{}}", "[]"] {
        let body = format!("{{\"cmd\":{cmd}}}");
        cases.push(refused(format!("cmd that is {cmd}"), body.as_bytes(), "must be text"));
    }
    let long = "x".repeat(MEGABYTE);
    for cmd in ["fly", "", "GET", " get", "get\u{0}", "ключ", &long] {
        let body = json!({"cmd": cmd}).to_string();
        let shown: String = cmd.chars().take(10).collect();
        cases.push(refused(format!("command {shown:?}"), body.as_bytes(), "unknown command"));
    }
    cases.extend(not_utf_8());
    cases.extend(nested_deeply());
    cases
}

fn not_utf_8() -> Vec<Case> {
    vec![
        refused("bytes that are no text", b"\xff\xfe\x00\x80", "not JSON"),
        refused("a cmd that is no UTF-8", b"{\"cmd\":\"\xff\xfe\"}", "not JSON"),
        refused("a cmd with half a surrogate", b"{\"cmd\":\"\\ud800\"}", "not JSON"),
        refused("UTF-16", b"{\0\"\0c\0m\0d\0\"\0:\0t\0}\0", "not JSON"),
    ]
}

fn nested_deeply() -> Vec<Case> {
    const DEPTH: usize = 100_000;
    let nest = |open: &str, close: &str| [open.repeat(DEPTH), close.repeat(DEPTH)].concat();
    vec![
        refused("arrays without end", nest("[", "").as_bytes(), "not JSON"),
        refused("arrays in arrays", nest("[", "]").as_bytes(), "not a JSON object"),
        refused("objects without end", nest("{\"a\":", "").as_bytes(), "not JSON"),
        refused(
            "a cmd of arrays in arrays",
            format!("{{\"cmd\":{}}}", nest("[", "]")).as_bytes(),
            "must be text",
        ),
        refused(
            "an object of objects without a cmd",
            format!("{{\"a\":{}5{}}}", "{\"a\":".repeat(DEPTH), "}".repeat(DEPTH)).as_bytes(),
            "without \"cmd\"",
        ),
    ]
}

/// What a field of a request holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Text.
    Text,
    /// A list of texts.
    Words,
    /// Yes or no.
    Flag,
    /// A number from 0 on.
    Count,
    /// A number or a text that names somebody.
    Identity,
    /// A port that somebody can be reached at.
    Port,
    /// An address that somebody can be reached at.
    Address,
    /// An address that is but a name.
    Via,
    /// A place on the ring: below 10000.
    Point,
    /// The version of a value, as in "7.42"; "0.0" is before all of them.
    Version,
    /// Groups by place and version.
    Places,
    /// Versions of keys.
    Entries,
    /// A place from which to go on.
    Cursor,
}

impl Kind {
    fn good(self) -> Value {
        match self {
            Self::Text => json!("a text"),
            Self::Words => json!(["a", "text"]),
            Self::Flag => json!(true),
            Self::Count => json!(1),
            Self::Identity => json!("somebody"),
            Self::Port => json!(4711),
            Self::Address | Self::Via => json!("127.0.0.1:4711"),
            Self::Point => json!(5),
            Self::Version => json!("7.42"),
            Self::Places => json!([[5, 1]]),
            Self::Entries => json!([{"key": "a text", "version": "7.42", "value": "v"}]),
            Self::Cursor => json!({"point": 5, "key": "a text"}),
        }
    }

    /// Values of another type, or out of range.
    fn wrong(self) -> Vec<Value> {
        let too_long = "x".repeat(257);
        let wrong = match self {
            Self::Text => json!([5, -1.5, true, ["x"], {"a": "b"}]),
            Self::Words => json!(["words", 5, {"a": 1}, [1], [["a"]], [null], ["a", 2]]),
            Self::Flag => json!(["yes", 1, [], {}]),
            Self::Count => json!([-1, 1.5, "5", true, [], {}, 1e30]),
            Self::Identity => json!([true, [1], {}, too_long]),
            Self::Port => json!([0, -1, 65536, 1.5, "4711", true, [4711]]),
            Self::Address => {
                let mut all = Self::Via.wrong();
                all.extend([json!("127.0.0.1:0"), json!("0.0.0.0:4711")]);
                return all;
            }
            Self::Via => json!([
                "nowhere",
                "localhost:1",
                "127.0.0.1",
                "[::1]:80",
                "1.2.3.4:65536",
                5,
                {},
                ""
            ]),
            Self::Point => json!([-1, 10_000, 65_535, 65_536, "5", 1.5, []]),
            Self::Version => {
                json!([
                    "",
                    "7",
                    "7.",
                    ".42",
                    "7.x",
                    "1.2.3",
                    "-1.2",
                    "7.18446744073709551616",
                    7.42,
                    5,
                    [7, 42]
                ])
            }
            Self::Places => {
                json!([5, [5], [[1]], [[1, 2, 3]], [["a", 1]], [[10_000, 1]], [[1, -1]]])
            }
            Self::Entries => json!([
                5,
                {},
                [5],
                [{"key": "k"}],
                [{"key": 5, "version": "1.1", "value": "v"}],
                [{"key": "k", "version": "1", "value": "v"}],
                // Writes are counted from 1.
                [{"key": "k", "version": "1.0", "value": "v"}],
            ]),
            Self::Cursor => {
                json!([5, {}, {"point": "x"}, {"point": 10_000}, {"point": 65_535, "key": "k"}])
            }
        };
        wrong.as_array().unwrap().clone()
    }
}

type Field = (&'static str, Kind);

/// A command and its fields.
pub(crate) struct Command {
    /// Its name.
    pub(crate) cmd: &'static str,
    required: &'static [Field],
    optional: &'static [Field],
}

const fn command(
    cmd: &'static str,
    required: &'static [Field],
    optional: &'static [Field],
) -> Command {
    Command { cmd, required, optional }
}

const KEY: Field = ("key", Kind::Text);
const VAL: Field = ("val", Kind::Text);
const VIA: Field = ("via", Kind::Via);
const START: Field = ("start", Kind::Point);
const IN_VERSION: Field = ("version", Kind::Count);
const REQUESTOR: Field = ("requestor", Kind::Identity);
const LOCK: Field = ("lockid", Kind::Text);

/// What a viewleader understands.
pub(crate) const VIEWLEADER: &[Command] = &[
    command(
        "heartbeat",
        &[("port", Kind::Port), REQUESTOR],
        &[("address", Kind::Address), ("lease_ms", Kind::Count), ("seen", Kind::Count)],
    ),
    command("query_view", &[], &[("after", Kind::Count), ("wait_ms", Kind::Count)]),
    command("report", &[REQUESTOR], &[("ready", Kind::Places), ("established", Kind::Places)]),
    command("lock_get", &[LOCK, REQUESTOR], &[]),
    command("lock_release", &[LOCK, REQUESTOR], &[]),
];

/// What a server understands.
pub(crate) const SERVER: &[Command] = &[
    command("print", &[("text", Kind::Words)], &[]),
    command("set", &[KEY, VAL], &[]),
    command("get", &[KEY], &[]),
    command("query_all_keys", &[], &[("after", Kind::Text), ("limit", Kind::Count)]),
    command("setr_request", &[KEY], &[]),
    command("setr_deny", &[KEY], &[]),
    command("setr", &[KEY, VAL], &[("direct", Kind::Flag)]),
    command("getr", &[KEY], &[]),
    command("primary_get", &[KEY], &[]),
    command("primary_set", &[KEY, VAL], &[]),
    command("primary_vote", &[KEY, VIA], &[]),
    command("primary_commit", &[KEY, VAL, VIA], &[]),
    command("primary_deny", &[KEY, VIA], &[]),
    command(
        "prepare",
        &[START, IN_VERSION, ("committed", Kind::Version), ("entries", Kind::Entries)],
        &[],
    ),
    command("establish", &[START, IN_VERSION], &[]),
    command("fetch", &[START, IN_VERSION], &[("after", Kind::Cursor)]),
];

impl Command {
    /// The command with every field that it needs.
    pub(crate) fn good(&self) -> Value {
        let fields = self.required.iter().map(|(name, kind)| ((*name).to_owned(), kind.good()));
        let cmd = [("cmd".to_owned(), json!(self.cmd))];
        Value::Object(cmd.into_iter().chain(fields).collect::<Map<_, _>>())
    }

    /// The command with one field missing or of the wrong type, in every way.
    pub(crate) fn bad(&self) -> Vec<Case> {
        let cmd = self.cmd;
        let mut cases = Vec::new();
        for (name, _) in self.required {
            let mut request = self.good();
            request.as_object_mut().unwrap().remove(*name);
            let words = format!("{cmd}: missing field `{name}`");
            let what = format!("{cmd} without {name}");
            cases.push(refused(what, request.to_string().as_bytes(), words));
        }
        let with = |(name, _): &Field, wrong: &str| {
            // By text: some of the wrong ones can't be told by a `Value`.
            let mut request = self.good();
            request.as_object_mut().unwrap().remove(*name);
            let rest = request.to_string();
            let body = format!("{{\"{name}\":{wrong},{}", &rest[1..]);
            let shown: String = wrong.chars().take(60).collect();
            refused(format!("{cmd} with {name} = {shown}"), body.as_bytes(), format!("{cmd}: "))
        };
        for field in self.required {
            cases.push(with(field, "null"));
            // As deep as a parser that calls itself would not survive.
            cases.push(with(field, &["[".repeat(100_000), "]".repeat(100_000)].concat()));
            cases.push(with(field, "[\"\\ud800\"]"));
        }
        for field in self.required.iter().chain(self.optional) {
            cases.extend(field.1.wrong().iter().map(|wrong| with(field, &wrong.to_string())));
            // What is wrong must not come back at its full length.
            let long = "x".repeat(MEGABYTE);
            cases.push(with(field, &json!({ "x": long }).to_string()));
            if !matches!(field.1, Kind::Text) {
                cases.push(with(field, &json!(long).to_string()));
            }
        }
        cases.extend(self.with_bad_texts());
        cases
    }

    /// The command with a text that is no UTF-8, or one that is too long.
    fn with_bad_texts(&self) -> Vec<Case> {
        let cmd = self.cmd;
        let mut cases = Vec::new();
        let texts =
            self.required.iter().filter(|(_, kind)| matches!(kind, Kind::Text | Kind::Identity));
        for (name, _) in texts {
            let mut request = self.good();
            request[*name] = json!("\u{1}");
            let mut body = request.to_string().into_bytes();
            // JSON writes that letter as \u0001: six bytes, of which one stays.
            let at = body.windows(6).position(|six| six == b"\\u0001").unwrap();
            body.splice(at..at + 6, *b"\xff");
            cases.push(refused(format!("{cmd}: {name} is no UTF-8"), &body, format!("{cmd}: ")));
            let limit = match *name {
                "key" => MAX_KEY,
                "val" => MAX_VALUE,
                "lockid" => 1024,
                _ => 256,
            };
            for length in [limit + 1, 2 * MEGABYTE] {
                request[*name] = json!("x".repeat(length));
                let words = match *name {
                    "key" | "val" => {
                        format!("of {length} bytes is over the limit of {limit} bytes")
                    }
                    "lockid" => format!("of {length} bytes is over the limit of {limit}"),
                    _ => format!("at most {limit} bytes"),
                };
                let what = format!("{cmd}: {name} of {length} bytes");
                cases.push(refused(what, request.to_string().as_bytes(), words));
            }
        }
        cases
    }
}
