"""What poc_gro_gso's relay forwards under load, and what it costs.

Owns the cases that are measured. `measure_all` blocks for some tenths of a second for each measurement.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gro_lab import Lab, Load, flows
from gro_relay import Relay

from experiment import Experiment
from traffic import Programs

OFFERED: Final = 1.2e6  # datagrams a second: more than one loop can take one by one
FRAMES: Final = 40_000  # for one measurement
PLAIN, MERGED, SPLIT = "a packet at a time", "merged", "merged in, one by one out"
_SETTLED: Final = 0.2  # seconds that what is on its way may still take to the sink
OFFLOADS: Final[dict[str, dict[str, bool]]] = {
    "all": {},
    "no UDP segm.": {"segmentation": False},
    "no offload": {"segmentation": False, "generic": False, "checksums": False},
}


@dataclass(frozen=True)
class Case:
    """One load: flows in turn, each `run` times in a row. `offload`: what egress can do, of OFFLOADS."""

    payload: int = 1000
    outputs: int = 1
    flows: int = 1
    run: int = 1
    offload: str = "all"
    checked: bool = True

    def __str__(self) -> str:
        """What differs from 1000 B, one output, one flow."""
        parts = [f"{self.payload} B"] if self.payload != 1000 else []
        parts += [f"{self.outputs} outputs"] if self.outputs > 1 else []
        parts += [f"{self.flows} flows"] if self.flows > 1 else []
        parts += [f"{self.run} in a row"] if self.run > 1 else []
        parts += [self.offload] if self.offload != "all" else []
        parts += [] if self.checked else ["no UDP checksum"]
        return ", ".join(parts) or "1000 B, 1 output, 1 flow"


@dataclass(frozen=True)
class Rate:
    """One measurement: datagrams in a frame, out a second, CPU µs for each of these, and whether all add up."""

    merged: float
    out: float
    cost: float
    exact: bool


class Rates:
    """All measurements, by case and way."""

    def __init__(self) -> None:
        self._all: dict[tuple[Case, str], list[Rate]] = {}

    def add(self, case: Case, way: str, rate: Rate) -> None:
        """One more."""
        self._all.setdefault((case, way), []).append(rate)

    @property
    def cases(self) -> list[Case]:
        """Those measured merged."""
        return [case for case, way in self._all if way == MERGED]

    def merged(self, case: Case, way: str = MERGED) -> float:
        """Datagrams in a frame."""
        return statistics.median(rate.merged for rate in self._all[case, way])

    def out(self, case: Case, way: str) -> float:
        """Datagrams out a second, over all outputs."""
        return statistics.median(rate.out for rate in self._all[case, way])

    def cost(self, case: Case, way: str) -> float:
        """CPU µs that each datagram out takes: the loop, waiting's overhead, the kernel's way to the sink."""
        return statistics.median(rate.cost for rate in self._all[case, way])

    def gain(self, case: Case, way: str = MERGED) -> float:
        """How many times less that is than a packet at a time."""
        return self.cost(case, PLAIN) / self.cost(case, way)

    def exact(self) -> list[bool]:
        """Of each measurement, whether exactly what the relay read came out on every output."""
        return [rate.exact for rates in self._all.values() for rate in rates]

    def show(self, experiment: Experiment) -> None:
        """The table: a packet at a time, then the other way."""
        rows = []
        for case, way in self._all:
            if way == PLAIN:
                continue
            rates = [f"{self.out(case, each) / 1e3:.0f}" for each in (PLAIN, way)]
            costs = [f"{self.cost(case, each):.2f}" for each in (PLAIN, way)]
            name = "the same, sent one by one" if way == SPLIT else str(case)
            rows.append([name, f"{self.merged(case, way):.1f}", *rates, *costs, f"{self.gain(case, way):.1f}"])
        columns = ["", "a frame", "plain k/s", "merged", "plain µs", "merged", "times"]
        title = f"Datagrams out by one Python loop, {OFFERED / 1e6} M/s offered; CPU time of each"
        experiment.table(title, columns, rows)


def both(cases: Iterable[Case]) -> list[tuple[Case, str]]:
    """Each case a packet at a time and merged."""
    return [(case, way) for case in cases for way in (PLAIN, MERGED)]


def measure_all(
    lab: Lab, cases: Sequence[tuple[Case, str]], rounds: int, *, merging: bool, checked: bool
) -> Rates:
    """Each case in each way, taking turns. Not `merging`: GRO stays off; not `checked`: no UDP checksum ever."""
    rates = Rates()
    with Programs(1) as sink:
        with lab.sink.inside():
            sink.attach(lab.sink_indexes())
        for _ in range(rounds):
            for case, way in cases:
                lab.merge(on=way != PLAIN and merging)
                lab.offload(**OFFLOADS[case.offload])
                rates.add(case, way, _measure(lab, sink, case, way, checked and case.checked))
    return rates


def _measure(lab: Lab, sink: Programs, case: Case, way: str, checked: bool) -> Rate:
    """One measurement: from the first frame of the load to the last one forwarded."""
    turns = flows(case.flows, case.run)
    how = "split" if way == SPLIT else "segment"
    with (
        Load(lab, turns, case.payload, OFFERED, checked=checked) as load,
        Relay(lab, flows(case.flows), case.outputs, how) as relay,
    ):
        before = _Counted(sink, case)
        with load.running(FRAMES) as thread:
            start, cpu = time.perf_counter(), time.thread_time()
            relay.run(lambda: not thread.is_alive())
            seconds, cpu = time.perf_counter() - start, time.thread_time() - cpu
        exact = before.rose_by(relay.datagrams)
        out = max(1, case.outputs * relay.datagrams)
        return Rate(relay.datagrams / max(1, relay.frames), out / seconds, cpu / out * 1e6, exact)


class _Counted:
    """What the sink had counted on the case's outputs when this was made."""

    def __init__(self, sink: Programs, case: Case) -> None:
        self._sink, self._case = sink, case
        self._before = self._now()

    def _now(self) -> tuple[list[int], list[int]]:
        """Segments and bytes of payload, by output."""
        outputs = self._case.outputs
        return self._sink.datagrams()[:outputs], self._sink.payload_bytes()[:outputs]

    def rose_by(self, datagrams: int) -> bool:
        """Whether just so many more came, or come soon, on every output, by segments and by bytes."""
        end = time.monotonic() + _SETTLED
        while True:
            rises = [
                {b - a for a, b in zip(*pair, strict=True)} for pair in zip(self._before, self._now(), strict=True)
            ]
            if rises == [{datagrams}, {datagrams * self._case.payload}] or time.monotonic() > end:
                return rises == [{datagrams}, {datagrams * self._case.payload}]
