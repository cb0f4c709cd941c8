"""Server-sent events (WHATWG HTML §9.2): the event log as a response that doesn't end.

Owns how many clients may follow, and when one is too slow. Made by api. A client has a place in the log and no
queue of its own; one that takes nothing for a while, or falls behind what is kept, is dropped and may come back
with Last-Event-ID. Nothing blocks.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mrelay.control.events import Cursor, Event, EventLog, Page

log = logging.getLogger(__name__)

MOST: Final = 32  # clients
KEEP_ALIVE: Final = 15.0  # seconds between comments when nothing happens, so that nobody in between hangs up
PATIENCE: Final = 10.0  # seconds in which a client must take what it is sent
PIECE: Final = 200  # events in one piece
RETRY: Final = 1000  # milliseconds until a browser comes back


class EventStream(Response):
    """What follows `after`, or what happens from now on, until the client leaves or the relay stops.

    `abort` closes the connection without waiting for the client; `refusal` is what one too many is answered.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: EventLog, after: Cursor | None, abort: Callable[[], None], refusal: Response
    ) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._events, self._abort, self._refusal = events, abort, refusal
        self._after = after or Cursor(events.run, events.last)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if self._events.followers >= MOST:
            await self._refusal(scope, receive, send)
            return
        self._events.followers += 1
        try:
            await self._follow(receive, send)
        finally:
            self._events.followers -= 1

    async def _follow(self, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            outcome, _ = await asyncio.gather(sending, leaving, return_exceptions=True)
        if isinstance(outcome, TimeoutError):
            log.info("an event stream's client is too slow, dropped")
            self._abort()
        elif isinstance(outcome, Exception):
            raise outcome

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        page = self._events.page(self._after, PIECE)
        place = page.events[0].id - 1 if page.events else page.last
        await _send(send, _hello(page, place))
        while not self._events.closed:
            page = self._events.page(Cursor(page.run, place), PIECE)
            if page.missed:
                raise TimeoutError
            if page.events:
                place = page.events[-1].id
                await _send(send, "".join(_of(page.run, event) for event in page.events))
            else:
                await self._wait(send, place)
        await send({"type": "http.response.body", "body": b""})

    async def _wait(self, send: Send, place: int) -> None:
        try:
            async with asyncio.timeout(KEEP_ALIVE):
                await self._events.news(place)
        except TimeoutError:
            await _send(send, ": keep-alive\n\n")


async def _send(send: Send, text: str) -> None:
    """TimeoutError when the client takes too long."""
    message: Message = {"type": "http.response.body", "body": text.encode(), "more_body": True}
    async with asyncio.timeout(PATIENCE):
        await send(message)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _hello(page: Page, place: int) -> str:
    """What a client must know first: which run this is, and what it has missed."""
    return f"retry: {RETRY}\n" + _message(page.run, place, "hello", page.model_dump_json(exclude={"events"}))


def _of(run: str, event: Event) -> str:
    return _message(run, event.id, event.type, event.model_dump_json())


def _message(run: str, place: int, kind: str, data: str) -> str:
    return f"id: {Cursor(run, place)}\nevent: {kind}\ndata: {data}\n\n"
