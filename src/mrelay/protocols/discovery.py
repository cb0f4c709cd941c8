"""What is on an interface: groups, who sends to them, who wants them, and what they are called.

A pure state machine: it is given each frame of a tap and the time it came. Called by control's discovery. All
tables are bounded; what finds no room is counted.
"""

import ipaddress
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

from mrelay.protocols import mdns, sap
from mrelay.protocols.frame import Datagram, Packet, datagram, walk
from mrelay.protocols.membership import Query, Record, messages

MAX_GROUPS: Final = 4096
MAX_EACH: Final = 64  # sources, members, names of one group
MAX_NAMES: Final = 4096  # hosts and services of multicast DNS
SPAN: Final = 3.0  # seconds that rates are over, at least
_MULTICAST: Final = {4: 0xE0000000, 6: 0xFF << 120}

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Place(NamedTuple):
    """Where streams go. `vlan` 0: untagged; `port` 0: not known, somebody wants the group or announced no port."""

    vlan: int
    family: int
    group: int
    port: int


@dataclass(slots=True)
class Source:
    """One sender to a place: datagrams, payload bytes, the TTL that the last one had."""

    packets: int = 0
    bytes: int = 0
    ttl: int = 0


@dataclass(slots=True)
class Group:
    """What is known of a place. `names`: of sessions announced for it; `announced`: the sources these name."""

    sources: dict[int, Source] = field(default_factory=dict)
    members: set[int] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    announced: set[int] = field(default_factory=set)
    rates: tuple[float, float] = (0.0, 0.0)  # datagrams, payload bits a second
    mark: tuple[float, int, int] = (0.0, 0, 0)  # rates are since then: seconds, and the totals at that time

    def totals(self) -> tuple[int, int]:
        """Datagrams and payload bytes of all sources."""
        return sum(one.packets for one in self.sources.values()), sum(one.bytes for one in self.sources.values())


class Discovery:
    """Everything heard so far. `queriers`: by address, the version each last asked in (IGMP, or MLD for IPv6).

    `hosts`: names by address; `services`: by name, where each is. `left_out`: what there was no room for.
    """

    def __init__(self) -> None:
        self.groups: dict[Place, Group] = {}
        self.queriers: dict[int, tuple[int, int]] = {}
        self.hosts: dict[str, str] = {}
        self.services: dict[str, tuple[str, int]] = {}
        self.left_out = 0
        self.frames = 0

    def add(self, data: bytes, now: float, *, link: int = 14, vlan: int | None = None, segment: int = 0) -> None:
        """A frame came at `now` (seconds); the rest as frame.walk and frame.segments have it."""
        self.frames += 1
        packet = walk(data, link, vlan)
        if packet is None or packet.destination < _MULTICAST[packet.family] or len(packet.vlans) > 1:
            return
        tag = packet.vlans[0] if packet.vlans else 0
        found = datagram(data, packet)
        if found is None:
            self._membership(data, packet, tag, now)
            return
        self._traffic(packet, found, tag, segment, now)
        if found.port == sap.PORT:
            self._session(data[found.start : found.end], tag, now)
        elif found.port == mdns.PORT:
            self._names(data[found.start : found.end])

    def tick(self, now: float) -> None:
        """Bring the rates up to date; call it about once a second."""
        for group in self.groups.values():
            (packets, octets), (since, packets_then, octets_then) = group.totals(), group.mark
            passed = max(now - since, 0.1)
            group.rates = (packets - packets_then) / passed, (octets - octets_then) * 8 / passed
            if passed >= SPAN:
                group.mark = (now, packets, octets)

    def _traffic(self, packet: Packet, found: Datagram, vlan: int, segment: int, now: float) -> None:
        group = self._group(Place(vlan, packet.family, packet.destination, found.port), now)
        source = None if group is None else self._source(group, packet.source)
        if source is not None:
            source.packets += -(-found.length // segment) if segment else 1
            source.bytes += found.length
            source.ttl = packet.ttl

    def _membership(self, data: bytes, packet: Packet, vlan: int, now: float) -> None:
        for one in messages(data, packet):
            match one:
                case Query(version):
                    self._put(self.queriers, packet.source, (version, packet.family), 16)
                case Record(group=number):
                    self._member(Place(vlan, packet.family, number, 0), packet.source, one, now)

    def _member(self, place: Place, member: int, record: Record, now: float) -> None:
        if place.group < _MULTICAST[place.family]:
            return
        if record.leaves:
            if place in self.groups:
                self.groups[place].members.discard(member)
            return
        group = self._group(place, now)
        if group is not None:
            self._collect(group.members, member)
            for source in record.sources:
                self._collect(group.announced, source)

    def _session(self, data: bytes, vlan: int, now: float) -> None:
        found = sap.announcement(data)
        if found is None or found.deletes:
            return
        name, media = sap.session(found.sdp)
        for one in media:
            for number in _groups(one):
                self._announced(Place(vlan, 4 if number < 1 << 32 else 6, number, one.port), name, one, now)

    def _announced(self, place: Place, name: str, media: sap.Media, now: float) -> None:
        group = self._group(place, now) if place.group >= _MULTICAST[place.family] else None
        if group is not None:
            self._collect(group.names, f"{name} ({media.kind})")
            if media.source:
                self._collect(group.announced, int(ipaddress.ip_address(media.source)))

    def _names(self, data: bytes) -> None:
        for one in mdns.answers(data):
            match one:
                case mdns.Host(name, address):
                    self._put(self.hosts, address, name, MAX_NAMES)
                case mdns.Service(name, host, port):
                    self._put(self.services, name, (host, port), MAX_NAMES)

    def _group(self, place: Place, now: float) -> Group | None:
        if place not in self.groups and len(self.groups) < MAX_GROUPS:
            self.groups[place] = Group(mark=(now, 0, 0))
        group = self.groups.get(place)
        self.left_out += group is None
        return group

    def _source(self, group: Group, address: int) -> Source | None:
        if address not in group.sources and len(group.sources) < MAX_EACH:
            group.sources[address] = Source()
        self.left_out += address not in group.sources
        return group.sources.get(address)

    def _collect(self, found: set[T], one: T) -> None:
        if one in found or len(found) < MAX_EACH:
            found.add(one)
        else:
            self.left_out += 1

    def _put(self, table: dict[K, T], key: K, value: T, most: int) -> None:
        if key in table or len(table) < most:
            table[key] = value
        else:
            self.left_out += 1


def _groups(media: sap.Media) -> Iterator[int]:
    """The consecutive groups that a media line names; none if its address is a host's name."""
    if media.address:
        first = int(ipaddress.ip_address(media.address))
        yield from range(first, first + media.groups)
