"""Fixtures of the namespace tests. (Without the privileges the tests are skipped by tests/conftest.py.)"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from netns import driver, fast, numbered
from netns.lab import Lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A laboratory that is cleared away after the test."""
    for tool in ("ip", "ethtool"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs the command {tool}")
    with Lab() as made:
        yield made


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that outlives a relay, and that its users can reach (tmp_path is for root only)."""
    made = Path(tempfile.mkdtemp(prefix="mrelay-test-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def pins(folder: Path) -> Iterator[Path]:
    """A BPF file system of the test's own."""
    mounted = folder / "bpf"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "bpf", "bpf", str(mounted)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a BPF file system: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.fixture
def can_do_xdp() -> None:
    """Skips by name of what lacks."""
    driver.require()


@pytest.fixture(scope="session")
def numbers_elf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The programs of numbered.py, compiled; skips where they can't be loaded."""
    fast.require()
    return numbered.compiled()
