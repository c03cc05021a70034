//! The client: one command, one reply.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(clippy::disallowed_methods, reason = "a program around the shells")]

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use crossbeam_channel::bounded;
use ringleader::kv::operation::{Command, Conclusion, Operation, Verdict};
use ringleader::net::ask::{Asker, exit_status};
use ringleader::net::{daemon, display, threads};
use ringleader::view::messages::{Health, LockCall, RebalanceStatus};
use ringleader::wire::{HostPort, Identity};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{self, IsTerminal, Write};
use std::net::SocketAddrV4;
use std::process::ExitCode;
use std::time::Duration;

/// How often `--watch` looks.
const WATCH_GLANCE: Duration = Duration::from_millis(200);

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

    /// Where the viewleader is: HOST (ports 39000 to 39009 are tried) or HOST:PORT; several with commas
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
    },
    /// Get a replicated key
    Getr {
        #[arg(allow_hyphen_values = true)]
        key: String,
    },
    /// List the servers: address and place on the ring of each, and the epoch
    #[command(name = "query_servers")]
    QueryServers,
    /// Get a lock, waiting for it if another holds it
    ///
    /// While another holds it, this says so and asks again every 5 seconds. Ctrl-C
    /// leaves the queue.
    #[command(name = "lock_get")]
    LockGet {
        /// The name of the lock
        lock: String,
        /// The name of whoever wants it; the same name may ask again
        client: String,
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

fn main() -> ExitCode {
    let flags = Flags::parse();
    let lock_call = |lockid, client: String| LockCall { lockid, requestor: Identity::text(client) };
    let (mut as_table, mut watch) = (false, false);
    let command = match flags.command {
        Asked::Print { text } => Command::Print(text),
        Asked::Set { key, value } => Command::Set(key.into(), value.into()),
        Asked::Get { key } => Command::Get(key.into()),
        Asked::QueryAllKeys => Command::QueryAllKeys,
        Asked::Setr { key, value } => Command::Setr(key.into(), value.into()),
        Asked::Getr { key } => Command::Getr(key.into()),
        Asked::QueryServers => Command::QueryServers,
        Asked::LockGet { lock, client } => Command::LockGet(lock_call(lock, client)),
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
        Asked::Completions { shell } => {
            clap_complete::generate(shell, &mut Flags::command(), "client", &mut io::stdout());
            return ExitCode::SUCCESS;
        }
    };
    let asker = Asker {
        servers: flags.server,
        viewleaders: flags.viewleader,
        timeout: Duration::from_secs_f64(flags.timeout),
    };
    let outcome = if watch { stay_until_complete(&asker) } else { run(&asker, command) };
    let conclusion = match outcome {
        Ok(conclusion) => conclusion,
        Err(error) => {
            say(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
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
