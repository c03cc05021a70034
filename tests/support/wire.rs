//! The wire from the outside: frames, calls, and whatever comes back.
//!
//! Written against the protocol's page and not with the project's own wire
//! module, so that a fault there can't hide itself.

use byteorder::{BigEndian, ReadBytesExt};
use serde_json::Value;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpStream};
use std::time::Duration;

/// How long a connection or an answer may take.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// What came of a call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Reply {
    /// A frame with this in it.
    Value(Value),
    /// The other end closed the connection without an answer.
    Closed,
    /// Nothing came within [`ANSWER_TIMEOUT`].
    Silent,
    /// Nobody listens there.
    Refused,
}

impl Reply {
    /// The value that came.
    ///
    /// # Panics
    /// If none did.
    pub(crate) fn value(self) -> Value {
        match self {
            Reply::Value(value) => value,
            other => panic!("a reply was expected, not {other:?}"),
        }
    }
}

/// One frame: the 4-byte length of `body` and `body`.
pub(crate) fn frame(body: &[u8]) -> Vec<u8> {
    frame_announcing(i32::try_from(body.len()).unwrap(), body)
}

/// A frame whose header may lie about its body.
pub(crate) fn frame_announcing(length: i32, body: &[u8]) -> Vec<u8> {
    [&length.to_be_bytes(), body].concat()
}

/// Calls the program at `address` as the original does: a connection for this
/// request alone.
pub(crate) fn call(address: SocketAddrV4, request: &Value) -> Reply {
    exchange(address, &frame(&serde_json::to_vec(request).unwrap()))
}

/// Sends `bytes` on a connection of their own and takes one answer.
pub(crate) fn exchange(address: SocketAddrV4, bytes: &[u8]) -> Reply {
    match Connection::open(address) {
        Some(mut connection) => {
            connection.send(bytes);
            connection.receive()
        }
        None => Reply::Refused,
    }
}

/// A connection on which a test says what it likes.
pub(crate) struct Connection(TcpStream);

impl Connection {
    /// Connects; `None` when nobody listens there.
    pub(crate) fn open(address: SocketAddrV4) -> Option<Self> {
        let stream = TcpStream::connect_timeout(&address.into(), ANSWER_TIMEOUT).ok()?;
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(ANSWER_TIMEOUT)).unwrap();
        Some(Self(stream))
    }

    /// Sends bytes as they are. If the other end has closed, what follows will
    /// show it: it may have had its reasons, and may have given them.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes);
    }

    /// Says that nothing more will be sent; what is answered can still be taken.
    pub(crate) fn end_sending(&mut self) {
        // It fails only if the other end has closed already.
        let _ = self.0.shutdown(Shutdown::Write);
    }

    /// Sends a request and takes its answer.
    pub(crate) fn call(&mut self, request: &Value) -> Reply {
        self.send(&frame(&serde_json::to_vec(request).unwrap()));
        self.receive()
    }

    /// Takes one answer.
    ///
    /// # Panics
    /// If it is a frame, but not one of JSON.
    pub(crate) fn receive(&mut self) -> Reply {
        let answer = self.0.read_i32::<BigEndian>().and_then(|length| {
            let mut body = vec![0; usize::try_from(length).expect("a length that can be")];
            self.0.read_exact(&mut body)?;
            Ok(body)
        });
        match answer {
            Ok(body) => Reply::Value(serde_json::from_slice(&body).unwrap()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Reply::Silent
            }
            Err(_) => Reply::Closed,
        }
    }
}
