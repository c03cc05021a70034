//! From one input, another that is like it.

use rand::RngExt;
use rand::rngs::StdRng;

/// The longest input that is made.
const MAX_BYTES: usize = 16 * 1024;

/// What our formats are made of.
const TOKENS: [&str; 24] = [
    "{}",
    "[]",
    "null",
    "true",
    "0",
    "-1",
    "1e999",
    "65536",
    "9999",
    "10000",
    "18446744073709551615",
    "18446744073709551616",
    "\"\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"0.0\"",
    "\"18446744073709551615.18446744073709551615\"",
    "\"127.0.0.1:38000\"",
    "\n",
    "\ntick 5000\n",
    "\nstored\n",
    "\nwork\n",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    "\u{0}",
];

/// An input like `input`, with pieces of `other` in it now and then.
pub(crate) fn mutate(rng: &mut StdRng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..rng.random_range(1..=4) {
        once(rng, &mut bytes, other);
    }
    bytes.truncate(MAX_BYTES);
    bytes
}

fn once(rng: &mut StdRng, bytes: &mut Vec<u8>, other: &[u8]) {
    let at = rng.random_range(0..=bytes.len());
    let end = (at + rng.random_range(0..16)).min(bytes.len());
    match rng.random_range(0..11) {
        0 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
        1 if at < bytes.len() => bytes[at] = rng.random(),
        2 => bytes.insert(at, rng.random()),
        3 => drop(bytes.drain(at..end)),
        4 => bytes.truncate(at),
        5 => {
            let token = TOKENS[rng.random_range(0..TOKENS.len())];
            drop(bytes.splice(at..at, token.bytes()));
        }
        6 => {
            // One value in the place of another.
            if let Some((start, end)) = value_at(bytes, at) {
                let token = TOKENS[rng.random_range(0..TOKENS.len())];
                drop(bytes.splice(start..end, token.bytes()));
            }
        }
        7 => {
            if let Some((start, end)) = value_at(bytes, at) {
                let from = rng.random_range(0..=other.len());
                if let Some((from, to)) = value_at(other, from) {
                    drop(bytes.splice(start..end, other[from..to].iter().copied()));
                }
            }
        }
        8 => {
            let from = rng.random_range(0..=other.len());
            bytes.truncate(at);
            bytes.extend(&other[from..]);
        }
        9 => {
            // A line once more, or one of another input, elsewhere.
            let source = if rng.random() { bytes.clone() } else { other.to_vec() };
            let lines: Vec<&[u8]> = source.split(|&byte| byte == b'\n').collect();
            let line = [lines[rng.random_range(0..lines.len())], b"\n"].concat();
            let start = bytes[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |it| it + 1);
            drop(bytes.splice(start..start, line));
        }
        _ => {
            // A line less.
            let start = bytes[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |it| it + 1);
            let end = bytes[at..].iter().position(|&byte| byte == b'\n');
            drop(bytes.drain(start..end.map_or(bytes.len(), |end| at + end + 1)));
        }
    }
}

/// Where the number, word or text ends that stands at or behind `at`.
fn value_at(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let is_edge = |byte: &u8| b",:[]{}\n ".contains(byte);
    let start = at + bytes[at..].iter().position(|byte| !is_edge(byte))?;
    let start = bytes[..start].iter().rposition(is_edge).map_or(0, |edge| edge + 1);
    let end = bytes[start..].iter().position(is_edge).map_or(bytes.len(), |end| start + end);
    Some((start, end))
}
