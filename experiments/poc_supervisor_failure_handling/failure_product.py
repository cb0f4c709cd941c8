"""The product's own worker under the experiment's eyes: its longest turn, its start, its interface's end.

Owns `ProductWorker`, with its channel to control in our hands. Called by poc_supervisor_failure_handling; every
function blocks until the worker has answered, IN_TIME at most, or for the seconds that it watches.
"""

import dataclasses
import os
import select
import time
from collections.abc import Sequence
from typing import Final, NamedTuple
from unittest import mock

import numpy as np
from failure_restart import SCALED, Keeper
from pyroute2 import IPRoute

from mrelay.counters import Counters
from mrelay.demo.topology import Namespace
from mrelay.messages import Commit, Granted, Message, OpenIngress, PutRule, PutRules, Stop, Sync, WorkerSetup
from mrelay.pulse import INTERVAL, SIZE
from mrelay.supervisor import backoff
from mrelay.supervisor.children import Child, end_all, new_counters
from mrelay.supervisor.resources import Resources
from mrelay.wire import Channel, channel_pair
from processes import GROUPS, IN_TIME, NOBODY, Trial, cpu_seconds, readable, rule, state_letter

_SAMPLE: Final = 0.001  # seconds between two looks at a pulse
_REST: Final = 0.2  # seconds without a beat: it waits, and beats once an INTERVAL


class ProductWorker(Child):
    """The product's worker; we are its supervisor and its control."""

    def __init__(self, core: int, limit: int) -> None:
        super().__init__("worker", "mrelay.worker", NOBODY, NOBODY)
        self.counters, self._core, self._limit = new_counters(limit), core, limit
        self.control: Channel | None = None

    def introduce(self) -> None:
        """Start it, and tell it who we are."""
        self.start()
        ours, theirs = channel_pair()
        with theirs:
            self.tell(WorkerSetup(0, self._core, self._limit, 0), [theirs.fileno(), self.counters])
        self.control = Channel(ours)

    def say(self, *messages: Message) -> None:
        """As control."""
        assert self.control is not None
        for message in messages:
            self.control.send(message)

    def answer(self) -> None:
        """Wait for one."""
        assert self.control is not None
        readable([self.control.fileno()])
        assert self.control.receive() is not None

    def beats(self) -> bytes:
        """Its pulse."""
        assert self.process is not None
        return os.pread(self.process._pulse, SIZE, 0)

    def leave(self) -> None:
        """Stop it, and let go of everything."""
        end_all([self], Stop(), 5.0)
        if self.control is not None:
            self.control.close()
        os.close(self.counters)


class Stretch(NamedTuple):
    """A piece of long work: CPU seconds in all, and the most that the worker used while its pulse stood still.

    CPU, because a worker that others keep from running is still too.
    """

    work: str
    seconds: float
    still: float


class Working(NamedTuple):
    """The worker with `flows` flows. `start`: CPU until it first answers, seconds; `idle`: CPU share at rest."""

    flows: int
    stretches: list[Stretch]
    start: float
    idle: float


def long_work(flows: int, core: int) -> Working:
    """Have it take over `flows` flows of an earlier worker, then route them all anew."""
    limit = max(1024, flows)
    worker = ProductWorker(core, limit)
    try:
        keys = Counters(worker.counters, limit, write=True).keys  # as an earlier worker would have left them
        keys[1, :flows] = 0x0A000001
        keys[3, :flows] = np.arange(flows, dtype=np.uint64) + np.uint64(GROUPS)
        keys[4, :flows] = 5000 | 4 << 32 | 1 << 40  # port, family, ifindex
        worker.introduce()
        worker.say(Sync(1))
        worker.answer()
        start = cpu_seconds(worker.pid)
        worker.say(PutRules((_rule(0, flows),)), Commit(1, whole=True))
        took_over = _watch("taking them over after a restart", worker)
        worker.answer()
        worker.say(PutRules((_rule(1, flows),)), Commit(2, whole=False))
        routed = _watch("routing them anew", worker)
        worker.answer()
        before, watched = cpu_seconds(worker.pid), 2 * INTERVAL
        select.select([], [], [], watched)
        return Working(flows, [took_over, routed], start, (cpu_seconds(worker.pid) - before) / watched)
    finally:
        worker.leave()


def _watch(work: str, worker: ProductWorker) -> Stretch:
    """Look at the pulse until the worker rests: it sleeps, and has not beaten for a while."""
    before, still, begun = worker.beats(), 0.0, cpu_seconds(worker.pid)
    used, moved, deadline = begun, time.monotonic(), time.monotonic() + IN_TIME
    while (now := time.monotonic()) < deadline and (now < moved + _REST or state_letter(worker.pid) != "S"):
        beats, cpu = worker.beats(), cpu_seconds(worker.pid)
        still = max(still, cpu - used)
        if beats != before:
            before, used, moved = beats, cpu, now
        select.select([], [], [], _SAMPLE)
    return Stretch(work, cpu_seconds(worker.pid) - begun, still)


def _rule(slot: int, flows: int) -> PutRule:
    return dataclasses.replace(rule(slot), group_low=GROUPS, group_high=GROUPS + flows)


def start_time(cores: Sequence[int], *, at_once: bool) -> float:
    """Seconds until a product worker on each core answers: all started at once, or one after another."""
    workers = [ProductWorker(core, 1024) for core in cores]
    start = time.monotonic()
    try:
        for worker in workers:
            worker.introduce()
            worker.say(Sync(1))
            if not at_once:
                worker.answer()
        for worker in workers if at_once else ():
            worker.answer()
        return time.monotonic() - start
    finally:
        for worker in workers:
            worker.leave()


# ---- an interface that is gone --------------------------------------------------------------------


class Gone(NamedTuple):
    """What an interface's removal did: restarts of a child that ends over it; and of the product's worker, and
    the share of a core that this used meanwhile."""

    restarts: int
    product_restarts: int
    product_share: float


def interface_gone(core: int, seconds: float) -> Gone:
    """Both on one veth, which is then removed."""
    with Namespace() as space, space.inside(), mock.patch.object(backoff, "_DELAYS", SCALED):
        ifindex = _add_veth()
        resources, worker = Resources(), ProductWorker(core, 1024)
        keeper = Keeper([Trial("link=v0")])
        try:
            _bind(worker, resources, ifindex)
            deadline = time.monotonic() + IN_TIME
            while not keeper.ups and time.monotonic() < deadline:
                keeper.turn(deadline)
            pid, before = worker.pid, cpu_seconds(worker.pid)
            with IPRoute() as ip:
                ip.link("del", index=ifindex)
            start = time.monotonic()
            # At least so long, and until the other has ended twice: on a busy machine that takes longer.
            while (spent := time.monotonic() - start) < seconds or (
                keeper.trials[0].restarts < 2 and spent < IN_TIME
            ):
                keeper.turn(time.monotonic() + 0.1)
            share = (cpu_seconds(worker.pid) - before) / spent
            worker.say(Sync(2))
            worker.answer()
            return Gone(keeper.trials[0].restarts, int(worker.pid != pid), share)
        finally:
            keeper.put_away()
            worker.leave()
            resources.close_all()


def _add_veth() -> int:
    with IPRoute() as ip:
        ip.link("add", ifname="v0", kind="veth", peer="v1")
        indices: list[int] = [ip.link_lookup(ifname=name)[0] for name in ("v0", "v1")]
        for index in indices:
            ip.link("set", index=index, state="up")
    return indices[0]


def _bind(worker: ProductWorker, resources: Resources, ifindex: int) -> None:
    resources.workers = 1
    ingress = OpenIngress(ifindex, 256)
    worker.introduce()
    worker.tell(Granted((ingress,), used=False), resources.open(ingress).fds(0))
    put = dataclasses.replace(rule(0), ifindex=ifindex, outputs=())
    worker.say(PutRules((put,)), Commit(1, whole=True))
    worker.answer()
