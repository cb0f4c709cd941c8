"""Ways to learn that a child ended, and what each of them gets wrong: pidfd, asyncio, SIGCHLD, PIDs.

Owns every process that it starts and leaves none. The PID that comes back is made in a PID namespace of its
own. Called by poc_supervisor_lifecycle; blocks until the children did what was asked, IN_TIME at most.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from processes import IN_TIME, Trial, all_readable, no_way_back, readable, running, zombies

CLONE_NEWPID: Final = 0x20000000  # linux/sched.h
LAST_PID: Final = Path("/proc/sys/kernel/ns_last_pid")  # the next process of this namespace gets one more
STATUS: Final = 7  # what the bystander exits with
_SLEEPER: Final = [sys.executable, "-SIc", "import signal; signal.alarm(20); signal.pause()"]
_libc = ctypes.CDLL(None, use_errno=True)


class Together(NamedTuple):
    """What told of several children that were killed while nobody looked."""

    pidfds: int
    signals: int
    waited: int  # by one wait for each signal
    left: int  # zombies after that


def killed_together(count: int) -> Together:
    """Kill them before anybody reads signals; then compare what is there to read."""
    with running([Trial() for _ in range(count)]) as trials, _blocked(signal.SIGCHLD):
        fds = [trial.pidfd for trial in trials]
        for trial in trials:
            trial.send_signal(signal.SIGKILL)
        pidfds = len(all_readable(fds))
        signals = 0
        while signal.sigtimedwait({signal.SIGCHLD}, 0):
            signals += 1
        waited = 0
        for trial in trials[:signals]:
            trial.ended()
            waited += 1
        return Together(pidfds, signals, waited, zombies())


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        while signal.sigtimedwait({number}, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def asyncio_threads(count: int) -> tuple[int, int, str]:
    """(ends noticed, most threads that asyncio used for them, the watcher's name) for `count` children."""
    return asyncio.run(_with_asyncio(count))


async def _with_asyncio(count: int) -> tuple[int, int, str]:
    before = threading.active_count()
    children = [await asyncio.create_subprocess_exec(*_SLEEPER) for _ in range(count)]
    threads = threading.active_count() - before
    for child in children:
        child.kill()
    statuses = await asyncio.wait_for(asyncio.gather(*(child.wait() for child in children)), IN_TIME)
    watcher = "thread" if threads else "pidfd"
    return statuses.count(-signal.SIGKILL), threads, watcher


def ends_beside_bystander(count: int, *, for_any: bool) -> tuple[int, int]:
    """(ends of ours seen, what a process seems to exit with that another part of the program started).

    The bystander's true status is STATUS. `for_any`: ours are waited for by waitpid(-1), as a SIGCHLD handler
    does, and not each by its pidfd.
    """
    bystander = subprocess.Popen(["sh", "-c", f"exit {STATUS}"])
    fd = os.pidfd_open(bystander.pid)
    readable([fd])
    os.close(fd)
    with running([Trial() for _ in range(count)]) as trials:
        ours = {trial.pid: trial.pidfd for trial in trials}
        for trial in trials:
            trial.send_signal(signal.SIGKILL)
        all_readable(list(ours.values()))
        ended = _wait_for_any() if for_any else [_wait_for(pidfd) for pidfd in ours.values()]
    return len(ours.keys() & set(ended)), bystander.wait()


def _wait_for_any() -> list[int]:
    ended = []
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            ended.append(pid)
    return ended


def _wait_for(pidfd: int) -> int:
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    return result.si_pid if result else 0


def reason_when(handler: signal.Handlers) -> str:
    """How a child's `exit 3` looks to its parent, with SIGCHLD ignored (as a parent may hand down) or not."""
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        trial = Trial("crash=3")
        trial.start()
        readable([trial.pidfd])
        return trial.ended()
    finally:
        signal.signal(signal.SIGCHLD, before)


def hands_down_ignoring() -> bool:
    """Whether a program that we start has SIGCHLD ignored because we have."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        code = "import signal; print(signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN)"
        return subprocess.run([sys.executable, "-SIc", code], capture_output=True, check=False).stdout == b"True\n"
    finally:
        signal.signal(signal.SIGCHLD, before)


# ---- a PID that comes back ----------------------------------------------------------------------


def can_choose_pids() -> bool:
    """Whether this kernel lets root say which PID comes next (CONFIG_CHECKPOINT_RESTORE)."""
    return os.access(LAST_PID, os.W_OK)


def kill_after_reuse(*, by_pidfd: bool) -> tuple[str, bool]:
    """Kill a child that is gone, whose PID a bystander has now: (what the call said, bystander lives on)."""
    ours, theirs = os.pipe()
    helper = os.fork()
    if not helper:
        with no_way_back():
            if _libc.unshare(CLONE_NEWPID):
                raise OSError(ctypes.get_errno(), "unshare")
            first = os.fork()  # PID 1 of the namespace: its end is everybody's
            if not first:
                with no_way_back():
                    os.write(theirs, _reuse(by_pidfd=by_pidfd).encode())
            os.waitpid(first, 0)
    os.close(theirs)
    with os.fdopen(ours) as said:
        answer, _, alive = said.read().partition(";")
    os.waitpid(helper, 0)
    return answer, alive == "alive"


def _reuse(*, by_pidfd: bool) -> str:
    ours = _pausing()
    fd = os.pidfd_open(ours)
    os.kill(ours, signal.SIGKILL)
    os.waitpid(ours, 0)
    LAST_PID.write_text(str(ours - 1))
    bystander = _pausing()
    assert bystander == ours
    answer = "sent"
    try:
        if by_pidfd:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        else:
            os.kill(ours, signal.SIGKILL)
    except ProcessLookupError as error:
        answer = error.strerror or ""
    other = os.pidfd_open(bystander)
    gone = readable([other], 5.0 if answer == "sent" else 0.1)
    return f"{answer};{'gone' if gone else 'alive'}"


def _pausing() -> int:
    child = os.fork()
    if not child:
        with no_way_back():
            signal.pause()
    return child
