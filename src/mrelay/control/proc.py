"""A process's start and processor time. Called by main, before control is confined, and by sampler."""

import os
import time
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK")
_CPUCLOCK_SCHED: Final = 2  # linux/posix-timers_types.h: the clock that counts what the scheduler gave


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
