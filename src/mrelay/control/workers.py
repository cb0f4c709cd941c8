"""The workers, as control sees them: their channels, the rules each has, their counters.

Owns one Worker for each that was ever up. Called by main (up and down), reconcile (rules) and stats
(counters). Nothing blocks; an answer is awaited until its deadline, so a stuck worker delays, never stops.
With each answer a worker says a digest of the rules it has in force; one that has others than it was told gets
all of them again.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from socket import socket
from typing import NamedTuple

import numpy as np

from mrelay.control.channel import AsyncChannel
from mrelay.control.slots import Counts
from mrelay.counters import Counters
from mrelay.counters_size import RULE_ROWS
from mrelay.messages import (
    Commit,
    Committed,
    DropRules,
    Message,
    PutRule,
    Sync,
    Synced,
    WorkerDown,
    WorkerUp,
    parts,
    rule_messages,
)
from mrelay.model.ruleset import DIGEST_MASK, rules_digest
from mrelay.wire import BadMessage

log = logging.getLogger(__name__)

REPAIR_PAUSE = 10.0  # seconds between two repairs of one worker
COMMIT_DEADLINE = 5.0  # seconds
SYNC_DEADLINE = 1.0  # seconds
EGRESS = ("io_uring", "sendmmsg")


class Order(NamedTuple):
    """What every worker should have in force from Commit `generation` on, by slot, and the rules' digest."""

    generation: int
    rules: Mapping[int, PutRule]
    digest: int


NOTHING = Order(0, {}, 0)


@dataclass(slots=True)
class Worker:
    """`channel` is None while the worker is down. `told` is the last order it was given since it came up.

    `fresh`: the next order is told as a whole. `trouble` and `retry` (monotonic): why it is down for longer, and
    until when. `repairs` counts how often it had other rules in force than it was told.
    """

    number: int
    core: int
    pid: int | None
    restarts: int
    counters: Counters
    channel: AsyncChannel | None
    statm: int | None = None  # a descriptor of its /proc/PID/statm
    state: str = "starting"
    egress: str = ""
    told: Order = NOTHING
    fresh: bool = True
    trouble: str = ""
    retry: float = 0.0
    repairs: int = 0
    repaired: float = 0.0  # monotonic
    awaited: dict[tuple[type[Message], int], asyncio.Future[None]] = field(default_factory=dict)

    def state_text(self) -> str:
        """For people: `state`, or what keeps it down."""
        if self.channel is not None or not self.trouble:
            return self.state
        return f"{self.trouble}: next try in {max(0.0, self.retry - time.monotonic()):.0f} s"


class Workers:
    """All of them, by number.

    `on_up` is called when one came up or must be told its rules again, `on_bad` when one sent nonsense.
    """

    def __init__(self, on_up: Callable[[], None], on_bad: Callable[[BadMessage], None]) -> None:
        self.by_number: dict[int, Worker] = {}
        self._on_up, self._on_bad = on_up, on_bad
        self._order = NOTHING
        self._sync = 0

    def up(self, message: WorkerUp, fds: list[int]) -> None:
        """A worker came up, with its channel and its counters (the same memory as before a restart)."""
        channel_fd, counters_fd, statm = _two_or_three(fds)
        old = self.by_number.get(message.worker)
        if old is not None:
            self._lost(old)
        counters = Counters(counters_fd, message.flow_limit)
        os.close(counters_fd)
        worker = Worker(message.worker, message.core, message.pid, message.restarts, counters, None, statm)
        worker.state = "restarting" if message.restarts else "starting"
        worker.repairs = old.repairs if old else 0
        self.by_number[message.worker] = worker
        worker.channel = AsyncChannel(
            socket(fileno=channel_fd),
            partial(self._receive, worker),
            partial(self._ended, worker),
            takes_fds=False,
        )
        if self._order is not NOTHING:  # at once: a pass of the reconciler may wait for other workers
            _tell(worker, self._order)
        self._on_up()

    def down(self, message: WorkerDown) -> None:
        """A worker ended; the supervisor starts another."""
        log.warning("worker %d ended: %s; restart %d", message.worker, message.reason, message.restarts)
        worker = self.by_number.get(message.worker)
        if worker is not None:
            worker.restarts = message.restarts
            self._lost(worker)
            worker.trouble, worker.retry = message.trouble, time.monotonic() + message.delay

    def live(self) -> list[Worker]:
        """Those that can be told something."""
        return [worker for worker in self.by_number.values() if worker.channel is not None]

    async def put(self, rules: Mapping[int, PutRule]) -> None:
        """Make every live worker run exactly these rules, by slot; returns at the deadline if need be."""
        generation = self._order.generation + 1
        self._order = Order(generation, dict(rules), _digest(self._order, rules))
        due = [worker for worker in self.live() if worker.fresh or worker.told.rules != rules]
        answers = {_await(worker, Committed, generation): worker for worker in due}
        for worker in due:
            _tell(worker, self._order)
        for worker in await _late(answers, Committed, generation, COMMIT_DEADLINE):
            log.error("worker %d did not take generation %d in time", worker.number, generation)

    async def sync(self) -> None:
        """Have every live worker bring its counters up to date, for at most the deadline."""
        self._sync += 1
        number = self._sync
        answers = {_await(worker, Synced, number): worker for worker in self.live()}
        for worker in answers.values():
            if worker.channel is not None:
                worker.channel.send(Sync(number))
        await _late(answers, Synced, number, SYNC_DEADLINE)

    def read_rules(self, slots: Sequence[int]) -> list[Counts]:
        """What rules' slots hold, over all workers: packets, bytes, drops (counters.RULE_DROPS)."""
        return self._read("rules", slots, RULE_ROWS)

    def read_links(self, slots: Sequence[int]) -> list[Counts]:
        """What the slots of outputs of rules hold, over all workers: packets, bytes, errors."""
        return self._read("links", slots, 3)

    def _read(self, table: str, slots: Sequence[int], width: int) -> list[Counts]:
        total = np.zeros((width, len(slots)), np.uint64)
        for worker in self.by_number.values():
            total += getattr(worker.counters, table)[:, slots]
        return list(map(tuple, total.T.tolist()))

    def _receive(self, worker: Worker, message: Message, _: list[int]) -> None:
        if isinstance(message, Committed) and message.egress in EGRESS:
            worker.egress = message.egress
            worker.state = "running"
            self._compare(worker, message)
            _answer(worker, Committed, message.generation)
        elif isinstance(message, Synced):
            self._compare(worker, message)
            _answer(worker, Synced, message.id)
        else:
            raise BadMessage(f"worker {worker.number} sent {message!r}")

    def _compare(self, worker: Worker, said: Committed | Synced) -> None:
        """Repair a worker that has other rules in force than it was told."""
        if said.generation != worker.told.generation or said.digest == worker.told.digest:
            return
        now = time.monotonic()
        if worker.repairs and now - worker.repaired < REPAIR_PAUSE:
            return
        worker.repaired, worker.repairs, worker.fresh = now, worker.repairs + 1, True
        level = logging.ERROR if worker.repairs == 1 else logging.DEBUG
        log.log(level, "worker %d has other rules than it was told: telling it all of them", worker.number)
        self._on_up()

    def _ended(self, worker: Worker, error: BadMessage | None) -> None:
        self._lost(worker)
        if error is not None:
            self._on_bad(error)

    @staticmethod
    def _lost(worker: Worker) -> None:
        if worker.channel is not None:
            worker.channel.close()
        if worker.statm is not None:
            os.close(worker.statm)
        worker.channel, worker.pid, worker.statm, worker.state = None, None, None, "restarting"
        for future in worker.awaited.values():
            if not future.done():
                future.set_result(None)


def _two_or_three(fds: list[int]) -> tuple[int, int, int | None]:
    if len(fds) not in (2, 3):
        raise BadMessage(f"WorkerUp with {len(fds)} descriptors")
    return fds[0], fds[1], fds[2] if len(fds) == 3 else None


def _digest(before: Order, rules: Mapping[int, PutRule]) -> int:
    """That of the rules, from that of the rules before."""
    old = before.rules
    gone = rules_digest(rule for slot, rule in old.items() if rules.get(slot) is not rule)
    new = rules_digest(rule for slot, rule in rules.items() if old.get(slot) is not rule)
    return before.digest - gone + new & DIGEST_MASK


def _tell(worker: Worker, order: Order) -> None:
    """Send what makes the worker's rules those of the order, and the Commit."""
    if worker.channel is None:
        return
    old = {} if worker.fresh else worker.told.rules
    for slots in parts([slot for slot in old if slot not in order.rules]):
        worker.channel.send(DropRules(slots))
    for message in rule_messages(rule for slot, rule in order.rules.items() if old.get(slot) != rule):
        worker.channel.send(message)
    worker.channel.send(Commit(order.generation, worker.fresh))
    worker.told, worker.fresh = order, False


async def _late(
    answers: dict[asyncio.Future[None], Worker], kind: type[Message], number: int, deadline: float
) -> list[Worker]:
    """Wait for each worker's answer; those that gave none in time."""
    if not answers:
        return []
    _, late = await asyncio.wait(answers, timeout=deadline)
    for worker in answers.values():
        worker.awaited.pop((kind, number), None)
    return [answers[future] for future in late]


def _await(worker: Worker, answer: type[Message], number: int) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    worker.awaited[answer, number] = future
    return future


def _answer(worker: Worker, kind: type[Message], number: int) -> None:
    """An answer that no one waits for any more is fine."""
    future = worker.awaited.get((kind, number))
    if future is not None and not future.done():
        future.set_result(None)
