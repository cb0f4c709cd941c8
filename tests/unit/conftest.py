"""Fixtures of the unit tests: a command line run in this process, and a fake relay for it to talk to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_relay import FakeRelay, Result, Run
from mrelay.cli import main


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process."""

    def runner(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, *capfd.readouterr())

    return runner


@pytest.fixture
def relay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRelay]:
    """A fake relay that the commands find by MRELAY_SOCKET."""
    with FakeRelay(tmp_path / "control.sock") as fake:
        monkeypatch.setenv("MRELAY_SOCKET", str(fake.path))
        yield fake
