"""The demo: its network shows what it claims, it succeeds, and it leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
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


def demo(*options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mrelay", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def traces() -> tuple[set[str], set[str], set[str]]:
    """Named namespaces, interfaces here, and the demo's temporary folders."""
    named = {path.name for path in Path("/run/netns").glob("*")}
    interfaces = {path.name for path in Path("/sys/class/net").iterdir()}
    return named, interfaces, {path.name for path in Path(tempfile.gettempdir()).glob("mrelay-demo-*")}


def test_nothing_is_lost_and_nothing_is_left() -> None:
    before = traces()
    process = demo("--seconds", "1", "--rate", "5000", "--json")
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
    assert traces() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_numbers_so_far(number: signal.Signals) -> None:
    before = traces()
    process = demo("--seconds", "600", "--rate", "1000", "--no-kernel")
    assert process.stdout is not None
    for line in process.stdout:
        if "mrelay: receiver-1" in line:
            break
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "lost 0" in output
    assert traces() == before
