"""Writes the table in docs/metrics.md from the metrics' own names and help, so that the two cannot differ.

Run it after any change to a metric: `python scripts/make_metrics.py`. A test compares its output with the file.
"""

import sys
from pathlib import Path

from mrelay.control.metrics import SPECS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
BEGIN, END = "<!-- made by scripts/make_metrics.py -->", "<!-- to here -->"
SUFFIXES = {"counter": "_total", "gauge": "", "info": "_info"}


def page() -> str:
    """The whole page, with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = []
    for name, spec in SPECS.items():
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        rows.append(f"| `{name}{SUFFIXES[spec.kind]}` | {spec.kind} | {labels} | {spec.help} |")
    head = ["| metric | type | labels | |", "|---|---|---|---|"]
    return before + "\n".join([BEGIN, *head, *rows, END]) + after


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
