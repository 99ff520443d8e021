"""Buckets for tests: a moto_server process on loopback, and a proxy before it that fails as it is told.

    def test_something(bucket):        # a URL, s3://NAME, of a bucket of its own; the environment says where and how
        Remote(f"{bucket}/runs/demo").write("a.txt", b"...")

Processes started by a test inherit the environment; ranks of the pool have to `learn` what they are `told`.
`unreliable` is the proxy, which then stands between.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import pytest

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server:
    """A moto_server on a free port of an address. variables: more of its environment."""

    def __init__(self, address: str = "127.0.0.1", **variables: str) -> None:
        with socket.socket() as probe:
            probe.bind((address, 0))
            self.address, self.port = probe.getsockname()
        self.endpoint = f"http://{address}:{self.port}"
        command = [str(Path(sys.executable).parent / "moto_server"), "-H", address, "-p", str(self.port)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=os.environ | variables, **quiet)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self.process.poll() is None, "moto_server ended"
            assert time.monotonic() < deadline, "moto_server does not answer"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self.address, self.port), timeout=1):
                return True
        except OSError:
            return False

    def make_bucket(self, name: str) -> str:
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30):
            return f"s3://{name}"

    def client(self, service: str = "s3") -> Any:
        """boto3's."""
        keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        return boto3.client(service, region_name=KEYS["AWS_DEFAULT_REGION"], endpoint_url=self.endpoint, **keys)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Unreliable:
    """Hands requests on to an endpoint, but answers 503 `until` a time; what it handed on is in `seen`."""

    def __init__(self, port: int) -> None:
        self.until = 0.0  # of time.monotonic
        self.refused = 0
        self.seen: list[tuple[str, str]] = []  # method and path
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(port))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def fail_for(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self, port: int) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if time.monotonic() < proxy.until:
                    proxy.refused += 1
                    return self.answer(503, [], b"")
                proxy.seen.append((self.command, self.path.partition("?")[0]))
                onward = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    onward.request(self.command, self.path, body, dict(self.headers))
                    answer = onward.getresponse()
                    self.answer(answer.status, answer.getheaders(), answer.read())
                finally:
                    onward.close()

            def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                told = {name.lower() for name, _ in headers}
                for name, value in headers:
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                if "content-length" not in told:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        return Handler


@pytest.fixture(scope="session")
def object_store() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def bucket(object_store: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket; the environment has what reaches it."""
    point_at(monkeypatch, object_store.endpoint)
    return object_store.make_bucket(f"bucket-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def unreliable(bucket: str, object_store: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unreliable]:
    """The proxy before `bucket`."""
    proxy = Unreliable(object_store.port)
    point_at(monkeypatch, proxy.endpoint)
    yield proxy
    proxy.close()


def told() -> dict[str, str]:
    """What this process knows of S3, for `learn` in ranks: they may be older than the bucket."""
    return {name: os.environ[name] for name in (*KEYS, "AWS_ENDPOINT_URL", "NO_PROXY")}


def learn(environment: dict[str, str]) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    os.environ.update(environment)


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, **variables: str) -> None:
    """Have this process and those it starts find S3 there."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # its instances keep the endpoint they were made for
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "NO_PROXY": "127.0.0.1", **variables}.items():
        monkeypatch.setenv(name, value)
