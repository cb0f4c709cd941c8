"""Packet tables for the program in the driver: the tables of tc, and what it leaves to tc.

Both programs must send the same bytes, so the expected frames are those of bpf_tables.py.
"""

import struct
from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether

from bpf_rig import (
    HOP_SOURCE,
    HOP_SOURCE_6,
    TC_ACT_REDIRECT,
    XDP_PASS,
    XDP_REDIRECT,
    FastPath,
    Out,
    merged,
    packed,
)
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
    v6,
)
from mrelay.ebpf.layout import (
    BROADCAST_HOP,
    BROADCASTS,
    CARRIED,
    CARRIED_XDP,
    HOP_READY,
    HOP_XDP,
    PASSED,
    SINGLE,
    WHY_NOT_XDP,
)

pytestmark = pytest.mark.netns
FRAME = bytes_of(v4())
READY: dict[str, Any] = {"flags": HOP_READY | HOP_XDP, "source": packed(HOP_SOURCE)}
OPEN: dict[str, Any] = {"state": CARRIED, "stamp": 7}  # tc carries the flow, and has seen all of it


@pytest.fixture
def xdp(path: FastPath) -> FastPath:
    """A fast path whose hop 0 takes frames from XDP."""
    path.set_hop(**READY)
    return path


@pytest.mark.parametrize("case", CARRIED4)
def test_ipv4_leaves_as_from_tc(xdp: FastPath, case: str) -> None:
    """Every byte, the count and the state; tc's counts of what was passed on stay as they are."""
    frame, output, expected = CARRIED4[case]
    xdp.install(KEY4, output, slot=3, **OPEN)
    assert xdp.run_xdp(bytes_of(frame)) == (XDP_REDIRECT, expected, 0)
    assert xdp.counted(3) == (1, len(PAYLOAD))
    assert xdp.passed() == {}
    assert xdp.flow(KEY4)["state"] == CARRIED_XDP


@pytest.mark.parametrize("case", CARRIED6)
def test_ipv6_leaves_as_from_tc(xdp: FastPath, case: str) -> None:
    """The same."""
    frame, output, expected = CARRIED6[case]
    xdp.set_hop(**READY | {"source": packed(HOP_SOURCE_6)})
    xdp.install(KEY6, output, slot=3, **OPEN)
    assert xdp.run_xdp(bytes_of(frame)) == (XDP_REDIRECT, expected, 0)
    assert xdp.counted(3) == (1, len(PAYLOAD))


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
def test_checksums_survive_any_payload(xdp: FastPath, six: bool) -> None:
    """Computed anew by Scapy."""
    xdp.set_hop(**READY | {"source": packed(HOP_SOURCE_6 if six else HOP_SOURCE)})
    xdp.install(KEY6 if six else KEY4, Out("ff3e::7") if six else Out(), **OPEN)
    for word in range(0, 65536, 257):
        payload = word.to_bytes(2, "big") + PAYLOAD[2:]
        verdict, left, _ = xdp.run_xdp(bytes_of(v6(payload) if six else v4(payload)))
        assert verdict == XDP_REDIRECT
        anew = Ether(left)
        for layer in (UDP, *(() if six else (IP,))):
            del anew[layer].chksum
        assert bytes_of(anew) == left


def test_a_sum_of_zero_is_sent_as_ones(xdp: FastPath) -> None:
    """The two bytes of payload that make the outgoing sum 0, which is sent as 0xffff."""
    xdp.install(KEY4, Out(), **OPEN)
    base = Ether(sent4())[UDP]
    wanted = (base.chksum + int.from_bytes(PAYLOAD[:2], "big") - 1) % 0xFFFF + 1
    payload = wanted.to_bytes(2, "big") + PAYLOAD[2:]
    _, left, _ = xdp.run_xdp(bytes_of(v4(payload)))
    assert left[40:42] == b"\xff\xff"


# ---- what it leaves to tc: as it was, and not counted ----


@pytest.mark.parametrize("case", SHAPES)
def test_unusual_frames_pass(xdp: FastPath, case: str) -> None:
    """Whatever is installed."""
    xdp.install(KEY4, Out(), **OPEN)
    xdp.install(KEY6, Out(), **OPEN)
    frame = bytes_of(SHAPES[case])
    assert xdp.run_xdp(frame) == (XDP_PASS, frame, 0)
    assert (xdp.passed(), xdp.counted()) == ({}, (0, 0))


@pytest.mark.parametrize("vlan", [0, 7])
def test_tagged_frames_pass(xdp: FastPath, vlan: int) -> None:
    """Also with a tag that gives a priority only."""
    xdp.install(KEY4, Out(), **OPEN)
    plain = v4()
    frame = bytes_of(Ether(src=plain.src, dst=plain.dst) / Dot1Q(vlan=vlan) / plain.payload)
    assert xdp.run_xdp(frame) == (XDP_PASS, frame, 0)


@pytest.mark.parametrize("other", OTHERS)
def test_other_flows_pass(xdp: FastPath, other: str) -> None:
    """Without a stamp: they may be merged."""
    xdp.install(OTHERS[other], Out(), **OPEN)
    assert xdp.run_xdp(FRAME) == (XDP_PASS, FRAME, 0)


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_output_cannot_take_passes(xdp: FastPath, case: str) -> None:
    """And closes this path until tc has seen it."""
    frame, output, change, _ = REFUSALS[case]
    xdp.install(KEY4, output, **OPEN)
    change(xdp)
    xdp.arrays["hops"][0]["flags"] |= HOP_XDP
    verdict, left, _ = xdp.run_xdp(bytes_of(frame))
    assert (verdict, left) == (XDP_PASS, bytes_of(frame))
    assert xdp.counted() == (0, 0)
    assert xdp.flow(KEY4)["given"] > 7


@pytest.mark.parametrize(("value", "why"), [(0, "outputs"), (BROADCAST_HOP, "hop"), (BROADCASTS + 1, "outputs")])
def test_several_outputs_without_a_broadcast(xdp: FastPath, value: int, why: str) -> None:
    """They pass without a stamp, so that tc gets them merged; and close this path."""
    xdp.install(KEY4, Out(), Out(), **OPEN)
    xdp.arrays["route"][0]["broadcast"] = value
    assert xdp.run_xdp(FRAME) == (XDP_PASS, FRAME, 0)
    assert (xdp.flow(KEY4)["why"], xdp.flow(KEY4)["given"]) == (WHY_NOT_XDP.index(why), 0)


def broadcast(path: FastPath, number: int = 5, **hop: Any) -> None:
    """A flow with three outputs, by interfaces 1, 7 and 8; `hop`: what is special about that of the last."""
    for at, ifindex in enumerate((1, 7, 8)):
        path.set_hop(at, **READY | {"ifindex": ifindex, "changes": at} | (hop if at == 2 else {}))
    path.install(KEY4, *(Out(hop=at) for at in range(3)), slot=3, **OPEN)
    path.arrays["route"][0]["broadcast"] = number + 1
    path.arrays["broadcasts"][number]["ifindex"][:3] = 1, 7, 8
    path.arrays["broadcasts"][number]["changes"] = 2


@pytest.mark.parametrize("number", range(BROADCASTS))
def test_a_broadcast_has_a_ticket(xdp: FastPath, number: int) -> None:
    """The frame leaves as it came, without padding, behind a ticket; counted once."""
    broadcast(xdp, number)
    padded = bytes_of(v4(b"short")).ljust(60, b"\0")
    verdict, left, _ = xdp.run_xdp(padded)
    ticket = struct.pack("=QII", 1 << 24 | 3, number, 0)
    assert (verdict, left) == (XDP_REDIRECT, ticket + padded[:47])
    assert xdp.counted(3) == (1, 5)
    assert xdp.flow(KEY4)["state"] == CARRIED_XDP


@pytest.mark.parametrize(
    "hop",
    [{"flags": HOP_READY}, {"ifindex": 9}, {"changes": 3}, {"flags": 0}, {"mtu": 100}],
    ids=["no XDP", "another interface", "changed since", "not ready", "MTU"],
)
def test_what_one_of_several_cannot_take(xdp: FastPath, hop: dict[str, Any]) -> None:
    """The frame passes as it is, and uncounted; the path is closed until tc has seen it."""
    broadcast(xdp, **hop)
    verdict, left, _ = xdp.run_xdp(FRAME)
    assert (verdict, left, xdp.counted(3)) == (XDP_PASS, FRAME, (0, 0))
    assert xdp.flow(KEY4)["given"] > 7
    assert xdp.flow(KEY4)["why"] == WHY_NOT_XDP.index("order" if "mtu" in hop else "hop")


def test_what_gro_merges_passes(xdp: FastPath) -> None:
    """Until tc has seen enough single frames in a row; a merged one there starts the count anew."""
    xdp.install(KEY4, Out(), single=SINGLE - 1, **OPEN)
    assert xdp.run_xdp(FRAME) == (XDP_PASS, FRAME, 0)
    assert (xdp.flow(KEY4)["why"], xdp.flow(KEY4)["given"]) == (WHY_NOT_XDP.index("merged"), 0)
    for _ in range(3):
        xdp.run(FRAME)
    assert xdp.flow(KEY4)["single"] == SINGLE
    assert xdp.run_xdp(FRAME)[2] > 0
    two = bytes_of(v4(2 * PAYLOAD))
    assert xdp.run(two, merged(2, len(PAYLOAD)))[0] == TC_ACT_REDIRECT
    assert xdp.flow(KEY4)["single"] == 0


def test_a_hop_without_ndo_xdp_xmit(xdp: FastPath) -> None:
    """Frames would be lost there without a word."""
    xdp.set_hop(source=packed(HOP_SOURCE))
    xdp.install(KEY4, Out(), **OPEN)
    assert xdp.run_xdp(FRAME) == (XDP_PASS, FRAME, 0)
    assert xdp.flow(KEY4)["why"] == WHY_NOT_XDP.index("hop")


# ---- order ----


def test_tc_comes_first(xdp: FastPath) -> None:
    """A frame without a stamp to tc; one with; and then none any more."""
    xdp.install(KEY4, Out())
    assert xdp.run_xdp(FRAME) == (XDP_PASS, FRAME, 0)
    assert xdp.run(FRAME)[0] == TC_ACT_REDIRECT
    verdict, _, stamp = xdp.run_xdp(FRAME)
    assert (verdict, stamp) == (XDP_PASS, xdp.flow(KEY4)["given"])
    assert stamp > 0
    assert xdp.run_xdp(FRAME)[0] == XDP_PASS  # tc has not seen it yet
    assert xdp.flow(KEY4)["why"] == WHY_NOT_XDP.index("order")


def see(path: FastPath, stamp: int) -> None:
    """What `relay` does with a frame that has a stamp (BPF_PROG_TEST_RUN can't give it one)."""
    value = path.flow(KEY4).copy()
    value["seen"] = stamp
    path.flows[4].update(KEY4, value.tobytes())


def test_only_the_last_stamp_opens(xdp: FastPath) -> None:
    """Every frame that passes closes it again, also one without a stamp."""
    xdp.install(KEY4, Out(), state=CARRIED)
    first, second = xdp.run_xdp(FRAME)[2], xdp.run_xdp(FRAME)[2]
    see(xdp, first)
    third = xdp.run_xdp(FRAME)[2]
    assert 0 < first < second < third
    see(xdp, third)
    assert xdp.run_xdp(FRAME)[0] == XDP_REDIRECT


@pytest.mark.parametrize("state", range(len(PASSED)))
def test_a_flow_on_the_slow_path_passes(xdp: FastPath, state: int) -> None:
    """Whatever the stamps say; and without a stamp, for it may be long."""
    xdp.install(KEY4, Out(), state=state, stamp=7)
    assert xdp.run_xdp(FRAME) == (XDP_PASS, FRAME, 0)
    assert xdp.flow(KEY4)["given"] > 7


def partial(packet: Any) -> bytes:
    """With the checksum that Linux leaves to the NIC: the folded sum of the pseudo-header."""
    whole = bytes_of(packet)
    six = IPv6 in packet
    start, head = (22, 54) if six else (26, 34)
    words = whole[start:head] + bytes((0, 17)) + whole[head + 4 : head + 6]
    total = sum(int.from_bytes(words[i : i + 2], "big") for i in range(0, len(words), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return whole[: head + 6] + total.to_bytes(2, "big") + whole[head + 8 :]


@pytest.mark.parametrize("make", [v4, v6])
def test_partial_checksums_open_nothing(xdp: FastPath, make: Callable[[], Any]) -> None:
    """Such a flow stays with tc, which knows what is missing."""
    name, frame = (KEY6, partial(v6())) if make is v6 else (KEY4, partial(v4()))
    xdp.install(name, Out("ff3e::7") if make is v6 else Out(), state=CARRIED)
    for _ in range(2):
        assert xdp.run_xdp(frame) == (XDP_PASS, frame, 0)
    assert xdp.flow(name)["why"] == WHY_NOT_XDP.index("partial")
