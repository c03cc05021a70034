//! Where somebody is: `HOST`, `HOST:PORT`, and lists of them with commas.
//!
//! The protocol is IPv4, as the original is. A host without a port stands for
//! the whole port range of the program it names, since the original's programs
//! bind the first free port of a range and its clients walk it.

use std::fmt;
use std::str::FromStr;

/// The ports of one kind of program: `first` and the `count - 1` after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The port that is tried first.
    pub first: u16,
    /// How many there are.
    pub count: u16,
}

impl PortRange {
    /// Where servers listen unless told otherwise.
    pub const SERVER: PortRange = PortRange { first: 38000, count: 10 };
    /// Where viewleaders listen unless told otherwise.
    pub const VIEWLEADER: PortRange = PortRange { first: 39000, count: 10 };

    /// Where masters listen unless told otherwise.
    pub const MASTER: PortRange = PortRange { first: 9000, count: 1 };
    /// Where chunkservers listen that are not told where.
    pub const CHUNKSERVER: PortRange = PortRange { first: 9001, count: 10 };

    /// The ports in the order in which they are tried.
    pub fn ports(self) -> impl Iterator<Item = u16> + Clone {
        self.first..self.first + self.count
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.first + self.count - 1)
    }
}

/// A host by name or IPv4 address, perhaps with a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// A name that can be resolved, or an IPv4 address.
    pub host: String,
    /// `None` stands for the port range of the program that is looked for.
    pub port: Option<u16>,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}:{port}", self.host),
            None => f.write_str(&self.host),
        }
    }
}

/// Why a text is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Nothing before the colon, or nothing at all.
    #[error("no host in {0:?}: write HOST or HOST:PORT")]
    NoHost(String),
    /// What follows the colon is not a port.
    #[error("{0:?} is not a port: write HOST:PORT with a number from 0 to 65535")]
    BadPort(String),
    /// A second colon: IPv6, or a slip.
    #[error("{0:?} has too many colons: addresses are IPv4 or names")]
    TooManyColons(String),
}

impl FromStr for HostPort {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let text = text.trim();
        let (host, port) = match text.split_once(':') {
            None => (text, None),
            Some((_, rest)) if rest.contains(':') => {
                return Err(AddressError::TooManyColons(text.to_owned()));
            }
            Some((host, port)) => {
                let number = port.parse().map_err(|_| AddressError::BadPort(port.to_owned()))?;
                (host, Some(number))
            }
        };
        if host.is_empty() || host.contains(char::is_whitespace) {
            return Err(AddressError::NoHost(text.to_owned()));
        }
        Ok(HostPort { host: host.to_owned(), port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_written() {
        let read = |text: &str| text.parse::<HostPort>().map(|address| address.to_string());
        assert_eq!(read("localhost"), Ok("localhost".to_owned()));
        assert_eq!(read(" 10.0.0.1:38000 "), Ok("10.0.0.1:38000".to_owned()));
        assert!(matches!(read(""), Err(AddressError::NoHost(_))));
        assert!(matches!(read(":38000"), Err(AddressError::NoHost(_))));
        assert!(matches!(read("a b:1"), Err(AddressError::NoHost(_))));
        assert!(matches!(read("host:"), Err(AddressError::BadPort(_))));
        assert!(matches!(read("host:70000"), Err(AddressError::BadPort(_))));
        assert!(matches!(read("::1"), Err(AddressError::TooManyColons(_))));
    }
}
