"""The same datagrams through a plain poll loop, asyncio's own ways, and io_uring: CPU time and wake-up of each.

Used by poc_io_uring_concurrency. Each way is a function that keeps reading and calls `got` for each datagram.
Sending is not counted. Blocks, in the loop's own sleep, for its length.
"""

import asyncio
import contextlib
import select
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

from uring_driver import Driver

SOCKETS: Final = 64
SIZE: Final = 64  # bytes of a datagram
BURST: Final = 8  # datagrams for each socket: net.unix.max_dgram_qlen is 10
_ROOM: Final = 2048

Got = Callable[[], None]
Way = Callable[[list[socket.socket], Got], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class Cost:
    """µs: CPU time a datagram, in bursts and one for each socket; from sending a lone one to its being read."""

    burst: float
    single: float
    lone: float


@contextmanager
def _pairs() -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(SOCKETS)]
        for end in (end for pair in pairs for end in pair):
            stack.enter_context(end).setblocking(False)
        yield [sender for sender, _ in pairs], [receiver for _, receiver in pairs]


def _send(senders: list[socket.socket], burst: int) -> None:
    for _ in range(burst):
        for sender in senders:
            sender.send(bytes(SIZE))


def _drain(receiver: socket.socket) -> int:
    """Read until nothing waits; how many."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            receiver.recv(_ROOM)
            count += 1
    return count


def plain_poll(rounds: int) -> Cost:
    """No event loop: poll, then recv until nothing waits. The worker's way with its channels."""
    with _pairs() as (senders, receivers):
        poll, by_fd = select.poll(), {receiver.fileno(): receiver for receiver in receivers}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)

        def read(count: int) -> None:
            while count > 0:
                count -= sum(_drain(by_fd[fd]) for fd, _ in poll.poll())

        def cost(burst: int) -> float:
            _send(senders, burst)
            begin = time.thread_time()
            read(burst * SOCKETS)
            return (time.thread_time() - begin) / (burst * SOCKETS) * 1e6

        def lone(number: int) -> float:
            begin = time.perf_counter()
            senders[number % SOCKETS].send(bytes(SIZE))
            read(1)
            return (time.perf_counter() - begin) * 1e6

        return Cost(
            statistics.median(cost(BURST) for _ in range(rounds)),
            statistics.median(cost(1) for _ in range(rounds)),
            statistics.median(lone(number) for number in range(4 * rounds)),
        )


class _Count:
    """Counts up to what is awaited."""

    def __init__(self) -> None:
        self._missing, self._all = 0, asyncio.get_running_loop().create_future()

    def got(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._all.set_result(None)

    def expect(self, count: int) -> Awaitable[None]:
        self._missing, self._all = count, asyncio.get_running_loop().create_future()
        return self._all


def in_asyncio(way: Way, rounds: int) -> Cost:
    """One of the ways below, in a loop of its own."""
    return asyncio.run(_measure(way, rounds))


async def _measure(way: Way, rounds: int) -> Cost:
    count = _Count()
    with _pairs() as (senders, receivers):
        async with way(receivers, count.got):
            await asyncio.sleep(0.01)  # all are reading

            async def cost(burst: int) -> float:
                done = count.expect(burst * SOCKETS)
                _send(senders, burst)
                begin = time.thread_time()
                await done
                return (time.thread_time() - begin) / (burst * SOCKETS) * 1e6

            async def lone(number: int) -> float:
                done, begin = count.expect(1), time.perf_counter()
                senders[number % SOCKETS].send(bytes(SIZE))
                await done
                return (time.perf_counter() - begin) * 1e6

            return Cost(
                statistics.median([await cost(BURST) for _ in range(rounds)]),
                statistics.median([await cost(1) for _ in range(rounds)]),
                statistics.median([await lone(number) for number in range(4 * rounds)]),
            )


@asynccontextmanager
async def add_reader(receivers: list[socket.socket], got: Got) -> AsyncIterator[None]:
    """A callback for each socket, which reads until nothing waits."""
    loop = asyncio.get_running_loop()

    def read(receiver: socket.socket) -> None:
        for _ in range(_drain(receiver)):
            got()

    for receiver in receivers:
        loop.add_reader(receiver, read, receiver)
    yield
    for receiver in receivers:
        loop.remove_reader(receiver)


@asynccontextmanager
async def sock_recv(receivers: list[socket.socket], got: Got) -> AsyncIterator[None]:
    """A task for each socket, which awaits loop.sock_recv."""
    loop = asyncio.get_running_loop()

    async def read(receiver: socket.socket) -> None:
        while True:
            await loop.sock_recv(receiver, _ROOM)
            got()

    async with _tasks([read(receiver) for receiver in receivers]):
        yield


@asynccontextmanager
async def uring_single(receivers: list[socket.socket], got: Got) -> AsyncIterator[None]:
    """A task for each socket, which awaits one io_uring receive after the other."""
    driver = Driver(lambda *_: None, SOCKETS, _ROOM)

    async def read(fd: int) -> None:
        while True:
            await driver.receive(fd)
            got()

    async with _tasks([read(receiver.fileno()) for receiver in receivers]):
        yield
    driver.close()


@asynccontextmanager
async def uring_multishot(receivers: list[socket.socket], got: Got) -> AsyncIterator[None]:
    """A task for each socket, which awaits the results of one multishot receive."""
    driver = Driver(lambda *_: None, 1, _ROOM, provided=1024)

    async def read(fd: int) -> None:
        async with driver.stream(fd) as stream:
            while True:
                await stream.next()
                got()

    async with _tasks([read(receiver.fileno()) for receiver in receivers]):
        yield
    driver.close()


@asynccontextmanager
async def _tasks(coroutines: list[Coroutine[None, None, None]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
