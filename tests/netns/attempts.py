"""What an attacker who runs code in a process would try: each a function that gets through, or raises OSError.

Standard library only, and imported before the process is confined. Harmless where they do get through: as root
and unconfined, that is how the tests see that they are real attempts.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

THROUGH: Final = "through"
_libc: Final = ctypes.CDLL(None, use_errno=True)
_COLUMN: Final = {"x86_64": 0, "aarch64": 1}
# asm/unistd_64.h, asm-generic/unistd.h
_NUMBERS: Final = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "clone3": (435, 435),
    "execveat": (322, 281),
    "init_module": (175, 105),
    "io_uring_setup": (425, 425),
    "kexec_load": (246, 104),
    "memfd_create": (319, 279),
    "pidfd_open": (434, 434),
    "process_vm_readv": (310, 270),
    "ptrace": (101, 117),
    "setns": (308, 268),
    "unshare": (272, 97),
}
PTRACE_SEIZE: Final = 0x4206  # linux/ptrace.h
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
NETLINK_NETFILTER: Final = 12  # linux/netlink.h
SO_ATTACH_BPF: Final = 50  # asm-generic/socket.h
PR_SET_DUMPABLE: Final = 4  # linux/prctl.h
MS_BIND: Final = 4096  # linux/mount.h


@dataclass(frozen=True)
class Targets:
    """Whom and what to attack. `folder` holds `script` (executable, but no program), `closed` (root's alone),
    and a listening `open.sock`; the abstract socket of the folder's name listens too."""

    folder: str
    supervisor: int
    sibling: int


def outcome(attempt: Callable[[Targets], object], targets: Targets) -> str:
    """THROUGH, or the errno's name that kept it back."""
    try:
        attempt(targets)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return THROUGH


def probe(targets: Targets) -> dict[str, str]:
    """The outcome of every attempt, by its name."""
    return {attempt.__name__: outcome(attempt, targets) for attempt in ATTEMPTS}


def _call(name: str, *arguments: object, fine: int = 0) -> int:
    """A system call; `fine` is the errno that says that nothing but our bad arguments stopped it."""
    number = _NUMBERS[name][_COLUMN[platform.machine()]]
    return _checked(_libc.syscall(ctypes.c_long(number), *arguments), fine)


def _checked(result: int, fine: int = 0) -> int:
    code = ctypes.get_errno()
    if result < 0 and code != fine:
        raise OSError(code, os.strerror(code))
    return result


# ---- sockets ---------------------------------------------------------------------------------------


def packet_socket(_: Targets) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()


def raw_socket(_: Targets) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()


def udp_socket(_: Targets) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()


def tcp_connection(_: Targets) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        _refused_at_most(lambda: sock.connect(("127.0.0.1", 9)))


def tcp_listener(_: Targets) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))


def unix_connection(targets: Targets) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(targets.folder + "/open.sock")


def abstract_unix_connection(targets: Targets) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + targets.folder)


def firewall_socket(_: Targets) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER).close()


def attach_bpf(_: Targets) -> None:
    """To the socket that is there: it says EBADF when it minds nothing but the missing program."""
    with socket.socket(fileno=os.dup(_a_socket())) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, 9999)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise


def _a_socket() -> int:
    """Any of ours."""
    for fd in range(3, 64):
        try:
            if os.fstat(fd).st_mode & 0o170000 == 0o140000:  # S_IFSOCK
                return fd
        except OSError:
            continue
    raise OSError(errno.ENOTSOCK, "no socket here")


def _refused_at_most(action: Callable[[], object]) -> None:
    try:
        action()
    except ConnectionRefusedError:
        return


# ---- files -----------------------------------------------------------------------------------------


def read_a_file_of_everyones(_: Targets) -> None:
    os.close(os.open("/etc/passwd", os.O_RDONLY))


def read_a_file_of_roots(targets: Targets) -> None:
    os.close(os.open(targets.folder + "/closed", os.O_RDONLY))


def write_a_file(_: Targets) -> None:
    os.close(os.open("/tmp", os.O_WRONLY | os.O_TMPFILE, 0o600))


def list_a_folder(_: Targets) -> None:
    os.listdir("/etc")


def read_a_device(_: Targets) -> None:
    os.close(os.open("/dev/urandom", os.O_RDONLY))


def mount_a_folder(targets: Targets) -> None:
    folder = targets.folder.encode()
    _checked(_libc.mount(folder, folder, None, MS_BIND, None))
    _checked(_libc.umount2(folder, 2))  # MNT_DETACH


def change_root(_: Targets) -> None:
    os.chroot("/")


# ---- other processes -------------------------------------------------------------------------------


def signal_the_supervisor(targets: Targets) -> None:
    os.kill(targets.supervisor, 0)


def signal_a_sibling(targets: Targets) -> None:
    os.kill(targets.sibling, 0)


def signal_by_descriptor(targets: Targets) -> None:
    fcntl.fcntl(2, fcntl.F_SETOWN, targets.supervisor)
    fcntl.fcntl(2, fcntl.F_SETOWN, 0)


def descriptor_of_a_process(targets: Targets) -> None:
    os.close(_call("pidfd_open", targets.supervisor, 0))


def trace_the_supervisor(targets: Targets) -> None:
    _call("ptrace", PTRACE_SEIZE, targets.supervisor, None, None)


def trace_a_sibling(targets: Targets) -> None:
    _call("ptrace", PTRACE_SEIZE, targets.sibling, None, None)


def read_the_supervisors_memory(targets: Targets) -> None:
    _call("process_vm_readv", targets.supervisor, None, 0, None, 0, 0)
    os.close(os.open(f"/proc/{targets.supervisor}/mem", os.O_RDONLY))


def read_the_supervisors_environment(targets: Targets) -> None:
    with open(f"/proc/{targets.supervisor}/environ", "rb") as file:
        file.read()


def read_a_siblings_memory(targets: Targets) -> None:
    os.close(os.open(f"/proc/{targets.sibling}/mem", os.O_RDWR))


def anothers_priority(targets: Targets) -> None:
    os.sched_setscheduler(targets.sibling, os.SCHED_OTHER, os.sched_param(0))


# ---- code ------------------------------------------------------------------------------------------


def execute(targets: Targets) -> None:
    path = (targets.folder + "/script").encode()
    _checked(_libc.execve(path, (ctypes.c_char_p * 2)(path), None), errno.ENOEXEC)


def execute_a_descriptor(targets: Targets) -> None:
    path = (targets.folder + "/script").encode()
    _call("execveat", -100, path, (ctypes.c_char_p * 2)(path), None, 0, fine=errno.ENOEXEC)


def fork(_: Targets) -> None:
    _wait_for(os.fork())


def clone_a_process(_: Targets) -> None:
    """By clone3, whose flags no filter sees."""
    arguments = (ctypes.c_uint64 * 8)(0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    _wait_for(_call("clone3", arguments, ctypes.sizeof(arguments)))


def _wait_for(pid: int) -> None:
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def executable_memory(_: Targets) -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def make_memory_executable(_: Targets) -> None:
    with mmap.mmap(-1, 4096) as memory:
        view = (ctypes.c_char * 4096).from_buffer(memory)
        try:
            _checked(_libc.mprotect(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(4096), 5))
        finally:
            del view


def file_in_memory(_: Targets) -> None:
    os.close(_call("memfd_create", b"code", 0))


# ---- the kernel ------------------------------------------------------------------------------------


def make_a_bpf_map(_: Targets) -> None:
    """BPF_MAP_CREATE of an array with one entry."""
    os.close(_call("bpf", 0, struct.pack("=IIII", 2, 4, 4, 1), 16))


def a_bpf_map_by_its_number(_: Targets) -> None:
    """BPF_MAP_GET_FD_BY_ID, of one that is not there."""
    _call("bpf", 14, struct.pack("=III", 0x7FFFFFFF, 0, 0), 12, fine=errno.ENOENT)


def a_bpf_program_by_its_number(_: Targets) -> None:
    """BPF_PROG_GET_FD_BY_ID, likewise."""
    _call("bpf", 13, struct.pack("=III", 0x7FFFFFFF, 0, 0), 12, fine=errno.ENOENT)


def load_a_bpf_program(_: Targets) -> None:
    """BPF_PROG_LOAD: a socket filter, r0 = 0; exit."""
    code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0))
    name = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack("=IIQQ", 1, 2, ctypes.addressof(code), ctypes.addressof(name))
    os.close(_call("bpf", 5, attributes, len(attributes)))


def set_up_io_uring(_: Targets) -> None:
    os.close(_call("io_uring_setup", 1, (ctypes.c_char * 120)()))


def load_a_module(_: Targets) -> None:
    _call("init_module", None, 0, b"", fine=errno.ENOEXEC)


def load_a_kernel(_: Targets) -> None:
    _call("kexec_load", 0, 99, None, 0, fine=errno.EINVAL)


def add_a_key(_: Targets) -> None:
    _call("add_key", b"user", b"mrelay-attack", b"x", 1, -2)  # KEY_SPEC_PROCESS_KEYRING


def enter_a_namespace(_: Targets) -> None:
    _call("setns", 9999, CLONE_NEWNET, fine=errno.EBADF)


def become_dumpable(_: Targets) -> None:
    _checked(_libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))


def become_root(_: Targets) -> None:
    os.setresuid(0, 0, 0)


def own_user_namespace(_: Targets) -> None:
    """Last: who gets through has changed what he may."""
    _call("unshare", CLONE_NEWUSER)


ATTEMPTS: Final[tuple[Callable[[Targets], None], ...]] = (
    packet_socket,
    raw_socket,
    udp_socket,
    tcp_connection,
    tcp_listener,
    unix_connection,
    abstract_unix_connection,
    firewall_socket,
    attach_bpf,
    read_a_file_of_everyones,
    read_a_file_of_roots,
    write_a_file,
    list_a_folder,
    read_a_device,
    mount_a_folder,
    change_root,
    signal_the_supervisor,
    signal_a_sibling,
    signal_by_descriptor,
    descriptor_of_a_process,
    trace_the_supervisor,
    trace_a_sibling,
    read_the_supervisors_memory,
    read_the_supervisors_environment,
    read_a_siblings_memory,
    anothers_priority,
    execute,
    execute_a_descriptor,
    fork,
    clone_a_process,
    executable_memory,
    make_memory_executable,
    file_in_memory,
    make_a_bpf_map,
    a_bpf_map_by_its_number,
    a_bpf_program_by_its_number,
    load_a_bpf_program,
    set_up_io_uring,
    load_a_module,
    load_a_kernel,
    add_a_key,
    enter_a_namespace,
    become_dumpable,
    become_root,
    own_user_namespace,
)
