"""Receives numbered streams on one endpoint and accounts for each.

Owns the receiving socket. Called by `mrelay receive` and `mrelay demo`. `drain` never blocks; `run`
blocks in poll(2), for at most 0.1 s at a time.
"""

import math
import select
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrelay.model.endpoint import Input
from mrelay.traffic.account import StreamAccount
from mrelay.traffic.mmsg import ReceiveBatch
from mrelay.traffic.sockets import open_receiving, socket_drops
from mrelay.traffic.stop import Stop
from mrelay.traffic.stream import Headers, is_ours

MAX_STREAMS = 256  # each takes 0.5 MB; datagrams of further ones count as foreign
_GATHER = 0.002  # seconds that datagrams gather before a batch is read; the kernel has stamped them already
_POLL_MS = 100


class Receiver:
    """One endpoint's streams. Use as a context manager."""

    def __init__(self, wanted: Input) -> None:
        """Open, bind and join. Raises TrafficError."""
        self.streams: dict[int, StreamAccount] = {}
        self.foreign = 0  # datagrams that `mrelay send` didn't make
        self.first_at = self.last_at = 0.0  # monotonic seconds of the first and last batch
        self._socket = open_receiving(wanted)
        self._batch = ReceiveBatch()

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """The socket's descriptor, for poll and select."""
        return self._socket.fileno()

    @property
    def received(self) -> int:
        """Datagrams of all streams."""
        return sum(account.received for account in self.streams.values())

    @property
    def lost(self) -> int:
        """Datagrams missing in all streams."""
        return sum(account.lost for account in self.streams.values())

    def socket_drops(self) -> int:
        """Of the lost, those that reached this host and found the socket's buffer full."""
        return socket_drops(self._socket)

    def drain(self) -> int:
        """Account for all datagrams that are waiting; how many they were."""
        total = 0
        while count := self._batch.receive(self._socket.fileno()):
            self._account(count)
            total += count
            if count < self._batch.size:
                break
        return total

    def run(
        self,
        stop: Stop,
        seconds: float | None,
        count: int | None,
        every: float,
        on_progress: Callable[["Receiver"], None],
    ) -> None:
        """Receive until `seconds` have passed, `count` datagrams came or are known lost, or `stop`."""
        start = time.monotonic()
        end, report_at = start + (math.inf if seconds is None else seconds), start + every
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        goal = math.inf if count is None else count
        while not stop.requested and (now := time.monotonic()) < end and self.received + self.lost < goal:
            if poll.poll(min(_POLL_MS, math.ceil((end - now) * 1000) if seconds is not None else _POLL_MS)):
                time.sleep(_GATHER)
                self.drain()
            if now >= report_at:
                report_at += every
                on_progress(self)

    def summary(self) -> dict[str, Any]:
        """All counts and latencies as plain values, for JSON."""
        seconds = self.last_at - self.first_at
        streams = [_stream_summary(number, account, seconds) for number, account in self.streams.items()]
        return {
            "received": self.received,
            "lost": self.lost,
            "reordered": sum(stream["reordered"] for stream in streams),
            "duplicates": sum(stream["duplicates"] for stream in streams),
            "foreign": self.foreign,
            "socket_drops": self.socket_drops(),
            "seconds": round(seconds, 6),
            "streams": streams,
        }

    def _account(self, count: int) -> None:
        self.last_at = time.monotonic()
        self.first_at = self.first_at or self.last_at
        headers, lengths = self._batch.headers(count), self._batch.lengths(count)
        ours = is_ours(headers, lengths)
        arrivals = self._batch.arrivals(count)
        if not ours.all():
            self.foreign += int(count - ours.sum())
            headers, lengths, arrivals = headers[ours], lengths[ours], arrivals[ours]
        for number in np.unique(headers["stream"]).tolist():
            self._account_stream(number, headers, lengths, arrivals)

    def _account_stream(
        self, number: int, headers: Headers, lengths: NDArray[np.uint32], arrivals: NDArray[np.int64]
    ) -> None:
        mine = headers["stream"] == number
        account = self._stream(number)
        if account is None:
            self.foreign += int(mine.sum())
            return
        account.add(headers["sequence"][mine].astype(np.int64))
        account.bytes += int(lengths[mine].sum())
        stamped = mine & (arrivals > 0)
        account.latency.add(arrivals[stamped] - headers["sent"][stamped].astype(np.int64))

    def _stream(self, number: int) -> StreamAccount | None:
        if number not in self.streams and len(self.streams) < MAX_STREAMS:
            self.streams[number] = StreamAccount()
        return self.streams.get(number)


def _stream_summary(number: int, account: StreamAccount, seconds: float) -> dict[str, Any]:
    return {
        "stream": f"{number:016x}",
        "received": account.received,
        "bytes": account.bytes,
        "lost": account.lost,
        "reordered": account.reordered,
        "duplicates": account.duplicates,
        "pps": round(account.received / seconds, 1) if seconds else 0.0,
        "bps": round(account.bytes * 8 / seconds, 1) if seconds else 0.0,
        "latency_us": latency_us(account),
    }


def latency_us(account: StreamAccount) -> dict[str, float | None]:
    """p50, p99, min and max one-way latency in microseconds; None where nothing was stamped."""
    latency = account.latency
    if not latency.count:
        return {"min": None, "p50": None, "p99": None, "max": None}
    values = {
        "min": latency.lowest,
        "p50": latency.percentile(50),
        "p99": latency.percentile(99),
        "max": latency.highest,
    }
    return {name: round(value / 1000, 1) for name, value in values.items() if value is not None}
