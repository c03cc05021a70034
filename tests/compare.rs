//! The comparison with the reference: the same calls to both systems, and the
//! replies side by side.
//!
//! `make compare REFERENCE=DIR` runs it against a user's own copy of the
//! original scripts; without that it runs against the stand-ins of
//! tests/reference, or says that there is no Python and passes. The reference
//! and ours are started side by side, each with a viewleader and three servers;
//! both are driven by the same [`steps`], in the same order, and what comes back
//! is compared after [`normalised`] has taken out what may vary: epochs, hashes,
//! addresses, the order of keys, the wording of errors.
//!
//! A reply that is not the same must be one that [`DIFFERENCES`] expects, to the
//! letter, and the sentence that explains it there must stand in the README. So
//! the README can't keep a difference quiet; nor can it claim one that is gone,
//! since against the stand-ins each of them must show.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test may panic, the table is its outcome, and it has threads"
)]

#[path = "compare/steps.rs"]
mod steps;
mod support;
#[path = "compare/verdict.rs"]
mod verdict;

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::thread;
use std::time::Duration;
use steps::{Act, Step, To, steps};
use support::process::{PATIENCE, run, wait_until, within};
use support::systems::{Listing, Ours, Reference, Scripts, System};
use support::wire::{Connection, Reply, exchange};
use verdict::{DIFFERENCES, FURTHER_FIELDS, OWN_WORDS, Verdict, judge, normalised};

/// How many servers each system has.
const SERVERS: u16 = 3;

/// Does all `steps` to `system` and returns what each of them gave.
fn drive(system: &dyn System, steps: &[Step], scripts: &Scripts) -> Vec<Value> {
    let address = |to: To| match to {
        To::Server(index) => system.servers()[index],
        To::Viewleader => system.viewleader(),
    };
    let announced = |port: u16| {
        let listing = Listing::of(system.viewleader())?;
        listing.servers.into_iter().find(|(address, _)| address.port() == port)
    };
    let outcome = |step: &Step| match &step.act {
        Act::Send(to, bytes) => told(exchange(address(*to), bytes)),
        Act::CallTwice(to, request) => {
            let mut connection = Connection::open(address(*to)).expect("it listens");
            json!([told(connection.call(request)), told(connection.call(request))])
        }
        Act::Client(arguments) => {
            printed_reply(&run("client", &mut system.client(arguments)).stdout, scripts)
        }
        Act::Printed(server, words) => {
            let there = || system.printed(*server).lines().any(|line| line.trim() == *words);
            let seen = within(Duration::from_secs(5), || there().then_some(()));
            json!(if seen.is_some() { "(printed)" } else { "(not printed)" })
        }
        Act::HashOf(port) => json!(announced(*port).map(|(_, hash)| hash)),
        Act::Expiry(port) => {
            let gone = || announced(*port).is_none().then_some(());
            wait_until("a server without heartbeats expires", PATIENCE, gone);
            json!("(gone)")
        }
    };
    steps.iter().map(|step| normalised(outcome(step))).collect()
}

fn told(reply: Reply) -> Value {
    match reply {
        Reply::Value(value) => value,
        Reply::Closed => json!("(closed)"),
        Reply::Silent => json!("(no answer)"),
        Reply::Refused => json!("(nobody listens)"),
    }
}

/// The reply in what a client printed: JSON, or a Python literal, from the first
/// bracket of the last line on; else all that was printed, as text.
fn printed_reply(output: &str, scripts: &Scripts) -> Value {
    let last = output.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    let reply = last.find(['{', '[']).and_then(|start| {
        let text = last[start..].trim_end();
        serde_json::from_str(text).ok().or_else(|| scripts.literal(text))
    });
    reply.unwrap_or_else(|| json!(output.trim()))
}

/// One line of the table.
struct Row {
    /// The call, the reference's reply and ours.
    cells: [String; 3],
    verdict: Verdict,
    sentence: Option<&'static str>,
}

impl Row {
    fn is_unexplained(&self) -> bool {
        self.verdict != Verdict::Same && self.sentence.is_none()
    }
}

/// Prints the rows in columns, and the sentences that they point to below.
fn print_table(rows: &[Row]) {
    let titles = ["call", "reference", "ours"].map(str::to_owned);
    let widths: [usize; 3] = std::array::from_fn(|column| {
        let lengths = rows.iter().map(|row| row.cells[column].chars().count());
        lengths.chain([titles[column].len()]).max().unwrap_or(0)
    });
    let line = |cells: &[String; 3], last: &str| {
        let [call, reference, ours] = widths;
        println!("{:call$} | {:reference$} | {:ours$} | {last}", cells[0], cells[1], cells[2]);
    };
    println!();
    line(&titles, "verdict");
    line(&widths.map(|width| "-".repeat(width)), "-------");
    let mut sentences: Vec<&str> = Vec::new();
    for row in rows {
        let mut verdict = row.verdict.to_string();
        if let Some(sentence) = row.sentence {
            if !sentences.contains(&sentence) {
                sentences.push(sentence);
            }
            let place = sentences.iter().position(|known| *known == sentence);
            verdict += &format!(" [{}]", place.map_or(0, |index| index + 1));
        } else if row.is_unexplained() {
            verdict += " [unexplained]";
        }
        line(&row.cells, &verdict);
    }
    println!();
    for (index, sentence) in sentences.iter().enumerate() {
        println!("[{}] {sentence}", index + 1);
    }
    let count = |verdict| rows.iter().filter(|row| row.verdict == verdict).count();
    let [same, different, better] = [Verdict::Same, Verdict::Different, Verdict::Better].map(count);
    println!("{} calls: {same} same, {different} different, {better} better", rows.len());
}

/// `reply` for the table: no longer than a column should be.
fn cell(reply: &Value) -> String {
    const WIDEST: usize = 56;
    let text = match reply {
        Value::String(text) => text.replace('\n', " / "),
        other => other.to_string(),
    };
    if text.chars().count() <= WIDEST {
        return text;
    }
    text.chars().take(WIDEST - 3).chain("...".chars()).collect()
}

/// The README with every run of white space made one space, as its sentences may
/// be wrapped.
fn readme() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(path).expect("the README");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn comparison_with_the_reference_finds_only_what_the_readme_tells() {
    let asked = std::env::var_os("RINGLEADER_COMPARE").filter(|folder| !folder.is_empty());
    let scripts = match &asked {
        Some(folder) => Scripts::originals(Path::new(folder)),
        None => Scripts::stand_ins(),
    };
    let Some(scripts) = scripts else { return };
    let reference = match &asked {
        Some(_) => Reference::start_on_the_originals_ports(scripts, SERVERS),
        None => Reference::start(scripts, SERVERS),
    };
    let ours = Ours::start(usize::from(SERVERS));

    let steps = steps(asked.is_some());
    let (theirs, ours) = thread::scope(|scope| {
        let theirs = scope.spawn(|| drive(&reference, &steps, &reference.scripts));
        let ours = drive(&ours, &steps, &reference.scripts);
        (theirs.join().expect("the reference could be driven"), ours)
    });
    let rows: Vec<Row> = steps
        .iter()
        .zip(theirs.iter().zip(&ours))
        .map(|(step, (theirs, ours))| {
            let (verdict, sentence) = judge(&step.call, theirs, ours);
            Row { cells: [step.call.clone(), cell(theirs), cell(ours)], verdict, sentence }
        })
        .collect();
    print_table(&rows);

    let readme = readme();
    for sentence in rows.iter().filter_map(|row| row.sentence) {
        assert!(readme.contains(sentence), "the README does not say: {sentence}");
    }
    let unexplained: Vec<_> =
        rows.iter().filter(|row| row.is_unexplained()).map(|row| &row.cells).collect();
    assert!(unexplained.is_empty(), "not the same, and not in DIFFERENCES: {unexplained:#?}");
    if asked.is_none() {
        let shown = |sentence| rows.iter().any(|row| row.sentence == Some(sentence));
        let gone: Vec<_> = DIFFERENCES
            .iter()
            .filter(|difference| steps.iter().any(|step| difference.is_expected_in(&step.call)))
            .map(|difference| difference.sentence)
            .filter(|sentence| !shown(sentence))
            .collect();
        assert!(gone.is_empty(), "the stand-ins differ in this no more: {gone:#?}");
    }
}

#[test]
fn the_readme_tells_every_difference_that_may_show() {
    let readme = readme();
    let expected = DIFFERENCES.iter().map(|difference| difference.sentence);
    let missing: Vec<_> = expected
        .chain([FURTHER_FIELDS, OWN_WORDS])
        .filter(|sentence| !readme.contains(sentence))
        .collect();
    assert!(missing.is_empty(), "the README lacks: {missing:#?}");
}

#[test]
fn every_expected_difference_belongs_to_one_step() {
    let steps = steps(true);
    let calls: BTreeSet<&str> = steps.iter().map(|step| step.call.as_str()).collect();
    assert_eq!(calls.len(), steps.len(), "two steps have one name");
    for (call, reply) in DIFFERENCES.iter().flat_map(|difference| difference.replies) {
        assert!(calls.contains(call), "no step is called {call:?}");
        assert!(serde_json::from_str::<Value>(reply).is_ok(), "{reply}");
    }
}
