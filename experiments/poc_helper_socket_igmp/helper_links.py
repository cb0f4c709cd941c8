"""What bounds the joins of a socket, and what becomes of a membership when its interface goes down or away.

Called by poc_helper_socket_igmp.py, on a link of its own, since the interface is removed.
"""

import contextlib
import errno
import socket
import struct
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from helper_filters import COUNT, count
from helper_lab import Lab, Link, Sender, address
from helper_wire import Ingress, in_mac_filter, users
from pyroute2 import IPRoute

from experiment import Experiment
from mrelay.kernel.membership import MembershipPool

IPV6_ADD_MEMBERSHIP: Final = 20  # linux/in6.h
GROUPS: Final = {4: "239.4.4.4", 6: "ff1e::4:4"}
INTERFACE: Final = "life0"
OPTMEM: Final = 4096  # net.core.optmem_max, lowered; 128 kB by default


def join(sock: socket.socket, interface: str, group: str) -> str:
    """Join with the plain option of the family: "" or the name of the error."""
    packed, index = ip_address(group).packed, socket.if_nametoindex(interface)
    try:
        if len(packed) == 4:  # struct ip_mreqn (linux/in.h)
            request = struct.pack("=4s4xi", packed, index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        else:  # struct ipv6_mreq (linux/in6.h)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_ADD_MEMBERSHIP, packed + index.to_bytes(4, "little"))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def fill(version: int, *interfaces: str) -> tuple[int, str]:
    """How many groups one socket takes, on these interfaces in turn, and the error of the next."""
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        for n in range(10_000):
            group = f"239.5.{n // 250}.{n % 250 + 1}" if version == 4 else f"ff1e::5:{n + 1:x}"
            problem = join(sock, interfaces[n % len(interfaces)], group)
            if problem:
                return n, problem
    return n, ""


# ---- limits ----------------------------------------------------------------------------------------


def show_limits(experiment: Experiment, lab: Lab) -> str:
    """What bounds a socket, and that a pool of them is not bounded; the bounds in words."""
    with lab.relay.inside():
        one, two = fill(4, "wire0"), fill(4, "wire0", "low0")
        v6 = fill(6, "wire0")
        default = int(Path("/proc/sys/net/ipv4/igmp_max_memberships").read_text())
        experiment.claim(
            "An IPv4 socket takes igmp_max_memberships groups over all its interfaces, then ENOBUFS",
            one == two == (default, "ENOBUFS"),
            f"net.ipv4.igmp_max_memberships {default}: one interface {one}, two {two}",
        )
        lab.relay.sysctl("core/optmem_max", OPTMEM)
        few = fill(6, "wire0")
        pools = [_pool(version, 3 * limit + 1) for version, limit in ((4, default), (6, few[0]))]
        sources = _pool_of_sources(25)
        lab.relay.sysctl("core/optmem_max", 1 << 17)
        experiment.claim(
            "An IPv6 socket has no such count: its groups take net.core.optmem_max, then ENOMEM",
            v6[1] == few[1] == "ENOMEM" and v6[0] > 5 * few[0],
            f"{v6[0]} groups by default, {few[0]} with {OPTMEM} bytes",
        )
        experiment.claim(
            "The relay's pool takes any number over several sockets, the sources of a group (igmp_max_msf) too",
            all(p == (n, 4, 0) for p, n in zip(pools, (3 * default + 1, 3 * few[0] + 1), strict=True))
            and sources[0] == 25
            and sources[1] > 1,
            f"(listed, sockets, listed after its close) {pools}; 25 sources of one group on {sources[1]} sockets",
        )
    return f"a socket takes {default} IPv4 or {v6[0]} IPv6 groups"


def _pool(version: int, groups: int) -> tuple[int, int, int]:
    names = [f"239.6.{n // 250}.{n % 250 + 1}" if version == 4 else f"ff1e::6:{n + 1:x}" for n in range(groups)]
    with contextlib.closing(MembershipPool(socket.if_nametoindex("wire0"))) as pool:
        for name in names:
            pool.join(name)
        listed, sockets = sum(users("wire0", name) for name in names), len(pool.sockets)
    return listed, sockets, sum(users("wire0", name) for name in names)


def _pool_of_sources(sources: int) -> tuple[int, int]:
    with contextlib.closing(MembershipPool(socket.if_nametoindex("wire0"))) as pool:
        for n in range(sources):
            pool.join("232.6.6.6", f"10.6.6.{n + 1}")
        rows = Path("/proc/thread-self/net/mcfilter").read_text().splitlines()[1:]
        return len(rows), len(pool.sockets)


# ---- an interface's life ---------------------------------------------------------------------------


@dataclass
class Life:
    """One helper and one ring on an interface that goes down, comes up, goes away and comes back."""

    lab: Lab
    seen: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.link = Link("life", self.lab.source, "l0", "l0", INTERFACE, 4)
        self._connect()
        self.index = socket.if_nametoindex(INTERFACE)
        self.pool = MembershipPool(self.index)
        for group in GROUPS.values():
            self.pool.join(group)

    def _connect(self, **options: int) -> None:
        """The link; `options`: the index that the relay's end shall have."""
        peer = {"ifname": "l0", "net_ns_fd": self.lab.source.fd}
        with IPRoute() as ip:
            ip.link("add", ifname=INTERFACE, kind="veth", peer=peer, **options)
        self.lab.relay.bring_up(INTERFACE, self.link.source(4, 3))
        self.lab.source.bring_up("l0", self.link.source(4))
        for version, host in ((4, 2), (6, 1), (6, 2)):
            address(self.lab.source, "l0", self.link.source(version, host))

    def down_and_up(self) -> None:
        """The same interface, down for a moment."""
        with self.lab.reports(self.link) as reports, Ingress(INTERFACE) as ring:
            self.seen["before"] = self._count(ring)
            self._set("down")
            self.seen["down: listed"] = self._listed()
            self.seen["down: IPv4 in MAC filter"] = in_mac_filter(INTERFACE, GROUPS[4])
            self.seen["down: ring's error"] = _error(ring.sock)
            reports.forget()
            self._set("up")
            self.seen["up: listed"] = self._listed()
            records = [reports.await_record(group, *range(1, 7)) for group in GROUPS.values()]
            self.seen["up: reported"] = all(record is not None for record in records)
            self.seen["up: in MAC filter"] = all(in_mac_filter(INTERFACE, group) for group in GROUPS.values())
            self.seen["after"] = self._count(ring)

    def removed(self) -> None:
        """Away, and back under its name with another index."""
        with Ingress(INTERFACE) as ring:
            self._delete()
            self.seen["removed: ring's error"] = _error(ring.sock)
            self._connect(index=self.index + 100)
            self.seen["new index: listed"] = self._listed()
            with Ingress(INTERFACE) as another:  # what that has got, the old one would have
                self.seen["new index: another ring"] = self._count(another)
            self.seen["new index: old ring"] = sum(1 for _ in ring.frames())
        self.seen["old index: join"] = _pool_join(self.index, GROUPS[4])
        self._delete()

    def same_index(self) -> None:
        """Back with the index it had: the sockets still have it in their lists, the interface has nothing."""
        self._connect(index=self.index)
        self.seen["same index: listed"] = self._listed()
        self.seen["same index: join"] = {
            join(sock, INTERFACE, GROUPS[4 if sock.family == socket.AF_INET else 6]) for sock in self.pool.sockets
        }
        for group in GROUPS.values():
            self.pool.join(group)
        self.seen["pool joined again"] = self._listed()
        for group in GROUPS.values():
            self.pool.leave(group)
            self.pool.join(group)
        self.seen["left and joined"] = self._listed()
        self.pool.close()
        self._delete()

    def _set(self, state: str) -> None:
        with IPRoute() as ip:
            ip.link("set", index=self.index, state=state)

    def _delete(self) -> None:
        with IPRoute() as ip:
            ip.link("del", index=socket.if_nametoindex(INTERFACE))

    def _listed(self) -> list[int]:
        return [users(INTERFACE, group) for group in GROUPS.values()]

    def _count(self, ring: Ingress) -> list[int]:
        """Of `COUNT` datagrams of each group, at the ring."""
        with Sender(self.lab, self.link) as sender:
            return [count(ring, sender, group) for group in GROUPS.values()]


def _error(sock: socket.socket) -> str:
    return errno.errorcode.get(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "none")


def _pool_join(index: int, group: str) -> str:
    with contextlib.closing(MembershipPool(index)) as pool:
        try:
            pool.join(group)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return "joined"


def show_life(experiment: Experiment, lab: Lab) -> None:
    """What it proves."""
    with lab.relay.inside():
        life = Life(lab)
        life.down_and_up()
        life.removed()
        life.same_index()
    seen, all_of_it = life.seen, [COUNT, COUNT]
    experiment.claim(
        "Down and up again: the helper stays joined, the kernel reports anew, the same ring goes on",
        seen["before"] == seen["after"] == all_of_it
        and seen["down: listed"] == seen["up: listed"] == [1, 1]
        and seen["up: in MAC filter"]
        and seen["up: reported"]
        and not seen["down: IPv4 in MAC filter"]
        and seen["down: ring's error"] == "ENETDOWN",
        _words(seen, "before", "down", "up", "after"),
    )
    experiment.claim(
        "Removed and made anew under its name: the old helper is joined to nothing, the old ring is deaf",
        seen["new index: listed"] == [0, 0]
        and (seen["new index: another ring"], seen["new index: old ring"]) == (all_of_it, 0)
        and (seen["removed: ring's error"], seen["old index: join"]) == ("ENETDOWN", "ENODEV"),
        _words(seen, "removed", "new index", "old index"),
    )
    experiment.claim(
        "Made anew with the same index: a join on the old socket says EADDRINUSE and does nothing; leave first",
        seen["same index: listed"] == [0, 0] == seen["pool joined again"]
        and seen["same index: join"] == {"EADDRINUSE"}
        and seen["left and joined"] == [1, 1],
        _words(seen, "same index", "pool", "left"),
    )


def _words(seen: dict[str, Any], *starts: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in seen.items() if name.startswith(starts))
