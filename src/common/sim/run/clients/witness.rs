//! The witness: once all is at rest, it has the cluster do what it is there for.
//!
//! That everything is where it belongs is not enough: somebody who may write must be able
//! to. So the real client, over the network, writes each key and reads it, and gets each
//! lock and gives it back. The network is as bad as ever, so it may take more than one
//! try, but not longer than [`IN_USE`] for any of them.

use super::super::{Judgement, Run};
use super::{Job, Trade};
use crate::kv::Text;
use crate::sim::linearizability::Call;
use std::time::Duration;

/// How long one thing may take that can be done at once.
const IN_USE: Duration = Duration::from_secs(60);

/// How often it is looked whether it is done.
const GLANCE: Duration = Duration::from_millis(10);

impl Run {
    /// Writes and reads each key, and gets each lock and gives it back.
    pub(in crate::sim::run) fn put_to_use(&mut self) -> Judgement {
        self.say(|_| "it is put to use".to_owned());
        let is_witness = |client: &super::Client| client.trade == Trade::Witness;
        let Some(witness) = self.clients.all.iter().rposition(is_witness) else { return Ok(()) };
        for key in self.keys.clone() {
            self.insist(witness, |run| {
                let value = run.value(witness);
                Job::Ask { key: Text::clone(&key), call: Call::Write { value } }
            })?;
            self.insist(witness, |_| Job::Ask { key: Text::clone(&key), call: Call::Read })?;
        }
        for number in 0..super::locking::LOCKS {
            self.insist(witness, |run| Job::Lock(run.wish_of_witness(witness, number)))?;
        }
        Ok(())
    }

    /// Has the witness do the job, again until it is done.
    fn insist(&mut self, witness: usize, job: impl Fn(&mut Self) -> Job) -> Judgement {
        let (deadline, before) = (self.cluster.now() + IN_USE, self.done());
        loop {
            let job = job(self);
            self.begin(witness, job.clone())?;
            // It gives a lock back, too, before it is done.
            while self.clients.unanswered().is_some() {
                self.go_on_until(self.cluster.now() + GLANCE)?;
            }
            if self.done() > before {
                return Ok(());
            }
            if self.cluster.now() > deadline {
                return self.fails("liveness", format!("at rest nobody does this: {job:?}"));
            }
        }
    }

    /// How much has been done: nobody else does anything when all is at rest.
    fn done(&self) -> u64 {
        self.tally.written + self.tally.read + self.tally.granted
    }
}
