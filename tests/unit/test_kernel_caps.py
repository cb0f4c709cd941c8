"""Capabilities and the parent death signal, as far as they can be tested without privilege."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mrelay.kernel import caps

# The middle process ends at once; the last one holds the pipe open until the signal ends it.
ORPHAN = """
import os, signal, subprocess, sys
from mrelay.kernel.caps import set_parent_death_signal
parent = os.getpid()
if os.fork() == 0:
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() == parent:
        signal.pause()
else:
    os._exit(0)
"""


def test_missing_names_what_is_not_effective() -> None:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    for cap, name in caps.NAMES.items():
        assert caps.missing([cap]) == ([] if effective >> cap & 1 else [name])
    assert caps.missing([63]) == ["capability 63"]  # no kernel has that many


@pytest.mark.parametrize(("uid", "gid"), [(0, 1000), (1000, 0), (-1, 1000)])
def test_no_drop_to_root(uid: int, gid: int) -> None:
    with pytest.raises(caps.PrivilegeError, match="no ids to drop to"):
        caps.drop_privileges(uid, gid)


def test_prctl_reports_errors() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        caps.prctl(0x7FFFFFFF)


def test_parent_death_signal() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, env=environ) as middle:
        assert middle.stdout is not None
        assert middle.stdout.read() == b""  # ends only when the orphan has
        assert middle.wait() == 0
