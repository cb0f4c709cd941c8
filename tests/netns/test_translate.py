"""What an output changes in a datagram: address, port, source, TTL, DSCP; and multicast through unicast."""

from collections.abc import Iterable

import pytest

from netns.lab import SOURCE, SOURCE_6, End, Lab
from netns.relay import Relay, rule
from netns.traffic import Capture, Sender, payloads

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"
COUNT = 20


def test_group_and_port(lab: Lab) -> None:
    star = lab.star()
    sent = payloads(COUNT)
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.255.2.2:65535")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config):
        sender.send(GROUP, 5000, sent)
        got = wire.wait(COUNT)
        assert [packet.payload for packet in got] == sent
        assert {(p.destination, p.dport, p.checksum_good) for p in got} == {("239.255.2.2", 65535, True)}


def test_multicast_to_unicast(lab: Lab) -> None:
    star = lab.star()
    sent = payloads(COUNT)
    config = rule("a", f"in0:{GROUP}:5000", "out0:10.1.0.2:6000")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config):
        sender.send(GROUP, 5000, sent)
        got = wire.wait(COUNT)
        assert [packet.payload for packet in got] == sent
        assert {(p.source, p.destination, p.dport) for p in got} == {("10.1.0.1", "10.1.0.2", 6000)}
        assert {(p.destination_mac, p.checksum_good) for p in got} == {(star.sink.mac("k0"), True)}


def test_unicast_to_multicast(lab: Lab) -> None:
    star = lab.star()
    sent = payloads(COUNT)
    config = rule("exit", "in0:192.168.50.1:5000", f"out0:{GROUP}:6000")
    with (
        Capture(star.sink, "k0") as wire,
        Capture(star.source, "s0") as back,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        star.relay.ip("route add 10.99.9.0/24 dev in0")  # so that a port-unreachable could find its way
        sender.send("192.168.50.1", 5000, sent)
        got = wire.wait(COUNT)
        assert [packet.payload for packet in got] == sent
        assert {(p.source, p.destination, p.dport) for p in got} == {("10.1.0.1", GROUP, 6000)}
        relay.await_received(COUNT)
        assert icmp_unreachables(back) == 0, "the host must not answer a unicast input with port-unreachable"


def icmp_unreachables(wire: Capture) -> int:
    """How many ICMP destination-unreachable messages (type 3) lie in a capture's queue."""
    wire.sock.setblocking(False)
    count = 0
    while True:
        try:
            frame = wire.sock.recv(2048)
        except BlockingIOError:
            return count
        count += frame[12:14] == b"\x08\x00" and frame[23] == 1 and frame[34] == 3


def test_tunnel_of_two_relays(lab: Lab) -> None:
    """Multicast becomes unicast at the near end, crosses, and becomes multicast at the far end."""
    source, near, far, sink = (lab.namespace(role) for role in ("src", "near", "far", "sink"))
    lab.source_link(source, near)
    lab.link(End(near, "wan", ("10.7.0.1/24",)), End(far, "wan", ("10.7.0.2/24",)))
    lab.link(End(far, "out0", ("10.8.0.1/24",)), End(sink, "k0", ("10.8.0.2/24",)))
    far.run("ethtool", "-K", "out0", "tx", "off")
    sent = payloads(COUNT)
    with (
        Capture(sink, "k0") as wire,
        Sender(source) as sender,
        Relay(near, rule("in", f"in0:{GROUP}:5000", "wan:10.7.0.2:7000")),
        Relay(far, rule("out", "wan:10.7.0.2:7000", f"out0:{GROUP}:5000")) as exit_,
    ):
        sender.send(GROUP, 5000, sent)
        got = wire.wait(COUNT)
        assert [packet.payload for packet in got] == sent
        assert {(p.source, p.destination, p.ttl) for p in got} == {("10.8.0.1", GROUP, 14)}
        assert all(packet.checksum_good for packet in got)
        assert exit_.await_received(COUNT)["matched"] == COUNT


def test_prefix_and_port_range_keep_the_input(lab: Lab) -> None:
    star = lab.star(outputs=2)
    config = rule("all", "in0:239.1.0.0/16:5000-5999", "out0:*:*", "out1:10.1.1.2:*")
    wanted = [(f"239.1.{i}.{i + 1}", 5000 + 333 * i) for i in range(4)]
    with (
        Capture(star.sink, "k0") as wire0,
        Capture(star.sink, "k1") as wire1,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        for number, (group, port) in enumerate(wanted):
            sender.send(group, port, payloads(1, first=number))
        kept, unicast = wire0.wait(4), wire1.wait(4)
        assert [(packet.destination, packet.dport) for packet in kept] == wanted
        assert [packet.payload for packet in kept] == payloads(4)
        assert [(p.destination, p.dport) for p in unicast] == [("10.1.1.2", port) for _, port in wanted]
        assert relay.await_received(4)["flows"] == 4


def test_streams_that_share_an_output_keep_their_own_ttl(lab: Lab) -> None:
    """Both leave by one socket; what it sends by default is the one's or the other's."""
    star = lab.star()
    config = rule("all", "in0:239.1.0.0/16:5000", "out0:*:*")
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source, ttl=16, dscp=46) as near,
        Sender(star.source, ttl=64) as far,
        Relay(star.relay, config, arguments=["--engine", "uring"]),
    ):
        for _ in range(3):
            for sender, group, ttl, dscp in ((near, "239.1.0.1", 15, 46), (far, "239.1.0.2", 63, 0)):
                sender.send(group, 5000, [b"each by itself"])
                (got,) = wire.wait(1)
                assert (got.destination, got.ttl, got.dscp) == (group, ttl, dscp)


def test_outside_the_prefix_or_range_is_not_forwarded(lab: Lab) -> None:
    star = lab.star()
    config = rule("all", "in0:239.1.0.0/16:5000-5999", "out0:*:*")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config) as relay:
        for group, port in (
            ("239.2.0.1", 5000),
            ("239.1.0.1", 4999),
            ("239.1.0.1", 6000),
            ("238.1.0.1", 5000),
        ):
            sender.send(group, port, [b"unwanted"])
        sender.send("239.1.255.255", 5999, [b"wanted"])
        assert [packet.payload for packet in wire.until(b"wanted")] == [b"wanted"]
        assert relay.stats()["matched"] == 1


def rules(options: Iterable[str]) -> str:
    """A rule for each option, from port 5000, 5001, …"""
    named = enumerate(options)
    return "".join(
        rule(f"rule-{i}", f"in0:{GROUP}:{5000 + i}", f"out0:239.2.2.2:6000{option}") for i, option in named
    )


SOURCES = {"": "10.1.0.1", ",source=egress": "10.1.0.1", ",source=keep": SOURCE, ",source=10.1.0.7": "10.1.0.7"}


def test_source(lab: Lab, subtests: pytest.Subtests) -> None:
    star = lab.star()
    star.relay.ip("addr add 10.1.0.7/24 dev out0")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, rules(SOURCES)):
        for i, (option, source) in enumerate(SOURCES.items()):
            with subtests.test(option):
                sent = payloads(COUNT, first=i * COUNT)
                sender.send(GROUP, 5000 + i, sent)
                got = wire.wait(COUNT)
                assert [packet.payload for packet in got] == sent
                assert {(p.source, p.header_good, p.checksum_good) for p in got} == {(source, True, True)}


def test_source_keep_ipv6_and_unicast(lab: Lab) -> None:
    star = lab.star(outputs=2)
    config = rule("six", "in0:[ff3e::1]:5000", "out0:[ff3e::2]:6000,source=keep")
    config += rule("host", f"in0:{GROUP}:5000", "out1:10.1.1.2:6000,source=keep")
    with (
        Capture(star.sink, "k0") as wire0,
        Capture(star.sink, "k1") as wire1,
        Sender(star.source, SOURCE_6) as six,
        Sender(star.source) as four,
        Relay(star.relay, config),
    ):
        six.send("ff3e::1", 5000, payloads(COUNT))
        four.send(GROUP, 5000, payloads(COUNT))
        for wire, source in ((wire0, SOURCE_6), (wire1, SOURCE)):
            got = wire.wait(COUNT)
            assert [packet.payload for packet in got] == payloads(COUNT)
            assert {(packet.source, packet.checksum_good) for packet in got} == {(source, True)}


TTLS = [(16, "", 15), (2, "", 1), (16, ",ttl=8", 8), (1, ",ttl=1", 1)]  # arrives with, option, leaves with


def test_ttl(lab: Lab, subtests: pytest.Subtests) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Relay(star.relay, rules(option for _, option, _ in TTLS)):
        for i, (arrives, option, leaves) in enumerate(TTLS):
            with subtests.test(option, arrives=arrives), Sender(star.source, ttl=arrives) as sender:
                sender.send(GROUP, 5000 + i, payloads(COUNT))
                assert {packet.ttl for packet in wire.wait(COUNT)} == {leaves}


def test_ttl_changes_within_a_flow(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    with Capture(star.sink, "k0") as wire, Relay(star.relay, config):
        for ttl in (16, 64, 3):
            with Sender(star.source, ttl=ttl) as sender:
                sender.send(GROUP, 5000, payloads(3))
        assert [packet.ttl for packet in wire.wait(9)] == [15] * 3 + [63] * 3 + [2] * 3


def test_expired_ttl_is_dropped_and_explained(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source, ttl=1) as expired,
        Sender(star.source, ttl=2) as good,
        Relay(star.relay, config) as relay,
    ):
        expired.send(GROUP, 5000, payloads(COUNT))
        good.send(GROUP, 5000, [b"good"])
        assert [packet.payload for packet in wire.until(b"good")] == [b"good"]
        relay.await_drops("ttl_expired", COUNT)
        relay.await_stats(lambda stats: stats["matched"] == 1, "matched == 1")
        assert "ttl" in relay.stderr, "the log names the remedy"
        assert relay.stderr.count("ttl_expired") <= 2, "and says it once a flow, not once a datagram"


def test_expired_for_one_output_only(lab: Lab) -> None:
    star = lab.star(outputs=2)
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000", "out1:239.2.2.2:6000,ttl=8")
    with (
        Capture(star.sink, "k1") as wire,
        Sender(star.source, ttl=1) as sender,
        Relay(star.relay, config) as r,
    ):
        sender.send(GROUP, 5000, payloads(COUNT))
        assert {packet.ttl for packet in wire.wait(COUNT)} == {8}
        assert r.await_received(COUNT)["matched"] == COUNT


DSCPS = {"": 46, ",dscp=10": 10, ",dscp=0": 0}  # arrives with 46


def test_dscp(lab: Lab, subtests: pytest.Subtests) -> None:
    star = lab.star()
    config = rules(DSCPS)
    for i, option in enumerate(DSCPS):
        config += rule(f"six-{i}", f"in0:[ff3e::1]:{5000 + i}", f"out0:[ff3e::2]:6000{option}")
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source, dscp=46) as four,
        Sender(star.source, SOURCE_6, dscp=46) as six,
        Relay(star.relay, config),
    ):
        for i, (option, leaves) in enumerate(DSCPS.items()):
            for sender, group in ((four, GROUP), (six, "ff3e::1")):
                with subtests.test(option, group=group):
                    sender.send(group, 5000 + i, payloads(COUNT))
                    assert {packet.dscp for packet in wire.wait(COUNT)} == {leaves}
