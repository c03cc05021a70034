//! The search for an order.
//!
//! A *configuration* is the set of operations that have taken effect so far and
//! the state of the register after them. From each one, an operation can be the
//! next if it began before any of those that are left has ended. The search takes
//! one, goes on, and undoes it when it gets stuck: the beginnings and ends that
//! are left stand in a list from which an operation is lifted, and put back, in
//! constant time. Configurations that were tried are remembered, for they lead to
//! nothing a second time either.
//!
//! Six rules keep it short and lose no order:
//!
//! * A read that can be next, and tells nothing new about the version, is taken at
//!   once, and nothing else is tried in its place: an order in which it comes later
//!   stays one when it is moved to the front. So is a compare-and-set that failed.
//! * Versions grow. So who makes or shows a version waits for all that show lower
//!   ones.
//! * A value is not replaced while it has still to be read, and nobody is left who
//!   could write it again.
//! * A value that has still to be shown at so many versions has to be written as often:
//!   what is left of its writes is not spent on anything else.
//! * An operation with unknown outcome is taken only if it makes an answer possible
//!   that was not: if the next one in an order gets its answer without it, it can
//!   be left out, or moved behind the next.
//! * Of several such operations that would do the same, the first is taken: from
//!   here on they are the same.

use super::Operation;
use super::register::{Effect, State, Value, Values};
use crate::kv::Version;
use std::collections::{BTreeMap, BTreeSet};

/// What a search finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// There is an order.
    Fine,
    /// There is none.
    Bad,
    /// The bound on the steps did not suffice.
    Undecided,
}

/// An operation with a known outcome.
struct Certain {
    effect: Effect,
    /// Where it stands among those that show versions, by version.
    rank: Option<usize>,
}

/// An operation with an unknown one.
struct Open {
    effect: Effect,
    /// How many of the ends come before its beginning.
    began: usize,
    /// The last one before it that would do the same.
    same_before: Option<usize>,
    taken: bool,
}

/// A beginning or an end in the list.
#[derive(Clone, Copy)]
enum Mark {
    /// Of this certain operation.
    Begin(usize),
    /// The end of one; so many ends come before it.
    End(usize),
}

/// Where to go on in a configuration.
#[derive(Clone, Copy)]
enum Cursor {
    /// Nothing has been tried.
    Start,
    /// All up to this mark has been.
    Mark(usize),
    /// All certain ones have been, and the open ones before this.
    Open(usize),
}

/// Who takes effect next.
#[derive(Clone, Copy)]
enum Next {
    Certain { operation: usize, mark: usize },
    Open(usize),
}

/// What was done, to be undone.
struct Done {
    next: Next,
    before: State,
    /// Nothing else is to be tried in its place.
    forced: bool,
}

/// The list's two ends in `previous` and `following`.
const NONE: usize = usize::MAX;

/// A search that goes on.
struct Search {
    certain: Vec<Certain>,
    open: Vec<Open>,
    marks: Vec<Mark>,
    /// For each beginning, where its end is.
    end_of: Vec<usize>,
    following: Vec<usize>,
    previous: Vec<usize>,
    head: usize,
    /// Which certain operations have taken effect, as bits.
    taken: Vec<u64>,
    /// No bit beyond this word was ever set.
    highest_word: usize,
    /// The versions that are shown, in order, with who shows them.
    versions: Vec<(Version, usize)>,
    /// All before this one in `versions` have taken effect.
    lowest: usize,
    /// For each value, how many have still to show it.
    readers: Vec<usize>,
    /// For each value, how many may still write it.
    writers: Vec<usize>,
    /// For each value, the versions at which it is shown, in order.
    shown_at: Vec<Vec<Version>>,
    state: State,
    /// Configurations that were tried: the bits from a word on, the open ones, the state.
    tried: BTreeSet<(usize, Vec<u64>, Vec<usize>, State)>,
}

/// Looks for an order of these operations of one key, sorted by their beginnings,
/// in at most `steps` steps.
pub(super) fn search(operations: &[&Operation], steps: u64) -> Answer {
    let mut search = Search::new(operations);
    let mut left = search.certain.len();
    let mut path: Vec<Done> = Vec::new();
    let mut cursor = Cursor::Start;
    let mut step = 0;
    while left > 0 {
        if step >= steps {
            return Answer::Undecided;
        }
        step += 1;
        if let Some((next, after, forced)) = search.next(cursor) {
            left -= usize::from(matches!(next, Next::Certain { .. }));
            search.take(next);
            let before = std::mem::replace(&mut search.state, after);
            path.push(Done { next, before, forced });
            cursor = Cursor::Start;
            continue;
        }
        loop {
            let Some(done) = path.pop() else { return Answer::Bad };
            left += usize::from(matches!(done.next, Next::Certain { .. }));
            search.put_back(done.next);
            search.state = done.before;
            if !done.forced {
                cursor = match done.next {
                    Next::Certain { mark, .. } => Cursor::Mark(mark),
                    Next::Open(open) => Cursor::Open(open + 1),
                };
                break;
            }
        }
    }
    Answer::Fine
}

impl Search {
    fn new(operations: &[&Operation]) -> Self {
        let values = Values::shown_by(operations);
        let (mut certain, mut open, mut events) = (Vec::new(), Vec::new(), Vec::new());
        for operation in operations {
            let Some(effect) = Effect::of(operation, &values) else { continue };
            match &operation.end {
                None => open.push((operation.began, effect)),
                Some((end, _)) => {
                    // At one moment, beginnings come before ends.
                    events.push((operation.began, false, certain.len()));
                    events.push((*end, true, certain.len()));
                    certain.push(Certain { effect, rank: None });
                }
            }
        }
        events.sort_unstable();
        let mut versions: Vec<(Version, usize)> = Vec::new();
        for (operation, of) in certain.iter().enumerate() {
            versions.extend(of.effect.version().map(|version| (version, operation)));
        }
        versions.sort_unstable();
        for (rank, &(_, operation)) in versions.iter().enumerate() {
            certain[operation].rank = Some(rank);
        }
        let (mut marks, mut end_of, mut ends) = (Vec::new(), vec![NONE; events.len()], Vec::new());
        let mut begin_of = vec![NONE; certain.len()];
        for &(at, is_end, operation) in &events {
            if is_end {
                end_of[begin_of[operation]] = marks.len();
                marks.push(Mark::End(ends.len()));
                ends.push(at);
            } else {
                begin_of[operation] = marks.len();
                marks.push(Mark::Begin(operation));
            }
        }
        let mut latest: BTreeMap<Effect, usize> = BTreeMap::new();
        let open = open.into_iter().enumerate().map(|(index, (began, effect))| Open {
            same_before: latest.insert(effect.clone(), index),
            effect,
            began: ends.partition_point(|&end| end < began),
            taken: false,
        });
        let last = marks.len().wrapping_sub(1);
        let open: Vec<Open> = open.collect();
        let (mut readers, mut writers) = (vec![0; values.count()], vec![0; values.count()]);
        let mut shown_at = vec![Vec::new(); values.count()];
        for &(version, operation) in &versions {
            let effect = &certain[operation].effect;
            if let Some(value) = effect.shown().or(effect.written()) {
                shown_at[value].push(version);
            }
        }
        shown_at.iter_mut().for_each(Vec::dedup);
        for effect in certain.iter().map(|c| &c.effect).chain(open.iter().map(|o| &o.effect)) {
            effect.shown().into_iter().for_each(|value| readers[value] += 1);
            effect.written().into_iter().for_each(|value| writers[value] += 1);
        }
        Self {
            readers,
            writers,
            shown_at,
            open,
            end_of,
            following: (0..marks.len()).map(|i| if i == last { NONE } else { i + 1 }).collect(),
            previous: (0..marks.len()).map(|i| i.wrapping_sub(1)).collect(),
            head: if marks.is_empty() { NONE } else { 0 },
            marks,
            taken: vec![0; certain.len().div_ceil(64)],
            highest_word: 0,
            certain,
            versions,
            lowest: 0,
            state: State::default(),
            tried: BTreeSet::new(),
        }
    }

    /// Who can be next, and has not been tried here; the state after it; and
    /// whether nothing else need be.
    fn next(&mut self, cursor: Cursor) -> Option<(Next, State, bool)> {
        if let Cursor::Start = cursor
            && let Some((next, after)) = self.next_without_change()
        {
            return Some((next, after, true));
        }
        let open_from = if let Cursor::Open(from) = cursor { from } else { 0 };
        let mut mark = match cursor {
            Cursor::Start => self.head,
            Cursor::Mark(mark) => self.following[mark],
            Cursor::Open(_) => NONE,
        };
        while mark != NONE
            && let Mark::Begin(operation) = self.marks[mark]
        {
            let next = Next::Certain { operation, mark };
            if let Some(after) = self.possible(&self.state, operation)
                && self.is_new(next, &after)
            {
                return Some((next, after, false));
            }
            mark = self.following[mark];
        }
        let found = (open_from..self.open_begun()).find_map(|open| {
            let after = self.worth_taking(open)?;
            self.is_new(Next::Open(open), &after).then_some((open, after))
        });
        found.map(|(open, after)| (Next::Open(open), after, false))
    }

    /// Those that have begun before any of those that are left has ended.
    fn window(&self) -> impl Iterator<Item = (usize, usize)> {
        let following = |&mark: &usize| Some(self.following[mark]).filter(|&next| next != NONE);
        let marks = std::iter::successors(Some(self.head).filter(|&head| head != NONE), following);
        marks.map_while(|mark| match self.marks[mark] {
            Mark::Begin(operation) => Some((mark, operation)),
            Mark::End(_) => None,
        })
    }

    fn next_without_change(&self) -> Option<(Next, State)> {
        let mut reads = self.window().filter(|&(_, op)| self.certain[op].effect.is_read());
        reads.find_map(|(mark, operation)| {
            let after = self.possible(&self.state, operation)?;
            (after == self.state).then_some((Next::Certain { operation, mark }, after))
        })
    }

    /// The register after this operation, if it can be next in `state`.
    fn possible(&self, state: &State, operation: usize) -> Option<State> {
        let effect = &self.certain[operation].effect;
        if let Some(version) = effect.version()
            && self.versions[self.lowest].0 < version
        {
            return None;
        }
        self.state_after(state, effect)
    }

    /// The register after this, unless a value is then missing that has still to be shown.
    fn state_after(&self, state: &State, effect: &Effect) -> Option<State> {
        let after = state.after(effect)?;
        if effect.is_read() {
            return Some(after);
        }
        let lacks = |value: Value| {
            let writes = self.writers[value] - usize::from(effect.written() == Some(value));
            let may_show = usize::from(after.value == Some(value) && after.version.is_none());
            let versions = &self.shown_at[value];
            let past = versions.partition_point(|version| *version <= after.floor);
            versions.len() - past > writes + may_show
        };
        let needed = |value: Value| self.readers[value] > 0 && self.writers[value] == 0;
        let lost = state.value.is_some_and(|value| needed(value) || lacks(value));
        (!lost && !effect.written().is_some_and(lacks)).then_some(after)
    }

    /// The register after this open operation, if that makes possible what was not.
    fn worth_taking(&self, open: usize) -> Option<State> {
        let Open { effect, same_before, taken, .. } = &self.open[open];
        if *taken || same_before.is_some_and(|before| !self.open[before].taken) {
            return None;
        }
        let after = self.state_after(&self.state, effect)?;
        let helps =
            |effect: &Effect| self.state.after(effect).is_none() && after.after(effect).is_some();
        let certain = || {
            self.window().any(|(_, operation)| {
                let effect = &self.certain[operation].effect;
                helps(effect) && self.possible(&after, operation).is_some()
            })
        };
        // Of open operations only a compare-and-set can be impossible.
        let conditional = |other: &Open| matches!(other.effect, Effect::Replaces(..));
        let others = || {
            let mut others = self.open.iter().filter(|other| conditional(other) && !other.taken);
            others.any(|other| helps(&other.effect))
        };
        (certain() || others()).then_some(after)
    }

    /// How many of the open operations began before any of those that are left has
    /// ended.
    fn open_begun(&self) -> usize {
        let first_end = self.window().map(|(mark, _)| self.end_of[mark]).min();
        let ends_before = first_end.map_or(0, |end| match self.marks[end] {
            Mark::End(before) => before,
            Mark::Begin(_) => 0,
        });
        self.open.partition_point(|open| open.began <= ends_before)
    }

    /// Remembers the configuration that `next` leads to; false if it was tried.
    fn is_new(&mut self, next: Next, after: &State) -> bool {
        let mut open: Vec<usize> =
            self.open.iter().enumerate().filter(|(_, o)| o.taken).map(|(i, _)| i).collect();
        let (mut extra_word, mut extra_bit) = (0, 0);
        match next {
            Next::Certain { operation, .. } => (extra_word, extra_bit) = bit(operation),
            Next::Open(index) => open.push(index),
        }
        open.sort_unstable();
        // Everything that began before the first that is left has taken effect.
        let first = match self.marks[self.head] {
            Mark::Begin(operation) => operation / 64,
            Mark::End(_) => 0,
        };
        let last = self.highest_word.max(extra_word).max(first);
        let mut words = self.taken[first..=last].to_vec();
        words[extra_word.max(first) - first] |= extra_bit;
        while words.last() == Some(&0) {
            words.pop();
        }
        self.tried.insert((first, words, open, after.clone()))
    }

    fn take(&mut self, next: Next) {
        let (operation, mark) = match next {
            Next::Open(open) => {
                self.open[open].taken = true;
                count(&mut self.writers, self.open[open].effect.written(), -1);
                return;
            }
            Next::Certain { operation, mark } => (operation, mark),
        };
        let (word, bit) = bit(operation);
        self.taken[word] |= bit;
        count(&mut self.writers, self.certain[operation].effect.written(), -1);
        count(&mut self.readers, self.certain[operation].effect.shown(), -1);
        self.highest_word = self.highest_word.max(word);
        for mark in [mark, self.end_of[mark]] {
            let (before, after) = (self.previous[mark], self.following[mark]);
            if before == NONE {
                self.head = after
            } else {
                self.following[before] = after
            }
            if after != NONE {
                self.previous[after] = before;
            }
        }
        while self.versions.get(self.lowest).is_some_and(|&(_, of)| self.is_taken(of)) {
            self.lowest += 1;
        }
    }

    /// Undoes what was done last.
    fn put_back(&mut self, next: Next) {
        let (operation, mark) = match next {
            Next::Open(open) => {
                self.open[open].taken = false;
                count(&mut self.writers, self.open[open].effect.written(), 1);
                return;
            }
            Next::Certain { operation, mark } => (operation, mark),
        };
        let (word, bit) = bit(operation);
        self.taken[word] &= !bit;
        count(&mut self.writers, self.certain[operation].effect.written(), 1);
        count(&mut self.readers, self.certain[operation].effect.shown(), 1);
        for mark in [self.end_of[mark], mark] {
            let (before, after) = (self.previous[mark], self.following[mark]);
            if before == NONE {
                self.head = mark
            } else {
                self.following[before] = mark
            }
            if after != NONE {
                self.previous[after] = mark;
            }
        }
        if let Some(rank) = self.certain[operation].rank {
            self.lowest = self.lowest.min(rank);
        }
    }

    fn is_taken(&self, operation: usize) -> bool {
        let (word, bit) = bit(operation);
        self.taken[word] & bit != 0
    }
}

/// One more, or one less, of this value.
fn count(counts: &mut [usize], value: Option<Value>, by: isize) {
    if let Some(value) = value {
        counts[value] = counts[value].wrapping_add_signed(by);
    }
}

/// The bit of an operation: its word, and the bit in that.
fn bit(operation: usize) -> (usize, u64) {
    (operation / 64, 1 << (operation % 64))
}

/// The same question, answered by trying every order, none of the rules used: only
/// for a handful of operations.
#[cfg(test)]
pub(super) fn try_all_orders(operations: &[Operation]) -> bool {
    let references: Vec<&Operation> = operations.iter().collect();
    let values = Values::shown_by(&references);
    let effects = operations.iter().filter_map(|o| Some((o, Effect::of(o, &values)?)));
    go_on(&State::default(), &effects.collect::<Vec<_>>())
}

#[cfg(test)]
fn go_on(state: &State, left: &[(&Operation, Effect)]) -> bool {
    if left.iter().all(|(operation, _)| operation.end.is_none()) {
        return true;
    }
    let first_end = left.iter().map(|(operation, _)| operation.end_time()).min();
    (0..left.len()).any(|index| {
        let (operation, effect) = &left[index];
        let mut others = left.to_vec();
        others.remove(index);
        Some(operation.began) <= first_end
            && state.after(effect).is_some_and(|after| go_on(&after, &others))
    })
}
