"""The roles' system calls: the filters in an interpreter, and processes that live behind them."""

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from typing import Any

import pytest

from mrelay.kernel import cbpf, seccomp
from mrelay.kernel.syscalls import CALLS, MACHINES

# What a worker does (must succeed) and what it must never do (must say EPERM), reported as JSON.
CONFINED = """
import ctypes, fcntl, gc, json, mmap, os, select, signal, socket, sys, threading, time, traceback
import numpy as np
from mrelay.kernel import cbpf, seccomp

receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.bind(("127.0.0.1", 0))
there = receiver.getsockname()
left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
memory = os.memfd_create("counters")
os.ftruncate(memory, 4096)
libc = ctypes.CDLL(None, use_errno=True)
fresh = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
signal.signal(signal.SIGUSR1, signal.SIG_DFL)

seccomp.restrict(seccomp.WORKER)

def descriptors():
    left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, memory.to_bytes(4, sys.byteorder))])
    ancillary = right.recvmsg(10, 100)[1]
    fd = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
    with mmap.mmap(fd, 4096) as view:
        view[0] = 1
    os.close(fd)

def datagrams():
    sender = socket.socket(fileno=os.dup(fresh.fileno()))
    sender.setblocking(False)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    cbpf.attach(sender, cbpf.DROP_ALL)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 5)
    sender.sendmsg([b"one"], [], 0, there)
    waiting = select.poll()
    waiting.register(receiver, select.POLLIN)
    waiting.poll(1000)
    assert receiver.recvmsg(9)[0] == b"one"
    sender.close()

def vectors():
    for bits in range(12, 25):
        np.sort(np.ones(1 << bits, np.uint8))
        bytearray(1 << bits).extend(bytes(1 << bits))
    gc.collect()

def signals():
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

def priorities():
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

def the_rest():
    os.getrandom(8), os.getpid(), os.getppid(), os.sched_yield(), os.set_blocking(right.fileno(), False)
    time.monotonic(), time.time(), time.process_time(), time.thread_time()
    os.write(2, b""), os.fstat(memory)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def outcome(action):
    try:
        action()
    except OSError as error:
        return error.errno
    except (RuntimeError, ImportError) as error:
        return type(error).__name__
    return 0

done = {a.__name__: outcome(a) for a in (descriptors, datagrams, vectors, signals, priorities, the_rest)}
refused = {
    "socket": outcome(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
    "socketpair": outcome(socket.socketpair),
    "open": outcome(lambda: open("/etc/hostname")),
    "connect": outcome(lambda: fresh.connect(there)),
    "bind": outcome(lambda: fresh.bind(("127.0.0.1", 0))),
    "listen": outcome(lambda: call("listen", fresh.fileno(), 1)),
    "execve": outcome(lambda: os.execv("/bin/true", ["true"])),
    "fork": outcome(os.fork),
    "kill": outcome(lambda: os.kill(os.getpid(), 0)),
    "ptrace": outcome(lambda: call("ptrace", 0, 0, None, None)),
    "another's priority": outcome(lambda: os.sched_setscheduler(os.getppid(), os.SCHED_BATCH, os.sched_param(0))),
    "io_uring_setup": outcome(lambda: call("syscall", 425, 1, None)),
    "ioctl": outcome(lambda: call("ioctl", fresh.fileno(), 0x8946, None)),
    "a join": outcome(lambda: fresh.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, bytes(8))),
    "an eBPF filter": outcome(lambda: fresh.setsockopt(socket.SOL_SOCKET, 50, 0)),  # SO_ATTACH_BPF
    "a ring's option": outcome(lambda: fresh.setsockopt(263, 18, 0)),  # SOL_PACKET, PACKET_FANOUT
    "signals by descriptor": outcome(lambda: fcntl.fcntl(fresh, fcntl.F_SETOWN, os.getpid())),
    "executable memory": outcome(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC)),
    "thread": outcome(threading.Thread(target=int).start),
    "late import": outcome(lambda: __import__("wave")),
}
try:
    1 / 0
except ZeroDivisionError:
    traceback.print_exc()
print(json.dumps({"done": done, "refused": refused}))
raise RuntimeError("the last words")
"""

KILLED = """
import os
from mrelay.kernel import seccomp
seccomp.restrict(seccomp.WORKER, seccomp.SECCOMP_RET_KILL_PROCESS)
os.kill(os.getpid(), 0)
"""


def python(script: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environ, timeout=50
    )


@pytest.fixture(scope="module")
def confined() -> "subprocess.CompletedProcess[str]":
    if os.uname().machine not in MACHINES:
        pytest.skip(f"no seccomp call numbers for {os.uname().machine}")
    return python(CONFINED)


def report(confined: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, Any]]:
    assert confined.stdout, confined.stderr
    found: dict[str, dict[str, Any]] = json.loads(confined.stdout)
    return found


def test_a_worker_can_work(confined: "subprocess.CompletedProcess[str]") -> None:
    done = report(confined)["done"]
    assert done == dict.fromkeys(done, 0)


def test_a_worker_can_open_nothing(confined: "subprocess.CompletedProcess[str]") -> None:
    refused = report(confined)["refused"]
    assert refused.pop("thread") == "RuntimeError"
    assert refused.pop("late import") in (errno.EPERM, "ModuleNotFoundError")  # as the finder has it cached
    assert refused == dict.fromkeys(refused, errno.EPERM)


def test_an_error_is_told_though_sources_cannot_be_read(
    confined: "subprocess.CompletedProcess[str]",
) -> None:
    assert confined.returncode == 1
    assert "ZeroDivisionError: division by zero" in confined.stderr
    assert confined.stderr.endswith("RuntimeError: the last words\n")


def test_the_rest_may_kill_instead(confined: "subprocess.CompletedProcess[str]") -> None:
    assert python(KILLED).returncode == -signal.SIGSYS


def verdict(program: list[cbpf.Insn], arch: int, number: int, *arguments: int) -> int:
    """What the program returns for a call (struct seccomp_data, little-endian)."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator = at = 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        match code:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x15:  # BPF_JMP | BPF_JEQ
                at += jt if accumulator == k else jf
            case 0x45:  # BPF_JMP | BPF_JSET
                at += jt if accumulator & k else jf
            case 0x06:  # BPF_RET
                return k
            case _:
                raise AssertionError(f"code {code:#x}")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("role", seccomp.ROLES)
def test_every_call_on_every_machine(role: str, machine: str) -> None:
    allowed = seccomp.ROLES[role]
    program = seccomp.build(allowed, seccomp.REFUSE, machine)
    column, arch = list(MACHINES).index(machine), MACHINES[machine].audit_arch
    plain = {CALLS[name][column] for name, guards in allowed.items() if not guards and name != "clone3"}
    guarded = {CALLS[name][column] for name, guards in allowed.items() if guards}
    for number in {*range(500), 0x40000001} - guarded - {CALLS["clone3"][column]}:
        want = seccomp.SECCOMP_RET_ALLOW if number in plain else seccomp.REFUSE
        assert verdict(program, arch, number) == want, number
    assert verdict(program, 0x40000003, 0) == seccomp.SECCOMP_RET_KILL_PROCESS  # AUDIT_ARCH_I386


# What a guarded call may be given, and what not.
ARGUMENTS: list[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = [
    ("worker", "mmap", (0, 4096, 1 | 2), (0, 4096, 1 | 4)),
    ("control", "mprotect", (0, 4096, 1 | 2), (0, 4096, 4)),
    ("worker", "ioctl", (3, seccomp.FIONBIO), (3, 0x5412)),  # TIOCSTI
    ("control", "fcntl", (3, seccomp.F_DUPFD_CLOEXEC), (3, 10)),  # F_SETSIG
    ("worker", "sched_setscheduler", (0, 3), (1, 3)),
    ("control", "clone", (0x3D0F00,), (0x11,)),  # pthread_create's flags, fork's
    ("control", "socket", (16, 3, 0), (2, 2, 0)),  # AF_NETLINK, AF_INET
    ("control", "socket", (16, 2, 0), (16, 3, 12)),  # NETLINK_ROUTE, NETLINK_NETFILTER
    ("worker", "setsockopt", (3, 1, 26), (3, 1, 50)),  # SO_ATTACH_FILTER, SO_ATTACH_BPF
    ("worker", "setsockopt", (3, 41, 18), (3, 263, 18)),  # IPV6_MULTICAST_HOPS, PACKET_FANOUT
    ("control", "setsockopt", (3, 1, 7), (3, 1, 26)),  # SO_SNDBUF, SO_ATTACH_FILTER
    ("worker", "setsockopt", (3, 1, 26), (3, 1, 27)),  # SO_ATTACH_FILTER, SO_DETACH_FILTER
    ("worker", "bpf", (2,), (0,)),  # BPF_MAP_UPDATE_ELEM, BPF_MAP_CREATE
    ("control", "bpf", (3,), (5,)),  # BPF_MAP_DELETE_ELEM, BPF_PROG_LOAD
    ("worker", "bpf", (24,), (14,)),  # BPF_MAP_LOOKUP_BATCH, BPF_MAP_GET_FD_BY_ID
    ("control", "bpf", (4,), (7,)),  # BPF_MAP_GET_NEXT_KEY, BPF_OBJ_GET
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("role", "call", "good", "bad"), ARGUMENTS)
def test_arguments_are_looked_at(
    machine: str, role: str, call: str, good: tuple[int, ...], bad: tuple[int, ...]
) -> None:
    program = seccomp.build(seccomp.ROLES[role], seccomp.REFUSE, machine)
    number, arch = CALLS[call][list(MACHINES).index(machine)], MACHINES[machine].audit_arch
    assert verdict(program, arch, number, *good) == seccomp.SECCOMP_RET_ALLOW
    assert verdict(program, arch, number, *bad) == seccomp.REFUSE


@pytest.mark.parametrize("machine", MACHINES)
def test_clone3_seems_to_be_unknown(machine: str) -> None:
    """So that the C library falls back to clone, whose flags can be looked at."""
    program = seccomp.build(seccomp.CONTROL, seccomp.REFUSE, machine)
    number, arch = CALLS["clone3"][list(MACHINES).index(machine)], MACHINES[machine].audit_arch
    assert verdict(program, arch, number) == seccomp.SECCOMP_RET_ERRNO | errno.ENOSYS
