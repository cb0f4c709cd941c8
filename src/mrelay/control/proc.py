"""What /proc says of a process: its processor time and its age. Called by stats and relay. Does not block."""

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

TICKS: Final = os.sysconf("SC_CLK_TCK")


class ProcessTimes(NamedTuple):
    """Seconds of processor time used, and seconds since its start."""

    cpu: float
    age: float


def process_times(pid: int) -> ProcessTimes | None:
    """The times of a process; None when it is gone or hidden from us (proc(5), hidepid)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # proc_pid_stat(5): what follows comm, from field 3 on
    utime, stime, started = (int(fields[number - 3]) / TICKS for number in (14, 15, 22))
    return ProcessTimes(utime + stime, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
