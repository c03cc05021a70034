//! Delay on a program's links, where the kernel has no `netem`: a small proxy in the
//! program's namespace.
//!
//! Rules of the namespace lead every new connection, to the program and from it, to the
//! proxy, which connects to where it was to go and passes on what comes, each way, so much
//! later. Connections that are there when it begins are reset, so that their ends make
//! new ones; those through the proxy break when it ends.

use super::network::{SERVER_PORT, SUBNET, VIEWLEADER_PORT};
use rustix::net::sockopt::ip_original_dst;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Where the proxy listens in a namespace.
pub(crate) const PORT: u16 = 37000;

/// The group as which the proxy runs: what it sends is not led to itself.
pub(crate) const GROUP: u32 = 65534;

/// How many pieces wait in one direction of a connection at most.
const MAX_WAITING: usize = 4096;

/// How long a piece is at most, in bytes.
const PIECE_BYTES: usize = 16 * 1024;

/// How long the proxy tries to connect.
const PATIENCE: Duration = Duration::from_secs(5);

/// What leads the connections of the program at `own` to the proxy, for nft.
pub(crate) fn rules(own: Ipv4Addr) -> String {
    let [a, b, c] = SUBNET;
    let subnet = format!("{a}.{b}.{c}.0/24");
    let ports = format!("{{ {SERVER_PORT}, {VIEWLEADER_PORT} }}");
    format!(
        "table ip delay {{
chain out {{ type nat hook output priority -100;
meta skgid != {GROUP} ip daddr {subnet} ip daddr != {own} tcp dport {ports} redirect to :{PORT}
}}
chain in {{ type nat hook prerouting priority -100;
iifname eth0 tcp dport {ports} redirect to :{PORT}
}}
chain old {{ type filter hook output priority 0;
oifname eth0 meta skgid != {GROUP} ct state established tcp dport {ports} reject with tcp reset
oifname eth0 meta skgid != {GROUP} ct state established tcp sport {ports} reject with tcp reset
}}
}}
"
    )
}

/// What undoes that.
pub(crate) const NO_RULES: &str = "table ip delay {}\ndelete table ip delay\n";

/// The proxy, until it is killed.
///
/// # Errors
/// When it can't listen.
pub(crate) fn serve(delay: Duration) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || pass_on(stream, delay));
    }
    Ok(())
}

/// Connects what was led here to where it was to go.
fn pass_on(from: TcpStream, delay: Duration) -> io::Result<()> {
    let to: SocketAddrV4 = ip_original_dst(&from)?;
    if to.port() == PORT {
        return Ok(());
    }
    let to = TcpStream::connect_timeout(&to.into(), PATIENCE)?;
    from.set_nodelay(true)?;
    to.set_nodelay(true)?;
    let (back_from, back_to) = (to.try_clone()?, from.try_clone()?);
    thread::spawn(move || one_way(back_from, back_to, delay));
    one_way(from, to, delay);
    Ok(())
}

/// One direction of a connection, to its end.
fn one_way(mut from: TcpStream, to: TcpStream, delay: Duration) {
    let (waiting, due) = sync_channel::<(Instant, Vec<u8>)>(MAX_WAITING);
    let writer = thread::spawn(move || {
        let mut to = to;
        for (at, piece) in due {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&piece).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    read_all(&mut from, &waiting, delay);
    drop(waiting);
    let _ = writer.join();
}

fn read_all(from: &mut TcpStream, waiting: &SyncSender<(Instant, Vec<u8>)>, delay: Duration) {
    let mut piece = vec![0; PIECE_BYTES];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        if waiting.send((Instant::now() + delay, piece[..length].to_vec())).is_err() {
            return;
        }
    }
}
