"""bpf(2) on maps that somebody else made: elements by descriptor, and arrays mapped into memory.

Owns the commands and the layouts of union bpf_attr (linux/bpf.h) that go with them. For control and workers,
which hold descriptors and no capability; loading and attaching is libbpf.py's. Nothing here blocks. A `Map`
belongs to one thread: its buffers are used again by each call.
"""

import ctypes
import errno
import mmap
import os
import platform
from collections.abc import Iterator
from typing import Final

from mrelay.kernel.syscalls import CALLS, MACHINES

# linux/bpf.h, enum bpf_cmd
BPF_MAP_LOOKUP_ELEM: Final = 1
BPF_MAP_UPDATE_ELEM: Final = 2
BPF_MAP_DELETE_ELEM: Final = 3
BPF_MAP_GET_NEXT_KEY: Final = 4
BPF_MAP_LOOKUP_BATCH: Final = 24
BPF_ANY: Final = 0  # flags of update
BPF_NOEXIST: Final = 1
BPF_EXIST: Final = 2

_SYS_BPF: Final = dict(zip(MACHINES, CALLS["bpf"], strict=True)).get(platform.machine(), -1)
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
# `long syscall(long, ...)`: converting the arguments here saves ctypes' guessing on each call.
_syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long]


class _Attr(ctypes.Structure):
    """union bpf_attr of BPF_MAP_*_ELEM; `value` is next_key for BPF_MAP_GET_NEXT_KEY."""

    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _BatchAttr(ctypes.Structure):
    """union bpf_attr of BPF_MAP_LOOKUP_BATCH."""

    _fields_ = (
        ("in_batch", ctypes.c_uint64),
        ("out_batch", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("map_fd", ctypes.c_uint32),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


# What lies behind a command's own members must be zero: the kernel is told how far they reach.
_LENGTHS: Final = {BPF_MAP_DELETE_ELEM: _Attr.value.offset, BPF_MAP_LOOKUP_BATCH: ctypes.sizeof(_BatchAttr)}


class Map:
    """A map by its descriptor, which the caller keeps open. Keys and values are bytes of the map's sizes."""

    def __init__(self, fd: int, key_size: int, value_size: int) -> None:
        self.fd, self.key_size, self.value_size = fd, key_size, value_size
        self._key, self._value = bytearray(key_size), bytearray(value_size)
        self._memory = [(ctypes.c_char * len(room)).from_buffer(room) for room in (self._key, self._value)]
        key, value = map(ctypes.addressof, self._memory)
        self._attr = _Attr(fd, 0, key, value, 0)
        self._next = _Attr(fd, 0, key, key, 0)  # the kernel copies the key before it writes the next one
        self._at, self._next_at = ctypes.addressof(self._attr), ctypes.addressof(self._next)

    def _call(self, command: int, at: int) -> bool:
        """False for ENOENT; OSError for anything else that goes wrong."""
        if _syscall(_SYS_BPF, command, at, _LENGTHS.get(command, ctypes.sizeof(_Attr))) == 0:
            return True
        if (code := ctypes.get_errno()) == errno.ENOENT:
            return False
        raise OSError(code, os.strerror(code), f"bpf command {command}")

    def _set_key(self, key: bytes) -> None:
        if len(key) != self.key_size:
            raise ValueError(f"a key of {len(key)} bytes for a map of {self.key_size}")
        self._key[:] = key

    def update(self, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
        """Put `value` there in one step: who looks it up sees the old element or the new one.

        OSError: E2BIG when the map is full, EEXIST and ENOENT with BPF_NOEXIST and BPF_EXIST.
        """
        self._set_key(key)
        if len(value) != self.value_size:
            raise ValueError(f"a value of {len(value)} bytes for a map of {self.value_size}")
        self._value[:] = value
        self._attr.flags = flags
        if not self._call(BPF_MAP_UPDATE_ELEM, self._at):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), "bpf command 2")

    def delete(self, key: bytes) -> bool:
        """False if it was not there."""
        self._set_key(key)
        return self._call(BPF_MAP_DELETE_ELEM, self._at)

    def lookup(self, key: bytes) -> bytes | None:
        """A copy of the element, None if there is none."""
        self._set_key(key)
        self._attr.flags = 0
        return bytes(self._value) if self._call(BPF_MAP_LOOKUP_ELEM, self._at) else None

    def dump(self, entries: int) -> tuple[bytes, bytes]:
        """Copies of all keys, and of all values, of a hash map that holds `entries` at most."""
        keys = (ctypes.c_char * (entries * self.key_size))()
        values = (ctypes.c_char * (entries * self.value_size))()
        at = ctypes.c_uint64()  # of a hash: a bucket's number
        attr = _BatchAttr(map_fd=self.fd, out_batch=ctypes.addressof(at))
        found, more = 0, True
        while more and found < entries:
            attr.keys = ctypes.addressof(keys) + found * self.key_size
            attr.values = ctypes.addressof(values) + found * self.value_size
            attr.count = entries - found
            more = self._call(BPF_MAP_LOOKUP_BATCH, ctypes.addressof(attr))
            found += attr.count  # also of the last call, which says ENOENT
            attr.in_batch = attr.out_batch
        # What was not written to takes no memory: so no copy of all of it.
        sizes = ((keys, self.key_size), (values, self.value_size))
        first, second = (bytes(memoryview(room)[: found * size]) for room, size in sizes)
        return first, second

    def all_keys(self) -> Iterator[bytes]:
        """All keys. Elements that are removed meanwhile may start the walk anew: a key may come twice."""
        self._next.key = 0
        key: bytes | None = None
        while True:
            if key is not None:
                self._key[:] = key  # the caller may have used the map since
                self._next.key = self._next.value
            if not self._call(BPF_MAP_GET_NEXT_KEY, self._next_at):
                return
            key = bytes(self._key)
            yield key


def map_memory(fd: int, size: int, *, writable: bool = True) -> mmap.mmap:
    """The values of an array made with BPF_F_MMAPABLE, shared with the kernel: `size` bytes, whole pages.

    OSError: EPERM for a descriptor or map that can't be written.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.MAP_SHARED, protection)
