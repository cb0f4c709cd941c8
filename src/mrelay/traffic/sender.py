"""Sends one numbered stream at a steady rate.

Owns pacing. Called by `mrelay send`. `run` blocks until the stream's end, in short sleeps and sends.
"""

import errno
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from mrelay.kernel.udp import UDP_MAX_SEGMENTS
from mrelay.model.endpoint import Output
from mrelay.traffic.mmsg import SendBatch
from mrelay.traffic.sockets import TrafficError, explain, open_sending
from mrelay.traffic.stop import Stop
from mrelay.traffic.stream import HEADER_SIZE, MAX_SIZE, new_stream_id

BURST = 32  # datagrams a call when catching up: small enough for any receiver's queue
_TICK = 0.0005  # seconds; the shortest sleep, so 20,000/s leave about ten at a time
_MAX_DEBT = 0.1  # seconds behind schedule that are caught up; the rest is given up, and shows in the rate
_TRANSIENT = (errno.ECONNREFUSED, errno.ENOBUFS, errno.EAGAIN, errno.EINTR)


class Pacer:
    """Says how many datagrams are due. Times are monotonic seconds, `rate` is datagrams per second."""

    def __init__(self, rate: float, start: float) -> None:
        self._rate = rate
        self._start = start

    def due(self, now: float, sent: int) -> int:
        """How many more should have left by `now`; a debt above 0.1 s is forgiven."""
        due = int((now - self._start) * self._rate) + 1 - sent
        most = max(1, int(self._rate * _MAX_DEBT))
        if due > most:
            self._start += (due - most) / self._rate
            return most
        return due

    def wait(self, now: float, sent: int) -> float:
        """Seconds until the next one is due, but at least a tick."""
        return max(_TICK, self._start + sent / self._rate - now)


@dataclass(frozen=True)
class SendPlan:
    """What to send: `rate` in datagrams/s, `size` in bytes of UDP payload, ends at `count` or `seconds`."""

    output: Output
    rate: float = 1000.0
    size: int = 1000
    count: int | None = None
    seconds: float | None = None
    ttl: int | None = None
    gso: bool = False

    def check(self) -> None:
        """Raise TrafficError for values that make no stream."""
        if not HEADER_SIZE <= self.size <= MAX_SIZE:
            raise TrafficError(f"size {self.size}: must be {HEADER_SIZE} to {MAX_SIZE} bytes")
        if not 0 < self.rate < math.inf:
            raise TrafficError(f"rate {self.rate}: must be above 0 datagrams a second")
        if self.ttl is not None and not 1 <= self.ttl <= 255:
            raise TrafficError(f"ttl {self.ttl}: must be 1 to 255")


@dataclass
class SendResult:
    """What was sent so far."""

    stream: int
    sent: int = 0
    errors: int = 0  # sends the kernel refused and that were tried again
    seconds: float = 0.0

    def rate(self) -> float:
        """Datagrams per second over the whole run."""
        return self.sent / self.seconds if self.seconds else 0.0


class Sender:
    """One stream to one endpoint. Use as a context manager."""

    def __init__(self, plan: SendPlan) -> None:
        """Open the socket. Raises TrafficError."""
        plan.check()
        self._plan = plan
        self._burst = min(UDP_MAX_SEGMENTS, MAX_SIZE // plan.size) if plan.gso else BURST
        self.result = SendResult(new_stream_id())
        self._batch = SendBatch(self.result.stream, plan.size, self._burst)
        self._socket = open_sending(plan.output, plan.ttl, plan.size if plan.gso else 0)

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def run(self, stop: Stop, every: float, on_progress: Callable[[SendResult], None]) -> SendResult:
        """Send until the plan's end or `stop`; calls `on_progress` every `every` seconds."""
        start = time.monotonic()
        pacer, result, report_at = Pacer(self._plan.rate, start), self.result, start + every
        while not stop.requested and (left := self._left(start)) > 0:
            now = time.monotonic()
            count = min(pacer.due(now, result.sent), self._burst, left)
            if count > 0:
                self._send(count)
            else:
                stop.sleep(pacer.wait(now, result.sent))
            if now >= report_at:
                report_at += every
                result.seconds = now - start
                on_progress(result)
        result.seconds = time.monotonic() - start
        return result

    def _left(self, start: float) -> int:
        if self._plan.seconds is not None and time.monotonic() - start >= self._plan.seconds:
            return 0
        return self._burst if self._plan.count is None else self._plan.count - self.result.sent

    def _send(self, count: int) -> None:
        self._batch.stamp(count, self.result.sent, time.time_ns())
        send = self._batch.send_merged if self._plan.gso else self._batch.send
        try:
            self.result.sent += send(self._socket, count)
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise explain(f"cannot send to {self._plan.output}", error) from error
            self.result.errors += 1
            time.sleep(_TICK)
