"""A worker's end of an interface's receive rings: which slots are ours, and in what order frames came.

Owns the rings' mappings. An interface has two rings: many short slots, so that bursts of small frames fit,
and few long ones, for merged and jumbo frames, which the kernel copies while they are hot in its cache (D1).
Both are read in order of arrival. Nothing here blocks.
"""

import socket
import struct
import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.ebpf.layout import VLAN_MARK
from mrelay.kernel.cbpf import SKF_NET_OFF, attach_group_filter, no_fragments, only_longer
from mrelay.kernel.packet import (
    L3_OFFSET,
    LONG_SLOT,
    LONG_SLOTS,
    SHORT,
    SLOT,
    TP_STATUS_USER,
    TPACKET2_HDR,
    VIRTIO_NET_HDR,
    VIRTIO_NET_HDR_GSO_UDP_L4,
    map_ring,
    ring_drops,
)
from mrelay.messages import OpenIngress

ARPHRD_ETHER, ARPHRD_LOOPBACK = 1, 772  # linux/if_arp.h
_SEC, _NSEC = 4, 5  # 32-bit words of struct tpacket2_hdr
_fence = threading.Lock()  # taking a lock orders our reads of slots after our read of their status words
Ranges = list[tuple[int, int]]
U64 = NDArray[np.uint64]
_NEVER: Final = (1 << 64) - 1
_NOTHING: Final = -1  # no 32 bits


class Ring:
    """One ring, slot by slot.

    `u16`, `u32`, `u64`: its memory as [slots, …] arrays; `view` as flat bytes; `pos` the next slot to read;
    `address` where slot 0 lies; `size` a slot's bytes; `told`: what a frame's destination begins with when the
    fast path has written its VLAN there (bpf/parse.h, struct told).
    """

    def __init__(
        self, sock: socket.socket, ifindex: int, slots: int, size: int, *, used: bool, behind: bool = False
    ) -> None:
        """`used`: a worker before us read from it. `behind`: it gets what the fast path left."""
        self.sock, self.ifindex, self.slots, self.size = sock, ifindex, slots, size
        self.told = VLAN_MARK if behind else _NOTHING
        memory = map_ring(sock.fileno(), slots, size)
        self.view = memoryview(memory)
        flat = np.frombuffer(memory, dtype=np.uint8)
        self.address = flat.ctypes.data
        self.u16 = flat.view(np.uint16).reshape(slots, size // 2)
        self.u32 = flat.view(np.uint32).reshape(slots, size // 4)
        self.u64 = flat.view(np.uint64).reshape(slots, size // 8)
        self.learn(L3_OFFSET - 14)
        self._words, self._stride = self.view.cast("I"), size // 4
        # Where a worker before us got to is not known until a frame shows it, and looking for one is slow.
        self._pos: int | None = None if used else 0
        self.woken = True

    @property
    def pos(self) -> int:
        return self._pos or 0

    def ready(self, limit: int) -> int:
        """How many slots from `pos` on hold frames: at most `limit`, and none beyond the ring's end."""
        if self._pos is None and not (self.woken and self._find_place()):
            self.woken = False
            return 0
        pos = self.pos
        if not self._is_ours(pos):
            return 0
        limit = min(limit, self.slots - pos)
        if limit == 1 or not self._is_ours(pos + 1):  # the usual case at low rates, where each line is latency
            count = 1
        elif self.size == SLOT:
            count = self._reach(pos, limit)
        else:
            count = next((n for n in range(2, limit) if not self._is_ours(pos + n)), limit)
        with _fence:
            return count

    def _reach(self, pos: int, limit: int) -> int:
        """A look at a slot is a cache miss, so look ahead in doubling steps, then at each slot up to there."""
        reach = 2
        while reach < limit and self._is_ours(pos + min(2 * reach, limit) - 1):
            reach *= 2
        mine = self.u32[pos : pos + min(2 * reach, limit), 0] & TP_STATUS_USER
        return len(mine) if mine.all() else int(mine.argmin())

    def _is_ours(self, slot: int) -> int:
        return self._words[slot * self._stride] & TP_STATUS_USER

    def _find_place(self) -> bool:
        """The oldest frame: the one behind a slot that is the kernel's, or in a full ring by its time."""
        mine = (self.u32[:, 0] & TP_STATUS_USER) != 0
        if not mine.any():
            return False
        if mine.all():
            self._pos = int(self._times(0, self.slots).argmin())
        else:
            self._pos = int(np.flatnonzero(mine & ~np.roll(mine, 1))[0])
        return True

    def times(self, count: int) -> U64:
        """When the next `count` frames came, in an order that compares; u64[count]."""
        return self._times(self.pos, count)

    def _times(self, start: int, count: int) -> U64:
        head = self.u32[start : start + count]
        return head[:, _SEC].astype(np.uint64) << np.uint64(32) | head[:, _NSEC]

    def release(self, count: int) -> None:
        """Give `count` slots back to the kernel. The next syscall orders the store; a late one does no harm."""
        pos = self.pos
        if count == 1:
            self._words[pos * self._stride] = 0
        else:
            self.u32[pos : pos + count, 0] = 0
        self._pos = (pos + count) % self.slots

    def header(self, slot: int) -> tuple[int, int, int, int, int]:
        """(status, length, captured, link-layer header's length, VLAN TCI) of a slot's frame."""
        status, length, captured, mac, _, _, _, tci, _ = TPACKET2_HDR.unpack_from(self.view, slot * self.size)
        return status, length, captured, L3_OFFSET - mac, tci

    def segment_size(self, slot: int, link: int) -> int:
        """The payload size of a merged frame's datagrams, 0 for a single one."""
        at = slot * self.size + L3_OFFSET - link - VIRTIO_NET_HDR.size
        _, kind, _, size, _, _ = VIRTIO_NET_HDR.unpack_from(self.view, at)
        return size if kind == VIRTIO_NET_HDR_GSO_UDP_L4 else 0

    def learn(self, mac: int) -> None:
        """Frames of this interface have their link-layer header there."""
        self.mac, self.head = _head_at(mac)

    def lost(self) -> int:
        """Frames that found the ring full since the last call."""
        return ring_drops(self.sock)

    def close(self) -> None:
        self.sock.close()


class Ingress:
    """An interface's two rings, read as one. `what`: the request that they were opened for."""

    def __init__(self, socks: list[socket.socket], what: OpenIngress, *, used: bool) -> None:
        self.what, self.ifindex = what, what.ifindex
        behind = what.family != 0
        self.short = Ring(socks[0], what.ifindex, what.slots, SLOT, used=used, behind=behind)
        self.long = Ring(socks[1], what.ifindex, LONG_SLOTS, LONG_SLOT, used=used, behind=behind)
        self.rings = (self.short, self.long)
        self._ranges: tuple[Ranges, Ranges] = [], []
        # An absolute offset also reads headers that are not in the buffer's linear part; SKF_NET_OFF does not.
        ethernet = _hardware_type(socks[0]) in (ARPHRD_ETHER, ARPHRD_LOOPBACK)
        self._network_offset = 14 if ethernet else SKF_NET_OFF

    def set_filter(self, v4: Ranges, v6: Ranges) -> None:
        """Let in only what is addressed to these closed address ranges."""
        if (v4, v6) != self._ranges:
            for ring in self.rings:
                start = only_longer(SHORT, longer=ring is self.long)
                if ring is self.short:  # fragments are put together for the other ring
                    start += no_fragments(self._network_offset)
                attach_group_filter(ring.sock, v4, v6, self._network_offset, start)
            self._ranges = v4, v6

    def ready(self, limit: int) -> list[tuple[Ring, int]]:
        """What waits, as (ring, frames) in order of arrival; at most `limit` frames of each ring.

        A frame is only taken when nothing that came before it can still be unseen in the other ring: the
        second look at the short ring shows all that came before the long frames just seen.
        """
        seen = self.short.ready(limit)
        long = self.long.ready(limit)
        if not long:
            return [(self.short, seen)] if seen else []
        short = self.short.ready(limit)
        if not short:
            return [(self.long, long)]
        runs = interleave(
            self.short.times(short),
            seen,
            self._capped(self.short, short, limit),
            self.long.times(long),
            self._capped(self.long, long, limit),
        )
        return [(self.long if is_long else self.short, count) for is_long, count in runs]

    def woken(self, fd: int) -> None:
        """poll says that the ring with this descriptor has frames."""
        for ring in self.rings:
            if not ring.woken:
                ring.woken = ring.sock.fileno() == fd

    def clear_errors(self) -> None:
        """Read the sockets' errors (the interface went down), or poll would report them for ever."""
        for ring in self.rings:
            ring.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def _capped(self, ring: Ring, count: int, limit: int) -> bool:
        return count == limit or ring.pos + count == ring.slots

    def close(self) -> None:
        for ring in self.rings:
            ring.close()


def interleave(short: U64, seen: int, short_capped: bool, long: U64, long_capped: bool) -> list[tuple[bool, int]]:
    """Runs (of the long ring?, frames) in order of arrival, from the two rings' times.

    The first `seen` short frames were there before the long ones were looked at. Capped: more may wait
    behind the last one, so nothing later than it is taken from the other ring.
    """
    last_long, last_short = int(long[-1]), int(short[-1]) if short_capped else _NEVER
    long = long[: int(np.searchsorted(long, last_short, side="right"))]
    takable = int(np.searchsorted(short, last_long, side="right"))
    short_count = takable if long_capped else max(seen, takable)
    before = np.minimum(np.searchsorted(short, long, side="left"), short_count)
    runs: list[tuple[bool, int]] = []
    done = 0
    for upto in before.tolist():
        if upto > done:
            runs.append((False, upto - done))
            done = upto
        runs = _extend_long(runs)
    return [*runs, (False, short_count - done)] if short_count > done else runs


def _extend_long(runs: list[tuple[bool, int]]) -> list[tuple[bool, int]]:
    """One more long frame, in the last run if that is one of them."""
    if runs and runs[-1][0]:
        return [*runs[:-1], (True, runs[-1][1] + 1)]
    return [*runs, (True, 1)]


def _head_at(mac: int) -> tuple[int, struct.Struct]:
    """For frames whose link-layer header is at `mac`, what to unpack from a slot's start.

    status, length, captured, mac, VLAN TCI (struct tpacket2_hdr), gso_type, gso_size (virtio_net_hdr), then
    struct told.
    """
    offload = mac - VIRTIO_NET_HDR.size
    return mac, struct.Struct(f"=IIIH10xH{offload + 1 - 26}xB2xH4xIH")


def _hardware_type(sock: socket.socket) -> int:
    """The ARPHRD_ type of a bound packet socket's interface."""
    kind: int = sock.getsockname()[3]
    return kind
