"""Frames, announcements, names and streams of any bytes at those who only listen: read or refused, and the sums
hold.

The first byte chooses who listens, so that a seed can be a whole frame.
"""

import struct
from collections.abc import Callable
from typing import Final

from fuzz.data import Data
from mrelay.model.health import Health
from mrelay.protocols import mdns, sap
from mrelay.protocols.frame import datagram, walk
from mrelay.protocols.membership import Kind, Query, messages
from mrelay.protocols.stream import Meter, meter_for
from mrelay.protocols.unmerge import unmerged

HEALTHS: Final = (
    Health("auto"),
    Health("rtp"),
    Health("mpegts"),
    Health("moldudp64"),
    Health("sequence", offset=2, size=4, endian="little"),
    Health("sequence", size=1, count_offset=1, count_size=1),
)


def check(data: bytes) -> None:
    _LISTENERS[data[0] % len(_LISTENERS) if data else 0](data[1:])


def _frame(data: bytes) -> None:
    choices = Data(data[:4])
    link, vlan = choices.pick([14, 14, 14, 0]), choices.pick([None, 20])
    segment, complete = choices.pick([0, 1, 7, 500]), bool(choices.below(2))
    data = data[4:]
    packet = walk(data, link, vlan)
    if packet is None:
        return
    assert link <= packet.ip < packet.start <= packet.end <= len(data)
    for one in messages(data, packet):
        assert 0 <= one.group < 1 << 128 and all(0 <= source < 1 << 128 for source in one.sources)
    found = datagram(data, packet)
    payload = b"" if found is None else data[found.start : found.end]
    frames = list(unmerged(data, link, vlan=vlan, segment=segment, complete=complete))
    assert len(frames) == (max(1, -(-len(payload) // segment)) if segment and found else 1)
    if found is not None and (segment or not complete):
        again = [(frame, walk(frame, link)) for frame in frames]
        pieces = [(frame, datagram(frame, there)) for frame, there in again if there is not None]
        assert b"".join(frame[one.start : one.end] for frame, one in pieces if one is not None) == payload


def _announcement(data: bytes) -> None:
    found = sap.announcement(data)
    if found is None:
        return
    name, media = sap.session(found.sdp)
    for text in (name, *(word for one in media for word in (one.kind, one.protocol, *one.formats))):
        assert text.isprintable() and len(text) <= 80


def _names(data: bytes) -> None:
    for one in mdns.answers(data):
        assert one.name.isprintable() and len(one.name) <= 80


def _stream(data: bytes) -> None:
    choices = Data(data)
    meter, came, now = meter_for(choices.pick(HEALTHS)), 0, 0.0
    before = struct.pack(">BBHIIQH", 0x80, 33, 65530, 0, 7, 1, 1)
    while choices and came < 400:
        kind = choices.below(8)
        now += choices.below(1000) / 1000
        if kind == 0:
            meter.excuse()
            continue
        if kind == 1:
            before = choices.some()
        elif len(before) >= 4:  # the next number, or one near it
            number = int.from_bytes(before[2:4]) + choices.pick([1, 1, 1, 1, 2, 0, -1, 9000])
            before = before[:2] + (number & 0xFFFF).to_bytes(2) + before[4:]
        padded = b"\1" + before + b"\2"
        meter.add(padded, 1, 1 + len(before), now)
        came += 1
    _adds_up(meter, came)


def _adds_up(meter: Meter, came: int) -> None:
    found = meter.figures()
    for count in (
        found.units,
        found.lost,
        found.reordered,
        found.duplicates,
        found.restarts,
        found.excused,
        found.bad,
    ):
        assert count is None or count >= 0
    assert found.jitter is None or found.jitter >= 0
    if meter.format == "rtp":
        assert found.units + found.bad + (found.duplicates or 0) <= came


def _membership(data: bytes) -> None:
    """The same as a frame, but with a checksum that is right, or little would be read."""
    head = struct.pack(">BBHHHBBHII", 0x45, 0, 20 + len(data), 0, 0, 1, 2, 0, 1, 2)
    body = bytearray(data.ljust(8, b"\0"))
    body[2:4] = bytes(2)
    total = sum(struct.unpack(f">{len(body) // 2}H", body[: len(body) // 2 * 2]))
    total += body[-1] << 8 if len(body) % 2 else 0
    body[2:4] = (~(total % 0xFFFF) & 0xFFFF).to_bytes(2)
    packet = walk(head + bytes(body), 0)
    assert packet is not None
    for one in messages(head + bytes(body), packet._replace(end=20 + len(body))):
        assert isinstance(one, Query) or one.kind in tuple(Kind)


_LISTENERS: Final[tuple[Callable[[bytes], None], ...]] = (_frame, _announcement, _names, _stream, _membership)
