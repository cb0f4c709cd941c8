"""What is known of one rule when it is judged. Pure; filled by control/why.py, read by stages.py."""

from dataclasses import dataclass
from typing import Final

from mrelay.diagnose.traffic import Traffic
from mrelay.model.endpoint import Input
from mrelay.model.rule import Rule

UP: Final = "up"  # the state of an output that is
RUNNING: Final = "running"  # of a worker


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge of this host that frames for the rule pass. `querier`: it asks for memberships itself."""

    name: str
    snooping: bool
    querier: bool


@dataclass(frozen=True, slots=True)
class Link:
    """An interface; without an `ifindex` it is not there. `like`: names of others that may be meant."""

    name: str
    ifindex: int = 0
    up: bool = False
    carrier: bool = False
    multicast: bool = False
    mtu: int = 0
    bridge: Bridge | None = None
    like: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Join:
    """A membership that the rule needs. `problem`: why it was not made. `member`: what /proc/net says, if it
    does.
    """

    group: str
    source: str | None
    problem: str
    member: bool | None


@dataclass(frozen=True, slots=True)
class Querier:
    """Who asks for memberships on a segment: when last (seconds ago), which protocol and version."""

    address: str
    protocol: str
    ago: float


@dataclass(frozen=True, slots=True)
class Member:
    """A host that reported a group on an egress interface, seconds ago."""

    address: str
    protocol: str
    ago: float


@dataclass(frozen=True, slots=True)
class Output:
    """One output. `sent`, `errors`: while we looked; `total`: since the rule was added. `members` of its group."""

    to: str
    state: str
    link: Link
    family: int
    multicast: bool
    ttl: int | None
    sent: int
    errors: int
    total: int
    members: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Worker:
    """`restarts` are those while we looked."""

    number: int
    state: str
    restarts: int


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow of the rule, as in /v1/flows."""

    source: str
    group: str
    port: int
    engine: str
    why: str
    packets: int


@dataclass(frozen=True, slots=True)
class Facts:
    """`others`: inputs of other rules. `state`: the rule's, as in /v1/rules. `deaf`: why the link's rings could
    not be opened, if so. `counted`: datagrams that it took while we looked, of `total` so far.

    `traffic` is what its ingress interface got, `elsewhere` what others got for its groups; `blind`: why we could
    not look. `listened`: seconds that queries and reports have been listened to there. `revived`: frames came when
    the groups were joined anew, and before that none did. `own`: addresses that the relay sends from. `drops`: by
    reason, of all rules, while we looked. `last`, `since`: seconds ago that it last took a datagram, and began to.
    """

    rule: Rule
    others: tuple[Input, ...]
    seconds: float
    state: str
    link: Link
    deaf: str
    joins: tuple[Join, ...]
    warning: str
    querier: Querier | None
    listened: float
    traffic: Traffic
    elsewhere: dict[str, int]
    blind: str
    revived: bool
    own: frozenset[int]
    workers: tuple[Worker, ...]
    flows: tuple[Flow, ...]
    outputs: tuple[Output, ...]
    drops: dict[str, int]
    counted: int
    total: int
    last: float | None
    since: float | None
