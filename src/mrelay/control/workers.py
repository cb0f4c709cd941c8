"""The workers, as control sees them: their channels, the rules each has, their counters.

Owns one Worker for each that was ever up. Called by main (up and down), reconcile (rules) and stats
(counters). Nothing blocks; an answer is awaited until its deadline, so a stuck worker delays, never stops.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from socket import socket

from mrelay.control.channel import AsyncChannel
from mrelay.control.slots import Counts
from mrelay.counters import Counters
from mrelay.messages import (
    BadMessage,
    Commit,
    Committed,
    DropRule,
    Message,
    PutRule,
    Sync,
    Synced,
    WorkerDown,
    WorkerUp,
)

log = logging.getLogger(__name__)

COMMIT_DEADLINE = 5.0  # seconds
SYNC_DEADLINE = 1.0  # seconds


@dataclass(slots=True)
class Worker:
    """`channel` is None while the worker is down; `sent` is what it was told since it came up."""

    number: int
    core: int
    pid: int | None
    restarts: int
    counters: Counters
    channel: AsyncChannel | None
    state: str = "starting"
    egress: str = ""
    sent: dict[int, PutRule] = field(default_factory=dict)
    fresh: bool = True  # never told a Commit yet
    awaited: dict[tuple[type[Message], int], asyncio.Future[None]] = field(default_factory=dict)


class Workers:
    """All of them, by number. `on_up` is called when one came up, `on_bad` when one sent nonsense."""

    def __init__(self, on_up: Callable[[], None], on_bad: Callable[[BadMessage], None]) -> None:
        self.by_number: dict[int, Worker] = {}
        self._on_up, self._on_bad = on_up, on_bad
        self._generation = 0
        self._sync = 0

    def up(self, message: WorkerUp, fds: list[int]) -> None:
        """A worker came up, with its channel and its counters (the same memory as before a restart)."""
        channel_fd, counters_fd = _two(fds)
        old = self.by_number.get(message.worker)
        if old is not None:
            self._lost(old)
        counters = Counters(counters_fd, message.flow_limit)
        os.close(counters_fd)
        worker = Worker(message.worker, message.core, message.pid, message.restarts, counters, None)
        worker.state = "restarting" if message.restarts else "starting"
        self.by_number[message.worker] = worker
        worker.channel = AsyncChannel(
            socket(fileno=channel_fd), partial(self._receive, worker), partial(self._ended, worker)
        )
        self._on_up()

    def down(self, message: WorkerDown) -> None:
        """A worker ended; the supervisor starts another."""
        log.warning("worker %d ended: %s; restart %d", message.worker, message.reason, message.restarts)
        worker = self.by_number.get(message.worker)
        if worker is not None:
            worker.restarts = message.restarts
            self._lost(worker)

    def live(self) -> list[Worker]:
        """Those that can be told something."""
        return [worker for worker in self.by_number.values() if worker.channel is not None]

    async def put(self, rules: Mapping[int, PutRule]) -> None:
        """Make every live worker run exactly these rules, by slot; returns at the deadline if need be."""
        self._generation += 1
        due = [worker for worker in self.live() if worker.fresh or worker.sent != rules]
        for worker in due:
            _send_difference(worker, rules)
        late = await _ask(due, Commit(self._generation), Committed, self._generation, COMMIT_DEADLINE)
        for worker in late:
            log.error("worker %d did not take generation %d in time", worker.number, self._generation)

    async def sync(self) -> None:
        """Have every live worker bring its counters up to date, for at most the deadline."""
        self._sync += 1
        await _ask(self.live(), Sync(self._sync), Synced, self._sync, SYNC_DEADLINE)

    def read_rule(self, slot: int) -> Counts:
        """What a rule's slot holds, over all workers: packets, bytes."""
        return self._read("rules", slot, 2)

    def read_link(self, slot: int) -> Counts:
        """What a (rule, output)'s slot holds, over all workers: packets, bytes, errors."""
        return self._read("links", slot, 3)

    def _read(self, table: str, slot: int, width: int) -> Counts:
        columns = [getattr(worker.counters, table)[:, slot].tolist() for worker in self.by_number.values()]
        return tuple(map(sum, zip(*columns, strict=True))) if columns else (0,) * width

    def _receive(self, worker: Worker, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        if isinstance(message, Committed):
            worker.egress = message.egress
            worker.state = "running"
            _answer(worker, Committed, message.generation)
        elif isinstance(message, Synced):
            _answer(worker, Synced, message.id)
        else:
            raise BadMessage(f"worker {worker.number} sent {type(message).__name__}")

    def _ended(self, worker: Worker, error: BadMessage | None) -> None:
        self._lost(worker)
        if error is not None:
            self._on_bad(error)

    @staticmethod
    def _lost(worker: Worker) -> None:
        if worker.channel is not None:
            worker.channel.close()
        worker.channel, worker.pid, worker.state = None, None, "restarting"
        for future in worker.awaited.values():
            if not future.done():
                future.set_result(None)


def _two(fds: list[int]) -> tuple[int, int]:
    if len(fds) != 2:
        raise BadMessage(f"WorkerUp with {len(fds)} descriptors")
    return fds[0], fds[1]


def _send_difference(worker: Worker, rules: Mapping[int, PutRule]) -> None:
    if worker.channel is None:
        return
    for slot in worker.sent.keys() - rules.keys():
        worker.channel.send(DropRule(slot))
    for slot, rule in rules.items():
        if worker.sent.get(slot) != rule:
            worker.channel.send(rule)
    worker.sent, worker.fresh = dict(rules), False


async def _ask(
    workers: list[Worker], question: Commit | Sync, answer: type[Message], number: int, deadline: float
) -> list[Worker]:
    """Send to each, and wait for each one's answer; those that gave none in time."""
    futures = {_await(worker, answer, number): worker for worker in workers}
    if not futures:
        return []
    for worker in workers:
        if worker.channel is not None:
            worker.channel.send(question)
    _, late = await asyncio.wait(futures, timeout=deadline)
    for worker in workers:
        worker.awaited.pop((answer, number), None)
    return [futures[future] for future in late]


def _await(worker: Worker, answer: type[Message], number: int) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    worker.awaited[answer, number] = future
    return future


def _answer(worker: Worker, kind: type[Message], number: int) -> None:
    """An answer that no one waits for any more is fine."""
    future = worker.awaited.get((kind, number))
    if future is not None and not future.done():
        future.set_result(None)
