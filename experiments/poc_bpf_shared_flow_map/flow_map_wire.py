"""What packet sockets see, at the relay and at the receiver: the checks that look at single frames.

Owns its sockets. `Receiver.receive` and `Taps.see` wait for a frame, at most for a second.
"""

import contextlib
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple, Self

from flow_map_lab import GROUP, PORT, Lab
from flow_map_layout import FIRST_PORT
from pyroute2 import IPRoute, NetlinkError

from mrelay.kernel.packet import (
    ETH_P_ALL,
    PACKET_FANOUT,
    PACKET_FANOUT_CPU,
    PACKET_FANOUT_FLAG_DEFRAG,
    PACKET_FANOUT_FLAG_UNIQUEID,
    SOL_PACKET,
)
from traffic import checksum

SOURCE: Final = "10.99.255.1"  # s0's own address
MAGIC: Final = 0x6D72656C  # numbered.bpf.c
ETH_P_IP: Final = 0x0800  # linux/if_ether.h
SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
_WAIT: Final = 1.0  # seconds
PATTERN: Final = bytes(range(84))


class Datagram(NamedTuple):
    """One that arrived: its number, the rest of the payload, TTL, and where it says it came from."""

    number: int
    rest: bytes
    ttl: int
    source: tuple[str, int]


class Sender:
    """An ordinary socket in the source's namespace; its frames' checksums are only partial."""

    def __init__(self, lab: Lab) -> None:
        with lab.source.inside():
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            membership = struct.pack("=4s4si", bytes(4), bytes(4), socket.if_nametoindex("s0"))
            self._sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, membership)
            # without DF, so that what is too long leaves as fragments
            self._sock.setsockopt(socket.IPPROTO_IP, 10, 0)  # linux/in.h: IP_MTU_DISCOVER, IP_PMTUDISC_DONT
        self._sock.bind((SOURCE, 4000))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def send(self, number: int, more: int = 0) -> None:
        """One datagram of 100 bytes and `more`."""
        self._sock.sendto(struct.pack("=IIQ", number, MAGIC, 0) + PATTERN + bytes(more), (GROUP, PORT))


class Receiver:
    """Reads frames at r1 and checks their checksums itself: the kernel takes over the word of the host before,
    even of a veth pair's other end, where a checksum was once found good."""

    def __init__(self, lab: Lab) -> None:
        self.wrong = 0
        with lab.sink.inside():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
            self._sock.bind(("r1", ETH_P_IP))
        self._sock.settimeout(_WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def receive(self) -> Datagram | None:
        """The next one; None if none comes. Counts in `wrong` those with a wrong checksum."""
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while True:
                ip = self._sock.recv(4096)[14:]
                if ip[9] == socket.IPPROTO_UDP and ip[22:24] == FIRST_PORT.to_bytes(2):
                    return self._checked(ip)
        return None

    def _checked(self, ip: bytes) -> Datagram:
        udp = ip[20 : int.from_bytes(ip[2:4])]
        pseudo_header = ip[12:20] + struct.pack("!HH", socket.IPPROTO_UDP, len(udp))
        self.wrong += bool(checksum(ip[:20]) or checksum(pseudo_header + udp) or udp[6:8] == bytes(2))
        source = socket.inet_ntoa(ip[12:16]), int.from_bytes(udp[:2])
        return Datagram(int.from_bytes(udp[8:12], sys.byteorder), udp[24:], ip[8], source)

    def waiting(self) -> list[Datagram]:
        """All that have come."""
        self._sock.settimeout(0)
        found = list(iter(self.receive, None))
        self._sock.settimeout(_WAIT)
        return found


class Taps:
    """Three packet sockets on in0: bound to ETH_P_ALL, to ETH_P_IP, and the latter in a fanout group that puts
    fragments together."""

    names: Final = ("ETH_P_ALL", "ETH_P_IP", "ETH_P_IP, defrag")

    def __init__(self, lab: Lab) -> None:
        self._socks = [tap(lab, protocol) for protocol in (ETH_P_ALL, ETH_P_IP, ETH_P_IP)]
        flags = PACKET_FANOUT_CPU | PACKET_FANOUT_FLAG_DEFRAG | PACKET_FANOUT_FLAG_UNIQUEID
        self._socks[2].setsockopt(SOL_PACKET, PACKET_FANOUT, (flags << 16).to_bytes(4, "little"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._socks:
            sock.close()

    def see(self) -> list[list[int]]:
        """For each, the lengths of the UDP frames that came since; waits for the first one's first."""
        self._socks[0].settimeout(_WAIT)
        first = [len(self._socks[0].recv(65536))]
        for sock in self._socks:
            sock.settimeout(0)
        return [first * (sock is self._socks[0]) + list(_lengths(sock)) for sock in self._socks]


def tap(lab: Lab, protocol: int = ETH_P_ALL) -> socket.socket:
    """A packet socket on in0."""
    with lab.relay.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.bind(("in0", protocol))
    return sock


def _lengths(sock: socket.socket) -> Iterator[int]:
    with contextlib.suppress(BlockingIOError):
        while True:
            yield len(sock.recv(65536))


def send_tagged(lab: Lab) -> None:
    """One frame out of s0: Ethernet, VLAN 5, IPv4, UDP; 142 bytes without the tag."""
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 128, 0, 0x4000, 16, 17, 0, *map(socket.inet_aton, (SOURCE, GROUP)))
    ethernet = bytes.fromhex("01005e010101 020000000001 8100 0005 0800")
    with lab.source.inside(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind(("s0", 0))
        sock.send(ethernet + ip + struct.pack("!HHHH", 4000, PORT, 108, 0) + bytes(100))


@contextlib.contextmanager
def bridged(lab: Lab) -> Iterator[bool]:
    """in0 is a bridge's port meanwhile; False if this kernel has no bridges."""
    with lab.relay.inside(), IPRoute() as route:
        try:
            route.link("add", ifname="br0", kind="bridge")
        except NetlinkError:
            yield False
            return
        (bridge,), (port,) = route.link_lookup(ifname="br0"), route.link_lookup(ifname="in0")
        route.link("set", index=bridge, state="up")
        route.link("set", index=port, master=bridge)
    try:
        yield True
    finally:
        with lab.relay.inside(), IPRoute() as route:
            route.link("del", index=bridge)
