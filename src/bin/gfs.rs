//! The client of the file system: one command.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a program around the shells"
)]

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use ringleader::consensus::requests::{GroupRequest, Kind, Whom};
use ringleader::gfs::messages::{MasterRequest, Status};
use ringleader::gfs::{FileName, MAX_PIECE_BYTES};
use ringleader::net::files::{Failure, FileClient};
use ringleader::net::transfer::{self, Bar};
use ringleader::wire::HostPort;
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How long a command may be given with --timeout, in seconds.
const MAX_TIMEOUT: f64 = 86_400.0;

/// A client of the file system.
///
/// Exit status: 0 done; 1 the system says no (not there, exists); 2 wrong usage; 3
/// nobody answered; 4 it may or may not have been done; 5 a local file can't be
/// read or written.
#[derive(Parser)]
#[command(name = "gfs", version, max_term_width = 100)]
struct Flags {
    /// Where the master is: HOST or HOST:PORT; several with commas
    #[arg(
        long,
        global = true,
        value_name = "HOST[:PORT]",
        env = "RINGLEADER_MASTER",
        default_value = "localhost",
        value_delimiter = ','
    )]
    master: Vec<HostPort>,

    /// How long to try each step, in seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value = "30", value_parser = timeout)]
    timeout: f64,

    /// Print one line of JSON for each thing that is told
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Asked,
}

#[derive(Subcommand)]
enum Asked {
    /// Make an empty file
    Create {
        name: String,
        #[command(flatten)]
        form: Form,
    },
    /// Copy a local file into the system; it is there when all of it is
    Put {
        /// The local file
        local: PathBuf,
        /// What it is to be called
        name: String,
        #[command(flatten)]
        form: Form,
    },
    /// Copy a file out of the system
    Get {
        name: String,
        /// The local file; it is there when all of it is
        local: PathBuf,
    },
    /// Write a file to standard output
    Cat { name: String },
    /// Write standard input into a file
    Write {
        name: String,
        /// From this byte on
        #[arg(long, value_name = "BYTES", default_value_t = 0)]
        offset: u64,
    },
    /// Append standard input to a file as one record, exactly once; prints where it stands
    Append {
        name: String,
        /// Each line is a record
        #[arg(long)]
        lines: bool,
    },
    /// List the files, or those under a name
    Ls { under: Option<String> },
    /// Show what is known of a file
    Stat { name: String },
    /// Call a file, or all that lies under a name, otherwise
    Mv { from: String, to: String },
    /// Delete files; for a while they can be brought back
    Rm {
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Bring back the file of this name that was deleted last
    Undelete { name: String },
    /// Copy a file, or all that lies under a name, as it is at this moment
    Snapshot { from: String, to: String },
    /// Take a master into the group of masters, in place of one whose disk was lost, or as one more
    MasterAdd {
        /// Where it is reached; it was started with --join, or over an empty disk
        address: SocketAddrV4,
    },
    /// Take a master out of the group for good
    MasterRemove {
        /// Where it is reached
        address: SocketAddrV4,
    },
    /// Show whether all is well: files, chunks, copies, and what is short, lost or damaged
    Census,
    /// Print the completions of a shell: `gfs completions bash >> ~/.bashrc`
    Completions {
        /// Which shell
        shell: Shell,
    },
}

#[derive(clap::Args)]
struct Form {
    /// The size of its chunks, in bytes [default: 64 MiB]
    #[arg(long, value_name = "BYTES")]
    chunk: Option<u64>,
    /// How many copies of each chunk [default: as the master says]
    #[arg(long, value_name = "N")]
    copies: Option<u8>,
}

fn timeout(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= MAX_TIMEOUT => Ok(seconds),
        _ => Err(format!("a time-out is a number of seconds, above 0 and up to {MAX_TIMEOUT}")),
    }
}

/// Why a command was not done.
enum Trouble {
    System(Failure),
    Local(String),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::System(failure)
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Local(error.to_string())
    }
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let trouble = match run(flags) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(trouble) => trouble,
    };
    let (status, message) = match trouble {
        Trouble::System(failure @ Failure::No(_)) => (1, failure.to_string()),
        Trouble::System(failure @ Failure::Nobody(_)) => (3, failure.to_string()),
        Trouble::System(failure @ Failure::Unknown(_)) => (4, failure.to_string()),
        Trouble::Local(message) => (5, message),
    };
    let _ = writeln!(io::stderr(), "gfs: {message}");
    ExitCode::from(status)
}

fn run(flags: Flags) -> Result<(), Trouble> {
    let timeout = Duration::from_secs_f64(flags.timeout);
    let masters = flags.master;
    let new = || FileClient::new(masters.clone(), timeout, rand::random());
    let mut client = new();
    let json = flags.json;
    match flags.command {
        Asked::Create { name, form: Form { chunk, copies } } => {
            let name = checked(&name)?;
            let request = MasterRequest::Create { name, chunk_bytes: chunk, copies };
            done(&mut client, &request, json)
        }
        Asked::Put { local, name, form: Form { chunk, copies } } => {
            let name = checked(&name)?;
            let file = File::open(&local).map_err(|error| local_trouble(&local, &error))?;
            let length = file.metadata()?.len();
            let bar = Bar::new(length, !json && io::stderr().is_terminal());
            transfer::put(&new, &file, length, &name, chunk, copies, &bar)
                .map_err(|trouble| transfer_trouble(&local, trouble))?;
            bar.end();
            tell(json, &Moved { name: name.as_str(), bytes: length })
        }
        Asked::Get { name, local } => {
            let name = checked(&name)?;
            let length = client.stat(&name)?.length;
            let bar = Bar::new(length, !json && io::stderr().is_terminal());
            transfer::get(&new, &name, length, &local, &bar)
                .map_err(|trouble| transfer_trouble(&local, trouble))?;
            bar.end();
            tell(json, &Moved { name: name.as_str(), bytes: length })
        }
        Asked::Cat { name } => cat(&new, &mut client, &checked(&name)?),
        Asked::Write { name, offset } => write(&mut client, &checked(&name)?, offset, json),
        Asked::Append { name, lines } => append(&mut client, &checked(&name)?, lines, json),
        Asked::Ls { under } => {
            let under = under.map(|name| checked(&name)).transpose()?;
            ls(&mut client, under, json)
        }
        Asked::Stat { name } => {
            let stat = client.stat(&checked(&name)?)?;
            if json {
                return print(&stat);
            }
            line(&format!(
                "{}: {} bytes, {} chunks of {} bytes, {} copies of each",
                stat.file.name, stat.length, stat.file.chunks, stat.file.chunk_bytes, stat.copies
            ))
        }
        Asked::Mv { from, to } => {
            let request = MasterRequest::Rename { from: checked(&from)?, to: checked(&to)? };
            done(&mut client, &request, json)
        }
        Asked::Rm { names } => {
            for name in names {
                let request = MasterRequest::Delete { name: checked(&name)? };
                done(&mut client, &request, json)?;
            }
            Ok(())
        }
        Asked::Undelete { name } => {
            done(&mut client, &MasterRequest::Undelete { name: checked(&name)? }, json)
        }
        Asked::Snapshot { from, to } => {
            let request = MasterRequest::Snapshot { from: checked(&from)?, to: checked(&to)? };
            done(&mut client, &request, json)
        }
        Asked::MasterAdd { address } => {
            reshape(&mut client, GroupRequest::Add(Whom { address }), json)
        }
        Asked::MasterRemove { address } => {
            reshape(&mut client, GroupRequest::Remove(Whom { address }), json)
        }
        Asked::Census => {
            let census = client.census()?;
            if json {
                return print(&census);
            }
            line(&format!(
                "{} chunkservers, {} files ({} deleted), {} chunks with {} copies\n{} short, {} \
                 lost, {} being copied, {} to be deleted, {} found damaged",
                census.servers,
                census.files,
                census.deleted,
                census.chunks,
                census.copies,
                census.short.len(),
                census.lost.len(),
                census.copying,
                census.orphans,
                census.damaged.len()
            ))
        }
        Asked::Completions { shell } => {
            clap_complete::generate(shell, &mut Flags::command(), "gfs", &mut io::stdout());
            Ok(())
        }
    }
}

fn checked(name: &str) -> Result<FileName, Trouble> {
    FileName::new(name).map_err(|error| {
        Trouble::System(Failure::No(ringleader::wire::Refusal::invalid(error.to_string())))
    })
}

fn local_trouble(path: &std::path::Path, error: &io::Error) -> Trouble {
    Trouble::Local(format!("{}: {error}", path.display()))
}

fn transfer_trouble(path: &std::path::Path, trouble: transfer::Trouble) -> Trouble {
    match trouble {
        transfer::Trouble::System(failure) => Trouble::System(failure),
        transfer::Trouble::Local(error) => local_trouble(path, &error),
    }
}

/// What was moved in or out.
#[derive(Serialize)]
struct Moved<'a> {
    name: &'a str,
    bytes: u64,
}

/// Where a record stands.
#[derive(Serialize)]
struct Stands {
    offset: u64,
}

fn line(text: &str) -> Result<(), Trouble> {
    let mut out = io::stdout().lock();
    Ok(writeln!(out, "{text}").and_then(|()| out.flush())?)
}

fn print(value: &impl Serialize) -> Result<(), Trouble> {
    let text = serde_json::to_string(value).map_err(|error| Trouble::Local(error.to_string()))?;
    line(&text)
}

fn tell(json: bool, value: &impl Serialize) -> Result<(), Trouble> {
    if json { print(value) } else { Ok(()) }
}

fn done(client: &mut FileClient, request: &MasterRequest, json: bool) -> Result<(), Trouble> {
    let status: Status = client.ask(request, false)?;
    tell(json, &status)
}

/// Changes the group of masters. Asking twice is as good as asking once.
fn reshape(client: &mut FileClient, request: GroupRequest, json: bool) -> Result<(), Trouble> {
    let reply: serde_json::Value = client.ask(&request.to(Kind::MASTER), true)?;
    if reply["status"] == "unknown" {
        let refusal = ringleader::wire::Refusal::not_found("no master of the group is there");
        return Err(Failure::No(refusal).into());
    }
    tell(json, &reply)
}

fn cat(
    new: &dyn Fn() -> FileClient,
    client: &mut FileClient,
    name: &FileName,
) -> Result<(), Trouble> {
    let length = client.stat(name)?.length;
    let mut out = io::stdout().lock();
    transfer::read_all(new, name, length, |piece| out.write_all(piece))
        .map_err(|trouble| transfer_trouble("standard output".as_ref(), trouble))?;
    Ok(out.flush()?)
}

fn write(
    client: &mut FileClient,
    name: &FileName,
    mut offset: u64,
    json: bool,
) -> Result<(), Trouble> {
    let (mut input, mut total) = (io::stdin().lock(), 0);
    loop {
        let mut piece = Vec::new();
        input.by_ref().take(MAX_PIECE_BYTES as u64).read_to_end(&mut piece)?;
        if piece.is_empty() {
            return tell(json, &Moved { name: name.as_str(), bytes: total });
        }
        client.write(name, offset, &piece)?;
        offset += piece.len() as u64;
        total += piece.len() as u64;
    }
}

fn append(
    client: &mut FileClient,
    name: &FileName,
    lines: bool,
    json: bool,
) -> Result<(), Trouble> {
    let mut input = io::stdin().lock();
    loop {
        let mut record = Vec::new();
        if lines {
            input.read_until(b'\n', &mut record)?;
        } else {
            input.read_to_end(&mut record)?;
        }
        if record.is_empty() {
            return Ok(());
        }
        let offset = client.append(name, &record)?;
        if json {
            print(&Stands { offset })?;
        } else {
            line(&offset.to_string())?;
        }
    }
}

fn ls(client: &mut FileClient, under: Option<FileName>, json: bool) -> Result<(), Trouble> {
    let mut after = None;
    loop {
        let page = client.page(under.clone(), after)?;
        for file in &page.files {
            if json {
                print(file)?;
            } else {
                line(file.name.as_str())?;
            }
        }
        if !page.more {
            return Ok(());
        }
        after = page.files.last().map(|file| file.name.clone());
    }
}
