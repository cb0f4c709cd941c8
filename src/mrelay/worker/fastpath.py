"""A worker's side of the kernel's fast path: which of its flows that carries, and what they counted there.

Owns this worker's entries in the maps of flows, its halves of `route` and `outputs`, and `drained`. Called by the
flow table (flows come, change, go; counts are wanted) and by worker.main (frames were sent on); never blocks. See
bpf/mrelay.h for who writes what, and docs/decisions/D36 for the hand-over.
"""

import ipaddress
import logging
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.counters import CARRIED as TOTAL_CARRIED
from mrelay.counters import MATCHED, RATE_LIMITED, RECEIVED, Counters
from mrelay.ebpf.carry import why_not
from mrelay.ebpf.layout import CARRIED, CARRIED_XDP, DSCP_KEEP, PASSED, TAIL_UNKNOWN
from mrelay.ebpf.maps import Maps, flow_key
from mrelay.model.ruleset import FlowKey, Route
from mrelay.worker.broadcast import Broadcasts
from mrelay.worker.egress import Entry
from mrelay.worker.limits import BURST, LEAST

log = logging.getLogger("mrelay.worker")

_FLOW: Final = struct.Struct("=QIIIIIIQQ6I")  # bpf/mrelay.h, struct flow
_NEW: Final = PASSED.index("waiting")
# Words of struct progress.
_ACCEPTED, _ACCEPTED_LONG, _DRAINED, _HALF, _SENT, _SENT_LONG, _ROOM, _ROOM_LONG = 0, 1, *range(8, 14)
U64 = NDArray[np.uint64]
Slots = NDArray[np.intp]
Place = tuple[int, int]  # struct flow: start, length
Plan = tuple[Place, int]  # and limit
_SECOND: Final = 10**9  # ns
_U64_MOST: Final = (1 << 64) - 1
_MOST_COST: Final = 1 << 46  # struct meter: more, and a frame's cost would overflow
_LEFT: Final = ((-1, 0), 0)  # of a flow that was there before us: none of our places


class FastPath:
    """`installed`: by slot, where the outputs of each flow that is in the kernel's map stand."""

    def __init__(self, maps: Maps, worker: int, counters: Counters) -> None:
        self._maps, self._worker, self._counters = maps, worker, counters
        self._first, self._first_limit = maps.sizes.first_slot(worker), maps.sizes.first_limit(worker)
        self._counts = maps.counts[:, self._first : self._first + maps.sizes.slots]
        self._progress = memoryview(maps.progress[worker]).cast("B").cast("Q")
        self.installed: dict[int, Plan] = {}
        self._rates: dict[int, tuple[int, int]] = {}
        self._slots: Slots | None = None  # those of `installed`, when they were last asked for
        self._broadcasts = Broadcasts(maps, worker)
        if counters.fresh:  # what an earlier relay's flows counted is not ours
            sums = self._counts.sum(axis=0, dtype=np.uint64).T
            counters.kernel[:, : maps.sizes.slots] = sums
        self.turn()

    # ---- routes and outputs ----------------------------------------------------------------

    def turn(self) -> None:
        """All routes are built anew: in the other half, while flows still point into this one."""
        half = self._progress[_HALF] = 1 - self._progress[_HALF]
        sizes = self._maps.sizes
        self._route_base, self._output_base = (
            sizes.first_route(self._worker, half),
            sizes.first_output(self._worker, half),
        )
        self._places: dict[tuple[int, ...], Place | None] = {}
        self._end = 0
        self._broadcasts.forget()
        self._entries: dict[int, Entry] = {}  # written into this half, by index
        self._errors = np.zeros(sizes.outputs, np.uint64)  # of each, as far as they are booked

    def _place(self, entries: Sequence[Entry]) -> Place | None:
        """Where these outputs stand in `route`, written there at first use; None when there is no room."""
        indices = tuple(entry.index for entry in entries)
        if indices not in self._places:
            self._places[indices] = self._write(entries, indices)
        return self._places[indices]

    def _write(self, entries: Sequence[Entry], indices: tuple[int, ...]) -> Place | None:
        sizes, end = self._maps.sizes, self._end + len(indices)
        if end > sizes.routes or max(indices) >= sizes.outputs:
            log.warning("the fast path has no room for %d more outputs: they stay on the slow path", len(indices))
            return None
        for entry in entries:
            if entry.index not in self._entries:
                self._write_output(entry)
        start, self._end = self._route_base + self._end, end
        places = self._maps.route[start : start + len(indices)]
        places["output"], places["broadcast"] = np.array(indices) + self._output_base, 0
        self._broadcasts.add(start, [entry.to.output for entry in entries])
        return start, len(indices)

    def _write_output(self, entry: Entry) -> None:
        assert entry.sock is not None  # noqa: S101  follow looked
        to, own = entry.to, entry.sock.getsockname()
        address, source = ipaddress.ip_address(to.address), ipaddress.ip_address(own[0].partition("%")[0])
        output = self._maps.outputs[self._output_base + entry.index : self._output_base + entry.index + 1]
        output["address"] = np.frombuffer(address.packed.ljust(16, b"\0"), np.uint8)
        output["source"] = np.frombuffer(source.packed.ljust(16, b"\0"), np.uint8)
        output["port"], output["source_port"], output["hop"] = to.port, own[1], to.output
        output["ttl"], output["dscp"] = to.ttl, DSCP_KEEP if to.dscp < 0 else to.dscp
        output["keep"], output["multicast"], output["errors"] = to.keep, address.is_multicast, 0
        self._entries[entry.index] = entry
        self._errors[entry.index] = 0

    # ---- flows -----------------------------------------------------------------------------

    def follow(self, slot: int, key: FlowKey, route: Route, entries: Sequence[Entry], *, forward: bool) -> None:
        """The flow in this slot goes that way now: have the kernel carry it, if it can."""
        place = None
        able = forward and slot < self._maps.sizes.slots and not why_not(key, route)
        if able and all(entry.sock is not None for entry in entries):
            place = self._place(entries)
        limit = self._first_limit + route.limited[0] + 1 if route.limited else 0
        if place is None:
            self.remove(slot, key)
        elif self.installed.get(slot) != (place, limit):
            self._install(slot, key, place, limit)

    def _install(self, slot: int, key: FlowKey, place: Place, limit: int) -> None:
        flows, name = self._maps.flows[key.family], flow_key(key)
        tail, state, stamp, single = TAIL_UNKNOWN, _NEW, 0, 0
        before = flows.lookup(name)
        if before is not None:
            old = _FLOW.unpack(before)
            if old[6] >= CARRIED:  # nothing of it is in the rings: it goes on without a detour through them
                tail, state = old[0], old[6]
                single = old[14]
            if old[6] == CARRIED_XDP:  # nor between XDP and tc
                stamp = 1
        first = tail, self._worker, self._first + slot, *place, 0, state, stamp, stamp
        try:
            flows.update(name, _FLOW.pack(*first, 0, 0, 0, 0, limit, single))
        except OSError as error:
            log.warning("a flow can't be given to the fast path (%s): it stays on the slow path", error.strerror)
            return
        self.installed[slot] = place, limit
        self._slots = None

    def remove(self, slot: int, key: FlowKey) -> None:
        """The kernel carries it no more; what it counted is in the counters."""
        if self.installed.pop(slot, None) is None:
            return
        self._slots = None
        self._maps.flows[key.family].delete(flow_key(key))
        self.collect_slot(slot)

    def inherit(self) -> None:
        """Flows that an earlier worker, or relay, left in the kernel's maps: note their keys for the flow table,
        which gives them their outputs, or removes them.

        One that does not fit the counters' memory is taken out.
        """
        for family in (4, 6):
            for name, slot, words in self._left(family):
                keys = self._counters.keys[:, slot]
                if not keys[4]:
                    keys[:] = words
                elif keys.tolist() != words:
                    self._maps.flows[family].delete(name)
                    continue
                self.installed[slot] = _LEFT
        self._slots = None

    def move(self, slot: int) -> None:
        """The flow that was left in this slot is installed in another one by now."""
        self.collect_slot(slot)
        self.installed.pop(slot, None)
        self._slots = None

    def _left(self, family: int) -> Iterator[tuple[bytes, int, list[int]]]:
        """Key, slot and words (counters.Counters.keys) of each flow of ours in the kernel's map."""
        keys, values = self._maps.all_flows(family)
        for at in np.flatnonzero(values["worker"] == self._worker).tolist():
            key, slot = keys[at], int(values["slot"][at]) - self._first
            if not 0 <= slot < self._maps.sizes.slots:
                continue
            name, width, low = key.tobytes(), 4 if family == 4 else 16, (1 << 64) - 1
            source, group = int.from_bytes(name[:width]), int.from_bytes(name[width : 2 * width])
            last = int(key["port"]) | int(key["vlan"]) << 16 | family << 32 | int(key["ifindex"]) << 40
            yield name, slot, [source >> 64, source & low, group >> 64, group & low, last]

    def limits(self, rates: Mapping[int, tuple[int, int]]) -> None:
        """The rules in these slots have such rates now, in datagrams and in bits a second; 0: no limit."""
        for rule, rate in rates.items():
            if self._rates.get(rule) != rate:
                self._limit(rule, *rate)
        self._rates = dict(rates)

    def _limit(self, rule: int, pps: int, bps: int) -> None:
        limit = self._maps.limits[self._worker, rule]
        for meter, rate, least in ((limit["datagrams"], pps, LEAST[0]), (limit["bytes"], bps / 8, LEAST[1])):
            meter["cost"] = min(round(_SECOND / rate * 65536), _MOST_COST) if rate else 0
            meter["burst"] = round(_SECOND * max(BURST, least / rate)) if rate else 0
            meter["due"] = (time.monotonic_ns() - int(meter["burst"])) & _U64_MOST

    # ---- counts ----------------------------------------------------------------------------

    def collect(self) -> Slots:
        """Add what the kernel counted since to the counters; the slots of the flows that it carried meanwhile."""
        self._broadcasts.refresh()
        if self._slots is None:
            self._slots = np.fromiter(self.installed, np.intp, len(self.installed))
        return self._collect(self._slots)

    def collect_slot(self, slot: int) -> None:
        """The same for one slot."""
        if slot < self._maps.sizes.slots:
            self._collect(np.array([slot]))

    def _collect(self, slots: Slots) -> Slots:
        counters = self._counters
        now = self._counts[:, slots].sum(axis=0, dtype=np.uint64).T
        fresh = now - counters.kernel[:, slots]
        active = (fresh[0] | fresh[2]) != 0
        slots, fresh = slots[active], fresh[:, active]
        counters.kernel[:, slots] += fresh
        counters.flows[:, slots] += fresh[:2]
        counters.dropped[slots] += fresh[2]
        total, limited = fresh[0].sum(dtype=np.uint64), fresh[2].sum(dtype=np.uint64)
        counters.totals[RECEIVED] += total + limited
        counters.drops[RATE_LIMITED] += limited
        counters.totals[MATCHED] += total
        counters.totals[TOTAL_CARRIED] += total
        return slots

    def refused(self) -> list[tuple[Entry, int]]:
        """Entries to which sends failed since the last call, and how many datagrams."""
        used = len(self._entries) and max(self._entries) + 1
        now = self._maps.outputs["errors"][self._output_base : self._output_base + used].copy()
        fresh = now - self._errors[:used]
        self._errors[:used] = now
        return [(self._entries[at], int(fresh[at])) for at in np.flatnonzero(fresh).tolist()]

    # ---- how far the slow path is ----------------------------------------------------------

    @property
    def accepted(self) -> int:
        """Frames that were let into this worker's rings."""
        return self._progress[_ACCEPTED]

    @property
    def behind(self) -> bool:
        """Whether it is not known that all of them were sent on."""
        return self._progress[_DRAINED] != self._progress[_ACCEPTED]

    def rings(self, short: int, long: int) -> None:
        """This worker has, at the least, so many slots in a ring for short frames, and in one for long ones.

        With three quarters of one taken, flows no longer wait; the rest is for those that can't be carried.
        """
        self._progress[_ROOM], self._progress[_ROOM_LONG] = short * 3 // 4, long * 3 // 4

    def sent(self, frames: int, *, long: bool) -> None:
        """They came out of a ring and were sent on, or it was full and they are lost."""
        self._progress[_SENT] += frames
        if long:
            self._progress[_SENT_LONG] += frames

    def drained(self) -> None:
        """The rings were seen empty: say so, if all that was let in has come out.

        Frames on different processors may overtake each other between the filter and the ring, so a count below
        the total says nothing about one frame.
        """
        sent = self._progress[_SENT]
        if sent == self._progress[_ACCEPTED]:
            self._progress[_DRAINED] = sent

    def quiet(self, accepted: int) -> None:
        """The rings have been empty for a while, since `accepted` was read: whatever we counted, all is sent on.

        A worker that ended, or a full ring, leaves a wrong count behind.
        """
        if accepted == self._progress[_ACCEPTED]:
            self._progress[_SENT] = self._progress[_DRAINED] = accepted
            self._progress[_SENT_LONG] = self._progress[_ACCEPTED_LONG]
