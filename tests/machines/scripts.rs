//! Running the scripts of a folder.

use goldenscript::Runner;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

/// Runs every script of the folder, each with a runner of its own.
pub(crate) fn run<R: Runner + Default>(folder: &str) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/scripts").join(folder);
    let wanted = std::env::var("SCRIPT").unwrap_or_default();
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut scripts: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    scripts.retain(|script| script.to_string_lossy().contains(&wanted));
    scripts.sort_unstable();
    let failed = scripts.iter().filter(|script| {
        println!("{}", script.display());
        let run = || goldenscript::run(&mut R::default(), script);
        let outcome = catch_unwind(AssertUnwindSafe(run));
        if let Ok(Err(error)) = &outcome {
            println!("{error}");
        }
        !matches!(outcome, Ok(Ok(())))
    });
    let failed: Vec<_> = failed.map(|script| script.file_stem().unwrap_or_default()).collect();
    assert!(failed.is_empty(), "not as written: {failed:?}");
}
