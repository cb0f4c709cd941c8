"""Tasks that are started and stopped while traffic goes on, and the account of every datagram and buffer.

Used by poc_io_uring_concurrency. Everything is in this process: Unix datagram socket pairs, whose queues
lose nothing. Nothing here blocks but the loop's own sleep.
"""

import asyncio
import contextlib
import os
import random
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from uring_driver import Driver

SIZE: Final = 256  # bytes of a buffer
_SINGLE, _STREAM = "single", "stream"


class Pair:
    """A sending and a receiving end; `sent` datagrams so far, `got` their numbers in order of arrival."""

    def __init__(self) -> None:
        self.sender, self.receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sender.setblocking(False)
        self.receiver.setblocking(False)
        self.fd, self.sent, self.got = self.receiver.fileno(), 0, list[int]()

    def send(self) -> None:
        """The next number, unless the queue is full (net.unix.max_dgram_qlen)."""
        with contextlib.suppress(BlockingIOError):
            self.sender.send(self.sent.to_bytes(8, "big"))
            self.sent += 1

    def take(self, data: bytes) -> None:
        """A datagram that came."""
        self.got.append(int.from_bytes(data, "big"))

    def drain(self) -> None:
        """What still waits in the socket, read by plain recv."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.take(self.receiver.recv(SIZE))

    def close(self) -> None:
        """Both ends."""
        self.sender.close()
        self.receiver.close()


@dataclass
class Account:
    """What a churn showed."""

    started: int = 0
    most_at_once: int = 0
    late: int = 0
    threads: set[str] = field(default_factory=set)
    stop_times: list[float] = field(default_factory=list)
    sent: int = 0
    wrong: int = 0  # pairs whose datagrams did not all come once, in order
    pool_missing: int = 0
    in_flight: int = 0
    provided: int = 0  # buffers that the kernel still had to give, by its own count

    @property
    def stop_time(self) -> float:
        """Median µs from cancel() to the task's end."""
        return statistics.median(self.stop_times) * 1e6 if self.stop_times else 0.0


class Churn:
    """`pairs` sockets; at most one task each, of either kind, started and stopped at random."""

    def __init__(self, pairs: int, provided: int, *, flags: int, take_back: bool, give_back: bool) -> None:
        """Made inside the loop. The last three are what an experiment can break, see Driver."""
        self.pairs = [Pair() for _ in range(pairs)]
        self._by_fd = {pair.fd: pair for pair in self.pairs}
        self.account = Account()
        self.driver = Driver(
            self._late, pairs, SIZE, provided=provided, flags=flags, take_back=take_back, give_back=give_back
        )
        self._tasks: dict[Pair, asyncio.Task[None]] = {}
        self._random = random.Random(1)  # the same churn each time

    async def run(self, steps: int) -> Account:
        """Some tasks change and some datagrams leave at each step; then all are stopped and all is counted."""
        for _ in range(steps):
            for pair in self._random.sample(self.pairs, len(self.pairs) // 10):
                self._toggle(pair)
            for pair in self._random.choices(self.pairs, k=len(self.pairs) // 3):
                pair.send()
            await asyncio.sleep(0)
            self.account.most_at_once = max(self.account.most_at_once, len(self._tasks))
            self.account.threads |= threads()
        for pair in list(self._tasks):
            self._toggle(pair)
        await _settle(self._tasks)
        await self._count()
        self._close()
        return self.account

    def _toggle(self, pair: Pair) -> None:
        task = self._tasks.get(pair)
        if task is None:
            kind = self._random.choice((_SINGLE, _STREAM))
            task = asyncio.create_task(self._stream(pair) if kind == _STREAM else self._single(pair))
            self._tasks[pair] = task
            self.account.started += 1
        elif not task.cancelling():
            asked = time.perf_counter()
            task.cancel()
            task.add_done_callback(lambda _: self._ended(pair, asked))

    def _ended(self, pair: Pair, asked: float) -> None:
        self.account.stop_times.append(time.perf_counter() - asked)
        del self._tasks[pair]

    async def _single(self, pair: Pair) -> None:
        while True:
            pair.take(await self.driver.receive(pair.fd))

    async def _stream(self, pair: Pair) -> None:
        async with self.driver.stream(pair.fd) as stream:
            while True:
                pair.take(await stream.next())

    def _late(self, fd: int, data: bytes) -> None:
        self._by_fd[fd].take(data)
        self.account.late += 1

    async def _count(self) -> None:
        account, driver = self.account, self.driver
        for pair in self.pairs:
            pair.drain()
        account.sent = sum(pair.sent for pair in self.pairs)
        account.wrong = sum(pair.got != list(range(pair.sent)) for pair in self.pairs)
        account.pool_missing = len(self.pairs) - len(set(driver.pool.home))
        account.in_flight = len(driver.operations)
        account.provided = await _still_given(driver)
        account.threads |= threads()

    def _close(self) -> None:
        self.driver.close()
        for pair in self.pairs:
            pair.close()


async def _settle(tasks: dict[Pair, asyncio.Task[None]]) -> None:
    """All end; one that fails otherwise than by being stopped is an error of the experiment."""
    ended = await asyncio.gather(*tasks.values(), return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
    await asyncio.sleep(0)


async def _still_given(driver: Driver) -> int:
    """How many provided buffers the kernel gives out until it has none: the rest has leaked."""
    pair = Pair()
    operation = driver.multishot(pair.fd)
    while not operation.over:
        pair.send()
        await asyncio.sleep(0)
    pair.close()
    return sum(number >= 0 for _, number in operation.results)


def threads() -> set[str]:
    """The threads of this process but its first, io-wq's kernel threads (iou-wrk-…) among them."""
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        if thread.name != str(os.getpid()):
            with contextlib.suppress(OSError):  # it has ended
                found.add((thread / "comm").read_text().strip())
    return found


def described(names: Sequence[str] | set[str]) -> str:
    """For people."""
    return ", ".join(sorted(names)) or "none"
