"""io_uring completions in an asyncio loop: many tasks, one thread, one eventfd. The blueprint.

Owns one ring, the buffers that operations write to, and the table of operations that the kernel has.
The rules that keep buffers safe:

- An operation owns its buffer until its final completion, whatever becomes of the task that asked.
- Stopping a task cancels its operation and waits for that completion. A cancellation can lose the race: the
  data that came nevertheless is handed to `late`, or it would be lost.
- Submissions of one turn of the loop leave together, in one io_uring_enter.

Nothing here blocks: the loop sleeps in epoll, and the eventfd wakes it.
"""

import asyncio
import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable
from errno import ENOBUFS
from typing import Final, Self

import numpy as np

from uring import (
    IORING_CQE_BUFFER_SHIFT,
    IORING_CQE_F_BUFFER,
    IORING_CQE_F_MORE,
    IORING_OP_ASYNC_CANCEL,
    IORING_OP_RECV,
    IORING_RECV_MULTISHOT,
    IOSQE_BUFFER_SELECT,
    BufferRing,
    Ring,
)

_NOBODY: Final = 0  # user_data of cancellations: their own completions tell nothing that the operation's don't


class Pool:
    """Buffers of `size` bytes for single receives. `home` are those that nobody has."""

    def __init__(self, count: int, size: int) -> None:
        self.memory, self.size = np.zeros((count, size), np.uint8), size
        self.home = list(range(count))

    def address(self, number: int) -> int:
        """Where a buffer lies."""
        return int(self.memory.ctypes.data) + number * self.size


class Operation:
    """What the kernel was asked. `over` with its final completion; `results` are (result, buffer number)."""

    __slots__ = ("future", "key", "over", "results")

    def __init__(self, key: int, future: asyncio.Future[None]) -> None:
        self.key, self.future, self.over = key, future, False
        self.results: deque[tuple[int, int]] = deque()

    def complete(self, result: int, flags: int) -> None:
        """One completion; whoever waits is woken."""
        number = flags >> IORING_CQE_BUFFER_SHIFT if flags & IORING_CQE_F_BUFFER else -1
        self.results.append((result, number))
        self.over = not flags & IORING_CQE_F_MORE
        if not self.future.done():
            self.future.set_result(None)


class Driver:
    """One ring for all tasks of one loop. `late(fd, data)` gets what came for a task that was being stopped."""

    def __init__(
        self,
        late: Callable[[int, bytes], None],
        buffers: int,
        size: int,
        *,
        provided: int = 64,
        flags: int = 0,
        take_back: bool = True,
        give_back: bool = True,
    ) -> None:
        """To be made inside the loop. The last three are there to be broken: sqe flags of every receive,
        whether a stopped task takes its operation back, whether a stopped stream returns its buffers.
        """
        self._loop, self.late, self._flags, self._take_back = asyncio.get_running_loop(), late, flags, take_back
        self.give_back = give_back
        self.ring = Ring(1024, 4096)
        self.pool, self.provided = Pool(buffers, size), BufferRing(self.ring, provided, size)
        self.provided_out = 0
        self._freed = asyncio.Event()
        self.operations: dict[int, Operation] = {}
        self._keys = itertools.count(_NOBODY + 1)
        self._planned = False
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.ring.signal(self._eventfd)
        self._loop.add_reader(self._eventfd, self._signalled)

    def close(self) -> None:
        """When all tasks are stopped."""
        self._loop.remove_reader(self._eventfd)
        self.ring.close()
        os.close(self._eventfd)

    # ---- what tasks call -------------------------------------------------------------------

    async def receive(self, fd: int) -> bytes:
        """One datagram, through a buffer of our own. OSError as the kernel says it."""
        number = self.pool.home.pop()
        operation = self._start(fd, self.pool.address(number), self.pool.size)
        try:
            await operation.future
        except asyncio.CancelledError:
            await self.stop(operation)
            if operation.results and operation.results[0][0] >= 0:
                self.late(fd, self._copy(number, operation.results[0][0]))
            raise
        finally:
            self.pool.home.append(number)
        return self._copy(number, _checked(operation.results[0][0]))

    def stream(self, fd: int) -> "Stream":
        """Datagrams until it is left, through provided buffers: `async with driver.stream(fd) as stream`."""
        return Stream(self, fd)

    # ---- operations ------------------------------------------------------------------------

    def multishot(self, fd: int) -> Operation:
        """A receive that goes on."""
        return self._start(fd, 0, 0, IOSQE_BUFFER_SELECT, IORING_RECV_MULTISHOT)

    def _start(self, fd: int, address: int, length: int, flags: int = 0, ioprio: int = 0) -> Operation:
        operation = Operation(next(self._keys), self._loop.create_future())
        self.operations[operation.key] = operation
        flags |= self._flags
        self.ring.push(IORING_OP_RECV, fd, address, length, user_data=operation.key, flags=flags, ioprio=ioprio)
        self._plan()
        return operation

    async def stop(self, operation: Operation) -> None:
        """Cancel it and wait for its final completion: until then its buffer is the kernel's."""
        if operation.over or not self._take_back:
            return
        self.ring.push(IORING_OP_ASYNC_CANCEL, address=operation.key, user_data=_NOBODY)
        self._plan()
        while not operation.over:
            operation.future = self._loop.create_future()
            with contextlib.suppress(asyncio.CancelledError):  # told twice: it makes no difference to the kernel
                await operation.future

    def was_read(self, number: int) -> None:
        """A provided buffer has been read."""
        self.provided.give_back_one(number)
        self.provided_out -= 1
        self._freed.set()

    async def wait_for_buffer(self) -> None:
        """Until some provided buffer is free."""
        while self.provided_out == self.provided.count:
            self._freed.clear()
            await self._freed.wait()

    # ---- the ring --------------------------------------------------------------------------

    def _plan(self) -> None:
        """Submit at the end of this turn of the loop, together with what others ask for."""
        if not self._planned:
            self._planned = True
            self._loop.call_soon(self.turn)

    def _signalled(self) -> None:
        os.eventfd_read(self._eventfd)
        self.turn()

    def turn(self) -> None:
        """Submit what waits, let the kernel finish what is due, wake those it was for."""
        self._planned = False
        self.ring.enter()
        for key, result, flags in self.ring.completions():
            self.provided_out += flags & IORING_CQE_F_BUFFER
            if key == _NOBODY:
                continue
            self.operations[key].complete(result, flags)
            if not flags & IORING_CQE_F_MORE:
                del self.operations[key]

    def _copy(self, number: int, length: int) -> bytes:
        return self.pool.memory[number, :length].tobytes()


class Stream:
    """The datagrams of one descriptor, by one multishot receive."""

    def __init__(self, driver: Driver, fd: int) -> None:
        self._driver, self._fd = driver, fd
        self._operation = driver.multishot(fd)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._driver.stop(self._operation)
        while self._operation.results and self._driver.give_back:
            result, number = self._operation.results.popleft()
            if number >= 0:
                self._driver.late(self._fd, self._read(number, result))

    async def next(self) -> bytes:
        """The next datagram. OSError as the kernel says it."""
        while True:
            operation = self._operation
            if operation.results:
                result, number = operation.results.popleft()
                if number >= 0:
                    return self._read(number, result)
                if result != -ENOBUFS:
                    _checked(result)
            elif operation.over:
                await self._driver.wait_for_buffer()
                self._operation = self._driver.multishot(self._fd)
            else:
                operation.future = asyncio.get_running_loop().create_future()
                await operation.future

    def _read(self, number: int, length: int) -> bytes:
        data = self._driver.provided.memory[number, :length].tobytes()
        self._driver.was_read(number)
        return data


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
