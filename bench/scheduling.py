"""Who runs first on a core: the load before everything, then what is measured, then the rest of the machine.

Called by lab.py, relays.py and traffic.py. Needs root. Nothing blocks.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

SLICE: Final = 100_000  # ns
_NR_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274, "riscv64": 274}  # asm/unistd.h
_libc = ctypes.CDLL(None, use_errno=True)


class _SchedAttr(ctypes.Structure):
    """struct sched_attr, linux/sched/types.h; sched_runtime is the slice of SCHED_OTHER since Linux 6.12."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("sched_policy", ctypes.c_uint32),
        ("sched_flags", ctypes.c_uint64),
        ("sched_nice", ctypes.c_int32),
        ("sched_priority", ctypes.c_uint32),
        ("sched_runtime", ctypes.c_uint64),
        ("sched_deadline", ctypes.c_uint64),
        ("sched_period", ctypes.c_uint64),
    )


@contextlib.contextmanager
def real_time(priority: int) -> Iterator[None]:
    """This thread runs before all others: the load is the outside world's, other work must not change it.

    What it starts, a relay for instance, is as usual.
    """
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def prefer(pids: Sequence[int]) -> None:
    """Put other work on this machine behind these processes.

    All that is measured gets the same, so its shares beside each other stay as they were. Both kinds of niceness
    count: within a session, and, where sched_autogroup is on, of the session.
    """
    for pid in pids:
        with contextlib.suppress(OSError):  # no sched_autogroup here, or the process has ended
            Path(f"/proc/{pid}/autogroup").write_text("-20")
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, pid, -20)


@contextlib.contextmanager
def softirqs_preferred(cores: set[int]) -> Iterator[None]:
    """So for the block are these cores' ksoftirqd threads."""
    names = {f"ksoftirqd/{core}" for core in cores}
    before = {pid: os.getpriority(os.PRIO_PROCESS, pid) for pid, name in threads() if name in names}
    for pid in before:
        os.setpriority(os.PRIO_PROCESS, pid, -20)
    try:
        yield
    finally:
        for pid, nice in before.items():
            os.setpriority(os.PRIO_PROCESS, pid, nice)


def threads() -> Iterator[tuple[int, str]]:
    """Number and name of every process, kernel threads included."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            yield int(process.name), (process / "comm").read_text().rstrip()


def prompt(pid: int) -> None:
    """A thread gets the same share, but in short slices: it runs when it wakes (before Linux 6.12 it waits)."""
    attr = _SchedAttr(ctypes.sizeof(_SchedAttr), os.SCHED_OTHER, 0, -20, 0, SLICE, 0, 0)
    number = ctypes.c_long(_NR_SCHED_SETATTR[platform.machine()])
    if _libc.syscall(number, pid, ctypes.byref(attr), 0):
        os.setpriority(os.PRIO_PROCESS, pid, -20)
