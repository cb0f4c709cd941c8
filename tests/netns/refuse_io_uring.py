"""`python refuse_io_uring.py COMMAND…`: run a command on a host that refuses io_uring, as containers do.

Installs a seccomp filter that fails io_uring_setup with EPERM, then becomes the command.
"""

import ctypes
import errno
import os
import struct
import sys

PR_SET_SECCOMP = 22  # linux/prctl.h
SECCOMP_MODE_FILTER = 2  # linux/seccomp.h
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
LOAD_WORD, JUMP_EQUAL, RETURN = (
    0x20,
    0x15,
    0x06,
)  # linux/filter.h: BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ, BPF_RET
IO_URING_SETUP = 425  # the same number on every architecture


def refuse() -> None:
    """Install the filter in this process and all it will start."""
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (LOAD_WORD, 0, 0, 0),  # struct seccomp_data begins with the system call's number
            (JUMP_EQUAL, 0, 1, IO_URING_SETUP),
            (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
            (RETURN, 0, 0, SECCOMP_RET_ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program)
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


if __name__ == "__main__":
    refuse()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 (a launcher becomes its command)
