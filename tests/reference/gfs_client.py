"""The client library of the original file system: files as text, by XML-RPC.

`gfs_client.py MASTER_URL COMMAND ARGUMENT...` makes one call; a test imports `FileSystem`.
"""

import random
import sys
import time
import xmlrpc.client

CHUNK_SIZE = 64000
READ_CACHE_SECONDS = 60
ATTEMPTS = 8


def connect(url):
    return xmlrpc.client.ServerProxy(url, allow_none=True)


class FileSystem:
    def __init__(self, master):
        self.master = connect(master)
        self.replicas = {}
        self.primaries = {}

    def create(self, name):
        return self.master.create(name)

    def delete(self, name):
        self.primaries = {key: it for key, it in self.primaries.items() if key[0] != name}
        return self.master.delete(name)

    def read(self, name, offset, amount):
        text = ""
        while amount > 0:
            index, within = divmod(offset, CHUNK_SIZE)
            part = self.read_chunk(name, index, within, min(amount, CHUNK_SIZE - within))
            if not part:
                break
            text += part
            offset, amount = offset + len(part), amount - len(part)
        return text

    def read_chunk(self, name, index, within, amount):
        for _ in range(ATTEMPTS):
            chunk, urls = self.where(name, index)
            for url in random.sample(urls, len(urls)):
                try:
                    text = connect(url).read(chunk, within, amount)
                except (OSError, xmlrpc.client.Error):
                    continue
                if text is not None:
                    return text
            self.replicas.pop((name, index), None)
            time.sleep(0.5)
        raise RuntimeError("no replica can be read")

    def where(self, name, index):
        known = self.replicas.get((name, index))
        if known and time.monotonic() - known[1] < READ_CACHE_SECONDS:
            return known[0]
        answer = self.master.read(name, index)
        if isinstance(answer, str):
            raise LookupError(answer)
        self.replicas[name, index] = (answer, time.monotonic())
        return answer

    def write(self, name, text, offset):
        """Returns where the first part really stands."""
        first = None
        while text:
            index, within = divmod(offset, CHUNK_SIZE)
            part, text = text[: CHUNK_SIZE - within], text[CHUNK_SIZE - within:]
            landed = self.write_chunk(name, index, part)
            first = index * CHUNK_SIZE + landed if first is None else first
            offset += len(part)
            if text:
                self.create(name)
        return first

    def write_chunk(self, name, index, part):
        pause, force = 1, False
        for _ in range(ATTEMPTS):
            lease = self.primaries.get((name, index))
            if lease is None or force:
                lease = self.master.get_primary(name, index, force)
                if isinstance(lease, str):
                    raise LookupError(lease)
                self.primaries[name, index] = lease
            chunk, primary, urls = lease
            force = False
            try:
                sent = connect(urls[0]).send_data(chunk, part, 1, urls)
                if sent == "success":
                    others = [url for url in urls if url != primary]
                    placed = connect(primary).apply_mutations(chunk, others, primary, [])
                    if isinstance(placed, dict):
                        return placed[part]
                    failed = placed
                else:
                    failed = sent
            except OSError:
                failed = "chunkserver failure_" + urls[0]
            if failed.startswith("chunkserver failure_"):
                self.master.remove_chunkserver(failed.split("_", 1)[1])
                force = True
            else:
                self.primaries.pop((name, index), None)
            time.sleep(pause)
            pause = min(pause * 2, 8)
        raise RuntimeError("not written: " + failed)


if __name__ == "__main__":
    system = FileSystem(sys.argv[1])
    numbers = [int(word) if word.isdigit() else word for word in sys.argv[3:]]
    print(getattr(system, sys.argv[2])(*numbers))
