"""When a child that ended may start again."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrelay.supervisor.backoff import CAP, BackOff


def delays(lives: Iterable[float]) -> list[float]:
    """The delay after each of these lives, in seconds."""
    back_off = BackOff()
    return [back_off.ended(life) for life in lives]


def loops(lives: Iterable[float]) -> list[bool]:
    """Whether it is in a crash loop, after each."""
    back_off = BackOff()
    found = []
    for life in lives:
        back_off.ended(life)
        found.append(back_off.looping())
    return found


def test_what_worked_for_a_while_starts_at_once() -> None:
    assert delays([3600, 1.5, 2, 1.1] * 10) == [0] * 40


def test_what_ends_early_waits_longer_each_time_up_to_the_cap() -> None:
    assert delays([0.1] * 9) == [0, 0, 0.1, 0.5, 2, 5, CAP, CAP, CAP]


def test_a_life_ends_the_row() -> None:
    assert delays([0.1] * 4 + [10] + [0.1] * 3) == [0, 0, 0.1, 0.5, 0, 0, 0, 0.1]


def test_the_budget_is_used_up_by_early_ends_and_given_back_by_life() -> None:
    assert loops([0] * 6) == [False] * 4 + [True] * 2
    assert not any(loops([2.1] * 1000)), "a worker that is killed every two seconds still does its work"
    assert loops([0] * 5 + [60]) == [False] * 4 + [True, False]


def test_the_present_life_counts() -> None:
    back_off = BackOff()
    for _ in range(5):
        back_off.ended(0)
    assert back_off.looping(0)
    assert not back_off.looping(10)


@given(st.lists(st.floats(0, 1e6)))
def test_delays_stay_between_nothing_and_the_cap(lives: list[float]) -> None:
    assert all(0 <= delay <= CAP for delay in delays(lives))


@pytest.mark.parametrize("life", [0.0, 0.5])
def test_it_never_gives_up(life: float) -> None:
    assert set(delays([life] * 100)[7:]) == {CAP}
