"""What this host is like, as far as a relay cares: sysctls, interfaces, multicast routing, io_uring.

`check` and `doctor` call it. Reads /proc and /sys and makes harmless system calls; needs no privilege;
nothing blocks.
"""

import contextlib
import ctypes
import errno
import os
import pwd
import shutil
import socket
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from mrelay.kernel import landlock, seccomp

# linux/if.h
IFF_UP: Final = 0x1
IFF_LOOPBACK: Final = 0x8
IFF_MULTICAST: Final = 0x1000
_IO_URING_PARAMS: Final = 120  # bytes of struct io_uring_params, linux/io_uring.h

PROC: Final = Path("/proc")
SYS_NET: Final = Path("/sys/class/net")
BTF: Final = Path("/sys/kernel/btf/vmlinux")
CLOCK_SOURCE: Final = Path("/sys/devices/system/clocksource/clocksource0")
CGROUPS: Final = Path("/sys/fs/cgroup")
TIME_ERROR: Final = 5  # linux/timex.h: the clock is not synchronised


def sysctl(name: str) -> int | None:
    """The number in a sysctl such as net.core.rmem_max; None when this kernel has no such sysctl."""
    try:
        return int((PROC / "sys" / name.replace(".", "/")).read_text())
    except (OSError, ValueError):
        return None


def interfaces() -> list[str]:
    """The names of the interfaces in this network namespace."""
    return sorted(name for _, name in socket.if_nameindex())


def interface_flags(name: str) -> int | None:
    """IFF_* flags of an interface; None when there is no such interface."""
    try:
        return int((SYS_NET / name / "flags").read_text(), 16)
    except (OSError, ValueError):
        return None


def has_address(address: IPv4Address | IPv6Address) -> bool:
    """Whether a socket of this host may bind to the address, that is, whether the address is its own."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def reverse_path_filters() -> dict[str, int]:
    """net.ipv4.conf.*.rp_filter in force by interface: the higher of its own and that of `all`."""
    everywhere = sysctl("net.ipv4.conf.all.rp_filter") or 0
    return {name: max(everywhere, _rp_filter(name)) for name in interfaces()}


def _rp_filter(name: str) -> int:
    try:  # by path: a dot in the interface's name (eth0.20) is part of the name here
        return int((PROC / "sys/net/ipv4/conf" / name / "rp_filter").read_text())
    except (OSError, ValueError):
        return 0


def multicast_routing_interfaces() -> list[str]:
    """Interfaces that the kernel's IPv4 multicast routing serves (/proc/net/ip_mr_vif)."""
    try:
        lines = (PROC / "net/ip_mr_vif").read_text().splitlines()[1:]
    except OSError:
        return []
    return [line.split()[1] for line in lines if len(line.split()) > 1]


def try_io_uring() -> int:
    """Set up a ring and close it: 0, or the errno of io_uring_setup(2).

    EINVAL with flags that came with Linux 6.1 means an older kernel whose io_uring works otherwise.
    """
    from mrelay.kernel import io_uring  # here, because it imports NumPy

    lean = _io_uring_setup(io_uring.IORING_SETUP_SINGLE_ISSUER | io_uring.IORING_SETUP_DEFER_TASKRUN)
    return _io_uring_setup(0) if lean == errno.EINVAL else lean


def _io_uring_setup(flags: int) -> int:
    from mrelay.kernel.io_uring import SYS_IO_URING_SETUP

    libc = ctypes.CDLL(None, use_errno=True)
    params = (ctypes.c_uint32 * (_IO_URING_PARAMS // 4))()
    params[2] = flags
    descriptor = libc.syscall(SYS_IO_URING_SETUP, ctypes.c_uint(4), ctypes.byref(params))
    if descriptor < 0:
        return ctypes.get_errno()
    os.close(descriptor)
    return 0


def has_btf() -> bool:
    """Whether the kernel describes its own types."""
    return BTF.exists()


def landlock_abi() -> int:
    """The version of Landlock here; 0 for none."""
    return landlock.abi()


def seccomp_available() -> bool:
    """Whether control and workers can be given their filters."""
    return seccomp.available()


def user_exists(name: str) -> bool:
    """Whether this host has a user of this name."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def capability_set(field: str) -> int:
    """CapEff or CapBnd of this process, as a bit mask."""
    status = (PROC / "self/status").read_text()
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith(f"{field}:"))


def may_hold(capability: int) -> bool:
    """Whether this process's bounding set still has the capability, so that root here would hold it."""
    return bool(capability_set("CapBnd") >> capability & 1)


def holds(capability: int) -> bool:
    """Whether the capability is in this process's effective set."""
    return bool(capability_set("CapEff") >> capability & 1)


def has_program(name: str) -> bool:
    """Whether this host has a command of this name."""
    return shutil.which(name) is not None


def clock_synchronised() -> bool:
    """Whether somebody keeps the system clock right: adjtimex(2) does not say STA_UNSYNC."""
    libc = ctypes.CDLL(None, use_errno=True)
    status = (ctypes.c_uint32 * 128)()  # struct timex (linux/timex.h) has 208 bytes; modes 0: only ask
    return int(libc.adjtimex(ctypes.byref(status))) != TIME_ERROR


def clock_sources() -> tuple[str, list[str]]:
    """What the kernel reads the time from, and what it could; empty where that is not shown."""
    try:
        current = (CLOCK_SOURCE / "current_clocksource").read_text().strip()
        return current, (CLOCK_SOURCE / "available_clocksource").read_text().split()
    except OSError:
        return "", []


def interface_index(name: str) -> int:
    """An interface's number; 0 when there is no such interface."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def cores() -> frozenset[int]:
    """Those that processes may run on here."""
    return frozenset(os.sched_getaffinity(0))


def interrupts(name: str) -> dict[int, frozenset[int]]:
    """The cores of each of an interface's interrupts; empty for one without hardware."""
    numbers: list[int] = []
    for folder in ("device/msi_irqs", "device/../msi_irqs"):  # of the device, or, for virtio, of the bus's
        with contextlib.suppress(OSError):
            numbers += [int(path.name) for path in (SYS_NET / name / folder).iterdir()]
    found = {number: _irq_cores(number) for number in sorted(numbers)}
    return {number: on for number, on in found.items() if on}


def _irq_cores(number: int) -> frozenset[int]:
    for file in ("effective_affinity_list", "smp_affinity_list"):
        try:
            return cores_of((PROC / "irq" / str(number) / file).read_text())
        except (OSError, ValueError):
            continue
    return frozenset()


def cores_of(text: str) -> frozenset[int]:
    """A list of cores as the kernel writes it: 0,2-3."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return frozenset(found)


def receive_queues(name: str) -> dict[str, frozenset[int]]:
    """The cores that RPS steers the frames of each receive queue to; none: where they come in."""
    try:
        queues = sorted(path for path in (SYS_NET / name / "queues").iterdir() if path.name.startswith("rx-"))
        masks = {path.name: int((path / "rps_cpus").read_text().replace(",", ""), 16) for path in queues}
    except (OSError, ValueError):
        return {}
    return {
        queue: frozenset(n for n in range(mask.bit_length()) if mask >> n & 1) for queue, mask in masks.items()
    }


def cgroup_bound(file: str) -> float | None:
    """The least that this process's control group, or one above it, says in a file such as memory.max (version 2).

    cpu.max in cores. None when nothing is bounded, or not shown here.
    """
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = CGROUPS / path.lstrip("/")
    found = [_cgroup_value(each / file) for each in (folder, *folder.parents) if each.is_relative_to(CGROUPS)]
    return min((value for value in found if value is not None), default=None)


def _cgroup_value(path: Path) -> float | None:
    try:
        first, *period = path.read_text().split()
        return None if first == "max" else int(first) / int(period[0] if period else 1)
    except (OSError, ValueError):
        return None


def seccomp_mode() -> int:
    """Of this process: 0 for none, 2 for a filter."""
    lines = (PROC / "self/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("Seccomp:")), 0)
