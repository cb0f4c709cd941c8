"""What the tests send and how they receive: UDP sockets, crafted frames, captures off the wire.

Sockets are opened inside their namespace and used from outside it. Every wait has a deadline and fails
with what came so far. All are context managers
that close their socket.
"""

import ipaddress
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Final, Self

from netns.frames import Packet, parse
from netns.lab import SOURCE, Namespace

ETH_P_ALL: Final = 0x0003  # linux/if_ether.h
SOL_PACKET: Final = 263  # linux/socket.h
PACKET_AUXDATA: Final = 8  # linux/if_packet.h
PACKET_IGNORE_OUTGOING: Final = 23
TP_STATUS_CSUMNOTREADY: Final = 1 << 3
TP_STATUS_VLAN_VALID: Final = 1 << 4
SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
UDP_SEGMENT: Final = 103  # linux/udp.h
IP_MTU_DISCOVER: Final = 10  # linux/in.h
PROBE: Final = b"hello"  # sent until the relay is as a test wants it; receivers and captures pass over it
BUFFER: Final = 256 << 20  # bytes: room for everything a test sends, so that only the relay can lose it


def payloads(count: int, size: int = 200, *, first: int = 0) -> list[bytes]:
    """`count` different payloads of `size` bytes, each beginning with its number."""
    pattern = bytes(range(256)) * (size // 256 + 2)
    return [struct.pack("!I", i) + pattern[i & 255 :][: size - 4] for i in range(first, first + count)]


def number(payload: bytes) -> int:
    """The number that `payloads` put in front."""
    return int(struct.unpack_from("!I", payload)[0])


class _Socket:
    """Shared by all: closes the socket at the end of a `with`."""

    sock: socket.socket

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


class Sender(_Socket):
    """A UDP socket at the source, bound to an interface and one of its addresses."""

    def __init__(
        self,
        namespace: Namespace,
        source: str = SOURCE,
        *,
        interface: str = "s0",
        ttl: int = 16,
        dscp: int = 0,
    ) -> None:
        v6 = ipaddress.ip_address(source).version == 6
        with namespace.inside():
            self.sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
            index = socket.if_nametoindex(interface)
        self.sock.bind((source, 0))
        if v6:
            self._set(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            self._set(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, ttl)
            self._set(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
            self._set(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, dscp << 2)
            return
        self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=4s4si", b"", b"", index))
        self._set(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
        self._set(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        self._set(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)

    def _set(self, level: int, option: int, value: int) -> None:
        self.sock.setsockopt(level, option, value)

    def send(self, group: str, port: int, sent: Iterable[bytes]) -> None:
        """One datagram for each payload."""
        for payload in sent:
            self.sock.sendto(payload, (group, port))

    def send_segmented(self, group: str, port: int, sent: Sequence[bytes]) -> None:
        """All payloads (of one size, the last may be shorter; up to 64 kB) as one UDP GSO message."""
        ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", len(sent[0])))]
        self.sock.sendmsg(sent, ancillary, 0, (group, port))


def send_frames(namespace: Namespace, interface: str, frames: Iterable[bytes]) -> None:
    """Put whole Ethernet frames on the wire (14 bytes at least)."""
    with namespace.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with sock:
        sock.bind((interface, 0))
        for frame in frames:
            sock.send(frame)


class Receiver(_Socket):
    """A plain UDP socket at the sink on one interface, joined to groups: what an application gets."""

    def __init__(self, namespace: Namespace, interface: str, port: int, *groups: str, v6: bool = False) -> None:
        with namespace.inside():
            self.sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
            index = socket.if_nametoindex(interface)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self.sock.bind(("", port))
        for group in groups:
            packed = ipaddress.ip_address(group).packed
            if v6:
                self.sock.setsockopt(
                    socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, packed + struct.pack("=i", index)
                )
            else:
                self.sock.setsockopt(
                    socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, struct.pack("=4s4si", packed, b"", index)
                )

    def receive(self, count: int, seconds: float = 10.0) -> list[bytes]:
        """The next `count` datagrams but probes; AssertionError when fewer come in time."""
        got: list[bytes] = []
        deadline = time.monotonic() + seconds
        while len(got) < count:
            _await(self.sock, deadline, f"{len(got)} of {count} datagrams came")
            payload = self.sock.recv(65536)
            got += [payload] if payload != PROBE else []
        return got


class Capture(_Socket):
    """Frames that arrive on an interface from now on, as they were on the wire."""

    def __init__(self, namespace: Namespace, interface: str) -> None:
        with namespace.inside():
            self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.sock.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self.sock.bind((interface, ETH_P_ALL))

    def frame(self, deadline: float, complaint: str) -> tuple[bytes, int | None, bool]:
        """The next frame, its stripped VLAN tag, and whether its checksum was left to hardware."""
        _await(self.sock, deadline, complaint)
        data, ancillary, _, _ = self.sock.recvmsg(70000, socket.CMSG_SPACE(20))
        status, _, _, _, _, tci, _ = struct.unpack("=IIIHHHH", ancillary[0][2])
        vlan = tci & 0xFFF if status & TP_STATUS_VLAN_VALID else None
        return data, vlan, bool(status & TP_STATUS_CSUMNOTREADY)

    def wait(self, count: int, seconds: float = 10.0) -> list[Packet]:
        """The next `count` unfragmented UDP packets; probes and other frames are passed over."""
        got: list[Packet] = []
        deadline = time.monotonic() + seconds
        while len(got) < count:
            data, vlan, partial = self.frame(deadline, f"{len(got)} of {count} packets came")
            packet = parse(data, vlan=vlan, partial=partial)
            got += [packet] if packet is not None and not _is_noise(packet) else []
        return got

    def arrived(self) -> list[Packet]:
        """Every unfragmented UDP packet but probes that has come by now."""
        got: list[Packet] = []
        while select.select([self.sock], [], [], 0)[0]:
            data, vlan, partial = self.frame(time.monotonic() + 1, "no frame came")
            packet = parse(data, vlan=vlan, partial=partial)
            got += [packet] if packet is not None and not _is_noise(packet) else []
        return got

    def until(self, payload: bytes, seconds: float = 10.0) -> list[Packet]:
        """Every UDP packet up to the first with this payload, that one included."""
        got: list[Packet] = []
        while not got or got[-1].payload != payload:
            got += self.wait(1, seconds)
        return got


_NOISE: Final = {5353, 5355, 1900}  # mDNS, LLMNR, SSDP of a busy host


def _is_noise(packet: Packet) -> bool:
    return packet.dport in _NOISE or packet.payload == PROBE


def _await(sock: socket.socket, deadline: float, complaint: str) -> None:
    if not select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
        raise AssertionError(f"only {complaint} in time")
