"""Runs every experiment and prints a table of their verdicts: `make experiments`.

Owns which programs are experiments, how one is run from outside, and the exit status: 0 when every claim that
could be shown held, 1 otherwise. Each runs alone, one after another, in a process group of its own that is gone
afterwards. The tests use `discover`, `run` and `unnoticed`. Blocks for as long as the experiments take.
"""

import argparse
import contextlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiment import EX_FAILED, EX_LACKING, Claim

HERE: Final = Path(__file__).resolve().parent
TRIES: Final = 2  # the machine may be shared and slow for a moment
_GRACE: Final = 5.0  # seconds to clear away after SIGINT
_SHOWN_LINES: Final = 30  # of a crashed program's standard error
_WIDTH: Final = 120  # of the table where there is no terminal

State = Literal["holds", "fails", "lacks", "crashed", "timeout"]
_COLOURS: Final[dict[State, str]] = {
    "holds": "green",
    "fails": "red",
    "lacks": "yellow",
    "crashed": "red",
    "timeout": "red",
}
_EXAMPLES: Final = """examples:
  sudo .venv/bin/python experiments/run_all.py                 all of them (also: make experiments)
  sudo .venv/bin/python experiments/run_all.py --short         the form that the tests run
  sudo .venv/bin/python experiments/run_all.py --break-each    and without each premise: does a claim fail then?
  sudo .venv/bin/python experiments/run_all.py --only igmp     those whose names contain igmp
  sudo .venv/bin/python experiments/run_all.py --json - | jq   verdicts, claims and figures for programs

Exit status: 0 every claim held, 1 one did not, or an experiment crashed or took too long (with --strict also
when one lacks something), 2 wrong arguments."""


@dataclass(frozen=True)
class Result:
    """One experiment's run. `text`: its verdict, what it lacks, or how it ended."""

    name: str
    state: State
    text: str
    seconds: float
    claims: tuple[Claim, ...] = ()
    stderr: str = ""

    @property
    def failing(self) -> list[Claim]:
        return [claim for claim in self.claims if not claim.holds]


def discover(folder: Path = HERE) -> list[Path]:
    """The programs: poc_x/poc_x.py, and the single files poc_*.py and *_test.py; nothing in archive/."""
    programs = [*folder.glob("*_test.py"), *folder.glob("poc_*.py")]
    # A folder whose program is misnamed is one too: it must not go missing in silence.
    programs += [path / f"{path.name}.py" for path in folder.glob("poc_*/") if any(path.glob("*.py"))]
    return sorted(programs, key=lambda program: program.stem)


def run(program: Path, timeout: float, *, short: bool = False, broken: str | None = None) -> Result:
    """Run one experiment; after `timeout` seconds it is ended. `broken`: the premise to take away."""
    arguments = [sys.executable, str(program), "--json"] + ["--short"] * short
    if broken is not None:
        arguments += ["--break", broken]
    begun = time.monotonic()
    # Files, not pipes: a process that the experiment left behind could keep a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        in_time = _wait(process, timeout)
        seconds = time.monotonic() - begun
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    if not in_time:
        return Result(program.stem, "timeout", f"not done after {timeout:g} s", seconds, stderr=stderr)
    return _judge(program.stem, process.returncode, stdout, stderr, seconds)


def premises(program: Path) -> list[str]:
    """What the experiment's `--break` takes."""
    asked = subprocess.run(
        [sys.executable, str(program), "--premises"], capture_output=True, text=True, check=True, timeout=60
    )
    return asked.stdout.split()


def unnoticed(program: Path, whole: Result, timeout: float) -> list[str]:
    """The premises without which no claim fails, in its short form, that held in `whole`; each is tried twice.

    ValueError when a run without one comes to no verdict.
    """
    held = {claim.text for claim in whole.claims if claim.holds}
    return [premise for premise in premises(program) if not _is_noticed(program, premise, held, timeout)]


def _is_noticed(program: Path, premise: str, held: set[str], timeout: float) -> bool:
    for _ in range(TRIES):
        result = run(program, timeout, short=True, broken=premise)
        if result.state not in ("holds", "fails"):
            raise ValueError(f"{program.stem} without {premise}: {result.text}\n{result.stderr}")
        if {claim.text for claim in result.failing} & held:
            return True
    return False


def _wait(process: "subprocess.Popen[bytes]", timeout: float) -> bool:
    """Whether it ended in time. It is gone afterwards, with its process group, whatever happens here."""
    pidfd, in_time = os.pidfd_open(process.pid), False
    try:
        in_time = bool(select.select([pidfd], [], [], timeout)[0])
    finally:
        if not in_time:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: it may still clear away
            select.select([pidfd], [], [], _GRACE)
        os.killpg(process.pid, signal.SIGKILL)  # what it left; its own entry stays until wait(), so nobody else's
        process.wait()
        os.close(pidfd)
    return in_time


def _judge(name: str, status: int, stdout: str, stderr: str, seconds: float) -> Result:
    """What the run shows; a status that does not go with what was printed is a crash."""
    said = _verdict(stdout)
    claims = tuple(Claim(**claim) for claim in said.get("claims", ()))
    if status == 0 and said.get("ok") is True:
        return Result(name, "holds", said["verdict"], seconds, claims)
    if status == EX_FAILED and said.get("ok") is False:
        failing = sum(not claim.holds for claim in claims)
        return Result(name, "fails", f"claims that no longer hold: {failing} of {len(claims)}", seconds, claims)
    if status == EX_LACKING and "lacks" in said:
        return Result(name, "lacks", said["lacks"], seconds, claims)
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return Result(name, "crashed", f"{how}, without its verdict", seconds, claims, stderr)


def _verdict(stdout: str) -> dict[str, Any]:
    """The JSON object on the last line, or nothing."""
    try:
        said = json.loads(stdout.rstrip().rpartition("\n")[2])
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


# ---- what is shown ----


def show(results: Sequence[Result], console: Console) -> None:
    """The table, then the particulars of everything that did not hold."""
    title = ", ".join(f"{key} {value}" for key, value in _host().items())
    table = Table("experiment", "verdict", title=title, title_justify="left")
    for name in ("claims", "seconds"):
        table.add_column(name, justify="right")
    for result in results:
        held = f"{len(result.claims) - len(result.failing)}/{len(result.claims)}" if result.claims else "–"
        state = "" if result.state == "holds" else f"[{_COLOURS[result.state]}]{result.state.upper()}[/] "
        table.add_row(result.name, state + escape(result.text), held, f"{result.seconds:.1f}")
    console.print(table)
    for line in _particulars(results):
        console.print(line, soft_wrap=True)
    counts = {state: sum(result.state == state for result in results) for state in _COLOURS}
    seconds = sum(result.seconds for result in results)
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count) + f"; {seconds:.0f} s")


def _particulars(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        for claim in result.failing:
            yield f"\n[red]FAILS[/]  {result.name}: {escape(claim.text)}\n       {escape(claim.observed)}"
        if result.state in ("crashed", "timeout"):
            lines = result.stderr.splitlines()[-_SHOWN_LINES:] or ["(nothing on standard error)"]
            yield "\n".join([f"\n[red]{result.state}[/]  {result.name}: {result.text}", *map(escape, lines)])
        if result.state == "lacks":
            yield f"\n[yellow]lacks[/]  {result.name} needs {escape(result.text)}"


def _as_json(results: Sequence[Result], *, short: bool) -> str:
    everything = {**_host(), "short": short, "experiments": [asdict(result) for result in results]}
    return json.dumps(everything, indent=2) + "\n"


def _host() -> dict[str, str | int]:
    """What the figures depend on."""
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


# ---- the command ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, one after another; show it."""
    parser = _parser()
    options = parser.parse_args(arguments)
    programs = _chosen(parser, options)
    signal.signal(signal.SIGTERM, _told_to_stop)
    console = Console(stderr=options.json == "-", highlight=False)
    if not console.is_terminal:
        console = Console(stderr=options.json == "-", highlight=False, width=_WIDTH)
    results = []
    for number, program in enumerate(programs, 1):
        console.print(f"{number}/{len(programs)}  {program.stem} …", style="dim", end="")
        results.append(run(program, options.timeout, short=options.short))
        if options.break_each and results[-1].state == "holds":
            results[-1] = _without_each(program, results[-1], options.timeout)
        console.print(f" {results[-1].state}, {results[-1].seconds:.1f} s", style="dim")
    show(results, console)
    if options.json:
        text = _as_json(results, short=options.short)
        _ = sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text)
    accepted = {"holds"} if options.strict else {"holds", "lacks"}
    return 0 if all(result.state in accepted for result in results) else EX_FAILED


def _without_each(program: Path, result: Result, timeout: float) -> Result:
    """The same result, or that of a premise which nobody would miss."""
    begun = time.monotonic()
    try:
        missed = unnoticed(program, result, timeout)
    except ValueError as error:
        return replace(result, state="crashed", text=str(error).partition("\n")[0], stderr=str(error))
    seconds = result.seconds + time.monotonic() - begun
    if missed:
        return replace(result, state="fails", text=f"no claim fails without {', '.join(missed)}", seconds=seconds)
    return replace(result, seconds=seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.py",
        description="Run the experiments and print a table of their verdicts.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--short", action="store_true", help="the short form of each, as the tests run it")
    add("--break-each", action="store_true", help="the short form without each premise, too: a claim must fail")
    add("--only", action="append", metavar="NAME", help="only those whose names contain NAME; may be repeated")
    add("--strict", action="store_true", help="exit 1 also when one lacks something that it needs")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="for each (default %(default)g)")
    add("--json", metavar="FILE", help="write everything as JSON; - is standard output")
    add("--in", dest="folder", type=Path, default=HERE, metavar="FOLDER", help="where they are (default: here)")
    return parser


def _chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Path]:
    programs = discover(options.folder)
    if not programs:
        parser.error(f"no experiment in {options.folder}")
    for name in options.only or ():
        if not any(name in program.stem for program in programs):
            parser.error(f"no experiment's name contains {name!r}; known: {', '.join(p.stem for p in programs)}")
    if not options.only:
        return programs
    return [program for program in programs if any(name in program.stem for name in options.only)]


def _told_to_stop(*_: object) -> NoReturn:
    raise SystemExit(EX_FAILED)  # on its way it ends the experiment that runs


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)  # 128 + SIGINT, as a shell says it
