//! What waits until a leader is confirmed to be one.
//!
//! A leader that was cut off or asleep may not know that there is another one by now.
//! So whatever it answers without a change of the log waits until a majority has
//! confirmed that it led when the request came; one confirmation serves all who wait.

use std::collections::VecDeque;

/// Requests of the type `Q` that wait, in their order.
#[derive(Debug)]
pub struct Unconfirmed<Q> {
    waiting: VecDeque<(u64, Q)>,
    /// The number of the last confirmation that was asked for.
    last: u64,
    /// Whether it has come.
    has_come: bool,
}

impl<Q> Default for Unconfirmed<Q> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), last: 0, has_come: true }
    }
}

impl<Q> Unconfirmed<Q> {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// One more waits, for a confirmation that is asked for from now on.
    pub fn push(&mut self, request: Q) {
        self.waiting.push_back((self.last + 1, request));
    }

    /// The number of a confirmation that is to be asked for now, if one is.
    pub fn ask(&mut self) -> Option<u64> {
        if !self.has_come || self.waiting.is_empty() {
            return None;
        }
        self.has_come = false;
        self.last += 1;
        Some(self.last)
    }

    /// It has come: this was the leader when `number` was asked for. Gives those who
    /// have waited for it.
    pub fn confirmed(&mut self, number: u64) -> Vec<Q> {
        self.has_come |= number >= self.last;
        let count = self.waiting.iter().take_while(|(waits_for, _)| *waits_for <= number).count();
        self.waiting.drain(..count).map(|(_, request)| request).collect()
    }

    /// Those who wait in vain.
    pub fn into_waiting(self) -> impl Iterator<Item = Q> {
        self.waiting.into_iter().map(|(_, request)| request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_after_a_confirmation_was_asked_for_waits_for_the_next() {
        let mut waiting = Unconfirmed::default();
        assert_eq!(waiting.ask(), None);
        waiting.push('a');
        assert_eq!(waiting.ask(), Some(1));
        waiting.push('b');
        assert_eq!(waiting.ask(), None);
        assert_eq!(waiting.confirmed(1), ['a']);
        assert_eq!(waiting.ask(), Some(2));
        assert_eq!(waiting.confirmed(2), ['b']);
        assert!(waiting.is_empty());
    }
}
