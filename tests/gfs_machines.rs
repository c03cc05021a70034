//! The file system's machines without their shells: golden scripts, and runs
//! of random chance.
//!
//! As in `machines.rs`: a script of tests/scripts/gfs reads as prose, command,
//! output, and its file name is a claim. `UPDATE_GOLDENFILES=1` writes the outputs
//! anew, to be read before they are committed; `SCRIPT=part-of-a-name` runs less.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test may panic, and says which script failed"
)]

#[path = "machines/arguments.rs"]
mod arguments;
#[path = "gfs_machines/chunkserver_steps.rs"]
mod chunkserver_steps;
#[path = "gfs_machines/cluster/mod.rs"]
mod cluster;
#[path = "gfs_machines/master_script.rs"]
mod master_script;
#[path = "gfs_machines/memory_disk.rs"]
mod memory_disk;
#[path = "gfs_machines/metadata.rs"]
mod metadata;
#[path = "machines/scripts.rs"]
mod scripts;

#[test]
fn the_master_does_what_its_scripts_say() {
    scripts::run::<master_script::MasterScript>("gfs/master");
}

/// `SEEDS=n` runs more of them; `SEED=17 cargo test --test gfs_machines chance --
/// --nocapture` runs that one alone and prints all of it.
#[test]
fn by_chance_no_acknowledged_append_is_lost_or_doubled_and_no_read_is_old() {
    let chosen = std::env::var("SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let seeds = std::env::var("SEEDS").map_or(60, |seeds| seeds.parse().unwrap());
    let mut total = cluster::Tally::default();
    let mut failed = Vec::new();
    for seed in chosen.map_or(0..seeds, |chosen| chosen..chosen + 1) {
        match cluster::Cluster::run(seed, chosen.is_some()) {
            Ok(tally) => total += tally,
            Err(what) => failed.push(what),
        }
    }
    println!("{total:?}");
    assert!(failed.is_empty(), "{} seeds failed:\n{}", failed.len(), failed.join("\n"));
}

/// `SEEDS=n` runs more of them, `SEED=17` that one alone.
#[test]
fn a_master_that_is_killed_at_any_point_has_all_that_it_acknowledged_and_nothing_half_done() {
    let is_long = std::env::var_os("RINGLEADER_LONG").is_some();
    let chosen = std::env::var("SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let seeds =
        std::env::var("SEEDS").map_or(if is_long { 1000 } else { 100 }, |it| it.parse().unwrap());
    let (mut acknowledged, mut failed) = (0, Vec::new());
    for seed in chosen.map_or(0..seeds, |chosen| chosen..chosen + 1) {
        match metadata::run(seed) {
            Ok(count) => acknowledged += count,
            Err(what) => failed.push(format!("seed {seed}: {what}")),
        }
    }
    println!("{} kills, {acknowledged} changes acknowledged", seeds as usize * metadata::KILLS);
    assert!(failed.is_empty(), "{} seeds failed:\n{}", failed.len(), failed.join("\n"));
    assert!(acknowledged > 1000 || chosen.is_some(), "only {acknowledged} changes");
}
