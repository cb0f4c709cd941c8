"""The flow table: exact match from what a frame says to where it goes. See docs/decisions/D30.

Owns the table's keys and counts (in the shared counters), the routes' entries, and the slow path that
resolves a miss against the rules. Bounded: when it is full, the flows unused for longest make room.
Called by both paths of one worker; nothing here blocks.
"""

import logging
import secrets
import socket
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.counters import LOOP, NO_OUTPUT, NO_RULE, RATE_LIMITED, RULE_DROP_ROW, Counters, sound_keys
from mrelay.messages import PutRule
from mrelay.model.ruleset import NOWHERE, RETURNED, FlowKey, Route, RuleSet, address_text
from mrelay.worker.books import I32, Books, Lists
from mrelay.worker.egress import Egress, Entry
from mrelay.worker.fastpath import FastPath
from mrelay.worker.limits import MOST, Limits

log = logging.getLogger("mrelay.worker")

FORWARD: Final = -1  # verdicts: this, a drop reason, or:
IGNORE: Final = -2  # no rule names the address: not ours, not counted
LIMITED: Final = -3  # forward, as far as the rates of its rules allow
_LOOP: Final = (
    "%s comes from an address of this host: what the relay sent has come back, and is dropped as loop; "
    "find the bridge or relay that returns it, or set allow_loop = true in the rule if that is meant"
)
_PROBES: Final = 8
_U64: Final = (1 << 64) - 1
_LOW32: Final = (1 << 32) - 1
_LOW, _HALF = np.uint64(_LOW32), np.uint64(32)
_MISS_RATE: Final = 20_000  # resolved misses a second, and as many at once
U64 = NDArray[np.uint64]


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

    def admitted(self, bits: int) -> list[Entry]:
        """The entries that get a frame which the rules of these bits (of Route.limited) pass."""
        masks = self.route.masks
        return [entry for entry, mask in zip(self.entries, masks, strict=True) if not mask or mask & bits]

    def refusing(self, bits: int) -> list[int]:
        """The rules that don't pass it."""
        return [rule for n, rule in enumerate(self.route.limited) if not bits >> min(n, MOST - 1) & 1]

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

    `routes` holds the entry indices of all routes. Of flows with limited rules: `limit_start`, `limit_length` i32
    (the rules, in `limited`), `mask_start` i32 (of all flows: Route.masks, in `masks`), `withheld` bool (no
    destination is free of limits). `beat` is called during long work. `fast` is told of every flow, if there is a
    fast path; `on_refused` of what an interface refused there: flow, entry, datagrams.
    """

    def __init__(
        self, counters: Counters, limit: int, rules: RuleSet, egress: Egress, beat: Callable[[], None]
    ) -> None:
        self.counters, self.limit, self.rules, self.egress, self._beat = counters, limit, rules, egress, beat
        self.index: dict[tuple[int, int, int, int, int, int], int] = {}
        self.flows: list[Flow | None] = [None] * limit
        self.verdict = np.full(limit, NO_RULE, np.int8)
        self.route_start = np.zeros(limit, np.int32)
        self.route_length = np.zeros(limit, np.int32)
        self.limit_start = np.zeros(limit, np.int32)
        self.limit_length = np.zeros(limit, np.int32)
        self.mask_start = np.zeros(limit, np.int32)
        self.withheld = np.zeros(limit, np.bool_)
        self.last = np.zeros(limit, np.int64)
        self.now = 0
        self.fast: FastPath | None = None
        self.on_refused: Callable[[Flow, Entry, int], None] = lambda *_: None
        self._free = array("i", range(limit - 1, -1, -1))  # a list takes ten times the memory
        self._bits = max(10, (4 * limit - 1).bit_length())
        self._slots = np.full(1 << self._bits, -1, np.int32)
        self._mix = [secrets.randbits(63) << 1 | 1 for _ in range(10)]  # so that nobody can aim for collisions
        self._factors = [np.uint64(factor) for factor in self._mix]
        self.kept: list[int] = []
        self._tokens, self._refilled = float(_MISS_RATE), time.monotonic()
        self.limits = Limits()
        self.limits.follow(rules)
        self._books = Books(counters, beat)
        self._reset_routes()

    def _reset_routes(self) -> None:
        if self.fast is not None:
            self._collect()
            self.fast.turn()
        self.egress.forget_entries()
        self._books.reset()
        self.routes, self.limited, self.masks = Lists(np.int32), Lists(np.int32), Lists(np.uint64)

    # ---- lookup ----------------------------------------------------------------------------

    def _hash(self, words: list[U64 | None]) -> NDArray[np.int64]:
        """Where to look first: the sum of the words' 32-bit halves by random factors, stirred.

        Sums of halves, because in XORed products of whole words the top bits of two words cancel out: who
        spoofs sources could aim for collisions without knowing a factor.
        """
        last = words[4]
        assert last is not None  # noqa: S101  the ports: never all zeros
        mixed = last * self._factors[4]
        for at, word in enumerate(words[:4]):
            if word is None:
                continue
            if words[0] is None:  # IPv4: the high half is zero
                mixed += word * self._factors[at]
            else:
                mixed += (word & _LOW) * self._factors[at]
                mixed += (word >> _HALF) * self._factors[at + 5]
        mixed ^= mixed >> np.uint64(29)
        mixed *= self._factors[9]
        mixed >>= np.uint64(64 - self._bits)
        return mixed.view(np.int64)

    def _hash_one(self, words: tuple[int, ...]) -> int:
        """The same for one key, in plain integers: an install needs no arrays."""
        mixed = words[4] * self._mix[4]
        for at in range(4):
            mixed += (words[at] & _LOW32) * self._mix[at] + (words[at] >> 32) * self._mix[at + 5]
        mixed &= _U64
        mixed = (mixed ^ mixed >> 29) * self._mix[9] & _U64
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
            self.restore(self.limit)
            self._make_room()
        slot = self._free.pop()
        self.counters.flows[:, slot] = 0
        self.counters.folded[:, slot] = 0
        self.counters.dropped[slot] = 0
        self._place(slot, key)
        if self.verdict[slot] == LOOP:
            log.warning(_LOOP, self.flows[slot])
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
        self._books.follow(slot, route)
        self.route_start[slot] = self.routes.start(tuple(e.index for e in entries))
        self.route_length[slot] = len(entries)
        self.limit_start[slot] = self.limited.start(route.limited)
        self.limit_length[slot] = len(route.limited)
        self.mask_start[slot] = self.masks.start(route.masks)
        self.withheld[slot] = 0 not in route.masks
        self.verdict[slot] = self._judge(key, route)
        if self.fast is not None:
            self.fast.follow(slot, key, route, entries, forward=self.verdict[slot] in (FORWARD, LIMITED))

    def _judge(self, key: FlowKey, route: Route) -> int:
        if route is NOWHERE:
            return NO_RULE if self.rules.names(key.ifindex, key.family, key.group) else IGNORE
        if route is RETURNED:
            return LOOP
        if not route.destinations:
            return NO_OUTPUT
        return LIMITED if route.limited else FORWARD

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
        if self.fast is not None:
            self.fast.remove(slot, flow.key)
        self._book(slot, flow)
        self._books.leave(slot)
        del self.index[flow.key]
        self.counters.keys[:, slot] = 0
        self.flows[slot], self.verdict[slot], self.route_length[slot] = None, NO_RULE, 0
        self._free.append(slot)

    def _make_room(self) -> None:
        """The sixteenth of the flows that was used longest ago goes."""
        self._collect()  # what the fast path carries is in use
        share = max(1, self.limit // 16)
        gone = np.argpartition(self.last, share - 1)[:share]
        self._slots[np.isin(self._slots, gone)] = -1
        for slot in gone.tolist():
            self._beat()
            flow = self.flows[slot]
            if flow is not None:
                self._empty(slot, flow)

    def inherit(self) -> None:
        """An earlier worker left flows in the shared memory: `restore` is to take them over."""
        if self.fast is not None:
            self.fast.inherit()
        keys = self.counters.keys
        keys[:, ~sound_keys(keys)] = 0
        self.kept = np.flatnonzero(keys[4]).tolist()
        taken = set(self.kept)
        self._free = array("i", (slot for slot in self._free if slot not in taken))

    def restore(self, most: int) -> None:
        """Take over some of the flows in `kept`. Forwarding need not wait: until then they are misses."""
        for _ in range(min(most, len(self.kept))):
            self._beat()
            slot = self.kept.pop()
            key = words_key([int(w) for w in self.counters.keys[:, slot]])
            if key in self.index:
                self._merge(slot, self.index[key])
            else:
                self._place(slot, key)

    def _merge(self, slot: int, into: int) -> None:
        """This kept flow came again, and was installed, before its turn."""
        counters = self.counters
        if self.fast is not None:
            self.fast.move(slot)
        for counts in (counters.flows, counters.folded):
            counts[:, into] += counts[:, slot]
        counters.dropped[into] += counters.dropped[slot]
        counters.keys[:, slot] = 0
        self._free.append(slot)

    def rules_changed(self, touched: Iterable[PutRule]) -> None:
        """Route anew the flows to addresses that `touched` names (old and new forms of what changed)."""
        self.fold()
        self.limits.follow(self.rules)
        if self.fast is not None:
            self.fast.limits(self.limits.rules)
        # By `index`: a look at each of 65,536 slots, of which few are used, takes longer than all else here.
        flows = [(slot, flow) for slot in self.index.values() if (flow := self.flows[slot]) is not None]
        crowded = self.routes.end > 2 * sum(len(flow.entries) for _, flow in flows) + 1024
        if crowded:
            self._reset_routes()
        named = RuleSet()
        for number, rule in enumerate(touched if flows and not crowded else ()):
            named.put(replace(rule, rule=number))  # two forms of a rule have one slot
        for slot, flow in flows:
            key = flow.key
            if crowded or named.names(key.ifindex, key.family, key.group):
                self._beat()
                self._route(slot, key)

    def fold(self) -> None:
        """Bring the rules' and links' counters up to date with the flows'."""
        self._collect()
        self._books.fold()
        for slot in np.flatnonzero(self.counters.dropped[: self._books.end]).tolist():
            self._beat()
            flow = self.flows[slot]
            if flow is not None:
                self._fold_dropped(slot, flow)

    def _collect(self) -> None:
        """Add what the fast path counted."""
        if self.fast is None:
            return
        self.now += 1
        self.last[self.fast.collect()] = self.now
        for entry, lost in self.fast.refused():
            flow = next((flow for flow in self.flows if flow is not None and entry in flow.entries), None)
            if flow is not None:
                self.on_refused(flow, entry, lost)

    def fold_flow(self, flow: Flow) -> tuple[int, int]:
        """The same for one flow; its packets and bytes so far."""
        slot = self.index[flow.key]
        self._book(slot, flow)
        packets, octets = self.counters.flows[:, slot].tolist()
        return packets, octets

    def _book(self, slot: int, flow: Flow) -> None:
        """As the books do it for many: their fixed cost would show where each send fails."""
        counters = self.counters
        fresh = counters.flows[:, slot] - counters.folded[:, slot]
        counters.folded[:, slot] = counters.flows[:, slot]
        for rule in flow.route.rules:
            counters.rules[:2, rule] += fresh
        for link in chain.from_iterable(flow.route.links):
            counters.links[:2, link] += fresh
        if counters.dropped[slot]:
            self._fold_dropped(slot, flow)

    def _fold_dropped(self, slot: int, flow: Flow) -> None:
        """What the flow's rules took and passed nowhere: for want of an output, or for their rates."""
        reason, rules = (NO_OUTPUT, flow.route.rules) if not flow.entries else (RATE_LIMITED, flow.route.limited)
        for rule in rules:
            self.counters.rules[RULE_DROP_ROW[reason], rule] += self.counters.dropped[slot]
        self.counters.dropped[slot] = 0
