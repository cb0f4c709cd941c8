"""A batch's frames as columns: the regular ones read all at once, the others one by one.

Owns the vector reading of headers. Regular: IPv4 without options or IPv6 without extension headers, UDP,
not a fragment, whole, right IPv4 header checksum; anything else goes through worker.parse, which knows the
reasons. Called by worker.vector; never blocks.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.kernel.packet import L3_OFFSET, TP_STATUS_VLAN_VALID, VIRTIO_NET_HDR
from mrelay.model.ruleset import FlowKey
from mrelay.worker.flows import FORWARD, key_words, words_key
from mrelay.worker.ingress import Ring
from mrelay.worker.parse import IPPROTO_UDP
from mrelay.worker.scalar import read_frame

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]
_V4_WORDS: Final = slice(L3_OFFSET // 4, L3_OFFSET // 4 + 7)  # IPv4 and UDP headers in 32-bit words
_V6_WORDS: Final = slice(L3_OFFSET // 4, L3_OFFSET // 4 + 12)  # the same for IPv6
_V6_ADDRESSES: Final = slice(L3_OFFSET // 8 + 1, L3_OFFSET // 8 + 5)  # source and group in 64-bit words
_LOW: Final = np.uint32(0xFFFF)


class Batch:
    """n frames from a ring's place on, as columns of n values.

    `verdict` i8 (FORWARD, or a drop reason), `words` the key words u64 (None: all zeros), `pointer` u64 and
    `length` i64 of the payload, `segment` i64 (0: a single datagram), `count` i64 of datagrams, `hop` i32.
    """

    def __init__(self, ring: Ring, n: int) -> None:
        self.n, self._ring, self._pos = n, ring, ring.pos
        rows = slice(ring.pos, ring.pos + n)
        self._head = ring.u32[rows]
        self._half = ring.u16[rows]
        self._link = L3_OFFSET - int(self._half[0, 6])
        self.status = self._head[:, 0]
        self.verdict = np.full(n, FORWARD, np.int8)
        slots = np.arange(ring.pos, ring.pos + n, dtype=np.uint64) * np.uint64(ring.size)
        self._slot_address = slots + np.uint64(ring.address)
        self._read_offload()
        regular = self._read_v4()
        odd = np.flatnonzero(~regular)
        if len(odd):
            odd = odd[~self._read_v6(odd)]
        for row in odd.tolist():
            self._read_one(row)
        last = self.words[4]
        assert last is not None  # noqa: S101  the ports: never all zeros
        last |= self._interface_word()
        size = np.where(self.segment > 0, self.segment, np.maximum(self.length, 1))
        self.count = np.maximum(-(-self.length // size), 1)

    def _read_offload(self) -> None:
        """Which frames are merged; how much of each network packet is there."""
        at = (L3_OFFSET - self._link - VIRTIO_NET_HDR.size) // 2
        merged = self._half[:, at] >> 8 == 5
        self.segment = np.where(merged, self._half[:, at + 2], 0).astype(np.int64)
        self._there = self._head[:, 1] - np.uint32(self._link)
        whole = self._head[:, 2] == self._head[:, 1]
        self._plain = whole & (self._half[:, 6] == L3_OFFSET - self._link) & (self._link % 2 == 0)

    def _read_v4(self) -> Mask:
        """Read all as IPv4; the mask says for which that was right."""
        w = self._head[:, _V4_WORDS].T.byteswap()
        total, udp = w[0] & _LOW, w[6] >> 16
        self.hop = (w[2] >> 24 << 8 | w[0] >> 16 & 0xFF).astype(np.int32)
        self.length = udp.astype(np.int64) - 8
        self.pointer = self._slot_address + np.uint64(L3_OFFSET + 28)
        port = w[5] & _LOW | np.uint64(4 << 32)
        self.words: list[U64 | None] = [None, w[3].astype(np.uint64), None, w[4].astype(np.uint64), port]
        fits = (udp >= 8) & (udp + 20 <= total) & (total <= self._there)
        # Zero for version 4, no options, not a fragment, UDP.
        shape = (w[0] >> 24 ^ 0x45) | (w[1] & 0x3FFF) | (w[2] >> 16 & 0xFF ^ IPPROTO_UDP)
        regular: Mask = self._plain & fits & (shape == 0) & _checksum_holds(w)
        return regular

    def _interface_word(self) -> U64:
        tagged = self.status & TP_STATUS_VLAN_VALID != 0
        vlan = np.where(tagged, self._half[:, 12] & 0xFFF, 0).astype(np.uint64)
        if self._ring.told >= 0:
            at = (L3_OFFSET - self._link) // 2
            mark = self._half[:, at] | self._half[:, at + 1].astype(np.uint32) << 16
            vlan = np.where(mark == self._ring.told, self._half[:, at + 2], vlan).astype(np.uint64)
        return vlan << np.uint64(16) | np.uint64(self._ring.ifindex << 40)

    def _read_v6(self, rows: Rows) -> Mask:
        """Read these rows as IPv6; the mask says for which of them that was right."""
        w = self._head[rows, _V6_WORDS].T.byteswap()
        payload, udp = w[1] >> 16, w[11] >> 16
        fits = (udp >= 8) & (udp <= payload) & (payload + 40 <= self._there[rows])
        shape = (w[0] >> 28 == 6) & (w[1] >> 8 & 0xFF == IPPROTO_UDP)
        right: Mask = self._plain[rows] & fits & shape
        rows, w = rows[right], w[:, right]
        self.hop[rows] = ((w[1] & 0xFF) << 8 | w[0] >> 20 & 0xFF).astype(np.int32)
        self.length[rows] = udp[right].astype(np.int64) - 8
        self.pointer[rows] = self._slot_address[rows] + np.uint64(L3_OFFSET + 48)
        self._widen()
        addresses = self._ring.u64[self._pos + rows, _V6_ADDRESSES].byteswap()
        for word in range(4):
            self.words[word][rows] = addresses[:, word]  # type: ignore[index]  # _widen made them arrays
        self.words[4][rows] = w[10] & _LOW | np.uint64(6 << 32)  # type: ignore[index]
        return right

    def _widen(self) -> None:
        """From here on there are IPv6 keys, whose high words are not zeros."""
        for word in (0, 2):
            if self.words[word] is None:
                self.words[word] = np.zeros(self.n, np.uint64)

    def _read_one(self, row: int) -> None:
        found = read_frame(self._ring, self._pos + row)
        if isinstance(found, int):
            self.verdict[row], self.length[row], self.segment[row] = found, 0, 0
            return
        base = self._ring.address
        self.pointer[row], self.length[row], self.hop[row] = base + found.start, found.length, found.hop
        if found.family == 6:
            self._widen()
        key = FlowKey(0, 0, found.family, found.source, found.group, found.port)
        for column, word in zip(self.words, key_words(key), strict=True):
            if column is not None:
                column[row] = word

    def key(self, row: int) -> FlowKey:
        """A row's flow."""
        return words_key([0 if word is None else int(word[row]) for word in self.words])


def _checksum_holds(w: U32) -> Mask:
    """RFC 1071 over the five words of IPv4 headers, u32[words, n]: a right sum is 0xffff, which is 0."""
    holds: Mask = w[:5].sum(axis=0, dtype=np.uint64) % 0xFFFF == 0
    return holds
