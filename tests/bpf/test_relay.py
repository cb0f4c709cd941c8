"""Packet tables for the program at tc ingress: what it makes of a frame, or why it leaves it alone.

The tables, and the frames that are expected byte for byte, stand in bpf_tables.py.
"""

import pytest
from scapy.layers.inet import UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from bpf_rig import HOP_SOURCE, HOP_SOURCE_6, TC_ACT_REDIRECT, TCX_NEXT, FastPath, Out, merged, packed
from bpf_tables import (
    CARRIED4,
    CARRIED6,
    KEY4,
    KEY6,
    OTHERS,
    PAYLOAD,
    REFUSALS,
    SHAPES,
    bytes_of,
    sent4,
    v4,
)  # fmt: skip
from mrelay.ebpf.layout import CARRIED, PASSED

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("case", CARRIED4)
def test_ipv4_leaves_as_the_output_says(path: FastPath, case: str) -> None:
    """Every byte, and the count."""
    frame, output, expected = CARRIED4[case]
    path.install(KEY4, output, slot=3)
    assert path.run(bytes_of(frame)) == (TC_ACT_REDIRECT, expected)
    assert path.counted(3) == (1, len(PAYLOAD))
    assert path.passed() == {}


@pytest.mark.parametrize("case", CARRIED6)
def test_ipv6_leaves_as_the_output_says(path: FastPath, case: str) -> None:
    """Every byte, and the count."""
    frame, output, expected = CARRIED6[case]
    path.set_hop(source=packed(HOP_SOURCE_6))
    path.install(KEY6, output, slot=3)
    assert path.run(bytes_of(frame)) == (TC_ACT_REDIRECT, expected)
    assert path.counted(3) == (1, len(PAYLOAD))


@pytest.mark.parametrize("word", range(0, 65536, 257))
def test_udp_checksums_survive_any_payload(path: FastPath, word: int) -> None:
    """Also where the sum comes out as zero on the way."""
    payload = word.to_bytes(2, "big") + PAYLOAD[2:]
    path.install(KEY4, Out())
    _, left = path.run(bytes_of(v4(payload)))
    assert left[42:] == payload
    assert left[40:42] == _sum_of(left)


def _sum_of(frame: bytes) -> bytes:
    packet = Ether(frame)
    del packet[UDP].chksum
    return bytes_of(packet)[40:42]


@pytest.mark.parametrize("case", SHAPES)
def test_unusual_frames_are_left_to_the_slow_path(path: FastPath, case: str) -> None:
    """As they are, whatever is installed."""
    path.install(KEY4, Out())
    path.install(KEY6, Out())
    frame = bytes_of(SHAPES[case])
    assert path.run(frame) == (TCX_NEXT, frame)
    assert path.passed() == {"shape": 1}


def test_other_protocols_are_nobodys_business(path: FastPath) -> None:
    """ARP and the like: passed on and not even counted."""
    frame = bytes_of(Ether(dst="ff:ff:ff:ff:ff:ff", type=0x0806) / Raw(bytes(46)))
    assert path.run(frame) == (TCX_NEXT, frame)
    assert path.passed() == {}


@pytest.mark.parametrize("other", OTHERS)
def test_a_flow_is_exact(path: FastPath, other: str) -> None:
    """One that differs in one part of the key is another."""
    path.install(OTHERS[other], Out())
    assert path.run(bytes_of(v4()))[0] == TCX_NEXT
    assert path.passed() == {"no_flow": 1}


@pytest.mark.parametrize("second", [False, True], ids=["only output", "second output"])
@pytest.mark.parametrize("case", REFUSALS)
def test_what_an_output_cannot_take_is_left_whole(path: FastPath, case: str, second: bool) -> None:
    """Nothing is sent anywhere, nothing counted, and the flow says why."""
    frame, output, change, reason = REFUSALS[case]
    path.set_hop(1, ifindex=99, source=packed(HOP_SOURCE))  # sending there would be an error
    path.install(KEY4, *([Out(hop=1, ttl=9)] if second else []), output)
    change(path)
    assert path.run(bytes_of(frame)) == (TCX_NEXT, bytes_of(frame))
    assert path.passed() == {reason: 1}
    assert path.counted() == (0, 0)
    assert path.arrays["outputs"]["errors"].sum() == 0
    assert path.flow(KEY4)["state"] == PASSED.index(reason)


def test_the_mtu_fits_exactly(path: FastPath) -> None:
    """28 bytes of headers and 100 of payload pass an MTU of 128."""
    path.set_hop(mtu=128, source=packed(HOP_SOURCE))
    path.install(KEY4, Out())
    assert path.run(bytes_of(v4()))[0] == TC_ACT_REDIRECT


def test_merged_frames_count_their_segments(path: FastPath) -> None:
    """Also when their number has to be computed; the MTU is for a segment."""
    path.install(KEY4, Out())
    frame = bytes_of(v4(bytes(3_000)))
    assert path.run(frame, merged(7, 1472))[0] == TC_ACT_REDIRECT
    assert path.counted() == (7, 3_000)
    assert path.run(frame, merged(0, 1472))[0] == TC_ACT_REDIRECT
    assert path.counted() == (7 + 3, 6_000)
    assert path.run(frame, merged(7, 1473))[0] == TCX_NEXT
    assert path.passed() == {"too_big": 1}


def test_merged_frames_with_bytes_behind_are_left(path: FastPath) -> None:
    """Nothing makes such, and cutting them would take the merged frame apart."""
    path.install(KEY4, Out())
    frame = bytes_of(v4(bytes(3_000))) + bytes(6)
    assert path.run(frame, merged(3, 1472)) == (TCX_NEXT, frame)
    assert path.passed() == {"shape": 1}


def test_state_says_carried(path: FastPath) -> None:
    """And the next frame that is not carried changes it."""
    path.install(KEY4, Out())
    path.run(bytes_of(v4()))
    assert path.flow(KEY4)["state"] == CARRIED
    path.run(bytes_of(v4(ttl=1)))
    assert path.flow(KEY4)["state"] == PASSED.index("ttl")


def test_errors_of_the_interface_are_counted_with_the_output(path: FastPath) -> None:
    """Copies that no interface takes; the last output still gets its own."""
    path.set_hop(1, ifindex=99, source=packed(HOP_SOURCE))
    path.install(KEY4, Out(hop=1), Out(hop=1), Out())
    assert path.run(bytes_of(v4())) == (TC_ACT_REDIRECT, sent4())
    assert path.arrays["outputs"]["errors"][:3].tolist() == [1, 1, 0]


def test_a_route_of_a_thousand_outputs(path: FastPath) -> None:
    """More than unrolled code could hold."""
    with FastPath(routes=1000) as large:
        large.set_hop(1, ifindex=99, source=packed(HOP_SOURCE))
        large.set_hop(source=packed(HOP_SOURCE))
        large.install(KEY4, *[Out(hop=1)] * 999, Out())
        assert large.run(bytes_of(v4())) == (TC_ACT_REDIRECT, sent4())
        assert large.arrays["outputs"]["errors"].sum() == 999
