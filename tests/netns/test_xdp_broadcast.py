"""XDP with several outputs: the kernel copies a frame by a devmap, and a second program makes each copy what its
output wants."""

import os
import signal
from pathlib import Path

import pytest

from netns import frames
from netns.driver import XDP, await_engine, engines, piling_up, xdp_star
from netns.lab import SOURCE, SOURCE_6, Lab, Star, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Receiver, Sender, payloads

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("can_do_xdp")]
G4, G6 = "239.1.1.1", "ff3e::1"
THREE4 = ("out0:239.2.2.2:6000", "out1:10.1.1.2:6001,ttl=9,dscp=46", "out2:*:*,source=keep")
THREE6 = ("out0:[ff3e::2]:6000", "out1:[fd00:1:1::2]:6001,ttl=9,dscp=46", "out2:*:*")
TWO = ("out0:239.2.2.2:6000", "out1:239.2.2.3:6001")


@pytest.fixture
def star(lab: Lab) -> Star:
    """A star of three outputs that take frames from XDP."""
    return xdp_star(lab, 3)


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
def test_each_output_has_its_own(star: Star, six: bool) -> None:
    """Addresses, ports, TTL, DSCP, link layer; checksums are verified off the wire."""
    group, source, left = (G6, SOURCE_6, f"[{G6}]") if six else (G4, SOURCE, G4)
    to = ["ff3e::2", "fd00:1:1::2", G6] if six else ["239.2.2.2", "10.1.1.2", G4]
    own = ["fd00:1::1", "fd00:1:1::1", "fd00:1:2::1"] if six else ["10.1.0.1", "10.1.1.1", SOURCE]
    sent = payloads(50)
    config = XDP + rule("a", f"in0:{left}:5000", *(THREE6 if six else THREE4))
    with Relay(star.relay, config) as relay, Sender(star.source, source, dscp=10) as sender:
        await_engine(relay, sender, group, "xdp")
        before = relay.stats()
        wires = [Capture(star.sink, f"k{i}") for i in range(3)]
        sender.send(group, 5000, sent)
        for i, wire in enumerate(wires):
            with wire:
                got = wire.wait(len(sent))
                assert [packet.payload for packet in got + wire.arrived()] == sent
            assert all(packet.header_good and packet.checksum_good for packet in got)
            said = {(p.source, p.destination, p.dport, p.ttl, p.dscp) for p in got}
            assert said == {(own[i], to[i], (6000, 6001, 5000)[i], 9 if i == 1 else 15, 46 if i == 1 else 10)}
            mac = star.sink.mac("k1") if i == 1 else frames.multicast_mac(to[i])
            assert {(p.destination_mac, p.source_mac) for p in got} == {(mac, star.relay.mac(f"out{i}"))}
        after = relay.await_received(before["received"] + len(sent))
        assert after["matched"] - before["matched"] == len(sent)
        assert engines(relay)[group] == ("xdp", "")
        relay.check_counters()


def test_several_by_one_interface(star: Star) -> None:
    """Each copy is another output's, also when the kernel sends some of a frame's copies before the others."""
    outputs = [f"out{n % 3 % 2}:239.2.2.{n}:{6000 + n}" for n in range(16)]
    with (
        Relay(star.relay, XDP + rule("a", f"in0:{G4}:5000", *outputs)) as relay,
        Sender(star.source) as sender,
        piling_up(star),
    ):
        await_engine(relay, sender, G4, "xdp")
        with Capture(star.sink, "k0") as one, Capture(star.sink, "k1") as two:
            sent = payloads(20)
            sender.send(G4, 5000, sent)
            got = one.wait(20 * 11) + two.wait(20 * 5) + one.arrived() + two.arrived()
        for n in range(16):
            mine = [p for p in got if (p.destination, p.dport) == (f"239.2.2.{n}", 6000 + n)]
            assert [packet.payload for packet in mine] == sent
            assert all(packet.checksum_good for packet in mine)
        assert len(got) == 20 * 16


def test_who_receives_copies_can_merge_them(star: Star) -> None:
    """The ticket that they came with is off: the kernel merges no frames whose data before them differ."""
    star.sink.run("ethtool", "-K", "k0", "rx-udp-gro-forwarding", "on")
    with (
        Relay(star.relay, XDP + rule("a", f"in0:{G4}:5000", *TWO)) as relay,
        Sender(star.source) as sender,
        piling_up(star),
    ):
        await_engine(relay, sender, G4, "xdp")

        def merged() -> bool:
            with Capture(star.sink, "k0") as wire:
                sender.send(G4, 5000, payloads(30, 1000))
                return any(len(packet.payload) > 1000 for packet in [*wire.wait(1), *wire.arrived()])

        eventually(merged, "copies arrive merged")
        assert engines(relay)[G4] == ("xdp", "")


def test_what_tc_keeps(star: Star) -> None:
    """More outputs than a broadcast has; one whose peer has no NAPI, and back."""
    config = XDP + rule("many", "in0:239.1.1.2:5000", *(f"out0:239.2.2.{n}:6002" for n in range(17)))
    config += rule("two", f"in0:{G4}:5000", *TWO)
    with Relay(star.relay, config) as relay, Sender(star.source) as sender:
        await_engine(relay, sender, "239.1.1.2", "ebpf", "more outputs")
        await_engine(relay, sender, G4, "xdp")
        star.sink.run("ethtool", "-K", "k1", "gro", "off")
        await_engine(relay, sender, G4, "ebpf", "takes no frames")
        with Receiver(star.sink, "k1", 6001, "239.2.2.3") as receiver:
            sender.send(G4, 5000, payloads(50))
            assert receiver.receive(50) == payloads(50)
        star.sink.run("ethtool", "-K", "k1", "gro", "on")
        await_engine(relay, sender, G4, "xdp")


def test_merged_frames_stay_with_tc(star: Star) -> None:
    """What GRO merges tc carries faster; single frames in a row bring XDP, and no merged one takes it away."""
    star.source.run("ethtool", "-K", "s0", "tx-udp-segmentation", "off")
    config = XDP + rule("a", f"in0:{G4}:5000", *TWO)
    with Relay(star.relay, config) as relay, Sender(star.source) as sender, piling_up(star):

        def merged() -> bool:
            for _ in range(20):
                sender.send_segmented(G4, 5000, payloads(16))
            return "GRO merges" in engines(relay).get(G4, ("", ""))[1]

        eventually(merged, "tc carries merged frames")
        for _ in range(20):
            merged()
        assert engines(relay)[G4] == ("ebpf", "no XDP: GRO merges its frames, not 16 in a row came single")
        await_engine(relay, sender, G4, "xdp")


def test_a_next_hop_that_moves(star: Star) -> None:
    """A unicast output's route has another gateway: from then on its copies go there."""
    gateways = {"10.1.1.8": "02:00:00:00:00:08", "10.1.1.9": "02:00:00:00:00:09"}
    star.relay.ip(*(f"neigh replace {address} lladdr {mac} dev out1" for address, mac in gateways.items()))
    star.relay.ip("route add 10.9.9.9/32 via 10.1.1.8")
    config = XDP + rule("a", f"in0:{G4}:5000", "out0:239.2.2.2:6000", "out1:10.9.9.9:6001")
    with Relay(star.relay, config) as relay, Sender(star.source) as sender:
        for address, mac in gateways.items():
            star.relay.ip(f"route replace 10.9.9.9/32 via {address}")
            with Capture(star.sink, "k1") as wire:

                def moved(wire: Capture = wire, mac: str = mac) -> bool:
                    sender.send(G4, 5000, [b"moved?"])
                    return any(packet.destination_mac.hex(":") == mac for packet in wire.arrived())

                eventually(moved, f"copies go to {address}")
            await_engine(relay, sender, G4, "xdp")
            with Capture(star.sink, "k1") as wire, Capture(star.sink, "k0") as other:
                sender.send(G4, 5000, payloads(50))
                got = wire.wait(50)
                assert {packet.destination_mac.hex(":") for packet in got} == {mac}
                for packets in (got, other.wait(50)):
                    assert [packet.payload for packet in packets] == payloads(50)
                    assert all(packet.checksum_good for packet in packets)


def test_an_interface_that_leaves_and_comes_back(star: Star) -> None:
    """The kernel takes it out of the devmap; with its old number it is put there again."""
    config = XDP + rule("a", f"in0:{G4}:5000", *TWO)
    with Relay(star.relay, config) as relay, Sender(star.source) as sender:
        await_engine(relay, sender, G4, "xdp")
        index = star.relay.links()["out1"]["ifindex"]
        star.relay.ip(f"link set out1 netns {star.source.name}")
        star.source.ip(f"link set out1 netns {star.relay.name}")
        star.relay.ip("addr add 10.1.1.1/24 dev out1", "link set out1 up")
        relay.await_rule("a", "up")
        assert star.relay.links()["out1"]["ifindex"] == index
        await_engine(relay, sender, G4, "xdp")
        with Receiver(star.sink, "k1", 6001, "239.2.2.3") as receiver:
            sender.send(G4, 5000, payloads(50))
            assert receiver.receive(50) == payloads(50)


def test_it_goes_on_and_is_taken_over(star: Star, folder: Path, pins: Path) -> None:
    """Every process killed: each datagram arrives at both outputs, then and by the next relay."""
    config = XDP + rule("a", f"in0:{G4}:5000", *TWO)
    arguments = ["--pin-dir", str(pins)]
    first = Relay(star.relay, config, folder=folder, arguments=arguments).start()
    first.wait_ready()
    with (
        Sender(star.source) as sender,
        Receiver(star.sink, "k0", 6000, "239.2.2.2") as one,
        Receiver(star.sink, "k1", 6001, "239.2.2.3") as two,
    ):
        await_engine(first, sender, G4, "xdp")
        for pid in first.family():
            os.kill(pid, signal.SIGKILL)
        first.close()
        sender.send(G4, 5000, payloads(100))
        with Relay(star.relay, config, folder=folder, arguments=arguments) as second:
            sender.send(G4, 5000, payloads(100, first=100))
            await_engine(second, sender, G4, "xdp")
            sender.send(G4, 5000, payloads(100, first=200))
            for receiver in (one, two):
                assert receiver.receive(300) == payloads(300)


def test_a_worker_that_ends(star: Star) -> None:
    """Nothing is lost or doubled, and it stays with XDP."""
    with (
        Relay(star.relay, XDP + rule("a", f"in0:{G4}:5000", *TWO)) as relay,
        Sender(star.source) as sender,
    ):
        await_engine(relay, sender, G4, "xdp")
        with Capture(star.sink, "k0") as one, Capture(star.sink, "k1") as two:
            worker = relay.workers()[0]["pid"]
            os.kill(worker, signal.SIGKILL)
            sender.send(G4, 5000, payloads(100))
            eventually(lambda: relay.workers()[0]["pid"] not in (worker, None), "another worker")
            sender.send(G4, 5000, payloads(100, first=100))
            for wire in (one, two):
                assert [packet.payload for packet in wire.wait(200)] == payloads(200)
        await_engine(relay, sender, G4, "xdp")
