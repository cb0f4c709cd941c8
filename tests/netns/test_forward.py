"""Streams from a source that the relay's host can't route to come out where the rules say, byte for byte."""

from contextlib import ExitStack

import pytest

from netns.frames import Packet, multicast_mac
from netns.lab import RELAY_IN, SOURCE_6, End, Lab, Namespace
from netns.relay import Relay, rule
from netns.traffic import Capture, Receiver, Sender, payloads

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"
COUNT = 50


def assert_good(packets: list[Packet]) -> None:
    """Headers and checksums are complete on the wire."""
    assert all(packet.header_good and packet.checksum_good for packet in packets)


def test_one_to_one(lab: Lab) -> None:
    star = lab.star()
    sent = payloads(COUNT)
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{GROUP}:5000")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config) as relay:
        sender.send(GROUP, 5000, sent)
        got = wire.wait(COUNT)
        stats = relay.await_received(COUNT)
        assert [packet.payload for packet in got] == sent
        assert_good(got)
        first = got[0]
        assert (first.source, first.destination, first.dport) == ("10.1.0.1", GROUP, 5000)
        assert (first.source_mac, first.destination_mac) == (star.relay.mac("out0"), multicast_mac(GROUP))
        assert (first.ttl, first.dscp, first.vlan) == (15, 0, None)
        assert (stats["matched"], sum(stats["drops"].values()), stats["flows"]) == (COUNT, 0, 1)
        stats = relay.await_stats(lambda s: s["rules"][0]["outputs"][0]["packets"] == COUNT, "output packets")
        counted = stats["rules"][0]
        assert (counted["name"], counted["packets"], counted["bytes"]) == ("a", COUNT, COUNT * 200)
        assert counted["outputs"][0]["to"] == f"out0:{GROUP}:5000"
        assert (counted["outputs"][0]["bytes"], counted["outputs"][0]["errors"]) == (COUNT * 200, 0)


def test_flow_is_listed(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{GROUP}:5000")
    with Sender(star.source) as sender, Relay(star.relay, config) as relay:
        sender.send(GROUP, 5000, payloads(5))
        relay.await_received(5)
        flow = relay.flows()[0]
        seen = [flow[key] for key in ("interface", "vlan", "source", "group", "port", "packets", "rules")]
        assert seen == ["in0", None, "10.99.9.1", GROUP, 5000, 5, ["a"]]
        assert flow["outputs"] == [f"out0:{GROUP}:5000"]


def test_fan_out_to_8_interfaces(lab: Lab) -> None:
    star = lab.star(outputs=8)
    sent = payloads(COUNT)
    config = rule("a", f"in0:{GROUP}:5000", *(f"out{i}:239.2.2.{i}:6000" for i in range(8)))
    with ExitStack() as stack:
        wires = [stack.enter_context(Capture(star.sink, f"k{i}")) for i in range(8)]
        sender = stack.enter_context(Sender(star.source))
        relay = stack.enter_context(Relay(star.relay, config))
        sender.send(GROUP, 5000, sent)
        for i, wire in enumerate(wires):
            got = wire.wait(COUNT)
            assert [packet.payload for packet in got] == sent
            assert {(packet.source, packet.destination) for packet in got} == {(f"10.1.{i}.1", f"239.2.2.{i}")}
            assert_good(got)
        assert relay.await_received(COUNT)["matched"] == COUNT, "a datagram is matched once"


def test_fan_out_on_one_interface(lab: Lab) -> None:
    star = lab.star()
    sent = payloads(COUNT)
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.1:6001", "out0:239.2.2.2:6002")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config):
        sender.send(GROUP, 5000, sent)
        got = wire.wait(2 * COUNT)
        assert_good(got)
        for group, port in (("239.2.2.1", 6001), ("239.2.2.2", 6002)):
            assert [p.payload for p in got if (p.destination, p.dport) == (group, port)] == sent


def test_two_rules_for_one_stream_send_it_once_to_each_output(lab: Lab) -> None:
    star = lab.star(outputs=2)
    sent = payloads(COUNT)
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.1:6000")
    config += rule("b", f"in0:{GROUP}:5000", "out0:239.2.2.1:6000", "out1:239.2.2.1:6000")
    marker = b"the end"
    with (
        Capture(star.sink, "k0") as wire0,
        Capture(star.sink, "k1") as wire1,
        Sender(star.source) as sender,
        Relay(star.relay, config),
    ):
        sender.send(GROUP, 5000, [*sent, marker])
        assert [packet.payload for packet in wire0.until(marker)] == [*sent, marker]
        assert [packet.payload for packet in wire1.until(marker)] == [*sent, marker]


def test_three_relays_in_a_row(lab: Lab) -> None:
    source, sink = lab.namespace("src"), lab.namespace("sink")
    hops = [lab.namespace(f"hop{i}") for i in range(3)]
    lab.source_link(source, hops[0])
    for i, (left, right) in enumerate(zip(hops, [*hops[1:], sink], strict=True)):
        connect(lab, left, right, i)
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{GROUP}:5000")
    sent = payloads(COUNT)
    with ExitStack() as stack:
        wire = stack.enter_context(Capture(sink, "in0"))
        sender = stack.enter_context(Sender(source, ttl=16))
        for hop in hops:
            stack.enter_context(Relay(hop, config))
        sender.send(GROUP, 5000, sent)
        got = wire.wait(COUNT)
        assert [packet.payload for packet in got] == sent
        assert {packet.ttl for packet in got} == {13}
        assert_good(got)


def connect(lab: Lab, left: Namespace, right: Namespace, i: int) -> None:
    """out0 of one namespace to in0 of the next, as a plain NIC."""
    lab.link(End(left, "out0", (f"10.3.{i}.1/24",)), End(right, "in0", (f"10.3.{i}.2/24",)))
    left.run("ethtool", "-K", "out0", "tx", "off")


def test_ipv6(lab: Lab) -> None:
    star = lab.star(outputs=2)
    sent = payloads(COUNT)
    config = rule("six", "in0:[ff3e::1]:5000", "out0:[ff3e::2]:6000", "out1:[fd00:1:1::2]:6001")
    with (
        Capture(star.sink, "k0") as wire0,
        Capture(star.sink, "k1") as wire1,
        Sender(star.source, SOURCE_6) as sender,
        Relay(star.relay, config) as relay,
    ):
        sender.send("ff3e::1", 5000, sent)
        group, host = wire0.wait(COUNT), wire1.wait(COUNT)
        assert [packet.payload for packet in group] == sent
        assert [packet.payload for packet in host] == sent
        assert_good(group + host)
        first = group[0]
        assert (first.source, first.destination, first.dport) == ("fd00:1::1", "ff3e::2", 6000)
        assert (first.ttl, first.dscp) == (15, 0)
        assert first.destination_mac == multicast_mac("ff3e::2")
        assert relay.await_received(COUNT)["matched"] == COUNT


def test_jumbo_frames(lab: Lab) -> None:
    star = lab.star(mtu=9000)
    sent = payloads(40, 8900)  # of 120 long slots; a flow that the kernel takes over waits for 90 frames at most
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config):
        sender.send(GROUP, 5000, sent)
        got = wire.wait(len(sent))
        assert [packet.payload for packet in got] == sent
        assert_good(got)


def test_empty_and_tiny_datagrams(lab: Lab) -> None:
    star = lab.star()
    sent = [b"", b"1", b"22", b"", b"odd"]
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config) as relay:
        sender.send(GROUP, 5000, sent)
        got = wire.wait(len(sent))
        assert [packet.payload for packet in got] == sent
        assert_good(got)
        relay.await_received(len(sent))


@pytest.mark.parametrize("size", [8000, 60000])
def test_fragmented_datagrams(lab: Lab, size: int) -> None:
    star = lab.star()
    sent = payloads(10, size)
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    with (
        Receiver(star.sink, "k0", 6000, "239.2.2.2") as application,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        sender.send(GROUP, 5000, sent)
        assert application.receive(len(sent)) == sent
        assert relay.await_received(len(sent))["matched"] == len(sent), "datagrams are counted, not fragments"


def test_a_large_datagram_is_fragmented_for_a_smaller_mtu(lab: Lab) -> None:
    star = lab.star(mtu=9000)
    star.relay.ip("link set out0 mtu 1500")
    sent = payloads(10, 8000)
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    with (
        Receiver(star.sink, "k0", 6000, "239.2.2.2") as application,
        Sender(star.source) as sender,
        Relay(star.relay, config),
    ):
        sender.send(GROUP, 5000, sent)
        assert application.receive(len(sent)) == sent


def test_from_and_to_one_interface(lab: Lab) -> None:
    star = lab.star()
    config = rule("hairpin", f"in0:{GROUP}:5000", "in0:239.2.2.2:6000")
    star.relay.run("ethtool", "-K", "in0", "tx", "off")
    with Capture(star.source, "s0") as wire, Sender(star.source) as sender, Relay(star.relay, config):
        sent = payloads(COUNT)
        sender.send(GROUP, 5000, sent)
        got = wire.wait(COUNT)
        assert [packet.payload for packet in got] == sent
        assert {(packet.source, packet.destination) for packet in got} == {(RELAY_IN, "239.2.2.2")}
