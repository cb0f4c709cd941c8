"""How a worker shares its core with the kernel's receive work, and waits for frames, by how busy it is.

Owns the worker's scheduling policy. Called by worker.main after every wait; never blocks. A waking worker
normally interrupts whatever has its core, which keeps latency low. Under load, what it interrupts is the
kernel thread that brings the frames (threaded NAPI, ksoftirqd), each time for a single merged frame:
SCHED_BATCH lets that thread finish its turn, and several frames wait when the worker gets the core (D33).

Between the two there are frames that come one by one and close together: to sleep for some tens of microseconds
and be woken costs more than what is done for a frame, so the worker looks for the next one without sleeping (D49).
"""

import os
import time
from typing import Final

from mrelay.counters import RECEIVED, Counters

_BUSY: Final = 200_000.0  # datagrams/s: some 3,000 merged frames, or batches of single ones
_FULL: Final = 60_000.0  # datagrams/s: there is hardly time to sleep, and taking several at a time is cheaper
_FEW: Final = 2  # datagrams a wake: so many wait where waking takes as long as the next one takes to come
_INTERVAL: Final = 0.1  # seconds between two looks at the rate


class Pace:
    """The policy follows the rate of received datagrams; `lively`: whether waits end soon enough to look on.

    `busy_poll`: how long to look on, in microseconds; 0: never.
    """

    def __init__(self, counters: Counters, busy_poll: int) -> None:
        self._totals = counters.totals.data
        self._due, self._since, self._before = 0.0, time.monotonic(), self._totals[RECEIVED]
        self._busy = self.lively = False
        self._gap, self._wakes = busy_poll / 1e6, 0
        self.look_on = busy_poll * 1000  # ns

    def keep(self, *, woken: bool) -> None:
        """Look at the rate when it is time to, and change the policy when the rate asks for it.

        `woken`: there was something to wake up for.
        """
        self._wakes += woken
        now = time.monotonic()
        if now < self._due:
            return
        received = self._totals[RECEIVED]
        count, seconds = received - self._before, now - self._since
        busy = count > _BUSY * seconds
        close = seconds < count * self._gap and count < _FULL * seconds
        self.lively = close and count < _FEW * self._wakes
        self._due, self._since, self._before, self._wakes = now + _INTERVAL, now, received, 0
        if busy != self._busy:
            self._busy = busy
            os.sched_setscheduler(0, os.SCHED_BATCH if busy else os.SCHED_OTHER, os.sched_param(0))
