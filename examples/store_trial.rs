//! Trials of the store on a real disk: how fast, how large, what a kill, damage
//! and a full disk do to it.
//!
//! ```text
//! cargo run --release --example store_trial -- writers DIR
//! cargo run --release --example store_trial -- overwrite DIR --value-bytes 1024
//! cargo run --release --example store_trial -- remove DIR
//! cargo run --release --example store_trial -- recover DIR
//! cargo run --release --example store_trial -- kill DIR
//! cargo run --release --example store_trial -- damage DIR
//! cargo run --release --example store_trial -- full DIR      (DIR: a small file system)
//! ```
//!
//! DIR must not be there yet, or be empty; it is removed afterwards.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a trial may panic; it prints, has a clock, threads and randomness"
)]

use clap::{Parser, Subcommand};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use ringleader::store::committer::Committer;
use ringleader::store::disk::{DiskStore, RESERVE_BYTES};
use ringleader::store::{Change, Durability, Space, Store, StoreError};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const MIB: f64 = 1024.0 * 1024.0;

/// Trials of the store on a real disk.
#[derive(Parser)]
struct Flags {
    #[command(subcommand)]
    trial: Trial,
    /// When a commit is on the disk
    #[arg(long, global = true, value_enum, default_value_t)]
    durability: Durability,
}

#[derive(Subcommand)]
enum Trial {
    /// Durable writes a second through the committer, with 1, 16 and 128 writers
    Writers {
        dir: PathBuf,
        #[arg(long, default_value_t = 3)]
        seconds: u64,
        #[arg(long, default_value_t = 100)]
        value_bytes: usize,
    },
    /// Space used while the same keys are overwritten
    Overwrite {
        dir: PathBuf,
        #[arg(long, default_value_t = 10_000)]
        keys: usize,
        #[arg(long, default_value_t = 200)]
        times: usize,
        #[arg(long, default_value_t = 1024)]
        value_bytes: usize,
    },
    /// Space used after most keys were removed
    Remove {
        dir: PathBuf,
        #[arg(long, default_value_t = 200_000)]
        keys: usize,
    },
    /// Time to open and read a store of many keys after kill -9
    Recover {
        dir: PathBuf,
        #[arg(long, default_value_t = 1_000_000)]
        keys: usize,
    },
    /// What kill -9 takes of what was acknowledged
    Kill {
        dir: PathBuf,
        #[arg(long, default_value_t = 10)]
        rounds: usize,
    },
    /// What comes of one flipped bit, a zeroed page, a cut, in every kind of file
    Damage {
        dir: PathBuf,
        #[arg(long, default_value_t = 300)]
        rounds: u64,
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// A disk that fills up: refused, then taken again
    Full { dir: PathBuf },
    /// Writes many keys, says so, and goes on
    Load { dir: PathBuf, keys: usize },
    /// Writes and prints what is acknowledged (for kills and power cuts)
    Ack {
        dir: PathBuf,
        #[arg(long, default_value_t = 16)]
        writers: usize,
    },
    /// Reads a store and prints a sum of what is in it
    Sum { dir: PathBuf },
    /// Checks a store against what `ack` printed
    Verify { dir: PathBuf, acknowledged: PathBuf },
}

fn main() {
    let Flags { trial, durability } = Flags::parse();
    match trial {
        Trial::Writers { dir, seconds, value_bytes } => {
            let seconds = Duration::from_secs(seconds);
            for writers in [1, 16, 128] {
                let disk = DiskStore::open(&dir, durability).unwrap();
                report("store", writers, measure(disk, writers, seconds, value_bytes));
                fs::remove_dir_all(&dir).unwrap();
                let bare = Bare(File::create(&dir).unwrap());
                report("append+fdatasync", writers, measure(bare, writers, seconds, value_bytes));
                fs::remove_file(&dir).unwrap();
            }
        }
        Trial::Overwrite { dir, keys, times, value_bytes } => {
            overwrite(&dir, durability, keys, times, value_bytes);
        }
        Trial::Remove { dir, keys } => remove(&dir, durability, keys),
        Trial::Recover { dir, keys } => recover(&dir, durability, keys),
        Trial::Kill { dir, rounds } => (0..rounds).for_each(|_| kill(&dir, durability)),
        Trial::Damage { dir, rounds, seed } => damage(&dir, rounds, seed),
        Trial::Full { dir } => full(&dir, durability),
        Trial::Load { dir, keys } => load(&dir, durability, keys),
        Trial::Ack { dir, writers } => acknowledge(&dir, durability, writers),
        Trial::Sum { dir } => match sum(&dir) {
            Ok(sum) => println!("{sum:x}"),
            Err(StoreError::Damaged { .. }) => println!("Damaged"),
            Err(error) => println!("{error}"),
        },
        Trial::Verify { dir, acknowledged } => {
            let lines = fs::read_to_string(acknowledged).unwrap();
            verify(&dir, durability, lines.lines());
        }
    }
}

// ---- how fast ----

/// The least that is durable, for comparison: append and fdatasync.
struct Bare(File);

impl Store for Bare {
    fn durability(&self) -> Durability {
        Durability::Always
    }
    fn commit(&mut self, batch: &[Change]) -> Result<(), StoreError> {
        let mut bytes = Vec::new();
        for change in batch {
            let Change::Put { key, value, .. } = change else { unreachable!("only puts") };
            bytes.extend([&(key.len() as u32).to_le_bytes(), &**key, &**value].concat());
        }
        self.0.write_all(&bytes).and_then(|()| self.0.sync_data()).unwrap();
        Ok(())
    }
    fn sync(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
    fn get(&self, _: Space, _: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        unreachable!("only written to")
    }
    fn scan(
        &self,
        _: Space,
        _: &[u8],
        _: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        unreachable!("only written to")
    }
}

/// What `writers` threads that each wait for their write achieve: how many
/// writes in how long, and all latencies.
fn measure(
    store: impl Store,
    writers: usize,
    long: Duration,
    value_bytes: usize,
) -> (Duration, Vec<Duration>) {
    let (wakers, waits): (Vec<_>, Vec<_>) =
        (0..writers).map(|_| crossbeam_channel::bounded(1)).unzip();
    let committer = Committer::start("committer", store, move |tags: Vec<usize>, outcome| {
        outcome.unwrap();
        tags.into_iter().for_each(|writer| wakers[writer].send(()).unwrap());
    });
    let committer = committer.unwrap();
    let begun = Instant::now();
    let latencies = thread::scope(|scope| {
        let threads: Vec<_> = waits
            .iter()
            .enumerate()
            .map(|(writer, wait)| {
                let committer = &committer;
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(writer as u64);
                    let mut latencies = Vec::new();
                    while begun.elapsed() < long {
                        let mut value = vec![0; value_bytes];
                        rng.fill_bytes(&mut value);
                        let key = format!("{:019}", rng.random_range(0..1_000_000_000_u64));
                        let started = Instant::now();
                        committer
                            .submit(vec![Change::put(Space::Entries, key, value)], writer)
                            .unwrap();
                        wait.recv().unwrap();
                        latencies.push(started.elapsed());
                    }
                    latencies
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    (begun.elapsed(), latencies)
}

fn report(what: &str, writers: usize, (took, mut latencies): (Duration, Vec<Duration>)) {
    latencies.sort_unstable();
    let at = |part: f64| latencies[(latencies.len() as f64 * part) as usize].as_secs_f64() * 1e3;
    println!(
        "{what:>16} {writers:>4} writers: {:>7.0} writes/s, median {:.2} ms, 99 %: {:.2} ms, worst {:.1} ms",
        latencies.len() as f64 / took.as_secs_f64(),
        at(0.5),
        at(0.99),
        at(0.999_999),
    );
}

// ---- how large ----

/// What is allocated for the files under `dir`, in bytes.
fn allocated(dir: &Path) -> u64 {
    let Ok(files) = fs::read_dir(dir) else { return 0 };
    let sizes = files.flatten().map(|file| match file.metadata() {
        Ok(data) if data.is_dir() => allocated(&file.path()),
        Ok(data) => data.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}

/// Waits until the engine has had nothing to do for a while.
fn settle(dir: &Path) -> u64 {
    let mut before = (0, Instant::now());
    while before.1.elapsed() < Duration::from_secs(2) {
        let now = allocated(dir);
        if now != before.0 {
            before = (now, Instant::now());
        }
        thread::sleep(Duration::from_millis(100));
    }
    before.0
}

fn overwrite(dir: &Path, durability: Durability, keys: usize, times: usize, value_bytes: usize) {
    let mut rng = StdRng::seed_from_u64(1);
    let mut store = DiskStore::open(dir, durability).unwrap();
    let live = keys * (8 + value_bytes);
    println!("live data: {:.1} MiB", live as f64 / MIB);
    let watched = dir.to_owned();
    let most = Arc::new(Mutex::new(0));
    let (end, seen) = (Arc::new(AtomicBool::new(false)), Arc::clone(&most));
    let ended = Arc::clone(&end);
    let watch = thread::spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            let now = allocated(&watched);
            let mut most = seen.lock().unwrap();
            *most = now.max(*most);
            drop(most);
            thread::sleep(Duration::from_millis(10));
        }
    });
    let begun = Instant::now();
    for round in 1..=times {
        for group in 0..keys / 100 {
            let mut batch: Vec<_> = (0..100)
                .map(|index| {
                    let mut value = vec![0; value_bytes];
                    rng.fill_bytes(&mut value);
                    let key = ((group * 100 + index) as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                    Change::put(Space::Entries, key.to_be_bytes(), value)
                })
                .collect();
            // A little in another space must not keep the journals.
            if group == 0 {
                batch.push(Change::put(Space::Meta, "round", round.to_string()));
            }
            store.commit(&batch).unwrap();
        }
        if round % (times / 10).max(1) == 0 || round <= 2 {
            let most = std::mem::take(&mut *most.lock().unwrap());
            println!(
                "overwritten {round:>4} times, {:>6.1} s: {:>6.1} MiB, at most {:>6.1} MiB since the line before",
                begun.elapsed().as_secs_f64(),
                allocated(dir) as f64 / MIB,
                most as f64 / MIB
            );
        }
    }
    println!("at rest: {:.1} MiB", settle(dir) as f64 / MIB);
    end.store(true, Ordering::Relaxed);
    watch.join().unwrap();
    drop(store);
    let store = DiskStore::open(dir, durability).unwrap();
    println!("opened again: {:.1} MiB", settle(dir) as f64 / MIB);
    drop(store);
    fs::remove_dir_all(dir).unwrap();
}

fn remove(dir: &Path, durability: Durability, keys: usize) {
    let mut store = DiskStore::open(dir, durability).unwrap();
    let all: Vec<usize> = (0..keys).collect();
    for group in all.chunks(1000) {
        let batch: Vec<_> = group.iter().map(|key| numbered(*key)).collect();
        store.commit(&batch).unwrap();
    }
    println!("{keys} keys of 1 KiB: {:.1} MiB", settle(dir) as f64 / MIB);
    for group in all[keys / 10..].chunks(1000) {
        let batch: Vec<_> =
            group.iter().map(|key| Change::remove(Space::Entries, name(*key))).collect();
        store.commit(&batch).unwrap();
    }
    println!("9 of 10 removed: {:.1} MiB", settle(dir) as f64 / MIB);
    drop(store);
    let store = DiskStore::open(dir, durability).unwrap();
    println!("opened again: {:.1} MiB", settle(dir) as f64 / MIB);
    drop(store);
    fs::remove_dir_all(dir).unwrap();
}

// ---- kills ----

fn name(key: usize) -> String {
    format!("key-{key:015}")
}

fn numbered(key: usize) -> Change {
    let mut value = vec![0; 1000];
    StdRng::seed_from_u64(key as u64).fill_bytes(&mut value);
    Change::put(Space::Entries, name(key), value)
}

fn load(dir: &Path, durability: Durability, keys: usize) {
    let mut store = DiskStore::open(dir, durability).unwrap();
    let all: Vec<usize> = (0..keys).collect();
    let begun = Instant::now();
    for group in all.chunks(1000) {
        let batch: Vec<_> = group
            .iter()
            .map(|key| Change::put(Space::Entries, name(*key), format!("{key:0100}")))
            .collect();
        store.commit(&batch).unwrap();
    }
    println!("loaded in {:.2} s", begun.elapsed().as_secs_f64());
    loop {
        store.commit(&[numbered(keys)]).unwrap();
    }
}

fn child(durability: Durability, flags: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(flags)
        .args(["--durability", &durability.to_string()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    (child, out)
}

fn recover(dir: &Path, durability: Durability, keys: usize) {
    let (mut child, mut out) =
        child(durability, &["load", dir.to_str().unwrap(), &keys.to_string()]);
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let size = allocated(dir) as f64 / MIB;
    let begun = Instant::now();
    let store = DiskStore::open(dir, durability).unwrap();
    let opened = begun.elapsed();
    let mut count = 0;
    let mut take = |_: &[u8], _: &[u8]| {
        count += 1;
        true
    };
    store.scan(Space::Entries, b"", &mut take).unwrap();
    println!(
        "{keys} keys {}, {size:.0} MiB; after kill -9: open {:.2} s, and read all {count} {:.2} s",
        line.trim(),
        opened.as_secs_f64(),
        (begun.elapsed() - opened).as_secs_f64()
    );
    drop(store);
    fs::remove_dir_all(dir).unwrap();
}

/// Writes keys `WRITER NUMBER`, and `WRITER` with the number as its value, in one
/// batch; prints the pair once it is acknowledged.
fn acknowledge(dir: &Path, durability: Durability, writers: usize) {
    let store = DiskStore::open(dir, durability).unwrap();
    let mut counts = vec![0; writers];
    let take = &mut |key: &[u8], value: &[u8]| {
        let [key, value] = [key, value].map(|text| str::from_utf8(text).unwrap());
        if let Ok(writer) = key.parse::<usize>() {
            counts[writer] = value.parse::<usize>().unwrap() + 1;
        }
        true
    };
    store.scan(Space::Entries, b"", take).unwrap();
    let (wakers, waits): (Vec<_>, Vec<_>) =
        (0..writers).map(|_| crossbeam_channel::bounded(1)).unzip();
    let committer = Committer::start(
        "committer",
        store,
        move |tags: Vec<(usize, usize)>, outcome: Result<(), StoreError>| {
            if let Err(error) = outcome {
                println!("# {error}");
                std::process::exit(3);
            }
            let lines: String =
                tags.iter().map(|(writer, number)| format!("{writer} {number}\n")).collect();
            let mut out = io::stdout().lock();
            out.write_all(lines.as_bytes()).and_then(|()| out.flush()).unwrap();
            tags.into_iter().for_each(|(writer, _)| wakers[writer].send(()).unwrap());
        },
    );
    let committer = committer.unwrap();
    thread::scope(|scope| {
        for (writer, wait) in waits.iter().enumerate() {
            let (committer, first) = (&committer, counts[writer]);
            scope.spawn(move || {
                for number in first.. {
                    let value = format!("{number}").repeat(1 + number % 97 * writer);
                    let changes = vec![
                        Change::put(Space::Entries, format!("{writer} {number}"), value),
                        Change::put(Space::Entries, format!("{writer}"), number.to_string()),
                    ];
                    committer.submit(changes, (writer, number)).unwrap();
                    wait.recv().unwrap();
                }
            });
        }
    });
}

fn kill(dir: &Path, durability: Durability) {
    let (mut child, out) = child(durability, &["ack", dir.to_str().unwrap()]);
    let lines = thread::spawn(move || out.lines().map_while(Result::ok).collect::<Vec<_>>());
    thread::sleep(Duration::from_millis(1000));
    child.kill().unwrap();
    child.wait().unwrap();
    let lines = lines.join().unwrap();
    verify(dir, durability, lines.iter().map(|line| &**line));
}

/// Says how many of the acknowledged writes are missing, and panics if what is
/// there isn't a beginning of what was written.
fn verify<'a>(dir: &Path, durability: Durability, lines: impl Iterator<Item = &'a str>) {
    let store = match DiskStore::open(dir, durability) {
        Ok(store) => store,
        Err(error) => {
            println!("not opened: {error}");
            std::process::exit(4);
        }
    };
    let mut there: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut latest: BTreeMap<usize, usize> = BTreeMap::new();
    let take = &mut |key: &[u8], value: &[u8]| {
        let [key, value] = [key, value].map(|text| str::from_utf8(text).unwrap());
        match key.split_once(' ') {
            Some((writer, number)) => {
                let (writer, number) = (writer.parse().unwrap(), number.parse::<usize>().unwrap());
                assert_eq!(value, format!("{number}").repeat(1 + number % 97 * writer));
                there.entry(writer).or_default().push(number);
            }
            None => {
                latest.insert(key.parse().unwrap(), value.parse().unwrap());
            }
        }
        true
    };
    store.scan(Space::Entries, b"", take).unwrap();
    for (writer, numbers) in &mut there {
        numbers.sort_unstable();
        assert!(numbers.iter().copied().eq(0..numbers.len()), "writer {writer} has holes");
        assert_eq!(latest[writer], numbers.len() - 1, "half a batch of {writer}");
    }
    let mut lost = 0;
    let mut count = 0;
    for line in lines.filter(|line| !line.starts_with('#')) {
        let Some((writer, number)) = line.split_once(' ') else { continue };
        let have = there.get(&writer.parse().unwrap()).map_or(0, Vec::len);
        lost += usize::from(number.parse::<usize>().unwrap() >= have);
        count += 1;
    }
    println!("acknowledged {count}, lost {lost}");
}

// ---- damage ----

/// A sum of everything in the store.
fn sum(dir: &Path) -> Result<u64, StoreError> {
    let store = DiskStore::open(dir, Durability::Always)?;
    let mut hasher = DefaultHasher::new();
    for space in Space::ALL {
        let take = &mut |key: &[u8], value: &[u8]| {
            (space as u8, key, value).hash(&mut hasher);
            true
        };
        store.scan(space, b"", take)?;
    }
    Ok(hasher.finish())
}

/// What another process makes of the store: the engine may end it.
fn sum_elsewhere(dir: &Path) -> String {
    let (mut child, mut out) = child(Durability::Always, &["sum", dir.to_str().unwrap()]);
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    let how = child.wait().unwrap();
    if how.success() { line.trim().to_owned() } else { format!("THE PROCESS ENDED: {how}") }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for file in fs::read_dir(dir).unwrap().flatten() {
        if file.metadata().unwrap().is_dir() {
            found.extend(files(&file.path()));
        } else {
            found.push(file.path());
        }
    }
    found.sort();
    found
}

/// Copies what is written, not the holes.
fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        let bytes = fs::read(&file).unwrap();
        let written = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        let mut copy = File::create(&target).unwrap();
        copy.write_all(&bytes[..written]).unwrap();
        copy.set_len(bytes.len() as u64).unwrap();
    }
}

/// Does one kind of damage to a file and says which; none if it has no bytes.
fn hurt(path: &Path, rng: &mut StdRng) -> Option<&'static str> {
    let bytes = fs::read(path).unwrap();
    let written = bytes.iter().rposition(|byte| *byte != 0)? + 1;
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    let at = rng.random_range(0..written);
    file.seek(SeekFrom::Start(at as u64)).unwrap();
    match rng.random_range(0..4) {
        0 | 1 => {
            file.write_all(&[bytes[at] ^ 1 << rng.random_range(0..8)]).unwrap();
            Some("a bit flipped")
        }
        2 => {
            let end = (at / 512 + 1) * 512;
            let zeros = vec![0; end.min(written) - at];
            file.write_all(&zeros).unwrap();
            (bytes[at..at + zeros.len()] != zeros).then_some("zeros to the end of a sector")
        }
        _ => {
            file.set_len(at as u64).unwrap();
            Some("the rest cut off")
        }
    }
}

fn damage(dir: &Path, rounds: u64, seed: u64) {
    let original = dir.join("original");
    let mut rng = StdRng::seed_from_u64(seed);
    {
        let mut store = DiskStore::open(&original, Durability::None).unwrap();
        for batch in 0..400_u64 {
            let changes: Vec<_> = (0..100)
                .map(|_| {
                    let key = rng.random_range(0..20_000_u64).to_be_bytes();
                    let mut value = vec![0; rng.random_range(0..2000)];
                    rng.fill_bytes(&mut value);
                    match rng.random_range(0..20) {
                        0 => Change::remove(Space::Entries, key),
                        1 => Change::put(Space::Meta, key, value),
                        2 => Change::put(Space::Log, batch.to_be_bytes(), value),
                        _ => Change::put(Space::Entries, key, value),
                    }
                })
                .collect();
            store.commit(&changes).unwrap();
        }
        settle(&original);
        copy(&original, &dir.join("image"));
    }
    let image = dir.join("image");
    for file in files(&image) {
        println!("{:>10} {}", fs::metadata(&file).unwrap().len(), file.display());
    }
    copy(&image, &dir.join("hurt"));
    let expected = sum_elsewhere(&dir.join("hurt"));
    let mut tally: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..rounds {
        fs::remove_dir_all(dir.join("hurt")).unwrap();
        copy(&image, &dir.join("hurt"));
        let all = files(&dir.join("hurt"));
        let file = &all[rng.random_range(0..all.len())];
        let Some(how) = hurt(file, &mut rng) else { continue };
        let kind = match file.extension().and_then(|name| name.to_str()) {
            Some("jnl") => "journal".to_owned(),
            _ if file.parent().unwrap().ends_with("tables") => "table".to_owned(),
            _ if file.file_name().is_some_and(|name| name.to_string_lossy().starts_with('v')) => {
                "version".to_owned()
            }
            _ => file.file_name().unwrap().to_string_lossy().into_owned(),
        };
        let found = sum_elsewhere(&dir.join("hurt"));
        let outcome = match &*found {
            _ if found == expected => "reads as before",
            _ if u64::from_str_radix(&found, 16).is_err() => &found,
            _ if kind == "journal" && how == "the rest cut off" => "ends earlier",
            _ => "READS OTHERWISE",
        };
        if outcome.starts_with(|first: char| first.is_uppercase()) && outcome != "Damaged" {
            println!("!! {outcome}: {how} in {}", file.display());
        }
        *tally.entry(format!("{kind:>8}, {how}: {outcome}")).or_default() += 1;
    }
    for (what, count) in tally {
        println!("{count:>5} {what}");
    }
    fs::remove_dir_all(dir).unwrap();
}

// ---- a full disk ----

fn full(dir: &Path, durability: Durability) {
    let free = || {
        let disk = rustix::fs::statvfs(dir.parent().unwrap()).unwrap();
        (disk.f_bavail * disk.f_frsize) as f64 / MIB
    };
    let mut rng = StdRng::seed_from_u64(1);
    let mut store = DiskStore::open(&dir.join("store"), durability).unwrap();
    println!("{:.0} MiB free, {:.0} are reserved", free(), RESERVE_BYTES as f64 / MIB);
    let mut batch = |keys: usize| -> Vec<_> {
        (0..100)
            .map(|_| {
                let mut value = vec![0; 1000];
                rng.fill_bytes(&mut value);
                Change::put(Space::Entries, name(rng.random_range(0..keys)), value)
            })
            .collect()
    };
    // Fill it with ever more keys until it refuses.
    let (mut taken, mut least) = (0, f64::MAX);
    let refusal = loop {
        match store.commit(&batch(1 << 40)) {
            Ok(()) => taken += 100,
            Err(error) => break error,
        }
        least = least.min(free());
    };
    println!("{taken} keys taken, {:.0} MiB free, then: {refusal}", free());
    // Keep on trying: now and then the engine gives something back.
    let (mut refused, mut more) = (0, 0);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(10) {
        match store.commit(&batch(1 << 40)) {
            Ok(()) => more += 100,
            Err(StoreError::Full { .. }) => {
                refused += 1;
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{error}"),
        }
        least = least.min(free());
    }
    println!("10 s on: {more} more taken, {refused} commits refused, at least {least:.0} MiB free");
    let mut count = 0;
    let mut take = |_: &[u8], _: &[u8]| {
        count += 1;
        true
    };
    store.scan(Space::Entries, b"", &mut take).unwrap();
    println!("reads go on: {count} keys");
    println!("make room, or take some, and press return");
    io::stdin().lock().read_line(&mut String::new()).unwrap();
    let mut outcomes = BTreeMap::<String, usize>::new();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(10) {
        let outcome = store.commit(&batch(10_000)).map_err(|error| error.to_string());
        let outcome = outcome.map_or_else(|error| error, |()| "taken".to_owned());
        let outcome: String = outcome.chars().filter(|letter| !letter.is_ascii_digit()).collect();
        *outcomes.entry(outcome).or_default() += 1;
        least = least.min(free());
    }
    println!("10 s on: {outcomes:?}, at least {least:.0} MiB free");
    drop(store);
    println!("closed");
    let store = DiskStore::open(&dir.join("store"), durability);
    println!("opened again: {:?}", store.map(|_| ()));
}
