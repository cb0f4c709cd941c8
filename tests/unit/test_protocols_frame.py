"""Frames as a listener reads them, and as they are put back on the wire: Scapy builds and reads them."""

import ipaddress
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import Dot1Q, Ether

from mrelay.protocols.frame import checksum, datagram, segments, walk
from mrelay.protocols.unmerge import unmerged
from ring_fake import checksum as plain_checksum

V4 = IP(src="10.9.9.9", dst="239.1.1.1", ttl=7)
V6 = IPv6(src="2001:db8::9", dst="ff3e::1", hlim=7)
ETHER = Ether(src="02:00:00:00:00:01", dst="01:00:5e:01:01:01")
UDP_IN = UDP(sport=4000, dport=5000)


def raw(packet: Any) -> bytes:
    return bytes(packet)


@pytest.mark.parametrize(
    ("network", "family"),
    [
        (V4, 4),
        (IP(src="10.9.9.9", dst="239.1.1.1", ttl=7, options=[IPOption_Router_Alert()]), 4),
        (V6, 6),
        (V6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(), 6),
        (V6 / IPv6ExtHdrFragment(offset=0, m=0), 6),
    ],
)
def test_a_datagram_is_found_behind_any_headers(network: Any, family: int) -> None:
    data = raw(ETHER / network / UDP_IN / b"payload") + b"padding"
    packet = walk(data)
    assert packet is not None
    source, group = ("10.9.9.9", "239.1.1.1") if family == 4 else ("2001:db8::9", "ff3e::1")
    assert (packet.family, packet.ttl, packet.vlans) == (family, 7, ())
    assert packet.source == int(ipaddress.ip_address(source))
    assert packet.destination == int(ipaddress.ip_address(group))
    found = datagram(data, packet)
    assert found is not None
    assert (found.source_port, found.port) == (4000, 5000)
    assert data[found.start : found.end] == b"payload"


def test_tags_are_read_from_metadata_and_from_the_frame() -> None:
    data = raw(ETHER / Dot1Q(vlan=20) / V4 / UDP_IN / b"x")
    assert walk(data) is not None
    assert [walk(data, vlan=vlan).vlans for vlan in (None, 100)] == [(20,), (100, 20)]  # type: ignore[union-attr]


def test_a_tunnel_has_no_link_layer_header() -> None:
    packet = walk(raw(V4 / UDP_IN / b"x"), link=0)
    assert packet is not None and packet.ip == 0


@pytest.mark.parametrize(
    "network",
    [IP(dst="239.1.1.1", flags="MF"), IP(dst="239.1.1.1", frag=9), V6 / IPv6ExtHdrFragment(offset=4)],
)
def test_a_fragment_has_no_datagram(network: Any) -> None:
    data = raw(ETHER / network / UDP_IN / b"x")
    packet = walk(data)
    assert packet is not None and packet.fragment
    assert datagram(data, packet) is None


@given(st.binary(max_size=120), st.sampled_from([0, 14]))
def test_any_bytes_are_read_or_refused(data: bytes, link: int) -> None:
    packet = walk(data, link)
    if packet is not None and (found := datagram(data, packet)) is not None:
        assert link <= packet.ip < packet.start < found.start <= found.end <= len(data)


@given(st.binary(max_size=200))
def test_checksum_is_that_of_rfc_1071(data: bytes) -> None:
    assert checksum(data) == plain_checksum(data)


@given(st.integers(0, 5000), st.integers(0, 700))
def test_segments_cover_the_payload(length: int, size: int) -> None:
    pieces = list(segments(10, 10 + length, size))
    assert pieces[0][0] == 10 and pieces[-1][1] == 10 + length
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(pieces))
    assert size == 0 or length <= size or {end - start for start, end in pieces[:-1]} == {size}


@pytest.mark.parametrize("network", [V4, V6, V6 / IPv6ExtHdrDestOpt()])
@pytest.mark.parametrize("vlan", [None, 20])
@given(payload=st.binary(min_size=1, max_size=700), segment=st.integers(1, 300))
def test_a_merged_frame_becomes_right_frames(network: Any, vlan: int | None, payload: bytes, segment: int) -> None:
    merged = raw(ETHER / network / UDP_IN / payload)
    frames = list(unmerged(merged, 14, vlan=vlan, segment=segment, complete=False))
    assert len(frames) == -(-len(payload) // segment)
    got = b""
    for frame in frames:
        read = Ether(frame)
        assert (read[Dot1Q].vlan if vlan else None) == vlan
        got += bytes(read[UDP].payload)
        sums = [(layer, layer.chksum) for layer in (read.getlayer(IP), read[UDP]) if layer is not None]
        for layer, _ in sums:
            del layer.chksum
        again = Ether(bytes(read))  # Scapy computes what is missing
        assert [again[type(layer)].chksum for layer, _ in sums] == [value for _, value in sums]
        assert bytes(again) == frame
    assert got == payload


def test_what_is_whole_stays_as_it_is() -> None:
    data = raw(ETHER / V4 / UDP_IN / b"x")
    assert list(unmerged(data, 14, vlan=None, segment=0, complete=True)) == [data]
    arp = raw(ETHER) + b"\x08\x06rest"
    assert list(unmerged(arp, 14, vlan=7, segment=0, complete=False)) == [
        arp[:12] + b"\x81\x00\x00\x07" + arp[12:]
    ]
