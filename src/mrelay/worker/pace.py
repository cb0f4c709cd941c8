"""How a worker shares its core with the kernel's receive work, by how busy it is.

Owns the worker's scheduling policy. Called by worker.main after every wait; never blocks. A waking worker
normally interrupts whatever has its core, which keeps latency low. Under load, what it interrupts is the
kernel thread that brings the frames (threaded NAPI, ksoftirqd), each time for a single merged frame:
SCHED_BATCH lets that thread finish its turn, and several frames wait when the worker gets the core (D33).
"""

import os
import time
from typing import Final

from mrelay.counters import RECEIVED, Counters

_BUSY: Final = 200_000.0  # datagrams/s: some 3,000 merged frames, or batches of single ones
_INTERVAL: Final = 0.1  # seconds between two looks at the rate


class Pace:
    """The policy follows the rate of received datagrams."""

    def __init__(self, counters: Counters) -> None:
        self._totals = counters.totals.data
        self._due, self._since, self._before = 0.0, time.monotonic(), self._totals[RECEIVED]
        self._busy = False

    def keep(self) -> None:
        """Look at the rate when it is time to, and change the policy when the rate asks for it."""
        now = time.monotonic()
        if now < self._due:
            return
        received = self._totals[RECEIVED]
        busy = received - self._before > _BUSY * (now - self._since)
        self._due, self._since, self._before = now + _INTERVAL, now, received
        if busy != self._busy:
            self._busy = busy
            os.sched_setscheduler(0, os.SCHED_BATCH if busy else os.SCHED_OTHER, os.sched_param(0))
