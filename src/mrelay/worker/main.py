"""A worker's loop: messages from supervisor and control, frames from its rings.

Owns the process. Blocks in poll only. The supervisor's messages are read before control's, so that a socket
is here before the rule that uses it. A bad message, or the supervisor's end, ends the process.
"""

import gc
import logging
import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from mrelay import logs
from mrelay.child import confine, settle
from mrelay.counters import RECEIVED, RING_FULL, Counters
from mrelay.ebpf.maps import Maps, sizes_of
from mrelay.kernel.packet import LONG_SLOTS
from mrelay.messages import (
    Commit,
    Committed,
    DropRules,
    FastPath,
    Granted,
    LogLevel,
    Message,
    OpenEgress,
    OpenIngress,
    PutMore,
    PutRule,
    PutRules,
    Revoked,
    Stop,
    Sync,
    Synced,
    WorkerSetup,
    joined,
)
from mrelay.model.ruleset import RuleSet
from mrelay.pulse import INTERVAL, Pulse
from mrelay.wire import BadMessage, Channel
from mrelay.worker import fastpath
from mrelay.worker.egress import Egress
from mrelay.worker.failures import Failures
from mrelay.worker.flows import FlowTable
from mrelay.worker.ingress import Ingress, Ring
from mrelay.worker.messages import Sender, best_sender
from mrelay.worker.pace import Pace
from mrelay.worker.scalar import ScalarPath
from mrelay.worker.vector import MAX_BATCH, VectorPath

log = logging.getLogger("mrelay.worker")

SCALAR_MOST: Final = 32  # frames: up to here one by one is faster than a batch's fixed cost (D33)
_ENOUGH: Final = 1024  # frames: a batch that is worth its fixed cost many times over (D33)
_ROUNDS: Final = 16  # batches of one ring before the others, and the channels, get their turn
_MESSAGES: Final = 2  # from control, with up to 32 rules each, before the rings get theirs
_FLOWS: Final = 64  # of those that an earlier worker left, likewise
_IDLE: Final = round(INTERVAL * 1000)  # ms
_QUIET: Final = 5  # ms without a frame, after which those that were let in have long been sent on


class Worker:
    """One worker's state, from its WorkerSetup on."""

    def __init__(
        self, supervisor: Channel, setup: WorkerSetup, fds: list[int], sender: Sender, pulse: Pulse
    ) -> None:
        self.supervisor, self._sender, self._pulse = supervisor, sender, pulse
        self.counters = Counters(fds[1], setup.flow_limit, write=True)
        self.counters.balance()
        os.close(fds[1])  # the mapping has its own
        self.rules, self.egress = RuleSet(), Egress()
        self.table = FlowTable(self.counters, setup.flow_limit, self.rules, self.egress, pulse.beat)
        failures = Failures(self.counters, self.table.fold_flow)
        self.table.on_refused = failures.refused
        self.fast: fastpath.FastPath | None = None
        self.scalar = ScalarPath(self.counters, self.table, failures)
        self.vector = VectorPath(self.counters, self.table, failures, sender)
        self.pace = Pace(self.counters, setup.busy_poll)
        self._number = setup.worker
        self.ingress: dict[tuple[int, int], Ingress] = {}  # by ifindex and family (messages.OpenIngress)
        self._by_fd: dict[int, Ingress] = {}
        self._poll = select.poll()
        self._poll.register(supervisor.sock, select.POLLIN)
        self.control: Channel | None = None
        self._committed = False
        self._take_control(fds[0])

    # ---- messages --------------------------------------------------------------------------

    def _take_control(self, fd: int) -> None:
        """Control is new: the rules of the old one stay in force until its first Commit, which says all."""
        if self.control is not None:
            self._leave_control()
        self.control = Channel(socket.socket(fileno=fd), takes_fds=False)
        self.control.sock.setblocking(False)
        self._poll.register(self.control.sock, select.POLLIN)
        self._incoming: dict[int, PutRule | None] = {}
        self._generation = 0

    def _leave_control(self) -> None:
        assert self.control is not None  # noqa: S101  both callers know it is there
        self._poll.unregister(self.control.sock)
        self.control.close()
        self.control = None

    def _from_supervisor(self, message: Message, fds: list[int]) -> None:
        match message:
            case Granted():
                self._granted(message, iter(fds))
            case Revoked():
                self._revoked(message)
            case WorkerSetup():
                os.close(fds[1])
                self._take_control(fds[0])
            case FastPath() if fds:
                maps = Maps(fds, sizes_of(message))
                self.fast = self.table.fast = fastpath.FastPath(maps, self._number, self.counters)
                self.fast.limits(self.table.limits.rules)
            case LogLevel(role, level):
                logs.set_level(role, level, mine=True)
            case Stop():
                self._sync()
                sys.exit(0)
            case _:
                raise BadMessage(f"{type(message).__name__} is not for a worker")

    def _granted(self, message: Granted, fds: Iterator[int]) -> None:
        for what in message.what:
            match what:
                case OpenIngress():
                    rings = [socket.socket(fileno=next(fds)), socket.socket(fileno=next(fds))]
                    self._add_ingress(Ingress(rings, what, used=message.used))
                case OpenEgress(output):
                    self.egress.grant(output, socket.socket(fileno=next(fds)))
                case _:
                    raise BadMessage(f"{type(what).__name__} is nothing for a worker")

    def _revoked(self, message: Revoked) -> None:
        for what in message.what:
            if isinstance(what, OpenIngress):
                self._remove_ingress(what)
            elif isinstance(what, OpenEgress):
                self.egress.revoke(what.output)

    def _from_control(self, message: Message) -> None:
        match message:
            case PutRules(rules):
                self._incoming |= {rule.rule: rule for rule in rules}
            case PutMore(slot):
                if (rule := self._incoming.get(slot)) is None:
                    raise BadMessage(f"more of rule {slot}, which was not put")
                self._incoming[slot] = joined(rule, message)
            case DropRules(slots):
                self._incoming |= dict.fromkeys(slots)
            case Commit(generation, whole):
                self._commit(whole=whole)
                self._generation = generation
                self._answer(Committed(generation, self._sender.name, self.rules.digest))
            case Sync(id):
                self._sync()
                self._answer(Synced(id, self._generation, self.rules.digest))
            case _:
                raise BadMessage(f"{type(message).__name__} is not for a worker")

    def _answer(self, message: Message) -> None:
        try:
            if self.control is not None:
                self.control.send(message)
        except OSError as error:
            log.warning("control does not take an answer (%s): it will ask again", error.strerror)

    def _commit(self, *, whole: bool) -> None:
        if whole:
            gone = [r.rule for r in self.rules if r.rule not in self._incoming]
            self._incoming.update(dict.fromkeys(gone))
        touched: list[PutRule] = []
        for slot, rule in self._incoming.items():
            old = self.rules.get(slot)
            if old == rule:
                continue
            touched += [form for form in (old, rule) if form is not None]
            self.rules.drop(slot)
            if rule is not None:
                self.rules.put(rule)
        self._incoming = {}
        self._put_in_force(touched)

    def _put_in_force(self, touched: Sequence[PutRule]) -> None:
        self.table.rules_changed(touched)
        if not self._committed:
            self._committed = True
            self.table.inherit()
            for ingress in self.ingress.values():
                self._open_gate(ingress)
        for ingress in self.ingress.values():
            self._filter(ingress)

    def _filter(self, ingress: Ingress) -> None:
        if ingress.what.family:  # control keeps the addresses that its filter looks up
            return
        ingress.set_filter(*(self.rules.ranges(ingress.ifindex, family) for family in (4, 6)))

    def _sync(self) -> None:
        logs.flush()
        self.table.fold()
        for ingress in self.ingress.values():
            self._count_lost(ingress)

    def _count_lost(self, ingress: Ingress) -> None:
        for ring in ingress.rings:
            lost = ring.lost()
            self.counters.totals[RECEIVED] += np.uint64(lost)
            self.counters.drops[RING_FULL] += np.uint64(lost)
            if self.fast is not None and ingress.what.family:
                self.fast.sent(lost, long=ring is ingress.long)

    # ---- rings -----------------------------------------------------------------------------

    def _add_ingress(self, ingress: Ingress) -> None:
        self._remove_ingress(ingress.what)
        self.ingress[ingress.what.ifindex, ingress.what.family] = ingress
        if self._committed:
            self._open_gate(ingress)

    def _open_gate(self, ingress: Ingress) -> None:
        """From here on its frames are ours to forward."""
        if self.fast is not None:
            self.fast.rings(min(each.short.slots for each in self.ingress.values()), LONG_SLOTS)
        for ring in ingress.rings:
            self._by_fd[ring.sock.fileno()] = ingress
            self._poll.register(ring.sock, select.POLLIN)
        self._filter(ingress)

    def _remove_ingress(self, what: OpenIngress) -> None:
        ingress = self.ingress.pop((what.ifindex, what.family), None)
        if ingress is None:
            return
        self._count_lost(ingress)
        for ring in ingress.rings:
            if self._by_fd.pop(ring.sock.fileno(), None) is not None:
                self._poll.unregister(ring.sock)
        ingress.close()

    def _forward(self, ingress: Ingress) -> None:
        """What waits in an interface's rings, a batch at a time."""
        yielded = False
        fast = self.fast if ingress.what.family else None
        for _ in range(_ROUNDS):
            runs = ingress.ready(MAX_BATCH)
            if not yielded and not self._worth_it(runs):
                os.sched_yield()  # to the kernel's receive thread, if it wants this core: no wait if it does not
                yielded = True
                continue
            if not runs:
                if fast is not None:
                    fast.drained()
                return
            yielded = False
            self.table.now += 1
            self._pulse.beat()
            for ring, count in runs:
                path = self.scalar if count <= SCALAR_MOST or ring is ingress.long else self.vector
                path.forward(ring, count)
                ring.release(count)
                if fast is not None:
                    fast.sent(count, long=ring is ingress.long)

    def _worth_it(self, runs: list[tuple[Ring, int]]) -> bool:
        """Few frames are sent at once, for latency; many make long runs; what lies between can grow first."""
        count = runs[0][1] if len(runs) == 1 else sum(count for _, count in runs)
        return 0 < count <= SCALAR_MOST or count >= _ENOUGH

    # ---- the loop --------------------------------------------------------------------------

    def run(self) -> None:
        """Until Stop, or the supervisor's end."""
        while True:
            ready = self._wait()
            if not ready.keys() <= self._by_fd.keys():
                self._listen(ready)
            for fd, event in ready.items():
                ingress = self._by_fd.get(fd)
                if ingress is not None:
                    ingress.woken(fd)
                    self._forward(ingress)
                    if event & select.POLLERR:
                        ingress.clear_errors()
            # Frames that wait come first: on a cold cache the rest would delay them by some microseconds.
            self._pulse.beat()
            self.table.restore(_FLOWS)
            self.pace.keep(woken=bool(ready))

    def _listen(self, ready: dict[int, int]) -> None:
        """A channel has messages."""
        if self.supervisor.fileno() in ready:
            self._drain(self.supervisor)
        elif self.control is not None and self.control.fileno() in ready:
            self._drain(self.supervisor)
            self._drain(self.control, _MESSAGES)

    def _wait(self) -> dict[int, int]:
        """Descriptors that are ready, and what for; empty when nothing is for a while."""
        if self.table.kept:
            return dict(self._poll.poll(0))
        if self.pace.lively and (ready := self._look_on()):
            return ready
        if self.fast is None or not self.fast.behind:
            return dict(self._poll.poll(_IDLE))
        accepted = self.fast.accepted
        ready = dict(self._poll.poll(_QUIET))
        if not ready:
            self.fast.quiet(accepted)
        return ready

    def _look_on(self) -> dict[int, int]:
        """Like a wait, without sleep, for a little while; whoever else wants this core gets it in between."""
        until = time.monotonic_ns() + self.pace.look_on
        while not (ready := self._poll.poll(0)) and time.monotonic_ns() < until:
            os.sched_yield()
        return dict(ready)

    def _drain(self, channel: Channel, most: int = sys.maxsize) -> None:
        """The messages that wait. Control's end is not ours: rules stay in force until another comes."""
        for _ in range(most):
            self._pulse.beat()
            try:
                got = channel.receive()
            except BlockingIOError:
                return
            except ConnectionResetError:
                got = None
            if got is None:
                if channel is self.supervisor:
                    sys.exit("the supervisor is gone")
                self._leave_control()
                return
            message, fds = got
            if channel is self.supervisor:
                self._from_supervisor(message, fds)
            else:
                self._from_control(message)


def main() -> None:
    """`python -m mrelay.worker …` (see child.settle), started by the supervisor."""
    supervisor, pulse = settle("worker")
    sender = best_sender()
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection would stall forwarding; nothing here makes cycles
    setup, fds = _await_setup(supervisor, pulse)
    _pin(setup.core)
    worker = Worker(supervisor, setup, fds, sender, pulse)
    confine("worker", flows=setup.flow_limit)
    worker.run()


def _pin(core: int) -> None:
    """Run on this core from now on; on any, if it was taken away meanwhile: forwarding comes first."""
    try:
        os.sched_setaffinity(0, {core})
    except OSError as error:
        log.warning("cannot run on core %d (%s): running on any", core, error.strerror)


def _await_setup(supervisor: Channel, pulse: Pulse) -> tuple[WorkerSetup, list[int]]:
    """The first message: at once, or when this process, a spare so far, takes the place of one that ended."""
    supervisor.sock.setblocking(False)
    poll = select.poll()
    poll.register(supervisor.sock, select.POLLIN)
    while not poll.poll(_IDLE):
        pulse.beat()
    first = supervisor.receive()
    if first is not None and isinstance(first[0], WorkerSetup):
        return first[0], first[1]
    if first is not None and isinstance(first[0], Stop):
        sys.exit(0)
    sys.exit("the supervisor's first message is not WorkerSetup")
