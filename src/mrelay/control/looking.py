"""How why looks at traffic: which taps it opens on which interfaces, and when.

Owns the course of one look. First the rule's own groups on its own interface; if nothing comes, all groups there,
and the rule's groups on other interfaces; if not even then, the groups are joined anew, for a switch that has
stopped sending them starts again when it hears that. Called by why. Nothing blocks.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from mrelay.control.supervisor import RequestFailed, Supervisor
from mrelay.control.tap import Tap, TapFilter, open_tap
from mrelay.diagnose.traffic import GROUP, Traffic, differs, matching
from mrelay.model.endpoint import Input

LEAST: Final = 0.5  # seconds that a look takes at least
_STEP: Final = 0.1  # seconds between two looks at the counters
_WIDER: Final = 0.35  # of the time: then look wider, if nothing came
_ANEW: Final = 0.6  # of the time: then join anew
_REVIVAL: Final = 1.0  # seconds at least that are given to joining anew
_ALIVE: Final = 3  # datagrams after joining anew that show that this is what brought them
_MOST_OTHERS: Final = 8  # interfaces besides the rule's own
_HEADERS: Final = 128  # bytes of a frame that hold them all
_ALL_GROUPS: Final = {4: "224.0.0.0/4", 6: "ff00::/8"}


class Look:
    """One look at the traffic for an input. Its fields are what came of it, as diagnose.facts.Facts has them."""

    def __init__(self, supervisor: Supervisor, wanted: Input, ifindex: int) -> None:
        self._supervisor, self._wanted, self._ifindex = supervisor, wanted, ifindex
        self.traffic, self.elsewhere, self.blind, self.revived = Traffic(), dict[str, int](), "", False
        self._tasks: list[asyncio.Task[None]] = []
        self._wide = Traffic()
        self._open = asyncio.Event()

    async def run(
        self,
        seconds: float,
        rising: Callable[[], Awaitable[bool]],
        others: Iterable[tuple[int, str]],
        join_anew: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """Look for `seconds`, shorter when all is well: the rule's counter is `rising`, and its frames were seen.

        `others`: further interfaces that may have the stream. `join_anew`: None when that makes no sense.
        """
        self._start(self._ifindex, TapFilter((str(self._wanted.address),)), self.traffic)
        try:
            await self._open.wait()
            began = time.monotonic()
            least = began + min(LEAST, seconds)
            if await self._well(least, began + _WIDER * seconds, rising):
                return
            if not self._anything():
                self._look_wider(others)
            if await self._well(least, began + _ANEW * seconds, rising):
                return
            anew = join_anew is not None and not self._anything() and not await rising()
            if anew and join_anew is not None:
                await join_anew()
            deadline = max(began + seconds, time.monotonic() + _REVIVAL) if anew else began + seconds
            await self._well(least, deadline, rising)
            self.revived = anew and self._came() >= _ALIVE
        finally:
            await self._stop()
            for name, stream in self._wide.streams.items():
                self.traffic.streams.setdefault(name, stream)

    async def _well(self, least: float, deadline: float, rising: Callable[[], Awaitable[bool]]) -> bool:
        """Look on until the deadline, or until nothing more is to be found out."""
        while (now := time.monotonic()) < deadline:
            await asyncio.sleep(min(_STEP, deadline - now))
            if now >= least and (self._came() or self.blind) and await rising():
                return True
        return False

    def _came(self) -> int:
        return sum(stream.datagrams for _, stream in matching(self.traffic, self._wanted))

    def _anything(self) -> bool:
        """Whether anything came that is for the group, be it not quite what is wanted."""
        ours = (GROUP not in differs(name, self._wanted) for name in self.traffic.streams)
        return bool(self.elsewhere) or any(ours)

    def _look_wider(self, others: Iterable[tuple[int, str]]) -> None:
        if self._wanted.address.is_multicast:
            every = TapFilter((_ALL_GROUPS[self._wanted.address.version],), snap=_HEADERS)
            self._start(self._ifindex, every, self._wide)
        own = TapFilter((str(self._wanted.address),), snap=_HEADERS)
        for ifindex, name in list(others)[:_MOST_OTHERS]:
            self._tasks.append(asyncio.create_task(self._listen_elsewhere(ifindex, name, own)))

    def _start(self, ifindex: int, what: TapFilter, traffic: Traffic) -> None:
        self._tasks.append(asyncio.create_task(self._listen(ifindex, what, traffic)))

    async def _listen(self, ifindex: int, what: TapFilter, traffic: Traffic) -> None:
        try:
            async with open_tap(self._supervisor, ifindex, what) as tap:
                self._open.set()
                await _take(tap, traffic)
        except RequestFailed as error:
            self.blind = str(error)
            self._open.set()

    async def _listen_elsewhere(self, ifindex: int, name: str, what: TapFilter) -> None:
        traffic = Traffic()
        try:
            async with open_tap(self._supervisor, ifindex, what) as tap:
                async for frame in tap:
                    traffic.add(frame)
                    here = sum(s.datagrams for n, s in traffic.streams.items() if not differs(n, self._wanted))
                    if here:
                        self.elsewhere[name] = here
        except RequestFailed:
            return  # it went meanwhile, or too many look: the rule's own interface is what matters

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _take(tap: Tap, traffic: Traffic) -> None:
    try:
        async for frame in tap:
            traffic.add(frame)
    finally:
        traffic.lost += tap.dropped
