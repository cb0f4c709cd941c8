"""Notices what changes without anybody saying so, and makes events of it: flows, drops, engines, interfaces.

Owns what was seen last. `Noticer.sampled` is called by sampler after each sample, `InterfaceWatch` by main when
links change. Flows are compared in NumPy, in a thread; who could make flows come and go at will (spoofed sources)
gets a few events and a number.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mrelay.control.events import (
    DropsRising,
    DropsSettled,
    EngineChanged,
    Event,
    EventLog,
    Flow,
    FlowAppeared,
    FlowGone,
    InterfaceDown,
    InterfaceUp,
)
from mrelay.control.fastpath import EBPF, URING, XDP, FastPath
from mrelay.control.links import LinkTable
from mrelay.control.sampler import FlowTable, Sample, find
from mrelay.control.stats import flow_key
from mrelay.counters import DROP_REASONS, U64
from mrelay.ebpf.carry import REASONS
from mrelay.ebpf.layout import CARRIED, CARRIED_XDP, PASSED
from mrelay.model.ruleset import address_text

SILENCE: Final = 10.0  # seconds without a datagram after which a flow is gone
WINDOW: Final = 10  # samples over which drops are watched
RISING: Final = 10  # datagrams in a window; less is no event
LOOK: Final = 5  # samples from one look at engines to the next
BURST: Final = 100  # events of flows that may come at once
PER_SECOND: Final = 1.0  # and how many in the long run
UNTOLD: Final = 10.0  # seconds from one `omitted` to the next
ENGINES: Final = (URING, EBPF, XDP)
UNKNOWN: Final = -1  # in place of an engine's number


@dataclass(slots=True)
class Looked:
    """What a look found: keys u64[5, n]. Those that changed went from engine `was` to `now`, by number in ENGINES;
    `state` is struct flow's, or -1 for what is not installed."""

    appeared: U64
    gone: U64
    changed: U64
    was: NDArray[np.int64]
    now: NDArray[np.int64]
    state: NDArray[np.int64]


class FlowWatch:
    """One worker's flows as of the last sample, in columns.

    `active`: when a datagram came last, -inf for before our time; `engine`: at the last look; `told`: by events.
    """

    def __init__(self, table: FlowTable) -> None:
        count = len(table.slots)
        self._table, self._live = table, np.ones(count, bool)
        self._active = np.full(count, -np.inf)
        self._engine = np.full(count, UNKNOWN)
        self._told = np.full(count, UNKNOWN)

    def look(self, table: FlowTable, at: float, states: NDArray[np.int64] | None) -> Looked:
        """The flows at this time. `states` by slot: of struct flow, None when nobody looked."""
        place = find(self._table, table)
        known = place >= 0
        grew = ~known
        grew[known] = table.counts[0, known] > self._table.counts[0, place[known]]
        was_live, active = _carried(self._live, place, False), _carried(self._active, place, -np.inf)
        active = np.where(grew, at, active)
        live = grew | was_live & (at - active < SILENCE)
        silent = was_live & ~live & np.isfinite(active)
        evicted = self._live & np.isfinite(self._active)
        evicted[place[known]] = False
        gone = np.concatenate([table.keys[:, silent], self._table.keys[:, evicted]], axis=1)
        appeared = table.keys[:, live & ~was_live]
        changes = self._look_at_engines(table, place, live, states)
        self._table, self._live, self._active = table, live, active
        return Looked(appeared, gone, *changes)

    def _look_at_engines(
        self, table: FlowTable, place: NDArray[np.intp], live: NDArray[np.bool_], states: NDArray[np.int64] | None
    ) -> tuple[U64, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Those that two looks in a row saw at another engine than was told."""
        before, told = _carried(self._engine, place, UNKNOWN), _carried(self._told, place, UNKNOWN)
        none = np.zeros(0, np.int64)
        self._engine, self._told = before, told
        if states is None:
            return table.keys[:, :0], none, none, none
        state = np.full(len(place), UNKNOWN)
        inside = table.slots < len(states)
        state[inside] = states[table.slots[inside]]
        engine = (state == CARRIED) + 2 * (state == CARRIED_XDP)
        settled = live & (engine == before)
        changed = settled & (told != engine) & (told != UNKNOWN)
        self._engine, self._told = engine, np.where(settled, engine, told)
        return table.keys[:, changed], told[changed], engine[changed], state[changed]


def _carried(column: NDArray[Any], place: NDArray[np.intp], new: Any) -> NDArray[Any]:
    """The column in its new order; `new` for rows that were not there."""
    found = np.full(len(place), new, column.dtype)
    known = place >= 0
    found[known] = column[place[known]]
    return found


class DropWatch:
    """Drops by reason over the last samples: rising by RISING in a window, settled by none in a whole one."""

    def __init__(self) -> None:
        self._window: deque[tuple[float, list[int]]] = deque(maxlen=WINDOW + 1)
        self._rising: dict[str, int] = {}  # by reason: the total before

    def look(self, drops: list[int], at: float) -> list[Event]:
        """What is to be told of these totals."""
        self._window.append((at, drops))
        then, old = self._window[0]
        seconds = max(at - then, 1.0)
        found: list[Event] = []
        for reason, before, now in zip(DROP_REASONS, old, drops, strict=True):
            if reason not in self._rising and now - before >= RISING:
                self._rising[reason] = before
                rate = round((now - before) / seconds, 1)
                found.append(DropsRising(reason=reason, per_second=rate, total=now))
            elif reason in self._rising and now <= before and len(self._window) > WINDOW:
                found.append(DropsSettled(reason=reason, dropped=now - self._rising.pop(reason), total=now))
        return found


class InterfaceWatch:
    """Which links were up."""

    def __init__(self, links: LinkTable, events: EventLog) -> None:
        self._links, self._events = links, events
        self._up = self._now()

    def _now(self) -> set[str]:
        return {link.name for link in self._links.by_name.values() if link.up}

    def look(self, named: AbstractSet[str]) -> None:
        """Links changed. `named`: those that rules name."""
        now = self._now()
        self._events.add_many([(InterfaceUp, {"interface": name}) for name in sorted((now - self._up) & named)])
        lost = sorted((self._up - now) & named)
        gone = self._links.by_name.keys()
        self._events.add_many([(InterfaceDown, {"interface": name, "gone": name not in gone}) for name in lost])
        self._up = now


class Noticer:
    """Makes events of samples."""

    def __init__(self, events: EventLog, interface: Callable[[int], str], fast: FastPath | None) -> None:
        """`interface`: the name of a link's number."""
        self._events, self._interface, self._fast = events, interface, fast
        self._flows: dict[int, FlowWatch] = {}
        self._drops = DropWatch()
        self._samples = 0
        self._credit, self._untold, self._told = float(BURST), Counter[str](), 0.0

    async def sampled(self, sample: Sample) -> None:
        """A sample was taken."""
        self._samples += 1
        for event in self._drops.look(sample.drops, sample.at):
            self._events.add(event)
        self._credit = min(BURST, self._credit + PER_SECOND)
        for looked in await asyncio.to_thread(self._look, sample):
            self._tell("flow_appeared", looked.appeared, lambda flow, _: FlowAppeared(flow=flow))
            self._tell("flow_gone", looked.gone, lambda flow, _: FlowGone(flow=flow, silence=SILENCE))
            self._tell("engine_changed", looked.changed, partial(_engine_changed, looked))
        if sample.at - self._told >= UNTOLD:
            self._told, untold, self._untold = sample.at, self._untold, Counter()
            for kind, count in untold.items():
                self._events.omit(kind, count)

    def _look(self, sample: Sample) -> list[Looked]:
        """In a thread: all workers' flows."""
        states = self._fast.worker_states() if self._fast is not None and self._samples % LOOK == 0 else {}
        found = []
        for worker, table in sample.flows.items():
            watch = self._flows.get(worker)
            if watch is None:
                self._flows[worker] = FlowWatch(table)
            else:
                found.append(watch.look(table, sample.at, states.get(worker)))
        return found

    def _tell(self, kind: str, keys: U64, make: Callable[[Flow, int], Event]) -> None:
        """As many as there is credit for; the rest is a number, later."""
        count = keys.shape[1]
        told = min(count, int(self._credit))
        self._credit -= told
        for number in range(told):
            self._events.add(make(self._flow(keys[:, number].tolist()), number))
        if count > told:
            self._untold[kind] += count - told

    def _flow(self, words: list[int]) -> Flow:
        key = flow_key(words)
        return Flow(
            interface=self._interface(key.ifindex),
            vlan=key.vlan or None,
            source=address_text(key.family, key.source),
            group=address_text(key.family, key.group),
            port=key.port,
        )


def _engine_changed(looked: Looked, flow: Flow, number: int) -> Event:
    was, now, state = (int(column[number]) for column in (looked.was, looked.now, looked.state))
    why = REASONS[PASSED[state]] if 0 <= state < len(PASSED) else ""
    return EngineChanged(flow=flow, engine=ENGINES[now], was=ENGINES[was], why=why)
