"""The flow table: exact match from what a frame says to where it goes. See docs/decisions/D30.

Owns the table's keys and counts (in the shared counters), the routes' entries, and the slow path that
resolves a miss against the rules. Bounded: when it is full, the flows unused for longest make room.
Called by both paths of one worker; nothing here blocks.
"""

import secrets
import socket
import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.counters import NO_OUTPUT, NO_RULE, Counters
from mrelay.model.ruleset import NOWHERE, FlowKey, Route, RuleSet, address_text
from mrelay.worker.egress import Egress, Entry

FORWARD: Final = -1  # verdicts: this, a drop reason, or:
IGNORE: Final = -2  # no rule names the address: not ours, not counted
_PROBES: Final = 8
_U64: Final = (1 << 64) - 1
_MISS_RATE: Final = 20_000  # resolved misses a second, and as many at once
U64 = NDArray[np.uint64]
I32 = NDArray[np.int32]


class Flow:
    """An installed flow. `entries` are its route's, in order; `source` is what source=keep sends from."""

    __slots__ = ("control", "entries", "key", "route", "sockets", "source", "steady", "warned")

    def __init__(self, key: FlowKey, route: Route, entries: tuple[Entry, ...]) -> None:
        self.key, self.route, self.entries = key, route, entries
        self.source = key.source.to_bytes(4 if key.family == 4 else 16)
        self.warned = False
        self.steady: tuple[int, int, int] | None = None
        self.sockets: list[socket.socket] = []
        self.control: list[tuple[int, int, bytes]] = []

    def settle(self, steady: tuple[int, int, int], control: list[tuple[int, int, bytes]]) -> None:
        """Frames of this hop and segment size, while Egress.generation is this, need nothing said but `control`.

        Only when each entry's socket is connected, and sends with the right TTL, TOS and source by itself.
        """
        socks = [e.sock for e in self.entries if e.sock is not None and e.needs_nothing(steady[0])]
        if len(socks) == len(self.entries):
            self.steady, self.sockets, self.control = steady, socks, control

    def __str__(self) -> str:
        source, group = (address_text(self.key.family, a) for a in (self.key.source, self.key.group))
        return f"flow {source} -> {group} port {self.key.port}"


def key_words(key: FlowKey) -> tuple[int, int, int, int, int]:
    """The key as the five words that the table holds (counters.Counters.keys)."""
    last = key.port | key.vlan << 16 | key.family << 32 | key.ifindex << 40
    return key.source >> 64, key.source & _U64, key.group >> 64, key.group & _U64, last


def words_key(words: list[int]) -> FlowKey:
    """The other way round."""
    high, low, group_high, group_low, last = words
    family = last >> 32 & 0xFF
    return FlowKey(
        last >> 40, last >> 16 & 0xFFFF, family, high << 64 | low, group_high << 64 | group_low, last & 0xFFFF
    )


class FlowTable:
    """Flows by slot. Columns, one value a slot: `verdict` i8, `route_start`, `route_length` i32, `last` i64.

    `route_entries` i32: the entry indices of all routes, one after the other.
    """

    def __init__(self, counters: Counters, limit: int, rules: RuleSet, egress: Egress) -> None:
        self.counters, self.limit, self.rules, self.egress = counters, limit, rules, egress
        self.index: dict[tuple[int, int, int, int, int, int], int] = {}
        self.flows: list[Flow | None] = [None] * limit
        self.verdict = np.full(limit, NO_RULE, np.int8)
        self.route_start = np.zeros(limit, np.int32)
        self.route_length = np.zeros(limit, np.int32)
        self.last = np.zeros(limit, np.int64)
        self.now = 0
        self._free = list(range(limit - 1, -1, -1))
        self._bits = max(10, (4 * limit - 1).bit_length())
        self._slots = np.full(1 << self._bits, -1, np.int32)
        self._mix = [secrets.randbits(63) << 1 | 1 for _ in range(5)]  # so that nobody can aim for collisions
        self._tokens, self._refilled = float(_MISS_RATE), time.monotonic()
        self._reset_routes()

    def _reset_routes(self) -> None:
        self.egress.forget_entries()
        self._routes: dict[tuple[int, ...], int] = {}
        self.route_entries = np.zeros(64, np.int32)
        self._route_end = 0

    # ---- lookup ----------------------------------------------------------------------------

    def _hash(self, words: list[U64 | None]) -> NDArray[np.int64]:
        mixed = np.zeros(1, np.uint64)
        for word, factor in zip(words, self._mix, strict=True):
            if word is not None:
                mixed = mixed ^ word * np.uint64(factor)
        mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(self._mix[0])
        return (mixed >> np.uint64(64 - self._bits)).astype(np.int64)

    def _hash_one(self, words: tuple[int, ...]) -> int:
        """The same for one key, in plain integers: an install needs no arrays."""
        mixed = 0
        for word, factor in zip(words, self._mix, strict=True):
            mixed ^= word * factor & _U64
        mixed = (mixed ^ mixed >> 29) * self._mix[0] & _U64
        return mixed >> (64 - self._bits)

    def lookup(self, words: list[U64 | None]) -> I32:
        """Slots, i32[n], of n keys; -1 for a miss. `words` are u64[n]; None stands for a word of zeros."""
        place = self._hash(words)
        found = self._probe(place, words)
        rows = np.flatnonzero(found < 0)
        for step in range(1, _PROBES):
            if not len(rows):
                break
            some = [None if w is None else w[rows] for w in words]
            found[rows] = self._probe(place[rows] + step, some)
            rows = rows[found[rows] < 0]
        return found

    def _probe(self, place: NDArray[np.int64], words: list[U64 | None]) -> I32:
        slots: I32 = self._slots[place & (len(self._slots) - 1)]
        slots[~self.holds(slots, words)] = -1
        return slots

    def holds(self, slots: I32, words: list[U64 | None]) -> NDArray[np.bool_]:
        """Whether each slot (-1: none) is the flow of its key, as for `lookup`."""
        same: NDArray[np.bool_] = slots >= 0
        for row, word in zip(self.counters.keys, words, strict=True):
            if word is not None:  # the last word tells IPv4 from IPv6, so zeros need no look
                same &= row[slots] == word
        return same

    # ---- misses ----------------------------------------------------------------------------

    def find(self, key: tuple[int, int, int, int, int, int]) -> int:
        """The slot of a flow, installed now if need be; -1 when misses come faster than they may."""
        slot = self.index.get(key)
        if slot is not None:
            return slot
        if not self._may_miss():
            return -1
        return self._install(FlowKey(*key))

    def _may_miss(self) -> bool:
        now = time.monotonic()
        self._tokens = min(_MISS_RATE, self._tokens + (now - self._refilled) * _MISS_RATE)
        self._refilled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _install(self, key: FlowKey) -> int:
        if not self._free:
            self._make_room()
        slot = self._free.pop()
        self.counters.flows[:, slot] = 0
        self.counters.folded[:, slot] = 0
        self._place(slot, key)
        return slot

    def _place(self, slot: int, key: FlowKey) -> None:
        words = key_words(key)
        self.counters.keys[:, slot] = words
        self._slots[self._room_near(self._hash_one(words))] = slot
        self.index[key] = slot
        self.last[slot] = self.now
        self._route(slot, key)

    def _near(self, place: int) -> list[int]:
        return [(place + step) & (len(self._slots) - 1) for step in range(_PROBES)]

    def _room_near(self, place: int) -> int:
        near = self._near(place)
        for at in near:
            if self._slots[at] < 0:
                return at
        self.remove(int(self._slots[near[0]]))
        return near[0]

    def _route(self, slot: int, key: FlowKey) -> None:
        route = self.rules.resolve(key)
        entries = tuple(self.egress.entry(to) for to in route.destinations)
        self.flows[slot] = Flow(key, route, entries)
        self.route_start[slot] = self._route_of(tuple(e.index for e in entries))
        self.route_length[slot] = len(entries)
        self.verdict[slot] = self._judge(key, route)

    def _judge(self, key: FlowKey, route: Route) -> int:
        if route is NOWHERE:
            return NO_RULE if self.rules.names(key.ifindex, key.family, key.group) else IGNORE
        return FORWARD if route.destinations else NO_OUTPUT

    def _route_of(self, entries: tuple[int, ...]) -> int:
        """Where in `route_entries` these entries stand; equal routes stand there once."""
        start = self._routes.get(entries)
        if start is None:
            start, self._route_end = self._route_end, self._route_end + len(entries)
            if self._route_end > len(self.route_entries):
                grown = np.zeros(2 * self._route_end, np.int32)
                grown[:start] = self.route_entries[:start]
                self.route_entries = grown
            self.route_entries[start : self._route_end] = entries
            self._routes[entries] = start
        return start

    # ---- removal, change, counting ---------------------------------------------------------

    def remove(self, slot: int) -> None:
        """Take a flow out; what it counted stays with its rules."""
        flow = self.flows[slot]
        if flow is not None:
            for at in self._near(self._hash_one(key_words(flow.key))):
                if self._slots[at] == slot:
                    self._slots[at] = -1
            self._empty(slot, flow)

    def _empty(self, slot: int, flow: Flow) -> None:
        self._fold_flow(slot, flow)
        del self.index[flow.key]
        self.counters.keys[:, slot] = 0
        self.flows[slot], self.verdict[slot], self.route_length[slot] = None, NO_RULE, 0
        self._free.append(slot)

    def _make_room(self) -> None:
        """The sixteenth of the flows that was used longest ago goes."""
        share = max(1, self.limit // 16)
        gone = np.argpartition(self.last, share - 1)[:share]
        self._slots[np.isin(self._slots, gone)] = -1
        for slot in gone.tolist():
            flow = self.flows[slot]
            if flow is not None:
                self._empty(slot, flow)

    def restore(self) -> None:
        """Take over the flows that an earlier worker left in the shared memory."""
        kept = np.flatnonzero(self.counters.keys[4])
        taken = set(kept.tolist())
        self._free = [slot for slot in self._free if slot not in taken]
        for slot in kept.tolist():
            self._place(slot, words_key([int(w) for w in self.counters.keys[:, slot]]))

    def rules_changed(self, touched: RuleSet) -> None:
        """Route anew the flows to addresses that `touched` names (old and new forms of what changed)."""
        self.fold()
        flows = [(slot, flow) for slot, flow in enumerate(self.flows) if flow is not None]
        if self._route_end > 2 * sum(len(flow.entries) for _, flow in flows) + 1024:
            self._reset_routes()
            touched = self.rules
        for slot, flow in flows:
            key = flow.key
            if touched is self.rules or touched.names(key.ifindex, key.family, key.group):
                self._route(slot, key)

    def fold(self) -> None:
        """Bring the rules' and links' counters up to date with the flows'."""
        counters = self.counters
        dirty = np.flatnonzero((counters.flows != counters.folded).any(axis=0))
        for slot in dirty.tolist():
            flow = self.flows[slot]
            if flow is not None:
                self._fold_flow(slot, flow)

    def fold_flow(self, flow: Flow) -> None:
        """The same for one flow."""
        self._fold_flow(self.index[flow.key], flow)

    def _fold_flow(self, slot: int, flow: Flow) -> None:
        counters = self.counters
        fresh = counters.flows[:, slot] - counters.folded[:, slot]
        counters.folded[:, slot] = counters.flows[:, slot]
        for rule in flow.route.rules:
            counters.rules[:, rule] += fresh
        for links in flow.route.links:
            for link in links:
                counters.links[:2, link] += fresh
