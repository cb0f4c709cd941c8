"""The system calls that a worker may still make.

Owns the seccomp filter: an allow-list by number, compiled to classic BPF. The worker calls
`restrict_worker` after set-up, when its imports are done and its privileges dropped. Nothing here
blocks.

io_uring requests are not system calls and pass no filter: a ring that was set up before must have been
restricted to the operations it needs (IORING_REGISTER_RESTRICTIONS).
"""

import ctypes
import errno
import os
import platform
from collections.abc import Iterable
from typing import Final, NamedTuple

from mrelay.kernel import cbpf
from mrelay.kernel.caps import PR_SET_NO_NEW_PRIVS, prctl

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
_DATA_ARG_1: Final = 24  # the low words of two arguments, little-endian
_DATA_ARG_2: Final = 32
PROT_EXEC: Final = 4  # asm-generic/mman-common.h
FIONBIO: Final = 0x5421  # asm-generic/ioctls.h


class Machine(NamedTuple):
    """An architecture: linux/audit.h's name for it, and the number of seccomp(2)."""

    audit_arch: int
    seccomp: int


MACHINES: Final = {
    "x86_64": Machine(0xC000003E, 317),  # AUDIT_ARCH_X86_64
    "aarch64": Machine(0xC00000B7, 277),  # AUDIT_ARCH_AARCH64
}

# (x86_64, aarch64): asm/unistd_64.h, asm-generic/unistd.h
CALLS: Final[dict[str, tuple[int, int]]] = {
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "dup": (32, 23),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "futex": (202, 98),
    "getcpu": (309, 168),
    "getpeername": (52, 205),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "io_uring_enter": (426, 426),
    "ioctl": (16, 29),
    "lseek": (8, 62),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),
    "ppoll": (271, 73),
    "pselect6": (270, 72),
    "read": (0, 63),
    "readv": (19, 65),
    "recvfrom": (45, 207),
    "recvmmsg": (299, 243),
    "recvmsg": (47, 212),
    "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigtimedwait": (128, 137),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "sendmmsg": (307, 269),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "setsockopt": (54, 208),
    "shutdown": (48, 210),
    "sigaltstack": (131, 132),
    "write": (1, 64),
    "writev": (20, 66),
    # x86_64 only: newer architectures have the p-variants alone, given here again
    "epoll_wait": (232, 22),
    "poll": (7, 73),
    "select": (23, 72),
}


class Guard(NamedTuple):
    """A call that is allowed only for some values of one argument: `test` with `k` decides, and
    `when_true` says whether a true answer allows it."""

    argument: int
    test: int
    k: int
    when_true: bool


GUARDS: Final = {
    "ioctl": Guard(_DATA_ARG_1, cbpf.BPF_JEQ, FIONBIO, True),
    "mmap": Guard(_DATA_ARG_2, cbpf.BPF_JSET, PROT_EXEC, False),
    "mprotect": Guard(_DATA_ARG_2, cbpf.BPF_JSET, PROT_EXEC, False),
}
WORKER: Final = frozenset(CALLS)


def restrict_worker(otherwise: int = REFUSE) -> None:
    """Allow every thread of this process what a running worker needs, and answer the rest with EPERM.

    Not reversible. OSError: EINVAL or ENOSYS on a kernel without seccomp filters; ENOSYS on a machine
    whose call numbers are not known here.
    """
    install(WORKER, otherwise)


def install(allowed: Iterable[str], otherwise: int = REFUSE) -> None:
    """Allow the calls of these names, for all threads; `otherwise` is the SECCOMP_RET_* for the rest.

    A call through another architecture's entry (32-bit code) kills the process.
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


def build(allowed: Iterable[str], otherwise: int, machine: str) -> list[cbpf.Insn]:
    """The filter: one comparison a call, then the looks at arguments.

    The length does not matter: the kernel remembers in a bitmap the calls that are allowed whatever their
    arguments, and runs the filter for the others alone.
    """
    column = list(MACHINES).index(machine)
    numbers = {name: CALLS[name][column] for name in allowed}
    guarded = [name for name in GUARDS if name in numbers]
    # From the end of the comparisons: the refusing return, the allowing one, four instructions a guard.
    targets = dict.fromkeys(numbers.values(), 1)
    targets |= {numbers[name]: 2 + 4 * i for i, name in enumerate(guarded)}
    tests = [
        _jump(cbpf.BPF_JEQ, number, len(targets) - 1 - i + target, 0)
        for i, (number, target) in enumerate(targets.items())
    ]
    return [
        cbpf.load(_DATA_ARCH),
        _jump(cbpf.BPF_JEQ, MACHINES[machine].audit_arch, 1, 0),
        cbpf.ret(SECCOMP_RET_KILL_PROCESS),
        cbpf.load(_DATA_NR),
        *tests,
        cbpf.ret(otherwise),
        cbpf.ret(SECCOMP_RET_ALLOW),
        *(insn for name in guarded for insn in _look(GUARDS[name], otherwise)),
    ]


def _look(guard: Guard, otherwise: int) -> list[cbpf.Insn]:
    when_true, when_false = SECCOMP_RET_ALLOW, otherwise
    if not guard.when_true:
        when_true, when_false = when_false, when_true
    test = _jump(guard.test, guard.k, 0, 1)
    return [cbpf.load(guard.argument), test, cbpf.ret(when_true), cbpf.ret(when_false)]


def _jump(test: int, k: int, jt: int, jf: int) -> cbpf.Insn:
    return cbpf.Insn(cbpf.BPF_JMP | test | cbpf.BPF_K, jt, jf, k)
