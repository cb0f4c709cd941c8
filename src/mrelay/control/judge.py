"""Which frames belong to a capture, and for which reason the slow path would drop one.

Owns both judgements, made anew from the frame and the running rules; pure. Called by observe. What depends on more
than the frame (a full ring, a rate, a neighbour, a route's MTU) can't be known here, nor which fragments were put
together.
"""

from collections.abc import Callable
from ipaddress import ip_network
from typing import NamedTuple

from mrelay.control.tap import Frame
from mrelay.counters import DROP_REASONS, FRAGMENT, LOOP, NO_OUTPUT, NO_RULE, TTL_EXPIRED
from mrelay.model.endpoint import Input, Network, Output
from mrelay.model.ruleset import NOWHERE, RETURNED, FlowKey, Route, RuleSet
from mrelay.protocols.frame import Packet, datagram, walk
from mrelay.worker.parse import parse

Judge = Callable[[Frame], str | None]


class Aim(NamedTuple):
    """Packets to be captured: None is any."""

    address: Network
    low: int
    high: int
    source: Network | None = None
    vlan: int | None = None

    def hits(self, packet: Packet, port: int | None) -> bool:
        """Whether the packet is meant; `port` None is not known, in a later fragment."""
        return (
            packet.family == self.address.version
            and int(self.address.network_address) <= packet.destination <= int(self.address.broadcast_address)
            and (port is None or self.low <= port <= self.high)
            and (self.vlan is None or self.vlan == (packet.vlans[0] if packet.vlans else 0))
            and (self.source is None or _contains(self.source, packet.source))
        )


def _contains(network: Network, address: int) -> bool:
    return int(network.network_address) <= address <= int(network.broadcast_address)


def aim_in(origin: Input) -> Aim:
    """What an input takes."""
    return Aim(origin.address, origin.ports.low, origin.ports.high, origin.source, origin.vlan or 0)


def aim_out(output: Output, origin: Input) -> Aim:
    """What an output sends of an input's datagrams, as far as its addresses tell."""
    low, high = (output.port, output.port) if output.port else (origin.ports.low, origin.ports.high)
    return Aim(ip_network(output.address) if output.address else origin.address, low, high)


def hits_one_of(aims: list[Aim]) -> Judge:
    """Takes the frames that one of these means, without a comment."""

    def judge(frame: Frame) -> str | None:
        packet = walk(frame.data, frame.network, frame.vlan)
        found = None if packet is None else datagram(frame.data, packet, pieces=True)
        if packet is None or (found is None and not packet.later):
            return None
        port = None if found is None else found.port
        return "" if any(aim.hits(packet, port) for aim in aims) else None

    return judge


def anything_to(origin: Input) -> Aim:
    """What is addressed to a group or host that an input names, whether or not the input takes it."""
    return Aim(origin.address, 0, 65535)


def dropped(rules: RuleSet, ifindex: int, aim: Aim) -> Judge:
    """Takes those of the frames meant that the slow path would drop; the comment says why."""

    def judge(frame: Frame) -> str | None:
        packet = walk(frame.data, frame.network, frame.vlan)
        if packet is not None:
            found = datagram(frame.data, packet)
            if not aim.hits(packet, None if found is None else found.port):
                return None
        reason = _reason(rules, ifindex, frame)
        return None if reason is None else f"dropped: {DROP_REASONS[reason]}"

    return judge


def _reason(rules: RuleSet, ifindex: int, frame: Frame) -> int | None:
    if frame.length > len(frame.data):
        return None  # cut by us: what it holds is not known
    found = parse(memoryview(frame.data), frame.network, len(frame.data))
    if isinstance(found, int):
        # The kernel puts fragments of IPv4 together; if it can't, they are counted nowhere.
        return None if found == FRAGMENT and frame.data[frame.network] >> 4 == 4 else found
    key = FlowKey(ifindex, frame.vlan or 0, found.family, found.source, found.group, found.port)
    return _route_reason(rules.resolve(key), found.hop >> 8)


def _route_reason(route: Route, ttl: int) -> int | None:
    if route is NOWHERE:
        return NO_RULE
    if route is RETURNED:
        return LOOP
    if not route.destinations:
        return NO_OUTPUT
    expired = ttl <= 1 and all(goal.ttl == 0 for goal in route.destinations)
    return TTL_EXPIRED if expired else None
