"""Resolving flows against rules: union, duplicates, `*`, and the index against plain search."""

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mrelay.messages import PutRule, RuleOutput
from mrelay.model.ruleset import NOWHERE, FlowKey, RuleSet, rules_digest, takes


def number(text: str) -> int:
    return int(ipaddress.ip_address(text))


def output(
    link: int, address: str | None = "239.2.2.2", port: int | None = 6000, oif: int = 2, ttl: int = 0
) -> RuleOutput:
    return RuleOutput(link, link, oif, address, port, ttl, -1, False)


def rule(slot: int, *outputs: RuleOutput, group: str = "239.1.1.1/32", ports: tuple[int, int] = (5000, 5000),
         source: tuple[int, int] = (0, 2**32 - 1), vlan: int = 0) -> PutRule:  # fmt: skip
    net = ipaddress.ip_network(group)
    low, high = int(net[0]), int(net[-1])
    return PutRule(slot, 1, vlan, net.version, low, high, *ports, *source, 0, 0, (), outputs)


KEY = FlowKey(1, 0, 4, number("10.1.1.9"), number("239.1.1.1"), 5000)


def rules(*several: PutRule) -> RuleSet:
    ruleset = RuleSet()
    for one in several:
        ruleset.put(one)
    return ruleset


def test_union_of_all_matching_rules() -> None:
    route = rules(
        rule(0, output(0)), rule(1, output(1, "239.3.3.3"), group="239.0.0.0/8"), rule(2, output(2), vlan=20)
    ).resolve(KEY)
    assert route.rules == (0, 1)
    assert [d.address for d in route.destinations] == ["239.2.2.2", "239.3.3.3"]
    assert route.links == ((0,), (1,))


def test_equal_outputs_are_one_destination_that_serves_both() -> None:
    route = rules(rule(0, output(0)), rule(1, output(1, ttl=8))).resolve(KEY)
    assert len(route.destinations) == 1
    assert route.destinations[0].ttl == 0, "the lower slot decides"
    assert route.links == ((0, 1),)


def test_star_keeps_what_the_flow_has() -> None:
    (to,) = rules(rule(0, output(0, None, None), group="239.0.0.0/8", ports=(1, 65535))).resolve(KEY).destinations
    assert (to.address, to.port, to.named) == ("239.1.1.1", 5000, True)


def test_a_removed_rule_takes_nothing_away_from_others() -> None:
    ruleset = rules(rule(0, output(0)), rule(1, output(1, "239.3.3.3")))
    ruleset.drop(0)
    assert ruleset.resolve(KEY).rules == (1,)
    ruleset.drop(1)
    assert ruleset.resolve(KEY) is NOWHERE
    ruleset.drop(1)


def test_named_but_not_taken() -> None:
    ruleset = rules(rule(0, output(0)))
    other_port = KEY._replace(port=5001)
    assert ruleset.resolve(other_port) is NOWHERE
    assert ruleset.names(1, 4, other_port.group)
    assert not ruleset.names(1, 4, other_port.group + 1)
    assert not ruleset.names(2, 4, other_port.group)


@given(
    st.lists(st.tuples(st.integers(24, 32), st.integers(0, 255), st.integers(4998, 5001)), max_size=12),
    st.integers(0, 255),
    st.integers(4998, 5001),
)
def test_the_index_finds_what_plain_search_finds(specs: list[tuple[int, int, int]], last: int, port: int) -> None:
    several = [
        rule(
            n,
            output(n),
            group=str(ipaddress.ip_network((number(f"239.1.1.{a}"), bits), strict=False)),
            ports=(4998, p),
        )
        for n, (bits, a, p) in enumerate(specs)
    ]
    key = KEY._replace(group=number(f"239.1.1.{last}"), port=port)
    assert rules(*several).resolve(key).rules == tuple(r.rule for r in several if takes(r, key))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(5000, 5002), st.booleans())))
def test_the_digest_is_that_of_the_rules_that_are_there(changes: list[tuple[int, int, bool]]) -> None:
    ruleset = RuleSet()
    for slot, port, drop in changes:
        if drop:
            ruleset.drop(slot)
        else:
            ruleset.put(rule(slot, output(slot), ports=(port, port)))
    assert ruleset.digest == rules_digest(ruleset)


def test_the_digest_sees_every_difference_but_the_order() -> None:
    one, two = rule(0, output(0)), rule(1, output(1))
    others = [rule(0, output(1)), rule(0, output(0, ttl=8)), rule(0, output(0), vlan=1), rule(2, output(0)), two]
    assert len({rules_digest([one]), *(rules_digest([other]) for other in others)}) == 6
    assert rules_digest([one, two]) == rules_digest([two, one]) != rules_digest([one])
    assert rules_digest([]) == 0


def test_the_digest_is_the_same_in_every_process() -> None:
    """Control and a worker compare theirs."""
    code = "import test_ruleset as t; print(t.rules_digest([t.rule(0, t.output(0))]))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=50,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert said == {f"{rules_digest([rule(0, output(0))])}\n"}
