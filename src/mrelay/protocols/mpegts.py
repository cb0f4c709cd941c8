"""MPEG transport streams as a listener sees them: the continuity counters of each PID.

A pure state machine, called by stream health. ISO/IEC 13818-1 (ITU-T H.222.0) §2.4.3. The counters have four bits,
so what they tell is that packets are missing, and the least number that can be; neither the order of datagrams
nor, if 16 or more in a row are missing, all of the loss.
"""

from typing import Final

PACKET: Final = 188  # bytes
SYNC: Final = 0x47
NULL_PID: Final = 0x1FFF  # its counter is undefined


class TsStream:
    """`packets` without null packets; `nulls`; `missing`: packets that must be, at least; `errors`: gaps.

    `duplicates`: a packet may be sent twice (§2.4.3.3). `discontinuities`: gaps that the sender announced.
    `bad`: pieces that are no transport packet, or that it marked as damaged (transport_error_indicator).
    """

    def __init__(self) -> None:
        self.packets = self.nulls = self.missing = self.errors = 0
        self.duplicates = self.discontinuities = self.bad = 0
        self._last: dict[int, int] = {}  # by PID: counter, and 16 if the packet before was a duplicate

    @property
    def pids(self) -> int:
        """PIDs heard, without the null packets'."""
        return len(self._last)

    def excuse(self) -> None:
        """We may have missed some: no counter is held against the one before."""
        self._last.clear()

    def add(self, data: bytes, start: int, end: int) -> None:
        """Account for the packets in data[start:end]."""
        if end - start < PACKET:
            self.bad += 1
            return
        for at in range(start, end - PACKET + 1, PACKET):
            if data[at] != SYNC or data[at + 1] & 0x80:
                self.bad += 1
                continue
            pid = (data[at + 1] & 0x1F) << 8 | data[at + 2]
            if pid == NULL_PID:
                self.nulls += 1
            else:
                self._packet(pid, data[at + 3], data[at + 4 : at + 6])

    def _packet(self, pid: int, flags: int, adaptation: bytes) -> None:
        self.packets += 1
        counter, payload = flags & 0xF, flags >> 4 & 1
        last = self._last.get(pid, -1)
        self._last[pid] = counter
        if last < 0 or (last & 0xF) + payload & 0xF == counter:
            return
        if flags & 0x20 and adaptation[0] and adaptation[1] & 0x80:  # discontinuity_indicator
            self.discontinuities += 1
        elif last == counter:  # once; `last` is 16 more if that was a duplicate itself
            self.duplicates += 1
            self._last[pid] = counter | 16
        else:
            self.errors += 1
            self.missing += (counter - last - payload) % 16


def looks_like(data: bytes, start: int, end: int) -> bool:
    """Whether data[start:end] is nothing but transport packets."""
    whole = end - start >= PACKET and (end - start) % PACKET == 0
    return whole and all(data[at] == SYNC for at in range(start, end, PACKET))
