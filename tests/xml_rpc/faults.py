"""What can't be carried out is a fault that says why: `faults.py MASTER_URL CHUNKSERVER_URL`."""

import http.client
import sys
import xmlrpc.client


def connect(url):
    return xmlrpc.client.ServerProxy(url, allow_none=True)


def fault(call, *arguments):
    try:
        result = call(*arguments)
    except xmlrpc.client.Fault as fault:
        assert fault.faultString, "a fault without a word"
        return fault.faultCode
    raise AssertionError(f"{arguments} was taken: {result!r}")


def post(url, body, headers=None, method="POST", path="/RPC2"):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request(method, path, body=body, headers=headers or {})
    reply = connection.getresponse()
    return reply.status, reply.read()


master, server = map(connect, sys.argv[1:])
# The call itself.
for proxy in (master, server):
    assert fault(proxy.fly) == -32601
    assert fault(proxy.system.methodHelp, "fly") == -32601
    assert fault(proxy.system.listMethods, 1) == -32602
    assert fault(proxy.create) == -32602
    assert fault(proxy.create, 1, 2, 3, 4) == -32602
assert fault(master.create, ["x"]) == -32602
assert fault(master.read, "x", -1) == -32602
assert fault(master.read, "x", "0") == -32602
assert fault(master.heartbeat, "ftp://x", []) == -32602
assert fault(master.heartbeat, "http://127.0.0.1:1", [[1, 2, 3]]) == -32602
assert fault(server.send_data, 1000, 5, 1, []) == -32602
assert fault(server.send_data, 1000, "x", 1, [7]) == -32602

# Names.
names = ["../../etc/passwd", "", "/", "a/../b", ".", "a\nb", "a//b", "a/", "x/" * 2048, "x" * 256]
for name in names:
    assert fault(master.create, name) == 1, name
    assert fault(master.read, name, 0) == 1, name
    assert fault(master.delete, name) == 1, name
    assert fault(master.get_primary, name, 0, False) == 1, name

# Places, sizes, chunks that are not here.
assert fault(server.read, 1 << 30, 0, 10) == 3
assert fault(server.read, "../x", 0, 10) == -32602
assert fault(server.update_version, 4711, 3) == 3
assert fault(server.assign_primary, 4711, 0.0) == 3
assert fault(server.send_data, 1000, "", 1, []) == 1
assert fault(server.send_data, 1000, "x" * (1024 * 1024 + 1), 1, []) == 1
assert fault(server.send_data, 1000, "x", 0, ["http://127.0.0.1:1"] * 17) == 1
assert server.apply_mutations(4711, [], sys.argv[2], []) == "not primary"

# No XML, no call, no HTTP of this kind.
for body in (b"", b"{}", b"<methodCall>", b"\xff\xfe", b"<a>" * 100000):
    status, reply = post(sys.argv[1], body)
    assert status == 200 and b"faultCode" in reply and b"-32700" in reply, (body[:20], reply[:200])
entity = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><methodCall><methodName>&b;' \
         b'</methodName></methodCall>'
assert b"-32700" in post(sys.argv[1], entity)[1]
assert post(sys.argv[1], b"x" * (8 * 1024 * 1024 + 1))[0] == 413
assert post(sys.argv[1], None, method="GET")[0] == 405
assert post(sys.argv[1], b"x", path="/../../etc/passwd")[0] == 404
assert post(sys.argv[1], b"x", headers={"Content-Encoding": "gzip"})[0] == 415
assert post(sys.argv[1], b"x", headers={"X": "y" * 20000})[0] == 431
assert post(sys.argv[1], iter([b"x"]), headers={"Transfer-Encoding": "chunked"})[0] == 501

# Many calls go over one connection, and nothing of the above has done harm.
for _ in range(100):
    assert master.read("nothing", 0) == "file not found"
print("done")
