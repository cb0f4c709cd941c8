"""A receive ring in plain memory, with frames that the tests put there."""

import ipaddress
import mmap
import socket
import struct

import pytest

from mrelay.kernel import packet
from mrelay.worker import ingress


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    folded: int = ~total & 0xFFFF
    return folded


def udp_v4(
    payload: bytes, group: str = "239.1.1.1", source: str = "10.9.9.9", *, port: int = 5000,
    ttl: int = 16, tos: int = 0, options: bytes = b"", fragment: int = 0, protocol: int = 17,
) -> bytes:  # fmt: skip
    """An IPv4 packet with a right header checksum."""
    udp = struct.pack(">HHHH", 4000, port, 8 + len(payload), 0) + payload
    header = struct.pack(
        ">BBHHHBBH4s4s",
        0x45 + len(options) // 4,
        tos,
        20 + len(options) + len(udp),
        7,
        fragment,
        ttl,
        protocol,
        0,
        socket.inet_aton(source),
        socket.inet_aton(group),
    )
    header += options
    return header[:10] + struct.pack(">H", checksum(header)) + header[12:] + udp


def udp_v6(
    payload: bytes, group: str = "ff3e::1", source: str = "2001:db8::9", *, port: int = 5000,
    ttl: int = 16, tos: int = 0, extensions: bytes = b"", following: int = 17,
) -> bytes:  # fmt: skip
    """An IPv6 packet; `following` is the type of the first of `extensions`."""
    udp = struct.pack(">HHHH", 4000, port, 8 + len(payload), 0) + payload
    addresses = ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(group).packed
    fixed = struct.pack(">IHBB", 6 << 28 | tos << 20, len(extensions) + len(udp), following, ttl)
    return fixed + addresses + extensions + udp


class FakeRing(ingress.Ring):
    """`put` writes the next slot as the kernel would."""

    def put(
        self,
        packet_: bytes,
        *,
        vlan: int | None = None,
        segment: int = 0,
        captured: int | None = None,
        link: int = 14,
        to: bytes = bytes(6),
    ) -> None:
        slot = self._put = getattr(self, "_put", -1) + 1
        frame = to[:link] + bytes(max(0, link - len(to))) + packet_
        held = len(frame) if captured is None else captured
        status = packet.TP_STATUS_USER | (packet.TP_STATUS_VLAN_VALID if vlan else 0)
        at = slot * packet.SLOT
        mac = packet.L3_OFFSET - link
        packet.TPACKET2_HDR.pack_into(
            self.view, at, status, len(frame), held, mac, packet.L3_OFFSET, 1, slot, vlan or 0, 0
        )
        kind = packet.VIRTIO_NET_HDR_GSO_UDP_L4 if segment else 0
        packet.VIRTIO_NET_HDR.pack_into(self.view, at + mac - 10, 0, kind, 0, segment, 0, 0)
        self.view[at + mac : at + mac + held] = frame[:held]


def new_ring(monkeypatch: pytest.MonkeyPatch, *, used: bool = False) -> FakeRing:
    """An empty ring of 256 slots on interface 7."""
    monkeypatch.setattr(ingress, "map_ring", lambda fd, slots, slot: mmap.mmap(-1, slots * slot))
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    return FakeRing(sock, 7, 256, packet.SLOT, used=used)
