//! Scripts that drive a group of nodes.
//!
//! | command | meaning |
//! |---|---|
//! | `found a b c` | these are started, each told of all of them |
//! | `start d [alone]` | one that waits to be added; or that is a group of its own |
//! | `run 3s` | time passes |
//! | `settle` | enough of it passes to found a group; what is told meanwhile is not shown |
//! | `propose a 1 2 3` | commands, to whoever leads without a name: `propose leader 1` |
//! | `confirm a` | does it lead still? |
//! | `add a d`, `remove a d` | somebody wishes of `a` that `d` is in the group, or not |
//! | `kill a`, `restart a`, `erase a` | the last one: its disk is gone, and it starts again |
//! | `pause a`, `resume a`, `cut a`, `heal` | stopped; cut off from all others |
//! | `hold_disk a`, `release_disk a` | its batches wait |
//! | `look` | how every node is |
//!
//! `leader` stands for the one that leads, `other` for the first one that runs and
//! does not.

use super::arguments::{Failure, exactly, positional, span};
use super::world::World;
use goldenscript::{Command, Runner};
use ringleader::consensus::founding::Entrance;
use ringleader::consensus::reshaping::Wish;
use std::time::Duration;

/// One script's group.
pub(crate) struct GroupScript {
    world: World,
    wishes: u64,
}

impl Default for GroupScript {
    fn default() -> Self {
        Self { world: World::new(7), wishes: 0 }
    }
}

impl GroupScript {
    fn site(&self, name: &str) -> Result<usize, Failure> {
        let world = &self.world;
        let found = match name {
            "leader" => world.leader(),
            "other" => (0..world.sites.len()).find(|at| world.is_up(*at) && !world.leads(*at)),
            name => world.site(name),
        };
        found.ok_or_else(|| format!("there is no {name}").into())
    }

    fn wish(&mut self, at: &str, change: Wish) -> Result<(), Failure> {
        self.wishes += 1;
        let at = self.site(at)?;
        self.world.wish(at, self.wishes, change);
        Ok(())
    }

    fn carry_out(&mut self, command: &Command) -> Result<(), Failure> {
        match command.name.as_str() {
            "found" => {
                let names = positional(command);
                let first = self.world.sites.len();
                let all: Vec<_> = (first..first + names.len()).map(World::address).collect();
                for name in names {
                    let at = self.world.sites.len();
                    let entrance = Entrance::with_founders(World::address(at), &all)?;
                    self.world.add_site(name, entrance);
                    self.world.start(at);
                }
            }
            "start" => {
                let arguments = positional(command);
                let is_alone = arguments.get(1) == Some(&"alone");
                let entrance = if is_alone { Entrance::Alone } else { Entrance::Wait };
                let at = self.world.add_site(arguments[0], entrance);
                self.world.start(at);
            }
            "run" => self.world.run_for(span(exactly::<1>(command)?[0])?),
            "settle" => {
                self.world.run_for(Duration::from_secs(3));
                self.world.lines.retain(|line| line.ends_with(" leads"));
            }
            "propose" => {
                let arguments = positional(command);
                let at = self.site(arguments[0])?;
                for number in &arguments[1..] {
                    let (first, last) = number.split_once("..").unwrap_or((number, number));
                    for number in first.parse::<u64>()?..=last.parse()? {
                        self.world.propose(at, number);
                    }
                }
            }
            "add" => {
                let [at, whom] = exactly(command)?;
                let address = World::address(self.site(whom)?);
                self.wish(at, Wish::Add(address))?;
            }
            "remove" => {
                let [at, whom] = exactly(command)?;
                let address = World::address(self.site(whom)?);
                self.wish(at, Wish::Remove(address))?;
            }
            "heal" => self.world.cut.clear(),
            "look" => {
                let lines = self.world.look();
                self.world.lines.extend(lines);
            }
            name => {
                let [whom] = exactly(command)?;
                let at = self.site(whom)?;
                let world = &mut self.world;
                if matches!(whom, "leader" | "other") {
                    world.lines.push(format!("({})", world.sites[at].name));
                }
                match name {
                    "confirm" => world.confirm(at),
                    "kill" => world.kill(at, 0),
                    "restart" => world.start(at),
                    "erase" => {
                        world.erase(at);
                        world.start(at);
                    }
                    "pause" => world.pause(at),
                    "resume" => world.resume(at),
                    "cut" => {
                        world.cut.insert(at);
                    }
                    "hold_disk" => world.hold_disk(at),
                    "release_disk" => world.release_disk(at),
                    _ => return Err(format!("there is no command such as {command}").into()),
                }
            }
        }
        Ok(())
    }
}

impl Runner for GroupScript {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &goldenscript::Context) -> Result<String, Failure> {
        self.carry_out(command)?;
        let lines = fold(std::mem::take(&mut self.world.lines));
        Ok(lines.into_iter().map(|line| line + "\n").collect())
    }
}

/// Makes one line of several numbers that one node has committed in a row.
fn fold(lines: Vec<String>) -> Vec<String> {
    let mut folded: Vec<String> = Vec::new();
    let commit = |line: &str| {
        let (name, numbers) = line.strip_suffix(" committed")?.split_once(" has ")?;
        let (first, last) = numbers.split_once("..").unwrap_or((numbers, numbers));
        Some((name.to_owned(), first.to_owned(), last.parse::<u64>().ok()?))
    };
    for line in lines {
        let before = folded.last().and_then(|line| commit(line));
        match (before, commit(&line)) {
            (Some((name, first, last)), Some((other, _, next)))
                if name == other && next == last + 1 =>
            {
                folded.pop();
                folded.push(format!("{name} has {first}..{next} committed"));
            }
            _ => folded.push(line),
        }
    }
    folded
}
