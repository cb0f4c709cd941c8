"""One stream through the demo's network: sent, received twice, sampled meanwhile.

Owns the receivers of one phase. Called by the demo command. `run` blocks until the stream has ended and
nothing arrives any more.
"""

import contextlib
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mrelay.cli.failure import INTERRUPTED, Failure
from mrelay.demo.processes import Program
from mrelay.demo.topology import Topology
from mrelay.model.endpoint import Input
from mrelay.traffic.account import StreamAccount
from mrelay.traffic.receiver import Receiver, latency_us
from mrelay.traffic.stop import Stop

_GATHER = 0.002  # seconds between reads; the kernel has stamped the datagrams already
_QUIET = 0.3  # seconds without a datagram after the sender's end: nothing more is on its way


@dataclass(frozen=True)
class Plan:
    """What is sent: datagrams/s, bytes of UDP payload, how many."""

    rate: float
    size: int
    count: int


@dataclass(frozen=True)
class Reading:
    """One receiver at one moment."""

    name: str
    group: str
    received: int
    lost: int
    duplicates: int
    reordered: int
    pps: float
    latency: dict[str, float | None]  # "p50", "p99" … in µs


class Stream:
    """The receivers of one phase, joined from the start. A context manager."""

    def __init__(self, network: Topology, groups: list[str]) -> None:
        """`groups` has one GROUP:PORT for each receiver."""
        self._network = network
        self._groups = groups
        self._counts_before = [0] * len(groups)
        self._time_before = time.monotonic()
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as on_failure:
            self._receivers = [on_failure.enter_context(self._join(i)) for i in range(len(groups))]
            self._stack = on_failure.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _join(self, i: int) -> Receiver:
        with self._network.receivers[i].inside():
            return Receiver(Input.parse(f"r{i + 1}:{self._groups[i]}"))

    def run(
        self, plan: Plan, to: str, log: Path, stop: Stop, every: float, on_tick: Callable[[float], None]
    ) -> int:
        """Send `plan` to the endpoint `to`, receiving meanwhile; how many were sent.

        Calls `on_tick` with the elapsed seconds every `every` seconds. Raises Failure when the
        sender fails, or is interrupted before it began.
        """
        arguments = ["--rate", str(plan.rate), "--size", str(plan.size), "--count", str(plan.count)]
        with Program(self._network.source, log, "send", to, "--ttl", "8", "--json", *arguments) as sender:
            start = time.monotonic()
            tick_at = start + every
            while sender.running():
                self._drain()
                if stop.requested:
                    sender.end_early()
                if time.monotonic() >= tick_at:
                    tick_at += every
                    on_tick(time.monotonic() - start)
            result = sender.result()
        if result is None:
            raise Failure("interrupted before the stream began", status=INTERRUPTED)
        self._settle()
        return int(result["sent"])

    def readings(self) -> list[Reading]:
        """Every receiver now; `pps` is since the last call."""
        now = time.monotonic()
        readings = [self._reading(i, now) for i in range(len(self._receivers))]
        self._counts_before = [reading.received for reading in readings]
        self._time_before = now
        return readings

    def _reading(self, i: int, now: float) -> Reading:
        receiver = self._receivers[i]
        # Only the demo's own sender is here, so there is one stream, or none yet.
        account = next(iter(receiver.streams.values()), StreamAccount())
        elapsed = now - max(self._time_before, receiver.first_at)
        return Reading(
            name=f"receiver-{i + 1}",
            group=self._groups[i],
            received=account.received,
            lost=account.lost,
            duplicates=account.duplicates,
            reordered=account.reordered,
            pps=(account.received - self._counts_before[i]) / max(elapsed, 1e-6),
            latency=latency_us(account),
        )

    def _drain(self) -> None:
        """Wait up to 0.1 s for datagrams, then read all there are."""
        if select.select(self._receivers, [], [], 0.1)[0]:
            time.sleep(_GATHER)
            for receiver in self._receivers:
                receiver.drain()

    def _settle(self) -> None:
        while select.select(self._receivers, [], [], _QUIET)[0]:
            self._drain()
