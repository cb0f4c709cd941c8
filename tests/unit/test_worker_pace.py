"""A worker's scheduling policy follows its load."""

import os
import time

import pytest

from mrelay.counters import RECEIVED, Counters
from mrelay.counters_size import counters_size
from mrelay.worker.pace import Pace


class Host:
    """A clock and a scheduler that a test sets and reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, busy_poll: int = 50) -> None:
        self.now, self.policies = 100.0, list[int]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(os, "sched_setscheduler", lambda _pid, policy, _param: self.policies.append(policy))
        memory = os.memfd_create("counters")
        os.ftruncate(memory, counters_size(4))
        self.counters = Counters(memory, 4, write=True)
        os.close(memory)
        self.pace = Pace(self.counters, busy_poll)

    def pass_time(self, seconds: float, datagrams: int, wakes: int = 10) -> None:
        """`datagrams` arrive in `seconds`, in so many wakes."""
        for n in range(wakes):
            self.now += seconds / wakes
            self.counters.totals[RECEIVED] += datagrams * (n + 1) // wakes - datagrams * n // wakes
            self.pace.keep(woken=True)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_low_rates_keep_the_low_latency_policy(host: Host) -> None:
    host.pass_time(5.0, 5 * 20_000)
    assert host.policies == []


def test_load_changes_the_policy_once_and_its_end_changes_it_back(host: Host) -> None:
    host.pass_time(5.0, 5 * 1_000_000)
    assert host.policies == [os.SCHED_BATCH]
    host.pass_time(5.0, 5 * 20_000)
    assert host.policies == [os.SCHED_BATCH, os.SCHED_OTHER]


def test_the_first_frame_after_a_pause_is_not_load(host: Host) -> None:
    host.pass_time(5.0, 5 * 1_000_000)
    host.pass_time(600.0, 10)
    assert host.policies == [os.SCHED_BATCH, os.SCHED_OTHER]


def test_frames_that_come_one_by_one_and_close_together_are_looked_out_for(host: Host) -> None:
    host.pass_time(1.0, 10_000, wakes=10_000)
    assert not host.pace.lively
    host.pass_time(1.0, 25_000, wakes=25_000)
    assert host.pace.lively
    assert host.pace.look_on == 50_000


def test_so_are_those_of_which_two_came_before_a_slow_machine_woke(host: Host) -> None:
    host.pass_time(1.0, 25_000, wakes=12_600)
    assert host.pace.lively


def test_merged_frames_and_batches_are_not(host: Host) -> None:
    host.pass_time(1.0, 25_000, wakes=12_000)
    assert not host.pace.lively
    host.pass_time(1.0, 100_000, wakes=2_000)
    assert not host.pace.lively
    host.pass_time(1.0, 90_000, wakes=30_000)
    assert not host.pace.lively


def test_nor_is_anything_after_a_pause_or_when_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    host.pass_time(1.0, 25_000, wakes=25_000)
    host.now += 2.0
    host.pace.keep(woken=False)
    assert not host.pace.lively
    never = Host(monkeypatch, busy_poll=0)
    never.pass_time(1.0, 25_000, wakes=25_000)
    assert not never.pace.lively
