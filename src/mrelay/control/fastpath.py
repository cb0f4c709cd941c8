"""The kernel's fast path, as control sees it: where each egress socket's datagrams go, and what rules name.

Owns the maps `hops` and `ranges` (bpf/mrelay.h). Called by reconcile (after each pass), main (a next hop changed)
and stats (what became of the flows). What control can't say of a hop, it leaves to the slow path, whose sends make
the kernel find out. Nothing here blocks.
"""

import asyncio
import functools
import ipaddress
import logging
import struct
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mrelay.addresses import address_of
from mrelay.control.links import Link, LinkTable
from mrelay.control.routes import UNSEEN, Hop, Reached
from mrelay.ebpf.carry import NOT_XDP, REASONS, why_not
from mrelay.ebpf.layout import CARRIED, CARRIED_XDP, HOP_READY, HOP_XDP, PASSED, WHY_NOT_XDP
from mrelay.ebpf.maps import Maps, flow_key
from mrelay.messages import OpenEgress, PutRule
from mrelay.model.ruleset import FlowKey, Route

log = logging.getLogger(__name__)

# the engines
XDP: Final = "xdp"
EBPF: Final = "ebpf"
URING: Final = "uring"
ARPHRD_ETHER: Final = 1  # linux/if_arp.h
ARPHRD_NONE: Final = 0xFFFE  # WireGuard, tun: no link-layer header, and no neighbours
TAKE_OVER: Final = 10.0  # seconds in which the workers give all flows of an earlier relay their new outputs
GRACE: Final = 0.001  # seconds: a program that runs has read what it needs of a hop long before
# In place of the groups that an output with `*` keeps: all that counts is which source the kernel would choose.
ANY_GROUP: Final = {4: "239.0.0.1", 6: "ff0e::1"}
_HOP: Final = struct.Struct("=III6s6s16s")  # struct hop, up to `changes`
_FLAGS: Final = struct.Struct("=I")  # its first member
_RANGE: Final = struct.Struct("=III16s")  # struct range_key
_UNREADY: Final = bytes(_HOP.size)


States = dict[bytes, tuple[int, int]]  # by key: `state` and `why` of struct flow


def carries(link: Link) -> bool:
    """Whether the fast path can be at this interface's ingress.

    Not where there is no Ethernet header, and not where a bridge, a bond or a VLAN interface takes frames before
    the slow path's rings would see what was left to them.
    """
    return link.kind == ARPHRD_ETHER and not link.taken


def hop_of(egress: OpenEgress, link: Link | None) -> Hop | None:
    """What must be known of the way to this output; None when nothing must."""
    if link is None:
        return None
    noarp, named = link.noarp or link.loopback, egress.address is None or egress.port is None
    if egress.address is None:
        return Hop(egress.ifindex, ANY_GROUP[egress.family], True, True)
    multicast = is_group(egress.address)
    return Hop(egress.ifindex, egress.address, noarp or multicast, named) if named or not multicast else None


@functools.lru_cache(1 << 16)
def is_group(address: str) -> bool:
    """Whether it is one, asked again and again of the same thousands."""
    return address_of(address).is_multicast


class FastPath:
    """`follow` and `set_ranges` say what is wanted; `run` brings `hops` up to it."""

    def __init__(
        self, maps: Maps, links: LinkTable, reached: Mapping[Hop, Reached | None], *, pinned: bool = False
    ) -> None:
        """`reached` is looked at anew each time. `pinned`: the fast path outlives the relay."""
        self.pinned = pinned
        self._maps, self._links, self._reached = maps, links, reached
        self._egresses: dict[int, OpenEgress] | None = None  # until the first `follow`, what is there stays
        self._ingresses: frozenset[int] = frozenset()
        self._changed, self._writing = asyncio.Event(), asyncio.Lock()
        self._targets: frozenset[int] = frozenset()  # interfaces that take frames from XDP
        self._left: set[int] = set()
        self._hops = maps.hops.data.cast("B")
        self._changes = int(maps.hops["changes"].max())
        self._written: dict[int, bytes] = {}
        self._inherited: dict[int, OpenEgress] = {}  # hops that a control before us wrote
        self._ranges = {bytes(key) for key in maps.ranges.all_keys()}  # a control before us may have left some

    # ---- hops --------------------------------------------------------------------------------

    def left(self, held: Iterable[OpenEgress]) -> AbstractSet[int]:
        """Numbers of hops that flows still use which an earlier relay installed; it grows empty in time.

        `held` are the sockets that are open, from before this control: their hops are good until looked at.
        """
        ready = np.flatnonzero(self._maps.hops["flags"]).tolist()
        self._written |= {n: bytes(self._hop(n)) for n in ready}
        self._inherited = {egress.output: egress for egress in held if egress.output in self._written}
        self._left |= set(ready) - self._inherited.keys()
        if self._left:
            asyncio.get_running_loop().call_later(TAKE_OVER, self._forget_left)
        return self._left

    def _forget_left(self) -> None:
        """By now the workers have pointed those flows elsewhere."""
        self._left.clear()
        self._changed.set()

    async def follow(self, egresses: Iterable[OpenEgress]) -> None:
        """These are open. Returns when `hops` says so: flows that are pointed there then need no slow path."""
        self._egresses = {egress.output: egress for egress in egresses}
        await self._catch_up()

    def set_targets(self, ifindexes: frozenset[int]) -> None:
        """These interfaces take frames from XDP."""
        self._targets = ifindexes
        self._changed.set()

    def look_again(self) -> None:
        """A link or a next hop changed."""
        self._changed.set()

    async def run(self) -> None:
        """Keep `hops` true until cancelled."""
        while True:
            await self._changed.wait()
            await self._catch_up()

    async def _catch_up(self) -> None:
        async with self._writing:
            self._changed.clear()
            if self._egresses is None:
                return
            wanted = {number: self._record(egress) for number, egress in self._egresses.items()}
            wanted |= dict.fromkeys(self._written.keys() - wanted.keys() - self._left, _UNREADY)
            changed = {n: record for n, record in wanted.items() if record != self._written.get(n, _UNREADY)}
            if changed:
                await self._write(changed)

    async def _write(self, changed: dict[int, bytes]) -> None:
        """Each is unready while it changes, so that no frame meets half of one."""
        flags = self._maps.hops["flags"]
        if in_use := list(changed.keys() & self._written.keys()):
            flags[in_use] = 0
            await asyncio.sleep(GRACE)
        self._changes += 1
        for number, record in changed.items():
            self._hop(number)[_FLAGS.size :] = record[_FLAGS.size :]
            self._maps.hops["changes"][number] = self._changes
        ready = [number for number, record in changed.items() if record != _UNREADY]
        for number in ready:
            flags[number] = _FLAGS.unpack_from(changed[number])[0]
        self._written |= {number: changed[number] for number in ready}
        for number in changed.keys() - set(ready):
            self._written.pop(number, None)

    def _hop(self, number: int) -> memoryview:
        at = number * self._maps.hops.itemsize
        return self._hops[at : at + _HOP.size]

    def _record(self, egress: OpenEgress) -> bytes:
        link = self._links.by_name.get(self._links.name(egress.ifindex))
        if link is None or not link.up or link.loopback or link.kind not in (ARPHRD_ETHER, ARPHRD_NONE):
            return _UNREADY
        hop = hop_of(egress, link)
        found = Reached() if hop is None else self._reached.get(hop, UNSEEN)
        if found is UNSEEN and self._inherited.get(egress.output) == egress:
            return self._written.get(egress.output, _UNREADY)
        self._inherited.pop(egress.output, None)
        if found is None or found is UNSEEN:
            return _UNREADY
        if link.kind == ARPHRD_ETHER and not found.mac and hop is not None and not hop.noarp:
            return _UNREADY
        source = ipaddress.ip_address(found.source).packed if found.source else b""
        mtu = min(link.mtu, found.mtu or link.mtu)
        takes_xdp = link.kind == ARPHRD_ETHER and link.ifindex in self._targets
        flags = HOP_READY | (HOP_XDP if takes_xdp else 0)
        return _HOP.pack(flags, link.ifindex, mtu, found.mac, link.mac, source)

    # ---- ranges ------------------------------------------------------------------------------

    def set_ranges(self, rules: Iterable[PutRule], ingresses: Iterable[int]) -> None:
        """The slow path's rings let in what these rules, which the workers have by now, name.

        `ingresses`: the interfaces that the fast path is at.
        """
        self._ingresses = frozenset(ingresses)
        wanted = {_range(rule) for rule in rules}
        for key in wanted - self._ranges:
            self._maps.ranges.update(key, bytes(4))
        for key in self._ranges - wanted:
            self._maps.ranges.delete(key)
        self._ranges = wanted

    # ---- what became of flows ------------------------------------------------------------------

    def states(self) -> States:
        """What became of the last frame of each installed flow. For threads, too."""
        found: States = {}
        for family in (4, 6):
            keys, values = self._maps.all_flows(family)
            pairs = zip(values["state"].tolist(), values["why"].tolist(), strict=True)
            found |= zip((key.tobytes() for key in keys), pairs, strict=True)
        return found

    def worker_states(self) -> dict[int, NDArray[np.int64]]:
        """By worker and slot: `state` of struct flow, -1 where none is installed. For threads, too."""
        sizes = self._maps.sizes
        found = np.full(sizes.flows, -1)
        for family in (4, 6):
            values = self._maps.all_flows(family)[1]
            found[values["slot"]] = values["state"]
        return dict(enumerate(found.reshape(sizes.workers, sizes.slots)))

    def carried(self) -> dict[str, int]:
        """Flows whose last frame it carried, by engine. For threads, too."""
        states = np.concatenate([self._maps.all_flows(family)[1]["state"] for family in (4, 6)])
        engines = {XDP: CARRIED_XDP, EBPF: CARRIED}
        return {engine: int(np.count_nonzero(states == state)) for engine, state in engines.items()}

    def is_at(self, ifindex: int) -> bool:
        """Whether it is at this interface's ingress."""
        return ifindex in self._ingresses

    def passed(self) -> dict[str, int]:
        """Frames that were left to the slow path or the IP stack since the maps were made, by reason."""
        return dict(zip(PASSED, self._maps.passed.sum(axis=0).tolist(), strict=False))


def engine_of(
    key: FlowKey, route: Route, states: States | None, no_xdp: str | None, at_ingress: bool
) -> tuple[str, str]:
    """Which engine carries a flow, and why not the faster one.

    `states` is None where there is no fast path; `no_xdp` says why there is no XDP where it was asked for, or ""
    when there is.
    """
    if states is None:
        return URING, ""
    if not at_ingress:  # what its flows say is from before
        return URING, "no fast path at its interface: no Ethernet, in a bridge or bond, or VLANs on top of it"
    state, why = states.get(flow_key(key), (None, 0))
    if state == CARRIED_XDP:
        return XDP, ""
    if state == CARRIED:
        return EBPF, "" if no_xdp is None else no_xdp or NOT_XDP[WHY_NOT_XDP[why]]
    if state is not None:
        return URING, REASONS[PASSED[state]] if state < len(PASSED) else f"state {state}"
    return URING, why_not(key, route) or "there is no room in the fast path"


def _range(rule: PutRule) -> bytes:
    bits = 32 if rule.family == 4 else 128
    prefix = bits - (rule.group_high - rule.group_low).bit_length()
    return _RANGE.pack(64 + prefix, rule.ifindex, rule.family, rule.group_low.to_bytes(bits // 8))
