"""Rules: what they hold, what they refuse by default, and what is wrong with several together."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model_strategies import Table, rule_tables
from mrelay.model.issue import Issue, issues_of
from mrelay.model.rule import Rule, check_rules


def rule(name: str, origin: str, *to: str, **allowed: bool) -> Rule:
    return Rule.model_validate({"name": name, "from": origin, "to": list(to), **allowed})


def complaints(table: object) -> list[Issue]:
    """Everything a Rule says against table; there is something."""
    with pytest.raises(ValidationError) as caught:
        Rule.read(table)
    return issues_of(caught.value)


def table(origin: object, *to: object, **more: object) -> dict[str, object]:
    return {"name": "a", "from": origin, "to": list(to), **more}


def test_to_table_is_plain_and_says_only_what_is_not_default() -> None:
    plain = rule("a", "eth0:239.1.1.1:5000", "eth1:*:*")
    assert plain.to_table() == {"name": "a", "from": "eth0:239.1.1.1:5000", "to": ["eth1:*:*"]}
    local = rule("a", "eth0:224.0.0.251:5353", "eth1:*:*", link_local=True, allow_loop=True)
    assert local.to_table()["link_local"] is True
    assert local.to_table()["allow_loop"] is True


def test_endpoints_may_be_tables() -> None:
    origin = {"interface": "eth0", "address": "239.1.1.1", "port": 5000}
    output = {"interface": "eth1", "address": "*", "port": "*", "ttl": 8}
    made = Rule.model_validate(table(origin, output))
    assert made == rule("a", "eth0:239.1.1.1:5000", "eth1:*:*,ttl=8")


@pytest.mark.parametrize(
    ("value", "key", "problem", "remedy"),
    [
        (table("eth0:224.0.0.1:5", "eth1:*:*"), "from", "never leave", "link_local = true"),
        (table("eth0:224.0.0.0/4:5", "eth1:*:*"), "from", "never leave", "link_local = true"),
        (table("eth0:[ff02::fb]:5", "eth1:*:*"), "from", "never leave", "link_local = true"),
        (table("eth0:239.1.1.1:5", "eth1:224.0.0.9:5"), "to[0]", "never leaves", "link_local = true"),
        (table("eth0:239.1.1.1:5", "eth0:239.1.1.1:5"), "to[0]", "own input", "allow_loop = true"),
        (table("eth0:239.1.1.1:5", "eth1:*:*", "eth0:*:*"), "to[1]", "own input", "allow_loop = true"),
        (table("eth0:239.1.0.0/16:*", "eth0:239.1.9.9:7"), "to[0]", "own input", "allow_loop = true"),
        (table("eth0:239.1.1.1:5", "eth1:[ff3e::1]:5,source=keep"), "to[0]", "IPv6", "source"),
        (table("eth0:239.1.1.1:5", "eth1:*:*,source=[2001:db8::1]"), "to[0]", "IPv6", "IPv4"),
        (table("eth0:239.1.1.1:5", "eth1:*:*", "eth1:*:*"), "to", "twice", "remove"),
        (table("eth0:239.1.1.1:5"), "to", "at least one output", "to = ["),
        (table("eth0:239.1.1.1:5", "eth1:*:*") | {"to": "eth1:*:*"}, "to", "one output", 'to = ["'),
        (table("eth0:239.1.1.1:5", "eth1:*:*", link_local="yes"), "link_local", "'yes'", "= true"),
        (table("eth0:239.1.1.1:5", "eth1:*:*", alow_loop=True), "alow_loop", "alow_loop", "'allow_loop'"),
        (table("eth0:239.1.1.1:5", "eth1:*:*", from_=3), "from_", "'from_'", "'from'"),
        (table("eth0:239.1.1.1:5", "eth1:*:*,tll=1"), "to[0].tll", "tll", "'ttl'"),
        (table("eth0:239.1.1.1:0", "eth1:*:*"), "from.port", "0", "5000"),
        (table("eth0:239.1.1.1:5", "eth1:*:*") | {"name": "a b"}, "name", "'a b'", "studio-a"),
        (table("eth0:239.1.1.1:5", "eth1:*:*") | {"name": "é"}, "name", "'é'", "studio-a"),
        (table("eth0:239.1.1.1:5", "eth1:*:*") | {"name": "a" * 65}, "name", "aaa", "64"),
        (table("eth0:239.1.1.1:5", "eth1:*:*") | {"name": 7}, "name", "7", "studio-a"),
        ({"from": "eth0:239.1.1.1:5", "to": ["eth1:*:*"]}, "name", "missing", 'name = "studio-a"'),
        ({"name": "a", "to": ["eth1:*:*"]}, "from", "missing", 'from = "eth0:'),
        ({"name": "a", "from": "eth0:239.1.1.1:5"}, "to", "missing", 'to = ["'),
        (7, "", "7", "name ="),
    ],
)
def test_a_refusal_names_key_problem_and_remedy(value: object, key: str, problem: str, remedy: str) -> None:
    (issue,) = complaints(value)
    assert issue.key == key
    assert problem in issue.problem
    assert remedy in issue.remedy


def test_all_faults_of_one_rule_come_at_once() -> None:
    value = table("eth0:224.0.0.1:5", "eth1:*:*,ttl=0", "eth1:nohost:5", "eth1:224.0.0.2:5", colour="red")
    keys = [issue.key for issue in complaints(value)]
    assert keys == ["from", "to[0].ttl", "to[1].address", "to[2]", "colour"]


@pytest.mark.parametrize(
    ("origin", "output", "allowed"),
    [
        ("eth0:224.0.0.251:5353", "eth1:224.0.0.251:5353", {"link_local": True}),
        ("eth0:239.1.1.1:5", "eth0:239.1.1.1:5", {"allow_loop": True}),
        ("eth0:239.1.1.1:5", "eth0:239.1.1.1:6", {}),
        ("eth0:239.1.1.1:5", "eth0:239.1.1.2:5", {}),
        ("eth0:239.1.1.1:5,vlan=20", "eth0:*:*", {}),  # what leaves is untagged
        ("eth0:10.0.0.1@232.1.1.1:5", "eth0:*:*,source=10.0.0.2", {}),  # (S,G) of another source
        ("eth0:239.1.1.1:5", "eth1:[ff3e::1]:5", {}),
        ("eth0:239.1.1.1:5", "eth1:[ff3e::1]:5,source=2001:db8::1", {}),
    ],
)
def test_what_is_not_refused(origin: str, output: str, allowed: dict[str, bool]) -> None:
    assert rule("a", origin, output, **allowed).to[0].interface == output.partition(":")[0]


def test_names_used_twice_are_found() -> None:
    one, other = (rule("a", f"eth0:239.1.1.{n}:5", "eth1:*:*") for n in (1, 2))
    (issue,) = check_rules([one, other])
    assert (issue.rule, issue.key) == ("a", "name")
    assert "2 rules" in issue.problem


def test_a_loop_names_its_path_and_what_allows_it() -> None:
    there = rule("there", "eth0:239.1.1.1:5", "eth1:239.2.2.2:6")
    back = rule("back", "eth1:239.2.0.0/16:*", "eth0:239.1.1.1:5")
    (issue,) = check_rules([there, back], "relay.toml")
    assert issue.key == "to"
    assert "there" in issue.problem
    assert "back" in issue.problem
    assert "allow_loop = true" in issue.remedy
    assert str(issue).startswith(f"relay.toml: rule '{issue.rule}', key 'to': ")
    allowed = rule("back", str(back.from_), str(back.to[0]), allow_loop=True)
    assert check_rules([there, allowed]) == []


def test_two_loops_are_both_found() -> None:
    rules = [
        rule(f"{way}{n}", f"{a}:239.1.1.{n}:5", f"{b}:*:*")
        for n in (1, 2)
        for way, a, b in (("there", "eth0", "eth1"), ("back", "eth1", "eth0"))
    ]
    assert len(check_rules(rules)) == 2


@pytest.mark.parametrize(
    "back",
    ["eth1:239.2.2.3:*", "eth1:239.2.2.2:7", "eth2:239.2.2.2:6", "eth1:239.2.2.2:6,vlan=1", "eth1:[ff3e::1]:6"],
)
def test_what_another_rule_does_not_take_is_no_loop(back: str) -> None:
    there = rule("there", "eth0:239.1.1.1:5", "eth1:239.2.2.2:6")
    assert check_rules([there, rule("back", back, "eth0:239.1.1.1:5")]) == []


@given(rule_tables())
def test_table_to_rule_to_table_loses_nothing(value: Table) -> None:
    made = Rule.model_validate(value)
    again = Rule.model_validate(made.to_table())
    assert again == made
    assert again.to_table() == made.to_table()


words = st.text() | st.sampled_from(["eth0:239.1.1.1:5000", "eth1:*:*", "eth0:*:*", "eth1:224.0.0.1:5,ttl=1"])
values: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers() | words | st.lists(words, max_size=3)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10kpps", "10kpps"),
        ("10000pps", "10kpps"),
        ("1.5kpps", "1500pps"),
        ("50 Mbit/s", "50Mbit/s"),
        ("0.001kbit/s,1pps", "1pps,1bit/s"),
        ("1000Gbit/s", "1000Gbit/s"),
    ],
)
def test_rates(text: str, canonical: str) -> None:
    limited = Rule.read(table("eth0:239.1.1.1:5", "eth1:*:*", rate=text))
    assert limited.to_table()["rate"] == canonical
    assert Rule.read(limited.to_table()) == limited


@pytest.mark.parametrize(
    "value",
    [
        "",
        "10",
        "10kbps",
        "0pps",
        "0.0001pps",
        "1001Gpps",
        "1pps,2pps",
        "1pps,",
        "-1pps",
        10,
        True,
        ["1pps"],
    ],
)
def test_what_is_no_rate(value: object) -> None:
    (issue,) = complaints(table("eth0:239.1.1.1:5", "eth1:*:*", rate=value))
    assert issue.key == "rate"
    assert "10kpps" in issue.remedy or "leave rate out" in issue.remedy


keys = st.sampled_from(["name", "from", "to", "link_local", "allow_loop", "rate"]) | st.text()


@given(values | st.dictionaries(keys, values))
def test_no_value_is_a_surprise(value: object) -> None:
    try:
        made = Rule.model_validate(value)
    except ValidationError as error:
        assert all(issue.problem and issue.remedy for issue in issues_of(error))
    else:
        assert Rule.model_validate(made.to_table()) == made
