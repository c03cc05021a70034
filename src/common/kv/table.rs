//! The values that one server holds.
//!
//! A key has at most one committed value and, while writes of it are under way,
//! the prepared ones in the order of their versions. A newer version always
//! wins, so that it does not matter in which order a value arrives by a
//! prepare and by a page of a fetch.
//!
//! Keys are kept by their point on the ring, so that an arc can be read or
//! dropped without looking at anything else.

use super::content::Content;
use super::ring::{Arc, Point, RING_POINTS};
use super::{Entry, Text, Version};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Bound;

/// What was written, and its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned {
    /// Which write it was.
    pub version: Version,
    /// What was written.
    pub content: Content,
}

impl Versioned {
    /// The value, if the key was not deleted.
    pub fn value(&self) -> Option<&Text> {
        self.content.value.as_ref()
    }
}

#[derive(Debug, Default)]
struct Slot {
    /// From the disk, and not known to be right any more. Nobody sees it; it is
    /// compared with what the primary has.
    old: Option<Versioned>,
    committed: Option<Versioned>,
    /// Sorted by version, all above the committed one. Nearly always empty or
    /// of one element.
    prepared: Vec<Versioned>,
}

impl Slot {
    fn settle_old(&mut self, is_right: bool) {
        let Some(old) = self.old.take() else { return };
        let newest =
            self.committed.as_ref().is_none_or(|committed| committed.version < old.version);
        if is_right && newest {
            self.prepared.retain(|prepared| prepared.version > old.version);
            self.committed = Some(old);
        }
    }

    /// What was written last, whether or not it is known to be committed.
    fn newest(&self) -> Option<&Versioned> {
        self.prepared.last().or(self.committed.as_ref())
    }

    fn is_empty(&self) -> bool {
        self.old.is_none() && self.committed.is_none() && self.prepared.is_empty()
    }
}

/// What a replica that is not ready lacks of a stretch of its arc.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// Entries that it has not, or has in another version.
    pub entries: Vec<Entry>,
    /// Keys that it has and that there are not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<Text>,
    /// Where to go on; nothing when the stretch is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Cursor>,
}

/// A place in an arc: everything up to this key, going up the ring, is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Where the key stands.
    pub point: Point,
    /// The key.
    pub key: Text,
}

/// All values of one server, by place and key.
#[derive(Debug)]
pub struct Table {
    places: Vec<BTreeMap<Text, Slot>>,
}

impl Default for Table {
    fn default() -> Self {
        Self { places: (0..RING_POINTS).map(|_| BTreeMap::new()).collect() }
    }
}

impl Table {
    fn place(&self, point: Point) -> &BTreeMap<Text, Slot> {
        &self.places[usize::from(point.number())]
    }

    fn place_mut(&mut self, point: Point) -> &mut BTreeMap<Text, Slot> {
        &mut self.places[usize::from(point.number())]
    }

    /// What is committed of `key`, which stands at `point`; a deletion, too.
    pub fn get(&self, point: Point, key: &str) -> Option<&Versioned> {
        self.place(point).get(key)?.committed.as_ref()
    }

    /// What was written last to `key`, and whether that is committed.
    pub fn newest(&self, point: Point, key: &str) -> (Option<&Versioned>, bool) {
        let slot = self.place(point).get(key);
        (slot.and_then(Slot::newest), slot.is_none_or(|slot| slot.prepared.is_empty()))
    }

    /// The deleted keys of `arc` that need not be remembered for ever, with the
    /// versions of their deletions, as far as these are committed.
    pub fn deleted(&self, arc: Arc) -> impl Iterator<Item = (Version, Point, &Text)> {
        self.slots(arc, None, None).filter_map(|(point, key, slot)| {
            let committed = slot.committed.as_ref()?;
            committed.content.is_forgettable().then_some((committed.version, point, key))
        })
    }

    /// Forgets that `key` was deleted by the write `version`, unless something was
    /// written since. Returns whether it is forgotten.
    pub fn forget_deleted(&mut self, point: Point, key: &str, version: Version) -> bool {
        let slots = self.place_mut(point);
        let is_over = slots.get(key).is_some_and(|slot| {
            let held = slot.committed.as_ref().filter(|held| held.version == version);
            slot.prepared.is_empty() && held.is_some_and(|held| held.content.is_forgettable())
        });
        if is_over {
            slots.remove(key);
        }
        is_over
    }

    /// Takes a prepared entry. Returns whether it was news: neither known nor
    /// older than what is committed.
    pub fn prepare(&mut self, point: Point, entry: &Entry) -> bool {
        let slot = self.place_mut(point).entry(Text::clone(&entry.key)).or_default();
        if slot.committed.as_ref().is_some_and(|committed| committed.version >= entry.version) {
            return false;
        }
        match slot.prepared.binary_search_by_key(&entry.version, |prepared| prepared.version) {
            Ok(_) => false,
            Err(place) => {
                let content = entry.content.clone();
                slot.prepared.insert(place, Versioned { version: entry.version, content });
                true
            }
        }
    }

    /// Makes the prepared `version` of `key` the committed value. Older prepared
    /// ones are thereby superseded.
    pub fn commit(&mut self, point: Point, key: &str, version: Version) {
        let Some(slot) = self.place_mut(point).get_mut(key) else { return };
        let above = slot.prepared.partition_point(|prepared| prepared.version <= version);
        let newest = slot.prepared.drain(..above).next_back();
        // Only `version` itself: an older one would have been committed before.
        if let Some(value) = newest.filter(|newest| newest.version == version) {
            slot.committed = Some(value);
        }
    }

    /// Takes an entry that is known to be committed.
    pub fn insert(&mut self, point: Point, entry: Entry) {
        let slot = self.place_mut(point).entry(entry.key).or_default();
        if slot.committed.as_ref().is_none_or(|committed| committed.version < entry.version) {
            slot.prepared.retain(|prepared| prepared.version > entry.version);
            slot.committed = Some(Versioned { version: entry.version, content: entry.content });
        }
    }

    /// Takes the committed entry that a primary has for a key in a stretch that is
    /// being compared; what was there from before is out of date. Returns whether
    /// it was news, rather than something that has been fetched already.
    pub fn replace(&mut self, point: Point, entry: Entry) -> bool {
        let slot = self.place_mut(point).entry(Text::clone(&entry.key)).or_default();
        slot.old = None;
        let is_news =
            slot.committed.as_ref().is_none_or(|committed| committed.version != entry.version);
        self.insert(point, entry);
        is_news
    }

    /// From now on nothing at `point` is known to be right.
    pub fn age(&mut self, point: Point) {
        for slot in self.place_mut(point).values_mut() {
            let newest = slot.prepared.drain(..).next_back().or(slot.committed.take());
            slot.old = newest.or(slot.old.take());
        }
    }

    /// Whether `version` is the newest that is held of `key`: the one that the disk
    /// is to keep.
    pub fn is_newest(&self, point: Point, key: &str, version: Version) -> bool {
        let Some(slot) = self.place(point).get(key) else { return true };
        slot.newest().is_none_or(|newest| newest.version <= version)
    }

    /// The prepared entry of `key` with this version, if no newer one has
    /// superseded it.
    pub fn prepared(&self, point: Point, key: &Text, version: Version) -> Option<Entry> {
        let slot = self.place(point).get(key)?;
        let found = slot.prepared.iter().find(|prepared| prepared.version == version)?;
        Some(Entry { key: Text::clone(key), version, content: found.content.clone() })
    }

    /// Takes an entry from the disk that may be out of date.
    pub fn load_old(&mut self, point: Point, entry: Entry) {
        let slot = self.place_mut(point).entry(entry.key).or_default();
        slot.old = Some(Versioned { version: entry.version, content: entry.content });
    }

    /// Everything old at `point` is right after all.
    pub fn trust_old(&mut self, point: Point) {
        for slot in self.place_mut(point).values_mut() {
            slot.settle_old(true);
        }
    }

    /// What is held of `arc` from the disk behind `after`, up to `limit` keys, and
    /// up to where that goes; `None` is the end of the arc.
    pub fn old(
        &self,
        arc: Arc,
        after: Option<&Cursor>,
        limit: usize,
    ) -> (Vec<(Text, Version)>, Option<Cursor>) {
        let mut held = Vec::new();
        for (point, key, slot) in self.slots(arc, after, None) {
            let Some(old) = &slot.old else { continue };
            held.push((Text::clone(key), old.version));
            if held.len() >= limit {
                return (held, Some(Cursor { point, key: Text::clone(key) }));
            }
        }
        (held, None)
    }

    /// The old value of `key` has been compared: it is right, or it is not and
    /// goes. Returns whether the key is not held any more.
    pub fn settle_old(&mut self, point: Point, key: &str, is_right: bool) -> bool {
        let slots = self.place_mut(point);
        let Some(slot) = slots.get_mut(key) else { return false };
        slot.settle_old(is_right);
        let is_empty = slot.is_empty();
        if is_empty {
            slots.remove(key);
        }
        is_empty
    }

    /// The slots of `arc` behind `after` and up to `until`, in the order of the
    /// ring.
    fn slots<'a>(
        &'a self,
        arc: Arc,
        after: Option<&'a Cursor>,
        until: Option<&'a Cursor>,
    ) -> impl Iterator<Item = (Point, &'a Text, &'a Slot)> {
        let first = after.map_or(0, |cursor| cursor.point.distance_from(arc.start));
        let last = until.map_or(u16::MAX, |cursor| cursor.point.distance_from(arc.start));
        let points = arc.points().skip(usize::from(first));
        let points = points.take(usize::from(last.saturating_sub(first)).saturating_add(1));
        // Most places of a small table are empty: they are passed over quickly.
        let points = points.filter(move |point| !self.place(*point).is_empty());
        points.flat_map(move |point| {
            let behind = match after.filter(|cursor| cursor.point == point) {
                None => Bound::Unbounded,
                Some(cursor) => Bound::Excluded(&*cursor.key),
            };
            let up_to = match until.filter(|cursor| cursor.point == point) {
                None => Bound::Unbounded,
                Some(cursor) => Bound::Included(&*cursor.key),
            };
            // A range that would end before it begins is empty, and not allowed.
            let is_empty =
                matches!((behind, up_to), (Bound::Excluded(a), Bound::Included(b)) if a >= b);
            let slots = (!is_empty).then(|| self.place(point).range::<str, _>((behind, up_to)));
            let slots = slots.map(|slots| slots.map(move |(key, slot)| (point, key, slot)));
            slots.into_iter().flatten()
        })
    }

    /// The committed entries of `arc` behind `after` and up to `until` which are
    /// not in `held` with the same version: up to `max_bytes` and one more. With
    /// them, the keys in `held` that there are none of, and where the next page
    /// starts; `None` when this one reaches `until`.
    pub fn page(
        &self,
        arc: Arc,
        after: Option<&Cursor>,
        until: Option<&Cursor>,
        held: Vec<(Text, Version)>,
        max_bytes: usize,
    ) -> Page {
        let mut held: BTreeMap<(u16, Text), Version> = held
            .into_iter()
            .map(|(key, version)| ((Point::of(&key).distance_from(arc.start), key), version))
            .collect();
        let mut page = Page::default();
        let mut bytes = 0;
        for (point, key, slot) in self.slots(arc, after, until) {
            let Some(Versioned { version, content }) = &slot.committed else { continue };
            // Whoever holds something of a deleted key is told that it is gone.
            if content.is_forgettable() {
                continue;
            }
            let place = (point.distance_from(arc.start), Text::clone(key));
            if held.remove(&place) == Some(*version) {
                continue;
            }
            let entry = Entry { key: place.1, version: *version, content: content.clone() };
            bytes += entry.bytes();
            page.entries.push(entry);
            if bytes >= max_bytes {
                let next = Cursor { point, key: Text::clone(key) };
                let reached = (point.distance_from(arc.start), Text::clone(key));
                held.retain(|place, _| *place <= reached);
                page.next = Some(next);
                break;
            }
        }
        page.gone = held.into_keys().map(|(_, key)| key).collect();
        page
    }

    /// How many keys of `arc` lie behind `after`, about.
    pub fn count(&self, arc: Arc, after: Option<&Cursor>) -> u64 {
        let first = after.map_or(0, |cursor| cursor.point.distance_from(arc.start));
        arc.points().skip(usize::from(first)).map(|point| self.place(point).len() as u64).sum()
    }

    /// Forgets everything at `point`, and says which keys there were.
    pub fn clear(&mut self, point: Point) -> impl Iterator<Item = Text> {
        std::mem::take(self.place_mut(point)).into_keys()
    }

    /// Every key whose last write, committed or not, left a value, with its place,
    /// in the order of the ring, from `after` (excluded) on. A write that was answered is
    /// prepared on every replica, while the news that it is committed may still
    /// be on its way.
    pub fn keys_after<'a>(
        &'a self,
        after: Option<(Point, &'a str)>,
    ) -> impl Iterator<Item = (Point, &'a Text)> {
        let first = after.map_or(0, |(point, _)| usize::from(point.number()));
        let places = self.places.iter().enumerate().skip(first);
        let places = places.filter(|(_, slots)| !slots.is_empty());
        places.flat_map(move |(place, slots)| {
            let point = Point::at(place as u16);
            let behind = match after {
                Some((same, key)) if same == point => Bound::Excluded(key),
                _ => Bound::Unbounded,
            };
            let held = slots.range::<str, _>((behind, Bound::Unbounded));
            let held = held.filter(|(_, slot)| slot.newest().and_then(Versioned::value).is_some());
            held.map(move |(key, _)| (point, key))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::MAX_BATCH_BYTES;
    use crate::kv::content::Fences;
    use crate::view::Revision;

    fn entry(key: &str, number: u64, value: &str) -> Entry {
        Entry {
            key: key.into(),
            version: Version { group: Revision(1), number },
            content: Content::of(value.into()),
        }
    }

    fn value(table: &Table, key: &str) -> Option<String> {
        table.get(Point::of(key), key)?.value().map(Text::to_string)
    }

    #[test]
    fn a_prepared_value_is_not_seen_before_it_is_committed() {
        let mut table = Table::default();
        let at = Point::of("k");
        assert!(table.prepare(at, &entry("k", 1, "a")));
        assert_eq!(value(&table, "k"), None);
        table.commit(at, "k", entry("k", 1, "a").version);
        assert!(table.prepare(at, &entry("k", 2, "b")));
        assert_eq!(value(&table, "k").as_deref(), Some("a"));
        table.commit(at, "k", entry("k", 2, "b").version);
        assert_eq!(value(&table, "k").as_deref(), Some("b"));
    }

    #[test]
    fn the_newer_version_wins_in_whatever_order_they_come() {
        let at = Point::of("k");
        let mut table = Table::default();
        assert!(table.prepare(at, &entry("k", 5, "new")));
        table.insert(at, entry("k", 3, "from a page"));
        assert_eq!(value(&table, "k").as_deref(), Some("from a page"));
        table.commit(at, "k", entry("k", 5, "new").version);
        table.insert(at, entry("k", 4, "late page"));
        assert!(!table.prepare(at, &entry("k", 2, "late prepare")));
        assert_eq!(value(&table, "k").as_deref(), Some("new"));
    }

    #[test]
    fn committing_the_newer_first_supersedes_the_older() {
        let at = Point::of("k");
        let mut table = Table::default();
        table.prepare(at, &entry("k", 1, "a"));
        table.prepare(at, &entry("k", 2, "b"));
        table.commit(at, "k", entry("k", 2, "b").version);
        table.commit(at, "k", entry("k", 1, "a").version);
        assert_eq!(value(&table, "k").as_deref(), Some("b"));
    }

    #[test]
    fn a_deleted_key_is_neither_listed_nor_sent_and_wins_over_older_writes() {
        let (mut table, at) = (Table::default(), Point::of("k"));
        let ring = Arc { start: Point::at(0), end: Point::at(0) };
        let deletion = Entry {
            content: Content { value: None, fences: Fences::default() },
            ..entry("k", 2, "")
        };
        table.insert(at, entry("k", 1, "a"));
        assert!(table.prepare(at, &deletion));
        assert_eq!(value(&table, "k").as_deref(), Some("a"), "not before it is committed");
        assert_eq!(table.keys_after(None).count(), 0);
        table.commit(at, "k", deletion.version);
        assert!(!table.prepare(at, &entry("k", 1, "late")));
        assert_eq!(value(&table, "k"), None);
        assert_eq!(table.page(ring, None, None, Vec::new(), MAX_BATCH_BYTES), Page::default());
        let held = vec![("k".into(), entry("k", 1, "").version)];
        assert_eq!(table.page(ring, None, None, held, MAX_BATCH_BYTES).gone, ["k".into()]);
        assert_eq!(table.deleted(ring).count(), 1);
    }

    #[test]
    fn a_deletion_is_forgotten_unless_something_was_written_since() {
        let (mut table, at) = (Table::default(), Point::of("k"));
        let deletion = |number| Entry {
            content: Content { value: None, fences: Fences::default() },
            ..entry("k", number, "")
        };
        table.insert(at, deletion(2));
        assert!(table.prepare(at, &entry("k", 3, "b")));
        assert!(!table.forget_deleted(at, "k", deletion(2).version));
        table.commit(at, "k", entry("k", 3, "b").version);
        assert!(!table.forget_deleted(at, "k", deletion(2).version));
        table.insert(at, deletion(4));
        assert!(!table.forget_deleted(at, "k", deletion(2).version));
        assert!(table.forget_deleted(at, "k", deletion(4).version));
        assert!(table.get(at, "k").is_none());
    }

    #[test]
    fn pages_bring_every_key_of_the_arc_once_and_no_other() {
        let mut table = Table::default();
        let arc = Arc { start: Point::at(9000), end: Point::at(1000) };
        let long = "v".repeat(MAX_BATCH_BYTES / 3);
        let mut wanted = Vec::new();
        for number in 0..60 {
            let key = format!("key-{number}");
            table.insert(Point::of(&key), entry(&key, 1, &long));
            if arc.contains(Point::of(&key)) {
                wanted.push(key);
            }
        }
        let (mut seen, mut after, mut pages) = (Vec::new(), None, 0);
        loop {
            let Page { entries, next, .. } =
                table.page(arc, after.as_ref(), None, Vec::new(), MAX_BATCH_BYTES);
            seen.extend(entries.iter().map(|entry| entry.key.to_string()));
            pages += 1;
            match next {
                Some(_) => after = next,
                None => break,
            }
        }
        assert!(pages > 2, "{pages} pages for {} keys", wanted.len());
        seen.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(seen, wanted);
    }
}
