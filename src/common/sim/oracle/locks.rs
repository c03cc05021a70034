//! Locks as their clients see them.
//!
//! A client holds a lock from the moment that it is told so to the moment at which
//! it begins to give it back, or at which its time to live is over: that is counted by
//! its own clock, from when it *sent* its last sign of life. What must hold:
//!
//! * nobody holds a lock beside one who holds it alone;
//! * who was told to wait before another one first asked comes before that one, unless
//!   it has left or its time is over, or both share the lock;
//! * nobody is told that it has lost its place before its time is over (whoever asks for
//!   a sign of life sees to that);
//! * no token comes with two grants; and a grant that was asked for after one was told
//!   has a greater token than that.

use crate::machine::Time;
use crate::view::Token;
use std::collections::BTreeMap;

/// One client's wish for a lock, from when it first asks until it has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim<'a> {
    /// The lock.
    pub lock: &'a str,
    /// Whose wish it is: another name for each wish.
    pub who: &'a str,
    /// Whether it would share the lock.
    pub shared: bool,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    shared: bool,
    /// When it was told to wait first, in a row.
    since: u64,
    /// When its time to live is over.
    until: Time,
}

#[derive(Clone, Debug, Default)]
struct Lock {
    holders: BTreeMap<String, Place>,
    waiting: BTreeMap<String, Place>,
    /// When who asked first for the place that it has, and the newest token that anybody
    /// had been told by then.
    asked: BTreeMap<String, (u64, Token)>,
}

/// Watches who is told what about locks.
#[derive(Clone, Debug, Default)]
pub struct Locks {
    locks: BTreeMap<String, Lock>,
    /// Whose grant each token came with.
    tokens: BTreeMap<Token, (String, String)>,
    /// Counts what happens.
    moment: u64,
}

impl Locks {
    fn lock(&mut self, name: &str) -> (&mut Lock, u64) {
        self.moment += 1;
        (self.locks.entry(name.to_owned()).or_default(), self.moment)
    }

    /// Somebody asks, for the first time or again: for a new place, if the time of the one
    /// that it had is over.
    pub fn asks(&mut self, now: Time, claim: Claim<'_>) {
        let newest = self.tokens.last_key_value().map(|(token, _)| *token).unwrap_or_default();
        let (lock, moment) = self.lock(claim.lock);
        let is_over = |place: Option<&Place>| place.is_some_and(|place| place.until <= now);
        let had = lock.holders.get(claim.who).or_else(|| lock.waiting.get(claim.who));
        if is_over(had) {
            lock.asked.remove(claim.who);
        }
        lock.asked.entry(claim.who.to_owned()).or_insert((moment, newest));
    }

    /// Somebody is told to wait, and its place is kept until then.
    ///
    /// # Errors
    /// When it holds the lock already.
    pub fn waits(&mut self, now: Time, claim: Claim<'_>, until: Time) -> Result<(), String> {
        let Claim { lock: name, who, shared } = claim;
        let (lock, moment) = self.lock(name);
        if lock.holders.get(who).is_some_and(|place| place.until > now) {
            return Err(format!("{who} is to wait for {name}, which it holds"));
        }
        let known = lock.waiting.get(who).filter(|place| place.until > now);
        let since = known.map_or(moment, |place| place.since);
        lock.waiting.insert(who.to_owned(), Place { shared, since, until });
        Ok(())
    }

    /// Somebody is told that it holds the lock, with this token and until then.
    ///
    /// # Errors
    /// When it must not.
    pub fn granted(
        &mut self,
        now: Time,
        claim: Claim<'_>,
        token: Token,
        until: Time,
    ) -> Result<(), String> {
        let Claim { lock: name, who, shared } = claim;
        let owner = (name.to_owned(), who.to_owned());
        let known = self.tokens.insert(token, owner.clone());
        if let Some((lock, other)) = known.as_ref().filter(|known| **known != owner) {
            return Err(format!(
                "the token {token} is granted to {who} for {name}, and was to {other} for {lock}"
            ));
        }
        let (lock, moment) = self.lock(name);
        let (asked, newest) = lock.asked.get(who).copied().unwrap_or((moment, token));
        if known.is_none() && token < newest {
            return Err(format!(
                "{name} is granted to {who} with {token}, though {newest} was told before it asked"
            ));
        }
        if until <= now {
            // It knows that its time is over.
            return Ok(());
        }
        let is_live = |place: &Place| place.until > now && !(place.shared && shared);
        let mut others = lock.holders.iter().filter(|(other, _)| *other != who);
        if let Some((holder, _)) = others.find(|(_, place)| is_live(place)) {
            return Err(format!("{name} is granted to {who} while {holder} holds it"));
        }
        lock.waiting.remove(who);
        // It may have had this very grant from before.
        let first = lock.waiting.iter().find(|(_, place)| place.since < asked && is_live(place));
        if let (None, Some((first, _))) = (&known, first) {
            return Err(format!(
                "{name} is granted to {who} while {first}, who came before, waits"
            ));
        }
        lock.holders.insert(who.to_owned(), Place { shared, since: moment, until });
        Ok(())
    }

    /// A sign of life of a holder was taken: it holds the lock until then.
    ///
    /// # Errors
    /// When somebody else holds it.
    pub fn kept(&mut self, now: Time, claim: Claim<'_>, until: Time) -> Result<(), String> {
        let Claim { lock: name, who, shared } = claim;
        let (lock, since) = self.lock(name);
        let is_live = |place: &Place| place.until > now && !(place.shared && shared);
        let mut others = lock.holders.iter().filter(|(other, _)| *other != who);
        if until > now
            && let Some((holder, _)) = others.find(|(_, place)| is_live(place))
        {
            return Err(format!("{name} is kept for {who} while {holder} holds it"));
        }
        lock.holders.insert(who.to_owned(), Place { shared, since, until });
        Ok(())
    }

    /// Somebody begins to give the lock back, or to leave its queue, or has learned
    /// that it lost it.
    pub fn leaves(&mut self, name: &str, who: &str) {
        let (lock, _) = self.lock(name);
        lock.waiting.remove(who);
        lock.holders.remove(who);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Time = Time::from_millis(1000);
    const LATER: Time = Time::from_millis(2000);

    fn claim(who: &str) -> Claim<'_> {
        Claim { lock: "l", who, shared: false }
    }

    fn sharing(who: &str) -> Claim<'_> {
        Claim { shared: true, ..claim(who) }
    }

    #[test]
    fn a_second_holder_is_noticed() {
        let mut locks = Locks::default();
        locks.asks(NOW, claim("a"));
        locks.granted(NOW, claim("a"), Token(1), LATER).unwrap();
        locks.asks(NOW, claim("b"));
        assert!(locks.granted(NOW, claim("b"), Token(2), LATER).is_err());
        assert!(locks.granted(NOW, sharing("b"), Token(2), LATER).is_err());
        locks.leaves("l", "a");
        locks.granted(NOW, claim("b"), Token(2), LATER).unwrap();
    }

    #[test]
    fn whose_time_is_over_holds_and_waits_no_more() {
        let mut locks = Locks::default();
        for who in ["a", "b", "c"] {
            locks.asks(NOW, claim(who));
            locks.waits(NOW, claim(who), LATER).unwrap();
        }
        locks.granted(NOW, claim("a"), Token(1), LATER).unwrap();
        assert!(locks.granted(NOW, claim("c"), Token(2), LATER).is_err());
        let end = LATER + std::time::Duration::from_secs(1);
        locks.granted(LATER, claim("c"), Token(2), end).unwrap();
        assert!(locks.kept(LATER, claim("a"), end).is_err());
    }

    #[test]
    fn whose_time_is_over_and_who_asks_again_comes_last() {
        let mut locks = Locks::default();
        for who in ["a", "b"] {
            locks.asks(NOW, claim(who));
        }
        locks.granted(NOW, claim("a"), Token(1), LATER).unwrap();
        let end = LATER + std::time::Duration::from_secs(1);
        locks.waits(NOW, claim("b"), end).unwrap();
        locks.asks(LATER, claim("a"));
        assert!(locks.clone().granted(LATER, claim("a"), Token(2), end).is_err());
        locks.granted(LATER, claim("a"), Token(1), end).unwrap();
    }

    #[test]
    fn those_who_share_hold_it_together() {
        let mut locks = Locks::default();
        for (who, token) in [("a", 1), ("b", 2)] {
            locks.asks(NOW, sharing(who));
            locks.granted(NOW, sharing(who), Token(token), LATER).unwrap();
        }
        locks.asks(NOW, claim("c"));
        assert!(locks.granted(NOW, claim("c"), Token(3), LATER).is_err());
    }

    #[test]
    fn who_overtakes_is_noticed_unless_they_asked_at_the_same_time() {
        let mut locks = Locks::default();
        for who in ["a", "b"] {
            locks.asks(NOW, claim(who));
        }
        locks.granted(NOW, claim("a"), Token(1), LATER).unwrap();
        locks.waits(NOW, claim("b"), LATER).unwrap();
        locks.asks(NOW, claim("c"));
        locks.waits(NOW, claim("c"), LATER).unwrap();
        locks.leaves("l", "a");
        assert!(locks.granted(NOW, claim("c"), Token(2), LATER).is_err());
        let mut locks = Locks::default();
        for who in ["b", "c"] {
            locks.asks(NOW, claim(who));
            locks.waits(NOW, claim(who), LATER).unwrap();
        }
        locks.leaves("l", "b");
        locks.granted(NOW, claim("c"), Token(1), LATER).unwrap();
    }

    #[test]
    fn a_token_that_comes_again_or_goes_back_is_noticed() {
        let mut locks = Locks::default();
        locks.asks(NOW, claim("a"));
        locks.granted(NOW, claim("a"), Token(5), LATER).unwrap();
        locks.leaves("l", "a");
        locks.asks(NOW, claim("b"));
        assert!(locks.granted(NOW, claim("b"), Token(5), LATER).is_err());
        let mut locks = Locks::default();
        locks.asks(NOW, claim("a"));
        locks.granted(NOW, claim("a"), Token(5), LATER).unwrap();
        locks.leaves("l", "a");
        locks.asks(NOW, claim("b"));
        assert!(locks.granted(NOW, claim("b"), Token(4), LATER).is_err());
    }
}
