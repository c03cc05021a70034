//! The oracles: what must never be, told by somebody who takes no part.
//!
//! * [`primaries`]: no two servers serve one arc at one moment of true time.
//! * [`copies`]: what was acknowledged, or is taken for committed by anybody, is on
//!   the disk of every ready replica; at rest each key is on exactly its target.
//! * [`locks`]: one holder at most, first come first served.
//! * [`super::linearizability`]: what clients saw was one register for each key.
//!
//! They look at the cluster and at what clients are told, and keep their own books.

pub mod copies;
pub mod locks;
pub mod primaries;
