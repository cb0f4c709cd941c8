"""Which flows the fast path can carry: the one place that says so.

Pure. Workers install by it; control shows by it why a flow takes the slow path.
"""

from ipaddress import ip_address
from typing import Final

from mrelay.ebpf.layout import PASSED, WHY_NOT_XDP
from mrelay.model.ruleset import FlowKey, Route, address_text

# What flow.state (bpf/mrelay.h, enum passed) means for people: why its last frame took the slow path.
REASONS: dict[str, str] = dict(
    zip(
        PASSED,
        (
            "new to the fast path",
            "unusual headers",
            "TTL ran out",
            "longer than an output's MTU",
            "an output's next hop is not known",
            "waiting until the slow path has sent what it holds",
            "a program on this host listens to it",
        ),
        strict=True,
    )
)

CHOSEN: Final = 'engine = "uring"'  # why there is no fast path where none is wanted
# The same for flow.why (enum why_not_xdp): why tc carried it, and not XDP.
NOT_XDP: dict[str, str] = dict(
    zip(
        WHY_NOT_XDP,
        (
            "no XDP: it saw no frame yet",
            "no XDP: waiting until tc has sent what it holds",
            "no XDP: more outputs, or lists of interfaces, than it has room for",
            "no XDP: the output's interface takes no frames from it",
            "no XDP: the sender, on this host, leaves checksums to hardware",
            "no XDP: the driver lets it put no data before a frame",
            "no XDP: its rule has a rate",
            "no XDP: GRO merges its frames, not 16 in a row came single",
        ),
        strict=True,
    )
)


def why_not(key: FlowKey, route: Route) -> str:
    """Why the fast path can't carry the flow along this route; empty when it can."""
    if not route.destinations:
        return "it goes nowhere"
    if route.limited and (len(route.limited) > 1 or 0 in route.masks):
        return "of several rules, some have a rate"
    for to in route.destinations:
        if to.family != key.family:
            return f"an output is IPv{to.family}, the stream IPv{key.family}"
        # `*`: which address a unicast input's datagrams go to is only known from them, and so the next hop.
        if to.address == address_text(key.family, key.group) and not ip_address(to.address).is_multicast:
            return "an output keeps a unicast address"
    return ""
