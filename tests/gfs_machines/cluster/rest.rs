//! What must be so when everything is healed and has come to rest.

use super::clients::{LOG, REGION, TABLE, TURN, Target, Turned, Wanted, turned};
use super::{Cluster, SERVERS, file, server_at};
use ringleader::consensus::replica::Lead;
use ringleader::gfs::state::State;
use ringleader::gfs::{ChunkId, FileName};
use std::collections::BTreeSet;

impl Cluster {
    pub(super) fn check_rest(&mut self) -> Result<(), String> {
        let master = self.master.as_ref().ok_or("there is no master")?;
        let state = master.state();
        if self.turning.is_some() {
            return Err("a file can't be renamed or made".to_owned());
        }
        if let Some(client) = self.clients.iter().find(|it| !it.record.is_empty()) {
            return Err(format!("client {} can't go on", client.name));
        }
        // Of a chunk that nobody has written to yet there may be empty copies, which wait for
        // the first one who does: its round was lost with the master.
        for (chunk, known) in state.chunks().filter(|(_, known)| !known.members.is_empty()) {
            for server in 0..SERVERS {
                let is_member = known
                    .members
                    .iter()
                    .any(|it| server_at(state.server(*it).unwrap().address) == server);
                if self.servers[server].disk.holds(chunk) && !is_member {
                    return Err(format!("server {server} keeps an orphan of {chunk}"));
                }
            }
        }
        let contents = self.content_of(state, &file(LOG))?;
        let begun = self.check_records(&contents, &self.acknowledged, "the log")?;
        self.check_targets(&begun, LOG, |_, target| target == Target::Log)?;
        for (place, snapshot) in self.snapshots.iter().enumerate() {
            let name = snapshot.name.as_str();
            let contents = self.content_of(state, &snapshot.name)?;
            self.check_records(&contents, &self.acknowledged[..snapshot.has], name)?;
            let begun = self.check_records(&contents, &snapshot.acknowledged, name)?;
            self.check_targets(&begun, name, |(client, number), target| match target {
                Target::Log => number <= snapshot.last[client as usize - 1],
                target => target == Target::Snapshot(place),
            })?;
        }
        self.check_turned(state)?;
        let table = self.content_of(state, &file(TABLE))?;
        for (client, it) in self.clients.iter().enumerate().filter(|(_, it)| it.written > 0) {
            let found = table[0].get(client * REGION..(client + 1) * REGION).unwrap_or_default();
            if !self.is_right(found, &Wanted::Region(client, it.written)) {
                let found = String::from_utf8_lossy(found).into_owned();
                return Err(format!("the region of {client} is {found}, not write {}", it.written));
            }
        }
        Ok(())
    }

    /// Checks that all these records were for the file that they stand in.
    fn check_targets(
        &self,
        begun: &BTreeSet<(u64, u64)>,
        name: &str,
        fits: impl Fn((u64, u64), Target) -> bool,
    ) -> Result<(), String> {
        match begun.iter().find(|it| !fits(**it, self.targets[*it])) {
            Some((client, number)) => {
                let target = self.targets[&(*client, *number)];
                Err(format!("{name} has {client}.{number}, which was for {target:?}"))
            }
            None => Ok(()),
        }
    }

    /// Checks the third file, under all the names that it had.
    fn check_turned(&self, state: &State) -> Result<(), String> {
        let names = (0..self.turns).map(turned).chain([file(TURN)]);
        let mut contents = Vec::new();
        for name in names {
            let content = self.content_of(state, &name)?;
            let begun = self.check_records(&content, &[], name.as_str())?;
            self.check_targets(&begun, name.as_str(), |_, target| target == Target::Turn)?;
            contents.push(content);
        }
        for Turned { record: (index, offset, record), between: (first, last) } in &self.turned {
            let begin = *offset as usize;
            let there = |content: &Vec<Vec<u8>>| {
                content.get(*index).and_then(|it| it.get(begin..begin + record.len()))
                    == Some(record)
            };
            if !contents[*first..=*last].iter().any(there) {
                let text = String::from_utf8_lossy(record).into_owned();
                let place = contents.iter().position(there);
                return Err(format!(
                    "{text:?} was acknowledged at {index}+{offset}, after the file was called \
                     otherwise {first} to {last} times, and is in {place:?}"
                ));
            }
        }
        Ok(())
    }

    /// What all members of each chunk of a file hold.
    fn content_of(&self, state: &State, name: &FileName) -> Result<Vec<Vec<u8>>, String> {
        let file = state.file(name).ok_or_else(|| format!("{name} is gone"))?;
        file.chunks.iter().map(|chunk| self.content_of_chunk(state, *chunk)).collect()
    }

    fn content_of_chunk(&self, state: &State, chunk: ChunkId) -> Result<Vec<u8>, String> {
        let known = state.chunk(chunk).ok_or_else(|| format!("{chunk} is gone"))?;
        if known.members.is_empty() {
            // Nobody wrote to it since it was asked for: it reads as what it is a copy of.
            let source = known.copy_of.map(|source| self.content_of_chunk(state, source));
            return source.unwrap_or(Ok(Vec::new()));
        }
        if known.members.len() != 3 {
            return Err(format!("{chunk} has the members {:?}", known.members));
        }
        let places = known.members.iter();
        let places = places.map(|number| server_at(state.server(*number).unwrap().address));
        let mut same: Option<(usize, Vec<u8>)> = None;
        for server in places {
            let (version, bytes) = self.servers[server].disk.content(chunk);
            let (first, content) = same.get_or_insert_with(|| (server, bytes.clone()));
            // A round may have come to nothing: a promise remains.
            if version < known.version || bytes != *content {
                return Err(format!(
                    "{chunk} is {} and not the same on server {server} ({version}, {} bytes) and \
                     {first} ({} bytes)",
                    known.version,
                    bytes.len(),
                    content.len()
                ));
            }
        }
        Ok(same.map(|(_, content)| content).unwrap_or_default())
    }

    /// Checks that these records stand in a file where they should, and none twice; gives
    /// all that stand there: client and number.
    fn check_records(
        &self,
        contents: &[Vec<u8>],
        records: &[(usize, u64, Vec<u8>)],
        name: &str,
    ) -> Result<BTreeSet<(u64, u64)>, String> {
        for (index, offset, record) in records {
            let begin = *offset as usize;
            let there = contents.get(*index).and_then(|it| it.get(begin..begin + record.len()));
            if there != Some(record) {
                let text = String::from_utf8_lossy(record).into_owned();
                return Err(format!(
                    "{text:?} was acknowledged at {index}+{offset} and is not there in {name}"
                ));
            }
        }
        let all: Vec<u8> = contents.concat();
        let mut seen = BTreeSet::new();
        for part in all.split(|byte| *byte == b'<').skip(1) {
            let title = part.split(|byte| *byte == b':').next().unwrap_or_default();
            let title = String::from_utf8_lossy(title).into_owned();
            let numbers = title
                .split_once('.')
                .and_then(|(client, number)| Some((client.parse().ok()?, number.parse().ok()?)));
            let Some(numbers) = numbers else {
                return Err(format!("{title:?} is no record of {name}"));
            };
            if !seen.insert(numbers) {
                return Err(format!("record {title} is there twice in {name}"));
            }
        }
        Ok(seen)
    }
}
