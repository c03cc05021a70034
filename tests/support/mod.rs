//! What the tests with real processes share.
//!
//! * [`process`]: start a program, watch what it says, be sure that it is gone
//!   afterwards; wait for a condition with a deadline, never for luck; free ports.
//! * [`wire`]: calls and raw bytes to a program's port, with every way in which
//!   an answer may fail to come.
//! * [`systems`]: a whole system, ours or the Python reference, behind one
//!   trait, so that a test can drive both alike.
//! * [`keys`]: many keys at once, and where each of them must be.
//! * [`traffic`]: readers and writers that know what they have been promised.
//! * [`nodes`]: a cluster of ours whose programs are killed, stopped and started
//!   again over their disks.
//! * [`files`]: a master and chunkservers of which the same is done.
//! * [`viewleaders`]: a group of viewleaders of which the same is done.
//!
//! Every test binary that says `mod support;` compiles all of it.

#![allow(dead_code, reason = "each test binary uses the part that it needs")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic and print, and stands outside of the machines: it has a clock, \
              sockets and threads"
)]

pub(crate) mod files;
pub(crate) mod keys;
pub(crate) mod nodes;
pub(crate) mod process;
pub(crate) mod systems;
pub(crate) mod traffic;
pub(crate) mod viewleaders;
pub(crate) mod wire;
