"""The vector path: a batch of frames at once, nothing per packet in Python.

Runs of one flow and size become one message each (UDP_SEGMENT), a merged frame is one already; each
message goes to every entry of its flow's route. Owns the message tables that the kernel reads. Called by
worker.main; sends never block. See docs/decisions/D31 and D33.
"""

import ctypes
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.counters import MATCHED, MISS_LIMITED, NO_OUTPUT, RATE_LIMITED, RECEIVED, Counters
from mrelay.kernel.udp import UDP_MAX_SEGMENTS
from mrelay.worker.batch import Batch
from mrelay.worker.egress import Entry
from mrelay.worker.failures import ALL, EXPIRED, Failures
from mrelay.worker.flows import FORWARD, IGNORE, LIMITED, FlowTable
from mrelay.worker.ingress import Ring
from mrelay.worker.limits import MOST
from mrelay.worker.messages import MESSAGES, MessageTable, Sender

MAX_BATCH: Final = 4096  # frames
_MAX_BYTES: Final = 65_000  # of payload in one message: an IP packet's limit, less headers
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]
Rows = NDArray[np.intp]


class Runs:
    """Messages to be: run g is datagrams first[g] … first[g] + pieces[g] - 1 of the columns, all of one flow.

    `flow`, `hop` i32; `segment` i64 (0: a single datagram); `count` (of datagrams), `size` (bytes) i64; `bits`
    u64 (which of the flow's limited rules pass it), None when no rule is limited.
    """

    def __init__(self, batch: Batch, flow: I32, rows: Rows, limits: I64, bits: U64 | None) -> None:
        flow = flow[rows]
        if len(flow) and (flow != flow[0]).any():
            order = np.argsort(flow, kind="stable")  # by flow; within a flow, order is kept
            rows, flow = rows[order], flow[order]
        self.pointer, self.length = batch.pointer[rows], batch.length[rows]
        segment, hop, count = batch.segment[rows], batch.hop[rows], batch.count[rows]
        new_flow = _changes(flow)
        cut = new_flow | _changes(self.length) | _changes(hop) | (segment > 0)
        cut[1:] |= segment[:-1] > 0
        if bits is not None:
            cut |= _changes(bits[rows])
        self.first = _limit(cut, limits[self.length]).nonzero()[0]
        self.pieces = np.empty_like(self.first)
        self.pieces[:-1] = self.first[1:] - self.first[:-1]
        self.pieces[-1] = len(rows) - self.first[-1]
        self.flow, self.hop = flow[self.first], hop[self.first]
        self.bits = None if bits is None else bits[rows][self.first]
        self.count = np.add.reduceat(count, self.first)
        self.size = np.add.reduceat(self.length, self.first)
        one_size = np.where(self.pieces > 1, self.length[self.first], 0)
        merged = np.where(count[self.first] > 1, segment[self.first], 0)
        self.segment = np.maximum(one_size, merged)
        self.flow_first = np.flatnonzero(_changes(self.flow))  # the first run of each flow


def _changes(column: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Where a value differs from the one before; the first does."""
    changed = np.ones(len(column), np.bool_)
    changed[1:] = column[1:] != column[:-1]
    return changed


def _limit(cut: NDArray[np.bool_], limit: I64) -> NDArray[np.bool_]:
    """Further cuts, so that no run is longer than its rows' limit."""
    at = np.arange(len(cut))
    start = np.maximum.accumulate(np.where(cut, at, 0))
    limited: NDArray[np.bool_] = cut | ((at - start) % limit == 0)
    return limited


def run_limits() -> I64:
    """How many datagrams of each payload size one message may hold; i64[65536]."""
    size = np.arange(65536, dtype=np.int64)
    limit: I64 = np.clip(_MAX_BYTES // np.maximum(size, 1), 1, UDP_MAX_SEGMENTS)
    limit[0] = 1
    return limit


class VectorPath:
    """Batches. `forward` takes `count` slots from the ring's place on; the caller releases them."""

    def __init__(self, counters: Counters, table: FlowTable, failures: Failures, sender: Sender) -> None:
        self.counters, self.table, self.failures, self.sender = counters, table, failures, sender
        self._limits = run_limits()
        self._messages: MessageTable = sender.table

    def forward(self, ring: Ring, count: int) -> None:
        batch = Batch(ring, count)
        flow = self._look_up(batch)
        self._count_drops(batch, flow)
        forward = batch.verdict == FORWARD
        bits = self._admit(batch, flow, forward) if self.table.limits.rules else None
        rows = np.flatnonzero(forward)
        if not len(rows):
            return
        runs = Runs(batch, flow, rows, self._limits, bits)
        self._count_flows(runs)
        if bits is not None:
            self._withhold(runs)
        self._messages.load_payloads(runs.pointer, runs.length)
        self._send(runs)

    def _look_up(self, batch: Batch) -> I32:
        """Each row's flow; misses are resolved and installed, in order of arrival."""
        flow = self.table.lookup(batch.words)
        misses = np.flatnonzero((flow < 0) & (batch.verdict == FORWARD))
        for row in misses.tolist():
            flow[row] = self.table.find(batch.key(row))
        if len(misses):
            # An install in a full table takes a flow out, which a row before may have found.
            flow[~self.table.holds(flow, batch.words)] = -1
        fine = batch.verdict == FORWARD
        found = np.where(flow >= 0, self.table.verdict[flow], np.int8(MISS_LIMITED))
        batch.verdict[fine] = found[fine]
        return flow

    def _admit(self, batch: Batch, flow: I32, forward: NDArray[np.bool_]) -> U64:
        """For each row, which of its flow's limited rules pass it. `forward` gets those that something passes."""
        table, bits = self.table, np.full(len(flow), ALL, np.uint64)
        rows = np.flatnonzero(batch.verdict == LIMITED)
        if not len(rows):
            return bits
        lengths = table.limit_length[flow[rows]]
        ends = np.cumsum(lengths)
        row = np.repeat(np.arange(len(rows)), lengths)
        place = np.arange(len(row)) - (ends - lengths)[row]
        slots = table.limited.items[table.limit_start[flow[rows]][row] + place].astype(np.int64)
        passes = table.limits.take(slots, batch.count[rows][row], batch.length[rows][row])
        some = np.uint64(1) << np.minimum(place, MOST - 1).astype(np.uint64)
        bits[rows] = np.bitwise_or.reduceat(np.where(passes, some, np.uint64(0)), ends - lengths)
        refused = (bits[rows] == 0) & table.withheld[flow[rows]]
        self.counters.drops[RATE_LIMITED] += np.uint64(batch.count[rows[refused]].sum())
        self._note_dropped(batch, flow, rows[refused])
        forward[rows[~refused]] = True
        return bits

    def _withhold(self, runs: Runs) -> None:
        """Take off what limited rules counted and did not pass, where other rules of the flow passed it."""
        assert runs.bits is not None  # noqa: S101  only called with limits
        for run in np.flatnonzero(self.table.limit_length[runs.flow]).tolist():
            flow, bits = self.table.flows[int(runs.flow[run])], int(runs.bits[run])
            if flow is not None and flow.refusing(bits):
                self.failures.withhold(flow, int(runs.count[run]), int(runs.size[run]), bits)

    def _note_dropped(self, batch: Batch, flow: I32, rows: I64) -> None:
        """These rows were taken by rules, and go nowhere: by flow."""
        np.add.at(self.counters.dropped, flow[rows], batch.count[rows].astype(np.uint64))

    def _count_drops(self, batch: Batch, flow: I32) -> None:
        ours = batch.verdict != IGNORE
        self.counters.totals[RECEIVED] += np.uint64(batch.count[ours].sum())
        dropped = batch.verdict >= 0
        if dropped.any():
            reasons = len(self.counters.drops)
            lost = np.bincount(batch.verdict[dropped], batch.count[dropped], reasons)
            self.counters.drops += lost.astype(np.uint64)
            if lost[NO_OUTPUT]:
                self._note_dropped(batch, flow, np.flatnonzero(batch.verdict == NO_OUTPUT))

    def _count_flows(self, runs: Runs) -> None:
        first, flows = runs.flow_first, runs.flow[runs.flow_first]
        counts = np.add.reduceat(runs.count, first).astype(np.uint64)
        packets, octets = self.counters.flows
        packets[flows] += counts  # each flow stands there once
        octets[flows] += np.add.reduceat(runs.size, first).astype(np.uint64)
        self.counters.totals[MATCHED] += counts.sum()
        self.table.last[flows] = self.table.now

    def _send(self, runs: Runs) -> None:
        """Every run to every entry of its flow's route, as many messages at a time as the table holds."""
        table = self.table
        lengths = table.route_length[runs.flow].astype(np.int64)
        run = np.repeat(np.arange(len(runs.first)), lengths)
        ends = np.cumsum(lengths)
        within = np.arange(len(run)) - np.repeat(ends - lengths, lengths)
        entry = table.routes.items[table.route_start[runs.flow][run] + within]
        if runs.bits is not None:
            mask = table.masks.items[table.mask_start[runs.flow][run] + within]
            free = (mask == 0) | (mask & runs.bits[run] != 0)
            run, entry = run[free], entry[free]
        failed: dict[int, list[tuple[Entry, int, int]]] = {}
        for at in range(0, len(run), MESSAGES):
            self._send_some(runs, run[at : at + MESSAGES], entry[at : at + MESSAGES], failed)
        for index, failures in failed.items():
            flow = table.flows[int(runs.flow[index])]
            if flow is not None:
                bits = ALL if runs.bits is None else int(runs.bits[index])
                self.failures.record(flow, int(runs.count[index]), int(runs.size[index]), failures, bits)

    def _send_some(
        self, runs: Runs, run: I64, entry: I32, failed: dict[int, list[tuple[Entry, int, int]]]
    ) -> None:
        hop = self._out_hop(runs.hop[run], entry)
        alive = hop >> 8 > 0
        for dead in np.flatnonzero(~alive).tolist():
            self._fail(runs, int(run[dead]), int(entry[dead]), EXPIRED, failed)
        if not alive.all():
            run, entry, hop = run[alive], entry[alive], hop[alive]
        self._messages.fill(runs.first[run], runs.pieces[run], runs.segment[run], entry, self.table.egress)
        special = np.flatnonzero((hop != self.table.egress.hop[entry]) | self.table.egress.keep[entry])
        if len(special):
            source = self.table.counters.keys[:2, runs.flow[run[special]]]
            self._messages.fill_special(special, runs.segment[run[special]], hop, source, entry, self.table.egress)
        for message, error in self.sender.send(self.table.egress.fd[entry]):
            self._retry(runs, int(run[message]), int(entry[message]), int(hop[message]), error, failed)
        self._adopt(entry[special], hop[special])

    def _out_hop(self, hop: I32, entry: I32) -> I32:
        """Entry.out_hop for columns."""
        egress = self.table.egress
        ttl = np.where(egress.ttl[entry] > 0, egress.ttl[entry], (hop >> 8) - 1)
        dscp = egress.dscp[entry]
        return ttl << 8 | np.where(dscp >= 0, dscp << 2 | hop & 3, hop & 0xFF)

    def _adopt(self, entry: I32, hop: I32) -> None:
        egress = self.table.egress
        changed = egress.adopts[entry] & (egress.hop[entry] != hop)
        for index, wanted in dict(zip(entry[changed].tolist(), hop[changed].tolist(), strict=True)).items():
            egress.adopt(index, wanted)

    def _fail(
        self, runs: Runs, run: int, entry: int, error: int, failed: dict[int, list[tuple[Entry, int, int]]]
    ) -> None:
        failed.setdefault(run, []).append((self.table.egress.entries[entry], int(runs.count[run]), error))

    def _retry(
        self,
        runs: Runs,
        run: int,
        entry: int,
        hop: int,
        error: int,
        failed: dict[int, list[tuple[Entry, int, int]]],
    ) -> None:
        """A message that the kernel refused, once more and by smaller steps: Entry.deliver knows how."""
        target = self.table.egress.entries[entry]
        flow = self.table.flows[int(runs.flow[run])]
        if flow is None:
            return
        pieces = range(int(runs.first[run]), int(runs.first[run] + runs.pieces[run]))
        payloads = [_memory(int(runs.pointer[i]), int(runs.length[i])) for i in pieces]
        lost, last = target.deliver(payloads, int(runs.segment[run]), hop, flow.source)
        if lost:
            failed.setdefault(run, []).append((target, lost, last or error))


def _memory(address: int, length: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * length).from_address(address)
