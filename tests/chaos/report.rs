//! What is said of a run.

use super::clients::{GENERATION, Seen};
use ringleader::sim::linearizability::{Call, Operation, Outcome, Verdict};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// How many of the keys that were longest out of reach are shown.
const SHOWN_GAPS: usize = 3;

/// How many strange answers and mishaps are shown.
const SHOWN: usize = 20;

/// A run, and what is to be said of it.
pub(crate) struct Report {
    /// What it was drawn from.
    pub(crate) seed: u64,
    /// How long harm was done.
    pub(crate) span: Duration,
    /// Where the programs ran.
    pub(crate) place: String,
    /// It was ended early.
    pub(crate) interrupted: bool,
    /// How often each kind of harm was done.
    pub(crate) faults: BTreeMap<&'static str, usize>,
    /// How many were drawn that could not be done at that moment.
    pub(crate) drawn_in_vain: usize,
    /// Whether all came to rest in the end.
    pub(crate) rest: Result<(), String>,
    /// Programs that ended by themselves or panicked.
    pub(crate) mishaps: Vec<String>,
    /// What clients have seen.
    pub(crate) seen: Seen,
    /// What is to be said of that.
    pub(crate) verdict: Verdict,
    /// How long it took to say so.
    pub(crate) checking: Duration,
    /// What each program has said.
    pub(crate) logs: Vec<(String, String)>,
}

impl Report {
    /// Something was done, and nothing is wrong.
    pub(crate) fn is_fine(&self) -> bool {
        let has_begun = self.count(|it| is_read(it) && is_done(it)) > 0
            && self.count(|it| !is_read(it) && is_done(it)) > 0
            && (self.interrupted || !self.faults.is_empty());
        has_begun
            && self.verdict.is_fine()
            && self.rest.is_ok()
            && self.mishaps.is_empty()
            && self.seen.strange.is_empty()
    }

    /// Writes the report to `folder`; if something is wrong, the history and the
    /// programs' logs too.
    ///
    /// # Errors
    /// When it can't be written.
    pub(crate) fn write(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("report.txt"), format!("{self}\n"))?;
        if self.is_fine() {
            return Ok(());
        }
        let mut history: Vec<&Operation> = self.seen.history.iter().collect();
        history.sort_by_key(|operation| (&operation.key, operation.began, operation.client));
        let lines: Vec<String> =
            history.iter().map(|operation| format!("{}: {operation}\n", operation.key)).collect();
        fs::write(folder.join("history.txt"), lines.concat())?;
        for (name, log) in &self.logs {
            fs::write(folder.join(format!("{name}.log")), log)?;
        }
        Ok(())
    }

    /// How many operations are such.
    fn count(&self, wanted: impl Fn(&Operation) -> bool) -> usize {
        self.seen.history.iter().filter(|operation| wanted(operation)).count()
    }
}

/// The longest that each key was out of reach, as its clients saw it: from the first
/// question after an answer until the next answer. A key of a generation goes on as the
/// one that takes its place in the next; what is asked for later is not counted.
fn gaps(history: &[Operation]) -> Vec<(Duration, &str)> {
    #[derive(Default)]
    struct Times {
        asked: Vec<u64>,
        served: Vec<u64>,
    }
    let mut keys: BTreeMap<&str, Times> = BTreeMap::new();
    for operation in history {
        let generation = Duration::from_micros(operation.began).as_secs() / GENERATION.as_secs();
        let name = operation.key.strip_prefix(&format!("key {generation}."));
        let Some(name) = name else { continue };
        let times = keys.entry(name).or_default();
        times.asked.push(operation.began);
        match operation.end {
            None | Some((_, Outcome::Refused)) => {}
            Some((at, _)) => times.served.push(at),
        }
    }
    let end = keys.values().flat_map(|times| &times.asked).max().copied().unwrap_or_default();
    let mut gaps = Vec::new();
    for (key, Times { mut asked, mut served }) in keys {
        served.extend([0, end]);
        asked.sort_unstable();
        served.sort_unstable();
        let longest = served.windows(2).filter_map(|pair| {
            let first = *asked.get(asked.partition_point(|&at| at <= pair[0]))?;
            Some(pair[1].saturating_sub(first))
        });
        gaps.push((Duration::from_micros(longest.max().unwrap_or(0)), key));
    }
    gaps.sort_unstable();
    gaps.reverse();
    gaps
}

fn is_read(operation: &Operation) -> bool {
    operation.call == Call::Read
}

fn is_done(operation: &Operation) -> bool {
    !matches!(operation.end, None | Some((_, Outcome::Refused)))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_refused =
            |operation: &Operation| matches!(operation.end, Some((_, Outcome::Refused)));
        writeln!(f, "seed {}, {:?} of faults, {}", self.seed, self.span, self.place)?;
        let reads = self.count(|it| is_read(it) && is_done(it));
        let writes = self.count(|it| !is_read(it) && is_done(it));
        let refused = self.count(is_refused);
        let unknown = self.count(|it| it.end.is_none());
        let all = self.seen.history.len();
        writeln!(
            f,
            "{all} operations: {reads} reads, {writes} writes, {refused} refused, {unknown} unknown"
        )?;
        let total: usize = self.faults.values().sum();
        writeln!(f, "{total} faults of {} kinds:", self.faults.len())?;
        for (kind, count) in &self.faults {
            writeln!(f, "  {count:>4} {kind}")?;
        }
        writeln!(f, "  {:>4} more drawn that could not be done then", self.drawn_in_vain)?;
        let gaps = gaps(&self.seen.history);
        let longest = gaps.iter().take(SHOWN_GAPS).map(|(gap, key)| format!("{gap:.2?} ({key})"));
        writeln!(f, "longest out of reach: {}", longest.collect::<Vec<_>>().join(", "))?;
        writeln!(f, "{}", self.seen.under_locks)?;
        for strange in self.seen.strange.iter().take(SHOWN) {
            writeln!(f, "strange: {strange}")?;
        }
        for mishap in self.mishaps.iter().take(SHOWN) {
            writeln!(f, "mishap: {mishap}")?;
        }
        match &self.rest {
            Ok(()) if self.interrupted => writeln!(f, "interrupted")?,
            Ok(()) => writeln!(f, "all came to rest, and every server gave every key")?,
            Err(why) => writeln!(f, "{why}")?,
        }
        writeln!(f, "{} (in {:.1?})", self.verdict, self.checking)?;
        f.write_str(if self.is_fine() { "PASS" } else { "FAIL" })
    }
}
