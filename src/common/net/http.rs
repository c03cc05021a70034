//! Requests by HTTP, on the port of the frames.
//!
//! A frame begins with the first byte of a length of at most
//! [`MAX_FRAME_BYTES`](crate::wire::MAX_FRAME_BYTES), a request by HTTP with a capital
//! letter: the first byte of a connection tells which it is. Here is as much of HTTP
//! 1.0 and 1.1 (RFC 9112) as calls by POST need: bodies of a known length, several
//! requests on one connection, one after the other. The crate `httparse` reads the
//! heads.

use super::call::CallFailure;
use super::connection::{FRAME_TIMEOUT, IDLE_TIMEOUT};
use super::listen::Connections;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

/// The longest head of a request, in bytes.
pub(super) const MAX_HEAD_BYTES: usize = 16 * 1024;

/// How many header fields a request has at most.
pub(super) const MAX_FIELDS: usize = 64;

/// The longest body of a request, in bytes: a piece of a file, all of it quoted, and
/// what stands around it.
pub(super) const MAX_BODY_BYTES: usize = 8 * 1024 * 1024;

/// A body may take this much longer than a frame, which has one limit for all.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// How much is read at a time.
const READ_BYTES: usize = 64 * 1024;

/// How much of a refused request is still read, so that its answer gets there.
const MAX_UNREAD_BYTES: usize = 2 * MAX_BODY_BYTES;

/// How long a refused request is still read.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(2);

/// A socket's time-out can't be zero.
const LEAST_WAIT: Duration = Duration::from_millis(1);

/// Whether a connection that begins with this byte speaks HTTP.
pub(super) fn begins_with(first: u8) -> bool {
    first.is_ascii_uppercase()
}

/// What is to be answered to a request that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Status(u16, &'static str, &'static str);

const BAD_REQUEST: Status = Status(400, "Bad Request", "this is no request by HTTP\n");
const NOT_FOUND: Status = Status(404, "Not Found", "calls go to /RPC2\n");
const NOT_POST: Status = Status(405, "Method Not Allowed", "calls are made by POST\n");
const TOO_LATE: Status = Status(408, "Request Timeout", "the request took too long\n");
const NO_LENGTH: Status = Status(411, "Length Required", "a body needs its Content-Length\n");
const TOO_LONG: Status = Status(413, "Content Too Large", "a call has at most 8 MiB\n");
const ENCODED: Status = Status(415, "Unsupported Media Type", "a call is XML as it is\n");
const LONG_HEAD: Status =
    Status(431, "Request Header Fields Too Large", "a head has at most 16 KiB\n");
const CODED: Status = Status(501, "Not Implemented", "a body comes in one piece\n");

/// What a head says.
struct Head {
    /// How long it is.
    bytes: usize,
    /// How long the body behind it is.
    body: usize,
    /// Whether the connection goes on after it.
    goes_on: bool,
    /// Whether the client waits to be told that its body is welcome.
    expects: bool,
    /// Whether another program of ours has passed it on.
    is_passed_on: bool,
    /// HTTP 1.0, whose clients must be told that the connection goes on.
    is_old: bool,
}

/// Why there is no head yet.
enum NoHead {
    /// It is not here as a whole.
    Part,
    Refused(Status),
}

/// Serves the requests of one connection: `answer` takes a body, and whether another
/// program of ours has passed it on, and gives the body of the reply.
///
/// # Errors
/// Those of the stream, which end it.
pub(super) fn serve(
    stream: &TcpStream,
    connections: &Connections,
    answer: impl Fn(&[u8], bool) -> Vec<u8>,
) -> io::Result<()> {
    let mut exchange = Exchange { stream, read: Vec::new() };
    loop {
        let head = match exchange.head() {
            Ok(None) => return Ok(()),
            Ok(Some(Ok(head))) => head,
            Ok(Some(Err(status))) => return exchange.refuse(status),
            Err(error) if error.kind() == ErrorKind::TimedOut => return exchange.refuse(TOO_LATE),
            Err(error) => return Err(error),
        };
        if head.expects {
            (&mut &*stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        match exchange.body(&head) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::TimedOut => return exchange.refuse(TOO_LATE),
            Err(error) => return Err(error),
        }
        let body = &exchange.read[head.bytes..head.bytes + head.body];
        let reply = answer(body, head.is_passed_on);
        exchange.read.drain(..head.bytes + head.body);
        let goes_on = head.goes_on && !connections.is_stopping();
        let connection = match (goes_on, head.is_old) {
            (true, true) => "Connection: keep-alive\r\n",
            (true, false) => "",
            (false, _) => "Connection: close\r\n",
        };
        let mut out = format!(
            "HTTP/1.1 200 OK\r\nServer: ringleader\r\nContent-Type: text/xml\r\n\
             Content-Length: {}\r\n{connection}\r\n",
            reply.len()
        )
        .into_bytes();
        out.extend(reply);
        (&mut &*stream).write_all(&out)?;
        if !goes_on {
            return Ok(());
        }
    }
}

struct Exchange<'a> {
    stream: &'a TcpStream,
    /// What has been read and not been used.
    read: Vec<u8>,
}

impl Exchange<'_> {
    /// The next head; nothing when the connection ends before it.
    fn head(&mut self) -> io::Result<Option<Result<Head, Status>>> {
        let mut deadline = Instant::now() + IDLE_TIMEOUT;
        let mut has_begun = false;
        loop {
            if !self.read.is_empty() {
                match parse(&self.read) {
                    Ok(head) => return Ok(Some(Ok(head))),
                    Err(NoHead::Refused(status)) => return Ok(Some(Err(status))),
                    Err(NoHead::Part) if self.read.len() > MAX_HEAD_BYTES => {
                        return Ok(Some(Err(LONG_HEAD)));
                    }
                    Err(NoHead::Part) if !has_begun => {
                        has_begun = true;
                        deadline = Instant::now() + FRAME_TIMEOUT;
                    }
                    Err(NoHead::Part) => {}
                }
            }
            match self.more(deadline) {
                Ok(true) => {}
                Ok(false) if self.read.is_empty() => return Ok(None),
                Ok(false) => return Err(io::Error::other("closed in the middle of a request")),
                // Between two requests it is no fault of the client's.
                Err(error) if error.kind() == ErrorKind::TimedOut && self.read.is_empty() => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn body(&mut self, head: &Head) -> io::Result<()> {
        let deadline = Instant::now() + BODY_TIMEOUT;
        while self.read.len() < head.bytes + head.body {
            if !self.more(deadline)? {
                return Err(io::Error::other("closed in the middle of a request"));
            }
        }
        Ok(())
    }

    /// Reads what has come until `deadline`; whether there was anything.
    fn more(&mut self, deadline: Instant) -> io::Result<bool> {
        let begin = self.read.len();
        self.read.resize(begin + READ_BYTES, 0);
        let count = loop {
            match (&mut &*self.stream).read(&mut self.read[begin..]) {
                Ok(count) => break Ok(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if super::call::is_late(&error) && Instant::now() < deadline => {}
                Err(error) if super::call::is_late(&error) => {
                    break Err(ErrorKind::TimedOut.into());
                }
                Err(error) => break Err(error),
            }
        };
        self.read.truncate(begin + count.as_ref().copied().unwrap_or(0));
        // Whoever sends a byte now and then is late, too.
        match count {
            Ok(count) if count > 0 && Instant::now() > deadline => Err(ErrorKind::TimedOut.into()),
            count => Ok(count? > 0),
        }
    }

    /// The last answer on this connection. What the client still sends is read for a
    /// moment: closing on unread bytes would take the answer away.
    fn refuse(&mut self, Status(code, name, why): Status) -> io::Result<()> {
        let allow = if code == NOT_POST.0 { "Allow: POST\r\n" } else { "" };
        let out = format!(
            "HTTP/1.1 {code} {name}\r\nServer: ringleader\r\nContent-Type: text/plain\r\n{allow}\
             Content-Length: {}\r\nConnection: close\r\n\r\n{why}",
            why.len()
        );
        (&mut &*self.stream).write_all(out.as_bytes())?;
        self.stream.shutdown(Shutdown::Write)?;
        self.stream.set_read_timeout(Some(UNREAD_TIMEOUT))?;
        let deadline = Instant::now() + UNREAD_TIMEOUT;
        let mut unread = 0;
        while unread < MAX_UNREAD_BYTES {
            self.read.clear();
            match self.more(deadline) {
                Ok(true) => unread += self.read.len(),
                Ok(false) | Err(_) => break,
            }
        }
        Ok(())
    }
}

fn parse(read: &[u8]) -> Result<Head, NoHead> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let bytes = match request.parse(&read[..read.len().min(MAX_HEAD_BYTES)]) {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) => return Err(NoHead::Part),
        Err(httparse::Error::TooManyHeaders) => return Err(NoHead::Refused(LONG_HEAD)),
        Err(_) => return Err(NoHead::Refused(BAD_REQUEST)),
    };
    let is_old = request.version == Some(0);
    let fields = &*request.headers;
    let refused = |status| Err(NoHead::Refused(status));
    if request.method != Some("POST") {
        return refused(NOT_POST);
    }
    if request.path != Some("/RPC2") && request.path != Some("/") {
        return refused(NOT_FOUND);
    }
    if field(fields, "transfer-encoding").is_some() {
        return refused(CODED);
    }
    if field(fields, "content-encoding").is_some_and(|it| !it.eq_ignore_ascii_case("identity")) {
        return refused(ENCODED);
    }
    let mut lengths = fields.iter().filter(|it| it.name.eq_ignore_ascii_case("content-length"));
    let Some(length) = lengths.next() else { return refused(NO_LENGTH) };
    let is_number = !length.value.is_empty() && length.value.iter().all(u8::is_ascii_digit);
    if !is_number || lengths.any(|other| other.value != length.value) {
        return refused(BAD_REQUEST);
    }
    let body = std::str::from_utf8(length.value).ok().and_then(|it| it.parse().ok());
    let Some(body) = body.filter(|body| *body <= MAX_BODY_BYTES) else { return refused(TOO_LONG) };
    let connection = field(fields, "connection").unwrap_or_default();
    let has = |word: &str| connection.split(',').any(|it| it.trim().eq_ignore_ascii_case(word));
    Ok(Head {
        bytes,
        body,
        goes_on: if is_old { has("keep-alive") } else { !has("close") },
        expects: field(fields, "expect").is_some_and(|it| it.eq_ignore_ascii_case("100-continue")),
        is_passed_on: field(fields, "via").is_some(),
        is_old,
    })
}

/// Makes one call by HTTP on a connection of its own; gives the body of the answer.
///
/// # Errors
/// When there is no answer until `deadline`, or another one than success; what became of
/// the call then is known only if it was not sent.
pub(super) fn post(
    to: SocketAddrV4,
    body: &[u8],
    deadline: Instant,
) -> Result<Vec<u8>, CallFailure> {
    let left = || deadline.saturating_duration_since(Instant::now()).max(LEAST_WAIT);
    let connect = || {
        let stream = super::call::connect(to, left())?;
        stream.set_write_timeout(Some(left()))?;
        stream.set_read_timeout(Some(left()))?;
        Ok(stream)
    };
    let stream = connect().map_err(CallFailure::NotSent)?;
    exchange(&stream, to, body).map_err(CallFailure::Lost)
}

fn exchange(mut stream: &TcpStream, to: SocketAddrV4, body: &[u8]) -> io::Result<Vec<u8>> {
    let head = format!(
        "POST /RPC2 HTTP/1.0\r\nHost: {to}\r\nVia: 1.0 ringleader\r\nContent-Type: text/xml\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat())?;
    let mut read = Vec::new();
    // By HTTP 1.0 the answer ends where the connection does.
    stream.take((MAX_HEAD_BYTES + MAX_BODY_BYTES) as u64).read_to_end(&mut read)?;
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    match response.parse(&read) {
        Ok(httparse::Status::Complete(bytes)) if response.code == Some(200) => {
            read.drain(..bytes);
            Ok(read)
        }
        Ok(httparse::Status::Complete(_)) => {
            Err(io::Error::other(format!("HTTP status {}", response.code.unwrap_or_default())))
        }
        _ => Err(io::Error::other("no answer by HTTP")),
    }
}

fn field<'a>(fields: &[httparse::Header<'a>], name: &str) -> Option<&'a str> {
    let field = fields.iter().find(|it| it.name.eq_ignore_ascii_case(name))?;
    std::str::from_utf8(field.value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(request: &str) -> u16 {
        match parse(request.as_bytes()) {
            Ok(_) => 200,
            Err(NoHead::Part) => 100,
            Err(NoHead::Refused(Status(code, ..))) => code,
        }
    }

    #[test]
    fn a_head_that_can_not_be_served_is_refused_by_its_own_status() {
        let post = "POST /RPC2 HTTP/1.1\r\n";
        assert_eq!(status(&format!("{post}Content-Length: 3\r\n\r\nabc")), 200);
        assert_eq!(status(&format!("{post}Content-Length: 3\r\n")), 100);
        assert_eq!(status("GET /RPC2 HTTP/1.1\r\n\r\n"), 405);
        assert_eq!(status("POST /../etc/passwd HTTP/1.1\r\nContent-Length: 0\r\n\r\n"), 404);
        assert_eq!(status(&format!("{post}\r\n")), 411);
        assert_eq!(status(&format!("{post}Transfer-Encoding: chunked\r\n\r\n")), 501);
        assert_eq!(status(&format!("{post}Content-Length: -1\r\n\r\n")), 400);
        assert_eq!(status(&format!("{post}Content-Length: 99999999999999999999999\r\n\r\n")), 413);
        assert_eq!(status(&format!("{post}Content-Length: 8388609\r\n\r\n")), 413);
        let twice = "Content-Length: 1\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(status(&format!("{post}{twice}")), 400);
        let gzip = "Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\n";
        assert_eq!(status(&format!("{post}{gzip}")), 415);
        assert_eq!(status("POST\r\n\r\n"), 400);
        assert_eq!(status(&format!("{post}{}\r\n", "a: b\r\n".repeat(65))), 431);
    }

    #[test]
    fn a_connection_goes_on_as_its_version_of_http_has_it() {
        let goes_on = |version: &str, connection: &str| {
            let request = format!(
                "POST /RPC2 HTTP/{version}\r\nContent-Length: 0\r\nConnection: {connection}\r\n\r\n"
            );
            parse(request.as_bytes()).is_ok_and(|head| head.goes_on)
        };
        assert!(goes_on("1.1", "keep-alive"));
        assert!(goes_on("1.1", ""));
        assert!(!goes_on("1.1", "Close"));
        assert!(!goes_on("1.0", ""));
        assert!(goes_on("1.0", "te, Keep-Alive"));
    }
}
