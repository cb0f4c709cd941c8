"""IGMP and MLD of every version, built by Scapy; damaged ones say nothing."""

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.igmp import IGMP, IGMPv3_MQ, IGMPv3_MR, IGMPv3_MR_Group
from scapy.layers.inet import IP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6MLDMultAddrRec,
    ICMPv6MLDone,
    ICMPv6MLQuery,
    ICMPv6MLQuery2,
    ICMPv6MLReport,
    ICMPv6MLReport2,
    IPv6,
    IPv6ExtHdrHopByHop,
    RouterAlert,
)

from mrelay.protocols.frame import walk
from mrelay.protocols.membership import Heard, Kind, Query, Record, messages

GROUP = int(ipaddress.ip_address("239.1.1.1"))
SOURCE = int(ipaddress.ip_address("10.9.9.9"))
GROUP_6 = int(ipaddress.ip_address("ff3e::1"))
SOURCE_6 = int(ipaddress.ip_address("2001:db8::9"))
V4 = IP(src="10.9.9.2", dst="239.1.1.1", ttl=1, proto=2, options=[IPOption_Router_Alert()])
V6 = IPv6(src="fe80::2", dst="ff3e::1", hlim=1) / IPv6ExtHdrHopByHop(options=[RouterAlert()])


def heard(data: bytes) -> list[Heard]:
    packet = walk(data, 0)
    assert packet is not None
    return messages(data, packet)


V3_REPORT = V4 / IGMPv3_MR(
    records=[
        IGMPv3_MR_Group(rtype=4, maddr="239.1.1.1", srcaddrs=[]),
        IGMPv3_MR_Group(rtype=6, maddr="239.1.1.1", srcaddrs=["10.9.9.9"]),
    ]
)  # fmt: skip
MLD2_REPORT = V6 / ICMPv6MLReport2(
    records=[ICMPv6MLDMultAddrRec(rtype=3, dst="ff3e::1", sources=["2001:db8::9"], auxdata=b"four")]
)

MESSAGES = [
    (V4 / IGMP(type=0x11, mrcode=0, gaddr="0.0.0.0"), [Query(1, 0, (), 10.0)]),
    (V4 / IGMP(type=0x11, mrcode=100, gaddr="239.1.1.1"), [Query(2, GROUP, (), 10.0)]),
    (
        V4 / IGMPv3_MQ(mrcode=208, gaddr="239.1.1.1", srcaddrs=["10.9.9.9"]),
        [Query(3, GROUP, (SOURCE,), 20.8)],  # RFC 3376 §4.1.1: (10 | 0x10) << 3 tenths
    ),
    (V4 / IGMP(type=0x12, gaddr="239.1.1.1"), [Record(1, Kind.CHANGE_TO_EXCLUDE_MODE, GROUP, ())]),
    (V4 / IGMP(type=0x16, gaddr="239.1.1.1"), [Record(2, Kind.CHANGE_TO_EXCLUDE_MODE, GROUP, ())]),
    (V4 / IGMP(type=0x17, gaddr="239.1.1.1"), [Record(2, Kind.CHANGE_TO_INCLUDE_MODE, GROUP, ())]),
    (
        V3_REPORT,
        [
            Record(3, Kind.CHANGE_TO_EXCLUDE_MODE, GROUP, ()),
            Record(3, Kind.BLOCK_OLD_SOURCES, GROUP, (SOURCE,)),
        ],
    ),
    (V6 / ICMPv6MLQuery(mrd=10000, mladdr="ff3e::1"), [Query(1, GROUP_6, (), 10.0)]),
    (
        V6 / ICMPv6MLQuery2(mrd=0x8001, mladdr="::", sources=[]),
        [Query(2, 0, (), 32.776)],  # RFC 3810 §5.1.3: (1 | 0x1000) << 3 milliseconds
    ),
    (V6 / ICMPv6MLReport(mladdr="ff3e::1"), [Record(1, Kind.CHANGE_TO_EXCLUDE_MODE, GROUP_6, ())]),
    (V6 / ICMPv6MLDone(mladdr="ff3e::1"), [Record(1, Kind.CHANGE_TO_INCLUDE_MODE, GROUP_6, ())]),
    (MLD2_REPORT, [Record(2, Kind.CHANGE_TO_INCLUDE_MODE, GROUP_6, (SOURCE_6,))]),
]


@pytest.mark.parametrize(("message", "want"), MESSAGES)
def test_each_version_comes_out_in_the_words_of_the_newest(message: Any, want: list[Heard]) -> None:
    assert heard(bytes(message)) == want


@pytest.mark.parametrize(("message", "want"), MESSAGES)
def test_one_damaged_byte_and_it_says_nothing(message: Any, want: list[Heard]) -> None:
    data = bytearray(bytes(message))
    data[-1] ^= 0x55
    assert heard(bytes(data)) == []


def test_leaving_is_told_from_joining() -> None:
    records = {kind: Record(3, kind, GROUP, ()) for kind in Kind}
    assert [kind for kind, record in records.items() if record.leaves] == [
        Kind.MODE_IS_INCLUDE,
        Kind.CHANGE_TO_INCLUDE_MODE,
        Kind.BLOCK_OLD_SOURCES,
    ]
    assert not Record(3, Kind.MODE_IS_INCLUDE, GROUP, (SOURCE,)).leaves


@given(st.sampled_from([bytes(message) for message, _ in MESSAGES]), st.integers(1, 60), st.data())
def test_cut_anywhere_it_is_read_or_refused(data: bytes, cut: int, choose: st.DataObject) -> None:
    data = data[: max(40, len(data) - cut)]
    at = choose.draw(st.integers(24, len(data) - 1))
    data = data[:at] + choose.draw(st.binary(min_size=1, max_size=1)) + data[at + 1 :]
    packet = walk(data, 0)
    if packet is not None:
        for one in messages(data, packet):
            assert isinstance(one, Query | Record)
