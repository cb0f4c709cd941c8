"""Children as real processes: those that end at once, of another version, or that cannot be started."""

import select
import subprocess
import sys

import pytest

from descriptors import none_leaks
from mrelay import __version__
from mrelay.child import EX_PROTOCOL
from mrelay.supervisor import children
from mrelay.supervisor.backoff import CAP
from mrelay.supervisor.children import OUTDATED, Child

NOBODY = 65534


def end(child: Child) -> str:
    """Wait for the end of the child's process."""
    assert child.process is not None
    assert select.select([child.process.pidfd], [], [], 20)[0], "it ends"
    return child.ended()


def test_one_that_ends_at_once_again_and_again_is_in_a_crash_loop() -> None:
    child = Child("x", "mrelay.nothing", NOBODY, NOBODY)  # a package that is broken
    troubles = []
    for _ in range(5):
        child.start()
        assert end(child) == "exit status 1"
        troubles.append(child.trouble)
    assert troubles == [""] * 4 + ["crash loop (exit status 1)"]
    assert child.restarts == 5
    assert 0 < child.delay <= CAP


def test_another_version_is_no_crash(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As if this relay had been started by version 0.0.9, and the package replaced since."""
    monkeypatch.setattr(children, "__version__", "0.0.9")
    child = Child("x", "mrelay.worker", NOBODY, NOBODY)
    for _ in range(6):
        child.start()
        assert end(child) == f"exit status {EX_PROTOCOL}"
        assert child.trouble == OUTDATED
        assert CAP - 1 < child.delay <= CAP
    said = capfd.readouterr().err
    assert f"the running relay is version 0.0.9, this program is {__version__}: restart the relay" in said
    monkeypatch.undo()
    child.failed("signal SIGKILL")
    assert (child.trouble, child.delay < 1) == ("", True), "it has cost nothing of the budget"


@pytest.mark.parametrize("role", ["control", "worker"])
def test_both_roles_refuse_another_version_before_anything_else(role: str) -> None:
    command = [sys.executable, "-P", "-m", f"mrelay.{role}", "9.9.9", "and whatever a later version says"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == EX_PROTOCOL
    assert done.stderr.strip().endswith(
        f"the running relay is version 9.9.9, this program is {__version__}: restart the relay"
    )


def test_one_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    child = Child("x", "mrelay.worker", NOBODY, NOBODY)
    with pytest.raises(FileNotFoundError):
        child.start()
    assert child.process is None
    assert child.failed("cannot be started") == "cannot be started"
    assert child.due is not None


def test_a_start_that_fails_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    child = Child("x", "mrelay.worker", NOBODY, NOBODY)
    with none_leaks():
        for _ in range(3):
            with pytest.raises(FileNotFoundError):
                child.start()


def test_a_child_has_nothing_of_ours_but_stderr_its_channel_and_its_pulse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The working folder of whoever starts the relay is no place to take code from, nor is his environment."""
    commands = []

    class Seen(Exception):
        pass

    def popen(command: list[str], **options: object) -> None:
        commands.append((command, options))
        raise Seen

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(Seen):
        Child("x", "mrelay.worker", NOBODY, NOBODY).start()
    ((command, options),) = commands
    assert command[1:4] == ["-P", "-m", "mrelay.worker"]
    assert "PYTHONPATH" not in options["env"]  # type: ignore[operator]
