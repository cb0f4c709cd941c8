"""A stand-in for the control role: answers the control API on a Unix socket with what a test put there.

Also how a test runs a command line in its own process: the fixtures `run` and `relay` of tests/unit.
"""

import json
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple


class Result(NamedTuple):
    """How a command line ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Result]


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    relay: "FakeRelay"


class FakeRelay:
    """`answers` maps "GET /v1/rules" to (status, body); `requests` lists (method, target, body)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, tuple[int, Any]] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self._server = _Server(str(path), _Handler)
        self._server.relay = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def answer(self, what: str, body: Any, status: int = 200) -> None:
        """From now on answer `what`, such as "GET /v1/flows", so; bytes go out as they are."""
        self.answers[what] = (status, body)

    def refuse(self, what: str, status: int, *errors: dict[str, str]) -> None:
        """From now on answer `what` with the API's error object."""
        self.answer(what, {"errors": list(errors)}, status)

    def __enter__(self) -> "FakeRelay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def _serve(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        relay = self.server.relay
        relay.requests.append((self.command, self.path, body))
        status, answer = relay.answers[f"{self.command} {self.path}"]
        data = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def address_string(self) -> str:
        return "unix"
