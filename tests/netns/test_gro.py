"""Merged frames: GRO on the way in, UDP GSO senders, and receivers that must not notice either."""

import socket
import struct
from collections import defaultdict

import pytest

from netns.lab import SOURCE_6, Lab, Namespace
from netns.relay import Relay, rule
from netns.traffic import Capture, Receiver, Sender, number, payloads

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"
OUT = "239.2.2.2"
MRT_INIT = 200  # linux/mroute.h
MRT_ADD_VIF = 202
VIFF_USE_IFINDEX = 8
FORWARDING = "rx-udp-gro-forwarding"


def merged_frames(wire: Capture, expected: int) -> int:
    """In how many frames `expected` bytes of payload arrived."""
    frames = octets = 0
    while octets < expected:
        octets += len(wire.wait(1)[0].payload)
        frames += 1
    return frames


@pytest.mark.parametrize("offload", [True, False], ids=["segmented-by-device", "segmented-by-kernel"])
@pytest.mark.parametrize("partial", [True, False], ids=["partial-checksum", "whole-checksum"])
def test_receivers_get_single_datagrams(lab: Lab, offload: bool, partial: bool) -> None:
    """A burst of equal datagrams merges on the way in; the application sees what was sent."""
    star = lab.star(outputs=2, offload=offload)
    star.source.run("ethtool", "-K", "s0", "tx-udp-segmentation", "off")  # the burst arrives datagram by datagram
    if not partial:
        star.source.run("ethtool", "-K", "s0", "tx", "off")
    sent = payloads(200, 1000)
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", "out1:10.1.1.2:6001")
    with (
        Receiver(star.sink, "k0", 6000, OUT) as group,
        Receiver(star.sink, "k1", 6001) as host,
        Capture(star.relay, "in0") as arriving,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        for start in range(0, len(sent), 40):
            sender.send_segmented(GROUP, 5000, sent[start : start + 40])
        assert group.receive(len(sent)) == sent
        assert host.receive(len(sent)) == sent
        assert relay.await_received(len(sent))["matched"] == len(sent), "datagrams are counted, not frames"
        assert merged_frames(arriving, 1000 * len(sent)) < len(sent) / 4, "GRO should have merged the bursts"


def test_interleaved_flows_of_different_sizes(lab: Lab) -> None:
    star = lab.star(offload=True)
    sizes = [64, 65, 200, 333, 1000, 1200, 1400, 1472]
    config = rule("a", "in0:239.1.1.0/24:5000", "out0:*:6000")
    groups = [f"239.1.1.{i + 1}" for i in range(len(sizes))]
    got: dict[int, list[int]] = defaultdict(list)
    with (
        Receiver(star.sink, "k0", 6000, *groups) as application,
        Capture(star.relay, "in0") as arriving,
        Sender(star.source) as sender,
        Relay(star.relay, config),
    ):
        hold_merged_frames(star.relay, "in0")
        for first in range(0, 400, 10):
            for i in range(first, first + 10):
                for flow, size in enumerate(sizes):
                    sender.send(groups[flow], 5000, payloads(1, size, first=i))
            for payload in application.receive(10 * len(sizes)):
                got[len(payload)].append(number(payload))
                assert payload == payloads(1, len(payload), first=number(payload))[0]
        assert got == {size: list(range(400)) for size in sizes}
        assert merged_frames(arriving, 400 * sum(sizes)) < 400 * len(sizes), "some should have merged"


def hold_merged_frames(namespace: Namespace, interface: str) -> None:
    """Let GRO keep frames from one poll to the next, so that interleaved single datagrams merge too."""
    folder = f"/sys/class/net/{interface}"
    namespace.run("sh", "-c", f"echo 2000000 > {folder}/gro_flush_timeout")  # ns
    namespace.run("sh", "-c", f"echo 1 > {folder}/napi_defer_hard_irqs")


def test_sizes_change_within_a_flow(lab: Lab) -> None:
    star = lab.star(offload=True)
    star.source.run("ethtool", "-K", "s0", "tx-udp-segmentation", "off")
    bursts = [
        payloads(count, size, first=1000 * i)
        for i, (count, size) in enumerate(
            [(20, 500), (1, 1400), (30, 100), (2, 100), (1, 4), (40, 1400), (10, 501)]
        )
    ]
    bursts = [[*burst, b"tail"] for burst in bursts]
    sent = [payload for burst in bursts for payload in burst]
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
    with (
        Receiver(star.sink, "k0", 6000, OUT) as application,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        for burst in bursts:
            sender.send_segmented(GROUP, 5000, burst)
        assert application.receive(len(sent)) == sent
        relay.await_received(len(sent))


@pytest.mark.parametrize("offload", [True, False], ids=["segmented-by-device", "segmented-by-kernel"])
def test_sender_that_uses_gso(lab: Lab, offload: bool, subtests: pytest.Subtests) -> None:
    """A superpacket from a local sender arrives whole; every segment must leave, the short last one too."""
    star = lab.star(offload=offload)
    star.sink.ip("route add 10.99.9.0/24 dev k0")  # the application's host judges the kept source, too
    sent = [*payloads(40, 1200), b"the short last one"]
    options = ["", ",ttl=3", ",source=keep", ",dscp=10"]
    config = "".join(
        rule(f"rule-{i}", f"in0:{GROUP}:{5000 + i}", f"out0:{OUT}:6000{option}")
        for i, option in enumerate(options)
    )
    with (
        Receiver(star.sink, "k0", 6000, OUT) as application,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        for i, option in enumerate(options):
            with subtests.test(option):
                for _ in range(3):
                    sender.send_segmented(GROUP, 5000 + i, sent)
                assert application.receive(3 * len(sent)) == sent * 3
                stats = relay.await_received((i + 1) * 3 * len(sent))
                of_rule = {entry["name"]: entry["bytes"] for entry in stats["rules"]}
                assert of_rule[f"rule-{i}"] == 3 * sum(map(len, sent))


def test_gso_segments_are_whole_on_the_wire(lab: Lab) -> None:
    star = lab.star()
    sent = [*payloads(30, 1200), b"tail"]
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
    with Capture(star.sink, "k0") as wire, Sender(star.source, dscp=46) as sender, Relay(star.relay, config):
        sender.send_segmented(GROUP, 5000, sent)
        got = wire.wait(len(sent))
        assert [packet.payload for packet in got] == sent
        assert {(p.header_good, p.checksum_good, p.ttl, p.dscp) for p in got} == {(True, True, 15, 46)}


def test_gso_ipv6(lab: Lab) -> None:
    star = lab.star()
    sent = [*payloads(30, 1200), b"tail"]
    config = rule("six", "in0:[ff3e::1]:5000", "out0:[ff3e::2]:6000")
    with Capture(star.sink, "k0") as wire, Sender(star.source, SOURCE_6) as sender, Relay(star.relay, config):
        sender.send_segmented("ff3e::1", 5000, sent)
        got = wire.wait(len(sent))
        assert [packet.payload for packet in got] == sent
        assert {packet.checksum_good for packet in got} == {True}


def test_segments_larger_than_the_output_mtu(lab: Lab) -> None:
    """Jumbo segments can't leave as segments of a 1500-byte link: they must leave as fragments."""
    star = lab.star(mtu=9000)
    star.relay.ip("link set out0 mtu 1500")
    sent = payloads(7, 8000)
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
    with (
        Receiver(star.sink, "k0", 6000, OUT) as application,
        Sender(star.source) as sender,
        Relay(star.relay, config) as relay,
    ):
        sender.send_segmented(GROUP, 5000, sent)
        assert application.receive(len(sent)) == sent
        assert relay.await_received(len(sent))["matched"] == len(sent)


@pytest.mark.parametrize("count", [64, 100])
def test_many_small_segments(lab: Lab, count: int) -> None:
    star = lab.star(outputs=2, offload=True)
    sent = payloads(count, 100)
    config = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000", f"out1:{OUT}:6000")
    with (
        Receiver(star.sink, "k0", 6000, OUT) as first,
        Receiver(star.sink, "k1", 6000, OUT) as second,
        Sender(star.source) as sender,
        Relay(star.relay, config),
    ):
        sender.send_segmented(GROUP, 5000, sent)
        assert first.receive(count) == sent
        assert second.receive(count) == sent


def differing(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """Features that have changed, with their new value."""
    return {name: value for name, value in after.items() if before.get(name) != value}


def test_gro_is_put_back_at_stop(lab: Lab) -> None:
    star = lab.star()
    before = star.relay.features("in0")
    with Relay(star.relay, rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")):
        assert star.relay.features("in0")[FORWARDING] == "on"
    assert differing(before, star.relay.features("in0")) == {}


def test_gro_false_leaves_the_interface_alone(lab: Lab) -> None:
    star = lab.star()
    before = star.relay.features("in0")
    config = "[relay]\ngro = false\n\n" + rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
    with Relay(star.relay, config):
        assert differing(before, star.relay.features("in0")) == {}


def test_gro_stays_off_beside_kernel_multicast_routing(lab: Lab) -> None:
    """The kernel's multicast routing drops merged frames that have DF set."""
    star = lab.star()
    with routing_socket(star.relay), Relay(star.relay, rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")):
        assert star.relay.features("in0")[FORWARDING] == "off"


def routing_socket(namespace: Namespace) -> socket.socket:
    """The socket of a kernel multicast router that serves in0; skips where the kernel has none."""
    with namespace.inside():
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IGMP)
    try:
        sock.setsockopt(socket.IPPROTO_IP, MRT_INIT, 1)
    except OSError:
        sock.close()
        pytest.skip("the kernel has no multicast routing (CONFIG_IP_MROUTE)")
    index = namespace.links()["in0"]["ifindex"]
    vif = struct.pack("=HBBIi4s", 0, VIFF_USE_IFINDEX, 1, 0, index, b"")  # struct vifctl
    sock.setsockopt(socket.IPPROTO_IP, MRT_ADD_VIF, vif)
    return sock
