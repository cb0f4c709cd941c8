"""What every experiment shares: its arguments, its claims and its verdict.

Owns how a verdict is written; each program under experiments/ makes one `Experiment`, and run_all.py reads
what `--json` prints. Nothing here blocks.

Arguments of every experiment: `--short` (the form the test suite runs: seconds, not minutes),
`--break PREMISE` (take away something the claims rest on; the verdict must then be that they fail),
`--json` (one JSON object on standard output instead of the table), `--premises` (what `--break` takes, one a
line; nothing is run). Exit status: 0 all claims hold, 1 one does not, 77 this host lacks something, which is
named.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

EX_FAILED: Final = 1
EX_LACKING: Final = 77  # sysexits.h EX_NOPERM, as for `mrelay run`: what it needs is not here


@dataclass(frozen=True)
class Claim:
    """One sentence that this run showed to be true or false, with what was observed."""

    text: str
    holds: bool
    observed: str


@dataclass
class Experiment:
    """One run. `name` is the folder's or file's; `premises` are what `--break` can take away."""

    name: str
    description: str
    premises: Sequence[str] = ()
    claims: list[Claim] = field(default_factory=list)

    def __post_init__(self) -> None:
        parser = argparse.ArgumentParser(
            prog=self.name,
            description=self.description,
            epilog="Exit status: 0 every claim holds, 1 one does not, 77 this host lacks something.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--short", action="store_true", help="the quick form that the tests run")
        parser.add_argument("--json", action="store_true", help="print the verdict as one JSON object")
        if self.premises:
            parser.add_argument(
                "--break",
                dest="broken",
                choices=self.premises,
                metavar="PREMISE",
                help=f"see a claim fail for want of: {', '.join(self.premises)}",
            )
        parser.add_argument("--premises", action="store_true", help="print what --break takes, one a line")
        given = parser.parse_args()
        if given.premises:
            print(*self.premises, sep="\n", end="\n" if self.premises else "")
            sys.exit(0)
        self.short: bool = given.short
        self.broken: str | None = getattr(given, "broken", None)
        self._json: bool = given.json
        # Tables go where a person looks; with --json standard output is the program's.
        self.console = Console(stderr=self._json, highlight=False)

    def runs(self, *premises: str) -> bool:
        """Whether to run the part that rests on these: always, but without a premise only what rests on that."""
        return self.broken is None or self.broken in premises

    def claim(self, text: str, holds: bool, observed: str) -> None:
        """Record one claim: `text` in the present tense, `observed` with the figures of this run."""
        self.claims.append(Claim(text, holds, observed))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show measurements: the first column to the left, figures to the right."""
        table = Table(*columns[:1], title=title, title_justify="left")
        for name in columns[1:]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self.console.print(table)

    def need_root(self) -> None:
        """End the run here, by name, when this process can't make namespaces and packet sockets."""
        if os.geteuid():
            self.lacks("root (CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN): run it with sudo")

    def lacks(self, what: str) -> NoReturn:
        """This host can't show it: say what is missing, exit 77."""
        self._say({"lacks": what})
        self.console.print(f"{self.name}: cannot run here: needs {escape(what)}")
        sys.exit(EX_LACKING)

    def finish(self, verdict: str) -> NoReturn:
        """The verdict in one line with its main figures; prints all claims and exits."""
        ok = bool(self.claims) and all(claim.holds for claim in self.claims)
        for claim in self.claims:
            sign = "[green]holds[/]" if claim.holds else "[red]FAILS[/]"
            self.console.print(f"{sign}  {escape(claim.text)}\n       {escape(claim.observed)}")
        self.console.print(f"{self.name}: {escape(verdict) if ok else 'a claim no longer holds, see above'}")
        self._say({"ok": ok, "verdict": verdict})
        sys.exit(0 if ok else EX_FAILED)

    def _say(self, result: dict[str, object]) -> None:
        if self._json:
            print(json.dumps({"name": self.name, **result, "claims": [asdict(claim) for claim in self.claims]}))
