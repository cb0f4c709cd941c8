"""The demo's two programs, the real relay and the real sender, run inside its namespaces.

Owns the processes and their log files. Called by the demo command. `wait_for_line` blocks until the
relay forwards, leaving a program until its process is gone.
"""

import ctypes
import json
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, Self

from mrelay.cli.client import Client
from mrelay.cli.failure import Failure
from mrelay.demo.topology import Namespace
from mrelay.traffic.stop import Stop

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_READY_SECONDS = 30.0
_STOP_SECONDS = 10.0  # after which a process that was asked to stop is killed
_LOG_TAIL = 5  # lines shown of a program that failed

_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """In the child before exec: even if the demo is killed outright, nothing of it stays."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Program:
    """`mrelay ARGUMENTS…` in a namespace, until closed. A context manager."""

    def __init__(self, namespace: Namespace, log: Path, *arguments: str) -> None:
        self._log = log
        self._name = arguments[0]
        self._asked_to_end = False
        with namespace.inside(), log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mrelay", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is for the demo, which stops its programs in order
                preexec_fn=_die_with_parent,  # noqa: PLW1509  no other threads run here
            )

        self._stdout: IO[bytes] = self._process.stdout  # type: ignore[assignment]  # it is a pipe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ask it to stop and wait; kill it after 10 s."""
        if self.running():
            self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def failed(self, what: str) -> Failure:
        """A Failure that says `what` happened and shows the log's end."""
        tail = self._log.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
        return Failure(f"the demo's `mrelay {self._name}` {what}; its last words:", *(tail or ["(none)"]))

    def end_early(self) -> None:
        """Ask it, once, to finish with its summary."""
        if not self._asked_to_end and self.running():
            self._asked_to_end = True
            self._process.terminate()

    def result(self) -> Any:
        """The JSON object it printed before it ended, None when it was asked to end before it had begun.

        Failure when it failed.
        """
        output, _ = self._process.communicate(timeout=_STOP_SECONDS)
        if self._asked_to_end and self._process.returncode == -signal.SIGTERM and not output:
            return None
        if self._process.returncode:
            raise self.failed(f"exited with {self._process.returncode}")
        return json.loads(output)

    def wait_for_line(self, line: str, stop: Stop) -> None:
        """Wait until it prints `line` (or `stop`); Failure when it ends before, or takes over 30 s."""
        deadline = time.monotonic() + _READY_SECONDS
        while not stop.requested:
            if select.select([self._stdout], [], [], 0.1)[0]:
                text = self._stdout.readline().decode(errors="replace")
                if text.strip() == line:
                    return
                if not text:
                    self._process.wait(_STOP_SECONDS)
                    raise self.failed(f"exited with {self._process.returncode} before it was {line}")
            if time.monotonic() > deadline:
                raise self.failed(f"was not {line} within {_READY_SECONDS:.0f} s")


class Relay(Program):
    """`mrelay run` with one config, its socket and state in `folder`."""

    def __init__(self, namespace: Namespace, folder: Path, config: str) -> None:
        file, sock = folder / "relay.toml", folder / "control.sock"
        file.write_text(config)
        state = folder / "state"
        super().__init__(
            namespace,
            folder / "relay.log",
            *("run", "--config", str(file), "--socket", str(sock), "--state-dir", str(state)),
        )
        self._client = Client(sock)

    def stats(self) -> Any:
        """GET /v1/stats."""
        return self._client.get("/v1/stats")
