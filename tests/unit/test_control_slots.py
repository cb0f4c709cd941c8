"""Counter slots: kept while a rule lives, used again as late as possible, counted from their base."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrelay.control import slots as module
from mrelay.control.slots import Counts, NoSlots, Slot, Slots
from mrelay.counters_size import RULE_ROWS
from mrelay.model.rule import Rule


def rule(name: str, outputs: int = 1) -> Rule:
    to = [f"eth1:239.2.2.{number}:6000" for number in range(outputs)]
    return Rule.model_validate({"name": name, "from": "eth0:239.1.1.1:5000", "to": to})


def zero_rules(slots: Sequence[int]) -> list[Counts]:
    return [(0,) * RULE_ROWS] * len(slots)


def zero_links(slots: Sequence[int]) -> list[Counts]:
    return [(0, 0, 0)] * len(slots)


def updated(slots: Slots, *rules: Rule) -> Slots:
    return slots.updated(rules, zero_rules, zero_links)


def test_what_stays_keeps_its_slot() -> None:
    one = updated(Slots(), rule("a"), rule("b"))
    two = updated(one, rule("b", outputs=2), rule("c"))
    assert two.rules["b"] == one.rules["b"]
    assert two.links["b", "eth1:239.2.2.0:6000"] == one.links["b", "eth1:239.2.2.0:6000"]
    assert two.rules["c"].index == 2


def test_a_slot_is_used_again_last() -> None:
    slots = updated(Slots(), rule("a"))
    assert updated(updated(slots), rule("a")).rules["a"].index == 1


def test_a_used_slot_counts_from_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RULES", 2)
    slots = updated(updated(Slots(), rule("a"), rule("b")), rule("b"))
    slots = slots.updated([rule("b"), rule("c")], lambda slots: [(slot + 10, 20) for slot in slots], zero_links)
    assert slots.rules["c"] == Slot(0, (10, 20))


def test_what_a_used_slot_dropped_is_saved_too_and_older_files_have_none() -> None:
    base = (1, 2, 0, 0, 0, 0, 7, 0)
    slots = Slots({"a": Slot(0, base), "b": Slot(1, (3, 4, 0, 0, 0, 0, 0, 0))}, {}, 2, 0)
    table = slots.to_table()
    assert table["drops"] == {"a": base[2:]}
    assert Slots.from_table(table) == slots
    del table["drops"]
    assert Slots.from_table(table).rules["a"] == Slot(0, (1, 2, 0, 0, 0, 0, 0, 0))


def test_no_more_rules_than_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RULES", 2)
    with pytest.raises(NoSlots):
        updated(Slots(), rule("a"), rule("b"), rule("c"))
    full = updated(Slots(), rule("a"), rule("b"))
    with pytest.raises(NoSlots):  # their slots count until this change is in force
        updated(full, rule("c"), rule("d"))


@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 3)), max_size=6))
def test_no_two_share_a_slot_and_json_keeps_all(steps: list[dict[str, int]]) -> None:
    slots = Slots()
    for step in steps:
        slots = updated(slots, *(rule(name, outputs) for name, outputs in step.items()))
        assert slots.rules.keys() == step.keys()
        for some in (slots.rules, slots.links):
            assert len({slot.index for slot in some.values()}) == len(some)
        assert Slots.from_table(slots.to_table()) == slots
