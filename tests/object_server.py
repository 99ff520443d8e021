"""A small object store over HTTP, with ranged GET, ETags and PUT, that counts, delays and fails as a test asks it to.

python tests/object_server.py FOLDER [--latency-s 0.02]     # serves, says its URL; GET /.counts tells the requests
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """A request as it came in: the range is [start, end) of the object."""

    method: str
    name: str
    start: int
    end: int


@dataclass
class Fault:
    """What happens instead of an answer. cut: so many bytes of the body come; None: all."""

    status: int | None = None
    cut: int | None = None
    reset: bool = False
    after_s: float = 0.0


Misbehave = Callable[[Asked], Fault | None]


class ObjectServer:
    """Serves the files of a folder at `url`. `misbehave(asked)` decides about every request, None is a good answer."""

    def __init__(self, folder: Path, latency_s: float = 0.0, writable: bool = False) -> None:
        self.folder = folder
        self.latency_s = latency_s
        self.writable = writable
        self.misbehave: Misbehave = lambda asked: None
        self.asked: list[Asked] = []
        self.sent: collections.Counter[str] = collections.Counter()  # bytes of bodies, by name
        self.etags: dict[tuple[str, int, int], str] = {}
        self._server: _Server | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.store = self
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more, and open connections break."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.connections):
            reset(connection)

    def reads(self, name: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.name == name and asked.method == "GET"]

    def etag(self, path: Path) -> str:
        stat = path.stat()
        key = str(path), stat.st_mtime_ns, stat.st_size
        if key not in self.etags:
            self.etags[key] = f'"{hashlib.md5(path.read_bytes()).hexdigest()}"'
        return self.etags[key]


def reset(connection: socket.socket) -> None:
    """End a connection with RST."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()
    except OSError:
        pass  # it has ended by itself


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    store: ObjectServer

    def __init__(self, *args) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request, client_address) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_PUT(self) -> None:
        store = self.server.store
        data = self.rfile.read(int(self.headers["Content-Length"]))
        store.asked.append(Asked("PUT", self.path.lstrip("/"), 0, len(data)))
        if store.writable:
            target = store.folder / self.path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        self._status(200 if store.writable else 405)

    def _answer(self, body: bool) -> None:
        store = self.server.store
        name = self.path.lstrip("/")
        if name == ".counts":
            text = json.dumps({"sent": store.sent, "num": len(store.asked)}).encode()
            return self._send(200, {"Content-Length": str(len(text))}, text)
        path = store.folder / name
        size = path.stat().st_size if path.is_file() else 0
        start, end = self._range(size)
        asked = Asked(self.command, name, start, end)
        store.asked.append(asked)
        time.sleep(store.latency_s)
        fault = store.misbehave(asked) or Fault()
        time.sleep(fault.after_s)
        if fault.reset:
            self.close_connection = True
            return reset(self.connection)
        if fault.status:
            return self._status(fault.status)
        if not path.is_file():
            return self._status(404)
        etag = store.etag(path)
        if self.headers.get("If-Match", etag) != etag:
            return self._status(412)
        headers = {"Content-Length": str(end - start), "ETag": etag, "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(end - start) if body else b""
        if fault.cut is not None:
            data, self.close_connection = data[: fault.cut], True
        self._send(206 if "Range" in self.headers else 200, headers, data)
        store.sent[name] += len(data)

    def _range(self, size: int) -> tuple[int, int]:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(first), min(size, int(last) + 1) if last else size

    def _status(self, status: int) -> None:
        self._send(status, {"Content-Length": "0"}, b"")

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args) -> None:
        """Nothing: `asked` has it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-s", type=float, default=0.0)
    args = parser.parse_args()
    sys.stdout.write(ObjectServer(args.folder, args.latency_s).url + "\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
