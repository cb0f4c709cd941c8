"""The lean path: a frame at a time, for when a few wait, and for merged frames, of which each is a batch.

Called by worker.main between waits. Sends never block. What it saves counts: between frames the kernel has
emptied the caches, so every line here runs several times slower than a profile of it alone shows (D33).
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from mrelay.counters import MATCHED, MISS_LIMITED, NO_OUTPUT, RATE_LIMITED, RECEIVED, TRUNCATED, Counters
from mrelay.kernel.packet import L3_OFFSET, TP_STATUS_VLAN_VALID, VIRTIO_NET_HDR_GSO_UDP_L4
from mrelay.kernel.udp import segment_control
from mrelay.worker.egress import Entry
from mrelay.worker.failures import ALL, Failures
from mrelay.worker.flows import FORWARD, IGNORE, LIMITED, Flow, FlowTable
from mrelay.worker.ingress import Ring
from mrelay.worker.parse import IPPROTO_UDP, Datagram, checksum_holds, parse

_V4_UDP: Final = struct.Struct(">BBHHHBBHIIHHHH")  # RFC 791 §3.1 without options, RFC 768
_PAYLOAD: Final = L3_OFFSET + _V4_UDP.size
Key = tuple[int, int, int, int, int, int]


def read_frame(ring: Ring, slot: int) -> Datagram | int:
    """What lies in a slot (its payload's offset counts in `ring.view`), or a drop reason."""
    _, length, captured, link, _ = ring.header(slot)
    if captured < length or captured < link:
        return TRUNCATED
    start = slot * ring.size + L3_OFFSET
    return parse(ring.view, start, start - link + captured)


class ScalarPath:
    """Frames one by one. `forward` takes `count` slots from the ring's place on; the caller releases them."""

    def __init__(self, counters: Counters, table: FlowTable, failures: Failures) -> None:
        self.table, self.failures = table, failures
        # Memoryviews of the counters: an item of one costs a third of an array's.
        self._totals, self._drops = counters.totals.data, counters.drops.data
        self._packets, self._bytes = counters.flows[0].data, counters.flows[1].data
        self._dropped = counters.dropped.data
        self._verdict, self._last = table.verdict.data, table.last.data

    def forward(self, ring: Ring, count: int) -> None:
        table, view, totals = self.table, ring.view, self._totals
        for key, start, length, hop, segment in self._read(ring, count):
            datagrams = -(-length // segment) if segment else 1
            place = table.find(key)
            verdict = self._verdict[place] if place >= 0 else MISS_LIMITED
            flow = table.flows[place]
            if verdict != FORWARD or flow is None:
                if verdict == LIMITED and flow is not None:
                    payload = view[start : start + length]
                    self._forward_limited(flow, place, payload, segment if datagrams > 1 else 0, datagrams, hop)
                else:
                    self._drop(verdict, datagrams)
                    if verdict == NO_OUTPUT:
                        self._dropped[place] += datagrams
                continue
            totals[RECEIVED] += datagrams
            totals[MATCHED] += datagrams
            self._packets[place] += datagrams
            self._bytes[place] += length
            self._last[place] = table.now
            self._send(flow, view[start : start + length], segment if datagrams > 1 else 0, datagrams, hop)

    def _read(self, ring: Ring, count: int) -> Iterator[tuple[Key, int, int, int, int]]:
        """(flow key, payload's start, its length, TTL << 8 | TOS, segment size or 0) of each good frame."""
        view, size, ifindex, head, told = ring.view, ring.size, ring.ifindex, ring.head, ring.told
        for at in range(ring.pos * size, (ring.pos + count) * size, size):
            status, length, captured, mac, tci, kind, segment, mark, there = head.unpack_from(view, at)
            vlan = tci & 0xFFF if status & TP_STATUS_VLAN_VALID else there if mark == told else 0
            if kind != VIRTIO_NET_HDR_GSO_UDP_L4:
                segment = 0
            version, tos, total, _, fragment, ttl, protocol, _, source, group, _, port, udp, _ = (
                _V4_UDP.unpack_from(view, at + L3_OFFSET)
            )
            if (
                version == 0x45
                and protocol == IPPROTO_UDP
                and not fragment & 0x3FFF
                and captured == length
                and mac == ring.mac
                and 8 <= udp <= total - 20 <= length - L3_OFFSET + mac - 20
                and (segment or checksum_holds(view, at + L3_OFFSET, 20))
            ):
                yield (ifindex, vlan, 4, source, group, port), at + _PAYLOAD, udp - 8, ttl << 8 | tos, segment
                continue
            found = read_frame(ring, at // size)
            if isinstance(found, int):
                self._drop(found, 1)
            else:
                family, source, group, port, start, length, hop = found
                segment = ring.segment_size(at // size, L3_OFFSET - mac)
                yield (ifindex, vlan, family, source, group, port), start, length, hop, segment
            if mac != ring.mac:
                ring.learn(mac)
                head = ring.head

    def _drop(self, verdict: int, count: int) -> None:
        if verdict != IGNORE:
            self._totals[RECEIVED] += count
            self._drops[verdict] += count

    def _forward_limited(
        self, flow: Flow, place: int, payload: memoryview, segment: int, count: int, hop: int
    ) -> None:
        """As far as the rates of its rules allow."""
        bits = self.table.limits.admit(flow.route.limited, count, len(payload))
        if not bits and self.table.withheld[place]:
            self._drop(RATE_LIMITED, count)
            self._dropped[place] += count
            return
        self._totals[RECEIVED] += count
        self._totals[MATCHED] += count
        self._packets[place] += count
        self._bytes[place] += len(payload)
        self._last[place] = self.table.now
        if flow.refusing(bits):
            self.failures.withhold(flow, count, len(payload), bits)
        self._deliver(flow, flow.admitted(bits), payload, segment, count, hop, bits)

    def _send(self, flow: Flow, payload: memoryview, segment: int, count: int, hop: int) -> None:
        if flow.steady != (hop, segment, self.table.egress.generation):
            self._send_carefully(flow, payload, segment, count, hop)
            return
        for n, sock in enumerate(flow.sockets):
            try:
                if segment:
                    sock.sendmsg((payload,), flow.control)
                else:
                    sock.send(payload)
            except OSError:
                self._send_carefully(flow, payload, segment, count, hop, first=n)
                return

    def _send_carefully(
        self, flow: Flow, payload: memoryview, segment: int, count: int, hop: int, first: int = 0
    ) -> None:
        """To each entry from `first` on, with all that may be special; afterwards the flow may be steady."""
        if self._deliver(flow, flow.entries[first:], payload, segment, count, hop, ALL):
            control = [segment_control(segment)] if segment else []
            flow.settle((hop, segment, self.table.egress.generation), control)

    def _deliver(
        self,
        flow: Flow,
        entries: Sequence[Entry],
        payload: memoryview,
        segment: int,
        count: int,
        hop: int,
        bits: int,
    ) -> bool:
        """To these entries, which the rules of `bits` allow; whether nothing failed."""
        failed: list[tuple[Entry, int, int]] = []
        for entry in entries:
            out = entry.out_hop(hop)
            lost, error = entry.deliver((payload,), segment, out, flow.source)
            if lost:
                failed.append((entry, lost, error))
            elif out != entry.hop and entry.adopts:
                self.table.egress.adopt(entry.index, out)
        if failed:
            self.failures.record(flow, count, len(payload), failed, bits)
        return not failed
