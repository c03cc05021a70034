//! Scripts that drive a small cluster.
//!
//! | command | meaning |
//! |---|---|
//! | `cluster s1 s2 s3` | start these one after the other, each once the one before has settled |
//! | `start s4` | start one more; or one that has died, again over its disk |
//! | `start s4 sync=lazy` | start one more, whose disk is synced only now and then |
//! | `start s4 on=s1` | start one more where another one was, with a disk of its own |
//! | `let pear plum owner=s4` | `pear` and `plum` stand for keys in the arc of `s4`, which may be yet to start |
//! | `s1 setr KEY VALUE`, `s1 getr KEY`, `get`, `set`, `query_all_keys` | a client asks that server |
//! | `s1 setr_request KEY`, `s1 commit KEY VALUE`, `s1 setr_deny KEY` | an original client does |
//! | `settle` | let everything happen until nothing new has been seen for half a second |
//! | `advance 5s` | let everything happen for so long |
//! | `hold s1 s2`, `release s1 s2` | from now on what s1 sends to s2 waits; no more |
//! | `hold s1 viewleader views` | only that of calls of this kind: `beats`, `views`, `reports` |
//! | `held s1 s2`, `deliver s1 s2 [N]`, `duplicate s1 s2`, `drop s1 s2` | what waits: show it; let it (the first N) through; twice over; lose it |
//! | `deliver s1 s2 page` | let through what has that word in it |
//! | `hold s1 disk`, `release s1 disk` | what s1 writes does not reach its disk; now it does |
//! | `fill s1`, `clear s1` | its disk has no room; now it has |
//! | `cut s1`, `heal s1` | lose everything from and to s1; no more |
//! | `kill s1`, `pause s1`, `resume s1` | the process; the name may be `viewleader` |
//! | `start viewleader` | again over its disk |
//! | `replace_viewleader` | by one that remembers nothing |
//! | `drain s1` | the viewleader is told that s1 is to leave |
//! | `restore begin above=N`, `restore load`, `restore finish`, `restore give_up` | the viewleader is told of a step of a restore |
//! | `s1 backup FROM`, `s1 load KEY VALUE` | whoever takes a backup, or restores one, asks that server |
//! | `groups [KEY]` | the view, or the group of a key |
//! | `keys s1` | what s1 holds, sorted |
//! | `disk s1` | what is on its disk, sorted |
//! | `show groups`, `show calls` | trace changes of groups, calls to the viewleader, too |
//!
//! A message takes a millisecond, a disk no time. Nothing happens between two
//! commands: what a client's request makes its server send is seen at once, and
//! arrives with the next command that lets time pass. Whoever is killed loses
//! what has not reached its disk.

use super::arguments::{Failure, exactly, option, positional, span};
use goldenscript::{Command, Context, Runner};
use rand::SeedableRng;
use rand::rngs::StdRng;
use ringleader::kv::ring::{self, Point};
use ringleader::kv::server::{Batch, DEFAULT_LEASE};
use ringleader::sim::chance::Steady;
use ringleader::sim::cluster::{Clock, Cluster, Outcome, Start};
use ringleader::sim::network::{Lane, Party};
use serde_json::{Value, json};
use std::time::Duration;

/// `settle` ends when nothing new has been seen for this long.
const QUIET: Duration = Duration::from_millis(500);

/// `settle` gives up after this long.
const MAX_SETTLE: Duration = Duration::from_secs(60);

/// The backup of which scripts speak.
const BACKUP: &str = "00000000000000b1";

/// One script's cluster.
pub(crate) struct ServersScript {
    cluster: Cluster,
}

impl Default for ServersScript {
    fn default() -> Self {
        let mut cluster = Cluster::new(Box::new(Steady));
        cluster.trace.is_on = true;
        Self { cluster }
    }
}

impl Runner for ServersScript {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &Context) -> Result<String, Failure> {
        let said = self.obey(command)?;
        Ok(self.cluster.trace.take() + &said)
    }
}

impl ServersScript {
    /// Does what the command says. Returns what it says beside the trace.
    fn obey(&mut self, command: &Command) -> Result<String, Failure> {
        match command.name.as_str() {
            "cluster" => {
                for name in positional(command) {
                    self.start(name, None, false)?;
                    self.settle()?;
                }
            }
            "start" => match exactly(command)? {
                ["viewleader"] => self.cluster.start_viewleader(0),
                [name] => {
                    let lazy = option(command, "sync") == Some("lazy");
                    self.start(name, option(command, "on"), lazy)?;
                }
            },
            "let" => {
                let owner = option(command, "owner").ok_or("owner=SERVER is missing")?;
                for alias in positional(command) {
                    self.alias(alias, owner)?;
                }
            }
            "settle" => self.settle()?,
            "advance" => {
                let [time] = exactly(command)?;
                let end = self.cluster.now() + span(time)?;
                self.cluster.run_until(end);
            }
            "kill" => self.cluster.kill(self.one(command)?),
            "pause" => self.cluster.pause(self.one(command)?),
            "resume" => self.cluster.resume(self.one(command)?),
            "cut" => self.cluster.cut_off(self.one(command)?),
            "heal" => self.cluster.heal(self.one(command)?),
            "replace_viewleader" => self.cluster.replace_viewleader(),
            "fill" | "clear" => match self.one(command)? {
                Party::Server(server) if command.name == "fill" => self.cluster.fill_disk(server),
                Party::Server(server) => self.cluster.clear_disk(server),
                _ => return Err("only servers' disks can be full".into()),
            },
            "drain" => match self.one(command)? {
                Party::Server(server) => self.cluster.drain(server),
                _ => return Err("the viewleader can't leave".into()),
            },
            "restore" => {
                let [step] = exactly(command)?;
                let mut request = json!({"backup": BACKUP, "step": step});
                if let Some(above) = option(command, "above") {
                    request["above"] = json!(above.parse::<u64>()?);
                }
                self.cluster.restore(serde_json::from_value(request)?);
            }
            "disk" => return self.disk(self.one(command)?),
            "show" => match exactly(command)? {
                ["groups"] => self.cluster.trace.with_groups = true,
                ["calls"] => self.cluster.trace.with_view_calls = true,
                [what] => return Err(format!("{what} can't be shown").into()),
            },
            "groups" => return self.groups(command),
            "keys" => return self.keys(self.one(command)?),
            "hold" | "release" | "held" | "deliver" | "duplicate" | "drop" => {
                return self.meddle(command);
            }
            name => {
                let at = self.party(name)?;
                self.ask(at, command)?;
            }
        }
        Ok(String::new())
    }

    fn party(&self, name: &str) -> Result<Party, Failure> {
        self.cluster.party(name).ok_or_else(|| format!("there is no {name}").into())
    }

    fn one(&self, command: &Command) -> Result<Party, Failure> {
        let [name] = exactly(command)?;
        self.party(name)
    }

    fn start(&mut self, name: &str, on: Option<&str>, lazy: bool) -> Result<(), Failure> {
        let cluster = &mut self.cluster;
        let new = u8::try_from(cluster.servers() + 1)?;
        let before = |cluster: &Cluster, name| match cluster.party(name) {
            Some(Party::Server(index)) => Some((cluster.host(index), cluster.disk(index))),
            _ => None,
        };
        let (host, disk) = match (before(cluster, name), on.map(|on| before(cluster, on))) {
            (Some((host, disk)), None) => (host, Some(disk)),
            (None, Some(Some((host, _)))) => (host, None),
            (None, None) => (new, None),
            _ => return Err("a server starts over its own disk, or on another's address".into()),
        };
        // Who is started again and must be somebody else draws other numbers.
        let seed = seed(name) + if disk.is_some() { u64::from(new) << 32 } else { 0 };
        cluster.start(Start {
            name,
            host,
            disk,
            seed,
            clock: Clock::default(),
            lazy,
            batch: Batch::default(),
            lease: DEFAULT_LEASE,
        });
        Ok(())
    }

    fn settle(&mut self) -> Result<(), Failure> {
        let deadline = self.cluster.now() + MAX_SETTLE;
        let seen = |cluster: &Cluster| (cluster.trace.count(), cluster.view().revision);
        let mut last = (seen(&self.cluster), self.cluster.now());
        while self.cluster.now().since(last.1) < QUIET {
            self.cluster.step();
            if seen(&self.cluster) != last.0 {
                last = (seen(&self.cluster), self.cluster.now());
            }
            if self.cluster.now() > deadline {
                return Err("it does not settle".into());
            }
        }
        Ok(())
    }

    /// Finds a key in the arc of the server `owner` for `alias` to stand for. A
    /// server that is yet to start will choose its place as it is chosen here.
    fn alias(&mut self, alias: &str, owner: &str) -> Result<(), Failure> {
        let members = &self.cluster.view().members;
        let mut starts: Vec<Point> = members.iter().map(|member| member.hash).collect();
        let place = match self.cluster.names.identity_of(owner) {
            Some(id) => Point::of(id.as_str()),
            None => {
                let mut rng = StdRng::seed_from_u64(seed(owner));
                let place = Point::of(ring::choose_identity(&starts, &mut rng).as_str());
                starts.push(place);
                place
            }
        };
        starts.sort_unstable();
        let is_there = |key: &String| starts[ring::owner_of(Point::of(key), &starts)] == place;
        let candidates = (0..).map(|number| match number {
            0 => alias.to_owned(),
            number => format!("{alias}-{number}"),
        });
        let key = candidates.take(10_000).find(is_there).ok_or("no such key")?;
        self.cluster.names.alias(&key, alias);
        Ok(())
    }

    /// Meddles with what one party sends to another.
    fn meddle(&mut self, command: &Command) -> Result<String, Failure> {
        let arguments = positional(command);
        let [from, to, rest @ ..] = arguments.as_slice() else {
            return Err("from whom, to whom?".into());
        };
        let from = self.party(from)?;
        if *to == "disk" {
            match command.name.as_str() {
                "hold" => self.cluster.hold_disk(from),
                "release" => self.cluster.release_disk(from),
                _ => return Err("a disk is held or released".into()),
            }
            let now = self.cluster.now();
            self.cluster.run_until(now);
            return Ok(String::new());
        }
        let to = self.party(to)?;
        let cluster = &mut self.cluster;
        match (command.name.as_str(), rest) {
            ("hold", []) => cluster.hold(from, to, None),
            ("hold", ["beats"]) => cluster.hold(from, to, Some(Lane::Beat)),
            ("hold", ["views"]) => cluster.hold(from, to, Some(Lane::View)),
            ("hold", ["reports"]) => cluster.hold(from, to, Some(Lane::Report)),
            ("release", []) => cluster.release(from, to),
            ("deliver", []) => cluster.deliver(from, to, usize::MAX, ""),
            ("deliver", [what]) => match what.parse() {
                Ok(count) => cluster.deliver(from, to, count, ""),
                Err(_) => cluster.deliver(from, to, usize::MAX, what),
            },
            ("duplicate", []) => cluster.duplicate(from, to),
            ("drop", []) => cluster.drop_waiting(from, to),
            ("held", []) => {
                return Ok(cluster.waiting(from, to).into_iter().map(|line| line + "\n").collect());
            }
            _ => return Err("too many arguments".into()),
        }
        // What was let through has arrived before the next command.
        let now = self.cluster.now();
        self.cluster.run_until(now);
        Ok(String::new())
    }

    fn groups(&mut self, command: &Command) -> Result<String, Failure> {
        let (names, view) = (&self.cluster.names, self.cluster.view());
        Ok(match positional(command).as_slice() {
            [] => names.view_lines(view),
            [key] => {
                let index = view.group_at(Point::of(names.key_of(key))).ok_or("no groups")?;
                names.group_line(view, index) + "\n"
            }
            _ => return Err("the groups of one key".into()),
        })
    }

    fn keys(&mut self, at: Party) -> Result<String, Failure> {
        let Party::Server(at) = at else { return Err("only servers hold keys".into()) };
        self.cluster.ask(at, &json!({"cmd": "query_all_keys"}));
        // The keys are said below, by their names.
        self.cluster.trace.take();
        let Some((_, Outcome::Reply(reply))) = self.cluster.outcomes().pop() else {
            return Err("no reply".into());
        };
        let reply: Value = serde_json::from_str(&reply)?;
        let keys = reply["result"].as_array().ok_or("no keys")?;
        let keys = keys.iter().filter_map(Value::as_str);
        let mut keys: Vec<&str> = keys.map(|key| self.cluster.names.key(key)).collect();
        keys.sort_unstable();
        Ok(if keys.is_empty() { "none\n".to_owned() } else { format!("{}\n", keys.join(" ")) })
    }

    fn disk(&mut self, at: Party) -> Result<String, Failure> {
        let Party::Server(at) = at else { return Err("only servers hold keys".into()) };
        let stored = self.cluster.stored(self.cluster.disk(at));
        let entries = stored.entries.iter().map(|(_, entry)| {
            let (key, version) = (self.cluster.names.key(&entry.key), entry.version);
            match &entry.content.value {
                Some(value) => format!("{key}={value}@{version}"),
                None => format!("no {key}@{version}"),
            }
        });
        let mut entries: Vec<String> = entries.collect();
        entries.sort_unstable();
        Ok(if entries.is_empty() { "nothing\n".to_owned() } else { entries.join(" ") + "\n" })
    }

    /// A client's request.
    fn ask(&mut self, at: Party, command: &Command) -> Result<(), Failure> {
        let Party::Server(at) = at else { return Err("clients ask servers".into()) };
        let arguments = positional(command);
        let key = |alias| self.cluster.names.key_of(alias);
        let mut body = match arguments.as_slice() {
            ["setr", k, v] => json!({"cmd": "setr", "key": key(k), "val": v, "direct": true}),
            ["commit", k, v] => json!({"cmd": "setr", "key": key(k), "val": v}),
            ["set", k, v] => json!({"cmd": "set", "key": key(k), "val": v}),
            [cmd @ ("get" | "getr" | "setr_request" | "setr_deny"), k] => {
                json!({"cmd": cmd, "key": key(k)})
            }
            ["load", k, v] => {
                json!({"cmd": "load", "backup": BACKUP,
                       "entry": {"key": key(k), "version": "1.1", "value": v}})
            }
            ["backup", from] => json!({"cmd": "backup", "from": from.parse::<u16>()?}),
            ["delr", k] => json!({"cmd": "delr", "key": key(k)}),
            ["query_all_keys"] => json!({"cmd": "query_all_keys"}),
            _ => return Err(format!("there is no command such as {command}").into()),
        };
        if let Some(version) = option(command, "if") {
            body["if_version"] = version.into();
        }
        if let Some((lock, token)) = option(command, "fence").and_then(|it| it.split_once('@')) {
            body["fence"] = json!({"lock": lock, "token": token.parse::<u64>()?});
        }
        self.cluster.ask(at, &body);
        Ok(())
    }
}

/// The seed of the server's identity: the same for the same name.
fn seed(name: &str) -> u64 {
    name.bytes().fold(0, |seed, byte| seed * 256 + u64::from(byte))
}
