"""What becomes of children whose parent is killed: PR_SET_PDEATHSIG, its traps, and the channel's end.

Owns a parent process for each case, which is killed, and its child, which is then looked at. Orphans come to
this process (PR_SET_CHILD_SUBREAPER), so that none is left. Called by poc_supervisor_lifecycle; blocks until
a child died, or _SURVIVES long to see that it does not.
"""

import contextlib
import ctypes
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mrelay.kernel.caps import CAP_KILL, prctl, set_parent_death_signal
from processes import NOBODY, Trial, no_way_back, readable

PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522  # linux/capability.h
_SURVIVES: Final = 0.2  # seconds; the signal is sent before a parent can be waited for
_DIES: Final = 3.0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Case:
    """A child, how it settles, and what is done to its parent. `dies`: what is expected."""

    name: str
    dies: bool
    settle: Callable[[], None]
    parent: Callable[[], None] = lambda: None
    in_thread: bool = False  # a thread of the parent makes the child, and ends; the parent goes on
    late: bool = False  # the child settles when its parent is gone already


def become_nobody() -> None:
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def signal_last() -> None:
    """The product's order (mrelay.child)."""
    become_nobody()
    set_parent_death_signal(signal.SIGKILL)


def signal_first() -> None:
    set_parent_death_signal(signal.SIGKILL)
    become_nobody()


def only_signal() -> None:
    set_parent_death_signal(signal.SIGKILL)


def signal_then_fork() -> None:
    """Go on in a child of the child, which does not inherit the setting."""
    set_parent_death_signal(signal.SIGKILL)
    if os.fork():
        signal.pause()


def without_cap_kill() -> None:
    """Give up one capability of this process."""
    fields = dict(
        line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if "Cap" in line
    )
    kept = int(fields["CapEff"], 16) & ~(1 << CAP_KILL)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def cases(order: Callable[[], None]) -> list[Case]:
    """`order`: how the first case's child settles."""
    return [
        Case("signal set after the change of user", True, order),
        Case("signal set before it", False, signal_first),
        Case("set, then forked again", False, signal_then_fork),
        Case("parent without CAP_KILL, same user", True, only_signal, without_cap_kill),
        Case("parent without CAP_KILL, other user", False, signal_last, without_cap_kill),
        Case("made by a thread that ended, parent alive", True, only_signal, in_thread=True),
        Case("parent gone before it was set", False, only_signal, late=True),
    ]


def dies(case: Case) -> bool:
    """Run one case: does the child end?"""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    said, say = os.pipe()
    go, gone = socket.socketpair()
    parent = os.fork()
    if not parent:
        with no_way_back():
            go.close()
            _be_parent(case, say, gone)
    os.close(say)
    gone.close()
    try:
        child = _read_pid(said)
        fd = os.pidfd_open(child)
        if not case.in_thread:
            os.kill(parent, signal.SIGKILL)
            os.waitpid(parent, 0)
        if case.late or case.in_thread:
            go.send(b"go")
        if case.late:
            os.read(said, 1)  # it has settled
        ended = bool(readable([fd], _DIES if case.dies else _SURVIVES))
        _put_away(fd, child, parent if case.in_thread else None)
        return ended
    finally:
        os.close(said)
        go.close()


def _be_parent(case: Case, say: int, gone: socket.socket) -> None:
    case.parent()
    if case.in_thread:
        maker = threading.Thread(target=_make_child, args=(case, say, gone))
        maker.start()
        maker.join()
    else:
        _make_child(case, say, gone)
    signal.pause()


def _make_child(case: Case, say: int, gone: socket.socket) -> None:
    child = os.fork()
    if not child:
        with no_way_back():
            _be_child(case, say, gone)
    gone.recv(2)


def _be_child(case: Case, say: int, gone: socket.socket) -> None:
    if case.late:
        _write_pid(say)
        gone.recv(2)
        case.settle()
    else:
        case.settle()
        _write_pid(say)
    os.write(say, b".")
    signal.pause()


# ---- the product's own child, and one that has only its channel ----------------------------------


def product_child_dies(word: str, *, death_signal: bool = True) -> bool:
    """A Trial that was told `word` ("block", "wake") loses its parent. Without `death_signal` only EOF tells."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    said, say = os.pipe()
    parent = os.fork()
    if not parent:
        with no_way_back():
            trial = Trial("plain" if death_signal else "undying")
            trial.launch()
            trial.say(word)
            os.write(say, trial.pid.to_bytes(4, "little"))
            signal.pause()
    os.close(say)
    child = _read_pid(said)
    os.close(said)
    fd = os.pidfd_open(child)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    expected = death_signal or word != "block"
    ended = bool(readable([fd], _DIES if expected else _SURVIVES))
    _put_away(fd, child, None)
    return ended


def _write_pid(say: int) -> None:
    os.write(say, os.getpid().to_bytes(4, "little"))


def _read_pid(said: int) -> int:
    data = b""
    while len(data) < 4:
        readable([said])
        piece = os.read(said, 4 - len(data))
        assert piece, "a helper process failed"
        data += piece
    return int.from_bytes(data, "little")


def _put_away(fd: int, child: int, parent: int | None) -> None:
    """End what is left of a case, and wait for all of it: orphans are ours."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    os.close(fd)
    if parent is not None:
        os.kill(parent, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
