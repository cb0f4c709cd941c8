"""The numbers of the system calls that a role's filter names, and of bpf(2). A table; for seccomp.py and bpf.py.

x86_64: asm/unistd_64.h. aarch64: asm-generic/unistd.h.
"""

from typing import Final, NamedTuple


class Machine(NamedTuple):
    """An architecture: linux/audit.h's name for it, and the number of seccomp(2)."""

    audit_arch: int
    seccomp: int


MACHINES: Final = {
    "x86_64": Machine(0xC000003E, 317),  # AUDIT_ARCH_X86_64
    "aarch64": Machine(0xC00000B7, 277),  # AUDIT_ARCH_AARCH64
}

# In the order of MACHINES.
CALLS: Final[dict[str, tuple[int, int]]] = {
    "accept4": (288, 242),
    "bind": (49, 200),
    "bpf": (321, 280),
    "brk": (12, 214),
    "clock_gettime": (228, 113),
    "clone": (56, 220),
    "clone3": (435, 435),
    "close": (3, 57),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "fsync": (74, 82),
    "futex": (202, 98),
    "getdents64": (217, 61),
    "getpeername": (52, 205),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "gettid": (186, 178),
    "io_uring_enter": (426, 426),
    "ioctl": (16, 29),
    "listen": (50, 201),
    "lseek": (8, 62),
    "madvise": (28, 233),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "newfstatat": (262, 79),
    "openat": (257, 56),
    "ppoll": (271, 73),
    "read": (0, 63),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_setscheduler": (144, 119),
    "sched_yield": (24, 124),
    "sendmmsg": (307, 269),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "set_robust_list": (273, 99),
    "setsockopt": (54, 208),
    "shutdown": (48, 210),
    "sigaltstack": (131, 132),
    "socket": (41, 198),
    "unlinkat": (263, 35),
    "write": (1, 64),
    # x86_64 only: newer architectures have the p-variants alone, given here again
    "epoll_wait": (232, 22),
    "poll": (7, 73),
}
