"""The two paths of a worker, side by side: the same datagrams out, in the same order, with the same counts."""

import dataclasses
import errno
import ipaddress
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrelay.counters import (
    DROP_REASONS,
    NO_OUTPUT,
    NO_RULE,
    RATE_LIMITED,
    RULE_DROP_ROW,
    TTL_EXPIRED,
    TX_ERROR,
    Counters,
)
from mrelay.ebpf.layout import VLAN_MARK
from mrelay.messages import PutRule
from mrelay.worker.flows import FlowTable
from ring_fake import new_ring, udp_v4, udp_v6
from worker_rig import FLOWS, Rig, rule


@contextmanager
def rig(monkeypatch: pytest.MonkeyPatch, rules: list[PutRule], outputs: int, *, vector: bool) -> Iterator[Rig]:
    made = Rig(new_ring(monkeypatch), rules, outputs, vector=vector)
    try:
        yield made
    finally:
        made.close()


def dropped(one: Rig, slot: int) -> dict[int, int]:
    """What the rule of this slot took and passed nowhere, by reason."""
    counts = one.counters.rules[:, slot].tolist()
    return {reason: counts[row] for reason, row in RULE_DROP_ROW.items() if counts[row]}


LIMITS = [
    rule(0, "239.1.1.0/30", [0, 1], rate=(2000, 0)),  # and at once 200, or the least burst
    rule(1, "239.1.1.1/32", [1, 2], ttl=9, rate=(500, 40_000)),
    rule(2, "239.1.1.2/32", [2]),
    rule(3, "ff3e::/64", [2], rate=(0, 100_000)),
    rule(4, "ff3e::1/128", [0], rate=(10, 0)),
]
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


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), count=st.integers(1, 250), refused=st.sampled_from([None, 0, 2]))
def test_both_paths_limit_alike(
    seed: int, count: int, refused: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    results = []
    for vector in (False, True):
        with rig(monkeypatch, LIMITS, 3, vector=vector) as one:
            if refused is not None:
                one.sockets[refused].refuse = errno.EPERM
            for packet, segment in stream(random.Random(seed), count):
                one.ring.put(packet, segment=segment)
            one.forward(count)
            results.append((one.counts(), {fd: sorted(sent) for fd, sent in one.sent.items() if sent}))
    assert results[0] == results[1]


@pytest.mark.parametrize("vector", [False, True])
def test_a_limited_rule_takes_nothing_from_another(monkeypatch: pytest.MonkeyPatch, vector: bool) -> None:
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rules = [rule(0, "239.1.1.1/32", [0, 1], rate=(1000, 0)), rule(1, "239.1.1.1/32", [1])]
    with rig(monkeypatch, rules, 2, vector=vector) as one:
        for n in range(250):
            one.ring.put(udp_v4(n.to_bytes(4)))
        one.forward(180)
        one.ring.release(180)
        now[0] += 0.05
        one.forward(70)
        sent = [int.from_bytes(data) for data in one.sent[0]]
        assert sent == [*range(100), *range(180, 230)], "the burst, then what 50 ms bring"
        assert len(one.sent[1]) == 250
        assert one.counters.links[0, [0, 1, 4]].tolist() == [150, 250, 250]
        assert one.counters.rules[0, :2].tolist() == [150, 250]
        assert (dropped(one, 0), dropped(one, 1)) == ({RATE_LIMITED: 100}, {}), "though the other rule passed them"
        assert (one.counters.matched, int(one.counters.drops.sum())) == (250, 0)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize(("group", "packet"), [("239.1.1.1", udp_v4), ("ff3e::1", udp_v6)], ids=["v4", "v6"])
def test_the_vlan_is_where_the_fast_path_wrote_it(
    monkeypatch: pytest.MonkeyPatch, group: str, packet: Callable[[bytes], bytes], vector: bool, behind: bool
) -> None:
    """But where there is none, an address on the wire says nothing."""
    rules = [rule(0, group, [0]), dataclasses.replace(rule(1, group, [1]), vlan=20)]
    told = VLAN_MARK.to_bytes(4, sys.byteorder) + (20).to_bytes(2, sys.byteorder)
    with rig(monkeypatch, rules, 2, vector=vector) as one:
        if behind:
            one.ring.told = VLAN_MARK
        one.ring.put(packet(b"told"), to=told)
        one.ring.put(packet(b"plain"), to=bytes.fromhex("01005e010101"))
        one.forward(2)
        assert one.sent[1] == ([b"told"] if behind else [])
        assert one.sent[0] == ([b"plain"] if behind else [b"told", b"plain"])


@pytest.mark.parametrize("vector", [False, True])
def test_what_no_rule_passes_is_dropped_by_name(monkeypatch: pytest.MonkeyPatch, vector: bool) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0], rate=(0, 8 * 655_360))], 1, vector=vector) as one:
        for _ in range(100):
            one.ring.put(udp_v4(bytes(1000)))
        one.forward(100)
        assert len(one.sent[0]) == 66, "65,536 bytes, and the one that makes it more"
        assert int(one.counters.drops[DROP_REASONS.index("rate_limited")]) == 34
        assert one.counters.rules[:2, 0].tolist() == [66, 66_000]
        assert dropped(one, 0) == {RATE_LIMITED: 34}


def test_a_changed_rate_is_in_force_at_once_and_an_unchanged_one_keeps_its_bucket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0], rate=(1, 0))], 1, vector=False) as one:
        for _ in range(200):
            one.ring.put(udp_v4(b"x"))
        one.forward(100)
        one.ring.release(100)
        one.table.rules_changed(one.rules)
        one.forward(50)
        one.ring.release(50)
        assert len(one.sent[0]) == 64, "the least burst, once"
        one.rules.put(rule(0, "239.1.1.1/32", [0]))
        one.table.rules_changed(one.rules)
        one.forward(50)
        assert len(one.sent[0]) == 114


@pytest.mark.parametrize("vector", [False, True])
def test_what_comes_back_is_dropped_as_loop_unless_a_rule_allows_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, vector: bool
) -> None:
    ours = int(ipaddress.ip_address("10.1.0.1"))
    rules = [rule(0, "239.1.1.0/30", [0], own=(ours,)), rule(1, "239.1.1.2/32", [1])]
    with rig(monkeypatch, rules, 2, vector=vector) as one:
        for group in (1, 1, 2):
            one.ring.put(udp_v4(b"back", f"239.1.1.{group}", source="10.1.0.1"))
        one.ring.put(udp_v4(b"else", "239.1.1.1"))
        one.forward(4)
        assert int(one.counters.drops[DROP_REASONS.index("loop")]) == 2
        assert dict(one.sent) == {0: [b"else"], 1: [b"back"]}
        assert caplog.text.count("allow_loop = true") == 1


@pytest.mark.parametrize("vector", [False, True])
def test_merged_frames_of_a_link_without_ethernet_are_cut_from_the_first_batch_on(
    monkeypatch: pytest.MonkeyPatch, vector: bool
) -> None:
    with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0])], 1, vector=vector) as one:
        for _ in range(2):
            one.ring.put(udp_v4(bytes(300)), segment=100, link=0)
        one.forward(2)
        assert one.sent[0] == [bytes(100)] * 6


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
            by_rule = [{TTL_EXPIRED: 1}, {}, {TX_ERROR: 1}, {NO_OUTPUT: 1}]
            assert [dropped(one, slot) for slot in range(4)] == by_rule


@pytest.mark.parametrize("vector", [False, True])
def test_a_rule_keeps_what_it_dropped_when_its_flow_goes_or_the_worker_dies(
    monkeypatch: pytest.MonkeyPatch, vector: bool
) -> None:
    with rig(monkeypatch, [rule(0, "239.1.0.0/16", [])], 0, vector=vector) as one:
        for n in range(2 * FLOWS):
            one.ring.put(udp_v4(b"x", f"239.1.1.{n}"))
        for _ in range(FLOWS):
            one.table.now += 1
            one.path.forward(one.ring, 2)  # not folded: as if killed before it could
            one.ring.release(2)
        assert len(one.table.index) <= FLOWS
        heir = FlowTable(Counters(one.fd, FLOWS, write=True), FLOWS, one.rules, one.egress, lambda: None)
        heir.inherit()
        heir.restore(FLOWS)
        heir.fold()
        heir.fold()
        assert dropped(one, 0) == {NO_OUTPUT: 2 * FLOWS}


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
        assert one.counters.rules[:2, 0].tolist() == [200, 200]
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
        heir = FlowTable(Counters(one.fd, FLOWS, write=True), FLOWS, one.rules, one.egress, lambda: None)
        heir.inherit()
        heir.restore(FLOWS)
        assert set(heir.index) == set(one.table.index)
        heir.fold()
        assert one.counters.rules[:2, 0].tolist() == [1, 1]


def test_a_flow_that_comes_again_before_its_turn_is_one_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A successor forwards while it takes over: what both counted is the flow's."""
    with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0])], 1, vector=True) as one:
        for _ in range(2):
            one.ring.put(udp_v4(b"x"))
        one.path.forward(one.ring, 2)
        (key,) = one.table.index
        heir = FlowTable(Counters(one.fd, FLOWS, write=True), FLOWS, one.rules, one.egress, lambda: None)
        heir.inherit()
        slot = heir.find(key)
        assert slot not in heir.kept, "what was left is not overwritten"
        heir.counters.flows[:, slot] += np.array([1, 10], np.uint64)
        heir.fold()
        heir.restore(FLOWS)
        heir.fold()
        assert list(heir.index.values()) == [slot]
        assert heir.counters.flows[:, slot].tolist() == [3, 12]
        assert heir.counters.rules[:2, 0].tolist() == [3, 12]
        assert np.count_nonzero(heir.counters.keys[4]) == 1, "one place in the table"


def test_a_successor_of_a_full_table_has_room_for_new_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(monkeypatch, [rule(0, "239.1.0.0/16", [0])], 1, vector=True) as one:
        for n in range(FLOWS):
            one.table.find((7, 0, 4, n, 0xEF010100, 5000))
        heir = FlowTable(Counters(one.fd, FLOWS, write=True), FLOWS, one.rules, one.egress, lambda: None)
        heir.inherit()
        assert heir.find((7, 0, 4, 999, 0xEF010100, 5000)) >= 0
        assert not heir.kept
        assert len(heir.index) == sum(flow is not None for flow in heir.flows) <= FLOWS


def test_a_successor_balances_the_books(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0])], 1, vector=True) as one:
        one.ring.put(udp_v4(b"x"))
        one.forward(1)
        one.counters.totals[0] += np.uint64(7)  # killed after it counted these as received
        heir = Counters(one.fd, FLOWS, write=True)
        heir.balance()
        assert (heir.received, heir.matched) == (1, 1)


def test_misses_are_rate_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(monkeypatch, [rule(0, "239.1.1.1/32", [0])], 1, vector=True) as one:
        monkeypatch.setattr(one.table, "_may_miss", lambda: False)
        one.ring.put(udp_v4(b"x"))
        one.forward(1)
        assert int(one.counters.drops[DROP_REASONS.index("miss_limited")]) == 1


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


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_an_output_that_names_each_destination_changes_nothing_for_others(
    monkeypatch: pytest.MonkeyPatch, vector: bool
) -> None:
    """Its socket can't adopt a TTL; trying would have every other flow say anew what its own socket sends with."""
    plain = rule(0, "239.1.1.1/32", [0])
    named = rule(1, "239.1.1.2/32", [1])
    named = replace(named, outputs=tuple(replace(output, address=None) for output in named.outputs))
    with rig(monkeypatch, [plain, named], 2, vector=vector) as one:
        for group in ("239.1.1.1", *["239.1.1.2"] * 6):
            one.ring.put(udp_v4(b"x", group))
        before = one.egress.generation
        one.forward(1)
        one.ring.release(1)
        settled = one.egress.generation
        assert settled > before, "the first took over the stream's TTL"
        for _ in range(3):
            one.forward(2)
            one.ring.release(2)
        assert one.egress.generation == settled
        assert (len(one.sent[0]), len(one.sent[1])) == (1, 6)
