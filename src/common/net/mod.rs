//! The shells: everything that touches the world.
//!
//! Synchronous all through: an accept loop ([`listen`]), a thread for each
//! connection ([`connection`]), pipelined links between servers ([`links`]), ways
//! between the processes of a group ([`peers`], `serve_group`),
//! calls that walk a list of addresses ([`call`]), and what every daemon needs
//! ([`daemon`]). The shells around the machines are [`serve_view`],
//! [`serve_kv`], [`serve_master`] and [`serve_chunks`]; [`files`] is what a client of
//! the file system does. [`backup`] and [`restore`] are the client's, too.
//!
//! A shell holds its machine's lock only to step it and to queue what must go
//! out in order; it never holds it over the network. Every socket has time-outs
//! and every queue an end; the constants are beside what they bound.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the shells are where the clock, sockets and threads are"
)]

pub mod ask;
pub mod backup;
pub mod call;
pub mod children;
pub mod clock;
pub mod connection;
pub mod daemon;
pub mod display;
pub mod files;
mod http;
pub mod journal;
pub mod lanes;
pub mod links;
pub mod listen;
pub mod lock_run;
mod original_chunks;
mod original_master;
pub mod peers;
pub mod restore;
pub mod serve_chunks;
mod serve_group;
pub mod serve_kv;
pub mod serve_master;
pub mod serve_view;
pub mod threads;
pub mod transfer;
pub mod xml_rpc;
