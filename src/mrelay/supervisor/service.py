"""What the service manager is told: readiness, reloads, one line of status, and the watchdog's ping.

Owns when each is sent; kernel.notify owns how. The supervisor's loop calls `turn` every time it goes round, so a
ping says that the loop is alive. It also says that something can forward: while no worker at all runs, none is
sent, and a restart that follows costs nothing. One child that hangs or crashes is the supervisor's own affair.
Nothing here blocks.
"""

import contextlib
import time
from collections.abc import Sequence
from typing import Final, Protocol

from mrelay.kernel import notify

_PINGS: Final = 3  # within the watchdog's interval: one that comes late does no harm


class Process(Protocol):
    """A child, as far as it matters here: `pid` is 0 while it is down; `trouble`: more than a restart is amiss."""

    name: str
    restarts: int
    trouble: str

    @property
    def pid(self) -> int: ...


class Service:
    """`next_ping` is when the loop must turn at the latest (time.monotonic), None without a watchdog."""

    def __init__(self) -> None:
        interval = notify.watchdog_interval()
        self._pause = None if interval is None else interval / _PINGS
        self.next_ping = None if interval is None else time.monotonic()
        self._ready = False
        self._status = self._told = ""

    @property
    def ready(self) -> bool:
        """Whether `announce` was ever called."""
        return self._ready

    def announce(self, status: str) -> None:
        """The start, or a reload, is over; `status` is control's line."""
        if not self._ready:
            self._ready = True
            with contextlib.suppress(OSError):  # whoever reads it has left, or the disk is full: no reason to end
                print("ready", flush=True)
        self._status = self._told = status
        notify.ready(status)

    def reloading(self) -> None:
        """The config file is read again; `announce` ends it."""
        notify.reloading("reading the config file again")

    def say(self, status: str) -> None:
        """Control's line from now on."""
        self._status = status

    def turn(self, control: Process, workers: Sequence[Process]) -> None:
        """Tell what is new, and ping when it is time."""
        amiss = [child for child in (control, *workers) if child.trouble or not child.pid]
        down = [f"{child.name}: {child.trouble or f'down (restart {child.restarts})'}" for child in amiss]
        text = "; ".join([self._status, *down])
        if self._ready and text != self._told and notify.status(text):
            self._told = text
        now = time.monotonic()
        if self.next_ping is not None and self._pause is not None and now >= self.next_ping:
            self.next_ping = now + self._pause
            if not workers or any(worker.pid for worker in workers):
                notify.watchdog()
