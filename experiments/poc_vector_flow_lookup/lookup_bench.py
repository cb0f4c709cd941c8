"""The measurements of poc_vector_flow_lookup: all methods over one set of flows, asked in turn.

Owns the clock. A `Bench` of a million flows takes some seconds to make.
"""

import statistics
import time
from collections.abc import Callable
from typing import Final

import numpy as np
from lookup_keys import Mix, Store, batches, ipv4_flows
from lookup_product import Product
from lookup_simple import EachPacket, Method, Sorted, UniqueFirst
from lookup_tables import Perfect, Probing, TwoPlaces

Kind = type[Method]
METHODS: Final[tuple[Kind, ...]] = (EachPacket, UniqueFirst, Sorted, Product, Probing, TwoPlaces, Perfect)
TABLES: Final[tuple[Kind, ...]] = (Product, Probing, TwoPlaces, Perfect)
TRAFFIC: Final = {  # share of known flows, Zipf's exponent
    "all known": (1.0, 0.0),
    "Zipf 1.3": (1.0, 1.3),
    "90% known": (0.9, 0.0),
    "50% known": (0.5, 0.0),
}
SPARE: Final = 300  # flows that come later
Costs = dict[Kind, float]


class Bench:
    """`flows` flows in every method. `trusting`: keys are not compared (lookup_keys.Store).

    `build`: ns a flow to build each method at once. `wrong` of `answers` so far differed from the dict's.
    """

    def __init__(self, flows: int, *, trusting: bool) -> None:
        self._chance = np.random.default_rng(flows)
        self._store = Store(ipv4_flows(flows + SPARE, self._chance), flows, trusting=trusting)
        self._methods: dict[Kind, Method] = {}
        self.build: Costs = {}
        self.answers = self.wrong = 0
        mix = Mix()
        for kind in METHODS:
            start = time.perf_counter_ns()
            self._methods[kind] = kind(self._store, mix)
            self.build[kind] = (time.perf_counter_ns() - start) / flows
        product = self._methods[Product]
        assert isinstance(product, Product)
        self.homeless = product.homeless

    def measure(self, size: int, rounds: int, traffic: str = "all known") -> Costs:
        """ns a packet: medians over `rounds` batches of `size` packets each, every batch a new one.

        A method that was given another's batch would find that one's keys in the cache.
        """
        spent: dict[Kind, list[int]] = {kind: [] for kind in METHODS}
        fresh = batches(self._store, size, rounds * len(METHODS), self._chance, *TRAFFIC[traffic])
        for words, kind in zip(fresh, METHODS * rounds, strict=True):
            start = time.perf_counter_ns()
            slots = self._methods[kind].lookup(words)
            spent[kind].append(time.perf_counter_ns() - start)
            right = self._methods[EachPacket].lookup(words)
            differing = slots != right
            if kind is Product:
                differing &= ~np.isin(right, self.homeless)
            self.wrong += int(differing.sum())
            self.answers += size
        return {kind: statistics.median(times) / size for kind, times in spent.items()}

    def change(self, kind: Kind) -> tuple[float, float]:
        """µs to install one flow more, and to remove it."""
        slots = range(self._store.used, self._store.used + SPARE)
        return _median_us(self._methods[kind].install, slots), _median_us(self._methods[kind].remove, slots)

    def memory(self, kind: Kind) -> float:
        """Bytes of index for a flow, beside the 40 of its key."""
        method = self._methods[kind]
        if isinstance(method, Product):
            return method.memory()
        if isinstance(method, EachPacket):
            return method.memory() / self._store.used
        arrays = [value for value in vars(method).values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in arrays) / self._store.used


def _median_us(act: Callable[[int], None], slots: range) -> float:
    spent = []
    for slot in slots:
        start = time.perf_counter_ns()
        act(slot)
        spent.append(time.perf_counter_ns() - start)
    return statistics.median(spent) / 1000
