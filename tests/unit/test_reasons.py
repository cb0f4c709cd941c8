"""Reasons: the README's tables say what the program says."""

import re
from pathlib import Path

import pytest

from mrelay import reasons

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize(
    ("head", "known"),
    [("reason | means", reasons.DROPS), ("a frame takes the slow path | because", reasons.PASSED)],
    ids=["drops", "passed"],
)
def test_the_readme_says_the_same(head: str, known: dict[str, str]) -> None:
    table = README.read_text().partition(f"| {head} |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [re.fullmatch(r"\| `(\w+)` \| (.*) \|", line) for line in table.splitlines()]
    said = {row[1]: row[2].replace("`", "") for row in rows if row}
    assert len(said) == len(rows)
    assert said == known


def test_what_a_frame_shows_are_reasons() -> None:
    assert reasons.DROPS.keys() > reasons.SHOWN_BY_FRAME
