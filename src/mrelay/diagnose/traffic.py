"""What was heard on an interface, stream by stream, and how it differs from what a rule wants.

Pure; fed with a tap's frames by control, read by the stages. Bounded: a flood of streams is counted, not kept.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from mrelay.kernel.tap import Frame
from mrelay.model.endpoint import Input, Network
from mrelay.protocols.frame import IPPROTO_UDP, Datagram, Packet, checksum, datagram, segments, walk

MOST_STREAMS: Final = 1000
PROTOCOLS: Final = {1: "ICMP", 2: "IGMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 89: "OSPF", 103: "PIM", 112: "VRRP"}
# What a stream may differ in from a rule's input, the likeliest mistake first.
PORT, SOURCE, VLAN, PROTOCOL, GROUP = "port", "source", "VLAN", "protocol", "group"
_ORDER: Final = (PORT, SOURCE, VLAN, PROTOCOL, GROUP)


@dataclass(frozen=True, slots=True)
class Name:
    """What makes a stream: `vlan` None is untagged; `port` 0 where there is none to be seen."""

    vlan: int | None
    family: int
    source: int
    group: int
    protocol: int
    port: int

    def __str__(self) -> str:
        port = f" port {self.port}" if self.port else ""
        tag = "" if self.vlan is None else f", VLAN {self.vlan}"
        return f"{self.source_text} -> {self.group_text}{port}{tag}"

    @property
    def source_text(self) -> str:
        """The source as people write it."""
        return address_text(self.family, self.source)

    @property
    def group_text(self) -> str:
        """The group as people write it."""
        return address_text(self.family, self.group)


@dataclass(slots=True)
class Stream:
    """Counts of one stream. Checksums: of those that could be checked. `longest`: bytes of IP in one datagram."""

    datagrams: int = 0
    fragments: int = 0
    ttl_low: int = 255
    ttl_high: int = 0
    headers_bad: int = 0
    checked: int = 0
    checksums_bad: int = 0
    longest: int = 0


@dataclass(slots=True)
class Traffic:
    """All streams heard. `unreadable`: frames without a whole IP header; `more`: datagrams of streams not kept."""

    streams: dict[Name, Stream] = field(default_factory=dict)
    unreadable: int = 0
    more: int = 0
    lost: int = 0  # by the tap

    def add(self, frame: Frame) -> None:
        """Count one frame."""
        packet = walk(frame.data, frame.network, frame.vlan)
        if packet is None:
            self.unreadable += 1
            return
        found = datagram(frame.data, packet)
        vlan = packet.vlans[0] if packet.vlans else 0
        port = found.port if found is not None else 0
        name = Name(
            vlan or None, packet.family, packet.source, packet.destination, packet.protocol, port
        )  # VLAN 0 is a priority alone
        stream = self.streams.get(name)
        if stream is None:
            if len(self.streams) >= MOST_STREAMS:
                self.more += 1
                return
            stream = self.streams[name] = Stream()
        _count(stream, frame, packet, found)


def _count(stream: Stream, frame: Frame, packet: Packet, found: Datagram | None) -> None:
    whole = len(list(segments(0, _payload(frame, packet), frame.segment))) if found is not None else 1
    stream.datagrams += whole
    stream.fragments += packet.fragment
    stream.ttl_low, stream.ttl_high = min(stream.ttl_low, packet.ttl), max(stream.ttl_high, packet.ttl)
    length = frame.segment + packet.start - packet.ip + 8 if frame.segment else frame.length - frame.network
    stream.longest = max(stream.longest, length)
    if packet.family == 4 and checksum(frame.data[packet.ip : packet.start]) != 0:
        stream.headers_bad += 1
    if found is not None and frame.complete and not frame.segment and len(frame.data) >= frame.length:
        right = _right(frame.data, packet)
        stream.checked += right is not None
        stream.checksums_bad += right is False


def _payload(frame: Frame, packet: Packet) -> int:
    """Bytes of UDP payload on the wire, also where fewer were captured."""
    return max(1, frame.length - packet.start - 8)


def _right(data: bytes, packet: Packet) -> bool | None:
    """Whether the UDP checksum holds; None where there is none (RFC 768), or the datagram is cut short."""
    length = int.from_bytes(data[packet.start + 4 : packet.start + 6])
    body = data[packet.start : min(packet.start + length, packet.end)]
    if len(body) < length:
        return None
    if body[6:8] == b"\0\0":
        return None if packet.family == 4 else False  # RFC 8200 §8.1
    size = 4 if packet.family == 4 else 16
    addresses = packet.source.to_bytes(size) + packet.destination.to_bytes(size)
    return checksum(addresses + struct.pack(">II", len(body), IPPROTO_UDP) + body) == 0


def address_text(family: int, address: int) -> str:
    """An address as people write it."""
    return str(ip_address(address.to_bytes(4 if family == 4 else 16)))


def differs(name: Name, wanted: Input) -> tuple[str, ...]:
    """In what a stream is not what a rule wants, likeliest mistake first; nothing when it is."""
    found: list[str] = []
    known = bool(name.port)
    if known and not wanted.ports.low <= name.port <= wanted.ports.high:
        found.append(PORT)
    if wanted.source is not None and not _within(name.family, name.source, wanted.source):
        found.append(SOURCE)
    if name.vlan != wanted.vlan:
        found.append(VLAN)
    if name.protocol != IPPROTO_UDP:
        found.append(PROTOCOL)
    if not _within(name.family, name.group, wanted.address):
        found.append(GROUP)
    return tuple(found)


def _within(family: int, address: int, network: Network) -> bool:
    low, high = int(network.network_address), int(network.broadcast_address)
    return family == network.version and low <= address <= high


def matching(traffic: Traffic, wanted: Input) -> list[tuple[Name, Stream]]:
    """The streams that the rule takes, the busiest first."""
    found = [(name, stream) for name, stream in traffic.streams.items() if name.port and not differs(name, wanted)]
    return sorted(found, key=lambda one: -one[1].datagrams)


def portless(traffic: Traffic, wanted: Input) -> list[tuple[Name, Stream]]:
    """What may be the rule's, but shows no port: fragments, and UDP headers that make no sense."""
    return [(name, s) for name, s in traffic.streams.items() if not name.port and not differs(name, wanted)]


def near(
    traffic: Traffic, wanted: Input, taken: Sequence[Input] = ()
) -> list[tuple[Name, Stream, tuple[str, ...]]]:
    """Streams that are nearly what the rule wants, the nearest and busiest first; none that is `taken` by others.

    Of other groups only one that a slip of the pen makes of this one: a single number differs, and nothing else.
    """
    found = []
    for name, stream in traffic.streams.items():
        what = differs(name, wanted)
        alike = GROUP not in what or (what == (GROUP,) and _slip(name, wanted.address))
        if what and alike and all(differs(name, other) for other in taken):
            found.append((name, stream, what))
    return sorted(found, key=lambda one: (len(one[2]), _ORDER.index(one[2][-1]), -one[1].datagrams))


def _slip(name: Name, wanted: Network) -> bool:
    if name.family != wanted.version:
        return False
    size = 1 if name.family == 4 else 2
    here, there = name.group.to_bytes(4 if name.family == 4 else 16), wanted.network_address.packed
    return sum(here[at : at + size] != there[at : at + size] for at in range(0, len(here), size)) == 1
