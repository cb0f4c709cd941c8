"""io_uring for the experiments: one ring, its submissions, its completions, and provided buffers.

Owns the parts of linux/io_uring.h that the product's send ring has no use for. poc_io_uring_af_packet and
poc_io_uring_concurrency use it. `Ring.enter` blocks when told to wait; nothing else does.

A ring belongs to one thread. By default it is made with IORING_SETUP_DEFER_TASKRUN, so completions appear,
and provided buffers are taken, only while that thread is inside `enter`. NumPy stores carry no memory
barriers; here none is needed, since the kernel looks at them in a system call of the same thread.
"""

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.kernel.io_uring import (
    IORING_ENTER_GETEVENTS,
    IORING_OFF_SQES,
    IORING_SETUP_CQSIZE,
    IORING_SETUP_DEFER_TASKRUN,
    IORING_SETUP_SINGLE_ISSUER,
    SYS_IO_URING_ENTER,
    SYS_IO_URING_REGISTER,
    SYS_IO_URING_SETUP,
)

# linux/io_uring.h, enum io_uring_op
IORING_OP_RECVMSG: Final = 10
IORING_OP_ASYNC_CANCEL: Final = 14
IORING_OP_RECV: Final = 27
# sqe->flags
IOSQE_ASYNC: Final = 1 << 4
IOSQE_BUFFER_SELECT: Final = 1 << 5
# sqe->ioprio of receives
IORING_RECV_MULTISHOT: Final = 1 << 1  # 6.0
IORING_RECVSEND_BUNDLE: Final = 1 << 4  # 6.10
# cqe->flags; the buffer's number is in the upper 16 bits
IORING_CQE_F_BUFFER: Final = 1 << 0
IORING_CQE_F_MORE: Final = 1 << 1
IORING_CQE_F_BUF_MORE: Final = 1 << 4  # 6.12
IORING_CQE_BUFFER_SHIFT: Final = 16
# io_uring_register(2)
IORING_REGISTER_EVENTFD: Final = 4
IORING_REGISTER_PBUF_RING: Final = 22  # 5.19
IORING_REGISTER_SYNC_CANCEL: Final = 24  # 6.0
IOU_PBUF_RING_INC: Final = 2  # 6.12
# sqe->cancel_flags
IORING_ASYNC_CANCEL_ALL: Final = 1 << 0  # 5.19
IORING_ASYNC_CANCEL_ANY: Final = 1 << 2
# io_uring_enter(2)
IORING_ENTER_EXT_ARG: Final = 1 << 3  # 5.11
_ENTER: Final = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG
PATIENCE: Final = 100_000_000  # ns that `enter` waits at most, so that no fault of an experiment hangs it

# struct io_uring_sqe: opcode flags ioprio fd off addr len msg_flags user_data; the rest, buf_group first, is 0
_SQE: Final = struct.Struct("=BBHiQQIIQ24x")
SQE: Final = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("ioprio", "<u2"),
        ("fd", "<i4"),
        ("off", "<u8"),
        ("addr", "<u8"),
        ("len", "<u4"),
        ("msg_flags", "<u4"),
        ("user_data", "<u8"),
        ("rest", "<u8", (3,)),
    ]
)
CQE: Final = np.dtype([("user_data", "<u8"), ("res", "<i4"), ("flags", "<u4")])
_CQE: Final = struct.Struct("=QiI")
_BUF: Final = np.dtype([("addr", "<u8"), ("len", "<u4"), ("bid", "<u2"), ("resv", "<u2")])  # io_uring_buf

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_enter = _libc["syscall"]
_enter.restype = ctypes.c_long
# The sixth argument is passed in memory, where an int of 32 bits would leave the other half to chance.
_enter.argtypes = [
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.c_size_t,
]


def _call(number: int, *arguments: object) -> int:
    result = int(_syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


class Ring:
    """Up to `entries` submissions between two calls of `enter`, `completions` that wait to be read."""

    def __init__(
        self,
        entries: int = 256,
        completions: int = 1024,
        setup: int = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
    ) -> None:
        """Raises OSError where io_uring is refused (EPERM, ENOSYS) or older than 6.1 (EINVAL)."""
        params = (ctypes.c_uint32 * 30)()  # struct io_uring_params
        params[1], params[2] = completions, setup | IORING_SETUP_CQSIZE
        self.fd = _call(SYS_IO_URING_SETUP, ctypes.c_uint(entries), ctypes.byref(params))
        self.entries, self._completions = params[0], params[1]
        sq, cq = params[10:20], params[20:30]
        size = max(sq[6] + 4 * self.entries, cq[5] + 16 * self._completions)
        shared = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._memory = memory = mmap.mmap(self.fd, size, shared)
        self._sqes = mmap.mmap(self.fd, 64 * self.entries, shared, offset=IORING_OFF_SQES)
        words = np.frombuffer(memory, dtype=np.uint32)
        self.prepared = np.frombuffer(self._sqes, dtype=SQE)
        self._order = words[sq[6] // 4 :][: self.entries]
        self._tail = words[sq[1] // 4 :][:1]
        self._cq_head, self._cq_tail = words[cq[0] // 4 :][:1], words[cq[1] // 4 :][:1]
        self._cqes = np.frombuffer(memory, dtype=CQE, count=self._completions, offset=cq[5])
        self._cqes_at = cq[5]
        self._at = self._pushed = 0
        self._patience = (ctypes.c_int64 * 2)(0, PATIENCE)  # struct __kernel_timespec
        # struct io_uring_getevents_arg: sigmask sigmask_sz pad ts
        self._argument = ctypes.create_string_buffer(
            struct.pack("=QIIQ", 0, 0, 0, ctypes.addressof(self._patience)), 24
        )

    def push(
        self,
        opcode: int,
        fd: int = -1,
        address: int = 0,
        length: int = 0,
        *,
        user_data: int = 0,
        flags: int = 0,
        ioprio: int = 0,
    ) -> None:
        """One more operation; it starts at the next `enter`, or in this call when the ring is full."""
        if self._pushed == self.entries:
            self.enter()
        place = self._at % self.entries
        _SQE.pack_into(self._sqes, place * 64, opcode, flags, ioprio, fd, 0, address, length, 0, user_data)
        self._order[place] = place
        self._at += 1
        self._pushed += 1

    def again(self, places: NDArray[np.integer]) -> None:
        """The operations written at these places of `prepared`, once more; not to be mixed with `push`."""
        self._order[(self._at + np.arange(len(places))) % self.entries] = places
        self._at += len(places)
        self._pushed += len(places)

    def enter(self, wait: int = 0) -> None:
        """Start what was pushed, let the kernel finish what is due, wait until `wait` completions are there.

        It waits for PATIENCE at most: who needs them looks whether they came.
        """
        self._tail[0] = self._at & 0xFFFFFFFF
        while True:
            done = int(_enter(SYS_IO_URING_ENTER, self.fd, self._pushed, wait, _ENTER, self._argument, 24))
            if done >= 0:
                self._pushed -= done
                if not self._pushed:
                    return
            elif ctypes.get_errno() == 62:  # ETIME
                return
            elif ctypes.get_errno() not in (4, 11):  # EINTR, EAGAIN
                raise OSError(ctypes.get_errno(), f"io_uring_enter: {os.strerror(ctypes.get_errno())}")

    @property
    def waiting(self) -> int:
        """Completions that can be read now, without a system call."""
        return (int(self._cq_tail[0]) - int(self._cq_head[0])) & 0xFFFFFFFF

    def reap(self, most: int = 1 << 30) -> NDArray[np.void]:
        """The completions that wait, oldest first, as a copy of dtype CQE; their places are given back."""
        count = min(self.waiting, most)
        head = int(self._cq_head[0])
        start = head % self._completions
        if start + count <= self._completions:
            taken = self._cqes[start : start + count].copy()
        else:
            taken = np.concatenate([self._cqes[start:], self._cqes[: start + count - self._completions]])
        self._cq_head[0] = (head + count) & 0xFFFFFFFF
        return taken

    def completions(self) -> list[tuple[int, int, int]]:
        """The same as (user_data, result, flags): cheaper for a few."""
        count, head = self.waiting, int(self._cq_head[0])
        found = []
        for number in range(head, head + count):
            found.append(_CQE.unpack_from(self._memory, self._cqes_at + number % self._completions * 16))
        self._cq_head[0] = (head + count) & 0xFFFFFFFF
        return found

    def signal(self, eventfd: int) -> None:
        """Write to `eventfd` when there is something to do: then call `enter`, then `reap`."""
        _call(SYS_IO_URING_REGISTER, self.fd, IORING_REGISTER_EVENTFD, ctypes.byref(ctypes.c_int(eventfd)), 1)

    def close(self) -> None:
        """Cancel what is in flight, see it end, give the ring back.

        Closing the descriptor alone would end nothing: the mappings hold the ring too, and operations in
        flight would go on to write into memory that Python has freed.
        """
        if self.fd < 0:
            return
        kind = IORING_ASYNC_CANCEL_ALL | IORING_ASYNC_CANCEL_ANY
        everything = struct.pack("=QiIqq32x", 0, -1, kind, -1, -1)  # struct io_uring_sync_cancel_reg
        with contextlib.suppress(FileNotFoundError):  # ENOENT: nothing was in flight
            _call(SYS_IO_URING_REGISTER, self.fd, IORING_REGISTER_SYNC_CANCEL, everything, 1)
        self.enter()
        os.close(self.fd)
        self.fd = -1


class BufferRing:
    """`count` (a power of two) buffers of `size` bytes that the kernel chooses from at each receive.

    `memory` holds them: u8[count, size]. Who takes a buffer out of a completion owns it until `give_back`.
    """

    def __init__(self, ring: Ring, count: int, size: int, flags: int = 0) -> None:
        """The ring's buffer group 0. OSError (EINVAL) when the kernel does not know the flags."""
        self.count, self.size = count, size
        self.memory = np.frombuffer(mmap.mmap(-1, count * size), dtype=np.uint8).reshape(count, size)
        self.address = self.memory.ctypes.data
        self._table = table = mmap.mmap(-1, max(16 * count, mmap.PAGESIZE))
        self._entries = np.frombuffer(table, dtype=_BUF, count=count)
        self._tail_word = np.frombuffer(table, dtype=np.uint16)[7:8]  # it lies over resv of entry 0
        request = struct.pack("=QIHHQQQ", self._entries.ctypes.data, count, 0, flags, 0, 0, 0)
        _call(SYS_IO_URING_REGISTER, ring.fd, IORING_REGISTER_PBUF_RING, request, 1)
        self._tail = 0
        self.give_back(range(count))

    def give_back(self, numbers: Iterable[int] | NDArray[np.integer]) -> None:
        """These buffers are the kernel's again."""
        numbers = np.fromiter(numbers, np.uint16) if not isinstance(numbers, np.ndarray) else numbers
        places = (self._tail + np.arange(len(numbers))) % self.count
        self._entries["addr"][places] = self.address + numbers.astype(np.uint64) * np.uint64(self.size)
        self._entries["len"][places] = self.size
        self._entries["bid"][places] = numbers
        self._tail += len(numbers)
        self._tail_word[0] = self._tail & 0xFFFF

    def give_back_one(self, number: int) -> None:
        """The same for one buffer: cheaper than an array."""
        place = self._tail % self.count * 16
        struct.pack_into("=QIH", self._table, place, self.address + number * self.size, self.size, number)
        self._tail += 1
        self._tail_word[0] = self._tail & 0xFFFF


def refusal(*, incremental: bool = False) -> str | None:
    """Why this host has no io_uring for the experiments (`incremental`: with such buffers); None if it has."""
    try:
        ring = Ring(8)
        if incremental:
            BufferRing(ring, 8, 4096, IOU_PBUF_RING_INC)
        ring.close()
    except OSError as error:
        version = "6.12" if incremental else "6.1"
        return f"io_uring of Linux {version} or later ({error.strerror}; see kernel.io_uring_disabled)"
    return None
