"""The container recipe's capabilities: the relay does its work with exactly these, as a container's root."""

import os
import pwd
import re
import shutil
from pathlib import Path

import pytest

from mrelay.kernel import libbpf
from netns.lab import Lab, Star
from netns.relay import Relay, rule
from netns.traffic import Capture, Sender

pytestmark = pytest.mark.netns
RECIPE = Path(__file__).resolve().parents[2] / "packaging" / "Containerfile"
CAPS = [name.lower() for name in re.findall(r"--cap-add ([A-Z_]+)", RECIPE.read_text())]


def forwards(relay: Relay, star: Star) -> bool:
    """It must; whether it has the kernel's fast path."""
    with relay, Capture(star.sink, "k0") as wire, Sender(star.source) as sender:
        sender.send("239.1.1.1", 5000, [b"contained"])
        assert wire.wait(1)[0].payload == b"contained"
        return bool(relay.get("/v1/health")["engine"] == "ebpf")


@pytest.mark.parametrize("without", [None, "net_raw", "net_admin", "setuid", "setgid", "kill", "bpf", "perfmon"])
def test_these_capabilities_and_no_fewer(lab: Lab, folder: Path, without: str | None) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("needs the command setpriv")
    star = lab.star()
    state, user = folder / "state", pwd.getpwnam("nobody")
    state.mkdir()
    os.chown(state, user.pw_uid, user.pw_gid)  # as in the image
    bounding = ",".join(["-all", *(f"+{cap}" for cap in CAPS if cap != without)])
    launcher = ("setpriv", f"--bounding-set={bounding}", "--inh-caps=-all", "--no-new-privs")
    config = rule("a", "in0:239.1.1.1:5000", "out0:239.2.2.2:6000")
    users = ("--user", "nobody", "--worker-user", "nobody")
    relay = Relay(star.relay, config, launcher=launcher, folder=folder, arguments=users)
    if without in ("bpf", "perfmon"):  # for the fast path: that one must be there, this one makes it faster
        fast = forwards(relay, star)
        assert not fast or without == "perfmon"
        return
    if without is not None:
        assert relay.run() == 77, relay.stderr  # EX_NOPERM
        assert without in relay.stderr.lower()
        return
    assert forwards(relay, star) or libbpf.available()
    assert (state / "state.json").stat().st_uid == user.pw_uid
