"""skb->csum, the sum that a NIC or a tunnel made of a whole packet, is right after rewriting (CHECKSUM_COMPLETE).

A wrong one loses nothing at once: receivers sum again, and the kernel logs "hw csum failure". So a program of
the test's own looks at it, before and after.
"""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import live  # bench/live.py
from bpf_rig import FastPath, Out, key, packed
from mrelay.kernel import bpf, libbpf
from netns import frames
from netns.lab import SOURCE, SOURCE_6, Lab, Namespace, Star
from netns.traffic import Capture, send_frames

pytestmark = pytest.mark.netns
TUNNEL = "type vxlan id 7 dstport 4789 udpcsum"  # its receiving end turns a good outer checksum into skb->csum


@pytest.fixture(scope="module")
def elf() -> bytes:
    """The program that looks."""
    return live.compiled(Path(__file__).with_name("complete.bpf.c"))


@pytest.fixture
def star(lab: Lab) -> Star:
    """Its source and relay have a tunnel, t0, whose outer checksums are whole."""
    made = lab.star()
    try:
        for end, own, other in ((made.source, 9, 1), (made.relay, 1, 9)):
            end.ip(f"link add t0 {TUNNEL} local 192.168.50.{own} remote 192.168.50.{other}", "link set t0 up")
    except AssertionError as error:
        pytest.skip(f"needs vxlan: {error}")
    made.source.ip("addr add 192.168.50.9/24 dev s0")
    made.source.run("ethtool", "-K", "s0", "tx", "off")
    return made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opens."""
    with ExitStack() as made:
        yield made


def look(stack: ExitStack, elf: bytes, namespace: Namespace, interface: str) -> Callable[[], int]:
    """Attach the program; the sum that it saw last."""
    loaded = stack.enter_context(libbpf.Object(elf, "complete"))
    loaded.load()
    fds = loaded.program_fd("look"), loaded.map_fd("sum")
    with namespace.inside():
        stack.callback(libbpf.attach_ingress(fds[0], socket.if_nametoindex(interface)).close)
    memory = stack.enter_context(bpf.map_memory(fds[1], 8, writable=True))
    for fd in fds:
        os.close(fd)
    return lambda: int(struct.unpack_from("=q", memory)[0])


def believed(value: int) -> int:
    """The 16-bit sum in network order that a 32-bit skb->csum stands for."""
    assert value > 0, "the kernel has no sum of it"
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return socket.ntohs(value)


@pytest.mark.parametrize(
    "six, summed", [(False, True), (True, True), (False, False)], ids=["IPv4", "IPv6", "no sum"]
)
def test_the_kernels_own_sum_follows_the_rewriting(
    star: Star, elf: bytes, stack: ExitStack, six: bool, summed: bool
) -> None:
    """Addresses, ports, TTL and DSCP all change; the last has no UDP checksum that follows them."""
    source, group, out = (SOURCE_6, "ff3e::1", "ff3e::2") if six else (SOURCE, "239.1.1.1", "239.2.2.2")
    path = stack.enter_context(FastPath())
    before = look(stack, elf, star.relay, "t0")
    after = look(stack, elf, star.sink, "k0")
    with star.relay.inside():
        ifindex = socket.if_nametoindex("t0")
        path.set_hop(ifindex=socket.if_nametoindex("out0"), source=packed("fd00:1::1" if six else "10.1.0.1"))
        stack.callback(libbpf.attach_ingress(path.program, ifindex).close)
    path.install(key(source, group, 5000, ifindex=ifindex), Out(out, ttl=99, dscp=46))
    wire = stack.enter_context(Capture(star.sink, "k0"))
    sent = frames.udp_frame(source, group, 5000, b"an odd number of bytes.")
    if not summed:
        sent = sent[:40] + bytes(2) + sent[42:]
    send_frames(star.source, "t0", [sent])
    (packet,) = wire.wait(1)
    datagram = frames.udp(packet.source, out, packet.sport, packet.dport, packet.payload)
    if not summed:
        datagram = datagram[:6] + bytes(2) + datagram[8:]
    if six:
        left = frames.ipv6(packet.source, out, datagram, tos=46 << 2, hops=99)
    else:
        left = frames.ipv4(packet.source, out, datagram, tos=46 << 2, ttl=99)
    assert packet.checksum_good == summed
    assert believed(before()) == ~frames.checksum(sent[14:]) & 0xFFFF
    assert believed(after()) == ~frames.checksum(left) & 0xFFFF
