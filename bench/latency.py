"""One-way latency through a relay: the send time travels in the payload, the kernel stamps the arrival.

Called by relay_bench.py; blocks for the time measured. One thread on the source's core sends on schedule
and reads arrivals in between, so the receiver takes nothing from the relay's core. The arrival time is
SO_TIMESTAMPNS, taken when the sink's interface hands the datagram on, not when it is read.
"""

import socket
import struct
import time
from dataclasses import dataclass
from typing import Final

import lab as labs

_SO_TIMESTAMPNS: Final = 35  # <asm-generic/socket.h>, SO_TIMESTAMPNS_OLD
_SO_RCVBUFFORCE: Final = 33
_LINGER: Final = 500_000_000  # ns to wait for the last arrivals


@dataclass(frozen=True)
class Latency:
    """Microseconds at the median and at the 99th percentile; datagrams sent and received."""

    p50: float
    p99: float
    sent: int
    received: int


Endpoint = tuple[str, int]  # group, port


def measure(lab: labs.Lab, ingress: Endpoint, egress: Endpoint, pps: int, seconds: float) -> Latency:
    """Send `pps` datagrams of 1000 bytes to `ingress`; they arrive on d1 for `egress`."""
    with labs.inside(lab.sink):
        receiver = _receiver(*egress)
    with labs.inside(lab.source):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender, labs.real_time(1):
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
        sender.connect(ingress)
        warm, total = pps // 2, pps // 2 + int(pps * seconds)
        delays = _exchange(sender, receiver, 1_000_000_000 // pps, total)
    # The first half second is the relay's to learn the flow in.
    steady = sorted(delay for number, delay in delays.items() if number >= warm)
    if not steady:
        return Latency(float("nan"), float("nan"), total - warm, 0)
    p50, p99 = (steady[int(len(steady) * q)] / 1000 for q in (0.50, 0.99))
    return Latency(p50, p99, total - warm, len(steady))


def _receiver(group: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
    index = socket.if_nametoindex("d1")
    membership = struct.pack("4s4si", socket.inet_aton(group), bytes(4), index)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    sock.bind((group, port))
    sock.setblocking(False)
    return sock


def _exchange(sender: socket.socket, receiver: socket.socket, gap: int, total: int) -> dict[int, int]:
    """Delay in ns of every datagram that arrived, by its number."""
    delays: dict[int, int] = {}
    message = bytearray(1000)
    due = time.time_ns()
    for number in range(total):
        due += gap
        while time.time_ns() < due:
            _arrival(receiver, delays)
        struct.pack_into("<QI", message, 0, time.time_ns(), number)
        sender.send(message)
    end = time.time_ns() + _LINGER
    while time.time_ns() < end and len(delays) < total:
        _arrival(receiver, delays)
    return delays


def _arrival(receiver: socket.socket, delays: dict[int, int]) -> None:
    """Read one datagram, if there is one."""
    try:
        data, ancillary, _, _ = receiver.recvmsg(1000, 64)
    except BlockingIOError:
        return
    seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
    sent, number = struct.unpack_from("<QI", data)
    delays[number] = seconds * 1_000_000_000 + nanoseconds - sent
