"""A worker's scheduling policy follows its load."""

import os
import time

import pytest

from mrelay.counters import RECEIVED, Counters
from mrelay.counters_size import counters_size
from mrelay.worker.pace import Pace


class Host:
    """A clock and a scheduler that a test sets and reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.policies = 100.0, list[int]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(os, "sched_setscheduler", lambda _pid, policy, _param: self.policies.append(policy))
        memory = os.memfd_create("counters")
        os.ftruncate(memory, counters_size(4))
        self.counters = Counters(memory, 4, write=True)
        os.close(memory)
        self.pace = Pace(self.counters)

    def pass_time(self, seconds: float, datagrams: int) -> None:
        """`datagrams` arrive in `seconds`, in ten wakes."""
        for _ in range(10):
            self.now += seconds / 10
            self.counters.totals[RECEIVED] += datagrams // 10
            self.pace.keep()


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
