"""SIGINT and SIGTERM as a flag, so that a stopped run still ends with its summary.

Owns the two handlers while entered. Called by the commands. Never blocks but in `sleep`.
"""

import signal
import time
from types import FrameType
from typing import Self

_NAP = 0.1  # seconds; how long a signal may go unnoticed


class Stop:
    """While entered, SIGINT and SIGTERM set `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until a signal asks to stop (noticed within 0.1 s)."""
        deadline = time.monotonic() + seconds
        while not self.requested and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _NAP))

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
