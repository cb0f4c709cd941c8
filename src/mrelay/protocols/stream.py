"""One stream's health: what each format can tell of loss, order, duplicates and jitter.

A pure state machine: it is given each datagram's payload and the time it came, and told where some may have been
missed. Called by control's stream health. RTP RFC 3550; MPEG-TS ISO/IEC 13818-1; MoldUDP64 as Nasdaq specifies it
(session of 10 bytes, sequence number of 8, message count of 2); or any sequence field.
"""

from typing import Final, NamedTuple, Protocol

from mrelay.model.health import Format, Health
from mrelay.protocols import mpegts, rtp
from mrelay.protocols.mpegts import TsStream
from mrelay.protocols.rtp import RtpStream
from mrelay.protocols.sequence import Sequence

_MOLD_SESSION: Final = 10
_MOLD_HEADER: Final = 20
_MOLD_END: Final = 0xFFFF  # message count: the session is over
_VOTES: Final = 3  # datagrams of one format that settle it
_TRIES: Final = 32


class Figures(NamedTuple):
    """What is known of a stream since it was first heard. None where its format can't tell.

    `units`: what is numbered (datagrams, messages, transport packets): so many came, without duplicates; `lost` of
    them did not. `excused`: missing where we did not hear all. `jitter` in seconds. `details`: what only this
    format has.
    """

    units: int
    lost: int | None
    reordered: int | None
    duplicates: int | None
    restarts: int | None
    excused: int
    jitter: float | None
    bad: int
    details: dict[str, int]


class Meter(Protocol):
    """What measures a stream of one format."""

    @property
    def format(self) -> str:
        """Its name."""

    def add(self, data: bytes, start: int, end: int, now: float) -> None:
        """A datagram whose payload is data[start:end] came at `now` (seconds)."""

    def excuse(self) -> None:
        """Some may have been missed here."""

    def figures(self) -> Figures:
        """What is known."""


def meter_for(health: Health) -> Meter:
    """What measures a stream as the rule says."""
    match health.format:
        case "rtp":
            return RtpMeter(health.clock)
        case "mpegts":
            return TsMeter()
        case "moldudp64":
            return MoldMeter()
        case "sequence":
            return FieldMeter(health)
        case "auto":
            return AutoMeter(health.clock)
    return AnyMeter()


class AnyMeter:
    """Nothing is known of it but that it comes."""

    format = "any"

    def __init__(self) -> None:
        self._units = 0

    def add(self, data: bytes, start: int, end: int, now: float) -> None:
        """As Meter."""
        self._units += 1

    def excuse(self) -> None:
        """As Meter."""

    def figures(self) -> Figures:
        """As Meter."""
        return Figures(self._units, None, None, None, None, 0, None, 0, {})


class RtpMeter:
    """RTP, and within it MPEG-TS if that is what it carries."""

    format = "rtp"

    def __init__(self, clock: int) -> None:
        self._rtp = RtpStream(clock)
        self._ts: TsStream | None = None

    def add(self, data: bytes, start: int, end: int, now: float) -> None:
        """As Meter."""
        head = self._rtp.add(data, start, end, now)
        if head is None:
            return
        if self._ts is None and head.payload_type == rtp.MP2T and mpegts.looks_like(data, head.start, head.end):
            self._ts, self.format = TsStream(), "rtp+mpegts"
        if self._ts is not None:
            self._ts.add(data, head.start, head.end)

    def excuse(self) -> None:
        """As Meter."""
        self._rtp.sequence.excuse()
        if self._ts is not None:
            self._ts.excuse()

    def figures(self) -> Figures:
        """As Meter."""
        one, numbers = self._rtp, self._rtp.sequence
        details = {"ssrc": one.ssrc, "payload_type": one.payload_type, "ssrc_changes": one.ssrc_changes}
        details |= {"clock": one.clock} if one.ssrc >= 0 else {}
        details |= _ts_details(self._ts) if self._ts else {}
        return _counted(numbers, one.jitter if one.ssrc >= 0 else None, one.bad, details)


class TsMeter:
    """MPEG-TS straight in UDP."""

    format = "mpegts"

    def __init__(self) -> None:
        self._ts = TsStream()

    def add(self, data: bytes, start: int, end: int, now: float) -> None:
        """As Meter."""
        self._ts.add(data, start, end)

    def excuse(self) -> None:
        """As Meter."""
        self._ts.excuse()

    def figures(self) -> Figures:
        """As Meter."""
        ts = self._ts
        return Figures(ts.packets, ts.missing, None, None, None, 0, None, ts.bad, _ts_details(ts))


class MoldMeter:
    """MoldUDP64: the number counts messages, of which a datagram has several; a heartbeat has none."""

    format = "moldudp64"

    def __init__(self) -> None:
        self._numbers = Messages(64)
        self._session = b""
        self._changes = self._bad = 0

    def add(self, data: bytes, start: int, end: int, now: float) -> None:
        """As Meter."""
        if end - start < _MOLD_HEADER:
            self._bad += 1
            return
        at = start + _MOLD_SESSION
        if data[start:at] != self._session:
            self._changes += self._session != b""
            self._session = data[start:at]
            self._numbers.sequence.forget()
        count = int.from_bytes(data[at + 8 : at + 10])
        self._numbers.add(int.from_bytes(data[at : at + 8]), 0 if count == _MOLD_END else count)

    def excuse(self) -> None:
        """As Meter."""
        self._numbers.sequence.excuse()

    def figures(self) -> Figures:
        """As Meter."""
        return _counted(self._numbers.sequence, None, self._bad, {"session_changes": self._changes})


class FieldMeter:
    """A sequence field, and maybe one that counts messages, anywhere in the datagram."""

    format = "sequence"

    def __init__(self, health: Health) -> None:
        self._health = health
        self._numbers = Messages(health.size * 8)
        self._needs = max(health.offset + health.size, health.count_offset + health.count_size)
        self._bad = 0

    def add(self, data: bytes, start: int, end: int, now: float) -> None:
        """As Meter."""
        field = self._health
        if end - start < self._needs:
            self._bad += 1
            return
        at, count = start + field.offset, 1
        if field.count_size:
            place = start + field.count_offset
            count = int.from_bytes(data[place : place + field.count_size], field.endian)
        self._numbers.add(int.from_bytes(data[at : at + field.size], field.endian), count)

    def excuse(self) -> None:
        """As Meter."""
        self._numbers.sequence.excuse()

    def figures(self) -> Figures:
        """As Meter."""
        return _counted(self._numbers.sequence, None, self._bad, {})


class Messages:
    """Numbers that come several at a time."""

    MOST: Final = 1024  # in one datagram: a message has two bytes of length at least, and a datagram 64 kB

    def __init__(self, bits: int) -> None:
        self.sequence = Sequence(bits)
        self._mask = (1 << bits) - 1

    def add(self, first: int, count: int) -> None:
        """`count` messages numbered from `first` on; none: `first` is the next one's number."""
        if count == 0:
            self.sequence.expect(first)
        for number in range(first, first + min(count, self.MOST)):
            self.sequence.add(number & self._mask)


class AutoMeter:
    """Finds out what the stream is from its first datagrams, which are not counted, then measures that."""

    def __init__(self, clock: int) -> None:
        self._clock = clock
        self._meter: Meter = AnyMeter()
        self._settled = False
        self._tries = 0
        self._votes = dict[Format, int]()
        self._last: rtp.Header | None = None

    @property
    def format(self) -> str:
        """Of the meter in use; "any" until it is known."""
        return self._meter.format

    def add(self, data: bytes, start: int, end: int, now: float) -> None:
        """As Meter."""
        if not self._settled:
            self._guess(data, start, end)
        self._meter.add(data, start, end, now)

    def excuse(self) -> None:
        """As Meter."""
        self._last = None
        self._meter.excuse()

    def figures(self) -> Figures:
        """As Meter."""
        return self._meter.figures()

    def _guess(self, data: bytes, start: int, end: int) -> None:
        self._tries += 1
        self._settled = self._tries == _TRIES
        kind = self._kind(data, start, end)
        if kind is None:
            return
        self._votes[kind] = self._votes.get(kind, 0) + 1
        if self._votes[kind] == _VOTES:
            self._settled = True
            self._meter = meter_for(Health(kind, clock=self._clock))

    def _kind(self, data: bytes, start: int, end: int) -> Format | None:
        if mpegts.looks_like(data, start, end):
            return "mpegts"
        if _is_mold(data, start, end):
            return "moldudp64"
        last, self._last = self._last, rtp.header(data, start, end)
        if last is None or self._last is None or last.ssrc != self._last.ssrc:
            return None
        return "rtp" if (last.sequence + 1) & 0xFFFF == self._last.sequence else None


def _is_mold(data: bytes, start: int, end: int) -> bool:
    """Whether the message blocks fill the datagram exactly, as their count says."""
    at = start + _MOLD_HEADER
    if at > end or not data[start : start + _MOLD_SESSION].isascii():
        return False
    count = int.from_bytes(data[at - 2 : at])
    for _ in range(0 if count == _MOLD_END else count):
        if at + 2 > end:
            return False
        at += 2 + int.from_bytes(data[at : at + 2])
    return at == end and count > 0


def _counted(numbers: Sequence, jitter: float | None, bad: int, details: dict[str, int]) -> Figures:
    return Figures(
        units=numbers.distinct,
        lost=numbers.lost,
        reordered=numbers.reordered,
        duplicates=numbers.duplicates,
        restarts=numbers.restarts,
        excused=numbers.excused,
        jitter=jitter,
        bad=bad,
        details=details,
    )


def _ts_details(ts: TsStream) -> dict[str, int]:
    return {
        "ts_packets": ts.packets,
        "ts_null_packets": ts.nulls,
        "ts_continuity_errors": ts.errors,
        "ts_missing": ts.missing,
        "ts_duplicates": ts.duplicates,
        "ts_discontinuities": ts.discontinuities,
        "ts_bad": ts.bad,
        "ts_pids": ts.pids,
    }
