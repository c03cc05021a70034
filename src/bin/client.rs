//! The client: one command, one reply.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(clippy::disallowed_methods, reason = "a program around the shells, which draws numbers")]

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use crossbeam_channel::bounded;
use ringleader::backup::Manifest;
use ringleader::kv::Version;
use ringleader::kv::content::Fence;
use ringleader::kv::messages::{Delete, Get, Setr};
use ringleader::kv::operation::{Command, Conclusion, Operation, Verdict};
use ringleader::net::ask::{Asker, exit_status};
use ringleader::net::backup::{self, Failure};
use ringleader::net::{daemon, display, lock_run, restore, threads};
use ringleader::view::Token;
use ringleader::view::locks::{MAX_TTL_MS, MIN_TTL_MS};
use ringleader::view::messages::{Health, LockCall, LockKeep, LockList, RebalanceStatus};
use ringleader::wire::{HostPort, Identity};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// How often `--watch` looks.
const WATCH_GLANCE: Duration = Duration::from_millis(200);

/// How long a client that waits for a lock lets the viewleader hold back an answer.
/// In between it looks whether the user wants to end.
const LOCK_WAIT: Duration = Duration::from_secs(1);

/// The exit status when a command can't be run, as a shell has it.
const CANNOT_RUN: u8 = 127;

/// How long a command may be given with --timeout, in seconds.
const MAX_TIMEOUT: f64 = 86_400.0;

/// A client of the replicated key-value store and its lock service.
///
/// The reply is printed on standard output as one line of JSON, messages on
/// standard error. Exit status: 0 done; 1 the system says no (not found,
/// unknown, denied); 2 wrong usage; 3 nobody answered; 4 it may or may not have
/// been done; 130 interrupted.
#[derive(Parser)]
#[command(name = "client", version, max_term_width = 100)]
struct Flags {
    /// Where servers are: HOST (ports 38000 to 38009 are tried) or HOST:PORT; several with commas
    #[arg(
        long,
        global = true,
        value_name = "HOST[:PORT]",
        env = "RINGLEADER_SERVER",
        default_value = "localhost",
        value_delimiter = ','
    )]
    server: Vec<HostPort>,

    /// Where viewleaders are: HOST (ports 39000 to 39009 are tried) or HOST:PORT; several with commas
    #[arg(
        long,
        global = true,
        value_name = "HOST[:PORT]",
        env = "RINGLEADER_VIEWLEADER",
        default_value = "localhost",
        value_delimiter = ','
    )]
    viewleader: Vec<HostPort>,

    /// How long to try, in seconds; waiting for a lock is not counted
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = timeout)]
    timeout: f64,

    #[command(subcommand)]
    command: Asked,
}

/// What a write depends on. If that is not so nothing is written, and the exit
/// status is 1.
#[derive(clap::Args)]
struct Condition {
    /// Only if the key is at this version, as `getr` shows it
    #[arg(long, value_name = "VERSION", value_parser = version)]
    if_version: Option<Version>,

    /// Only if there is no such key
    #[arg(long, conflicts_with = "if_version")]
    if_absent: bool,

    /// Only if nobody has written the key under a later grant of this lock
    #[arg(long, value_name = "LOCK:TOKEN", value_parser = fence)]
    fence: Option<Fence>,
}

impl Condition {
    fn version(&self) -> Option<Version> {
        self.if_version.or(self.if_absent.then(Version::default))
    }
}

fn version(text: &str) -> Result<Version, String> {
    text.parse()
}

fn fence(text: &str) -> Result<Fence, String> {
    let parts = text.rsplit_once(':');
    let (lock, token) = parts.ok_or("it is LOCK:TOKEN, as in jobs:17")?;
    let token = token.parse().map_err(|_| format!("{token:?} is not the number of a token"))?;
    Ok(Fence { lock: lock.into(), token: Token(token) })
}

#[derive(Subcommand)]
#[command(rename_all = "snake_case")]
enum Asked {
    /// Print words on a server's standard output
    Print {
        /// The words
        #[arg(
            required = true,
            value_name = "TEXT",
            trailing_var_arg = true,
            allow_hyphen_values = true
        )]
        text: Vec<String>,
    },
    /// Set a key on one server only
    ///
    /// The value goes into that server's own namespace: it is not replicated, and
    /// `getr` never sees it.
    Set {
        #[arg(allow_hyphen_values = true)]
        key: String,
        #[arg(allow_hyphen_values = true)]
        value: String,
    },
    /// Get a key from one server
    ///
    /// The server looks in its own namespace first, then for the replicated value.
    Get {
        #[arg(allow_hyphen_values = true)]
        key: String,
    },
    /// List the keys that one server holds, its own and the replicated ones
    #[command(name = "query_all_keys")]
    QueryAllKeys,
    /// Set a replicated key
    ///
    /// `ok` means that every replica has it, and that every later `getr`, from
    /// anywhere, returns this value or a newer one. Exit status 4 means that it
    /// may or may not have been set: read the key to find out.
    Setr {
        #[arg(allow_hyphen_values = true)]
        key: String,
        #[arg(allow_hyphen_values = true)]
        value: String,
        #[command(flatten)]
        condition: Condition,
    },
    /// Get a replicated key, and the version that it is at
    Getr {
        #[arg(allow_hyphen_values = true)]
        key: String,
    },
    /// Delete a replicated key
    ///
    /// `not_found` means that there was no such key.
    Delr {
        #[arg(allow_hyphen_values = true)]
        key: String,
        #[command(flatten)]
        condition: Condition,
    },
    /// List the servers: address and place on the ring of each, and the epoch
    #[command(name = "query_servers")]
    QueryServers,
    /// Get a lock, waiting for it if another holds it
    ///
    /// While another holds it, this says so and asks again every 5 seconds, or three times
    /// within its time to live if that is sooner. Ctrl-C leaves the queue. The reply tells the token of the grant, for `setr --fence`.
    #[command(name = "lock_get")]
    LockGet {
        /// The name of the lock
        lock: String,
        /// The name of whoever wants it; the same name may ask again
        client: String,
        /// Be told as soon as it is granted, instead of asking every 5 seconds
        #[arg(long)]
        wait: bool,
        /// Hold it together with others who share it
        #[arg(long)]
        shared: bool,
        /// Lose it after so long without a sign of life (lock_keep)
        #[arg(long, value_name = "SECONDS", value_parser = ttl)]
        ttl: Option<u64>,
    },
    /// Give a sign of life for a lock that was got with --ttl
    #[command(name = "lock_keep")]
    LockKeep {
        /// The name of the lock
        lock: String,
        /// The name of whoever holds it
        client: String,
        /// The token of the grant
        token: u64,
    },
    /// List locks: who holds them, with which tokens, and who waits
    #[command(name = "lock_list")]
    LockList {
        /// Only locks behind this one, in the order of their names
        #[arg(long, value_name = "LOCK")]
        after: Option<String>,
    },
    /// Run a command while holding a lock
    ///
    /// Waits for the lock, runs the command with RINGLEADER_LOCK and RINGLEADER_TOKEN in its
    /// environment, keeps the lock alive meanwhile, and gives it back. If the lock can't be
    /// kept the command is ended, with all that it has started, before it can be another's. The
    /// exit status is the command's; 128 and the number of the signal that has ended it; 4 if
    /// the lock was lost; 1 if it was not granted.
    #[command(name = "lock_run")]
    LockRun {
        /// The name of the lock
        lock: String,
        /// Hold it together with others who share it
        #[arg(long)]
        shared: bool,
        /// After so long without a sign of life the lock is another's
        #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = ttl)]
        ttl: u64,
        /// The name to hold it under [default: one that nobody else has]
        #[arg(long)]
        client: Option<String>,
        /// The command and its arguments, after --
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Release a lock, or leave its queue
    #[command(name = "lock_release")]
    LockRelease {
        /// The name of the lock
        lock: String,
        /// The name of whoever holds it or waits for it
        client: String,
    },
    /// Show the cluster at a glance: servers, leases, and which arcs are short, moving or lost
    ///
    /// A table on a terminal, else one line of JSON.
    Status {
        /// One line of JSON in any case
        #[arg(long)]
        json: bool,
    },
    /// Show how far the rebalancing is: arcs, keys, bytes, and the time that is left
    #[command(name = "rebalance_status")]
    RebalanceStatus {
        /// Stay until it is complete, with a progress bar on a terminal
        #[arg(long)]
        watch: bool,
    },
    /// Let a server leave: its data is moved elsewhere first, then its program ends
    Drain {
        /// Where the server listens, as `query_servers` lists it
        #[arg(id = "leaving", value_name = "IP:PORT")]
        server: SocketAddrV4,
    },
    /// Let a viewleader come into the group of viewleaders
    ///
    /// It must have been started, with --join or over a disk that has lost what was there. If a
    /// viewleader at that address has lost its disk, this one takes its place. Answers when it
    /// has caught up and votes.
    #[command(name = "viewleader_add")]
    ViewleaderAdd {
        /// Where it listens
        #[arg(value_name = "IP:PORT")]
        address: SocketAddrV4,
    },
    /// Let a viewleader leave the group of viewleaders, for good
    #[command(name = "viewleader_remove")]
    ViewleaderRemove {
        /// Where it listens, as `status` lists it
        #[arg(value_name = "IP:PORT")]
        address: SocketAddrV4,
    },
    /// Take a backup of the cluster into a new folder, while clients read and write
    ///
    /// For each key it holds a value that was committed between its start and its end: nothing
    /// that was acknowledged before is missing. It is no snapshot of one instant. What `set` keeps
    /// on one server is not in it.
    Backup {
        /// The folder; it must not be there yet
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Load a backup into a new cluster
    ///
    /// The cluster must be empty: viewleaders and servers, any number of each, that were started
    /// with empty data directories. Until all is loaded it serves nobody. Afterwards it counts
    /// epochs, versions and tokens from where the old cluster can't have come to, and refuses the
    /// old ones. One that was interrupted goes on when the same command is given again.
    Restore {
        /// The folder of the backup
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Print the completions of a shell: `client completions bash >> ~/.bashrc`
    Completions {
        /// Which shell
        shell: Shell,
    },
}

fn timeout(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= MAX_TIMEOUT => Ok(seconds),
        _ => Err(format!("a time-out is a number of seconds, above 0 and up to {MAX_TIMEOUT}")),
    }
}

/// A time to live, in milliseconds.
fn ttl(text: &str) -> Result<u64, String> {
    let range = MIN_TTL_MS..=MAX_TTL_MS;
    let ms = text.parse::<f64>().ok().map(|seconds| (seconds * 1000.0).round() as u64);
    ms.filter(|ms| range.contains(ms)).ok_or_else(|| {
        let (min, max) = (MIN_TTL_MS as f64 / 1000.0, MAX_TTL_MS / 1000);
        format!("a time to live is a number of seconds from {min} to {max}")
    })
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let timeout = Duration::from_secs_f64(flags.timeout);
    let asker = Asker { servers: flags.server, viewleaders: flags.viewleader, timeout };
    let lock_call = |lockid, client: String| LockCall {
        request: Some(rand::random()),
        ..LockCall::new(lockid, Identity::text(client))
    };
    let wait_ms = Some(LOCK_WAIT.min(timeout / 2).as_millis() as u64);
    let (mut as_table, mut watch) = (false, false);
    let command = match flags.command {
        Asked::Print { text } => Command::Print(text),
        Asked::Set { key, value } => Command::Set(key.into(), value.into()),
        Asked::Get { key } => Command::Get(key.into()),
        Asked::QueryAllKeys => Command::QueryAllKeys,
        Asked::Setr { key, value, condition } => Command::Setr(Setr {
            key: key.into(),
            val: value.into(),
            direct: true,
            if_version: condition.version(),
            fence: condition.fence,
        }),
        Asked::Getr { key } => Command::Getr(Get { key: key.into() }),
        Asked::Delr { key, condition } => Command::Delr(Delete {
            key: key.into(),
            if_version: condition.version(),
            fence: condition.fence,
        }),
        Asked::QueryServers => Command::QueryServers,
        Asked::LockGet { lock, client, wait, shared, ttl } => Command::LockGet(LockCall {
            shared,
            ttl_ms: ttl,
            wait_ms: wait_ms.filter(|_| wait),
            ..lock_call(lock, client)
        }),
        Asked::LockKeep { lock, client, token } => Command::LockKeep(LockKeep {
            lockid: lock,
            requestor: Identity::text(client),
            token: Some(Token(token)),
        }),
        Asked::LockList { after } => Command::LockList(LockList { after }),
        Asked::LockRun { lock, shared, ttl, client, command } => {
            let unique =
                || format!("lock_run-{}-{:08x}", std::process::id(), rand::random::<u32>());
            let call = lock_call(lock, client.unwrap_or_else(unique));
            let call = LockCall { shared, ttl_ms: Some(ttl), wait_ms, ..call };
            let status = lock_run::run(&asker, call, &command, say).unwrap_or_else(|error| {
                say(&error.to_string());
                CANNOT_RUN
            });
            return ExitCode::from(status);
        }
        Asked::LockRelease { lock, client } => Command::LockRelease(lock_call(lock, client)),
        Asked::Status { json } => {
            as_table = !json && io::stdout().is_terminal();
            Command::Status
        }
        Asked::RebalanceStatus { watch: stay } => {
            watch = stay;
            Command::RebalanceStatus
        }
        Asked::Drain { server } => Command::Drain(server),
        Asked::ViewleaderAdd { address } => Command::ViewleaderAdd(address),
        Asked::ViewleaderRemove { address } => Command::ViewleaderRemove(address),
        Asked::Backup { folder } => return with_backup(&asker, &folder, backup::take),
        Asked::Restore { folder } => return with_backup(&asker, &folder, restore::load),
        Asked::Completions { shell } => {
            clap_complete::generate(shell, &mut Flags::command(), "client", &mut io::stdout());
            return ExitCode::SUCCESS;
        }
    };
    let outcome = if watch { stay_until_complete(&asker) } else { run(&asker, command) };
    let conclusion = match outcome {
        Ok(conclusion) => conclusion,
        Err(error) => {
            say(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    conclude(&conclusion, as_table)
}

/// Tells the user how it has ended.
fn conclude(conclusion: &Conclusion, as_table: bool) -> ExitCode {
    if let Some(message) = &conclusion.message {
        say(message);
    }
    if let Some(reply) = &conclusion.reply {
        match serde_json::from_str::<Health>(reply) {
            Ok(health) if as_table => daemon::print_line(&display::health(&health)),
            _ => daemon::print_line(reply),
        }
    }
    ExitCode::from(exit_status(conclusion.verdict))
}

/// Takes or restores the backup in `folder`. The first signal ends it in order, the
/// second one at once.
fn with_backup(
    asker: &Asker,
    folder: &Path,
    act: fn(&Asker, &Path, &AtomicBool) -> Result<Manifest, Failure>,
) -> ExitCode {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let status = exit_status(Verdict::Interrupted).into();
        // In this order: the first signal finds the flag not set.
        let registered =
            signal_hook::flag::register_conditional_shutdown(signal, status, Arc::clone(&stop))
                .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)));
        if let Err(error) = registered {
            say(&error.to_string());
            return ExitCode::FAILURE;
        }
    }
    let conclusion = match act(asker, folder, &stop) {
        Ok(Manifest { backup, keys, bytes, numbers, .. }) => {
            let reply = serde_json::json!({
                "status": "ok", "backup": backup, "keys": keys, "bytes": bytes, "numbers": numbers,
            });
            Conclusion { reply: Some(reply.to_string()), message: None, verdict: Verdict::Done }
        }
        Err(failure) => failure.into_conclusion(),
    };
    conclude(&conclusion, false)
}

/// Asks how far the rebalancing is until it is complete.
fn stay_until_complete(asker: &Asker) -> io::Result<Conclusion> {
    let bar = display::Progress::default();
    loop {
        let conclusion = run(asker, Command::RebalanceStatus)?;
        let status = conclusion.reply.as_deref().map(serde_json::from_str::<RebalanceStatus>);
        match status {
            Some(Ok(status)) if status.moving => bar.show(&status),
            _ => {
                bar.end();
                return Ok(conclusion);
            }
        }
        std::thread::sleep(WATCH_GLANCE);
    }
}

/// Only a command that waits can be interrupted in order; any other is left to
/// the signal itself.
fn run(asker: &Asker, command: Command) -> io::Result<Conclusion> {
    let (interrupt, interrupts) = bounded(1);
    if matches!(command, Command::LockGet(_)) {
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        threads::start("signals", move || {
            for _ in signals.forever() {
                if interrupt.try_send(()).is_err() {
                    // The second one does not wait for anything.
                    std::process::exit(exit_status(Verdict::Interrupted).into());
                }
            }
        })?;
    }
    Ok(asker.run(Operation::new(command), &interrupts, say))
}

fn say(message: &str) {
    let _ = writeln!(io::stderr(), "client: {message}");
}
