"""The way round by lo: which copies take it, what waits for them, and that nothing is lost where lo takes none."""

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from bpf_rig import (
    HOP_SOURCE,
    LOOPBACK,
    TC_ACT_REDIRECT,
    TC_ACT_SHOT,
    TCX_NEXT,
    XDP_PASS,
    XDP_REDIRECT,
    FastPath,
    Out,
    key,
    merged,
    packed,
)
from bpf_tables import KEY4, bytes_of, v4
from mrelay.ebpf import layout
from mrelay.ebpf.layout import CARRIED, HOP_READY, HOP_XDP, NO_PLACE
from mrelay.kernel import libbpf
from netns import frames
from netns.lab import SOURCE, SOURCE_6, Lab, Namespace, Star
from netns.traffic import Capture, Receiver, Sender, payloads, send_frames

pytestmark = pytest.mark.netns
BURST = bytes_of(v4(bytes(8 * 100)))
EIGHT, SEVEN = merged(8, 100), merged(7, 115)
SLOT = 5
G4, G6, OUT4, OUT6 = "239.1.1.1", "ff3e::1", "239.2.2.2", "ff3e::2"


def trip(path: FastPath, slot: int = SLOT) -> Any:
    """What of a flow is on its way."""
    value = path.trips.lookup(struct.pack("=I", slot))
    assert value is not None
    return np.frombuffer(value, layout.TRIP)[0]


def set_trip(path: FastPath, slot: int = SLOT, **values: int) -> None:
    """Pretend."""
    value = np.zeros(1, layout.TRIP)
    for name, number in values.items():
        value[name] = number
    path.trips.update(struct.pack("=I", slot), value.tobytes())


# ---- what the program at an interface decides ----


@pytest.fixture
def two(path: FastPath) -> FastPath:
    """A flow of two outputs."""
    path.install(KEY4, Out(), Out(port=6001), slot=SLOT)
    return path


def has_tried(path: FastPath) -> bool:
    """Whether a copy was to go round. (The kernel sends no merged frame of BPF_PROG_TEST_RUN anywhere.)"""
    return bool(trip(path)["moved"])


def leave(path: FastPath, place: int = 1, ifindex: int = LOOPBACK) -> None:
    """A copy is away, since just now."""
    path.run(BURST, EIGHT)
    path.arrays["counts"][:] = 0
    path.arrays["outputs"]["errors"] = 0
    set_trip(path, away=1, place=place, moved=int(trip(path)["moved"]), ifindex=ifindex)


@pytest.fixture
def elsewhere(home: Namespace) -> int:
    """Another interface to leave by."""
    home.ip("link add d0 up type veth peer name d1")
    home.ip("link set d0 up", "link set d1 up")
    with home.inside():
        return socket.if_nametoindex("d0")


@pytest.mark.parametrize(
    "frame, context, tried",
    [(BURST, EIGHT, True), (BURST, SEVEN, False), (bytes_of(v4()), b"", False)],
    ids=["many segments", "fewer", "single"],
)
def test_a_copy_of_many_segments_goes_round(two: FastPath, frame: bytes, context: bytes, tried: bool) -> None:
    """For others it costs more than their pages. What lo does not take goes directly."""
    verdict, left = two.run(frame, context)
    assert (verdict, left[36:38]) == (TC_ACT_REDIRECT, (6001).to_bytes(2))
    assert has_tried(two) == tried
    assert trip(two)["away"] == 0


def test_one_output_needs_no_copy(path: FastPath) -> None:
    """The frame itself leaves."""
    path.install(KEY4, Out(), slot=SLOT)
    assert path.run(BURST, EIGHT)[0] == TC_ACT_REDIRECT
    assert not has_tried(path)


@pytest.mark.parametrize("offset", [8, 32], ids=["mark", "priority"])
def test_what_others_noted_is_kept(two: FastPath, offset: int) -> None:
    """skb->mark and skb->priority would not survive: such frames go directly."""
    context = bytearray(EIGHT)
    struct.pack_into("=I", context, offset, 3)
    assert two.run(BURST, bytes(context))[0] == TC_ACT_REDIRECT
    assert not has_tried(two)


def test_copies_follow_the_one_that_is_away(two: FastPath) -> None:
    """Also of a single datagram, as long as the route is the same: the frame itself leaves before it."""
    leave(two)
    verdict, left = two.run(bytes_of(v4()))
    assert (verdict, left[36:38]) == (TC_ACT_REDIRECT, (6000).to_bytes(2))
    assert trip(two)["away"] == 2
    assert two.counted(SLOT) == (1, 100)
    assert not two.arrays["outputs"]["errors"].any()


def test_what_is_for_the_slow_path_waits(two: FastPath) -> None:
    """As a whole, uncounted as yet; and what comes after it waits as well."""
    leave(two)
    assert two.run(bytes_of(v4(ttl=1)))[0] == TC_ACT_SHOT
    assert trip(two)[["away", "place", "iif"]].tolist() == (2, NO_PLACE, LOOPBACK)
    assert two.run(bytes_of(v4()))[0] == TC_ACT_SHOT
    assert trip(two)["away"] == 3
    assert two.counted(SLOT) == (0, 0)
    assert two.passed() == {}
    assert two.flow(KEY4)["left"] == 0


@pytest.mark.parametrize(
    "outputs, place", [(1, 1), (2, 7), (3, 1), (1, 0)], ids=["shorter", "elsewhere", "longer", "same place"]
)
def test_another_route_waits(two: FastPath, outputs: int, place: int) -> None:
    """Also one of a single output, which none of its copies could follow, at a place that is used again."""
    leave(two, place)
    two.install(KEY4, *[Out()] * outputs, slot=SLOT)
    assert two.run(bytes_of(v4()))[0] == TC_ACT_SHOT
    assert trip(two)[["away", "place"]].tolist() == (2, NO_PLACE)


def test_an_output_by_another_interface_waits_for_nobody(two: FastPath, elsewhere: int) -> None:
    """Its next hop has moved: there is no order between interfaces, and the copy that is away has the old one."""
    leave(two)
    two.set_hop(ifindex=elsewhere, source=packed(HOP_SOURCE))
    verdict, left = two.run(bytes_of(v4()))
    assert (verdict, left[36:38]) == (TC_ACT_REDIRECT, (6001).to_bytes(2))
    assert trip(two)[["away", "ifindex"]].tolist() == (1, LOOPBACK)


def test_what_never_comes_back_is_forgotten(two: FastPath) -> None:
    """After 100 jiffies: an interface went away."""
    leave(two)
    moved = int(trip(two)["moved"])
    set_trip(two, away=2, place=NO_PLACE, moved=moved - 100)
    assert two.run(bytes_of(v4(ttl=1)))[0] == TCX_NEXT
    assert trip(two)["away"] == 0
    assert two.passed() == {"ttl": 1}
    again = int(trip(two)["again"])
    assert again >= moved + 100_000, "nothing of this flow goes that way for a while"
    set_trip(two, again=again)
    two.enter(KEY4)
    assert two.run(BURST, EIGHT)[0] == TC_ACT_REDIRECT
    assert not has_tried(two)


def test_lo_takes_no_more(two: FastPath, home: Namespace, elsewhere: int) -> None:
    """A copy that can't follow is lost at its output, and counted there; directly it would overtake."""
    leave(two, ifindex=elsewhere)
    two.set_hop(ifindex=elsewhere, source=packed(HOP_SOURCE))
    home.ip("link set lo down")
    verdict, left = two.run(bytes_of(v4()))
    assert (verdict, left[36:38]) == (TC_ACT_REDIRECT, (6000).to_bytes(2))
    assert two.arrays["outputs"]["errors"][:2].tolist() == [0, 1]
    assert trip(two)["away"] == 1


@pytest.mark.parametrize("away, verdict", [(0, XDP_REDIRECT), (1, XDP_PASS)], ids=["nothing", "a copy"])
def test_xdp_waits(path: FastPath, away: int, verdict: int) -> None:
    """For what is away: it would overtake."""
    path.set_hop(flags=HOP_READY | HOP_XDP, source=packed(HOP_SOURCE))
    path.install(KEY4, Out(), slot=SLOT, state=CARRIED, stamp=7)
    set_trip(path, away=away)
    assert path.run_xdp(bytes_of(v4()))[0] == verdict


# ---- between interfaces ----


class Wire:
    """A star of two outputs with both programs, and a flow of each family that goes to both."""

    def __init__(self, star: Star, path: FastPath, stack: ExitStack) -> None:
        self.star, self.path = star, path
        with star.relay.inside():
            self.iif = socket.if_nametoindex("in0")
            for i in range(2):
                values = {"ifindex": socket.if_nametoindex(f"out{i}"), "own_mac": star.relay.mac(f"out{i}")}
                path.set_hop(i, **values, source=packed(f"10.1.{i}.1"))
                path.set_hop(2 + i, **values, source=packed(f"fd00:1:{i}::1"))
            stack.callback(libbpf.attach_tcx(path.program, LOOPBACK).close)  # an input, too
            stack.callback(libbpf.attach_tcx(path.land, LOOPBACK, first=True).close)
            stack.callback(libbpf.attach_tcx(path.program, self.iif).close)

    def install(self, *, six: bool = False, vlan: int = 0) -> None:
        """The flow."""
        source, group, out, hop = (SOURCE_6, G6, OUT6, 2) if six else (SOURCE, G4, OUT4, 0)
        outputs = (Out(out, 6000, hop=hop), Out(out, 6001, hop=hop + 1))
        self.path.install(key(source, group, 5000, ifindex=self.iif, vlan=vlan), *outputs, slot=SLOT)

    def now(self) -> int:
        """In jiffies: a copy is sent, and its trip says when."""
        with Sender(self.star.source) as sender, Receiver(self.star.sink, "k1", 6001, OUT4) as receiver:
            sender.send_segmented(G4, 5000, payloads(8, 100))
            receiver.receive(8)
        return int(trip(self.path)["moved"])


@pytest.fixture
def wire(lab: Lab) -> Iterator[Wire]:
    """Whose bursts come in as one frame."""
    star = lab.star(outputs=2, mtu=1500, offload=True)
    with FastPath() as path, ExitStack() as stack:
        yield Wire(star, path, stack)


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
def test_a_burst_comes_to_both(wire: Wire, six: bool) -> None:
    """By lo to the last one, whole; its checksums are right; and it is back."""
    wire.install(six=six)
    source, group, out = (SOURCE_6, G6, OUT6) if six else (SOURCE, G4, OUT4)
    sent = payloads(40, 1000)
    with ExitStack() as stack:
        round_trips = stack.enter_context(Capture(wire.star.relay, "lo"))
        sinks = [stack.enter_context(Capture(wire.star.sink, f"k{i}")) for i in range(2)]
        receivers = [
            stack.enter_context(Receiver(wire.star.sink, f"k{i}", 6000 + i, out, v6=six)) for i in range(2)
        ]
        sender = stack.enter_context(Sender(wire.star.source, source))
        sender.send_segmented(group, 5000, sent)
        for receiver in receivers:
            assert receiver.receive(len(sent)) == sent
        assert [(p.destination, p.dport, len(p.payload)) for p in round_trips.wait(1)] == [(out, 6001, 40_000)]
        for i, sink in enumerate(sinks):
            (packet,) = sink.wait(1)
            assert (packet.destination, packet.dport, len(packet.payload)) == (out, 6000 + i, 40_000)
            assert packet.header_good
    assert trip(wire.path)["away"] == 0
    assert wire.path.counted(SLOT) == (40, 40_000)


@pytest.mark.parametrize("vlan", [0, 7], ids=["untagged", "tagged"])
def test_a_frame_that_waited_is_forwarded(wire: Wire, vlan: int) -> None:
    """Back at its interface, once, with its tag; what it waited for is still away."""
    wire.install()
    moved = wire.now()
    wire.install(vlan=vlan)
    before = wire.path.counted(SLOT)
    set_trip(wire.path, away=1, place=NO_PLACE, moved=moved)
    with ExitStack() as stack:
        round_trips = stack.enter_context(Capture(wire.star.relay, "lo"))
        sinks = [stack.enter_context(Capture(wire.star.sink, f"k{i}")) for i in range(2)]
        send_frames(wire.star.source, "s0", [frames.udp_frame(SOURCE, G4, 5000, b"waited", vlan=vlan, ttl=9)])
        assert [(p.destination, p.payload) for p in round_trips.wait(1)] == [(G4, b"waited")]
        for i, sink in enumerate(sinks):
            (packet,) = sink.wait(1)
            assert (packet.destination, packet.dport, packet.payload, packet.ttl, packet.vlan) == (
                OUT4, 6000 + i, b"waited", 8, None,
            )  # fmt: skip
            assert packet.header_good and packet.checksum_good
    assert trip(wire.path)["away"] == 1
    assert wire.path.counted(SLOT) == (before[0] + 1, before[1] + 6)


def test_a_frame_for_the_slow_path_is_passed_on_once(wire: Wire) -> None:
    """When it is back; the packet sockets that get what tc passed on see it once."""
    wire.install()
    moved = wire.now()
    set_trip(wire.path, away=1, place=NO_PLACE, moved=moved)
    with wire.star.relay.inside():
        ring = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with ring:
        ring.bind(("in0", 0x0800))
        ring.settimeout(10)
        sent = (b"last hop", b"the next")
        for payload in sent:
            send_frames(wire.star.source, "s0", [frames.udp_frame(SOURCE, G4, 5000, payload, ttl=1)])
        assert tuple(ring.recv(2000)[-8:] for _ in sent) == sent
    assert wire.path.passed()["ttl"] == 2
    assert wire.path.flow(key(SOURCE, G4, 5000, ifindex=wire.iif))["left"] == 2
    assert trip(wire.path)["away"] == 1


def test_it_is_no_input_s(wire: Wire) -> None:
    """A flow of lo has the copy's very addresses, and its program is there: the copy is not taken for its."""
    wire.install()
    wire.path.install(key("10.1.1.1", OUT4, 6001), Out(OUT4, 6000), Out(OUT4, 6001, hop=1), slot=SLOT + 1)
    sent = payloads(8, 1000)
    with Sender(wire.star.source) as sender, Receiver(wire.star.sink, "k1", 6001, OUT4) as receiver:
        sender.send_segmented(G4, 5000, sent)
        assert receiver.receive(8) == sent
    assert wire.path.counted(SLOT) == (8, 8000)
    assert wire.path.counted(SLOT + 1) == (0, 0)


def test_others_frames_on_lo_pass(wire: Wire) -> None:
    """As if there were no program."""
    with wire.star.relay.inside():
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(10)
        sender.sendto(b"local", receiver.getsockname())
        assert receiver.recv(100) == b"local"


def test_lo_is_down(wire: Wire) -> None:
    """Copies go directly, and lo is not asked again at once."""
    wire.install()
    wire.star.relay.ip("link set lo down")
    dropped = wire.star.relay.links()["lo"]["stats64"]["rx"]["dropped"]
    sent = payloads(24, 1000)
    with Sender(wire.star.source) as sender, Receiver(wire.star.sink, "k1", 6001, OUT4) as receiver:
        for start in range(0, 24, 8):
            sender.send_segmented(G4, 5000, sent[start : start + 8])
        assert receiver.receive(24) == sent
    assert wire.star.relay.links()["lo"]["stats64"]["rx"]["dropped"] == dropped + 1
    assert trip(wire.path)["away"] == 0
