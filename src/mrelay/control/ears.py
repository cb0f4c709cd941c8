"""The taps that stream health listens on: as many as the rules need, opened, listened to in turns, and closed.

Owns each tap's reader. Called by streams, which says what is wanted and gets the frames. A reader takes a quarter
of a processor at most (control.tap); what does not fit is told as missed. Nothing blocks.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from mrelay.control.supervisor import RequestFailed, Supervisor
from mrelay.control.tap import Frame, Tap, TapFilter, open_tap

LISTEN: Final = 1.0  # seconds of each turn that a sampled stream is heard for
RETRY: Final = 5.0  # seconds until a tap is asked for again


class Ear(NamedTuple):
    """A tap: where, and one second in how many it listens. Also its key."""

    ifindex: int
    sample: int


@dataclass(slots=True)
class Hearing:
    """A wanted tap: what it lets in, its reader, and why nothing is heard. Times are monotonic seconds."""

    networks: tuple[str, ...]
    task: asyncio.Task[None] | None = None
    problem: str = "not listening yet"
    listening: bool = False
    over: float = 0.0  # when the last whole turn was


class Ears:
    """All of them, by key.

    `on_frame` gets each frame; `on_miss` how many were missed before the next one, 0 when listening begins.
    """

    def __init__(
        self, supervisor: Supervisor, on_frame: Callable[[Ear, Frame], None], on_miss: Callable[[Ear, int], None]
    ) -> None:
        self._supervisor, self._on_frame, self._on_miss = supervisor, on_frame, on_miss
        self.by_key: dict[Ear, Hearing] = {}

    def want(self, wanted: Mapping[Ear, tuple[str, ...]]) -> None:
        """Listen there, to these networks, and nowhere else."""
        for ear in [ear for ear, hearing in self.by_key.items() if wanted.get(ear) != hearing.networks]:
            self._end(self.by_key.pop(ear))
        for ear in wanted.keys() - self.by_key.keys():
            hearing = self.by_key[ear] = Hearing(wanted[ear])
            hearing.task = asyncio.create_task(self._listen(ear, hearing))

    def check(self) -> None:
        """Raise what a reader failed with: a bug, since it never ends by itself."""
        for hearing in self.by_key.values():
            if hearing.task is not None and hearing.task.done():
                hearing.task.result()

    def close(self) -> None:
        """End all."""
        self.want({})

    @staticmethod
    def _end(hearing: Hearing) -> None:
        if hearing.task is not None:
            hearing.task.cancel()

    async def _listen(self, ear: Ear, hearing: Hearing) -> None:
        """Until cancelled; what goes wrong is kept for the view, and tried again."""
        while True:
            try:
                async with open_tap(self._supervisor, ear.ifindex, TapFilter(hearing.networks)) as tap:
                    hearing.problem, hearing.listening = "", True
                    self._on_miss(ear, 0)
                    await self._hear(ear, tap)
                hearing.listening, hearing.over = False, time.monotonic()
                await asyncio.sleep((ear.sample - 1) * LISTEN)
            except (RequestFailed, OSError) as error:
                hearing.problem, hearing.listening = str(error), False
                await asyncio.sleep(RETRY)

    async def _hear(self, ear: Ear, tap: Tap) -> None:
        """For ever, or for a turn."""
        missed = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if ear.sample == 1 else LISTEN):
                async for frame in tap:
                    if frame.missed != missed:
                        self._on_miss(ear, frame.missed - missed)
                        missed = frame.missed
                    self._on_frame(ear, frame)
