"""Control's requests to the supervisor, when whoever asked has left before the answer came."""

import asyncio
import contextlib
import os
import socket

import pytest

from mrelay.control.supervisor import Supervisor
from mrelay.messages import CloseTap, OpenTap, TapFilter, Tapped
from mrelay.wire import Channel, channel_pair

WHAT = TapFilter((), membership=True)


@pytest.mark.parametrize("late", [True, False], ids=["before the answer", "with the answer there, unread"])
def test_a_tap_that_nobody_waits_for_is_closed(late: bool) -> None:
    """Its descriptor here, and the tap in the supervisor, of which there are only so many."""
    asyncio.run(asyncio.wait_for(_leave(late=late), 10))


async def _leave(*, late: bool) -> None:
    theirs, ours = channel_pair()
    supervisor = Supervisor(ours, lambda *_: None, lambda _: None)
    with contextlib.closing(Channel(theirs)) as channel:
        asking = asyncio.create_task(supervisor.open_tap(1, WHAT))
        await asyncio.sleep(0)
        asked, _ = received(channel)
        assert isinstance(asked, OpenTap)
        tap, far = socket.socketpair()
        if late:
            asking.cancel()
            await asyncio.wait([asking])
        channel.send(Tapped(asked.id), [tap.fileno()])
        tap.close()
        if not late:
            while asked.id in supervisor._waiting and not supervisor._waiting[asked.id].done():
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.wait([asking])
        assert asking.cancelled()
        await asyncio.get_running_loop().run_in_executor(None, theirs.settimeout, 5)
        closed, _ = await asyncio.to_thread(received, channel)
        assert closed == CloseTap(asked.id)
        with far:
            assert await asyncio.to_thread(far.recv, 1) == b"", "the descriptor is closed as well"


def received(channel: Channel) -> tuple[object, list[int]]:
    got = channel.receive()
    assert got is not None
    for fd in got[1]:
        os.close(fd)
    return got
