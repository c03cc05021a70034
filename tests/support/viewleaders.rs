//! A group of viewleaders whose programs are killed, stopped, replaced and started
//! again.

use super::process::{Finished, PATIENCE, Program, free_ports, run, wait_until};
use super::systems::local;
use super::wire::{Reply, call};
use ringleader::wire::address::PortRange;
use serde_json::{Value, json};
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

/// Viewleaders on consecutive ports.
pub(crate) struct Viewleaders {
    first: u16,
    programs: Vec<Option<Program>>,
    flags: Vec<Vec<String>>,
    /// How many disks each has had.
    disks: Vec<usize>,
    data: TempDir,
}

impl Viewleaders {
    /// Room for `count`, of which none runs.
    pub(crate) fn new(count: u16) -> Self {
        let count_of = usize::from(count);
        Self {
            first: free_ports(count),
            programs: (0..count).map(|_| None).collect(),
            flags: vec![Vec::new(); count_of],
            disks: vec![0; count_of],
            data: tempfile::tempdir().unwrap(),
        }
    }

    /// A group of `count` that has a leader.
    pub(crate) fn start(count: u16) -> Self {
        let mut group = Self::new(count);
        let peers = group.list(0..usize::from(count));
        for index in 0..usize::from(count) {
            group.run(index, &["--peers", &peers]);
        }
        group.leader();
        group
    }

    pub(crate) fn at(&self, index: usize) -> SocketAddrV4 {
        local(self.first + index as u16)
    }

    /// Their ports, those that don't run included.
    pub(crate) fn ports(&self) -> PortRange {
        PortRange { first: self.first, count: self.programs.len() as u16 }
    }

    /// Addresses with commas.
    pub(crate) fn list(&self, which: impl Iterator<Item = usize>) -> String {
        which.map(|index| self.at(index).to_string()).collect::<Vec<_>>().join(",")
    }

    /// All of them, with commas.
    pub(crate) fn all(&self) -> String {
        self.list(0..self.programs.len())
    }

    fn folder(&self, index: usize) -> PathBuf {
        self.data.path().join(format!("viewleader-{index}-{}", self.disks[index]))
    }

    // ---- they come and go ----

    /// The command that starts one, with `flags`.
    pub(crate) fn command(&self, index: usize, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_viewleader"));
        command.args(["--listen", &self.at(index).to_string()]).args(flags);
        command.arg("--data-dir").arg(self.folder(index));
        command
    }

    /// Starts one with `flags`, and waits until it listens.
    pub(crate) fn run(&mut self, index: usize, flags: &[&str]) {
        self.flags[index] = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let name = format!("viewleader {}", self.at(index));
        let mut program = Program::start(&name, &mut self.command(index, flags));
        program.listening();
        self.programs[index] = Some(program);
    }

    /// Starts one again, as it was.
    pub(crate) fn restart(&mut self, index: usize) {
        let flags = self.flags[index].clone();
        self.run(index, &flags.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Ends one with a signal.
    pub(crate) fn end(&mut self, index: usize, signal: &str) -> Finished {
        let program = self.programs[index].take().expect("one that runs");
        program.signal(signal);
        program.finish(PATIENCE)
    }

    pub(crate) fn signal(&self, index: usize, signal: &str) {
        self.programs[index].as_ref().expect("one that runs").signal(signal);
    }

    /// From now on, its disk is an empty one.
    pub(crate) fn lose_disk(&mut self, index: usize) {
        self.disks[index] += 1;
    }

    /// What it has said on standard error.
    pub(crate) fn said(&self, index: usize) -> String {
        self.programs[index].as_ref().map(Program::stderr).unwrap_or_default()
    }

    /// What it has printed.
    pub(crate) fn printed(&self, index: usize) -> String {
        self.programs[index].as_ref().map(Program::stdout).unwrap_or_default()
    }

    // ---- how they are ----

    /// The one that leads, if one that runs says so.
    pub(crate) fn leader_now(&self) -> Option<usize> {
        let runs = |index: &usize| self.programs[*index].is_some();
        (0..self.programs.len()).filter(runs).find(|index| {
            let reply = call(self.at(*index), &json!({"cmd": "query_servers"}));
            matches!(reply, Reply::Value(reply) if reply["error"].is_null())
        })
    }

    /// Waits until one leads.
    pub(crate) fn leader(&self) -> usize {
        wait_until("a viewleader leads", PATIENCE, || self.leader_now())
    }

    /// What the leader says of all viewleaders.
    pub(crate) fn health(&self) -> Vec<Value> {
        let leader = self.at(self.leader());
        match call(leader, &json!({"cmd": "status"})) {
            Reply::Value(reply) => reply["viewleaders"].as_array().cloned().unwrap_or_default(),
            _ => Vec::new(),
        }
    }

    /// Waits until exactly these are in the group, vote, and answer.
    pub(crate) fn wait_until_voting(&self, which: &[usize]) {
        let mut due: Vec<String> = which.iter().map(|index| self.at(*index).to_string()).collect();
        due.sort_unstable();
        wait_until("all viewleaders vote and answer", PATIENCE, || {
            let health = self.health();
            let well = |one: &&Value| one["role"] != "learner" && one["answers"] == true;
            let mut seen: Vec<String> = health
                .iter()
                .filter(well)
                .filter_map(|one| one["address"].as_str().map(str::to_owned))
                .collect();
            seen.sort_unstable();
            (seen == due && health.len() == due.len()).then_some(())
        });
    }

    /// Our client, told of all of them.
    pub(crate) fn client(&self, arguments: &[&str]) -> Finished {
        self.client_within("30", arguments)
    }

    /// The same, which tries for so many seconds.
    pub(crate) fn client_within(&self, seconds: &str, arguments: &[&str]) -> Finished {
        let mut command = Command::new(env!("CARGO_BIN_EXE_client"));
        command.args(["--viewleader", &self.all(), "--timeout", seconds]).args(arguments);
        run("client", &mut command)
    }

    /// # Panics
    /// If one of them has ended or panicked.
    pub(crate) fn assert_sound(&mut self) {
        for program in self.programs.iter_mut().flatten() {
            program.assert_running();
            let said = program.stderr();
            assert!(!said.contains("panicked"), "{said}");
        }
    }
}
