//! What is done to both systems, in order: the calls and the command lines.

use crate::SERVERS;
use crate::support::wire::{frame, frame_announcing};
use serde_json::{Value, json};
use std::fmt;

/// Whom a step addresses.
#[derive(Clone, Copy)]
pub(crate) enum To {
    Server(usize),
    Viewleader,
}

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            To::Server(index) => write!(f, "server {index}"),
            To::Viewleader => f.write_str("viewleader"),
        }
    }
}

/// One thing to do to a system.
pub(crate) enum Act {
    /// Send these bytes on a connection of their own.
    Send(To, Vec<u8>),
    /// Send this request twice on one connection.
    CallTwice(To, Value),
    /// Run the system's own client.
    Client(&'static [&'static str]),
    /// Look for a line on the standard output of this server.
    Printed(usize, &'static str),
    /// Find the hash of the server that was announced with this port.
    HashOf(u16),
    /// Wait until the server that was announced with this port has expired.
    Expiry(u16),
}

pub(crate) struct Step {
    /// What the table calls it; no two steps have the same.
    pub(crate) call: String,
    pub(crate) act: Act,
}

fn send(to: To, situation: &str, bytes: Vec<u8>) -> Step {
    Step { call: format!("{to}: {situation}"), act: Act::Send(to, bytes) }
}

fn wire(to: To, situation: &str, request: Value) -> Step {
    send(to, situation, frame(&serde_json::to_vec(&request).unwrap()))
}

fn client(arguments: &'static [&'static str]) -> Step {
    Step { call: format!("client {}", arguments.join(" ")), act: Act::Client(arguments) }
}

/// Everything that is done, in order: what may upset the reference comes last.
pub(crate) fn steps(patient: bool) -> Vec<Step> {
    let mut steps = plain_calls();
    steps.extend(votes());
    steps.extend(command_lines());
    steps.extend(bad_messages_to_a_server());
    steps.extend(locks());
    steps.extend(heartbeats());
    if patient {
        steps.extend(what_takes_long());
    }
    steps.extend(bad_messages_to_the_viewleader());
    steps
}

fn plain_calls() -> Vec<Step> {
    let server = |situation, request| wire(To::Server(0), situation, request);
    vec![
        server("print", json!({"cmd": "print", "text": ["hello", "world"]})),
        Step {
            call: "server 0: the words are on its output".to_owned(),
            act: Act::Printed(0, "hello world"),
        },
        server("get, not found", json!({"cmd": "get", "key": "a"})),
        server("set", json!({"cmd": "set", "key": "a", "val": "1"})),
        server("get, found", json!({"cmd": "get", "key": "a"})),
        server("set, once more", json!({"cmd": "set", "key": "a", "val": "2"})),
        server("get, overwritten", json!({"cmd": "get", "key": "a"})),
        wire(To::Server(1), "get, set on another server", json!({"cmd": "get", "key": "a"})),
        server(
            "set, with an old client's other arguments",
            json!({"cmd": "set", "key": "b c", "val": "é", "server": "localhost",
                   "viewleader": "localhost", "port": null}),
        ),
        server("get, not ASCII", json!({"cmd": "get", "key": "b c"})),
        server(
            "set, a message of nearly 8192 bytes",
            json!({"cmd": "set", "key": "long", "val": "v".repeat(8000)}),
        ),
        server("get, a reply of nearly 8192 bytes", json!({"cmd": "get", "key": "long"})),
        server("query_all_keys", json!({"cmd": "query_all_keys"})),
    ]
}

fn votes() -> Vec<Step> {
    let vote = |key| json!({"cmd": "setr_request", "key": key});
    let commit = |key, val| json!({"cmd": "setr", "key": key, "val": val});
    let deny = |key| json!({"cmd": "setr_deny", "key": key});
    let get = |key| json!({"cmd": "get", "key": key});
    let server = |situation, request| wire(To::Server(0), situation, request);
    let mut steps = vec![
        server("setr_request", vote("one")),
        server("setr_request, a second one", vote("one")),
        server("setr_deny", deny("one")),
        server("setr_deny, nothing pending", deny("one")),
        server("get, denied", get("one")),
        server("setr_request, after the deny", vote("one")),
        server("setr", commit("one", "by one")),
        server("get, committed", get("one")),
        wire(To::Server(1), "get, committed through server 0", get("one")),
        server("setr_request, after the commit", vote("one")),
        server("setr_deny, the value stays", deny("one")),
        server("get, still there", get("one")),
    ];
    for index in 0..usize::from(SERVERS) {
        steps.push(wire(To::Server(index), "setr_request, to all", vote("all")));
    }
    for index in 0..usize::from(SERVERS) {
        steps.push(wire(To::Server(index), "setr, to all", commit("all", "by all")));
    }
    for index in 0..usize::from(SERVERS) {
        steps.push(wire(To::Server(index), "get, committed on all", get("all")));
    }
    steps.push(server("setr without a vote", commit("alone", "no vote")));
    steps.push(server("get, set without a vote", get("alone")));
    steps
}

fn command_lines() -> Vec<Step> {
    let mut steps = vec![
        client(&["print", "good", "morning"]),
        Step {
            call: "client print, the words are on server 0's output".to_owned(),
            act: Act::Printed(0, "good morning"),
        },
        client(&["set", "apple", "green"]),
        client(&["get", "apple"]),
        client(&["get", "nothing"]),
        client(&["setr", "pear", "yellow"]),
        client(&["getr", "pear"]),
        client(&["getr", "nothing"]),
        client(&["query_all_keys"]),
        client(&["query_servers"]),
        client(&["lock_get", "door", "me"]),
        client(&["lock_release", "door", "me"]),
        client(&["lock_release", "no-such-lock", "me"]),
        client(&["setr", "plum", "by setr"]),
    ];
    for index in 0..usize::from(SERVERS) {
        let request = json!({"cmd": "set", "key": "plum", "val": "by set"});
        steps.push(wire(To::Server(index), "set, a replicated key", request));
    }
    steps.push(client(&["getr", "plum"]));
    steps
}

fn bad_messages_to_a_server() -> Vec<Step> {
    // To the last server, so that one that does not survive them is not missed.
    let to = To::Server(usize::from(SERVERS) - 1);
    let bad = |situation, request| wire(to, situation, request);
    vec![
        bad(
            "set, a message over 8192 bytes",
            json!({"cmd": "set", "key": "longer", "val": "v".repeat(9000)}),
        ),
        bad("get, a reply over 8192 bytes", json!({"cmd": "get", "key": "longer"})),
        send(to, "a negative length", frame_announcing(-1, b"")),
        send(to, "an empty message", frame(b"")),
        send(to, "not JSON", frame(b"hello")),
        bad("JSON, but no object", json!([1, 2])),
        bad("no cmd", json!({"key": "a"})),
        bad("an unknown cmd", json!({"cmd": "make_tea"})),
        bad("set without val", json!({"cmd": "set", "key": "a"})),
        bad("get, the key a list", json!({"cmd": "get", "key": ["a"]})),
        bad("set, the key a number", json!({"cmd": "set", "key": 5, "val": "v"})),
        Step {
            call: format!("{to}: two calls on a connection"),
            act: Act::CallTwice(to, json!({"cmd": "set", "key": "twice", "val": "v"})),
        },
    ]
}

fn locks() -> Vec<Step> {
    let get = |situation, who| {
        let request = json!({"cmd": "lock_get", "lockid": "l", "requestor": who});
        wire(To::Viewleader, &format!("lock_get by {situation}"), request)
    };
    let release = |situation, who| {
        let request = json!({"cmd": "lock_release", "lockid": "l", "requestor": who});
        wire(To::Viewleader, &format!("lock_release by {situation}"), request)
    };
    vec![
        release("a, no such lock", "a"),
        get("a, free", "a"),
        get("a, while holding", "a"),
        get("b, held", "b"),
        get("c, held", "c"),
        get("d, held", "d"),
        get("b, queued already", "b"),
        release("b, leaving the queue", "b"),
        get("b, queued again, last", "b"),
        release("a, holding", "a"),
        get("d, not its turn", "d"),
        get("c, its turn", "c"),
        get("a, held by c", "a"),
        release("c, holding", "c"),
        get("d, its turn", "d"),
        release("d, holding", "d"),
        get("b, its turn", "b"),
        release("b, holding", "b"),
        get("a, its turn", "a"),
        release("a, the last one", "a"),
        release("a, free again", "a"),
    ]
}

/// Servers that exist by their heartbeats alone. From here on neither system can
/// place keys any more.
fn heartbeats() -> Vec<Step> {
    let beat = |situation, port: u16, who: Value| {
        let request = json!({"cmd": "heartbeat", "port": port, "requestor": who});
        wire(To::Viewleader, &format!("heartbeat, {situation}"), request)
    };
    let hash_of = |situation, port| Step {
        call: format!("viewleader: hash of {situation}"),
        act: Act::HashOf(port),
    };
    vec![
        wire(To::Viewleader, "query_servers", json!({"cmd": "query_servers"})),
        beat("a new server", 1, json!(4711)),
        beat("once more", 1, json!(4711)),
        beat("another on its address", 1, json!(4712)),
        hash_of("the identity 4711", 1),
        // A number whose text a parser of floats might change.
        send(
            To::Viewleader,
            "heartbeat, a small number",
            frame(br#"{"cmd": "heartbeat", "port": 2, "requestor": 4.5e-05}"#),
        ),
        hash_of("the identity 4.5e-05", 2),
        beat("a text", 3, json!("reader")),
        hash_of("the identity \"reader\"", 3),
    ]
}

/// Waits for a lease of 30 s; only where somebody asked for the comparison.
fn what_takes_long() -> Vec<Step> {
    let beat = |situation, who: u64| {
        let request = json!({"cmd": "heartbeat", "port": 1, "requestor": who});
        wire(To::Viewleader, &format!("heartbeat, {situation}"), request)
    };
    let vote = || json!({"cmd": "setr_request", "key": "abandoned"});
    vec![
        wire(To::Server(0), "setr_request, never followed up", vote()),
        Step {
            call: "viewleader: 4711 is not listed after a lease".to_owned(),
            act: Act::Expiry(1),
        },
        beat("after the lease ran out", 4711),
        beat("a new one on that address", 4713),
        wire(To::Server(0), "setr_request after a client died", vote()),
    ]
}

fn bad_messages_to_the_viewleader() -> Vec<Step> {
    let bad = |situation, request| wire(To::Viewleader, situation, request);
    let stranger = json!({"cmd": "lock_release", "lockid": "held", "requestor": "stranger"});
    vec![
        bad(
            "lock_get, a lock to keep",
            json!({"cmd": "lock_get", "lockid": "held", "requestor": "a"}),
        ),
        bad("lock_release by a stranger", stranger),
        bad("lock_get without requestor", json!({"cmd": "lock_get", "lockid": "held"})),
        bad("heartbeat without port", json!({"cmd": "heartbeat", "requestor": 4714})),
        bad("an unknown cmd", json!({"cmd": "make_tea"})),
        bad("no cmd", json!({})),
        send(To::Viewleader, "not JSON", frame(b"hello")),
        send(To::Viewleader, "a negative length", frame_announcing(i32::MIN, b"")),
        bad(
            "lock_get, it still works",
            json!({"cmd": "lock_get", "lockid": "held", "requestor": "a"}),
        ),
    ]
}
