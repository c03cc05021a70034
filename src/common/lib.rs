//! # Ringleader
//!
//! A replicated key-value store with a lock service: synchronous Rust, a thread
//! for each connection, made to be read. The map of the house:
//!
//! * [`machine`]: the contract between logic and world. Start here.
//! * [`wire`]: frames, addresses, refusals.
//! * [`view`]: the viewleader: leases, epochs, groups, locks.
//! * [`kv`]: the servers: the ring, replication, and the client's operations.
//! * [`net`]: the shells: listeners, connections, calls, threads, clocks.
//!
//! `view` and `kv` decide and never touch the world; `net` touches the world and
//! never decides.

pub mod kv;
pub mod machine;
pub mod net;
pub mod store;
pub mod view;
pub mod wire;
