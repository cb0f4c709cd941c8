"""One frame's network and transport headers, read strictly: what it is, or why it is dropped.

Pure; called by the scalar path for every frame and by the vector path for those that are not plainly
regular. RFC 791, RFC 8200, RFC 768.
"""

import struct
from typing import Final, NamedTuple

from mrelay.counters import FRAGMENT, MALFORMED, NOT_UDP, TRUNCATED

IPPROTO_UDP: Final = 17
# IPv6 extension headers that are stepped over (RFC 8200 §4.1): hop-by-hop, routing, destination options.
_EXTENSIONS: Final = frozenset({0, 43, 60})
_FRAGMENT: Final = 44
_V4 = struct.Struct(">BBHHHBBHII")
_V6 = struct.Struct(">IHBB16s16s")
_UDP = struct.Struct(">HHHH")
_WORDS: Final = {header: f"={header // 4}I" for header in range(20, 61, 4)}  # an IPv4 header in 32-bit words


class Datagram(NamedTuple):
    """A UDP datagram (or a merged frame of several). `start`, `length`: its payload's, in bytes."""

    family: int
    source: int
    group: int
    port: int
    start: int
    length: int
    hop: int  # TTL << 8 | TOS


def parse(data: memoryview, start: int, end: int) -> Datagram | int:
    """The datagram whose network header is at data[start], or a drop reason (an index of DROP_REASONS).

    `end` is where the captured bytes stop; padding behind the datagram is fine.
    """
    if end <= start:
        return TRUNCATED
    version = data[start] >> 4
    if version == 4:
        return _parse_v4(data, start, end)
    return _parse_v6(data, start, end) if version == 6 else MALFORMED


def _parse_v4(data: memoryview, start: int, end: int) -> Datagram | int:
    if end - start < _V4.size:
        return TRUNCATED
    first, tos, total, _, fragment, ttl, protocol, _, source, group = _V4.unpack_from(data, start)
    header = (first & 0xF) * 4
    if header < _V4.size or total < header:
        return MALFORMED
    if total > end - start:
        return TRUNCATED
    if not checksum_holds(data, start, header):
        return MALFORMED
    if fragment & 0x3FFF:  # more fragments, or an offset
        return FRAGMENT
    if protocol != IPPROTO_UDP:
        return NOT_UDP
    return _parse_udp(data, start + header, start + total, (4, source, group, ttl << 8 | tos))


def checksum_holds(data: memoryview, start: int, header: int) -> bool:
    """Whether the IPv4 header of `header` bytes at data[start] has a right checksum (RFC 1071)."""
    total: int = sum(struct.unpack_from(_WORDS[header], data, start))
    return total % 0xFFFF == 0  # ones' complement: a right sum is 0xffff, that is 0


def _parse_v6(data: memoryview, start: int, end: int) -> Datagram | int:
    if end - start < _V6.size:
        return TRUNCATED
    word, payload, following, hops, source, group = _V6.unpack_from(data, start)
    at, stop = start + _V6.size, start + _V6.size + payload
    if stop > end:
        return TRUNCATED
    while following in _EXTENSIONS or following == _FRAGMENT:
        if stop - at < 8:
            return MALFORMED
        if following == _FRAGMENT and int.from_bytes(data[at + 2 : at + 4]) & 0xFFF9:
            return FRAGMENT  # an atomic fragment (RFC 6946) is a whole datagram
        size = 8 if following == _FRAGMENT else (data[at + 1] + 1) * 8
        following, at = data[at], at + size
    if following != IPPROTO_UDP:
        return NOT_UDP
    addresses = int.from_bytes(source), int.from_bytes(group)
    return _parse_udp(data, at, stop, (6, *addresses, hops << 8 | (word >> 20 & 0xFF)))


def _parse_udp(data: memoryview, at: int, stop: int, network: tuple[int, int, int, int]) -> Datagram | int:
    if stop - at < _UDP.size:
        return MALFORMED
    _, port, length, _ = _UDP.unpack_from(data, at)
    if length < _UDP.size or length > stop - at:
        return MALFORMED
    family, source, group, hop = network
    return Datagram(family, source, group, port, at + 8, length - 8, hop)
