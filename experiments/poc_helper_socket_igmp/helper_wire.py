"""What is seen of the relay: reports on its cable, frames at its AF_PACKET ring, the kernel's own tables.

Owns the parsing of IGMPv3 and MLDv2 reports (RFC 3376 §4.2, RFC 3810 §5.2) and of /proc/net. Nothing here
joins anything. Only `Reports.await_record` and `Ingress.receive` block, both with a limit.
"""

import select
import socket
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, NamedTuple, Self

from mrelay.kernel import cbpf, packet

Address = IPv4Address | IPv6Address
# RFC 3376 §4.2.12, RFC 3810 §5.2.12
CHANGE_TO_INCLUDE: Final = 3  # of no source: leave
CHANGE_TO_EXCLUDE: Final = 4  # of no source: join
ALLOW_NEW_SOURCES: Final = 5
BLOCK_OLD_SOURCES: Final = 6
_IGMPV3_REPORT, _MLDV2_REPORT = 0x22, 143
MARKERS: Final = {4: "224.0.0.1", 6: "ff02::1"}  # every interface lets these in, every switch floods them
_SLOTS: Final = 512


class Record(NamedTuple):
    """One group record of a report."""

    kind: int
    group: Address
    sources: tuple[Address, ...]


class Reports:
    """An AF_PACKET socket at the peer's end of a cable: the membership reports in order of their arrival."""

    def __init__(self, interface: str) -> None:
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(packet.ETH_P_ALL))
        self._sock.bind((interface, packet.ETH_P_ALL))
        self.seen: list[Record] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def await_record(self, group: str, *kinds: int, seconds: float = 3.0) -> Record | None:
        """The next record about `group` of one of `kinds`; None when none came. `seen` keeps all."""
        deadline = time.monotonic() + seconds
        while select.select([self._sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
            found = list(parse_report(self._sock.recv(65536)))
            self.seen += found
            for record in found:
                if record.group == ip_address(group) and record.kind in kinds:
                    return record
        return None

    def forget(self) -> None:
        """Drop what has come so far."""
        while select.select([self._sock], [], [], 0)[0]:
            self._sock.recv(65536)
        self.seen.clear()


def parse_report(frame: bytes) -> Iterator[Record]:
    """The group records of an IP packet that is an IGMPv3 or MLDv2 report; none of any other packet."""
    version = frame[0] >> 4
    if version == 4 and frame[9] == socket.IPPROTO_IGMP:
        body, size = frame[(frame[0] & 15) * 4 :], 4
    elif version == 6 and frame[6] == 0 and frame[40] == socket.IPPROTO_ICMPV6:  # behind a hop-by-hop header
        body, size = frame[40 + (frame[41] + 1) * 8 :], 16
    else:
        return
    if body[0] not in (_IGMPV3_REPORT, _MLDV2_REPORT):
        return
    position = 8
    for _ in range(int.from_bytes(body[6:8], "big")):
        count = int.from_bytes(body[position + 2 : position + 4], "big")
        start = position + 4
        addresses = [ip_address(body[start + i * size : start + (i + 1) * size]) for i in range(count + 1)]
        yield Record(body[position], addresses[0], tuple(addresses[1:]))
        position = start + (count + 1) * size + body[position + 1] * 4


class Ingress:
    """One receive ring as the relay opens it, counting the datagrams that arrive by group and source.

    Made in the relay's namespace. Filtered to `groups`, or letting in all of IP.
    """

    def __init__(self, interface: str, groups: tuple[str, ...] | None = None) -> None:
        index = socket.if_nametoindex(interface)
        self.sock, _ = packet.open_ring(index, _SLOTS, packet.SLOT, None, shared=False)
        self._memory = packet.map_ring(self.sock.fileno(), _SLOTS, packet.SLOT)
        self._next = 0
        wanted = [ip_address(text) for text in (*groups, *MARKERS.values())] if groups else []
        ranges = {v: [(int(a), int(a)) for a in wanted if a.version == v] for v in (4, 6)}
        if groups is None:
            ranges = {4: [(0, (1 << 32) - 1)], 6: [(0, (1 << 128) - 1)]}
        cbpf.attach_group_filter(self.sock, ranges[4], ranges[6])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory.close()
        self.sock.close()

    def receive(self, marker: bytes, seconds: float = 3.0) -> Counter[tuple[str, str]] | None:
        """Datagrams by (group, source) up to the one that carries `marker`; None when that never came."""
        found: Counter[tuple[str, str]] = Counter()
        deadline = time.monotonic() + seconds
        while True:
            for group, source, payload in self.frames():
                if payload == marker:
                    return found
                found[group, source] += 1
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.sock], [], [], left)[0]:
                return None

    def frames(self) -> Iterator[tuple[str, str, bytes]]:
        """What waits in the ring: group, source and payload of each UDP datagram."""
        while True:
            base = self._next * packet.SLOT
            status, _, length, link, network, *_ = packet.TPACKET2_HDR.unpack_from(self._memory, base)
            if not status & packet.TP_STATUS_USER:
                return
            frame = self._memory[base + network : base + link + length]
            self._memory[base : base + 4] = packet.TP_STATUS_KERNEL.to_bytes(4, "little")
            self._next = (self._next + 1) % _SLOTS
            parsed = parse_datagram(frame)
            if parsed:
                yield parsed


def parse_datagram(frame: bytes) -> tuple[str, str, bytes] | None:
    """Group, source and payload of an unfragmented UDP datagram, from its network header on."""
    if frame[0] >> 4 == 4 and frame[9] == socket.IPPROTO_UDP:
        start, source, group = (frame[0] & 15) * 4, frame[12:16], frame[16:20]
    elif frame[0] >> 4 == 6 and frame[6] == socket.IPPROTO_UDP:
        start, source, group = 40, frame[8:24], frame[24:40]
    else:
        return None
    length = int.from_bytes(frame[start + 4 : start + 6], "big")
    return str(ip_address(group)), str(ip_address(source)), frame[start + 8 : start + length]


# ---- the kernel's tables, of the namespace that the calling thread is in ---------------------------


def _read(name: str) -> list[str]:
    return Path("/proc/thread-self/net", name).read_text().splitlines()


def users(interface: str, group: str) -> int:
    """How many sockets hold `group` on `interface` (/proc/net/igmp, igmp6); 0 when nobody does."""
    wanted = ip_address(group)
    if wanted.version == 6:
        rows = [line.split() for line in _read("igmp6")]
        return sum(int(row[3]) for row in rows if row[1:3] == [interface, wanted.packed.hex()])
    current, number = "", int.from_bytes(wanted.packed, "little")
    for line in _read("igmp")[1:]:
        words = line.split()
        if not line.startswith("\t"):
            current = words[1]
        elif current == interface and int(words[0], 16) == number:
            return int(words[1])
    return 0


def included(interface: str, group: str, source: str) -> bool:
    """Whether `source` of `group` is asked for (/proc/net/mcfilter, mcfilter6)."""
    name = "mcfilter" if ip_address(group).version == 4 else "mcfilter6"
    for line in _read(name)[1:]:
        row = line.split()
        pair = int(row[2], 16), int(row[3], 16)
        if row[1] == interface and pair == (int(ip_address(group)), int(ip_address(source))):
            return int(row[4]) > 0
    return False


def mac(group: str) -> str:
    """The Ethernet address that `group` is sent to (RFC 1112 §6.4, RFC 2464 §7), as hex digits."""
    packed = ip_address(group).packed
    if len(packed) == 4:
        return f"01005e{packed[1] & 0x7F:02x}{packed[2]:02x}{packed[3]:02x}"
    return "3333" + packed[-4:].hex()


def in_mac_filter(interface: str, group: str) -> bool:
    """Whether the interface's multicast list, which a NIC's filter is set from, has it (/proc/net/dev_mcast)."""
    rows = [line.split() for line in _read("dev_mcast")]
    return any(row[1] == interface and row[4] == mac(group) for row in rows)


def udp_counter(version: int, name: str) -> int:
    """A UDP counter of the host's IP stack (/proc/net/snmp, snmp6)."""
    if version == 6:
        return int(dict(line.split() for line in _read("snmp6")).get(f"Udp6{name}", 0))
    names, values = (line.split() for line in _read("snmp") if line.startswith("Udp:"))
    return int(values[names.index(name)])
