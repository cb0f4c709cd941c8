"""`python as_user.py UID GID CAPS COMMAND…`: become an ordinary user with ambient capabilities, then the command.

As a systemd unit's User=, AmbientCapabilities= and CapabilityBoundingSet= do it. CAPS are numbers with commas, or
`none`. Folders that an ordinary user could not enter on the way to this Python are opened first, in a mount
namespace of this process's own (`ip netns exec` has made one).
"""

import ctypes
import os
import stat
import struct
import sys
import tempfile
from pathlib import Path

MS_BIND, MS_REC = 4096, 16384  # linux/mount.h
PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 8, 24, 47, 2  # linux/prctl.h
CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """OSError when a C function failed."""
    if result:
        raise OSError(ctypes.get_errno(), what)


def closed_above(path: Path) -> Path | None:
    """The topmost folder on the way to `path` that others may not enter."""
    ways = (folder for folder in reversed(path.parents) if not folder.stat().st_mode & stat.S_IXOTH)
    return next(ways, None)


def open_way(path: Path) -> None:
    """Put an empty folder over the closed one, with nothing in it but the way to `path`."""
    closed = closed_above(path)
    if closed is None:
        return
    aside = tempfile.mkdtemp()
    check(libc.mount(str(path).encode(), aside.encode(), None, MS_BIND | MS_REC, None), f"bind {path}")
    check(libc.mount(b"tmpfs", str(closed).encode(), b"tmpfs", 0, b"mode=755"), f"tmpfs {closed}")
    path.mkdir(parents=True)
    check(libc.mount(aside.encode(), str(path).encode(), None, MS_BIND | MS_REC, None), f"bind {aside}")


def become(uid: int, gid: int, caps: list[int]) -> None:
    """This user, with these capabilities in every set, and no others in the bounding set."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for cap in set(range(last + 1)) - set(caps):
        check(libc.prctl(PR_CAPBSET_DROP, cap, 0, 0, 0), "PR_CAPBSET_DROP")
    check(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
    os.setgroups([gid])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    mask = sum(1 << cap for cap in caps)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    check(libc.capset(header, struct.pack("=6I", low, low, low, high, high, high)), "capset")
    for cap in caps:
        check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0), "PR_CAP_AMBIENT_RAISE")


if __name__ == "__main__":
    user, group, wanted, *command = sys.argv[1:]
    open_way(Path(sys.base_prefix))
    become(int(user), int(group), [] if wanted == "none" else [int(cap) for cap in wanted.split(",")])
    os.execv(command[0], command)  # noqa: S606 (a launcher becomes its command)
