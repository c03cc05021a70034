//! Threads: named, with small stacks.

use std::io;
use std::thread::{Builder, JoinHandle};

/// The stack of a thread, in bytes. Ten thousand connections are ten thousand
/// of these, of which only what is used takes memory.
const STACK_BYTES: usize = 256 * 1024;

/// Starts a thread called `name`.
///
/// # Errors
/// When the system has no room for another thread.
pub fn start<R: Send + 'static>(
    name: impl Into<String>,
    work: impl FnOnce() -> R + Send + 'static,
) -> io::Result<JoinHandle<R>> {
    Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(work)
}
