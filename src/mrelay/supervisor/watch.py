"""Whether a child that runs still works: judged by its pulse.

Owns the judgement. Called by the supervisor's loop at every CHECK. A child is hung when it misses beats although
it had what it needs to beat: one that waits for a processor, for the kernel or for a debugger is late, and ending
it would mend nothing. Reads a file of /proc, and only when beats are missed; nothing here blocks.
"""

import os
from collections.abc import Callable
from typing import Final, NamedTuple

from mrelay.pulse import INTERVAL, SIZE

CHECK: Final = 0.25  # seconds between two looks
SILENCE: Final = 3 * INTERVAL  # seconds without a beat
START: Final = 30.0  # seconds until the first beat: imports, on a slow machine under load
LONG_WORK: Final = 15.0  # seconds that control may compute in one piece: thousands of rules at once
_SUSPECT: Final = 1.5 * INTERVAL  # seconds of silence, from when on the processor time is watched
_ENOUGH: Final = 0.2  # seconds of processor time in which a working child would have beaten
_DOING: Final = {"S": "waiting for something", "T": "stopped"}
_TICK: Final = 1 / os.sysconf("SC_CLK_TCK")


class Activity(NamedTuple):
    """`state` as in proc_pid_stat(5): R runs or wants to, S sleeps, D waits in the kernel, T stopped, t traced."""

    state: str
    cpu: float  # seconds


def activity(pid: int) -> Activity:
    """What the main thread of a process does, and the processor time of all its threads.

    Where other users' processes are hidden (proc(5), hidepid) silence alone has to tell: as if it slept.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return Activity("S", 0.0)
    return Activity(fields[0].decode(), (int(fields[11]) + int(fields[12])) * _TICK)


class Watch:
    """One process, from its start. `late` says that it misses beats, but not by its own fault.

    `busy`: seconds without a beat that are allowed while it computes.
    """

    def __init__(
        self, pid: int, pulse: int, now: float, busy: float = SILENCE, look: Callable[[int], Activity] = activity
    ) -> None:
        self._pid, self._pulse, self._busy, self._look = pid, pulse, busy, look
        self._last, self._looked, self._silent = bytes(SIZE), now, 0.0
        self._before: Activity | None = None
        self.beaten = self.late = False

    def check(self, now: float) -> str:
        """Why it counts as hung; empty while it does not."""
        # A pause of our own (a stopped supervisor, a machine that slept) is no silence of the child's.
        self._silent += min(now - self._looked, 2 * CHECK)
        self._looked = now
        beat = os.pread(self._pulse, SIZE, 0)
        if beat != self._last:
            self._last, self._silent, self._before = beat, 0.0, None
            self.beaten, self.late = True, False
        return self._judge()

    def _judge(self) -> str:
        limit = SILENCE if self.beaten else START
        if self._silent < limit - (SILENCE - _SUSPECT):
            return ""
        found = self._look(self._pid)
        self._before = self._before or found
        if self._silent < limit:
            return ""
        busy = found.cpu - self._before.cpu >= _ENOUGH
        if busy and self._silent < self._busy:
            return ""
        self.late = found.state in ("D", "t") or (found.state == "R" and not busy)
        doing = "busy" if busy else _DOING.get(found.state, found.state)
        return "" if self.late else f"no sign of life for {self._silent:.1f} s, {doing}"
