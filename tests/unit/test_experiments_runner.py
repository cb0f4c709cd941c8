"""The experiments' runner on experiments made for it; and the index, which must name the real ones."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
from run_all import Result, discover, premises, run  # noqa: E402 (the experiments are no package)

HEAD = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(EXPERIMENTS)!r})
"""
ONE_CLAIM = """
from experiment import Experiment
exp = Experiment("fake", "One claim.", premises=("sun", "rain"))
exp.claim("water is wet", exp.broken != "rain", "it felt [bold] and wet")
exp.claim("so is rain", True, "it rained")
exp.finish("2 of 2 wet")
"""
FAILS = """
from experiment import Experiment
exp = Experiment("fake", "Fails.")
exp.claim("stones float", False, "17 of 17 sank [so said]")
exp.claim("feathers float", True, "17 of 17 floated")
exp.finish("stones float")
"""
LACKS = """
from experiment import Experiment
Experiment("fake", "Lacks.").lacks("a kernel with CONFIG_UNICORN")
"""
CRASHES = """
print("so far so good")
1 / 0
"""
SAYS_NOTHING = ""
# Waits for ever, with a process that ignores SIGINT; says which in `here`, and when SIGINT let it clear away.
HANGS = """
here = Path(__file__).parent
try:
    child = subprocess.Popen(["sleep", "100"], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    (here / "new").write_text(str(child.pid))
    (here / "new").rename(here / "started")
    time.sleep(100)
finally:
    (here / "cleared").touch()
"""


def fake(folder: Path, **programs: str) -> Path:
    """A folder of experiments; the keys are their names."""
    for name, code in programs.items():
        (folder / name).mkdir()
        (folder / name / f"{name}.py").write_text(HEAD + code)
    return folder


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(EXPERIMENTS / "run_all.py"), "--in", str(folder), *options]


def run_all(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(folder, *options), capture_output=True, text=True, check=False, timeout=50)


def gone(pid: int) -> bool:
    """Whether the process ended: init may not have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)
    return path.read_text()


def test_all_hold(tmp_path: Path) -> None:
    done = run_all(fake(tmp_path, poc_one=ONE_CLAIM, poc_two=ONE_CLAIM))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"poc_(?:one|two) .*2 of 2 wet .* 2/2 ", done.stdout)) == 2
    assert "2 holds" in done.stdout


def test_a_claim_that_fails_is_shown_with_what_was_observed(tmp_path: Path) -> None:
    done = run_all(fake(tmp_path, poc_good=ONE_CLAIM, poc_bad=FAILS))
    assert done.returncode == 1
    assert re.search(r"FAILS +poc_bad: stones float\n +17 of 17 sank \[so said\]", done.stdout)
    assert "feathers" not in done.stdout
    assert "1 holds, 1 fails" in done.stdout


@pytest.mark.parametrize("code, shown", [(CRASHES, "ZeroDivisionError"), (SAYS_NOTHING, "without its verdict")])
def test_a_crash_counts_as_failed_and_the_rest_still_runs(tmp_path: Path, code: str, shown: str) -> None:
    done = run_all(fake(tmp_path, poc_a=code, poc_b=ONE_CLAIM))
    assert done.returncode == 1
    assert shown in done.stdout
    assert "1 holds, 1 crashed" in done.stdout


def test_one_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    done = run_all(fake(tmp_path, poc_hangs=HANGS), "--timeout", "3")
    assert done.returncode == 1
    assert "TIMEOUT not done after 3 s" in done.stdout
    assert gone(int((tmp_path / "poc_hangs" / "started").read_text()))
    assert (tmp_path / "poc_hangs" / "cleared").exists(), "it had no chance to clear away"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_stopping_the_runner_stops_the_experiment(tmp_path: Path, number: int, status: int) -> None:
    folder = fake(tmp_path, poc_hangs=HANGS) / "poc_hangs"
    runner = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        child = int(wait_for(folder / "started"))
        runner.send_signal(number)
        assert runner.wait(30) == status
    finally:
        runner.kill()
        runner.wait()
    assert gone(child)
    assert (folder / "cleared").exists()


def test_what_lacks_something_is_named_and_fails_only_when_strict(tmp_path: Path) -> None:
    fake(tmp_path, poc_a=LACKS, poc_b=ONE_CLAIM)
    lenient, strict = run_all(tmp_path), run_all(tmp_path, "--strict")
    assert (lenient.returncode, strict.returncode) == (0, 1)
    for done in (lenient, strict):
        assert re.search(r"lacks +poc_a needs a kernel with CONFIG_UNICORN", done.stdout)
        assert "1 holds, 1 lacks" in done.stdout


def test_only_some(tmp_path: Path) -> None:
    fake(tmp_path, poc_red=ONE_CLAIM, poc_green=FAILS)
    done = run_all(tmp_path, "--only", "red")
    assert (done.returncode, "green" in done.stdout) == (0, False)
    wrong = run_all(tmp_path, "--only", "blue")
    assert wrong.returncode == 2
    assert "'blue'; known: poc_green, poc_red" in wrong.stderr


def test_json(tmp_path: Path) -> None:
    fake(tmp_path, poc_red=ONE_CLAIM, poc_green=FAILS)
    done = run_all(tmp_path, "--short", "--json", "-")
    said = json.loads(done.stdout)
    green, red = said["experiments"]
    assert (done.returncode, said["short"], said["kernel"]) == (1, True, os.uname().release)
    assert (red["state"], red["text"], len(red["claims"])) == ("holds", "2 of 2 wet", 2)
    assert green["claims"][0] == {"text": "stones float", "holds": False, "observed": "17 of 17 sank [so said]"}


def test_a_premise_taken_away(tmp_path: Path) -> None:
    (program,) = discover(fake(tmp_path, poc_one=ONE_CLAIM))
    assert premises(program) == ["sun", "rain"]
    whole, broken = run(program, 30), run(program, 30, broken="rain")
    assert (whole.state, broken.state) == ("holds", "fails")
    assert [claim.text for claim in broken.failing] == ["water is wet"]
    assert run(program, 30, broken="snow").state == "crashed"


def test_a_premise_that_nobody_misses(tmp_path: Path) -> None:
    done = run_all(fake(tmp_path, poc_one=ONE_CLAIM), "--break-each")
    assert done.returncode == 1
    assert "FAILS no claim fails without sun" in done.stdout


def test_what_is_an_experiment(tmp_path: Path) -> None:
    for name in (
        "poc_x/poc_x.py",
        "poc_x/poc_x_part.py",
        "poc_y/misnamed.py",
        "poc_z.py",
        "a_test.py",
        "run_all.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "archive" / "poc_old").mkdir(parents=True)
    (tmp_path / "archive" / "poc_old" / "poc_old.py").touch()
    (tmp_path / "poc_left" / "__pycache__").mkdir(parents=True)
    found = discover(tmp_path)
    expected = ["a_test.py", "poc_x/poc_x.py", "poc_y/poc_y.py", "poc_z.py"]
    assert [str(path.relative_to(tmp_path)) for path in found] == expected
    misnamed: Result = run(found[2], 30)
    assert misnamed.state == "crashed"
    assert "poc_y.py" in misnamed.stderr


def test_the_index_names_every_experiment_and_each_says_what_it_found() -> None:
    linked = re.findall(r"^\| \[(\w+)\]\(", (EXPERIMENTS / "README.md").read_text(), re.MULTILINE)
    programs = discover()
    assert sorted(linked) == [program.stem for program in programs]
    parts = ("Problem", "learnings", "What it changed", "Related designs", "Verdict")
    for program in programs:
        page = program if program.parent == EXPERIMENTS else program.parent / "README.md"
        missing = [part for part in parts if part not in page.read_text()]
        assert not missing, f"{page}: {missing}"
