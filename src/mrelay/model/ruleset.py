"""Which rules take a flow, and where it then goes: the one place where rules are resolved.

Owns the compiled rules (messages.PutRule) of one worker, indexed by interface and group. Pure: no I/O,
standard library only, since workers import it. See docs/decisions/D30.
"""

import hashlib
import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mrelay.messages import PutRule, RuleOutput


class FlowKey(NamedTuple):
    """A flow, exactly. Addresses are integers; `vlan` 0 is untagged; `family` 4 or 6."""

    ifindex: int
    vlan: int
    family: int
    source: int
    group: int
    port: int


class Destination(NamedTuple):
    """One place that a flow's datagrams go to. `address` is text; `named`: each send must say it."""

    output: int
    oif: int
    family: int
    address: str
    port: int
    named: bool
    ttl: int
    dscp: int
    keep: bool


class Route(NamedTuple):
    """All of them, the rules that ask for it, and for each destination the links (counter slots) it serves.

    `limited` are those of the rules that have a rate; `masks` has for each destination a bit for each of them that
    sends there, or 0 when a rule without a rate does: then it is never withheld.
    """

    rules: tuple[int, ...]
    destinations: tuple[Destination, ...]
    links: tuple[tuple[int, ...], ...]
    limited: tuple[int, ...]
    masks: tuple[int, ...]


NOWHERE = Route((), (), (), (), ())
RETURNED = Route((), (), (), (), ())  # what we sent ourselves has come back, and no rule allows a loop
DIGEST_MASK = (1 << 64) - 1


def address_text(family: int, address: int) -> str:
    """An integer address as text."""
    if family == 4:
        return str(ipaddress.IPv4Address(address))
    return str(ipaddress.IPv6Address(address))


def takes(rule: PutRule, key: FlowKey) -> bool:
    """Whether `rule` matches the flow."""
    return (
        rule.ifindex == key.ifindex
        and rule.family == key.family
        and rule.group_low <= key.group <= rule.group_high
        and rule.port_low <= key.port <= rule.port_high
        and rule.vlan == key.vlan
        and rule.source_low <= key.source <= rule.source_high
    )


def rule_digest(rule: PutRule) -> int:
    """64 bits that differ, as good as always, for rules that differ in anything; the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(rule).encode(), digest_size=8).digest())


def rules_digest(rules: Iterable[PutRule]) -> int:
    """The same for a set of rules, in any order."""
    return sum(map(rule_digest, rules)) & DIGEST_MASK


class RuleSet:
    """The rules in force. `put` and `drop` change it; a rule's slot is its identity and its rank.

    `digest` is `rules_digest` of them all, taken of what changed since it was last asked for.
    """

    def __init__(self) -> None:
        self._digest = 0
        self._came: list[PutRule] = []  # and `_went`: since the digest was taken
        self._went: list[PutRule] = []
        self._rules: dict[int, PutRule] = {}
        self._exact: dict[tuple[int, int, int], set[int]] = defaultdict(set)
        self._wide: dict[tuple[int, int], set[int]] = defaultdict(set)

    def __iter__(self) -> Iterator[PutRule]:
        return iter(self._rules.values())

    def get(self, slot: int) -> PutRule | None:
        return self._rules.get(slot)

    def put(self, rule: PutRule) -> None:
        self.drop(rule.rule)
        self._rules[rule.rule] = rule
        self._bucket(rule).add(rule.rule)
        self._came.append(rule)

    def drop(self, slot: int) -> None:
        rule = self._rules.pop(slot, None)
        if rule is not None:
            self._bucket(rule).discard(slot)
            self._went.append(rule)

    @property
    def digest(self) -> int:
        self._digest = self._digest + rules_digest(self._came) - rules_digest(self._went) & DIGEST_MASK
        self._came, self._went = [], []
        return self._digest

    def _bucket(self, rule: PutRule) -> set[int]:
        if rule.group_low == rule.group_high:
            return self._exact[rule.ifindex, rule.family, rule.group_low]
        return self._wide[rule.ifindex, rule.family]

    def _near(self, ifindex: int, family: int, group: int) -> Iterable[PutRule]:
        slots = self._exact.get((ifindex, family, group), set()) | self._wide.get((ifindex, family), set())
        return (self._rules[slot] for slot in sorted(slots))

    def names(self, ifindex: int, family: int, group: int) -> bool:
        """Whether some rule on this interface names the address: such datagrams count as received."""
        return any(r.group_low <= group <= r.group_high for r in self._near(ifindex, family, group))

    def ranges(self, ifindex: int, family: int) -> list[tuple[int, int]]:
        """The closed address ranges that rules on this interface name, for the ring's filter."""
        mine = (r for r in self if r.ifindex == ifindex and r.family == family)
        return [(r.group_low, r.group_high) for r in mine]

    def resolve(self, key: FlowKey) -> Route:
        """The union of what all matching rules ask for; NOWHERE when none matches, RETURNED when none may take it.

        Two outputs with the same interface, address and port are one destination; the rule with the
        lower slot says its TTL, DSCP and source.
        """
        matching = [r for r in self._near(key.ifindex, key.family, key.group) if takes(r, key)]
        if not matching:
            return NOWHERE
        matching = [r for r in matching if key.source not in r.own]
        if not matching:
            return RETURNED
        found: dict[tuple[int, str, int], tuple[Destination, list[int], list[int]]] = {}
        for rule in matching:
            for output in rule.outputs:
                goal = _destination(output, key)
                _, links, senders = found.setdefault((goal.oif, goal.address, goal.port), (goal, [], []))
                links.append(output.link)
                senders.append(rule.rule)
        limited = tuple(r.rule for r in matching if r.pps or r.bps)
        return Route(
            tuple(r.rule for r in matching),
            tuple(goal for goal, _, _ in found.values()),
            tuple(tuple(links) for _, links, _ in found.values()),
            limited,
            tuple(_mask(senders, limited) for _, _, senders in found.values()),
        )


def _mask(senders: list[int], limited: tuple[int, ...]) -> int:
    """Route.masks for one destination. Limited rules beyond the 64th share its bit."""
    if any(rule not in limited for rule in senders):
        return 0
    bits = {1 << min(limited.index(rule), 63) for rule in senders}
    return sum(bits)


def _destination(output: RuleOutput, key: FlowKey) -> Destination:
    address = output.address if output.address is not None else address_text(key.family, key.group)
    return Destination(
        output=output.output,
        oif=output.oif,
        family=6 if ":" in address else 4,
        address=address,
        port=key.port if output.port is None else output.port,
        named=output.address is None or output.port is None,
        ttl=output.ttl,
        dscp=output.dscp,
        keep=output.keep,
    )
