"""What this host is like, as far as a relay cares: sysctls, interfaces, multicast routing, io_uring.

`check` and `doctor` call it. Reads /proc and /sys and makes harmless system calls; needs no privilege;
nothing blocks.
"""

import ctypes
import errno
import os
import pwd
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
