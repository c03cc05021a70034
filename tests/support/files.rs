//! The file system as real processes: started, harmed, looked at.

use super::process::{Finished, PATIENCE, Program, free_ports, wait_until};
use super::systems::local;
use super::wire::{Reply, call};
use ringleader::gfs::FileName;
use ringleader::gfs::messages::Census;
use ringleader::net::files::FileClient;
use serde_json::json;
use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// One program and what it takes to start it again.
pub(crate) struct Node {
    pub(crate) port: u16,
    pub(crate) program: Option<Program>,
}

/// Masters and chunkservers, on ports and over disks that they keep.
pub(crate) struct System {
    pub(crate) masters: Vec<Node>,
    pub(crate) servers: Vec<Node>,
    pub(crate) flags: Vec<String>,
    pub(crate) data: TempDir,
}

impl System {
    /// One master, and so many chunkservers with these flags.
    pub(crate) fn start(count: usize, flags: &[&str]) -> Self {
        Self::with_masters(1, count, flags)
    }

    /// A group of masters, and so many chunkservers with these flags.
    pub(crate) fn with_masters(masters: usize, count: usize, flags: &[&str]) -> Self {
        let first = free_ports((masters + count) as u16);
        let node = |place: usize| Node { port: first + place as u16, program: None };
        let mut system = Self {
            masters: (0..masters).map(node).collect(),
            servers: (masters..masters + count).map(node).collect(),
            flags: flags.iter().map(|it| (*it).to_owned()).collect(),
            data: tempfile::tempdir().unwrap(),
        };
        (0..masters).for_each(|index| system.start_master(index));
        (0..count).for_each(|index| system.start_server(index));
        system.wait_for("all are here", |census| census.servers == count);
        system
    }

    pub(crate) fn start_master(&mut self, index: usize) {
        let peers = self.addresses();
        match self.masters.len() {
            1 => self.start_master_with(index, &[]),
            _ => self.start_master_with(index, &["--peers", &peers]),
        }
    }

    /// Starts a master that waits to be added.
    pub(crate) fn join_master(&mut self, index: usize) {
        self.start_master_with(index, &["--join"]);
    }

    fn start_master_with(&mut self, index: usize, flags: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_master"));
        let at = local(self.masters[index].port).to_string();
        command.args(["--listen", &at, "--repair-after", "1"]).args(flags);
        command.arg("--data-dir").arg(self.data.path().join(format!("master-{index}")));
        let mut program = Program::start(&format!("master {index}"), &mut command);
        program.listening();
        self.masters[index].program = Some(program);
    }

    pub(crate) fn start_server(&mut self, index: usize) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chunkserver"));
        let port = self.servers[index].port.to_string();
        command.args(["127.0.0.1", &port, "--master", &self.addresses()]);
        command.arg("--data-dir").arg(self.folder(index)).args(&self.flags);
        let mut program = Program::start(&format!("chunkserver {index}"), &mut command);
        program.listening();
        self.servers[index].program = Some(program);
    }

    pub(crate) fn kill_server(&mut self, index: usize) {
        let program = self.servers[index].program.take().unwrap();
        program.signal("KILL");
        program.finish(PATIENCE);
    }

    pub(crate) fn kill_master(&mut self, index: usize) {
        let program = self.masters[index].program.take().unwrap();
        program.signal("KILL");
        program.finish(PATIENCE);
    }

    /// Which master leads, once one does.
    pub(crate) fn leader(&self) -> usize {
        let leads = |index: &usize| {
            let census = json!({"cmd": "census"});
            let is_up = self.masters[*index].program.is_some();
            let answer = is_up.then(|| call(local(self.masters[*index].port), &census));
            matches!(answer, Some(Reply::Value(census)) if census.get("servers").is_some())
        };
        wait_until("a master leads", PATIENCE, || (0..self.masters.len()).find(leads))
    }

    /// The first master.
    pub(crate) fn at(&self) -> SocketAddrV4 {
        local(self.masters[0].port)
    }

    /// All masters, with commas.
    pub(crate) fn addresses(&self) -> String {
        let all: Vec<String> =
            self.masters.iter().map(|master| local(master.port).to_string()).collect();
        all.join(",")
    }

    pub(crate) fn folder(&self, index: usize) -> PathBuf {
        self.data.path().join(format!("chunkserver-{index}"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }

    pub(crate) fn client(&self) -> FileClient {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let name = NEXT.fetch_add(1, Ordering::Relaxed);
        let masters = self.addresses().split(',').map(|it| it.parse().unwrap()).collect();
        FileClient::new(masters, PATIENCE, name)
    }

    /// Begins a command of the client.
    pub(crate) fn begin(&self, arguments: &[&str]) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gfs"));
        command.args(["--master", &self.addresses(), "--timeout", "60"]).args(arguments);
        Program::start(&format!("gfs {}", arguments[0]), &mut command)
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Finished {
        self.begin(arguments).finish(PATIENCE)
    }

    pub(crate) fn census(&self) -> Option<Census> {
        let mut client = self.client();
        client.timeout = Duration::from_secs(2);
        client.census().ok()
    }

    pub(crate) fn wait_for(&self, what: &str, condition: impl Fn(&Census) -> bool) -> Census {
        wait_until(what, PATIENCE, || self.census().filter(|census| condition(census)))
    }

    /// Waits until every chunk has all its copies and nothing is left over.
    pub(crate) fn wait_until_at_rest(&self) -> Census {
        let servers = self.servers.iter().filter(|node| node.program.is_some()).count();
        self.wait_for("all is well", |it| {
            it.servers == servers
                && it.short.is_empty()
                && it.lost.is_empty()
                && it.copying == 0
                && it.orphans == 0
        })
    }
}

/// Whether the full sizes are asked for: `make test-long`.
pub(crate) fn is_long() -> bool {
    std::env::var_os("RINGLEADER_LONG").is_some()
}

pub(crate) fn name(text: &str) -> FileName {
    FileName::new(text).unwrap()
}

/// Bytes that repeat nowhere soon.
pub(crate) fn bytes(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..count).map(next).collect()
}

pub(crate) fn chunk_files(folder: &Path) -> Vec<PathBuf> {
    let folders = fs::read_dir(folder.join("chunks")).unwrap();
    let files = folders.flat_map(|it| fs::read_dir(it.unwrap().path()).unwrap());
    files.map(|file| file.unwrap().path()).collect()
}
