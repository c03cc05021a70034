//! Where the programs run, and the links between them.
//!
//! With namespaces: this process stands in a network and mount namespace of its
//! own, entered by `unshare` when it began, with a bridge in it. Each program has
//! a namespace, held by a `sleep` that dies with this process, and one cable to
//! the bridge. Rules for the bridge say which packets it drops. So nothing has a
//! name outside, and when this process ends, however it does, all is gone with it.
//!
//! Delay is made by a proxy in the namespace of a program ([`delay`]): not every kernel
//! has `netem`.

use super::delay;
use super::faults;
use super::process::{PATIENCE, Program, free_ports, wait_until};
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// In namespaces, the first three numbers of every address; nobody else is there.
pub(crate) const SUBNET: [u8; 3] = [10, 77, 0];

/// Where servers and viewleaders listen there.
pub(crate) const SERVER_PORT: u16 = 38000;
pub(crate) const VIEWLEADER_PORT: u16 = 39000;

/// What tells this program that it is the proxy, and the delay in milliseconds.
pub(crate) const PROXY: &str = "--delay-proxy";

/// Where the clients are in it; the programs count from the next on.
const CLIENTS: u8 = 1;

/// One end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The program with this number.
    Program(usize),
    /// All clients.
    Clients,
}

/// Where the programs run.
pub(crate) enum Network {
    /// All on 127.0.0.1: links can't be cut. Why it is so, in a word.
    Loopback {
        /// In a word.
        why: String,
    },
    /// Each in a namespace of its own.
    Namespaces(Namespaces),
}

/// The namespaces and what is wrong with the links.
#[derive(Default)]
pub(crate) struct Namespaces {
    /// For each program, who holds its namespace.
    holders: BTreeMap<usize, Program>,
    /// By the number of the fault: the links that it cuts.
    cuts: BTreeMap<usize, Vec<(End, End)>>,
    /// By the number of the fault: of a hundred packets, so many are lost.
    losses: BTreeMap<usize, u32>,
    /// By the number of the fault: the program whose links are slow, and the proxy.
    delays: BTreeMap<usize, (usize, Program)>,
}

/// What makes namespaces possible, or why they aren't.
pub(crate) fn can_have_namespaces() -> Result<(), String> {
    let works = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if !works("unshare", &["--net", "--mount", "ip", "link", "add", "br0", "type", "bridge"]) {
        return Err("network namespaces need root, util-linux and iproute2".to_owned());
    }
    let rules = format!("table bridge chaos {{}}\n{}", delay::rules(address(CLIENTS)));
    if !works("unshare", &["--net", "sh", "-c", &format!("echo '{rules}' | nft -f -")]) {
        return Err("cutting links needs nft".to_owned());
    }
    Ok(())
}

/// Replaces this process by the same in namespaces of its own, `marker` set in its
/// environment; returns only if that can't be done.
pub(crate) fn enter_namespaces(marker: &str) -> std::io::Error {
    let this = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--"]).arg(this).args(std::env::args_os().skip(1));
    command.env(marker, "1").exec()
}

impl Network {
    /// A bridge in this process's own namespace; see [`enter_namespaces`].
    ///
    /// # Panics
    /// If the system refuses.
    pub(crate) fn namespaces() -> Self {
        run("ip", &["link", "set", "lo", "up"]);
        run("ip", &["link", "add", "br0", "type", "bridge"]);
        let here = format!("{}/24", address(CLIENTS));
        run("ip", &["addr", "add", &here, "dev", "br0"]);
        run("ip", &["link", "set", "br0", "up"]);
        Self::Namespaces(Namespaces::default())
    }

    /// Whether links can be cut, and disks mounted.
    pub(crate) fn can_cut(&self) -> bool {
        matches!(self, Self::Namespaces(_))
    }

    /// A place for the program `number`: where it will listen.
    pub(crate) fn place(&mut self, number: usize) -> SocketAddrV4 {
        match self {
            Self::Loopback { .. } => SocketAddrV4::new(Ipv4Addr::LOCALHOST, free_ports(1)),
            Self::Namespaces(namespaces) => namespaces.place(number),
        }
    }

    /// The command that runs `path` at the place of the program `number`. It is
    /// killed when this process dies, and hears nothing of a Ctrl-C.
    pub(crate) fn command(&self, number: usize, path: &Path) -> Command {
        let mut command = match self {
            Self::Loopback { .. } => Command::new(path),
            Self::Namespaces(namespaces) => {
                let mut command = Command::new("nsenter");
                let holder = namespaces.holders[&number].id().to_string();
                command.args(["-t", &holder, "-n", "setpriv", "--pdeathsig", "KILL"]).arg(path);
                command
            }
        };
        command.process_group(0);
        command
    }

    /// The place of the program `number` is not needed any more.
    pub(crate) fn leave(&mut self, number: usize) {
        if let Self::Namespaces(namespaces) = self {
            namespaces.delays.retain(|_, (of, _)| *of != number);
            namespaces.holders.remove(&number);
            // It may be gone already, with the namespace of its other end.
            let _ = Command::new("ip").args(["link", "delete", &cable(number)]).output();
        }
    }

    /// Cuts links on account of the fault `index`; false where that can't be.
    pub(crate) fn cut(&mut self, index: usize, links: Vec<(End, End)>) -> bool {
        let Self::Namespaces(namespaces) = self else { return false };
        namespaces.cuts.insert(index, links);
        namespaces.apply();
        true
    }

    /// Loses so many of a hundred packets on account of the fault `index`.
    pub(crate) fn lose(&mut self, index: usize, percent: u32) -> bool {
        let Self::Namespaces(namespaces) = self else { return false };
        namespaces.losses.insert(index, percent);
        namespaces.apply();
        true
    }

    /// Has everything from and to the program `number` take `delay` longer, each way, on
    /// account of the fault `index`; false where that can't be, or is so already.
    pub(crate) fn delay(&mut self, index: usize, number: usize, delay: Duration) -> bool {
        let Self::Namespaces(namespaces) = self else { return false };
        namespaces.delay(index, number, delay)
    }

    /// Makes good what was done on account of the fault `index`.
    pub(crate) fn mend(&mut self, index: usize) {
        if let Self::Namespaces(namespaces) = self {
            namespaces.cuts.remove(&index);
            namespaces.losses.remove(&index);
            namespaces.apply();
            if let Some((number, _proxy)) = namespaces.delays.remove(&index) {
                namespaces.inside(number, delay::NO_RULES);
            }
        }
    }

    /// Makes good everything.
    pub(crate) fn mend_all(&mut self) {
        if let Self::Namespaces(namespaces) = self {
            namespaces.cuts.clear();
            namespaces.losses.clear();
            namespaces.apply();
            for (number, _proxy) in std::mem::take(&mut namespaces.delays).into_values() {
                namespaces.inside(number, delay::NO_RULES);
            }
        }
    }
}

impl Namespaces {
    fn place(&mut self, number: usize) -> SocketAddrV4 {
        let mut hold = Command::new("unshare");
        hold.args(["--net", "setpriv", "--pdeathsig", "KILL", "sleep", "infinity"]);
        hold.process_group(0);
        let holder = Program::start(&format!("the namespace of {number}"), &mut hold);
        let pid = holder.id().to_string();
        let ours = fs::read_link("/proc/self/ns/net").unwrap();
        wait_until("a namespace is there", PATIENCE, || {
            let theirs = fs::read_link(format!("/proc/{pid}/ns/net")).ok()?;
            (theirs != ours).then_some(())
        });
        let ip = own_address(number);
        let (cable, subnet) = (cable(number), format!("{ip}/24"));
        run("ip", &["link", "add", &cable, "type", "veth", "peer", "name", "eth0", "netns", &pid]);
        run("ip", &["link", "set", &cable, "master", "br0", "up"]);
        let inside: [&[&str]; 3] = [
            &["addr", "add", &subnet, "dev", "eth0"],
            &["link", "set", "eth0", "up"],
            &["link", "set", "lo", "up"],
        ];
        for arguments in inside {
            run("nsenter", &[&["-t", &pid, "-n", "ip"], arguments].concat());
        }
        self.holders.insert(number, holder);
        SocketAddrV4::new(ip, if faults::leads(number) { VIEWLEADER_PORT } else { SERVER_PORT })
    }

    fn delay(&mut self, index: usize, number: usize, delay: Duration) -> bool {
        let is_slow = self.delays.values().any(|(of, _)| *of == number);
        let Some(holder) = self.holders.get(&number).filter(|_| !is_slow) else { return false };
        let (holder, group) = (holder.id().to_string(), delay::GROUP.to_string());
        let mut command = Command::new("nsenter");
        command.args(["-t", &holder, "-n", "setpriv", "--regid", &group, "--clear-groups"]);
        command.args(["--pdeathsig", "KILL"]).arg(std::env::current_exe().unwrap());
        command.args([PROXY, &delay.as_millis().to_string()]).process_group(0);
        let proxy = Program::start(&format!("the proxy of {}", faults::name(number)), &mut command);
        self.inside(number, &delay::rules(own_address(number)));
        self.delays.insert(index, (number, proxy));
        true
    }

    /// Has the namespace of the program `number` follow these rules.
    fn inside(&self, number: usize, rules: &str) {
        if let Some(holder) = self.holders.get(&number) {
            nft(&["nsenter", "-t", &holder.id().to_string(), "-n"], rules);
        }
    }

    /// Tells the bridge all that it is to drop, at one stroke.
    fn apply(&self) {
        let mut chains: [(&str, String); 3] =
            ["forward", "input", "output"].map(|hook| (hook, String::new()));
        for (from, to) in self.cuts.values().flatten() {
            let (chain, rule) = match (from, to) {
                (End::Program(from), End::Program(to)) => {
                    (0, format!("iifname {} oifname {}", cable(*from), cable(*to)))
                }
                (End::Program(from), End::Clients) => (1, format!("iifname {}", cable(*from))),
                (End::Clients, End::Program(to)) => (2, format!("oifname {}", cable(*to))),
                (End::Clients, End::Clients) => continue,
            };
            let _ = writeln!(chains[chain].1, "{rule} drop");
        }
        let mut rules =
            "table bridge chaos\ndelete table bridge chaos\ntable bridge chaos {\n".to_owned();
        for (hook, mut drops) in chains {
            for percent in self.losses.values() {
                let _ = writeln!(drops, "numgen random mod 100 < {percent} drop");
            }
            let _ =
                writeln!(rules, "chain {hook} {{ type filter hook {hook} priority 0;\n{drops}}}");
        }
        rules.push_str("}\n");
        nft(&[], &rules);
    }
}

/// Has the kernel follow `rules`, wherever `there` leads.
fn nft(there: &[&str], rules: &str) {
    let words = [there, &["nft", "-f", "-"]].concat();
    let mut nft = Command::new(words[0]);
    let mut nft = nft.args(&words[1..]).stdin(Stdio::piped()).spawn().unwrap();
    nft.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success(), "nft refuses:\n{rules}");
}

/// The end of a program's cable at the bridge.
fn cable(number: usize) -> String {
    faults::name(number).replace("viewleader", "v-leader").replace("server", "v")
}

fn own_address(number: usize) -> Ipv4Addr {
    address(CLIENTS + 1 + u8::try_from(number).unwrap())
}

fn address(last: u8) -> Ipv4Addr {
    let [a, b, c] = SUBNET;
    Ipv4Addr::new(a, b, c, last)
}

/// Runs a command of the system.
///
/// # Panics
/// If it fails.
pub(crate) fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("can't run {program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {said}", arguments.join(" "));
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback { why } => {
                write!(f, "all on loopback ({why}): kill, stop and go on, join, drain")
            }
            Self::Namespaces(_) => f.write_str("each in a network namespace of its own"),
        }
    }
}
