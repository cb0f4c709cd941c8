"""The lean path: a frame at a time, for when only one or a few wait. It halves latency at low rates.

Called by worker.main between waits. Sends never block. DESIGN.md section 6.
"""

from mrelay.counters import MATCHED, RATE_LIMITED, RECEIVED, TRUNCATED, Counters
from mrelay.kernel.packet import L3_OFFSET, TP_STATUS_VLAN_VALID
from mrelay.worker.egress import Entry
from mrelay.worker.failures import Failures
from mrelay.worker.flows import FORWARD, IGNORE, Flow, FlowTable
from mrelay.worker.ingress import Ring
from mrelay.worker.parse import Datagram, parse


def read_frame(ring: Ring, slot: int) -> Datagram | int:
    """What lies in a slot (its payload's offset counts in `ring.view`), or a drop reason."""
    _, length, captured, link, _ = ring.header(slot)
    if captured < max(length, link):
        return TRUNCATED
    start = slot * ring.size + L3_OFFSET
    return parse(ring.view, start, start - link + captured)


class ScalarPath:
    """Frames one by one. `forward` takes `count` slots from the ring's place on; the caller releases them."""

    def __init__(self, counters: Counters, table: FlowTable, failures: Failures) -> None:
        self.table, self.failures = table, failures
        self._totals, self._drops = counters.totals.data, counters.drops.data
        self._packets, self._bytes = counters.flows[0].data, counters.flows[1].data

    def forward(self, ring: Ring, count: int) -> None:
        for slot in range(ring.pos, ring.pos + count):
            self._forward_one(ring, slot)

    def _forward_one(self, ring: Ring, slot: int) -> None:
        found = read_frame(ring, slot)
        if isinstance(found, int):
            self._drop(found, 1)
            return
        status, _, _, link, tci = ring.header(slot)
        vlan = tci & 0xFFF if status & TP_STATUS_VLAN_VALID else 0
        segment = ring.segment_size(slot, link)
        count = -(-found.length // segment) if segment else 1
        place = self.table.find((ring.ifindex, vlan, found.family, found.source, found.group, found.port))
        verdict = self.table.verdict[place] if place >= 0 else RATE_LIMITED
        if verdict != FORWARD:
            self._drop(verdict, count)
            return
        flow = self.table.flows[place]
        assert flow is not None  # noqa: S101  a slot that forwards holds a flow
        self._count(place, count, found.length)
        payload = ring.view[found.start : found.start + found.length]
        self._send(flow, payload, segment if count > 1 else 0, count, found.hop)

    def _drop(self, verdict: int, count: int) -> None:
        if verdict != IGNORE:
            self._totals[RECEIVED] += count
            self._drops[verdict] += count

    def _count(self, place: int, count: int, octets: int) -> None:
        self._totals[RECEIVED] += count
        self._totals[MATCHED] += count
        self._packets[place] += count
        self._bytes[place] += octets
        self.table.last[place] = self.table.now

    def _send(self, flow: Flow, payload: memoryview, segment: int, count: int, hop: int) -> None:
        failed: list[tuple[Entry, int, int]] = []
        for entry in flow.entries:
            out = entry.out_hop(hop)
            lost, error = entry.deliver((payload,), segment, out, flow.source)
            if lost:
                failed.append((entry, lost, error))
            elif out != entry.hop:
                self.table.egress.adopt(entry.index, out)
        if failed:
            self.failures.record(flow, count, len(payload), failed)
