"""The supervisor, as control sees it: requests out, answers and events in.

Owns the channel that control was started with. Called by main (events) and by reconcile and main
(requests). Nothing blocks; a request is awaited until the supervisor answers it.
"""

import asyncio
import itertools
import os
from collections.abc import Callable
from socket import socket

from mrelay.control.channel import AsyncChannel
from mrelay.messages import (
    BadMessage,
    Done,
    Failed,
    Grant,
    Held,
    Listen,
    Message,
    Ready,
    Release,
    Reload,
    Resource,
    Setup,
    StartWorkers,
    Stop,
    WorkerDown,
    WorkerUp,
)

EVENTS = (Setup, Held, WorkerUp, WorkerDown, Reload, Stop)
Event = Setup | Held | WorkerUp | WorkerDown | Reload | Stop
Request = Grant | Release | Listen | StartWorkers


class RequestFailed(Exception):
    """The supervisor could not do it: why, and what would help."""

    def __init__(self, errno: int, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} — {remedy}" if remedy else problem)
        self.errno, self.problem, self.remedy = errno, problem, remedy


class Supervisor:
    """`on_event` gets each event with its descriptors; `on_end` as in AsyncChannel."""

    def __init__(
        self,
        sock: socket,
        on_event: Callable[[Event, list[int]], None],
        on_end: Callable[[BadMessage | None], None],
    ) -> None:
        self._on_event = on_event
        self._on_end = on_end
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[list[int]]] = {}
        self._channel = AsyncChannel(sock, self._receive, self._ended)

    async def grant(self, what: Resource) -> None:
        """Have it opened; raises RequestFailed."""
        await self._request(Grant(next(self._ids), what))

    async def release(self, what: Resource) -> None:
        """Have it closed; raises RequestFailed."""
        await self._request(Release(next(self._ids), what))

    async def listen(self, mode: int, group: str | None) -> int:
        """The descriptor of the API's listening socket, made with this file mode and group."""
        fds = await self._request(Listen(next(self._ids), mode, group))
        if len(fds) != 1:
            raise RequestFailed(0, f"the supervisor sent {len(fds)} descriptors for the API socket", "")
        return fds[0]

    async def start_workers(self, cores: tuple[int, ...], flow_limit: int) -> None:
        """Have one worker started on each core; those that run already go on."""
        await self._request(StartWorkers(next(self._ids), cores, flow_limit))

    def ready(self, status: str) -> None:
        """Say that every rule that can be up is up."""
        self._channel.send(Ready(status))

    async def _request(self, message: Request) -> list[int]:
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting[message.id] = future
        self._channel.send(message)
        try:
            return await future
        finally:
            del self._waiting[message.id]

    def _receive(self, message: Message, fds: list[int]) -> None:
        if isinstance(message, Done):
            self._answer(message.id, fds, None)
        elif isinstance(message, Failed):
            self._answer(message.id, fds, RequestFailed(message.errno, message.problem, message.remedy))
        elif isinstance(message, EVENTS):
            self._on_event(message, fds)
        else:
            raise BadMessage(f"the supervisor sent {type(message).__name__}")

    def _answer(self, request: int, fds: list[int], error: RequestFailed | None) -> None:
        future = self._waiting.get(request)
        if future is None or future.done():  # whoever asked was cancelled
            for fd in fds:
                os.close(fd)
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(fds)

    def _ended(self, error: BadMessage | None) -> None:
        for future in self._waiting.values():
            future.cancel()
        self._on_end(error)
