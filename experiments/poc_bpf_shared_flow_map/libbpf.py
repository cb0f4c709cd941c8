"""libbpf by ctypes: load an object, attach its programs, read and write maps. Thin, and not tied to mrelay.

Owns the prototypes of libbpf 1.1 and later (bpf/libbpf.h, bpf/bpf.h, bpf/btf.h; Debian's package libbpf1) and
the few constants of linux/bpf.h that go with them. Opening, loading and attaching need CAP_BPF, CAP_NET_ADMIN
and for some programs CAP_PERFMON; a `Map` made from a descriptor needs none. Importing fails with OSError where
the library is missing. `Program.test_run` blocks for as long as it is told to repeat; nothing else does.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import socket
from ctypes import POINTER, c_bool, c_char, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from types import TracebackType
from typing import Final, Self

SONAME: Final = "libbpf.so.1"
# linux/bpf.h
BPF_ANY: Final = 0
BPF_MAP_TYPE_ARRAY: Final = 2
BPF_PROG_TYPE_SOCKET_FILTER: Final = 1
BPF_F_RDONLY: Final = 1 << 3  # of a descriptor: this one can't change the map
BPF_F_TEST_XDP_LIVE_FRAMES: Final = 1 << 1
BPF_TCX_INGRESS: Final = 46
BPF_TC_INGRESS: Final = 1  # bpf/libbpf.h, enum bpf_tc_attach_point
BPF_TC_INGRESS_AND_EGRESS: Final = 3
BTF_KIND_STRUCT: Final = 4  # linux/btf.h
SO_ATTACH_BPF: Final = 50  # asm-generic/socket.h
SO_LOCK_FILTER: Final = 44
_LOG_SIZE: Final = 1 << 18
_PERCPU_TYPES: Final = (5, 6, 10)  # BPF_MAP_TYPE_PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH


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
        ("ctx_in", c_void_p),
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


class _FdByIdOptions(_Options):  # struct bpf_get_fd_by_id_opts
    _fields_ = (("sz", c_size_t), ("open_flags", c_uint32))


class _MapInfo(ctypes.Structure):  # linux/bpf.h, struct bpf_map_info, as far as used
    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("name", c_char * 16),
    )


class _BtfType(ctypes.Structure):  # linux/btf.h, struct btf_type; a struct's members follow it
    _fields_ = (("name_off", c_uint32), ("info", c_uint32), ("size", c_uint32))


class _BtfMember(ctypes.Structure):  # linux/btf.h, struct btf_member
    _fields_ = (("name_off", c_uint32), ("type", c_uint32), ("offset", c_uint32))


_PROTOTYPES: Final[dict[str, tuple[object, ...]]] = {  # name: result, arguments
    "libbpf_set_print": (c_void_p, c_void_p),
    "libbpf_num_possible_cpus": (c_int,),
    "bpf_object__open_mem": (c_void_p, c_char_p, c_size_t, POINTER(_OpenOptions)),
    "bpf_object__load": (c_int, c_void_p),
    "bpf_object__close": (None, c_void_p),
    "bpf_object__find_map_fd_by_name": (c_int, c_void_p, c_char_p),
    "bpf_object__find_program_by_name": (c_void_p, c_void_p, c_char_p),
    "bpf_object__btf": (c_void_p, c_void_p),
    "bpf_program__fd": (c_int, c_void_p),
    "bpf_prog_test_run_opts": (c_int, c_int, POINTER(_TestRunOptions)),
    "bpf_link_create": (c_int, c_int, c_int, c_int, c_void_p),
    "bpf_tc_hook_create": (c_int, POINTER(_TcHook)),
    "bpf_tc_hook_destroy": (c_int, POINTER(_TcHook)),
    "bpf_tc_attach": (c_int, POINTER(_TcHook), POINTER(_TcOptions)),
    "bpf_obj_get_info_by_fd": (c_int, c_int, c_void_p, POINTER(c_uint32)),
    "bpf_map_get_fd_by_id_opts": (c_int, c_uint32, POINTER(_FdByIdOptions)),
    "bpf_map_create": (c_int, c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p),
    "bpf_prog_load": (c_int, c_int, c_char_p, c_char_p, c_char_p, c_size_t, c_void_p),
    "bpf_map_update_elem": (c_int, c_int, c_char_p, c_char_p, c_uint64),
    "bpf_map_lookup_elem": (c_int, c_int, c_char_p, c_void_p),
    "bpf_map_delete_elem": (c_int, c_int, c_char_p),
    "btf__find_by_name_kind": (c_int, c_void_p, c_char_p, c_uint32),
    "btf__type_by_id": (c_void_p, c_void_p, c_uint32),
    "btf__name_by_offset": (c_char_p, c_void_p, c_uint32),
    "btf__resolve_size": (c_int64, c_void_p, c_uint32),
}


def _load_library() -> ctypes.CDLL:
    library = ctypes.CDLL(SONAME, use_errno=True)
    for name, (result, *arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.libbpf_set_print(None)  # errors are ours to tell
    return library


_lib: Final = _load_library()


def _checked(result: int, what: str) -> int:
    """libbpf 1.x returns -errno; OSError with that."""
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
    return result


class Map:
    """A map by its descriptor, which the caller keeps open. Keys and values are bytes of the map's sizes."""

    def __init__(self, fd: int) -> None:
        """OSError (EBADF, EINVAL) if it is no map's."""
        info, size = _MapInfo(), c_uint32(ctypes.sizeof(_MapInfo))
        _checked(_lib.bpf_obj_get_info_by_fd(fd, ctypes.byref(info), size), "bpf_obj_get_info_by_fd")
        self.fd, self.id, self.max_entries = fd, int(info.id), int(info.max_entries)
        self.key_size, self.value_size = int(info.key_size), int(info.value_size)
        per_cpu = info.type in _PERCPU_TYPES
        self._stride = -(-self.value_size // 8) * 8 if per_cpu else self.value_size
        self.room = self._stride * (int(_lib.libbpf_num_possible_cpus()) if per_cpu else 1)

    def update(self, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
        """Put `value` (`room` bytes: for per-CPU maps one for each possible CPU) there in one step: who looks
        it up sees the old element or the new one."""
        if (len(key), len(value)) != (self.key_size, self.room):
            raise ValueError(f"{len(key)} and {len(value)} bytes for {self.key_size} and {self.room}")
        _checked(_lib.bpf_map_update_elem(self.fd, key, value, flags), "bpf_map_update_elem")

    def delete(self, key: bytes) -> None:
        """OSError (ENOENT) if it is not there."""
        _checked(_lib.bpf_map_delete_elem(self.fd, key), "bpf_map_delete_elem")

    def lookup(self, key: bytes) -> list[bytes]:
        """The value, or one for each possible CPU; OSError (ENOENT) if there is none."""
        room = ctypes.create_string_buffer(self.room)
        _checked(_lib.bpf_map_lookup_elem(self.fd, key, room), "bpf_map_lookup_elem")
        return [room.raw[at : at + self.value_size] for at in range(0, self.room, self._stride)]

    def memory(self, *, writable: bool = True) -> mmap.mmap:
        """The values of an array made with BPF_F_MMAPABLE, shared with the kernel; elements on 8 bytes."""
        size = -(-self.value_size // 8) * 8 * self.max_entries
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(self.fd, pages, mmap.MAP_SHARED, protection)

    def open_read_only(self) -> int:
        """A new descriptor that can look up and never change; the caller's. Needs CAP_SYS_ADMIN."""
        options = _FdByIdOptions(open_flags=BPF_F_RDONLY)
        return _checked(_lib.bpf_map_get_fd_by_id_opts(self.id, options), "bpf_map_get_fd_by_id_opts")


class Program:
    """A loaded program; lives as long as its Object, or what it is attached to."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def attach_ingress(self, ifindex: int, *, tcx: bool = True) -> "TcxLink | ClsactFilter":
        """At tc ingress of an interface of the caller's namespace: by tcx (Linux 6.6), else by clsact."""
        if tcx:
            with contextlib.suppress(_NoTcx):
                return TcxLink(self.fd, ifindex)
        return ClsactFilter(self.fd, ifindex)

    def attach_to(self, sock: socket.socket, *, lock: bool) -> None:
        """As the socket's filter, replacing the one before. `lock`: nobody can change it any more."""
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, self.fd)
        if lock:
            sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)

    def test_run(self, frame: bytes, repeat: int, batch: int) -> None:
        """Run an XDP program on `repeat` live copies of `frame`; what it redirects is sent `batch` at a time."""
        options = _TestRunOptions(
            data_in=frame,
            data_size_in=len(frame),
            repeat=repeat,
            flags=BPF_F_TEST_XDP_LIVE_FRAMES,
            batch_size=batch,
        )
        _checked(_lib.bpf_prog_test_run_opts(self.fd, options), "bpf_prog_test_run_opts")


class _NoTcx(Exception):
    """This kernel has none."""


class TcxLink:
    """A program at tcx ingress, until `close` or the process's end."""

    kind: Final = "tcx"

    def __init__(self, prog_fd: int, ifindex: int) -> None:
        fd = _lib.bpf_link_create(prog_fd, ifindex, BPF_TCX_INGRESS, None)
        if fd == -errno.EINVAL:  # what kernels say of an attach type that they do not know
            raise _NoTcx
        self.fd = _checked(fd, "bpf_link_create")

    def close(self) -> None:
        os.close(self.fd)


class ClsactFilter:
    """A program in the clsact qdisc, which is removed with it; outlives the process unless closed."""

    kind: Final = "clsact"

    def __init__(self, prog_fd: int, ifindex: int) -> None:
        self._hook = _TcHook(ifindex=ifindex, attach_point=BPF_TC_INGRESS)
        _checked(_lib.bpf_tc_hook_create(self._hook), "bpf_tc_hook_create")
        _checked(_lib.bpf_tc_attach(self._hook, _TcOptions(prog_fd=prog_fd)), "bpf_tc_attach")

    def close(self) -> None:
        self._hook.attach_point = BPF_TC_INGRESS_AND_EGRESS
        _checked(_lib.bpf_tc_hook_destroy(self._hook), "bpf_tc_hook_destroy")


class Object:
    """The programs and maps of one ELF file, loaded into the kernel. A context manager."""

    def __init__(self, elf: bytes, name: str) -> None:
        """OSError with the end of the verifier's log when the kernel refuses a program."""
        log = ctypes.create_string_buffer(_LOG_SIZE)
        options = _OpenOptions(
            object_name=name.encode(), kernel_log_buf=ctypes.addressof(log), kernel_log_size=_LOG_SIZE
        )
        self._pointer = _lib.bpf_object__open_mem(elf, len(elf), options)
        if not self._pointer:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
        result = _lib.bpf_object__load(self._pointer)
        if result < 0:
            self.close()
            raise OSError(-result, f"{name}: {os.strerror(-result)}\n{log.value.decode()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of programs and maps; closing twice is fine."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            _lib.bpf_object__close(pointer)

    def map(self, name: str) -> Map:
        """OSError (ENOENT) if the object has no such map. Its descriptor is closed with the object."""
        return Map(_checked(_lib.bpf_object__find_map_fd_by_name(self._pointer, name.encode()), name))

    def program(self, name: str) -> Program:
        """OSError (ENOENT) if the object has no such program."""
        program = _lib.bpf_object__find_program_by_name(self._pointer, name.encode())
        return Program(_checked(_lib.bpf_program__fd(program) if program else -errno.ENOENT, name))

    def layout(self, struct: str) -> tuple[int, dict[str, tuple[int, int]]]:
        """A struct's size, and for each member (offset, size), from the object's BTF: bytes."""
        btf = _lib.bpf_object__btf(self._pointer)
        number = _checked(_lib.btf__find_by_name_kind(btf, struct.encode(), BTF_KIND_STRUCT), struct)
        at = _lib.btf__type_by_id(btf, number)
        head = _BtfType.from_address(at)
        members = (_BtfMember * (head.info & 0xFFFF)).from_address(at + ctypes.sizeof(_BtfType))
        return int(head.size), dict(_member(btf, member) for member in members)


def _member(btf: int, member: _BtfMember) -> tuple[str, tuple[int, int]]:
    name = _lib.btf__name_by_offset(btf, member.name_off).decode()
    return name, (member.offset // 8, _lib.btf__resolve_size(btf, member.type))


def create_array(value_size: int) -> int:
    """A BPF_MAP_TYPE_ARRAY of one value; the caller's descriptor. OSError EPERM without CAP_BPF."""
    return _checked(_lib.bpf_map_create(BPF_MAP_TYPE_ARRAY, None, 4, value_size, 1, None), "bpf_map_create")


def load_instructions(kind: int, instructions: bytes) -> int:
    """Load bare code as a program of type `kind`; the caller's descriptor. OSError EPERM without CAP_BPF."""
    count = len(instructions) // 8
    result = _lib.bpf_prog_load(kind, None, b"Apache-2.0", instructions, count, None)
    return _checked(result, "bpf_prog_load")
