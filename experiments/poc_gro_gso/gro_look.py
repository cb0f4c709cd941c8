"""What comes out of poc_gro_gso's relay, as an application sees it and as the wire does.

Owns the receiving sockets, the taps, and a sender of bursts. Reads are bounded by a time-out.
"""

import contextlib
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Self

from gro_lab import CHECKSUMMING, GROUP, OUT_GROUP, OUT_PORT, PORT, UDP_SEGMENTATION, Lab

from mrelay.demo.topology import Namespace
from mrelay.kernel.packet import ETH_P_ALL, PACKET_IGNORE_OUTGOING, SOL_PACKET
from mrelay.kernel.udp import open_egress, segment_control
from traffic import checksum

SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
SO_TIMESTAMPNS: Final = 35  # asm-generic/socket.h, SO_TIMESTAMPNS_OLD
_IN_TIME: Final = 2.0  # seconds
_TIMESPEC: Final = struct.Struct("@ll")


class Seen(NamedTuple):
    """One frame: when (ns), and its bytes from the IP header on."""

    time: int
    packet: bytes


class Tap:
    """An AF_PACKET socket that sees each frame of an interface without being told of offloads."""

    def __init__(self, namespace: Namespace, interface: str, *, outgoing: bool = False) -> None:
        with namespace.inside():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, int(not outgoing))
        self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
        self._sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._sock.bind((interface, ETH_P_ALL))
        self._sock.setblocking(False)

    def udp(self, port: int) -> list[Seen]:
        """All IPv4 frames so far that hold UDP to `port`, and later fragments of anything."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, control, _, _ = self._sock.recvmsg(1 << 17, 64)
                if packet[9] == socket.IPPROTO_UDP and (_is_later_fragment(packet) or _port(packet) == port):
                    seconds, nanoseconds = _TIMESPEC.unpack(control[0][2])
                    found.append(Seen(seconds * 10**9 + nanoseconds, packet))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


def _is_later_fragment(packet: bytes) -> bool:
    return bool(int.from_bytes(packet[6:8]) & 0x1FFF)


def _port(packet: bytes) -> int:
    return int.from_bytes(packet[22:24])


def is_whole(packet: bytes) -> bool:
    """One datagram, not a fragment, with right IPv4 and UDP checksums (RFC 791, RFC 768)."""
    fragment, total = int.from_bytes(packet[6:8]) & 0x3FFF, int.from_bytes(packet[2:4])
    udp = packet[20:total]
    pseudo = packet[12:20] + struct.pack("!HH", socket.IPPROTO_UDP, len(udp))
    good = checksum(packet[:20]) == 0 and checksum(pseudo + udp + bytes(len(udp) % 2)) == 0
    return not fragment and good and udp[6:8] != bytes(2)


class Receiver:
    """An application: an ordinary UDP socket that joined the group on dN."""

    def __init__(self, lab: Lab, output: int) -> None:
        with lab.sink.inside():
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, f"d{output}".encode())
            request = struct.pack(
                "=4s4si", socket.inet_aton(OUT_GROUP), bytes(4), socket.if_nametoindex(f"d{output}")
            )
            self._sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)  # struct ip_mreqn
            self._sock.bind((OUT_GROUP, OUT_PORT))
        self._sock.setblocking(False)

    def take(self, count: int) -> list[bytes]:
        """`count` datagrams, or what comes within the time-out."""
        got: list[bytes] = []
        end = time.monotonic() + _IN_TIME
        while len(got) < count and time.monotonic() < end:
            if select.select([self._sock], [], [], 0.05)[0]:
                got.append(self._sock.recv(1 << 16))
        return got

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


def sending(lab: Lab, bursts: Sequence[Sequence[bytes]]) -> Iterator[None]:
    """Each burst reaches r0 as single datagrams with whole checksums, all in one poll; yields after each.

    All of a burst are of one size, but for the last, which may be shorter.
    """
    lab.switch(lab.source, "s0", {CHECKSUMMING: False, UDP_SEGMENTATION: False})
    with open_source(lab) as sock:
        for burst in bursts:
            sock.sendmsg([b"".join(burst)], [segment_control(len(burst[0]))])
            yield


def open_source(lab: Lab) -> socket.socket:
    """The source's socket, connected to the first flow's group."""
    with lab.source.inside():
        return open_egress(socket.if_nametoindex("s0"), 4, GROUP, PORT, "egress", None)
