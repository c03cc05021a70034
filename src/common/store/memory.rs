//! A store in memory: what a test, a simulator or a trial needs.

use super::{Change, Durability, Space, Store, StoreError};
use std::collections::BTreeMap;
use std::ops::Bound;

/// A store that lasts as long as the process. It never fails.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStore {
    spaces: [BTreeMap<Vec<u8>, Vec<u8>>; Space::ALL.len()],
}

impl Store for MemoryStore {
    /// Always: there is nothing more to wait for.
    fn durability(&self) -> Durability {
        Durability::Always
    }

    fn commit(&mut self, batch: &[Change]) -> Result<(), StoreError> {
        batch.iter().for_each(Change::assert_writable);
        for change in batch {
            match change {
                Change::Put { space, key, value } => {
                    self.spaces[*space as usize].insert(key.clone(), value.clone());
                }
                Change::Remove { space, key } => {
                    self.spaces[*space as usize].remove(key);
                }
            }
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    fn get(&self, space: Space, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.spaces[space as usize].get(key).cloned())
    }

    fn scan(
        &self,
        space: Space,
        from: &[u8],
        take: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), StoreError> {
        let range = (Bound::Included(from), Bound::Unbounded);
        for (key, value) in self.spaces[space as usize].range::<[u8], _>(range) {
            if !take(key, value) {
                break;
            }
        }
        Ok(())
    }
}
