"""Rates of the last ten minutes: of the relay, and of each rule.

Owns a bounded list of points, one for every STEP samples. Called by main (after each sample) and relay. Nothing
here blocks; a point is a few array operations, and takes 12 bytes a rule.
"""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mrelay.control.rulebook import Rulebook
from mrelay.control.sampler import INTERVAL, Sample
from mrelay.control.slots import Slots
from mrelay.control.workers import Workers
from mrelay.counters import DROP_REASONS
from mrelay.counters_size import MAX_LINKS, MAX_RULES

STEP: Final = 5  # samples
POINTS: Final = 120
ERRORS: Final = 2  # the row of counters.links

Table = dict[str, Any]
Rates = NDArray[np.float32]


class Totals(NamedTuple):
    """What was counted so far: received, matched and drops by reason; by rule slot packets, bytes, errors."""

    at: float
    relay: NDArray[np.float64]
    rules: NDArray[np.float64]


class Point(NamedTuple):
    """The rates from one moment to the next; rows as in Totals."""

    relay: Rates
    rules: Rates


class History:
    """The last POINTS points."""

    def __init__(self, workers: Workers, book: Rulebook) -> None:
        self._workers, self._book = workers, book
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._made = 0  # points ever
        self._samples = 0
        self._last: Totals | None = None
        self._end = 0.0  # of the last point: seconds since 1970
        self._known = Slots()
        self._since: dict[str, int] = {}  # by rule: the first point that is its own

    def sampled(self, sample: Sample) -> None:
        """A sample was taken."""
        self._samples += 1
        if self._samples % STEP == 1:
            self._note_rules()
            self._add(self._totals(sample))

    def _note_rules(self) -> None:
        """Rules that are new: their slots may have been other rules'."""
        slots = self._book.slots
        if slots is self._known:
            return
        old, first = self._known.rules, self._made
        self._since = {
            name: self._since[name] if name in old and old[name].index == slot.index else first
            for name, slot in slots.rules.items()
        }
        self._known = slots

    def _totals(self, sample: Sample) -> Totals:
        used = 1 + max((slot.index for slot in self._known.rules.values()), default=-1)
        counters = [worker.counters for worker in self._workers.by_number.values()]
        matched = sum(one.matched for one in counters)
        links = np.zeros(MAX_LINKS)
        for one in counters:
            links += one.links[ERRORS]
        rules = np.vstack([sample.rules[:, :used], _by_rule(links, self._known)[:used]])
        return Totals(sample.at, np.array([matched + sum(sample.drops), matched, *sample.drops], float), rules)

    def _add(self, new: Totals) -> None:
        old, self._last, self._end = self._last, new, time.time()
        if old is None:
            return
        both = min(old.rules.shape[1], new.rules.shape[1])
        seconds = max(new.at - old.at, 0.001)
        relay = np.maximum(new.relay - old.relay, 0) / seconds
        rules = np.maximum(new.rules[:, :both] - old.rules[:, :both], 0) / seconds
        self._points.append(Point(relay.astype(np.float32), rules.astype(np.float32)))
        self._made += 1

    def relay(self) -> Table:
        """/v1/history"""
        rows = np.array([point.relay for point in self._points]).reshape(-1, 2 + len(DROP_REASONS)).T
        received, matched, *drops = ([round(rate, 1) for rate in row] for row in rows.tolist())
        by_reason = {reason: row for reason, row in zip(DROP_REASONS, drops, strict=True) if any(row)}
        return {**self._frame(), "received": received, "matched": matched, "drops": by_reason}

    def rule(self, name: str) -> Table:
        """/v1/rules/NAME/history; null for the time before the rule was there. KeyError for no rule."""
        index = self._book.slots.rules[name].index
        same = name in self._known.rules and self._known.rules[name].index == index
        since = self._since[name] - (self._made - len(self._points)) if same else POINTS
        series: tuple[list[float | None], ...] = ([], [], [])
        for number, point in enumerate(self._points):
            known = number >= since and index < point.rules.shape[1]
            for row, values in enumerate(series):
                values.append(round(float(point.rules[row, index]), 1) if known else None)
        packets, octets, errors = series
        bits = [None if value is None else value * 8 for value in octets]
        return {**self._frame(), "pps": packets, "bps": bits, "errors": errors}

    def _frame(self) -> Table:
        return {"step": STEP * INTERVAL, "end": round(self._end, 1)}


def _by_rule(links: NDArray[np.float64], slots: Slots) -> NDArray[np.float64]:
    """Counts of link slots, added up by rule slot."""
    indices: Mapping[str, int] = {name: slot.index for name, slot in slots.rules.items()}
    pairs = [(slot.index, indices[rule]) for (rule, _), slot in slots.links.items()]
    if not pairs:
        return np.zeros(MAX_RULES)
    of_link, of_rule = np.array(pairs).T
    return np.bincount(of_rule, weights=links[of_link], minlength=MAX_RULES).astype(float)
