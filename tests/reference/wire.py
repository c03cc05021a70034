"""What the three stand-ins share: frames, calls, port ranges and the listener.

One message is a 4-byte big-endian signed length and then that many bytes of JSON. A call has a
connection to itself: one request, one reply, closed.
"""
import json
import os
import signal
import socket
import socketserver
import struct
import sys

LIMIT = 8192  # bytes: a message of this length or longer is refused on both ends
CONNECT_SECONDS = 5


def send(connection, message):
    body = json.dumps(message).encode("utf-8")
    if len(body) >= LIMIT:
        raise ValueError("refused to send a message of %d bytes" % len(body))
    connection.sendall(struct.pack("!i", len(body)) + body)


def receive(connection):
    (length,) = struct.unpack("!i", _read(connection, 4))
    if not 0 <= length < LIMIT:
        raise ValueError("refused to take a message of %d bytes" % length)
    return json.loads(_read(connection, length).decode("utf-8"))


def _read(connection, count):
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("closed by the other end")
        data += piece
    return data


def call(address, request):
    """The reply of HOST:PORT. A call that fails is a reply with an "error" key like any other."""
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS) as connection:
            connection.settimeout(None)  # the time-out is for connecting alone
            send(connection, request)
            return receive(connection)
    except (OSError, ValueError) as failure:
        return {"error": "%s: %s" % (address, failure)}


def call_first(host, ports, request):
    """The first reply without an "error" key on a walk over the ports; else the last error."""
    reply = {"error": "no ports to try"}
    for port in ports:
        reply = call("%s:%d" % (host, port), request)
        if "error" not in reply:
            break
    return reply


def port_range(program, base):
    """BASE[:COUNT] from RINGLEADER_REFERENCE_<program>_PORTS, else the ten ports from `base`."""
    given = os.environ.get("RINGLEADER_REFERENCE_%s_PORTS" % program, str(base))
    first, _, count = given.partition(":")
    return range(int(first), int(first) + int(count or 10))


VIEWLEADER_PORTS = port_range("VIEWLEADER", 39000)
SERVER_PORTS = port_range("SERVER", 38000)


class Listener(socketserver.ThreadingTCPServer):
    """A program on the first free port of its range, with a thread for each connection.

    The command `{"cmd": "x"}` is answered by the program's method `do_x(request, peer)`, `peer`
    being the caller's IP. A method that raises costs the caller its connection, and nobody else.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, program, ports):
        self.program = program
        interface = os.environ.get("RINGLEADER_REFERENCE_BIND", "0.0.0.0")
        for port in ports:
            try:
                super().__init__((interface, port), _Call)
                return
            except OSError:
                continue  # taken: try the next one
        sys.exit("no free port from %d to %d on %s" % (ports[0], ports[-1], interface))

    def run(self):
        """Serve until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        print("listening on %s:%d" % self.server_address, flush=True)
        self.serve_forever()

    def handle_error(self, request, client_address):
        failure = sys.exc_info()[1]
        print("a call of %s failed: %r" % (client_address[0], failure), file=sys.stderr, flush=True)


class _Call(socketserver.BaseRequestHandler):
    def handle(self):
        request = receive(self.request)
        command = getattr(self.server.program, "do_%s" % request["cmd"], None)
        if command is None:
            reply = {"error": "unknown command: %s" % request["cmd"]}
        else:
            reply = command(request, self.client_address[0])
        send(self.request, reply)
