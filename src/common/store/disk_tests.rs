//! Tests of the store on a disk. A crash is an *image*: a copy of the directory
//! while the store is open.

use super::*;
use crate::store::MAX_KEY_BYTES;
use crate::store::tests::pairs;
use std::sync::atomic::{AtomicU64, Ordering};

/// A directory for stores and images of them.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn open(&self, name: &str) -> Result<DiskStore, StoreError> {
        DiskStore::open(&self.path(name), Durability::Always)
    }

    /// Copies what is in the store `from` right now to `to`.
    fn image(&self, from: &str, to: &str) {
        fn copy(from: &Path, to: &Path) {
            fs::create_dir_all(to).unwrap();
            for file in fs::read_dir(from).unwrap().map(Result::unwrap) {
                let target = to.join(file.file_name());
                if file.file_type().unwrap().is_dir() {
                    copy(&file.path(), &target);
                } else {
                    fs::copy(file.path(), target).unwrap();
                }
            }
        }
        let _ = fs::remove_dir_all(self.path(to));
        copy(&self.path(from), &self.path(to));
    }

    /// Changes the first journal of a store: what was ever written of it.
    fn change_journal(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.path(name).join("0.jnl");
        let mut bytes = fs::read(&path).unwrap();
        bytes.truncate(written(&bytes));
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }

    /// How many bytes of the journal of a store were written.
    fn journal_end(&self, name: &str) -> usize {
        written(&fs::read(self.path(name).join("0.jnl")).unwrap())
    }
}

fn written(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

fn put(key: &str, value: &str) -> Change {
    Change::put(Space::Entries, key, value)
}

fn keys(store: &DiskStore) -> String {
    let pairs = pairs(store, Space::Entries, "", usize::MAX);
    pairs.into_iter().map(|(key, _)| key).collect()
}

/// A store with the keys a to e, committed one by one, and where each batch ends
/// in the journal.
fn five_batches(place: &Place) -> (DiskStore, Vec<usize>) {
    let mut store = place.open("store").unwrap();
    let ends = ["a", "b", "c", "d", "e"].map(|key| {
        store.commit(&[put(key, &key.repeat(1000))]).unwrap();
        place.journal_end("store")
    });
    (store, ends.into())
}

#[test]
fn what_is_committed_is_there_after_a_crash() {
    let place = Place::new();
    let mut store = place.open("store").unwrap();
    store.commit(&[put("a", "1"), put("b", "1"), put("a", "2")]).unwrap();
    store.commit(&[Change::remove(Space::Entries, "b"), put("c", "3")]).unwrap();
    store.commit(&[Change::put(Space::Meta, "m", "4")]).unwrap();
    place.image("store", "image");
    let image = place.open("image").unwrap();
    assert_eq!(keys(&image), "ac");
    assert_eq!(image.get(Space::Entries, b"a"), Ok(Some(b"2".to_vec())));
    assert_eq!(image.get(Space::Meta, b"m"), Ok(Some(b"4".to_vec())));
}

#[test]
fn without_any_sync_nothing_is_lost_when_only_the_process_dies() {
    for durability in [Durability::Interval, Durability::None] {
        let place = Place::new();
        let mut store = DiskStore::open(&place.path("store"), durability).unwrap();
        store.commit(&[put("a", "1")]).unwrap();
        place.image("store", "image");
        assert_eq!(keys(&place.open("image").unwrap()), "a");
    }
}

#[test]
fn a_closed_store_opens_again_and_again() {
    let place = Place::new();
    for (round, key) in ["a", "b", "c"].into_iter().enumerate() {
        let mut store = place.open("store").unwrap();
        assert_eq!(keys(&store), "abc"[..round]);
        store.commit(&[put(key, "")]).unwrap();
    }
}

#[test]
fn what_is_written_out_to_tables_and_merged_reads_the_same() {
    let place = Place::new();
    let mut store = DiskStore::open(&place.path("store"), Durability::None).unwrap();
    let value = "v".repeat(64 * 1024);
    for round in 0..6 {
        for key in 0..100 {
            store
                .commit(&[
                    put(&format!("{key:02}"), "hidden within its batch"),
                    put(&format!("{key:02}"), &format!("{round} {value}")),
                    Change::put(Space::Log, format!("{round} {key}"), ""),
                ])
                .unwrap();
        }
        store.commit(&[Change::remove(Space::Entries, format!("{round:02}"))]).unwrap();
    }
    assert!(store.space(Space::Entries).table_count() > 0, "it never left the memory");
    let expected: Vec<_> =
        (0..100).filter(|key| *key != 5).map(|key| format!("{key:02}")).collect();
    let check = |store: DiskStore| {
        let found = pairs(&store, Space::Entries, "", usize::MAX);
        assert!(found.iter().all(|(_, found)| *found == format!("5 {value}")));
        assert_eq!(found.into_iter().map(|(key, _)| key).collect::<Vec<_>>(), expected);
        assert_eq!(pairs(&store, Space::Log, "", usize::MAX).len(), 600);
    };
    check(store);
    check(place.open("store").unwrap());
}

#[test]
fn a_torn_tail_is_cut_and_everything_before_it_stays() {
    let place = Place::new();
    let (_store, ends) = five_batches(&place);
    let [.., before, end] = ends[..] else { unreachable!() };
    for length in [before + 1, before + 20, before + 500, end - 1] {
        for zeros in [0, 5000] {
            place.image("store", "image");
            place.change_journal("image", |bytes| {
                bytes.truncate(length);
                bytes.resize(length + zeros, 0);
            });
            let mut image = place.open("image").unwrap();
            assert_eq!(keys(&image), "abcd", "cut at {length} of {end}");
            // It goes on from there.
            image.commit(&[put("f", "")]).unwrap();
            drop(image);
            assert_eq!(keys(&place.open("image").unwrap()), "abcdf");
        }
    }
}

#[test]
fn a_last_batch_with_a_hole_in_it_is_cut() {
    let place = Place::new();
    let (_store, ends) = five_batches(&place);
    place.image("store", "image");
    place.change_journal("image", |bytes| bytes[ends[3] + 200..ends[3] + 700].fill(0));
    assert_eq!(keys(&place.open("image").unwrap()), "abcd");
}

#[test]
fn garbage_behind_the_last_batch_is_cut() {
    let place = Place::new();
    let (_store, _) = five_batches(&place);
    place.image("store", "image");
    place.change_journal("image", |bytes| bytes.extend([7; 300]));
    assert_eq!(keys(&place.open("image").unwrap()), "abcde");
}

#[test]
fn a_damaged_middle_is_refused_and_left_as_it_was() {
    let place = Place::new();
    let (_store, ends) = five_batches(&place);
    // In the head, in a length, in the value, and in the tail of the second batch.
    for at in [ends[0], ends[0] + 3, ends[0] + 25, ends[0] + 400, ends[1] - 2] {
        place.image("store", "image");
        place.change_journal("image", |bytes| bytes[at] ^= 4);
        let before = fs::read(place.path("image").join("0.jnl")).unwrap();
        for _ in 0..2 {
            match place.open("image").map(|store| keys(&store)) {
                Err(StoreError::Damaged { path, .. }) => {
                    assert!(path.starts_with(place.path("image")), "{}", path.display());
                }
                other => panic!("byte {at}: {other:?}"),
            }
        }
        let mut after = fs::read(place.path("image").join("0.jnl")).unwrap();
        after.resize(before.len(), 0);
        assert!(before == after, "byte {at}: the journal was changed");
    }
}

#[test]
fn with_less_than_always_what_stands_behind_a_hole_was_never_synced_and_is_cut() {
    let place = Place::new();
    let (_store, ends) = five_batches(&place);
    place.image("store", "image");
    place.change_journal("image", |bytes| bytes[ends[1] - 20..ends[2] + 20].fill(0));
    assert!(matches!(place.open("image"), Err(StoreError::Damaged { .. })));
    let image = DiskStore::open(&place.path("image"), Durability::Interval).unwrap();
    assert_eq!(keys(&image), "a");
    drop(image);
    // Within a value, too.
    place.image("store", "image");
    place.change_journal("image", |bytes| bytes[ends[1] + 100..ends[2] - 100].fill(0));
    assert!(matches!(place.open("image"), Err(StoreError::Damaged { .. })));
    let image = DiskStore::open(&place.path("image"), Durability::None).unwrap();
    assert_eq!(keys(&image), "ab");
}

#[test]
fn a_damaged_table_is_named_when_it_is_read() {
    let place = Place::new();
    let mut store = place.open("store").unwrap();
    store.commit(&[put("a", &"x".repeat(9000)), put("b", &"y".repeat(9000))]).unwrap();
    store.space(Space::Entries).rotate_memtable_and_wait().unwrap();
    drop(store);
    let tables = place.path("store").join("keyspaces/1/tables");
    let table = fs::read_dir(tables).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&table).unwrap();
    let at = bytes.windows(20).position(|bytes| bytes == [b'y'; 20]).unwrap();
    bytes[at + 100] ^= 1;
    fs::write(table, bytes).unwrap();
    // The journal still has the batch; without it only the table does.
    place.change_journal("store", Vec::clear);
    let store = place.open("store").unwrap();
    assert_eq!(store.get(Space::Entries, b"a").unwrap().unwrap().len(), 9000);
    assert!(matches!(store.get(Space::Entries, b"b"), Err(StoreError::Damaged { .. })));
    let mut seen = Vec::new();
    let outcome = store.scan(Space::Entries, b"", &mut |key, _| {
        seen.push(key.to_vec());
        true
    });
    assert!(matches!(outcome, Err(StoreError::Damaged { .. })), "{outcome:?}");
    assert!(seen.is_empty() || seen == [b"a"]);
}

#[test]
fn a_space_whose_list_of_tables_is_gone_is_not_taken_for_an_empty_one() {
    let place = Place::new();
    let (_store, _) = five_batches(&place);
    for space in 0..4 {
        place.image("store", "image");
        let list = place.path("image").join(format!("keyspaces/{space}/current"));
        fs::remove_file(&list).unwrap();
        match place.open("image").map(|store| keys(&store)) {
            Err(StoreError::Damaged { path, .. }) => assert_eq!(path, list),
            other => panic!("space {space}: {other:?}"),
        }
    }
}

#[test]
fn every_flipped_bit_in_a_list_of_tables_is_refused() {
    let place = Place::new();
    let (store, _) = five_batches(&place);
    store.space(Space::Entries).rotate_memtable_and_wait().unwrap();
    drop(store);
    for space in 0..4 {
        let dir = place.path("store").join(format!("keyspaces/{space}"));
        let number = fs::read(dir.join("current")).unwrap()[0];
        for list in [dir.join("current"), dir.join(format!("v{number}"))] {
            let bytes = fs::read(&list).unwrap();
            // The last byte of `current` says which kind of checksum it is.
            for at in 0..bytes.len() - usize::from(list.ends_with("current")) {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << (at % 8);
                fs::write(&list, flipped).unwrap();
                let outcome = journal::vet_list(&dir);
                assert!(
                    matches!(outcome, Err(StoreError::Damaged { .. })),
                    "byte {at} of {}",
                    list.display()
                );
            }
            fs::write(&list, bytes).unwrap();
        }
        journal::vet_list(&dir).unwrap();
    }
    place.open("store").unwrap();
}

#[test]
fn a_store_is_open_once() {
    let place = Place::new();
    let store = place.open("store").unwrap();
    assert_eq!(place.open("store").err(), Some(StoreError::InUse { path: place.path("store") }));
    drop(store);
    place.open("store").unwrap();
}

#[test]
fn half_a_new_store_is_made_again_and_no_store_is_no_store() {
    let place = Place::new();
    place.open("store.new").unwrap();
    fs::remove_file(place.path("store.new").join("version")).unwrap();
    place.open("store").unwrap();
    assert!(!place.path("store.new").exists());
    fs::create_dir(place.path("other")).unwrap();
    fs::write(place.path("other").join("precious"), "").unwrap();
    assert!(matches!(place.open("other"), Err(StoreError::Damaged { .. })));
    fs::write(place.path("file"), "").unwrap();
    assert!(matches!(place.open("file"), Err(StoreError::Failed { .. })));
}

#[test]
fn a_full_disk_refuses_before_anything_is_written_and_takes_again_once_there_is_room() {
    let place = Place::new();
    let free = Arc::new(AtomicU64::new(u64::MAX));
    let asked = Arc::clone(&free);
    let probe = move || Ok(asked.load(Ordering::Relaxed));
    let mut store =
        DiskStore::open_with(&place.path("store"), Durability::Always, Arc::new(probe)).unwrap();
    store.commit(&[put("a", "1")]).unwrap();
    let written = place.journal_end("store");

    free.store(RESERVE_BYTES, Ordering::Relaxed);
    let Err(StoreError::Full { free: RESERVE_BYTES, needed }) = store.commit(&[put("a", "2")])
    else {
        panic!("there was no room");
    };
    assert!(needed > RESERVE_BYTES);
    assert_eq!(place.journal_end("store"), written);
    assert_eq!(store.get(Space::Entries, b"a"), Ok(Some(b"1".to_vec())));

    // What makes it emptier is taken a while longer.
    store.commit(&[Change::remove(Space::Entries, "a")]).unwrap();
    free.store(RESERVE_BYTES / 2, Ordering::Relaxed);
    let removal = [Change::remove(Space::Entries, "a")];
    assert!(matches!(store.commit(&removal), Err(StoreError::Full { .. })));

    free.store(needed, Ordering::Relaxed);
    store.commit(&[put("a", "3")]).unwrap();
    assert_eq!(store.get(Space::Entries, b"a"), Ok(Some(b"3".to_vec())));
}

#[test]
fn space_is_given_back_after_many_removals() {
    let place = Place::new();
    let mut store = DiskStore::open(&place.path("store"), Durability::None).unwrap();
    let all: Vec<u32> = (0..30_000).collect();
    for keys in all.chunks(5000) {
        let puts: Vec<_> = keys
            .iter()
            .map(|key| Change::put(Space::Entries, key.to_be_bytes(), vec![0; 300]))
            .collect();
        store.commit(&puts).unwrap();
    }
    store.space(Space::Entries).rotate_memtable_and_wait().unwrap();
    let before = store.space(Space::Entries).disk_space();
    // In one batch: the upkeep may look at any time, and would find too little of it.
    let removals = all[3000..].iter().map(|key| Change::remove(Space::Entries, key.to_be_bytes()));
    store.commit(&removals.collect::<Vec<_>>()).unwrap();
    let mut looks = 0;
    while store.space(Space::Entries).disk_space() > before / 5 {
        looks += 1;
        assert!(looks < 10_000, "it still takes as much");
        std::thread::sleep(LOOK_AGAIN);
    }
    let mut left = 0;
    let mut take = |_: &[u8], _: &[u8]| {
        left += 1;
        true
    };
    store.scan(Space::Entries, b"", &mut take).unwrap();
    assert_eq!(left, 3000);
}

#[test]
#[should_panic(expected = "a key of 65536 bytes")]
fn a_key_that_the_journal_would_cut_is_a_bug() {
    let place = Place::new();
    let mut store = place.open("store").unwrap();
    let _ = store.commit(&[Change::put(Space::Entries, vec![0; MAX_KEY_BYTES + 1], "")]);
}
