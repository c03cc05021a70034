#!/usr/bin/env python3
"""A stand-in for the original server: keys and values in memory, votes on replicated sets.

It draws a numeric identity when it starts, and heartbeats to the viewleader under it every 10 s;
the replies tell it the epoch that its votes carry. Plain and replicated values share one table.

Rebalancing is left out: nothing moves when servers come and go.
"""
import argparse
import os
import random
import sys
import threading
import time

from wire import SERVER_PORTS, VIEWLEADER_PORTS, Listener, call_first

HEARTBEAT_SECONDS = float(os.environ.get("RINGLEADER_REFERENCE_HEARTBEAT", "10"))


class Server:
    def __init__(self):
        self.guard = threading.Lock()
        self.identity = random.randrange(10**12)
        self.epoch = 0
        self.values = {}
        self.pending = set()  # keys with a vote that is neither committed nor denied

    def heartbeat_for_ever(self, viewleader, port):
        beat = {"cmd": "heartbeat", "port": port, "requestor": self.identity}
        while True:
            reply = call_first(viewleader, VIEWLEADER_PORTS, beat)
            if reply.get("status") == "ok":
                self.epoch = reply["epoch"]
            else:
                print("heartbeat: %s" % reply, file=sys.stderr, flush=True)
            time.sleep(HEARTBEAT_SECONDS)

    def do_print(self, request, _peer):
        print(" ".join(request["text"]), flush=True)
        return {"status": "ok"}

    def do_set(self, request, _peer):
        with self.guard:
            self.values[request["key"]] = request["val"]
        return {"status": "ok"}

    def do_get(self, request, _peer):
        with self.guard:
            if request["key"] not in self.values:
                return {"status": "not_found"}
            return {"status": "ok", "value": self.values[request["key"]]}

    def do_query_all_keys(self, _request, _peer):
        with self.guard:
            return {"result": list(self.values)}

    def do_setr_request(self, request, _peer):
        with self.guard:
            if request["key"] in self.pending:
                return {"reply": "no"}
            self.pending.add(request["key"])
            return {"reply": "ok", "epoch": self.epoch}

    def do_setr(self, request, _peer):
        with self.guard:
            self.values[request["key"]] = request["val"]
            self.pending.discard(request["key"])
        return {}

    def do_setr_deny(self, request, _peer):
        with self.guard:
            self.pending.discard(request["key"])
        return {}


def main():
    flags = argparse.ArgumentParser(description="A server of the original key-value system.")
    flags.add_argument("--viewleader", metavar="HOST", default="127.0.0.1")
    viewleader = flags.parse_args().viewleader
    server = Server()
    listener = Listener(server, SERVER_PORTS)
    beats = (viewleader, listener.server_address[1])
    threading.Thread(target=server.heartbeat_for_ever, args=beats, daemon=True).start()
    listener.run()


if __name__ == "__main__":
    main()
