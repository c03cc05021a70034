"""A chunkserver of the original file system: `chunkserver.py HOST PORT FOLDER [MASTER_URL]`."""

import json
import os
import pathlib
import sys
import threading
import time
import xmlrpc.client
from socketserver import ThreadingMixIn
from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

HEARTBEAT_SECONDS = float(os.environ.get("RINGLEADER_REFERENCE_HEARTBEAT", "30"))
RETRY_SECONDS = 10
BLOCK = 64


def sums(text):
    return [sum(map(ord, text[at:at + BLOCK])) for at in range(0, len(text), BLOCK)]


def connect(url):
    return xmlrpc.client.ServerProxy(url, allow_none=True)


class ChunkServer:
    def __init__(self, url, folder, master):
        self._url, self._folder, self._master = url, pathlib.Path(folder), master
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._leases, self._pieces = {}, {}
        self._chunks = {}
        for path in self._folder.glob("*.json"):
            self._chunks[int(path.stem)] = json.loads(path.read_text())

    def _keep(self, chunk):
        self._chunks[chunk]["sums"] = sums(self._chunks[chunk]["text"])
        (self._folder / f"{chunk}.json").write_text(json.dumps(self._chunks[chunk]))

    def _drop(self, chunk):
        self._chunks.pop(chunk, None)
        (self._folder / f"{chunk}.json").unlink(missing_ok=True)

    def create(self, filename, chunk_id):
        with self._lock:
            self._chunks[chunk_id] = {"name": filename, "text": "", "version": 0}
            self._keep(chunk_id)

    def read(self, chunk_id, chunk_offset, amount):
        with self._lock:
            chunk = self._chunks[chunk_id]
            if chunk["sums"] == sums(chunk["text"]):
                return chunk["text"][chunk_offset:chunk_offset + amount]
            self._drop(chunk_id)
        connect(self._master).report_invalid_checksum(chunk_id, self._url)
        return None

    def send_data(self, chunk_id, data, idx, replica_urls):
        with self._lock:
            self._pieces.setdefault(chunk_id, []).append(data)
        if idx < len(replica_urls):
            try:
                return connect(replica_urls[idx]).send_data(chunk_id, data, idx + 1, replica_urls)
            except OSError:
                return "chunkserver failure_" + replica_urls[idx]
        return "success"

    def apply_mutations(self, chunk_id, secondary_urls, primary_url, pieces):
        with self._lock:
            if self._url == primary_url:
                if self._leases.get(chunk_id, 0) < time.time():
                    return "not primary"
                pieces = self._pieces.pop(chunk_id, [])
            else:
                self._pieces.pop(chunk_id, None)
            placed = {}
            for piece in pieces:
                placed[piece] = len(self._chunks[chunk_id]["text"])
                self._chunks[chunk_id]["text"] += piece
            self._keep(chunk_id)
        if self._url == primary_url:
            for url in secondary_urls:
                try:
                    connect(url).apply_mutations(chunk_id, [], primary_url, pieces)
                except OSError:
                    return "failed applying mutation to secondary"
        return placed

    def get_data_for_chunk(self, chunk_id, version):
        with self._lock:
            chunk = self._chunks.get(chunk_id)
            if chunk is None or chunk["version"] < version:
                return "stale replica"
            if chunk["sums"] != sums(chunk["text"]):
                return "invalid checksum"
            return [chunk["name"], chunk["text"], chunk["version"]]

    def replicate_data(self, chunk_id, version, source_url):
        answer = connect(source_url).get_data_for_chunk(chunk_id, version)
        if isinstance(answer, str):
            return answer
        with self._lock:
            self._chunks[chunk_id] = {"name": answer[0], "text": answer[1], "version": answer[2]}
            self._keep(chunk_id)
        return "success"

    def update_version(self, chunk_id, version):
        with self._lock:
            self._chunks[chunk_id]["version"] = version
            self._keep(chunk_id)

    def assign_primary(self, chunk_id, lease_end):
        with self._lock:
            self._leases[chunk_id] = lease_end

    def remove_current_leases(self):
        with self._lock:
            self._leases.clear()

    def get_chunks(self):
        with self._lock:
            return [[chunk, it["version"]] for chunk, it in self._chunks.items()]

    def _live(self):
        method, pause = "link_with_master", 0
        while True:
            time.sleep(pause)
            try:
                gone = getattr(connect(self._master), method)(self._url, self.get_chunks())
                method, pause = "heartbeat", HEARTBEAT_SECONDS
            except (OSError, xmlrpc.client.Error):
                pause = min(RETRY_SECONDS, HEARTBEAT_SECONDS)
                continue
            with self._lock:
                for chunk in gone:
                    self._drop(chunk)


class Server(ThreadingMixIn, SimpleXMLRPCServer):
    daemon_threads = True


def main(host, port, folder, master="http://localhost:9000"):
    handler = SimpleXMLRPCRequestHandler
    with Server((host, int(port)), handler, logRequests=False, allow_none=True) as server:
        chunkserver = ChunkServer(f"http://{host}:{port}", folder, master)
        server.register_introspection_functions()
        server.register_instance(chunkserver)
        threading.Thread(target=chunkserver._live, daemon=True).start()
        print(f"listening on {host}:{port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
