"""The rule line that discovery suggests: a shell takes it apart into a rule that is right."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrelay.model.rule import Rule
from mrelay.model.suggest import rule_line, rule_name


def read(line: str) -> Rule:
    """The rule that the line adds."""
    words = shlex.split(line)
    assert words[:3] == ["mrelay", "rule", "add"] and words[4] == "--from" and words[6] == "--to"
    options = {word.removeprefix("--").replace("-", "_"): True for word in words[8:]}
    return Rule.read({"name": words[3], "from": words[5], "to": [words[7]], **options})


ADDRESSES = st.sampled_from(["239.1.1.1", "224.0.0.251", "232.1.1.1", "ff3e::1", "ff02::fb", "ff15::8000:1"])


@given(
    ADDRESSES,
    st.integers(0, 65535),
    st.integers(0, 4094),
    st.lists(st.sampled_from(["10.9.9.9", "10.9.9.8"]), max_size=2, unique=True),
    st.integers(0, 255),
    st.text(max_size=90),
)
def test_it_is_a_right_rule(group: str, port: int, vlan: int, sources: list[str], ttl: int, name: str) -> None:
    sources = ["2001:db8::9"] if ":" in group and sources else sources
    rule = read(rule_line("eth0", "eth1", group, port, vlan=vlan, sources=sources, ttl=ttl, name=name))
    assert (str(rule.from_.address.network_address), rule.from_.vlan) == (group, vlan or None)
    assert (rule.from_.ports.low, rule.from_.ports.high) == ((port, port) if port else (1, 65535))
    assert rule.to[0].ttl == (8 if ttl == 1 else None)


def test_a_source_is_named_where_the_group_asks_for_one() -> None:
    line = rule_line("eth0", "eth1", "232.1.1.1", 5000, sources=["10.9.9.9"])
    assert line == "mrelay rule add 232.1.1.1-5000 --from eth0:10.9.9.9@232.1.1.1:5000 --to 'eth1:*:*'"
    assert "@" not in rule_line("eth0", "eth1", "239.1.1.1", 5000, sources=["10.9.9.9"])
    assert "@" not in rule_line("eth0", "eth1", "232.1.1.1", 5000, sources=["10.9.9.9", "10.9.9.8"])


@pytest.mark.parametrize(
    ("name", "want"),
    [("Studio A: main", "studio-a-main"), ("…", "239.1.1.1-5000"), ("x" * 99, "x" * 64), ("$(reboot)", "reboot")],
)
def test_a_rule_is_called_like_its_stream(name: str, want: str) -> None:
    assert rule_name(name, "239.1.1.1", 5000) == want
