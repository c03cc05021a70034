//! A whole cluster on one machine: for a first look, for lessons, for tests.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a program around the shells"
)]

use clap::Parser;
use ringleader::gfs::messages::MasterRequest;
use ringleader::net::call::{Patience, Walked, walk};
use ringleader::net::children::{Daemon, program};
use ringleader::net::{daemon, listen};
use ringleader::view::View;
use ringleader::view::messages::{QueryView, ViewAnswer, ViewRequest};
use ringleader::wire::HostPort;
use ringleader::wire::address::PortRange;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::error::Error;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long the servers may take until every group is complete.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// How often we look at what we wait for.
const GLANCE: Duration = Duration::from_millis(20);

/// How long one look at the viewleader may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs a whole cluster on this machine: viewleaders and some servers, masters and some
/// chunkservers, on 127.0.0.1. Shows a short session, then stays until Ctrl-C or SIGTERM.
#[derive(Parser)]
#[command(name = "cluster", version, max_term_width = 100)]
struct Flags {
    /// How many servers
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    servers: u16,

    /// How many viewleaders: 3 go on when one fails, 5 when two do. It counts as long as the data
    /// directory is empty
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=9))]
    viewleaders: u16,

    /// How many chunkservers of the file system; with 0 there is no file system
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(0..=100))]
    chunkservers: u16,

    /// How many masters of the file system: 3 go on when one fails, 5 when two do. It counts as
    /// long as the data directory is empty
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=9))]
    masters: u16,

    /// Where the programs keep their data and their logs
    #[arg(long, value_name = "DIR", default_value = "./data")]
    data_dir: PathBuf,

    /// Leave after the session; the exit status says whether everything was right
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    daemon::run("cluster", || run(&flags))
}

fn run(flags: &Flags) -> Result<(), Box<dyn Error>> {
    let end = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&end))?;
    }
    let mut cluster = Cluster::default();
    let result = cluster.start(flags, &end).and_then(|()| {
        if end.load(Ordering::Relaxed) {
            return Ok(());
        }
        cluster.introduce(flags);
        cluster.session()?;
        if flags.chunkservers > 0 {
            cluster.file_session(flags)?;
        }
        if !flags.check {
            println("\nIt is yours now: Ctrl-C stops it.");
            cluster.watch(&end);
        }
        Ok(())
    });
    println("stopping");
    cluster.stop();
    result
}

fn println(line: &str) {
    daemon::print_line(line);
}

/// The programs that run: the viewleaders first, then the servers, then the file system.
#[derive(Default)]
struct Cluster {
    daemons: Vec<Daemon>,
    viewleaders: Vec<SocketAddrV4>,
    servers: usize,
    masters: Vec<SocketAddrV4>,
}

impl Cluster {
    fn start(&mut self, flags: &Flags, end: &AtomicBool) -> Result<(), Box<dyn Error>> {
        self.viewleaders =
            self.start_group(flags, "viewleader", PortRange::VIEWLEADER, flags.viewleaders)?;
        let viewleaders = self.viewleaders.clone();
        wait_for_view(&viewleaders, "a viewleader to lead", end, |_| true)?;
        for number in 1..=flags.servers {
            if end.load(Ordering::Relaxed) {
                return Ok(());
            }
            let name = format!("server-{number}");
            let arguments = [
                "--viewleader".to_owned(),
                list(&viewleaders),
                "--data-dir".to_owned(),
                flags.data_dir.join(&name).display().to_string(),
            ];
            let port = free_ports(PortRange::SERVER, 1)[0];
            self.start_one(flags, &name, "server", &listen_at(port), &arguments)?;
            self.servers += 1;
            // One after the other, so that each finds the widest gap in the ring.
            let joined = |view: &View| view.members.len() >= usize::from(number);
            wait_for_view(&viewleaders, &format!("{name} to join"), end, joined)?;
        }
        wait_for_view(&viewleaders, "the groups to be complete", end, View::is_at_rest)?;
        if flags.chunkservers > 0 { self.start_file_system(flags, end) } else { Ok(()) }
    }

    fn start_file_system(&mut self, flags: &Flags, end: &AtomicBool) -> Result<(), Box<dyn Error>> {
        self.masters = self.start_group(flags, "master", PortRange::MASTER, flags.masters)?;
        for number in 1..=flags.chunkservers {
            let name = format!("chunkserver-{number}");
            let arguments = [
                "--master".to_owned(),
                list(&self.masters),
                "--data-dir".to_owned(),
                flags.data_dir.join(&name).display().to_string(),
            ];
            let port = free_ports(PortRange::CHUNKSERVER, 1)[0];
            let place = ["127.0.0.1".to_owned(), port.to_string()];
            self.start_one(flags, &name, "chunkserver", &place, &arguments)?;
        }
        let count = u64::from(flags.chunkservers);
        let joined = |census: &Value| census["servers"].as_u64() >= Some(count);
        wait_for(&self.masters, &MasterRequest::Census {}, "the chunkservers", end, joined)
    }

    /// Starts `count` programs that keep one state together.
    fn start_group(
        &mut self,
        flags: &Flags,
        program: &str,
        range: PortRange,
        count: u16,
    ) -> Result<Vec<SocketAddrV4>, Box<dyn Error>> {
        let ports = free_ports(range, usize::from(count));
        let here = |port: &u16| SocketAddrV4::new(Ipv4Addr::LOCALHOST, *port);
        let addresses: Vec<SocketAddrV4> = ports.iter().map(here).collect();
        for (index, port) in ports.into_iter().enumerate() {
            let name = match count {
                1 => program.to_owned(),
                _ => format!("{program}-{}", index + 1),
            };
            let data_dir = flags.data_dir.join(&name).display().to_string();
            let mut arguments = vec!["--data-dir".to_owned(), data_dir];
            if count > 1 {
                arguments.extend(["--peers".to_owned(), list(&addresses)]);
            }
            self.start_one(flags, &name, program, &listen_at(port), &arguments)?;
        }
        Ok(addresses)
    }

    /// The first server.
    fn server(&self) -> &Daemon {
        &self.daemons[self.viewleaders.len()]
    }

    fn start_one(
        &mut self,
        flags: &Flags,
        name: &str,
        program: &str,
        place: &[String],
        arguments: &[String],
    ) -> Result<(), Box<dyn Error>> {
        let log = flags.data_dir.join(format!("{name}.log"));
        let echo = |name: &str, line: &str| println(&format!("[{name}] {line}"));
        let daemon = Daemon::start(name, program, &[place, arguments].concat(), &log, echo)?;
        self.daemons.push(daemon);
        Ok(())
    }

    /// Says who listens where, and what to type next.
    fn introduce(&self, flags: &Flags) {
        for daemon in &self.daemons {
            println(&format!("{:<14} {:<16} pid {}", daemon.name, daemon.address, daemon.id()));
        }
        println(&format!("logs: {}/*.log\n", flags.data_dir.display()));
        println("In another terminal:");
        println(&format!("  export RINGLEADER_VIEWLEADER={}", list(&self.viewleaders)));
        println(&format!("  export RINGLEADER_SERVER={}", self.server().address));
        if !self.masters.is_empty() {
            println(&format!("  export RINGLEADER_MASTER={}", list(&self.masters)));
        }
        println(&format!("  {} setr colour blue", program("client").display()));
        println(&format!("  kill -9 {}   # a server: nothing is lost", self.server().id()));
        if self.viewleaders.len() > 1 {
            println(&format!(
                "  kill -9 {}   # a viewleader: the others go on",
                self.daemons[0].id()
            ));
        }
        println(&format!("  {} --help", program("client").display()));
        if !self.masters.is_empty() {
            println(&format!("  {} --help", program("gfs").display()));
        }
        println("");
    }

    /// A short session through the real client, as a user would have it.
    fn session(&self) -> Result<(), Box<dyn Error>> {
        let ask = |command: &str| self.client(command);
        expect(ask("set apple green")?, "status", "ok")?;
        expect(ask("get apple")?, "value", "green")?;
        expect(ask("setr pear yellow")?, "status", "ok")?;
        expect(ask("getr pear")?, "value", "yellow")?;
        let servers = ask("query_servers")?;
        if servers["result"].as_array().map(Vec::len) != Some(self.servers) {
            return Err(format!("query_servers does not list every server: {servers}").into());
        }
        expect(ask("lock_get door me")?, "status", "granted")?;
        expect(ask("lock_release door me")?, "status", "ok")
    }

    /// A file goes into the file system and out again.
    fn file_session(&self, flags: &Flags) -> Result<(), Box<dyn Error>> {
        let (greeting, back) =
            (flags.data_dir.join("greeting.txt"), flags.data_dir.join("greeting.back"));
        fs::write(&greeting, "Hello from a file in three places.\n")?;
        // Nobody else's file is called so.
        let name = format!("greetings/{}", std::process::id());
        let shown = |path: &Path| path.display().to_string();
        self.gfs(&["put", &shown(&greeting), &name])?;
        self.gfs(&["ls", "greetings"])?;
        self.gfs(&["stat", &name])?;
        self.gfs(&["get", &name, &shown(&back)])?;
        self.gfs(&["cat", &name])?;
        if fs::read(&greeting)? != fs::read(&back)? {
            return Err(format!("{} is not what went in", back.display()).into());
        }
        self.gfs(&["rm", &name])?;
        self.gfs(&["census"])
    }

    /// Runs a command of the file system and shows it and what it printed.
    fn gfs(&self, arguments: &[&str]) -> Result<(), Box<dyn Error>> {
        println(&format!("$ gfs {}", arguments.join(" ")));
        let output = Command::new(program("gfs"))
            .args(["--master", &list(&self.masters)])
            .args(arguments)
            .output()?;
        let shown = [output.stderr, output.stdout].concat();
        if !shown.is_empty() {
            println(String::from_utf8_lossy(&shown).trim_end());
        }
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("gfs {}: {}", arguments[0], output.status).into()),
        }
    }

    /// Runs the client and shows what it was asked and what it answered.
    fn client(&self, command: &str) -> Result<Value, Box<dyn Error>> {
        println(&format!("$ client {command}"));
        let output = Command::new(program("client"))
            .args(["--viewleader", &list(&self.viewleaders)])
            .args(["--server", &self.server().address.to_string()])
            .args(command.split(' '))
            .output()?;
        let (reply, message) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        println(&format!("{}{}", message, reply.trim_end()));
        if !output.status.success() {
            return Err(format!("client {command}: {}", output.status).into());
        }
        Ok(serde_json::from_str(&reply)?)
    }

    /// Stays until the end; tells of a program that ends before.
    fn watch(&mut self, end: &AtomicBool) {
        while !end.load(Ordering::Relaxed) {
            self.daemons.retain_mut(|daemon| match daemon.ended() {
                None => true,
                Some(status) => {
                    let words = daemon.last_words();
                    println(&format!(
                        "{} has ended: {status}; its log ends:\n{words}",
                        daemon.name
                    ));
                    false
                }
            });
            std::thread::sleep(GLANCE);
        }
    }

    /// Stops the last one first: servers before those that lead them.
    fn stop(self) {
        for daemon in self.daemons.into_iter().rev() {
            daemon.stop();
        }
    }
}

/// The first free ports of `range`, and any others when there are too few.
fn free_ports(range: PortRange, count: usize) -> Vec<u16> {
    let here = |port| HostPort { host: "127.0.0.1".to_owned(), port };
    // All are held until all are found, so that they are different ones.
    let held = (0..count).filter_map(|_| {
        let in_range = listen::bind(&here(None), range);
        in_range.or_else(|_| listen::bind(&here(Some(0)), range)).ok()
    });
    let held: Vec<_> = held.collect();
    held.iter().filter_map(|listener| Some(listener.local_addr().ok()?.port())).collect()
}

/// Addresses with commas.
fn list(addresses: &[SocketAddrV4]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn listen_at(port: u16) -> [String; 2] {
    ["--listen".to_owned(), format!("127.0.0.1:{port}")]
}

fn wait_for_view(
    viewleaders: &[SocketAddrV4],
    what: &str,
    end: &AtomicBool,
    is_so: impl Fn(&View) -> bool,
) -> Result<(), Box<dyn Error>> {
    let look = ViewRequest::QueryView(QueryView::default());
    wait_for(viewleaders, &look, what, end, |answer: &ViewAnswer| is_so(&answer.view))
}

/// Asks one of `addresses` until the answer is as it should be.
fn wait_for<A: DeserializeOwned>(
    addresses: &[SocketAddrV4],
    look: &impl Serialize,
    what: &str,
    end: &AtomicBool,
    is_so: impl Fn(&A) -> bool,
) -> Result<(), Box<dyn Error>> {
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        let walked = walk(addresses, look, Patience::Each(LOOK_TIMEOUT)).0;
        let seen: Option<A> = match walked {
            Walked::Answer { body, .. } => Some(serde_json::from_slice(&body)?),
            _ => None,
        };
        if seen.is_some_and(|seen| is_so(&seen)) || end.load(Ordering::Relaxed) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("waited {} s in vain for {what}", READY_TIMEOUT.as_secs()).into());
        }
        std::thread::sleep(GLANCE);
    }
}

fn expect(reply: Value, field: &str, value: &str) -> Result<(), Box<dyn Error>> {
    if reply[field] == value {
        Ok(())
    } else {
        Err(format!("expected {field} to be {value:?}: {reply}").into())
    }
}
