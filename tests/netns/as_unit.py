"""`python as_unit.py UNIT`: start a unit's ExecStart= as systemd would, as far as its settings can matter to it.

Users, groups, capabilities, no new privileges, umask, no memory both writable and executable, system call filter
and files that can't be written. Run as root in a mount namespace of its own (`ip netns exec` makes one).
Of systemd only the names of its system call sets are needed.
"""

import configparser
import ctypes
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 8, 22, 24, 38  # linux/prctl.h
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 47, 2, 65, 1
SECCOMP_MODE_FILTER, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 2, 0x7FFF0000, 0x00050000  # linux/seccomp.h
BPF_LD_W_ABS, BPF_JEQ, BPF_RET = 0x20, 0x15, 0x06  # linux/bpf_common.h
CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
EPERM: Final = 1
NUMBERS: Final = Path(f"/usr/include/{platform.machine()}-linux-gnu/asm/unistd_64.h")
CAPS: Final = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8,
    "CAP_NET_BIND_SERVICE": 10, "CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_PERFMON": 38, "CAP_BPF": 39,
}  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


def prctl(*arguments: Any) -> None:
    """OSError when it fails."""
    if libc.prctl(*arguments, *[0] * (5 - len(arguments))):
        raise OSError(ctypes.get_errno(), f"prctl {arguments}")


def read_unit(path: str) -> dict[str, list[str]]:
    """The [Service] section: every value of each key, in order."""

    class Values(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, self[key] + value if isinstance(value, list) and key in self else value)

    parser = configparser.RawConfigParser(strict=False, dict_type=Values, delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # as its documentation says
    parser.read(path)
    return {key: value.split("\n") for key, value in parser.items("Service")}


def system_calls(rules: list[str]) -> set[str]:
    """What SystemCallFilter= lines let through."""
    allowed: set[str] = set()
    for rule in rules:
        named = set().union(*map(expand, rule.removeprefix("~").split()))
        allowed = allowed - named if rule.startswith("~") else allowed | named
    return allowed


def expand(name: str) -> set[str]:
    """A system call, or all of a set."""
    if not name.startswith("@"):
        return {name}
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True
    )
    words = [line.split("#")[0].strip() for line in listed.stdout.splitlines()[1:]]
    return set().union(*(expand(word) for word in words if word))


def filter_calls(names: set[str]) -> None:
    """A seccomp filter: these, and EPERM for all others."""
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", NUMBERS.read_text()))
    program = struct.pack("=HBBI", BPF_LD_W_ABS, 0, 0, 0)
    for name in sorted(names & numbers.keys()):
        program += struct.pack("=HBBI", BPF_JEQ, 0, 1, int(numbers[name]))
        program += struct.pack("=HBBI", BPF_RET, 0, 0, SECCOMP_RET_ALLOW)
    program += struct.pack("=HBBI", BPF_RET, 0, 0, SECCOMP_RET_ERRNO | EPERM)
    code = ctypes.create_string_buffer(program, len(program))
    prog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(prog))


def protect_files(writable: list[str], binds: list[str]) -> None:
    """All mounts read-only for us, but these folders; `binds`: SOURCE:TARGET, one with a dash may be missing."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    shown = {folder: folder for folder in writable}
    for bind in binds:
        source, target = bind.removeprefix("-").split(":")
        if os.path.exists(source) or not bind.startswith("-"):
            shown[target] = source
    for target, source in shown.items():
        subprocess.run(["mount", "--bind", source, target], check=True)
    targets = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for target in set(targets) - shown.keys():
        if not target.startswith(("/proc", "/sys", "/dev")):
            subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)


def become(user: str, group: str, ambient: list[int], bounding: list[int]) -> None:
    """This user, with these capabilities."""
    uid, gid = (int(subprocess.check_output(["id", flag, user])) for flag in ("-u", "-g"))
    if group:
        gid = int(subprocess.check_output(["getent", "group", group]).split(b":")[2])
    for cap in set(range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1)) - set(bounding):
        prctl(PR_CAPBSET_DROP, cap)
    prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([gid])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    low, high = (sum(1 << cap for cap in ambient) >> shift & 0xFFFFFFFF for shift in (0, 32))
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    if libc.capset(header, struct.pack("=6I", low, low, low, high, high, high)):
        raise OSError(ctypes.get_errno(), "capset")
    for cap in ambient:
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap)


def main() -> None:
    """Everything in systemd's order, then the command."""
    unit = read_unit(sys.argv[1])
    calls = system_calls(unit["SystemCallFilter"])
    protect_files(unit["ReadWritePaths"][0].split(), unit["BindPaths"][0].split())
    ambient, bounding = (
        [CAPS[name] for name in unit[key][0].split()] for key in ("AmbientCapabilities", "CapabilityBoundingSet")
    )
    become(unit["User"][0], unit["Group"][0], ambient, bounding)
    os.umask(int(unit["UMask"][0], 8))
    os.chdir("/")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN)
    filter_calls(calls)
    command = unit["ExecStart"][0].split()
    environment = {"PATH": "/usr/sbin:/usr/bin", "LANG": "C.UTF-8", **keep_notify()}
    os.execve(command[0], command, environment)  # noqa: S606  no shell is what is wanted


def keep_notify() -> dict[str, str]:
    """What the service manager tells a service."""
    return {key: value for key, value in os.environ.items() if key in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}


if __name__ == "__main__":
    main()
