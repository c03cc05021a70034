//! What a person at a terminal is shown instead of a line of JSON.

use crate::view::messages::{ArcHealth, Health, RebalanceStatus, Role};
use indicatif::{ProgressBar, ProgressStyle};
use std::fmt::Write;
use std::time::Duration;

/// The cluster at a glance, as lines of text.
pub fn health(health: &Health) -> String {
    let mut text = format!(
        "epoch {}, {} servers, {} arcs: {} complete, {} short, {} moving, {} lost\n",
        health.epoch.0,
        health.servers.len(),
        health.arcs,
        health.complete,
        health.short.len(),
        health.moving.len(),
        health.lost.len()
    );
    if let Some(backup) = &health.restoring {
        let _ = writeln!(
            text,
            "being restored from the backup {backup}: it serves nobody until `client restore` is done"
        );
    }
    let _ = writeln!(
        text,
        "{:>5}  {:<21}  {:>8}  {:>7}  {:>7}",
        "place", "server", "lease", "primary", "replica"
    );
    for server in &health.servers {
        let _ = writeln!(
            text,
            "{:>5}  {:<21}  {:>6.1} s  {:>7}  {:>7}  {}",
            server.hash,
            server.address.to_string(),
            server.lease_left_ms as f64 / 1000.0,
            server.primary_of,
            server.replica_of,
            server.notes.join(", ")
        );
    }
    for viewleader in health.viewleaders.iter().filter(|_| health.viewleaders.len() > 1) {
        let role = match viewleader.role {
            Role::Leader => "leads",
            Role::Follower => "follows",
            Role::Learner => "catches up",
        };
        let silent = (!viewleader.answers).then(|| "does not answer".to_owned());
        let notes: Vec<String> = silent.into_iter().chain(viewleader.notes.clone()).collect();
        let _ = writeln!(
            text,
            "viewleader {:<21}  {role:<10}  {}",
            viewleader.address.to_string(),
            notes.join(", ")
        );
    }
    let lists = [
        ("short", &health.short, "waits for"),
        ("moving", &health.moving, "waits for"),
        ("lost", &health.lost, "was held by"),
    ];
    for (what, arcs, verb) in lists {
        for ArcHealth { arc: (start, end), ready, target, waits_for } in arcs {
            let servers: Vec<String> = waits_for.iter().map(ToString::to_string).collect();
            let _ = write!(text, "{what}: [{start},{end}) has {ready} of {target} replicas");
            if !servers.is_empty() {
                let _ = write!(text, ", {verb} {}", servers.join(", "));
            }
            text.push('\n');
        }
    }
    text.truncate(text.trim_end().len());
    text
}

/// A progress bar for so many steps, on standard error if that is a terminal.
#[derive(Debug)]
pub struct Walk(ProgressBar);

impl Walk {
    /// A walk of `length` steps, which are called so.
    pub fn new(length: u64, steps: &str) -> Self {
        let bar = ProgressBar::new(length);
        let look = format!("{{wide_bar}} {{pos}}/{{len}} {steps}  {{msg}}  {{eta}} to go");
        if let Ok(style) = ProgressStyle::with_template(&look) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// Shows how far it is, and how many keys that were.
    pub fn show(&self, step: u64, keys: u64) {
        self.0.set_position(step);
        self.0.set_message(format!("{keys} keys"));
    }

    /// Takes the bar away.
    pub fn end(self) {
        self.0.finish_and_clear();
    }
}

/// A progress bar on standard error.
#[derive(Debug)]
pub struct Progress(ProgressBar);

impl Default for Progress {
    fn default() -> Self {
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} keys  {msg}") {
            bar.set_style(style);
        }
        Self(bar)
    }
}

impl Progress {
    /// Shows how far it is by now.
    pub fn show(&self, status: &RebalanceStatus) {
        self.0.set_length(status.keys_moved + status.keys_left);
        self.0.set_position(status.keys_moved);
        let estimate = status.estimate_ms.map_or(String::new(), |millis| {
            format!(", {} s to go", Duration::from_millis(millis).as_secs())
        });
        self.0.set_message(format!("{} of {} arcs{estimate}", status.arcs_done, status.arcs));
    }

    /// Takes the bar away.
    pub fn end(self) {
        self.0.finish_and_clear();
    }
}
