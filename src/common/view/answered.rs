//! What was answered to requests that may come again.
//!
//! A client whose request was carried out, and the reply lost, asks again, perhaps
//! at another viewleader. Its request has a number that was drawn for it, and what
//! came of it is remembered with the state: the second one is answered like the
//! first, and changes nothing.

use super::locks::Grant;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// How many answers are remembered; beyond it the oldest are forgotten. At two
/// thousand lock operations a second that is a client's patience; at the most that was
/// measured it is 2.6 s, and a request that comes again later than that is a new one.
pub const MAX_ANSWERED: usize = 20_000;

/// What came of a request about a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Of asking for it.
    Asked(Grant),
    /// Of giving it back: whether the requestor held it or waited for it.
    Released(bool),
}

/// The answers, by the numbers of their requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    answers: BTreeMap<u64, Answer>,
    order: VecDeque<u64>,
}

impl Answered {
    /// The answer that the request with this number was given.
    pub fn get(&self, request: Option<u64>) -> Option<Answer> {
        self.answers.get(&request?).copied()
    }

    /// Remembers what came of the request with this number, if it has one.
    pub fn remember(&mut self, request: Option<u64>, answer: Answer) {
        let Some(request) = request else { return };
        if self.answers.insert(request, answer).is_none() {
            self.order.push_back(request);
        }
        if self.order.len() > MAX_ANSWERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.answers.remove(&oldest);
        }
    }
}
