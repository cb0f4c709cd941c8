"""The state file: the running rules as they were, for the next start.

Owns `state.json` in the state directory, which it reaches by descriptor alone, since this process may not
be able to walk its path. Called by main and rulebook. Blocks for file I/O: save it in a thread.
"""

import contextlib
import json
import logging
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import ValidationError

from mrelay.control.slots import Slots
from mrelay.model.config import ConfigError, RelaySettings, parse_rules
from mrelay.model.rule import Rule

log = logging.getLogger(__name__)

VERSION: Final = 1
NAME: Final = "state.json"


class Corrupt(Exception):
    """The file is not a state of this version."""


@dataclass(frozen=True)
class State:
    """`rules` run; `file_rules` are those the config file had when it was last read.

    `slots` and `relay` only mean something to a control that is restarted while the relay runs.
    """

    rules: tuple[Rule, ...] = ()
    file_rules: tuple[Rule, ...] = ()
    slots: Slots = field(default_factory=Slots)
    relay: RelaySettings = field(default_factory=RelaySettings)


class StateFile:
    """The file in the directory open as `directory`; the descriptor is ours."""

    def __init__(self, directory: int) -> None:
        self._directory = directory

    def load(self) -> State | None:
        """What was saved; None when nothing was, or when it is unusable, which is then set aside.

        OSError when the file is there and can't be read.
        """
        try:
            with os.fdopen(self._open(NAME, os.O_RDONLY), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        try:
            return decode(data)
        except Corrupt as error:
            aside = self._set_aside()
            log.error("%s %s; kept as %s, starting without the rules added at run time", NAME, error, aside)
            return None

    def save(self, state: State) -> None:
        """Replace the file, all or nothing, also through a power cut. OSError when that fails."""
        temporary = NAME + ".new"
        try:
            with os.fdopen(self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                file.write(encode(state))
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, NAME, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._directory)
            raise
        os.fsync(self._directory)

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._directory)

    def _set_aside(self) -> str:
        stem = aside = f"{NAME}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        taken, number = set(os.listdir(self._directory)), 1
        while aside in taken:
            aside, number = f"{stem}-{number}", number + 1
        os.rename(NAME, aside, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        return aside


def encode(state: State) -> bytes:
    """The file's bytes."""
    table = {
        "version": VERSION,
        "rules": [rule.to_table() for rule in state.rules],
        "file_rules": [rule.to_table() for rule in state.file_rules],
        "slots": state.slots.to_table(),
        "relay": state.relay.model_dump(mode="json"),
    }
    return json.dumps(table, indent=1).encode() + b"\n"


def decode(data: bytes) -> State:
    """The state in the file's bytes; Corrupt says what is wrong."""
    try:
        table: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"is not JSON: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("version"), int):
        raise Corrupt("has no version")
    if table["version"] != VERSION:
        raise Corrupt(f"is of version {table['version']}, this relay knows version {VERSION}")
    try:
        return State(
            parse_rules(table["rules"], NAME),
            parse_rules(table["file_rules"], NAME),
            Slots.from_table(table["slots"]),
            RelaySettings.model_validate(table["relay"]),
        )
    except ConfigError as error:
        raise Corrupt(f"has a rule that is refused: {error.issues[0]}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        raise Corrupt(f"is incomplete: {error!r}") from error
