"""A relay with the kernel's fast path: its maps as a test may read them, and which engine carries what.

The maps come from the supervisor's open descriptors, by pidfd_getfd(2): no copy of the relay's is asked.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from conftest import effective_capabilities
from mrelay.ebpf import layout, load
from mrelay.ebpf.maps import Maps
from mrelay.kernel import libbpf
from mrelay.kernel.syscalls import CALLS, MACHINES
from netns.lab import eventually
from netns.relay import Relay

CAP_PERFMON, CAP_BPF = 38, 39  # linux/capability.h
_PIDFD_GETFD: Final = 438  # asm-generic/unistd.h; the same on every machine
BPF_OBJ_GET_INFO_BY_FD: Final = 15  # linux/bpf.h
_MAP_INFO: Final = struct.Struct("=6I16s")  # struct bpf_map_info, up to `name`; the fifth is `max_entries`
_SYS_BPF: Final = dict(zip(MACHINES, CALLS["bpf"], strict=True))[platform.machine()]
_libc = ctypes.CDLL(None, use_errno=True)


def require() -> None:
    """Skip where there can be no fast path, by name of what lacks."""
    for lacking in (libbpf.available(), load.missing()):
        if lacking:
            pytest.skip(lacking)
    mask = effective_capabilities()
    for name, bit in (("CAP_BPF", CAP_BPF), ("CAP_PERFMON", CAP_PERFMON)):
        if not mask >> bit & 1:
            pytest.skip(f"needs {name}")


def _named(fd: int) -> tuple[str, int]:
    """A map's name and how much it holds; OSError for other descriptors."""
    info = ctypes.create_string_buffer(_MAP_INFO.size)
    attr = ctypes.create_string_buffer(struct.pack("=IIQ", fd, _MAP_INFO.size, ctypes.addressof(info)))
    if _libc.syscall(_SYS_BPF, BPF_OBJ_GET_INFO_BY_FD, attr, 16):
        raise OSError(ctypes.get_errno(), "BPF_OBJ_GET_INFO_BY_FD")
    *_, entries, _, name = _MAP_INFO.unpack(info.raw)
    return name.rstrip(b"\0").decode(), entries


def _stolen(pid: int, fd: int) -> int:
    process = os.pidfd_open(pid)
    try:
        ours = _libc.syscall(_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    if ours < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return int(ours)


def open_maps(pid: int) -> Maps:
    """The fast path's maps of the supervisor with this process id."""
    fds: dict[str, int] = {}
    entries: dict[str, int] = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{fd}") == "anon_inode:bpf-map":
            ours = _stolen(pid, int(fd))
            name, entries[name] = _named(ours)
            fds[name] = ours
    workers, halves = entries["progress"], layout.HALVES
    sizes = layout.Sizes(
        workers=workers,
        slots=entries["flows4"] // workers,
        routes=entries["route"] // workers // halves,
        outputs=entries["outputs"] // workers // halves,
        cpus=entries["passed"] // layout.PASSED_REASONS,
    )
    return Maps([*(fds[name] for name in layout.MAPS), -1], sizes)


class Kernel:
    """What the fast path of a running relay did so far."""

    def __init__(self, relay: Relay) -> None:
        self.maps = open_maps(relay.pid)

    def close(self) -> None:
        """Let go of the descriptors."""
        for held in (*self.maps.flows.values(), self.maps.ranges, *self.maps.devmaps):
            os.close(held.fd)

    def passed(self) -> dict[str, int]:
        """Frames that it left to the slow path, by reason."""
        return dict(zip(layout.PASSED, self.maps.passed.sum(axis=0).tolist(), strict=False))

    def accepted(self) -> int:
        """Frames that the rings of all workers let in."""
        return int(self.maps.progress[:, 0].sum())

    def carried(self) -> int:
        """Datagrams that it carried."""
        return int(self.maps.counts[:, :, 0].sum())


@contextmanager
def kernel_of(relay: Relay) -> Iterator[Kernel]:
    """Its maps, while they are needed."""
    made = Kernel(relay)
    try:
        yield made
    finally:
        made.close()


def flow(relay: Relay, **wanted: Any) -> dict[str, Any]:
    """The one listed flow with these members."""
    found = [each for each in relay.flows() if all(each[name] == value for name, value in wanted.items())]
    assert len(found) == 1, f"{wanted} among {found}"
    return found[0]


def await_engine(relay: Relay, engine: str, why: str = "", **wanted: Any) -> None:
    """Return when the flow is listed with this engine, and this reason against the faster one."""

    def listed() -> bool:
        got = flow(relay, **wanted)
        return (got["engine"], got["why"]) == (engine, why)

    try:
        eventually(listed, f"engine {engine} {why!r}")
    except AssertionError as error:
        error.add_note(f"flows: {relay.flows()}")
        raise
