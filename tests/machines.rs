//! The machines without their shells: golden scripts, and runs of random chance.
//!
//! A script of tests/scripts reads as prose, command, output; its file name is a
//! claim. `viewleader/` drives the viewleader alone, `servers/` a small cluster
//! in one thread with a virtual clock; the commands are listed in
//! [`viewleader_script`] and [`servers_script`]. After a change that is meant,
//! `UPDATE_GOLDENFILES=1 cargo test --test machines` writes the outputs anew,
//! to be read before they are committed. `SCRIPT=part-of-a-name` runs less.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test may panic, and says which script failed"
)]

#[path = "machines/arguments.rs"]
mod arguments;
#[path = "machines/chance.rs"]
mod chance;
#[path = "machines/cluster.rs"]
mod cluster;
#[path = "machines/disk.rs"]
mod disk;
#[path = "machines/names.rs"]
mod names;
#[path = "machines/network.rs"]
mod network;
#[path = "machines/oracle.rs"]
mod oracle;
#[path = "machines/servers_script.rs"]
mod servers_script;
#[path = "machines/smoke.rs"]
mod smoke;
#[path = "machines/trace.rs"]
mod trace;
#[path = "machines/viewleader_script.rs"]
mod viewleader_script;

use goldenscript::Runner;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

/// Runs every script of the folder, each with a runner of its own.
fn run_scripts<R: Runner + Default>(folder: &str) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/scripts").join(folder);
    let wanted = std::env::var("SCRIPT").unwrap_or_default();
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut scripts: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    scripts.retain(|script| script.to_string_lossy().contains(&wanted));
    scripts.sort_unstable();
    let failed = scripts.iter().filter(|script| {
        println!("{}", script.display());
        let run = || goldenscript::run(&mut R::default(), script);
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
fn the_viewleader_does_what_its_scripts_say() {
    run_scripts::<viewleader_script::ViewleaderScript>("viewleader");
}

#[test]
fn the_servers_do_what_their_scripts_say() {
    run_scripts::<servers_script::ServersScript>("servers");
}

/// Runs the seeds; `SEED=17 cargo test --test machines chance -- --nocapture` runs
/// that one alone and prints all of it.
fn run_seeds(seeds: std::ops::Range<u64>) {
    let chosen = std::env::var("SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let mut total = smoke::Tally::default();
    let mut failed = Vec::new();
    for seed in seeds.filter(|seed| chosen.is_none_or(|chosen| chosen == *seed)) {
        match smoke::run(seed, chosen.is_some()) {
            Ok(tally) => total += tally,
            Err(what) => failed.push(what),
        }
    }
    println!("{total:?}");
    assert!(failed.is_empty(), "{} seeds failed:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn by_chance_nothing_is_lost_and_everything_comes_to_rest() {
    let seeds = std::env::var("SEEDS").map_or(200, |seeds| seeds.parse().unwrap());
    run_seeds(0..seeds);
}
