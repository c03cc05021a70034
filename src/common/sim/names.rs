//! Names for people: what a script and a trace call servers, arcs and keys.
//!
//! Identities are random and places on the ring follow from them. A trace that
//! showed either would change with every change to how identities are drawn, so
//! it shows names instead: a server's is the one that it was started under, an
//! arc's that of the server at whose place it starts.

use crate::kv::ring::Point;
use crate::view::{Group, View};
use crate::wire::Identity;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddrV4;

/// Names of identities, arcs, addresses and keys.
#[derive(Debug, Default)]
pub struct Names {
    identities: BTreeMap<Identity, String>,
    arcs: BTreeMap<Point, String>,
    addresses: BTreeMap<SocketAddrV4, String>,
    keys: BTreeMap<String, String>,
}

impl Names {
    /// Whoever listens at `address` is called `name`.
    pub fn address(&mut self, address: SocketAddrV4, name: &str) {
        self.addresses.insert(address, name.to_owned());
    }

    /// The identity `id` is called `name`, and so is the arc that starts where it
    /// stands. A second identity under the same name gets a dash: `s1'`.
    pub fn identity(&mut self, id: &Identity, name: &str) {
        if self.identities.contains_key(id) {
            return;
        }
        let mut name = name.to_owned();
        while self.identities.values().any(|taken| *taken == name) {
            name.push('\'');
        }
        self.arcs.insert(Point::of(id.as_str()), name.clone());
        self.identities.insert(id.clone(), name);
    }

    /// Learns the members of `view`: each is called as its address is, or by its
    /// identity when the address has no name.
    pub fn learn(&mut self, view: &View) {
        for member in &view.members {
            let name = self.addresses.get(&member.address).cloned();
            self.identity(&member.id, &name.unwrap_or_else(|| member.id.to_string()));
        }
    }

    /// `key` is called `alias`.
    pub fn alias(&mut self, key: &str, alias: &str) {
        self.keys.insert(key.to_owned(), alias.to_owned());
    }

    /// What the identity is called.
    pub fn of(&self, id: &Identity) -> String {
        self.identities.get(id).cloned().unwrap_or_else(|| id.to_string())
    }

    /// The identity that is called `name`.
    pub fn identity_of(&self, name: &str) -> Option<&Identity> {
        self.identities.iter().find(|(_, called)| *called == name).map(|(id, _)| id)
    }

    /// What the arc that starts here is called.
    pub fn arc(&self, start: Point) -> String {
        self.arcs.get(&start).cloned().unwrap_or_else(|| start.to_string())
    }

    /// What the server that listens here is called.
    pub fn at(&self, address: SocketAddrV4) -> String {
        self.addresses.get(&address).cloned().unwrap_or_else(|| address.to_string())
    }

    /// What the key is called.
    pub fn key<'a>(&'a self, key: &'a str) -> &'a str {
        self.keys.get(key).map_or(key, String::as_str)
    }

    /// The key that is called `alias`.
    pub fn key_of<'a>(&'a self, alias: &'a str) -> &'a str {
        self.keys.iter().find(|(_, called)| *called == alias).map_or(alias, |(key, _)| key)
    }

    /// `text` with names instead of addresses, arcs and keys.
    pub fn rewrite(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for (address, name) in &self.addresses {
            text = text.replace(&address.to_string(), name);
        }
        for (start, from) in &self.arcs {
            for (end, to) in &self.arcs {
                text = text.replace(&format!("[{start},{end})"), &format!("[{from},{to})"));
            }
        }
        for (key, alias) in &self.keys {
            text = text.replace(&format!("\"{key}\""), &format!("\"{alias}\""));
        }
        text
    }

    /// One line about the group at `index` of `view`.
    pub fn group_line(&self, view: &View, index: usize) -> String {
        let group = &view.groups[index];
        let arc = self.arc(group.start);
        let mut line = format!("arc {arc}, {}: ", group.version);
        let Some(primary) = &group.primary else {
            let held: Vec<String> =
                group.held_by.iter().map(|holder| self.of(&holder.id)).collect();
            let _ = write!(line, "lost; held last by {}", held.join(" "));
            return line;
        };
        let _ = write!(line, "{} leads", self.of(primary));
        let ready = self.seats(group, |id| id != primary && group.ready.contains(id));
        let is_aside = |id: &Identity| group.seat(id).is_some_and(|seat| seat.aside);
        let is_other = |id: &Identity| id != primary && !group.ready.contains(id);
        let others = self.seats(group, |id| is_other(id) && !is_aside(id));
        let aside = self.seats(group, |id| is_other(id) && is_aside(id));
        for (what, names) in [("ready", ready), ("not ready", others), ("aside", aside)] {
            if !names.is_empty() {
                let _ = write!(line, "; {what} {}", names.join(" "));
            }
        }
        if group.established {
            line.push_str("; established");
        }
        line
    }

    /// The names of the replicas that are `wanted`, sorted.
    fn seats(&self, group: &Group, wanted: impl Fn(&Identity) -> bool) -> Vec<String> {
        let seats = group.replicas.iter().filter(|seat| wanted(&seat.id));
        let mut names: Vec<String> = seats.map(|seat| self.of(&seat.id)).collect();
        names.sort_unstable();
        names
    }

    /// The whole view: its counters, and a line for each group, by the arcs'
    /// names.
    pub fn view_lines(&self, view: &View) -> String {
        let mut groups: Vec<usize> = (0..view.groups.len()).collect();
        groups.sort_by_key(|index| self.arc(view.groups[*index].start));
        let mut members: Vec<String> = view.members.iter().map(|m| self.of(&m.id)).collect();
        members.sort_unstable();
        let mut text = format!("{} {}: {}\n", view.epoch, view.revision, members.join(" "));
        for index in groups {
            let _ = writeln!(text, "{}", self.group_line(view, index));
        }
        text
    }

    /// What has changed from `before` to `after`: who came, who went, and each
    /// group that is not as it was.
    pub fn changes(&self, before: &View, after: &View) -> (Vec<String>, Vec<String>) {
        let mut members = Vec::new();
        for gone in before.members.iter().filter(|member| after.member(&member.id).is_none()) {
            members.push(format!("{} is out; {}", self.of(&gone.id), after.epoch));
        }
        for new in after.members.iter().filter(|member| before.member(&member.id).is_none()) {
            members.push(format!("{} is in; {}", self.of(&new.id), after.epoch));
        }
        let mut groups: Vec<String> = (0..after.groups.len())
            .filter(|index| !before.groups.contains(&after.groups[*index]))
            .map(|index| self.group_line(after, index))
            .collect();
        groups.sort_unstable();
        (members, groups)
    }
}
