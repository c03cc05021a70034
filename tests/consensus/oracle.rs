//! What must hold whatever happens, apart from whoever makes it happen.

use std::collections::{BTreeMap, BTreeSet};

/// Sees what all nodes apply, in all their lives, and what they tell.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    /// The command that was applied at each place of the log, by whoever came
    /// there first.
    log: BTreeMap<u64, u64>,
    /// Which commands those are.
    applied: BTreeSet<u64>,
    /// Commands of which their proposer was told that they are applied.
    pub(crate) acknowledged: BTreeSet<u64>,
}

impl Oracle {
    /// A node applies `command` at `index`.
    pub(crate) fn applies(&mut self, index: u64, command: u64) -> Result<(), String> {
        match self.log.get(&index) {
            Some(known) if *known == command => Ok(()),
            Some(known) => Err(format!("entry {index} is {command}, and was {known}")),
            None if !self.applied.insert(command) => Err(format!("{command} is applied twice")),
            None => {
                self.log.insert(index, command);
                Ok(())
            }
        }
    }

    /// A state goes on from one that holds everything up to `index`.
    pub(crate) fn holds(&self, index: u64, state: &[u64]) -> Result<(), String> {
        let due: Vec<u64> = self.log.range(..=index).map(|(_, command)| *command).collect();
        if due == state {
            Ok(())
        } else {
            Err(format!("the state at {index} is {state:?}, and should be {due:?}"))
        }
    }
}
