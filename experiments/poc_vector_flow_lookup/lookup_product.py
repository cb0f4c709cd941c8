"""The relay's own flow table as one of the methods of poc_vector_flow_lookup.

Owns the table's shared memory. Filled at once, not flow by flow: a million installs one by one take too long
here, and what is looked up afterwards is the same. So it knows the table's inside.
"""

import os
from array import array

import numpy as np
from lookup_keys import I32, Key, Mix, Store, Words
from lookup_simple import Method
from numpy.typing import NDArray

from mrelay.counters import Counters
from mrelay.model.ruleset import RuleSet
from mrelay.supervisor.children import new_counters
from mrelay.worker.egress import Egress
from mrelay.worker.flows import FlowTable, words_key

LIMIT = 65_536  # the relay's flow_limit, unless told otherwise
PROBES = 8


def _table(limit: int) -> FlowTable:
    fd = new_counters(limit)
    counters = Counters(fd, limit, write=True)
    os.close(fd)
    return FlowTable(counters, limit, RuleSet(), Egress(), lambda: None)


class Product(Method):
    """mrelay.worker.flows.FlowTable. `homeless`: flows that found all their places taken (it evicts one then)."""

    name = "mrelay's flow table"

    def __init__(self, store: Store, mix: Mix) -> None:
        super().__init__(store, mix)
        limit = max(LIMIT, store.used)
        self.table = _table(limit)
        self.table.counters.keys[:, : store.used] = store.columns[:, : store.used]
        words = store.words(slice(store.used))
        place, slots, todo = self.table._hash(words), self.table._slots, np.arange(store.used)
        for step in range(PROBES):
            at = (place[todo] + step) & (len(slots) - 1)
            free = slots[at] < 0
            slots[at[free]] = todo[free]
            todo = todo[slots[at] != todo]
        self.homeless = todo
        self.table._free = array("i", range(limit - 1, store.used - 1, -1))

    @staticmethod
    def hash(words: Words) -> NDArray[np.int64]:
        """Where the table would look first for these keys."""
        return _table(LIMIT)._hash(words)

    def memory(self) -> float:
        """Bytes of index for each flow that there is room for, without the dict that the scalar path asks."""
        return self.table._slots.nbytes / self.table.limit

    def lookup(self, words: Words) -> I32:
        return self.table.lookup(words)

    def install(self, slot: int) -> None:
        key: Key = self.store.key(slot)
        self.table.find(words_key(list(key)))

    def remove(self, slot: int) -> None:
        self.table.remove(slot)
