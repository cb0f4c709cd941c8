"""The kernel: its version, io_uring, its own types (BTF), the clock.

Called by the package. Reads /proc and /sys and makes harmless system calls.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import Final

from mrelay.cli import host
from mrelay.cli.doctor.finding import Finding, set_sysctl

_FAST_CLOCKS: Final = (
    "tsc",
    "kvm-clock",
    "hyperv_clocksource_tsc_page",
    "arch_sys_counter",
)  # read without a syscall


def version() -> tuple[int, int]:
    """Of the kernel; (0, 0) when its release says none."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _kernel() -> Iterator[Finding]:
    release = os.uname().release
    if version() < (5, 3):  # pidfd_open; SO_BINDTOIFINDEX is 5.1, PACKET_IGNORE_OUTGOING 4.20
        why = "before 5.3 a relay cannot watch its processes or bind its outputs"
        yield Finding("kernel", "bad", release, why, "upgrade the kernel, 6.1 or later for all there is")
    elif version() < (6, 1):
        why = "before 6.1 io_uring lacks what sends cheapest, and before 5.17 sendmmsg is used"
        yield Finding("kernel", "warn", release, why, "upgrade the kernel to 6.1 or later")
    else:
        yield Finding("kernel", "ok", release)


def _io_uring() -> Iterator[Finding]:
    number = host.try_io_uring()
    disabled = host.sysctl("kernel.io_uring_disabled") or 0
    slower = "sending falls back to sendmmsg: works, costs more CPU"
    enable = set_sysctl("kernel.io_uring_disabled", 0)
    if disabled == 1 and number == 0:
        why = f"only for privileged processes, and workers are not: {slower}"
        yield Finding("io_uring", "warn", "kernel.io_uring_disabled = 1", why, command=enable)
    elif number == 0:
        yield Finding("io_uring", "ok", "usable")
    elif disabled:
        yield Finding("io_uring", "warn", f"kernel.io_uring_disabled = {disabled}", slower, command=enable)
    elif number == errno.EPERM:
        remedy = "allow io_uring_setup and io_uring_enter in the container's seccomp profile"
        yield Finding("io_uring", "warn", "refused by a seccomp filter", slower, remedy)
    else:
        remedy = "use a kernel built with CONFIG_IO_URING=y"
        yield Finding("io_uring", "warn", f"not usable: {os.strerror(number)}", slower, remedy)


def _btf() -> Iterator[Finding]:
    btf = "there" if host.has_btf() else "absent"
    yield Finding("BTF", "ok", btf, "no matter: the programs use none of the kernel's own types")


def _synchronised() -> Iterator[Finding]:
    if host.clock_synchronised():
        yield Finding("clock", "ok", "synchronised")
        return
    why = (
        "latencies that 'mrelay receive' measures between two hosts, and times in logs and events, are off by as "
        "much as the clock is"
    )
    if host.has_program("timedatectl"):
        yield Finding("clock", "warn", "not synchronised", why, command="timedatectl set-ntp true")
    else:
        yield Finding("clock", "warn", "not synchronised", why, "run chrony, systemd-timesyncd or ptp4l")


def _clock_source() -> Iterator[Finding]:
    current, available = host.clock_sources()
    better = next((name for name in _FAST_CLOCKS if name in available), "")
    if current in _FAST_CLOCKS or not current:
        yield Finding("clock source", "ok", current or "not shown here")
        return
    why = "to ask for the time takes a system call or slow hardware: more CPU, and latencies are measured worse"
    if better:
        command = f"sh -c 'echo {better} > {host.CLOCK_SOURCE}/current_clocksource'"
        yield Finding("clock source", "warn", current, why, command=command)
    else:
        yield Finding(
            "clock source", "warn", current, why, "ask who runs the machine, or see its BIOS, for a stable TSC"
        )


LOOKS: Final[tuple[Callable[[], Iterator[Finding]], ...]] = (
    _kernel,
    _io_uring,
    _btf,
    _synchronised,
    _clock_source,
)
