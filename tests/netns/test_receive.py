"""What the relay takes in: memberships, source filters, VLANs, options, and many rules at once."""

import subprocess

import pytest

from netns.frames import IP_MF, ROUTER_ALERT, ethernet, ipv4, ipv6, multicast_mac, udp, udp_frame
from netns.lab import SOURCE, SOURCE_2, SOURCE_6, Lab, Namespace, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Sender, payloads, send_frames

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"
SSM_GROUP = "232.1.1.1"
COUNT = 20


def test_source_filter(lab: Lab) -> None:
    star = lab.star()
    config = rule("ssm", f"in0:{SOURCE}@{SSM_GROUP}:5000", "out0:239.2.2.2:6000")
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source, SOURCE) as wanted,
        Sender(star.source, SOURCE_2) as unwanted,
        Relay(star.relay, config) as relay,
    ):
        for payload in payloads(COUNT):
            unwanted.send(SSM_GROUP, 5000, [b"unwanted"])
            wanted.send(SSM_GROUP, 5000, [payload])
        assert [packet.payload for packet in wire.wait(COUNT)] == payloads(COUNT)
        relay.await_stats(lambda stats: stats["matched"] == COUNT, f"matched == {COUNT}")
        # 0xe8010101 is the group, 0x0a630901 the source: a source-specific membership, not an any-source one
        assert any("0xe8010101 0x0a630901" in line for line in star.relay.read("mcfilter").splitlines())


def test_source_prefix(lab: Lab) -> None:
    star = lab.star()
    config = rule("ssm", "in0:10.99.9.0/31@232.1.1.1:5000", "out0:239.2.2.2:6000")
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source, SOURCE) as wanted,  # .1 is in the /31, .2 is not
        Sender(star.source, SOURCE_2) as unwanted,
        Relay(star.relay, config) as relay,
    ):
        unwanted.send(SSM_GROUP, 5000, [b"unwanted"])
        wanted.send(SSM_GROUP, 5000, [b"wanted"])
        assert [packet.payload for packet in wire.until(b"wanted")] == [b"wanted"]
        relay.await_drops("no_rule", 1)


def test_membership_comes_and_goes_with_the_rule(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay) as relay:
        relay.add_rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
        relay.add_rule("b", f"in0:{GROUP}:5001", "out0:239.2.2.2:6001")
        eventually(lambda: GROUP in star.relay.groups("in0"), "joined")
        relay.remove_rule("a")
        relay.await_rule("b", "up")
        assert GROUP in star.relay.groups("in0"), "another rule still wants it"
        relay.remove_rule("b")
        eventually(lambda: GROUP not in star.relay.groups("in0"), "left")


def make_vlan(namespace: Namespace, parent: str, vlan: int, address: str) -> None:
    """A VLAN interface; the test is skipped where the kernel has none."""
    arguments = ["ip", "-n", namespace.name, "link", "add", "link", parent, "name", f"{parent}.{vlan}"]
    done = subprocess.run(
        [*arguments, "type", "vlan", "id", str(vlan)], capture_output=True, check=False, timeout=20
    )
    if done.returncode:
        pytest.skip("the kernel has no 802.1Q interfaces (CONFIG_VLAN_8021Q)")
    namespace.ip(f"addr add {address} dev {parent}.{vlan}", f"link set {parent}.{vlan} up")


def test_vlan_interface(lab: Lab) -> None:
    star = lab.star()
    make_vlan(star.relay, "in0", 20, "192.168.20.1/24")
    config = rule("a", f"in0.20:{GROUP}:5000", "out0:239.2.2.2:6000")
    with Capture(star.sink, "k0") as wire, Relay(star.relay, config):
        send_frames(star.source, "s0", [udp_frame(SOURCE, GROUP, 5000, b"untagged")])
        send_frames(star.source, "s0", [udp_frame(SOURCE, GROUP, 5000, b"tagged", vlan=20)])
        assert [packet.payload for packet in wire.until(b"tagged")] == [b"tagged"]


def test_tagged_frames_on_the_parent(lab: Lab) -> None:
    star = lab.star(outputs=2)
    config = rule("plain", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    config += rule("twenty", f"in0:{GROUP}:5000,vlan=20", "out1:239.2.2.2:6000")
    frames = [udp_frame(SOURCE, GROUP, 5000, str(vlan).encode(), vlan=vlan) for vlan in (20, 21, None)]
    with (
        Capture(star.sink, "k0") as plain,
        Capture(star.sink, "k1") as twenty,
        Relay(star.relay, config) as relay,
    ):
        send_frames(star.source, "s0", frames * 3)
        assert [packet.payload for packet in twenty.wait(3)] == [b"20"] * 3
        got = plain.wait(3)
        assert [packet.payload for packet in got] == [b"None"] * 3
        assert {packet.vlan for packet in got} == {None}, "tags do not leak to the output"
        relay.await_drops("no_rule", 3)
        relay.await_received(9)
        assert {flow["vlan"] for flow in relay.flows() if flow["rules"]} == {None, 20}


def test_ip_options_are_read_over(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    packet = ipv4(SOURCE, GROUP, udp(SOURCE, GROUP, 4000, 5000, b"with options"), options=ROUTER_ALERT)
    with Capture(star.sink, "k0") as wire, Relay(star.relay, config) as relay:
        send_frames(star.source, "s0", [ethernet(multicast_mac(GROUP), packet)])
        got = wire.wait(1)[0]
        assert (got.payload, got.header_good, got.checksum_good) == (b"with options", True, True)
        relay.await_received(1)


@pytest.mark.parametrize("vlan", [None, 20])
def test_fragments_of_a_datagram_that_would_fit_a_short_slot(lab: Lab, vlan: int | None) -> None:
    """A sender behind a small MTU fragments what would fit one frame here."""
    star = lab.star()
    tag = f",vlan={vlan}" if vlan else ""
    config = rule("a", f"in0:{GROUP}:5000{tag}", "out0:239.2.2.2:6000")
    datagram = udp(SOURCE, GROUP, 4000, 5000, b"put together" * 80)
    halves = [
        ipv4(SOURCE, GROUP, piece, ident=99, fragment=flags)
        for piece, flags in ((datagram[:480], IP_MF), (datagram[480:], 480 // 8))
    ]
    with Capture(star.sink, "k0") as wire, Relay(star.relay, config) as relay:
        for _ in range(2):  # the same again: nothing of the first is left over
            send_frames(star.source, "s0", [ethernet(multicast_mac(GROUP), half, vlan=vlan) for half in halves])
            assert wire.wait(1)[0].payload == b"put together" * 80
        relay.await_received(2)
        assert not wire.arrived()


def test_ipv6_extension_headers_are_counted(lab: Lab) -> None:
    """Forwarded or dropped for a reason: either will do, an uncounted loss will not."""
    star = lab.star()
    config = rule("six", "in0:[ff3e::1]:5000", "out0:[ff3e::2]:6000")
    datagram = udp(SOURCE_6, "ff3e::1", 4000, 5000, b"behind hop-by-hop options")
    hop_by_hop = bytes((17, 0, 1, 4, 0, 0, 0, 0))  # next header UDP, PadN (RFC 8200 §4.3)
    packet = ipv6(SOURCE_6, "ff3e::1", hop_by_hop + datagram, next_header=0)
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source, SOURCE_6) as sender,
        Relay(star.relay, config) as r,
    ):
        send_frames(star.source, "s0", [ethernet(multicast_mac("ff3e::1"), packet)])
        sender.send("ff3e::1", 5000, [b"plain"])
        assert wire.until(b"plain")[-1].payload == b"plain"
        r.await_received(2)


def test_frame_with_ethernet_padding(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    frame = udp_frame(SOURCE, GROUP, 5000, b"abc") + b"\xee" * 15
    with Capture(star.sink, "k0") as wire, Relay(star.relay, config):
        send_frames(star.source, "s0", [frame])
        assert wire.wait(1)[0].payload == b"abc"


def test_datagram_without_udp_checksum(lab: Lab) -> None:
    star = lab.star()
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
    frame = bytearray(udp_frame(SOURCE, GROUP, 5000, b"no checksum"))
    frame[40:42] = b"\0\0"  # behind 14 + 20 bytes of headers, at offset 6: RFC 768's "none"
    with Capture(star.sink, "k0") as wire, Relay(star.relay, config):
        send_frames(star.source, "s0", [bytes(frame)])
        assert wire.wait(1)[0].payload == b"no checksum"


def test_200_groups_with_20_memberships_a_socket(lab: Lab) -> None:
    star = lab.star()
    star.relay.sysctl("ipv4/igmp_max_memberships", 20)
    groups = [f"239.10.{i // 100}.{i % 100 + 1}" for i in range(200)]
    config = "".join(rule(f"r{i}", f"in0:{group}:5000", "out0:*:*") for i, group in enumerate(groups))
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config) as relay:
        assert set(groups) <= star.relay.groups("in0")
        for group in groups:
            sender.send(group, 5000, [group.encode()])
        got = wire.wait(200)
        assert sorted(p.destination for p in got) == sorted(groups)
        assert all(packet.payload == packet.destination.encode() for packet in got)
        assert relay.await_received(200)["flows"] == 200


def test_500_rules(lab: Lab) -> None:
    star = lab.star()
    config = "".join(
        rule(f"r{i}", f"in0:239.20.{i // 250}.{i % 250 + 1}:5000", f"out0:239.30.0.1:{6000 + i}")
        for i in range(500)
    )
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, config) as relay:
        assert {entry["state"] for entry in relay.rules().values()} == {"up"}
        assert len(relay.rules()) == 500
        for i in range(500):
            sender.send(f"239.20.{i // 250}.{i % 250 + 1}", 5000, [str(6000 + i).encode()])
        got = wire.wait(500)
        assert sorted(packet.dport for packet in got) == list(range(6000, 6500))
        assert all(packet.payload == str(packet.dport).encode() for packet in got)
        assert relay.await_received(500)["matched"] == 500
