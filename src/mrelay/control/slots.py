"""Counter slots: which rule and which (rule, output) counts where, and from what.

Owns the assignment and the base values; counters.py owns the memory. A slot is handed out round robin, so
one that was used is used again as late as possible; what it held then is its base. Pure; a change makes a
new Slots, so that one that can't be saved changes nothing.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from mrelay.counters_size import MAX_LINKS, MAX_RULES, RULE_ROWS
from mrelay.model.rule import Rule

Counts = tuple[int, ...]
ReadSlots = Callable[[Sequence[int]], list[Counts]]  # what slots hold now, summed over the workers
LinkKey = tuple[str, str]  # a rule's name, an output's text
Key = TypeVar("Key")


class NoSlots(Exception):
    """More rules or outputs than there are slots."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Counts are those in slot `index`, minus `base`."""

    index: int
    base: Counts


@dataclass(frozen=True)
class Slots:
    """Slots by rule name and by (rule name, output text); `next_rule`, `next_link` are tried first."""

    rules: Mapping[str, Slot] = field(default_factory=dict)
    links: Mapping[LinkKey, Slot] = field(default_factory=dict)
    next_rule: int = 0
    next_link: int = 0

    def updated(self, rules: Iterable[Rule], read_rules: ReadSlots, read_links: ReadSlots) -> Self:
        """Slots for exactly these rules; what stays keeps its slot. Raises NoSlots."""
        names = [rule.name for rule in rules]
        keys = [(rule.name, str(output)) for rule in rules for output in rule.to]
        rule_slots, next_rule = _assign(self.rules, names, self.next_rule, MAX_RULES, read_rules)
        link_slots, next_link = _assign(self.links, keys, self.next_link, MAX_LINKS, read_links)
        return type(self)(rule_slots, link_slots, next_rule, next_link)

    def to_table(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "rules": [[name, slot.index, *slot.base[:2]] for name, slot in self.rules.items()],
            "drops": {name: slot.base[2:] for name, slot in self.rules.items() if any(slot.base[2:])},
            "links": [[*key, slot.index, *slot.base] for key, slot in self.links.items()],
            "next": [self.next_rule, self.next_link],
        }

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> Self:
        """The reverse; ValueError, TypeError or KeyError when it isn't one of ours."""
        drops, none = table.get("drops", {}), [0] * (RULE_ROWS - 2)  # earlier versions had none
        rules = {
            _text(name): _slot(index, [*base, *drops.get(name, none)], RULE_ROWS, MAX_RULES)
            for name, index, *base in table["rules"]
        }
        links = {
            (_text(name), _text(to)): _slot(index, base, 3, MAX_LINKS) for name, to, index, *base in table["links"]
        }
        for slots in rules, links:
            if len({slot.index for slot in slots.values()}) < len(slots):
                raise ValueError("one slot is given twice")
        next_rule, next_link = table["next"]
        return cls(rules, links, _count(next_rule, MAX_RULES), _count(next_link, MAX_LINKS))


def _slot(index: object, base: list[object], width: int, limit: int) -> Slot:
    if len(base) != width:
        raise ValueError(f"{width} base values were due, not {len(base)}")
    return Slot(_count(index, limit), tuple(_count(value) for value in base))


def _count(value: object, limit: int | None = None) -> int:
    if not isinstance(value, int) or value < 0 or (limit is not None and value >= limit):
        raise ValueError(f"{value!r} can't be a slot or a count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _assign(
    old: Mapping[Key, Slot], keys: list[Key], start: int, limit: int, read: ReadSlots
) -> tuple[dict[Key, Slot], int]:
    """Slots for `keys`, and where to look for the next free one."""
    if len(keys) > limit:
        raise NoSlots(f"{len(keys)} rules or outputs are more than the {limit} that can be counted")
    used = {slot.index for slot in old.values()}
    free = (index % limit for index in range(start, start + limit) if index % limit not in used)
    lacking = [key for key in keys if key not in old]
    taken = list(itertools.islice(free, len(lacking)))
    if len(taken) < len(lacking):  # the rest are held by rules that go with this very change
        raise NoSlots(f"no more than {limit} rules or outputs can be counted; remove some first")
    fresh = dict(zip(lacking, map(Slot, taken, read(taken)), strict=True))
    return {key: old.get(key) or fresh[key] for key in keys}, (taken[-1] + 1 if taken else start) % limit
