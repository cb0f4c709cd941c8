"""The experiments that compare no times, in their short form: their claims hold here, and fail without a premise.

Each is the program that `make experiments` runs; a kernel or library change that breaks a claim fails its test.
Those that compare times need a machine of their own: `make experiments` alone runs them.
"""

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
from run_all import HERE, TRIES, Result, premises, run, unnoticed

PATIENCE = 90.0  # seconds for one that takes 8 on an idle machine
MOST_PREMISES = 6  # of one experiment
PROGRAMS = [
    HERE / "closure_passing_test.py",
    HERE / "poc_closure_ownership.py",
    *(HERE / name / f"{name}.py" for name in ("poc_fd_passing_privdrop", "poc_helper_socket_igmp")),
    HERE / "poc_supervisor_lifecycle" / "poc_supervisor_lifecycle.py",
]

pytestmark = pytest.mark.netns
# One process runs both tests of an experiment, and so the whole experiment only once.
each_experiment = pytest.mark.parametrize(
    "program",
    [pytest.param(path, marks=pytest.mark.xdist_group(path.stem), id=path.stem) for path in PROGRAMS],
)


@functools.cache
def whole(program: Path) -> Result:
    """With every premise in place; skips by name where this host can't."""
    for _ in range(TRIES):
        result = run(program, PATIENCE, short=True)
        if result.state == "lacks":
            pytest.skip(f"{program.stem} needs {result.text}")
        assert result.state in ("holds", "fails"), f"{result.state}: {result.text}\n{result.stderr}"
        if not result.failing:
            break
    return result


@each_experiment
@pytest.mark.timeout(TRIES * PATIENCE + 30)
def test_its_claims_hold(program: Path) -> None:
    result = whole(program)
    assert result.failing == []
    assert result.claims


@each_experiment
@pytest.mark.timeout(TRIES * MOST_PREMISES * PATIENCE)
def test_each_of_its_premises_matters(program: Path) -> None:
    """Without it, a claim fails that held: the experiment would notice."""
    assert 0 < len(premises(program)) < MOST_PREMISES
    assert unnoticed(program, whole(program), PATIENCE) == []
