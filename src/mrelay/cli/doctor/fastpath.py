"""What the kernel's fast path needs; without it all works, so nothing here is bad.

Called by the package. Asks the kernel and libbpf; nothing blocks.
"""

import os
from collections.abc import Callable, Iterator
from typing import Final

from mrelay.cli import host
from mrelay.cli.doctor.finding import Finding, set_sysctl
from mrelay.cli.doctor.kernel import version
from mrelay.cli.doctor.privileges import NEEDED
from mrelay.ebpf import load
from mrelay.ebpf.pins import PIN_DIR
from mrelay.kernel import caps, libbpf

NO_FAST_PATH: Final = "no kernel fast path: every datagram passes through a worker"
_CAPABILITIES: Final = {
    caps.CAP_BPF: "load the fast path: it forwards in user space",
    caps.CAP_PERFMON: "load it without barriers against speculative execution: it costs more CPU",
}


def _libbpf() -> Iterator[Finding]:
    problem = libbpf.available()
    if problem:
        yield Finding("libbpf", "warn", problem, NO_FAST_PATH, command="apt-get install -y libbpf1")
    else:
        yield Finding("libbpf", "ok", "there")


def _programs() -> Iterator[Finding]:
    problem = load.missing()
    if problem:
        yield Finding("kernel programs", "warn", problem, NO_FAST_PATH, "reinstall mrelay; in a source tree: make")
    else:
        yield Finding("kernel programs", "ok", "there")
    problem, check = load.outdated(), "kernel for the fast path"
    if problem:
        remedy = "upgrade the kernel, 6.6 or later for all there is"
        yield Finding(check, "warn", problem, NO_FAST_PATH, remedy)
    else:
        yield Finding(check, "ok", os.uname().release)


def _tc() -> Iterator[Finding]:
    if version() >= (6, 6):
        yield Finding("tc ingress", "ok", "tcx")
        return
    why = "before 6.6 the program sits in the clsact qdisc, where it stays when the relay is killed"
    remedy = "after kill -9, unless a relay starts again: tc qdisc del dev IFACE clsact"
    yield Finding("tc ingress", "ok", "clsact", why, remedy)


def _capabilities() -> Iterator[Finding]:
    check, fine = "capabilities for the fast path", True
    for cap, purpose in _CAPABILITIES.items():
        if host.holds(cap) or (host.may_hold(cap) and not all(map(host.holds, NEEDED))):
            continue  # what an ordinary user lacks is said with the others
        name, fine = caps.NAMES[cap], False
        remedy = f"docker run --cap-add {name[4:]}, or add it to the unit's AmbientCapabilities="
        yield Finding(check, "warn", f"{name} is withheld", f"a relay here cannot {purpose}", remedy)
    if fine:
        yield Finding(check, "ok", "none is withheld")


def _pins() -> Iterator[Finding]:
    if libbpf.is_bpffs(PIN_DIR):
        yield Finding("BPF file system", "ok", f"at {PIN_DIR.parent}")
        return
    why = "the fast path ends with the relay: its restart or crash interrupts the streams"
    command = f"mount -t bpf -o mode=700 bpf {PIN_DIR.parent}"
    yield Finding("BPF file system", "warn", f"none at {PIN_DIR.parent}", why, command=command)


def _settings() -> Iterator[Finding]:
    name = "net.core.bpf_jit_enable"
    value = host.sysctl(name)
    if value == 0:
        why = "the kernel interprets the fast path's program: several times the CPU"
        yield Finding(name, "warn", "0", why, command=set_sysctl(name, 1))
    else:
        yield Finding(name, "ok", "not shown here" if value is None else str(value))
    name = "kernel.unprivileged_bpf_disabled"
    value = host.sysctl(name)
    why = "no matter: control and workers use maps that they were handed"
    yield Finding(name, "ok", "not shown here" if value is None else str(value), why)


LOOKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (
    *(_libbpf, _programs, _tc, _capabilities, _pins, _settings),
)
