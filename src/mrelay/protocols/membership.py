"""IGMP and MLD as a listener hears them: who asks, and who wants which group.

Pure; called by discovery. Messages of all versions come out in the words of the newest (RFC 3376 §7.3.2, RFC 3810
§8.3.2): an old report is one that excludes no source, a leave one that includes none.
IGMPv1 RFC 1112, IGMPv2 RFC 2236, IGMPv3 RFC 3376; MLDv1 RFC 2710, MLDv2 RFC 3810.
"""

import enum
import struct
from typing import Final, NamedTuple

from mrelay.protocols.frame import IPPROTO_ICMPV6, IPPROTO_IGMP, Packet, checksum


class _Igmp(enum.IntEnum):
    """RFC 3376 §4, RFC 2236 §2.1."""

    QUERY = 0x11
    V1_REPORT = 0x12
    V2_REPORT = 0x16
    LEAVE = 0x17
    V3_REPORT = 0x22


class _Mld(enum.IntEnum):
    """RFC 3810 §5, RFC 2710 §3.1."""

    QUERY = 130
    REPORT = 131
    DONE = 132
    V2_REPORT = 143


class Kind(enum.IntEnum):
    """What a group record says (RFC 3376 §4.2.12, RFC 3810 §5.2.12)."""

    MODE_IS_INCLUDE = 1
    MODE_IS_EXCLUDE = 2
    CHANGE_TO_INCLUDE_MODE = 3
    CHANGE_TO_EXCLUDE_MODE = 4
    ALLOW_NEW_SOURCES = 5
    BLOCK_OLD_SOURCES = 6


_KINDS: Final = frozenset(map(int, Kind))


class Query(NamedTuple):
    """A querier asks; `group` 0: for all groups. `version` of IGMP or MLD; `response`: seconds to answer in."""

    version: int
    group: int
    sources: tuple[int, ...]
    response: float


class Record(NamedTuple):
    """A member says what it wants of `group`, or no longer wants. `version` of IGMP or MLD."""

    version: int
    kind: Kind
    group: int
    sources: tuple[int, ...]

    @property
    def leaves(self) -> bool:
        """Whether it wants nothing of the group any more, as far as it says."""
        return self.kind is Kind.BLOCK_OLD_SOURCES or (
            self.kind in (Kind.MODE_IS_INCLUDE, Kind.CHANGE_TO_INCLUDE_MODE) and not self.sources
        )


Heard = Query | Record


def messages(data: bytes, packet: Packet) -> list[Heard]:
    """What an IGMP or MLD message says; nothing when it is none, cut short or damaged.

    One of a version or type that is not known is ignored, as RFC 3376 §4 asks.
    """
    if packet.fragment:
        return []
    body = data[packet.start : packet.end]
    if packet.family == 4 and packet.protocol == IPPROTO_IGMP:
        return _igmp(body) if len(body) >= 8 and checksum(body) == 0 else []
    if packet.family == 6 and packet.protocol == IPPROTO_ICMPV6 and len(body) >= 8:
        pseudo = struct.pack(">16s16sII", *_addresses(packet), len(body), IPPROTO_ICMPV6)  # RFC 8200 §8.1
        return _mld(body) if checksum(pseudo + body) == 0 else []
    return []


def _addresses(packet: Packet) -> tuple[bytes, bytes]:
    return packet.source.to_bytes(16), packet.destination.to_bytes(16)


def _igmp(body: bytes) -> list[Heard]:
    kind, code, group = body[0], body[1], int.from_bytes(body[4:8])
    match kind:
        case _Igmp.QUERY if len(body) >= 12:
            return _query(3, group, body[8:], 4, _exponential(code, 0x80, 4) / 10)
        case _Igmp.QUERY:
            return [Query(2, group, (), code / 10) if code else Query(1, group, (), 10.0)]  # RFC 2236 §4
        case _Igmp.V1_REPORT:
            return [Record(1, Kind.CHANGE_TO_EXCLUDE_MODE, group, ())]
        case _Igmp.V2_REPORT:
            return [Record(2, Kind.CHANGE_TO_EXCLUDE_MODE, group, ())]
        case _Igmp.LEAVE:
            return [Record(2, Kind.CHANGE_TO_INCLUDE_MODE, group, ())]
        case _Igmp.V3_REPORT:
            return _records(3, body, 4)
    return []


def _mld(body: bytes) -> list[Heard]:
    kind, group = body[0], int.from_bytes(body[8:24])
    if kind == _Mld.V2_REPORT:
        return _records(2, body, 16)
    if len(body) < 24:
        return []
    code = int.from_bytes(body[4:6])
    match kind:
        case _Mld.QUERY if len(body) >= 28:
            return _query(2, group, body[24:], 16, _exponential(code, 0x8000, 12) / 1000)
        case _Mld.QUERY:
            return [Query(1, group, (), code / 1000)]
        case _Mld.REPORT:
            return [Record(1, Kind.CHANGE_TO_EXCLUDE_MODE, group, ())]
        case _Mld.DONE:
            return [Record(1, Kind.CHANGE_TO_INCLUDE_MODE, group, ())]
    return []


def _exponential(code: int, limit: int, bits: int) -> int:
    """A Max Resp Code above `limit` is a floating-point number (RFC 3376 §4.1.1, RFC 3810 §5.1.3)."""
    if code < limit:
        return code
    mantissa, exponent = code & ((1 << bits) - 1), code >> bits & 7
    return (mantissa | 1 << bits) << (exponent + 3)


def _query(version: int, group: int, rest: bytes, size: int, response: float) -> list[Heard]:
    sources = _sources(rest[4:], int.from_bytes(rest[2:4]), size)
    return [] if sources is None else [Query(version, group, sources, response)]


def _records(version: int, body: bytes, size: int) -> list[Heard]:
    """The group records that are whole and of a known kind."""
    found: list[Heard] = []
    at = 8
    for _ in range(int.from_bytes(body[6:8])):
        if len(body) < at + 4 + size:
            break
        kind, auxiliary, count = body[at], body[at + 1], int.from_bytes(body[at + 2 : at + 4])
        group = int.from_bytes(body[at + 4 : at + 4 + size])
        sources = _sources(body[at + 4 + size :], count, size)
        if sources is None:
            break
        if kind in _KINDS:
            found.append(Record(version, Kind(kind), group, sources))
        at += 4 + size + count * size + auxiliary * 4
    return found


def _sources(data: bytes, count: int, size: int) -> tuple[int, ...] | None:
    """`count` addresses of `size` bytes; None when they are not all there."""
    if len(data) < count * size:
        return None
    return tuple(int.from_bytes(data[at : at + size]) for at in range(0, count * size, size))
