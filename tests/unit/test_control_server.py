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
    ticks: list[int] = []

    async def serve() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            served = server.Server(_application, listening, server.UnixProtocol)
            look = served.on_tick

            async def counted(counter: int) -> bool:
                served.server_state.default_headers = []
                ended = await look(counter)
                ticks.append(len(served.server_state.default_headers))
                return ended

            monkeypatch.setattr(served, "on_tick", counted)
            task = asyncio.create_task(served.run_here())
            while len(ticks) < 3:
                await asyncio.sleep(0.001)
            monkeypatch.setattr(server, "_TICK", 3600.0)
            looks = len(ticks)
            while len(ticks) == looks:  # the first wait that is an hour long begins
                await asyncio.sleep(0.001)
            await served.stop()
            await task

    monkeypatch.setattr(server, "_TICK", 0.001)
    asyncio.run(asyncio.wait_for(serve(), 30))
    assert all(ticks), "each has a date"
