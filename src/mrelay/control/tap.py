"""Looking at traffic: copies of an interface's frames, as they were before the fast path took them.

Owns how taps are read: in portions with rests between, so that a flood costs a share of the event loop and no
more; what does not fit the kernel's buffer meanwhile is counted. Called by whatever explains, lists, measures or
captures traffic. Nothing blocks.

A frame that GRO merged comes whole, its tag in `vlan`; what an XDP program carries does not come at all.
"""

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import AsyncIterator
from typing import Final

from mrelay.control.supervisor import Supervisor
from mrelay.kernel import tap
from mrelay.kernel.packet import VIRTIO_NET_HDR, ring_drops
from mrelay.kernel.tap import Frame
from mrelay.messages import TapFilter

__all__ = ["Frame", "Tap", "TapFilter", "open_tap"]

PORTION: Final = 64  # frames at a time
REST: Final = 3  # times the processor time that a portion and its reader took: a quarter of one at most
_PAUSE: Final = 0.001  # seconds of rest at least
_LOOK: Final = 5.0  # seconds between two looks whether an interface that is down is still there


class Tap:
    """An open tap: `async for frame in tap` goes on until it is cancelled or left, or the interface is gone.

    `dropped`: frames that passed the filter and found the buffer full. `bad`: that could not be read.
    `down`: whether the interface was, when last heard of.
    """

    def __init__(self, sock: socket.socket, snap: int) -> None:
        self._sock, self._buffer = sock, bytearray(VIRTIO_NET_HDR.size + snap)
        self._dropped = 0
        self.down = False
        self.bad = 0

    @property
    def dropped(self) -> int:
        """Since it was opened."""
        self._dropped += ring_drops(self._sock)
        return self._dropped

    async def __aiter__(self) -> AsyncIterator[Frame]:
        while True:
            await self._readable()
            started = time.thread_time()
            for frame in self._portion():
                yield frame
            if self.down and tap.is_deaf(self._sock):
                return
            await asyncio.sleep(max(_PAUSE, REST * (time.thread_time() - started)))

    async def _readable(self) -> None:
        """Return when there is something to read; while the interface is down also at intervals, for then it goes
        without a word.
        """
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._sock, ready.set)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ready.wait(), _LOOK if self.down else None)
        finally:
            loop.remove_reader(self._sock)

    def _portion(self) -> list[Frame]:
        found = []
        for _ in range(PORTION):
            try:
                frame = tap.read(self._sock, self._buffer)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.ENETDOWN:  # said once; frames come again when it is up
                    self.down = True
                    continue
                frame = None
            if frame is None:
                self.bad += 1
            else:
                self.down = False
                found.append(frame)
        return found


@contextlib.asynccontextmanager
async def open_tap(supervisor: Supervisor, ifindex: int, what: TapFilter) -> AsyncIterator[Tap]:
    """A tap on an interface, closed at the end of the block. RequestFailed when there can't be one."""
    number, fd = await supervisor.open_tap(ifindex, what)
    try:
        with _socket(fd) as sock:
            yield Tap(sock, what.snap)
    finally:
        supervisor.close_tap(number)


def _socket(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
    sock.setblocking(False)
    return sock
