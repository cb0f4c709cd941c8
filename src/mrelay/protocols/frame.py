"""A frame as someone who only listens reads it: link layer, IP, and where the transport header is.

Pure; called by discovery, stream health and captures for every frame of a tap. Unlike worker.parse, which judges
what is forwarded, it also reads what is no UDP, and takes a frame that was captured in part. RFC 791, RFC 8200,
RFC 768; IEEE 802.1Q.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

ETHERNET: Final = 14  # bytes of link-layer header; 0 on a tunnel
IPPROTO_IGMP: Final = 2  # linux/in.h
IPPROTO_UDP: Final = 17
IPPROTO_ICMPV6: Final = 58  # linux/in6.h
_TAGS: Final = frozenset({0x8100, 0x88A8})  # linux/if_ether.h: ETH_P_8021Q, ETH_P_8021AD
# RFC 8200 §4.1: hop-by-hop, routing, destination options; RFC 8200 §4.5: fragment.
_EXTENSIONS: Final = frozenset({0, 43, 60})
_FRAGMENT: Final = 44
_V4 = struct.Struct(">BBHHHBBH4s4s")
_V6 = struct.Struct(">IHBB16s16s")
_UDP = struct.Struct(">HHHH")


class Packet(NamedTuple):
    """An IP packet. `start` and `end`: where its transport header begins and its captured bytes end.

    `vlans`: its tags, the outermost first. `ip`: where its IP header begins. A `fragment` that is not the first
    has no transport header at `start`.
    """

    vlans: tuple[int, ...]
    family: int
    source: int
    destination: int
    protocol: int
    ttl: int
    ip: int
    start: int
    end: int
    fragment: bool
    later: bool


class Datagram(NamedTuple):
    """A UDP datagram, or several that the kernel merged: ports, and where its payload begins and ends.

    `length`: of the payload, captured or not.
    """

    source_port: int
    port: int
    start: int
    end: int
    length: int


def walk(data: bytes, link: int = ETHERNET, vlan: int | None = None) -> Packet | None:
    """The packet in a frame with `link` bytes of link-layer header; None when there is no whole IP header.

    `vlan`: the tag that the kernel took off.
    """
    vlans: tuple[int, ...] = () if vlan is None else (vlan,)
    at = link
    if link == ETHERNET:
        kind = int.from_bytes(data[12:14])
        while kind in _TAGS and len(data) >= at + 4:
            vlans += (int.from_bytes(data[at : at + 2]) & 0xFFF,)
            kind, at = int.from_bytes(data[at + 2 : at + 4]), at + 4
    if len(data) <= at:
        return None
    version = data[at] >> 4
    if version == 4:
        return _walk_v4(data, at, vlans)
    return _walk_v6(data, at, vlans) if version == 6 else None


def _walk_v4(data: bytes, at: int, vlans: tuple[int, ...]) -> Packet | None:
    if len(data) - at < _V4.size:
        return None
    first, _, total, _, fragment, ttl, protocol, _, source, destination = _V4.unpack_from(data, at)
    header = (first & 0xF) * 4
    if header < _V4.size or total < header or len(data) < at + header:
        return None
    addresses = int.from_bytes(source), int.from_bytes(destination)
    end = min(at + total, len(data))
    pieces = bool(fragment & 0x3FFF), bool(fragment & 0x1FFF)  # more fragments, or an offset; an offset
    return Packet(vlans, 4, *addresses, protocol, ttl, at, at + header, end, *pieces)


def _walk_v6(data: bytes, ip: int, vlans: tuple[int, ...]) -> Packet | None:
    if len(data) - ip < _V6.size:
        return None
    _, payload, following, hops, source, destination = _V6.unpack_from(data, ip)
    at = ip + _V6.size
    end, fragment = min(at + payload, len(data)), 0
    while following in _EXTENSIONS or following == _FRAGMENT:
        if end - at < 8:
            return None
        if following == _FRAGMENT:
            fragment |= int.from_bytes(data[at + 2 : at + 4]) & 0xFFF9
        size = 8 if following == _FRAGMENT else (data[at + 1] + 1) * 8
        following, at = data[at], at + size
    if at > end:
        return None
    addresses = int.from_bytes(source), int.from_bytes(destination)
    return Packet(vlans, 6, *addresses, following, hops, ip, at, end, bool(fragment), fragment > 1)


def datagram(data: bytes, packet: Packet, *, pieces: bool = False) -> Datagram | None:
    """The UDP datagram in a packet, as far as it was captured; None when it is something else, or a fragment.

    `pieces`: the first fragment will do.
    """
    wanted = not packet.later if pieces else not packet.fragment
    if packet.protocol != IPPROTO_UDP or not wanted or packet.end - packet.start < _UDP.size:
        return None
    source_port, port, length, _ = _UDP.unpack_from(data, packet.start)
    if length < _UDP.size:
        return None
    return Datagram(source_port, port, packet.start + 8, min(packet.start + length, packet.end), length - 8)


def segments(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the payload of each datagram lies that the kernel merged into [start, end); `size` 0: it is one."""
    if size <= 0 or end - start <= size:
        yield start, end
        return
    for at in range(start, end, size):
        yield at, min(at + size, end)


def checksum(data: bytes) -> int:
    """RFC 1071 over these bytes: 0 when a checksum in them is right.

    A number is congruent to the sum of its 16-bit digits modulo 0xffff, so the division adds them all up at once.
    """
    total = int.from_bytes(data if len(data) % 2 == 0 else data + b"\0")
    if total == 0:
        return 0xFFFF
    return 0xFFFF - (total % 0xFFFF or 0xFFFF)
