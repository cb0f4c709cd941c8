"""A worker's inside around a fake ring: either path, with sockets that record what is sent."""

import ctypes
import errno
import ipaddress
import os
import socket
from collections import defaultdict
from typing import Any

from mrelay.counters import Counters
from mrelay.messages import PutRule, RuleOutput
from mrelay.model.ruleset import RuleSet
from mrelay.supervisor.children import new_counters
from mrelay.worker.egress import Egress
from mrelay.worker.failures import Failures
from mrelay.worker.flows import FlowTable
from mrelay.worker.messages import STRIDE, MessageTable
from mrelay.worker.scalar import ScalarPath
from mrelay.worker.vector import VectorPath
from ring_fake import FakeRing

FLOWS = 64


class FakeSocket:
    """Records what the scalar path sends. `refuse`: the errno for every send, or 0."""

    family = socket.AF_INET

    def __init__(self, number: int, sent: dict[int, list[bytes]]) -> None:
        self.number, self.sent, self.refuse = number, sent, 0

    def fileno(self) -> int:
        return self.number

    def setsockopt(self, *_: Any) -> None:
        """TTL and TOS defaults: the netns tests see them on the wire."""

    def close(self) -> None:
        pass

    def send(self, payload: Any) -> None:
        self.sendmsg((payload,), [])

    def sendmsg(self, payloads: Any, control: Any, flags: int = 0, address: Any = None) -> None:
        if self.refuse:
            raise OSError(self.refuse, os.strerror(self.refuse))
        data = b"".join(bytes(p) for p in payloads)
        sizes = [int.from_bytes(value, "little") for level, _, value in control if level == 17]
        self.sent[self.number] += cut(data, sizes[0] if sizes else 0)


class FakeSender:
    """Records what the vector path sends, reading the headers as the kernel would."""

    name = "fake"

    def __init__(self, sent: dict[int, list[bytes]], sockets: list[FakeSocket]) -> None:
        self.table = MessageTable()
        self.sent, self.sockets = sent, sockets

    def send(self, fds: Any) -> list[tuple[int, int]]:
        failed = []
        for at, fd in enumerate(fds.tolist()):
            error = errno.EBADF if fd < 0 else self.sockets[fd].refuse
            if error:
                failed.append((at, error))
            else:
                self.sent[fd] += self._datagrams(at)
        return failed

    def _datagrams(self, at: int) -> list[bytes]:
        header = (ctypes.c_uint64 * 7).from_address(self.table.address + at * STRIDE)
        iov = (ctypes.c_uint64 * (2 * header[3])).from_address(header[2])
        data = b"".join(ctypes.string_at(iov[2 * n], iov[2 * n + 1]) for n in range(header[3]))
        segment = 0
        if header[5] and (ctypes.c_uint32 * 4).from_address(header[4])[2] == 17:
            segment = ctypes.c_uint16.from_address(header[4] + 16).value
        assert header[3] <= 64
        assert len(data) <= 65507
        return cut(data, segment)


def cut(data: bytes, segment: int) -> list[bytes]:
    if not segment:
        return [data]
    pieces = [data[at : at + segment] for at in range(0, len(data), segment)]
    assert 1 <= len(pieces) <= 64
    return pieces


class Rig:
    """A worker's inside around a fake ring: `sent` datagrams by output."""

    def __init__(self, ring: FakeRing, rules: list[PutRule], outputs: int, *, vector: bool) -> None:
        self.ring = ring
        self.sent: dict[int, list[bytes]] = defaultdict(list)
        self.fd = new_counters(FLOWS)
        self.counters = Counters(self.fd, FLOWS, write=True)
        self.rules, self.egress = RuleSet(), Egress()
        for rule in rules:
            self.rules.put(rule)
        self.sockets = [FakeSocket(n, self.sent) for n in range(outputs)]
        for n, sock in enumerate(self.sockets):
            self.egress.grant(n, sock)  # type: ignore[arg-type]  # stands in for a socket
        self.table = FlowTable(self.counters, FLOWS, self.rules, self.egress, lambda: None)
        failures = Failures(self.counters, self.table.fold_flow)
        sender = FakeSender(self.sent, self.sockets)
        self.path: ScalarPath | VectorPath = ScalarPath(self.counters, self.table, failures)
        if vector:
            self.path = VectorPath(self.counters, self.table, failures, sender)

    def forward(self, count: int) -> None:
        self.path.forward(self.ring, count)
        self.table.fold()

    def counts(self) -> tuple[Any, ...]:
        c = self.counters
        assert c.received == c.matched + int(c.drops.sum())
        return c.received, c.matched, c.drops.tolist(), c.rules[:, :8].tolist(), c.links[:, :8].tolist()

    def close(self) -> None:
        os.close(self.fd)


def rule(
    slot: int,
    group: str,
    outputs: list[int],
    *,
    port: int = 5000,
    ttl: int = 0,
    rate: tuple[int, int] = (0, 0),
    own: tuple[int, ...] = (),
) -> PutRule:
    net = ipaddress.ip_network(group)
    low, high = int(net[0]), int(net[-1])
    top = 2 ** (32 if net.version == 4 else 128) - 1
    outs = tuple(
        RuleOutput(slot * 4 + n, o, 2, f"239.2.2.{o + 1}", 6000, ttl, -1, False) for n, o in enumerate(outputs)
    )
    return PutRule(slot, 7, 0, net.version, low, high, port, port, 0, top, *rate, own, outs)
