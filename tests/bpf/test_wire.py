"""The programs on interfaces: copies, tags, merged frames and partial checksums, and what the rings see."""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from bpf_rig import LOOPBACK, FastPath, Out, key, packed
from mrelay.ebpf import load
from mrelay.kernel import libbpf
from mrelay.kernel.packet import SHORT
from netns import frames
from netns.lab import SOURCE, SOURCE_6, Lab, Namespace, Star, eventually
from netns.traffic import Capture, Receiver, Sender, payloads, send_frames

pytestmark = pytest.mark.netns
G4, G6 = "239.1.1.1", "ff3e::1"
OUT4, OUT6 = "239.2.2.2", "ff3e::2"
ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD


class Wire:
    """A star whose relay has the program at in0, and a hop for each of its outputs."""

    def __init__(self, star: Star, path: FastPath, outputs: int, *, offload: bool) -> None:
        self.star, self.path, self.offload = star, path, offload
        with star.relay.inside():
            self.ifindex = socket.if_nametoindex("in0")
            for i in range(outputs):
                values = {"ifindex": socket.if_nametoindex(f"out{i}"), "own_mac": star.relay.mac(f"out{i}")}
                path.set_hop(i, **values, mac=star.sink.mac(f"k{i}"), source=packed(f"10.1.{i}.1"))
                path.set_hop(100 + i, **values, mac=star.sink.mac(f"k{i}"), source=packed(f"fd00:1:{i}::1"))
            self.landing = libbpf.attach_tcx(path.land, LOOPBACK)
            self.link = libbpf.attach_ingress(path.program, self.ifindex)

    def key(self, source: str = SOURCE, group: str = G4, vlan: int = 0) -> bytes:
        """Of a flow that comes in here."""
        return key(source, group, 5000, ifindex=self.ifindex, vlan=vlan)


@pytest.fixture
def wire(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Wire]:
    """With three outputs."""
    offload = getattr(request, "param", False)
    star = lab.star(outputs=3, mtu=9000, offload=offload)
    with FastPath() as path:
        made = Wire(star, path, 3, offload=offload)
        yield made
        made.link.close()
        made.landing.close()


def captures(stack: ExitStack, star: Star, count: int = 3) -> list[Capture]:
    """Of what arrives at the sinks."""
    return [stack.enter_context(Capture(star.sink, f"k{i}")) for i in range(count)]


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
def test_each_output_gets_its_own_copy(wire: Wire, six: bool) -> None:
    """Each rewriting starts from the original, not from the copy before it."""
    source, group, out, base = (SOURCE_6, G6, OUT6, 100) if six else (SOURCE, G4, OUT4, 0)
    unicast = "fd00:1:2::2" if six else "10.1.2.2"
    outputs = [
        Out(out, 6000, 40000, base, ttl=99, dscp=46),
        Out(out, 6001, 40001, base + 1, keep=True),
        Out(unicast, 6002, 40002, base + 2, dscp=0),
    ]
    wire.path.install(wire.key(source, group), *outputs)
    with ExitStack() as stack:
        wires = captures(stack, wire.star)
        send_frames(wire.star.source, "s0", [frames.udp_frame(source, group, 5000, b"one", ttl=16)])
        got = [each.wait(1)[0] for each in wires]
    sources = ("fd00:1::1", "fd00:1:1::1", "fd00:1:2::1") if six else ("10.1.0.1", "10.1.1.1", "10.1.2.1")
    assert [(p.source, p.destination, p.sport, p.dport, p.ttl, p.dscp) for p in got] == [
        (sources[0], out, 40000, 6000, 99, 46),
        (source, out, 40001, 6001, 15, 0),
        (sources[2], unicast, 40002, 6002, 15, 0),
    ]
    macs = [frames.multicast_mac(out)] * 2 + [wire.star.sink.mac("k2")]
    assert [p.destination_mac for p in got] == macs
    assert [p.source_mac for p in got] == [wire.star.relay.mac(f"out{i}") for i in range(3)]
    assert all(p.payload == b"one" and p.header_good and p.checksum_good for p in got)
    assert wire.path.counted() == (1, 3)
    assert not wire.path.arrays["outputs"]["errors"].any()


@pytest.mark.parametrize("vlan", [0, 7])
def test_tags_are_matched_and_taken_off(wire: Wire, vlan: int) -> None:
    """A tag of VLAN 0 gives a priority only: such a frame is untagged."""
    wire.path.install(wire.key(vlan=vlan), Out(), Out(hop=1))
    with ExitStack() as stack:
        wires = captures(stack, wire.star, 2)
        other = frames.udp_frame(SOURCE, G4, 5000, b"other", vlan=8)
        send_frames(wire.star.source, "s0", [other, frames.udp_frame(SOURCE, G4, 5000, b"tagged", vlan=vlan)])
        got = [each.wait(1)[0] for each in wires]
    assert [(p.vlan, p.payload) for p in got] == [(None, b"tagged")] * 2
    assert wire.path.passed()["no_flow"] >= 1


@pytest.mark.parametrize("wire", [True, False], indirect=True, ids=["merged-out", "segmented-by-kernel"])
@pytest.mark.parametrize("checksums", [True, False], ids=["partial", "whole"])
@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
def test_bursts_leave_whole_and_right(wire: Wire, checksums: bool, six: bool) -> None:
    """A sender's UDP_SEGMENT burst: one frame in, or single ones; each datagram's checksum is right."""
    source, group, out, base = (SOURCE_6, G6, OUT6, 100) if six else (SOURCE, G4, OUT4, 0)
    if not checksums:
        wire.star.source.run("ethtool", "-K", "s0", "tx", "off", "tx-udp-segmentation", "off")
    merged_out = wire.offload and checksums
    wire.path.install(wire.key(source, group), *(Out(out, 6000, 40000 + i, base + i) for i in range(3)))
    sent = payloads(40, 1000)
    with ExitStack() as stack:
        wires = captures(stack, wire.star)
        receivers = [stack.enter_context(Receiver(wire.star.sink, f"k{i}", 6000, out, v6=six)) for i in range(3)]
        sender = stack.enter_context(Sender(wire.star.source, source))
        sender.send_segmented(group, 5000, sent)
        for receiver in receivers:
            assert receiver.receive(len(sent)) == sent
        for each in wires:
            seen = each.wait(1 if merged_out else len(sent))
            assert all(packet.header_good for packet in seen)
            assert {packet.checksum_good for packet in seen} == {None if merged_out else True}
            assert len(seen[0].payload) == (40_000 if merged_out else 1000)
    assert wire.path.counted() == (40, 40_000)


def test_padding_stays_behind(wire: Wire) -> None:
    """A tunnel would carry it on as part of the packet."""
    wire.path.install(wire.key(), Out(), Out(hop=1))
    with wire.star.sink.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_IP))
    frame = frames.udp_frame(SOURCE, G4, 5000, b"tiny")
    with sock:
        sock.bind(("k0", ETH_P_IP))
        sock.settimeout(10)
        send_frames(wire.star.source, "s0", [frame + bytes(14)])
        assert len(sock.recv(2000)) == len(frame)


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_a_program_is_attached_replaced_and_detached(lab: Lab, tcx: bool) -> None:
    """By either way; each time the one that was attached last sees the frames."""
    star = lab.star()
    with FastPath() as first, FastPath() as second, star.relay.inside():
        link = libbpf.attach_ingress(first.program, socket.if_nametoindex("in0"), tcx=tcx)
        assert link.kind == ("tcx" if tcx else "clsact")
        for path in (first, second):
            link.replace(path.program)
            send_frames(star.source, "s0", [frames.udp_frame(SOURCE, G4, 5000, b"seen")])
            eventually(lambda path=path: path.passed().get("no_flow"), "the program saw it")  # type: ignore[misc]
        seen = [path.passed()["no_flow"] for path in (first, second)]  # of others the kernel sends some, too
        link.close()
        send_frames(star.source, "s0", [frames.udp_frame(SOURCE, G4, 5000, b"unseen")])
        eventually(lambda: star.relay.links()["in0"]["stats64"]["rx"]["packets"] >= 3, "it came")
        assert [path.passed()["no_flow"] for path in (first, second)] == seen


# ---- the rings behind it ----


def ring(stack: ExitStack, relay: Namespace, program: int, protocol: int) -> socket.socket:
    """A packet socket at in0 that gets what tc passed on and the filter takes."""
    with relay.inside():
        sock = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
    libbpf.attach_to(sock, program, lock=True)
    sock.bind(("in0", protocol))
    sock.setblocking(False)
    return sock


def waiting(sock: socket.socket) -> list[int]:
    """Lengths of the frames that have come."""
    lengths = []
    while True:
        try:
            lengths.append(len(sock.recv(70_000)))
        except BlockingIOError:
            return lengths


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
def test_each_frame_has_one_ring(wire: Wire, six: bool) -> None:
    """SHORT counts the link-layer header; each frame is numbered once, and its flow keeps the number."""
    source, group, headers = (SOURCE_6, G6, 62) if six else (SOURCE, G4, 42)
    path, bits, family = wire.path, 128 if six else 32, 6 if six else 4
    wanted = struct.pack("=III", 64 + bits, wire.ifindex, family) + packed(group)
    path.ranges.update(wanted, bytes(4))
    path.arrays["progress"][0]["accepted"] = 10
    path.install(wire.key(source, group), Out(hop=50), tail=5)  # a hop that is not ready: all frames pass on
    path.arrays["progress"][0]["drained"] = 10
    programs = load.load_rings(path.maps, 0)
    sizes = [SHORT - headers, SHORT - headers + 1]
    with ExitStack() as stack:
        rings = [ring(stack, wire.star.relay, each, ETH_P_IPV6 if six else ETH_P_IP) for each in programs]
        sent = [frames.udp_frame(source, group, 5000, bytes(size)) for size in sizes]
        sent.append(frames.udp_frame(source, OUT6 if six else OUT4, 5000, b"unwanted"))
        send_frames(wire.star.source, "s0", sent)
        eventually(lambda: path.passed().get("no_flow"), "the last frame passed the program")
        assert [waiting(each) for each in rings] == [[SHORT], [SHORT + 1]]
    for program in programs:
        os.close(program)
    assert path.arrays["progress"][0]["accepted"] == 12
    assert path.flow(wire.key(source, group))["tail"] == 12


def test_the_ring_gets_nothing_that_was_carried(wire: Wire) -> None:
    """One decision for each frame."""
    path = wire.path
    path.ranges.update(struct.pack("=III", 64, wire.ifindex, 4) + bytes(16), bytes(4))
    path.install(wire.key(), Out(ttl=9))
    programs = load.load_rings(path.maps, 0)
    with ExitStack() as stack:
        short = ring(stack, wire.star.relay, programs[0], ETH_P_IP)
        carried = [frames.udp_frame(SOURCE, G4, 5000, b"carried")] * 5
        send_frames(wire.star.source, "s0", [*carried, frames.udp_frame(SOURCE, G4, 5001, b"not")])
        eventually(lambda: path.arrays["progress"][0]["accepted"], "the last frame came to the ring")
        assert len(waiting(short)) == 1
    for program in programs:
        os.close(program)
    assert path.counted() == (5, 35)
