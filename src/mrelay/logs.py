"""How every role logs: one line a message on standard error, in one of two forms, and never too many of them.

Owns the form, the levels and the folding of what repeats. Each role calls `set_up` once and `flush` now and then;
the supervisor passes `environment` on to its children. Standard library only. Writing to standard error may block
when its reader does; nothing else does.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final

ROLES: Final = ("supervisor", "control", "worker")
LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
VARIABLE: Final = "MRELAY_LOG"  # from supervisor to children, as `_Settings.to_text` says
WINDOW: Final = 10.0  # seconds
MOST: Final = 50  # different messages of one kind in a window
# sd-daemon(3): what journald takes off the start of a line, by the lowest level that has it
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


class _Settings:
    """The form, and every role's level."""

    def __init__(self, form: str = "text", journal: bool = False, levels: dict[str, str] | None = None) -> None:
        self.form, self.journal = form, journal
        self.levels = dict.fromkeys(ROLES, "info") | (levels or {})

    def to_text(self) -> str:
        return json.dumps([self.form, self.journal, self.levels])


_settings = _Settings()


def configure(form: str, level: str) -> None:
    """In the supervisor, before `set_up`: what the command line said. `form` is "text" or "json"."""
    global _settings  # noqa: PLW0603  logging is the process's, and so is this
    _settings = _Settings(form, _to_journal(), dict.fromkeys(ROLES, level))


def set_up(role: str) -> None:
    """Let all of this process's logging go to standard error, as configured or as the supervisor passed it on."""
    global _settings  # noqa: PLW0603
    if VARIABLE in os.environ:
        _settings = _Settings(*json.loads(os.environ[VARIABLE]))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(role, as_json=_settings.form == "json", journal=_settings.journal))
    handler.addFilter(_folding)
    _folding.out = handler.handle
    logging.basicConfig(level=LEVELS[_settings.levels[role]], handlers=[handler])


def environment() -> dict[str, str]:
    """What a child needs in its environment to log as we do."""
    return {VARIABLE: _settings.to_text()}


def levels() -> dict[str, str]:
    """Every role's level."""
    return dict(_settings.levels)


def set_level(role: str, level: str, *, mine: bool) -> None:
    """From now on; KeyError for what is no role or no level. `mine`: it is this process's role."""
    number = LEVELS[level]
    if role not in _settings.levels:
        raise KeyError(role)
    _settings.levels[role] = level
    if mine:
        logging.getLogger().setLevel(number)


def flush() -> None:
    """Say what was held back and is due. Cheap when there is nothing."""
    _folding.flush(time.monotonic())


def _to_journal() -> bool:
    """Whether standard error goes to journald (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class _Formatter(logging.Formatter):
    """Lines for people, or an object a line for programs; for journald each line with its priority."""

    def __init__(self, role: str, *, as_json: bool, journal: bool) -> None:
        name = "mrelay" if role == "supervisor" else f"mrelay {role}"
        super().__init__(f"{name}: %(message)s")
        self._role, self._json, self._journal = role, as_json, journal

    def format(self, record: logging.LogRecord) -> str:
        text = self._object(record) if self._json else super().format(record)
        if not self._journal:
            return text
        priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())

    def _object(self, record: logging.LogRecord) -> str:
        table = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            table["error"] = self.formatException(record.exc_info)
        return json.dumps(table, ensure_ascii=False)


def log_many(to: logging.Logger, level: int, message: str, each: Sequence[tuple[object, ...]]) -> None:
    """A message of many things at once: of the first by name, of the others how many.

    Folding would let no more through, but takes its time for each.
    """
    for arguments in each[:MOST]:
        to.log(level, message, *arguments)
    if len(each) > MOST:
        to.log(level, "… and %d more messages of this kind", len(each) - MOST)


class _Window:
    """What one kind of message (a place in the code) said since `start`; `again`: how often each text repeated."""

    def __init__(self, record: logging.LogRecord, start: float) -> None:
        self.first, self.start = record, start
        self.again: dict[str, int] = {}
        self.more = 0  # others, beyond the first MOST


class Folding(logging.Filter):
    """Lets a text through once in a WINDOW, and MOST texts of a kind; `flush` says what was held back.

    However fast messages come, and whatever is in them, the log grows by at most MOST + 1 lines of each kind in a
    window, and by as many that say how often each came again. `out` takes those.
    """

    def __init__(self, out: Callable[[logging.LogRecord], object] | None = None) -> None:
        super().__init__()
        self.out = out
        self._windows: dict[tuple[str, int, str], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "summary", False):
            return True
        now = time.monotonic()
        self.flush(now)
        window = self._windows.setdefault((record.name, record.levelno, str(record.msg)), _Window(record, now))
        text = record.getMessage()
        if text in window.again:
            window.again[text] += 1
            return False
        if len(window.again) >= MOST:
            window.more += 1
            return False
        window.again[text] = 0
        return True

    def flush(self, now: float) -> None:
        """Say what the windows that are over held back."""
        over = [key for key, window in self._windows.items() if now - window.start >= WINDOW]
        for window in [self._windows.pop(key) for key in over]:
            seconds = f"{now - window.start:.0f} s"
            for text, times in window.again.items():
                if times:
                    self._say(window.first, f"{text} … repeated {times} times in {seconds}")
            if window.more:
                self._say(window.first, f"… and {window.more} more messages of this kind in {seconds}")

    def _say(self, like: logging.LogRecord, text: str) -> None:
        """A record of the same level and logger."""
        record = logging.LogRecord(like.name, like.levelno, like.pathname, like.lineno, text, None, None)
        record.summary = True
        if self.out is not None:
            self.out(record)


_folding = Folding()
