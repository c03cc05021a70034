//! What happens to viewleaders: faults, and changes of their group.
//!
//! The group is changed as an operator does it: a client asks for one change, again and
//! again until it is made, and only then for the next one. A disk is lost only while all
//! others are members and no change is under way; then whoever sits there is replaced,
//! with or without being removed first.

use super::{DOZE_MS, Fault, Run, Trouble};
use crate::machine::Time;
use crate::sim::network::Party;
use rand::RngExt;
use std::collections::BTreeMap;
use std::time::Duration;

/// How many viewleaders there are at most.
const MAX_VIEWLEADERS: usize = 5;

/// How many sites for them there are at most.
const MAX_SITES: usize = 7;

/// How a site stands to the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seat {
    /// Its viewleader is a member.
    In,
    /// Its viewleader waits to be added.
    Coming,
    /// Its viewleader is to be removed.
    Going,
    /// Nobody is there, or somebody who was removed.
    Out,
}

/// Where viewleaders stand.
#[derive(Debug)]
pub(in crate::sim::run) struct Council {
    seats: BTreeMap<usize, Seat>,
}

impl Council {
    pub(super) fn of(count: usize) -> Self {
        Self { seats: (0..count).map(|site| (site, Seat::In)).collect() }
    }

    fn count(&self, seat: Seat) -> usize {
        self.seats.values().filter(|it| **it == seat).count()
    }

    /// Those that are members.
    pub(in crate::sim::run) fn members(&self) -> impl Iterator<Item = usize> {
        self.seats.iter().filter(|(_, seat)| **seat == Seat::In).map(|(site, _)| *site)
    }

    /// Whether a change of the group is under way.
    pub(in crate::sim::run) fn is_changing(&self) -> bool {
        self.count(Seat::Coming) + self.count(Seat::Going) > 0
    }
}

impl Fault {
    pub(super) fn is_about_viewleaders(self) -> bool {
        let is_single = matches!(self, Self::KillViewleader | Self::PauseViewleader);
        is_single || self.is_of_a_group()
    }
}

impl Run {
    /// The sites where somebody is, or will be again.
    pub(super) fn sites_in_use(&self) -> Vec<usize> {
        let seats = self.troubles.council.seats.iter();
        seats.filter(|(_, seat)| **seat != Seat::Out).map(|(site, _)| *site).collect()
    }

    /// A viewleader that nothing is wrong with, often the one that leads.
    pub(super) fn pick_viewleader(&mut self) -> Option<usize> {
        let is_well = |site: &usize| {
            let party = Party::Viewleader(*site);
            self.cluster.is_viewleader_alive(*site) && !self.troubles.parties.contains_key(&party)
        };
        let well: Vec<usize> = self.sites_in_use().into_iter().filter(is_well).collect();
        let leader = self.cluster.leader().filter(|site| well.contains(site));
        if well.is_empty() {
            return None;
        }
        let any = well[self.rng.random_range(0..well.len())];
        leader.filter(|_| self.rng.random_bool(0.6)).or(Some(any))
    }

    pub(super) fn can_harm_viewleaders(&self, fault: Fault) -> bool {
        let council = &self.troubles.council;
        let can_change = !council.is_changing() && self.cluster.leader().is_some();
        let members = council.count(Seat::In);
        match fault {
            Fault::LoseViewleader => can_change && members >= 3,
            Fault::RemoveViewleader => can_change && members >= 2,
            Fault::AddViewleader => can_change && members < MAX_VIEWLEADERS,
            _ => true,
        }
    }

    /// Returns whether anybody was harmed.
    pub(super) fn harm_viewleaders(&mut self, fault: Fault, span: Duration) -> bool {
        if fault == Fault::AddViewleader {
            return self.add_viewleader();
        }
        let Some(site) = self.pick_viewleader() else { return false };
        let party = Party::Viewleader(site);
        match fault {
            Fault::KillViewleaders => {
                for site in self.sites_in_use() {
                    let party = Party::Viewleader(site);
                    if !self.troubles.parties.contains_key(&party) {
                        let span = self.span() / 2;
                        self.cluster.kill(party);
                        self.is_in_trouble_for(party, Trouble::Down, span);
                    }
                }
            }
            Fault::EndViewleader => {
                self.cluster.end_viewleader(site);
                self.is_in_trouble_for(party, Trouble::Down, span / 2);
            }
            Fault::PauseViewleader => {
                self.cluster.pause(party);
                self.is_in_trouble_for(party, Trouble::Paused, span);
            }
            Fault::DozeApart => {
                let all = Duration::from_millis(self.rng.random_range(DOZE_MS));
                self.raise_wall(fault, party, all);
                self.doze(party, self.cluster.now() + all);
            }
            Fault::LoseViewleader => self.lose_viewleader(site, span / 2),
            Fault::RemoveViewleader => {
                self.troubles.council.seats.insert(site, Seat::Going);
                self.wish_for_viewleader(site, false);
            }
            _ => {
                self.cluster.kill(party);
                self.is_in_trouble_for(party, Trouble::Down, span / 2);
            }
        }
        true
    }

    /// The disk of the viewleader at `site` is lost. Another one comes there after `span`,
    /// and is let in.
    fn lose_viewleader(&mut self, site: usize, span: Duration) {
        self.cluster.erase_viewleader(site);
        self.is_in_trouble_for(Party::Viewleader(site), Trouble::Down, span);
        self.troubles.council.seats.insert(site, Seat::Coming);
        if self.rng.random_bool(0.5) {
            self.wish_for_viewleader(site, false);
        }
        self.wish_for_viewleader(site, true);
    }

    /// The operator was told that what it wished is done, and may count on it: all
    /// viewleaders lose their power, and one that is not needed for a majority its disk.
    pub(in crate::sim::run) fn put_new_group_to_the_test(&mut self) {
        let council = &self.troubles.council;
        let members: Vec<usize> = council.members().collect();
        let is_in_time = self.cluster.now() < Time::default() + self.options.busy;
        let may_be = self.options.kinds.contains(&Fault::LoseViewleader) && is_in_time;
        if !may_be || council.is_changing() || members.len() < 3 || self.rng.random_bool(0.5) {
            return;
        }
        self.say(|_| "the viewleaders lose their power, and one its disk".to_owned());
        for site in self.sites_in_use() {
            let span = self.span() / 2;
            self.cluster.kill(Party::Viewleader(site));
            self.is_in_trouble_for(Party::Viewleader(site), Trouble::Down, span);
        }
        let lost = members[self.rng.random_range(0..members.len())];
        let span = self.span() / 2;
        self.lose_viewleader(lost, span);
        self.troubles.note_due();
    }

    fn add_viewleader(&mut self) -> bool {
        let seats = &self.troubles.council.seats;
        let out = seats.iter().filter(|(_, seat)| **seat == Seat::Out).map(|(site, _)| *site);
        let out: Vec<usize> = out.collect();
        let is_new = out.is_empty() || self.rng.random_bool(0.3);
        let site = if is_new && self.cluster.viewleaders() < MAX_SITES {
            let clock = self.clock();
            self.cluster.add_viewleader(clock)
        } else if let Some(site) = out.first() {
            self.cluster.renew_viewleader(*site);
            *site
        } else {
            return false;
        };
        self.troubles.council.seats.insert(site, Seat::Coming);
        self.wish_for_viewleader(site, true);
        true
    }

    /// The operator's wish about the viewleader at `site` is fulfilled.
    pub(in crate::sim::run) fn viewleader_changed(&mut self, site: usize, is_added: bool) {
        let seats = &mut self.troubles.council.seats;
        match (is_added, seats.get(&site).copied()) {
            (true, _) => {
                seats.insert(site, Seat::In);
            }
            (false, Some(Seat::Going)) => {
                seats.insert(site, Seat::Out);
                // Somebody may forget to end it.
                if self.rng.random_bool(0.5) {
                    self.troubles.parties.remove(&Party::Viewleader(site));
                    self.cluster.kill(Party::Viewleader(site));
                }
            }
            // It comes back.
            (false, _) => {}
        }
    }
}
