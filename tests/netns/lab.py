"""Networks for the tests: namespaces, veth pairs and the usual topologies.

Every namespace has a name that no other test run has, and is removed when the `Lab` ends; interface names
may therefore be short and fixed. Sources are unroutable unless a test says otherwise: the relay's namespace
has no route to them and judges with a strict reverse-path check (rp_filter = 1).
"""

import contextlib
import ctypes
import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
SOURCE: Final = "10.99.9.1"  # no relay has a route to these three
SOURCE_2: Final = "10.99.9.2"
SOURCE_6: Final = "fd99::1"
RELAY_IN: Final = "192.168.50.1"
RELAY_IN_6: Final = "fd00:50::1"

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count(1)


def eventually(question: Callable[[], T], what: str, seconds: float = 10.0) -> T:
    """The first truthy answer to `question`; AssertionError with the last one when the time is up."""
    deadline = time.monotonic() + seconds
    while not (answer := question()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}; last answer: {answer!r}")
        time.sleep(0.02)
    return answer


def command(*arguments: str) -> str:
    """Run a command; its standard output, or AssertionError with what it said."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        raise AssertionError(f"{' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Namespace:
    """One network namespace, by name."""

    name: str

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is in the namespace meanwhile; sockets opened here stay in it for good."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(f"/run/netns/{self.name}")
            yield
        finally:
            _set_namespace(home)
            os.close(home)

    def ip(self, *lines: str) -> None:
        """Run `ip` commands, one a line."""
        arguments = ["ip", "-n", self.name, "-batch", "-"]
        done = subprocess.run(
            arguments, input="\n".join(lines), capture_output=True, text=True, check=False, timeout=20
        )
        if done.returncode:
            raise AssertionError(f"ip in {self.name}: {done.stderr.strip()}: {lines}")

    def run(self, *arguments: str) -> str:
        """A command's standard output, run in the namespace."""
        return command("ip", "netns", "exec", self.name, *arguments)

    def links(self) -> dict[str, dict[str, Any]]:
        """`ip -j -s link`, by interface name."""
        found = json.loads(command("ip", "-n", self.name, "-j", "-s", "link"))
        return {link["ifname"]: link for link in found}

    def mac(self, interface: str) -> bytes:
        """The interface's Ethernet address."""
        return bytes.fromhex(self.links()[interface]["address"].replace(":", ""))

    def sysctl(self, path: str, value: int) -> None:
        """Set /proc/sys/net/`path` of this namespace."""
        with self.inside():
            Path("/proc/sys/net", path).write_text(str(value))

    def read(self, path: str) -> str:
        """The text of /proc/net/`path` of this namespace."""
        with self.inside():
            return Path("/proc/thread-self/net", path).read_text()

    def groups(self, interface: str) -> set[str]:
        """IPv4 groups that the interface is a member of (/proc/net/igmp)."""
        found: set[str] = set()
        current = ""
        for line in self.read("igmp").splitlines()[1:]:
            words = line.split()
            if line[0] != "\t":
                current = words[1]
            elif current == interface:
                found.add(".".join(str(byte) for byte in reversed(bytes.fromhex(words[0]))))
        return found - {"224.0.0.1"}

    def features(self, interface: str) -> dict[str, str]:
        """Offload features as `ethtool -k` has them: name to "on" or "off", maybe with " [fixed]"."""
        lines = self.run("ethtool", "-k", interface).splitlines()[1:]
        return {name.strip(): value.strip() for name, value in (line.split(":", 1) for line in lines)}


def _set_namespace(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _enter(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set_namespace(fd)
    finally:
        os.close(fd)


class Lab:
    """Makes namespaces and links; a context manager that removes all of them."""

    def __init__(self) -> None:
        self._label = f"mr{os.getpid()}-{next(_serial)}"
        self._made: list[Namespace] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in reversed(self._made):
            subprocess.run(["ip", "netns", "del", namespace.name], capture_output=True, check=False, timeout=20)

    def namespace(self, role: str) -> Namespace:
        """A new namespace, without duplicate address detection, with a strict reverse-path check."""
        namespace = Namespace(f"{self._label}-{role}")
        command("ip", "netns", "add", namespace.name)
        self._made.append(namespace)
        with namespace.inside():
            for name in ("all", "default"):
                Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text("0")
                Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("1")
        namespace.ip("link set lo up")
        return namespace

    def link(self, left: "End", right: "End", *, mtu: int = 1500) -> None:
        """A veth pair between two namespaces, both ends up and with their addresses."""
        left.namespace.ip(
            f"link add name {left.interface} mtu {mtu} type veth"
            f" peer name {right.interface} mtu {mtu} netns {right.namespace.name}"
        )
        for end in (left, right):
            lines = [f"addr add {address} dev {end.interface}" for address in end.addresses]
            end.namespace.ip(*lines, f"link set {end.interface} up")

    def star(self, outputs: int = 1, *, mtu: int = 1500, offload: bool = False) -> "Star":
        """Source s0 to relay in0; relay out0.. each to its own k0.. in the sink's namespace.

        Without `offload` what leaves the relay is one frame a datagram with complete checksums, as a
        plain NIC would put it on the wire.
        """
        star = Star(self.namespace("src"), self.namespace("relay"), self.namespace("sink"))
        self.source_link(star.source, star.relay, mtu=mtu)
        for i in range(outputs):
            self.egress_link(star, i, mtu=mtu, offload=offload)
        return star

    def source_link(self, source: Namespace, relay: Namespace, *, mtu: int = 1500) -> None:
        """s0, with addresses that the relay can't route to, to the relay's in0."""
        at_source = End(source, "s0", (f"{SOURCE}/24", f"{SOURCE_2}/24", f"{SOURCE_6}/64"))
        self.link(at_source, End(relay, "in0", (f"{RELAY_IN}/24", f"{RELAY_IN_6}/64")), mtu=mtu)
        mac = relay.mac("in0").hex(":")
        source.ip(
            f"route add {RELAY_IN}/32 dev s0",
            f"neigh replace {RELAY_IN} lladdr {mac} dev s0",  # the relay won't answer the source's ARP
            f"route add {RELAY_IN_6}/128 dev s0",
            f"neigh replace {RELAY_IN_6} lladdr {mac} dev s0",
        )

    def egress_link(self, star: "Star", i: int, *, mtu: int = 1500, offload: bool = False) -> None:
        """The relay's out`i` (10.1.i.1) to the sink's k`i` (10.1.i.2)."""
        relay = End(star.relay, f"out{i}", (f"10.1.{i}.1/24", f"fd00:1:{i}::1/64"))
        self.link(relay, End(star.sink, f"k{i}", (f"10.1.{i}.2/24", f"fd00:1:{i}::2/64")), mtu=mtu)
        if not offload:
            star.relay.run("ethtool", "-K", f"out{i}", "tx", "off")


@dataclass(frozen=True)
class End:
    """One end of a link."""

    namespace: Namespace
    interface: str
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Star:
    """A source, a relay and a sink with any number of links from the relay."""

    source: Namespace
    relay: Namespace
    sink: Namespace
