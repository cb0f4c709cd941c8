"""What all receivers of poc_io_uring_af_packet have in common: the socket, what is read of a frame, the loop.

Owns the socket's options, which are the product's (virtio-net header, group filter, fanout group with
defragmentation), and the way a receiver is measured. `receive` blocks for as long as it is told to.
"""

import ipaddress
import socket
import time
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from packet_load import FLOW, Network

from mrelay.kernel.cbpf import attach_group_filter
from mrelay.kernel.packet import (
    ETH_P_ALL,
    PACKET_FANOUT,
    PACKET_FANOUT_CPU,
    PACKET_FANOUT_FLAG_DEFRAG,
    PACKET_FANOUT_FLAG_UNIQUEID,
    PACKET_IGNORE_OUTGOING,
    PACKET_VNET_HDR,
    SOL_PACKET,
)

U16 = NDArray[np.uint16]
MEMORY: Final = 16 << 20  # bytes that wait at most, in a ring or in a socket's queue
BATCH: Final = 1024  # frames that are looked at together, as in the product
VNET: Final = 10  # bytes, struct virtio_net_hdr: it comes before the Ethernet header
HEADER: Final = 44  # bytes: Ethernet, IPv4 and UDP headers, rounded up
NOTHING: Final = np.empty((0, HEADER // 2), np.uint16)
SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
GROUP: Final = int(ipaddress.IPv4Address(FLOW.group))
_GROUP_WORD: Final = int.from_bytes(GROUP.to_bytes(4, "big"), "little")  # as it lies in memory
_PORT_WORD: Final = socket.htons(FLOW.port)
_FEW: Final = 32  # frames: up to here a patient receiver does not wait for more, as in the product


class Receiver(Protocol):
    """One way to receive."""

    sock: socket.socket

    def wait(self) -> None:
        """Sleep until there may be frames, for 100 ms at most."""

    def take(self) -> U16:
        """The headers of frames that wait, u16[frames, HEADER / 2]: BATCH, or a V3 block. Ours until `release`."""

    def release(self) -> None:
        """Give back what `take` gave: called when that was not nothing."""

    def close(self) -> None:
        """Close the socket and what belongs to it; a ring's mapping goes with the last use of its frames."""


def packet_socket() -> socket.socket:
    """An AF_PACKET socket, made by raw socket calls, that is not bound yet."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, MEMORY // 2)  # the kernel doubles it
    return sock


def let_in(sock: socket.socket) -> None:
    """From here on it receives what is sent to the group."""
    attach_group_filter(sock, [(GROUP, GROUP)], [], 14)


def bind(sock: socket.socket) -> None:
    """Bind it to the receivers' interface, with the product's fanout group and filter."""
    let_in(sock)
    sock.bind(("in0", ETH_P_ALL))
    kind = PACKET_FANOUT_CPU | PACKET_FANOUT_FLAG_DEFRAG | PACKET_FANOUT_FLAG_UNIQUEID
    sock.setsockopt(SOL_PACKET, PACKET_FANOUT, (kind << 16).to_bytes(4, "little"))


def datagrams(headers: U16, payload: int) -> int:
    """How many datagrams of the flow these frames hold: the same few NumPy operations for every receiver."""
    group = headers[:, 15].astype(np.uint32) | headers[:, 16].astype(np.uint32) << np.uint32(16)
    ours = (headers[:, 6] == 8) & (headers[:, 18] == _PORT_WORD) & (group == _GROUP_WORD)
    length = headers[:, 19].byteswap()  # UDP header and payloads: of all datagrams, when GRO merged them
    return int((length // payload)[ours].sum())


@dataclass(frozen=True)
class Sample:
    """Datagrams a second; ns of the receiver's and of the kernel's receive thread for each; frames a batch."""

    rate: float
    thread: float
    napi: float
    batch: float


class _Clock:
    """What has been used and received since it was made."""

    def __init__(self, network: Network) -> None:
        self._network, self.count, self.frames, self.batches = network, 0, 0, 0
        self._napi, self._thread, self._begin = network.napi_seconds(), time.thread_time(), time.monotonic()

    def stop(self) -> Sample:
        seconds, thread = time.monotonic() - self._begin, time.thread_time() - self._thread
        napi, count = self._network.napi_seconds() - self._napi, max(self.count, 1)
        return Sample(
            count / seconds, thread / count * 1e9, napi / count * 1e9, self.frames / max(self.batches, 1)
        )


def receive(receiver: Receiver, network: Network, payload: int, seconds: float, nap: float = 0) -> Sample:
    """Receive for `seconds`, counting the last three quarters: what is left of them, when others had the core.

    `nap`: a batch of middling size is once left to grow for so long.
    """
    clock, begin, napped = None, time.monotonic(), False
    while (now := time.monotonic()) < begin + seconds or clock is None:
        if clock is None and now > begin + seconds / 4:
            clock = _Clock(network)
        frames = receiver.take()
        if not len(frames):
            receiver.wait()
            continue
        if nap and not napped and _FEW < len(frames) < BATCH:
            time.sleep(nap)
            napped = True
            continue
        count, napped = datagrams(frames, payload), False
        if clock is not None:
            clock.count += count
            clock.frames += len(frames)
            clock.batches += 1
        receiver.release()
    return clock.stop()
