//! A cluster of ours whose programs are killed, stopped and started again over
//! their disks, on the ports that they had.

use super::keys::{assert_readable, getr, wait_until_placed};
use super::process::{Finished, PATIENCE, Program, free_ports, wait_until, within};
use super::systems::{Listing, local, view_of};
use super::traffic::Outcome;
use super::wire::{Reply, call};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Whether the tests are to take their full size: `make test-long`.
pub(crate) fn is_long() -> bool {
    std::env::var_os("RINGLEADER_LONG").is_some_and(|value| !value.is_empty())
}

/// A program that may run or not, and what it is started with.
struct Node {
    address: SocketAddrV4,
    folder: PathBuf,
    flags: Vec<String>,
    program: Option<Program>,
}

/// A viewleader and servers that come, go and come again.
pub(crate) struct Nodes {
    viewleader: Node,
    servers: Vec<Node>,
    /// What viewleaders that have ended had printed.
    printed: String,
    /// The servers' leases, in seconds.
    lease: f64,
    data: TempDir,
}

impl Node {
    fn start(&mut self, name: &str, viewleader: Option<SocketAddrV4>) {
        let path = match viewleader {
            None => env!("CARGO_BIN_EXE_viewleader"),
            Some(_) => env!("CARGO_BIN_EXE_server"),
        };
        let mut command = Command::new(path);
        command.args(["--listen", &self.address.to_string()]);
        command.args(viewleader.iter().flat_map(|at| ["--viewleader".to_owned(), at.to_string()]));
        command.arg("--data-dir").arg(&self.folder).args(&self.flags);
        self.program = Some(Program::start(&format!("{name} {}", self.address), &mut command));
    }

    fn program(&mut self) -> &mut Program {
        self.program.as_mut().expect("a program that runs")
    }

    /// Ends it with `signal` and returns what it left.
    fn end(&mut self, signal: &str) -> Finished {
        let program = self.program.take().expect("a program that runs");
        program.signal(signal);
        program.finish(PATIENCE)
    }
}

impl Nodes {
    /// A viewleader without servers; those that join ask for leases of `lease`
    /// seconds.
    pub(crate) fn new(lease: f64) -> Self {
        let data = tempfile::tempdir().unwrap();
        let folder = data.path().join("viewleader");
        let address = local(free_ports(1));
        let viewleader = Node { address, folder, flags: Vec::new(), program: None };
        let printed = String::new();
        let mut nodes = Self { viewleader, servers: Vec::new(), printed, lease, data };
        nodes.start_viewleader();
        nodes
    }

    /// A viewleader and `count` servers at rest.
    pub(crate) fn start(count: usize, lease: f64) -> Self {
        let mut nodes = Self::new(lease);
        nodes.join(count, &[]);
        nodes.wait_until_at_rest();
        nodes
    }

    // ---- who is there ----

    /// Where the viewleader listens.
    pub(crate) fn leader(&self) -> SocketAddrV4 {
        self.viewleader.address
    }

    /// Where the server with this index listens, if it runs.
    pub(crate) fn at(&self, index: usize) -> SocketAddrV4 {
        self.servers[index].address
    }

    /// The index of the server at `address`.
    pub(crate) fn index_of(&self, address: SocketAddrV4) -> usize {
        self.servers.iter().position(|node| node.address == address).expect("a server of ours")
    }

    /// The servers that run.
    pub(crate) fn running(&self) -> Vec<SocketAddrV4> {
        let running = self.servers.iter().filter(|node| node.program.is_some());
        running.map(|node| node.address).collect()
    }

    /// The data directory of the server with this index.
    pub(crate) fn folder(&self, index: usize) -> &Path {
        &self.servers[index].folder
    }

    /// A folder that goes with the cluster.
    pub(crate) fn data(&self) -> &Path {
        self.data.path()
    }

    /// What the server with this index has said.
    pub(crate) fn said(&mut self, index: usize) -> String {
        self.servers[index].program().stderr()
    }

    /// All that viewleaders have printed.
    pub(crate) fn printed(&mut self) -> String {
        let now = self.viewleader.program.as_ref().map(Program::stdout);
        format!("{}{}", self.printed, now.unwrap_or_default())
    }

    // ---- they come and go ----

    /// Starts `count` servers more, all together; returns the index of the first.
    pub(crate) fn join(&mut self, count: usize, flags: &[&str]) -> usize {
        let first = self.servers.len();
        for index in first..first + count {
            let folder = self.data.path().join(format!("server-{index}"));
            self.add(folder, flags);
        }
        for node in &mut self.servers[first..] {
            node.program().listening();
        }
        first
    }

    /// One more server, over `folder`; returns its index.
    pub(crate) fn add(&mut self, folder: PathBuf, flags: &[&str]) -> usize {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let flags = [vec!["--lease".to_owned(), self.lease.to_string()], flags].concat();
        let address = local(free_ports(1));
        let mut node = Node { address, folder, flags, program: None };
        node.start("server", Some(self.viewleader.address));
        self.servers.push(node);
        self.servers.len() - 1
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self, index: usize) {
        assert_eq!(self.servers[index].end("KILL").code, None, "a signal was to end it");
    }

    /// Kills all these servers at the same instant.
    pub(crate) fn kill_together(&mut self, indexes: &[usize]) {
        let ids = indexes.iter().map(|index| self.servers[*index].program().id());
        kill_at_once(&ids.collect::<Vec<_>>());
        for index in indexes {
            let ended = self.servers[*index].program.take().map(|it| it.finish(PATIENCE));
            assert_eq!(ended.and_then(|finished| finished.code), None);
        }
    }

    /// Sends a signal to the server with this index.
    pub(crate) fn signal(&mut self, index: usize, signal: &str) {
        self.servers[index].program().signal(signal);
    }

    /// Starts the server with this index again, over its disk.
    pub(crate) fn restart(&mut self, index: usize) {
        self.restart_unheard(index);
        self.servers[index].program().listening();
    }

    /// The same, without waiting until it listens.
    pub(crate) fn restart_unheard(&mut self, index: usize) {
        assert!(self.servers[index].program.is_none());
        let leader = self.viewleader.address;
        self.servers[index].start("server", Some(leader));
    }

    /// From now on, the server with this index listens elsewhere.
    pub(crate) fn give_new_port(&mut self, index: usize) {
        self.servers[index].address = local(free_ports(1));
    }

    /// Waits until the server with this index has ended by itself.
    pub(crate) fn wait_until_ended(&mut self, index: usize) -> Finished {
        self.try_until_ended(index).expect("it ends by itself")
    }

    /// The same; `None` if it does not end.
    pub(crate) fn try_until_ended(&mut self, index: usize) -> Option<Finished> {
        let ended = within(PATIENCE, || self.servers[index].program().has_ended().then_some(()));
        ended.map(|()| self.servers[index].program.take().unwrap().finish(PATIENCE))
    }

    /// `kill -9` of the viewleader.
    pub(crate) fn kill_viewleader(&mut self) {
        let finished = self.viewleader.end("KILL");
        self.printed += &finished.stdout;
    }

    /// Starts the viewleader over its disk.
    pub(crate) fn start_viewleader(&mut self) {
        self.viewleader.start("viewleader", None);
        self.viewleader.program().listening();
    }

    /// `kill -9` of everything, at the same instant.
    pub(crate) fn kill_everything(&mut self) {
        let running = self.servers.iter_mut().filter(|node| node.program.is_some());
        let all = running.chain([&mut self.viewleader]);
        kill_at_once(&all.map(|node| node.program().id()).collect::<Vec<_>>());
        let viewleader = self.viewleader.program.take().unwrap().finish(PATIENCE);
        self.printed += &viewleader.stdout;
        for program in self.servers.iter_mut().filter_map(|node| node.program.take()) {
            program.finish(PATIENCE);
        }
    }

    // ---- how they are ----

    /// One question to the viewleader without arguments.
    pub(crate) fn ask(&self, cmd: &str) -> Value {
        call(self.leader(), &json!({"cmd": cmd})).value()
    }

    /// The epoch by now.
    pub(crate) fn epoch(&self) -> u64 {
        self.ask("query_servers")["epoch"].as_u64().unwrap()
    }

    /// How many of those that are listed are members, whoever runs.
    pub(crate) fn listed(&self) -> usize {
        Listing::of(self.leader()).map_or(0, |listing| listing.servers.len())
    }

    /// Whether exactly the servers that run are members, and nothing is left to
    /// move.
    pub(crate) fn is_at_rest(&self) -> bool {
        let running: BTreeSet<_> = self.running().into_iter().collect();
        view_of(self.leader()).is_some_and(|view| {
            let members: BTreeSet<_> = view.own_members().map(|member| member.address).collect();
            members == running && !view.groups.is_empty() && view.is_at_rest()
        })
    }

    /// Waits for that, and until every server that runs answers what is asked of
    /// all of them. (A viewleader that was started again knows the members, but
    /// not whether they are there.)
    pub(crate) fn wait_until_at_rest(&self) {
        let answers = |at: &SocketAddrV4| {
            let probes = (0..20).map(|number| getr(&format!("is anybody there? {number}")));
            probes.into_iter().all(|probe| {
                matches!(call(*at, &probe), Reply::Value(reply) if reply["error"].is_null())
            })
        };
        let is_at_rest = || self.is_at_rest() && self.running().iter().all(answers);
        if within(PATIENCE, || (is_at_rest() && self.is_at_rest()).then_some(())).is_none() {
            let status = call(self.leader(), &json!({"cmd": "status"}));
            panic!("never at rest with {:?}: {status:?}", self.running());
        }
    }

    /// Waits for that in a cluster that serves nobody, as one that is being restored.
    pub(crate) fn wait_until_at_rest_unserved(&self) {
        wait_until("all is at rest", PATIENCE, || self.is_at_rest().then_some(()));
    }

    /// Waits until the server with this index is no member any more.
    pub(crate) fn wait_until_out(&self, index: usize) {
        let gone = self.at(index);
        wait_until("its lease has run out", PATIENCE, || {
            (!Listing::of(self.leader())?.has(gone)).then_some(())
        });
    }

    /// Nothing that runs has ended or panicked.
    pub(crate) fn assert_sound(&mut self) {
        let running = self.servers.iter_mut().filter(|node| node.program.is_some());
        for node in running.chain([&mut self.viewleader]) {
            node.program().assert_running();
            let said = node.program().stderr();
            assert!(!said.contains("panicked"), "{said}");
        }
    }

    /// At rest, all is where it must be, every server that runs answers for what
    /// was acknowledged, and nothing is there that was refused.
    pub(crate) fn assert_holds(&mut self, outcome: &Outcome) {
        self.wait_until_at_rest();
        let placed = wait_until_placed(self.leader());
        outcome.assert_explains(&placed);
        assert_readable(&self.running(), outcome.acknowledged.iter());
        self.assert_sound();
    }

    /// The answer of the server with this index, if it gives one.
    pub(crate) fn try_call(&self, index: usize, request: &Value) -> Option<Value> {
        match call(self.at(index), request) {
            Reply::Value(reply) => Some(reply),
            _ => None,
        }
    }
}

/// `kill -9` of all these processes, in one go.
fn kill_at_once(ids: &[u32]) {
    let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
    let mut kill = Command::new("sh");
    kill.arg("-c").arg(format!("kill -KILL {}", ids.join(" ")));
    assert!(kill.status().unwrap().success());
}

/// Copies the directory `from` with all that is in it.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        let target = to.join(file.file_name());
        if file.file_type().unwrap().is_dir() {
            copy_folder(&file.path(), &target);
        } else {
            fs::copy(file.path(), target).unwrap();
        }
    }
}
