//! Frames: a 4-byte big-endian signed length, then that many bytes.
//!
//! [`Decoder`] knows no socket: a shell reads into [`Decoder::space`], says how
//! much came with [`Decoder::filled`], and takes complete bodies with
//! [`Decoder::next_frame`]. One read may bring several frames (a client that
//! pipelines) or a part of one. The length is checked before any memory is
//! taken for the body, and memory grows with the bytes that have really come,
//! so a header that promises much costs nothing.

use byteorder::{BigEndian, ByteOrder};
use serde::Serialize;

/// The longest body of a frame, in bytes, that we send or accept. The original
/// refuses 8192 bytes and more; an old client can't read a longer reply.
pub const MAX_FRAME_BYTES: usize = 16 * 1024 * 1024;

/// The length header, in bytes.
pub const HEADER_BYTES: usize = 4;

/// What a decoder keeps for a quiet connection, in bytes: one read brings at
/// least this much, and ten thousand idle connections stay affordable.
const QUIET_BUFFER_BYTES: usize = 8 * 1024;

/// Why a stream of frames can't go on. The stream has lost its step after any
/// of these: the connection is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header holds a negative number.
    #[error("a frame can't have the negative length {0}")]
    Negative(i32),
    /// The body is longer than the receiver accepts.
    #[error("a message of {0} bytes is over the limit of {MAX_FRAME_BYTES} bytes")]
    TooLong(usize),
}

/// Takes bytes as they come and gives complete frame bodies.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// The bytes at `start..end` have come and are not yet taken.
    start: usize,
    end: usize,
    /// The last message was a long one: the next one may be, too.
    is_long: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    pub fn new() -> Self {
        Self { buffer: vec![0; QUIET_BUFFER_BYTES], start: 0, end: 0, is_long: false }
    }

    /// Where the next bytes from the stream go; never empty.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if !self.is_long {
                self.rest();
            }
        }
        if self.end == self.buffer.len() {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            } else {
                self.buffer.resize(self.buffer.len() * 2, 0);
            }
        }
        &mut self.buffer[self.end..]
    }

    /// Gives back what memory long messages have taken, if nothing is waiting in it: the
    /// stream is quiet.
    pub fn rest(&mut self) {
        if self.start == self.end && self.buffer.len() > QUIET_BUFFER_BYTES {
            *self = Self::new();
        }
    }

    /// Says that the first `count` bytes of [`Decoder::space`] were filled.
    pub fn filled(&mut self, count: usize) {
        self.end += count;
        assert!(self.end <= self.buffer.len(), "more bytes filled than there was space");
    }

    /// The body of the next complete frame, or `None` when more bytes are
    /// needed for one.
    ///
    /// # Errors
    /// A [`FrameError`] when the header can't be right; the stream is then lost.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let Some(length) = self.next_length()? else { return Ok(None) };
        let body = self.start + HEADER_BYTES..self.start + HEADER_BYTES + length;
        self.start = body.end;
        self.is_long = length > QUIET_BUFFER_BYTES;
        Ok(Some(&self.buffer[body]))
    }

    /// Whether [`Decoder::next_frame`] has something to say.
    pub fn has_frame(&self) -> bool {
        !matches!(self.next_length(), Ok(None))
    }

    /// The length of the next body, if all of it has come.
    fn next_length(&self) -> Result<Option<usize>, FrameError> {
        let waiting = &self.buffer[self.start..self.end];
        if waiting.len() < HEADER_BYTES {
            return Ok(None);
        }
        let announced = BigEndian::read_i32(waiting);
        let length = usize::try_from(announced).map_err(|_| FrameError::Negative(announced))?;
        if length > MAX_FRAME_BYTES {
            return Err(FrameError::TooLong(length));
        }
        Ok((waiting.len() >= HEADER_BYTES + length).then_some(length))
    }

    /// Whether the stream stands between two frames: here an end of the stream
    /// is a clean close, anywhere else it tears a frame.
    pub fn is_between_frames(&self) -> bool {
        self.start == self.end
    }
}

/// Appends `message` as one frame to `out`.
///
/// # Errors
/// [`FrameError::TooLong`], with `out` as it was, when the body would be longer
/// than a receiver accepts.
///
/// # Panics
/// If `message` can't be written as JSON, which our own types always can.
pub fn append_frame(out: &mut Vec<u8>, message: &impl Serialize) -> Result<(), FrameError> {
    let header = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    #[expect(clippy::expect_used, reason = "a message of ours that is no JSON is a bug")]
    serde_json::to_writer(&mut *out, message).expect("our messages are JSON");
    let length = out.len() - header - HEADER_BYTES;
    match i32::try_from(length) {
        Ok(announced) if length <= MAX_FRAME_BYTES => {
            BigEndian::write_i32(&mut out[header..], announced);
            Ok(())
        }
        _ => {
            out.truncate(header);
            Err(FrameError::TooLong(length))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(decoder: &mut Decoder, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let space = decoder.space();
            let count = space.len().min(rest.len());
            space[..count].copy_from_slice(&rest[..count]);
            decoder.filled(count);
            rest = &rest[count..];
        }
    }

    #[test]
    fn frames_come_out_whole_whatever_pieces_they_arrive_in() {
        let mut stream = Vec::new();
        let words = ["", "a", &"long ".repeat(10_000), "end"];
        for word in words {
            append_frame(&mut stream, &word).unwrap();
        }
        for piece in [1, 3, 4, 1000, stream.len()] {
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            for bytes in stream.chunks(piece) {
                feed(&mut decoder, bytes);
                while let Some(body) = decoder.next_frame().unwrap() {
                    seen.push(serde_json::from_slice::<String>(body).unwrap());
                }
            }
            assert_eq!(seen, words, "in pieces of {piece}");
            assert!(decoder.is_between_frames());
        }
    }

    #[test]
    fn a_promise_of_much_takes_no_memory() {
        let mut decoder = Decoder::new();
        feed(&mut decoder, &(MAX_FRAME_BYTES as i32).to_be_bytes());
        assert_eq!(decoder.next_frame(), Ok(None));
        assert_eq!(decoder.buffer.len(), QUIET_BUFFER_BYTES);
        assert!(!decoder.is_between_frames());
    }

    #[test]
    fn lengths_that_cannot_be_are_refused_at_the_header() {
        let mut decoder = Decoder::new();
        feed(&mut decoder, &(-1i32).to_be_bytes());
        assert_eq!(decoder.next_frame(), Err(FrameError::Negative(-1)));
        let mut decoder = Decoder::new();
        feed(&mut decoder, &(MAX_FRAME_BYTES as i32 + 1).to_be_bytes());
        assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(MAX_FRAME_BYTES + 1)));
    }

    #[test]
    fn a_message_over_the_limit_leaves_the_buffer_as_it_was() {
        let mut out = b"before".to_vec();
        let long = "x".repeat(MAX_FRAME_BYTES);
        assert!(matches!(append_frame(&mut out, &long), Err(FrameError::TooLong(_))));
        assert_eq!(out, b"before");
    }

    #[test]
    fn memory_of_a_long_message_is_given_back_after_a_short_one_or_in_a_quiet_moment() {
        let mut stream = Vec::new();
        append_frame(&mut stream, &"x".repeat(1 << 20)).unwrap();
        let long = || {
            let mut decoder = Decoder::new();
            feed(&mut decoder, &stream);
            assert!(decoder.next_frame().unwrap().is_some());
            decoder.space();
            assert!(decoder.buffer.len() > 1 << 20, "the next one may be as long");
            decoder
        };
        let mut decoder = long();
        decoder.rest();
        assert_eq!(decoder.buffer.len(), QUIET_BUFFER_BYTES);
        let mut decoder = long();
        let mut short = Vec::new();
        append_frame(&mut short, &"x").unwrap();
        feed(&mut decoder, &short);
        decoder.rest();
        assert!(decoder.next_frame().unwrap().is_some(), "what waits is kept");
        decoder.space();
        assert_eq!(decoder.buffer.len(), QUIET_BUFFER_BYTES);
    }
}
