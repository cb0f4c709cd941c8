"""Which engine carries what, for people; and what a relay says that can have no fast path."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from netns import fast
from netns.lab import Lab, Star, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Sender, payloads

pytestmark = pytest.mark.netns
GROUP, OUT = "239.1.1.1", "239.2.2.2"
CONFIG = rule("a", f"in0:{GROUP}:5000", f"out0:{OUT}:6000")
MIXED = "".join(rule("b" + rate, "in0:239.1.1.2:5000", f"out0:{OUT}:6001", rate=rate) for rate in ("1pps", "2pps"))


def test_flows_in_a_table(lab: Lab) -> None:
    """The engine, and why not the faster one."""
    fast.require()
    star = lab.star()
    with Sender(star.source) as sender, Relay(star.relay, CONFIG + MIXED) as relay:

        def carried() -> bool:
            for group in (GROUP, "239.1.1.2"):
                sender.send(group, 5000, payloads(1))
            return {f["engine"] for f in relay.flows()} == {"ebpf", "uring"}

        eventually(carried, "one is the kernel's, one is not")
        said = " ".join(listing(star, relay).split())
        assert "engine" in said.lower()
        assert "ebpf" in said
        assert "uring: of several rules, some have a rate" in said


def listing(star: Star, relay: Relay) -> str:
    """`mrelay flows`, on a wide terminal."""
    program = ("env", "COLUMNS=300", sys.executable, "-m", "mrelay")
    return star.relay.run(*program, "flows", "--socket", str(relay.socket))


def without_bpf(*arguments: str) -> tuple[str, ...]:
    """A launcher that takes the capabilities away which loading needs."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs the command setpriv")
    bounding = "-bpf,-sys_admin,-perfmon"
    return ("setpriv", f"--bounding-set={bounding}", "--inh-caps=-all", *arguments)


def test_engine_ebpf_without_the_right_to_load(lab: Lab) -> None:
    """One clear line, and an exit status."""
    star = lab.star()
    relay = Relay(star.relay, CONFIG, launcher=without_bpf(), arguments=["--engine", "ebpf"])
    assert relay.run() not in (0, 77)
    said = [line for line in relay.stderr.splitlines() if "ebpf" in line]
    assert len(said) == 1, relay.stderr
    assert 'set engine = "auto" to do without' in said[0]
    assert "Traceback" not in relay.stderr


def test_engine_auto_without_the_right_to_load(lab: Lab) -> None:
    """A warning, and the slow path."""
    star = lab.star()
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source) as sender,
        Relay(star.relay, CONFIG, launcher=without_bpf()) as relay,
    ):
        sent = payloads(10)
        sender.send(GROUP, 5000, sent)
        assert [packet.payload for packet in wire.wait(10)] == sent
        assert {(f["engine"], f["why"]) for f in relay.flows()} == {("uring", "")}
        assert relay.stderr.count("no kernel fast path") == 1


def test_engine_ebpf_without_libbpf(lab: Lab, folder: Path) -> None:
    """The library is hidden: it is named."""
    star = lab.star()
    hider = folder / "hide"
    hider.write_text(
        "import runpy, sys\n"
        "import mrelay.kernel.libbpf as library\n"
        "library.available = lambda: 'libbpf.so.1 is not installed (Debian: libbpf1)'\n"
        "sys.argv = ['mrelay.supervisor', *sys.argv[1:]]\n"
        "runpy.run_module('mrelay.supervisor', run_name='__main__')\n"
    )
    config = folder / "c.toml"
    config.write_text(CONFIG)
    settings: dict[str, str | None] = {
        "config": str(config), "engine": "ebpf", "workers": None, "socket": f"{folder}/s",
        "state_dir": f"{folder}/d", "pin_dir": "/nowhere", "user": None, "worker_user": None,
        "log_format": "text", "log_level": "info",
    }  # fmt: skip
    done = subprocess.run(
        ["ip", "netns", "exec", star.relay.name, sys.executable, str(hider), json.dumps(settings)],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode not in (0, 77)
    said = [line for line in done.stderr.splitlines() if "ebpf" in line]
    assert len(said) == 1, done.stderr
    assert "libbpf.so.1 is not installed (Debian: libbpf1)" in said[0]
