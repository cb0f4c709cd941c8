"""Packet tables for the program at tc ingress: what it makes of a frame, or why it leaves it alone.

Expected frames are built by Scapy from nothing but the table, checksums included, and compared byte for byte.
"""

from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from bpf_rig import (
    HOP_SOURCE,
    HOP_SOURCE_6,
    NEXT_MAC,
    OWN_MAC,
    TC_ACT_REDIRECT,
    TCX_NEXT,
    FastPath,
    Out,
    key,
    merged,
    packed,
)  # fmt: skip
from mrelay.ebpf.layout import CARRIED, PASSED

pytestmark = pytest.mark.netns
S4, G4, S6, G6 = "10.9.9.9", "239.1.1.1", "fd99::9", "ff3e::1:2345:6789"
PAYLOAD = b"0123456789" * 10
KEY4, KEY6 = key(S4, G4, 5000), key(S6, G6, 5000)
ECT = 1


def bytes_of(packet: Any) -> bytes:
    """Scapy's packet with all that it computes."""
    return bytes(packet)


def v4(payload: bytes = PAYLOAD, *, check: int | None = None, **fields: Any) -> Any:
    """A datagram of the flow KEY4."""
    ip = {"src": S4, "dst": G4, "ttl": 16, "id": 77, "tos": 0x28 | ECT, **fields}
    return Ether(src="02:00:00:00:00:01", dst="01:00:5e:01:01:01") / IP(**ip) / _udp(4000, 5000, payload, check)


def v6(payload: bytes = PAYLOAD, *, check: int | None = None, **fields: Any) -> Any:
    """A datagram of the flow KEY6."""
    ip = {"src": S6, "dst": G6, "hlim": 16, "fl": 0x12345, "tc": 0x28 | ECT, **fields}
    return Ether(src="02:00:00:00:00:01", dst="33:33:23:45:67:89") / IPv6(**ip) / _udp(4000, 5000, payload, check)


def _udp(sport: int, dport: int, payload: bytes, check: int | None) -> Any:
    fields = {} if check is None else {"chksum": check}
    return UDP(sport=sport, dport=dport, **fields) / Raw(payload)


def sent4(mac: bytes | str = "01:00:5e:02:02:02", *, check: int | None = None, **fields: Any) -> bytes:
    """What is to leave for the usual output, but for `fields`."""
    mac = mac if isinstance(mac, str) else mac.hex(":")
    ip = {"src": HOP_SOURCE, "dst": "239.2.2.2", "ttl": 15, "id": 77, "tos": 0x28 | ECT, "flags": "DF", **fields}
    return bytes_of(Ether(src=OWN_MAC.hex(":"), dst=mac) / IP(**ip) / _udp(40001, 6000, PAYLOAD, check))


def sent6(mac: bytes | str = "33:33:00:00:00:07", **fields: Any) -> bytes:
    """The same for IPv6."""
    mac = mac if isinstance(mac, str) else mac.hex(":")
    ip = {"src": HOP_SOURCE_6, "dst": "ff3e::7", "hlim": 15, "fl": 0x12345, "tc": 0x28 | ECT, **fields}
    return bytes_of(Ether(src=OWN_MAC.hex(":"), dst=mac) / IPv6(**ip) / _udp(40001, 6000, PAYLOAD, None))


CARRIED4: dict[str, tuple[Any, Out, bytes]] = {
    "plain": (v4(), Out(), sent4()),
    "low group bits": (v4(), Out("239.255.2.2"), sent4("01:00:5e:7f:02:02", dst="239.255.2.2")),
    "unicast": (v4(), Out("10.1.0.2"), sent4(NEXT_MAC, dst="10.1.0.2")),
    "ttl set": (v4(), Out(ttl=64), sent4(ttl=64)),
    "ttl set for a ttl of 1": (v4(ttl=1), Out(ttl=64), sent4(ttl=64)),
    "ttl 2": (v4(ttl=2), Out(), sent4(ttl=1)),
    "dscp set, ECN kept": (v4(), Out(dscp=46), sent4(tos=46 << 2 | ECT)),
    "dscp 0": (v4(), Out(dscp=0), sent4(tos=ECT)),
    "source kept": (v4(), Out(keep=True), sent4(src=S4)),
    "source of its own": (v4(), Out(source="10.7.7.7"), sent4(src="10.7.7.7")),
    "DF from the sender": (v4(flags="DF"), Out(), sent4()),
    "no UDP checksum": (v4(check=0), Out(), sent4(check=0)),
    "padded": (Raw(bytes_of(v4()) + bytes(6)), Out(), sent4()),
}
CARRIED6: dict[str, tuple[Any, Out, bytes]] = {
    "plain": (v6(), Out("ff3e::7"), sent6()),
    "unicast": (v6(), Out("fd00:1::2"), sent6(NEXT_MAC, dst="fd00:1::2")),
    "hop limit set": (v6(), Out("ff3e::7", ttl=255), sent6(hlim=255)),
    "dscp set, ECN kept": (v6(), Out("ff3e::7", dscp=46), sent6(tc=46 << 2 | ECT)),
    "source kept": (v6(), Out("ff3e::7", keep=True), sent6(src=S6)),
    "source of its own": (v6(), Out("ff3e::7", source="fd77::7"), sent6(src="fd77::7")),
}


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


SHAPES: dict[str, Any] = {
    "options": v4(options=[IPOption_Router_Alert()]),
    "first fragment": v4(flags="MF"),
    "later fragment": v4(frag=100),
    "IPv4 checksum": v4(chksum=0x1234),
    "TCP": v4(proto=6),
    "version 5": v4(version=5),
    "IP longer than the frame": v4(len=2000),
    "IP shorter than its headers": v4(len=27),
    "UDP longer than IP": Raw(bytes_of(v4())[:38] + b"\x01\x00" + bytes_of(v4())[40:]),
    "UDP shorter than IP": Raw(bytes_of(v4())[:38] + b"\x00\x50" + bytes_of(v4())[40:]),
    "UDP shorter than its header": Raw(bytes_of(v4())[:38] + b"\x00\x07" + bytes_of(v4())[40:]),
    "cut off in UDP": Raw(bytes_of(v4())[:40]),
    "extension header": Ether(bytes_of(v6())[:14]) / IPv6(src=S6, dst=G6) / IPv6ExtHdrDestOpt() / UDP(dport=5000),
    "IPv6 without checksum": v6(check=0),
    "IPv6 longer than the frame": v6(plen=2000),
    "IPv6 cut off": Raw(bytes_of(v6())[:60]),
}


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


OTHERS = {
    "source": key("10.9.9.8", G4, 5000), "group": key(S4, "239.1.1.2", 5000), "port": key(S4, G4, 5001),
    "interface": key(S4, G4, 5000, ifindex=2), "VLAN": key(S4, G4, 5000, vlan=7),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_flow_is_exact(path: FastPath, other: str) -> None:
    """One that differs in one part of the key is another."""
    path.install(OTHERS[other], Out())
    assert path.run(bytes_of(v4()))[0] == TCX_NEXT
    assert path.passed() == {"no_flow": 1}


Change = Callable[[FastPath], None]
REFUSALS: dict[str, tuple[Any, Out, Change, str]] = {
    "ttl 1": (v4(ttl=1), Out(), lambda path: None, "ttl"),
    "ttl 0": (v4(ttl=0), Out(), lambda path: None, "ttl"),
    "above the MTU": (v4(), Out(), lambda path: path.set_hop(mtu=127, source=packed(HOP_SOURCE)), "too_big"),
    "hop not ready": (v4(), Out(), lambda path: path.set_hop(flags=0), "hop"),
    "no source": (v4(), Out(), lambda path: path.set_hop(source=bytes(16)), "hop"),
    "no such hop": (v4(), Out(hop=1 << 20), lambda path: None, "hop"),
}


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
