"""What is said of memberships on the segments that rules name: who asks, and who wants which group.

Owns a tap for IGMP and one for MLD on each such interface, behind the fast path, so that streams it carries cost
nothing. Queries come every two minutes, so this must listen all the time to know. Called by main (its task, and
what to follow) and why. Nothing blocks.
"""

import asyncio
import errno
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

from mrelay.control.fastpath import is_group
from mrelay.control.supervisor import RequestFailed, Supervisor
from mrelay.control.tap import Frame, TapFilter, open_tap
from mrelay.control.want import RulePlan
from mrelay.diagnose.facts import Member, Querier
from mrelay.diagnose.traffic import address_text
from mrelay.protocols.frame import walk
from mrelay.protocols.membership import Query, messages

log = logging.getLogger(__name__)

MOST_SEGMENTS: Final = 16  # interfaces that are listened to
MOST_MEMBERS: Final = 4096  # (group, host) of one segment, those heard last
FORGET: Final = 260.0  # seconds, RFC 3376 §8.4: who has not reported for so long is gone
_SETTLE: Final = 1.0  # seconds: opening taps keeps the supervisor busy, and rules come first
_AGAIN: Final = 5.0  # seconds until a tap that could not be opened, or whose interface went, is tried again
_PROTOCOL: Final = {4: "IGMPv", 6: "MLDv"}


class _Heard(NamedTuple):
    at: float  # monotonic
    version: int


class Segment:
    """What was heard on one interface. `since` (monotonic): from when on it was listened to."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self._queriers: dict[int, tuple[int, _Heard]] = {}  # by family: address
        self._members: OrderedDict[tuple[int, int, int], _Heard] = OrderedDict()  # family, group, host

    def hear(self, frame: Frame) -> None:
        """Take note of one frame."""
        packet = walk(frame.data, frame.network, frame.vlan)
        if packet is None:
            return
        now = time.monotonic()
        for said in messages(frame.data, packet):
            heard = _Heard(now, said.version)
            if isinstance(said, Query):
                if packet.source:  # RFC 4541 §2.1.1: a switch's own proxy query is from 0.0.0.0
                    self._queriers[packet.family] = packet.source, heard
                continue
            who = packet.family, said.group, packet.source
            self._members.pop(who, None)
            if not said.leaves:
                self._members[who] = heard
                if len(self._members) > MOST_MEMBERS:
                    self._members.popitem(last=False)

    def querier(self, family: int) -> Querier | None:
        """Who asked last, if it was not too long ago."""
        address, heard = self._queriers.get(family, (0, _Heard(0.0, 0)))
        ago = time.monotonic() - heard.at
        if not address or ago > FORGET:
            return None
        return Querier(address_text(family, address), f"{_PROTOCOL[family]}{heard.version}", ago)

    def members(self, family: int, group: int) -> tuple[Member, ...]:
        """Who reported the group and has not left it since."""
        now = time.monotonic()
        return tuple(
            Member(address_text(family, host), f"{_PROTOCOL[family]}{heard.version}", now - heard.at)
            for (of, which, host), heard in self._members.items()
            if (of, which) == (family, group) and now - heard.at <= FORGET
        )


def segments_of(plans: Sequence[RulePlan]) -> list[int]:
    """Numbers of the interfaces where memberships matter to rules: those that groups come from, then go to.

    Only the first of them if they are too many.
    """
    groups = [plan for plan in plans if plan.ingress is not None and plan.joins]
    egresses = [output.egress for plan in plans for output in plan.outputs if output.egress]
    into = [egress.ifindex for egress in egresses if egress.address and is_group(egress.address)]
    both = [plan.ingress.ifindex for plan in groups if plan.ingress] + into
    return list(dict.fromkeys(both))[:MOST_SEGMENTS]


class Segments:
    """By interface number, those that are listened to."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._plans: Sequence[RulePlan] = ()
        self._changed = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.by_ifindex: dict[int, Segment] = {}

    def follow(self, plans: Sequence[RulePlan]) -> None:
        """Listen where these rules' memberships matter, soon."""
        self._plans = plans
        self._changed.set()

    async def run(self) -> None:
        """Listen until cancelled."""
        try:
            while True:
                await self._changed.wait()
                await asyncio.sleep(_SETTLE)
                self._changed.clear()
                self._adjust(frozenset(segments_of(self._plans)))
        finally:
            self._adjust(frozenset())

    def _adjust(self, wanted: AbstractSet[int]) -> None:
        for ifindex in self._tasks.keys() - wanted:
            self._tasks.pop(ifindex).cancel()
            self.by_ifindex.pop(ifindex, None)
        for ifindex in wanted - self._tasks.keys():
            self._tasks[ifindex] = asyncio.create_task(self._listen(ifindex))

    async def _listen(self, ifindex: int) -> None:
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    segment = Segment()
                    for family in (4, 6):
                        group.create_task(self._hear(ifindex, family, segment))
            except* RequestFailed as errors:  # the interface is gone, or too many look at traffic
                log.debug("interface %d: no memberships are heard: %s", ifindex, errors.exceptions[0])
            self.by_ifindex.pop(ifindex, None)
            await asyncio.sleep(_AGAIN)

    async def _hear(self, ifindex: int, family: int, segment: Segment) -> None:
        what = TapFilter((), membership=True, family=family, snap=2048)
        async with open_tap(self._supervisor, ifindex, what) as tap:
            self.by_ifindex[ifindex] = segment
            async for frame in tap:
                segment.hear(frame)
        raise RequestFailed(errno.ENODEV, "the interface is gone", "")  # the other tap is opened anew as well
