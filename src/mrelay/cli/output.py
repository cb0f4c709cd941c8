"""What the commands print: tables, JSON, live views, and numbers as people read them.

Every command that prints data calls it. `show` with `watch` blocks until Ctrl-C.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

_WIDE: Final = 1000  # columns when nobody looks: a pipe must get whole lines, not folded cells
_UNITS: Final = ("", "k", "M", "G", "T", "P")


def console() -> Console:
    """Standard output. Markup is off: "[ff3e::1]" is an address here, not a style."""
    plain = Console(markup=False, emoji=False, highlight=False)
    return plain if plain.is_terminal else Console(markup=False, emoji=False, highlight=False, width=_WIDE)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A table without lines; the columns named in `right` are numbers."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def stack(*parts: RenderableType) -> Group:
    """Several things, one below the other."""
    return Group(*parts)


def print_json(value: object) -> None:
    """One JSON document for a program."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show(
    fetch: Callable[[], Any],
    render: Callable[[Any], RenderableType],
    *,
    as_json: bool,
    watch: bool,
    every: float,
) -> None:
    """Print what `fetch` gives, once or every `every` seconds: a table, or JSON (a line each when live)."""
    if not watch:
        _show_once(fetch(), render, as_json)
    elif as_json:
        _repeat(lambda: print(json.dumps(fetch(), ensure_ascii=False), flush=True), every)
    elif sys.stdout.isatty():
        _show_live(fetch, render, every)
    else:
        _repeat(lambda: _show_once(fetch(), render, False), every)


def _show_once(data: Any, render: Callable[[Any], RenderableType], as_json: bool) -> None:
    if as_json:
        print_json(data)
    else:
        print_view(render(data))


def print_view(view: RenderableType) -> None:
    """A table or the like, without the blanks that fill its last column."""
    shown = console()
    with shown.capture() as text:
        shown.print(view)
    print("\n".join(line.rstrip() for line in text.get().splitlines()), flush=True)


def _show_live(fetch: Callable[[], Any], render: Callable[[Any], RenderableType], every: float) -> None:
    first = render(fetch())  # a relay that is not there is said before the screen is taken
    with Live(first, console=console(), auto_refresh=False, screen=False) as live:
        live.refresh()
        time.sleep(every)
        _repeat(lambda: live.update(render(fetch()), refresh=True), every)


def _repeat(step: Callable[[], None], every: float) -> None:
    while True:
        step()
        time.sleep(every)


def count(number: int) -> str:
    """1234567 as 1,234,567."""
    return f"{number:,}"


def scaled(number: float, unit: str) -> str:
    """1234567, "bit/s" as 1.23 Mbit/s: three digits and an SI prefix."""
    value, index = float(number), 0
    while abs(value) >= 999.5 and index < len(_UNITS) - 1:
        value, index = value / 1000, index + 1
    digits = 0 if index == 0 and value == int(value) else max(0, 3 - len(str(int(abs(value)))))
    return f"{value:.{digits}f} {_UNITS[index]}{unit}"


def plural(number: int, noun: str) -> str:
    """1 rule, 2 rules."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
