"""The HTTP server: renews its date while it waits to be told to end."""

import asyncio
import socket
from typing import Any

import pytest

from mrelay.control import server


async def _application(scope: Any, receive: Any, send: Any) -> None:
    """Answers nothing."""


def test_the_date_is_renewed_until_it_is_told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn's own loop looks ten times a second; this one once, and ends at once."""

    async def serve() -> None:
        ticks: asyncio.Queue[int] = asyncio.Queue()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            served = server.Server(_application, listening, server.UnixProtocol)
            look = served.on_tick

            async def counted(counter: int) -> bool:
                served.server_state.default_headers = []
                ended = await look(counter)
                await ticks.put(len(served.server_state.default_headers))
                return ended

            monkeypatch.setattr(served, "on_tick", counted)
            task = asyncio.create_task(served.run_here())
            for _ in range(3):
                assert await ticks.get(), "it has a date"
            monkeypatch.setattr(server, "_TICK", 3600.0)
            while not ticks.empty():
                ticks.get_nowait()
            await ticks.get()  # the next wait is an hour long
            await served.stop()
            await task

    monkeypatch.setattr(server, "_TICK", 0.001)
    asyncio.run(asyncio.wait_for(serve(), 30))
