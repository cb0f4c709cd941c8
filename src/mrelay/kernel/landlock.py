"""Landlock: a process gives up the filesystem, TCP, and signals to others, for good and without privilege.

Owns the three landlock system calls (linux/landlock.h). Control and workers call `restrict` once, before they
start a thread: only the calling thread and what it starts later are bound. Nothing here blocks.
"""

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import Final

from mrelay.kernel.caps import PR_SET_NO_NEW_PRIVS, prctl

# asm-generic/unistd.h; the same on every architecture
SYS_LANDLOCK_CREATE_RULESET: Final = 444
SYS_LANDLOCK_ADD_RULE: Final = 445
SYS_LANDLOCK_RESTRICT_SELF: Final = 446

# linux/landlock.h
LANDLOCK_CREATE_RULESET_VERSION: Final = 1
LANDLOCK_RULE_PATH_BENEATH: Final = 1
LANDLOCK_ACCESS_FS_WRITE_FILE: Final = 1 << 1
LANDLOCK_ACCESS_FS_READ_FILE: Final = 1 << 2
LANDLOCK_ACCESS_FS_READ_DIR: Final = 1 << 3
LANDLOCK_ACCESS_FS_REMOVE_FILE: Final = 1 << 5
LANDLOCK_ACCESS_FS_MAKE_REG: Final = 1 << 8
LANDLOCK_ACCESS_FS_TRUNCATE: Final = 1 << 14
LANDLOCK_ACCESS_NET_BIND_TCP: Final = 1 << 0
LANDLOCK_ACCESS_NET_CONNECT_TCP: Final = 1 << 1
LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET: Final = 1 << 0
LANDLOCK_SCOPE_SIGNAL: Final = 1 << 1

# How many LANDLOCK_ACCESS_FS_* bits an ABI version knows: REFER came with 2, TRUNCATE with 3, IOCTL_DEV with 5.
_FS_BITS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_BITS_LATER: Final = 16
_NET_SINCE: Final = 4
_SCOPE_SINCE: Final = 6
# What keeping files in a directory takes: no subdirectories, links, devices, sockets or programs.
_KEEP_FILES: Final = (
    LANDLOCK_ACCESS_FS_WRITE_FILE
    | LANDLOCK_ACCESS_FS_READ_FILE
    | LANDLOCK_ACCESS_FS_READ_DIR
    | LANDLOCK_ACCESS_FS_REMOVE_FILE
    | LANDLOCK_ACCESS_FS_MAKE_REG
    | LANDLOCK_ACCESS_FS_TRUNCATE
)

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def abi() -> int:
    """This kernel's Landlock ABI version; 0 when it has none, or has it switched off."""
    try:
        return _call(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_CREATE_RULESET_VERSION)
    except OSError as error:
        # EPERM is a container's seccomp profile that does not know the call
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def restrict(directory: int | None = None) -> int:
    """Leave this process no file but those right in `directory` (a descriptor), if one is given.

    From ABI 4 on no TCP either, and from 6 on no signal to a process outside and no abstract Unix socket.
    Descriptors that are open stay so. Returns the ABI version in use; with 0 nothing was restricted. OSError
    when a kernel that has Landlock refuses; EBUSY when other threads would stay free.
    """
    version = abi()
    if version == 0:
        return 0
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise OSError(errno.EBUSY, "Landlock binds one thread only: restrict before another is started")
    handled = (1 << _FS_BITS.get(version, _FS_BITS_LATER)) - 1
    net = LANDLOCK_ACCESS_NET_BIND_TCP | LANDLOCK_ACCESS_NET_CONNECT_TCP if version >= _NET_SINCE else 0
    scoped = LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | LANDLOCK_SCOPE_SIGNAL if version >= _SCOPE_SINCE else 0
    attributes = struct.pack("=QQQ", handled, net, scoped)  # struct landlock_ruleset_attr; an older one is shorter
    ruleset = _call(SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    try:
        if directory is not None:
            beneath = struct.pack("=Qi", _KEEP_FILES & handled, directory)  # struct landlock_path_beneath_attr
            _call(SYS_LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, beneath, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        _call(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def _call(number: int, *arguments: object) -> int:
    result: int = _syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "landlock")
    return result
