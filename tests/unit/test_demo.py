"""What the demo says and when it counts as a success; nothing here needs privilege."""

import errno
import os

import pytest

from mrelay.cli.failure import NOT_PERMITTED, Failure
from mrelay.demo import command
from mrelay.demo.report import KernelReport, Report
from mrelay.demo.stream import Reading

LATENCY: dict[str, float | None] = {"min": 5.0, "p50": 40.0, "p99": 90.4, "max": 300.0}
NO_LATENCY: dict[str, float | None] = dict.fromkeys(LATENCY)


def reading(number: int, received: int, duplicates: int = 0) -> Reading:
    latency = LATENCY if received else NO_LATENCY
    return Reading(f"receiver-{number}", f"239.2.2.{number}:6000", received, 0, duplicates, 0, 0.0, latency)


def report(*received: int, sent: int = 100, matched: int = 100, packets: int = 100, ttl: int = 0) -> Report:
    outputs = [{"packets": packets}, {"packets": packets}]
    stats = {
        "received": 100,
        "matched": matched,
        "drops": {"ttl_expired": ttl},
        "rules": [{"outputs": outputs}],
    }
    return Report(sent, [reading(i + 1, count) for i, count in enumerate(received)], stats, None)


@pytest.mark.parametrize(
    ("made", "ok"),
    [
        (report(100, 100), True),
        (report(100, 99), False),  # the last one lost, which the receiver can't see
        (report(100, 100, matched=99), False),
        (report(100, 100, packets=99), False),
        (report(100, 100, matched=98, ttl=2), True),
        (report(100, 100, sent=101), False),
        (report(0, 0, sent=0), False),
    ],
)
def test_when_it_is_a_success(made: Report, ok: bool) -> None:
    assert made.ok is ok
    assert made.to_json()["ok"] is ok


def test_last_lines() -> None:
    kernel = KernelReport(40, [reading(1, 0), reading(2, 0)], 40)
    made = report(100, 97, matched=98, ttl=2)
    lines = Report(made.sent, made.receivers, made.stats, kernel).lines()
    assert lines[0].endswith("receiver-1 received 0 of 40, receiver-2 received 0 of 40")
    assert "10.99.0.1: the reverse-path check (rp_filter=2) dropped 40" in lines[1]
    assert "receiver-1 (239.2.2.1:6000): received 100, lost 0, latency p50 40 µs, p99 90 µs" in lines[3]
    assert "receiver-2 (239.2.2.2:6000): received 97, lost 3" in lines[4]
    assert "100 = 98 + 2 (2 ttl_expired): DOES NOT ADD UP" in lines[5]


def test_without_privilege_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EPERM, "unshare: Operation not permitted")

    monkeypatch.setattr(command, "Topology", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Failure, match="sudo mrelay demo") as failure:
        command.demo()
    assert failure.value.status == NOT_PERMITTED
    assert len(failure.value.lines) == 1
