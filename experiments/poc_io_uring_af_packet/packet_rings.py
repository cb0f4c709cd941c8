"""The mmap rings of poc_io_uring_af_packet, read with plain poll: TPACKET_V2 as in the product, and TPACKET_V3.

Owns the layout of TPACKET_V3 (linux/if_packet.h). `wait` blocks in poll.
"""

import mmap
import select
import socket
import struct
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import as_strided
from packet_methods import BATCH, HEADER, MEMORY, NOTHING, U16, bind, let_in, packet_socket

from mrelay.kernel.packet import (
    L3_OFFSET,
    PACKET_RX_RING,
    PACKET_VERSION,
    SLOT,
    SOL_PACKET,
    TP_STATUS_USER,
    open_ring,
)
from mrelay.worker.ingress import Ring

# linux/if_packet.h
PACKET_COPY_THRESH: Final = 7
TPACKET_V3: Final = 2
TP_STATUS_COPY: Final = 1 << 1
_WAIT: Final = 100  # ms
# struct tpacket_block_desc in 32-bit words: version, offset_to_priv, block_status, num_pkts, offset_to_first_pkt
_STATUS, _COUNT, _FIRST = 2, 3, 4
_NEXT, _MAC = 0, 12  # struct tpacket3_hdr: tp_next_offset, word 0 of 32 bits; tp_mac, word 12 of 16 bits


class RingV2:
    """The product's ring (kernel/packet.py, worker/ingress.py); `most` frames at a time."""

    def __init__(self, slot: int = SLOT, slots: int = MEMORY // SLOT, most: int = BATCH) -> None:
        ifindex = socket.if_nametoindex("in0")
        self.sock, _ = open_ring(ifindex, slots, slot, None, shared=False)
        self.ring, self._most, self._taken = Ring(self.sock, ifindex, slots, slot, used=False), most, 0
        let_in(self.sock)
        self._poll = select.poll()
        self._poll.register(self.sock, select.POLLIN)

    def wait(self) -> None:
        self._poll.poll(_WAIT)

    def take(self) -> U16:
        self._taken, pos = self.ring.ready(self._most), self.ring.pos
        column = (L3_OFFSET - 14) // 2
        return self.ring.u16[pos : pos + self._taken, column : column + HEADER // 2]

    def release(self) -> None:
        self.ring.release(self._taken)

    def close(self) -> None:
        self.sock.close()


class RingV3:
    """Frames lie one behind the other in blocks; a block is ours when it is full or its time is over."""

    def __init__(self, block: int = 256 << 10, retire: int = 1) -> None:
        """`block`: bytes; `retire`: ms until a block that has begun is handed over, 1 is the least there is."""
        self.sock = packet_socket()
        self._blocks, self._at = MEMORY // block, 0
        self.sock.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
        # struct tpacket_req3: block_size block_nr frame_size frame_nr retire_blk_tov sizeof_priv feature_req_word
        request = struct.pack("=7I", block, self._blocks, SLOT, MEMORY // SLOT, retire, 0, 0)
        self.sock.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
        memory = mmap.mmap(self.sock.fileno(), MEMORY, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._words = np.frombuffer(memory, dtype=np.uint32).reshape(self._blocks, block // 4)
        bind(self.sock)
        self._poll = select.poll()
        self._poll.register(self.sock, select.POLLIN)

    def wait(self) -> None:
        self._poll.poll(_WAIT)

    def take(self) -> U16:
        block = self._words[self._at]
        if not block[_STATUS] & TP_STATUS_USER:
            return NOTHING
        count, first = int(block[_COUNT]), int(block[_FIRST]) // 4
        step = int(block[first + _NEXT])
        # Frames of one length are evenly spaced, so they are one array; others have to be walked, one by one.
        if count > 1 and bool((as_strided(block[first + _NEXT :], (count - 1,), (step,)) == step).all()):
            halves = block.view(np.uint16)[first * 2 :]
            return as_strided(halves[int(halves[_MAC]) // 2 :], (count, HEADER // 2), (step, 2))
        return self._walk(block.view(np.uint16), count, first)

    def _walk(self, halves: U16, count: int, at: int) -> U16:
        rows = np.empty((count, HEADER // 2), np.uint16)
        for row in range(count):
            column = at * 2 + int(halves[at * 2 + _MAC]) // 2
            rows[row] = halves[column : column + HEADER // 2]
            at += int(self._words[self._at, at + _NEXT]) // 4
        return rows

    def release(self) -> None:
        if self._words[self._at, _STATUS] & TP_STATUS_USER:
            self._words[self._at, _STATUS] = 0
            self._at = (self._at + 1) % self._blocks

    def close(self) -> None:
        self.sock.close()


class RingCopy(RingV2):
    """Short slots, and PACKET_COPY_THRESH: a frame that is longer waits whole in the socket's queue."""

    def __init__(self) -> None:
        super().__init__()
        self.sock.setsockopt(SOL_PACKET, PACKET_COPY_THRESH, 1)
        self._frame = bytearray(1 << 17)

    def take(self) -> U16:
        frames = super().take()
        # One recv for each: its headers are in the slot too, its payload only here.
        for _ in range(int(np.count_nonzero(self.ring.u32[self.ring.pos :, 0][: len(frames)] & TP_STATUS_COPY))):
            self.sock.recv_into(self._frame)
        return frames
