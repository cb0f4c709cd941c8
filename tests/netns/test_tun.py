"""A tunnel interface as input: it has no link-layer header."""

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from netns.frames import ipv4, udp
from netns.lab import SOURCE, Lab, Namespace
from netns.relay import Relay, rule
from netns.traffic import Capture, payloads

pytestmark = pytest.mark.netns
TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000  # linux/if_tun.h


@contextmanager
def tun(where: Namespace, name: str) -> Iterator[int]:
    """A tunnel interface in a namespace; what is written to the descriptor arrives on it."""
    if not os.path.exists("/dev/net/tun"):
        pytest.skip("no /dev/net/tun (CONFIG_TUN)")
    with where.inside():
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    try:
        where.ip(f"addr add 10.50.0.1/24 dev {name}", f"link set {name} up")
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("count", [3, 200], ids=["few", "many"])
def test_frames_without_a_link_layer_header(lab: Lab, count: int) -> None:
    star = lab.star()
    config = rule("exit", "tun7:239.1.1.1:5000", "out0:239.2.2.2:6000")
    with (
        tun(star.relay, "tun7") as fd,
        Capture(star.sink, "k0") as wire,
        Relay(star.relay, config) as relay,
    ):
        for payload in payloads(count):
            datagram = udp(SOURCE, "239.1.1.1", 4000, 5000, payload)
            os.write(fd, ipv4(SOURCE, "239.1.1.1", datagram, ttl=9))
        packets = wire.wait(count)
        assert [packet.payload for packet in packets] == payloads(count)
        assert {packet.ttl for packet in packets} == {8}
        relay.await_stats(lambda stats: stats["matched"] == count, f"matched == {count}")


def test_a_unicast_stream_leaves_the_tunnel_as_multicast(lab: Lab) -> None:
    star = lab.star()
    config = rule("exit", "tun7:10.50.0.1:6000", "out0:239.2.2.2:6000")
    with (
        tun(star.relay, "tun7") as fd,
        Capture(star.sink, "k0") as wire,
        Relay(star.relay, config),
    ):
        os.write(fd, ipv4(SOURCE, "10.50.0.1", udp(SOURCE, "10.50.0.1", 4000, 6000, b"out")))
        assert wire.wait(1)[0].payload == b"out"
