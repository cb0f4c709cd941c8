"""The state file: comes back as it was saved, is replaced whole or not at all, and never lost."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrelay.control.slots import Slots
from mrelay.control.state import NAME, State, StateFile, encode
from mrelay.model.config import RelaySettings
from mrelay.model.rule import Rule

RULE = Rule.model_validate(
    {"name": "a", "from": "eth0:239.1.1.1:5000", "to": ["eth1:239.2.2.2:6000,ttl=8"], "allow_loop": True}
)
OTHER = Rule.model_validate({"name": "b", "from": "eth0:[ff3e::1]:5-9", "to": ["eth1:*:*"]})
STATE = State(
    (RULE, OTHER),
    (OTHER,),
    Slots().updated([RULE, OTHER], lambda _: (1, 2), lambda _: (3, 4, 5)),
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


def newer() -> bytes:
    return json.dumps({**json.loads(encode(STATE)), "version": 2}).encode()


def refused_rule() -> bytes:
    table = json.loads(encode(STATE))
    table["rules"][0]["from"] = "nonsense"
    return json.dumps(table).encode()


def without_slots() -> bytes:
    table = json.loads(encode(STATE))
    del table["slots"]
    return json.dumps(table).encode()


UNUSABLE = {
    "empty": b"",
    "half": encode(STATE)[:100],
    "binary": b"\xff\x00\xfe",
    "deep": b"[" * 100_000,
    "other": b"[1, 2]",
    "newer": newer(),
    "refused": refused_rule(),
    "incomplete": without_slots(),
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


def test_a_newer_version_is_named(file: StateFile, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / NAME).write_bytes(newer())
    file.load()
    assert "version 2" in caplog.text


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


def test_what_cannot_be_read_is_not_taken_for_nothing(file: StateFile, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(OSError, match="directory"):
        file.load()


def test_a_link_is_not_followed(file: StateFile, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(encode(STATE))
    (tmp_path / NAME).symlink_to("elsewhere")
    with pytest.raises(OSError):
        file.load()
