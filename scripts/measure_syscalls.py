#!/usr/bin/env python3
"""Which system calls control and workers make once they are confined: `measure_syscalls.py COMMAND…`.

Runs the command (`pytest tests/netns`, `mrelay run …`), attaches strace to every control and worker process
that it starts, and prints for each role what was called after the seccomp filter was installed, how often,
how often it was refused, the arguments that the filter looks at, and what the role's list in
mrelay.kernel.seccomp allows but nothing used. Needs root and strace; slows the command several times.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
ROLES: Final = ("control", "worker")
_CALL: Final = re.compile(r"^\d+ +[\d.]+ (\w+)\((.*)$")
_POLL: Final = 0.01  # seconds between looks at the process list: an interpreter takes longer to start
# The arguments worth telling apart, by place: those that a filter can look at.
_ARGUMENTS: Final = {
    "clone": (1,),  # strace shows the stack first
    "clone3": (0,),
    "fcntl": (1,),
    "getsockopt": (1, 2),
    "ioctl": (1,),
    "madvise": (2,),
    "mmap": (2, 3),
    "mprotect": (2,),
    "openat": (0, 1, 2),
    "newfstatat": (0, 1),
    "sched_setscheduler": (0, 1),
    "setsockopt": (1, 2),
    "socket": (0, 1, 2),
    "socketpair": (0, 1),
}


def main(command: list[str]) -> int:
    """Measure while the command runs; its exit status."""
    with tempfile.TemporaryDirectory(prefix="mrelay-strace-") as folder:
        with subprocess.Popen(command) as measured:
            tracers = _trace(measured, Path(folder))
        for tracer in tracers:
            tracer.wait()
        for role in ROLES:
            _report(role, sorted(Path(folder).glob(f"{role}.*")))
    return measured.returncode


def _trace(measured: "subprocess.Popen[bytes]", folder: Path) -> list["subprocess.Popen[bytes]"]:
    """Attach to each process of a role among the command's descendants, until the command ends."""
    tracers: dict[int, subprocess.Popen[bytes]] = {}
    while measured.poll() is None:
        for pid in _descendants(measured.pid):
            role = _role(pid) if pid not in tracers else None
            if role is not None:
                strace = ["strace", "-f", "-qq", "-ttt", "-o", str(folder / f"{role}.{pid}"), "-p", str(pid)]
                tracers[pid] = subprocess.Popen(strace, stderr=subprocess.DEVNULL)
        time.sleep(_POLL)
    return list(tracers.values())


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        try:
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended meanwhile
    return found


def _role(pid: int) -> str | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return None
    return next((role for role in ROLES if f"mrelay.{role}" in words), None)


def _report(role: str, traces: list[Path]) -> None:
    calls: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    arguments: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for trace in traces:
        _read(trace, calls, refused, arguments)
    print(f"\n{role}: {len(traces)} processes")
    for name, count in sorted(calls.items()):
        said = f", {refused[name]} refused" if refused[name] else ""
        print(f"  {name:20} {count:8}{said}")
        for text, times in arguments[name].most_common(30):
            print(f"      {text}  x{times}")
    print(f"  allowed, but never made: {', '.join(sorted(_allowed(role) - calls.keys()))}")


def _read(
    trace: Path, calls: Counter[str], refused: Counter[str], arguments: defaultdict[str, Counter[str]]
) -> None:
    confined = False
    for line in trace.read_text(errors="replace").splitlines():
        found = _CALL.match(line)
        if found is None:
            continue
        name, rest = found.groups()
        if confined:
            calls[name] += 1
            refused[name] += " EPERM " in rest
            if name in _ARGUMENTS:
                words = rest.split(", ")
                arguments[name][", ".join(words[at] for at in _ARGUMENTS[name] if at < len(words))] += 1
        confined = confined or name == "seccomp"


def _allowed(role: str) -> set[str]:
    sys.path.insert(0, str(ROOT / "src"))
    from mrelay.kernel import seccomp

    return set(seccomp.ROLES[role])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
