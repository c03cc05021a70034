//! The names of files, and what hangs on a name.

use super::ChunkId;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::fmt;

/// The longest name, in bytes.
pub const MAX_NAME_BYTES: usize = 1024;

/// The longest part between two slashes, in bytes: what other systems take.
pub const MAX_PART_BYTES: usize = 255;

/// How many chunks a file has at most.
pub const MAX_CHUNKS: usize = 1 << 20;

/// The name of a file, or of what its files have in common: parts with slashes
/// between them. A slash before the first is left out, so `/a/b` is `a/b`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct FileName(Box<str>);

/// Why a text is no name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is nothing in it.
    #[error("a file needs a name")]
    Empty,
    /// Too long as a whole.
    #[error("a name has at most {MAX_NAME_BYTES} bytes, not {0}")]
    TooLong(usize),
    /// Too long between two slashes.
    #[error("a name has at most {MAX_PART_BYTES} bytes between two slashes, not {0}")]
    PartTooLong(usize),
    /// Two slashes in a row, or one at the end.
    #[error("a name has something between two slashes, and after the last")]
    EmptyPart,
    /// `.` or `..`.
    #[error("\".\" and \"..\" are no parts of a name: names are taken as they are")]
    Dots,
    /// NUL, newline and the like.
    #[error("a name can't hold the control character {0:?}")]
    Control(char),
}

impl FileName {
    /// Checks `text`.
    ///
    /// # Errors
    /// A [`NameError`] that says what a name can't be.
    pub fn new(text: &str) -> Result<Self, NameError> {
        let name = text.strip_prefix('/').unwrap_or(text);
        if name.is_empty() {
            return Err(NameError::Empty);
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(NameError::TooLong(name.len()));
        }
        if let Some(control) = name.chars().find(|letter| letter.is_control()) {
            return Err(NameError::Control(control));
        }
        for part in name.split('/') {
            match part {
                "" => return Err(NameError::EmptyPart),
                "." | ".." => return Err(NameError::Dots),
                _ if part.len() > MAX_PART_BYTES => {
                    return Err(NameError::PartTooLong(part.len()));
                }
                _ => {}
            }
        }
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The names that this one lies under, the longest last: `a` and `a/b` for
    /// `a/b/c`.
    pub fn above(&self) -> impl Iterator<Item = FileName> + '_ {
        self.0.match_indices('/').map(|(at, _)| Self(self.0[..at].into()))
    }

    /// Whether it lies under `other`.
    pub fn is_under(&self, other: &FileName) -> bool {
        self.rest_under(other).is_some()
    }

    /// The part of it that comes after `other` and a slash.
    pub fn rest_under(&self, other: &FileName) -> Option<&str> {
        self.0.strip_prefix(&*other.0)?.strip_prefix('/')
    }

    /// The name that lies under `to` as this one lies under `from`; `to` itself
    /// for `from` itself.
    ///
    /// # Errors
    /// When it would be too long.
    pub fn moved(&self, from: &FileName, to: &FileName) -> Result<Self, NameError> {
        match self.rest_under(from) {
            None => Ok(to.clone()),
            Some(rest) => Self::new(&format!("{to}/{rest}")),
        }
    }
}

impl fmt::Display for FileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for FileName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<str>::deserialize(deserializer)?;
        Self::new(&text).map_err(de::Error::custom)
    }
}

/// What the master knows of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// How many bytes each chunk has, the last one aside.
    pub chunk_bytes: u64,
    /// How many copies each chunk is to have.
    pub copies: u8,
    /// When it was made, in milliseconds since 1970.
    pub made_ms: u64,
    /// Its chunks in their order.
    pub chunks: Vec<ChunkId>,
}

/// A file that was deleted and not yet collected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// What it was called.
    pub name: FileName,
    /// When it was deleted, in milliseconds since 1970.
    pub at_ms: u64,
    /// What it was.
    pub file: File,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_as_it_is() {
        let read = |text: &str| FileName::new(text).map(|name| name.to_string());
        assert_eq!(read("a"), Ok("a".to_owned()));
        assert_eq!(read("/a/b c/ü"), Ok("a/b c/ü".to_owned()));
        assert_eq!(read("..."), Ok("...".to_owned()));
    }

    #[test]
    fn what_could_reach_elsewhere_is_no_name() {
        let refused = |text: &str| FileName::new(text).unwrap_err();
        assert_eq!(refused(""), NameError::Empty);
        assert_eq!(refused("/"), NameError::Empty);
        assert_eq!(refused("../../etc/passwd"), NameError::Dots);
        assert_eq!(refused("a/./b"), NameError::Dots);
        assert_eq!(refused("//a"), NameError::EmptyPart);
        assert_eq!(refused("a/"), NameError::EmptyPart);
        assert_eq!(refused("a\0b"), NameError::Control('\0'));
        assert_eq!(refused("a\nb"), NameError::Control('\n'));
        assert_eq!(refused(&"x".repeat(256)), NameError::PartTooLong(256));
        assert_eq!(refused(&"x/".repeat(2048)), NameError::TooLong(4096));
        assert!(serde_json::from_str::<FileName>("\"../x\"").is_err());
    }

    #[test]
    fn a_name_lies_under_the_parts_before_it() {
        let name = |text| FileName::new(text).unwrap();
        let above: Vec<String> = name("a/b/c").above().map(|name| name.to_string()).collect();
        assert_eq!(above, ["a", "a/b"]);
        assert!(name("a/b").is_under(&name("a")));
        assert!(!name("ab").is_under(&name("a")));
        assert!(!name("a").is_under(&name("a")));
        assert_eq!(name("a/b/c").moved(&name("a"), &name("x/y")), Ok(name("x/y/b/c")));
    }
}
