"""bpf(2) by hand, as control and workers use it; objects, constants, pins and links, as the supervisor does."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bpf_rig import FastPath
from mrelay.ebpf import layout, load
from mrelay.kernel import bpf, libbpf
from netns.lab import Namespace, command

pytestmark = pytest.mark.netns
VALUE = np.dtype(layout.FLOW).itemsize


@pytest.fixture
def flows(path: FastPath) -> bpf.Map:
    """The map of IPv4 flows, with room for 16."""
    return path.flows[4]


def numbered(number: int, size: int) -> bytes:
    """A key or value."""
    return struct.pack("<I", number).ljust(size, b"\0")


def test_elements_come_and_go(flows: bpf.Map) -> None:
    """Update, lookup, delete."""
    key, value = numbered(1, 16), numbered(2, VALUE)
    assert flows.lookup(key) is None
    flows.update(key, value)
    assert flows.lookup(key) == value
    assert flows.delete(key)
    assert not flows.delete(key)
    assert flows.lookup(key) is None


def test_flags_of_update(flows: bpf.Map) -> None:
    """They reach the kernel, and what it says comes back."""
    key, value = numbered(1, 16), numbered(2, VALUE)
    with pytest.raises(FileNotFoundError):
        flows.update(key, value, bpf.BPF_EXIST)
    flows.update(key, value, bpf.BPF_NOEXIST)
    with pytest.raises(FileExistsError):
        flows.update(key, value, bpf.BPF_NOEXIST)
    assert flows.lookup(key) == value


def test_a_full_map_says_so(flows: bpf.Map) -> None:
    """As E2BIG."""
    for number in range(16):
        flows.update(numbered(number, 16), bytes(VALUE))
    with pytest.raises(OSError, match="Argument list too long") as caught:
        flows.update(numbered(16, 16), bytes(VALUE))
    assert caught.value.errno == errno.E2BIG


def test_keys_are_walked(flows: bpf.Map) -> None:
    """All of them, also when the walk looks at each and takes it away behind it."""
    keys = {numbered(number, 16) for number in range(16)}
    assert list(flows.all_keys()) == []
    for key in keys:
        flows.update(key, bytes(VALUE))
    assert sorted(flows.all_keys()) == sorted(keys)
    seen = []
    for key in list(flows.all_keys()):
        assert flows.lookup(key) == bytes(VALUE)
        assert flows.delete(key)
        seen.append(key)
    assert set(seen) == keys


def test_sizes_are_checked_before_the_kernel_reads(flows: bpf.Map) -> None:
    """It would read beyond."""
    for key, value in ((bytes(15), bytes(VALUE)), (bytes(16), bytes(VALUE - 1))):
        with pytest.raises(ValueError, match="bytes for a map of"):
            flows.update(key, value)
    with pytest.raises(ValueError, match="a key of 17 bytes"):
        flows.lookup(bytes(17))


def test_a_bad_descriptor_is_an_error() -> None:
    """And no missing element."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        bpf.Map(1 << 20, 4, 4).lookup(bytes(4))


def test_read_only_memory(path: FastPath) -> None:
    """Seen by whoever maps it, written by whoever may."""
    path.arrays["hops"][3]["mtu"] = 1234
    with bpf.map_memory(path.maps["hops"], 48 * layout.HOPS, writable=False) as memory:
        assert struct.unpack_from("<I", memory, 3 * 48 + 8) == (1234,)
        with pytest.raises(TypeError):
            memory[0] = 1


def test_memory_of_a_map_that_has_none(path: FastPath) -> None:
    """Hashes can't be mapped."""
    with pytest.raises(OSError, match=r"Errno"):
        bpf.map_memory(path.maps["flows4"], VALUE, writable=True)


# ---- objects ----


def test_maps_come_in_order_and_of_the_size_asked_for(home: Namespace) -> None:
    """By layout.MAPS and Sizes.entries."""
    sizes = layout.Sizes(workers=2, slots=8, routes=5, outputs=6, cpus=libbpf.possible_cpus())
    maps = load.create_maps(sizes)
    try:
        assert tuple(maps) == layout.MAPS
        for name, fd in maps.items():
            lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
            info = dict(line.split(":\t") for line in lines)
            assert int(info["max_entries"]) == sizes.entries()[name], name
            assert not os.get_inheritable(fd)
    finally:
        for fd in maps.values():
            os.close(fd)


def test_the_verifiers_words_are_in_the_error(path: FastPath) -> None:
    """A program over maps of other sizes is refused, and it says what it found."""
    with load.open_object(load.RELAY) as opened:
        opened.reuse("hops", path.maps["flows4"])
        with pytest.raises(OSError, match="mrelay_relay"):
            opened.load()


def test_names_that_are_not_there(path: FastPath) -> None:
    """Each is an error with the name in it."""
    with load.open_object(load.RING) as opened:
        with pytest.raises(FileNotFoundError, match="nothing"):
            opened.set_max_entries("nothing", 1)
        opened.load()
        with pytest.raises(FileNotFoundError, match="nothing"):
            opened.program_fd("nothing")


def test_no_object_at_all() -> None:
    """Bytes that are no ELF file."""
    with pytest.raises(OSError, match="broken"):
        libbpf.Object(b"no program", "broken")


# ---- attaching and pinning ----


@pytest.fixture
def ifindex(home: Namespace) -> int:
    """An interface of the namespace that the test is in."""
    home.ip("link add name v0 type veth peer name v1")
    return socket.if_nametoindex("v0")


@pytest.fixture
def bpffs(home: Namespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A BPF file system of the test's own."""
    folder = str(tmp_path_factory.mktemp("bpf"))
    command("mount", "-t", "bpf", "bpf", folder)
    yield folder
    command("umount", folder)


def test_pins_outlive_descriptors(path: FastPath, ifindex: int, bpffs: str) -> None:
    """A link that was pinned is taken over and gets another program."""
    link = libbpf.attach_ingress(path.program, ifindex)
    if not isinstance(link, libbpf.TcxLink):
        pytest.skip("needs tcx (Linux 6.6)")
    with pytest.raises(FileNotFoundError):
        libbpf.get_pinned(f"{bpffs}/link")
    libbpf.pin(link.fd, f"{bpffs}/link")
    with pytest.raises(FileExistsError):
        libbpf.pin(link.fd, f"{bpffs}/link")
    link.close()
    taken = libbpf.TcxLink(libbpf.get_pinned(f"{bpffs}/link"))
    taken.replace(path.program)
    os.unlink(f"{bpffs}/link")
    taken.close()
