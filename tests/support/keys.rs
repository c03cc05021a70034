//! Many keys at once, and where each of them must be.
//!
//! Which server must hold which key is worked out here from the page on the
//! original, not with the project's own ring, so that a fault there can't hide
//! itself.

use super::process::{PATIENCE, within};
use super::systems::Listing;
use super::wire::{Connection, call, frame};
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::thread;

/// How many requests are under way on one connection.
const WINDOW: usize = 250;

// ---- the rule of the reference ----

/// Where `text` stands on the ring: its SHA-1 as an integer, modulo 10000.
pub(crate) fn place(text: &str) -> u64 {
    Sha1::digest(text).iter().fold(0, |rest, byte| (rest * 256 + u64::from(*byte)) % 10_000)
}

/// The replicas of `key`: the server with the highest hash not above the key's,
/// else the one with the highest of all, and the next two in ascending order.
pub(crate) fn replicas_of(key: &str, listing: &Listing) -> BTreeSet<SocketAddrV4> {
    let (servers, point) = (&listing.servers, place(key));
    let owner = servers.iter().rposition(|(_, hash)| *hash <= point);
    let owner = owner.unwrap_or(servers.len() - 1);
    (0..servers.len().min(3)).map(|step| servers[(owner + step) % servers.len()].0).collect()
}

/// The keys that the server at `address` lists, each of them once.
pub(crate) fn keys_of(address: SocketAddrV4) -> BTreeSet<String> {
    let reply = call(address, &json!({"cmd": "query_all_keys"})).value();
    let listed = reply["result"].as_array().unwrap();
    let keys: BTreeSet<String> =
        listed.iter().map(|key| key.as_str().unwrap().to_owned()).collect();
    assert_eq!(keys.len(), listed.len(), "{address} lists a key twice");
    keys
}

/// Waits until every key is on exactly the servers that the rule names, of those
/// that `viewleader` lists, and returns all keys. (A replica hears that a write
/// is committed a moment after the client does.)
///
/// # Panics
/// If that does not come about.
pub(crate) fn wait_until_placed(viewleader: SocketAddrV4) -> BTreeSet<String> {
    let listing = Listing::of(viewleader).unwrap();
    assert!(listing.servers.is_sorted_by_key(|(_, hash)| *hash));
    let mut wrong = String::new();
    let placed = within(PATIENCE, || {
        let held: BTreeMap<_, _> =
            listing.servers.iter().map(|(at, _)| (*at, keys_of(*at))).collect();
        let all: BTreeSet<String> = held.values().flatten().cloned().collect();
        let misplaced = all.iter().find_map(|key| {
            let due = replicas_of(key, &listing);
            let found: BTreeSet<_> =
                held.iter().filter(|(_, keys)| keys.contains(key)).map(|(at, _)| *at).collect();
            (due != found).then(|| format!("{key}: due at {due:?}, found at {found:?}"))
        });
        match misplaced {
            None => Some(all),
            Some(key) => {
                wrong = key;
                None
            }
        }
    });
    placed.unwrap_or_else(|| panic!("not where it must be: {wrong}"))
}

// ---- many calls ----

/// A write in our own way.
pub(crate) fn setr(key: &str, value: &str) -> Value {
    json!({"cmd": "setr", "key": key, "val": value, "direct": true})
}

/// A read.
pub(crate) fn getr(key: &str) -> Value {
    json!({"cmd": "getr", "key": key})
}

/// What is written under `key`, where it does not matter what.
pub(crate) fn value_of(key: &str) -> String {
    format!("the value of {key}")
}

/// Sends `requests` to `address`, many at a time, and returns the answers.
pub(crate) fn pipelined(
    address: SocketAddrV4,
    requests: impl Iterator<Item = Value>,
) -> Vec<Value> {
    let mut connection = Connection::open(address).unwrap();
    let requests: Vec<Value> = requests.collect();
    let mut replies = Vec::with_capacity(requests.len());
    for window in requests.chunks(WINDOW) {
        let frames = window.iter().flat_map(|request| frame(request.to_string().as_bytes()));
        connection.send(&frames.collect::<Vec<u8>>());
        replies.extend(window.iter().map(|_| connection.receive().value()));
    }
    replies
}

/// Writes all `pairs` through the server at `address`.
///
/// # Panics
/// If one of them is not acknowledged.
pub(crate) fn write_all(address: SocketAddrV4, pairs: &[(String, String)]) {
    let replies = pipelined(address, pairs.iter().map(|(key, value)| setr(key, value)));
    for ((key, _), reply) in pairs.iter().zip(replies) {
        assert_eq!(reply["status"], "ok", "{key} through {address}: {reply}");
    }
}

/// Reads all `pairs` through the server at `address`.
///
/// # Panics
/// If one of them is not there or has another value.
pub(crate) fn assert_all(address: SocketAddrV4, pairs: &[(String, String)]) {
    let replies = pipelined(address, pairs.iter().map(|(key, _)| getr(key)));
    for ((key, value), reply) in pairs.iter().zip(replies) {
        assert_eq!(reply["value"], *value, "{key} from {address}: {reply}");
    }
}

/// So many keys that begin with `name`, each with its [`value_of`].
pub(crate) fn pairs(name: &str, count: usize) -> Vec<(String, String)> {
    let key = |number| format!("{name} {number}");
    (0..count).map(|number| (key(number), value_of(&key(number)))).collect()
}

/// Asks each of `servers` for each of `keys`.
///
/// # Panics
/// If one of them does not have its [`value_of`].
pub(crate) fn assert_readable<'a>(
    servers: &[SocketAddrV4],
    keys: impl Iterator<Item = &'a String> + Clone + Send,
) {
    thread::scope(|scope| {
        for address in servers {
            let keys = keys.clone();
            scope.spawn(move || {
                let replies = pipelined(*address, keys.clone().map(|key| getr(key)));
                for (key, reply) in keys.zip(replies) {
                    assert_eq!(reply["value"], value_of(key), "{key} from {address}: {reply}");
                }
            });
        }
    });
}
