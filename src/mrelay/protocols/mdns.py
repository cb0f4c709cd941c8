"""Multicast DNS as a listener hears it: hosts' names and the services they offer.

Pure; called by discovery. RFC 6762 (mDNS), RFC 6763 (service discovery), RFC 1035 §4 (the wire format). Only
answers are read, and of them only addresses (A, AAAA) and services (SRV).
"""

import ipaddress
import struct
from typing import Final, NamedTuple

from mrelay.protocols.sap import printable

PORT: Final = 5353  # RFC 6762 §3
_HEADER = struct.Struct(">HHHHHH")
_RECORD = struct.Struct(">HHIH")
_MAX_RECORDS: Final = 256
_MAX_NAME: Final = 255  # bytes, RFC 1035 §2.3.4
_A: Final = 1  # RFC 1035 §3.2.2
_AAAA: Final = 28  # RFC 3596 §2.1
_SRV: Final = 33  # RFC 2782


class Host(NamedTuple):
    """A host's name and one of its addresses."""

    name: str
    address: str


class Service(NamedTuple):
    """A service's name, and the host and port where it is."""

    name: str
    host: str
    port: int


def answers(data: bytes) -> list[Host | Service]:
    """What a message says of hosts and services; what does not parse, and all behind it, is left out."""
    if len(data) < _HEADER.size:
        return []
    _, flags, questions, *counts = _HEADER.unpack_from(data)
    if not flags & 0x8000:  # QR: a query
        return []
    found: list[Host | Service] = []
    at = _HEADER.size
    try:
        for _ in range(min(questions, _MAX_RECORDS)):
            at = _name(data, at)[1] + 4
        for _ in range(min(sum(counts), _MAX_RECORDS)):
            name, at = _name(data, at)
            kind, _, _, length = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            found += _read(name, kind, data, at, length)
            at += length
    except (IndexError, struct.error):
        pass  # cut short
    return found


def _read(name: str, kind: int, data: bytes, at: int, length: int) -> list[Host | Service]:
    value = data[at : at + length]
    if (kind, len(value)) in ((_A, 4), (_AAAA, 16)):
        return [Host(name, str(ipaddress.ip_address(value)))]
    if kind == _SRV and length > 6:
        return [Service(name, _name(data, at + 6)[0], int.from_bytes(value[4:6]))]
    return []


def _name(data: bytes, at: int) -> tuple[str, int]:
    """The name at data[at] and where what follows begins (RFC 1035 §4.1.4). IndexError when it is none."""
    labels: list[bytes] = []
    follow, size = -1, 0
    while length := data[at]:
        if length >= 0xC0:
            follow = at + 2 if follow < 0 else follow
            target = (length & 0x3F) << 8 | data[at + 1]
            if target >= at:  # only backwards, or it never ends
                raise IndexError
            at = target
            continue
        size += length + 1
        if length > 63 or size > _MAX_NAME or at + length >= len(data):
            raise IndexError
        labels.append(data[at + 1 : at + 1 + length])
        at += 1 + length
    return printable(b".".join(labels).decode(errors="replace")), at + 1 if follow < 0 else follow
