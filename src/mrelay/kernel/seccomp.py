"""The system calls that control and a worker may still make.

Owns the seccomp filters: for each role an allow-list, some calls for certain arguments only, compiled to
classic BPF. child.confine calls `restrict` when a role's imports are done and its privileges dropped. The lists
are what scripts/measure_syscalls.py saw while the tests ran, and the few that its comments name. Nothing here
blocks.

io_uring requests are not system calls and pass no filter: a ring that was set up before must have been
restricted to the operations it needs (IORING_REGISTER_RESTRICTIONS).
"""

import ctypes
import errno
import os
import platform
import socket
from collections.abc import Mapping
from typing import Final, NamedTuple

from mrelay.kernel import bpf, cbpf, udp
from mrelay.kernel.caps import PR_SET_NO_NEW_PRIVS, prctl
from mrelay.kernel.syscalls import CALLS, MACHINES

# linux/seccomp.h
SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_TSYNC: Final = 1
SECCOMP_RET_KILL_PROCESS: Final = 0x80000000
SECCOMP_RET_ERRNO: Final = 0x00050000
SECCOMP_RET_ALLOW: Final = 0x7FFF0000
REFUSE: Final = SECCOMP_RET_ERRNO | errno.EPERM
# struct seccomp_data: int nr, u32 arch, u64 instruction_pointer, u64 args[6]
_DATA_NR: Final = 0
_DATA_ARCH: Final = 4
_DATA_ARGS: Final = 16  # eight bytes each, little-endian, so their low words come first

PROT_EXEC: Final = 4  # asm-generic/mman-common.h
FIONBIO: Final = 0x5421  # asm-generic/ioctls.h
CLONE_THREAD: Final = 0x00010000  # linux/sched.h
# linux/netlink.h
NETLINK_ROUTE: Final = 0
_SOCKADDR_NL: Final = 12  # bytes
# linux/fcntl.h, asm-generic/fcntl.h. Not among them: F_SETOWN and F_SETSIG, which make the kernel send signals.
F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC = 1, 2, 3, 4, 1030


class Guard(NamedTuple):
    """What one argument (its low 32 bits) must be: one of `values`, or have a bit of `has`, or none of `lacks`."""

    argument: int
    values: tuple[int, ...] = ()
    has: int = 0
    lacks: int = 0


Allowed = Mapping[str, tuple[Guard, ...]]  # by name; the call passes when all its guards do


def _plainly(*names: str) -> dict[str, tuple[Guard, ...]]:
    """Calls that are allowed whatever their arguments."""
    return dict.fromkeys(names, ())


_NO_CODE: Final = (Guard(2, lacks=PROT_EXEC),)
_BOTH: Final[Allowed] = {
    # memory, locks, the end
    **_plainly("brk", "madvise", "munmap", "futex", "getpid", "clock_gettime", "exit_group"),
    # descriptors and sockets that are there
    **_plainly("close", "getpeername", "getsockname", "getsockopt", "newfstatat", "recvmsg", "sendmsg", "write"),
    # seldom seen: large blocks that grow, signals, calls that one broke off, the last words of who fails
    **_plainly("mremap", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall"),
    # how another Python or C library may say what is above
    **_plainly("sched_yield", "fstat", "gettid", "getrandom", "lseek"),
    "fcntl": (Guard(1, (F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC)),),
    "ioctl": (Guard(1, (FIONBIO,)),),
    # elements of the fast path's maps, whose descriptors they were given
    "bpf": (
        Guard(
            0,
            (
                bpf.BPF_MAP_LOOKUP_ELEM,
                bpf.BPF_MAP_UPDATE_ELEM,
                bpf.BPF_MAP_DELETE_ELEM,
                bpf.BPF_MAP_GET_NEXT_KEY,
                bpf.BPF_MAP_LOOKUP_BATCH,
            ),
        ),
    ),
    "mmap": _NO_CODE,
    "mprotect": _NO_CODE,
}
_SEND_OPTIONS: Final = (
    *(udp.IP_TTL, udp.IP_MULTICAST_TTL, udp.IP_TOS),
    *(udp.IPV6_UNICAST_HOPS, udp.IPV6_MULTICAST_HOPS, udp.IPV6_TCLASS),
)
WORKER: Final[Allowed] = {
    **_BOTH,
    **_plainly("io_uring_enter", "poll", "ppoll", "sendmmsg"),
    "sched_setscheduler": (Guard(0, (0,)),),  # its own alone
    # No joins, no binding, nothing of a receive ring (SOL_PACKET) but its filter. The two lists are checked
    # apart, so a name also passes at another level; none of these does harm there.
    "setsockopt": (
        Guard(1, (socket.SOL_SOCKET, socket.IPPROTO_IP, socket.IPPROTO_IPV6)),
        Guard(2, (cbpf.SO_ATTACH_FILTER, socket.SO_SNDBUF, udp.SO_SNDBUFFORCE, *_SEND_OPTIONS)),
    ),
}
CONTROL: Final[Allowed] = {
    **_BOTH,
    **_plainly("accept4", "epoll_ctl", "epoll_pwait", "epoll_wait", "listen", "recvfrom", "sendto", "shutdown"),
    # threads, which do what would block the event loop
    **_plainly("clone3", "exit", "rseq", "sched_getaffinity", "set_robust_list"),
    "clone": (Guard(0, has=CLONE_THREAD),),
    # the state file (unlinkat only when it can't be written); where there is Landlock, nothing else can be opened
    **_plainly("fsync", "getdents64", "openat", "read", "renameat", "renameat2", "unlinkat"),
    # the list of links, and whose child we are
    **_plainly("getppid"),
    "bind": (Guard(2, (_SOCKADDR_NL,)),),  # no tap, which has a struct sockaddr_ll
    "socket": (Guard(0, (socket.AF_NETLINK,)), Guard(2, (NETLINK_ROUTE,))),
    "setsockopt": (
        Guard(1, (socket.SOL_SOCKET,)),
        Guard(2, (socket.SO_SNDBUF, socket.SO_RCVBUF, udp.SO_SNDBUFFORCE)),
    ),
}
ROLES: Final[dict[str, Allowed]] = {"control": CONTROL, "worker": WORKER}
# Its flags lie in memory, where a filter can't look: so that the C library falls back to clone.
_ABSENT: Final = {"clone3": SECCOMP_RET_ERRNO | errno.ENOSYS}


def restrict(allowed: Allowed, otherwise: int = REFUSE) -> None:
    """Allow every thread of this process these calls; `otherwise` (SECCOMP_RET_*) is the answer to the rest.

    Not reversible. A call through another architecture's entry (32-bit code) kills the process. OSError:
    EINVAL or ENOSYS on a kernel without seccomp filters; ENOSYS on a machine whose call numbers are not known.
    """
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no seccomp call numbers for {machine}")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    fprog, memory = cbpf.sock_fprog(build(allowed, otherwise, machine))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_char_p]
    number = MACHINES[machine].seccomp
    result = libc.syscall(number, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, fprog)
    del memory
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "seccomp")
    if result > 0:
        raise OSError(errno.ESRCH, f"thread {result} cannot take the seccomp filter")


def available() -> bool:
    """Whether this kernel and machine can do what `restrict` does."""
    return platform.machine() in MACHINES and os.path.exists("/proc/sys/kernel/seccomp/actions_avail")


def build(allowed: Allowed, otherwise: int, machine: str) -> list[cbpf.Insn]:
    """The filter: one comparison a call, then an answer or the looks at arguments.

    The length does not matter: the kernel remembers in a bitmap the calls that are allowed whatever their
    arguments, and runs the filter for the others alone.
    """
    column = list(MACHINES).index(machine)
    blocks = {
        CALLS[name][column]: [cbpf.ret(_ABSENT[name])] if name in _ABSENT else _look(guards, otherwise)
        for name, guards in allowed.items()
        if guards or name in _ABSENT
    }
    numbers = list(dict.fromkeys(CALLS[name][column] for name in allowed))
    tests, answers = [], [cbpf.ret(otherwise), cbpf.ret(SECCOMP_RET_ALLOW)]
    for left, number in zip(reversed(range(len(numbers))), numbers, strict=True):
        target = 1 if number not in blocks else len(answers)
        answers += blocks.get(number, [])
        tests.append(_jump(cbpf.BPF_JEQ, number, left + target, 0))
    return [
        cbpf.load(_DATA_ARCH),
        _jump(cbpf.BPF_JEQ, MACHINES[machine].audit_arch, 1, 0),
        cbpf.ret(SECCOMP_RET_KILL_PROCESS),
        cbpf.load(_DATA_NR),
        *tests,
        *answers,
    ]


def _look(guards: tuple[Guard, ...], otherwise: int) -> list[cbpf.Insn]:
    """Each guard goes on to the next, or refuses; behind the last one the call is allowed."""
    program: list[cbpf.Insn] = []
    for guard in guards:
        program.append(cbpf.load(_DATA_ARGS + 8 * guard.argument))
        for left, value in zip(reversed(range(len(guard.values))), guard.values, strict=True):
            program.append(_jump(cbpf.BPF_JEQ, value, left + 1, 0))
        if guard.has:
            program.append(_jump(cbpf.BPF_JSET, guard.has, 1, 0))
        if guard.lacks:
            program.append(_jump(cbpf.BPF_JSET, guard.lacks, 0, 1))
        program.append(cbpf.ret(otherwise))
    return [*program, cbpf.ret(SECCOMP_RET_ALLOW)]


def _jump(test: int, k: int, jt: int, jf: int) -> cbpf.Insn:
    return cbpf.Insn(cbpf.BPF_JMP | test | cbpf.BPF_K, jt, jf, k)
