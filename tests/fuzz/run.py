"""Coverage-guided fuzzing of every target, for `make fuzz`: Atheris (libFuzzer) drives, each in its own process.

    python tests/fuzz/run.py [--inputs N] [--minutes M] [--targets a,b]   all targets, N inputs in total
    python tests/fuzz/run.py TARGET FILE…                                 try these inputs again, without Atheris

New inputs that reach new code are kept in tests/fuzz/corpus/TARGET, what fails in tests/fuzz/crashes/TARGET, with
the command that repeats it. Exit 1 when anything failed. Blocks until done.
"""

import argparse
import importlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

TESTS: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from fuzz.data import CORPUS, FOLDER, TARGETS  # noqa: E402  needs the path above

CRASHES: Final = FOLDER / "crashes"
INPUT_SECONDS: Final = 20  # one input that takes longer hangs
MEMORY_MB: Final = 2048
_COUNT: Final = re.compile(rb"#(\d+)\s")
_COVERED: Final = re.compile(rb" cov: (\d+)")


@dataclass
class Progress:
    """One target's process, as its output shows it."""

    target: str
    done: int = 0
    covered: int = 0
    seconds: float = 0.0
    failed: bool = False


def main() -> int:
    """The command line above."""
    if len(sys.argv) > 2 and sys.argv[1] in TARGETS:
        return _again(sys.argv[1], sys.argv[2:])
    if len(sys.argv) > 2 and sys.argv[1] == "--child":
        _drive(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description="Fuzz every target.")
    parser.add_argument("--inputs", type=int, default=1_200_000, help="in total, over all targets")
    parser.add_argument("--minutes", type=float, default=0, help="stop after about so long, done or not")
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of: " + ",".join(TARGETS))
    options = parser.parse_args()
    targets = options.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    return _all(targets, options.inputs, options.minutes * 60)


def _all(targets: list[str], inputs: int, seconds: float) -> int:
    """Every target, as many at a time as there are processors."""
    jobs = os.cpu_count() or 1
    share = -(-inputs // len(targets))
    each = seconds * min(jobs, len(targets)) / len(targets)
    states = [Progress(target) for target in targets]
    stopped = threading.Event()
    teller = threading.Thread(target=_tell, args=(states, inputs, stopped))
    teller.start()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda state: _fuzz(state, share, each), states))
    finally:
        stopped.set()
        teller.join()
    total = sum(state.done for state in states)
    failed = [state.target for state in states if state.failed]
    print(f"{total:,} inputs, {len(failed)} of {len(states)} targets failed", *failed)
    return 1 if failed else 0


def _fuzz(state: Progress, inputs: int, seconds: float) -> None:
    """Run one target's process to its end, following what it prints."""
    corpus, crashes = CORPUS / state.target, CRASHES / state.target
    corpus.mkdir(parents=True, exist_ok=True)
    crashes.mkdir(parents=True, exist_ok=True)
    arguments = [f"-runs={inputs}", f"-max_total_time={int(seconds)}", f"-artifact_prefix={crashes}/"]
    arguments += [f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY_MB}", "-max_len=4096", str(corpus)]
    start, tail = time.monotonic(), [b""]
    command = [sys.executable, __file__, "--child", state.target, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail = [*tail[-60:], line]
            if count := _COUNT.match(line):
                state.done = int(count[1])
            if covered := _COVERED.search(line):
                state.covered = int(covered[1])
    state.failed, state.seconds = process.returncode != 0, time.monotonic() - start
    print(f"{state.target:10} {state.done:9,} inputs {state.done / state.seconds:9,.0f}/s  {state.covered} edges")
    if state.failed:
        print(b"".join(tail).decode(errors="replace"))
        again = f"{sys.executable} {__file__} {state.target} {crashes}/…"
        print(f"{state.target} FAILED; repeat it with the file named above: {again}", flush=True)


def _tell(states: list[Progress], inputs: int, stopped: threading.Event) -> None:
    while not stopped.wait(10):
        done = sum(state.done for state in states)
        running = " ".join(f"{s.target} {s.done:,}" for s in states if s.done and not s.seconds)
        print(f"  {done:,} of {inputs:,} inputs ({running})", flush=True)


def _drive(target: str, arguments: list[str]) -> None:
    """The child: does not return, libFuzzer ends the process."""
    import atheris

    logging.disable()  # targets look at results; formatting millions of warnings shows nothing
    with atheris.instrument_imports(include=["mrelay", "tomlkit"]):
        module = importlib.import_module(f"fuzz.target_{target}")
    atheris.Setup([sys.argv[0], *arguments], module.check)
    atheris.Fuzz()


def _again(target: str, files: list[str]) -> int:
    module: Any = importlib.import_module(f"fuzz.target_{target}")
    for file in files:
        print(file)
        module.check(Path(file).read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
