//! The ring: where names stand, and who owns what.
//!
//! Servers and keys are placed on a ring of [`RING_POINTS`] points by SHA-1 of
//! their text, as an integer, modulo the number of points: the original's rule,
//! kept so that its programs find the same servers for the same keys. An *arc*
//! goes from one member's point (included) to the next one's (excluded); the
//! last one wraps. The replicas of a key are the owner of the arc it stands in
//! (the member with the highest point not above the key's, else the one with
//! the highest of all) and the next two around the ring.

use crate::wire::Identity;
use rand::RngExt;
use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};
use std::fmt;

/// How many points the ring has; the original's number.
pub const RING_POINTS: u16 = 10_000;

/// How many replicas a key has, when there are that many servers.
pub const REPLICAS: usize = 3;

/// How many identities a new server draws to choose its place from.
const IDENTITY_CANDIDATES: usize = 256;

/// A place on the ring, below [`RING_POINTS`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(try_from = "u16")]
pub struct Point(u16);

impl TryFrom<u16> for Point {
    type Error = String;

    fn try_from(number: u16) -> Result<Self, String> {
        Self::new(number).ok_or_else(|| format!("the ring has no point {number}"))
    }
}

impl Point {
    /// Where `text` stands: SHA-1 of its UTF-8 bytes, as a big-endian integer,
    /// modulo [`RING_POINTS`].
    pub fn of(text: &str) -> Self {
        let digest = Sha1::digest(text.as_bytes());
        let modulus = u32::from(RING_POINTS);
        // Four bytes at a time: (remainder * 2^32 + word) fits in 64 bits.
        let remainder = digest.as_chunks::<4>().0.iter().fold(0, |remainder, word| {
            let number = u64::from(remainder) << 32 | u64::from(u32::from_be_bytes(*word));
            (number % u64::from(modulus)) as u32
        });
        Self(remainder as u16)
    }

    /// The point with this number.
    ///
    /// # Panics
    /// If the number is not below [`RING_POINTS`].
    pub fn at(number: u16) -> Self {
        assert!(number < RING_POINTS, "the ring has no point {number}");
        Self(number)
    }

    /// Every point.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..RING_POINTS).map(Self)
    }

    /// The point with this number, if there is one.
    pub fn new(number: u16) -> Option<Self> {
        (number < RING_POINTS).then_some(Self(number))
    }

    /// The number of the point.
    pub fn number(self) -> u16 {
        self.0
    }

    /// How many points lie between `start` and this one, going up the ring.
    pub fn distance_from(self, start: Point) -> u16 {
        (self.0 + RING_POINTS - start.0) % RING_POINTS
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A stretch of the ring: from `start` (included) up to `end` (excluded). One
/// that ends where it starts is the whole ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arc {
    /// The first point in it.
    pub start: Point,
    /// The first point after it.
    pub end: Point,
}

impl Arc {
    /// How many points it has.
    pub fn length(self) -> u16 {
        match self.end.distance_from(self.start) {
            0 => RING_POINTS,
            length => length,
        }
    }

    /// Whether `point` lies in it.
    pub fn contains(self, point: Point) -> bool {
        point.distance_from(self.start) < self.length()
    }

    /// Its points, in the order of the ring.
    pub fn points(self) -> impl Iterator<Item = Point> {
        (0..self.length()).map(move |step| Point((self.start.0 + step) % RING_POINTS))
    }
}

impl fmt::Display for Arc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{},{})", self.start, self.end)
    }
}

/// The index of the one of the `starts` (sorted, not empty) whose arc holds
/// `point`: the last that is not above it, else the last of all.
pub fn owner_of(point: Point, starts: &[Point]) -> usize {
    starts.partition_point(|start| *start <= point).checked_sub(1).unwrap_or(starts.len() - 1)
}

/// The indexes of the replicas of `point` among members whose places are
/// `starts` (sorted): the owner first, then the next ones around the ring.
/// All of them when there are [`REPLICAS`] or fewer.
pub fn target_of(point: Point, starts: &[Point]) -> Vec<usize> {
    if starts.is_empty() {
        return Vec::new();
    }
    let owner = owner_of(point, starts);
    (0..REPLICAS.min(starts.len())).map(|step| (owner + step) % starts.len()).collect()
}

/// Draws an identity for a new server: of a few hundred random numbers the one
/// that best halves the longest arc of the ring, so that the ring stays even
/// without virtual nodes and the old protocol sees nothing but a number.
pub fn choose_identity(taken: &[Point], rng: &mut impl RngExt) -> Identity {
    let longest_arc_with = |candidate: Point| {
        let mut starts = taken.to_vec();
        starts.push(candidate);
        starts.sort_unstable();
        starts.dedup();
        let ends = starts.iter().cycle().skip(1);
        let mut lengths: Vec<u16> = starts
            .iter()
            .zip(ends)
            .map(|(start, end)| Arc { start: *start, end: *end }.length())
            .collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        // The longest arc counts first, then the next ones: splitting any of
        // several equally long arcs is as good as splitting the first.
        lengths
    };
    let best = (0..IDENTITY_CANDIDATES)
        .map(|_| Identity::number(rng.random()))
        .min_by_key(|identity| longest_arc_with(Point::of(identity.as_str())));
    #[expect(clippy::expect_used, reason = "the number of candidates is not zero")]
    best.expect("there are candidates")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn points_are_the_originals() {
        // int(hashlib.sha1(text).hexdigest(), 16) % 10000, by CPython.
        for (text, number) in
            [("", 1305), ("a", 6152), ("hello", 3181), ("0.25", 1579), ("ключ", 95)]
        {
            assert_eq!(Point::of(text).number(), number, "{text:?}");
        }
    }

    #[test]
    fn the_owner_is_the_highest_not_above_and_the_ring_wraps() {
        let starts = [100, 4000, 4000, 9000].map(Point::at);
        let target = |point| target_of(Point::at(point), &starts);
        assert_eq!(target(100), [0, 1, 2]);
        assert_eq!(target(3999), [0, 1, 2]);
        assert_eq!(target(4000), [2, 3, 0], "of two at one point the last one owns");
        assert_eq!(target(9500), [3, 0, 1]);
        assert_eq!(target(99), [3, 0, 1], "below the first: the highest of all");
        assert_eq!(target_of(Point::at(5), &starts[..2]), [1, 0], "all, when there are few");
    }

    #[test]
    fn arcs_hold_their_start_and_not_their_end() {
        let arc = Arc { start: Point::at(9990), end: Point::at(10) };
        assert_eq!(arc.length(), 20);
        assert!(arc.contains(Point::at(9990)) && arc.contains(Point::at(9)));
        assert!(!arc.contains(Point::at(10)) && !arc.contains(Point::at(9989)));
        assert_eq!(arc.points().count(), 20);
        let ring = Arc { start: Point::at(5), end: Point::at(5) };
        assert!(ring.contains(Point::at(4)) && ring.contains(Point::at(5)));
    }

    #[test]
    fn chosen_identities_keep_the_ring_even() {
        let mut rng = StdRng::seed_from_u64(1);
        let mut starts: Vec<Point> = Vec::new();
        for _ in 0..16 {
            let identity = choose_identity(&starts, &mut rng);
            starts.push(Point::of(identity.as_str()));
            starts.sort_unstable();
        }
        let ends = starts.iter().cycle().skip(1);
        let longest =
            starts.iter().zip(ends).map(|(s, e)| Arc { start: *s, end: *e }.length()).max();
        assert!(longest.unwrap() <= 2 * RING_POINTS / 16, "longest arc: {longest:?}");
    }
}
