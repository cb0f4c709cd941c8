"""The network interfaces of this host, as the kernel has them now.

Owns a netlink socket that hears of changes, and the table of links. A change only says that something
changed: the table is always a whole dump, so a lost event (ENOBUFS) needs no case of its own. Called by
main and reconcile. Unprivileged; nothing blocks the event loop longer than parsing a dump takes.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from pyroute2 import AsyncIPRoute, NetlinkDumpInterrupted, NetlinkError

from mrelay.messages import OpenEgress

log = logging.getLogger(__name__)

IFF_UP, IFF_LOOPBACK, IFF_NOARP = 0x1, 0x8, 0x80  # include/uapi/linux/if.h
RTM_DELLINK = 17  # include/uapi/linux/rtnetlink.h
RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x1, 0x10, 0x100  # include/uapi/linux/rtnetlink.h
IFA_F_DADFAILED, IFA_F_TENTATIVE = 0x08, 0x40  # include/uapi/linux/if_addr.h
FAMILIES = (socket.AF_INET, socket.AF_INET6)  # a dump has the addresses of others, such as AF_MCTP, too
IPV4_LINK_LOCAL = "169.254."  # RFC 3927
_LINK_MESSAGE = struct.Struct("=IH10xB3xi")  # length, type, …, family, …, ifindex
SETTLE = 0.02  # seconds; changes come in bursts, one dump serves them all
RETRY = 1.0  # seconds after a dump that failed


@dataclass(frozen=True, slots=True)
class Link:
    """An interface; `ipv4` and `ipv6` are the addresses that the kernel may choose as a source."""

    name: str
    ifindex: int
    up: bool
    ipv4: frozenset[str] = frozenset()
    ipv6: frozenset[str] = frozenset()
    loopback: bool = False
    noarp: bool = False  # a tunnel or the like, where there are no neighbours to be found
    kind: int = 0  # ARPHRD_*
    mtu: int = 0
    mac: bytes = b""
    taken: bool = False  # its frames go to another interface before they get to the IP stack


class LinkTable:
    """The links by name, and how often each one's addresses have changed."""

    def __init__(self, held: Iterable[OpenEgress] = ()) -> None:
        self.by_name: dict[str, Link] = {}
        self._names: dict[int, str] = {}
        self._replaced: set[int] = set()
        # by ifindex and family
        self._addresses: dict[tuple[int, int], frozenset[str]] = {}
        self._epochs: dict[tuple[int, int], int] = {}
        for egress in held:  # from before control's restart: what is open must stay as it is named
            key = egress.ifindex, egress.family
            self._epochs[key] = max(egress.epoch, self._epochs.get(key, 0))

    def update(self, links: Iterable[Link], gone: AbstractSet[int] = frozenset()) -> bool:
        """Take a whole dump; whether anything is different. `gone`: numbers of links that went meanwhile."""
        before = self.by_name
        self.by_name = {link.name: link for link in links}
        self._names = {link.ifindex: link.name for link in self.by_name.values()}
        for link in self.by_name.values():
            if link.up:  # one that is down loses IPv6 addresses, only to get them back
                self._count(link.ifindex, 4, link.ipv4)
                self._count(link.ifindex, 6, link.ipv6)
        for counts in self._addresses, self._epochs:
            for key in [key for key in counts if key[0] not in self._names]:
                del counts[key]
        self._replaced |= gone & self._names.keys()
        return before != self.by_name or bool(gone & self._names.keys())

    def take_replaced(self) -> set[int]:
        """Numbers that another link has now: what was open on the old one is dead. Each is told once."""
        replaced, self._replaced = self._replaced, set()
        return replaced

    def _count(self, ifindex: int, family: int, addresses: frozenset[str]) -> None:
        key = ifindex, family
        if self._addresses.setdefault(key, addresses) != addresses:
            self._addresses[key] = addresses
            self._epochs[key] = self._epochs.get(key, 0) + 1

    def epoch(self, ifindex: int, family: int) -> int:
        """How often the link's addresses of this family changed since they were first seen."""
        return self._epochs.get((ifindex, family), 0)

    def numbers(self) -> set[int]:
        """Of all links."""
        return set(self._names)

    def name(self, ifindex: int) -> str:
        """The link's name, or its number once it is gone."""
        return self._names.get(ifindex, str(ifindex))


class LinkWatcher:
    """Keeps a LinkTable true; `on_change` is called after each change."""

    def __init__(self, table: LinkTable, on_change: Callable[[], None]) -> None:
        self._table, self._on_change = table, on_change
        self._changed = asyncio.Event()
        self._gone: set[int] = set()

    async def run(self, ready: asyncio.Event) -> None:
        """Watch until cancelled; `ready` is set when the table is filled for the first time."""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as events:
            events.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
            loop = asyncio.get_running_loop()
            loop.add_reader(events, self._drain, events)
            try:
                await self._follow(ready)
            finally:
                loop.remove_reader(events)

    async def _follow(self, ready: asyncio.Event) -> None:
        async with AsyncIPRoute(groups=0) as netlink:
            while True:
                self._changed.clear()
                gone, self._gone = self._gone, set()
                try:
                    links = await dump(netlink)
                except NetlinkDumpInterrupted:  # it changed meanwhile
                    self._gone |= gone
                    continue
                except (NetlinkError, OSError) as error:
                    self._gone |= gone
                    log.error("cannot list the interfaces: %s; trying again", error)
                    await asyncio.sleep(RETRY)
                    continue
                if self._table.update(links, gone):
                    self._on_change()
                ready.set()
                await self._changed.wait()
                await asyncio.sleep(SETTLE)

    def _drain(self, events: socket.socket) -> None:
        """Whatever it says, also ENOBUFS, means: look again. Which links went, a look afterwards may not show."""
        self._changed.set()
        try:
            while data := events.recv(65536):
                self._gone |= deleted(data)
        except BlockingIOError:
            return
        except OSError as error:
            log.info("netlink: %s; looking at all interfaces again", error)


def deleted(data: bytes) -> set[int]:
    """Numbers of the links that these netlink messages say are gone (struct nlmsghdr, struct ifinfomsg)."""
    found: set[int] = set()
    while len(data) >= _LINK_MESSAGE.size:
        length, kind, family, ifindex = _LINK_MESSAGE.unpack_from(data)
        if kind == RTM_DELLINK and family == socket.AF_UNSPEC:  # of AF_BRIDGE: a port left its bridge
            found.add(ifindex)
        data = data[max(-(-length // 4) * 4, _LINK_MESSAGE.size) :]
    return found


async def dump(netlink: AsyncIPRoute) -> list[Link]:
    """All interfaces with their usable addresses."""
    found: dict[tuple[int, int], set[str]] = {}
    links = [message async for message in await netlink.get_links()]
    async for message in await netlink.get_addr():
        address = message.get("local") or message.get("address")
        flags = message.get("flags") or 0
        if flags & (IFA_F_DADFAILED | IFA_F_TENTATIVE) or message["family"] not in FAMILIES:
            continue
        if address and not address.startswith(IPV4_LINK_LOCAL):
            found.setdefault((message["index"], message["family"]), set()).add(address)
    parents = {message.get("link") for message in links if _is_vlan(message)}
    return [
        Link(
            name=message.get("ifname"),
            ifindex=message["index"],
            up=bool(message["flags"] & IFF_UP),
            ipv4=frozenset(found.get((message["index"], socket.AF_INET), ())),
            ipv6=frozenset(found.get((message["index"], socket.AF_INET6), ())),
            loopback=bool(message["flags"] & IFF_LOOPBACK),
            noarp=bool(message["flags"] & IFF_NOARP),
            kind=message["ifi_type"],
            mtu=message.get("mtu") or 0,
            mac=_mac(message.get("address")),
            taken=bool(message.get("master")) or message["index"] in parents,
        )
        for message in links
    ]


def _is_vlan(message: Any) -> bool:
    return (message.get("linkinfo") or {}).get("kind") == "vlan"


def _mac(text: str | None) -> bytes:
    """Empty for a link without one of six bytes."""
    mac = bytes.fromhex((text or "").replace(":", ""))
    return mac if len(mac) == 6 else b""
