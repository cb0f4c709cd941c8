"""The control API's client: JSON over HTTP over the relay's Unix socket, standard library only.

The client commands call it. Every call blocks for TIMEOUT seconds at most, or as long as its
caller says, and opens a connection of its own, so a relay that was restarted between two calls of `--watch` is
found again. All that can go wrong is raised as Failure, with what to do next.
"""

import contextlib
import grp
import http.client
import json
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from mrelay.cli.failure import NOT_PERMITTED, Failure

TIMEOUT: Final = 10.0  # seconds
SILENCE: Final = 40.0  # seconds without even a comment after which a stream is taken for dead


class _UnixConnection(http.client.HTTPConnection):
    """HTTPConnection whose transport is a Unix stream socket."""

    def __init__(self, path: Path, timeout: float = TIMEOUT) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """One relay, named by the path of its control socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, target: str) -> Any:
        """The JSON object at `target`, for example /v1/flows."""
        return self.request("GET", target)

    def request(self, method: str, target: str, body: object = None, *, patience: float = TIMEOUT) -> Any:
        """The JSON answer of one request, None when it has no body; Failure for all else.

        `patience`: seconds without an answer until it is one.
        """
        status, data = self._exchange(method, target, body, patience)
        if status >= 400:
            raise Failure(*_error_lines(status, data))
        try:
            return json.loads(data) if data else None
        except ValueError as error:
            raise Failure(f"the relay at {self.path} gave an answer that is not JSON: {error}") from error

    def stream(self, target: str) -> Iterator[tuple[str, str, Any]]:
        """The server-sent events at `target`: id, name, object. Ends with the relay; Failure for all else."""
        with self.opened("GET", target, silence=SILENCE) as response:
            yield from _messages(response)

    @contextlib.contextmanager
    def opened(
        self, method: str, target: str, body: object = None, *, silence: float | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, to be read as it comes; Failure for all else.

        It may take as long as it likes, but say nothing for `silence` seconds at most.
        """
        connection = _UnixConnection(self.path)
        payload = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, target, payload, {"Content-Type": "application/json"} if payload else {})
            response = connection.getresponse()
            if response.status >= 400:
                raise Failure(*_error_lines(response.status, response.read()))
            if connection.sock is not None:  # none when all has come already
                connection.sock.settimeout(silence)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise _connection_failure(self.path, error) from error
        finally:
            connection.close()

    def _exchange(self, method: str, target: str, body: object, patience: float) -> tuple[int, bytes]:
        connection = _UnixConnection(self.path, patience)
        payload = None if body is None else json.dumps(body).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}
        try:
            connection.request(method, target, payload, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _connection_failure(self.path, error, patience) from error
        finally:
            connection.close()


def _messages(lines: Iterable[bytes]) -> Iterator[tuple[str, str, Any]]:
    """What the lines of a text/event-stream say (WHATWG HTML §9.2.6), as the relay writes it: one line of data."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.decode().rstrip("\r\n").partition(":")
        if name:
            fields[name] = value.removeprefix(" ")
        elif "data" in fields:
            yield fields.get("id", ""), fields.get("event", ""), json.loads(fields.pop("data"))


def _connection_failure(path: Path, error: Exception, patience: float = TIMEOUT) -> Failure:
    remedy = "start one with 'mrelay run', or name its socket with --socket or MRELAY_SOCKET"
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return Failure(f"no relay at {path}: {remedy}")
        case PermissionError():
            return Failure(f"not allowed to use {path}: {_permission_remedy(path)}", status=NOT_PERMITTED)
        case ConnectionResetError() | BrokenPipeError() | http.client.HTTPException():
            return Failure(f"the relay at {path} hung up without an answer: see its log, then try again")
        case ConnectionRefusedError():
            return Failure(f"no relay answers at {path}, which one left behind: {remedy}")
        case TimeoutError():
            return Failure(f"the relay at {path} did not answer within {patience:.0f} s: see its log")
    return Failure(f"no relay reached at {path}: {error}: {remedy}")


def _permission_remedy(path: Path) -> str:
    """Which group may use the socket, or that only root may."""
    try:
        info = path.stat()
    except OSError:
        return f"you may not enter {path.parent}; try again with sudo"
    if info.st_gid == 0 or not info.st_mode & 0o020:
        return "only its owner may; try again with sudo, or set socket_group under [relay]"
    try:
        group = grp.getgrgid(info.st_gid).gr_name
    except KeyError:
        group = str(info.st_gid)
    return f"it is for group {group}; join it (sudo usermod -aG {group} $USER, then log in again) or use sudo"


def _error_lines(status: int, data: bytes) -> list[str]:
    """One line for each error of the body {"errors": [{"rule", "key", "problem", "remedy"}]}."""
    try:
        return [error_line(error) for error in json.loads(data)["errors"]] or [f"the relay answered {status}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        text = data.decode(errors="replace").strip() or "nothing more"
        return [f"the relay answered {status}: {text[:300]}"]


def error_line(error: dict[str, str]) -> str:
    """One API error in words: rule 'a', key 'from': problem — remedy."""
    rule, key, remedy = (error.get(what) or "" for what in ("rule", "key", "remedy"))
    # A name holds no space: "rule 3" is a rule without one.
    rule = rule if not rule or " " in rule else f"rule '{rule}'"
    place = ", ".join(filter(None, [rule, key and f"key '{key}'"]))
    problem = f"{error['problem']} — {remedy}" if remedy else error["problem"]
    return f"{place}: {problem}" if place else problem
