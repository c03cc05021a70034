//! MooseFS, a file system after the same paper as ours: a master, chunkservers, and a
//! client that mounts it.
//!
//! Its programs refuse to meet at loopback addresses. So they run in a network and a
//! mount namespace of their own, with made-up addresses in it. A `sleep` holds both and
//! dies with this process, and then addresses and mount are gone. The load generator
//! stays outside and finds the mounted files through that `sleep`.
//!
//! It answers `fsync` when the data is in the memory of all chunkservers; it has no
//! setting by which it waits for their disks. So that a row compares the same thing,
//! the disks are seen to from here: at the end of a file, all chunks are synced at once
//! ([`MooseFs::sync_disks`]), which is the least that it could cost; for records that
//! are each durable, the kernel is told to sync whatever is written
//! ([`MooseFs::sync_each_write`]). The metadata is synced by its own setting.

use super::load::Client;
use super::process::{Program, within};
use super::programs::{Daemon, PATIENCE, is_installed};
use rustix::fs::{Advice, fadvise};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

/// How many chunkservers there are, and copies of everything.
const COPIES: usize = 3;

/// Where the master is in its namespace; the chunkservers have addresses of their own.
const MASTER: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);

/// Where it serves clients, and where chunkservers serve them: their usual ports.
const MASTER_PORT: u16 = 9421;
const SERVER_PORT: u16 = 9422;

/// After so many seconds the mounted file system fails, instead of waiting.
const MOUNT_PATIENCE_SECONDS: u64 = 60;

/// The metadata of a file system in which nothing is yet.
const NO_METADATA: &str = "MFSM NEW";

/// The file system, mounted. What depends on others is dropped before them.
pub(crate) struct MooseFs {
    mount: Daemon,
    servers: Vec<Daemon>,
    holder: Program,
    /// Where the mount is, as its own programs see it.
    inside: PathBuf,
    /// Where the chunkservers keep their chunks.
    disks: Vec<PathBuf>,
}

impl MooseFs {
    /// Starts a master and three chunkservers with their data in `folder`, and mounts
    /// what they serve.
    ///
    /// # Errors
    /// When they can't run here; the message says what is missing.
    pub(crate) fn start(folder: &Path) -> io::Result<Self> {
        can_run()?;
        let holder = hold()?;
        let master = start_master(&holder, &folder.join("mfsmaster"))?;
        let (mut servers, mut disks) = (vec![master], Vec::new());
        for number in 0..COPIES {
            let own = folder.join(format!("mfschunks{number}"));
            let disk = own.join("disk");
            servers.push(start_server(&holder, &own, &disk, address(number))?);
            disks.push(disk);
        }
        servers[0].wait_until(|| {
            let here = servers[0].said().matches("chunkserver register end").count();
            if here == COPIES { Ok(()) } else { Err(io::Error::other("chunkservers are missing")) }
        })?;
        let inside = folder.join("mnt");
        fs::create_dir_all(&inside)?;
        let mut command = within_namespaces(&holder, "mfsmount");
        let options = format!("mfsbind={MASTER},mfsnice=0,mfstimeout={MOUNT_PATIENCE_SECONDS}");
        command.args(["-f", "-H", &MASTER.to_string(), "-o", &options]).arg(&inside);
        let at = SocketAddrV4::new(MASTER, MASTER_PORT);
        let mount = Daemon::launch("mfsmount", command, at)?;
        let system = Self { mount, servers, holder, inside, disks };
        system.mount.wait_until(|| system.ask("mfssetgoal", &[&COPIES.to_string()], ""))?;
        system.check_copies()?;
        Ok(system)
    }

    /// Has one of its own tools do something with a mounted file; returns what it said.
    fn ask(&self, tool: &str, arguments: &[&str], file: &str) -> io::Result<String> {
        let mut command = within_namespaces(&self.holder, tool);
        let output = command.args(arguments).arg(self.inside.join(file)).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.success() {
            true => Ok(said),
            false => Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned())),
        }
    }

    /// That what is written has as many copies as ours.
    fn check_copies(&self) -> io::Result<()> {
        let mut file = self.create("probe")?;
        file.write_all(b"probe")?;
        file.sync_all()?;
        let copies = self.ask("mfsfileinfo", &[], "probe")?.matches("VALID").count();
        match copies {
            COPIES => Ok(()),
            _ => Err(io::Error::other(format!("MooseFS makes {copies} copies"))),
        }
    }

    /// The servers' processes. The client's is not among them: ours is a part of the
    /// load generator.
    pub(crate) fn processes(&self) -> Vec<u32> {
        self.servers.iter().map(Daemon::id).collect()
    }

    /// Where the mounted file `name` is, seen from this process.
    fn path(&self, name: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        let inside = self.inside.strip_prefix("/").unwrap_or(&self.inside);
        root.join(inside).join(name)
    }

    fn create(&self, name: &str) -> io::Result<File> {
        OpenOptions::new().append(true).create_new(true).open(self.path(name))
    }

    /// Waits until all that the chunkservers have written is on their disks.
    fn sync_disks(&self) -> io::Result<()> {
        thread::scope(|scope| {
            let disks: Vec<_> =
                self.disks.iter().map(|disk| scope.spawn(move || sync_chunks(disk))).collect();
            disks.into_iter().try_for_each(|it| it.join().map_err(|_| io::Error::other("panic"))?)
        })
    }

    /// From now on every write of a chunkserver is on its disk before it goes on.
    pub(crate) fn sync_each_write(&self) -> io::Result<()> {
        match Command::new("chattr").args(["-R", "+S"]).args(&self.disks).status()?.success() {
            true => Ok(()),
            false => Err(io::Error::other("durable appends need a folder on ext4")),
        }
    }

    /// A client that writes the new file `name` in pieces, and syncs it after the last.
    pub(crate) fn writer(&self, name: &str, piece: Vec<u8>, pieces: u64) -> io::Result<Writer<'_>> {
        Ok(Writer { system: self, file: self.create(name)?, piece, pieces })
    }

    /// A client that reads the file `name` in pieces of this size, and finds nothing of
    /// it in this machine's cache of mounted files.
    pub(crate) fn reader(&self, name: &str, piece_bytes: usize) -> io::Result<Reader> {
        let file = File::open(self.path(name))?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
        Ok(Reader { file, piece: vec![0; piece_bytes] })
    }

    /// A client that appends `record` to the new file `name`, and syncs it each time.
    pub(crate) fn appender(&self, name: &str, record: &'static [u8]) -> io::Result<Appender> {
        Ok(Appender { file: self.create(name)?, record })
    }
}

/// Says why it can't be run here, if it can't.
fn can_run() -> io::Result<()> {
    if !["mfsmaster", "mfschunkserver", "mfsmount"].iter().all(|it| is_installed(it.as_ref())) {
        return Err(io::Error::other(
            "MooseFS is not installed: \
             `apt-get install moosefs-master moosefs-chunkserver moosefs-client`",
        ));
    }
    let mut unshare = Command::new("unshare");
    unshare.args(["--net", "--mount", "ip", "link", "set", "lo", "up"]);
    match unshare.stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        _ => Err(io::Error::other("MooseFS runs in namespaces: needs root, and `ip`")),
    }
}

/// A chunkserver's address.
fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(MASTER.to_bits() + 10 + number as u32)
}

/// Makes the namespaces; they are there as long as the process is.
fn hold() -> io::Result<Program> {
    let mut script = "ip link set lo up\n".to_owned();
    for address in (0..COPIES).map(address).chain([MASTER]) {
        script += &format!("ip addr add {address}/32 dev lo\n");
    }
    script += "echo ready\nexec sleep infinity\n";
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "setpriv", "--pdeathsig", "KILL", "sh", "-ec", &script]);
    let holder = Program::start("namespaces for MooseFS", &mut command);
    match within(PATIENCE, || holder.stdout().contains("ready").then_some(())) {
        Some(()) => Ok(holder),
        None => Err(io::Error::other(format!("no namespaces: {}", holder.stderr()))),
    }
}

/// A program of MooseFS that runs in the namespaces.
fn within_namespaces(holder: &Program, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["-t", &holder.id().to_string(), "-n", "-m"]);
    command.args(["setpriv", "--pdeathsig", "KILL", program]);
    command
}

fn start_master(holder: &Program, own: &Path) -> io::Result<Daemon> {
    fs::create_dir_all(own)?;
    let (exports, topology) = (own.join("exports.cfg"), own.join("topology.cfg"));
    fs::write(own.join("metadata.mfs"), NO_METADATA)?;
    fs::write(&exports, "* / rw,alldirs,maproot=0\n")?;
    fs::write(&topology, "")?;
    let settings = format!(
        "EXPORTS_FILENAME = {}\nTOPOLOGY_FILENAME = {}\nMATOML_LISTEN_HOST = {MASTER}\n\
         MATOCS_LISTEN_HOST = {MASTER}\nMATOCL_LISTEN_HOST = {MASTER}\n\
         MATOCL_LISTEN_PORT = {MASTER_PORT}\nCHANGELOG_SAVE_MODE = 2\n",
        exports.display(),
        topology.display(),
    );
    let at = SocketAddrV4::new(MASTER, MASTER_PORT);
    let daemon = launch(holder, "mfsmaster", own, at, &settings)?;
    daemon.wait_until(|| match daemon.said().contains("initialized properly") {
        true => Ok(()),
        false => Err(io::Error::other("it does not say that it runs")),
    })?;
    Ok(daemon)
}

fn start_server(holder: &Program, own: &Path, disk: &Path, ip: Ipv4Addr) -> io::Result<Daemon> {
    fs::create_dir_all(disk)?;
    let disks = own.join("disks.cfg");
    fs::write(&disks, format!("{}\n", disk.display()))?;
    let settings = format!(
        "HDD_CONF_FILENAME = {}\nMASTER_HOST = {MASTER}\nBIND_HOST = {ip}\n\
         CSSERV_LISTEN_HOST = {ip}\nCSSERV_LISTEN_PORT = {SERVER_PORT}\n",
        disks.display(),
    );
    launch(holder, "mfschunkserver", own, SocketAddrV4::new(ip, SERVER_PORT), &settings)
}

/// Starts a daemon with these settings, and those that all have: it is no more
/// important than ours.
fn launch(
    holder: &Program,
    name: &'static str,
    own: &Path,
    at: SocketAddrV4,
    settings: &str,
) -> io::Result<Daemon> {
    let file = own.join("settings.cfg");
    let common = "WORKING_USER = root\nWORKING_GROUP = root\nNICE_LEVEL = 0\n";
    fs::write(&file, format!("{common}DATA_PATH = {}\n{settings}", own.display()))?;
    let mut command = within_namespaces(holder, name);
    command.arg("-f").arg("-c").arg(file).arg("start");
    Daemon::launch(name, command, at)
}

/// Syncs every chunk of one chunkserver. Those that were synced before cost nothing.
fn sync_chunks(disk: &Path) -> io::Result<()> {
    for folder in fs::read_dir(disk)? {
        let folder = folder?.path();
        if !folder.is_dir() {
            continue;
        }
        for chunk in fs::read_dir(folder)? {
            File::open(chunk?.path())?.sync_all()?;
        }
    }
    Ok(())
}

/// Writes a file in pieces.
pub(crate) struct Writer<'a> {
    system: &'a MooseFs,
    file: File,
    piece: Vec<u8>,
    pieces: u64,
}

impl Client for Writer<'_> {
    fn call(&mut self, number: u64, _: usize) -> io::Result<()> {
        self.file.write_all(&self.piece)?;
        if number + 1 == self.pieces {
            self.file.sync_all()?;
            self.system.sync_disks()?;
        }
        Ok(())
    }
}

/// Reads a file in pieces.
pub(crate) struct Reader {
    file: File,
    piece: Vec<u8>,
}

impl Client for Reader {
    fn call(&mut self, _: u64, _: usize) -> io::Result<()> {
        self.file.read_exact(&mut self.piece)
    }
}

/// Appends records to a file.
pub(crate) struct Appender {
    file: File,
    record: &'static [u8],
}

impl Client for Appender {
    fn call(&mut self, _: u64, _: usize) -> io::Result<()> {
        self.file.write_all(self.record)?;
        self.file.sync_all()
    }
}
