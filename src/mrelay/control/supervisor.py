"""The supervisor, as control sees it: requests out, answers and events in.

Owns the channel that control was started with. Called by main (events) and by reconcile and main
(requests). Nothing blocks; a request is awaited until the supervisor answers it.
"""

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from socket import socket

from mrelay.control.channel import AsyncChannel
from mrelay.messages import (
    CloseTap,
    Done,
    Failed,
    FastPath,
    Grant,
    Held,
    Listen,
    Listening,
    ListeningTcp,
    ListenTcp,
    LogLevel,
    Message,
    OpenTap,
    Outcome,
    ProbeNeighbour,
    Quit,
    Ready,
    Release,
    Reload,
    Resource,
    Setup,
    StartWorkers,
    Status,
    Stop,
    TapFilter,
    Tapped,
    WorkerDown,
    WorkerUp,
    XdpTargets,
    parts,
)
from mrelay.wire import BadMessage

EVENTS = (Setup, Held, WorkerUp, WorkerDown, FastPath, XdpTargets, Reload, Stop)
Event = Setup | Held | WorkerUp | WorkerDown | FastPath | XdpTargets | Reload | Stop
Request = Grant | Release | Listen | ListenTcp | StartWorkers | OpenTap
Answer = tuple[Outcome | Done | Listening | ListeningTcp | Tapped, list[int]]


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
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._channel = AsyncChannel(sock, self._receive, self._ended)

    async def grant(self, what: Sequence[Resource]) -> dict[Resource, RequestFailed]:
        """Have them opened, in this order; those that could not be, and why."""
        return await self._ask([Grant(next(self._ids), part) for part in parts(what)])

    async def release(self, what: Sequence[Resource]) -> dict[Resource, RequestFailed]:
        """Have them closed, in this order; what could not be done of that, and why."""
        return await self._ask([Release(next(self._ids), part) for part in parts(what)])

    async def _ask(self, requests: Sequence[Grant | Release]) -> dict[Resource, RequestFailed]:
        answers = await asyncio.gather(*map(self._request, requests))
        return {
            request.what[refusal.at]: RequestFailed(refusal.errno, refusal.problem, refusal.remedy)
            for request, (outcome, _) in zip(requests, answers, strict=True)
            for refusal in (outcome.refused if isinstance(outcome, Outcome) else ())
        }

    async def listen(self, mode: int, group: str | None) -> tuple[Listening, int]:
        """The API's listening socket, made with this file mode and group: whose file it is, its descriptor."""
        answer, fds = await self._request(Listen(next(self._ids), mode, group))
        if not isinstance(answer, Listening) or len(fds) != 1:
            raise RequestFailed(0, f"the supervisor sent {len(fds)} descriptors for the API socket", "")
        return answer, fds[0]

    async def listen_tcp(self, address: str, port: int) -> int:
        """A socket that listens there, first asked for before `listen`: its descriptor; raises RequestFailed."""
        answer, fds = await self._request(ListenTcp(next(self._ids), address, port))
        if not isinstance(answer, ListeningTcp) or len(fds) != 1:
            raise RequestFailed(0, f"the supervisor sent {len(fds)} descriptors for the TCP socket", "")
        return fds[0]

    async def start_workers(self, cores: tuple[int, ...], flow_limit: int, busy_poll: int, *, fast: bool) -> None:
        """Have one worker started on each core; those that run already go on. `fast`: after the event FastPath."""
        await self._request(StartWorkers(next(self._ids), cores, flow_limit, busy_poll, fast))

    async def open_tap(self, ifindex: int, what: TapFilter) -> tuple[int, int]:
        """A tap's number and descriptor; raises RequestFailed. Close the descriptor before `close_tap`."""
        answer, fds = await self._request(OpenTap(next(self._ids), ifindex, what))
        if not isinstance(answer, Tapped) or len(fds) != 1:
            raise BadMessage(f"{type(answer).__name__} with {len(fds)} descriptors for a tap")
        return answer.id, fds[0]

    def close_tap(self, number: int) -> None:
        """Have no more frames come to it."""
        self._channel.send(CloseTap(number))

    def probe(self, ifindex: int, address: str) -> None:
        """Have the kernel find out whether this neighbour is still there."""
        self._channel.send(ProbeNeighbour(ifindex, address))

    def quit(self, *, keep: bool) -> None:
        """Stop the relay; `keep`: but for what the fast path carries."""
        self._channel.send(Quit(keep))

    def ready(self, status: str) -> None:
        """Say that every rule that can be up is up, or that a reload is over."""
        self._channel.send(Ready(status))

    def status(self, text: str) -> None:
        """Say how things are now."""
        self._channel.send(Status(text))

    def log_level(self, role: str, level: str) -> None:
        """Have this role log from that level on."""
        self._channel.send(LogLevel(role, level))

    async def _request(self, message: Request) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[message.id] = future
        self._channel.send(message)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._unwanted(*future.result())
            raise
        finally:
            del self._waiting[message.id]

    def _unwanted(
        self, answer: Outcome | Done | Listening | ListeningTcp | Tapped | Failed, fds: list[int]
    ) -> None:
        """Whoever asked was cancelled."""
        for fd in fds:
            os.close(fd)
        if isinstance(answer, Tapped):
            self.close_tap(answer.id)

    def _receive(self, message: Message, fds: list[int]) -> None:
        if isinstance(message, Outcome | Done | Listening | ListeningTcp | Tapped | Failed):
            self._answer(message, fds)
        elif isinstance(message, EVENTS):
            self._on_event(message, fds)
        else:
            raise BadMessage(f"the supervisor sent {type(message).__name__}")

    def _answer(self, answer: Outcome | Done | Listening | ListeningTcp | Tapped | Failed, fds: list[int]) -> None:
        future = self._waiting.get(answer.id)
        if future is None or future.done():
            self._unwanted(answer, fds)
        elif isinstance(answer, Failed):
            future.set_exception(RequestFailed(answer.errno, answer.problem, answer.remedy))
        else:
            future.set_result((answer, fds))

    def _ended(self, error: BadMessage | None) -> None:
        for future in self._waiting.values():
            future.cancel()
        self._on_end(error)
