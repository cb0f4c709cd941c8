"""Memberships and unicast holds as the kernel itself lists them, and that helper sockets stay empty."""

import errno
import fcntl
import select
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from mrelay.kernel.membership import MembershipError, MembershipPool, UnicastPool
from netns.lab import SOURCE, SOURCE_6, Lab, Namespace, Star, eventually
from netns.traffic import Sender

pytestmark = pytest.mark.netns
FIONREAD = 0x541B  # asm-generic/ioctls.h
GROUPS = [f"239.7.{i // 100}.{i % 100 + 1}" for i in range(200)]
GROUPS_6 = [f"ff3e::7:{i + 1:x}" for i in range(200)]


@pytest.fixture
def star(lab: Lab) -> Star:
    return lab.star()


@pytest.fixture
def pool(star: Star) -> Iterator[MembershipPool]:
    """The memberships of the relay's in0; the test's thread is in the relay's namespace meanwhile."""
    with star.relay.inside():
        made = MembershipPool(socket.if_nametoindex("in0"))
        yield made
        made.close()


def groups6(namespace: Namespace) -> set[str]:
    """in0's IPv6 groups by /proc/net/igmp6, without those that every node joins."""
    rows = [line.split() for line in namespace.read("igmp6").splitlines()]
    addresses = {str(ip_address(bytes.fromhex(row[2]))) for row in rows if row[1] == "in0"}
    return {address for address in addresses if address.startswith("ff3e")}


def sources(namespace: Namespace) -> set[tuple[str, str]]:
    """in0's (group, included source) pairs by /proc/net/mcfilter and mcfilter6."""
    found = set()
    for line in namespace.read("mcfilter").splitlines()[1:]:
        _, interface, group, source, include, _ = line.split()
        if interface == "in0" and int(include):
            found.add((str(ip_address(int(group, 16))), str(ip_address(int(source, 16)))))
    for line in namespace.read("mcfilter6").splitlines()[1:]:
        _, interface, group, source, include, _ = line.split()
        if interface == "in0" and int(include):
            pair = (ip_address(bytes.fromhex(group)), ip_address(bytes.fromhex(source)))
            found.add((str(pair[0]), str(pair[1])))
    return found


def test_200_groups_with_the_default_limits(star: Star, pool: MembershipPool) -> None:
    for group in [*GROUPS, *GROUPS]:  # joining twice does nothing
        pool.join(group)
    assert star.relay.groups("in0") == set(GROUPS)
    assert len(pool.sockets) == 10  # 20 each
    for group in GROUPS[:50]:
        pool.leave(group)
        pool.leave(group)
    assert star.relay.groups("in0") == set(GROUPS[50:])
    assert len(pool.sockets) == 8
    for group in GROUPS[:10]:
        pool.join(group)
    assert len(pool.sockets) == 8  # the room that the leaves made
    pool.close()
    assert star.relay.groups("in0") == set()


def test_ipv6_groups(star: Star, pool: MembershipPool) -> None:
    for group in GROUPS_6:
        pool.join(group)
    assert groups6(star.relay) == set(GROUPS_6)
    for group in GROUPS_6[1:]:
        pool.leave(group)
    assert groups6(star.relay) == {GROUPS_6[0]}
    pool.close()
    assert groups6(star.relay) == set()


def test_more_ipv6_groups_than_one_socket_has_memory_for(star: Star, pool: MembershipPool) -> None:
    groups = [f"ff3e::8:{i:x}" for i in range(6000)]
    for group in groups:
        pool.join(group)
    assert groups6(star.relay) == set(groups) | {"ff3e::8:0"}
    assert len(pool.sockets) > 1


@pytest.mark.parametrize(
    ("group", "template"), [("232.1.1.1", "10.9.0.{}"), ("ff3e::1", "fd00:9::{}")], ids=["IPv4", "IPv6"]
)
def test_many_sources_of_one_group(star: Star, pool: MembershipPool, group: str, template: str) -> None:
    """Above igmp_max_msf (10) and mld_max_msf (64) a socket."""
    wanted = {(group, template.format(i)) for i in range(1, 81)}
    for _, source in wanted:
        pool.join(group, source)
    assert sources(star.relay) == wanted
    pool.leave(group, template.format(1))
    assert sources(star.relay) == wanted - {(group, template.format(1))}


def test_any_source_and_one_source_of_one_group(star: Star, pool: MembershipPool) -> None:
    pool.join("232.1.1.1", SOURCE)
    pool.join("232.1.1.1")
    assert star.relay.groups("in0") == {"232.1.1.1"}
    pool.leave("232.1.1.1")
    assert sources(star.relay) == {("232.1.1.1", SOURCE)}
    pool.leave("232.1.1.1", SOURCE)
    assert star.relay.groups("in0") == set()
    assert pool.sockets == []


def test_a_limit_of_nothing_names_the_sysctl(star: Star, pool: MembershipPool) -> None:
    star.relay.sysctl("ipv4/igmp_max_memberships", 0)
    with pytest.raises(MembershipError, match=r"net\.ipv4\.igmp_max_memberships") as caught:
        pool.join(GROUPS[0])
    with pytest.raises(MembershipError, match=r"net\.ipv4\.igmp_max_msf"):
        pool.join("232.1.1.1", SOURCE)
    assert (caught.value.errno, caught.value.sysctl) == (errno.ENOBUFS, "net.ipv4.igmp_max_memberships")
    assert pool.sockets == []


def test_a_lowered_limit_is_met_with_more_sockets(star: Star, pool: MembershipPool) -> None:
    pool.join(GROUPS[0])
    star.relay.sysctl("ipv4/igmp_max_memberships", 1)
    pool.join(GROUPS[1])
    assert star.relay.groups("in0") == set(GROUPS[:2])
    assert len(pool.sockets) == 2


def test_errors_are_the_kernels_own(star: Star, pool: MembershipPool) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        pool.join("10.1.1.1")
    missing = MembershipPool(9999)
    with pytest.raises(OSError, match="No such device"):
        missing.join(GROUPS[0])
    assert pool.sockets == missing.sockets == []


def test_leaving_an_interface_that_is_gone(star: Star, pool: MembershipPool) -> None:
    for group in (GROUPS[0], GROUPS_6[0]):
        pool.join(group)
    star.relay.ip("link del in0")
    for group in (GROUPS[0], GROUPS_6[0]):
        pool.leave(group)
    assert pool.sockets == []


def test_a_helper_socket_never_has_data(star: Star, pool: MembershipPool) -> None:
    """Not even when a listener on the same host gets the very same datagrams."""
    star.relay.sysctl("ipv4/conf/all/rp_filter", 0)
    star.relay.sysctl("ipv4/conf/in0/rp_filter", 0)
    for group in ("239.1.1.1", "ff3e::1"):
        pool.join(group)
    route = ("ip", "-6", "route", "show", "table", "local", "ff00::/8", "dev", "in0")
    eventually(lambda: star.relay.run(*route), "the kernel takes IPv6 groups in on in0")
    with listener("239.1.1.1") as four, listener("ff3e::1") as six:
        with Sender(star.source) as sender, Sender(star.source, SOURCE_6) as sender6:
            sender.send("239.1.1.1", 5000, [b"four"])
            sender6.send("ff3e::1", 5000, [b"six"])
        assert (four.recv(10), six.recv(10)) == (b"four", b"six")
    assert len(pool.sockets) == 2
    assert select.select(pool.sockets, [], [], 0)[0] == []
    assert all(queued(sock) == 0 for sock in pool.sockets)


def listener(group: str) -> socket.socket:
    """A plain receiver in this namespace, with in0's membership made by the pool (IP_MULTICAST_ALL)."""
    family = socket.AF_INET if "." in group else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.bind((group, 5000, 0, socket.if_nametoindex("in0")) if family == socket.AF_INET6 else (group, 5000))
    return sock


def queued(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, FIONREAD, bytes(4)))[0])


@pytest.mark.parametrize("family", [4, 6])
def test_a_hold_keeps_the_host_from_answering(star: Star, family: int) -> None:
    """Without it the sender learns of a port-unreachable by its next call (ECONNREFUSED)."""
    address, ours = ("10.1.0.1", "10.1.0.2") if family == 4 else ("fd00:1:0::1", "fd00:1:0::2")
    holds = UnicastPool()
    with connected(star.sink, ours, address) as sender:
        with star.relay.inside():
            assert holds.hold(address, 5000)
            assert holds.hold(address, 5000)
        for _ in range(3):
            sender.send(b"x")
        assert select.select([sender], [], [], 0.2)[0] == []
        holds.release(address, 5000)
        holds.release(address, 5000)
        sender.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            sender.recv(1)


def connected(namespace: Namespace, ours: str, theirs: str) -> socket.socket:
    with namespace.inside():
        sock = socket.socket(socket.AF_INET if "." in ours else socket.AF_INET6, socket.SOCK_DGRAM)
    sock.settimeout(10)
    sock.bind((ours, 0))
    sock.connect((theirs, 5000))
    return sock


def test_a_local_listener_keeps_its_port(star: Star) -> None:
    holds = UnicastPool()
    with star.relay.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as local:
        local.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        local.bind(("0.0.0.0", 5000))
        local.settimeout(10)
        assert not holds.hold("10.1.0.1", 5000)
        with connected(star.sink, "10.1.0.2", "10.1.0.1") as sender:
            sender.send(b"mine")
        assert local.recv(10) == b"mine"
        local.close()
        assert holds.hold("10.1.0.1", 5000)
        with pytest.raises(OSError, match="Cannot assign"):
            holds.hold("10.1.0.77", 5000)
    holds.close()
