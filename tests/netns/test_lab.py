"""The laboratory itself: what the other tests rely on, without a relay."""

import subprocess

import pytest

from netns import frames
from netns.frames import parse, udp_frame
from netns.lab import SOURCE, SOURCE_6, Lab
from netns.traffic import Capture, Receiver, Sender, payloads, send_frames

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"


def test_capture_reads_what_was_sent(lab: Lab) -> None:
    star = lab.star()
    star.source.run("ethtool", "-K", "s0", "tx", "off")
    sent = payloads(3)
    with Capture(star.relay, "in0") as wire, Sender(star.source, ttl=9, dscp=46) as sender:
        sender.send(GROUP, 5000, sent)
        got = wire.wait(3)
    assert [packet.payload for packet in got] == sent
    first = got[0]
    assert (first.source, first.destination, first.dport) == (SOURCE, GROUP, 5000)
    assert (first.ttl, first.dscp, first.vlan) == (9, 46, None)
    assert (first.header_good, first.checksum_good) == (True, True)
    assert first.destination_mac == frames.multicast_mac(GROUP)


def test_capture_reads_ipv6(lab: Lab) -> None:
    star = lab.star()
    star.source.run("ethtool", "-K", "s0", "tx", "off")
    with Capture(star.relay, "in0") as wire, Sender(star.source, SOURCE_6, ttl=9, dscp=46) as sender:
        sender.send("ff3e::1", 5000, [b"six"])
        packet = wire.wait(1)[0]
    assert (packet.source, packet.destination, packet.payload) == (SOURCE_6, "ff3e::1", b"six")
    assert (packet.ttl, packet.dscp, packet.checksum_good) == (9, 46, True)


def test_capture_sees_a_bad_checksum(lab: Lab) -> None:
    star = lab.star()
    bad = bytearray(udp_frame(SOURCE, GROUP, 5000, b"payload"))
    bad[-1] ^= 1
    with Capture(star.relay, "in0") as wire:
        send_frames(star.source, "s0", [bytes(bad)])
        assert wire.wait(1)[0].checksum_good is False


def test_capture_sees_a_stripped_vlan_tag(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.relay, "in0") as wire:
        send_frames(star.source, "s0", [udp_frame(SOURCE, GROUP, 5000, b"tagged", vlan=20)])
        assert wire.wait(1)[0].vlan == 20


@pytest.mark.parametrize("group", [GROUP, "ff3e::1"])
def test_frames_are_good(group: str) -> None:
    source = SOURCE_6 if ":" in group else SOURCE
    packet = parse(udp_frame(source, group, 5000, b"odd"))
    assert packet is not None
    assert (packet.header_good, packet.checksum_good, packet.payload) == (True, True, b"odd")


def test_kernel_refuses_the_unroutable_source(lab: Lab) -> None:
    star = lab.star()
    with Receiver(star.relay, "in0", 5000, GROUP) as application, Sender(star.source) as unroutable:
        unroutable.send(GROUP, 5000, [b"never seen"])
        star.source.ip("addr add 192.168.50.2/24 dev s0")
        with Sender(star.source, "192.168.50.2") as routable:
            routable.send(GROUP, 5000, [b"seen"])
        assert application.receive(1) == [b"seen"]


def test_receiver_gets_one_datagram_a_segment(lab: Lab) -> None:
    star = lab.star()
    star.source.ip("addr add 192.168.50.2/24 dev s0")
    sent = [*payloads(10, 1000), b"short tail"]
    with (
        Receiver(star.relay, "in0", 5000, GROUP) as application,
        Sender(star.source, "192.168.50.2") as sender,
    ):
        sender.send_segmented(GROUP, 5000, sent)
        assert application.receive(11) == sent


def test_unicast_to_the_relay_needs_no_arp_answer(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.relay, "in0") as wire, Sender(star.source) as sender:
        sender.send("192.168.50.1", 5000, [b"unicast"])
        assert wire.wait(1)[0].payload == b"unicast"


def test_namespaces_are_removed() -> None:
    with Lab() as lab:
        name = lab.star().relay.name
    assert name not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
