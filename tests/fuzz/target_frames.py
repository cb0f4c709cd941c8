"""Frames of any bytes through both paths of a worker: the same datagrams out and the same counts, or a drop.

What no kernel delivers is not tried: a merged frame (virtio-net header) has a right IPv4 checksum and more
payload than one segment, as net/ipv4/udp_offload.c and linux/virtio_net.h make sure.
"""

import contextlib
import errno
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest

from fuzz.data import Data
from mrelay.worker.parse import Datagram, parse
from ring_fake import checksum, new_ring, udp_v4, udp_v6
from worker_rig import Rig, rule

RULES = [
    rule(0, "239.1.1.0/30", [0, 1]),
    rule(1, "239.1.1.1/32", [1, 2], ttl=9),
    rule(2, "ff3e::/64", [2]),
    rule(3, "239.1.1.3/32", [], port=5001),
    rule(4, "239.1.1.2/32", [0], rate=(2, 900)),
    rule(5, "ff3e::2/128", [1], own=(0x20010DB8 << 96 | 9,)),
]
HOP_BY_HOP = bytes([17, 0]) + bytes(6)
FRAGMENT = bytes([17, 0, 0, 1]) + bytes(4)
EXTENSIONS = [
    (17, b""),
    (0, HOP_BY_HOP),
    (60, HOP_BY_HOP),
    (43, HOP_BY_HOP),
    (44, FRAGMENT),
]


class Frame(NamedTuple):
    packet: bytes
    vlan: int
    segment: int
    captured: int | None
    link: int


def check(data: bytes) -> None:
    choices = Data(data)
    link = choices.pick([14, 14, 0])
    refused = choices.pick([None, None, 0, 2])
    frames = [_frame(choices, link)]
    frames += [_frame(choices, link) for _ in range(choices.below(40)) if choices]
    with mock.patch.object(time, "monotonic", lambda: 5.0):
        scalar, vector = (_forwarded(frames, refused, vector=vector) for vector in (False, True))
    assert scalar == vector


def _frame(choices: Data, link: int) -> Frame:
    packet = _packet(choices)
    flags = choices.integer(1)
    vlan = choices.pick([20, 4095, 0x6014]) if flags & 0xC0 == 0xC0 else 0
    captured = link + choices.below(len(packet) + 1) if flags & 0x30 == 0x30 else None
    found = parse(memoryview(packet), 0, len(packet))
    segment = 0
    if flags & 0xC == 0xC and captured is None and isinstance(found, Datagram) and found.length > 1:
        segment = max(1 + choices.below(found.length - 1), -(-found.length // 64))
    return Frame(packet, vlan, segment, captured, link)


def _packet(choices: Data) -> bytes:
    """A packet of a usual shape with some bytes changed, or any bytes at all."""
    kind = choices.below(8)
    if kind == 7:
        return choices.some()
    payload = bytes(choices.pick([0, 1, 4, 100, 1200]))
    port, ttl, tos = choices.pick([5000, 5000, 5001]), choices.pick([1, 2, 64, 255]), choices.pick([0, 0xB9])
    if kind < 5:
        group = f"239.1.1.{choices.below(5)}"
        options = bytes(4 * choices.pick([0, 0, 0, 1, 10]))
        packet = bytearray(udp_v4(payload, group, port=port, ttl=ttl, tos=tos, options=options))
    else:
        following, extension = choices.pick(EXTENSIONS)
        group = f"ff3e::{choices.below(4)}"
        packet = bytearray(
            udp_v6(payload, group, port=port, ttl=ttl, tos=tos, extensions=extension, following=following)
        )
    for _ in range(choices.pick([0, 0, 1, 2, 4])):
        packet[choices.below(min(len(packet), 64))] = choices.integer(1)
    if kind < 4 and packet[0] >> 4 == 4 and len(packet) >= (size := (packet[0] & 15) * 4) >= 20:
        packet[10:12] = bytes(2)
        packet[10:12] = struct.pack(">H", checksum(bytes(packet[:size])))
    return bytes(packet) + bytes(choices.pick([0, 0, 6]))


@contextlib.contextmanager
def _rig(*, vector: bool) -> Iterator[Rig]:
    with pytest.MonkeyPatch.context() as patch:
        made = Rig(new_ring(patch), RULES, 3, vector=vector)
    try:
        yield made
    finally:
        made.close()
        made.ring.sock.close()


def _forwarded(frames: list[Frame], refused: int | None, *, vector: bool) -> tuple[Any, ...]:
    with _rig(vector=vector) as one:
        if refused is not None:
            one.sockets[refused].refuse = errno.EPERM
        for frame in frames:
            one.ring.put(
                frame.packet,
                vlan=frame.vlan,
                segment=frame.segment,
                captured=frame.captured,
                link=frame.link,
            )
        one.forward(len(frames))
        return one.counts(), {fd: sorted(sent) for fd, sent in one.sent.items() if sent}
