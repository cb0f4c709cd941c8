"""Starting, watching and ending the unprivileged processes.

Owns their processes and the supervisor's ends of their channels. Called by supervisor.main. `end_all`
blocks for as long as its deadline says; nothing else does.
"""

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from typing import Final

from mrelay.counters_size import counters_size
from mrelay.messages import Channel, Message, channel_pair

_BACKOFF: Final = (0.0, 0.1, 0.5, 2.0, 5.0)  # seconds before a restart, by how many came close together
_GRACE: Final = 2.0  # seconds from closing its channel to its end
_CALM: Final = 30.0  # seconds alive after which an end counts as the first again
# NumPy's BLAS would otherwise start a thread a core, in each worker.
_ENVIRONMENT: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Child:
    """One role's process, started again whenever it ends. `name` is for the log."""

    def __init__(self, name: str, module: str, uid: int, gid: int, core: int | None = None) -> None:
        self.name, self.core, self.restarts = name, core, 0
        self._command = [sys.executable, "-m", module]
        self._uid, self._gid = uid, gid
        self._process: subprocess.Popen[bytes] | None = None
        self.pidfd = -1
        self.channel: Channel | None = None
        self.due: float | None = 0.0  # when to start it next (or to kill it, if it hung up); None while it runs
        self._started = 0.0
        self._quick_ends = 0

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """A fresh process with nothing of ours but stderr and its channel."""
        ours, theirs = channel_pair()
        arguments = [str(theirs.fileno()), str(self._uid), str(self._gid)]
        with theirs:
            self._process = subprocess.Popen(
                self._command + arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
            )
        if self.core is not None:
            os.sched_setaffinity(self._process.pid, {self.core})
        self.pidfd = os.pidfd_open(self._process.pid)
        self.channel = Channel(ours)
        self.channel.sock.setblocking(False)
        self.due, self._started = None, time.monotonic()

    def tell(self, message: Message, fds: list[int] | None = None) -> None:
        """Send to it; one that is gone or takes nothing any more is ended, and so restarted."""
        if self.channel is None:
            return
        try:
            self.channel.send(message, fds or [])
        except OSError:
            self.kill()

    def hung_up(self) -> None:
        """It closed its channel, so it should be ending; `due` is now when to help it along."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        self.due = time.monotonic() + _GRACE

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def ended(self) -> str:
        """Clean up after its end: why it ended. `due` says when it should start again."""
        assert self._process is not None  # noqa: S101
        status = self._process.wait()
        os.close(self.pidfd)
        self._process, self.pidfd = None, -1
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        quick = time.monotonic() - self._started < _CALM
        self._quick_ends = min(self._quick_ends + 1, len(_BACKOFF)) if quick else 1
        self.due = time.monotonic() + _BACKOFF[self._quick_ends - 1]
        self.restarts += 1
        self.status = status
        return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def end_all(children: list[Child], message: Message, seconds: float) -> None:
    """Ask all to stop, wait, then insist."""
    alive = [child for child in children if child.pidfd >= 0]
    for child in alive:
        child.tell(message)
    deadline = time.monotonic() + seconds
    while alive:
        left = deadline - time.monotonic()
        if left <= 0:
            for child in alive:
                child.kill()
        ready, _, _ = select.select([child.pidfd for child in alive], [], [], max(left, 0.1))
        for child in [c for c in alive if c.pidfd in ready]:
            alive.remove(child)
            child.ended()


def new_counters(flow_limit: int) -> int:
    """Shared memory for one worker's counters, of a fixed size so that nobody can make another's map fault."""
    fd = os.memfd_create("mrelay-counters", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, counters_size(flow_limit))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd
