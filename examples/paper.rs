//! The paper exercise: what a ring of many servers would do, worked out with the code
//! that viewleader and servers run, while none of them is started.
//!
//! Servers join one after the other and choose their places as they do in earnest
//! ([`choose_identity`]). A [`State`] then leads their groups through every step of a
//! rebalancing, and is told at once what replicas would report after a while: so the
//! views are real ones, and so is what moves. Then one more server joins, several times
//! over from the same state; the table has the mean of what that took.
//!
//! Every point of the ring is taken for as much data as any other, which is where
//! SHA-1 gets with many keys. Sizes of data are parts of all of it, counted once.
#![allow(missing_docs, reason = "a program's flags document themselves")]
#![allow(clippy::print_stdout, reason = "a program that prints a table")]

use clap::Parser;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ringleader::kv::ring::{Point, REPLICAS, RING_POINTS, choose_identity};
use ringleader::kv::server::{BEATS_PER_LEASE, DEFAULT_LEASE};
use ringleader::view::state::{Change, State};
use ringleader::view::{Dialect, Group, Member, Start, View};
use ringleader::wire::Identity;
use std::net::{Ipv4Addr, SocketAddrV4};

/// How many servers there are.
const SIZES: [usize; 4] = [3, 12, 100, 1_000];

/// How many times one more joins, each time as the only one, to see what that takes.
const NEWCOMERS: usize = 10;

/// The address of the first server; the others count from there.
const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

/// Prints what rings of several sizes would do, as a table.
#[derive(Parser)]
#[command(name = "paper", version, max_term_width = 100)]
struct Flags {
    /// The seed from which servers draw their places
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
}

/// A viewleader's state, and what has happened to it.
struct Ring {
    state: State,
    rng: StdRng,
    /// Points whose data was sent to a server that had not had it.
    moved: u64,
    /// Changes that servers were told of.
    changes: u64,
}

impl Ring {
    fn new(state: State, seed: u64) -> Self {
        Self { state, rng: StdRng::seed_from_u64(seed), moved: 0, changes: 0 }
    }

    fn view(&self) -> &View {
        self.state.view()
    }

    fn apply(&mut self, change: Change) {
        let before = self.view().revision;
        self.state.apply(change);
        self.changes += u64::from(self.view().revision > before);
    }

    /// A server comes in, and nothing has moved yet.
    fn join(&mut self) {
        let taken: Vec<Point> = self.view().members.iter().map(|member| member.hash).collect();
        let id = choose_identity(&taken, &mut self.rng);
        let ip = Ipv4Addr::from_bits(FIRST_ADDRESS.to_bits() + taken.len() as u32);
        let member = Member {
            hash: Point::of(id.as_str()),
            id,
            address: SocketAddrV4::new(ip, 38_000),
            dialect: Dialect::Ringleader,
            lease_ms: DEFAULT_LEASE.as_millis() as u64,
            start: Some(Start { count: 1, drawn: self.rng.random() }),
            full: false,
            leaving: false,
        };
        let (lineage, formerly) = (Vec::new(), Vec::new());
        self.apply(Change::Join { member, lineage, formerly, chosen_in: None });
    }

    /// Lets the groups advance, and replicas report, until nothing is left to do.
    fn settle(&mut self) {
        while !self.view().is_settled() {
            self.apply(Change::Advance);
            let reports = self.fetch_and_report();
            reports.into_iter().for_each(|report| self.apply(report));
        }
    }

    /// Every replica that lacks something fetches it, and every primary sees that its
    /// group follows: what they would report.
    fn fetch_and_report(&mut self) -> Vec<Change> {
        let (mut reports, mut moved) = (Vec::new(), 0);
        let view = self.view();
        for (index, group) in view.groups.iter().enumerate() {
            let (start, version) = (group.start, group.version);
            for seat in group.replicas.iter().filter(|seat| !group.ready.contains(&seat.id)) {
                moved += u64::from(view.arc(index).length());
                reports.push(Change::Ready { id: seat.id.clone(), start, version });
            }
            if let Some(id) = group.primary.clone().filter(|_| !group.established) {
                reports.push(Change::Established { id, start, version });
            }
        }
        self.moved += moved;
        reports
    }

    /// How many times the mean the largest share of a server is, when the groups count
    /// for a server for which `counts` says so.
    fn imbalance(&self, counts: impl Fn(&Group, &Identity) -> bool) -> f64 {
        let view = self.view();
        let share = |member: &Member| -> u64 {
            let groups = view.groups.iter().enumerate();
            let own = groups.filter(|(_, group)| counts(group, &member.id));
            own.map(|(index, _)| u64::from(view.arc(index).length())).sum()
        };
        let shares: Vec<u64> = view.members.iter().map(share).collect();
        let mean = shares.iter().sum::<u64>() as f64 / shares.len() as f64;
        shares.into_iter().max().unwrap_or_default() as f64 / mean
    }
}

/// The line of the table for a ring of `servers`.
fn line(servers: usize, seed: u64) -> Result<String, serde_json::Error> {
    let mut ring = Ring::new(State::default(), seed);
    (0..servers).for_each(|_| ring.join());
    ring.settle();
    let primary = ring.imbalance(|group, id| group.primary.as_ref() == Some(id));
    let any = ring.imbalance(Group::seats);
    let groups = ring.view().groups.len();
    let view_bytes = serde_json::to_vec(ring.view())?.len();
    let beats = servers as f64 * f64::from(BEATS_PER_LEASE) / DEFAULT_LEASE.as_secs_f64();

    let (mut moved, mut changes) = (0, 0);
    for _ in 0..NEWCOMERS {
        let mut after = Ring::new(ring.state.clone(), ring.rng.random());
        after.join();
        after.settle();
        moved += after.moved;
        changes += after.changes;
    }
    let of_one = |sum: u64| sum as f64 / NEWCOMERS as f64;
    let (moved, changes) = (of_one(moved) / f64::from(RING_POINTS), of_one(changes));
    let ideal = REPLICAS as f64 / (servers + 1) as f64;
    let sent = (view_bytes * servers) as f64;
    Ok(format!(
        "| {servers} | {primary:.2} | {any:.2} | {:.2} % | {:.2} % | {groups} | {view_bytes} | \
         {beats:.0} | {sent:.0} | {changes:.0} | {:.0} |",
        moved * 100.0,
        ideal * 100.0,
        sent * changes,
    ))
}

fn main() -> Result<(), serde_json::Error> {
    let Flags { seed } = Flags::parse();
    println!(
        "| servers | most as primary | most as any of three | moved by a join | 3/(n+1) | groups | \
         bytes of a view | heartbeats/s | bytes of it to all | views in a join | bytes of them to all |\n\
         |---|---|---|---|---|---|---|---|---|---|---|"
    );
    for servers in SIZES {
        println!("{}", line(servers, seed)?);
    }
    Ok(())
}
