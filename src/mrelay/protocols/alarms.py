"""Alarms: raised when a value passes its threshold, cleared when it has stayed below for a while.

A pure state machine, called once a second by stream health with what it has measured.
"""

from collections import deque
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

Kind = Literal["loss", "jitter", "silence"]
KINDS: Final[tuple[Kind, ...]] = ("loss", "jitter", "silence")
# Seconds that a value stays below before the alarm is cleared. A stream that is back is back.
HOLD: Final[Mapping[Kind, float]] = {"loss": 10.0, "jitter": 10.0, "silence": 0.0}
WINDOW: Final = 10  # ticks over which loss is judged


class Change(NamedTuple):
    """An alarm was raised, or cleared: what was measured, and the threshold."""

    kind: Kind
    raised: bool
    value: float
    threshold: float


class Alarms:
    """Those of one stream. `thresholds` of 0 raise nothing."""

    def __init__(self, thresholds: Mapping[Kind, float]) -> None:
        self._thresholds = thresholds
        self.raised: dict[Kind, float] = {}  # and the value that was last above the threshold
        self._above: dict[Kind, float] = {}  # and when that was

    def judge(self, values: Mapping[Kind, float | None], now: float) -> list[Change]:
        """What changes with these values; None is not known, and changes nothing."""
        changes = []
        for kind in KINDS:
            value, threshold = values.get(kind), self._thresholds.get(kind, 0.0)
            if value is None or not threshold:
                continue
            if value > threshold:
                if kind not in self.raised:
                    changes.append(Change(kind, True, value, threshold))
                self.raised[kind], self._above[kind] = value, now
            elif kind in self.raised and now - self._above[kind] >= HOLD[kind]:
                del self.raised[kind]
                changes.append(Change(kind, False, value, threshold))
        return changes


class LossRatio:
    """Loss over the last WINDOW ticks, from counters that only grow, but for what was lost and still came."""

    def __init__(self) -> None:
        self._ticks: deque[tuple[int, int]] = deque([(0, 0)], maxlen=WINDOW + 1)

    def tick(self, units: int, lost: int) -> float:
        """A second is over; lost / (lost + units) of the window."""
        self._ticks.append((units, lost))
        came, missing = units - self._ticks[0][0], max(0, lost - self._ticks[0][1])
        return missing / (came + missing) if missing else 0.0
