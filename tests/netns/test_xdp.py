"""XDP as the second accelerator: flows that GRO does not merge are carried in the driver, everything else by tc.

Here with one output; test_xdp_broadcast has several.
"""

import itertools
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from bpf_rig import FastPath
from mrelay.kernel import libbpf
from netns import frames
from netns.driver import XDP, await_engine, counted, engines, piling_up, xdp_star
from netns.lab import SOURCE, SOURCE_6, Lab, Star, command, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Receiver, Sender, number, payloads, send_frames

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("can_do_xdp")]
G4, G6 = "239.1.1.1", "ff3e::1"
OUT4, OUT6 = "239.2.2.2", "ff3e::2"


@pytest.fixture
def star(lab: Lab) -> Star:
    """A star of two outputs that take frames from XDP."""
    return xdp_star(lab, 2)


CASES = {
    "multicast": (SOURCE, G4, OUT4, "", ("10.1.0.1", 15, 10)),
    "unicast": (SOURCE, G4, "10.1.0.2", "", ("10.1.0.1", 15, 10)),
    "ttl": (SOURCE, G4, OUT4, ",ttl=99", ("10.1.0.1", 99, 10)),
    "dscp": (SOURCE, G4, OUT4, ",dscp=46", ("10.1.0.1", 15, 46)),
    "source kept": (SOURCE, G4, OUT4, ",source=keep", (SOURCE, 15, 10)),
    "source": (SOURCE, G4, OUT4, ",source=10.7.7.7", ("10.7.7.7", 15, 10)),
    "IPv6": (SOURCE_6, G6, OUT6, "", ("fd00:1::1", 15, 10)),
    "IPv6 unicast": (SOURCE_6, G6, "fd00:1::2", ",ttl=3", ("fd00:1::1", 3, 10)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_an_output_says(star: Star, case: str) -> None:
    """By XDP as by any engine; checksums are verified off the wire."""
    source, group, out, options, said = CASES[case]
    if said[0] == "10.7.7.7":
        star.relay.ip("addr add 10.7.7.7/32 dev lo")
    left, right = (f"[{group}]", f"[{out}]") if ":" in group else (group, out)
    config = XDP + rule("a", f"in0:{left}:5000", f"out0:{right}:6000{options}")
    sent = payloads(50)
    with Relay(star.relay, config) as relay, Sender(star.source, source, dscp=10) as sender:
        await_engine(relay, sender, group, "xdp")
        with Capture(star.sink, "k0") as wire:
            sender.send(group, 5000, sent)
            got = wire.wait(len(sent))
        assert [packet.payload for packet in got] == sent
        assert all(packet.header_good and packet.checksum_good for packet in got)
        assert {(packet.source, packet.ttl, packet.dscp) for packet in got} == {said}
        multicast = "unicast" not in case
        mac = frames.multicast_mac(out) if multicast else star.sink.mac("k0")
        assert {(p.destination, p.dport, p.destination_mac) for p in got} == {(out, 6000, mac)}
        assert {packet.source_mac for packet in got} == {star.relay.mac("out0")}
        assert engines(relay)[group] == ("xdp", "")
        assert "xdp" in command("ip", "-n", star.relay.name, "-d", "link", "show", "in0")
    assert "prog/xdp" not in command("ip", "-n", star.relay.name, "-d", "link", "show", "in0")


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_nothing_is_lost_at_the_hand_over(star: Star, outputs: int) -> None:
    """Slow path, tc, XDP: each number once, in order, for many flows that start at once, in bursts.

    Bursts pile up; each datagram is longer than the one before, so that the kernel holds it back, to merge it,
    while it goes on with others, and merges none.
    """
    groups, each = [f"239.1.1.{n}" for n in range(1, 9)], 30  # a veth holds 256 frames: one burst
    bursts = itertools.count()
    config = XDP + rule("a", "in0:239.1.1.0/24:5000", *("out0:*:*", "out1:*:6000", "out0:*:6001")[:outputs])
    with (
        Relay(star.relay, config) as relay,
        Sender(star.source) as sender,
        Capture(star.sink, "k0") as first,
        Capture(star.sink, "k1") as second,
        piling_up(star),
    ):

        def all_by_xdp() -> bool:
            start, taken = next(bursts) * each, counted(star.relay, "in0", "rx_packets")
            for group in groups:
                sent = (payloads(1, 100 + n % 1200, first=n)[0] for n in range(start, start + each))
                sender.send(group, 5000, sent)
            wanted = taken + each * len(groups)
            eventually(lambda: counted(star.relay, "in0", "rx_packets") >= wanted, "in0 has taken the burst")
            return {engine for engine, _ in engines(relay).values()} == {"xdp"}

        eventually(all_by_xdp, "all flows are XDP's", 20)
        all_by_xdp()
        count = next(bursts) * each
        assert counted(star.source, "s0", "tx_dropped") == 0, "lost on its way to the relay"
        got = first.wait(count * len(groups) * (2 if outputs == 3 else 1), 30)
        got += second.wait(count * len(groups), 30) if outputs > 1 else []
        relay.await_received(count * len(groups))
    for port, group in itertools.product((5000, 6000, 6001)[:outputs], groups):
        mine = [number(p.payload) for p in got if (p.destination, p.dport) == (group, port)]
        assert mine == list(range(count))


def test_tc_keeps_what_xdp_cannot(star: Star) -> None:
    """An egress whose peer has no NAPI, and back."""
    config = XDP + rule("one", f"in0:{G4}:5000", f"out1:{OUT4}:6002")
    with Relay(star.relay, config) as relay, Sender(star.source) as sender:
        await_engine(relay, sender, G4, "xdp")
        star.sink.run("ethtool", "-K", "k1", "gro", "off")
        await_engine(relay, sender, G4, "ebpf", "takes no frames")
        with Receiver(star.sink, "k1", 6002, OUT4) as receiver:
            sender.send(G4, 5000, payloads(50))
            assert receiver.receive(50) == payloads(50)
        star.sink.run("ethtool", "-K", "k1", "gro", "on")
        await_engine(relay, sender, G4, "xdp")


def test_partial_checksums_stay_with_tc(star: Star) -> None:
    """A sender on this host: its datagrams leave whole."""
    star.source.run("ethtool", "-K", "s0", "tx", "on")
    with (
        Relay(star.relay, XDP + rule("a", f"in0:{G4}:5000", f"out0:{OUT4}:6000")) as relay,
        Sender(star.source) as sender,
        Capture(star.sink, "k0") as wire,
    ):
        await_engine(relay, sender, G4, "ebpf", "checksums to hardware")
        sender.send(G4, 5000, [b"last"])
        assert all(packet.checksum_good for packet in wire.until(b"last"))


def test_single_frames_that_do_not_fit(star: Star) -> None:
    """TTL and MTU: left to the slow path, which counts or sends them; the flow goes on by XDP."""
    star.relay.ip("link set out0 mtu 1000")
    with (
        Relay(star.relay, XDP + rule("a", f"in0:{G4}:5000", f"out0:{OUT4}:6000")) as relay,
        Sender(star.source) as sender,
        Receiver(star.sink, "k0", 6000, OUT4) as receiver,
    ):
        await_engine(relay, sender, G4, "xdp")
        sender.send(G4, 5000, [b"L" * 1400])
        eventually(lambda: b"L" * 1400 in receiver.receive(1), "the long one arrives, in fragments")
        send_frames(star.source, "s0", [frames.udp_frame(SOURCE, G4, 5000, b"dies", ttl=1)])
        relay.await_drops("ttl_expired", 1)
        await_engine(relay, sender, G4, "xdp")


def test_a_listener_gets_the_stream_too(star: Star) -> None:
    """While it listens."""
    with Relay(star.relay, XDP + rule("a", f"in0:{G4}:5000", f"out0:{OUT4}:6000")) as relay:
        star.relay.sysctl("ipv4/conf/all/rp_filter", 0)
        star.relay.sysctl("ipv4/conf/in0/rp_filter", 0)
        with Sender(star.source) as sender:
            await_engine(relay, sender, G4, "xdp")
            with Receiver(star.relay, "in0", 5000, G4) as local:
                sender.send(G4, 5000, payloads(20))
                assert local.receive(20) == payloads(20)
            await_engine(relay, sender, G4, "xdp")


def test_a_driver_that_cannot(lab: Lab) -> None:
    """A bridge has no XDP of its own: said once, with the remedy, and shown; tc forwards."""
    star = lab.star()
    star.source.run("ethtool", "-K", "s0", "tx", "off")
    star.relay.ip(
        "link add br0 type bridge mcast_snooping 0", "link set in0 master br0", "link set br0 up",
    )  # fmt: skip
    with Relay(star.relay, XDP + rule("a", f"br0:{G4}:5000", f"out0:{OUT4}:6000")) as relay:
        with Sender(star.source) as sender:
            await_engine(relay, sender, G4, "ebpf", "its driver refuses XDP")
        assert relay.rules()["a"]["state"] == "up"
        star.relay.ip("link add any0 type veth peer name any1")
        time.sleep(0.2)  # for the relay to look again
        assert relay.stderr.count("br0: no XDP") == 1
        assert "leave it out of xdp under [relay]" in relay.stderr


def test_an_mtu_that_is_too_large(lab: Lab) -> None:
    """For a frame in one page."""
    star = lab.star(mtu=9000)
    with Relay(star.relay, XDP + rule("a", f"in0:{G4}:5000", f"out0:{OUT4}:6000")) as relay:
        with Sender(star.source) as sender:
            await_engine(relay, sender, G4, "ebpf", "with this MTU")
        assert "lower its MTU" in relay.stderr


def test_another_program_stays(star: Star) -> None:
    """One that somebody attached before; when it is gone, a link that changes has the relay try again."""
    config = XDP + rule("a", f"in0:{G4}:5000", f"out0:{OUT4}:6000")
    with FastPath() as foreign, star.relay.inside():
        other = libbpf.attach_xdp(foreign.xdp, socket.if_nametoindex("in0"))
    with Relay(star.relay, config) as relay, Sender(star.source) as sender:
        await_engine(relay, sender, G4, "ebpf", "another XDP program")
        other.close()
        star.relay.ip("link add any0 type veth peer name any1")
        await_engine(relay, sender, G4, "xdp")


def test_it_goes_on_and_is_taken_over(star: Star, folder: Path, pins: Path) -> None:
    """Every process killed: each datagram arrives; the next relay has the same place; its end leaves nothing."""
    config = XDP + rule("a", f"in0:{G4}:5000", f"out0:{OUT4}:6000")
    first = Relay(star.relay, config, folder=folder, arguments=["--pin-dir", str(pins)]).start()
    first.wait_ready()
    with Sender(star.source) as sender:
        await_engine(first, sender, G4, "xdp")
        for pid in first.family():
            os.kill(pid, signal.SIGKILL)
        first.close()
        assert len(list(pins.glob("*/xdp-*"))) == 1
        with Receiver(star.sink, "k0", 6000, OUT4) as receiver:
            sender.send(G4, 5000, payloads(100))
            assert receiver.receive(100) == payloads(100)
        with Relay(star.relay, config, folder=folder, arguments=["--pin-dir", str(pins)]) as second:
            await_engine(second, sender, G4, "xdp")
            with Receiver(star.sink, "k0", 6000, OUT4) as receiver:
                sender.send(G4, 5000, payloads(100))
                assert receiver.receive(100) == payloads(100)
    assert not list(pins.glob("mrelay/*"))
    assert "prog/xdp" not in command("ip", "-n", star.relay.name, "-d", "link", "show", "in0")


def test_only_where_it_was_asked_for(star: Star) -> None:
    """An interface that is not named has tc, and no excuse."""
    config = XDP.replace("true", '["out1"]') + rule("a", f"in0:{G4}:5000", f"out0:{OUT4}:6000")
    with Relay(star.relay, config) as relay, Sender(star.source) as sender:
        await_engine(relay, sender, G4, "ebpf")
        assert engines(relay)[G4] == ("ebpf", "")


def test_tags_are_left_on(star: Star) -> None:
    """While XDP is there; afterwards they are taken off as before."""
    feature = "rx-vlan-offload"
    before = star.relay.features("in0")[feature]
    if before != "on":
        pytest.skip(f"needs an interface with {feature}: it is {before}")
    with Relay(star.relay, XDP + rule("a", f"in0:{G4}:5000", f"out0:{OUT4}:6000")):
        assert star.relay.features("in0")[feature] == "off"
    assert star.relay.features("in0")[feature] == "on"
