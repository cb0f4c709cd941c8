"""When datagrams leave poc_gro_gso's relay, beside when they came.

Owns the evenly paced sender, a child process that ends by itself after some tens of milliseconds, and
the histogram. `measure` waits for the child.
"""

import os
import statistics
import struct
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from gro_lab import LOAD_CORE, OUT_PORT, PORT, Lab, flows
from gro_look import Tap, open_source
from gro_relay import Relay

from scheduling import real_time

GAP: Final = 50_000  # ns between two datagrams
HOLD: Final = 1_000_000  # ns that GRO may hold back what it merges, when asked to
PAYLOAD: Final = 1000
BOUNDS: Final = (5_000, 25_000, 100_000, 500_000)  # ns, upper, of all but the last bin
BINS: Final = ("< 5 µs", "5-25", "25-100", "100-500", "> 500 µs")
_IN_TIME: Final = 5.0  # seconds


@dataclass(frozen=True)
class Spacing:
    """Gaps between datagrams in and out, ns; how long each was under way; datagrams in a frame read."""

    gaps_in: list[int]
    gaps_out: list[int]
    delay: float
    merged: float


def histogram(gaps: Sequence[int]) -> list[float]:
    """Share of the gaps in each of BINS."""
    counts = [0] * len(BINS)
    for gap in gaps:
        counts[sum(gap >= bound for bound in BOUNDS)] += 1
    return [count / max(1, len(gaps)) for count in counts]


def hold(lab: Lab, nanoseconds: int) -> None:
    """Let GRO at r0 keep frames from one poll to the next for so long; 0 is how Linux comes.

    /sys shows the network namespace that mounted it, hence one mount more, for that shell alone.
    """
    commands = "mount -t sysfs none /sys; cd /sys/class/net/r0"
    commands += f"; echo {nanoseconds} > gro_flush_timeout; echo {int(nanoseconds > 0)} > napi_defer_hard_irqs"
    with lab.relay.inside():
        subprocess.run(["unshare", "--mount", "sh", "-ec", commands], check=True, timeout=10)


def measure(lab: Lab, count: int) -> Spacing:
    """`count` datagrams, GAP apart, through the relay to the first output, which cuts merged ones up itself."""
    lab.offload(segmentation=False)
    with (
        Tap(lab.source, "s0", outgoing=True) as before,
        Tap(lab.sink, "d1") as after,
        Relay(lab, flows(1), 1) as relay,
    ):
        end = time.monotonic() + _IN_TIME
        child = _send_evenly(lab, count)
        try:
            with real_time(1):  # what other work on this machine does to spacing is not asked here
                relay.run(lambda: relay.datagrams >= count or time.monotonic() > end)
        finally:
            os.waitpid(child, 0)
        came, went = before.udp(PORT), after.udp(OUT_PORT)
        sent = {seen.packet[28:36]: seen.time for seen in came}
        delays = [seen.time - sent[seen.packet[28:36]] for seen in went]
        return Spacing(
            [b.time - a.time for a, b in pairwise(came)],
            [b.time - a.time for a, b in pairwise(went)],
            statistics.median(delays) if delays else 0.0,
            relay.datagrams / max(1, relay.frames),
        )


def _send_evenly(lab: Lab, count: int) -> int:
    """A child that sends `count` numbered datagrams GAP apart, and ends; its id."""
    sock = open_source(lab)
    child = os.fork()
    if child:
        sock.close()
        return child
    try:
        os.sched_setaffinity(0, {LOAD_CORE})
        with real_time(1):
            due = time.monotonic_ns() + 2_000_000
            for number in range(count):
                while (now := time.monotonic_ns()) < due:
                    pass
                sock.send(struct.pack("!Q", number).ljust(PAYLOAD, b"\0"))
                due = now + GAP  # a late one is not made up for
    finally:
        os._exit(0)
