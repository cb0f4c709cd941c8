"""What lets the stream in: each kind of link, with and without a membership, and what the helper itself gets.

Called by poc_helper_socket_igmp.py. Every count is taken up to a marker that every link lets through, so
"nothing came" is known without waiting.
"""

import contextlib
import fcntl
import itertools
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from helper_lab import Lab, Link, Sender
from helper_wire import MARKERS, Ingress, mac, users

from experiment import Experiment
from mrelay.kernel import packet
from mrelay.kernel.membership import MembershipPool

COUNT: Final = 20  # datagrams a measurement
# linux/if_packet.h
PACKET_ADD_MEMBERSHIP: Final = 1
PACKET_MR_MULTICAST: Final = 0
FIONREAD: Final = 0x541B  # asm-generic/ioctls.h
_serial = itertools.count(1)

# (group, another one with the same Ethernet address); a MAC filter of hash bits may let some in unasked
ANY: Final = {
    4: [(f"239.1.1.{n}", f"239.129.1.{n}") for n in range(1, 9)],
    6: [(f"ff1e::1:{n}", f"ff1e::9:0:1:{n}") for n in range(1, 9)],
}
SSM: Final = {4: "232.1.1.1", 6: "ff3e::2:2"}


def delivered(ingress: Ingress, sender: Sender, group: str, host: int = 1) -> Counter[tuple[str, str]]:
    """What arrives at the ring of `COUNT` datagrams to `group`; the link itself is known to be alive."""
    marker_group = MARKERS[ip_address(group).version]
    found: Counter[tuple[str, str]] = Counter()
    sender.send(group, COUNT, host)
    for _ in range(2):  # the second starts when the first is through, so nothing is on its way any more
        marker = f"marker {next(_serial)}".encode()
        sender.send_marker(marker_group, marker)
        part = ingress.receive(marker)
        if part is None:
            raise RuntimeError(f"{marker_group} does not come through, so this link is broken")
        found += part
    return found


def count(ingress: Ingress, sender: Sender, group: str, host: int = 1) -> int:
    """How many of `COUNT` datagrams to `group` arrive."""
    return sum(n for (to, _), n in delivered(ingress, sender, group, host).items() if to == group)


_QUERIER = 20.0  # seconds: IPv6 waits for the bridge's address to be known as nobody else's


@dataclass
class Row:
    """One link and IP version: how many of `COUNT` arrived in each case."""

    link: str
    version: int
    group: str = ""
    unasked: int = 0  # groups that the MAC filter let in though nobody joined, by hash
    nobody: int = 0
    joined: int = 0
    helper_bytes: int = 0
    twin: int = 0
    twin_filtered: int = 0
    closed: int = 0
    packet_membership: int = 0
    packet_users: int = 0
    ssm: tuple[int, int] = (0, 0)

    def cells(self) -> list[object]:
        """The row of the table."""
        name, ssm = f"{self.link}, v{self.version}", "{}+{}".format(*self.ssm)
        twins = self.twin, self.twin_filtered
        return [name, self.nobody, self.joined, *twins, ssm, self.closed, self.packet_membership]


@dataclass
class Matrix:
    """Every link, both IP versions."""

    lab: Lab
    broken: str | None
    rows: list[Row] = field(default_factory=list)

    def measure(self) -> None:
        """Fill `rows`."""
        with self.lab.relay.inside():
            self._await_querier()
            if self.broken == "snooping":
                self.lab.bridge.snooping(False)
            for link in self.lab.links:
                with Sender(self.lab, link) as sender, Ingress(link.receiver) as ingress:
                    self.rows += [self._row(link, version, sender, ingress) for version in (4, 6)]

    def row(self, link: Link) -> list[Row]:
        return [row for row in self.rows if row.link == link.name]

    def _await_querier(self) -> None:
        """Until the bridge has a querier in both families: before, it floods like a switch without snooping."""
        link = self.lab.snooping
        deadline = time.monotonic() + _QUERIER
        with Sender(self.lab, link) as sender, Ingress(link.receiver) as ingress:
            while any(count(ingress, sender, ANY[version][0][0]) for version in (4, 6)):
                if time.monotonic() > deadline:
                    raise RuntimeError("the bridge's querier does not take up its work")

    def _row(self, link: Link, version: int, sender: Sender, ingress: Ingress) -> Row:
        row = Row(link.name, version)
        twin = self._pick_group(row, ingress, sender)
        with self._membership(link, row.group) as pool:
            row.joined = count(ingress, sender, row.group)
            row.helper_bytes = sum(map(pending, pool.sockets))
            row.twin = count(ingress, sender, twin)
            with Ingress(link.receiver, (row.group,)) as filtered:
                row.twin_filtered = count(filtered, sender, twin)
        row.closed = count(ingress, sender, row.group)
        with packet_membership(link.receiver, row.group):  # what that alone does: no report
            row.packet_users = users(link.receiver, row.group)
            row.packet_membership = count(ingress, sender, row.group)
        with self._membership(link, SSM[version], link.source(version, 1)):
            sources = (count(ingress, sender, SSM[version], host) for host in (1, 2))
            row.ssm = next(sources), next(sources)
        return row

    def _pick_group(self, row: Row, ingress: Ingress, sender: Sender) -> str:
        """The first group that a MAC filter doesn't happen to let in already; returns its twin."""
        for group, twin in ANY[row.version]:
            row.group, row.nobody = group, count(ingress, sender, group)
            if row.nobody == 0 or row.link == self.lab.wire.name:
                return twin
            row.unasked += 1
        return ANY[row.version][-1][1]

    @contextlib.contextmanager
    def _membership(self, link: Link, group: str, source: str | None = None) -> Iterator[MembershipPool]:
        """A helper that joined, for the block; the switch knows it, and knows its end afterwards."""
        instead = packet_membership(link.receiver, group) if self.broken == "report" else contextlib.nullcontext()
        with contextlib.closing(MembershipPool(socket.if_nametoindex(link.receiver))) as pool, instead:
            if self.broken != "report":
                pool.join(group, source)
                self._await_switch(link, group, joined=True)
            if self.broken == "helper":
                self._end(link, pool, group)
            yield pool
            self._end(link, pool, group)

    def _end(self, link: Link, pool: MembershipPool, group: str) -> None:
        joined = bool(pool.sockets)
        pool.close()
        refresh_filter(link.receiver)
        if joined:
            self._await_switch(link, group, joined=False)

    def _await_switch(self, link: Link, group: str, *, joined: bool) -> None:
        """Nothing to wait for elsewhere: the kernel sets the interface's own filter before a join returns."""
        if link is self.lab.snooping and self.broken != "snooping":
            self.lab.bridge.await_group(ip_address(group).packed, joined=joined)


def pending(sock: socket.socket) -> int:
    """Bytes that wait to be read."""
    return int.from_bytes(fcntl.ioctl(sock, FIONREAD, bytes(4)), "little")


@contextlib.contextmanager
def packet_membership(interface: str, group: str) -> Iterator[None]:
    """A packet socket that asks the interface for the group's Ethernet address (struct packet_mreq)."""
    address = bytes.fromhex(mac(group))
    request = struct.pack("=iHH8s", socket.if_nametoindex(interface), PACKET_MR_MULTICAST, len(address), address)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.setsockopt(packet.SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
        yield
    if group != MARKERS[4]:
        refresh_filter(interface)


def refresh_filter(interface: str) -> None:
    """Have macvlan make its filter anew: it does so before it drops an address, so it is one change behind."""
    with packet_membership(interface, MARKERS[4]):
        return


# ---- what it proves --------------------------------------------------------------------------------


def show(experiment: Experiment, lab: Lab) -> str:
    """Measure, print the table and make the claims; what helpers brought in, in words."""
    matrix = Matrix(lab, experiment.broken)
    matrix.measure()
    experiment.table(
        f"Of {COUNT} datagrams, at the relay's AF_PACKET ring",
        ("link", "no join", "helper", "same MAC", "+ cBPF", "SSM", "closed", "MR only"),
        [row.cells() for row in matrix.rows],
    )
    _claim_helper(experiment, matrix)
    _claim_filters(experiment, matrix)
    brought = sum(row.joined for row in matrix.rows)
    return f"{brought} of {COUNT * len(matrix.rows)} datagrams at the ring"


def _claim_helper(experiment: Experiment, matrix: Matrix) -> None:
    rows = matrix.rows
    wire, nic, snooping = (matrix.row(link) for link in matrix.lab.links)
    helper_bytes = sum(row.helper_bytes for row in rows)
    experiment.claim(
        "A helper socket that is never read brings the stream to AF_PACKET on every link, IPv4 and IPv6",
        all_are(rows, "joined", COUNT) and helper_bytes == 0,
        f"helper joined: {column(rows, 'joined')} at the ring; bytes waiting at helpers: {helper_bytes}",
    )
    experiment.claim(
        "Without a membership a MAC filter and a snooping switch keep the stream out; a plain veth pair doesn't",
        all_are(wire, "nobody", COUNT) and all_are([*nic, *snooping], "nobody", 0),
        f"nobody joined: {column(rows, 'nobody')}; by a hash collision: {sum(r.unasked for r in nic)} groups",
    )
    experiment.claim(
        "Closing the helper stops the stream wherever something filters, and leaves the ring open and at work",
        all_are(wire, "closed", COUNT) and all_are([*nic, *snooping], "closed", 0),
        f"helper closed: {column(rows, 'closed')}; the marker after it arrived each time",
    )
    experiment.claim(
        "PACKET_ADD_MEMBERSHIP sets the MAC filter but makes no membership: a snooping switch sends nothing",
        all_are([*wire, *nic], "packet_membership", COUNT)
        and all_are(snooping, "packet_membership", 0)
        and all_are(rows, "packet_users", 0),
        f"PACKET_MR_MULTICAST only: {column(rows, 'packet_membership')}; users in igmp and igmp6: "
        f"{sum(row.packet_users for row in rows)}",
    )


def _claim_filters(experiment: Experiment, matrix: Matrix) -> None:
    rows = matrix.rows
    wire, nic, snooping = (matrix.row(link) for link in matrix.lab.links)
    experiment.claim(
        "A MAC filter lets in the other groups of the same Ethernet address; the ring's cBPF does not",
        all_are(nic, "twin", COUNT) and all_are(snooping, "twin", 0) and all_are(rows, "twin_filtered", 0),
        f"same MAC: {column(rows, 'twin')}; with the group filter: {column(rows, 'twin_filtered')}",
    )
    experiment.claim(
        "A source-specific membership filters sources in the switch alone: elsewhere the worker must look at them",
        all_are([*wire, *nic], "ssm", (COUNT, COUNT)) and all_are(snooping, "ssm", (COUNT, 0)),
        f"wanted and other source: {column(rows, 'ssm')}",
    )


def all_are(rows: list[Row], name: str, value: object) -> bool:
    """Whether the field is `value` in every row."""
    return bool(rows) and all(getattr(row, name) == value for row in rows)


def column(rows: list[Row], name: str) -> str:
    """A field of all rows in words, IPv4 and IPv6 of a link together."""
    values: dict[str, list[str]] = {}
    for row in rows:
        values.setdefault(row.link, []).append(str(getattr(row, name)))
    return ", ".join(f"{link} {'/'.join(several)}" for link, several in values.items())
