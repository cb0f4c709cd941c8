"""Rules' rates: a token bucket for each rule that has one. See docs/decisions/D35.

Owns the buckets of one worker. A datagram passes while its rule's buckets hold anything, and may leave them
in debt: so a merged frame of 64 datagrams is not starved by a small rate, and the average is exact. Called
by the flow table (rules) and both paths (frames); nothing here blocks.
"""

import time
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.counters_size import MAX_RULES
from mrelay.messages import PutRule

MOST: Final = 64  # limited rules of one flow that are told apart; further ones share the last one's verdict
BURST: Final = 0.1  # seconds' worth that may come at once
LEAST: Final = (64.0, 65536.0)  # and at least: datagrams, bytes
_UNLIMITED: Final = 1e18  # a rate that no stream has, small enough to reckon with
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Limits:
    """Buckets by rule slot. Rows of the arrays f64[2, MAX_RULES]: datagrams, bytes of payload."""

    def __init__(self) -> None:
        self.rules: dict[int, tuple[int, int]] = {}  # slot: (pps, bps) of the limited rules in force
        self._rate = np.zeros((2, 0))
        self._burst, self._tokens, self._filled = self._rate, self._rate, self._rate[0]

    def follow(self, rules: Iterable[PutRule]) -> None:
        """These are the rules in force now. A bucket whose rate is what it was keeps its tokens."""
        wanted = {rule.rule: (rule.pps, rule.bps) for rule in rules if rule.pps or rule.bps}
        for slot, rate in wanted.items():
            if self.rules.get(slot) != rate:
                self._fill(slot, *rate)
        self.rules = wanted

    def _fill(self, slot: int, pps: int, bps: int) -> None:
        if not self._rate.size:  # most relays have no limited rule
            self._rate, self._burst, self._tokens = (np.zeros((2, MAX_RULES)) for _ in range(3))
            self._filled = np.zeros(MAX_RULES)
        self._rate[:, slot] = pps or _UNLIMITED, bps / 8 or _UNLIMITED
        self._burst[:, slot] = np.maximum(self._rate[:, slot] * BURST, LEAST)
        self._tokens[:, slot] = self._burst[:, slot]
        self._filled[slot] = time.monotonic()

    def take(self, slots: I64, count: I64, size: I64) -> Bools:
        """For each frame, in order of arrival: whether the rule of its slot passes it, with its tokens taken."""
        order = np.argsort(slots, kind="stable")
        slots, spent = slots[order], np.stack((count[order], size[order])).astype(float)
        first = np.flatnonzero(np.diff(slots, prepend=-1))
        self._refill(slots[first])
        before = np.cumsum(spent, axis=1) - spent
        before -= np.repeat(before[:, first], np.diff(first, append=len(slots)), axis=1)
        passes: Bools = (before < self._tokens[:, slots]).all(axis=0)
        self._tokens[:, slots[first]] -= np.add.reduceat(np.where(passes, spent, 0.0), first, axis=1)
        verdict = np.empty_like(passes)
        verdict[order] = passes
        return verdict

    def _refill(self, slots: I64) -> None:
        now = time.monotonic()
        grown = self._tokens[:, slots] + self._rate[:, slots] * (now - self._filled[slots])
        self._tokens[:, slots] = np.minimum(grown, self._burst[:, slots])
        self._filled[slots] = now

    def admit(self, slots: tuple[int, ...], count: int, size: int) -> int:
        """The same for one frame and all limited rules of its flow: a bit for each that passes it."""
        bits = 0
        for place, slot in enumerate(slots):
            if self._take_one(slot, count, size):
                bits |= 1 << min(place, MOST - 1)
        return bits

    def _take_one(self, slot: int, count: int, size: int) -> bool:
        now = time.monotonic()
        since, self._filled[slot] = now - self._filled[slot], now
        tokens = self._tokens[:, slot]
        np.minimum(tokens + self._rate[:, slot] * since, self._burst[:, slot], out=tokens)
        if tokens.min() <= 0:
            return False
        tokens -= count, size
        return True
