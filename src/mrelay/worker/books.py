"""What flows counted, booked on the rules and outputs that it is for.

Owns, for each slot of the flow table, the counter slots of its rules and links. Called by the flow table, each
second for all flows; nothing here blocks, and nothing takes a step of Python for each flow.
"""

from collections.abc import Callable
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.counters import U64, Counters
from mrelay.model.ruleset import Route

_MOST: Final = 1 << 16  # counters at a time, but for one flow's own: some MB of arrays
_FLOW: Final = 16  # as many as a flow without any weighs
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


class Lists:
    """Short lists of integers, one after the other in `items`; equal lists stand there once."""

    def __init__(self, dtype: type[np.int32] | type[np.uint64]) -> None:
        self.items = np.zeros(64, dtype)
        self.end = 0
        self._starts: dict[tuple[int, ...], int] = {}

    def start(self, items: tuple[int, ...]) -> int:
        """Where in `items` this list stands."""
        start = self._starts.get(items)
        if start is None:
            start, self.end = self.end, self.end + len(items)
            if self.end > len(self.items):
                self.items = np.concatenate((self.items, np.zeros(self.end, self.items.dtype)))
            self.items[start : self.end] = items
            self._starts[items] = start
        return start


class _Columns:
    """A list of counters for each slot."""

    def __init__(self, limit: int) -> None:
        self._start = np.zeros(limit, np.int32)
        self.length = np.zeros(limit, np.int32)
        self._lists = Lists(np.int32)

    def put(self, slot: int, items: tuple[int, ...]) -> None:
        self._start[slot], self.length[slot] = self._lists.start(items), len(items)

    def reset(self) -> None:
        self._lists = Lists(np.int32)

    def of(self, slots: I64) -> tuple[I32, I64]:
        """The counters of all the slots, and for each the row of its slot in `slots`."""
        lengths = self.length[slots]
        rows = np.repeat(np.arange(len(slots)), lengths)
        ends = np.cumsum(lengths)
        within = np.arange(len(rows)) - np.repeat(ends - lengths, lengths)
        return self._lists.items[self._start[slots][rows] + within], rows


class Books:
    """Whose a flow's datagrams are. `beat` is called during long work.

    `end`: slots from there on had no flow yet. The lowest are taken first, so that few flows take little time.
    """

    def __init__(self, counters: Counters, beat: Callable[[], None]) -> None:
        self._counters, self._beat = counters, beat
        limit = counters.flows.shape[1]
        self._rules, self._links = _Columns(limit), _Columns(limit)
        self._followed = np.zeros(limit, np.bool_)
        self.end = 0

    def follow(self, slot: int, route: Route) -> None:
        """From now on the slot's datagrams are the route's; those before must be booked."""
        self._rules.put(slot, route.rules)
        self._links.put(slot, tuple(chain.from_iterable(route.links)))
        self._followed[slot] = True
        self.end = max(self.end, slot + 1)

    def leave(self, slot: int) -> None:
        """The slot is empty."""
        self._followed[slot] = False

    def reset(self) -> None:
        """All are."""
        self._followed[:] = False
        self._rules.reset()
        self._links.reset()

    def fold(self) -> None:
        """Bring all rules' and links' counters up to date."""
        counters, end = self._counters, self.end
        fresh = (counters.flows[:, :end] != counters.folded[:, :end]).any(axis=0)
        slots = np.flatnonzero(fresh & self._followed[:end])  # what a worker before us left is nobody's yet
        weights = np.cumsum(self._links.length[slots] + _FLOW) // _MOST
        for some in np.split(slots, np.flatnonzero(np.diff(weights)) + 1):
            self._beat()
            self._book(some)

    def _book(self, slots: I64) -> None:
        counters = self._counters
        now = counters.flows[:, slots]
        fresh = now - counters.folded[:, slots]
        counters.folded[:, slots] = now
        for columns, table in ((self._rules, counters.rules), (self._links, counters.links)):
            items, rows = columns.of(slots)
            _add(table, items, fresh, rows)


def _add(table: U64, items: I32, fresh: U64, rows: I64) -> None:
    """Packets and bytes; items may stand there more than once."""
    for kind in range(2):
        np.add.at(table[kind], items, fresh[kind, rows])
