"""One stage's finding, and how figures are said in it. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Status = Literal["ok", "failed", "unknown", "skipped"]
OK: Final = "ok"
FAILED: Final = "failed"
UNKNOWN: Final = "unknown"
SKIPPED: Final = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """`text` in one line; `evidence`: what was seen; `remedy`: what to do, empty unless it failed."""

    status: Status
    text: str
    evidence: tuple[str, ...] = ()
    remedy: str = ""


def fine(text: str, *evidence: str) -> Finding:
    """The stage is as it should be."""
    return Finding(OK, text, evidence)


def unknown(text: str, *evidence: str) -> Finding:
    """Nothing shows that it is amiss, nothing that it isn't."""
    return Finding(UNKNOWN, text, evidence)


def failed(text: str, remedy: str, *evidence: str) -> Finding:
    """It stops here."""
    return Finding(FAILED, text, evidence, remedy)


def several(count: int, noun: str) -> str:
    """1 datagram, 1,234 datagrams."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(words: Iterable[str], most: int = 3) -> str:
    """a, b, c and 4 more"""
    every = list(words)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest


def span(seconds: float) -> str:
    """2.0 s, 3 min, 2 h, 5 days"""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
