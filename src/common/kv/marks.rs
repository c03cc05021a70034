//! The original's vote and commit, on top of the replica groups.
//!
//! An original client asks every replica of a key for its vote
//! (`setr_request`), and when all grant it, sends the value to each of them
//! (`setr`); else it withdraws (`setr_deny`) from each. Nothing in its requests
//! says which client it is.
//!
//! Here the primary of the key keeps one *mark* for it, and in the mark one vote
//! for each server through which a client asked. A vote through the same server
//! a second time is refused, so at most one client can have them all, exactly
//! as if each server kept its own. The first commit under a mark becomes one
//! write; the commits of the same value through the other voters join it. A
//! mark ends when all its voters have committed, when they have withdrawn, or
//! [`MARK_LIFE`] after it was made, so a client that died blocks nobody for
//! long. Writers of our dialect do not ask and are not held up: such a write is
//! simply ordered before the commit.
//!
//! A loser withdraws everywhere, from servers that refused it, too. So that this
//! doesn't withdraw the winner's vote, every refusal through a server is
//! counted, and a withdrawal is set against the refusals first.

use super::{Text, Version};
use crate::machine::Time;
use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::time::Duration;

/// How long after its first vote a client can commit.
pub const MARK_LIFE: Duration = Duration::from_secs(10);

/// How many keys can be marked at one primary.
pub const MAX_MARKS: usize = 100_000;

/// What a commit leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ruling {
    /// The first one: write the value.
    Write,
    /// The value is being written: wait for it.
    Wait,
    /// The value has been written.
    Written(Version),
    /// There is no mark for this: it has run out or never was.
    NoVote,
}

#[derive(Debug, Default)]
struct Vote {
    refusals: u32,
    used: bool,
}

#[derive(Debug)]
struct Mark {
    until: Time,
    votes: BTreeMap<SocketAddrV4, Vote>,
    /// What the first commit writes, and which write it became.
    value: Option<Text>,
    written: Option<Version>,
}

/// The marks on the keys of one primary.
#[derive(Debug, Default)]
pub struct Marks {
    marks: BTreeMap<Text, Mark>,
}

impl Marks {
    /// A client asks for the vote on `key` through `via`; whether it is granted.
    pub fn vote(&mut self, now: Time, key: &Text, via: SocketAddrV4) -> bool {
        self.forget_if_over(now, key);
        if !self.marks.contains_key(key) {
            if self.marks.len() >= MAX_MARKS {
                self.marks.retain(|_, mark| mark.until > now);
            }
            if self.marks.len() >= MAX_MARKS {
                return false;
            }
        }
        let mark = self.marks.entry(Text::clone(key)).or_insert_with(|| Mark {
            until: now + MARK_LIFE,
            votes: BTreeMap::new(),
            value: None,
            written: None,
        });
        match mark.votes.get_mut(&via) {
            Some(vote) => {
                vote.refusals += 1;
                false
            }
            None if mark.value.is_some() => false,
            None => {
                mark.votes.insert(via, Vote::default());
                true
            }
        }
    }

    /// A client withdraws from `via`. Returns whether the vote there is free
    /// again.
    pub fn deny(&mut self, now: Time, key: &Text, via: SocketAddrV4) -> bool {
        self.forget_if_over(now, key);
        let Some(mark) = self.marks.get_mut(key) else { return true };
        match mark.votes.get_mut(&via) {
            Some(vote) if vote.refusals > 0 => {
                vote.refusals -= 1;
                false
            }
            Some(vote) if vote.used => false,
            Some(_) => {
                mark.votes.remove(&via);
                if mark.votes.is_empty() {
                    self.marks.remove(key);
                }
                true
            }
            None => true,
        }
    }

    /// A client commits `value` through `via`.
    pub fn commit(&mut self, now: Time, key: &Text, via: SocketAddrV4, value: &Text) -> Ruling {
        self.forget_if_over(now, key);
        let Some(mark) = self.marks.get_mut(key) else { return Ruling::NoVote };
        let Some(vote) = mark.votes.get_mut(&via) else { return Ruling::NoVote };
        match &mark.value {
            None => {
                vote.used = true;
                mark.value = Some(Text::clone(value));
                Ruling::Write
            }
            Some(first) if first != value => Ruling::NoVote,
            Some(_) => {
                let Some(version) = mark.written else { return Ruling::Wait };
                vote.used = true;
                self.forget_if_spent(key);
                Ruling::Written(version)
            }
        }
    }

    /// The write under the mark on `key` is committed as `version`.
    pub fn written(&mut self, key: &Text, version: Version) {
        if let Some(mark) = self.marks.get_mut(key).filter(|mark| mark.value.is_some()) {
            mark.written = Some(version);
            self.forget_if_spent(key);
        }
    }

    /// A mark is over when its life is; one that has come to its commit lives
    /// once more as long, for the commits through the other servers.
    fn forget_if_over(&mut self, now: Time, key: &Text) {
        let over = |mark: &Mark| match mark.value {
            None => mark.until <= now,
            Some(_) => mark.until + MARK_LIFE <= now,
        };
        if self.marks.get(key).is_some_and(over) {
            self.marks.remove(key);
        }
    }

    fn forget_if_spent(&mut self, key: &Text) {
        let spent = |mark: &Mark| mark.votes.values().all(|vote| vote.used);
        if self.marks.get(key).is_some_and(spent) {
            self.marks.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Revision;
    use std::net::Ipv4Addr;

    const VERSION: Version = Version { group: Revision(1), number: 1 };

    fn server(port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
    }

    fn votes(marks: &mut Marks, now: Time) -> Vec<bool> {
        [1, 2, 3].map(|port| marks.vote(now, &"k".into(), server(port))).to_vec()
    }

    #[test]
    fn one_client_gets_every_vote_and_its_commits_are_one_write() {
        let (mut marks, now, key) = (Marks::default(), Time::default(), "k".into());
        assert_eq!(votes(&mut marks, now), [true; 3]);
        assert_eq!(votes(&mut marks, now), [false; 3]);
        assert_eq!(marks.commit(now, &key, server(1), &"v".into()), Ruling::Write);
        assert_eq!(marks.commit(now, &key, server(2), &"v".into()), Ruling::Wait);
        marks.written(&key, VERSION);
        assert_eq!(marks.commit(now, &key, server(2), &"v".into()), Ruling::Written(VERSION));
        assert_eq!(marks.commit(now, &key, server(3), &"v".into()), Ruling::Written(VERSION));
        assert_eq!(marks.commit(now, &key, server(3), &"v".into()), Ruling::NoVote);
        assert_eq!(votes(&mut marks, now), [true; 3], "the key is free again");
    }

    #[test]
    fn a_losers_withdrawals_leave_the_winners_votes() {
        let (mut marks, now, key) = (Marks::default(), Time::default(), "k".into());
        assert_eq!(votes(&mut marks, now), [true; 3]);
        assert_eq!(votes(&mut marks, now), [false; 3]);
        for port in [1, 2, 3] {
            assert!(!marks.deny(now, &key, server(port)), "set against the refusal");
        }
        assert_eq!(marks.commit(now, &key, server(1), &"v".into()), Ruling::Write);
    }

    #[test]
    fn when_neither_has_all_votes_both_withdraw_and_the_key_is_free() {
        let (mut marks, now, key) = (Marks::default(), Time::default(), "k".into());
        assert!(marks.vote(now, &key, server(1)));
        assert!(marks.vote(now, &key, server(3)), "by the other client");
        assert!(marks.vote(now, &key, server(2)));
        assert!(!marks.vote(now, &key, server(3)));
        assert!(!marks.vote(now, &key, server(1)));
        assert!(!marks.vote(now, &key, server(2)));
        for port in [1, 2, 3, 1, 2, 3] {
            marks.deny(now, &key, server(port));
        }
        assert_eq!(votes(&mut marks, now), [true; 3]);
    }

    #[test]
    fn a_client_that_died_between_vote_and_commit_blocks_the_key_for_ten_seconds() {
        let (mut marks, start, key) = (Marks::default(), Time::default(), "k".into());
        assert_eq!(votes(&mut marks, start), [true; 3]);
        let just_before = start + (MARK_LIFE - Duration::from_millis(1));
        assert_eq!(votes(&mut marks, just_before), [false; 3]);
        let over = start + MARK_LIFE;
        assert_eq!(marks.commit(over, &key, server(1), &"late".into()), Ruling::NoVote);
        assert_eq!(votes(&mut marks, over), [true; 3]);
    }
}
