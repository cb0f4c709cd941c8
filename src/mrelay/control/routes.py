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
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

from pyroute2 import AsyncIPRoute, NetlinkDumpInterrupted, NetlinkError

from mrelay.kernel import rtnetlink
from mrelay.kernel.rtnetlink import RTM_DELNEIGH, RTM_DELROUTE, RTM_NEWNEIGH, RTM_NEWROUTE, Neighbour, Route

log = logging.getLogger(__name__)

RTMGRP_NEIGH, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE = 0x4, 0x40, 0x400  # include/uapi/linux/rtnetlink.h
NUD_INCOMPLETE, NUD_STALE, NUD_FAILED = 0x01, 0x04, 0x20  # include/uapi/linux/neighbour.h
NUD_ANSWERED = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # REACHABLE STALE DELAY PROBE NOARP PERMANENT
PAUSE: Final = 0.1  # seconds between two looks, at least
SHARE: Final = 20  # and so many times what the last look took: 5 % of a core at most
AT_ONCE: Final = 100  # routes asked for before others get their turn


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
Neighbours = Mapping[tuple[int, str], Neighbour]  # by (ifindex, address)
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
        self._routes: dict[Hop, tuple[Route | None, str]] = {}  # and the source if it is `named`
        self._neighbours: dict[tuple[int, str], Neighbour] | None = None  # None: to be asked for
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
        self._neighbours = None
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
                    self._neighbours = None
                    await self._follow(events, netlink)

    async def _follow(self, events: socket.socket, netlink: AsyncIPRoute) -> None:
        while self._hops:
            start = time.monotonic()
            self._take(events)
            self._changed.clear()
            await self._look(netlink)
            await asyncio.sleep(max(PAUSE, SHARE * (time.monotonic() - start)))
            await self._woken(events)

    def _take(self, events: socket.socket) -> None:
        """Read what waits. Neighbours are as their messages say; after a change of routes, all are asked for."""
        try:
            while data := events.recv(65536):
                for kind, body in rtnetlink.messages(data):
                    self._take_one(kind, body)
        except BlockingIOError:
            return
        except OSError as error:  # ENOBUFS: something was missed
            log.debug("netlink: %s", error)
            self.look_again()

    def _take_one(self, kind: int, body: bytes) -> None:
        if kind in (RTM_NEWROUTE, RTM_DELROUTE):
            self._routes.clear()
        elif self._neighbours is not None and kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
            who, neighbour = rtnetlink.read_neighbour(body)
            self._neighbours[who] = neighbour if kind == RTM_NEWNEIGH else UNKNOWN

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
            if self._neighbours is None:
                self._neighbours = await _neighbours(netlink)
            await self._ask_routes(hops - self._routes.keys())
        except NetlinkDumpInterrupted:  # it changed meanwhile
            self._changed.set()
            return
        except (NetlinkError, OSError) as error:
            log.error("cannot look at routes and neighbours: %s; trying again at the next change", error)
            return
        neighbours = self._neighbours
        for hop in self._routes.keys() - self._hops:
            del self._routes[hop]
        found = {hop: judge(hop, route, neighbours, hop in before) for hop, (route, _) in self._routes.items()}
        self.problems = {hop: problem for hop, problem in found.items() if problem}
        reached = {hop: self._reach(hop, neighbours) for hop in self._routes}
        if (self.problems, self.reached) != (before, reached):
            self.reached.clear()  # others hold this very dict
            self.reached.update(reached)
            self._on_change()

    async def _ask_routes(self, hops: AbstractSet[Hop]) -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as sock:
            for number, hop in enumerate(hops):
                if number % AT_ONCE == AT_ONCE - 1:
                    await asyncio.sleep(0)
                route = rtnetlink.get_route(sock, hop.address, hop.ifindex, match=True)
                used = rtnetlink.get_route(sock, hop.address, hop.ifindex, match=False) if hop.named else None
                self._routes[hop] = route, used.source if used else ""

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
        return Reached(neighbour.mac, source, route.mtu)


async def _neighbours(netlink: AsyncIPRoute) -> dict[tuple[int, str], Neighbour]:
    found: dict[tuple[int, str], Neighbour] = {}
    async for message in await netlink.neigh("dump"):
        mac = bytes.fromhex((message.get("lladdr") or "").replace(":", ""))
        found[message["ifindex"], str(message.get("dst"))] = Neighbour(message["state"], mac)
    return found


def _gateway(hop: Hop, route: Route | None) -> str:
    return (route and route.gateway) or hop.address


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
