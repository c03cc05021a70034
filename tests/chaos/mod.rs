//! Chaos: the real programs under real faults, and a judge of what clients saw.
//!
//! Three viewleaders and some servers run as processes. Clients write and read a few
//! keys through any server, and note on one clock what they asked for, when, and
//! what they were answered. Meanwhile a schedule drawn from a seed does harm: it
//! kills, stops, cuts off, fills disks, lets servers join and leave. In the end
//! everything is healed; then all must come to rest, every server be asked for
//! every key, and the whole history be linearizable.
//!
//! * [`faults`]: what harm there is, and the schedule.
//! * [`network`]: where the programs run: each in a network namespace of its own
//!   (root, Linux, `ip`, `nft`), where links can be cut; else all on loopback.
//! * [`delay`]: the proxy that makes links slow.
//! * [`programs`]: the processes.
//! * [`replacing`]: a viewleader whose disk is gone, or which another one is to replace.
//! * [`clients`]: what is asked and noted.
//! * [`locks`]: clients that take locks and write under their tokens, and what must be so.
//! * [`report`]: what is said of it in the end.
//!
//! The same seed draws the same schedule and the same requests; what processes and
//! their system make of it differs from run to run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test may panic and print, and stands outside of the machines: it has a clock, \
              sockets and threads"
)]
#![allow(dead_code, reason = "the command and the test use the part that each needs")]

pub(crate) mod clients;
pub(crate) mod delay;
pub(crate) mod faults;
pub(crate) mod locks;
pub(crate) mod network;
#[path = "../support/process.rs"]
pub(crate) mod process;
pub(crate) mod programs;
pub(crate) mod replacing;
pub(crate) mod report;

use clients::Clients;
use faults::{Fault, Planned, schedule};
use locks::Lockers;
use network::Network;
use programs::Programs;
use rand::SeedableRng;
use rand::rngs::StdRng;
use report::Report;
use ringleader::sim::linearizability::{MAX_STEPS, check};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The lease that the servers ask for.
pub(crate) const LEASE: Duration = Duration::from_secs(2);

/// How often the schedule is looked at.
const TICK: Duration = Duration::from_millis(20);

/// How long all may take to come to rest after everything is healed.
const REST_PATIENCE: Duration = Duration::from_secs(120);

/// How a run is to be.
pub(crate) struct Settings {
    /// Where the programs are.
    pub(crate) programs: PathBuf,
    /// Where they run.
    pub(crate) network: Network,
    /// How long harm is done.
    pub(crate) span: Duration,
    /// What the schedule and the requests are drawn from.
    pub(crate) seed: u64,
    /// With how many servers it begins.
    pub(crate) servers: usize,
    /// How many clients there are.
    pub(crate) clients: usize,
    /// When set, the run ends early.
    pub(crate) interrupted: Arc<AtomicBool>,
}

/// Runs it all.
///
/// # Panics
/// If the cluster can't even be started.
pub(crate) fn run(settings: Settings) -> Report {
    let Settings { programs, network, span, seed, servers, clients, interrupted } = settings;
    let plan = schedule(&mut StdRng::seed_from_u64(seed), span, servers, network.can_cut());
    let place = network.to_string();
    let mut programs = Programs::start(programs, network, servers);
    programs.wait_until_at_rest(REST_PATIENCE).unwrap_or_else(|why| panic!("no start: {why}"));
    let clients = Clients::start(clients, seed, programs.serving());
    let viewleaders = programs.viewleaders().collect();
    let lockers = Lockers::start(&clients, seed, viewleaders);

    let mut harm = Harm { programs, clients: &clients, done: BTreeMap::new(), drawn_in_vain: 0 };
    harm.carry_out(&plan, span, &interrupted);
    let Harm { mut programs, done, drawn_in_vain, .. } = harm;

    let mut rest = Ok(());
    let interrupted = interrupted.load(Ordering::Relaxed);
    if !interrupted {
        programs.heal();
        clients.use_servers(programs.serving());
        rest = programs.wait_until_at_rest(REST_PATIENCE);
    }
    let locked = lockers.end();
    let mut seen = clients.end();
    locked.add_to(&mut seen);
    if !interrupted && rest.is_ok() {
        seen.use_everything(&programs.serving());
    }
    let started = Instant::now();
    let verdict = check(&seen.history, MAX_STEPS);
    Report {
        seed,
        span,
        place,
        interrupted,
        faults: done,
        drawn_in_vain,
        rest,
        mishaps: programs.mishaps(),
        checking: started.elapsed(),
        seen,
        verdict,
        logs: programs.logs(),
    }
}

/// The schedule being carried out.
struct Harm<'a> {
    programs: Programs,
    clients: &'a Clients,
    done: BTreeMap<&'static str, usize>,
    drawn_in_vain: usize,
}

/// What is to be done at some moment.
#[derive(Clone, Copy)]
enum Step {
    Begin(usize),
    End(usize),
}

impl Harm<'_> {
    fn carry_out(&mut self, plan: &[Planned], span: Duration, interrupted: &AtomicBool) {
        let mut steps: Vec<(Duration, Step)> = Vec::new();
        for (index, planned) in plan.iter().enumerate() {
            steps.push((planned.at, Step::Begin(index)));
            steps.push((planned.at + planned.lasts, Step::End(index)));
        }
        steps.sort_by_key(|&(at, _)| at);
        let mut begun: Vec<Option<Fault>> = plan.iter().map(|_| None).collect();
        let start = Instant::now();
        let mut steps = steps.into_iter().peekable();
        while start.elapsed() < span && !interrupted.load(Ordering::Relaxed) {
            while let Some((_, step)) = steps.next_if(|&(at, _)| at <= start.elapsed()) {
                match step {
                    Step::Begin(index) => {
                        let planned = &plan[index].fault;
                        let leader = self.programs.leader().unwrap_or_default();
                        let fault = planned.resolved(leader);
                        if self.begin(index, &fault) {
                            println!("{:>8.1?} {fault}", start.elapsed());
                            *self.done.entry(planned.kind()).or_default() += 1;
                            begun[index] = Some(fault);
                        } else {
                            self.drawn_in_vain += 1;
                        }
                    }
                    Step::End(index) => {
                        if let Some(fault) = &begun[index] {
                            self.end(index, fault);
                        }
                    }
                }
                self.clients.use_servers(self.programs.serving());
            }
            self.programs.look();
            thread::sleep(TICK);
        }
    }

    /// Begins to do harm; false where it can't be done now.
    fn begin(&mut self, index: usize, fault: &Fault) -> bool {
        let programs = &mut self.programs;
        match fault {
            Fault::Kill(who) => programs.kill(who),
            Fault::Pause(who) => programs.pause(*who),
            Fault::Cut(cut) => {
                let links = cut.links(&programs.present());
                !links.is_empty() && programs.network.cut(index, links)
            }
            Fault::Lose(percent) => programs.network.lose(index, *percent),
            Fault::Delay(who, ms) => {
                programs.network.delay(index, *who, Duration::from_millis(*ms))
            }
            Fault::Fill(who) => programs.fill(*who),
            Fault::Join => programs.join(),
            Fault::Drain(who) => programs.drain(*who),
            Fault::Erase(who) => programs.replace(*who, false),
            Fault::Replace(who) => programs.replace(*who, true),
        }
    }

    /// Makes it good again.
    fn end(&mut self, index: usize, fault: &Fault) {
        let programs = &mut self.programs;
        match fault {
            Fault::Kill(who) => programs.restart(who),
            Fault::Pause(who) => programs.go_on(*who),
            Fault::Cut(_) | Fault::Lose(_) | Fault::Delay(..) => programs.network.mend(index),
            Fault::Fill(who) => programs.empty(*who),
            Fault::Join | Fault::Drain(_) | Fault::Erase(_) | Fault::Replace(_) => {}
        }
    }
}
