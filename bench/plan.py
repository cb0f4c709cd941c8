"""In which order everything is measured, and how long that takes. Pure.

Peers take turns within each round, and begin with another one in each, so that a slow spell of the machine falls
on all of them. Called by run_bench.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Final

import measure
from cases import LATENCY_RATES, SECTIONS, Case, Section
from measure import Entry
from peers import Peer

START: Final = 0.4  # seconds that a step takes beside its load: namespaces, start, stop, namespaces
START_OURS: Final = 1.2  # mrelay is more than one process


@dataclass(frozen=True)
class Step:
    """Who is measured in what in one round: under load all that is compared, else one.

    seconds: as far as one can tell before.
    """

    round: int
    section: Section
    entries: tuple[Entry, ...]
    seconds: float

    def __str__(self) -> str:
        first, *more = dict.fromkeys(entry.case for entry in self.entries)
        peers = dict.fromkeys(entry.peer.name for entry in self.entries)
        cases = f"{1 + len(more)} cases side by side" if more else str(first)
        return f"{self.section.title}: {cases}: {' '.join(peers)}"


@dataclass(frozen=True)
class Choice:
    """What was asked for; None: all."""

    sections: Sequence[str] | None = None
    peers: Sequence[str] | None = None
    rounds: int = 3
    quick: bool = False


def steps(choice: Choice, peers: Sequence[Peer], setup: measure.Setup) -> list[Step]:
    """All of them, in order."""
    most = ceil(choice.rounds * max(section.share for section in SECTIONS))
    return [step for number in range(1, most + 1) for step in _round(choice, number, peers, setup)]


def _round(choice: Choice, number: int, peers: Sequence[Peer], setup: measure.Setup) -> Iterator[Step]:
    for section in SECTIONS:
        if choice.sections is not None and section.name not in choice.sections:
            continue
        if number > max(1, ceil(choice.rounds * section.share)):
            continue
        cases = section.quick if choice.quick and choice.sections is None else section.cases
        for some in [cases] if section.together else [(case,) for case in cases]:
            able = [entry for case in some for entry in _able(choice, peers, setup, section, case)]
            first = number % len(able) if able else 0
            able = able[first:] + able[:first]
            for entries in [able] if section.measure == "load" and able else [[entry] for entry in able]:
                seconds = sum(_start(entry.peer) + _seconds(setup, section, entry.case) for entry in entries)
                yield Step(number, section, tuple(entries), seconds)


def _able(
    choice: Choice, peers: Sequence[Peer], setup: measure.Setup, section: Section, case: Case
) -> list[Entry]:
    if case.workers > 1 and setup.cores.second is None:
        return []
    return [Entry(peer, case) for peer in peers if peer.can(section, case) and _asked(choice, peer)]


def _asked(choice: Choice, peer: Peer) -> bool:
    if choice.peers is None:
        return peer.quick or not choice.quick
    return peer.name in choice.peers


def _start(peer: Peer) -> float:
    return START_OURS if peer.ours else START


def _seconds(setup: measure.Setup, section: Section, case: Case) -> float:
    """Of load."""
    if section.measure == "latency":
        return len(LATENCY_RATES) * (setup.warm + setup.seconds + 0.7)
    if section.measure == "spacing":
        return len(measure.SPACING_RATES) * (setup.warm + setup.seconds + 0.7)
    if section.measure == "changes":
        return measure.ADDED * 0.8 + 30
    load = (
        (measure.WARM + 0.25) * measure.TURNS
        + 1.5 * setup.seconds
        + 1.0 * measure.COSTED
        + 1.0
        + 3.3 * case.flows / measure.LEARN_RATE
        + case.rules / 1000
    )
    if section.search and case.outputs == 1:
        load += 1.2 * (setup.steps + 1) * (setup.trial + 0.4)
    if section.curve and setup.curve and case.outputs == 1:
        load += len(measure.LOADS) * (setup.trial / 2 + 0.5)
    return load + 0.02 * case.outputs


@dataclass
class Clock:
    """How much is left, by what the steps so far took beside what was expected."""

    expected: float
    done: float = 0.0
    took: float = field(default=0.0)

    def step(self, expected: float, took: float) -> None:
        """One is over."""
        self.done += expected
        self.took += took

    @property
    def left(self) -> float:
        """Seconds."""
        pace = self.took / self.done if self.done > 20 else 1.0
        return max(0.0, self.expected - self.done) * pace
