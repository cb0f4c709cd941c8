"""A worker's end of one receive ring: which slots are ours, where each frame lies, giving them back.

Owns the ring's mapping and the buffers for frames longer than a slot. Never blocks: the socket is only
read for frames that the ring says are waiting.
"""

import ctypes
import socket
import threading

import numpy as np

from mrelay.kernel.cbpf import SKF_NET_OFF, attach_group_filter
from mrelay.kernel.packet import (
    L3_OFFSET,
    SLOT,
    TP_STATUS_COPY,
    TP_STATUS_USER,
    TPACKET2_HDR,
    VIRTIO_NET_HDR,
    map_ring,
    ring_drops,
)

ARPHRD_ETHER, ARPHRD_LOOPBACK = 1, 772  # linux/if_arp.h
WHOLE = 66048  # bytes: the longest frame, 65,535 with link-layer, VLAN and virtio-net headers, rounded up
WHOLE_BUFFERS = 64  # frames longer than a slot that one batch may hold
_PEEK = 64  # bytes compared to find our place in the socket's queue
_fence = threading.Lock()  # taking a lock orders our reads of slots after our read of their status words


class WholeFrames:
    """Buffers for frames longer than a slot; shared by a worker's rings, since one batch runs at a time."""

    def __init__(self) -> None:
        self.memory = bytearray(WHOLE * WHOLE_BUFFERS)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Ring:
    """One interface's ring, slot by slot.

    `u8`, `u16`, `u32`, `u64`: the same memory as [slots, …] arrays; `view` as flat bytes; `pos` the next
    slot to read; `address` where slot 0 lies.
    """

    def __init__(self, sock: socket.socket, ifindex: int, slots: int, whole: WholeFrames) -> None:
        self.sock, self.ifindex, self.slots, self.whole = sock, ifindex, slots, whole
        self._memory = map_ring(sock.fileno(), slots)
        self.view = memoryview(self._memory)
        flat = np.frombuffer(self._memory, dtype=np.uint8)
        self.address = flat.ctypes.data
        self.u16 = flat.view(np.uint16).reshape(slots, SLOT // 2)
        self.u32 = flat.view(np.uint32).reshape(slots, SLOT // 4)
        self.u64 = flat.view(np.uint64).reshape(slots, SLOT // 8)
        self._words = self.view.cast("I")
        self._pos: int | None = (
            None  # not known in a ring that somebody read before us, until a frame shows it
        )
        self._queue_checked = False
        self._ranges: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
        # An absolute offset also reads headers that are not in the buffer's linear part; SKF_NET_OFF does not.
        self._network_offset = 14 if _hardware_type(sock) in (ARPHRD_ETHER, ARPHRD_LOOPBACK) else SKF_NET_OFF
        sock.setblocking(False)

    @property
    def pos(self) -> int:
        return self._pos or 0

    def ready(self, limit: int) -> int:
        """How many slots from `pos` on hold frames: at most `limit`, and none beyond the ring's end."""
        if self._pos is None and not self._find_place():
            return 0
        pos = self.pos
        if not self._words[pos * (SLOT // 4)] & TP_STATUS_USER:
            return 0
        mine = self.u32[pos : pos + limit, 0] & TP_STATUS_USER
        count = len(mine) if mine.all() else int(mine.argmin())
        with _fence:
            return count

    def _find_place(self) -> bool:
        """The oldest frame: the one behind a slot that is the kernel's, or in a full ring by its time."""
        mine = (self.u32[:, 0] & TP_STATUS_USER) != 0
        if not mine.any():
            return False
        if mine.all():
            time = self.u32[:, 4].astype(np.uint64) << 32 | self.u32[:, 5]  # tp_sec, tp_nsec
            self._pos = int(time.argmin())
        else:
            self._pos = int(np.flatnonzero(mine & ~np.roll(mine, 1))[0])
        return True

    def release(self, count: int) -> None:
        """Give `count` slots back to the kernel. The next syscall orders the store; a late one costs nothing."""
        self.u32[self.pos : self.pos + count, 0] = 0
        self._pos = (self.pos + count) % self.slots

    def header(self, slot: int) -> tuple[int, int, int, int, int]:
        """(status, length, captured, link-layer header's length, VLAN TCI) of a slot's frame."""
        status, length, captured, mac, _, _, _, tci, _ = TPACKET2_HDR.unpack_from(self.view, slot * SLOT)
        return status, length, captured, L3_OFFSET - mac, tci

    def segment_size(self, slot: int, link: int) -> int:
        """The payload size of a merged frame's datagrams, 0 for a single one."""
        at = slot * SLOT + L3_OFFSET - link - VIRTIO_NET_HDR.size
        _, kind, _, size, _, _ = VIRTIO_NET_HDR.unpack_from(self.view, at)
        return size if kind == 5 else 0

    def read_whole(self, slot: int, buffer: int) -> bool:
        """Fetch the whole of a slot's long frame into a buffer; False when it is no longer there."""
        if not self._queue_checked and not self._queue_matches(slot):
            return False
        self._queue_checked = True
        at = buffer * WHOLE
        try:
            got = self.sock.recv_into(self.whole.view[at : at + WHOLE])
        except BlockingIOError:
            return False
        return got > VIRTIO_NET_HDR.size

    def _queue_matches(self, slot: int) -> bool:
        """A worker that died between fetching a frame and giving its slot back left them out of step."""
        try:
            head = self.sock.recv(VIRTIO_NET_HDR.size + _PEEK, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        _, _, _, link, _ = self.header(slot)
        at = slot * SLOT + L3_OFFSET - link
        return head[VIRTIO_NET_HDR.size :] == self.view[at : at + _PEEK]

    def fitting(self, count: int, buffers: int) -> int:
        """As many of the next `count` slots as hold no more than `buffers` long frames."""
        if count <= buffers:
            return count
        long = np.cumsum(self.u32[self.pos : self.pos + count, 0] & TP_STATUS_COPY != 0)
        return int(np.searchsorted(long, buffers, side="right"))

    def clear_stray(self) -> None:
        """Frames queued without a slot (left by a worker that died): nobody would ever ask for them."""
        try:
            while self.ready(1) == 0:
                self.sock.recv(1)
        except BlockingIOError:
            pass

    def clear_error(self) -> None:
        """Read the socket's error (the interface went down), or poll would report it for ever."""
        self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def is_long(self, status: int) -> bool:
        return bool(status & TP_STATUS_COPY)

    def set_filter(self, v4: list[tuple[int, int]], v6: list[tuple[int, int]]) -> None:
        """Let in only what is addressed to these closed address ranges."""
        if (v4, v6) != self._ranges:
            attach_group_filter(self.sock, v4, v6, self._network_offset)
            self._ranges = v4, v6

    def lost(self) -> int:
        """Frames that found the ring full since the last call."""
        return ring_drops(self.sock)

    def close(self) -> None:
        self.sock.close()


def _hardware_type(sock: socket.socket) -> int:
    """The ARPHRD_ type of a bound packet socket's interface."""
    kind: int = sock.getsockname()[3]
    return kind
