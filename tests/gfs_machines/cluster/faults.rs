//! What goes wrong in a run, and that it goes right again.

use super::{Cluster, Event, SERVERS, Who, server_at};
use rand::RngExt;
use ringleader::consensus::replica::Lead;
use ringleader::gfs::ChunkId;
use ringleader::gfs::chunkserver;
use ringleader::gfs::state::Chunk;
use ringleader::machine::Time;
use std::collections::BTreeSet;
use std::time::Duration;

impl Cluster {
    pub(super) fn fault(&mut self) {
        if self.healing {
            return;
        }
        if self.servers.iter().any(|server| server.disk.has_trouble()) {
            return self.at(Duration::from_secs(1), Event::Fault);
        }
        self.tally.faults += 1;
        let server = Who::Server(self.rng.random_range(0..SERVERS));
        let span = Duration::from_millis(self.rng.random_range(50..9_000));
        match self.rng.random_range(0..17) {
            0..4 => {
                self.kill(server);
                self.at(span, Event::Restart(server));
            }
            4..6 => {
                self.say(|| format!("{server:?} is paused for {span:?}"));
                self.nodes.get_mut(&server).unwrap().paused_until = self.now + span;
            }
            6 | 7 => {
                let other = match self.rng.random_range(0..3) {
                    0 => Who::Master,
                    _ => Who::Server(self.rng.random_range(0..SERVERS)),
                };
                self.is_one_way = self.rng.random_range(0..2) == 0;
                let how = if self.is_one_way { "one way" } else { "both ways" };
                self.say(|| format!("{server:?} and {other:?} are cut off {how} for {span:?}"));
                self.cuts = BTreeSet::from([(server, other)]);
                self.cut_until = self.now + span;
            }
            8 => {
                self.kill(Who::Master);
                self.at(span / 4, Event::Restart(Who::Master));
            }
            9 => {
                self.say(|| format!("the disk of {server:?} is full for {span:?}"));
                let Who::Server(server) = server else { return };
                let room = chunkserver::Input::Room { used: 1_000_000, free: 1, full: true };
                self.step_server(server, room);
                self.at(span, Event::Room(server));
            }
            10 | 11 => self.damage(),
            12 | 13 => self.refuse(span),
            14 | 15 => {
                self.say(|| format!("the disk of {server:?} is slow for {span:?}"));
                let Who::Server(server) = server else { return };
                self.servers[server].slow_until = self.now + span;
            }
            _ => {
                // All at once.
                for server in (0..SERVERS).map(Who::Server) {
                    self.kill(server);
                    let span = Duration::from_millis(self.rng.random_range(50..6_000));
                    self.at(span, Event::Restart(server));
                }
            }
        }
        let next = Duration::from_millis(self.rng.random_range(200..6_000));
        self.at(next, Event::Fault);
    }

    /// One of three copies that are all in order, and where it is.
    fn whole_copy(&mut self) -> Option<(ChunkId, usize)> {
        let calm = self.now >= self.cut_until
            && self.nodes.values().all(|node| node.is_up && node.paused_until <= self.now);
        let master = self.master.as_ref().filter(|_| calm)?;
        let whole = |known: &Chunk| known.members.len() == 3;
        let chunks: Vec<(ChunkId, usize)> = master
            .state()
            .chunks()
            .filter(|(_, known)| whole(known))
            .flat_map(|(chunk, known)| {
                let places = known.members.iter();
                let addresses = places.map(|it| master.state().server(*it).unwrap().address);
                addresses.map(move |address| (chunk, server_at(address))).collect::<Vec<_>>()
            })
            .filter(|(chunk, server)| self.servers[*server].disk.holds(*chunk))
            .collect();
        let count = chunks.len();
        (count > 0).then(|| chunks[self.rng.random_range(0..count)])
    }

    /// A bit flips.
    fn damage(&mut self) {
        let Some((chunk, server)) = self.whole_copy() else { return };
        self.say(|| format!("a bit flips in {chunk} on {server}"));
        self.tally.damaged += 1;
        self.servers[server].disk.damage(chunk);
        let soon = Duration::from_millis(self.rng.random_range(1..2_000));
        self.at(soon, Event::Scrub(server, chunk));
    }

    /// A disk has no room for a copy for a while, as none has said before.
    fn refuse(&mut self, span: Duration) {
        let Some((chunk, server)) = self.whole_copy() else { return };
        self.say(|| format!("there is no room for {chunk} on {server} for {span:?}"));
        self.tally.refused += 1;
        self.servers[server].disk.refuse(chunk);
        self.at(span, Event::Room(server));
    }

    pub(super) fn scrub(&mut self, server: usize, chunk: ChunkId) {
        if !self.servers[server].disk.is_damaged(chunk) {
            return;
        }
        if self.nodes[&Who::Server(server)].is_up {
            self.step_server(server, chunkserver::Input::Damaged(chunk));
        }
        // Until it is gone, it is found each time.
        self.at(Duration::from_millis(500), Event::Scrub(server, chunk));
    }

    pub(super) fn heal(&mut self) {
        self.say(|| "healing".to_owned());
        self.healing = true;
        self.cut_until = Time::default();
        let whos: Vec<Who> = self.nodes.keys().copied().collect();
        for who in whos {
            self.nodes.get_mut(&who).unwrap().paused_until = Time::default();
            if !matches!(who, Who::Client(_)) {
                self.start(who);
            }
        }
        for server in 0..SERVERS {
            self.servers[server].slow_until = Time::default();
            self.at(Duration::from_millis(1), Event::Room(server));
        }
    }
}
