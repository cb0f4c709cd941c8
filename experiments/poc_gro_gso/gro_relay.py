"""The relay of poc_gro_gso: one plain Python loop, the same whether its frames are merged or not.

Owns its ring and its egress sockets. `run` blocks in poll until its caller says that it is over.
"""

import contextlib
import errno
import select
import socket
import struct
from collections.abc import Callable
from typing import Final, Self

from gro_lab import OUT_PORT, Lab

from mrelay.kernel.cbpf import attach_group_filter
from mrelay.kernel.packet import (
    L3_OFFSET,
    LONG_SLOT,
    TP_STATUS_USER,
    VIRTIO_NET_HDR,
    VIRTIO_NET_HDR_GSO_UDP_L4,
    map_ring,
    open_ring,
)
from mrelay.kernel.udp import open_egress, segment_control
from traffic import Flow

SLOTS: Final = 120  # of 68 kB: a merged frame fits
_ETHERNET: Final = 14
_GROUPS: Final = (0xEF010000, 0xEF01FFFF)  # 239.1.0.0/16
_VNET: Final = L3_OFFSET - _ETHERNET - VIRTIO_NET_HDR.size
_IP_UDP: Final = struct.Struct("!16x4s2xHH2x")  # group, destination port, UDP length
_PAYLOAD: Final = L3_OFFSET + _IP_UDP.size

HOW: Final = ("segment", "split", "forget")  # a merged frame leaves: by UDP_SEGMENT, one by one, as it is


class Relay:
    """Takes `flows` from r0 and sends each to `outputs` outputs, on sockets that are connected.

    `how`: one of HOW. Counts `frames` read and `datagrams` in them, `refused` sends that the kernel would
    not segment.
    """

    def __init__(self, lab: Lab, flows: list[Flow], outputs: int, how: str = "segment") -> None:
        self._how, self._pos = how, 0
        self.frames = self.datagrams = self.refused = 0
        self._table: dict[tuple[bytes, int], list[socket.socket]] = {}
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as on_failure, lab.relay.inside():
            ring, _ = open_ring(socket.if_nametoindex("r0"), SLOTS, LONG_SLOT, None, shared=False)
            on_failure.enter_context(ring)
            self._memory = memoryview(map_ring(ring.fileno(), SLOTS, LONG_SLOT))
            for flow in flows:
                sockets = [on_failure.enter_context(_output(flow, n)) for n in range(1, outputs + 1)]
                self._table[socket.inet_aton(flow.group), flow.port] = sockets
            attach_group_filter(ring, [_GROUPS], [], _ETHERNET)
            self._stack = on_failure.pop_all()
        self._status = self._memory.cast("I")
        self._poll = select.poll()
        self._poll.register(ring, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, over: Callable[[], bool]) -> None:
        """Forward until no frame waits and it is `over`, which is asked every few milliseconds then."""
        while True:
            at = self._pos * LONG_SLOT
            if self._status[at >> 2] & TP_STATUS_USER:
                self._forward(at)
                self._status[at >> 2] = 0
                self._pos = (self._pos + 1) % SLOTS
                continue
            if over():
                return
            self._poll.poll(2)

    def _forward(self, at: int) -> None:
        """One frame, of one datagram or of many, to all outputs of its flow."""
        _, kind, _, size, _, _ = VIRTIO_NET_HDR.unpack_from(self._memory, at + _VNET)
        group, port, length = _IP_UDP.unpack_from(self._memory, at + L3_OFFSET)
        payload = self._memory[at + _PAYLOAD : at + L3_OFFSET + 20 + length]
        sockets = self._table[group, port]
        self.frames += 1
        if kind != VIRTIO_NET_HDR_GSO_UDP_L4:
            self.datagrams += 1
            for sock in sockets:
                sock.send(payload)
            return
        self.datagrams += -(-len(payload) // size)
        for sock in sockets:
            self._send_merged(sock, payload, size)

    def _send_merged(self, sock: socket.socket, payload: memoryview, size: int) -> None:
        if self._how == "forget":
            sock.send(payload)
            return
        if self._how == "segment":
            try:
                sock.sendmsg((payload,), (segment_control(size),))
                return
            except OSError as error:  # before Linux 6.11, no checksum offload at egress: EIO
                if error.errno != errno.EIO:
                    raise
                self.refused += 1
        for start in range(0, len(payload), size):
            sock.send(payload[start : start + size])


def _output(flow: Flow, number: int) -> socket.socket:
    """What comes as 239.1.x.y goes out as 239.2.x.y."""
    group = flow.group.replace("239.1.", "239.2.", 1)
    return open_egress(socket.if_nametoindex(f"r{number}"), 4, group, OUT_PORT, "egress", None)
