"""What bounds a relay here without saying so: control groups (containers, units), descriptors, locked memory.

Called by the package. Reads /sys/fs/cgroup and this process's limits: a relay that is started
elsewhere may have others.
"""

import resource
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from mrelay.cli import host
from mrelay.cli.doctor.finding import Finding
from mrelay.cli.doctor.kernel import version

_DESCRIPTORS: Final = (
    4096  # for some 2,000 outputs with one worker: each has its socket, and the supervisor a copy
)
_MEMORY: Final = 512 << 20  # bytes: a relay with one worker takes 184 MB, and rings and maps come on top
_TASKS: Final = 64  # five processes, and control's threads
_LOCKED: Final = 8 << 20  # bytes; before 5.11 BPF maps, before 5.12 io_uring's rings count


class Bound(NamedTuple):
    """A file of a control group whose number must be at least `least`; what follows if not; how to change it."""

    check: str
    file: str
    least: float
    unit: str
    consequence: str
    remedy: str


TABLE: Final = (
    Bound(
        "processor time",
        "cpu.max",
        1.0,
        "cores",
        "a worker is stopped for the rest of each period once the time is used: frames wait, then are lost",
        "docker update --cpus, or CPUQuota= of the unit: at least one core for each worker",
    ),
    Bound(
        "memory",
        "memory.max",
        _MEMORY,
        "bytes",
        "the kernel ends processes of the relay when rings, maps and rules need more",
        "docker update --memory, or MemoryMax= of the unit: 512 MB or more",
    ),
    Bound(
        "processes and threads",
        "pids.max",
        _TASKS,
        "tasks",
        "a process that ends may not be replaced",
        "docker update --pids-limit, or TasksMax= of the unit: 64 or more",
    ),
)


def _control_groups() -> Iterator[Finding]:
    for row in TABLE:
        value = host.cgroup_bound(row.file)
        if value is None:
            yield Finding(row.check, "ok", "not bounded by a control group")
        elif value < row.least:
            yield Finding(row.check, "warn", f"{row.file}: {value:g} {row.unit}", row.consequence, row.remedy)
        else:
            yield Finding(row.check, "ok", f"{row.file}: {value:g} {row.unit}")


def _descriptors() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= _DESCRIPTORS:
        yield Finding(
            "descriptors", "ok", _limit(hard), "each output takes one in each worker, and in the supervisor"
        )
        return
    why = f"room for about {max(0, (hard - 200) // 2)} outputs with one worker; further ones are refused"
    yield Finding(
        "descriptors", "warn", _limit(hard), why, "raise ulimit -n, docker run --ulimit nofile=, or LimitNOFILE="
    )


def _locked_memory() -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    enough = hard == resource.RLIM_INFINITY or hard >= _LOCKED
    if version() >= (5, 12) or enough:
        yield Finding("locked memory", "ok", _limit(hard), "" if enough else "no matter from Linux 5.12 on")
        return
    why = "maps and io_uring's rings count against it before Linux 5.12: the fast path may not load"
    yield Finding(
        "locked memory",
        "warn",
        _limit(hard),
        why,
        "raise ulimit -l, docker run --ulimit memlock=, or LimitMEMLOCK=",
    )


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"at most {value:,}"


def _system_calls() -> Iterator[Finding]:
    if host.seccomp_mode() == 2:  # SECCOMP_MODE_FILTER, linux/seccomp.h
        why = "what it refuses shows in the checks above; a relay's own filters come on top"
        yield Finding("system call filter", "ok", "this process runs under one", why)
    else:
        yield Finding("system call filter", "ok", "none on this process")


LOOKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (
    *(_control_groups, _descriptors, _locked_memory, _system_calls),
)
