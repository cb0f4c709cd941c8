"""The demo's network: a source, a relay host and two receivers, joined by veth pairs.

Owns the namespaces. They have no name in /run/netns: only this process holds them, so the kernel removes
them with their links however the process ends, and no other namespace is touched. Called by the demo
command. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN. Blocks for some milliseconds while building.

    source (10.99.0.1) ── in0 (192.0.2.1) [relay] out1 (198.51.100.1) ── receiver-1
                                                  out2 (203.0.113.1)  ── receiver-2
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from pyroute2 import IPRoute

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
SOURCE = "10.99.0.1"  # no other namespace has a route to it
RP_FILTER = 2  # loose, the mildest that distributions set (systemd's 50-default.conf): any route back will do

_libc = ctypes.CDLL(None, use_errno=True)


def _enter(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Namespace:
    """A network namespace that lives as long as this object and what runs in it."""

    def __init__(self) -> None:
        """Make it. Raises OSError (EPERM without CAP_SYS_ADMIN)."""
        home = _current()
        try:
            if _libc.unshare(CLONE_NEWNET):
                error = ctypes.get_errno()
                raise OSError(error, f"unshare: {os.strerror(error)}")
            self.fd = _current()
        finally:
            _enter(home)
            os.close(home)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in the namespace meanwhile; sockets and processes made here stay in it."""
        home = _current()
        try:
            _enter(self.fd)
            yield
        finally:
            _enter(home)
            os.close(home)

    def sysctl(self, path: str, value: int) -> None:
        """Set /proc/sys/net/`path`."""
        with self.inside():
            Path("/proc/sys/net", path).write_text(str(value))

    def reverse_path_drops(self) -> int:
        """Packets that the kernel's reverse-path check dropped here (IPReversePathFilter of nstat)."""
        with self.inside():
            names, values = (
                line.split()
                for line in Path("/proc/thread-self/net/netstat").read_text().splitlines()
                if line.startswith("TcpExt:")
            )
        return int(values[names.index("IPReversePathFilter")])

    def bring_up(self, interface: str, address: str | None = None) -> None:
        """Give `interface` its IPv4 address (a /24) and set it up."""
        with self.inside(), IPRoute() as ip:
            (index,) = ip.link_lookup(ifname=interface)
            if address is not None:
                ip.addr("add", index=index, address=address, prefixlen=24)
            ip.link("set", index=index, state="up")


class Topology:
    """The four hosts. A context manager; leaving it lets go of them."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as on_failure:
            self.source, self.relay, *self.receivers = (on_failure.enter_context(Namespace()) for _ in range(4))
            self._configure()
            self._stack = on_failure.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _configure(self) -> None:
        for namespace in (self.source, self.relay, *self.receivers):
            namespace.bring_up("lo")
        for scope in ("all", "default"):
            self.relay.sysctl(f"ipv4/conf/{scope}/rp_filter", RP_FILTER)
        connect(End(self.source, "s0", SOURCE), End(self.relay, "in0", "192.0.2.1"))
        connect(End(self.receivers[0], "r1", "198.51.100.2"), End(self.relay, "out1", "198.51.100.1"))
        connect(End(self.receivers[1], "r2", "203.0.113.2"), End(self.relay, "out2", "203.0.113.1"))


class End(NamedTuple):
    """One end of a link."""

    namespace: Namespace
    interface: str
    address: str


def connect(one: End, other: End) -> None:
    """A veth pair between two namespaces, both ends addressed and up."""
    peer = {"ifname": other.interface, "net_ns_fd": other.namespace.fd}
    with one.namespace.inside(), IPRoute() as ip:
        ip.link("add", ifname=one.interface, kind="veth", peer=peer)
    for end in (one, other):
        end.namespace.bring_up(end.interface, end.address)
