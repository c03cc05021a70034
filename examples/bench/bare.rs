//! The least that a server of this shape can do: a thread for each connection, which
//! reads what has come and writes an answer that was made before. It decodes nothing
//! and looks nothing up, so what it takes is the kernel's: no server with blocking
//! threads answers faster from these processors.

use super::ours::Requests;
use super::programs::{Daemon, loopback};
use super::rows::value;
use ringleader::wire::append_frame;
use serde_json::json;
use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::thread;

/// How much is read at once, in bytes.
const READ_BYTES: usize = 4096;

/// The stack of a connection's thread, in bytes.
const STACK_BYTES: usize = 64 * 1024;

/// Starts it as a process of its own.
///
/// # Errors
/// When it does not come to serve.
pub(crate) fn start() -> io::Result<Daemon> {
    let address = loopback();
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--bare", &address.to_string()]);
    Daemon::start("bare server", command, address)
}

/// What that process does, until it is killed.
///
/// # Errors
/// When it can't listen.
pub(crate) fn serve(address: SocketAddrV4) -> io::Result<()> {
    let mut reply = Vec::new();
    let body = json!({"status": "ok", "value": value(), "version": "41.1"});
    append_frame(&mut reply, &body).map_err(io::Error::other)?;
    let reply: Arc<[u8]> = reply.into();
    for stream in TcpListener::bind(address)?.incoming() {
        let (stream, reply) = (stream?, Arc::clone(&reply));
        let work = move || answer(&stream, &reply);
        thread::Builder::new().stack_size(STACK_BYTES).spawn(work)?;
    }
    Ok(())
}

fn answer(mut stream: &TcpStream, reply: &[u8]) {
    let mut read = [0; READ_BYTES];
    let _ = stream.set_nodelay(true);
    while stream.read(&mut read).is_ok_and(|count| count > 0) && stream.write_all(reply).is_ok() {}
}

impl Requests {
    /// The same requests, all of them to the server at `address`.
    pub(crate) fn to(&self, address: SocketAddrV4) -> Arc<Self> {
        let made = self.made.iter().map(|(_, frame)| (0, frame.clone()));
        Arc::new(Self { servers: vec![address], made: made.collect() })
    }
}
