"""The measurements: each makes a lab for each peer, runs it there, loads it and returns figures.

Called by run_bench.py for each step of its plan; blocks for the step. Figures are floats by name: rates in
datagrams a second, delays in microseconds, processor time in nanoseconds for each datagram out. RuntimeError or
OSError when a peer can't do what was asked.
"""

import contextlib
import json
import math
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import costs
import lab as labs
import search
from cases import LATENCY_RATES, Case, Section
from histogram import quantiles
from peers import Peer
from relays import Relay, running
from traffic import Flow, Programs, Source, UdpSource, XdpSource, frame

LOADS: Final = (100_000, 250_000, 500_000, 1_000_000, 2_000_000, 3_000_000)  # offered, for the curve
COST_RATE: Final = 100_000  # out
SPACING_RATES: Final = (100_000, 500_000)
CHANGE_RATE: Final = 100_000
TURNS: Final = 4  # of overload for each relay in a step: short, so that turns to be compared are close together
WARM: Final = 0.5  # seconds of each turn before: kernel routing begins a quarter faster than it goes on
COSTED: Final = 2  # of them are followed by a look at what forwarding costs
LONGEST_CHANGE: Final = 60.0  # seconds
LONGEST_WAIT: Final = 5.0  # seconds from the answer to a request until what it asked for is forwarded
ADDED: Final = 15  # rules, each to an own flow
LEARN_RATE: Final = 12_000  # new flows a second: below mrelay's limit on misses
MOST_LESSONS: Final = 5
SHARES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
CURVE: Final = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0)
Figures = dict[str, float]


@dataclass(frozen=True)
class Entry:
    """Who, in what case."""

    peer: Peer
    case: Case

    def __str__(self) -> str:
        return f"{self.case}, {self.peer.name}"


@dataclass(frozen=True)
class Setup:
    """How long and how hard: seconds of each part, packets offered a second."""

    cores: labs.Cores
    pps: float = 3.5e6  # more than a relay takes of merged frames, less than the source can
    warm: float = 1.0
    seconds: float = 1.6
    trial: float = 0.8
    steps: int = 5
    curve: bool = True


@dataclass
class Outcome:
    """What one turn found, at one offered rate (0: at its own). `curve`: delays in µs at CURVE."""

    rate: int
    figures: Figures
    curve: list[float] = field(default_factory=list)


@dataclass
class Finding:
    """What one step found of an entry, until there was a problem."""

    entry: Entry
    outcomes: list[Outcome] = field(default_factory=list)
    problem: str = ""

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """A problem ends the block, and is noted."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.problem = str(error)


def measure(setup: Setup, section: Section, entries: Sequence[Entry]) -> list[Finding]:
    """One step; in order of the entries."""
    os.sched_setaffinity(0, {setup.cores.source})
    if section.measure == "load":
        return _loads(setup, section, entries)
    alone = {"latency": _latency, "spacing": _spacing, "changes": _changes}[section.measure]
    findings = [Finding(entry) for entry in entries]
    for found in findings:
        with found.noting():
            found.outcomes += alone(setup, found.entry)
    return findings


@dataclass
class _Bench:
    """A peer that forwards, and the load for it."""

    lab: labs.Lab
    programs: Programs
    relay: Relay
    source: Source
    case: Case

    def lost(self, pps: float, seconds: float) -> float:
        """The share of datagrams that did not come out when so many are offered: a trial of the search."""
        sent, came = self.source.sent, sum(self.programs.datagrams())
        with self.source.offering(pps, seconds):
            time.sleep(seconds)
        self.programs.drained()
        expected = (self.source.sent - sent) * self.case.copies
        return max(0.0, 1 - (sum(self.programs.datagrams()) - came) / max(1, expected))

    def out(self, pps: float, seconds: float) -> float:
        """Datagrams out a second while so many are offered."""
        with self.source.offering(pps, seconds + 0.3):
            time.sleep(0.2)
            start, came = time.monotonic(), sum(self.programs.datagrams())
            time.sleep(seconds)
            return (sum(self.programs.datagrams()) - came) / (time.monotonic() - start)


@contextlib.contextmanager
def _bench(setup: Setup, entry: Entry, *, burst: int = 64, threads: bool = True) -> Iterator[_Bench]:
    peer, case = entry.peer, entry.case
    mtu = 1500 if case.payload <= 1472 else 9000
    with (
        labs.Lab(case.outputs, mtu=mtu, segment=case.segment) as lab,
        Programs(case.payload, case.flows) as programs,
        running(peer, lab, case, setup.cores) as relay,
    ):
        with labs.inside(lab.sink):
            programs.attach(lab.sink_indexes())
        if not case.merge:
            with labs.inside(lab.relay):
                programs.keep_polling(socket.if_nametoindex("r0"))
            lab.gro_off()
        if threads:
            lab.thread_napi(setup.cores)
        if case.sender != "xdp":
            lab.steer(setup.cores.relay)
        yield _Bench(lab, programs, relay, _source(lab, programs, case, burst), case)


def _source(lab: labs.Lab, programs: Programs, case: Case, burst: int = 64) -> Source:
    if case.sender == "xdp":
        return _xdp(lab, programs, case.traffic(), df=case.df, burst=burst)
    return UdpSource(lab, case.traffic()[0], case.payload, merged=case.sender == "udp-merged")


def _xdp(lab: labs.Lab, programs: Programs, flows: list[Flow], *, df: bool = True, burst: int) -> XdpSource:
    frames = [frame(flow, programs.payload, df=df) for flow in flows]
    return XdpSource(programs, frames, "s0", partial(labs.inside, lab.source), burst=burst)


# ---- load ------------------------------------------------------------------------------------------


@dataclass
class _Entrant:
    """A relay that is loaded in turn with others. `before`: what was lost until then."""

    found: Finding
    bench: _Bench
    before: "_Stages"


def _loads(setup: Setup, section: Section, entries: Sequence[Entry]) -> list[Finding]:
    """All relays stand side by side and take turns, so that what slows the machine down for seconds slows all."""
    findings = [Finding(entry) for entry in entries]
    entrants: list[_Entrant] = []
    with contextlib.ExitStack() as stack:
        for found in findings:
            with found.noting():
                stack.enter_context(found.noting())  # its end may fail, too, and is its own
                bench = stack.enter_context(_bench(setup, found.entry))
                _learn(bench)
                entrants.append(_Entrant(found, bench, _Stages.of(bench)))
        _take_turns(setup, section, entrants)
    return findings


def _take_turns(setup: Setup, section: Section, entrants: Sequence[_Entrant]) -> None:
    """To and fro. A peer that has a problem takes no part any more."""
    for number in range(TURNS):
        for one in reversed(entrants) if number % 2 else entrants:
            if not one.found.problem:
                with one.found.noting():
                    one.found.outcomes.append(Outcome(0, _turn(setup, one.bench, number)))
    for one in entrants:
        if not one.found.problem:
            with one.found.noting():
                one.bench.programs.drained()
                lost = _Stages.of(one.bench).since(one.before)
                one.found.outcomes[-1].figures |= lost | _once(setup, section, one.bench, one.found)


def _turn(setup: Setup, bench: _Bench, number: int) -> Figures:
    """All turns together are measured as long as the set-up says, all looks at the cost half as long."""
    figures = _overload(replace(setup, warm=WARM, seconds=setup.seconds / TURNS), bench)
    if number % (TURNS // COSTED) == 0:
        figures |= _cost(replace(setup, seconds=setup.seconds / 2 / COSTED), bench)
    return figures


def _once(setup: Setup, section: Section, bench: _Bench, found: Finding) -> Figures:
    """What takes no turns."""
    figures = costs.memory(bench.relay.pids())
    if section.curve and setup.curve and bench.case.outputs == 1:
        figures |= {f"out_at_{load}": bench.out(load, setup.trial / 2) for load in LOADS}
    if section.search and bench.case.outputs == 1:
        ceiling = min(setup.pps, 1.05 * max(each.figures["out"] for each in found.outcomes))
        figures["lossless"] = search.highest(lambda pps: bench.lost(pps, setup.trial), ceiling, setup.steps)
    return figures


def _learn(bench: _Bench) -> None:
    """Each flow is seen twice, at a rate at which new ones are taken, until all come out. Then only the busy ones.

    A relay that still learns under load would be measured at that.
    """
    seconds = max(0.5, 2.2 * bench.case.flows / LEARN_RATE)
    for _ in range(MOST_LESSONS):
        if bench.lost(LEARN_RATE, seconds) == 0:
            break
    if busy := bench.case.busy:
        bench.source = _xdp(bench.lab, bench.programs, bench.case.traffic()[:busy], burst=64)


def _overload(setup: Setup, bench: _Bench) -> Figures:
    """More than anybody can take: what comes out, and who had room."""
    with bench.source.offering(setup.pps, setup.warm + setup.seconds + 0.2):
        time.sleep(setup.warm)
        first, start = _Counts.of(setup, bench), time.monotonic()
        time.sleep(setup.seconds)
        last, seconds = _Counts.of(setup, bench), time.monotonic() - start
    bench.programs.drained()
    each = [now - then for now, then in zip(last.datagrams, first.datagrams, strict=True)]
    total, frames = sum(each), last.frames - first.frames
    if not all(each):
        raise RuntimeError(f"an output sent nothing ({each}): {bench.relay.words()}")
    if abs(last.by_size - first.by_size - total) > 0.001 * total + 64 * len(each):
        raise RuntimeError(f"{total} datagrams came, but by their bytes {last.by_size - first.by_size}")
    busy = costs.spent(first.costs, last.costs, seconds, total)
    return {
        "out": total / seconds,
        "offered": (last.sent - first.sent) / seconds,
        "wanted": setup.pps,
        "merged": total / frames,
        "sink_share": 100 * frames / seconds * bench.programs.sink_seconds(),
        **{f"busy_{name}": busy[name] for name in ("cpu", "sink_idle", "core_steal")},
    }


@dataclass(frozen=True)
class _Counts:
    """So far, at one moment of a load."""

    sent: int
    datagrams: list[int]
    by_size: int
    frames: int
    costs: costs.Snapshot

    @classmethod
    def of(cls, setup: Setup, bench: _Bench) -> Self:
        spent = costs.Snapshot.of(bench.relay.pids(), bench.lab, setup.cores)
        programs = bench.programs
        return cls(
            bench.source.sent,
            programs.datagrams(),
            sum(programs.payload_bytes()) // programs.payload,
            programs.frames(),
            spent,
        )


def _cost(setup: Setup, bench: _Bench) -> Figures:
    """At a rate that every relay is offered alike, and all but socat can take."""
    with bench.source.offering(max(2000, COST_RATE / bench.case.copies), setup.seconds + 0.6):
        time.sleep(0.4)
        first, start = _Counts.of(setup, bench), time.monotonic()
        time.sleep(setup.seconds)
        last, seconds = _Counts.of(setup, bench), time.monotonic() - start
    found = costs.spent(first.costs, last.costs, seconds, sum(last.datagrams) - sum(first.datagrams))
    if bench.case.sender != "xdp":  # softirqs, which are nobody's
        found |= dict.fromkeys(("cpu", "cpu_network"), math.nan)
    return found


@dataclass(frozen=True)
class _Stages:
    """Counts so far of what was lost, and where: `ring` and `relay` in datagrams in, `egress` in frames out.

    all: datagrams that should have come out and did not.
    ring: the queue of the interface into the relay was full. relay: by the relay's counters, or by those of
    sockets in its namespace. egress: the queues of the interfaces to the sink.
    """

    all: int
    ring: int
    relay: int
    egress: int

    @classmethod
    def of(cls, bench: _Bench) -> Self:
        egress = [link for name, link in _links(bench.lab.relay).items() if name.startswith("r") and name != "r0"]
        with labs.inside(bench.lab.relay):
            snmp = Path("/proc/thread-self/net/snmp").read_text()
        names, values = (line.split() for line in snmp.splitlines() if line.startswith("Udp:"))
        sockets = int(dict(zip(names, values, strict=True))["RcvbufErrors"])
        return cls(
            bench.source.sent * bench.case.copies - sum(bench.programs.datagrams()),
            _links(bench.lab.source)["s0"]["tx"]["dropped"],
            sum(bench.relay.drops().values()) + sockets,
            sum(link["tx"]["dropped"] for link in egress),
        )

    def since(self, before: "_Stages") -> Figures:
        """How many more by now."""
        return {
            "lost": float(self.all - before.all),
            **{
                f"lost_{name}": float(getattr(self, name) - getattr(before, name))
                for name in ("ring", "relay", "egress")
            },
        }


def _links(namespace: str) -> dict[str, Any]:
    """`ip -s link`'s counters, by interface."""
    line = ["ip", "-n", namespace, "-j", "-s", "link"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=20)
    return {link["ifname"]: link["stats64"] for link in json.loads(done.stdout)}


# ---- latency and spacing ---------------------------------------------------------------------------


def _latency(setup: Setup, entry: Entry) -> list[Outcome]:
    """Evenly spaced datagrams. No threads for NAPI: frames are handled where the interrupt would be."""
    with _bench(setup, entry, burst=1, threads=False) as bench:
        return [_timed(setup, bench, rate) for rate in LATENCY_RATES]


def _timed(setup: Setup, bench: _Bench, rate: int) -> Outcome:
    with bench.source.offering(rate, setup.warm):
        time.sleep(setup.warm)
    bench.programs.drained()
    bench.programs.forget()
    sent = bench.source.sent
    with bench.programs.timing():
        with bench.source.offering(rate, setup.seconds):
            time.sleep(setup.seconds)
        bench.programs.drained()
    came, sent = sum(bench.programs.datagrams()), bench.source.sent - sent
    delays = [delay / 1000 for delay in quantiles(bench.programs.delays, list(SHARES.values()))]
    curve = [delay / 1000 for delay in quantiles(bench.programs.delays, CURVE)]
    figures = dict(zip(SHARES, delays, strict=True))
    return Outcome(rate, {**figures, "sent": sent, "lost": sent * bench.case.copies - came}, curve)


def _spacing(setup: Setup, entry: Entry) -> list[Outcome]:
    """The same as the receiver sees it: gaps between datagrams that were sent evenly, one at a time."""
    found = []
    with _bench(setup, entry, burst=1) as bench:
        for rate in SPACING_RATES:
            _timed(setup, bench, rate)
            gaps = [gap / 1000 for gap in quantiles(bench.programs.gaps, list(SHARES.values()))]
            delays = [delay / 1000 for delay in quantiles(bench.programs.delays, list(SHARES.values()))]
            merged = sum(bench.programs.datagrams()) / max(1, bench.programs.frames())
            together = bench.programs.gaps[0] / max(1, int(bench.programs.gaps.sum()))
            figures = {f"gap_{name}": gap for name, gap in zip(SHARES, gaps, strict=True)}
            figures |= {f"delay_{name}": delay for name, delay in zip(SHARES, delays, strict=True)}
            found.append(Outcome(rate, {**figures, "merged": merged, "together": 100 * float(together)}))
    return found


# ---- changes ---------------------------------------------------------------------------------------


def _changes(setup: Setup, entry: Entry) -> list[Outcome]:
    """Time until added rules forward; datagrams lost across reload, restart and kills.

    No threads for NAPI: on the relay's core they would have to share it with what starts there.
    """
    with _bench(setup, entry, threads=False) as bench:
        figures: Figures = {}
        if entry.peer.add:
            asked = (bench.relay.adding(number) for number in range(1, ADDED + 1))
            delays = sorted(_until_forwarded(bench, *each) for each in asked)
            figures |= {"add": delays[ADDED // 2], "add_worst": delays[-1]}
        bench.source = _source(bench.lab, bench.programs, entry.case)
        bench.lost(CHANGE_RATE, setup.warm)
        figures["lost_steady"] = _lost_across(bench, 3.0, lambda: None)
        figures["lost_reload"] = _lost_across(bench, 3.0, bench.relay.reload)
        figures["lost_restart"] = _lost_across(bench, 8.0, bench.relay.restart)
        figures["lost_killed"] = _lost_across(bench, 8.0, bench.relay.killed)
        if entry.peer.put:
            figures["put"] = _until_forwarded(bench, *bench.relay.putting(ADDED + 1))
    return [Outcome(0, figures)]


def _until_forwarded(bench: _Bench, flow: Flow, ask: Callable[[], None]) -> float:
    """Milliseconds from the request that adds a flow to the first of its datagrams at the receiver."""
    bench.programs.forget()
    source = _xdp(bench.lab, bench.programs, [flow], burst=1)
    with source.offering(10_000, LONGEST_CHANGE):
        time.sleep(0.2)
        start = time.monotonic_ns()
        ask()
        end = time.monotonic() + LONGEST_WAIT
        while not bench.programs.first() and time.monotonic() < end:
            time.sleep(0.01)
    if not bench.programs.first():
        raise RuntimeError(f"what was added is not forwarded: {bench.relay.words()}")
    return (bench.programs.first() - start) / 1e6


def _lost_across(bench: _Bench, seconds: float, change: Callable[[], None]) -> float:
    """Datagrams lost while `change` is made half a second into a stream."""
    sent, came = bench.source.sent, sum(bench.programs.datagrams())
    with bench.source.offering(CHANGE_RATE, LONGEST_CHANGE):
        end = time.monotonic() + seconds
        time.sleep(0.5)
        change()
        time.sleep(max(0.5, end - time.monotonic()))
    bench.programs.drained()
    return (bench.source.sent - sent) * bench.case.copies - (sum(bench.programs.datagrams()) - came)
