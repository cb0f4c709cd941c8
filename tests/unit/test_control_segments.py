"""What is remembered of queries and reports on a segment."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mrelay.control import segments
from mrelay.control.segments import Segment, Segments
from mrelay.kernel.tap import Frame
from netns.frames import ROUTER_ALERT, checksum, ethernet, ipv4, multicast_mac

QUERIER, HOST, OTHER, GROUP = "10.1.1.1", "10.1.1.8", "10.1.1.9", 0xEF010101


def igmp(source: str, body: bytes, to: str = "224.0.0.22") -> Frame:
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    packet = ipv4(source, to, body, protocol=2, ttl=1, options=ROUTER_ALERT)
    data = ethernet(multicast_mac(to), packet)
    return Frame(1, None, data, 14, len(data), 0, False, True, 0)


def query(source: str, version: int = 3) -> Frame:
    return igmp(source, bytes([0x11, 100, 0, 0]) + bytes(4) + bytes(4 if version == 3 else 0), "224.0.0.1")


def report(source: str, kind: int, group: int = GROUP) -> Frame:
    return igmp(source, bytes([0x22, 0, 0, 0, 0, 0, 0, 1]) + struct.pack("!BBHI", kind, 0, 0, group))


@pytest.fixture
def segment() -> Segment:
    return Segment()


def test_the_querier_that_asked_last(segment: Segment) -> None:
    assert segment.querier(4) is None
    segment.hear(query(QUERIER, 2))
    segment.hear(query("0.0.0.0"))  # a switch's own, which makes it no querier
    found = segment.querier(4)
    assert found is not None
    assert (found.address, found.protocol) == (QUERIER, "IGMPv2")
    assert segment.querier(6) is None


def test_members_come_and_go(segment: Segment) -> None:
    segment.hear(report(HOST, 4))
    segment.hear(report(OTHER, 2))
    segment.hear(report(OTHER, 4, GROUP + 1))
    assert [member.address for member in segment.members(4, GROUP)] == [HOST, OTHER]
    segment.hear(report(HOST, 3))  # RFC 3376 §4.2.12: to include nothing
    assert [(member.address, member.protocol) for member in segment.members(4, GROUP)] == [(OTHER, "IGMPv3")]


def test_who_was_not_heard_for_long_is_forgotten(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    segment.hear(query(QUERIER))
    segment.hear(report(HOST, 4))
    monkeypatch.setattr(segments, "FORGET", -1.0)
    assert segment.querier(4) is None
    assert segment.members(4, GROUP) == ()


def test_a_flood_of_members_is_bounded(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MOST_MEMBERS", 10)
    for number in range(30):
        segment.hear(report(HOST, 4, GROUP + number))
    assert not segment.members(4, GROUP)
    assert segment.members(4, GROUP + 29)


def test_nonsense_is_nothing(segment: Segment) -> None:
    segment.hear(Frame(1, None, b"", 14, 60, 0, False, True, 0))
    good = report(HOST, 4)
    segment.hear(good._replace(data=good.data[:-1] + b"\0"))
    assert segment.members(4, GROUP) == ()


def test_when_one_tap_of_an_interface_ends_both_are_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other may have been opened when the interface was back already, and would go on for ever."""
    opened: list[int] = []

    @asynccontextmanager
    async def open_tap(_: Any, __: int, what: Any) -> AsyncIterator[AsyncIterator[Frame]]:
        opened.append(what.family)

        async def frames() -> AsyncIterator[Frame]:
            if what.family == 6 or len(opened) > 2:
                await asyncio.Event().wait()
            for frame in list[Frame]():
                yield frame

        yield frames()

    async def listen() -> None:
        listening = asyncio.create_task(Segments(None)._listen(1))  # type: ignore[arg-type]  # no supervisor needed
        while len(opened) < 4:
            await asyncio.sleep(0)
        listening.cancel()

    monkeypatch.setattr(segments, "open_tap", open_tap)
    monkeypatch.setattr(segments, "_AGAIN", 0.0)
    asyncio.run(asyncio.wait_for(listen(), 5))
    assert opened == [4, 6, 4, 6]
