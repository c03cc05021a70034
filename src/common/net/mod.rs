//! The shells: everything that touches the world.
//!
//! Synchronous all through: an accept loop ([`listen`]), a thread for each
//! connection ([`connection`]), pipelined links between servers ([`links`]),
//! calls that walk a list of addresses ([`call`]), and what every daemon needs
//! ([`daemon`]). The shells around the machines are [`serve_view`] and
//! [`serve_kv`].
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
pub mod call;
pub mod children;
pub mod clock;
pub mod connection;
pub mod daemon;
pub mod display;
pub mod journal;
pub mod links;
pub mod listen;
pub mod serve_kv;
pub mod serve_view;
pub mod threads;
