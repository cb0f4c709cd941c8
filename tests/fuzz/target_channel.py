"""A channel whose peer sends anything, with descriptors: a message, BadMessage or the end, and no leak."""

import contextlib
import os
import socket

from descriptors import none_leaks
from fuzz.data import Data
from mrelay.messages import Stop, Sync
from mrelay.wire import BadMessage, Channel, channel_pair, encode

WHOLE = [encode(Sync(1)), encode(Stop())]
NULL = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def check(data: bytes) -> None:
    with none_leaks():
        _check(data)


def _check(data: bytes) -> None:
    choices = Data(data)
    ours, theirs = channel_pair()
    channel = Channel(ours)
    try:
        for _ in range(1 + choices.below(6)):
            _send(theirs, choices)
        theirs.close()
        _receive_all(channel)
    finally:
        theirs.close()
        channel.close()


def _send(sock: socket.socket, choices: Data) -> None:
    datagram = choices.pick([*WHOLE, choices.some(), b"", b"x" * (140 * 1024)])
    fds = [NULL] * choices.pick([0, 0, 1, 2, 63, 64, 65, 200])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds))]
    with contextlib.suppress(BlockingIOError):  # the queue is full
        sock.sendmsg([datagram], ancillary if fds else [], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)


def _receive_all(channel: Channel) -> None:
    """Until the peer is gone. An empty datagram without descriptors looks the same, so read on a little."""
    for _ in range(8):
        try:
            got = channel.receive()
        except BadMessage:
            continue
        if got is not None:
            for fd in got[1]:
                os.close(fd)
