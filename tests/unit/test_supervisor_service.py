"""What the service manager is told, and when."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from manager import Manager
from mrelay.supervisor.service import Service


@dataclass
class Child:
    name: str
    pid: int = 1
    restarts: int = 0
    trouble: str = ""


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with Manager(tmp_path, watchdog=0.003) as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield made


def turn_until_due(service: Service, *workers: Child) -> None:
    """Go round the loop until a ping was due at least once."""
    before = service.next_ping
    while service.next_ping == before:
        service.turn(Child("control"), workers)


def test_ready_once_and_reloads(manager: Manager, capsys: pytest.CaptureFixture[str]) -> None:
    service = Service()
    assert not service.ready
    service.announce("2 of 2 rules up")
    service.reloading()
    service.announce("3 of 3 rules up")
    manager.take_all()
    assert [(m.get("READY"), m.get("RELOADING")) for m in manager.said] == [("1", None), (None, "1"), ("1", None)]
    assert "MONOTONIC_USEC" in manager.said[1]
    assert capsys.readouterr().out == "ready\n"


def test_ready_though_nobody_reads_that(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    out = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", out)
    service = Service()
    service.announce("2 of 2 rules up")
    assert service.ready
    with contextlib.suppress(BrokenPipeError):  # what it could not write
        out.close()


def test_status_is_told_when_it_changes(manager: Manager) -> None:
    service, worker, control = Service(), Child("worker 0"), Child("control")
    service.announce("up")
    for pid, restarts in ((1, 0), (1, 0), (0, 1), (0, 1), (7, 1)):
        worker.pid, worker.restarts = pid, restarts
        service.turn(control, [worker])
    service.say("1 of 2 rules up")
    service.turn(control, [worker])
    control.trouble = "crash loop (exit status 1)"
    service.turn(control, [worker])
    manager.take_all()
    told = [message["STATUS"] for message in manager.said if "STATUS" in message]
    assert told == [
        "up",
        "up; worker 0: down (restart 1)",
        "up",
        "1 of 2 rules up",
        "1 of 2 rules up; control: crash loop (exit status 1)",
    ]


def test_pings_while_any_worker_runs(manager: Manager) -> None:
    service = Service()
    turn_until_due(service, Child("worker 0", pid=0), Child("worker 1"))
    assert manager.take(1) == {"WATCHDOG": "1"}


def test_no_ping_while_no_worker_runs(manager: Manager) -> None:
    service = Service()
    turn_until_due(service, Child("worker 0", pid=0), Child("worker 1", pid=0))
    manager.take_all()
    assert not any("WATCHDOG" in message for message in manager.said)


def test_pings_during_a_start(manager: Manager) -> None:
    turn_until_due(Service())
    assert manager.take(1) == {"WATCHDOG": "1"}


def test_without_a_watchdog(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC")
    service = Service()
    assert service.next_ping is None
    service.turn(Child("control"), [])
    manager.take_all()
    assert manager.said == []
