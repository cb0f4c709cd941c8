"""Throughput and latency of mrelay beside socat and kernel multicast routing, in one run on one machine.

The benchmark's command: `python bench/relay_bench.py [--help]`, as root. Everything happens in network
namespaces of its own (lab.py), which are removed at the end, however it ends. The source has one core,
the relay and the sink share another. Systems take turns within each round, so that a slow spell of the
machine falls on all of them; medians and spread are over the rounds. Blocks until done, within a time
limit that follows from what was asked for. Exit code: 0 measured, 1 failed, or with --check a missed target.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

import lab as labs
import latency
import report
import systems
from report import Counted, Rate
from systems import Case, System
from traffic import Sink, Source

PAYLOAD: Final = 1000  # bytes
_WARM_UP: Final = 2.5  # seconds of load before counting: flows are learnt, queues full, the spare worker started
_TAIL: Final = 0.2  # seconds of load after it
_TOOLS: Final = {"mroute": "smcrouted", "mroute-gro": "smcrouted", "socat": "socat"}
_OVERHEAD: Final = 45  # seconds at most that one measurement takes beside its load: start, stop, namespaces


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, report."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=options.json == "-")
    try:
        chosen = _chosen(options)
        results = _measure_all(options, chosen, console)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report.show(results, console)
    if options.json:
        text = json.dumps(report.as_json(results), indent=2) + "\n"
        _ = sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text)
    if not results.rates and not results.latencies:
        return 1
    return int(options.check and not all(verdict.met for verdict in report.verdicts(results)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="mrelay beside socat and kernel multicast routing")
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="times everything is measured (default %(default)s)")
    add("--seconds", type=float, default=3.0, help="of load for each measurement (default %(default)s)")
    add("--pps", type=float, default=2e6, help="packets offered a second (default %(default)g)")
    add("--outputs", type=int, nargs="+", default=[1, 4], metavar="N", help="default: 1 4")
    add("--flows", nargs="+", choices=("one", "interleaved"), default=["one", "interleaved"])
    add("--no-gro", action="store_true", help="also with GRO off")
    add("--no-df", action="store_true", help="also from senders that don't set DF, which mroute-gro needs")
    add("--rule-per-flow", action="store_true", help="interleaved: 200 mrelay rules instead of one prefix")
    add("--systems", nargs="+", metavar="NAME", help="only these (see systems.py)")
    add("--extra", action="append", default=[], metavar="NAME=COMMAND", help=systems.from_command.__doc__)
    add("--latency", action="store_true", help="measure latency too")
    add("--latency-only", action="store_true", help="measure nothing but latency")
    add("--latency-pps", type=int, default=20_000, help="packets a second for it (default %(default)s)")
    add("--source-core", type=int, default=0, help="core of the source (default %(default)s)")
    add("--relay-core", type=int, default=1, help="core of relay and sink (default %(default)s)")
    add("--json", metavar="FILE", help="write everything as JSON; - is standard output")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    return parser


def _chosen(options: argparse.Namespace) -> list[System]:
    """The systems asked for. ValueError names what can't be."""
    if os.geteuid():
        raise ValueError("needs root for namespaces and BPF; remedy: sudo")
    cores = os.sched_getaffinity(0)
    if not {options.source_core, options.relay_core} <= cores or options.source_core == options.relay_core:
        raise ValueError(f"needs two cores of {sorted(cores)}; remedy: --source-core and --relay-core")
    known = systems.known(options.relay_core)
    names = [system.name for system in known]
    for name in options.systems or ():
        if name not in names:
            raise ValueError(f"no system {name!r}; known: {' '.join(names)}")
    chosen = [system for system in known if not options.systems or system.name in options.systems]
    for system in chosen:
        tool = _TOOLS.get(system.name, "ip")
        if not shutil.which(tool):
            raise ValueError(
                f"{tool} is not installed; remedy: install it, or leave {system.name} out by --systems"
            )
    return chosen + [systems.from_command(text) for text in options.extra]


def _measure_all(options: argparse.Namespace, chosen: list[System], console: Console) -> report.Results:
    plan = _plan(options, chosen)
    peers = [system.name for system in chosen if system.peer]
    settings: dict[str, Any] = {"payload": PAYLOAD, **vars(options)}
    results = report.Results(peers, settings)
    _end_by(len(plan) * options.rounds * (options.seconds + _OVERHEAD))
    for number in range(1, options.rounds + 1):
        for what, system, measure in plan:
            console.print(f"round {number}/{options.rounds}  {what}: {system.name}", style="dim", highlight=False)
            try:
                measure(results, number)
            except (OSError, RuntimeError) as error:
                results.problems.append(f"{what}, {system.name}: {error}")
    return results


_Measure = Callable[[report.Results, int], None]


def _plan(options: argparse.Namespace, chosen: list[System]) -> list[tuple[str, System, _Measure]]:
    """One round: what is measured, in order."""
    plan: list[tuple[str, System, _Measure]] = []
    flows = [] if options.latency_only else options.flows
    cases = [Case(kind, n, options.rule_per_flow) for kind in flows for n in options.outputs]
    plain = [case for case in cases if case.flows == "one"]
    cases += [dataclasses.replace(case, gro=False) for case in plain if options.no_gro]
    cases += [dataclasses.replace(case, df=False) for case in plain if options.no_df]
    for case in cases:
        plan += [(str(case), system, _throughput(options, system, case)) for system in chosen if system.can(case)]
    if options.latency or options.latency_only:
        plan += [("latency", system, _latency(options, system)) for system in chosen]
    return plan


def _throughput(options: argparse.Namespace, system: System, case: Case) -> _Measure:
    def measure(results: report.Results, number: int) -> None:
        with labs.Lab(case.outputs) as lab:
            lab.gro()
            indexes = lab.sink_indexes()
            with labs.inside(lab.sink):
                sink = Sink(indexes, PAYLOAD)
            with sink, systems.running(system, lab, case, options.relay_core) as files:
                lab.thread_napi(options.relay_core)
                counted = _count(options, lab, sink, case)
                if not all(counted.outputs):
                    silent = f"{case}, {system.name}: an output sent nothing: {systems.words(files)}"
                    results.problems.append(silent)
            results.rates.append(Rate(case, system.name, number, counted))

    return measure


def _count(options: argparse.Namespace, lab: labs.Lab, sink: Sink, case: Case) -> Counted:
    """Load the relay and count what comes out while it is loaded."""
    os.sched_setaffinity(0, {options.source_core})
    with labs.inside(lab.source):
        source = Source(socket.if_nametoindex("s0"), case.traffic(), PAYLOAD, options.pps, df=case.df)
        with source.offering(_WARM_UP + options.seconds + _TAIL):
            time.sleep(_WARM_UP)
            start, sent, out, sized = time.monotonic(), source.sent, sink.segments(), sink.datagrams()
            time.sleep(options.seconds)
            seconds = time.monotonic() - start
            offered = source.sent - sent
            each = [now - then for now, then in zip(sink.segments(), out, strict=True)]
            by_size = [now - then for now, then in zip(sink.datagrams(), sized, strict=True)]
    return Counted(seconds, offered, tuple(each), sum(by_size))


def _latency(options: argparse.Namespace, system: System) -> _Measure:
    """Interfaces as they come, no threaded NAPI: each system as it would be set up for low latency."""
    case = Case("one", 1)

    def measure(results: report.Results, _: int) -> None:
        os.sched_setaffinity(0, {options.source_core})
        with labs.Lab(1) as lab, systems.running(system, lab, case, options.relay_core):
            flow = case.traffic()[0]
            rate, seconds = options.latency_pps, options.seconds
            one = latency.measure(lab, (flow.group, flow.port), system.sink, rate, seconds)
        results.latencies.setdefault(system.name, []).append(one)

    return measure


def _end_by(seconds: float) -> None:
    """SIGTERM, or `seconds` gone by, ends the run as an error does: with everything cleaned up."""

    def too_long(*_: object) -> None:
        raise SystemExit(f"error: not done after {seconds:.0f} s")

    def told_to(*_: object) -> None:
        raise SystemExit(1)

    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGTERM, told_to)
    signal.alarm(int(seconds) + 1)


if __name__ == "__main__":
    sys.exit(main())
