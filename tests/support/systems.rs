//! Whole systems: ours, and the Python reference; one trait drives both.

use super::process::{PATIENCE, Program, free_ports, wait_until};
use super::wire::{Connection, Reply, call};
use ringleader::view::View;
use ringleader::view::messages::ViewAnswer;
use ringleader::wire::address::PortRange;
use serde_json::{Value, json};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Once};
use tempfile::TempDir;

/// A viewleader and some servers that run on this machine.
pub(crate) trait System {
    /// Where the viewleader listens.
    fn viewleader(&self) -> SocketAddrV4;

    /// Where the servers listen, in the order in which they were started.
    fn servers(&self) -> &[SocketAddrV4];

    /// What the server with this index has written to its standard output.
    fn printed(&self, server: usize) -> String;

    /// The system's own client, set to talk to the first server.
    fn client(&self, arguments: &[&str]) -> Command;
}

/// The answer to `query_servers`.
pub(crate) struct Listing {
    /// Address and hash of each server, as they were listed.
    pub(crate) servers: Vec<(SocketAddrV4, u64)>,
    /// The epoch in which this holds.
    pub(crate) epoch: u64,
}

impl Listing {
    /// What the viewleader at `viewleader` says now; `None` if it does not
    /// answer as one.
    pub(crate) fn of(viewleader: SocketAddrV4) -> Option<Self> {
        let Reply::Value(reply) = call(viewleader, &json!({"cmd": "query_servers"})) else {
            return None;
        };
        let server = |row: &Value| Some((row[0].as_str()?.parse().ok()?, row[1].as_u64()?));
        let servers = reply["result"].as_array()?.iter().map(server).collect::<Option<_>>()?;
        Some(Self { servers, epoch: reply["epoch"].as_u64()? })
    }

    /// Whether `server` is listed.
    pub(crate) fn has(&self, server: SocketAddrV4) -> bool {
        self.servers.iter().any(|(address, _)| *address == server)
    }
}

/// Waits until the viewleader lists exactly `servers` and each of them votes
/// with the epoch of that view: from then on an original client can `setr`.
pub(crate) fn wait_until_settled(viewleader: SocketAddrV4, servers: &[SocketAddrV4]) {
    let votes_with = |server: SocketAddrV4, epoch: u64| {
        let vote = call(server, &json!({"cmd": "setr_request", "key": "is it settled?"}));
        call(server, &json!({"cmd": "setr_deny", "key": "is it settled?"}));
        matches!(vote, Reply::Value(vote) if vote["reply"] == "ok" && vote["epoch"] == epoch)
    };
    wait_until("every server is listed and knows the epoch", PATIENCE, || {
        let listing = Listing::of(viewleader)?;
        let complete = listing.servers.len() == servers.len()
            && servers.iter().all(|server| listing.has(*server))
            && servers.iter().all(|server| votes_with(*server, listing.epoch));
        complete.then_some(())
    });
}

/// Port `port` of the loopback interface.
pub(crate) fn local(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

// ---- ours ----

/// Starts our viewleader on `port`; 0 stands for any.
///
/// Its data goes with the program.
pub(crate) fn our_viewleader(port: u16) -> Program {
    let data = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_viewleader"));
    command.args(["--listen", &local(port).to_string()]).arg("--data-dir").arg(data.path());
    Program::start("viewleader", &mut command).keeping(data)
}

/// Starts our server on `port`, 0 standing for any, with its data in `folder`.
pub(crate) fn our_server(viewleader: SocketAddrV4, port: u16, folder: &Path) -> Program {
    let mut command = Command::new(env!("CARGO_BIN_EXE_server"));
    command.args(["--listen", &local(port).to_string()]);
    command.args(["--viewleader", &viewleader.to_string()]);
    Program::start("server", command.arg("--data-dir").arg(folder))
}

/// Our client, about to run `arguments`.
pub(crate) fn our_client(
    viewleader: SocketAddrV4,
    server: SocketAddrV4,
    arguments: &[&str],
) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_client"));
    command.args(["--viewleader", &viewleader.to_string()]);
    command.args(["--server", &server.to_string()]);
    command.args(["--timeout", "10"]).args(arguments);
    command
}

/// A cluster of our programs, each with a data directory of its own.
pub(crate) struct Ours {
    viewleader: Program,
    servers: Vec<Program>,
    viewleader_address: SocketAddrV4,
    server_addresses: Vec<SocketAddrV4>,
    data: TempDir,
}

impl Ours {
    /// Starts a viewleader and `count` servers on any ports, and waits until
    /// they are ready.
    pub(crate) fn start(count: usize) -> Self {
        Self::start_on(0, &vec![0; count])
    }

    /// The same on these ports.
    pub(crate) fn start_on(viewleader_port: u16, server_ports: &[u16]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let mut viewleader = our_viewleader(viewleader_port);
        let viewleader_address = viewleader.listening();
        let start = |(index, port): (usize, &u16)| {
            our_server(viewleader_address, *port, &data.path().join(format!("server-{index}")))
        };
        let mut servers: Vec<Program> = server_ports.iter().enumerate().map(start).collect();
        let server_addresses: Vec<_> = servers.iter_mut().map(Program::listening).collect();
        wait_until_settled(viewleader_address, &server_addresses);
        wait_until_at_rest(viewleader_address, server_addresses.len());
        Self { viewleader, servers, viewleader_address, server_addresses, data }
    }
}

impl System for Ours {
    fn viewleader(&self) -> SocketAddrV4 {
        self.viewleader_address
    }

    fn servers(&self) -> &[SocketAddrV4] {
        &self.server_addresses
    }

    fn printed(&self, server: usize) -> String {
        self.servers[server].stdout()
    }

    fn client(&self, arguments: &[&str]) -> Command {
        our_client(self.viewleader_address, self.server_addresses[0], arguments)
    }
}

/// What our viewleader's view is now; `None` if it does not answer with one.
pub(crate) fn view_of(viewleader: SocketAddrV4) -> Option<Arc<View>> {
    let Reply::Value(reply) = call(viewleader, &json!({"cmd": "query_view"})) else { return None };
    // Through text: an identity is read as it is written.
    Some(serde_json::from_str::<ViewAnswer>(&reply.to_string()).ok()?.view)
}

/// Waits until our viewleader has `count` members and nothing is left to move.
pub(crate) fn wait_until_at_rest(viewleader: SocketAddrV4, count: usize) {
    wait_until("every group is at its target", PATIENCE, || {
        let view = view_of(viewleader)?;
        let own = view.own_members().count();
        (own == count && !view.groups.is_empty() && view.is_at_rest()).then_some(())
    });
}

// ---- the reference ----

/// How often the stand-ins' servers heartbeat, in seconds: a view change is
/// known to all of them after this. (The original waits 10 s.)
const STAND_IN_HEARTBEAT: &str = "0.3";

/// The three Python programs of the original protocol in one folder, and a
/// Python to run them with.
///
/// Every program is told its ports and its interface by the stand-ins'
/// environment variables (see tests/reference/README.md), which the real
/// originals don't know: those use their own port ranges.
pub(crate) struct Scripts {
    python: String,
    folder: PathBuf,
    heartbeat: Option<&'static str>,
}

impl Scripts {
    /// The stand-ins of tests/reference; `None`, with a notice, when there is
    /// no Python here.
    pub(crate) fn stand_ins() -> Option<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
        Self::within(folder, Some(STAND_IN_HEARTBEAT))
    }

    /// The originals, or whatever takes their place, in `folder`; `None`, with
    /// a notice, when there is no Python here.
    pub(crate) fn originals(folder: &Path) -> Option<Self> {
        Self::within(folder.to_owned(), None)
    }

    fn within(folder: PathBuf, heartbeat: Option<&'static str>) -> Option<Self> {
        let python = std::env::var("PYTHON").ok().filter(|name| !name.is_empty());
        let python = python.unwrap_or_else(|| "python3".to_owned());
        let works = Command::new(&python).arg("--version").output();
        if !works.is_ok_and(|output| output.status.success()) {
            // Past the test harness, which keeps what a passing test prints. Once
            // is enough: every test of the binary that needs a Python skips.
            static NOTICE: Once = Once::new();
            NOTICE.call_once(|| {
                let _ = writeln!(std::io::stderr(), "skipped: no {python} found");
            });
            return None;
        }
        for script in ["viewleader.py", "server.py", "client.py"] {
            let path = folder.join(script);
            assert!(path.is_file(), "the reference lacks {}", path.display());
        }
        Some(Self { python, folder, heartbeat })
    }

    /// The start of a command line for one of the scripts.
    fn command(&self, script: &str, viewleaders: PortRange, servers: PortRange) -> Command {
        let range = |ports: PortRange| format!("{}:{}", ports.first, ports.count);
        let mut command = self.python(Path::new(script));
        command
            .env("RINGLEADER_REFERENCE_BIND", "127.0.0.1")
            .env("RINGLEADER_REFERENCE_VIEWLEADER_PORTS", range(viewleaders))
            .env("RINGLEADER_REFERENCE_SERVER_PORTS", range(servers));
        command
    }

    /// The start of a command line for a script of the reference, or for any other.
    pub(crate) fn python(&self, script: &Path) -> Command {
        let mut command = Command::new(&self.python);
        command.arg(self.folder.join(script));
        // What a program prints is to be seen at once.
        command.env("PYTHONUNBUFFERED", "1").env("PYTHONDONTWRITEBYTECODE", "1");
        if let Some(seconds) = self.heartbeat {
            command.env("RINGLEADER_REFERENCE_HEARTBEAT", seconds);
        }
        command
    }

    /// Starts viewleader.py on the first free one of `ports`.
    pub(crate) fn viewleader(&self, ports: PortRange) -> Program {
        let mut command = self.command("viewleader.py", ports, PortRange::SERVER);
        Program::start("viewleader.py", &mut command)
    }

    /// Starts server.py on the first free one of `ports`, to heartbeat to the
    /// first of `viewleaders` that answers.
    pub(crate) fn server(&self, viewleaders: PortRange, ports: PortRange) -> Program {
        let mut command = self.command("server.py", viewleaders, ports);
        // The page on the original names this flag for the client alone.
        let source = std::fs::read_to_string(self.folder.join("server.py")).unwrap();
        if source.contains("--viewleader") {
            command.args(["--viewleader", "127.0.0.1"]);
        }
        Program::start("server.py", &mut command)
    }

    /// client.py, about to run `arguments`; it walks both port ranges.
    pub(crate) fn client(
        &self,
        viewleaders: PortRange,
        servers: PortRange,
        arguments: &[&str],
    ) -> Command {
        let mut command = self.command("client.py", viewleaders, servers);
        command.args(["--server", "127.0.0.1", "--viewleader", "127.0.0.1"]).args(arguments);
        command
    }

    /// A Python literal, such as a printed `dict`, as JSON.
    pub(crate) fn literal(&self, text: &str) -> Option<Value> {
        const PROGRAM: &str =
            "import ast, json, sys; print(json.dumps(ast.literal_eval(sys.argv[1])))";
        let output = Command::new(&self.python).args(["-c", PROGRAM, text]).output().ok()?;
        serde_json::from_slice(&output.stdout).ok()
    }
}

/// The range that is one port.
pub(crate) fn only(port: u16) -> PortRange {
    PortRange { first: port, count: 1 }
}

/// A viewleader and servers of the original protocol, in Python.
pub(crate) struct Reference {
    pub(crate) scripts: Scripts,
    viewleader: Program,
    servers: Vec<Program>,
    viewleader_address: SocketAddrV4,
    server_addresses: Vec<SocketAddrV4>,
    viewleader_ports: PortRange,
    server_ports: PortRange,
}

impl Reference {
    /// Starts `count` servers and a viewleader on free ports, which only the
    /// stand-ins can be told, and waits until they are ready.
    pub(crate) fn start(scripts: Scripts, count: u16) -> Self {
        let first = free_ports(1 + count);
        Self::start_on(scripts, only(first), PortRange { first: first + 1, count }, count)
    }

    /// The same on the port ranges of the original. Systems give these ports to
    /// outgoing connections, too, so that one of them may be busy for a while:
    /// the programs take the next one then.
    ///
    /// # Panics
    /// If somebody listens on one of the ports: the client would walk into a
    /// stranger.
    pub(crate) fn start_on_the_originals_ports(scripts: Scripts, count: u16) -> Self {
        for port in PortRange::VIEWLEADER.ports().chain(PortRange::SERVER.ports()) {
            let stranger = Connection::open(local(port)).is_some();
            assert!(!stranger, "somebody listens on port {port}: the reference needs it free");
        }
        Self::start_on(scripts, PortRange::VIEWLEADER, PortRange::SERVER, count)
    }

    fn start_on(
        scripts: Scripts,
        viewleader_ports: PortRange,
        server_ports: PortRange,
        count: u16,
    ) -> Self {
        // The originals don't say where they listen: it is to be seen from outside.
        let mut viewleader = scripts.viewleader(viewleader_ports);
        let viewleader_address = wait_until("viewleader.py answers", PATIENCE, || {
            viewleader.assert_running();
            viewleader_ports.ports().map(local).find(|address| Listing::of(*address).is_some())
        });
        let mut servers = Vec::new();
        let mut server_addresses = Vec::new();
        for _ in 0..count {
            let mut server = scripts.server(viewleader_ports, server_ports);
            server_addresses.push(wait_until("server.py is listed", PATIENCE, || {
                server.assert_running();
                let listed = Listing::of(viewleader_address)?.servers.into_iter();
                listed
                    .map(|(address, _)| address)
                    .find(|address| !server_addresses.contains(address))
            }));
            servers.push(server);
        }
        wait_until_settled(viewleader_address, &server_addresses);
        Self {
            scripts,
            viewleader,
            servers,
            viewleader_address,
            server_addresses,
            viewleader_ports,
            server_ports,
        }
    }
}

impl System for Reference {
    fn viewleader(&self) -> SocketAddrV4 {
        self.viewleader_address
    }

    fn servers(&self) -> &[SocketAddrV4] {
        &self.server_addresses
    }

    fn printed(&self, server: usize) -> String {
        self.servers[server].stdout()
    }

    fn client(&self, arguments: &[&str]) -> Command {
        self.scripts.client(self.viewleader_ports, self.server_ports, arguments)
    }
}
