"""What mrelay is to reach beside the others, as ratios in one run, and whether it does. Pure.

Owns the targets. tables.py and page.py show the verdicts; run_bench.py --check fails when one is missed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cases import Case
from results import Results

KERNEL, TUNED = "smcroute", "smcroute-gro"
FAST, XDP, USER = "mrelay-tc", "mrelay-xdp", "mrelay-uring"


@dataclass(frozen=True)
class Target:
    """`ours` over `theirs`, of a figure, is to be at least (or, for what should be little, at most) `factor`."""

    what: str
    section: str
    case: Case
    figure: str
    ours: str
    theirs: str
    factor: float
    at_most: bool = False
    rate: int = 0


def _row(
    what: str, section: str, figure: str, ours: str, theirs: str, factors: dict[int, float], *,
    at_most: bool = False, rate: int = 0, **case: int | bool,
) -> Iterator[Target]:  # fmt: skip
    """One target for each number of outputs."""
    for outputs, factor in factors.items():
        wanted = Case(outputs=outputs, **case)  # type: ignore[arg-type]  # fields of one kind each
        yield Target(what, section, wanted, figure, ours, theirs, factor, at_most, rate)


TARGETS: Final = (
    *_row("user space, one flow", "fan-out", "out", USER, "socat", {1: 17.0}),
    *_row("user space, one flow", "fan-out", "out", USER, KERNEL, {1: 3.5, 4: 6.0, 16: 7.0}),
    *_row("user space, 200 flows", "interleaved", "out", USER, KERNEL, {1: 0.7, 4: 0.8, 16: 1.0}, flows=200),
    *_row("fast path, one flow", "fan-out", "out", FAST, KERNEL, {1: 4.0, 4: 11.0, 16: 20.0}),
    *_row("fast path, one flow, no DF", "no-df", "out", FAST, TUNED, {1: 1.05, 4: 1.1, 16: 1.2}, df=False),
    *_row("fast path, 200 flows", "interleaved", "out", FAST, KERNEL, {1: 2.3, 4: 2.2, 16: 2.0}, flows=200),
    *_row("with XDP, 200 flows", "interleaved", "out", XDP, KERNEL, {1: 2.3, 4: 2.2}, flows=200),
    *_row("fast path, GRO off", "unmerged", "out", FAST, KERNEL, {1: 2.3, 4: 2.2, 16: 2.0}, merge=False),
    *_row("with XDP, GRO off", "unmerged", "out", XDP, KERNEL, {1: 2.3, 4: 2.2}, merge=False),
    *(
        target
        for rate in (1_000, 20_000, 100_000)
        for figure in ("p50", "p99")
        for target in _row(
            f"fast path, {figure} at {rate:,}/s", "latency", figure, FAST, KERNEL, {1: 0.7, 4: 0.8},
            at_most=True, rate=rate,
        )
    ),
    *(
        target
        for rate in (1_000, 20_000)
        for target in _row(
            f"user space, p50 at {rate:,}/s", "latency", "p50", USER, "socat", {1: 1.0}, at_most=True, rate=rate
        )
    ),
    *_row("fast path, CPU a datagram, GRO off", "unmerged", "cpu", FAST, KERNEL, {1: 0.5, 4: 0.5, 16: 0.5},
          at_most=True, merge=False),
    *_row("with XDP, CPU a datagram, GRO off", "unmerged", "cpu", XDP, KERNEL, {1: 0.5, 4: 0.5},
          at_most=True, merge=False),
    *_row("fast path, CPU a datagram, GRO on, no DF", "no-df", "cpu", FAST, TUNED, {1: 0.5, 4: 0.5, 16: 0.5},
          at_most=True, df=False),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A target and the ratio found."""

    target: Target
    ratio: float

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.ratio <= self.target.factor if self.target.at_most else self.ratio >= self.target.factor


def verdicts(results: Results) -> list[Verdict]:
    """Of all targets of which both sides were measured."""
    ratios = [(t, results.ratio(t.section, t.case, t.ours, t.theirs, t.figure, t.rate)) for t in TARGETS]
    return [Verdict(target, ratio) for target, ratio in ratios if ratio is not None]
