//! A whole cluster on one machine: for a first look, for lessons, for tests.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a program around the shells"
)]

use clap::Parser;
use ringleader::net::call::{Patience, Walked, walk};
use ringleader::net::children::{Daemon, program};
use ringleader::net::{daemon, listen};
use ringleader::view::View;
use ringleader::view::messages::{QueryView, ViewAnswer, ViewRequest};
use ringleader::wire::HostPort;
use ringleader::wire::address::PortRange;
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::error::Error;
use std::net::SocketAddrV4;
use std::path::PathBuf;
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

/// Runs a whole cluster on this machine: a viewleader and some servers, on
/// 127.0.0.1. Shows a short session, then stays until Ctrl-C or SIGTERM.
#[derive(Parser)]
#[command(name = "cluster", version, max_term_width = 100)]
struct Flags {
    /// How many servers
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    servers: u16,

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

/// The programs that run: the viewleader first.
#[derive(Default)]
struct Cluster {
    daemons: Vec<Daemon>,
}

impl Cluster {
    fn start(&mut self, flags: &Flags, end: &AtomicBool) -> Result<(), Box<dyn Error>> {
        let data_dir = flags.data_dir.join("viewleader").display().to_string();
        let arguments = ["--data-dir".to_owned(), data_dir];
        self.start_one(flags, "viewleader", "viewleader", PortRange::VIEWLEADER, &arguments)?;
        let viewleader = self.daemons[0].address;
        for number in 1..=flags.servers {
            if end.load(Ordering::Relaxed) {
                return Ok(());
            }
            let name = format!("server-{number}");
            let arguments = [
                "--viewleader".to_owned(),
                viewleader.to_string(),
                "--data-dir".to_owned(),
                flags.data_dir.join(&name).display().to_string(),
            ];
            self.start_one(flags, &name, "server", PortRange::SERVER, &arguments)?;
            // One after the other, so that each finds the widest gap in the ring.
            let joined = |view: &View| view.members.len() >= usize::from(number);
            wait_for_view(viewleader, &format!("{name} to join"), end, joined)?;
        }
        wait_for_view(viewleader, "the groups to be complete", end, View::is_at_rest)?;
        Ok(())
    }

    fn start_one(
        &mut self,
        flags: &Flags,
        name: &str,
        program: &str,
        range: PortRange,
        arguments: &[String],
    ) -> Result<(), Box<dyn Error>> {
        let listen = ["--listen".to_owned(), format!("127.0.0.1:{}", free_port(range))];
        let log = flags.data_dir.join(format!("{name}.log"));
        let echo = |name: &str, line: &str| println(&format!("[{name}] {line}"));
        let daemon = Daemon::start(name, program, &[&listen, arguments].concat(), &log, echo)?;
        self.daemons.push(daemon);
        Ok(())
    }

    /// Says who listens where, and what to type next.
    fn introduce(&self, flags: &Flags) {
        for daemon in &self.daemons {
            println(&format!("{:<12} {:<16} pid {}", daemon.name, daemon.address, daemon.id()));
        }
        println(&format!("logs: {}/*.log\n", flags.data_dir.display()));
        println("In another terminal:");
        println(&format!("  export RINGLEADER_VIEWLEADER={}", self.daemons[0].address));
        println(&format!("  export RINGLEADER_SERVER={}", self.daemons[1].address));
        println(&format!("  {} setr colour blue", program("client").display()));
        println(&format!("  kill -9 {}   # a server: nothing is lost", self.daemons[1].id()));
        println(&format!("  {} --help\n", program("client").display()));
    }

    /// A short session through the real client, as a user would have it.
    fn session(&self) -> Result<(), Box<dyn Error>> {
        let ask = |command: &str| self.client(command);
        expect(ask("set apple green")?, "status", "ok")?;
        expect(ask("get apple")?, "value", "green")?;
        expect(ask("setr pear yellow")?, "status", "ok")?;
        expect(ask("getr pear")?, "value", "yellow")?;
        let servers = ask("query_servers")?;
        if servers["result"].as_array().map(Vec::len) != Some(self.daemons.len() - 1) {
            return Err(format!("query_servers does not list every server: {servers}").into());
        }
        expect(ask("lock_get door me")?, "status", "granted")?;
        expect(ask("lock_release door me")?, "status", "ok")
    }

    /// Runs the client and shows what it was asked and what it answered.
    fn client(&self, command: &str) -> Result<Value, Box<dyn Error>> {
        println(&format!("$ client {command}"));
        let output = Command::new(program("client"))
            .args(["--viewleader", &self.daemons[0].address.to_string()])
            .args(["--server", &self.daemons[1].address.to_string()])
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

    /// Stops the servers, then the viewleader.
    fn stop(self) {
        for daemon in self.daemons.into_iter().rev() {
            daemon.stop();
        }
    }
}

/// The first free port of `range`, or 0 for any.
fn free_port(range: PortRange) -> u16 {
    let here = HostPort { host: "127.0.0.1".to_owned(), port: None };
    let free = listen::bind(&here, range).ok().and_then(|listener| listener.local_addr().ok());
    free.map_or(0, |address| address.port())
}

fn wait_for_view(
    viewleader: SocketAddrV4,
    what: &str,
    end: &AtomicBool,
    is_so: impl Fn(&View) -> bool,
) -> Result<(), Box<dyn Error>> {
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        let look = ViewRequest::QueryView(QueryView::default());
        let walked = walk(&[viewleader], &look, Patience::Each(LOOK_TIMEOUT)).0;
        let seen = match walked {
            Walked::Answer { body, .. } => Some(serde_json::from_slice::<ViewAnswer>(&body)?.view),
            _ => None,
        };
        if seen.is_some_and(|view| is_so(&view)) || end.load(Ordering::Relaxed) {
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
