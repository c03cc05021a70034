"""A file is made, written, read and deleted with Python's own XML-RPC client and nothing else:
`session.py MASTER_URL`. Every method is called by its own name."""

import sys
import xmlrpc.client

NAME = "docs/greeting"


def connect(url):
    return xmlrpc.client.ServerProxy(url, allow_none=True)


master = connect(sys.argv[1])
assert master.read(NAME, 0) == "file not found"
assert master.get_primary(NAME, 0, False) == "file not found"
assert master.delete(NAME) == "file not found"
assert master.create(NAME) == "successfully created " + NAME
chunk, urls = master.read(NAME, 0)
assert chunk >= 1000 and len(urls) == 3, (chunk, urls)
assert master.read(NAME, 1) == "requested chunk idx out of range"

chunk, primary, urls = master.get_primary(NAME, 0, False)
assert primary in urls and len(urls) == 3
others = [url for url in urls if url != primary]


def append(*pieces):
    for piece in pieces:
        assert connect(urls[0]).send_data(chunk, piece, 1, urls) == "success"
    return connect(primary).apply_mutations(chunk, others, primary, [])


def read(offset, amount):
    """What all replicas say."""
    said = [connect(url).read(chunk, offset, amount) for url in urls]
    assert said[0] == said[1] == said[2], said
    return said[0]


assert append("Hello, ") == {"Hello, ": 0}
assert append("w\u00f6rld <&>", "!\n")["!\n"] == 17
assert read(0, 100) == "Hello, w\u00f6rld <&>!\n"
assert read(7, 2) == "w" or read(7, 2).data == b"w\xc3"
assert read(1000, 5) == ""
binary = xmlrpc.client.Binary(bytes(range(256)))
append(binary)
assert read(19, 256) == binary
# What a primary is given is appended, too.
assert connect(primary).apply_mutations(chunk, others, primary, ["given"])["given"] == 275
# Who does not lead says so; nothing waits twice.
assert connect(others[0]).apply_mutations(chunk, [], others[0], []) == "not primary"
assert read(280, 10) == ""
# Two equal pieces of two clients are both there.
append("twice", "twice")
assert read(280, 100) == "twicetwice"

server = connect(primary)
[[held, version]] = server.get_chunks()
assert held == chunk and version >= 1
stored, data, at = server.get_data_for_chunk(chunk, version)
assert data.data.startswith(b"Hello, ") and at == version
assert server.get_data_for_chunk(chunk, version + 1) == "stale replica"
assert server.get_data_for_chunk(4711, 1) == "stale replica"
assert server.assign_primary(chunk, 0.5) is None
assert server.send_data(chunk, "x", 1, [primary, "http://127.0.0.1:1"]) == \
    "chunkserver failure_http://127.0.0.1:1"
assert server.remove_current_leases() is None
assert server.apply_mutations(chunk, others, primary, []) == "not primary"

# Another primary is found, or the same one again, under a new version; all is still there.
chunk, primary, urls = master.get_primary(NAME, 0, True)
others = [url for url in urls if url != primary]
assert append("after")["after"] in (290, 291)
assert read(0, 7) == "Hello, "
[[_, version]] = connect(primary).get_chunks()
assert connect(primary).update_version(chunk, version) is None
assert isinstance(connect(others[0]).replicate_data(chunk, version, primary), str)
assert read(0, 7) == "Hello, "

assert master.create(NAME) == "successfully created " + NAME
assert master.read(NAME, 1)[0] > chunk
assert master.remove_chunkserver("http://127.0.0.1:1") is None
assert master.report_invalid_checksum(chunk, "http://127.0.0.1:1") is None
assert master.delete(NAME) == "successfully deleted " + NAME
assert master.read(NAME, 0) == "file not found"

methods = {
    master: "create delete get_primary heartbeat link_with_master read remove_chunkserver "
            "report_invalid_checksum",
    server: "apply_mutations assign_primary create get_chunks get_data_for_chunk read "
            "remove_current_leases replicate_data send_data update_version",
}
about = "system.listMethods system.methodHelp system.methodSignature"
for proxy, names in methods.items():
    assert proxy.system.listMethods() == sorted((names + " " + about).split())
    for name in (names + " " + about).split():
        assert proxy.system.methodHelp(name)
        [signature] = proxy.system.methodSignature(name)
        assert all(isinstance(it, str) for it in signature)
print("done")
