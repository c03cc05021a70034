//! Locks: first come, first served.
//!
//! A lock exists while somebody holds it or waits for it. Whoever asks while others
//! hold it is queued once, in order of arrival; when they give it back, the first in
//! the queue holds it. Asking again while holding is granted again. All of this is
//! the original's rule; the refusal to let a stranger release is ours, and so is
//! what follows.
//!
//! # Tokens
//! Every grant carries a [`Token`], larger than that of any grant before it, of
//! whatever lock. It is drawn when the requestor becomes a holder, which may be a
//! while before it asks again and learns of it. A store that remembers the newest
//! token that it has seen refuses a holder who has lost the lock without knowing:
//! see [`crate::kv::content`].
//!
//! # Shared locks
//! A lock can be asked for *shared*: any number may hold it so, and then nobody
//! holds it alone. The queue stays one queue: a lock is held by its first place
//! alone, or by all shared places before the first that is not. So whoever waits to
//! hold it alone is not overtaken by later ones who would share.
//!
//! # Time to live
//! A place may have a *time to live*: it is to be kept alive by its requestor, or it
//! is given up, whether it holds the lock or waits. The time itself is the leader's
//! matter, as with the leases of servers; here is only how long it is.

use super::Token;
use crate::wire::Identity;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// How many locks there can be at once.
pub const MAX_LOCKS: usize = 100_000;

/// How many requestors can wait for one lock.
pub const MAX_WAITERS: usize = 10_000;

/// The longest name of a lock, in bytes.
pub const MAX_LOCK_NAME_BYTES: usize = 1024;

/// The shortest time to live of a place, in milliseconds.
pub const MIN_TTL_MS: u64 = 200;

/// The longest time to live of a place, in milliseconds.
pub const MAX_TTL_MS: u64 = 3_600_000;

/// What becomes of a request for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grant {
    /// The requestor holds it.
    Granted {
        /// What tells this grant from all before it.
        token: Token,
    },
    /// The requestor waits; this many are before it, those who hold it included.
    Queued {
        /// How many are before it.
        ahead: usize,
    },
    /// There is no room for another lock or another waiter.
    Full,
    /// It has a place already, to hold the lock in the other manner.
    OtherManner,
    /// What came of this request has been given back or given up since.
    Gone,
}

impl Grant {
    /// The same, when the place that came of it is there no more: what is not held must
    /// not be taken for held, nor a place that others have passed for one in the queue.
    #[must_use]
    pub fn without_place(self) -> Self {
        match self {
            Self::Granted { .. } | Self::Queued { .. } => Self::Gone,
            refusal => refusal,
        }
    }
}

/// How a requestor wants to hold a lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manner {
    /// Together with others who share it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
    /// How long it is kept without a sign of life, in milliseconds; for ever without
    /// this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
}

/// A place in the queue of a lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Whose it is.
    pub requestor: Identity,
    /// How it holds the lock, or is to hold it.
    #[serde(default)]
    pub manner: Manner,
    /// What it was granted with; `None` while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
}

/// All locks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Locks {
    /// Those who hold the lock stand first, then those who wait, in order of arrival.
    queues: BTreeMap<Box<str>, VecDeque<Place>>,
    /// The newest token that was ever drawn.
    last_token: Token,
}

impl Locks {
    /// `requestor` asks for `lock`, for the first time or again.
    pub fn get(&mut self, lock: &str, requestor: &Identity, manner: Manner) -> Grant {
        if !self.queues.contains_key(lock) && self.queues.len() >= MAX_LOCKS {
            return Grant::Full;
        }
        let queue = self.queues.entry(lock.into()).or_default();
        let length = queue.len();
        match queue.iter_mut().find(|place| place.requestor == *requestor) {
            Some(place) if place.manner.shared != manner.shared => return Grant::OtherManner,
            Some(place) => place.manner = manner,
            None if length > MAX_WAITERS => return Grant::Full,
            None => {
                let requestor = requestor.clone();
                queue.push_back(Place { requestor, manner, token: None });
            }
        }
        self.grant(lock);
        self.place(lock, requestor, manner).unwrap_or(Grant::Full)
    }

    /// The newest token that was ever drawn.
    pub fn last_token(&self) -> Token {
        self.last_token
    }

    /// Draws no token up to this one any more.
    pub fn burn(&mut self, last: Token) {
        self.last_token = self.last_token.max(last);
    }

    /// Gives tokens to those who hold `lock` by now and have none.
    fn grant(&mut self, lock: &str) {
        let Some(queue) = self.queues.get_mut(lock) else { return };
        for (index, place) in queue.iter_mut().enumerate() {
            if index > 0 && !place.manner.shared {
                return;
            }
            if place.token.is_none() {
                self.last_token.0 += 1;
                place.token = Some(self.last_token);
            }
            if !place.manner.shared {
                return;
            }
        }
    }

    /// Every lock with its places, those who hold it first, from the lock behind
    /// `after` on.
    pub fn list<'a>(
        &'a self,
        after: Option<&'a str>,
    ) -> impl Iterator<Item = (&'a str, &'a VecDeque<Place>)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let behind = after.map_or(Unbounded, Excluded);
        self.queues.range::<str, _>((behind, Unbounded)).map(|(lock, queue)| (&**lock, queue))
    }

    /// The places of `lock`, those who hold it first.
    pub fn queue(&self, lock: &str) -> impl Iterator<Item = &Place> {
        self.queues.get(lock).into_iter().flatten()
    }

    /// What asking for `lock` in that manner comes to, if it changes nothing.
    pub fn place(&self, lock: &str, requestor: &Identity, manner: Manner) -> Option<Grant> {
        let mut queue = self.queue(lock).enumerate();
        let (ahead, place) = queue.find(|(_, place)| place.requestor == *requestor)?;
        if place.manner.shared != manner.shared {
            return Some(Grant::OtherManner);
        }
        let grant = place.token.map_or(Grant::Queued { ahead }, |token| Grant::Granted { token });
        (place.manner == manner).then_some(grant)
    }

    /// `requestor` gives `lock` back, or leaves its queue. Returns whether it
    /// held it or waited for it.
    pub fn release(&mut self, lock: &str, requestor: &Identity) -> bool {
        let Some(queue) = self.queues.get_mut(lock) else { return false };
        let Some(place) = queue.iter().position(|place| place.requestor == *requestor) else {
            return false;
        };
        queue.remove(place);
        if queue.is_empty() {
            self.queues.remove(lock);
        }
        self.grant(lock);
        true
    }

    /// The time of `requestor` has run out: it loses `lock`, or its place in the
    /// queue, if it is still the place with this `token`, or without one. Returns
    /// whether it was.
    pub fn expire(&mut self, lock: &str, requestor: &Identity, token: Option<Token>) -> bool {
        let is_it = |place: &Place| place.requestor == *requestor && place.token == token;
        self.queue(lock).any(is_it) && self.release(lock, requestor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALONE: Manner = Manner { shared: false, ttl_ms: None };
    const SHARED: Manner = Manner { shared: true, ttl_ms: None };

    fn names(count: usize) -> impl Iterator<Item = Identity> {
        (0..count).map(|number| Identity::text(number.to_string()))
    }

    fn granted(token: u64) -> Grant {
        Grant::Granted { token: Token(token) }
    }

    /// Who holds the lock `l`, by the first letter.
    fn holders(locks: &Locks) -> String {
        let holders = locks.queue("l").filter(|place| place.token.is_some());
        holders.map(|place| place.requestor.as_str()).collect()
    }

    #[test]
    fn a_queue_has_an_end() {
        let mut locks = Locks::default();
        for requestor in names(MAX_WAITERS + 1) {
            assert_ne!(locks.get("l", &requestor, ALONE), Grant::Full);
        }
        let last = Identity::text("one too many");
        assert_eq!(locks.get("l", &last, ALONE), Grant::Full);
        assert!(matches!(locks.get("other", &last, ALONE), Grant::Granted { .. }));
    }

    #[test]
    fn a_number_and_its_text_are_two_requestors() {
        let mut locks = Locks::default();
        assert_eq!(locks.get("l", &Identity::number(7), ALONE), granted(1));
        assert_eq!(locks.get("l", &Identity::text("7"), ALONE), Grant::Queued { ahead: 1 });
        assert!(!locks.release("l", &Identity::text("stranger")));
        assert!(locks.release("l", &Identity::number(7)));
        assert_eq!(locks.get("l", &Identity::text("7"), ALONE), granted(2));
    }

    #[test]
    fn tokens_grow_over_all_locks_and_asking_again_brings_the_same() {
        let (mut locks, [a, b]) = (Locks::default(), ["a", "b"].map(Identity::text));
        assert_eq!(locks.get("l", &a, ALONE), granted(1));
        assert_eq!(locks.get("m", &a, ALONE), granted(2));
        assert_eq!(locks.get("l", &a, ALONE), granted(1));
        assert_eq!(locks.get("l", &b, ALONE), Grant::Queued { ahead: 1 });
        assert!(locks.release("l", &a));
        assert_eq!(locks.get("m", &b, ALONE), Grant::Queued { ahead: 1 });
        assert_eq!(locks.get("l", &b, ALONE), granted(3), "drawn when it was released");
        assert!(locks.release("l", &b) && locks.release("m", &a) && locks.release("m", &b));
        assert_eq!(locks.get("l", &a, ALONE), granted(5));
    }

    #[test]
    fn whoever_waits_alone_is_not_overtaken_by_those_who_share() {
        let mut locks = Locks::default();
        let [a, b, c, d, e] = ["a", "b", "c", "d", "e"].map(Identity::text);
        for (requestor, manner) in [(&a, SHARED), (&b, SHARED), (&c, ALONE), (&d, SHARED)] {
            locks.get("l", requestor, manner);
        }
        assert_eq!(holders(&locks), "ab");
        assert_eq!(locks.get("l", &d, SHARED), Grant::Queued { ahead: 3 });
        assert!(locks.release("l", &a));
        assert_eq!(holders(&locks), "b");
        locks.get("l", &e, SHARED);
        assert!(locks.release("l", &b));
        assert_eq!(holders(&locks), "c");
        assert!(locks.release("l", &c));
        assert_eq!(holders(&locks), "de");
        // One who waits alone gives up: those behind it share.
        locks.get("l", &a, ALONE);
        locks.get("l", &b, SHARED);
        assert_eq!(holders(&locks), "de");
        assert!(locks.release("l", &a));
        assert_eq!(holders(&locks), "deb");
    }

    #[test]
    fn a_place_is_held_in_one_manner() {
        let (mut locks, a) = (Locks::default(), Identity::text("a"));
        assert_eq!(locks.get("l", &a, SHARED), granted(1));
        assert_eq!(locks.get("l", &a, ALONE), Grant::OtherManner);
        assert_eq!(locks.place("l", &a, ALONE), Some(Grant::OtherManner));
        assert_eq!(locks.get("l", &a, SHARED), granted(1));
    }

    #[test]
    fn a_time_that_has_run_out_ends_only_the_grant_that_it_was_for() {
        let (mut locks, [a, b]) = (Locks::default(), ["a", "b"].map(Identity::text));
        let manner = Manner { ttl_ms: Some(1000), ..ALONE };
        assert_eq!(locks.get("l", &a, manner), granted(1));
        assert_eq!(locks.get("l", &b, manner), Grant::Queued { ahead: 1 });
        assert!(locks.release("l", &a));
        assert_eq!(locks.get("l", &a, manner), Grant::Queued { ahead: 1 });
        assert!(!locks.expire("l", &a, Some(Token(1))), "that grant is over");
        assert!(!locks.expire("l", &b, None), "it waits no more");
        assert!(locks.expire("l", &b, Some(Token(2))));
        assert_eq!(locks.get("l", &a, manner), granted(3));
    }
}
