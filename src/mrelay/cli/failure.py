"""How a command says that it failed: an exception that `main` prints, and the exit codes.

Every command module raises it; only `mrelay.cli.main` catches it. Does no I/O.
"""

from typing import Final

FAILED: Final = 1
USAGE: Final = 2
NOT_PERMITTED: Final = 77  # EX_NOPERM, sysexits.h
BAD_CONFIG: Final = 78  # EX_CONFIG, sysexits.h
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells say it


class Failure(Exception):
    """An expected failure: `lines` for stderr, each one whole, and the exit `status`."""

    def __init__(self, *lines: str, status: int = FAILED) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
        self.status = status
