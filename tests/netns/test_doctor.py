"""`mrelay doctor --fix` mends a host that is a namespace, and says so."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from netns.lab import Lab

pytestmark = pytest.mark.netns
NAME = "net.ipv4.igmp_max_memberships"


def test_fix_mends_what_it_shows(lab: Lab, folder: Path) -> None:
    """Of all commands only sysctl is there to be found, so that nothing outside the namespace is changed."""
    if (sysctl := shutil.which("sysctl")) is None:
        pytest.skip("needs sysctl (procps)")
    relay = lab.star().relay
    (folder / "sysctl").symlink_to(sysctl)
    relay.run("sysctl", "-qw", f"{NAME}=0")

    def doctor(*arguments: str) -> dict[str, dict[str, Any]]:
        command = ["env", f"PATH={folder}", sys.executable, "-m", "mrelay", "doctor", "--json"]
        command += ["--socket", str(folder / "none.sock"), *arguments]
        done = subprocess.run(
            ["ip", "netns", "exec", relay.name, *command], capture_output=True, text=True, timeout=60, check=False
        )
        answer = json.loads(done.stdout)
        fixes = {fix["check"]: fix for fix in answer.get("fixes", ())}
        assert all(fix["status"] for fix in fixes.values() if "sysctl" not in fix["command"])
        return {each["check"]: each for each in answer["checks"]} | {"fix": fixes.get(NAME, {})}

    before = doctor()[NAME]
    assert (before["verdict"], before["command"]) == ("bad", f"sysctl -w {NAME}=20")
    assert doctor()[NAME] == before, "looking changes nothing"
    found = doctor("--fix")
    assert found["fix"] == {"check": NAME, "command": before["command"], "status": 0, "said": f"{NAME} = 20"}
    assert (found[NAME]["verdict"], found[NAME]["found"]) == ("ok", "20")
