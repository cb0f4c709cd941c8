"""io_uring against the mmap rings, on AF_PACKET sockets: what each costs a frame, and how long one waits.

See README.md beside this file. As root: `python experiments/poc_io_uring_af_packet/poc_io_uring_af_packet.py
[--short] [--json] [--break PREMISE]`. Blocks for 20 seconds, with --short for 7.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runnable alone: the shared half is one folder up
import packet_behaviour
from packet_latency import lone_frames
from packet_load import Network
from packet_methods import Receiver, Sample, receive
from packet_rings import RingCopy, RingV2, RingV3
from uring_receivers import Incremental, Multishot, SingleShot

from experiment import Experiment
from mrelay.kernel.packet import LONG_SLOT, LONG_SLOTS
from uring import refusal

EASY, ALL = 100_000, 2_000_000  # frames offered a second: all can take them; none can
SHORT_PAYLOAD, LONG_PAYLOAD = 100, 1000  # bytes
_PATIENCE: Final = 0.0008  # s that the patient ring lets a middling batch grow
_SMALLEST_BLOCK: Final = 4096  # bytes


@dataclass(frozen=True)
class Method:
    """One way to receive; `nap` as in `receive`; `brief`: in the short form too."""

    name: str
    make: Callable[[], Receiver]
    nap: float = 0
    brief: bool = True


V2, PATIENT, V3, MULTISHOT = "ring V2", "ring V2, patient", "ring V3", "multishot recv"
PACKED: Final = "multishot, packed"


def methods(broken: str | None) -> list[Method]:
    """The rows of the table."""
    most = 1 if broken == "batches" else 1024
    block = _SMALLEST_BLOCK if broken == "lone" else 256 << 10
    return [
        Method("recv", lambda: SingleShot(recvmsg=False)),
        Method("recvmsg", lambda: SingleShot(recvmsg=True), brief=False),
        Method(MULTISHOT, Multishot),
        Method("multishot recvmsg", lambda: Multishot(recvmsg=True)),
        Method(PACKED, Incremental, brief=False),
        Method(V2, lambda: RingV2(most=most)),
        Method(PATIENT, lambda: RingV2(most=most), nap=_PATIENCE),
        Method(V3, lambda: RingV3(block=block)),
    ]


MERGED: Final = [
    Method(MULTISHOT, lambda: Multishot(buffers=64, size=LONG_SLOT)),
    Method(PACKED, lambda: Incremental(buffers=16, size=1 << 20)),
    Method("ring V2 of long slots", lambda: RingV2(LONG_SLOT, LONG_SLOTS)),
    Method("ring V2, recv for long", RingCopy),
    Method(V3, lambda: RingV3(block=1 << 20)),
]


@dataclass(frozen=True)
class Plan:
    """How much is measured: rounds at full and at easy load, seconds for each measurement, lone frames."""

    full: int
    easy: int
    seconds: float
    frames: int


@dataclass(frozen=True)
class Row:
    """One method's medians; `lone` is sorted, in µs."""

    full: Sample
    easy: Sample
    lone: list[float]

    @property
    def median(self) -> float:
        """Of the lone frames, in µs."""
        return statistics.median(self.lone)


def main() -> None:
    """The run. Without a premise only the half is run that rests on it."""
    experiment = Experiment(
        "poc_io_uring_af_packet",
        "AF_PACKET sockets driven by io_uring, single-shot and multishot, against the mmap rings with poll.",
        ("give-back", "auxdata", "batches", "lone"),
    )
    experiment.need_root()
    if reason := refusal(incremental=True):
        experiment.lacks(reason)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        experiment.lacks("two processor cores: one for the source, one for the receivers")
    plan = Plan(2, 1, 0.1, 60) if experiment.short else Plan(3, 2, 0.16, 200)
    with _network(experiment, cores) as network:
        if experiment.runs("give-back", "auxdata"):
            packet_behaviour.claim_all(experiment, network)
        if not experiment.runs("batches", "lone"):
            experiment.finish(f"without {experiment.broken}")
        rows = _measure(experiment, network, plan)
    _show(experiment, rows)
    _claim_costs(experiment, rows)
    if not experiment.short:
        with _network(experiment, cores, merge=True) as network:
            _merged(experiment, network, plan)
    ring, uring = rows[V2], rows[MULTISHOT]
    experiment.finish(
        f"ring V2 {ring.full.rate / uring.full.rate:.1f}x multishot io_uring at full load, "
        f"{ring.easy.thread / uring.easy.thread:.2f}x its CPU a packet at {EASY:,}/s; "
        f"a lone frame: V2 {ring.median:.0f} µs, io_uring {uring.median:.0f} µs, V3 {rows[V3].median:.0f} µs"
    )


def _network(experiment: Experiment, cores: list[int], *, merge: bool = False) -> Network:
    try:
        network = Network(*cores, merge=merge)
        with network.offering(SHORT_PAYLOAD, EASY, 0.01):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        experiment.lacks(f"veth with threaded NAPI and GRO, and XDP live frames (Linux 5.18): {error}")
    return network


def _measure(experiment: Experiment, network: Network, plan: Plan) -> dict[str, Row]:
    """Methods take turns within each round, so that a slow spell of the machine falls on all of them."""
    chosen = [method for method in methods(experiment.broken) if method.brief or not experiment.short]
    samples: dict[tuple[str, int], list[Sample]] = {}
    for number in range(plan.full):
        for method in chosen:
            for offered in (ALL, EASY) if number < plan.easy else (ALL,):
                sample = _under_load(method, network, SHORT_PAYLOAD, offered, plan.seconds)
                samples.setdefault((method.name, offered), []).append(sample)
    lone = {method.name: _lone(method, network, plan.frames, experiment.broken != "lone") for method in chosen}
    return {
        method.name: Row(
            _median(samples[method.name, ALL]), _median(samples[method.name, EASY]), lone[method.name]
        )
        for method in chosen
    }


def _under_load(method: Method, network: Network, payload: int, offered: float, seconds: float) -> Sample:
    with network.relay.inside():
        receiver = method.make()
    with network.offering(payload, offered, seconds + 0.03):
        sample = receive(receiver, network, payload, seconds, method.nap)
    receiver.close()
    return sample


def _lone(method: Method, network: Network, frames: int, alone: bool) -> list[float]:
    with network.relay.inside():
        receiver = method.make()
    with network.sender() as sender:
        took = lone_frames(receiver, network, sender, frames, alone=alone)
    receiver.close()
    return took


def _median(samples: Sequence[Sample]) -> Sample:
    rate, thread, napi, batch = zip(*((s.rate, s.thread, s.napi, s.batch) for s in samples), strict=True)
    return Sample(*map(statistics.median, (rate, thread, napi, batch)))


def _show(experiment: Experiment, rows: dict[str, Row]) -> None:
    experiment.table(
        f"Frames of {SHORT_PAYLOAD} bytes. k/s: thousand packets a second when {ALL:,} are offered; ns: "
        f"the receiver's CPU time a packet; easy: at {EASY:,} a second; kernel: NAPI's, on the same core; "
        "lone: µs until a lone frame is seen, median and 99th percentile",
        ["", "k/s", "ns", "batch", "easy ns", "kernel", "lone", "p99"],
        [
            (
                name,
                f"{row.full.rate / 1e3:.0f}",
                f"{row.full.thread:.0f}",
                f"{row.full.batch:.0f}",
                f"{row.easy.thread:.0f}",
                f"{row.easy.napi:.0f}",
                f"{row.median:.0f}",
                f"{row.lone[int(len(row.lone) * 0.99)]:.0f}",
            )
            for name, row in rows.items()
        ],
    )


def _claim_costs(experiment: Experiment, rows: dict[str, Row]) -> None:
    v2, patient, v3, multishot = (rows[name] for name in (V2, PATIENT, V3, MULTISHOT))
    experiment.claim(
        "at full load ring V2 takes at least 1.2 times the packets of multishot recv",
        v2.full.rate >= 1.2 * multishot.full.rate,
        f"{v2.full.rate:,.0f} and {multishot.full.rate:,.0f} packets/s: {v2.full.rate / multishot.full.rate:.2f}x",
    )
    experiment.claim(
        f"at {EASY:,} packets/s ring V2 costs its reader less CPU time than multishot recv",
        v2.easy.thread < multishot.easy.thread,
        f"{v2.easy.thread:.0f} and {multishot.easy.thread:.0f} ns/packet",
    )
    experiment.claim(
        "ring V3 holds a lone frame back: its median is at least 3 times ring V2's",
        v3.median >= 3 * v2.median,
        f"{v3.median:.0f} and {v2.median:.0f} µs (multishot {multishot.median:.0f} µs)",
    )
    experiment.claim(
        "what ring V3 saves is mostly batch size: V2 that lets batches grow costs at most 3.5 times its CPU time",
        patient.full.thread <= 3.5 * v3.full.thread,
        f"loaded: V2 {v2.full.thread:.0f}, patient {patient.full.thread:.0f}, V3 {v3.full.thread:.0f} ns/packet",
    )


def _merged(experiment: Experiment, network: Network, plan: Plan) -> None:
    samples: dict[str, list[Sample]] = {}
    for _ in range(plan.easy):
        for method in MERGED:
            sample = _under_load(method, network, LONG_PAYLOAD, ALL, plan.seconds)
            samples.setdefault(method.name, []).append(sample)
    experiment.table(
        f"Datagrams of {LONG_PAYLOAD} bytes that GRO merged; k/s and ns are of datagrams (no claims on this)",
        ["", "k/s", "ns", "kernel", "frames a batch"],
        [
            (name, f"{s.rate / 1e3:.0f}", f"{s.thread:.0f}", f"{s.napi:.0f}", f"{s.batch:.1f}")
            for name, s in ((name, _median(each)) for name, each in samples.items())
        ],
    )


if __name__ == "__main__":
    main()
