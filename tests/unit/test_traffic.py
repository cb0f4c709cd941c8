"""The test stream's format, its accounting and its pacing, as pure functions and state machines."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrelay.model.endpoint import Output
from mrelay.traffic.account import WINDOW, LatencyHistogram, StreamAccount
from mrelay.traffic.sender import Pacer, SendPlan
from mrelay.traffic.sockets import TrafficError
from mrelay.traffic.stream import (
    HEADER_SIZE,
    headers_in,
    is_ours,
    new_stream_id,
    stamp,
    write_constant_fields,
)


def account_of(*batches: list[int]) -> StreamAccount:
    account = StreamAccount()
    for batch in batches:
        account.add(np.array(batch, np.int64))
    return account


def counts(account: StreamAccount) -> tuple[int, int, int, int]:
    """received, lost, reordered, duplicates."""
    return account.received, account.lost, account.reordered, account.duplicates


def test_header_bytes_on_the_wire() -> None:
    buffer = bytearray(2 * 40)
    headers = headers_in(buffer, 40, 2)
    write_constant_fields(headers, 0x0102030405060708)
    stamp(headers, 7, 0x1122334455667788)
    assert HEADER_SIZE == 32
    assert buffer[40:72].hex(" ", 8) == "4d524c5900010000 0102030405060708 0000000000000008 1122334455667788"


def test_foreign_datagrams_are_told_apart() -> None:
    headers = headers_in(bytearray(5 * HEADER_SIZE), HEADER_SIZE, 5)
    write_constant_fields(headers, new_stream_id())
    headers["magic"][1] = 0
    headers["version"][2] = 2
    headers["sequence"][3] = 1 << 63
    lengths = np.array([HEADER_SIZE, 100, 100, 100, HEADER_SIZE - 1], np.uint32)
    assert is_ours(headers, lengths).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([], (0, 0, 0, 0)),
        ([[]], (0, 0, 0, 0)),
        ([[0, 1, 2], [3, 4]], (5, 0, 0, 0)),
        ([[1000, 1001]], (2, 0, 0, 0)),  # joined late: what came before is unknown, not lost
        ([[0, 1, 4], [6]], (4, 3, 0, 0)),
        ([[0, 2, 1, 3]], (4, 0, 1, 0)),
        ([[0, 2], [1, 3]], (4, 0, 1, 0)),
        ([[0, 3, 2, 1]], (4, 0, 2, 0)),
        ([[0, 1, 1, 2], [2]], (5, 0, 0, 2)),
        ([[5, 6], [4]], (3, 0, 1, 0)),
        ([[0, 0, 0]], (3, 0, 0, 2)),
        ([[0, 2, 2, 1, 1, 4]], (6, 1, 1, 2)),
    ],
)
def test_accounting(batches: list[list[int]], expected: tuple[int, int, int, int]) -> None:
    assert counts(account_of(*batches)) == expected


def test_far_too_late_stays_lost() -> None:
    account = account_of([0, WINDOW + 1], [1], [1])
    assert counts(account) == (4, WINDOW, 2, 0)


def test_gap_wider_than_the_window_in_one_batch() -> None:
    account = account_of([0, WINDOW, 2 * WINDOW], [2 * WINDOW])
    assert counts(account) == (4, 2 * WINDOW - 2, 0, 1)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=80), st.randoms(use_true_random=False))
def test_batches_do_not_matter(sequences: list[int], rng: random.Random) -> None:
    one_by_one = account_of(*[[sequence] for sequence in sequences])
    cut = rng.randint(0, len(sequences))
    assert counts(account_of(sequences[:cut], sequences[cut:])) == counts(one_by_one)
    received, lost, reordered, duplicates = counts(one_by_one)
    distinct = set(sequences)
    assert received == len(sequences)
    assert duplicates == len(sequences) - len(distinct)
    assert lost == max(sequences) - min(sequences) + 1 - len(distinct)
    assert 0 <= reordered <= len(distinct)


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=200))
def test_percentiles_are_within_a_bucket(nanoseconds: list[int]) -> None:
    histogram = LatencyHistogram()
    for half in (nanoseconds[::2], nanoseconds[1::2]):
        histogram.add(np.array(half, np.int64))
    ordered = sorted(nanoseconds)
    for percent in (50, 99, 100):
        exact = ordered[int(np.ceil(len(ordered) * percent / 100)) - 1]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.023, abs=0.5)
    assert (histogram.lowest, histogram.highest) == (ordered[0], ordered[-1])


def test_clocks_that_differ_show_as_negative() -> None:
    histogram = LatencyHistogram()
    assert histogram.percentile(50) is None
    histogram.add(np.array([-5000, -4000], np.int64))
    assert histogram.lowest == -5000
    assert histogram.percentile(50) == 1.0


def test_pacer_keeps_the_rate() -> None:
    pacer, sent = Pacer(20_000, start=100.0), 0
    for tick in range(1000):
        sent += max(0, pacer.due(100.0 + tick * 0.0005, sent))
    assert sent == pytest.approx(999 * 10 + 1, abs=1)
    assert pacer.due(100.0 + 0.4995, sent) == 0


def test_pacer_waits_for_the_next_one() -> None:
    pacer = Pacer(10, start=0.0)
    assert pacer.due(0.0, 0) == 1
    assert pacer.wait(0.0, 1) == pytest.approx(0.1)
    assert pacer.due(0.05, 1) == 0
    assert pacer.due(0.1001, 1) == 1


def test_pacer_forgives_what_is_too_far_behind() -> None:
    pacer = Pacer(1000, start=0.0)
    assert pacer.due(10.0, 0) == 100  # 0.1 s worth of the 10 s
    assert pacer.due(10.0, 100) == 0
    assert pacer.due(10.0502, 100) == 50


@pytest.mark.parametrize("change", [{"size": 31}, {"size": 65_508}, {"rate": 0}, {"ttl": 256}, {"ttl": 0}])
def test_plans_that_make_no_stream(change: dict[str, int]) -> None:
    plan = SendPlan(Output.parse("eth0:239.1.1.1:5000"), **change)  # type: ignore[arg-type]
    with pytest.raises(TrafficError, match="must be"):
        plan.check()
