"""Session announcements: who sends what to which group, in the sender's own words.

Pure; called by discovery. SAP RFC 2974; SDP RFC 8866, of which only what names a stream and says where it goes;
source filters RFC 4570. SMPTE ST 2110, AES67 and SAP-announced IPTV use them.
"""

import ipaddress
import struct
import zlib
from collections.abc import Iterable
from typing import Final, NamedTuple

PORT: Final = 9875  # RFC 2974 §3
MAX_SDP: Final = 8192  # bytes; RFC 2974 §3 asks for less than 1 kB
_MAX_MEDIA: Final = 64
_V4 = struct.Struct(">BBH4s")
_V6 = struct.Struct(">BBH16s")


class Announcement(NamedTuple):
    """One SAP packet (RFC 2974 §6). `deletes`: the session of this origin and hash is over. `sdp`: its text."""

    deletes: bool
    hash: int
    origin: str
    sdp: str


class Media(NamedTuple):
    """One m= line with its c= line (RFC 8866 §5.7, §5.14). `address` and `source` may be empty.

    `groups`: how many consecutive groups from `address` on. `ports`: how many consecutive ports, two apart for
    RTP.
    """

    kind: str
    address: str
    groups: int
    port: int
    ports: int
    protocol: str
    formats: tuple[str, ...]
    source: str


class Session(NamedTuple):
    """What a session description says (RFC 8866 §5)."""

    name: str
    media: tuple[Media, ...]


def announcement(data: bytes) -> Announcement | None:
    """The announcement in a datagram; None when it is none, or encrypted (RFC 2974 §7)."""
    if len(data) < _V4.size or data[0] >> 5 != 1:
        return None
    head = _V6 if data[0] & 0x10 else _V4
    if len(data) < head.size:
        return None
    flags, words, number, origin = head.unpack_from(data)
    if flags & 0x02:  # E
        return None
    body = data[head.size + words * 4 :]
    if flags & 0x01:  # C
        body = _inflated(body)
    if not body.startswith(b"v=0"):  # a payload type comes first
        kind, _, body = body.partition(b"\0")
        if kind != b"application/sdp":
            return None
    text = body[:MAX_SDP].decode(errors="replace")
    return Announcement(bool(flags & 0x04), number, str(ipaddress.ip_address(origin)), text)


def _inflated(body: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(body, MAX_SDP)
    except zlib.error:
        return b""


def session(sdp: str) -> Session:
    """The session that the text describes; what does not parse is left out."""
    name, media = "", list[Media]()
    address, source = ("", 1), ""  # of the session; a media section may have its own
    for line in sdp.splitlines():
        kind, _, value = line.partition("=")
        match kind:
            case "s" if not media:
                name = printable(value)
            case "m" if len(media) < _MAX_MEDIA:
                media += _media(value, address, source)
            case "c" if media:
                where, groups = _connection(value)
                media[-1] = media[-1]._replace(address=where, groups=groups)
            case "c":
                address = _connection(value)
            case "a" if media:
                media[-1] = media[-1]._replace(source=_source(value) or media[-1].source)
            case "a":
                source = _source(value) or source
    return Session(name, tuple(media))


def printable(text: str) -> str:
    """Text from the network as one short line that can't do anything to a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.strip()[:80])


def _media(value: str, address: tuple[str, int], source: str) -> Iterable[Media]:
    """m=<media> <port>[/<number of ports>] <proto> <fmt> …"""
    words = value.split()
    if len(words) < 3:
        return []
    port, _, ports = words[1].partition("/")
    number, count = _number(port, 65535), _number(ports or "1", 65535)
    if number is None or count is None:
        return []
    kind, protocol, *formats = map(printable, (words[0], words[2], *words[3:35]))
    return [Media(kind, *address, number, count, protocol, tuple(formats), source)]


def _connection(value: str) -> tuple[str, int]:
    """c=IN IP4 <address>[/<ttl>[/<number>]], c=IN IP6 <address>[/<number>]: address and number of groups."""
    words = value.split()
    if len(words) < 3 or words[0] != "IN":
        return "", 1
    address, *rest = words[2].split("/")
    count = rest[-1] if len(rest) == (2 if words[1] == "IP4" else 1) else "1"
    return _address(address), _number(count, 256) or 1


def _source(value: str) -> str:
    """a=source-filter: incl IN IP4 <group> <source> (RFC 4570 §3), when it names a single source."""
    words = value.split()
    if len(words) == 6 and words[:3] == ["source-filter:", "incl", "IN"]:
        return _address(words[5])
    return ""


def _address(text: str) -> str:
    """The address in its usual form; nothing when it is none (a host name, for example)."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return ""


def _number(text: str, most: int) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 and int(text) <= most else None
