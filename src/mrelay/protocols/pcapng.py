"""Captures as pcapng: the blocks that a file is made of.

Pure; called by control's captures. draft-ietf-opsawg-pcapng: Section Header §4.1, Interface Description §4.2,
Enhanced Packet §4.3, Interface Statistics §4.6; options §3.5. Little-endian; times are nanoseconds since 1970.
"""

import struct
from typing import Final

LINKTYPE_ETHERNET: Final = 1  # draft-ietf-opsawg-pcaplinktype
LINKTYPE_RAW: Final = 101
_SECTION_HEADER: Final = 0x0A0D0D0A
_BYTE_ORDER: Final = 0x1A2B3C4D
_INTERFACE: Final = 1
_STATISTICS: Final = 5
_PACKET: Final = 6
_OPT_COMMENT: Final = 1
_SHB_USERAPPL: Final = 4
_IF_NAME: Final = 2
_IF_TSRESOL: Final = 9
_EPB_FLAGS: Final = 2
_ISB_IFRECV: Final = 4
_ISB_OSDROP: Final = 7
_INBOUND: Final = 1  # epb_flags §4.3.1
_OUTBOUND: Final = 2


def section(application: str) -> bytes:
    """How a file begins; `application` wrote it."""
    body = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1)  # version 1.0, of a length that is not known yet
    return _block(_SECTION_HEADER, body + _options((_SHB_USERAPPL, application.encode())))


def interface(name: str, link: int, snap: int) -> bytes:
    """An interface of `link`, a LINKTYPE_*; packets name it by its place among the interfaces, from 0."""
    resolution = (_IF_TSRESOL, bytes([9]))  # 10^-9 seconds
    return _block(_INTERFACE, struct.pack("<HHI", link, 0, snap) + _options((_IF_NAME, name.encode()), resolution))


def packet(at: int, time: int, data: bytes, length: int, *, comment: str = "", outgoing: bool = False) -> bytes:
    """A packet of interface `at` that was `length` bytes long; `data` is its beginning."""
    head = struct.pack("<IIIII", at, time >> 32, time & 0xFFFFFFFF, len(data), length)
    options = [(_EPB_FLAGS, struct.pack("<I", _OUTBOUND if outgoing else _INBOUND))]
    if comment:
        options.append((_OPT_COMMENT, comment.encode()))
    return _block(_PACKET, head + _padded(data) + _options(*options))


def statistics(at: int, time: int, received: int, dropped: int) -> bytes:
    """How many packets of interface `at` were there, and how many of them the capture was too slow for."""
    counts = ((_ISB_IFRECV, struct.pack("<Q", received)), (_ISB_OSDROP, struct.pack("<Q", dropped)))
    return _block(_STATISTICS, struct.pack("<III", at, time >> 32, time & 0xFFFFFFFF) + _options(*counts))


def _block(kind: int, body: bytes) -> bytes:
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length


def _options(*options: tuple[int, bytes]) -> bytes:
    written = (struct.pack("<HH", code, len(value)) + _padded(value) for code, value in options)
    return b"".join(written) + bytes(4)  # opt_endofopt


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
