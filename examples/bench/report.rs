//! What is written down: the figures in `docs/benchmarks.json`, by which `--check` knows
//! what has been claimed, and as tables in `docs/benchmarks.md`, between two marks.

use super::rows::{Figure, Side};
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

const DOCUMENT: &str = "docs/benchmarks.md";
const FIGURES: &str = "docs/benchmarks.json";

/// The figures stand between these.
const BEGIN: &str = "<!-- figures: begin -->";
const END: &str = "<!-- figures: end -->";

/// How far the rounds lay from the median at most, as a part of it.
fn noise(figure: &Figure) -> f64 {
    let value = figure.value();
    let distance = |measured: &f64| (measured - value).abs() / value;
    figure.measured.iter().map(distance).fold(0.0, f64::max)
}

/// The figures that have been written down.
fn claimed() -> io::Result<Vec<Figure>> {
    match fs::read(FIGURES) {
        Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Writes the figures down; those of rows that were not measured this time stay.
///
/// # Errors
/// When the documents can't be read or written.
pub(crate) fn write(figures: &[Figure], effort: &str) -> io::Result<()> {
    let mut all = claimed()?;
    for figure in figures {
        match all.iter_mut().find(|known| known.name == figure.name) {
            Some(known) => known.clone_from(figure),
            None => all.push(figure.clone()),
        }
    }
    let json = serde_json::to_string_pretty(&all).map_err(io::Error::other)?;
    fs::write(FIGURES, json + "\n")?;
    let text = fs::read_to_string(DOCUMENT)?;
    let (head, rest) = text.split_once(BEGIN).ok_or_else(|| no_mark(BEGIN))?;
    let (_, tail) = rest.split_once(END).ok_or_else(|| no_mark(END))?;
    let figures = tables(&all, effort);
    fs::write(DOCUMENT, format!("{head}{BEGIN}\n{figures}{END}{tail}"))
}

fn no_mark(mark: &str) -> io::Error {
    io::Error::other(format!("{DOCUMENT} has no line {mark}"))
}

/// Compares with what has been claimed. Returns the rows that fall short of it.
///
/// # Errors
/// When the claims can't be read.
pub(crate) fn shortfalls(figures: &[Figure]) -> io::Result<Vec<String>> {
    let claimed = claimed()?;
    let short = figures.iter().filter_map(|figure| {
        let claim = claimed.iter().find(|claim| claim.name == figure.name)?;
        let (value, unit) = (figure.value(), &figure.unit);
        let (claims, slack) = (claim.value(), noise(claim) + MARGIN);
        let is_short = match claim.goal.is_minimum() {
            true => value < claims * (1.0 - slack),
            false => value > claims * (1.0 + slack),
        };
        is_short.then(|| format!("{}: {value:.2} {unit}, claimed are {claims:.2}", figure.name))
    });
    Ok(short.collect())
}

/// Beyond the noise that was seen when a claim was made, a quick run has some of its
/// own, as a part of the claim.
const MARGIN: f64 = 0.25;

fn tables(figures: &[Figure], effort: &str) -> String {
    let mut text = String::new();
    // Writing to memory can't fail.
    let _ = writeln!(text, "\n{}\n\n{effort}\n", machine());
    let _ = writeln!(text, "| what | against | measured | rounds | to reach | |");
    let _ = writeln!(text, "|---|---|---|---|---|---|");
    for figure in figures {
        let Figure { name, against, measured, unit, note, .. } = figure;
        let rounds: Vec<String> = measured.iter().map(|value| format!("{value:.2}")).collect();
        let verdict = if figure.is_reached() { "reached" } else { "**missed**" };
        let (value, goal) = (figure.value(), figure.goal.words());
        let _ = writeln!(
            text,
            "| {name} | {against} | {value:.2} {unit} | {} | {goal} | {verdict}{}{note} |",
            rounds.join(" "),
            if note.is_empty() { "" } else { "; " },
        );
    }
    let _ = writeln!(
        text,
        "\n| what | side | operations/s | p50 ms | p99 ms | p99.9 ms | cpu us/operation | peak MiB |\n\
         |---|---|---|---|---|---|---|---|"
    );
    for figure in figures {
        let Some((ours, theirs)) = figure.sides else { continue };
        for (side, Side { rate, p50, p99, p999, cpu, memory }) in
            [("ours", ours), (&*figure.against, theirs)]
        {
            let _ = writeln!(
                text,
                "| {} | {side} | {rate:.0} | {p50:.2} | {p99:.2} | {p999:.2} | {cpu:.1} | {memory:.0} |",
                figure.name
            );
        }
    }
    text
}

/// Where it ran, and what.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory =
        memory.lines().next().and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    let memory = memory.map_or(0, |kib: u64| kib / (1024 * 1024));
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let versions: Vec<String> = [
        ("redis-server", "--version"),
        ("etcd", "--version"),
        ("mfsmaster", "-v"),
        ("rustc", "--version"),
    ]
    .into_iter()
    .filter_map(|(program, flag)| version(program, flag))
    .collect();
    format!(
        "{cores} cores, {memory} GiB of memory, Linux {}; {}. The load generator runs on the same \
         cores.",
        kernel.trim(),
        versions.join("; ")
    )
}

fn version(program: &str, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).output().ok()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    said.lines().find(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned())
}

/// Whether the documents are where they should be.
pub(crate) fn is_here() -> bool {
    Path::new(DOCUMENT).exists()
}
