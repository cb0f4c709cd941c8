"""Whether the kernel could reach the unicast outputs now: a route, and a neighbour that answers.

Owns a netlink socket that hears of routes and neighbours, open only while there are unicast outputs. An event
only says "look again"; then each output's route is asked for by itself, for a router may have a million. A
storm of events costs a bounded share of a core, since the pause between two looks grows with what a look
takes. Only shown, never acted upon: sends go on, and are what makes the kernel resolve a neighbour. Called by
main and reconcile. Unprivileged; blocks the event loop no longer than parsing an answer takes.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

from pyroute2 import AsyncIPRoute, NetlinkDumpInterrupted, NetlinkError

log = logging.getLogger(__name__)

RTMGRP_NEIGH, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE = 0x4, 0x40, 0x400  # include/uapi/linux/rtnetlink.h
RTM_F_FIB_MATCH = 0x2000  # include/uapi/linux/rtnetlink.h: without it, any IPv4 address would be "on link"
NUD_INCOMPLETE, NUD_FAILED = 0x01, 0x20  # include/uapi/linux/neighbour.h
NUD_ANSWERED = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # REACHABLE STALE DELAY PROBE NOARP PERMANENT
PAUSE: Final = 0.1  # seconds between two looks, at least
SHARE: Final = 20  # and so many times what the last look took: 5 % of a core at most


class Hop(NamedTuple):
    """A unicast address to be reached out of one interface; `noarp`: which has no neighbours."""

    ifindex: int
    address: str
    noarp: bool


Neighbours = Mapping[tuple[int, str], int]  # (ifindex, address) to NUD_ state


class NextHops:
    """`problems` says what is amiss with which; hops that are fine, or not looked at yet, are not in it."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.problems: dict[Hop, str] = {}
        self._on_change = on_change
        self._hops: frozenset[Hop] = frozenset()
        self._changed = asyncio.Event()

    def follow(self, hops: AbstractSet[Hop]) -> None:
        """From now on look at these."""
        if hops != self._hops:
            self._hops = frozenset(hops)
            self.problems = {hop: problem for hop, problem in self.problems.items() if hop in hops}
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
                    await self._follow(events, netlink)

    async def _follow(self, events: socket.socket, netlink: AsyncIPRoute) -> None:
        while self._hops:
            start = time.monotonic()
            _drain(events)
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
            found = {hop: await _problem(netlink, hop, neighbours, hop in before) for hop in hops}
        except NetlinkDumpInterrupted:  # it changed meanwhile
            self._changed.set()
            return
        except (NetlinkError, OSError) as error:
            log.error("cannot look at routes and neighbours: %s; trying again at the next change", error)
            return
        self.problems = {hop: problem for hop, problem in found.items() if problem and hop in self._hops}
        if self.problems != before:
            self._on_change()


def _drain(events: socket.socket) -> None:
    """Whatever they say, also ENOBUFS, means: look."""
    try:
        while events.recv(65536):
            pass
    except BlockingIOError:
        return
    except OSError as error:
        log.debug("netlink: %s", error)


async def _neighbours(netlink: AsyncIPRoute) -> Neighbours:
    found: dict[tuple[int, str], int] = {}
    async for message in await netlink.neigh("dump"):
        found[message["ifindex"], str(message.get("dst"))] = message["state"]
    return found


async def _problem(netlink: AsyncIPRoute, hop: Hop, neighbours: Neighbours, before: bool) -> str:
    """What keeps the kernel from reaching it, empty when nothing is known to."""
    try:
        (route,) = await netlink.route("get", dst=hop.address, oif=hop.ifindex, flags=RTM_F_FIB_MATCH)
    except NetlinkError:
        return judge(hop, None, neighbours, before)
    return judge(hop, route, neighbours, before)


def judge(hop: Hop, route: Mapping[str, Any] | None, neighbours: Neighbours, before: bool) -> str:
    """What the route, if there is one, and its neighbour say. One that is being asked for is as it was `before`.

    Without a route the kernel still sends, as if the address were on the link: right for tunnels, and for a
    neighbour that does answer.
    """
    if hop.noarp:
        return ""
    gateway = str((route and _attribute(route, "RTA_GATEWAY")) or hop.address)
    state = neighbours.get((hop.ifindex, gateway), 0)
    if route is None:
        return "" if state & NUD_ANSWERED else f"no route to {hop.address} through this interface"
    if state & NUD_FAILED or (state & NUD_INCOMPLETE and before):
        via = "" if gateway == hop.address else f", the gateway to {hop.address},"
        return f"no neighbour: {gateway}{via} does not answer"
    return ""


def _attribute(message: Mapping[str, Any], name: str) -> object:
    return dict(message["attrs"]).get(name)
