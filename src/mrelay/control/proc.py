"""A process's start, processor time and memory. Called by main, before control is confined, sampler and relay."""

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

TICKS: Final = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED: Final = 2  # linux/posix-timers_types.h: the clock that counts what the scheduler gave


class Usage(NamedTuple):
    """Seconds of processor time, bytes of resident memory; None for what can't be known."""

    cpu: float | None
    resident: int | None


def start_time(pid: int) -> float:
    """When it started, on CLOCK_BOOTTIME; now when it is hidden from us (proc(5), hidepid)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return int(text.rpartition(")")[2].split()[19]) / TICKS  # proc_pid_stat(5): starttime; comm may hold anything


def cpu_seconds(pid: int) -> float | None:
    """Processor time used so far; None when it is gone. Without a file: a confined process has no /proc.

    The clock's number is what clock_getcpuclockid(3) makes of a pid.
    """
    try:
        return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
    except OSError:
        return None


def open_statm(pid: int) -> int | None:
    """A descriptor of /proc/PID/statm; None where that is hidden from us."""
    try:
        return os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def usage(pid: int | None, statm: int | None) -> Usage:
    """Of the process with this pid, and this descriptor of its statm."""
    return Usage(None if pid is None else cpu_seconds(pid), None if statm is None else _resident(statm))


def _resident(statm: int) -> int | None:
    try:
        os.lseek(statm, 0, os.SEEK_SET)
        return int(os.read(statm, 256).split()[1]) * os.sysconf("SC_PAGESIZE")  # proc_pid_statm(5)
    except (OSError, IndexError):  # it has ended
        return None
