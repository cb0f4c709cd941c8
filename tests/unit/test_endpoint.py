"""Endpoints as text and as tables: what is accepted, what it becomes, and what each refusal says."""

from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model_strategies import Table, input_tables, output_tables
from mrelay.model.endpoint import Endpoint, Input, Output, PortRange
from mrelay.model.issue import Issue, issues_of

ENDPOINTS: list[type[Endpoint]] = [Input, Output]


def complaints(model: type[Endpoint], value: object) -> list[Issue]:
    """Everything model says against value; there is something."""
    with pytest.raises(ValidationError) as caught:
        model.read(value)
    issues = issues_of(caught.value)
    assert all(issue.problem and issue.remedy for issue in issues)
    return issues


@pytest.mark.parametrize(
    "text",
    [
        "eth0:239.1.1.1:5000",
        "eth0:10.1.1.9@232.1.1.1:5000",
        "eth0:10.1.0.0/16@232.1.1.1:5000",
        "eth0.20:239.1.0.0/16:5000-5999",
        "eth1:[ff3e::1]:6000",
        "eth1:[ff3e::/64]:6000",
        "eth1:[2001:db8::1]@[ff3e::1]:6000",
        "eth0:239.0.0.0/8:*,vlan=20",
        "wg-0.x:10.100.0.2:6000",
    ],
)
def test_canonical_input_text_stays_as_it_is(text: str) -> None:
    assert str(Input.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "eth1:239.2.2.2:6000",
        "wg0:10.100.0.2:6000,ttl=8,source=keep,dscp=46",
        "eth1:*:*",
        "eth1:[ff3e::1]:*,ttl=8",
        "eth1:[ff3e::1]:6000,source=[2001:db8::1]",
        "eth1:239.2.2.2:6000,source=10.0.0.1,dscp=0",
    ],
)
def test_canonical_output_text_stays_as_it_is(text: str) -> None:
    assert str(Output.parse(text)) == text


@pytest.mark.parametrize(
    ("model", "text", "canonical"),
    [
        (Input, " eth0:10.1.1.9@232.1.1.1:5000 , vlan = 20 ", "eth0:10.1.1.9@232.1.1.1:5000,vlan=20"),
        (Input, "eth0:232.1.1.1/32:5000,source=10.1.1.9", "eth0:10.1.1.9@232.1.1.1:5000"),
        (Input, "eth0:239.1.1.1:1-65535", "eth0:239.1.1.1:*"),
        (Input, "eth0:239.1.1.1:5000-5000", "eth0:239.1.1.1:5000"),
        (Input, "eth0:[FF3E:0::1]:05000", "eth0:[ff3e::1]:5000"),
        (Output, "eth0:1.2.3.4:5,ttl=decrement,source=egress,dscp=keep", "eth0:1.2.3.4:5"),
        (Output, "eth0:10.0.0.1@239.1.1.1:5", "eth0:239.1.1.1:5,source=10.0.0.1"),
    ],
)
def test_other_spellings_become_canonical(model: type[Endpoint], text: str, canonical: str) -> None:
    assert str(model.parse(text)) == canonical


def test_parts_have_their_types() -> None:
    source = Input.parse("eth0:10.1.1.9@232.1.1.0/24:5000-5999,vlan=20")
    assert source.address == IPv4Network("232.1.1.0/24")
    assert source.source == IPv4Network("10.1.1.9/32")
    assert (source.ports.low, source.ports.high, source.vlan) == (5000, 5999, 20)
    assert Input.parse("e:[ff3e::1]:1").address == IPv6Network("ff3e::1/128")
    output = Output.parse("eth1:239.2.2.2:6000,ttl=8,source=10.0.0.1,dscp=46")
    assert (output.address, output.port) == (IPv4Address("239.2.2.2"), 6000)
    assert (output.ttl, output.source, output.dscp) == (8, IPv4Address("10.0.0.1"), 46)
    kept = Output.parse("eth1:*:*")
    assert (kept.address, kept.port, kept.ttl, kept.source, kept.dscp) == (None, None, None, "egress", None)


def test_endpoints_are_made_in_code_too() -> None:
    made = Input(interface="eth0", address=IPv4Network("239.1.1.1/32"), ports=PortRange(low=5000, high=5000))
    assert made == Input.parse("eth0:239.1.1.1:5000")
    assert Output(interface="eth1", address=None, port=None) == Output.parse("eth1:*:*")
    assert len({made, Input.parse("eth0:239.1.1.1:5000")}) == 1


@pytest.mark.parametrize(
    ("model", "value", "key", "problem", "remedy"),
    [
        (Input, "", "", "IFACE:[SOURCE@]ADDRESS:PORT", "eth0:239.1.1.1:5000"),
        (Input, "eth0", "", "IFACE:[SOURCE@]ADDRESS:PORT", "eth0:239.1.1.1:5000"),
        (Input, "239.1.1.1:5000", "", "no interface", "eth0:239.1.1.1:5000"),
        (Input, "10.1.1.9@232.1.1.1:5000", "", "no interface", "eth0:"),
        (Input, "eth0:239.1.1.1", "", "no port", "eth0:239.1.1.1:5000"),
        (Input, "eth0:239.1.1.1:", "", "no port", "eth0:239.1.1.1:5000"),
        (Input, "eth1:[ff3e::1]", "", "no port", "eth1:[ff3e::1]:5000"),
        (Input, "eth1:[ff3e::1:6000", "", "no ']'", "eth1:[ff3e::1]:6000"),
        (Input, "eth1:ff3e::1:6000", "", "without brackets", "eth1:[ff3e::1]:6000"),
        (Input, "eth1:ff3e::1", "", "without brackets", "eth1:[ff3e::1]:6000"),
        (Input, "eth1:ff3e::/64:6000", "", "without brackets", "eth1:[ff3e::/64]:6000"),
        (Input, "eth1:[ff3e::]/64:6000", "", "outside the brackets", "[ff3e::/64]:6000"),
        (Input, "eth0:239.1.1.1:0", "port", "0", "5000"),
        (Input, "eth0:239.1.1.1:65536", "port", "65536", "5000"),
        (Input, "eth0:239.1.1.1:http", "port", "http", "5000"),
        (Input, "eth0:239.1.1.1:5000-4000", "port", "backwards", "4000-5000"),
        (Input, "eth0:239.1.1.1:5000-", "port", "''", "5000"),
        (Input, "eth0:239.1.1:5000", "address", "239.1.1", "239.1.1.1"),
        (Input, "eth0:239.1.2.3/16:5000", "address", "host bits", "239.1.0.0/16"),
        (Input, "eth0:10.0.0.0/8:5000", "address", "10.0.0.0/8", "224.0.0.0/4"),
        (Input, "eth0:224.0.0.0/3:5000", "address", "224.0.0.0/3", "224.0.0.0/4"),
        (Input, "eth0:0.0.0.0:5000", "address", "0.0.0.0", "host"),
        (Input, "eth0:255.255.255.255:5000", "address", "255.255.255.255", "host"),
        (Input, "eth0:*:5000", "address", "needs an address", "239.0.0.0/8"),
        (Input, "eth0:[fe80::1%eth0]:5000", "address", "zone", "%"),
        (Input, "eth0:2001:db8::1@[ff3e::1]:5", "", "without brackets", "eth0:[2001:db8::1]@[ff3e::1]:5"),
        (Input, "eth0:[2001:db8::1]@239.1.1.1:5", "source", "IPv6", "IPv4"),
        (Input, "eth0:10.0.0.1@[ff3e::1]:5", "source", "IPv4", "IPv6"),
        (Input, "eth0:239.0.0.1@239.1.1.1:5", "source", "can't be a source", "sender"),
        (Input, "eth0:10.0.0.1/8@239.1.1.1:5", "source", "host bits", "10.0.0.0/8"),
        (Input, "eth0.20@eth0:239.1.1.1:5", "interface", "'@'", "'eth0.20'"),
        (Input, "eth/0:239.1.1.1:5", "interface", "eth/0", "ip link"),
        (Input, "et h0:239.1.1.1:5", "interface", "et h0", "ip link"),
        (Input, "a-name-too-long-:239.1.1.1:5", "interface", "a-name-too-long-", "15"),
        (Input, "..:239.1.1.1:5", "interface", "'..'", "ip link"),
        (Input, "eth0:239.1.1.1:5,vlna=20", "vlna", "vlna", "did you mean 'vlan'?"),
        (Input, "eth0:239.1.1.1:5,ports=7", "ports", "'ports'", "did you mean 'port'?"),
        (Input, "eth0:239.1.1.1:5,ttl=8", "ttl", "an input has no key 'ttl'", "vlan"),
        (Input, "eth0:239.1.1.1:5,vlan=0", "vlan", "0", "20"),
        (Input, "eth0:239.1.1.1:5,vlan=4095", "vlan", "4094", "20"),
        (Input, "eth0:239.1.1.1:5,vlan=1,vlan=2", "", "twice", "once"),
        (Input, "eth0:1.1.1.1@239.1.1.1:5,source=1.1.1.1", "", "twice", "once"),
        (Input, "eth0:239.1.1.1:5,", "", "not an option", "key=value"),
        (Input, "eth0:239.1.1.1:5,vlan", "", "'vlan'", "key=value"),
        (Input, 5, "", "5", "eth0:239.1.1.1:5000"),
        (Input, None, "", "nothing", "eth0:239.1.1.1:5000"),
        (Input, {"interface": "eth0", "address": "239.1.1.1"}, "port", "missing", "port = 5000"),
        (Input, {"interface": 3, "address": "239.1.1.1", "port": 5}, "interface", "3", "eth0"),
        (Input, {"interface": "e", "address": "239.1.1.1", "port": True}, "port", "true", "5000"),
        (Input, {"interface": "e", "address": "239.1.1.1", "port": 5.0}, "port", "5.0", "5000"),
        (Input, {"interface": "e", "address": ["239.1.1.1"], "port": 5}, "address", "an array", "239.1.1.1"),
        (Output, "eth1:239.1.1.1:5000-5999", "port", "range", "*"),
        (Output, "eth1:239.1.1.0/24:5000", "address", "prefix", "*"),
        (Output, "eth1:nohost:5000", "address", "nohost", "239.1.1.1"),
        (Output, "eth1:0.0.0.0:5000", "address", "0.0.0.0", "host"),
        (Output, "eth1:1.2.3.4:0", "port", "0", "5000"),
        (Output, "eth1:1.2.3.4:5,ttl=0", "ttl", "0", "1 to 255"),
        (Output, "eth1:1.2.3.4:5,ttl=256", "ttl", "256", "1 to 255"),
        (Output, "eth1:1.2.3.4:5,ttl=-1", "ttl", "-1", "1 to 255"),
        (Output, "eth1:1.2.3.4:5,ttl=٣", "ttl", "٣", "1 to 255"),
        (Output, "eth1:1.2.3.4:5,dscp=64", "dscp", "64", "0 to 63"),
        (Output, "eth1:1.2.3.4:5,source=2001:db8::1", "source", "IPv6", "IPv4"),
        (Output, "eth1:1.2.3.4:5,source=keeep", "source", "keeep", "keep"),
        (Output, "eth1:1.2.3.4:5,source=239.1.1.1", "source", "239.1.1.1", "egress"),
        (Output, "eth1:1.2.3.4:5,tll=5", "tll", "tll", "did you mean 'ttl'?"),
        (Output, "eth1", "", "IFACE:[SOURCE@]ADDRESS:PORT", "eth1:239.2.2.2:6000"),
    ],
)
def test_a_refusal_names_key_problem_and_remedy(
    model: type[Endpoint], value: object, key: str, problem: str, remedy: str
) -> None:
    (issue,) = complaints(model, value)
    assert issue.key == key
    assert problem in issue.problem
    assert remedy in issue.remedy


def test_all_faults_of_one_endpoint_come_at_once() -> None:
    issues = complaints(Output, "eth/1:nohost:0,ttl=0,dscp=99,source=x,colour=red")
    assert [issue.key for issue in issues] == ["interface", "address", "port", "ttl", "source", "dscp", "colour"]


def test_text_that_unicode_cannot_encode_is_refused_like_any_other() -> None:
    for model in ENDPOINTS:
        assert complaints(model, "eth0\ud800:239.1.1.1:5000,\ud800=1")
        assert complaints(model, {"interface": "\ud800", "address": "\ud800", "port": "\ud800", "\ud800": 1})


@given(input_tables())
def test_input_table_and_text_say_the_same(table: Table) -> None:
    made = Input.model_validate(table)
    assert Input.parse(str(made)) == made
    assert str(Input.parse(str(made))) == str(made)


@given(output_tables())
def test_output_table_and_text_say_the_same(table: Table) -> None:
    made = Output.model_validate(table)
    assert Output.parse(str(made)) == made
    assert str(Output.parse(str(made))) == str(made)


def check_total(model: type[Endpoint], value: Any) -> None:
    """value is an endpoint or is refused with a remedy; it never raises anything else."""
    try:
        made = model.model_validate(value)
    except ValidationError as error:
        assert all(issue.problem and issue.remedy for issue in issues_of(error))
    else:
        assert model.parse(str(made)) == made


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
keys = st.sampled_from(["interface", "address", "port", "source", "vlan", "ttl", "dscp", "low"])
pieces = st.sampled_from(["eth0", ":", "@", "[", "]", "*", ",", "/", "-", "=", "239.1.1.1", "ff3e::1", "5", "ttl"])


@given(st.sampled_from(ENDPOINTS), st.text() | st.lists(pieces).map("".join))
def test_no_text_is_a_surprise(model: type[Endpoint], text: str) -> None:
    check_total(model, text)


@given(st.sampled_from(ENDPOINTS), anything | st.dictionaries(keys | st.text(), anything))
def test_no_value_is_a_surprise(model: type[Endpoint], value: object) -> None:
    check_total(model, value)
