"""A running mrelay for a test: started in a namespace, asked over its socket, stopped and checked.

Black box: only the command line, the signals and the HTTP API are used.
"""

import contextlib
import http.client
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from netns.lab import Namespace, eventually

DEADLINE = 20.0  # seconds for a start or a stop on a slow machine
Stats = dict[str, Any]


def rule(name: str, from_: str, *to: str, **options: bool | str) -> str:
    """A [[rule]] table in TOML."""
    lines = [f'[[rule]]\nname = "{name}"\nfrom = "{from_}"\nto = {json.dumps(to)}']
    return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in options.items())]) + "\n\n"


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=DEADLINE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(str(self._path))


class Relay:
    """`mrelay run` in a namespace, with its own socket, state directory and, when given, config.

    As a context manager: ready at entry; at exit its counters are checked, SIGTERM must end it with 0
    and no process of it may remain. When a test fails, its standard error is added to the report.
    """

    def __init__(
        self,
        namespace: Namespace,
        config: str | None = None,
        *,
        arguments: Sequence[str] = (),
        launcher: Sequence[str] = (),
        python: str = sys.executable,
        pass_fds: Sequence[int] = (),
        folder: Path | None = None,
        socket_path: Path | None = None,
    ) -> None:
        self.namespace = namespace
        self._keep = folder is not None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="mrelay-test-"))
        self.folder.chmod(0o755)  # the relay's own users must reach what it puts there
        self.socket = socket_path or self.folder / "control.sock"
        self.state_dir = self.folder / "state"
        self.config = self.folder / "relay.toml"
        self._log = self.folder / "stderr"
        self._arguments = [*launcher, python, "-m", "mrelay", "run"]
        self._pass_fds = pass_fds
        if config is not None:
            self.config.write_text(config)
            self._arguments += ["--config", str(self.config)]
        self._arguments += ["--socket", str(self.socket), "--state-dir", str(self.state_dir), *arguments]
        self.process: subprocess.Popen[bytes] | None = None

    # ---- life --------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start it and don't wait."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace.name, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=self._pass_fds,
            )
        return self

    def wait_ready(self) -> None:
        """Return when it has printed `ready`."""
        assert self.process is not None and self.process.stdout is not None
        seen = b""
        deadline = time.monotonic() + DEADLINE
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"ready\n" not in seen:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"no `ready` in {DEADLINE} s; it said {seen!r}")
                piece = os.read(self.process.stdout.fileno(), 4096)
                if not piece:
                    raise AssertionError(f"it ended with {self.process.wait(DEADLINE)} before it was ready")
                seen += piece
        assert seen == b"ready\n", "standard output is one line"

    def run(self) -> int:
        """Start it, for a start that must fail: its exit status."""
        self.start()
        assert self.process is not None
        try:
            return self.process.wait(DEADLINE)
        finally:
            self.close()

    def __enter__(self) -> Self:
        try:
            self.start().wait_ready()
        except BaseException as error:
            self._report(error)
            self.close()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if error is None:
                self.check_counters()
                self.stop()
        except BaseException as late:
            self._report(late)
            raise
        finally:
            if error is not None:
                self._report(error)
            self.close()

    def stop(self) -> None:
        """SIGTERM; it must end in good order and take everything with it."""
        family = self.family()
        self.signal(signal.SIGTERM)
        assert self.process is not None
        assert self.process.wait(DEADLINE) == 0, "SIGTERM should end it with 0"
        left = [pid for pid in family if Path(f"/proc/{pid}").exists()]
        assert not left, f"processes {left} outlive the relay"

    def close(self) -> None:
        """End what still runs (a failed test's relay) and remove the folder."""
        if self.process is not None:
            for pid in self.family() if self.process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            self.process.wait(DEADLINE)
            if self.process.stdout is not None:
                self.process.stdout.close()
        if not self._keep:
            self._last_words = self.stderr
            shutil.rmtree(self.folder, ignore_errors=True)

    _last_words = ""

    def _report(self, error: BaseException) -> None:
        error.add_note(f"---- relay in {self.namespace.name}, standard error:\n{self.stderr[-8000:]}")

    @property
    def stderr(self) -> str:
        """Everything it has logged."""
        return self._log.read_text(errors="replace") if self._log.exists() else self._last_words

    # ---- processes ---------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The process that was started."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Send a signal to the process that was started."""
        os.kill(self.pid, number)

    def family(self) -> list[int]:
        """The process that was started and all below it."""
        found = [self.pid]
        for pid in found:
            try:
                found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            except FileNotFoundError:
                continue  # it has ended meanwhile
        return found

    def role(self, module: str) -> list[int]:
        """The processes that run `python -m mrelay.<module>`."""
        return [pid for pid in self.family() if f"mrelay.{module}" in _command_line(pid)]

    # ---- API ---------------------------------------------------------------------------------------

    def taps(self) -> int:
        """Packet sockets that control has: it listens to memberships, soon after the start."""
        (pid,) = self.role("control")
        inodes = {line.split()[-1] for line in Path(f"/proc/{pid}/net/packet").read_text().splitlines()}
        links = []
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                links.append(str(fd.readlink()))
        return sum(link.removeprefix("socket:[").removesuffix("]") in inodes for link in links)

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and decoded body of one API request."""
        connection = _UnixConnection(self.socket)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        is_json = "json" in (response.getheader("Content-Type") or "")
        return response.status, json.loads(data) if is_json and data else data.decode()

    def get(self, path: str) -> Any:
        """The body of a GET that must succeed."""
        status, body = self.request("GET", path)
        assert status == 200, f"GET {path}: {status} {body}"
        return body

    def stats(self) -> Stats:
        """GET /v1/stats."""
        return dict(self.get("/v1/stats"))

    def workers(self) -> list[dict[str, Any]]:
        """The list in GET /v1/workers."""
        return list(self.get("/v1/workers")["workers"])

    def flows(self) -> list[dict[str, Any]]:
        """The list in GET /v1/flows."""
        return list(self.get("/v1/flows")["flows"])

    def rules(self) -> dict[str, dict[str, Any]]:
        """The list in GET /v1/rules, by name."""
        return {entry["name"]: entry for entry in self.get("/v1/rules")["rules"]}

    def add_rule(self, name: str, from_: str, *to: str, **options: bool) -> dict[str, Any]:
        """Add a rule that must be accepted; the rule as the relay has it."""
        status, body = self.request("POST", "/v1/rules", {"name": name, "from": from_, "to": to, **options})
        assert status == 201, f"adding {name}: {status} {body}"
        return dict(body)

    def remove_rule(self, name: str) -> None:
        """Remove a rule that must be there."""
        status, body = self.request("DELETE", f"/v1/rules/{name}")
        assert status == 204, f"removing {name}: {status} {body}"

    def await_rule(self, name: str, state: str) -> None:
        """Return when the rule's state begins with `state`."""
        eventually(lambda: self.rules().get(name, {}).get("state", "").startswith(state), f"rule {name} {state}")

    def await_stats(self, question: Callable[[Stats], bool], what: str) -> Stats:
        """The first stats for which `question` holds."""
        latest: Stats = {}

        def ask() -> bool:
            latest.clear()
            latest.update(self.stats())
            return question(latest)

        try:
            eventually(ask, what, 5.0)
        except AssertionError as error:
            error.add_note(f"stats: {json.dumps(latest)}")
            raise
        return latest

    def await_received(self, count: int) -> Stats:
        """The stats once `count` datagrams have been received, and no more than that."""
        return self.await_stats(lambda stats: stats["received"] == count, f"received == {count}")

    def await_drops(self, reason: str, count: int) -> Stats:
        """The stats once `count` datagrams have been dropped for `reason`."""
        return self.await_stats(lambda s: s["drops"].get(reason, 0) == count, f"drops.{reason} == {count}")

    def check_counters(self) -> None:
        """Every datagram received is matched or in exactly one drop counter."""
        self.await_stats(
            lambda s: s["received"] == s["matched"] + sum(s["drops"].values()),
            "received == matched + sum(drops)",
        )


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except FileNotFoundError:
        return ""
