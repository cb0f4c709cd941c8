"""What the measurements say: medians, ratios, verdicts against the targets, tables and JSON.

Owns the targets. Called by relay_bench.py at the end; pure apart from printing and reading what
machine this is. Rates are datagrams a second; ratios are of medians over the rounds.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from latency import Latency
from systems import Case


@dataclass(frozen=True)
class Counted:
    """Counts over `seconds` of load: frames offered, datagrams out by output, and their sum by bytes."""

    seconds: float
    offered: int
    outputs: tuple[int, ...]
    by_bytes: int  # differs from the sum of `outputs` only when a relay changed sizes


@dataclass(frozen=True)
class Rate:
    """One measurement of one system."""

    case: Case
    system: str
    round: int
    counted: Counted

    @property
    def offered(self) -> float:
        """Packets a second from the source."""
        return self.counted.offered / self.counted.seconds

    @property
    def out(self) -> float:
        """Packets a second out of the relay, all outputs together."""
        return sum(self.counted.outputs) / self.counted.seconds


@dataclass(frozen=True)
class Target:
    """`out` of our system must be at least `factor` times the peer's in this case."""

    system: str
    case: Case
    peer: str
    factor: float


def _userspace(system: str) -> tuple[Target, ...]:
    return (
        Target(system, Case("one", 1), "socat", 10.0),
        Target(system, Case("one", 1), "mroute", 2.5),
        Target(system, Case("one", 4), "mroute", 4.0),
        Target(system, Case("interleaved", 1), "mroute", 0.6),
        Target(system, Case("interleaved", 4), "mroute", 0.6),
    )


TARGETS: Final = (
    *_userspace("mrelay-uring"),
    *_userspace("mrelay-sendmmsg"),
    Target("mrelay-ebpf", Case("one", 1), "socat", 15.0),
    Target("mrelay-ebpf", Case("one", 1), "mroute", 3.5),
    Target("mrelay-ebpf", Case("one", 4), "mroute", 9.0),
    Target("mrelay-ebpf", Case("one", 8), "mroute", 12.0),
    *(Target("mrelay-ebpf", Case("one", n, df=False), "mroute-gro", 1.0) for n in (1, 4, 8)),
    *(
        Target("mrelay-ebpf", case, "mroute", {1: 2.2, 4: 2.0}[case.outputs])
        for n in (1, 4)
        for case in (Case("interleaved", n), Case("one", n, gro=False))
    ),
)
# Of latency, at the median and at the 99th percentile: the first must be below the second.
LATENCY_TARGET: Final = ("mrelay-ebpf", "mroute")


@dataclass
class Results:
    """Everything measured in one run."""

    peers: list[str]
    settings: dict[str, Any]
    rates: list[Rate] = field(default_factory=list)
    latencies: dict[str, list[Latency]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def cases(self) -> list[Case]:
        """Cases measured, in order."""
        return list(dict.fromkeys(rate.case for rate in self.rates))

    def of(self, case: Case, system: str) -> list[Rate]:
        """All rounds of one system in one case."""
        return [rate for rate in self.rates if rate.case == case and rate.system == system]

    def systems(self, case: Case) -> list[str]:
        """Systems measured in a case, in order."""
        return list(dict.fromkeys(rate.system for rate in self.rates if rate.case == case))

    def out(self, case: Case, system: str) -> float | None:
        """Median packets out per second, None when not measured."""
        rounds = self.of(case, system)
        return median(rate.out for rate in rounds) if rounds else None


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured."""

    case: str
    system: str
    peer: str
    target: float
    ratio: float

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the target."""
        return self.ratio >= self.target


def verdicts(results: Results) -> list[Verdict]:
    """Every target against every system of ours that was measured beside its peer."""
    found = []
    for case in results.cases():
        for target in TARGETS:
            peer, ours = results.out(case, target.peer), results.out(case, target.system)
            if target.case == dataclasses.replace(case, rule_per_flow=False) and peer and ours is not None:
                found.append(Verdict(str(case), target.system, target.peer, target.factor, ours / peer))
    return found + _latency_verdicts(results)


def _latency_verdicts(results: Results) -> list[Verdict]:
    """As ratios too: how many times the peer's latency is ours."""
    ours, theirs = (results.latencies.get(name, []) for name in LATENCY_TARGET)
    if not ours or not theirs:
        return []
    return [
        Verdict(
            f"latency, {name}",
            *LATENCY_TARGET,
            1.0,
            median(getattr(one, name) for one in theirs) / median(getattr(one, name) for one in ours),
        )
        for name in ("p50", "p99")
    ]


def uneven(results: Results) -> list[str]:
    """Where systems were not offered the same: the comparison would not be fair."""
    found = []
    for case in results.cases():
        offered = [rate.offered for rate in results.rates if rate.case == case]
        if max(offered) > 1.06 * min(offered):
            found.append(f"{case}: offered between {_k(min(offered))} and {_k(max(offered))} a second")
    for rate in results.rates:
        segments, by_bytes = sum(rate.counted.outputs), rate.counted.by_bytes
        if abs(segments - by_bytes) > 1000 + segments // 1000:  # the two are read at slightly different times
            found.append(f"{rate.case}, {rate.system}: {segments} datagrams, but {by_bytes} by their bytes")
    return found


def show(results: Results, console: Console) -> None:
    """Print tables, remarks and verdicts."""
    for case in results.cases():
        console.print(_rate_table(results, case))
    if results.latencies:
        console.print(_latency_table(results))
    for problem in dict.fromkeys((*results.problems, *uneven(results))):
        console.print(f"[yellow]note[/]  {problem}", highlight=False, soft_wrap=True)
    for v in verdicts(results):
        word = "[green]met   [/]" if v.met else "[red]missed[/]"
        text = f"{v.case}: {v.system} {v.ratio:.2f}x {v.peer}, target {v.target:g}x"
        console.print(f"{word} {text}", highlight=False, soft_wrap=True)


def _rate_table(results: Results, case: Case) -> Table:
    systems = results.systems(case)
    peers = [name for name in systems if name in results.peers]
    table = Table(title=str(case), title_justify="left")
    for heading in ("system", "offered/s", "out/s", "spread", *(f"x {peer}" for peer in peers)):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for system in systems:
        rounds = results.of(case, system)
        rates = [rate.out for rate in rounds]
        ratios = [_ratio(median(rates), results.out(case, peer)) for peer in peers]
        offered = _k(median(rate.offered for rate in rounds))
        table.add_row(system, offered, _k(median(rates)), f"{_k(min(rates))} – {_k(max(rates))}", *ratios)
    return table


def _latency_table(results: Results) -> Table:
    rate = results.settings["latency_pps"]
    table = Table(title=f"one-way latency at {rate} packets/s, one output, µs", title_justify="left")
    for heading in ("system", "p50", "p99", "p99 spread", "lost"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for system, rounds in results.latencies.items():
        tails = [one.p99 for one in rounds]
        lost = sum(one.sent - one.received for one in rounds)
        spread = f"{min(tails):.1f} – {max(tails):.1f}"
        p50 = median(one.p50 for one in rounds)
        table.add_row(system, f"{p50:.1f}", f"{median(tails):.1f}", spread, str(lost))
    return table


def _ratio(value: float, peer: float | None) -> str:
    return f"{value / peer:.2f}" if peer else "–"


def _k(rate: float) -> str:
    return f"{rate / 1e6:.2f} M" if rate >= 999_500 else f"{rate / 1e3:.0f} k"


def as_json(results: Results) -> dict[str, Any]:
    """The whole run as plain data: machine, versions, settings, every measurement, medians, verdicts."""
    summary = [
        {"case": str(case), "system": system, "out": results.out(case, system)}
        for case in results.cases()
        for system in results.systems(case)
    ]
    return {
        "machine": machine(),
        "settings": results.settings,
        "rates": [{**asdict(rate), "offered": rate.offered, "out": rate.out} for rate in results.rates],
        "latencies": {name: [asdict(one) for one in rounds] for name, rounds in results.latencies.items()},
        "medians": summary,
        "verdicts": [{**asdict(v), "met": v.met} for v in verdicts(results)],
        "problems": [*results.problems, *uneven(results)],
    }


def machine() -> dict[str, str | int]:
    """Where and with what this ran."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count() or 0,
        "kernel": f"{platform.release()} {platform.version()}",
        "python": platform.python_version(),
        "numpy": _package("numpy"),
        "mrelay": _package("mrelay"),
        "smcroute": _first_line("smcrouted", "-v"),
        "socat": _first_line("socat", "-V", want="version"),
    }


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _first_line(*command: str, want: str = "") -> str:
    """The first line of a command's output that contains `want`."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
        return next((line.strip() for line in (done.stdout + done.stderr).splitlines() if want in line), "unknown")
    return "not installed"
