"""Starting, watching and ending the unprivileged processes.

Owns their processes, the supervisor's ends of their channels, and what is shown of their troubles. Called by
supervisor.main. `end_all` blocks for as long as its deadline says; nothing else does.
"""

import fcntl
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

from mrelay import __version__, logs
from mrelay.child import EX_PROTOCOL
from mrelay.counters_size import counters_size
from mrelay.messages import Granted, Message, Resource, parts
from mrelay.supervisor.backoff import CAP, BackOff
from mrelay.supervisor.host import User
from mrelay.supervisor.resources import Resources
from mrelay.supervisor.watch import LONG_WORK, SILENCE, Watch
from mrelay.wire import Channel, channel_pair

_GRACE: Final = 10.0  # seconds from closing its channel to its end, on a slow machine under load
_SETTLED: Final = 10.0  # seconds of life after which its troubles are over
# NumPy's BLAS would otherwise start a thread a core, in each worker.
_ENVIRONMENT: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
OUTDATED: Final = "another version of mrelay is installed than the one that runs: restart the relay"


class Process:
    """A fresh process with nothing of ours but stderr, its channel and its pulse. OSError when there is none."""

    def __init__(self, command: list[str], uid: int, gid: int, busy: float) -> None:
        ours, theirs = channel_pair()
        pulse = shared_memory("mrelay-pulse", mmap.PAGESIZE)  # last: nothing else closes a bare descriptor
        # The version comes first: a program of another version knows this one argument.
        arguments = [__version__, *map(str, (theirs.fileno(), pulse, uid, gid))]
        try:
            with theirs:
                self._popen = subprocess.Popen(
                    command + arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    pass_fds=[theirs.fileno(), pulse],
                    env=_ENVIRONMENT | logs.environment(),
                )
        except OSError:
            ours.close()
            os.close(pulse)
            raise
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.statm = _statm(self.pid)
        self.channel: Channel | None = Channel(ours, takes_fds=False)
        ours.setblocking(False)
        self._pulse = pulse
        self.watch = Watch(self.pid, pulse, time.monotonic(), busy)

    def kill(self) -> None:
        self._popen.kill()

    def hang_up(self) -> None:
        """Let go of its channel."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def close(self) -> int:
        """Clean up after its end; its status, as in subprocess."""
        status = self._popen.wait()
        self.hang_up()
        for fd in (self.pidfd, self._pulse, *self.statm):
            os.close(fd)
        return status


def _statm(pid: int) -> tuple[int, ...]:
    """Its /proc/PID/statm, opened for control to read: nothing where /proc hides it from us."""
    try:
        return (os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC),)
    except OSError:
        return ()


class Child:
    """One role, whose process is started again whenever it ends. `name` is for the log.

    `due`: when to start its process next (or to kill it, if it hung up); None while there is nothing to do.
    `trouble`: why it is not simply restarted, in words; empty when all is well.
    """

    _busy: float = SILENCE  # seconds it may compute in one piece
    _works_from_first_beat = True

    def __init__(self, name: str, module: str, uid: int, gid: int) -> None:
        self.name = name
        # -P: the folder that the relay was started in is no place to take code from.
        self._command = [sys.executable, "-P", "-m", module]
        self._uid, self._gid = uid, gid
        self.process: Process | None = None
        self.due: float | None = 0.0
        self.restarts, self.status, self.trouble = 0, 0, ""
        self._works_since: float | None = None
        self._hung = ""
        self._back_off = BackOff()

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    @property
    def pidfd(self) -> int:
        return self.process.pidfd if self.process else -1

    @property
    def statm(self) -> tuple[int, ...]:
        return self.process.statm if self.process else ()

    @property
    def channel(self) -> Channel | None:
        return self.process.channel if self.process else None

    @property
    def delay(self) -> float:
        """Seconds until its next start."""
        return max(0.0, (self.due or 0.0) - time.monotonic())

    def start(self, ready: Process | None = None) -> Process:
        """Have a process from now on: `ready`, or a new one. OSError when there is none to be had."""
        self._works_since, self._hung = None, ""
        self.process = ready or Process(self._command, self._uid, self._gid, self._busy)
        self.due = None
        return self.process

    def works(self) -> None:
        """It has come as far as doing its work: its life begins."""
        if self._works_since is None:
            self._works_since = time.monotonic()

    def _life(self) -> float:
        """Seconds, without the start."""
        return 0.0 if self._works_since is None else time.monotonic() - self._works_since

    def give(self) -> Process | None:
        """The process, if it runs: no more ours."""
        process, self.process = self.process, None
        return process

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
        if self.process is not None:
            self.process.hang_up()
        self.due = time.monotonic() + _GRACE

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def check(self, now: float) -> str:
        """Look at its pulse. What is to be said of it now: it hangs and is killed, is late, or lives again."""
        if self.process is None or self._hung:
            return ""
        was_late = self.process.watch.late
        self._hung = self.process.watch.check(now)
        if self._hung:
            self.kill()
            return f"hangs ({self._hung}): ending it"
        if self.process.watch.late and not was_late:
            return "is late, but left alone: it gets no processor time, waits in the kernel, or is traced"
        if self._works_from_first_beat and self.process.watch.beaten:
            self.works()
        if self.trouble and self._life() > _SETTLED:
            self.trouble = ""
            return f"has run for {_SETTLED:.0f} s: its troubles are over"
        return ""

    def ended(self) -> str:
        """Clean up after its end: why it ended. `due` says when it should start again."""
        assert self.process is not None  # noqa: S101  it ended, so there was one
        self.status = self.process.close()
        self.process = None
        return self.failed(self._reason(), outdated=self.status == EX_PROTOCOL)

    def _reason(self) -> str:
        if self._hung:
            return f"hung: {self._hung}"
        return f"signal {signal.Signals(-self.status).name}" if self.status < 0 else f"exit status {self.status}"

    def failed(self, reason: str, *, outdated: bool = False) -> str:
        """It ended, or could not be started, for this reason."""
        now, life = time.monotonic(), self._life()
        self.restarts += 1
        if outdated:  # no crash: nothing but a restart of the relay mends it, or the old package
            self.due, self.trouble = now + CAP, OUTDATED
        else:
            self.due = now + self._back_off.ended(life)
            self.trouble = f"crash loop ({reason})" if self._back_off.looping() else ""
        return reason


class ControlChild(Child):
    """Control. The supervisor calls `works` when it says that it is ready."""

    _busy = LONG_WORK
    _works_from_first_beat = False


class WorkerChild(Child):
    """A worker, and the counters that outlive it."""

    def __init__(self, number: int, core: int, flow_limit: int, busy_poll: int, user: User) -> None:
        super().__init__(f"worker {number}", "mrelay.worker", *user)
        self.number, self.core, self.flow_limit, self.busy_poll = number, core, flow_limit, busy_poll
        self.counters = new_counters(flow_limit)

    def grant(self, resources: Resources, what: Sequence[Resource], *, used: bool) -> None:
        """Its copies of those that it needs some of. `used`: by a worker before it."""
        held = resources.held
        for part in parts([each for each in what if held[each].sockets]):
            self.tell(Granted(part, used), [fd for each in part for fd in held[each].fds(self.number)])


def end_all(children: list[Child], message: Message, seconds: float) -> None:
    """Ask all to stop, wait, then insist."""
    alive = {child.pidfd: child for child in children if child.process is not None}
    poll = select.poll()  # not select(2): descriptors may lie above 1023
    for pidfd, child in alive.items():
        poll.register(pidfd, select.POLLIN)
        child.tell(message)
    deadline = time.monotonic() + seconds
    while alive:
        left = deadline - time.monotonic()
        if left <= 0:
            for child in alive.values():
                child.kill()
        for pidfd, _ in poll.poll(max(left, 0.1) * 1000):
            poll.unregister(pidfd)
            alive.pop(pidfd).ended()


def new_counters(flow_limit: int) -> int:
    """Shared memory for one worker's counters."""
    return shared_memory("mrelay-counters", counters_size(flow_limit))


def shared_memory(name: str, size: int) -> int:
    """Memory to share, of a fixed size so that nobody can make another's map fault."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd
