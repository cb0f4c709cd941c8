"""Half a minute of `make soak`: the relay stays as it was, its counters add up, and each loss has a reason."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]
SOAK = Path(__file__).parents[2] / "bench" / "soak.py"


@pytest.mark.usefixtures("lab")  # skips where a tool is missing
def test_a_short_soak_is_steady(tmp_path: Path) -> None:
    command = [sys.executable, str(SOAK), "--seconds", "30", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "soak.json").read_text())
    assert {"rules", "flap", "reload", "kill_worker", "kill_control"} <= {what for _, what in run["trouble"]}
    assert (tmp_path / "soak.png").stat().st_size > 10_000
