"""The experiments, in their short form: their claims hold here, and fail when a premise is taken away.

Each is the program that `make experiments` runs; a kernel or library change that breaks a claim fails its test.
"""

import functools
import sys
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "experiments"))
from run_all import Result, discover, premises, run

PATIENCE = 90.0  # seconds for one that takes 8 on an idle machine
MOST_PREMISES = 6  # of one experiment
TRIES = 2  # the machine may be shared and slow for a moment; what no longer holds fails twice

pytestmark = pytest.mark.netns
SHARING = {  # claim nothing about time that other tests could take from them
    *("closure_passing_test", "poc_closure_ownership", "poc_fd_passing_privdrop", "poc_helper_socket_igmp"),
    "poc_supervisor_lifecycle",
}


def with_marks(program: Path) -> ParameterSet:
    """One process runs all of an experiment's tests, and so the whole experiment only once."""
    mark = pytest.mark.xdist_group(program.stem) if program.stem in SHARING else pytest.mark.alone
    return pytest.param(program, marks=mark, id=program.stem)


each_experiment = pytest.mark.parametrize("program", [with_marks(program) for program in discover()])


def run_short(program: Path, broken: str | None = None) -> Result:
    """A run that came to a verdict; skips by name where this host can't."""
    result = run(program, PATIENCE, short=True, broken=broken)
    if result.state == "lacks":
        pytest.skip(f"{program.stem} needs {result.text}")
    assert result.state in ("holds", "fails"), f"{result.state}: {result.text}\n{result.stderr}"
    return result


@functools.cache
def whole(program: Path) -> Result:
    """With every premise in place."""
    results = (run_short(program) for _ in range(TRIES))
    result = next(results)
    return result if not result.failing else next(results)


def is_noticed(program: Path, premise: str, held: set[str]) -> bool:
    """Whether a claim that held fails for want of this premise."""
    failing = (run_short(program, premise).failing for _ in range(TRIES))
    return any({claim.text for claim in claims} & held for claims in failing)


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
    can_be_broken = premises(program)
    assert 0 < len(can_be_broken) < MOST_PREMISES
    held = {claim.text for claim in whole(program).claims if claim.holds}
    assert [premise for premise in can_be_broken if not is_noticed(program, premise, held)] == []
