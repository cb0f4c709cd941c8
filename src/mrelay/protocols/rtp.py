"""RTP as a listener sees it: loss, order, duplicates and jitter of one stream.

A pure state machine: it is given each datagram's payload and the time it came. Called by stream health. RFC 3550:
the header §5.1, sequence numbers A.1, jitter §6.4.1 and A.8; clock rates of static payload types RFC 3551 §6.
"""

import struct
from typing import Final, NamedTuple

from mrelay.protocols.sequence import Sequence

_HEADER = struct.Struct(">BBHII")
# Payload type: clock rate. All others are dynamic, or of 90 kHz (every video format of RFC 3551).
_AUDIO: Final = {
    **dict.fromkeys((0, 3, 4, 5, 7, 8, 9, 12, 13, 15, 18), 8000),
    6: 16000, 10: 44100, 11: 44100, 16: 11025, 17: 22050,
}  # fmt: skip
DEFAULT_CLOCK: Final = 90_000  # hertz
MP2T: Final = 33  # RFC 3551 §5.8
_HALF: Final = 1 << 31


class Header(NamedTuple):
    """`start`, `end`: where the payload lies, behind contributing sources and extension, without padding."""

    payload_type: int
    sequence: int
    timestamp: int
    ssrc: int
    start: int
    end: int


def header(data: bytes, start: int, end: int) -> Header | None:
    """The RTP header of the datagram whose payload is data[start:end]; None when it is none."""
    if end - start < _HEADER.size:
        return None
    first, second, sequence, timestamp, ssrc = _HEADER.unpack_from(data, start)
    if first >> 6 != 2 or (64 <= second & 0x7F < 96 and second >> 7):  # the latter: RTCP (RFC 5761 §4)
        return None
    at = start + _HEADER.size + (first & 0xF) * 4
    if first & 0x10:
        at += 4 + int.from_bytes(data[at + 2 : at + 4]) * 4
    stop = end - data[end - 1] if first & 0x20 else end
    return Header(second & 0x7F, sequence, timestamp, ssrc, at, stop) if at <= stop else None


class RtpStream:
    """One flow's RTP. `ssrc_changes`: the sender was started again, or there are several at once.

    `bad`: datagrams that are no RTP. `clock`: the timestamps' rate in hertz, 0 to go by the payload type.
    """

    def __init__(self, clock: int = 0) -> None:
        self._given = clock
        self.clock = clock or DEFAULT_CLOCK  # hertz of the timestamps, as given or assumed
        self.sequence = Sequence(16)
        self.ssrc = -1
        self.payload_type = -1
        self.ssrc_changes = 0
        self.bad = 0
        self.jitter = 0.0  # interarrival jitter in seconds (RFC 3550 §6.4.1)
        self._timestamp = 0
        self._arrival = 0.0

    def add(self, data: bytes, start: int, end: int, now: float) -> Header | None:
        """Account for a datagram that came at `now` (seconds); its header if it is RTP."""
        head = header(data, start, end)
        if head is None:
            self.bad += 1
            return None
        if head.ssrc != self.ssrc or head.payload_type != self.payload_type:
            self._change(head, now)
        self.sequence.add(head.sequence)
        self._transit(head.timestamp, now)
        return head

    def _change(self, head: Header, now: float) -> None:
        if head.ssrc != self.ssrc:
            self.ssrc_changes += self.ssrc >= 0
            self.sequence.forget()
        self.ssrc, self.payload_type = head.ssrc, head.payload_type
        self._timestamp, self._arrival, self.jitter = head.timestamp, now, 0.0
        self.clock = self._given or _AUDIO.get(head.payload_type, DEFAULT_CLOCK)

    def _transit(self, timestamp: int, now: float) -> None:
        """RFC 3550 A.8, in seconds: J += (|D| - J) / 16."""
        step = (timestamp - self._timestamp + _HALF) % (2 * _HALF) - _HALF  # modulo 2^32, signed
        difference = (now - self._arrival) - step / self.clock
        self.jitter += (abs(difference) - self.jitter) / 16
        self._timestamp, self._arrival = timestamp, now
