"""The HTTP server: uvicorn on sockets that the supervisor opened, in control's event loop.

Owns its settings, and the limits on who comes over TCP: anyone may, so none can keep the others out for long.
Called by main and tcp. Nothing here blocks.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from socket import socket
from typing import Any, Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mrelay.control.peers import peer_of

GRACE: Final = 1  # seconds for requests under way when the relay stops
MAX_CONNECTIONS: Final = 128  # over TCP; a browser opens six, and two for events
MAX_HEADERS: Final = 16 << 10  # bytes
PATIENCE: Final = 10.0  # seconds for a whole request to come, and for an answer to go on
_TICK: Final = 1.0  # seconds, the Date header's own unit


class UnixProtocol(H11Protocol):
    """HTTP/1.1 that knows who is there: `request.state.peer`; `request.state.abort()` hangs up."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        """As asyncio calls it."""
        super().connection_made(transport)
        peer = peer_of(transport.get_extra_info("socket"))
        self.app_state = {**self.app_state, "peer": peer, "abort": transport.abort}


class TcpProtocol(H11Protocol):
    """HTTP/1.1 for anyone: so many connections, and none that only waits."""

    def __init__(self, *arguments: Any, **rest: Any) -> None:
        super().__init__(*arguments, **rest)
        self._deadlines: dict[str, asyncio.TimerHandle] = {}  # of what is waited for

    def _wait_for(self, what: str) -> None:
        if what not in self._deadlines:
            self._deadlines[what] = self.loop.call_later(PATIENCE, self.transport.abort)

    def _has_come(self, what: str) -> None:
        if what in self._deadlines:
            self._deadlines.pop(what).cancel()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        """As asyncio calls it."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._wait_for("request")

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it. Many small pieces buy no time."""
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait_for("request")
        else:
            self._has_come("request")

    def pause_writing(self) -> None:
        """As asyncio calls it: the client does not read."""
        super().pause_writing()
        self._wait_for("room")

    def resume_writing(self) -> None:
        """As asyncio calls it."""
        super().resume_writing()
        self._has_come("room")

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio calls it."""
        self._has_come("request")
        self._has_come("room")
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Serves on a listening socket, in the loop that runs already, and leaves signals alone."""

    def __init__(self, app: ASGIApp, listening: socket, protocol: type[H11Protocol]) -> None:
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",  # a module that is imported late, so preload does it early
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # who a proxy says is there decides nothing
            h11_max_incomplete_event_size=MAX_HEADERS,
            timeout_graceful_shutdown=GRACE,
        )
        super().__init__(config)
        self._listening = listening
        self._ending, self._stopped = asyncio.Event(), asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the supervisor's."""
        yield

    async def main_loop(self) -> None:
        """uvicorn's own looks ten times a second whether to end, half of what an idle control did; this is told.

        A tick renews the responses' date.
        """
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), _TICK)

    async def run_here(self) -> None:
        """Serve until `stop`."""
        await self.serve([self._listening])
        self._stopped.set()

    async def stop(self) -> None:
        """Let requests under way end, and stop."""
        self.should_exit = True
        self._ending.set()
        await self._stopped.wait()
