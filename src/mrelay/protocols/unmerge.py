"""Frames as they are on the wire, from frames as the kernel hands them about.

Pure; called by captures. The kernel merges datagrams (GRO), takes VLAN tags off and leaves checksums to the
network card; whoever reads a capture wants none of that. RFC 791, RFC 8200, RFC 768.
"""

import struct
from collections.abc import Iterator

from mrelay.protocols.frame import IPPROTO_UDP, Datagram, Packet, checksum, datagram, segments, walk


def unmerged(data: bytes, link: int, *, vlan: int | None, segment: int, complete: bool) -> Iterator[bytes]:
    """Each datagram as a frame of its own, tagged if it was.

    `link`: bytes of link-layer header; `segment`: payload of each merged datagram, 0 for one that is whole
    already; `complete`: its checksum is there. A frame that is no UDP datagram stays as it is, but for the tag.
    """
    tag = b"" if vlan is None or link < 14 else struct.pack(">HH", 0x8100, vlan)
    packet = walk(data, link)
    found = datagram(data, packet) if packet is not None else None
    if packet is None or found is None or (segment == 0 and complete):
        yield _tagged(data, link, tag)
        return
    for number, (start, end) in enumerate(segments(found.start, found.end, segment)):
        yield _tagged(_frame(data, packet, found, number, data[start:end]), link, tag)


def _tagged(data: bytes, link: int, tag: bytes) -> bytes:
    return data[: link - 2] + tag + data[link - 2 :] if tag else data


def _frame(data: bytes, packet: Packet, found: Datagram, number: int, payload: bytes) -> bytes:
    """The frame of one datagram: the merged one's headers, with lengths and checksums of its own."""
    ip = bytearray(data[packet.ip : packet.start])
    udp = struct.pack(">HHHH", found.source_port, found.port, 8 + len(payload), 0)
    if packet.family == 4:
        identification = (int.from_bytes(ip[4:6]) + number) & 0xFFFF
        ip[2:6] = struct.pack(">HH", len(ip) + 8 + len(payload), identification)
        ip[10:12] = bytes(2)
        ip[10:12] = checksum(bytes(ip)).to_bytes(2)
    else:
        ip[4:6] = (len(ip) - 40 + 8 + len(payload)).to_bytes(2)
    size = 4 if packet.family == 4 else 16
    pseudo = packet.source.to_bytes(size) + packet.destination.to_bytes(size)
    pseudo += struct.pack(">II", 8 + len(payload), IPPROTO_UDP)
    total = checksum(pseudo + udp + payload) or 0xFFFF  # RFC 768: 0 means that there is none
    return data[: packet.ip] + bytes(ip) + udp[:6] + total.to_bytes(2) + payload
