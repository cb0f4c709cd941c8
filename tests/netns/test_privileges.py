"""Who may do what: processes that touch packets or clients hold no privilege."""

import subprocess
import sys
from pathlib import Path

import pytest

from netns.lab import Lab, eventually
from netns.relay import Relay, rule
from netns.traffic import Sender, payloads

pytestmark = pytest.mark.netns
EX_NOPERM = 77  # sysexits.h
GROUP = "239.1.1.1"
CONFIG = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
ROOT_WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def status(pid: int) -> dict[str, list[str]]:
    """/proc/PID/status: the words behind each key."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: words.split() for key, words in (line.split(":", 1) for line in lines)}


@pytest.mark.parametrize("role", ["control", "worker"])
def test_unprivileged_roles(lab: Lab, role: str) -> None:
    star = lab.star()
    with Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        sender.send(GROUP, 5000, payloads(5))
        relay.await_received(5)
        pids = relay.role(role)
        assert pids, f"there is a process mrelay.{role}"
        for pid in pids:
            found = status(pid)
            for key in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(found[key][0], 16) == 0, f"{role} has {key} {found[key][0]}"
            assert "0" not in found["Uid"] + found["Gid"] + found["Groups"], "neither root nor its groups"
            assert found["NoNewPrivs"] == ["1"]


def test_workers_are_confined_by_seccomp(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        for pid in relay.role("worker"):
            assert status(pid)["Seccomp"] == ["2"], "SECCOMP_MODE_FILTER"


def packet_sockets(relay: Relay) -> set[str]:
    """Inodes of the AF_PACKET sockets in the relay's namespace (/proc/net/packet)."""
    return {line.split()[-1] for line in relay.namespace.read("packet").splitlines()[1:]}


def open_sockets(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def test_control_has_no_raw_socket(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        raw = packet_sockets(relay)
        assert raw, "the relay receives through AF_PACKET"
        assert not raw & open_sockets(relay.role("control")[0])
        assert raw & set().union(*(open_sockets(pid) for pid in relay.role("worker")))


def test_supervisor_loads_no_parser(lab: Lab) -> None:
    """It has the privileges, so it has the standard library and mrelay.kernel and nothing else."""
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        supervisor = relay.role("supervisor")
        assert supervisor == [relay.pid], "`run` becomes the supervisor"
        maps = Path(f"/proc/{relay.pid}/maps").read_text()
        assert not [name for name in ("numpy", "pydantic_core", "uvloop", "httptools") if name in maps]


def test_a_client_may_not_pass_the_socket_mode(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        assert relay.socket.stat().st_mode & 0o777 == 0o660
        assert nobody_asks(relay) != 0, "a stranger is turned away"


def nobody_asks(relay: Relay) -> int:
    """Exit status of an attempt to connect to the API as nobody."""
    program = f"import socket; socket.socket(socket.AF_UNIX).connect({str(relay.socket)!r})"
    arguments = [*AS_NOBODY, sys.executable, "-c", program]
    return subprocess.run(arguments, capture_output=True, check=False, timeout=20).returncode


def test_started_by_nobody(lab: Lab) -> None:
    again = "import os, sys, mrelay.cli; os.execv(sys.executable, [sys.executable, '-c', 'import mrelay.cli'])"
    probe = [*AS_NOBODY, sys.executable, "-c", again]
    if subprocess.run(probe, capture_output=True, check=False, timeout=20).returncode:
        pytest.skip("needs a Python and a source tree that nobody may read")
    star = lab.star()
    relay = Relay(star.relay, CONFIG, launcher=AS_NOBODY)
    assert relay.run() == EX_NOPERM, relay.stderr
    assert "CAP_NET_RAW" in relay.stderr, "the message names what is missing"


def test_started_by_a_root_without_capabilities(lab: Lab) -> None:
    star = lab.star()
    relay = Relay(star.relay, CONFIG, launcher=ROOT_WITHOUT_CAPABILITIES)
    assert relay.run() == EX_NOPERM, relay.stderr
    assert "CAP_NET_RAW" in relay.stderr, "the message names what is missing"


def test_nothing_remains_after_stop(lab: Lab) -> None:
    star = lab.star()
    with Relay(star.relay, CONFIG) as relay:
        assert GROUP in star.relay.groups("in0")
        socket = relay.socket
    assert not socket.exists(), "the API socket is removed"
    eventually(lambda: GROUP not in star.relay.groups("in0"), "left the group")
    assert packet_sockets(relay) == set()
