#!/usr/bin/env python3
"""A stand-in for the original client: one command, and the reply as JSON on standard output.

Every parsed argument goes into the request, needed or not. HOST is a host alone: the client walks
the port range there and takes the first port whose reply has no "error" key.
"""
import argparse
import json
import sys
import time

from ring import replicas
from wire import SERVER_PORTS, VIEWLEADER_PORTS, call, call_first

LOCK_RETRY_SECONDS = 5

COMMANDS = {  # command -> the arguments after it
    "print": ["text"],
    "set": ["key", "val"],
    "get": ["key"],
    "query_all_keys": [],
    "query_servers": [],
    "lock_get": ["lockid", "requestor"],
    "lock_release": ["lockid", "requestor"],
    "setr": ["key", "val"],
    "getr": ["key"],
}


def parse():
    flags = argparse.ArgumentParser(description="A client of the original key-value system.")
    flags.add_argument("--server", metavar="HOST", default="127.0.0.1")
    flags.add_argument("--viewleader", metavar="HOST", default="127.0.0.1")
    commands = flags.add_subparsers(dest="cmd", metavar="COMMAND", required=True)
    for name, arguments in COMMANDS.items():
        command = commands.add_parser(name)
        for argument in arguments:
            command.add_argument(argument, nargs="+" if argument == "text" else None)
    return vars(flags.parse_args())


def to_server(request):
    return call_first(request["server"], SERVER_PORTS, request)


def to_viewleader(request):
    return call_first(request["viewleader"], VIEWLEADER_PORTS, request)


def lock_get(request):
    while True:
        reply = to_viewleader(request)
        if reply.get("status") != "retry":
            return reply
        print("waiting for lock %s" % request["lockid"], file=sys.stderr, flush=True)
        time.sleep(LOCK_RETRY_SECONDS)


def find_replicas(request):
    """The view, and the addresses that hold the request's key; a view with an error has none."""
    view = to_viewleader(dict(request, cmd="query_servers"))
    if not view.get("result"):
        return {"error": view.get("error", "the view has no servers")}, []
    return view, replicas(view["result"], request["key"])


def setr(request):
    view, holders = find_replicas(request)
    if "error" in view:
        return view
    votes = [call(holder, dict(request, cmd="setr_request")) for holder in holders]
    denied = any(vote.get("reply") != "ok" for vote in votes)
    outdated = any(vote.get("epoch") != view["epoch"] for vote in votes)
    for holder in holders:
        call(holder, dict(request, cmd="setr_deny" if denied or outdated else "setr"))
    if denied:
        failed = [vote["error"] for vote in votes if "error" in vote]
        return {"error": (failed + ["key already being set"])[0]}
    return {"error": "server with wrong epoch"} if outdated else {"status": "ok"}


def getr(request):
    view, holders = find_replicas(request)
    reply = view
    for holder in holders:
        reply = call(holder, dict(request, cmd="get"))
        if "error" not in reply:
            break
    return reply


SPECIAL = {
    "setr": setr,
    "getr": getr,
    "lock_get": lock_get,
    "lock_release": to_viewleader,
    "query_servers": to_viewleader,
}

if __name__ == "__main__":
    request = parse()
    reply = SPECIAL.get(request["cmd"], to_server)(request)
    print(json.dumps(reply), flush=True)
    sys.exit(1 if "error" in reply else 0)
