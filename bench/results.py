"""What a run found: every figure of every step, and medians and spread over the rounds. Saved as JSON.

Owns that file's shape. run_bench.py adds to it; tables, plots, targets and the page are made from it. Pure but for
`save` and `load`.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final, Self

from cases import SECTIONS, Case, Section

VERSION: Final = 1  # of the file


@dataclass(frozen=True)
class Sample:
    """A turn's figures; those that take no turns are with the last. `curve`: see measure.py.

    rate: offered, where there are several; else 0.
    """

    section: str
    case: Case
    peer: str
    round: int
    rate: int
    figures: dict[str, float]
    curve: list[float]


@dataclass(frozen=True)
class Middle:
    """Over the rounds."""

    median: float
    low: float
    high: float


@dataclass
class Results:
    """Of one run. `peers`: name to title, version and whether it is ours, in order."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    peers: dict[str, dict[str, Any]]
    samples: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False

    def sections(self) -> list[Section]:
        """Those of which something was measured."""
        seen = {sample.section for sample in self.samples}
        return [section for section in SECTIONS if section.name in seen]

    def cases(self, section: str) -> list[Case]:
        """Those that were measured, in order of the section."""
        seen = {sample.case for sample in self.samples if sample.section == section}
        order = next(each for each in SECTIONS if each.name == section).cases
        return [case for case in order if case in seen] + [case for case in seen if case not in order]

    def names(self, section: str) -> list[str]:
        """The peers measured there, in the file's order."""
        seen = {sample.peer for sample in self.samples if sample.section == section}
        return [name for name in self.peers if name in seen]

    def rates(self, section: str) -> list[int]:
        """Offered there."""
        return sorted({sample.rate for sample in self.samples if sample.section == section})

    def of(self, section: str, case: Case, peer: str, rate: int = 0) -> list[Sample]:
        """All rounds."""
        wanted = (section, case, peer, rate)
        return [each for each in self.samples if (each.section, each.case, each.peer, each.rate) == wanted]

    def figure(self, section: str, case: Case, peer: str, name: str, rate: int = 0) -> Middle | None:
        """Median and spread of a figure; None when there is none."""
        found = (sample.figures.get(name, math.nan) for sample in self.of(section, case, peer, rate))
        values = [value for value in found if not math.isnan(value)]
        return Middle(median(values), min(values), max(values)) if values else None

    def ratio(
        self, section: str, case: Case, ours: str, theirs: str, name: str = "out", rate: int = 0
    ) -> float | None:
        """Median of a figure's ratios, turn by turn: what slows the machine down for a while is on both sides.

        None when no turn has the figure of both.
        """
        a, b = (self._by_round(section, case, peer, name, rate) for peer in (ours, theirs))
        pairs = [pair for number in a for pair in zip(a[number], b.get(number, ()), strict=False)]
        ratios = [one / other for one, other in pairs if other]
        return median(ratios) if ratios else None

    def _by_round(self, section: str, case: Case, peer: str, name: str, rate: int) -> dict[int, list[float]]:
        """A figure of each turn that has it."""
        found: dict[int, list[float]] = {}
        for sample in self.of(section, case, peer, rate):
            value = sample.figures.get(name, math.nan)
            if not math.isnan(value):
                found.setdefault(sample.round, []).append(value)
        return found

    def title(self, peer: str) -> str:
        """For tables and plots."""
        return str(self.peers[peer]["title"])

    def remarks(self) -> list[str]:
        """What a reader must know: problems, and where generator or sink had no room."""
        return [*dict.fromkeys(self.problems), *_crowded(self)]

    # ---- file --------------------------------------------------------------------------------------

    def save(self, file: Path) -> None:
        """As JSON; NaN, which JSON has not, as null."""
        whole = {"version": VERSION, **asdict(self)}
        for sample in whole["samples"]:
            sample["case"] = _special(sample["case"])
            sample["figures"] = {name: _plain(value) for name, value in sample["figures"].items()}
            sample["curve"] = [_plain(value) for value in sample["curve"]]
        text = json.dumps(whole, indent=1)
        file.write_text(_joined(text) + "\n")

    @classmethod
    def load(cls, file: Path) -> Self:
        """ValueError for a file of another version."""
        whole = json.loads(file.read_text())
        if (version := whole.pop("version", None)) != VERSION:
            raise ValueError(f"{file} has version {version}, this program reads {VERSION}; remedy: measure again")
        samples = whole.pop("samples")
        return cls(**whole, samples=[_sample(each) for each in samples])


def _sample(plain: dict[str, Any]) -> Sample:
    figures = {name: math.nan if value is None else value for name, value in plain["figures"].items()}
    return Sample(**{**plain, "case": Case(**plain["case"]), "figures": figures})


def _special(case: dict[str, Any]) -> dict[str, Any]:
    """Only what is not as usual."""
    usual = asdict(Case())
    return {name: value for name, value in case.items() if value != usual[name]}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")


def _joined(text: str) -> str:
    """One line for each sample, not for each figure: a file that people can compare."""
    lines: list[str] = []
    for line in text.splitlines():
        deep = len(line) - len(line.lstrip())
        if deep > 2:
            lines[-1] += ("" if lines[-1][-1] in "[{" else " ") + line.strip()
        elif deep == 2 and line.strip()[0] in "]}" and len(lines[-1]) - len(lines[-1].lstrip()) == 2:
            lines[-1] += line.strip()
        else:
            lines.append(line)
    return "\n".join(lines)


def _crowded(results: Results) -> list[str]:
    """Steps at which the load or the sink may have been the limit: once for each, however many turns it had."""
    found: dict[tuple[str, str], str] = {}
    load = [sample for sample in results.samples if "offered" in sample.figures]
    for sample in load:
        figures, where = sample.figures, f"{sample.case}, {sample.peer}, round {sample.round}"
        taken, lost = figures["out"] / sample.case.copies, figures.get("lost", 0.0)
        if taken > 0.98 * figures["offered"]:
            said = f"{where}: the generator was the limit ({figures['offered']:,.0f} offered a second)"
            found.setdefault((where, "generator"), said)
        if (full := figures.get("lost_egress", 0.0)) > 0.02 * max(1.0, lost) and sample.case.segment:
            found[where, "sink"] = f"{where}: the sink was the limit ({full:,.0f} frames had no place there)"
    return list(found.values())
