"""Whether the kernel could reach the unicast outputs now, and how: a route, and a neighbour that answers.

Owns a netlink socket that hears of routes and neighbours, open only while there are such outputs. An event
only says "look again"; when a route changed, each output's is asked for by itself, for a router may have a
million. A storm of events costs a bounded share of a core, since the pause between two looks grows with what a
look takes. `problems` are only shown: sends of the slow path go on, and are what makes the kernel resolve a
neighbour. `reached` is where the fast path sends. Called by main and reconcile. Unprivileged; blocks the event
loop no longer than parsing an answer takes.
"""

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

from pyroute2 import AsyncIPRoute, NetlinkDumpInterrupted, NetlinkError

log = logging.getLogger(__name__)

RTMGRP_NEIGH, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE = 0x4, 0x40, 0x400  # include/uapi/linux/rtnetlink.h
RTM_F_FIB_MATCH = 0x2000  # include/uapi/linux/rtnetlink.h: without it, any IPv4 address would be "on link"
NUD_INCOMPLETE, NUD_STALE, NUD_FAILED = 0x01, 0x04, 0x20  # include/uapi/linux/neighbour.h
RTM_NEWROUTE, RTM_DELROUTE = 24, 25  # include/uapi/linux/rtnetlink.h
NUD_ANSWERED = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # REACHABLE STALE DELAY PROBE NOARP PERMANENT
PAUSE: Final = 0.1  # seconds between two looks, at least
_MESSAGE: Final = struct.Struct("=IH10x")  # struct nlmsghdr
SHARE: Final = 20  # and so many times what the last look took: 5 % of a core at most


class Hop(NamedTuple):
    """An address to be reached out of one interface. `noarp`: without a neighbour.

    `named`: its socket is not connected, so the source address that the kernel would choose is to be found out.
    """

    ifindex: int
    address: str
    noarp: bool
    named: bool = False


class Reached(NamedTuple):
    """How a hop is reached: the neighbour's link-layer address (empty: unknown, or there is none), the source
    address (for a `named` hop), the route's MTU (0: the link's)."""

    mac: bytes = b""
    source: str = ""
    mtu: int = 0


UNSEEN: Final = Reached(b"?")  # in place of a hop that was not looked at yet


class Neighbour(NamedTuple):
    """Its NUD_ state and link-layer address."""

    state: int
    mac: bytes


Neighbours = Mapping[tuple[int, str], Neighbour]  # by (ifindex, address)
Route = Mapping[str, Any]
UNKNOWN: Final = Neighbour(0, b"")


class NextHops:
    """`problems` says what is amiss with which; hops that are fine, or not looked at yet, are not in it.

    `reached` has each hop that was looked at: how datagrams get there without the kernel's help, None if they
    can't. `on_stale` is told of each
    neighbour (ifindex, address) on the way to one that has not been heard of for a while.
    """

    def __init__(
        self, on_change: Callable[[], None], on_stale: Callable[[int, str], None] = lambda *_: None
    ) -> None:
        self.problems: dict[Hop, str] = {}
        self.reached: dict[Hop, Reached | None] = {}
        self._on_change, self._on_stale = on_change, on_stale
        self._hops: frozenset[Hop] = frozenset()
        self._routes: dict[Hop, tuple[Route | None, str]] = {}  # the route, and the source if it is `named`
        self._changed = asyncio.Event()

    def follow(self, hops: AbstractSet[Hop]) -> None:
        """From now on look at these."""
        if hops != self._hops:
            self._hops = frozenset(hops)
            self.problems = {hop: problem for hop, problem in self.problems.items() if hop in hops}
            for hop in self.reached.keys() - hops:
                del self.reached[hop]
            self._changed.set()

    def look_again(self) -> None:
        """Links changed, and routes with them: not every kernel tells of these."""
        self._routes.clear()
        self._changed.set()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            while not self._hops:
                await self._changed.wait()
                self._changed.clear()
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as events:
                events.bind((0, RTMGRP_NEIGH | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE))
                async with AsyncIPRoute(groups=0) as netlink:
                    self._routes.clear()
                    await self._follow(events, netlink)

    async def _follow(self, events: socket.socket, netlink: AsyncIPRoute) -> None:
        while self._hops:
            start = time.monotonic()
            if _routes_changed(events):
                self._routes.clear()
            self._changed.clear()
            await self._look(netlink)
            await asyncio.sleep(max(PAUSE, SHARE * (time.monotonic() - start)))
            await self._woken(events)

    async def _woken(self, events: socket.socket) -> None:
        """Until an event comes, or other hops are asked for."""
        loop = asyncio.get_running_loop()
        loop.add_reader(events, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            loop.remove_reader(events)

    async def _look(self, netlink: AsyncIPRoute) -> None:
        before, hops = self.problems, self._hops
        try:
            neighbours = await _neighbours(netlink)
            for hop in hops - self._routes.keys():
                self._routes[hop] = await _route(netlink, hop), await _source(netlink, hop)
        except NetlinkDumpInterrupted:  # it changed meanwhile
            self._changed.set()
            return
        except (NetlinkError, OSError) as error:
            log.error("cannot look at routes and neighbours: %s; trying again at the next change", error)
            return
        for hop in self._routes.keys() - self._hops:
            del self._routes[hop]
        found = {hop: judge(hop, route, neighbours, hop in before) for hop, (route, _) in self._routes.items()}
        self.problems = {hop: problem for hop, problem in found.items() if problem}
        reached = {hop: self._reach(hop, neighbours) for hop in self._routes}
        if (self.problems, self.reached) != (before, reached):
            self.reached.clear()  # others hold this very dict
            self.reached.update(reached)
            self._on_change()

    def _reach(self, hop: Hop, neighbours: Neighbours) -> Reached | None:
        route, source = self._routes[hop]
        if hop.named and not source:
            return None
        if hop.noarp:
            return Reached(source=source)
        if route is None:
            return None
        gateway = _gateway(hop, route)
        neighbour = neighbours.get((hop.ifindex, gateway), UNKNOWN)
        if not neighbour.state & NUD_ANSWERED or len(neighbour.mac) != 6:
            return None
        if neighbour.state & NUD_STALE:
            self._on_stale(hop.ifindex, gateway)
        metrics = _attribute(route, "RTA_METRICS")
        mtu = _attribute(metrics, "RTAX_MTU") if isinstance(metrics, Mapping) else None
        return Reached(neighbour.mac, source, int(str(mtu or 0)))


def _routes_changed(events: socket.socket) -> bool:
    """Read what waits, which only says "look"; whether more than neighbours changed, or something was missed."""
    found = False
    try:
        while data := events.recv(65536):
            found |= any(kind in (RTM_NEWROUTE, RTM_DELROUTE) for kind in _kinds(data))
    except BlockingIOError:
        return found
    except OSError as error:
        log.debug("netlink: %s", error)
    return True


def _kinds(data: bytes) -> Iterator[int]:
    """The types of netlink messages (struct nlmsghdr)."""
    while len(data) >= _MESSAGE.size:
        length, kind = _MESSAGE.unpack_from(data)
        yield kind
        data = data[max(-(-length // 4) * 4, _MESSAGE.size) :]


async def _neighbours(netlink: AsyncIPRoute) -> Neighbours:
    found: dict[tuple[int, str], Neighbour] = {}
    async for message in await netlink.neigh("dump"):
        mac = bytes.fromhex((message.get("lladdr") or "").replace(":", ""))
        found[message["ifindex"], str(message.get("dst"))] = Neighbour(message["state"], mac)
    return found


async def _route(netlink: AsyncIPRoute, hop: Hop) -> Route | None:
    """The route that a datagram to it would take out of this interface, None when there is none."""
    try:
        (route,) = await netlink.route("get", dst=hop.address, oif=hop.ifindex, flags=RTM_F_FIB_MATCH)
    except NetlinkError:
        return None
    return dict(route)


async def _source(netlink: AsyncIPRoute, hop: Hop) -> str:
    """The source address that it would have, for a `named` hop; empty when the kernel finds none."""
    if not hop.named:
        return ""
    try:
        (route,) = await netlink.route("get", dst=hop.address, oif=hop.ifindex)
    except NetlinkError:
        return ""
    return str(_attribute(route, "RTA_PREFSRC") or "")


def _gateway(hop: Hop, route: Route | None) -> str:
    return str((route and _attribute(route, "RTA_GATEWAY")) or hop.address)


def judge(hop: Hop, route: Route | None, neighbours: Neighbours, before: bool) -> str:
    """What the route, if there is one, and its neighbour say. One that is being asked for is as it was `before`.

    Without a route the kernel still sends, as if the address were on the link: right for tunnels, and for a
    neighbour that does answer.
    """
    if hop.noarp:
        return ""
    gateway = _gateway(hop, route)
    state = neighbours.get((hop.ifindex, gateway), UNKNOWN).state
    if route is None:
        return "" if state & NUD_ANSWERED else f"no route to {hop.address} through this interface"
    if state & NUD_FAILED or (state & NUD_INCOMPLETE and before):
        via = "" if gateway == hop.address else f", the gateway to {hop.address},"
        return f"no neighbour: {gateway}{via} does not answer"
    return ""


def _attribute(message: Mapping[str, Any], name: str) -> object:
    return dict(message["attrs"]).get(name)
