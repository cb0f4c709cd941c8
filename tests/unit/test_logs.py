"""Log lines: their forms, levels, and that a storm of them stays small."""

import io
import json
import logging
import os
import subprocess
import sys
import typing
from collections.abc import Iterator

import pytest

from mrelay import logs
from mrelay.cli.options import Level
from mrelay.control.views import LogLevels

PROGRAM = """
import logging, sys
from mrelay import logs
if len(sys.argv) > 1:
    logs.configure(sys.argv[1], "info")
logs.set_up("control")
log = logging.getLogger("mrelay.test")
log.debug("unseen")
log.warning("two\\nlines")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def stderr_of(*arguments: str, journal: bool = False, **environment: str) -> list[str]:
    """The lines that a process of its own logs."""
    read, write = os.pipe()
    with open(read, encoding="utf-8") as reader:
        if journal:
            found = os.fstat(write)
            environment["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
        command = [sys.executable, "-c", PROGRAM, *arguments]
        subprocess.run(command, stderr=write, env=os.environ | environment, check=True, timeout=30)
        os.close(write)
        return reader.read().splitlines()


def test_lines_for_people() -> None:
    lines = stderr_of("text")
    assert lines[:4] == [
        "mrelay control: two",
        "lines",
        "mrelay control: failed",
        "Traceback (most recent call last):",
    ]


def test_json_is_an_object_a_line() -> None:
    first, second = map(json.loads, stderr_of("json"))
    assert (first["level"], first["role"], first["message"]) == ("warning", "control", "two\nlines")
    assert first["time"].endswith("+00:00") and first["pid"] > 0
    assert "ZeroDivisionError" in second["error"] and second["level"] == "error"


def test_journald_gets_a_priority_on_every_line() -> None:
    lines = stderr_of("text", journal=True)
    assert lines[:3] == ["<4>mrelay control: two", "<4>lines", "<3>mrelay control: failed"]
    assert all(line.startswith("<3>") for line in lines[2:])
    assert [line[:4] for line in stderr_of("json", journal=True)] == ["<4>{", "<3>{"]


def test_another_journals_variable_means_nothing() -> None:
    assert stderr_of("text", JOURNAL_STREAM="1:2")[0] == "mrelay control: two"


def test_a_child_logs_as_its_parent_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_settings", logs._Settings("json", True, {"control": "error"}))
    monkeypatch.setenv(logs.VARIABLE, logs.environment()[logs.VARIABLE])
    lines = stderr_of()
    assert len(lines) == 1 and lines[0].startswith('<3>{"time"'), "json, for journald, errors only"


def test_one_list_of_levels() -> None:
    assert typing.get_args(Level) == tuple(logs.LEVELS)
    assert set(LogLevels.model_fields) == set(logs.ROLES)
    assert typing.get_args(LogLevels.model_fields["worker"].annotation) == tuple(logs.LEVELS)


@pytest.mark.parametrize(("role", "level"), [("cook", "info"), ("worker", "loud")])
def test_no_such_role_or_level(role: str, level: str) -> None:
    before = logs.levels()
    with pytest.raises(KeyError):
        logs.set_level(role, level, mine=True)
    assert logs.levels() == before


class Storm:
    """A logger behind a Folding, with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._stream = 100.0, io.StringIO()
        monkeypatch.setattr("mrelay.logs.time.monotonic", lambda: self.now)
        handler = logging.StreamHandler(self._stream)
        self.folding = logs.Folding(handler.handle)
        handler.addFilter(self.folding)
        self.log = logging.Logger("storm")
        self.log.addHandler(handler)

    def lines(self) -> list[str]:
        """What came out since the last call."""
        lines = self._stream.getvalue().splitlines()
        self._stream.seek(0)
        self._stream.truncate()
        return lines


@pytest.fixture
def storm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storm]:
    yield Storm(monkeypatch)


def test_repeats_are_folded_and_said_later(storm: Storm) -> None:
    for _ in range(58):
        storm.log.warning("disk %s", "full")
    storm.log.warning("disk %s", "gone")
    assert storm.lines() == ["disk full", "disk gone"]
    storm.now += logs.WINDOW - 0.1
    storm.folding.flush(storm.now)
    assert storm.lines() == [], "not before the window is over"
    storm.now += 0.1
    storm.folding.flush(storm.now)
    assert storm.lines() == ["disk full … repeated 57 times in 10 s"]
    storm.log.warning("disk %s", "full")
    assert storm.lines() == ["disk full"], "a new window"


def test_a_storm_of_different_messages_is_bounded(storm: Storm) -> None:
    for number in range(10_000):
        storm.log.error("flow %s fails", number)
    storm.log.error("something else")
    assert storm.lines() == [*(f"flow {n} fails" for n in range(logs.MOST)), "something else"]
    storm.now += logs.WINDOW
    storm.log.error("something else")
    assert storm.lines() == [f"… and {10_000 - logs.MOST} more messages of this kind in 10 s", "something else"]


def test_a_message_of_many_things_names_the_first_and_counts_the_others(storm: Storm) -> None:
    logs.log_many(storm.log, logging.INFO, "rule %s: %s", [(number, "up") for number in range(10_000)])
    named = [f"rule {number}: up" for number in range(logs.MOST)]
    assert storm.lines() == [*named, f"… and {10_000 - logs.MOST} more messages of this kind"]
    logs.log_many(storm.log, logging.INFO, "rule %s: %s", [(1, "down")])
    logs.log_many(storm.log, logging.INFO, "rule %s: %s", [])
    storm.now += logs.WINDOW
    storm.folding.flush(storm.now)
    assert storm.lines() == ["… and 1 more messages of this kind in 10 s"]


def test_summaries_keep_their_level(storm: Storm) -> None:
    levels: list[int] = []
    storm.folding.out = lambda record: levels.append(record.levelno)
    for _ in range(2):
        storm.log.error("a")
        storm.log.info("b")
    storm.folding.flush(storm.now + logs.WINDOW)
    assert levels == [logging.ERROR, logging.INFO]
