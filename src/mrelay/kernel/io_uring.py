"""io_uring, as far as sending datagrams needs it: a submission ring of SENDMSG operations.

Owns the layouts of linux/io_uring.h and one ring. A worker makes it at its start (before seccomp) and is
its only user. Operations carry MSG_DONTWAIT, which io_uring takes as "never wait, never punt": each is over
when `submit` returns, and only those that failed leave a completion.
"""

import ctypes
import mmap
import os
import socket
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

# asm-generic/unistd.h
SYS_IO_URING_SETUP: Final = 425
SYS_IO_URING_ENTER: Final = 426
SYS_IO_URING_REGISTER: Final = 427
# linux/io_uring.h
IORING_OP_SENDMSG: Final = 9
IORING_SETUP_CQSIZE: Final = 1 << 3
IORING_SETUP_R_DISABLED: Final = 1 << 6  # 5.10
IORING_REGISTER_RESTRICTIONS: Final = 11
IORING_REGISTER_ENABLE_RINGS: Final = 12
IORING_RESTRICTION_SQE_OP: Final = 1
IORING_RESTRICTION_SQE_FLAGS_ALLOWED: Final = 2
IORING_SETUP_SINGLE_ISSUER: Final = 1 << 12  # 6.0
IORING_SETUP_DEFER_TASKRUN: Final = 1 << 13  # 6.1
IORING_ENTER_GETEVENTS: Final = 1 << 0
IORING_OFF_SQES: Final = 0x10000000
IORING_FEAT_SINGLE_MMAP: Final = 1 << 0  # 5.4
IORING_FEAT_CQE_SKIP: Final = 1 << 11  # 5.17
IOSQE_CQE_SKIP_SUCCESS: Final = 1 << 6

_SQE = np.dtype(
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
_CQE = np.dtype([("user_data", "<u8"), ("res", "<i4"), ("flags", "<u4")])
_PARAMS: Final = 30  # u32 words of struct io_uring_params: 10, then 10 of sq_off, 10 of cq_off

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _setup(entries: int, flags: int) -> tuple[int, list[int]]:
    params = (ctypes.c_uint32 * _PARAMS)()
    params[1], params[2] = entries * 2, flags
    fd = _syscall(SYS_IO_URING_SETUP, ctypes.c_uint(entries), ctypes.byref(params))
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd, list(params)


def _setup_best(entries: int) -> tuple[int, list[int]]:
    common = IORING_SETUP_CQSIZE | IORING_SETUP_R_DISABLED
    try:
        return _setup(entries, common | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN)
    except OSError as error:
        if error.errno != 22:
            raise
        return _setup(entries, common)


def _allow_sendmsg_only(fd: int) -> None:
    """Operations on a ring bypass seccomp, so the ring itself must refuse all but ours; then enable it."""
    restrictions = struct.pack("=HBB12x", IORING_RESTRICTION_SQE_OP, IORING_OP_SENDMSG, 0)
    restrictions += struct.pack("=HBB12x", IORING_RESTRICTION_SQE_FLAGS_ALLOWED, IOSQE_CQE_SKIP_SUCCESS, 0)
    for operation, argument, count in (
        (IORING_REGISTER_RESTRICTIONS, restrictions, 2),
        (IORING_REGISTER_ENABLE_RINGS, None, 0),
    ):
        if _syscall(SYS_IO_URING_REGISTER, fd, operation, argument, count) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class SendRing:
    """SENDMSG operations over a fixed table of message headers.

    `messages` is the address of `entries` headers, `stride` bytes apart; operation i sends header i on
    descriptor `fds[i]` (i32[entries], to be filled before `submit`). Raises OSError where io_uring is
    refused or too old (5.17).
    """

    def __init__(self, entries: int, messages: int, stride: int) -> None:
        self.fd, params = _setup_best(entries)
        sq, cq = params[10:20], params[20:30]
        if not params[5] & IORING_FEAT_SINGLE_MMAP or not params[5] & IORING_FEAT_CQE_SKIP:
            os.close(self.fd)
            raise OSError(38, "this kernel's io_uring lacks IOSQE_CQE_SKIP_SUCCESS (5.17)")  # ENOSYS
        _allow_sendmsg_only(self.fd)
        self._entries, self._cq_entries = params[0], params[1]
        size = max(sq[6] + 4 * self._entries, cq[5] + 16 * self._cq_entries)
        self._ring = mmap.mmap(self.fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        sqes = mmap.mmap(self.fd, 64 * self._entries, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=IORING_OFF_SQES)
        words = np.frombuffer(self._ring, dtype=np.uint32)
        self._tail = words[sq[1] // 4 :][:1]
        self._cq_head, self._cq_tail = words[cq[0] // 4 :][:1], words[cq[1] // 4 :][:1]
        self._array = words[sq[6] // 4 :][: self._entries]
        self._cqes = np.frombuffer(self._ring, dtype=_CQE, count=self._cq_entries, offset=cq[5])
        self._order = np.arange(self._entries, dtype=np.uint32)
        self.fds = self._prepare(sqes, messages, stride)

    def _prepare(self, memory: mmap.mmap, messages: int, stride: int) -> NDArray[np.int32]:
        """Everything but the descriptor is the same for every operation to come, so it is written once."""
        sqes = np.frombuffer(memory, dtype=_SQE)
        sqes["opcode"] = IORING_OP_SENDMSG
        sqes["flags"] = IOSQE_CQE_SKIP_SUCCESS
        sqes["msg_flags"] = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        sqes["len"] = 1
        sqes["addr"] = messages + np.arange(self._entries, dtype=np.uint64) * np.uint64(stride)
        sqes["user_data"] = self._order
        fds: NDArray[np.int32] = sqes["fd"]
        return fds

    def submit(self, count: int) -> list[tuple[int, int]]:
        """Send headers 0..count-1; (index, errno) of those that failed.

        The tail store needs no barrier of its own: the enter syscall that follows orders it.
        """
        tail = int(self._tail[0])
        start = tail % self._entries
        first = min(count, self._entries - start)
        self._array[start : start + first] = self._order[:first]
        self._array[: count - first] = self._order[first:count]
        self._tail[0] = (tail + count) & 0xFFFFFFFF
        self._enter(count)
        return self._reap()

    def _enter(self, count: int) -> None:
        while count > 0:
            done = _syscall(SYS_IO_URING_ENTER, self.fd, count, 0, IORING_ENTER_GETEVENTS, None, 0)
            if done < 0:
                if ctypes.get_errno() in (4, 11):  # EINTR, EAGAIN
                    continue
                raise OSError(ctypes.get_errno(), "io_uring_enter")
            count -= done

    def _reap(self) -> list[tuple[int, int]]:
        head, tail = int(self._cq_head[0]), int(self._cq_tail[0])
        if head == tail:
            return []
        rows = np.arange(head, head + ((tail - head) & 0xFFFFFFFF)) % self._cq_entries
        failed = self._cqes[rows]
        self._cq_head[0] = tail
        return [(int(c["user_data"]), -int(c["res"])) for c in failed if c["res"] < 0]
