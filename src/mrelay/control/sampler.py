"""Rates: a sample of the counters each second, and the difference of the last two.

Owns the samples. Called by stats; its `run` is one of main's tasks. A sample is a few array copies, whose
cost grows with the flows there are, not with the table's size in Python.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mrelay.control.proc import cpu_seconds
from mrelay.control.workers import Worker, Workers
from mrelay.counters import DROP_REASONS, U64, sound_keys
from mrelay.counters_size import MAX_RULES

INTERVAL = 1.0  # seconds
PAUSE = 10.0  # seconds without a datagram, after which a rule begins anew


@dataclass(frozen=True, slots=True)
class FlowTable:
    """One worker's live flows: slots, keys u64[5, n], packets and bytes u64[2, n]."""

    slots: NDArray[np.intp]
    keys: U64
    counts: U64


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters at one moment (`at`: monotonic); `rules` u64[2, MAX_RULES] and `drops`, by reason, are over all
    workers, the rest by worker number."""

    at: float
    rules: U64
    drops: list[int]
    flows: dict[int, FlowTable]
    cpu: dict[int, tuple[int, float]]  # pid, seconds of processor time


def flow_table(worker: Worker) -> FlowTable:
    """A copy of the worker's live flows: those that went somewhere."""
    counters = worker.counters
    slots = np.flatnonzero((counters.keys[4] != 0) & (counters.flows[0] != 0))
    keys = counters.keys[:, slots]
    sound = sound_keys(keys)
    slots = slots[sound]
    return FlowTable(slots, keys[:, sound], counters.flows[:, slots])


def take(workers: Workers) -> Sample:
    """A sample now."""
    rules = np.zeros((2, MAX_RULES), np.uint64)
    drops = np.zeros(len(DROP_REASONS), np.uint64)
    cpu: dict[int, tuple[int, float]] = {}
    for worker in workers.by_number.values():
        rules += worker.counters.rules[:2]
        drops += worker.counters.drops
        if worker.pid is not None and (seconds := cpu_seconds(worker.pid)) is not None:
            cpu[worker.number] = worker.pid, seconds
    flows = {worker.number: flow_table(worker) for worker in workers.by_number.values()}
    return Sample(time.monotonic(), rules, drops.tolist(), flows, cpu)


class Sampler:
    """The last two samples, and the rates between them: 0 until there are two. `after` is told of each."""

    def __init__(self, workers: Workers, after: Callable[[Sample], Awaitable[None]] | None = None) -> None:
        self._workers, self._after = workers, after
        self._old: Sample | None = None
        self._new: Sample | None = None
        self._grew = np.zeros((2, MAX_RULES))  # monotonic: when each rule last took a datagram, and since when

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await self._workers.sync()
            self._old, self._new = self._new, take(self._workers)
            self._note_growth(self._old, self._new)
            if self._after is not None:
                await self._after(self._new)
            await asyncio.sleep(INTERVAL)

    def _note_growth(self, old: Sample | None, new: Sample) -> None:
        grown = new.rules[0] > (old.rules[0] if old else 0)
        last, since = self._grew
        since[grown & (new.at - last > PAUSE)] = new.at
        last[grown] = new.at

    def ago(self, slot: int) -> tuple[float | None, float | None]:
        """Seconds since the rule of this slot last took a datagram, and since it began to; None: it never did."""
        now = time.monotonic()
        last, since = self._grew[:, slot].tolist()
        return (now - last, now - since) if last else (None, None)

    def rules(self) -> NDArray[np.float64]:
        """Packets and bytes per second of each rule slot: [2, MAX_RULES]."""
        if self._old is None or self._new is None:
            return np.zeros((2, MAX_RULES))
        return (self._new.rules - self._old.rules) / (self._new.at - self._old.at)

    def flows(self, worker: int, table: FlowTable) -> NDArray[np.float64]:
        """Packets and bytes per second of the flows in `table`: [2, n]; 0 for those not in both samples."""
        rates = np.zeros((2, len(table.slots)))
        if self._old is None or self._new is None:
            return rates
        old, new = self._old.flows.get(worker), self._new.flows.get(worker)
        if old is None or new is None:
            return rates
        in_old, in_new = find(old, table), find(new, table)
        both = (in_old >= 0) & (in_new >= 0)
        grown = new.counts[:, in_new[both]].astype(float) - old.counts[:, in_old[both]]
        rates[:, both] = grown / (self._new.at - self._old.at)
        return np.maximum(rates, 0)  # a flow that went and came back counts from 0

    def cpu_percent(self, worker: int) -> float:
        """Of one core, over the last interval."""
        if self._old is None or self._new is None:
            return 0.0
        old, new = self._old.cpu.get(worker), self._new.cpu.get(worker)
        if old is None or new is None or old[0] != new[0]:
            return 0.0
        return round(100 * (new[1] - old[1]) / (self._new.at - self._old.at), 1)


def find(sample: FlowTable, table: FlowTable) -> NDArray[np.intp]:
    """Where the flows of `table` stand in `sample`; -1 for those that don't: same slot, but another key."""
    if not len(sample.slots):
        return np.full(len(table.slots), -1)
    at = np.minimum(np.searchsorted(sample.slots, table.slots), len(sample.slots) - 1)
    same = (sample.slots[at] == table.slots) & (sample.keys[:, at] == table.keys).all(axis=0)
    return np.where(same, at, -1)
