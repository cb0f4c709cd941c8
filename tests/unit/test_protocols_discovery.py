"""What discovery makes of frames: who sends, who wants, how fast; and that nothing makes it grow without end."""

import ipaddress

import pytest
from scapy.layers.igmp import IGMPv3_MR, IGMPv3_MR_Group
from scapy.layers.inet import IP, UDP, IPOption_Router_Alert
from scapy.layers.l2 import Ether

from mrelay.protocols.discovery import MAX_EACH, MAX_GROUPS, Discovery, Place

GROUP = int(ipaddress.ip_address("239.1.1.1"))
PLACE = Place(0, 4, GROUP, 5000)


def frame(source: str = "10.9.9.9", group: str = "239.1.1.1", port: int = 5000, size: int = 100) -> bytes:
    return bytes(Ether() / IP(src=source, dst=group, ttl=9) / UDP(sport=1, dport=port) / bytes(size))


def report(kind: int, group: str = "239.1.1.1", source: str = "10.9.9.2") -> bytes:
    ip = IP(src=source, dst="224.0.0.22", ttl=1, proto=2, options=[IPOption_Router_Alert()])
    return bytes(Ether() / ip / IGMPv3_MR(records=[IGMPv3_MR_Group(rtype=kind, maddr=group)]))


def test_rates_are_of_datagrams_merged_or_not() -> None:
    found = Discovery()
    for second in range(8):
        for _ in range(10):
            found.add(frame(size=1000), second + 0.5, segment=100)
        found.add(frame(size=300), second + 0.5)
        found.tick(second + 1)
    group = found.groups[PLACE]
    assert group.totals() == (8 * 101, 8 * 10_300)
    assert list(group.rates) == pytest.approx([101, 82_400])


def test_a_stream_that_ends_has_no_rate_in_the_end() -> None:
    found = Discovery()
    found.add(frame(), 0)
    for second in range(1, 9):
        found.tick(second)
    assert found.groups[PLACE].rates == (0, 0)


def test_who_leaves_is_no_member_any_more() -> None:
    found = Discovery()
    place = Place(0, 4, GROUP, 0)
    found.add(report(4), 0)
    assert len(found.groups[place].members) == 1
    found.add(report(3), 1)
    assert not found.groups[place].members


def test_a_merged_frame_cut_by_the_snap_length_still_counts_whole() -> None:
    found = Discovery()
    found.add(frame(size=6400)[:200], 0, segment=100)
    assert found.groups[PLACE].totals() == (64, 6400)


def test_tables_are_bounded_and_what_is_left_out_is_counted() -> None:
    found = Discovery()
    for n in range(MAX_GROUPS + 5):
        found.add(frame(group=f"239.2.{n >> 8}.{n & 255}", size=1), 0)
    for n in range(MAX_EACH + 5):
        found.add(frame(source=f"10.8.{n}.1", group="239.2.0.0", size=1), 0)
        found.add(report(4, "239.2.0.1", f"10.8.{n}.1"), 0)
    assert len(found.groups) == MAX_GROUPS
    assert len(found.groups[Place(0, 4, int(ipaddress.ip_address("239.2.0.0")), 5000)].sources) == MAX_EACH
    assert found.left_out >= 10
