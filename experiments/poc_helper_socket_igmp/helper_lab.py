"""The network of this experiment: one source, one relay, and the links between them.

Owns the namespaces. Each link lets multicast through by another rule, so that what a membership is good for
can be told apart:

    wire      source w0 ─── wire0 relay            a plain veth pair: everything arrives
    nic       source n0 ─── low0, nic0 relay       nic0 is a macvlan: a MAC filter of 256 hash bits, set from
                                                   the interface's multicast list as a NIC's is
    snooping  source s0 ─── br0 ─── snoop0 relay   br0 is a bridge in a namespace of its own: IGMP and MLD
                                                   snooping, a querier, immediate leave
    second    source t0 ─── second0 relay          another plain pair, to compare two ways to receive
"""

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Self

from helper_wire import Reports
from pyroute2 import IPRoute

from mrelay.demo.topology import End, Namespace, connect

LIMIT: Final = 3.0  # seconds to wait for an event before it counts as missing
PORT, MARKER_PORT = 5000, 5001
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1  # linux/socket.h, linux/netlink.h
RTNLGRP_MDB: Final = 26  # linux/rtnetlink.h
RTM_NEWMDB, RTM_DELMDB = 84, 85  # linux/rtnetlink.h
IFA_F_NODAD: Final = 0x02  # linux/if_addr.h
IPV6_MULTICAST_IF, IPV6_MULTICAST_HOPS = 17, 18  # linux/in6.h


class Link(NamedTuple):
    """One way from the source to the relay. Addresses: the source's two, which may both send."""

    name: str
    peer: Namespace  # where the other end of the relay's cable is, and its interface
    cable: str
    sender: str  # the source's interface
    receiver: str  # the relay's
    net: int  # 10.77.net.0/24 and fd77:net::/64

    def source(self, version: int, host: int = 1) -> str:
        """The source's address `host` (1 or 2), the relay's (3)."""
        return f"10.77.{self.net}.{host}" if version == 4 else f"fd77:{self.net}::{host}"


class Lab:
    """All of it. A context manager."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as on_failure:
            self.source, self.switch, self.relay = (on_failure.enter_context(_namespace()) for _ in range(3))
            self.wire = Link("veth", self.source, "w0", "w0", "wire0", 1)
            self.nic = Link("MAC filter", self.source, "n0", "n0", "nic0", 2)
            self.snooping = Link("snooping", self.switch, "p1", "s0", "snoop0", 3)
            self.second = Link("second veth", self.source, "t0", "t0", "second0", 5)
            self._connect()
            self.bridge = on_failure.enter_context(Bridge(self.switch, ("p0", "p1")))
            self._stack = on_failure.pop_all()

    @property
    def links(self) -> tuple[Link, Link, Link]:
        """The three that differ in what they let through."""
        return self.wire, self.nic, self.snooping

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _connect(self) -> None:
        connect(End(self.source, "w0", "10.77.1.1"), End(self.relay, "wire0", "10.77.1.3"))
        connect(End(self.source, "n0", "10.77.2.1"), End(self.relay, "low0", "10.88.2.3"))
        connect(End(self.source, "s0", "10.77.3.1"), End(self.switch, "p0", "10.88.3.1"))
        connect(End(self.relay, "snoop0", "10.77.3.3"), End(self.switch, "p1", "10.88.3.3"))
        connect(End(self.source, "t0", "10.77.5.1"), End(self.relay, "second0", "10.77.5.3"))
        with self.relay.inside(), IPRoute() as ip:
            (lower,) = ip.link_lookup(ifname="low0")
            ip.link("add", ifname="nic0", kind="macvlan", macvlan_mode="bridge", link=lower)
        self.relay.bring_up("nic0", "10.77.2.3")
        for link in (*self.links, self.second):
            address(self.source, link.sender, link.source(4, 2))
            for host in (1, 2):
                address(self.source, link.sender, link.source(6, host))
            address(self.relay, link.receiver, link.source(6, 3))

    def reports(self, link: Link) -> Reports:
        """What the other end of the relay's cable hears of its memberships."""
        with link.peer.inside():
            return Reports(link.cable)


def _namespace() -> Namespace:
    made = Namespace()
    made.sysctl("ipv6/conf/default/accept_dad", 0)  # or addresses would be tentative for a second
    made.bring_up("lo")
    return made


def address(namespace: Namespace, interface: str, text: str) -> None:
    """Give `interface` one more address."""
    prefix: dict[str, Any] = {"prefixlen": 64, "flags": IFA_F_NODAD} if ":" in text else {"prefixlen": 24}
    with namespace.inside(), IPRoute() as ip:
        ip.addr("add", index=socket.if_nametoindex(interface), address=text, **prefix)


class Bridge:
    """A snooping switch with its own querier; `await_group` follows its table of groups."""

    def __init__(self, namespace: Namespace, ports: tuple[str, str]) -> None:
        self._namespace = namespace
        with namespace.inside(), IPRoute() as ip:
            ip.link("add", ifname="br0", kind="bridge")
            self._index = socket.if_nametoindex("br0")
            # A querier's bridge floods until the response interval is over: 8 ms, not the default 10 s.
            self._set(ip, br_mcast_query_response_intvl=1)
            # The first query may come before the bridge's IPv6 address is usable; the next one not 31 s later.
            self._set(ip, br_mcast_startup_query_intvl=100, br_mcast_startup_query_cnt=20)
            self._set(ip, br_mcast_igmp_version=3, br_mcast_mld_version=2, br_mcast_querier=1)
            for port in ports:
                ip.link("set", index=socket.if_nametoindex(port), master=self._index)
                ip.brport("set", index=socket.if_nametoindex(port), fast_leave=1)
            ip.link("set", index=self._index, state="up")
            self._events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
            self._events.bind((0, 0))
            self._events.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_MDB)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()

    def _set(self, ip: IPRoute, **options: int) -> None:
        for name, value in options.items():  # one a request: the kernel applies them in an order of its own
            ip.link("set", index=self._index, kind="bridge", **{name: value})

    def snooping(self, on: bool) -> None:
        with self._namespace.inside(), IPRoute() as ip:
            self._set(ip, br_mcast_snooping=int(on))

    def await_group(self, group: bytes, *, joined: bool, seconds: float = LIMIT) -> bool:
        """Whether the bridge now enters (or removes) a port for `group`, by its own notice."""
        wanted = RTM_NEWMDB if joined else RTM_DELMDB
        return any(kind == wanted and group in body for kind, body in self._notices(seconds))

    def _notices(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        deadline = time.monotonic() + seconds
        while readable(self._events, deadline):
            data = self._events.recv(65536)
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)  # struct nlmsghdr
                yield kind, data[16:length]
                data = data[-(-length // 4) * 4 :]


def readable(sock: socket.socket, deadline: float) -> bool:
    """Wait until there is something to read; False when the time is up."""
    return bool(select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0])


class Sender:
    """The source's UDP sockets on one link: two addresses a family."""

    def __init__(self, lab: Lab, link: Link) -> None:
        with lab.source.inside():
            index = socket.if_nametoindex(link.sender)
            self._sockets = {(v, host): self._socket(link, v, host, index) for v in (4, 6) for host in (1, 2)}

    def _socket(self, link: Link, version: int, host: int, index: int) -> socket.socket:
        if version == 4:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            # struct ip_mreqn (linux/in.h): group, address, interface
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=4x4xi", index))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 4)
        else:
            sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_IF, index)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MULTICAST_HOPS, 4)
        sock.bind((link.source(version, host), 0))
        return sock

    def send(self, group: str, count: int, host: int) -> None:
        """`count` datagrams to `group` from the source's address `host`."""
        sock = self._sockets[6 if ":" in group else 4, host]
        for _ in range(count):
            sock.sendto(b"data", (group, PORT))

    def send_marker(self, group: str, payload: bytes) -> None:
        """One datagram to another port, which no socket of the relay's host is bound to."""
        self._sockets[6 if ":" in group else 4, 1].sendto(payload, (group, MARKER_PORT))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets.values():
            sock.close()
