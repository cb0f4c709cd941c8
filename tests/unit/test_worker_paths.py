"""The two paths of a worker, side by side: the same datagrams out, in the same order, with the same counts."""

import ctypes
import errno
import ipaddress
import os
import random
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrelay.counters import DROP_REASONS, NO_OUTPUT, NO_RULE, TTL_EXPIRED, TX_ERROR, Counters
from mrelay.messages import PutRule, RuleOutput
from mrelay.model.ruleset import RuleSet
from mrelay.supervisor.children import new_counters
from mrelay.worker.egress import Egress
from mrelay.worker.failures import Failures
from mrelay.worker.flows import FlowTable
from mrelay.worker.messages import STRIDE, MessageTable
from mrelay.worker.scalar import ScalarPath
from mrelay.worker.vector import VectorPath
from ring_fake import FakeRing, new_ring, udp_v4, udp_v6

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
        self.table = FlowTable(self.counters, FLOWS, self.rules, self.egress)
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


@contextmanager
def rig(monkeypatch: pytest.MonkeyPatch, rules: list[PutRule], outputs: int, *, vector: bool) -> Iterator[Rig]:
    made = Rig(new_ring(monkeypatch), rules, outputs, vector=vector)
    try:
        yield made
    finally:
        made.close()


def rule(slot: int, group: str, outputs: list[int], *, port: int = 5000, ttl: int = 0) -> PutRule:
    net = ipaddress.ip_network(group)
    low, high = int(net[0]), int(net[-1])
    top = 2 ** (32 if net.version == 4 else 128) - 1
    outs = tuple(
        RuleOutput(slot * 4 + n, o, 2, f"239.2.2.{o + 1}", 6000, ttl, -1, False) for n, o in enumerate(outputs)
    )
    return PutRule(slot, 7, 0, net.version, low, high, port, port, 0, top, outs)


RULES = [
    rule(0, "239.1.1.0/30", [0, 1]),
    rule(1, "239.1.1.1/32", [1, 2], ttl=9),
    rule(2, "ff3e::/64", [2]),
    rule(3, "239.1.1.3/32", [], port=5001),
]


def stream(rng: random.Random, count: int) -> list[tuple[bytes, int]]:
    """(packet, segment size) of several interleaved flows, some merged, each payload numbered."""
    made = []
    for n in range(count):
        size = rng.choice([0, 4, 4, 4, 100, 1200])
        segment = rng.choice([0, 0, 0, 400]) if size == 1200 else 0
        payload = (n.to_bytes(4) * 400)[:size]
        port = rng.choice([5000, 5000, 5000, 5001])
        ttl = rng.choice([1, 2, 64])
        if rng.random() < 0.2:
            made.append((udp_v6(payload, f"ff3e::{rng.randint(1, 3)}", port=port, ttl=ttl), segment))
        else:
            made.append((udp_v4(payload, f"239.1.1.{rng.randint(0, 4)}", port=port, ttl=ttl), segment))
    return made


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), count=st.integers(1, 200), refused=st.sampled_from([None, 0, 2]))
def test_both_paths_do_the_same(
    seed: int, count: int, refused: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for vector in (False, True):
        with rig(monkeypatch, RULES, 3, vector=vector) as one:
            if refused is not None:
                one.sockets[refused].refuse = errno.EPERM
            for packet, segment in stream(random.Random(seed), count):
                one.ring.put(packet, segment=segment)
            one.forward(count)
            results.append((one.counts(), {fd: sorted(sent) for fd, sent in one.sent.items() if sent}))
    assert results[0] == results[1]


def test_a_flow_keeps_its_order_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(monkeypatch, [rule(n, f"239.1.1.{n}/32", [n]) for n in range(4)], 4, vector=True) as one:
        wanted = defaultdict(list)
        for n in range(200):
            flow, size = n * 7 % 4, 100 if n % 50 < 25 else 60
            payload = (n.to_bytes(4) * 25)[:size]
            one.ring.put(udp_v4(payload, f"239.1.1.{flow}"))
            wanted[flow].append(payload)
        one.forward(200)
        assert one.sent == wanted


def test_drops_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for vector in (False, True):
        with rig(monkeypatch, RULES, 3, vector=vector) as one:
            one.sockets[2].refuse = errno.EPERM
            for packet in (
                udp_v4(b"a", "239.1.1.0", ttl=1),
                udp_v4(b"b", "239.1.1.0", port=5009),
                udp_v4(b"c", "239.1.1.3", port=5001),
                udp_v6(b"d", "ff3e::1"),
                udp_v4(b"e", "239.9.9.9"),
            ):
                one.ring.put(packet)
            one.forward(5)
            found = {DROP_REASONS[i]: int(n) for i, n in enumerate(one.counters.drops) if n}
            wanted = dict.fromkeys((DROP_REASONS[i] for i in (TTL_EXPIRED, NO_RULE, NO_OUTPUT, TX_ERROR)), 1)
            assert found == wanted
            assert one.counters.received == 4, "an address that no rule names is not ours to count"


def test_one_failing_output_of_two_is_an_error_not_a_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    for vector in (False, True):
        with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0, 1])], 2, vector=vector) as one:
            one.sockets[1].refuse = errno.EPERM
            for _ in range(3):
                one.ring.put(udp_v4(b"abc"))
            one.forward(3)
            assert (one.counters.matched, int(one.counters.drops.sum())) == (3, 0)
            assert one.counters.links[:, 0].tolist() == [3, 9, 0]
            assert one.counters.links[:, 1].tolist() == [0, 0, 3]


def test_counts_stay_right_when_flows_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(monkeypatch, [rule(0, "239.1.0.0/16", [0])], 1, vector=True) as one:
        for n in range(200):
            one.ring.put(udp_v4(b"x", f"239.1.1.{n}"))
        for _ in range(4):
            one.table.now += 1
            one.forward(50)
            one.ring.release(50)
        assert len(one.table.index) <= FLOWS
        assert one.counters.rules[:, 0].tolist() == [200, 200]
        assert len(one.sent[0]) == 200


def test_a_rule_change_moves_flows_and_keeps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0])], 2, vector=True) as one:
        for _ in range(4):
            one.ring.put(udp_v4(b"x"))
        one.forward(2)
        one.ring.release(2)
        one.rules.put(rule(1, "239.1.1.1/32", [1]))
        one.table.rules_changed(one.rules)
        one.forward(2)
        assert one.counters.rules[0, :2].tolist() == [4, 2]
        assert (len(one.sent[0]), len(one.sent[1])) == (4, 2)


def test_a_successor_takes_over_the_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0])], 1, vector=True) as one:
        one.ring.put(udp_v4(b"x"))
        one.path.forward(one.ring, 1)  # not folded: as if killed before it could
        heir = FlowTable(Counters(one.fd, FLOWS, write=True), FLOWS, one.rules, one.egress)
        heir.restore()
        assert set(heir.index) == set(one.table.index)
        heir.fold()
        assert one.counters.rules[:, 0].tolist() == [1, 1]


def test_misses_are_rate_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0])], 1, vector=True) as one:
        monkeypatch.setattr(one.table, "_may_miss", lambda: False)
        one.ring.put(udp_v4(b"x"))
        one.forward(1)
        assert int(one.counters.drops[DROP_REASONS.index("rate_limited")]) == 1


def test_lookup_finds_every_installed_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(monkeypatch, [rule(0, "239.1.0.0/16", [0]), rule(1, "ff3e::/64", [0])], 1, vector=True) as one:
        keys = [(7, 0, 4, n, 0xEF010100 + n % 5, 5000) for n in range(30)]
        keys += [(7, 0, 6, 1 << 100 | n, 0xFF3E << 112 | n, 5000) for n in range(20)]
        slots = [one.table.find(key) for key in keys]
        words = [np.array(one.counters.keys[w, slots]) for w in range(5)]
        assert one.table.lookup(list(words)).tolist() == slots
        words[4] = words[4] + np.uint64(1)
        assert (one.table.lookup(list(words)) == -1).all()


def test_a_batch_with_more_flows_than_the_table_holds_sends_nothing_astray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = [rule(n, f"239.1.1.{n}/32", [n % 3]) for n in range(200)]
    with rig(monkeypatch, rules, 3, vector=True) as one:
        for n in range(200):
            one.ring.put(udp_v4(bytes([n]), f"239.1.1.{n}"))
        one.forward(200)
        for output, sent in one.sent.items():
            assert {payload[0] % 3 for payload in sent} == {output}
        assert one.counters.received == 200
        assert one.counters.matched == sum(len(sent) for sent in one.sent.values()) > 0
        assert one.counters.matched + int(one.counters.drops.sum()) == 200
