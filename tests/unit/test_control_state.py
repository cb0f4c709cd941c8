"""The state file: comes back as it was saved, is replaced whole or not at all, and never lost."""

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrelay.control.slots import Slots
from mrelay.control.state import MIGRATIONS, NAME, VERSION, State, StateFile, encode
from mrelay.model.config import RelaySettings
from mrelay.model.rule import Rule

RULE = Rule.model_validate(
    {"name": "a", "from": "eth0:239.1.1.1:5000", "to": ["eth1:239.2.2.2:6000,ttl=8"], "allow_loop": True}
)
OTHER = Rule.model_validate({"name": "b", "from": "eth0:[ff3e::1]:5-9", "to": ["eth1:*:*"]})
STATE = State(
    (RULE, OTHER),
    (OTHER,),
    Slots().updated(
        [RULE, OTHER],
        lambda slots: [(1, 2, 0, 0, 0, 0, 7, 0)] * len(slots),
        lambda slots: [(3, 4, 5)] * len(slots),
    ),
    RelaySettings(workers=[0, 2], gro=False),
)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StateFile]:
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield StateFile(directory)
    os.close(directory)


def test_nothing_saved_yet(file: StateFile) -> None:
    assert file.load() is None


def test_it_comes_back_as_it_was(file: StateFile, tmp_path: Path) -> None:
    file.save(STATE)
    file.save(STATE)
    assert file.load() == STATE
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def of_version(version: object, state: State = STATE) -> bytes:
    return json.dumps({**json.loads(encode(state)), "version": version}).encode()


def refused_rule() -> bytes:
    table = json.loads(encode(STATE))
    table["rules"][0]["from"] = "nonsense"
    return json.dumps(table).encode()


def without_slots() -> bytes:
    table = json.loads(encode(STATE))
    del table["slots"]
    return json.dumps(table).encode()


def with_slots(**changes: object) -> bytes:
    table = json.loads(encode(STATE))
    table["slots"] |= changes
    return json.dumps(table).replace("Infinity", "1e999").encode()


UNUSABLE = {
    "empty": b"",
    "half": encode(STATE)[:100],
    "binary": b"\xff\x00\xfe",
    "deep": b"[" * 100_000,
    "other": b"[1, 2]",
    "unversioned": of_version("2"),
    "version-0": of_version(0),
    "refused": refused_rule(),
    "incomplete": without_slots(),
    "infinite": with_slots(next=[float("inf"), 0]),
    "outside": with_slots(rules=[["a", 1 << 30, 1, 2]]),
    "negative": with_slots(rules=[["a", -1, 1, 2]]),
    "twice": with_slots(rules=[["a", 1, 1, 2], ["b", 1, 1, 2]]),
}


@pytest.mark.parametrize("data", UNUSABLE.values(), ids=UNUSABLE)
def test_what_cannot_be_used_is_set_aside(
    file: StateFile, tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        (tmp_path / NAME).write_bytes(data)
        assert file.load() is None
    aside = list(tmp_path.iterdir())
    assert len(aside) == 2
    assert {path.read_bytes() for path in aside} == {data}
    assert all(path.name.startswith("state.json.corrupt-") for path in aside)
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("kept as state.json.corrupt-" in message for message in errors)


def test_a_newer_version_is_set_aside_and_ours_of_before_is_used(
    file: StateFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = State((OTHER,))
    (tmp_path / NAME).write_bytes(of_version(2))
    (tmp_path / f"{NAME}.v1").write_bytes(encode(ours))
    assert file.load() == ours
    (aside,) = tmp_path.glob("state.json.v2-*")
    assert aside.read_bytes() == of_version(2)
    assert not (tmp_path / NAME).exists()
    for word in ("version 2", "knows version 1", aside.name, "starting from state.json.v1"):
        assert word in caplog.text
    file.save(ours)
    assert file.load() == ours


@pytest.mark.parametrize("kept", [None, b"{", of_version(3)], ids=["none", "corrupt", "newer"])
def test_a_newer_version_without_a_usable_one_of_ours(
    file: StateFile, tmp_path: Path, kept: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).write_bytes(of_version(2))
    if kept is not None:
        (tmp_path / f"{NAME}.v1").write_bytes(kept)
    assert file.load() is None
    assert [path.read_bytes() for path in tmp_path.glob("state.json.v2-*")] == [of_version(2)]
    assert "starting without the rules added at run time" in caplog.text
    assert kept is None or (tmp_path / f"{NAME}.v1").read_bytes() == kept


def test_newer_ones_never_replace_each_other(file: StateFile, tmp_path: Path) -> None:
    for state in (STATE, State((OTHER,))):
        (tmp_path / NAME).write_bytes(of_version(2, state))
        file.load()
    found = {path.read_bytes() for path in tmp_path.glob("state.json.v2-*")}
    assert found == {of_version(2), of_version(2, State((OTHER,)))}


def test_there_is_a_migration_from_every_older_version() -> None:
    assert sorted(MIGRATIONS) == list(range(1, VERSION))


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were the third version: the first had no file_rules, the second called the slots otherwise."""

    def to_second(table: dict[str, Any]) -> dict[str, Any]:
        return {**table, "file_rules": table["rules"], "places": table["slots"]}

    def to_third(table: dict[str, Any]) -> dict[str, Any]:
        return {**table, "slots": table["places"]}

    monkeypatch.setattr("mrelay.control.state.VERSION", 3)
    monkeypatch.setattr("mrelay.control.state.MIGRATIONS", {1: to_second, 2: to_third})


def first_version() -> bytes:
    table = json.loads(of_version(1))
    del table["file_rules"]
    return json.dumps(table).encode()


@pytest.mark.usefixtures("third")
def test_an_older_version_is_migrated_step_by_step_and_kept(file: StateFile, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(first_version())
    state = file.load()
    assert state == State(STATE.rules, STATE.rules, STATE.slots, STATE.relay)
    assert (tmp_path / f"{NAME}.v1").read_bytes() == first_version()
    assert (tmp_path / f"{NAME}.v1").stat().st_mode & 0o777 == 0o600
    file.save(state)
    assert json.loads((tmp_path / NAME).read_bytes())["version"] == 3
    assert file.load() == state
    assert {path.name for path in tmp_path.iterdir()} == {NAME, f"{NAME}.v1"}


@pytest.mark.usefixtures("third")
def test_an_older_version_that_cannot_be_migrated_is_lost_to_nobody(file: StateFile, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b'{"version": 2, "rules": []}')
    assert file.load() is None
    (aside,) = tmp_path.glob("state.json.corrupt-*")
    assert aside.read_bytes() == b'{"version": 2, "rules": []}'


def test_there_and_back(file: StateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upgrade, a rule more, rollback: as before the upgrade. Upgrade again: goes on from there."""
    file.save(STATE)
    with monkeypatch.context() as newer:
        newer.setattr("mrelay.control.state.VERSION", 2)
        newer.setattr("mrelay.control.state.MIGRATIONS", {1: lambda table: table})
        assert file.load() == STATE
        file.save(State((OTHER,)))
    assert file.load() == STATE
    file.save(STATE)
    with monkeypatch.context() as newer:
        newer.setattr("mrelay.control.state.VERSION", 2)
        newer.setattr("mrelay.control.state.MIGRATIONS", {1: lambda table: table})
        assert file.load() == STATE
    assert [json.loads(path.read_bytes())["version"] for path in tmp_path.glob("state.json.v2-*")] == [2]


@pytest.mark.usefixtures("third")
def test_a_disk_without_room_for_the_kept_one(
    file: StateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).write_bytes(first_version())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert file.load() is not None
    assert "can't be kept for a rollback: No space" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_save_that_fails_leaves_what_was(
    file: StateFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.save(STATE)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        file.save(State())
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert file.load() == STATE


def test_a_name_that_is_not_known_to_be_on_disk_is_no_failed_save(
    file: StateFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is the new one by then: whoever is told that nothing was changed would be told wrong."""
    file.save(State())
    sync = os.fsync

    def unsure(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(5, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", unsure)
    file.save(STATE)
    assert file.load() == STATE
    assert "may be the old one again after a power cut: Input/output error" in caplog.text


def test_what_cannot_be_read_is_not_taken_for_nothing(file: StateFile, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(OSError, match="directory"):
        file.load()


def test_a_link_is_not_followed(file: StateFile, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(encode(STATE))
    (tmp_path / NAME).symlink_to("elsewhere")
    with pytest.raises(OSError):
        file.load()
