"""From rules and links to what is wanted: compiled rules, resources, states. Pure."""

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

import pytest

from mrelay.control.links import Link, LinkTable
from mrelay.control.slots import Slots
from mrelay.control.want import (
    UP,
    EgressIds,
    RulePlan,
    Settings,
    in_force,
    output_state,
    own_sources,
    plan_rules,
    rule_state,
)
from mrelay.messages import (
    AttachXdp,
    HoldUnicast,
    JoinGroup,
    OpenEgress,
    OpenIngress,
    PutRule,
    Resource,
    RuleOutput,
    SetGro,
)
from mrelay.model.rule import Rule

ETH0 = Link("eth0", 2, True, frozenset({"10.0.0.1"}))
ETH1 = Link("eth1", 3, True, frozenset({"10.0.1.1"}), frozenset({"fe80::1"}))
ETHER = replace(ETH0, kind=1)
DOWN = Link("eth2", 4, False)
ANY_V4 = 0, 2**32 - 1
GRO = Settings("auto", 1024)
NONE_FAILED: dict[Resource, str] = {}


def rule(origin: str, *outputs: str, name: str = "r") -> Rule:
    return Rule.model_validate({"name": name, "from": origin, "to": list(outputs)})


def plan(
    *rules: Rule,
    links: Iterable[Link] = (ETH0, ETH1, DOWN),
    settings: Settings = GRO,
    ids: EgressIds | None = None,
) -> list[RulePlan]:
    table = LinkTable()
    table.update(links)
    slots = Slots().updated(rules, lambda slots: [(0, 0)] * len(slots), lambda slots: [(0, 0, 0)] * len(slots))
    return plan_rules(rules, slots, table, ids or EgressIds(), settings, own_sources(rules, table))


def compiled(origin: str, *outputs: str) -> PutRule:
    (one,) = plan(rule(origin, *outputs))
    put = in_force(one, one.needs())
    assert put is not None
    return replace(put, own=())


def joins(origin: str) -> set[JoinGroup]:
    return set(plan(rule(origin, "eth1:10.9.9.9:6000"))[0].joins)


def number(text: str) -> int:
    return int(ip_address(text))


def test_a_plain_rule_compiled() -> None:
    put = compiled("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000")
    group = number("239.1.1.1")
    output = RuleOutput(link=0, output=0, oif=3, address="239.2.2.2", port=6000, ttl=0, dscp=-1, keep=False)
    assert put == PutRule(0, 2, 0, 4, group, group, 5000, 5000, *ANY_V4, 0, 0, (), (output,))


def test_ranges_are_closed() -> None:
    put = compiled("eth0:10.1.0.0/16@239.1.0.0/16:5000-5999,vlan=20", "eth1:*:*")
    assert (put.vlan, put.ifindex, put.port_low, put.port_high) == (20, 2, 5000, 5999)
    assert (put.group_low, put.group_high) == (number("239.1.0.0"), number("239.1.255.255"))
    assert (put.source_low, put.source_high) == (number("10.1.0.0"), number("10.1.255.255"))


def test_output_options() -> None:
    put = compiled("eth0:239.1.1.1:5000", "eth1:*:*,ttl=7,source=keep,dscp=46")
    assert put.outputs == (
        RuleOutput(link=0, output=0, oif=3, address=None, port=None, ttl=7, dscp=46, keep=True),
    )


def test_a_star_output_has_the_inputs_family() -> None:
    (one,) = plan(rule("eth0:[ff3e::1]:5000", "eth1:*:*"))
    assert one.outputs[0].egress == OpenEgress(0, 3, 6, None, None, "egress", 0)
    assert one.compiled is not None
    assert one.compiled.family == 6
    assert (one.compiled.source_low, one.compiled.source_high) == (0, 2**128 - 1)


def test_an_outputs_own_family_wins() -> None:
    (one,) = plan(rule("eth0:[ff3e::1]:5000", "eth1:10.2.2.2:6000,source=10.0.1.1"))
    assert one.outputs[0].egress == OpenEgress(0, 3, 4, "10.2.2.2", 6000, "10.0.1.1", 0)


def test_what_a_multicast_rule_opens_and_joins() -> None:
    (one,) = plan(rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000"))
    egress = OpenEgress(0, 3, 4, "239.2.2.2", 6000, "egress", 0)
    assert one.sockets() == {egress}
    assert one.opens() == {OpenIngress(2, 1024), SetGro(2)}
    assert one.needs() == one.sockets() | one.opens() | {JoinGroup(2, "239.1.1.1", None)}


def test_no_gro_when_it_is_off() -> None:
    (one,) = plan(rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000"), settings=Settings(False, 1024))
    assert not any(isinstance(what, SetGro) for what in one.needs())


@pytest.mark.parametrize(("xdp", "wanted"), [(False, False), (True, True), (("eth0",), True), (("eth1",), False)])
def test_xdp_where_it_was_asked_for(xdp: bool | tuple[str, ...], wanted: bool) -> None:
    settings = Settings("auto", 1024, fast=True, xdp=xdp)
    (one,) = plan(rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000"), links=(ETHER, ETH1), settings=settings)
    assert (AttachXdp(2) in one.opens()) is wanted


def test_no_xdp_without_the_program_at_tc() -> None:
    rules = rule("eth0:239.1.1.1:5000", "eth1:*:*"), rule("eth0:239.1.1.1:5000,vlan=7", "eth1:*:*", name="tagged")
    for one in plan(*rules, links=(ETHER, ETH1), settings=Settings("auto", 1024, xdp=True)):
        assert AttachXdp(2) not in one.needs()


def test_a_host_source_is_joined_a_source_prefix_is_not() -> None:
    assert joins("eth0:10.1.1.9@232.1.1.1:5000") == {JoinGroup(2, "232.1.1.1", "10.1.1.9")}
    assert joins("eth0:10.1.1.0/24@232.1.1.1:5000") == {JoinGroup(2, "232.1.1.1", None)}


def test_a_prefix_is_joined_group_by_group_up_to_256() -> None:
    found = joins("eth0:239.1.1.0/24:5000")
    assert len(found) == 256
    assert {JoinGroup(2, "239.1.1.0", None), JoinGroup(2, "239.1.1.255", None)} <= found
    (wide,) = plan(rule("eth0:239.0.0.0/23:5000", "eth1:*:*"))
    assert wide.joins == frozenset()
    assert "too wide to join" in wide.warning
    assert rule_state(wide, NONE_FAILED) == UP


def test_a_unicast_input_is_held_not_joined() -> None:
    (one,) = plan(rule("eth0:10.0.0.1:5000-5001", "eth1:239.2.2.2:6000"))
    assert one.joins == frozenset()
    assert {HoldUnicast("10.0.0.1", 5000), HoldUnicast("10.0.0.1", 5001)} <= one.opens()
    (many,) = plan(rule("eth0:10.0.0.1:5000-5064", "eth1:239.2.2.2:6000"))
    assert not any(isinstance(what, HoldUnicast) for what in many.needs())


def test_a_missing_interface_is_waited_for() -> None:
    (one,) = plan(rule("eth9:239.1.1.1:5000", "eth1:239.2.2.2:6000"))
    assert rule_state(one, NONE_FAILED) == "waiting: no interface eth9"
    assert in_force(one, one.needs()) is None
    (one,) = plan(rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000", "eth9:239.2.2.2:6000"))
    assert rule_state(one, NONE_FAILED) == "waiting: no interface eth9"
    assert [output_state(output, NONE_FAILED) for output in one.outputs] == [
        UP,
        "waiting: no interface eth9",
    ]
    put = in_force(one, one.needs())
    assert put is not None
    assert [output.oif for output in put.outputs] == [3]


def test_a_link_that_is_down_opens_nothing_and_closes_nothing() -> None:
    (one,) = plan(rule("eth2:239.1.1.1:5000", "eth2:239.2.2.2:6000"))
    assert rule_state(one, NONE_FAILED) == "waiting: eth2 is down"
    assert one.sockets() | one.opens() == set()
    assert OpenIngress(4, 1024) in one.needs()
    put = in_force(one, one.needs())
    assert put is not None
    assert put.outputs == ()


def test_what_failed_shows_and_is_left_out() -> None:
    (one,) = plan(rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000", "eth1:239.2.2.3:6000"))
    bad = one.outputs[0].egress
    assert bad is not None
    put = in_force(one, one.needs() - {bad})
    assert put is not None
    assert [output.address for output in put.outputs] == ["239.2.2.3"]
    assert rule_state(one, {bad: "error: no route"}) == "error: no route"
    assert output_state(one.outputs[0], {bad: "error: no route"}) == "error: no route"
    assert output_state(one.outputs[1], {bad: "error: no route"}) == UP
    assert in_force(one, one.needs() - {OpenIngress(2, 1024)}) is None


def test_what_the_relay_sends_from_is_not_taken_back_unless_allowed() -> None:
    table = LinkTable()
    table.update([ETH0, ETH1, DOWN])
    rules = (
        rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000", name="a"),
        rule("eth1:239.1.1.2:5000", "eth0:239.2.2.2:6000,source=10.9.9.9", "eth0:*:*,source=keep", name="b"),
    )
    own = own_sources(rules, table)
    assert own == {
        4: (int(ip_address("10.0.1.1")), int(ip_address("10.9.9.9"))),
        6: (int(ip_address("fe80::1")),),
    }
    one, _ = plan(*rules)
    put = in_force(one, one.needs())
    assert put is not None
    assert put.own == own[4]
    exempt = rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000").model_copy(update={"allow_loop": True})
    loopback = Link("lo", 1, True, frozenset({"127.0.0.1"}), loopback=True)
    for free in plan(
        exempt, rule("lo:239.1.1.1:5000", "eth1:239.2.2.2:6000", name="l"), links=(loopback, ETH0, ETH1)
    ):
        put = in_force(free, free.needs())
        assert put is not None
        assert put.own == ()


def test_equal_outputs_share_a_socket_unequal_ttl_does_not() -> None:
    plans = plan(
        rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000", name="a"),
        rule("eth0:239.1.1.2:5000", "eth1:239.2.2.2:6000", name="b"),
        rule("eth0:239.1.1.3:5000", "eth1:239.2.2.2:6000,ttl=9", name="c"),
    )
    a, b, c = (one.outputs[0].egress for one in plans)
    assert a == b
    assert a != c
    links = {one.outputs[0].compiled.link for one in plans if one.outputs[0].compiled}
    assert links == {0, 1, 2}


def test_egress_numbers_survive_a_restart_of_control() -> None:
    one = rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000", "eth1:239.2.2.3:6000", name="a")
    ids = EgressIds()
    plan(rule("eth0:239.9.9.9:5000", "eth1:239.9.9.8:1"), ids=ids)
    before = [output.egress for output in plan(one, ids=ids)[0].outputs]
    again = EgressIds(egress for egress in reversed(before) if egress)
    assert [output.egress for output in plan(one, ids=again)[0].outputs] == before


def test_egress_numbers_are_used_again_only_when_closed() -> None:
    ids = EgressIds()
    first = plan(rule("eth0:239.1.1.1:5000", "eth1:239.2.2.2:6000"), ids=ids)[0].outputs[0].egress
    second = plan(rule("eth0:239.1.1.1:5000", "eth1:239.2.2.3:6000"), ids=ids)[0].outputs[0].egress
    assert first and second
    assert (first.output, second.output) == (0, 1)
    ids.keep({1})
    third = plan(rule("eth0:239.1.1.1:5000", "eth1:239.2.2.4:6000"), ids=ids)[0].outputs[0].egress
    assert third
    assert third.output == 0
