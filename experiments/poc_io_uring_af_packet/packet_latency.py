"""How long a lone frame takes until a receiver that slept has seen it. Used by poc_io_uring_af_packet.

Sender and receiver share one thread and one core with the kernel's receive thread: the frame is passed on
only when the receiver sleeps, so each measurement holds one real sleep and wake-up. Blocks for its length.
"""

import os
import random
import socket
import time
from typing import Final

from packet_load import FLOW, Network
from packet_methods import Receiver

from traffic import frame

_FRAME: Final = frame(FLOW, 1000)
_WARM_UP: Final = 5
_COMPANY: Final = 5  # frames: more than fill the smallest block of TPACKET_V3


def lone_frames(
    receiver: Receiver, network: Network, sender: socket.socket, count: int, *, alone: bool
) -> list[float]:
    """µs of `count` frames, sorted. Not `alone`: others follow each at once."""
    os.sched_setaffinity(0, {network.relay_core})
    took = []
    for _ in range(count + _WARM_UP):
        time.sleep(random.uniform(0.0002, 0.0012))  # it comes at any point of a block's time
        begin = time.perf_counter()
        for _ in range(1 if alone else 1 + _COMPANY):
            sender.send(_FRAME)
        while not len(receiver.take()):
            receiver.wait()
        took.append((time.perf_counter() - begin) * 1e6)
        receiver.release()
        if not alone:
            _drain(receiver)
    return sorted(took[_WARM_UP:])


def _drain(receiver: Receiver) -> None:
    """All that came with it."""
    end = time.monotonic() + 0.003
    while time.monotonic() < end:
        if len(receiver.take()):
            receiver.release()
        time.sleep(0)
