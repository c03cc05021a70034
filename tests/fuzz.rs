//! Bytes from elsewhere: whatever they are, nothing panics, and what was understood
//! was understood right.
//!
//! Each target of [`targets`] starts from a small corpus of real messages in
//! tests/fuzz/corpus. Inputs are changed at random ([`mutation`]); one whose outcome
//! is described in words that were not seen before is kept, and changed further.
//! Here it is a short run with a fixed seed; `make fuzz SECONDS=n` goes on for so
//! long on each target, from a new seed. An input that fails is written to the
//! corpus, so that from then on every run of the tests tries it first.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic and print, and has a clock"
)]

#[path = "fuzz/mutation.rs"]
mod mutation;
#[path = "fuzz/targets.rs"]
mod targets;

use mutation::mutate;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeSet;
use std::fs;
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use targets::{TARGETS, Target};

/// How many inputs a short run makes for each target.
const SHORT: u64 = 4_000;

/// How many inputs are kept to be changed further.
const MAX_POOL: usize = 4_000;

/// How many different outcomes are told apart.
const MAX_WORDS: usize = 20_000;

/// How long to go on, and from which seed.
enum Length {
    Inputs(u64),
    Until(Instant),
}

impl Target {
    fn folder(&self) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(self.name)
    }

    fn corpus(&self) -> Vec<Vec<u8>> {
        let files = fs::read_dir(self.folder()).unwrap();
        let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
        paths.sort_unstable();
        paths.iter().map(|path| fs::read(path).unwrap()).collect()
    }

    /// Runs one input.
    ///
    /// # Panics
    /// If it fails; the input is then in the corpus.
    fn try_one(&self, input: &[u8]) -> String {
        let run = self.run;
        catch_unwind(|| run(input)).unwrap_or_else(|_| {
            let sum = input.iter().fold(0_u32, |sum, &byte| sum.rotate_left(5) ^ u32::from(byte));
            let path = self.folder().join(format!("failed-{sum:08x}"));
            fs::write(&path, input).unwrap();
            panic!("{}: {} fails", self.name, path.display())
        })
    }

    /// Runs the corpus, and then whatever comes of it.
    fn fuzz(&self, seed: u64, length: Length) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut pool = self.corpus();
        assert!(!pool.is_empty(), "{} has no corpus", self.name);
        let mut words: BTreeSet<String> = pool.iter().map(|input| self.try_one(input)).collect();
        let mut made = 0;
        while match length {
            Length::Inputs(count) => made < count,
            Length::Until(end) => Instant::now() < end,
        } {
            let input = &pool[rng.random_range(0..pool.len())];
            let other = &pool[rng.random_range(0..pool.len())];
            let input = mutate(&mut rng, input, other);
            let word = self.try_one(&input);
            made += 1;
            if words.len() < MAX_WORDS && words.insert(word) && pool.len() < MAX_POOL {
                pool.push(input);
            }
        }
        println!("{}: {made} inputs, {} outcomes, seed {seed}", self.name, words.len());
    }
}

#[test]
fn no_bytes_from_elsewhere_bring_a_program_down() {
    let seconds: Option<u64> =
        std::env::var("FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let only = std::env::var("FUZZ_TARGET").unwrap_or_default();
    for target in TARGETS.iter().filter(|target| only.is_empty() || target.name == only) {
        match seconds {
            None => target.fuzz(1, Length::Inputs(SHORT)),
            Some(seconds) => {
                let end = Instant::now() + Duration::from_secs(seconds);
                target.fuzz(rand::random(), Length::Until(end));
            }
        }
    }
}
