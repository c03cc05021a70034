//! What proves the rest: a simulator, and oracles that know nothing of the machines.
//!
//! * [`cluster`]: the real machines in one thread, on a virtual clock, [`network`] and
//!   [`disk`]; [`chance`] decides what nobody in the cluster decides.
//! * [`run`]: a run of random chance from one seed: clients, faults, and a judgement.
//! * [`oracle`]: what is judged: no two primaries, copies where they should be,
//!   locks in turn; and [`linearizability`]: were these reads and writes those of one
//!   register?
//! * [`trace`] and [`names`]: what happens as stable lines.
//!
//! Everything here is pure, as the machines are: a seed or a history goes in, a
//! verdict comes out, the same one each time.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a simulator that can't go on has found a bug, in itself or in what it runs"
)]

pub mod chance;
pub mod cluster;
pub mod disk;
pub mod linearizability;
pub mod lone_log;
pub mod names;
pub mod network;
pub mod oracle;
pub mod run;
pub mod trace;
