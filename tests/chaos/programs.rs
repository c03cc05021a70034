//! The processes: viewleaders and servers, their disks, and what becomes of them.

use super::LEASE;
use super::faults::{self, MAX_SERVERS, MIN_SERVERS, SMALL_DISKS, VIEWLEADERS};
use super::network::{self, Network};
use super::process::{Program, within};
use super::replacing::Replacing;
use ringleader::net::call::Caller;
use ringleader::view::View;
use ringleader::view::messages::ViewAnswer;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The size of a small disk; the store keeps 256 MiB of it free.
const SMALL_DISK: &str = "size=400m";

/// What fills it.
const BALLAST: &str = "200M";

/// How long a question to a program may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// One program, or its disk while it does not run.
struct Node {
    address: SocketAddrV4,
    folder: PathBuf,
    program: Option<Program>,
    paused: bool,
    /// It was told to leave: it may end by itself.
    leaves: bool,
    /// A viewleader that was started to join a group, rather than to found one.
    joins: bool,
    /// What it said in its earlier lives.
    log: String,
}

/// All of them, by number.
pub(crate) struct Programs {
    /// Where the links can be cut.
    pub(crate) network: Network,
    folder: PathBuf,
    nodes: BTreeMap<usize, Node>,
    /// The viewleader that is being replaced; one at a time.
    replacing: Option<Replacing>,
    mishaps: Vec<String>,
    /// The logs of those that are gone for good.
    gone: Vec<(String, String)>,
    data: TempDir,
}

impl Programs {
    /// Starts the programs in `folder`: viewleaders and `servers` servers.
    pub(crate) fn start(folder: PathBuf, network: Network, servers: usize) -> Self {
        let (data, nodes) = (tempfile::tempdir().unwrap(), BTreeMap::new());
        let (mishaps, gone) = (Vec::new(), Vec::new());
        let replacing = None;
        let mut programs = Self { network, folder, nodes, replacing, mishaps, gone, data };
        for number in 0..VIEWLEADERS {
            programs.make_room(number);
        }
        // Each is told of all the others.
        (0..VIEWLEADERS).for_each(|number| programs.run(number));
        (0..servers).for_each(|_| programs.add());
        programs
    }

    /// Starts one program more, in the first place that is free.
    fn add(&mut self) {
        let number = (0..).find(|number| !self.nodes.contains_key(number)).unwrap();
        self.make_room(number);
        self.run(number);
    }

    /// A place and a disk for the program `number`.
    fn make_room(&mut self, number: usize) {
        let address = self.network.place(number);
        let folder = self.data.path().join(faults::name(number));
        let is_new = fs::create_dir(&folder).is_ok();
        if is_new && self.network.can_cut() && SMALL_DISKS.contains(&number) {
            let at = folder.to_str().unwrap();
            network::run("mount", &["-t", "tmpfs", "-o", SMALL_DISK, "tmpfs", at]);
        }
        let log = String::new();
        let (paused, leaves, joins) = (false, false, false);
        let node = Node { address, folder, program: None, paused, leaves, joins, log };
        self.nodes.insert(number, node);
    }

    fn run(&mut self, number: usize) {
        let leads = faults::leads(number);
        let path = self.folder.join(if leads { "viewleader" } else { "server" });
        let mut command = self.network.command(number, &path);
        let viewleaders: Vec<String> = self.viewleaders().map(|at| at.to_string()).collect();
        let viewleaders = viewleaders.join(",");
        let node = self.nodes.get_mut(&number).unwrap();
        command.args(["--listen", &node.address.to_string()]);
        command.arg("--data-dir").arg(node.folder.join("data"));
        match (leads, node.joins) {
            (true, true) => command.arg("--join"),
            (true, false) => command.args(["--peers", &viewleaders]),
            (false, _) => {
                let lease = LEASE.as_secs_f64().to_string();
                command.args(["--viewleader", &viewleaders, "--lease", &lease])
            }
        };
        node.program = Some(Program::start(&faults::name(number), &mut command));
    }

    // ---- who is there ----

    /// The numbers of all that have a place, whether they run or not.
    pub(crate) fn present(&self) -> Vec<usize> {
        self.nodes.keys().copied().collect()
    }

    fn runs(&self, number: usize) -> bool {
        self.nodes.get(&number).is_some_and(|node| node.program.is_some() && !node.paused)
    }

    /// Where servers listen that clients may ask, whether they answer or not.
    pub(crate) fn serving(&self) -> Vec<SocketAddrV4> {
        let servers = self.nodes.iter().filter(|(number, _)| !faults::leads(**number));
        servers.map(|(_, node)| node.address).collect()
    }

    /// Where the viewleaders listen, whether they answer or not.
    pub(crate) fn viewleaders(&self) -> impl Iterator<Item = SocketAddrV4> {
        (0..VIEWLEADERS).map(|number| self.nodes[&number].address)
    }

    /// The number of the viewleader that leads, if it answers and says so.
    pub(crate) fn leader(&self) -> Option<usize> {
        (0..VIEWLEADERS).filter(|number| self.runs(*number)).find(|number| {
            let reply = ask(self.nodes[number].address, &json!({"cmd": "query_servers"}));
            reply.is_some_and(|reply| reply["error"].is_null())
        })
    }

    /// What the viewleader that leads answers, if one does.
    fn ask_leader(&self, request: &Value) -> Option<Value> {
        ask(self.nodes[&self.leader()?].address, request)
    }

    // ---- harm ----

    /// Kills those of them that run, in one go.
    pub(crate) fn kill(&mut self, who: &[usize]) -> bool {
        let who: Vec<usize> = who.iter().copied().filter(|number| self.runs(*number)).collect();
        let ids = who.iter().map(|number| self.nodes[number].program.as_ref().unwrap().id());
        let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
        if ids.is_empty() {
            return false;
        }
        // One that ends at this moment by itself is as good as killed.
        let _ = Command::new("kill").arg("-KILL").args(ids).output();
        for number in who {
            let node = self.nodes.get_mut(&number).unwrap();
            node.log += &node.program.take().unwrap().finish(super::process::PATIENCE).stderr;
        }
        true
    }

    /// Starts those of them that do not run.
    pub(crate) fn restart(&mut self, who: &[usize]) {
        for &number in who {
            if self.nodes.get(&number).is_some_and(|node| node.program.is_none()) {
                self.run(number);
            }
        }
    }

    /// Stops it where it stands.
    pub(crate) fn pause(&mut self, number: usize) -> bool {
        let runs = self.runs(number);
        if runs {
            self.signal(number, "STOP");
        }
        runs
    }

    /// Lets it go on.
    pub(crate) fn go_on(&mut self, number: usize) {
        if self.nodes.get(&number).is_some_and(|node| node.paused) {
            self.signal(number, "CONT");
        }
    }

    fn signal(&mut self, number: usize, signal: &str) {
        let node = self.nodes.get_mut(&number).unwrap();
        node.paused = signal == "STOP";
        if let Some(program) = &node.program {
            program.signal(signal);
        }
    }

    /// Fills its disk.
    pub(crate) fn fill(&mut self, number: usize) -> bool {
        let Some(node) = self.nodes.get(&number) else { return false };
        let ballast = node.folder.join("ballast");
        let fallocate = Command::new("fallocate").args(["-l", BALLAST]).arg(ballast).output();
        fallocate.is_ok_and(|output| output.status.success())
    }

    /// Makes room on its disk.
    pub(crate) fn empty(&mut self, number: usize) {
        if let Some(node) = self.nodes.get(&number) {
            let _ = fs::remove_file(node.folder.join("ballast"));
        }
    }

    /// Starts one server more, if there is room for it.
    pub(crate) fn join(&mut self) -> bool {
        let room = self.nodes.len() < VIEWLEADERS + MAX_SERVERS;
        if room {
            self.add();
        }
        room
    }

    /// Tells it to leave, if enough stay.
    pub(crate) fn drain(&mut self, number: usize) -> bool {
        let stay = self.nodes.values().filter(|node| !node.leaves).count() - VIEWLEADERS;
        let Some(address) = self.nodes.get(&number).map(|node| node.address) else { return false };
        if stay <= MIN_SERVERS {
            return false;
        }
        let request = json!({"cmd": "drain", "server": address.to_string()});
        // Without an answer it may have been told all the same.
        self.nodes.get_mut(&number).unwrap().leaves = true;
        self.ask_leader(&request).is_some_and(|reply| reply["status"] == "ok")
    }

    /// Begins to replace a viewleader, unless another one is being replaced. It is removed
    /// from its group first, or just loses its disk.
    pub(crate) fn replace(&mut self, number: usize, is_removed_first: bool) -> bool {
        if self.replacing.is_some() {
            return false;
        }
        let replacing = Replacing::new(number, is_removed_first);
        if !is_removed_first {
            self.erase(number, false);
        }
        self.replacing = Some(replacing);
        true
    }

    /// Kills a viewleader and starts it again over an empty disk.
    fn erase(&mut self, number: usize, joins: bool) {
        self.go_on(number);
        self.kill(&[number]);
        let node = self.nodes.get_mut(&number).unwrap();
        node.joins = joins;
        fs::remove_dir_all(node.folder.join("data")).unwrap();
        self.run(number);
    }

    /// Goes on with replacing a viewleader.
    fn go_on_replacing(&mut self) {
        let Some(mut replacing) = self.replacing.take() else { return };
        let viewleaders: Vec<SocketAddrV4> = self.viewleaders().collect();
        let number = replacing.number;
        if replacing.look(&self.folder, &viewleaders, self.nodes[&number].address) {
            self.erase(number, true);
        }
        self.replacing = Some(replacing).filter(|it| !it.is_over());
    }

    /// Notes who has ended by itself, and goes on with what takes longer.
    pub(crate) fn look(&mut self) {
        self.go_on_replacing();
        let ended: Vec<usize> = self
            .nodes
            .iter_mut()
            .filter_map(|(number, node)| node.program.as_mut()?.has_ended().then_some(*number))
            .collect();
        for number in ended {
            let node = self.nodes.get_mut(&number).unwrap();
            let finished = node.program.take().unwrap().finish(super::process::PATIENCE);
            node.log += &finished.stderr;
            if node.leaves && finished.code == Some(0) {
                let node = self.nodes.remove(&number).unwrap();
                self.network.leave(number);
                fs::remove_dir_all(node.folder.join("data")).unwrap();
                self.gone.push((faults::name(number), node.log));
            } else {
                let last: Vec<&str> = finished.stderr.lines().rev().take(3).collect();
                let how =
                    format!("{} ended by itself, status {:?}", faults::name(number), finished.code);
                self.mishaps.push(format!("{how}: {}", last.join(" / ")));
                self.run(number);
            }
        }
    }

    // ---- peace ----

    /// Makes everything good again.
    pub(crate) fn heal(&mut self) {
        self.network.mend_all();
        for number in self.present() {
            self.empty(number);
            self.go_on(number);
            self.restart(&[number]);
        }
    }

    /// Waits until exactly those that run are members and nothing is left to move.
    ///
    /// # Errors
    /// What the viewleader says instead.
    pub(crate) fn wait_until_at_rest(&mut self, patience: Duration) -> Result<(), String> {
        let rest = within(patience, || {
            self.look();
            if self.replacing.is_some() || !self.all_vote() {
                return None;
            }
            let view = view_of(self.nodes[&self.leader()?].address)?;
            let mut members: Vec<_> = view.own_members().map(|member| member.address).collect();
            let mut running = self.serving();
            members.sort_unstable();
            running.sort_unstable();
            let is_at_rest = view.is_at_rest() && !view.groups.is_empty();
            (members == running && is_at_rest).then_some(())
        });
        rest.ok_or_else(|| {
            let status = self.ask_leader(&json!({"cmd": "status"}));
            let status = status.map_or("no answer".to_owned(), |status| status.to_string());
            format!("not at rest after {patience:?} with {:?}: {status}", self.serving())
        })
    }

    /// Whether all viewleaders are in the group, vote and answer.
    fn all_vote(&self) -> bool {
        let status = self.ask_leader(&json!({"cmd": "status"})).unwrap_or_default();
        let Some(viewleaders) = status["viewleaders"].as_array() else { return false };
        let votes = |one: &Value| one["role"] != "learner" && one["answers"] == true;
        viewleaders.len() == VIEWLEADERS && viewleaders.iter().all(votes)
    }

    /// What happened that must not: programs that ended by themselves, or panicked.
    pub(crate) fn mishaps(&self) -> Vec<String> {
        let mut mishaps = self.mishaps.clone();
        for (name, log) in self.logs() {
            let panics = log.lines().filter(|line| line.contains("panicked"));
            mishaps.extend(panics.map(|line| format!("{name}: {line}")));
        }
        mishaps
    }

    /// What each has said.
    pub(crate) fn logs(&self) -> Vec<(String, String)> {
        let nodes = self.nodes.iter().map(|(number, node)| {
            let now = node.program.as_ref().map(Program::stderr).unwrap_or_default();
            (faults::name(*number), format!("{}{now}", node.log))
        });
        self.gone.iter().cloned().chain(nodes).collect()
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        for node in self.nodes.values_mut() {
            node.program = None;
        }
        // What is mounted in there goes with the namespace, but the folders under
        // it can't be removed before.
        for number in SMALL_DISKS.iter().filter(|_| self.network.can_cut()) {
            let folder = self.data.path().join(faults::name(*number));
            let _ = Command::new("umount").arg(folder).output();
        }
    }
}

fn ask(whom: SocketAddrV4, request: &Value) -> Option<Value> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let answer = Caller::connect(whom, deadline).ok()?.call(request, deadline).ok()?;
    serde_json::from_slice(&answer).ok()
}

fn view_of(viewleader: SocketAddrV4) -> Option<Arc<View>> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let mut caller = Caller::connect(viewleader, deadline).ok()?;
    let answer = caller.call(&json!({"cmd": "query_view"}), deadline).ok()?;
    Some(serde_json::from_slice::<ViewAnswer>(&answer).ok()?.view)
}
