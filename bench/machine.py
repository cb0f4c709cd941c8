"""On what a run was made: processor, kernel, versions, commit. Reads files and runs a few commands."""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lab as labs
import peers
from cases import Case
from peers import Peer

_PACKAGES = ("numpy", "pydantic")


def facts(cores: labs.Cores) -> dict[str, Any]:
    """For the record."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count() or 0,
        "memory_gb": round(int(memory[1]) / 1e6, 1) if memory else 0,
        "virtual": _line("systemd-detect-virt", "--vm") or "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "libbpf": _line("dpkg-query", "-W", "-f", "${Version}", "libbpf1"),
        "commit": _line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "cores": {"source": cores.source, "relay": cores.relay, "sink": cores.sink, "second": cores.second},
    }


def described(chosen: Iterable[Peer]) -> dict[str, dict[str, Any]]:
    """The peers: title, version, whether it is ours."""
    return {peer.name: {"title": peer.title, "version": _version(peer), "ours": peer.ours} for peer in chosen}


def _version(peer: Peer) -> str:
    command = peers.render(peer.version, peers.context(peer, Case(), Path("/"), [0]))
    return _line(*command.split(), want=r"\d") if command else ""


def _line(*command: str, want: str = "") -> str:
    """The first line of what a command prints that has `want`; empty when there is none."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        lines = (done.stdout + done.stderr).splitlines()
        return next((" ".join(line.split()) for line in lines if re.search(want, line)), "")
    return ""
