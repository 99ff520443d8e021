"""In front of moto's EC2: a cloud that has no host to give."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
from collections.abc import Iterator

from tests.cluster import hosts
from tests.cluster.cloud import MOTO_PORT

PORT = MOTO_PORT + 1
URL = f"http://{hosts.GATEWAY}:{PORT}"
NO_CAPACITY = """<?xml version="1.0"?><Response><Errors><Error><Code>InsufficientInstanceCapacity</Code>
<Message>We currently do not have sufficient capacity in the zone you requested.</Message></Error></Errors>
<RequestID>1</RequestID></Response>"""


class Scarce(http.server.ThreadingHTTPServer):
    """`full` says whether it has none."""

    def __init__(self) -> None:
        super().__init__((hosts.GATEWAY, PORT), _Answers)
        self.full = True


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Scarce

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.full and b"Action=RunInstances" in body:
            self._send(500, {"Content-Type": "text/xml"}, NO_CAPACITY.encode())
            return
        moto = http.client.HTTPConnection(hosts.GATEWAY, MOTO_PORT)
        moto.request("POST", self.path, body, dict(self.headers))
        answer = moto.getresponse()
        self._send(answer.status, {"Content-Type": answer.headers["Content-Type"]}, answer.read())
        moto.close()

    def _send(self, code: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """It says nothing."""


@contextlib.contextmanager
def of_hosts() -> Iterator[Scarce]:
    """In a cloud's network, at `URL`."""
    server = Scarce()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
