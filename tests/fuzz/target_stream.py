"""Datagrams of any bytes at a receiver of test streams: accounted for or foreign, and the sums hold."""

import math
import socket
from unittest import mock

from fuzz.data import Data
from mrelay.model.endpoint import Input
from mrelay.traffic import receiver
from mrelay.traffic.stream import HEADER_SIZE, headers_in, stamp, write_constant_fields

WANTED = Input.parse("lo:127.0.0.1:5000")
NUMBERS = [0, 1, 2, 3, 65535, 65536, 65537, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def check(data: bytes) -> None:
    choices = Data(data)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    sent = 0
    with theirs, mock.patch.object(receiver, "open_receiving", lambda _: ours), receiver.Receiver(WANTED) as one:
        while choices and sent < 200:
            for _ in range(1 + choices.below(8)):
                theirs.send(_datagram(choices))
                sent += 1
            one.drain()
        _adds_up(one, sent)


def _datagram(choices: Data) -> bytes:
    if choices.below(4) == 0:
        return choices.some()
    buffer = bytearray(HEADER_SIZE)
    header = headers_in(buffer, HEADER_SIZE, 1)
    write_constant_fields(header, choices.pick([0, 1, (1 << 63) - 1]))
    stamp(header, 0, 0)
    header["sequence"] = choices.pick([*NUMBERS, choices.integer(8)])
    header["sent"] = choices.pick([*NUMBERS, choices.integer(8)])
    return bytes(buffer) + bytes(choices.pick([0, 0, 100]))


def _adds_up(one: receiver.Receiver, sent: int) -> None:
    summary = one.summary()
    assert summary["received"] + summary["foreign"] == sent
    for account in one.streams.values():
        assert 0 < account.distinct + account.duplicates <= account.received
        assert account.received <= account.distinct + account.duplicates + account.reordered
        assert account.lost >= 0
    for stream in summary["streams"]:
        assert all(value is None or math.isfinite(value) for value in stream["latency_us"].values())
