//! # Ringleader
//!
//! A replicated key-value store with a lock service, and a file system:
//! synchronous Rust, a thread for each connection, made to be read. The map of the house:
//!
//! * [`machine`]: the contract between logic and world. Start here.
//! * [`wire`]: frames, addresses, refusals.
//! * [`consensus`]: a log that several processes agree upon.
//! * [`view`]: the viewleader: leases, epochs, groups, locks.
//! * [`kv`]: the servers: the ring, replication, and the client's operations.
//! * [`gfs`]: the file system: master, chunkservers, files.
//! * [`net`]: the shells: listeners, connections, calls, threads, clocks.
//! * [`backup`]: a cluster in a folder, and what may never come again after a restore.
//! * [`sim`]: all of it in one thread, and the oracles that judge what clients saw.
//!
//! `consensus`, `view`, `kv` and `gfs` decide and never touch the world; `net` touches the
//! world and never decides.

/// Messages are made by one thread and dropped by another, thousands of times a
/// second: the system's allocator spends a fifth of a busy server's time on that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub mod backup;
pub mod consensus;
#[cfg(test)]
mod docs_tests;
pub mod gfs;
pub mod kv;
pub mod machine;
pub mod net;
pub mod sim;
pub mod store;
pub mod view;
pub mod wire;
