"""libbpf by ctypes: open objects, load and attach their programs. For the supervisor and tests.

Owns the prototypes of libbpf 1.1 and later (bpf/libbpf.h, bpf/bpf.h, bpf/btf.h; Debian's package libbpf1) and
the few constants of linux/bpf.h that go with them. Opening, loading and attaching need CAP_BPF, CAP_NET_ADMIN
and CAP_PERFMON. Importing works where the library is missing, and then `available` says so. `test_run` blocks
for as long as it is told to repeat; nothing else does.
"""

import ctypes
import errno
import functools
import os
import socket
from ctypes import POINTER, c_bool, c_char, c_char_p, c_int, c_int64, c_long, c_size_t, c_uint32, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from mrelay.kernel.cbpf import SO_LOCK_FILTER

SONAME: Final = "libbpf.so.1"
# linux/bpf.h
BPF_XDP: Final = 37
BPF_TCX_INGRESS: Final = 46
BPF_F_BEFORE: Final = 1 << 3
BPF_TC_INGRESS: Final = 1  # bpf/libbpf.h, enum bpf_tc_attach_point
BPF_TC_F_REPLACE: Final = 1
XDP_FLAGS_DRV_MODE: Final = 1 << 2  # linux/if_link.h
BTF_KIND_STRUCT: Final = 4  # linux/btf.h
BTF_KIND_DATASEC: Final = 15
SO_ATTACH_BPF: Final = 50  # asm-generic/socket.h
BPF_FS_MAGIC: Final = 0xCAFE4A11  # linux/magic.h
_STATFS_SIZE: Final = 256  # bytes, more than any struct statfs has; f_type comes first
_LOG_SIZE: Final = 1 << 20
_LOG_TAIL: Final = 2000  # bytes of it that an error shows


class _Options(ctypes.Structure):
    """The options structs of libbpf begin with their own size; 0 everywhere else means the default."""

    def __init__(self, **values: object) -> None:
        super().__init__(sz=ctypes.sizeof(self), **values)


class _OpenOptions(_Options):  # struct bpf_object_open_opts
    _fields_ = (
        ("sz", c_size_t),
        ("object_name", c_char_p),
        ("relaxed_maps", c_bool),
        ("pin_root_path", c_char_p),
        ("unused", c_uint32),
        ("kconfig", c_char_p),
        ("btf_custom_path", c_char_p),
        ("kernel_log_buf", c_void_p),
        ("kernel_log_size", c_size_t),
        ("kernel_log_level", c_uint32),
    )


class _TestRunOptions(_Options):  # struct bpf_test_run_opts
    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_char_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_char_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class _LinkOptions(_Options):  # struct bpf_link_create_opts, up to what XDP needs
    _fields_ = (
        ("sz", c_size_t),
        ("flags", c_uint32),
        ("iter_info", c_void_p),
        ("iter_info_len", c_uint32),
        ("target_btf_id", c_uint32),
    )


class _TcHook(_Options):  # struct bpf_tc_hook
    _fields_ = (("sz", c_size_t), ("ifindex", c_int), ("attach_point", c_int), ("parent", c_uint32))


class _TcOptions(_Options):  # struct bpf_tc_opts
    _fields_ = (
        ("sz", c_size_t),
        ("prog_fd", c_int),
        ("flags", c_uint32),
        ("prog_id", c_uint32),
        ("handle", c_uint32),
        ("priority", c_uint32),
    )


class _BtfType(ctypes.Structure):  # linux/btf.h, struct btf_type; members follow it
    _fields_ = (("name_off", c_uint32), ("info", c_uint32), ("size", c_uint32))


class _BtfMember(ctypes.Structure):  # linux/btf.h, struct btf_member
    _fields_ = (("name_off", c_uint32), ("type", c_uint32), ("offset", c_uint32))


class _BtfVariable(ctypes.Structure):  # linux/btf.h, struct btf_var_secinfo
    _fields_ = (("type", c_uint32), ("offset", c_uint32), ("size", c_uint32))


_PROTOTYPES: Final[dict[str, tuple[object, ...]]] = {  # name: result, arguments
    "libbpf_set_print": (c_void_p, c_void_p),
    "libbpf_num_possible_cpus": (c_int,),
    "bpf_object__open_mem": (c_void_p, c_char_p, c_size_t, POINTER(_OpenOptions)),
    "bpf_object__load": (c_int, c_void_p),
    "bpf_object__close": (None, c_void_p),
    "bpf_object__find_map_by_name": (c_void_p, c_void_p, c_char_p),
    "bpf_object__find_program_by_name": (c_void_p, c_void_p, c_char_p),
    "bpf_object__next_program": (c_void_p, c_void_p, c_void_p),
    "bpf_object__btf": (c_void_p, c_void_p),
    "bpf_program__fd": (c_int, c_void_p),
    "bpf_program__set_autoload": (c_int, c_void_p, c_bool),
    "bpf_map__fd": (c_int, c_void_p),
    "bpf_map__set_max_entries": (c_int, c_void_p, c_uint32),
    "bpf_map__reuse_fd": (c_int, c_void_p, c_int),
    "bpf_map__initial_value": (c_void_p, c_void_p, POINTER(c_size_t)),
    "bpf_prog_test_run_opts": (c_int, c_int, POINTER(_TestRunOptions)),
    "bpf_link_create": (c_int, c_int, c_int, c_int, POINTER(_LinkOptions)),
    "bpf_link_update": (c_int, c_int, c_int, c_void_p),
    "bpf_tc_hook_create": (c_int, POINTER(_TcHook)),
    "bpf_tc_attach": (c_int, POINTER(_TcHook), POINTER(_TcOptions)),
    "bpf_tc_detach": (c_int, POINTER(_TcHook), POINTER(_TcOptions)),
    "bpf_obj_pin": (c_int, c_int, c_char_p),
    "bpf_obj_get": (c_int, c_char_p),
    "btf__find_by_name_kind": (c_int, c_void_p, c_char_p, c_uint32),
    "btf__type_by_id": (c_void_p, c_void_p, c_uint32),
    "btf__name_by_offset": (c_char_p, c_void_p, c_uint32),
    "btf__resolve_size": (c_int64, c_void_p, c_uint32),
}


@functools.cache
def _lib() -> ctypes.CDLL:
    """OSError where the library is missing, AttributeError where it is too old."""
    library = ctypes.CDLL(SONAME, use_errno=True)
    for name, (result, *arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.libbpf_set_print(None)  # errors are ours to tell
    return library


def available() -> str:
    """Why nothing here will work; empty when it will, privilege given."""
    try:
        _lib()
    except OSError:
        return f"{SONAME} is not installed (Debian: libbpf1)"
    except AttributeError as error:
        return f"{SONAME} is older than 1.0: {error}"
    return ""


def _checked(result: int, what: str) -> int:
    """libbpf 1.x returns -errno; OSError with that."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
    return result


def possible_cpus() -> int:
    """Processors that may ever be there: those numbers that a program may run on."""
    return _checked(_lib().libbpf_num_possible_cpus(), "libbpf_num_possible_cpus")


# ---- objects ----


class Object:
    """The maps and programs of one ELF file: opened, then adjusted, then loaded. A context manager."""

    def __init__(self, elf: bytes, name: str) -> None:
        """OSError if it can't be read."""
        self.name = name
        self._log = ctypes.create_string_buffer(_LOG_SIZE)
        options = _OpenOptions(
            object_name=name.encode(), kernel_log_buf=ctypes.addressof(self._log), kernel_log_size=_LOG_SIZE
        )
        self._pointer = _lib().bpf_object__open_mem(elf, len(elf), options)
        if not self._pointer:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of maps and programs, except for descriptors handed out; closing twice is fine."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            _lib().bpf_object__close(pointer)

    def _map(self, name: str) -> int:
        found: int | None = _lib().bpf_object__find_map_by_name(self._pointer, name.encode())
        if not found:
            raise OSError(errno.ENOENT, f"{self.name} has no such map", name)
        return found

    def set_max_entries(self, name: str, entries: int) -> None:
        """Before `load`."""
        _checked(_lib().bpf_map__set_max_entries(self._map(name), entries), name)

    def reuse(self, name: str, fd: int) -> None:
        """Before `load`: have the map behind `fd`, which stays the caller's, instead of a new one."""
        _checked(_lib().bpf_map__reuse_fd(self._map(name), fd), name)

    def set_constants(self, **values: int) -> None:
        """Before `load`: what `const volatile` variables of .rodata are."""
        size = c_size_t()
        memory = _lib().bpf_map__initial_value(self._map(".rodata"), size)
        places = self._variables(".rodata")
        for name, value in values.items():
            offset, length = places[name]
            ctypes.memmove(memory + offset, value.to_bytes(length, "little"), length)

    def load(self, *, programs: bool = True) -> None:
        """Make the maps and, unless told otherwise, load the programs.

        OSError with the end of the verifier's log when the kernel refuses one.
        """
        program = None
        while not programs and (program := _lib().bpf_object__next_program(self._pointer, program)):
            _checked(_lib().bpf_program__set_autoload(program, False), self.name)
        result = _lib().bpf_object__load(self._pointer)
        if result < 0:
            log = self._log.value.decode(errors="replace")[-_LOG_TAIL:]
            raise OSError(-result, f"{self.name}: {os.strerror(-result)}\n{log}")

    def map_fd(self, name: str) -> int:
        """After `load`: a descriptor of the caller's own, which outlives the object."""
        return os.dup(_checked(_lib().bpf_map__fd(self._map(name)), name))

    def program_fd(self, name: str) -> int:
        """The same for a program."""
        program = _lib().bpf_object__find_program_by_name(self._pointer, name.encode())
        return os.dup(_checked(_lib().bpf_program__fd(program) if program else -errno.ENOENT, name))

    def layout(self, struct: str) -> tuple[int, dict[str, tuple[int, int]]]:
        """A struct's size, and for each member (offset, size), from the object's BTF: bytes."""
        btf, at = self._btf(struct, BTF_KIND_STRUCT)
        head = _BtfType.from_address(at)
        members = (_BtfMember * (head.info & 0xFFFF)).from_address(at + ctypes.sizeof(_BtfType))
        return int(head.size), {
            _name(btf, member.name_off): (member.offset // 8, int(_lib().btf__resolve_size(btf, member.type)))
            for member in members
        }

    def _variables(self, section: str) -> dict[str, tuple[int, int]]:
        """(offset, size) of each variable in a section."""
        btf, at = self._btf(section, BTF_KIND_DATASEC)
        count = _BtfType.from_address(at).info & 0xFFFF
        variables = (_BtfVariable * count).from_address(at + ctypes.sizeof(_BtfType))
        types = [_BtfType.from_address(_lib().btf__type_by_id(btf, each.type)) for each in variables]
        return {
            _name(btf, kind.name_off): (each.offset, each.size)
            for each, kind in zip(variables, types, strict=True)
        }

    def _btf(self, name: str, kind: int) -> tuple[int, int]:
        """The object's BTF, and where in memory the type of that name is described."""
        btf = _lib().bpf_object__btf(self._pointer)
        number = _checked(_lib().btf__find_by_name_kind(btf, name.encode(), kind), name)
        return btf, _lib().btf__type_by_id(btf, number)


def _name(btf: int, offset: int) -> str:
    found: bytes = _lib().btf__name_by_offset(btf, offset)
    return found.decode()


# ---- attaching ----


class _Link:
    """A program at an interface while the descriptor `fd`, or a pin, is open."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def replace(self, program: int) -> None:
        """With another one, without a gap."""
        _checked(_lib().bpf_link_update(self.fd, program, None), "bpf_link_update")

    def close(self) -> None:
        """Detaches, unless it is pinned."""
        os.close(self.fd)


class TcxLink(_Link):
    """At tcx ingress."""

    kind: Final = "tcx"


class XdpLink(_Link):
    """In the driver."""

    kind: Final = "xdp"


class ClsactFilter:
    """A program in the clsact qdisc, for kernels before 6.6. Outlives the process unless closed."""

    kind: Final = "clsact"

    def __init__(self, program: int, ifindex: int) -> None:
        """Takes the place of one that an earlier process left, at the same handle and priority."""
        self._hook = _TcHook(ifindex=ifindex, attach_point=BPF_TC_INGRESS)
        created = _lib().bpf_tc_hook_create(self._hook)
        _checked(0 if created == -errno.EEXIST else created, "bpf_tc_hook_create")
        self.replace(program)

    def replace(self, program: int) -> None:
        """With another one, without a gap."""
        options = _TcOptions(prog_fd=program, flags=BPF_TC_F_REPLACE, handle=1, priority=1)
        _checked(_lib().bpf_tc_attach(self._hook, options), "bpf_tc_attach")

    def close(self) -> None:
        """The qdisc stays: others may have filters there."""
        _checked(_lib().bpf_tc_detach(self._hook, _TcOptions(handle=1, priority=1)), "bpf_tc_detach")


def attach_ingress(program: int, ifindex: int, *, tcx: bool = True) -> TcxLink | ClsactFilter:
    """At tc ingress of an interface of the caller's namespace: by tcx (Linux 6.6), else by clsact."""
    if tcx:
        try:
            return attach_tcx(program, ifindex)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return ClsactFilter(program, ifindex)


def attach_tcx(program: int, ifindex: int, *, first: bool = False) -> TcxLink:
    """At tcx ingress, behind the programs that are there or before them.

    OSError: EINVAL is what kernels before 6.6 say, which do not know it.
    """
    options = _LinkOptions(flags=BPF_F_BEFORE if first else 0)
    return TcxLink(_checked(_lib().bpf_link_create(program, ifindex, BPF_TCX_INGRESS, options), "bpf_link_create"))


def attach_xdp(program: int, ifindex: int) -> XdpLink:
    """In the interface's driver, before everything else. OSError: EOPNOTSUPP (ERANGE, EINVAL) for a driver that
    can't, now or at all; EBUSY where another XDP program is.
    """
    fd = _lib().bpf_link_create(program, ifindex, BPF_XDP, _LinkOptions(flags=XDP_FLAGS_DRV_MODE))
    return XdpLink(_checked(fd, "bpf_link_create"))


def attach_to(sock: socket.socket, program: int, *, lock: bool) -> None:
    """As the socket's filter, replacing the one before. `lock`: nobody can change it any more."""
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program)
    if lock:
        sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)


def is_bpffs(folder: Path) -> bool:
    """Whether this folder is in a BPF file system; one that is not there (or not for us to see): the one above."""
    statfs = ctypes.CDLL(None).statfs
    found = (c_long * (_STATFS_SIZE // ctypes.sizeof(c_long)))()
    seen = next((at for at in (folder, *folder.parents) if statfs(os.fsencode(at), found) == 0), None)
    return seen is not None and found[0] & 0xFFFFFFFF == BPF_FS_MAGIC


def pin(fd: int, path: str) -> None:
    """Give a map, program or link a name in a BPF file system, which holds it. OSError EEXIST if it is taken."""
    _checked(_lib().bpf_obj_pin(fd, path.encode()), path)


def map_id(fd: int) -> int:
    """The kernel's number of a map, which no other has had since boot."""
    with open(f"/proc/self/fdinfo/{fd}") as file:  # bpf_map_show_fdinfo, kernel/bpf/syscall.c
        lines = dict(line.split(":") for line in file)
    return int(lines["map_id"])


def get_pinned(path: str) -> int:
    """A descriptor of the caller's own. OSError ENOENT if there is none."""
    return _checked(_lib().bpf_obj_get(path.encode()), path)


# ---- trying out ----


class Run(NamedTuple):
    """What a program made of a frame. `nanoseconds`: the average of one run."""

    verdict: int
    frame: bytes
    nanoseconds: int


def test_run(program: int, frame: bytes, context: bytes = b"", repeat: int = 1) -> Run:
    """BPF_PROG_TEST_RUN; `context`: struct __sk_buff, of which few members may be other than zero."""
    room: ctypes.Array[c_char] = ctypes.create_string_buffer(len(frame) + 256)
    options = _TestRunOptions(
        data_in=frame,
        data_size_in=len(frame),
        data_out=ctypes.addressof(room),
        data_size_out=len(room),
        ctx_in=context or None,
        ctx_size_in=len(context),
        repeat=repeat,
    )
    _checked(_lib().bpf_prog_test_run_opts(program, options), "bpf_prog_test_run_opts")
    verdict = ctypes.c_int32(options.retval).value
    return Run(verdict, room.raw[: options.data_size_out], int(options.duration))
