//! Groups of nodes that replicate a log, without their shells: golden scripts, and
//! runs of random chance.
//!
//! The nodes are the real ones, on a virtual network, clock and disks
//! (`consensus/world.rs`); what they apply is a list of numbers, each proposed once.
//! After every step it is checked that nothing promised is broken (`Oracle`). The
//! commands of the scripts are listed in `consensus/script.rs`. `SEEDS=n` runs more
//! seeds, `SEED=n` one, and prints all of it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test may panic, and says which script failed"
)]

#[path = "machines/arguments.rs"]
#[allow(dead_code, reason = "shared")]
mod arguments;
#[path = "consensus/chance.rs"]
mod chance;
#[path = "consensus/oracle.rs"]
mod oracle;
#[path = "consensus/script.rs"]
mod script;
#[path = "consensus/world.rs"]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

#[test]
fn groups_do_what_their_scripts_say() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/scripts/consensus");
    let wanted = std::env::var("SCRIPT").unwrap_or_default();
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut scripts: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    scripts.retain(|script| script.to_string_lossy().contains(&wanted));
    scripts.sort_unstable();
    let failed = scripts.iter().filter(|path| {
        println!("{}", path.display());
        let run = || goldenscript::run(&mut script::GroupScript::default(), path);
        let outcome = catch_unwind(AssertUnwindSafe(run));
        if let Ok(Err(error)) = &outcome {
            println!("{error}");
        }
        !matches!(outcome, Ok(Ok(())))
    });
    let failed: Vec<_> = failed.map(|script| script.file_stem().unwrap_or_default()).collect();
    assert!(failed.is_empty(), "not as written: {failed:?}");
}

#[test]
fn by_chance_nothing_committed_is_lost_or_applied_twice_and_a_leader_knows_it_all() {
    let seeds = std::env::var("SEEDS").map_or(60, |seeds| seeds.parse().unwrap());
    let chosen = std::env::var("SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let mut total = chance::Tally::default();
    let mut failed = Vec::new();
    for seed in chosen.map_or(0..seeds, |seed| seed..seed + 1) {
        let run = || chance::run(seed, chosen.is_some());
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(tally)) => total += tally,
            Ok(Err(what)) => failed.push(format!("seed {seed}: {what}")),
            Err(_) => failed.push(format!("seed {seed}: a panic, see above")),
        }
    }
    println!("{total:?}");
    assert!(failed.is_empty(), "{} seeds failed:\n{}", failed.len(), failed.join("\n"));
}
