"""Captures: the frames of a rule or a flow as pcapng, as they come in, go out, or are dropped.

Owns a capture's taps and bounds. Called by observe; the client gets blocks as they come, and what it is too slow
for is counted by the taps. Nothing blocks.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Final, NamedTuple

from mrelay import __version__
from mrelay.control.fastpath import ARPHRD_ETHER
from mrelay.control.links import Link
from mrelay.control.supervisor import Supervisor
from mrelay.control.tap import Frame, Tap, TapFilter, open_tap
from mrelay.protocols import pcapng
from mrelay.protocols.unmerge import unmerged

QUEUE: Final = 256  # batches of blocks that wait for the client
CHUNK: Final = 64  # of these given to the client at once
SNAP: Final = 65535


class Side(NamedTuple):
    """One interface of a capture. `comment_of`: None leaves a frame out, else the comment of its packets."""

    link: Link
    networks: tuple[str, ...]
    outgoing: bool
    comment_of: Callable[[Frame], str | None]


class Bounds(NamedTuple):
    """When a capture ends, whichever comes first."""

    seconds: float
    packets: int
    bytes: int  # of the file


class Blocks(NamedTuple):
    """Whole pcapng blocks, and how many packets they hold."""

    data: bytes
    packets: int


async def capture(supervisor: Supervisor, sides: list[Side], bounds: Bounds) -> AsyncGenerator[bytes, None]:
    """A pcapng file, piece by piece. RequestFailed before the first when there can't be a tap."""
    queue: asyncio.Queue[Blocks] = asyncio.Queue(QUEUE)
    counts = [0] * len(sides)
    async with contextlib.AsyncExitStack() as stack:
        taps = [
            await stack.enter_async_context(open_tap(supervisor, side.link.ifindex, _filter(side)))
            for side in sides
        ]
        readers = [asyncio.create_task(_read(tap, at, sides[at], queue, counts)) for at, tap in enumerate(taps)]
        try:
            head = pcapng.section(f"mrelay {__version__}")
            head += b"".join(pcapng.interface(side.link.name, _link_type(side.link), SNAP) for side in sides)
            yield head
            async for data in _bounded(queue, bounds, len(head)):
                yield data
            yield b"".join(_end(at, tap, counts[at]) for at, tap in enumerate(taps))
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)


async def _read(tap: Tap, at: int, side: Side, queue: asyncio.Queue[Blocks], counts: list[int]) -> None:
    """Turn frames into blocks; waits while the client has enough to do."""
    async for frame in tap:
        comment = side.comment_of(frame)
        if comment is not None:
            blocks = _blocks(at, side.link, frame, comment)
            counts[at] += blocks.packets
            await queue.put(blocks)


def _blocks(at: int, link: Link, frame: Frame, comment: str) -> Blocks:
    """A frame's datagrams, each a packet."""
    packets = list(
        unmerged(frame.data, frame.network, vlan=frame.vlan, segment=frame.segment, complete=frame.complete)
    )
    cut = 0 if _has_ethernet(link) else frame.network
    beyond = max(0, frame.length - len(frame.data)) if len(packets) == 1 else 0
    data = b"".join(
        pcapng.packet(
            at, frame.time, data[cut:], len(data) - cut + beyond, comment=comment, outgoing=frame.outgoing
        )
        for data in packets
    )
    return Blocks(data, len(packets))


async def _bounded(queue: asyncio.Queue[Blocks], bounds: Bounds, size: int) -> AsyncGenerator[bytes, None]:
    """Blocks as they come, several at once, until a bound is reached."""
    packets, deadline = 0, time.monotonic() + bounds.seconds
    chunk: list[bytes] = []
    while packets < bounds.packets:
        try:
            # No asyncio.timeout around a yield: it would end whoever reads us.
            blocks = await asyncio.wait_for(queue.get(), deadline - time.monotonic())
        except TimeoutError:
            break
        blocks = _first(blocks, min(blocks.packets, bounds.packets - packets))
        if size + len(blocks.data) > bounds.bytes:
            break
        packets, size = packets + blocks.packets, size + len(blocks.data)
        chunk.append(blocks.data)
        if queue.empty() or len(chunk) >= CHUNK:
            yield b"".join(chunk)
            chunk.clear()
    yield b"".join(chunk)


def _first(blocks: Blocks, count: int) -> Blocks:
    """The first `count` packets of several."""
    end = 0
    for _ in range(count):
        end += int.from_bytes(blocks.data[end + 4 : end + 8], "little")
    return Blocks(blocks.data[:end], count)


def _filter(side: Side) -> TapFilter:
    return TapFilter(side.networks, incoming=not side.outgoing, outgoing=side.outgoing, snap=SNAP)


def _has_ethernet(link: Link) -> bool:
    return link.kind == ARPHRD_ETHER or link.loopback


def _link_type(link: Link) -> int:
    return pcapng.LINKTYPE_ETHERNET if _has_ethernet(link) else pcapng.LINKTYPE_RAW


def _end(at: int, tap: Tap, count: int) -> bytes:
    return pcapng.statistics(at, time.time_ns(), count, tap.dropped)
