"""docs/performance.md, and a bit of README.md, filled in from a run: tables between marks, pictures beside it.

    python bench/page.py [RESULT.json]      fill the pages from that run and keep the run as the recorded one
    python bench/page.py --check            exit 1 if a page is not what the recorded run gives

A part `<!-- bench:NAME -->` … `<!-- /bench -->` is replaced. NAME is a section's (bench/cases.py) or one of
machine, summary, peers, targets, memory, losses, room, notes. Files only; blocks for as long as drawing takes.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import plots  # noqa: E402  the path above comes first, for all of these
import tables  # noqa: E402
from cases import SECTIONS  # noqa: E402
from results import Results  # noqa: E402

PAGES: Final = (HERE.parent / "docs" / "performance.md", HERE.parent / "README.md")
PICTURES: Final = HERE.parent / "docs" / "performance"
RECORDED: Final = HERE / "results" / "recorded.json"
_PART: Final = re.compile(r"(<!-- bench:([a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def filled(text: str, results: Results) -> str:
    """The page's text with every marked part replaced. ValueError for a part that there is not."""

    def part(found: re.Match[str]) -> str:
        return found[1] + _part(found[2], results) + "\n" + found[3]

    return _PART.sub(part, text)


def _part(name: str, results: Results) -> str:
    over_all = {
        "summary": tables.summary,
        "peers": tables.peers,
        "targets": tables.judged,
        "memory": tables.memory,
        "losses": tables.losses,
        "room": tables.room,
    }
    if name in over_all:
        return over_all[name](results).markdown()
    if name == "machine":
        return _machine(results)
    if name == "notes":
        return "\n".join(f"- {remark}" for remark in results.remarks()) or "None."
    section = next((each for each in SECTIONS if each.name == name), None)
    if section is None:
        raise ValueError(
            f"no part {name!r}; parts: machine notes {' '.join(over_all)} and the sections of cases.py"
        )
    if section not in results.sections():
        return f"Not measured on this machine: {_why_not(name)}."
    picture = "![By payload](performance/payload.svg)\n\n" if name == "payload" else ""
    return picture + "\n\n".join(f"{table.title}:\n\n{table.markdown()}" for table in tables.of(results, section))


def _why_not(name: str) -> str:
    return "it takes four cores" if name == "workers" else "the run left it out"


def _machine(results: Results) -> str:
    machine, settings = results.machine, results.settings
    cores = machine["cores"]
    kind = "A quick run, one short round" if settings["quick"] else f"{settings['rounds']} rounds"
    shared = "relay and sink share one" if cores["relay"] == cores["sink"] else "relay and sink have one each"
    return (
        f"{settings['started'][:10]}, commit {machine['commit']}: {machine['cpu']} ({machine['cpus']} processors,"
        f" virtual: {machine['virtual']}), {machine['kernel']}, Python {machine['python']}. The source has a core;"
        f" {shared}."
        f" {kind}, {results.seconds / 60:.0f} minutes."
    )


def record(source: Path) -> None:
    """Keep the run, fill the page, draw the pictures: from the file, whose figures are rounded."""
    results = Results.load(source)
    if source.resolve() != RECORDED:
        RECORDED.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, RECORDED)
    for page in PAGES:
        page.write_text(filled(page.read_text(), results))
    plots.draw(results, PICTURES)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="fill docs/performance.md from a run")
    parser.add_argument(
        "result", nargs="?", type=Path, default=RECORDED, help="of `make bench` (default %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            results = Results.load(options.result)
            return int(any(filled(page.read_text(), results) != page.read_text() for page in PAGES))
        record(options.result)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
