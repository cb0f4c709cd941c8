"""What the demo shows while it runs: a live table on a terminal, a line a second anywhere else.

Called by the demo command. Blocks only on the terminal.
"""

from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mrelay.cli.output import table
from mrelay.demo.report import balance_text, latency_text
from mrelay.demo.stream import Reading

_COLUMNS = ("", "received", "a second", "lost", "latency")
_NUMBERS = ("received", "a second", "lost")


@dataclass(frozen=True)
class Moment:
    """One phase at one moment: `what` forwards, what the receivers have, what relay and kernel counted."""

    what: str
    seconds: float
    receivers: list[Reading]
    reverse_path_drops: int
    stats: dict[str, Any] | None = None  # of the relay, where there is one

    def counters(self) -> str:
        """The counters of relay and kernel in words."""
        kernel = f"kernel's reverse-path check dropped {self.reverse_path_drops:,}"
        if self.stats is None:
            return kernel
        return f"received = matched + drops: {balance_text(self.stats)}; of the same datagrams the {kernel}"


class View:
    """Shows the latest moment of each phase. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._phases: dict[str, Moment] = {}

    @property
    def every(self) -> float:
        """Seconds between moments."""
        return 0.5 if self._console.is_terminal else 1.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, soft_wrap=True)

    def show(self, moment: Moment) -> None:
        """Bring the picture up to date."""
        self._phases[moment.what] = moment
        if self._console.is_terminal:
            self._live.update(self._picture(), refresh=True)
        else:
            self._console.print(_line(moment), soft_wrap=True)

    def _picture(self) -> Group:
        rows = [
            (f"{moment.what} → {r.name}", f"{r.received:,}", f"{r.pps:,.0f}", f"{r.lost:,}", latency_text(r))
            for moment in self._phases.values()
            for r in moment.receivers
        ]
        notes = [Text(f"{moment.what}: {moment.counters()}") for moment in self._phases.values()]
        return Group(table(_COLUMNS, rows, right=_NUMBERS), *notes)


def _line(moment: Moment) -> str:
    receivers = [
        f"{r.name} {r.received:,} ({r.pps:,.0f}/s), lost {r.lost:,}, latency {latency_text(r)}"
        for r in moment.receivers
    ]
    return "; ".join(
        [f"{moment.seconds:4.1f} s  {moment.what}: {receivers[0]}", *receivers[1:], moment.counters()]
    )
