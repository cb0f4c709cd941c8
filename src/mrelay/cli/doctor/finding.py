"""What the doctor says of one thing: the row that every area's looks yield.

Owns Finding alone. Called by the other files of this package; does no I/O.
"""

from dataclasses import dataclass
from typing import Final, Literal

Verdict = Literal["ok", "warn", "bad"]
VERDICTS: Final[tuple[Verdict, ...]] = ("bad", "warn", "ok")  # the worst first


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, what follows from it, and how to change it.

    `command` is exact: as root it changes just this, and `--fix` runs it. `remedy` says in words what no single
    command does.
    """

    check: str
    verdict: Verdict
    found: str
    consequence: str = ""
    remedy: str = ""
    command: str = ""


def set_sysctl(name: str, value: int) -> str:
    """The command that sets a sysctl until the next boot."""
    return f"sysctl -w {name}={value}"
