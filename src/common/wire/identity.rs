//! Who somebody is: a server's identity, or the requestor of a lock.
//!
//! The original names its servers by random JSON numbers and its lock clients
//! by text. A number is kept as the text that stands in the JSON, since its
//! place on the ring is the SHA-1 of that text, and a parser that went through
//! a float would move it.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use std::fmt;

/// The longest identity, in bytes of its text.
pub const MAX_IDENTITY_BYTES: usize = 256;

/// A number or a text, as it stands in the JSON. `5` and `"5"` are two.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// A JSON number, by its text.
    Number(Box<str>),
    /// A JSON text.
    Text(Box<str>),
}

impl Identity {
    /// The identity that is this text.
    pub fn text(text: impl Into<Box<str>>) -> Self {
        Self::Text(text.into())
    }

    /// The identity that is this number.
    pub fn number(number: u64) -> Self {
        Self::Number(number.to_string().into())
    }

    /// What is hashed to find the place on the ring.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Number(text) | Self::Text(text) => text,
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Identity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Number(text) => {
                use serde::ser::Error as _;
                let raw: &RawValue = serde_json::from_str(text).map_err(S::Error::custom)?;
                raw.serialize(serializer)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Identity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        let raw = raw.get();
        let identity = match raw.as_bytes().first() {
            Some(b'"') => Self::Text(serde_json::from_str(raw).map_err(D::Error::custom)?),
            Some(b'-' | b'0'..=b'9') => Self::Number(raw.into()),
            _ => return Err(D::Error::custom("an identity is a number or a text")),
        };
        if identity.as_str().len() > MAX_IDENTITY_BYTES {
            return Err(D::Error::custom(format_args!(
                "an identity has at most {MAX_IDENTITY_BYTES} bytes"
            )));
        }
        Ok(identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_comes_back_letter_by_letter() {
        for json in
            ["7", "-1", "0.8444218515250481", "340282366920938463463374607431768211455", "\"a b\""]
        {
            let identity: Identity = serde_json::from_str(json).unwrap();
            assert_eq!(serde_json::to_string(&identity).unwrap(), json);
        }
    }

    #[test]
    fn what_is_neither_number_nor_text_is_no_identity() {
        for json in ["null", "true", "[1]", "{}"] {
            assert!(serde_json::from_str::<Identity>(json).is_err(), "{json}");
        }
        let long = format!("\"{}\"", "x".repeat(MAX_IDENTITY_BYTES + 1));
        assert!(serde_json::from_str::<Identity>(&long).is_err());
    }
}
