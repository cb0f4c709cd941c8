"""What nobody says, and samples show: flows that come and go, drops, engines, interfaces."""

import asyncio
from typing import cast
from unittest.mock import Mock

import numpy as np
from numpy.typing import NDArray

from mrelay.control.events import EventLog
from mrelay.control.fastpath import FastPath
from mrelay.control.links import Link, LinkTable
from mrelay.control.notice import BURST, LOOK, RISING, SILENCE, UNTOLD, WINDOW, InterfaceWatch, Noticer
from mrelay.control.sampler import FlowTable, Sample
from mrelay.counters import DROP_REASONS, RING_FULL
from mrelay.ebpf.layout import CARRIED, PASSED
from mrelay.model.ruleset import FlowKey
from mrelay.worker.flows import key_words

NO_DROPS = [0] * len(DROP_REASONS)


def table(flows: dict[int, tuple[int, int]]) -> FlowTable:
    """By slot: the flow's port and its datagrams."""
    keys = [
        key_words(FlowKey(ifindex=3, vlan=0, family=4, source=0x0A010101, group=0xEF010101, port=port))
        for port, _ in flows.values()
    ]
    counts = [[packets for _, packets in flows.values()], [0] * len(flows)]
    return FlowTable(
        np.array(list(flows), np.intp), np.array(keys, np.uint64).reshape(-1, 5).T, np.array(counts, np.uint64)
    )


class Scene:
    """A Noticer that is given samples, one a second."""

    def __init__(self, states: NDArray[np.int64] | None = None) -> None:
        self.events = EventLog()
        fast = None if states is None else Mock(worker_states=lambda: {0: states})
        self._noticer = Noticer(self.events, lambda ifindex: f"eth{ifindex}", cast(FastPath | None, fast))
        self._at = 0.0

    def sample(
        self, flows: dict[int, tuple[int, int]], *, drops: list[int] = NO_DROPS, after: float = 1.0
    ) -> list[str]:
        """What is told of it."""
        self._at += after
        before = self.events.last
        sample = Sample(self._at, np.zeros((2, 1), np.uint64), drops, {0: table(flows)}, {})
        asyncio.run(self._noticer.sampled(sample))
        return [event.text for event in self.events.page().events if event.id > before]


def flow(port: int) -> str:
    return f"flow eth3 10.1.1.1 -> 239.1.1.1 port {port}"


def test_a_flow_appears_once_and_goes_once() -> None:
    it = Scene()
    assert it.sample({}) == []
    assert it.sample({7: (5000, 1)}) == [f"{flow(5000)} appeared"]
    assert it.sample({7: (5000, 2)}) == []
    assert it.sample({7: (5000, 2)}, after=SILENCE - 1) == []
    assert it.sample({7: (5000, 2)}) == [f"{flow(5000)} is gone"]
    assert it.sample({7: (5000, 2)}) == []
    assert it.sample({7: (5000, 3)}) == [f"{flow(5000)} appeared"]


def test_a_slot_that_gets_another_flow() -> None:
    it = Scene()
    it.sample({})
    it.sample({7: (5000, 1)})
    assert it.sample({7: (5001, 1), 9: (5002, 4)}) == [
        f"{flow(5001)} appeared",
        f"{flow(5002)} appeared",
        f"{flow(5000)} is gone",
    ]


def test_flows_from_before_our_time_are_no_news() -> None:
    it = Scene()
    assert it.sample({1: (5000, 10), 2: (5001, 10)}) == []
    assert it.sample({1: (5000, 11), 2: (5001, 10)}) == []
    assert it.sample({1: (5000, 11), 2: (5001, 10)}, after=SILENCE) == [f"{flow(5000)} is gone"]
    assert it.sample({2: (5001, 11)}) == [f"{flow(5001)} appeared"]


def test_a_storm_of_flows_is_a_few_events_and_a_number() -> None:
    it = Scene()
    it.sample({})
    assert len(it.sample({slot: (slot + 1, 1) for slot in range(5000)})) == BURST
    storm = {slot: (slot + 1, 2) for slot in range(6000)}
    told = it.sample(storm, after=UNTOLD)
    assert told[-1] == f"{5000 - BURST + 1000 - 1:,} more of flow_appeared"
    assert len(told) == 2
    assert it.events.counts["flow_appeared"] == 6000


def test_drops_rise_and_settle() -> None:
    def drops(count: int) -> list[int]:
        return [count if number == RING_FULL else 0 for number in range(len(DROP_REASONS))]

    it = Scene()
    it.sample({}, drops=drops(5))
    assert it.sample({}, drops=drops(5 + RISING - 1)) == []
    assert it.sample({}, drops=drops(5 + 40)) == ["datagrams are dropped as ring_full: 20 a second"]
    assert it.sample({}, drops=drops(100)) == []
    for _ in range(WINDOW - 1):
        assert it.sample({}, drops=drops(100)) == []
    assert it.sample({}, drops=drops(100)) == ["no more datagrams are dropped as ring_full; 95 were"]
    assert it.sample({}, drops=drops(101)) == []


def test_an_engine_is_told_when_it_stays() -> None:
    states = np.full(16, CARRIED)
    it = Scene(states)

    def looks(count: int) -> list[str]:
        return [text for number in range(count * LOOK) for text in it.sample({7: (5000, next(packets))})]

    packets = iter(range(1, 1000))
    it.sample({})
    looks(3)
    states[7] = PASSED.index("too_big")
    looks(1)
    states[7] = CARRIED  # one frame was, so what
    assert looks(2) == []
    states[7] = PASSED.index("too_big")
    assert looks(2) == [f"{flow(5000)} went from ebpf to uring: longer than an output's MTU"]
    states[7] = CARRIED
    assert looks(2) == [f"{flow(5000)} went from uring to ebpf"]


def test_only_interfaces_that_rules_name_are_told() -> None:
    events, links = EventLog(), LinkTable()
    links.update([Link("eth0", 1, True), Link("eth1", 2, False), Link("veth9", 3, True)])
    watch = InterfaceWatch(links, events)
    links.update([Link("eth0", 1, False), Link("eth1", 2, True)])
    watch.look({"eth0", "eth1"})
    links.update([Link("eth1", 2, True)])
    watch.look({"eth0", "eth1"})
    links.update([])
    watch.look({"eth0", "eth1"})
    assert [event.text for event in events.page().events] == [
        "interface eth1 is up",
        "interface eth0 is down",
        "interface eth1 is gone",
    ]
