"""mrelay measured beside what people would use instead: `make bench`.

The command `python bench/run_bench.py [--help]`, as root. Everything happens in network namespaces of its own
(lab.py), which are removed at the end, however it ends; Ctrl-C ends it with what was measured so far. What is
measured stands in cases.py, who is measured in peers.toml. Blocks until done. Exit code: 0 measured, 1 failed, or
with --check a missed target.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

import lab as labs
import machine
import measure
import page
import peers
import plots
import tables
from cases import SECTIONS
from mrelay.kernel import libbpf
from peers import Peer
from plan import Choice, Clock, Step, steps
from results import Results, Sample
from targets import verdicts

OUT: Final = Path(__file__).resolve().parent / "results" / "local"
QUICK: Final[dict[str, Any]] = {"warm": 0.5, "seconds": 0.7, "trial": 0.3, "steps": 3, "curve": False}
_EXAMPLES: Final = """examples:
  make bench                                    everything, in 70 minutes; docs/performance.md says what it means
  make bench QUICK=1                            the main figures, under five minutes
  make bench ARGS="--only latency --peers mrelay-tc smcroute --rounds 5"
  make bench ARGS="--record"                    and fill docs/performance.md from it
another relay to compare with: add it to bench/peers.toml"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, report."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        setup, choice = _setup(options)
        results, plan = _prepare(options, setup, choice, console)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _run(plan, setup, results, console, options.out)
    if not results.samples:
        print("error: nothing was measured", *results.remarks(), sep="\n  ", file=sys.stderr)
        return 1
    show(results, console)
    _keep(results, options, console)
    return int(options.check and not all(verdict.met for verdict in verdicts(results)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    sections = ", ".join(section.name for section in SECTIONS)
    add("--quick", action="store_true", help="one short round of the main figures")
    add("--only", nargs="+", metavar="SECTION", help=f"only these: {sections}")
    add("--peers", nargs="+", metavar="NAME", help="only these (bench/peers.toml)")
    add("--rounds", type=int, help="times the main figures are measured (default 3; quick: 1)")
    add("--seconds", type=float, help="of load for each figure (default 1.6; quick: 0.7)")
    add("--pps", type=float, default=measure.Setup.pps, help="offered as overload (default %(default)g)")
    add(
        "--out",
        type=Path,
        default=OUT,
        metavar="FOLDER",
        help="for result.json and pictures (default %(default)s)",
    )
    add("--record", action="store_true", help="fill docs/performance.md and keep the run in bench/results")
    add("--check", action="store_true", help="exit 1 when a target is missed")
    add("--list", action="store_true", help="say what would be measured, and how long it takes")
    return parser


def _setup(options: argparse.Namespace) -> tuple[measure.Setup, Choice]:
    """ValueError for what can't be."""
    known = [section.name for section in SECTIONS]
    if unknown := [name for name in options.only or () if name not in known]:
        raise ValueError(f"no section {' '.join(unknown)}; there are: {' '.join(known)}")
    setup = measure.Setup(labs.Cores.chosen(os.sched_getaffinity(0)), pps=options.pps)
    if options.quick:
        setup = replace(setup, **QUICK)
    if options.seconds:
        setup = replace(setup, seconds=options.seconds, trial=options.seconds / 2)
    rounds = options.rounds or (1 if options.quick else 3)
    return setup, Choice(options.only, options.peers, rounds, options.quick)


def _prepare(
    options: argparse.Namespace, setup: measure.Setup, choice: Choice, console: Console
) -> tuple[Results, list[Step]]:
    """Who takes part, and in what. ValueError when nobody can."""
    everybody = peers.load()
    names = [peer.name for peer in everybody]
    if unknown := [name for name in choice.peers or () if name not in names]:
        raise ValueError(f"no peer {' '.join(unknown)}; there are: {' '.join(names)}; more: bench/peers.toml")
    here = [peer for peer in everybody if not peer.missing()]
    plan = steps(choice, here, setup)
    if options.list:
        _list(plan, console)
    if os.geteuid():
        raise ValueError("needs root, for namespaces and BPF; remedy: make bench, or sudo")
    if why := libbpf.available():
        raise ValueError(f"{why}; remedy: apt-get install libbpf1")
    if not plan:
        raise ValueError("none of the peers asked for takes part in what was asked for; remedy: --list")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    chosen = _settings(setup, choice) | {"started": started}
    results = Results(machine.facts(setup.cores), chosen, machine.described(_taking_part(plan, everybody)))
    results.problems += [f"{peer.name}: {peer.missing()}" for peer in everybody if peer.missing()]
    return results, plan


def _taking_part(plan: Sequence[Step], everybody: Sequence[Peer]) -> list[Peer]:
    names = {entry.peer.name for step in plan for entry in step.entries}
    return [peer for peer in everybody if peer.name in names]


def _settings(setup: measure.Setup, choice: Choice) -> dict[str, Any]:
    own = asdict(setup)
    own.pop("cores")
    return {**own, "rounds": choice.rounds, "quick": choice.quick}


def _list(plan: Sequence[Step], console: Console) -> None:
    for step in plan:
        console.print(f"{step.seconds:5.0f} s  round {step.round}  {step}", highlight=False)
    console.print(
        f"{len(plan)} steps, about {sum(step.seconds for step in plan) / 60:.0f} minutes", highlight=False
    )
    raise SystemExit(0)


# ---- measuring -------------------------------------------------------------------------------------


def _run(plan: Sequence[Step], setup: measure.Setup, results: Results, console: Console, out: Path) -> None:
    """All steps, or as many as Ctrl-C lets it; the file is written after each."""
    clock = Clock(sum(step.seconds for step in plan))
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    number = 0
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(20), TextColumn("{task.description}"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Progress(*columns, console=console, transient=True) as progress, labs.room_for_sinks(setup.cores):
            task = progress.add_task("", total=len(plan))
            for number, step in enumerate(plan):
                left = f"{clock.left / 60:.0f} min left" if clock.left > 90 else f"{clock.left:.0f} s left"
                text = f"{left}  round {step.round}  {step}"
                progress.update(task, completed=number, description=text)
                if not console.is_terminal:
                    console.print(f"{number}/{len(plan)}  {text}", highlight=False, soft_wrap=True)
                _one(step, setup, results, clock)
                results.seconds = time.monotonic() - start
                results.save(out / "result.json")
        results.complete = True
    except KeyboardInterrupt:
        results.problems.append(f"interrupted in step {number + 1} of {len(plan)}")
    finally:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def _one(step: Step, setup: measure.Setup, results: Results, clock: Clock) -> None:
    began = time.monotonic()
    try:
        findings = measure.measure(setup, step.section, step.entries)
    except (OSError, RuntimeError) as error:
        results.problems.append(f"{step}, round {step.round}: {error}")
        findings = []
    for found in findings:
        entry = found.entry
        about = (step.section.name, entry.case, entry.peer.name, step.round)
        results.samples += [Sample(*about, one.rate, one.figures, one.curve) for one in found.outcomes]
        if found.problem:
            results.problems.append(f"{entry}, round {step.round}: {found.problem}")
    clock.step(step.seconds, time.monotonic() - began)


# ---- reporting -------------------------------------------------------------------------------------


def show(results: Results, console: Console) -> None:
    """All tables, remarks, verdicts."""
    console.print(tables.peers(results).rich())
    for section in results.sections():
        for table in tables.of(results, section):
            console.print(table.rich())
    for table in (tables.losses(results), tables.memory(results), tables.room(results)):
        if table.rows:
            console.print(table.rich())
    if results.machine["cores"]["relay"] == results.machine["cores"]["sink"]:
        console.print("[yellow]note[/]  two cores: relay and sink share one, so all rates are of both together")
    for remark in results.remarks():
        console.print(f"[yellow]note[/]  {remark}", highlight=False, soft_wrap=True)
    if (judged := tables.judged(results)).rows:
        console.print(judged.rich())


def _keep(results: Results, options: argparse.Namespace, console: Console) -> None:
    file = options.out / "result.json"
    results.save(file)
    made = plots.draw(results, options.out)
    names = " ".join(picture.name for picture in made)
    console.print(f"{results.seconds / 60:.1f} minutes; {file}; {names}", highlight=False, soft_wrap=True)
    if options.record and results.complete:
        page.record(file)
        console.print("recorded in docs/performance.md, README.md and bench/results", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
