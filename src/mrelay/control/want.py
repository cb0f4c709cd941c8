"""What the rules ask for, given the links there are: resources, compiled rules, states.

Owns the step from an operator's rule to the objects that the supervisor opens and the rules that the
workers run. Pure: no I/O; the numbers of egress sockets come from an EgressIds. Called by reconcile.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from types import MappingProxyType
from typing import Literal

from mrelay.control.fastpath import carries
from mrelay.control.links import Link, LinkTable
from mrelay.control.slots import Slots
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
from mrelay.model.endpoint import Input, Network, Output, is_multicast
from mrelay.model.rate import Rate
from mrelay.model.rule import Rule

UP = "up"
STARTING = "waiting: starting"  # shown until the first pass that knows the rule is over
MAX_JOINS = 256  # groups of one prefix; more would fill the interface's filter and every querier's table
MAX_HOLDS = 64  # ports of one unicast input

EgressKey = tuple[int, int, str | None, int | None, str, int]  # OpenEgress without its number
Own = Mapping[int, tuple[int, ...]]  # by family, addresses of this relay
_NO_RATE = Rate()


@dataclass(frozen=True, slots=True)
class Settings:
    """The config's `gro`, `ring_slots` and `xdp`; `fast`: there is a fast path."""

    gro: Literal["auto"] | bool
    ring_slots: int
    fast: bool = False
    xdp: bool | tuple[str, ...] = False

    def wants_xdp(self, interface: str) -> bool:
        """Whether the operator wants it there."""
        return self.xdp if isinstance(self.xdp, bool) else interface in self.xdp


class EgressIds:
    """Numbers for egress sockets: the same one for the same socket, also after a restart of control.

    Sockets that differ in TTL or DSCP alone are two, though the supervisor opens them alike. Numbers in `avoid`,
    as long as they are in it, are not handed out.
    """

    def __init__(self, held: Iterable[OpenEgress] = (), avoid: AbstractSet[int] = frozenset()) -> None:
        self._avoid = avoid
        self._ids: dict[tuple[EgressKey, int, int], int] = {}
        self._held: dict[EgressKey, list[int]] = {}
        for egress in sorted(held, key=lambda egress: egress.output):
            self._held.setdefault(_egress_key(egress), []).append(egress.output)
        self._used = {number for numbers in self._held.values() for number in numbers}
        self._next = 0  # no number below is free

    def get(self, key: EgressKey, ttl: int, dscp: int) -> int:
        """The number of this socket, a new one if need be."""
        full = key, ttl, dscp
        number = self._ids.get(full)
        if number is None:
            number = self._ids[full] = self._held[key].pop(0) if self._held.get(key) else self._lowest_free()
            self._used.add(number)
        return number

    def keep(self, numbers: AbstractSet[int]) -> None:
        """Only these are still open; the others may be handed out again."""
        self._ids = {full: number for full, number in self._ids.items() if number in numbers}
        self._held.clear()
        self._used, self._next = set(numbers), 0

    def _lowest_free(self) -> int:
        while self._next in self._used or self._next in self._avoid:
            self._next += 1
        return self._next


def _egress_key(egress: OpenEgress) -> EgressKey:
    return egress.ifindex, egress.family, egress.address, egress.port, egress.source, egress.epoch


@dataclass(frozen=True, slots=True)
class OutputPlan:
    """One output: its text, what keeps it waiting (or UP); its socket and compiled form if the link exists."""

    text: str
    state: str
    egress: OpenEgress | None = None
    compiled: RuleOutput | None = None


@dataclass(frozen=True, slots=True)
class RulePlan:
    """One rule: what keeps its input waiting (or UP), and what it needs if the input's link exists.

    What is open stays so while a link is down, so that a flap costs nothing; it is only not opened then.
    `compiled` has the outputs whose links are up, whether or not their sockets could be opened.
    """

    rule: Rule
    state: str
    outputs: tuple[OutputPlan, ...]
    ingress: OpenIngress | None = None
    beside: frozenset[Resource] = frozenset()  # wanted with the ring: GRO, XDP, held ports
    joins: frozenset[JoinGroup] = frozenset()  # wanted once it is
    compiled: PutRule | None = None
    warning: str = ""

    def needs(self) -> set[Resource]:
        """All that may be open for this rule."""
        found: set[Resource] = {output.egress for output in self.outputs if output.egress}
        return found.union(self.beside, self.joins, (self.ingress,) if self.ingress else ())

    def sockets(self) -> set[Resource]:
        """What is to be opened first."""
        return {output.egress for output in self.outputs if output.egress and output.state == UP}

    def opens(self) -> set[Resource]:
        """What else is to be opened before the workers get the rule."""
        return {self.ingress, *self.beside} if self.ingress and self.state == UP else set()


def own_sources(rules: Iterable[Rule], links: LinkTable) -> Own:
    """By family, the addresses that this relay sends from, as integers in order."""
    found: dict[int, set[int]] = {4: set(), 6: set()}
    senders = {(output.interface, output.source) for rule in rules for output in rule.to}
    for interface, source in senders:
        link = links.by_name.get(interface)
        if link is not None and source == "egress":
            found[4] |= {int(IPv4Address(address)) for address in link.ipv4}
            found[6] |= {int(IPv6Address(address)) for address in link.ipv6}
        elif not isinstance(source, str):
            found[source.version].add(int(source))
    return {family: tuple(sorted(addresses)) for family, addresses in found.items()}


def plan_rules(
    rules: Sequence[Rule],
    slots: Slots,
    links: LinkTable,
    ids: EgressIds,
    settings: Settings,
    own: Own,
    known: Mapping[str, RulePlan] = MappingProxyType({}),
) -> list[RulePlan]:
    """A plan for each rule. `own` as own_sources says; `known` are plans made with the same links and `own`, to be
    used again.
    """
    return [
        old
        if (old := known.get(rule.name)) and old.rule is rule
        else _plan_rule(rule, slots, links, ids, settings, own)
        for rule in rules
    ]


def _plan_rule(
    rule: Rule, slots: Slots, links: LinkTable, ids: EgressIds, settings: Settings, own: Own
) -> RulePlan:
    outputs = tuple([_plan_output(rule, output, slots, links, ids) for output in rule.to])
    link = links.by_name.get(rule.from_.interface)
    state = _link_state(rule.from_.interface, link)
    if link is None:
        return RulePlan(rule, state, outputs)
    joins, warning = _joins(rule.from_, link.ifindex)
    ingress, beside = _at_ingress(link, rule.from_.address.version, settings)
    if holds := _holds(rule.from_):
        beside |= holds
    compiled = _compile(rule, slots.rules[rule.name].index, link, outputs, own)
    return RulePlan(rule, state, outputs, ingress, beside, joins, compiled, warning)


@lru_cache(1024)
def _at_ingress(link: Link, family: int, settings: Settings) -> tuple[OpenIngress, frozenset[Resource]]:
    """The ring, behind the fast path, which takes one for each family, or before all (0); GRO; and XDP, if any."""
    beside: set[Resource] = {SetGro(link.ifindex)} if settings.gro else set()  # "auto" or true
    if not settings.fast or not carries(link):
        return OpenIngress(link.ifindex, settings.ring_slots, 0), frozenset(beside)
    if settings.wants_xdp(link.name):
        beside.add(AttachXdp(link.ifindex))
    return OpenIngress(link.ifindex, settings.ring_slots, family), frozenset(beside)


def _link_state(name: str, link: Link | None) -> str:
    if link is None:
        return f"waiting: no interface {name}"
    return UP if link.up else f"waiting: {name} is down"


def _holds(origin: Input) -> frozenset[Resource]:
    if is_multicast(origin.address) or origin.ports.high - origin.ports.low >= MAX_HOLDS:
        return frozenset()
    address = str(origin.address.network_address)
    return frozenset(HoldUnicast(address, port) for port in range(origin.ports.low, origin.ports.high + 1))


def _joins(origin: Input, ifindex: int) -> tuple[frozenset[JoinGroup], str]:
    """The memberships that an input needs, and what to warn of."""
    if not is_multicast(origin.address):
        return frozenset(), ""
    if _size(origin.address) > MAX_JOINS:
        return frozenset(), "prefix too wide to join: relies on static membership or an upstream querier"
    source = str(origin.source.network_address) if origin.source and _is_host(origin.source) else None
    groups = (origin.address.network_address + place for place in range(_size(origin.address)))
    return frozenset([JoinGroup(ifindex, str(group), source) for group in groups]), ""


def _is_host(network: Network) -> bool:
    return network.prefixlen == network.max_prefixlen


def _compile(rule: Rule, slot: int, link: Link, outputs: Iterable[OutputPlan], own: Own) -> PutRule:
    """On the loopback interface everything comes from an address of ours, so there it says nothing."""
    origin, rate = rule.from_, rule.rate or _NO_RATE
    family = origin.address.version
    group_low, group_high = _range(origin.address)
    source_low, source_high = (
        _range(origin.source) if origin.source else (0, (1 << origin.address.max_prefixlen) - 1)
    )
    return PutRule(
        rule=slot,
        ifindex=link.ifindex,
        vlan=origin.vlan or 0,
        family=family,
        group_low=group_low,
        group_high=group_high,
        port_low=origin.ports.low,
        port_high=origin.ports.high,
        source_low=source_low,
        source_high=source_high,
        pps=rate.packets,
        bps=rate.bits,
        own=() if rule.allow_loop or link.loopback else own[family],
        outputs=tuple([output.compiled for output in outputs if output.compiled and output.state == UP]),
    )


def _range(network: Network) -> tuple[int, int]:
    low = int(network.network_address)
    return low, low + _size(network) - 1


def _size(network: Network) -> int:
    """Its `num_addresses`, which makes an object for each network."""
    return 1 << network.max_prefixlen - network.prefixlen


def _plan_output(rule: Rule, output: Output, slots: Slots, links: LinkTable, ids: EgressIds) -> OutputPlan:
    text = output.text
    link = links.by_name.get(output.interface)
    state = _link_state(output.interface, link)
    if link is None:
        return OutputPlan(text, state)
    family = (output.address or rule.from_.address).version
    address = str(output.address) if output.address else None
    ttl, dscp = output.ttl or 0, -1 if output.dscp is None else output.dscp
    key = link.ifindex, family, address, output.port, str(output.source), links.epoch(link.ifindex, family)
    egress = OpenEgress(ids.get(key, ttl, dscp), *key)
    compiled = RuleOutput(
        link=slots.links[rule.name, text].index,
        output=egress.output,
        oif=link.ifindex,
        address=address,
        port=output.port,
        ttl=ttl,
        dscp=dscp,
        keep=output.source == "keep",
    )
    return OutputPlan(text, state, egress, compiled)


# ---- and what becomes of a plan, given what could be opened -----------------------------------------


def in_force(plan: RulePlan, have: AbstractSet[Resource]) -> PutRule | None:
    """The rule for the workers with the outputs that are there, if any; None when it has no ring."""
    if plan.compiled is None or plan.ingress not in have:
        return None
    here = tuple([o.compiled for o in plan.outputs if o.compiled and o.state == UP and o.egress in have])
    return plan.compiled if len(here) == len(plan.compiled.outputs) else replace(plan.compiled, outputs=here)


def output_state(output: OutputPlan, trouble: Mapping[Resource, str]) -> str:
    """UP, or what keeps it from being so. `trouble`: what is amiss with resources that were asked for."""
    if output.state != UP or output.egress is None:
        return output.state
    return trouble.get(output.egress, UP)


def rule_state(plan: RulePlan, trouble: Mapping[Resource, str]) -> str:
    """UP when all of the rule is; else the first thing that is amiss: input, memberships, outputs."""
    if plan.state != UP:
        return plan.state
    if not trouble:
        return next((output.state for output in plan.outputs if output.state != UP), UP)
    outputs = {output.egress for output in plan.outputs}
    problems = [trouble[what] for what in sorted(plan.needs() & trouble.keys() - outputs, key=str)]
    states = [output_state(output, trouble) for output in plan.outputs]
    return next(iter(problems + [state for state in states if state != UP]), UP)
