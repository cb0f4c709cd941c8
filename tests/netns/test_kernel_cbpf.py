"""The group filter on AF_PACKET sockets: Ethernet, VLAN tags, and an interface without a link layer."""

import fcntl
import os
import socket
import struct
from ipaddress import ip_address

import pytest

from mrelay.kernel import cbpf
from netns.lab import Lab, Namespace

pytestmark = pytest.mark.netns
ETH_P_ALL = 3  # linux/if_ether.h
# linux/if_tun.h
TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000

WANTED = ("239.1.1.1", "239.5.0.9", "ff3e::1", "ff3e:1:2:3:4:5:6:7", "ff3e:9:0:1:ffff::", "10.1.1.1")
UNWANTED = (
    "239.1.1.0",
    "239.1.1.2",
    "239.4.255.255",
    "239.6.0.0",
    "ff3e::",
    "ff3e:1:2:3:4:5:6:8",
    "ff3e:8::",
)
V4 = [(0xEF010101, 0xEF010101), (0xEF050000, 0xEF05FFFF), (0x0A010101, 0x0A010101)]
SIX = int(ip_address("ff3e:1:2:3:4:5:6:7"))
V6 = [(0xFF3E << 112 | 1,) * 2, (SIX, SIX), (0xFF3E0009 << 96, 0xFF3E0009 << 96 | (1 << 96) - 1)]
LAST = "239.1.1.1"  # sent after all others, so that what did not arrive by then was dropped


def packet(destination: str) -> bytes:
    """An IP header that is enough for the filter, with the destination."""
    address = ip_address(destination)
    if address.version == 4:
        return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20, 0, 0, 9, 17, 0, bytes(4), address.packed)
    return struct.pack("!IHBB16s16s", 0x60000000, 0, 17, 9, bytes(16), address.packed)


def ethertype(destination: str) -> bytes:
    return struct.pack("!H", cbpf.ETH_P_IP if "." in destination else cbpf.ETH_P_IPV6)


def capture(interface: str, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, kind, 0)
    cbpf.attach(sock, cbpf.DROP_ALL)
    sock.bind((interface, ETH_P_ALL))
    cbpf.attach_group_filter(sock, V4, V6)
    sock.settimeout(10)
    return sock


def arrived(sock: socket.socket, skip: int) -> list[str]:
    """Destinations of what the socket got, the first LAST and all after it left out."""
    found: list[str] = []
    while len(found) <= len(WANTED):
        data = sock.recv(2000)[skip:]
        found.append(str(ip_address(data[16:20] if data[0] >> 4 == 4 else data[24:40])))
        if found[-1] == LAST:
            return found[:-1]
    raise AssertionError(f"too many: {found}")


@pytest.fixture
def host(lab: Lab) -> Namespace:
    """A namespace with a veth pair v0, v1 that says nothing by itself."""
    namespace = lab.namespace("host")
    namespace.ip(
        "link add v0 type veth peer name v1",
        *(f"link set {name} addrgenmode none up" for name in ("v0", "v1")),
    )
    return namespace


@pytest.mark.parametrize("kind", [socket.SOCK_RAW, socket.SOCK_DGRAM])
@pytest.mark.parametrize("tag", [b"", struct.pack("!HH", 0x8100, 20)], ids=["untagged", "tagged"])
def test_ethernet(host: Namespace, kind: socket.SocketKind, tag: bytes) -> None:
    destinations = [*WANTED[1:], *UNWANTED, LAST]
    with host.inside():
        source = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        source.bind(("v1", 0))
        with source, capture("v0", kind) as sink:
            for to in destinations:
                source.send(b"\xff" * 12 + tag + ethertype(to) + packet(to) + bytes(20))
            assert arrived(sink, 14 if kind == socket.SOCK_RAW else 0) == list(WANTED[1:])


def test_no_link_layer(host: Namespace) -> None:
    with host.inside():
        try:
            tun = os.open("/dev/net/tun", os.O_RDWR)
        except OSError as error:
            pytest.skip(f"needs /dev/net/tun: {error}")
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
        host.ip("link set tun0 addrgenmode none up")
        with capture("tun0", socket.SOCK_RAW) as sink:
            for to in [*WANTED[1:], *UNWANTED, LAST]:
                os.write(tun, packet(to) + bytes(20))
            assert arrived(sink, 0) == list(WANTED[1:])
        os.close(tun)
