"""Rates of the last minutes: what a rule's own are, and what is kept."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from mrelay.control.history import POINTS, STEP, History
from mrelay.control.rulebook import Rulebook
from mrelay.control.sampler import Sample
from mrelay.control.slots import Slots
from mrelay.control.workers import Workers
from mrelay.counters import DROP_REASONS
from mrelay.counters_size import MAX_LINKS, MAX_RULES
from mrelay.model.rule import Rule

RULES = [
    Rule.read({"name": name, "from": f"eth0:239.1.1.{at}:5000", "to": [f"eth1:239.2.2.{at}:6000", "eth2:*:*"]})
    for at, name in enumerate("abc")
]
NO_DROPS = dict.fromkeys(DROP_REASONS, 0)


@dataclass
class Scene:
    """A relay's counters, and the history that is told of them."""

    at: float = 0.0
    rules: "np.ndarray[tuple[int, int], np.dtype[np.uint64]]" = field(
        default_factory=lambda: np.zeros((2, MAX_RULES), np.uint64)
    )
    drops: dict[str, int] = field(default_factory=lambda: dict(NO_DROPS))

    def __post_init__(self) -> None:
        self.counters = SimpleNamespace(matched=0, links=np.zeros((3, MAX_LINKS), np.uint64))
        self.book = SimpleNamespace(slots=Slots())
        workers = SimpleNamespace(by_number={0: SimpleNamespace(counters=self.counters)})
        self.history = History(cast(Workers, workers), cast(Rulebook, self.book))

    def have(self, *names: str) -> None:
        rules = [rule for rule in RULES if rule.name in names]
        self.book.slots = self.book.slots.updated(
            rules, lambda slots: [(0, 0)] * len(slots), lambda slots: [(0, 0, 0)] * len(slots)
        )

    def point(self) -> None:
        """As many samples as make one."""
        for _ in range(STEP):
            self.history.sampled(Sample(self.at, self.rules.copy(), list(self.drops.values()), {}, {}))
            self.at += 1.0

    def count(self, name: str, packets: int) -> None:
        index = self.book.slots.rules[name].index
        self.rules[0, index] += packets
        self.rules[1, index] += packets * 100
        self.counters.matched += packets


def test_rates_of_the_relay() -> None:
    scene = Scene()
    scene.have("a")
    scene.point()
    scene.count("a", 50)
    scene.drops["no_rule"] += 10
    scene.point()
    scene.point()
    found = scene.history.relay()
    assert (found["received"], found["matched"]) == ([12.0, 0.0], [10.0, 0.0])
    assert found["drops"] == {"no_rule": [2.0, 0.0]}, "only those there were"
    assert found["step"] == STEP


def test_rates_of_a_rule_and_what_it_could_not_send() -> None:
    scene = Scene()
    scene.have("a", "b")
    scene.point()
    scene.count("a", 50)
    for (rule, _), slot in scene.book.slots.links.items():
        scene.counters.links[2, slot.index] += 5 if rule == "b" else 0
    scene.point()
    a, b = scene.history.rule("a"), scene.history.rule("b")
    assert (a["pps"], a["bps"], a["errors"]) == ([10.0], [8000.0], [0.0])
    assert (b["pps"], b["errors"]) == ([0.0], [2.0]), "of both its outputs"


def test_a_rule_has_no_past_of_others() -> None:
    """Though its slot was another's."""
    scene = Scene()
    scene.have("a")
    scene.point()
    scene.count("a", 50)
    scene.point()
    slot = scene.book.slots.rules["a"]
    scene.book.slots = Slots({"b": slot})
    assert scene.history.rule("b")["pps"] == [None], "it was not noted yet"
    scene.point()
    scene.count("b", 25)
    scene.point()
    assert scene.history.rule("b")["pps"] == [None, 0.0, 5.0]
    with pytest.raises(KeyError):
        scene.history.rule("a")


def test_it_is_bounded() -> None:
    scene = Scene()
    scene.have("a")
    for _ in range(POINTS + 20):
        scene.count("a", 5)
        scene.point()
    assert scene.history.rule("a")["pps"] == [1.0] * POINTS
    assert len(scene.history.relay()["received"]) == POINTS


def test_counters_that_start_anew_are_no_negative_rate() -> None:
    scene = Scene()
    scene.have("a")
    scene.count("a", 50)
    scene.point()
    scene.rules[:] = 0
    scene.counters.matched = 0
    scene.point()
    assert scene.history.rule("a")["pps"] == [0.0]
    assert scene.history.relay()["matched"] == [0.0]
