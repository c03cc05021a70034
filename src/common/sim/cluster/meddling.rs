//! Meddling with messages and disks, by hand or by chance: what a script can do to
//! a cluster beside killing and pausing.

use super::shells::Call;
use super::{BAD_NEWS, Cluster, Event, Silence};
use crate::kv::server::CallError;
use crate::sim::network::{Body, Lane, Party, Wall};
use std::collections::BTreeSet;

impl Cluster {
    /// Loses everything from and to `party` from now on.
    pub fn cut_off(&mut self, party: Party) {
        self.network.cut_off(party);
    }

    /// From now on, what is sent from the first to the second of one of these
    /// `pairs` is lost.
    pub fn raise_wall(&mut self, pairs: BTreeSet<(Party, Party)>) -> Wall {
        self.network.raise(pairs)
    }

    /// The wall stands no more.
    pub fn pull_down(&mut self, wall: Wall) {
        self.network.pull_down(wall);
    }

    /// The server `new` is where the server `old` was: behind the same walls.
    pub fn take_place(&mut self, old: usize, new: usize) {
        self.network.take_place(Party::Server(old), Party::Server(new));
    }

    /// The connection of `caller` to `callee` breaks: of what is on its way the
    /// last part is lost, each way, and the caller is told soon.
    pub(super) fn break_connection(&mut self, caller: Party, callee: Party, lane: Lane) {
        for back in [false, true] {
            let (sender, receiver) = if back { (callee, caller) } else { (caller, callee) };
            let is_on_it = |event: &Event| match event {
                Event::Arrival { from, to, lane: on, parcel } => {
                    let is_back = !matches!(parcel.body, Body::Request(_));
                    (*from, *to, *on, is_back) == (sender, receiver, lane, back)
                }
                _ => false,
            };
            let under_way = self.events.iter().filter(|(_, event)| is_on_it(event));
            let under_way: Vec<_> = under_way.map(|(place, _)| *place).collect();
            let saved = self.chance.saved(under_way.len());
            for place in &under_way[saved..] {
                self.events.remove(place);
            }
        }
        self.network.renew(caller, callee, lane);
        let told = self.now + BAD_NEWS;
        let is_on_it =
            |call: &Call| (call.caller, call.callee, call.lane) == (caller, Some(callee), lane);
        let calls = self.calls.iter().filter(|(_, call)| is_on_it(call));
        for rpc in calls.map(|(rpc, _)| *rpc).collect::<Vec<_>>() {
            self.at(told, Event::Ended { rpc, error: CallError::Lost });
        }
        let Party::Client(client) = caller else { return };
        let calls = self.client_calls.iter();
        let calls = calls.filter(|(_, it)| (it.client, it.callee) == (client, Some(callee)));
        for rpc in calls.map(|(rpc, _)| *rpc).collect::<Vec<_>>() {
            self.at(told, Event::Silent { rpc, silence: Silence::Lost });
        }
    }

    /// The next batch that the party gives to its disk fails, and that ends it.
    pub fn break_disk(&mut self, party: Party) {
        self.disk_mut(party).is_failing = true;
    }

    /// Whether the next batch will fail.
    pub fn is_disk_failing(&self, disk: usize) -> bool {
        self.disks[disk].is_failing
    }

    /// No disk is about to fail any more, nor slower than can be borne.
    pub fn mend_disks(&mut self) {
        self.chance.mend_disks();
        let viewleaders = self.viewleaders.iter_mut().map(|it| &mut it.disk);
        self.disks.iter_mut().chain(viewleaders).for_each(|disk| disk.is_failing = false);
    }

    /// Ends that.
    pub fn heal(&mut self, party: Party) {
        self.network.heal(party);
    }

    /// From now on, what `from` sends to `to` waits; or only what it sends on one
    /// lane.
    pub fn hold(&mut self, from: Party, to: Party, only: Option<Lane>) {
        self.network.hold(from, to, only);
    }

    /// What `from` sends to `to` waits no more, nor does what has waited.
    pub fn release(&mut self, from: Party, to: Party) {
        for (lane, parcel) in self.network.release(from, to) {
            self.at(self.now, Event::Arrival { from, to, lane, parcel });
        }
    }

    /// Lets up to `count` messages through of those that wait and have `words` in
    /// them.
    pub fn deliver(&mut self, from: Party, to: Party, count: usize, words: &str) {
        let Some(waiting) = self.network.waiting(from, to) else { return };
        let (mut through, mut rest) = (Vec::new(), Vec::new());
        for (lane, parcel) in std::mem::take(waiting) {
            let is_wanted = through.len() < count && parcel.words.contains(words);
            if is_wanted { &mut through } else { &mut rest }.push((lane, parcel));
        }
        *waiting = rest;
        for (lane, parcel) in through {
            self.at(self.now, Event::Arrival { from, to, lane, parcel });
        }
    }

    /// Puts a copy behind each of what waits.
    pub fn duplicate(&mut self, from: Party, to: Party) {
        let Some(waiting) = self.network.waiting(from, to) else { return };
        *waiting = waiting.iter().flat_map(|parcel| [parcel.clone(), parcel.clone()]).collect();
    }

    /// Loses what waits. Only a time-out tells whoever sent it.
    pub fn drop_waiting(&mut self, from: Party, to: Party) {
        if let Some(waiting) = self.network.waiting(from, to) {
            waiting.clear();
        }
    }

    /// What waits from `from` to `to`, in words.
    pub fn waiting(&mut self, from: Party, to: Party) -> Vec<String> {
        let waiting = self.network.waiting(from, to).map(std::mem::take).unwrap_or_default();
        let words = waiting.iter().map(|(_, parcel)| self.words(from, to, &parcel.words)).collect();
        if let Some(place) = self.network.waiting(from, to) {
            *place = waiting;
        }
        words
    }

    /// From now on, what `party` writes does not reach its disk.
    pub fn hold_disk(&mut self, party: Party) {
        self.disk_mut(party).hold();
    }

    /// Now it does, and what has waited, too.
    pub fn release_disk(&mut self, party: Party) {
        if let Some(number) = self.disk_mut(party).release() {
            let life = self.life(party);
            self.at(self.now, Event::Stored { party, life, number });
        }
    }

    /// The server's disk has no room: nothing that it writes is stored, and it is
    /// told so.
    pub fn fill_disk(&mut self, server: usize) {
        self.hold_disk(Party::Server(server));
        self.handle(Event::Room { at: server, is_room: false });
    }

    /// The server's disk has room again.
    pub fn clear_disk(&mut self, server: usize) {
        self.handle(Event::Room { at: server, is_room: true });
        self.release_disk(Party::Server(server));
    }
}
