#!/usr/bin/env python3
"""A stand-in for the original viewleader: who is a member, at which epoch, and who holds a lock.

A server is a member while it heartbeats under one identity: every heartbeat gives it a lease of
30 s. An identity whose lease has once run out is denied for good. Every change of membership
raises the epoch. A lock belongs to the first in its queue.

Rebalancing is left out: this viewleader starts none when its view changes.
"""
import threading
import time

from ring import position
from wire import VIEWLEADER_PORTS, Listener

LEASE_SECONDS = 30


class Viewleader:
    def __init__(self):
        self.guard = threading.RLock()
        self.epoch = 0
        self.members = {}  # identity -> (address, the moment its lease runs out)
        self.expired = set()  # identities that are denied from now on
        self.locks = {}  # lock -> requestors in order of arrival: the first one holds it

    def expire(self):
        now = time.monotonic()
        late = [who for who, (_, deadline) in self.members.items() if deadline < now]
        for identity in late:
            del self.members[identity]
            self.expired.add(identity)
        self.epoch += len(late)

    def do_heartbeat(self, request, peer):
        identity, address = request["requestor"], "%s:%d" % (peer, request["port"])
        with self.guard:
            self.expire()
            if identity in self.expired:
                return {"status": "deny"}
            known, _ = self.members.get(identity, (None, None))
            if address != known:
                if address in (taken for taken, _ in self.members.values()):
                    return {"status": "retry", "epoch": self.epoch}
                self.epoch += 1
            self.members[identity] = (address, time.monotonic() + LEASE_SECONDS)
            return {"status": "ok", "epoch": self.epoch}

    def do_query_servers(self, _request, _peer):
        with self.guard:
            self.expire()
            ring = [[address, position(str(who))] for who, (address, _) in self.members.items()]
            return {"result": sorted(ring, key=lambda server: server[1]), "epoch": self.epoch}

    def do_lock_get(self, request, _peer):
        requestor = request["requestor"]
        with self.guard:
            queue = self.locks.setdefault(request["lockid"], [])
            if requestor not in queue:
                queue.append(requestor)
            return {"status": "granted" if queue[0] == requestor else "retry"}

    def do_lock_release(self, request, _peer):
        lock = request["lockid"]
        with self.guard:
            if lock not in self.locks:
                return {"status": "unknown"}
            self.locks[lock].remove(request["requestor"])  # a stranger makes this raise, as it did
            if not self.locks[lock]:
                del self.locks[lock]
            return {"status": "ok"}


if __name__ == "__main__":
    Listener(Viewleader(), VIEWLEADER_PORTS).run()
