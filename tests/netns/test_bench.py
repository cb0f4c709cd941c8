"""The benchmark from end to end, as small as it goes: measures, writes what it found, leaves nothing behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import peers  # bench/, for all of these
import relays
import scheduling
from cases import Case
from lab import BACKLOG, Cores, Lab
from measure import COSTED
from netns import fast
from netns.lab import eventually

pytestmark = [pytest.mark.netns, pytest.mark.alone]
BENCH = Path(__file__).resolve().parents[2] / "bench" / "run_bench.py"


def require() -> None:
    fast.require()
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    require()
    line = [sys.executable, str(BENCH), "--out", str(out), *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left_behind(pid: int) -> list[str]:
    return [each.name for each in Path("/run/netns").glob(f"mrb{pid}-*")]


def test_measures_and_clears_away(tmp_path: Path) -> None:
    backlog = BACKLOG.read_text()
    run = start(
        tmp_path, "--only", "small", "latency", "--peers", "mrelay-tc", "--rounds", "1", "--seconds", "0.3",
        "--pps", "200000",
    )  # fmt: skip
    said, _ = run.communicate(timeout=55)
    assert run.returncode == 0, said
    assert not left_behind(run.pid)
    assert BACKLOG.read_text() == backlog
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"]
    *turns, load = [sample["figures"] for sample in result["samples"] if sample["section"] == "small"]
    assert all(0 < turn["out"] <= turn["offered"] * 1.1 for turn in [*turns, load])
    costs = [turn["cpu"] for turn in turns if "cpu" in turn]
    assert len(costs) == COSTED
    assert min(costs) > 0
    assert load["lost"] >= 0
    assert load["pss"] > 10
    delays = [sample["figures"] for sample in result["samples"] if sample["section"] == "latency"]
    assert all(0 < each["p50"] <= each["p99"] <= each["max"] for each in delays), delays
    assert (tmp_path / "latency.svg").exists()
    assert "Latency at 1,000/s" in said


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    load = ("--rounds", "50", "--seconds", "0.1", "--pps", "50000")
    run = start(tmp_path, "--only", "small", "--peers", "mrelay-uring", *load)
    result = tmp_path / "result.json"
    eventually(result.exists, "the first figures", 40)
    time.sleep(0.5)  # anywhere within the next step
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 0, said
    assert not left_behind(run.pid)
    found = json.loads(result.read_text())
    assert found["samples"]
    assert not found["complete"]
    assert "interrupted" in said


def test_what_is_started_under_load_runs_as_usual() -> None:
    """The load's thread comes before all others; a relay that it starts again must not."""
    with scheduling.real_time(1):
        assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
        line = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
        done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=20)
    assert int(done.stdout) == os.SCHED_OTHER
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@contextlib.contextmanager
def on(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_relay_is_killed_started_and_given_thousands_of_rules() -> None:
    """On its own core, although the benchmark is on the source's meanwhile."""
    require()
    cores = Cores.chosen(os.sched_getaffinity(0))
    (peer,) = [each for each in peers.load() if each.name == "mrelay-tc"]
    with Lab() as lab, on(cores.source), relays.running(peer, lab, Case(), cores) as relay:
        before = relay.pids()
        assert len(before) >= 3, "supervisor, control, worker"
        relay.killed()
        assert not set(before) & set(relay.pids())
        assert {tuple(os.sched_getaffinity(pid)) for pid in relay.pids()} == {(cores.relay,)}
        flow, put = relay.putting(1)
        put()
        listed = relay.shell("{{ python }} -m mrelay rule list --json --socket {{ directory }}/control.sock")
    sources = [rule["from"] for rule in json.loads(listed.stdout)["rules"]]
    assert len(sources) == 10_000
    assert flow.group in sources[-1]
