//! What travels: frames, addresses, refusals.
//!
//! A message is a 4-byte big-endian signed length and that many bytes of JSON
//! (UTF-8): the format of the Python programs that this project replaces. A
//! request is an object with a `"cmd"`; a reply is one JSON value, and a reply
//! with an `"error"` in it is a refusal. Fields that a receiver does not know
//! are ignored, since the original's client sends all of its command line with
//! every request.
//!
//! The messages themselves live with the machines that understand them:
//! [`crate::view::messages`] and [`crate::kv::messages`].

pub mod address;
pub mod frame;
pub mod identity;
pub mod refusal;

pub use address::HostPort;
pub use frame::{Decoder, FrameError, MAX_FRAME_BYTES, append_frame};
pub use identity::Identity;
pub use refusal::{Reason, Refusal};

use serde::Deserialize;
use std::borrow::Cow;

/// Reads the `"cmd"` of a request and leaves the rest for later.
///
/// # Errors
/// A [`Refusal`] that says what is wrong when `body` is not JSON, is not an
/// object, or has no `"cmd"` that is text.
pub fn command_of(body: &[u8]) -> Result<Cow<'_, str>, Refusal> {
    #[derive(Deserialize)]
    struct Head<'a> {
        #[serde(borrow)]
        cmd: Option<Cow<'a, str>>,
    }
    if body.is_empty() {
        return Err(Refusal::invalid(
            "an empty message: a request is a JSON object with a \"cmd\"",
        ));
    }
    if body.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(Refusal::invalid(
            match serde_json::from_slice::<serde::de::IgnoredAny>(body) {
                Ok(_) => "not a JSON object: a request is an object with a \"cmd\"".to_owned(),
                Err(error) => format!("not JSON: {error}"),
            },
        ));
    }
    let head: Head<'_> = serde_json::from_slice(body).map_err(|error| {
        Refusal::invalid(if error.is_data() {
            format!("\"cmd\" must be text: {error}")
        } else {
            format!("not JSON: {error}")
        })
    })?;
    head.cmd.ok_or_else(|| Refusal::invalid("a request without \"cmd\": name a command"))
}

/// Reads the arguments of the command `cmd` from the whole request.
///
/// # Errors
/// A [`Refusal`] that names the field that is missing or of the wrong type.
pub fn arguments<'a, T: Deserialize<'a>>(cmd: &str, body: &'a [u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal::invalid(format!("{cmd}: {error}")))
}
