"""The demo: its network shows what it claims, it succeeds, and it leaves nothing behind."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mrelay.demo.command import GROUP, STREAM_TO
from mrelay.demo.kernel_route import KernelRoute
from mrelay.demo.stream import Plan, Stream
from mrelay.demo.topology import SOURCE, Topology
from mrelay.traffic.stop import Stop

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
def test_only_the_reverse_path_check_keeps_the_kernel_from_forwarding(rp_filter: int, tmp_path: Path) -> None:
    """With the check off the same set-up forwards, so the demo's comparison is a fair one."""
    with ExitStack() as stack:
        network = stack.enter_context(Topology())
        for scope in ("all", "in0"):
            network.relay.sysctl(f"ipv4/conf/{scope}/rp_filter", rp_filter)
        with network.relay.inside():
            try:
                stack.enter_context(KernelRoute(SOURCE, GROUP, "in0", ["out1", "out2"]))
            except OSError:
                pytest.skip("needs a kernel with CONFIG_IP_MROUTE")
        stream = stack.enter_context(Stream(network, [f"{GROUP}:5000"] * 2))
        sent = stream.run(Plan(2000, 500, 1000), STREAM_TO, tmp_path / "log", Stop(), 60, lambda _: None)
        received = [reading.received for reading in stream.readings()]
        assert sent == 1000
        assert received == ([0, 0] if rp_filter else [1000, 1000])
        assert network.relay.reverse_path_drops() == (1000 if rp_filter else 0)


PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """The demo's TMPDIR. Fails when a file stays there, a process stays, or an interface here changed.

    Without a process or a name (the demo gives none) no namespace can stay.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # the demo's orphans would become ours
    before = interfaces()
    yield tmp_path
    remaining = children()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0)
    assert remaining == []
    assert list(tmp_path.iterdir()) == []
    assert interfaces() == before


def interfaces() -> dict[str, str]:
    """The interfaces of this namespace and their addresses."""
    return {path.name: (path / "address").read_text() for path in Path("/sys/class/net").iterdir()}


def children() -> list[str]:
    """Names of this process's children that run or were not waited for."""
    stats = [path.read_text().rpartition(")") for path in Path("/proc").glob("[0-9]*/stat")]
    return [name for name, _, rest in stats if rest.split()[1] == str(os.getpid())]


def demo(tmp: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mrelay", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(tmp)},
    )


def wait_for_line(process: "subprocess.Popen[str]", pattern: str) -> None:
    """Read the demo's output up to a line that matches."""
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern, line):
            return
    raise AssertionError(f"ended without {pattern!r}: {process.communicate()[1]}")


def test_nothing_is_lost_and_nothing_is_left(nothing_left: Path) -> None:
    process = demo(nothing_left, "--seconds", "1", "--rate", "5000", "--json")
    output, errors = process.communicate(timeout=50)
    assert process.returncode == 0, errors
    report = json.loads(output)
    assert report["ok"]
    assert report["sent"] == 5000
    assert [(r["received"], r["lost"]) for r in report["receivers"]] == [(5000, 0)] * 2
    assert report["relay"]["received"] == report["relay"]["matched"] == 5000
    if report["kernel"] is not None:
        assert report["kernel"]["received"] == [0, 0]
        assert report["kernel"]["reverse_path_drops"] == report["kernel"]["sent"] == 5000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_numbers_so_far(nothing_left: Path, number: signal.Signals) -> None:
    process = demo(nothing_left, "--seconds", "600", "--rate", "1000", "--no-kernel")
    wait_for_line(process, "mrelay: receiver-1 [1-9]")
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "lost 0" in output


def test_a_signal_in_the_kernel_half_ends_it_too(nothing_left: Path) -> None:
    process = demo(nothing_left, "--seconds", "600", "--rate", "1000")
    wait_for_line(process, "kernel: receiver-1")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors


def test_a_relay_that_fails_is_said_and_cleared_away(nothing_left: Path) -> None:
    program = (
        "import mrelay.demo.command as c; c.CONFIG = 'nonsense'; from mrelay.cli import main; main(['demo', "
        "'--no-kernel'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, "TMPDIR": str(nothing_left)},
    )
    assert done.returncode == 1
    assert "mrelay run` exited with" in done.stderr
    assert "Traceback" not in done.stderr
