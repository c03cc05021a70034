//! Deliberate bugs, each of which the simulator must find.
//!
//! A file of tests/mutants is one bug: its name is the claim that would be true with
//! it, its first line says what it breaks, and then comes where, which text (where
//! that is not enough, behind which other text), and what stands there instead. They
//! are not in the product's code. The long test (`make mutants`) makes a copy of the
//! tree in which each of these texts is a choice between the old and the new one, so
//! that one build is enough for all of them; then it runs the simulator once for each
//! mutant, seed after seed until one fails, and once more without it: that seed must be
//! fine then. A mutant that no seed finds fails the test: then the simulator is too weak.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic, says what it found, and waits for programs"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How many seeds a mutant is given.
const SEEDS: u64 = 50_000;

/// How many seconds it is given, beside one seed.
const SECONDS: u64 = 1_200;

/// How long one seed may hang.
const HANG: Duration = Duration::from_secs(60);

/// How many seeds must be fine without any mutant.
const FINE_SEEDS: u64 = 100;

/// What the simulator is called in the copy.
const EXAMPLE: &str = "sim_with_mutants";

/// What tells the simulator in the copy which mutant it is; 0 is none.
const CHOICE: &str = "RINGLEADER_MUTANT";

/// One deliberate bug.
struct Mutant {
    name: String,
    breaks: String,
    file: PathBuf,
    /// What stands right before the old text, and stays.
    behind: String,
    old: String,
    new: String,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn mutants() -> Vec<Mutant> {
    let entries = fs::read_dir(root().join("tests/mutants")).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort_unstable();
    files.iter().map(|file| read(file)).collect()
}

fn read(path: &Path) -> Mutant {
    let name = path.file_stem().unwrap().to_string_lossy().into_owned();
    let text = fs::read_to_string(path).unwrap();
    let parts = (|| {
        let (breaks, rest) = text.split_once("\nfile: ")?;
        let (head, rest) = rest.split_once("\n--- old\n")?;
        let (old, new) = rest.split_once("\n--- new\n")?;
        let (file, behind) = head.split_once("\n--- behind\n").unwrap_or((head, ""));
        Some((breaks, file, behind, old, new.strip_suffix('\n')?))
    })();
    let (breaks, file, behind, old, new) = parts.unwrap_or_else(|| panic!("{name} is no mutant"));
    let [breaks, behind, old, new] = [breaks, behind, old, new].map(str::to_owned);
    Mutant { name, breaks, file: file.into(), behind, old, new }
}

impl Mutant {
    /// Where its old text stands in `text`, the text of its file.
    fn place(&self, text: &str) -> Range<usize> {
        let Self { name, file, behind, old, new, .. } = self;
        let wanted = format!("{behind}{old}");
        let places: Vec<usize> = text.match_indices(&wanted).map(|(place, _)| place).collect();
        let [place] = places.as_slice() else {
            panic!("{name}: its old text is {} times in {}", places.len(), file.display());
        };
        assert_ne!(old, new, "{name} changes nothing");
        let start = place + behind.len();
        start..start + old.len()
    }
}

#[test]
fn every_mutant_still_applies_at_exactly_one_place() {
    let mutants = mutants();
    assert!(mutants.len() >= 60, "{} mutants", mutants.len());
    for mutant in mutants {
        mutant.place(&fs::read_to_string(root().join(&mutant.file)).unwrap());
    }
}

/// What a run of the simulator has come to.
enum Found {
    /// This seed fails, if it is known which, and the oracle said that.
    At(Option<u64>, String),
    Not,
}

#[test]
#[ignore = "builds a copy and takes minutes: make mutants"]
fn the_simulator_finds_every_mutant() {
    let mutants = mutants();
    let wanted = std::env::var("MUTANT").unwrap_or_default();
    let tree = root().join("target/mutants/tree");
    make_copy(&tree, &mutants);
    build(&tree);
    must_be_fine(0, FINE_SEEDS);
    println!("| mutant | seeds | found by |\n|---|---|---|");
    let (mut unfound, mut count) = (Vec::new(), 0);
    for (index, mutant) in mutants.iter().enumerate() {
        if !wanted.split(',').any(|part| mutant.name.contains(part)) {
            continue;
        }
        count += 1;
        let name = mutant.name.replace('_', " ");
        match run(index + 1, 0, SEEDS) {
            Found::At(seed, what) => {
                // Or it is something else that was found.
                seed.into_iter().for_each(|seed| must_be_fine(seed, 1));
                let oracle = what.split(" at ").next().unwrap_or_default();
                let seeds = seed.map_or("0".to_owned(), |seed| (seed + 1).to_string());
                println!("| {name} | {seeds} | {oracle} |");
            }
            Found::Not => {
                println!("| {name} | **not found** | {} |", mutant.breaks);
                unfound.push(&mutant.name);
            }
        }
    }
    assert!(unfound.is_empty(), "not found: {unfound:?}");
    assert!(count > 0, "no mutant is called like that: {wanted}");
}

/// The tree without any mutant passes these seeds.
fn must_be_fine(first: u64, seeds: u64) {
    if let Found::At(seed, what) = run(0, first, seeds) {
        panic!("the tree fails without any mutant, at seed {seed:?}: {what}");
    }
}

/// Makes `tree` a copy of what the simulator is built from, with every mutant in it,
/// to be chosen when it runs.
fn make_copy(tree: &Path, mutants: &[Mutant]) {
    let example = format!("examples/{EXAMPLE}.rs");
    let copied = ["Cargo.toml", "Cargo.lock"].map(|file| (file, file));
    for (file, copy) in copied.into_iter().chain([("examples/sim.rs", &*example)]) {
        let text = fs::read_to_string(root().join(file)).unwrap();
        // Another version, so that what is built here is not taken for the product.
        let named = format!("name = \"ringleader\"\nversion = \"{}", env!("CARGO_PKG_VERSION"));
        write_if_changed(&tree.join(copy), &text.replacen(&named, &format!("{named}-mutants"), 1));
    }
    // Nobody builds the benchmarks there, but the manifest names them.
    let mut folders = vec![PathBuf::from("src"), PathBuf::from("benches")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let file = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                folders.push(file);
                continue;
            }
            let mut text = mutated(&file, fs::read_to_string(entry.path()).unwrap(), mutants);
            if file == Path::new("src/common/lib.rs") {
                text += &format!(
                    "
pub mod mutant {{
    static CHOSEN: std::sync::LazyLock<usize> = std::sync::LazyLock::new(|| {{
        std::env::var({CHOICE:?}).map_or(0, |number| number.parse().unwrap())
    }});
    pub fn is(number: usize) -> bool {{
        *CHOSEN == number
    }}
}}
"
                );
            }
            write_if_changed(&tree.join(file), &text);
        }
    }
}

/// A mutant, and the number by which it is chosen.
type Numbered<'a> = (usize, &'a Mutant);

/// The text of `file` with its mutants.
fn mutated(file: &Path, mut text: String, mutants: &[Mutant]) -> String {
    // By where the old text starts: where it ends, and the mutants there.
    let mut places: BTreeMap<usize, (usize, Vec<Numbered<'_>>)> = BTreeMap::new();
    for (index, mutant) in mutants.iter().enumerate().filter(|(_, mutant)| mutant.file == file) {
        let place = mutant.place(&text);
        let (end, here) = places.entry(place.start).or_insert((place.end, Vec::new()));
        assert_eq!(*end, place.end, "{} overlaps another one", mutant.name);
        here.push((index + 1, mutant));
    }
    // From the end, so that places stay right.
    for (start, (end, here)) in places.into_iter().rev() {
        let old = &text[start..end];
        let is_statement = old.trim_end().ends_with([';', '}']);
        let news = here.iter().map(|(number, Mutant { new, .. })| {
            format!("if crate::mutant::is({number}) {{ {new} }} else ")
        });
        let choice = format!("{}{{ {old} }}", news.collect::<String>());
        let choice = if is_statement { choice } else { format!("({choice})") };
        text.replace_range(start..end, &choice);
    }
    text
}

/// What has not changed is not built again.
fn write_if_changed(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|there| there == text) {
        return;
    }
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn build(tree: &Path) {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--locked", "--example", EXAMPLE])
        .current_dir(tree)
        // The libraries are there already; and what is built here has its own name.
        .env("CARGO_TARGET_DIR", root().join("target"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "the copy with the mutants does not build:\n{said}");
}

fn run(choice: usize, first: u64, seeds: u64) -> Found {
    let mut child = Command::new(root().join("target/release/examples").join(EXAMPLE))
        .args(["--stop", "--lines", "0", "--seeds", &seeds.to_string()])
        .args(["--first", &first.to_string()])
        .args(["--seconds", &SECONDS.to_string()])
        .env(CHOICE, choice.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(SECONDS) + HANG;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            return Found::At(None, "it hangs".to_owned());
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    // With two threads another seed may have failed before the first one that does.
    let failures = text.lines().filter_map(|line| {
        let (seed, what) = line.strip_prefix("seed ")?.split_once(" fails: ")?;
        Some((seed.parse::<u64>().unwrap(), what.to_owned()))
    });
    match failures.min() {
        Some((seed, what)) => Found::At(Some(seed), what),
        None if status.success() => Found::Not,
        None => Found::At(None, format!("it dies: {status}")),
    }
}
