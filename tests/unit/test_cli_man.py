"""The manual page says what the command line says."""

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from mrelay.cli import COMMANDS, RULE_COMMANDS
from unit.script import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def make_man() -> ModuleType:
    return load_script("make_man")


def test_the_page_is_current(make_man: ModuleType) -> None:
    current = (ROOT / "docs" / "man" / "mrelay.1").read_text(encoding="utf-8")
    assert current == make_man.page(), "run: python scripts/make_man.py"


def test_every_command_is_in_it(make_man: ModuleType) -> None:
    text = make_man.page()
    names = [command.name for command in COMMANDS] + [f"rule {command.name}" for command in RULE_COMMANDS]
    assert all(f".SS mrelay {name}" in text for name in names)


def test_roff_finds_no_fault_with_it(make_man: ModuleType) -> None:
    if shutil.which("groff") is None:
        pytest.skip("needs groff")
    result = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z"],
        input=make_man.page(),
        text=True,
        capture_output=True,
        check=True,
    )
    assert result.stderr == ""
