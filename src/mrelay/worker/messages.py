"""The message headers of one round of sends, and the two ways to hand them to the kernel.

Owns the tables that sendmsg reads (struct mmsghdr, iovec and cmsghdr: linux/socket.h), filled by column,
and the choice between io_uring and sendmmsg. Called by worker.vector; neither way blocks.
"""

import ctypes
import errno
import logging
import socket
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from mrelay.kernel.io_uring import SendRing
from mrelay.kernel.udp import (
    IP_PKTINFO,
    IP_TOS,
    IP_TTL,
    IPV6_HOPLIMIT,
    IPV6_PKTINFO,
    IPV6_TCLASS,
    SOL_UDP,
    UDP_SEGMENT,
)
from mrelay.worker.egress import Egress

log = logging.getLogger("mrelay.worker")

MESSAGES: Final = 2048  # a round's messages
PAYLOADS: Final = 4096  # a batch's payloads
STRIDE: Final = 64  # bytes, struct mmsghdr
# struct msghdr in 64-bit words
_NAME, _NAME_LENGTH, _IOV, _IOV_COUNT, _CONTROL, _CONTROL_LENGTH = range(6)
# Words of one message's control data: UDP_SEGMENT, TTL, TOS (three each), PKTINFO (four or five)
_CONTROL_WORDS: Final = 14
_AFTER_SEGMENT, _TTL, _TOS, _PKTINFO, _END_V4 = 3, 3, 6, 9, 13
_INT_CMSG: Final = 20  # cmsg_len of an int: CMSG_LEN(4)

I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]
Rows = NDArray[np.intp]


class MessageTable:
    """Up to MESSAGES headers and PAYLOADS payloads. `filled` says how many headers are good."""

    def __init__(self) -> None:
        self.headers = np.zeros((MESSAGES, STRIDE // 8), np.uint64)
        self.address = self.headers.ctypes.data
        self.filled = 0
        self._iov = np.zeros((PAYLOADS, 2), np.uint64)
        self._control = np.zeros((MESSAGES, _CONTROL_WORDS), np.uint64)
        self._control[:, 0] = 18  # CMSG_LEN(2)
        self._control[:, 1] = SOL_UDP | UDP_SEGMENT << 32
        self._segment = self._control.view(np.uint16)[:, 8]
        step = np.uint64(_CONTROL_WORDS * 8)
        self._control_at = np.uint64(self._control.ctypes.data) + np.arange(MESSAGES, dtype=np.uint64) * step

    def load_payloads(self, pointer: U64, length: I64) -> None:
        """The payloads (addresses, bytes) that `fill` then refers to by their place."""
        self._iov[: len(pointer), 0] = pointer
        self._iov[: len(pointer), 1] = length

    def fill(self, first: I64, pieces: I64, segment: I64, entry: I32, egress: Egress) -> None:
        """Header i sends payloads first[i] … + pieces[i] to entry[i], cut into segment[i] bytes (0: uncut)."""
        n = self.filled = len(first)
        h = self.headers[:n]
        h[:, _NAME] = egress.name[entry]
        h[:, _NAME_LENGTH] = egress.name_length[entry]
        h[:, _IOV] = first * 16 + self._iov.ctypes.data
        h[:, _IOV_COUNT] = pieces
        h[:, _CONTROL] = self._control_at[:n]
        h[:, _CONTROL_LENGTH] = np.where(segment > 0, _AFTER_SEGMENT * 8, 0)
        self._segment[:n] = segment

    def fill_special(self, rows: Rows, segment: I64, hop: I32, source: U64, entry: I32, egress: Egress) -> None:
        """Headers `rows` also say their TTL and TOS, and the source address where the output keeps it.

        `segment` and `source` (u64[2, len(rows)]: high and low word) have a value a row; `hop` and `entry`
        are the whole columns that `fill` had.
        """
        v6, keep = egress.v6[entry[rows]], egress.keep[entry[rows]]
        level = np.where(v6, socket.IPPROTO_IPV6, socket.IPPROTO_IP)
        control = self._control
        for at, v4_type, v6_type, value in (
            (_TTL, IP_TTL, IPV6_HOPLIMIT, hop[rows] >> 8),
            (_TOS, IP_TOS, IPV6_TCLASS, hop[rows] & 0xFF),
        ):
            control[rows, at] = _INT_CMSG
            control[rows, at + 1] = level | np.where(v6, v6_type, v4_type) << 32
            control[rows, at + 2] = value
        self._fill_source(
            rows[keep & ~v6], rows[keep & v6], source[:, keep & ~v6], source[:, keep & v6], entry, egress
        )
        start = np.where(segment > 0, 0, _AFTER_SEGMENT)
        end = np.where(keep, np.where(v6, _CONTROL_WORDS, _END_V4), _PKTINFO)
        self.headers[rows, _CONTROL] = self._control_at[rows] + (start * 8).astype(np.uint64)
        self.headers[rows, _CONTROL_LENGTH] = (end - start) * 8

    def _fill_source(self, v4: Rows, v6: Rows, v4_source: U64, v6_source: U64, entry: I32, egress: Egress) -> None:
        c = self._control
        c[v4, _PKTINFO] = 28  # CMSG_LEN(sizeof(struct in_pktinfo))
        c[v4, _PKTINFO + 1] = socket.IPPROTO_IP | IP_PKTINFO << 32
        wire = v4_source[1].astype(np.uint32).byteswap().astype(np.uint64)
        c[v4, _PKTINFO + 2] = egress.oif[entry[v4]] | wire << np.uint64(32)  # ipi_ifindex, ipi_spec_dst
        c[v4, _PKTINFO + 3] = 0
        c[v6, _PKTINFO] = 36  # CMSG_LEN(sizeof(struct in6_pktinfo))
        c[v6, _PKTINFO + 1] = socket.IPPROTO_IPV6 | IPV6_PKTINFO << 32
        c[v6, _PKTINFO + 2], c[v6, _PKTINFO + 3] = v6_source[0].byteswap(), v6_source[1].byteswap()
        c[v6, _PKTINFO + 4] = egress.oif[entry[v6]]


class Sender(Protocol):
    """Hands a table's filled headers to the kernel. `name` is what users see."""

    name: str
    table: MessageTable

    def send(self, fds: I32) -> list[tuple[int, int]]:
        """Header i on descriptor fds[i]; all done on return; (header, errno) of those that failed."""


class UringSender:
    """All of a round in one syscall."""

    name = "io_uring"

    def __init__(self, table: MessageTable) -> None:
        self.table = table
        self._ring = SendRing(MESSAGES, table.address, STRIDE)

    def send(self, fds: I32) -> list[tuple[int, int]]:
        self._ring.fds[: len(fds)] = fds
        return self._ring.submit(len(fds)) if len(fds) else []


class MmsgSender:
    """One sendmmsg for each run of headers to one descriptor: for where io_uring is refused."""

    name = "sendmmsg"

    def __init__(self, table: MessageTable) -> None:
        self.table = table
        self._sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg
        self._sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]

    def send(self, fds: I32) -> list[tuple[int, int]]:
        if not len(fds):
            return []
        order = np.argsort(fds, kind="stable")
        headers = self.table.headers
        headers[: len(fds)] = headers[order]  # one descriptor's headers side by side, their order kept
        starts = np.flatnonzero(np.diff(fds[order], prepend=-2))
        failed: list[tuple[int, int]] = []
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(fds)], strict=True):
            self._send_run(int(fds[order[start]]), start, end, failed)
        return [(int(order[at]), error) for at, error in failed]

    def _send_run(self, fd: int, at: int, end: int, failed: list[tuple[int, int]]) -> None:
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        while at < end:
            sent = self._sendmmsg(fd, self.table.address + at * STRIDE, end - at, flags)
            if sent > 0:
                at += sent
            elif ctypes.get_errno() != errno.EINTR:
                failed.append((at, ctypes.get_errno()))
                at += 1


def best_sender() -> Sender:
    """io_uring where the kernel lets us, sendmmsg elsewhere; the log says which and why."""
    table = MessageTable()
    try:
        return UringSender(table)
    except OSError as error:
        log.warning("io_uring is refused here (%s): sending with sendmmsg, a little slower", error.strerror)
        return MmsgSender(table)
