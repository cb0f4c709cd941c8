"""Whose a buffer is, moment by moment: the exact claims of poc_io_uring_concurrency about one operation.

Each function makes its own ring and sockets. Nothing here blocks.
"""

import asyncio
import os
import socket
from dataclasses import dataclass
from typing import Final

import numpy as np
from uring_driver import Driver

from uring import IORING_OP_RECV, Ring

LOST: Final = "lost"
_CANARY: Final = 0xAA
_DATAGRAM: Final = b"it came while the task was being stopped"
_KEPT: Final[list[object]] = []  # nothing tells when the kernel has let go of these
_TURNS: Final = 8  # of the loop: more than stopping takes


@dataclass(frozen=True)
class Stopped:
    """A task was stopped; `intact`: its buffer, in another's hands, kept what that one had written there."""

    intact: bool
    turns: int  # of the loop until the buffer was free
    where: str  # the datagram that came meanwhile


async def stop_while_receiving(*, take_back: bool) -> Stopped:
    """Stop a task, send to it before the kernel can know; its buffer is another's as soon as it is free."""
    late: list[bytes] = []
    driver = Driver(lambda _, data: late.append(data), 1, 256, take_back=take_back)
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    task = asyncio.create_task(driver.receive(receiver.fileno()))
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    sender.send(_DATAGRAM)
    free_after = 0
    for turn in range(1, _TURNS):
        await asyncio.sleep(0)
        if driver.pool.home and not free_after:
            free_after = turn
            driver.pool.memory[0] = _CANARY  # its next owner's data
    driver.turn()
    intact = bool((driver.pool.memory[0] == _CANARY).all())
    driver.close()
    where = _where(receiver, late)
    sender.close()
    receiver.close()
    return Stopped(intact, free_after, where)


def _where(receiver: socket.socket, late: list[bytes]) -> str:
    receiver.setblocking(False)
    try:
        waits = [receiver.recv(256)]
    except BlockingIOError:
        waits = []
    if late + waits != [_DATAGRAM]:
        return LOST
    return "still in the socket" if waits else "handed on as late"


@dataclass(frozen=True)
class Signal:
    """What an eventfd said: its count, completions to be seen then, and after io_uring_enter."""

    count: int
    seen: int
    after: int


def one_signal_for_many(sockets: int) -> Signal:
    """Datagrams for many receives: how often is the eventfd written, and where are the completions?"""
    ring, eventfd = Ring(64), os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    ring.signal(eventfd)
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(sockets)]
    memory = np.zeros((sockets, 64), np.uint8)
    for number, (_, receiver) in enumerate(pairs):
        ring.push(IORING_OP_RECV, receiver.fileno(), memory.ctypes.data + 64 * number, 64)
    ring.enter()
    for sender, _ in pairs:
        sender.send(b"datagram")
    count, seen = os.eventfd_read(eventfd), ring.waiting
    ring.enter()
    signal = Signal(count, seen, ring.waiting)
    ring.close()
    os.close(eventfd)
    for sender, receiver in pairs:
        sender.close()
        receiver.close()
    return signal


def written_after_close(setup: int) -> bool:
    """A ring's descriptor is closed while it receives, then a datagram comes: does it land in the buffer?"""
    ring = Ring(8, setup=setup)
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    memory = np.zeros(64, np.uint8)
    _KEPT.append(memory)
    ring.push(IORING_OP_RECV, receiver.fileno(), memory.ctypes.data, 64)
    ring.enter()
    os.close(ring.fd)
    sender.send(b"datagram")
    os.getppid()  # any system call
    written = bool(memory.any())
    sender.close()
    receiver.close()
    return written
