"""Capabilities, and the one-way drop of every privilege.

Owns capset(2) and the prctl(2) calls around it. The supervisor asks `missing` and calls `keep_only`;
control and workers call `drop_privileges` before they read anything that others sent, and
`set_parent_death_signal`. Nothing here blocks.
"""

import ctypes
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

# linux/capability.h
CAP_CHOWN: Final = 0
CAP_DAC_OVERRIDE: Final = 1
CAP_FOWNER: Final = 3
CAP_KILL: Final = 5
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_SETPCAP: Final = 8
CAP_NET_BIND_SERVICE: Final = 10
CAP_NET_ADMIN: Final = 12
CAP_NET_RAW: Final = 13
CAP_IPC_LOCK: Final = 14
CAP_SYS_ADMIN: Final = 21
CAP_SYS_NICE: Final = 23
CAP_SYS_RESOURCE: Final = 24
CAP_PERFMON: Final = 38
CAP_BPF: Final = 39
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522

NAMES: Final = {value: name for name, value in list(globals().items()) if name.startswith("CAP_")}

# linux/prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.capset.argtypes = [ctypes.c_char_p, ctypes.c_char_p]


class PrivilegeError(Exception):
    """Privileges could not be dropped, or were not gone afterwards. The process must exit."""


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2); OSError when it fails."""
    result: int = _libc.prctl(option, arg2, arg3, arg4, arg5)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl {option}")
    return result


def missing(caps: Iterable[int]) -> list[str]:
    """Names of those capabilities that are not in this thread's effective set."""
    effective = int(_status("/proc/thread-self/status")["CapEff"], 16)
    return [NAMES.get(cap, f"capability {cap}") for cap in caps if not effective >> cap & 1]


def set_parent_death_signal(signal: int) -> None:
    """Have the kernel send `signal` when the thread that started this process ends (PR_SET_PDEATHSIG).

    A change of user or group clears it: call it again after `drop_privileges`. A parent that ended
    before the call sends nothing: compare os.getppid() afterwards.
    """
    prctl(PR_SET_PDEATHSIG, signal)


def keep_only(caps: Iterable[int]) -> None:
    """Give up every capability but these, for this process and all it starts; for good.

    Those that are not held now are not gained. Nor can a program that is set-uid or has file
    capabilities bring any back. Raises PrivilegeError when any step fails, or anything is left.
    """
    keep = sum(1 << cap for cap in set(caps))
    try:
        _drop_bounding_set(keep)
        status = _status("/proc/thread-self/status")
        permitted, inheritable = (int(status[name], 16) & keep for name in ("CapPrm", "CapInh"))
        _set_capabilities(permitted, inheritable)  # the ambient set follows
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_DUMPABLE, 0)
    except OSError as error:
        raise PrivilegeError(f"cannot give up capabilities: {error}") from error
    status = _status("/proc/thread-self/status")
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        if int(status[name], 16) & ~keep:
            raise PrivilegeError(f"{name} is {status[name]} after the drop")


def drop_privileges(uid: int, gid: int) -> None:
    """Become `uid` and `gid`, without other groups, capabilities or a way to get any; for good.

    A process that is not root and lacks CAP_SETUID may only name its own user and group. Raises
    PrivilegeError when any step fails, or any thread of the process keeps anything.
    """
    if uid <= 0 or gid <= 0:
        raise PrivilegeError(f"uid {uid}, gid {gid}: root's ids are no ids to drop to")
    try:
        _drop(uid, gid)
        for thread in Path("/proc/self/task").iterdir():
            _verify(_status(thread / "status"), uid, gid)
    except OSError as error:
        raise PrivilegeError(f"cannot become uid {uid}, gid {gid}: {error}") from error


def _drop(uid: int, gid: int) -> None:
    prctl(PR_SET_KEEPCAPS, 0)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    _drop_bounding_set(0)
    if not set(os.getgroups()) <= {gid}:
        os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _set_capabilities(0, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)  # last: a change of ids sets it anew


def _drop_bounding_set(keep: int) -> None:
    """Needs CAP_SETPCAP. Without it the set stays, which no_new_privs makes harmless."""
    if missing([CAP_SETPCAP]):
        return
    for cap in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
        if not keep >> cap & 1:
            prctl(PR_CAPBSET_DROP, cap)


def _set_capabilities(permitted: int, inheritable: int) -> None:
    """The calling thread's sets, as masks; effective is what is permitted."""
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    # struct __user_cap_data_struct twice: effective, permitted, inheritable, for the low and high 32 bits
    words = [sets >> shift & 0xFFFFFFFF for shift in (0, 32) for sets in (permitted, permitted, inheritable)]
    if _libc.capset(header, struct.pack("=6I", *words)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "capset")


def _verify(status: dict[str, str], uid: int, gid: int) -> None:
    """What `wanted` holds is a thread's own, so a thread that was started before the drop keeps its part."""
    wanted = {
        "Uid": [str(uid)] * 4,
        "Gid": [str(gid)] * 4,
        "NoNewPrivs": ["1"],
        **{name: ["0" * 16] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")},
    }
    for name, value in wanted.items():
        if status.get(name, "").split() != value:
            raise PrivilegeError(
                f"after the drop, thread {status['Pid']} has {name} {status.get(name)!r}; "
                "drop before any thread is started (with NumPy: OPENBLAS_NUM_THREADS=1)"
            )
    if not set(status["Groups"].split()) <= {str(gid)}:
        raise PrivilegeError(f"thread {status['Pid']} has groups {status['Groups']} after the drop")


def _status(path: str | Path) -> dict[str, str]:
    """The fields of a /proc/*/status file."""
    return dict(re.findall(r"^(\w+):[ \t]*(.*)$", Path(path).read_text(), re.MULTILINE))
