//! Locks: first come, first served.
//!
//! A lock exists while somebody holds it. Whoever asks while another holds it
//! is queued once, in order of arrival, and told to ask again; when the holder
//! releases, the first in the queue holds it and is granted when it next asks.
//! Asking again while holding is granted again. All of this is the original's
//! rule; the refusal to let a stranger release is ours.

use crate::wire::Identity;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// How many locks can be held at once.
pub const MAX_LOCKS: usize = 100_000;

/// How many requestors can wait for one lock.
pub const MAX_WAITERS: usize = 10_000;

/// The longest name of a lock, in bytes.
pub const MAX_LOCK_NAME_BYTES: usize = 1024;

/// What becomes of a request for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The requestor holds it.
    Granted,
    /// The requestor waits; this many are before it, the holder included.
    Queued {
        /// How many are before it, the holder included.
        ahead: usize,
    },
    /// There is no room for another lock or another waiter.
    Full,
}

/// All locks that are held.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Locks {
    /// The holder stands first, then those who wait, in order of arrival.
    queues: BTreeMap<Box<str>, VecDeque<Identity>>,
}

impl Locks {
    /// `requestor` asks for `lock`, for the first time or again.
    pub fn get(&mut self, lock: &str, requestor: &Identity) -> Grant {
        if !self.queues.contains_key(lock) {
            if self.queues.len() >= MAX_LOCKS {
                return Grant::Full;
            }
            self.queues.insert(lock.into(), VecDeque::from([requestor.clone()]));
            return Grant::Granted;
        }
        let queue = self.queues.entry(lock.into()).or_default();
        match queue.iter().position(|waiting| waiting == requestor) {
            Some(0) => Grant::Granted,
            Some(ahead) => Grant::Queued { ahead },
            None if queue.len() > MAX_WAITERS => Grant::Full,
            None => {
                queue.push_back(requestor.clone());
                Grant::Queued { ahead: queue.len() - 1 }
            }
        }
    }

    /// Who holds `lock` and who waits for it, in order.
    pub fn queue(&self, lock: &str) -> Vec<Identity> {
        self.queues.get(lock).into_iter().flatten().cloned().collect()
    }

    /// Where `requestor` stands with `lock`, if it holds it or waits for it.
    pub fn place(&self, lock: &str, requestor: &Identity) -> Option<Grant> {
        let place = self.queues.get(lock)?.iter().position(|waiting| waiting == requestor)?;
        Some(if place == 0 { Grant::Granted } else { Grant::Queued { ahead: place } })
    }

    /// `requestor` gives `lock` back, or leaves its queue. Returns whether it
    /// held it or waited for it.
    pub fn release(&mut self, lock: &str, requestor: &Identity) -> bool {
        let Some(queue) = self.queues.get_mut(lock) else { return false };
        let Some(place) = queue.iter().position(|waiting| waiting == requestor) else {
            return false;
        };
        queue.remove(place);
        if queue.is_empty() {
            self.queues.remove(lock);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> impl Iterator<Item = Identity> {
        (0..count).map(|number| Identity::text(number.to_string()))
    }

    #[test]
    fn a_queue_has_an_end() {
        let mut locks = Locks::default();
        for requestor in names(MAX_WAITERS + 1) {
            assert_ne!(locks.get("l", &requestor), Grant::Full);
        }
        assert_eq!(locks.get("l", &Identity::text("one too many")), Grant::Full);
        assert_eq!(locks.get("other", &Identity::text("one too many")), Grant::Granted);
    }

    #[test]
    fn a_number_and_its_text_are_two_requestors() {
        let mut locks = Locks::default();
        assert_eq!(locks.get("l", &Identity::number(7)), Grant::Granted);
        assert_eq!(locks.get("l", &Identity::text("7")), Grant::Queued { ahead: 1 });
        assert!(!locks.release("l", &Identity::text("stranger")));
        assert!(locks.release("l", &Identity::number(7)));
        assert_eq!(locks.get("l", &Identity::text("7")), Grant::Granted);
    }
}
