"""Dropping privileges for real: each case in a process of its own, which starts with all of them."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.netns
NOBODY = 65534

PRELUDE = """
import ctypes, json, os, re, signal, socket, struct, threading
from mrelay.kernel import caps

def status():
    return dict(re.findall(r"(\\w+):[ \\t]*(.*)", open("/proc/self/status").read()))

def attempt(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return type(error).__name__
    return "allowed"

def drop():
    try:
        caps.drop_privileges(65534, 65534)
    except caps.PrivilegeError as error:
        return str(error)
    return "dropped"

def become_ambient():
    # Like a service with User= and AmbientCapabilities=: not root, yet capable.
    os.setgroups([])
    caps.prctl(caps.PR_SET_KEEPCAPS, 1)
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    mask = 1 << caps.CAP_NET_RAW
    header = struct.pack("=Ii", 0x20080522, 0)
    assert ctypes.CDLL(None).capset(header, struct.pack("=6I", mask, mask, mask, 0, 0, 0)) == 0
    caps.prctl(caps.PR_CAP_AMBIENT, 2, caps.CAP_NET_RAW)  # PR_CAP_AMBIENT_RAISE
"""


def child(script: str) -> dict[str, Any]:
    """What the script prints, which is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def unprivileged(status: dict[str, str]) -> None:
    assert status["Uid"].split() == status["Gid"].split() == [str(NOBODY)] * 4
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert status["Groups"].split() in ([], [str(NOBODY)])


def test_root_becomes_nobody_for_good() -> None:
    found = child("""
os.setgroups([1, 2, 3])
first = drop()
print(json.dumps({
    "drop": first, "status": status(), "dumpable": caps.prctl(3),
    "back": attempt(os.setresuid, 0, 0, 0),
    "raw": attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW),
}))
""")
    assert (found["drop"], found["dumpable"]) == ("dropped", 0)
    unprivileged(found["status"])
    assert int(found["status"]["CapBnd"], 16) == 0
    assert found["back"] == found["raw"] == "PermissionError"


def test_ambient_capabilities_go_too() -> None:
    found = child("""
become_ambient()
before = caps.missing([caps.CAP_NET_RAW])
print(json.dumps({"before": before, "drop": drop(), "status": status(),
                  "after": caps.missing([caps.CAP_NET_RAW])}))
""")
    assert (found["before"], found["drop"], found["after"]) == ([], "dropped", ["CAP_NET_RAW"])
    unprivileged(found["status"])


def test_dropping_twice_is_fine() -> None:
    found = child("""print(json.dumps({"drops": [drop(), drop()], "status": status()}))""")
    assert found["drops"] == ["dropped", "dropped"]
    unprivileged(found["status"])


def test_groups_that_cannot_be_left_are_fatal() -> None:
    found = child("""
os.setgroups([1, 2])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print(json.dumps({"drop": drop()}))
""")
    assert found["drop"].startswith("cannot become uid 65534, gid 65534")


def test_another_users_id_without_privilege_is_fatal() -> None:
    found = child("""
os.setgroups([])
os.setresgid(1234, 1234, 1234)
os.setresuid(1234, 1234, 1234)
print(json.dumps({"drop": drop()}))
""")
    assert found["drop"].startswith("cannot become uid 65534, gid 65534")


def test_a_thread_that_keeps_its_capabilities_is_fatal() -> None:
    """Capabilities and no_new_privs are each thread's own; only ids are changed for all of them."""
    found = child("""
end = threading.Event()
threading.Thread(target=end.wait).start()
print(json.dumps({"drop": drop()}))
end.set()
""")
    assert "drop before any thread is started" in found["drop"]
