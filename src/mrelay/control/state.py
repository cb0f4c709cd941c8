"""The state file: the running rules as they were, for the next start.

Owns `state.json` in the state directory, which it reaches by descriptor alone, since this process may not
be able to walk its path. Called by main and rulebook. Blocks for file I/O: save it in a thread.

Upgrade: a file of an older version is kept as `state.json.vN` and migrated, a version at a time. Rollback: a file
of a newer version is set aside, and what was kept of our own version is used. Nothing is ever thrown away.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import ValidationError

from mrelay.control.slots import Slots
from mrelay.model.config import ConfigError, RelaySettings, parse_rules
from mrelay.model.rule import Rule

log = logging.getLogger(__name__)

Table = dict[str, Any]

VERSION: Final = 1
NAME: Final = "state.json"
# From version n to the next: how to make its table from one of version n. Whoever raises VERSION adds one.
MIGRATIONS: Final[dict[int, Callable[[Table], Table]]] = {}


class Corrupt(Exception):
    """The file is not a state of any version."""


class Newer(Exception):
    """The file is a state of a version above ours: the argument."""

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


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
        data = self._read(NAME)
        if data is None:
            return None
        try:
            version = version_of(data)
            if version < VERSION:
                self._keep(data, version)
            return decode(data)
        except Corrupt as error:
            aside = self._set_aside("corrupt")
            log.error("%s %s; kept as %s, starting without the rules added at run time", NAME, error, aside)
            return None
        except Newer as error:
            return self._roll_back(error.version)

    def save(self, state: State) -> None:
        """Replace the file, all or nothing, also through a power cut. OSError when that fails: it is as before."""
        self._write(NAME, encode(state))

    def _keep(self, data: bytes, version: int) -> None:
        """For a rollback to the relay that wrote it. Without room for that we start all the same."""
        try:
            self._write(_kept(version), data)
        except OSError as error:
            log.error("%s is of version %d and can't be kept for a rollback: %s", NAME, version, error.strerror)
        else:
            log.info("%s is of version %d, now %d; kept as %s", NAME, version, VERSION, _kept(version))

    def _roll_back(self, version: int) -> State | None:
        """A newer relay was here: what ours left before that, or None."""
        aside = self._set_aside(f"v{version}")
        log.error("%s is of version %d, this relay knows version %d; kept as %s", NAME, version, VERSION, aside)
        remedy = f"rules added since the upgrade are in {aside}: add them again, or go back to the newer relay"
        try:
            data = self._read(_kept(VERSION))
            state = None if data is None else decode(data)
        except (Corrupt, Newer) as error:
            log.error("%s %s; not used", _kept(VERSION), error)
            state = None
        start = "without the rules added at run time" if state is None else f"from {_kept(VERSION)}"
        log.error("starting %s; %s", start, remedy)
        return state

    def _read(self, name: str) -> bytes | None:
        try:
            with os.fdopen(self._open(name, os.O_RDONLY), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        temporary = NAME + ".new"
        try:
            with os.fdopen(self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._directory)
            raise
        try:
            os.fsync(self._directory)
        except OSError as error:  # too late to fail: the file is the new one
            log.warning("%s is saved, but may be the old one again after a power cut: %s", name, error.strerror)

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._directory)

    def _set_aside(self, why: str) -> str:
        stem = aside = f"{NAME}.{why}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        taken, number = set(os.listdir(self._directory)), 1
        while aside in taken:
            aside, number = f"{stem}-{number}", number + 1
        os.rename(NAME, aside, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        return aside


def encode(state: State) -> bytes:
    """The file's bytes: one line, since json's indentation would take ten times as long."""
    table = {
        "version": VERSION,
        "rules": [rule.to_table() for rule in state.rules],
        "file_rules": [rule.to_table() for rule in state.file_rules],
        "slots": state.slots.to_table(),
        "relay": state.relay.model_dump(),
    }
    return json.dumps(table).encode() + b"\n"


def version_of(data: bytes) -> int:
    """The version that the file's bytes say; Corrupt when they say none."""
    return _versioned(data)[0]


def decode(data: bytes) -> State:
    """The state in the file's bytes, migrated if need be; Corrupt says what is wrong; Newer."""
    version, table = _versioned(data)
    if version > VERSION:
        raise Newer(version)
    try:
        for older in range(version, VERSION):
            table = MIGRATIONS[older](table)
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


def _versioned(data: bytes) -> tuple[int, Table]:
    try:
        table: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"is not JSON: {error}") from error
    version = table.get("version") if isinstance(table, dict) else None
    if type(version) is not int or version < 1:
        raise Corrupt("has no version")
    return version, table


def _kept(version: int) -> str:
    """The name under which the last state of this version is kept."""
    return f"{NAME}.v{version}"
