"""The relay as a service manager sees it, and its logs at run time."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from manager import Manager
from mrelay.ebpf import load
from mrelay.kernel import libbpf
from netns.lab import Lab, eventually
from netns.relay import Relay, rule

pytestmark = pytest.mark.netns
CONFIG = rule("a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000")


def test_what_the_service_manager_is_told(lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    star = lab.star()
    with Manager(folder, watchdog=3.0) as manager:
        for name, value in manager.environment.items():
            monkeypatch.setenv(name, value)
        with Relay(star.relay, CONFIG) as relay:
            assert manager.wait("READY")["STATUS"].startswith("1 of 1 rules up")
            manager.wait("WATCHDOG", "1")
            relay.add_rule("b", "in9:239.1.1.2:5000", "out0:239.2.2.2:6001")
            assert manager.wait("STATUS")["STATUS"].startswith("1 of 2 rules up")
            relay.signal(signal.SIGHUP)
            assert "MONOTONIC_USEC" in manager.wait("RELOADING", "1")
            manager.wait("READY", "1")
            relay.config.write_text("nonsense")
            relay.signal(signal.SIGHUP)
            manager.wait("RELOADING", "1")
            manager.wait("READY", "1")
            os.kill(relay.role("worker")[0], signal.SIGKILL)
            manager.wait("WATCHDOG", "1")
            eventually(lambda: relay.workers()[0]["state"] == "running", "the worker is back")
            manager.wait("WATCHDOG", "1")
        manager.wait("STOPPING", "1")


def test_a_stopped_supervisor_does_not_ping(lab: Lab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    star = lab.star()
    with Manager(folder, watchdog=0.3) as manager:
        for name, value in manager.environment.items():
            monkeypatch.setenv(name, value)
        with Relay(star.relay, CONFIG) as relay:
            manager.wait("WATCHDOG", "1")
            relay.signal(signal.SIGSTOP)
            manager.take_all()
            assert manager.take(1.0) == {}
            relay.signal(signal.SIGCONT)
            manager.wait("WATCHDOG", "1")


@pytest.fixture
def bpffs(folder: Path) -> Iterator[Path]:
    """A BPF file system of the test's own."""
    subprocess.run(["mount", "-t", "bpf", "bpf", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_restart_leaves_the_fast_path_and_a_stop_ends_it(lab: Lab, bpffs: Path) -> None:
    if problem := libbpf.available() or load.missing() or load.outdated():
        pytest.skip(f"needs the fast path: {problem}")
    star, pins = lab.star(), bpffs / "pins"  # made by the relay
    there = Path(tempfile.mkdtemp(prefix="mrelay-test-"))
    try:
        relay = Relay(star.relay, CONFIG, folder=there, arguments=("--pin-dir", str(pins)))
        relay.start().wait_ready()
        relay.signal(signal.SIGUSR1)  # RestartKillSignal= of the unit
        assert relay.process is not None and relay.process.wait(20) == 0
        assert len(list(pins.glob("*/link-*"))) == 1
        with Relay(star.relay, CONFIG, folder=there, arguments=("--pin-dir", str(pins))) as relay:
            assert "going on with what a relay before us left" in relay.stderr
        assert not list(pins.iterdir()), "SIGTERM ends all"
    finally:
        shutil.rmtree(there)


def test_json_logs_and_levels_at_run_time(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG, arguments=("--log-format", "json", "--log-level", "error")) as relay:
        assert relay.stderr == "", "nothing went wrong"
        levels = {"supervisor": "warning", "control": "info", "worker": "error"}
        assert relay.request("PATCH", "/v1/log", levels) == (200, levels)
        relay.add_rule("b", "in0:239.1.1.2:5000", "out0:239.2.2.2:6001")
        os.kill(relay.role("control")[0], signal.SIGKILL)
        eventually(lambda: relay.role("control"), "control is back")
        relay.await_rule("b", "up")
        assert relay.get("/v1/log") == levels, "the next control knows"
        said = [json.loads(line) for line in relay.stderr.splitlines()]
        assert ("control", "info", "rule 'b': up") in [(s["role"], s["level"], s["message"]) for s in said]
        assert any(s["role"] == "supervisor" and "control ended" in s["message"] for s in said)
