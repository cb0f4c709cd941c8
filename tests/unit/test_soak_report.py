"""The soak's judge: a steady run passes, and each kind of trouble fails by its own verdict."""

from dataclasses import replace
from typing import Any

import pytest

from soak_report import STEADY, Run, Sample, slope, verdicts

SECONDS = 100.0


def samples(role: str, pid: int, *, leak: float = 0.0, opened: int = 0) -> list[Sample]:
    """One a second; `leak` in kB a second, `opened` descriptors more at the end."""
    return [
        Sample(role, pid, float(t), 10_000 + leak * t, 20_000, t / 10, 9 + (opened if t > 90 else 0), 3, 1)
        for t in range(101)
    ]


def run(*, worker: list[Sample] | None = None, lost: int = 0, **stats: int) -> Run:
    names = [*STEADY, "limited", "struck"]
    streams: list[dict[str, Any]] = [
        {"name": name, "sent": 100, "received": 100, "lost": 0, "sent_in_trouble": 0} for name in names
    ]
    streams[0]["lost"] = lost
    numbers = {"received": 700, "matched": 700, "drops": {"ring_full": 0, "rate_limited": 0}, **stats}
    found = [*samples("supervisor", 1), *samples("control", 2), *(worker or samples("worker", 3))]
    return Run(SECONDS, found, [], streams, numbers, [{"restarts": 0}])


def failed(one: Run) -> list[str]:
    return [verdict["what"] for verdict in verdicts(one) if not verdict["ok"]]


def test_a_steady_run_passes() -> None:
    assert failed(run()) == []


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (run(worker=samples("worker", 3, leak=100)), ["memory of worker 3 is flat"]),
        (run(worker=samples("worker", 3, opened=1)), ["descriptors of worker 3 are flat"]),
        (run(worker=samples("worker", 3)[:60]), ["each role was judged"]),
        (run(lost=1), ["untouched streams lose what ring_full counts"]),
        (run(matched=699), ["received = matched + drops"]),
        (run(received=701, matched=701), ["all that was sent was received"]),
        (replace(run(), workers=[{"restarts": 1}]), ["no worker died but by us"]),
    ],
)
def test_each_trouble_fails_by_its_verdict(bad: Run, what: list[str]) -> None:
    assert failed(bad) == what


def test_the_slope_is_not_moved_by_a_jump() -> None:
    at = [float(t) for t in range(50)]
    assert slope(at, [5.0 if t != 25 else 500.0 for t in at]) == 0
    assert slope(at, [3 * t for t in at]) == 3
