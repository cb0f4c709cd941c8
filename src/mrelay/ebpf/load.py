"""The fast path's maps and programs: made and loaded by the supervisor, from the objects in this package.

Owns which object has what, and how their constants are set. What is loaded belongs to the caller, by
descriptor. Needs libbpf (kernel/libbpf.available), CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; every function may
raise OSError. Loading takes some ten milliseconds and may block for as long as the verifier needs.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mrelay.ebpf.layout import MAPS, Sizes
from mrelay.kernel.libbpf import Object, map_id
from mrelay.kernel.packet import SHORT

_FOLDER: Final = Path(__file__).parent
RELAY: Final = "relay"
RING: Final = "ring"
OLDEST: Final = (5, 19)  # the first to let control and workers, which have map descriptors only, call bpf(2)
XDP: Final = "xdp"
COPY: Final = "copy"
LAND: Final = "land"
OBJECTS: Final = (RELAY, RING, XDP, COPY, LAND)


def missing() -> str:
    """What this installation lacks of the kernel programs; empty when they are there."""
    lacking = [name for name in OBJECTS if not path(name).is_file()]
    return f"built without kernel programs: {', '.join(map(str, map(path, lacking)))}" if lacking else ""


def outdated() -> str:
    """Why this kernel is too old for the fast path; empty when it isn't."""
    release = os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    old = found is None or (int(found[1]), int(found[2])) < OLDEST
    return f"Linux {release} is older than {OLDEST[0]}.{OLDEST[1]}" if old else ""


def path(name: str) -> Path:
    return _FOLDER / f"{name}.bpf.o"


def open_object(name: str) -> Object:
    """One of OBJECTS, not loaded yet."""
    return Object(path(name).read_bytes(), f"mrelay_{name}")


def create_maps(sizes: Sizes) -> dict[str, int]:
    """A descriptor of each map, in the order of MAPS; all empty."""
    with open_object(RELAY) as opened:
        for name, entries in sizes.entries().items():
            opened.set_max_entries(name, entries)
        opened.load(programs=False)
        return {name: opened.map_fd(name) for name in MAPS}


def load_relay(maps: Mapping[str, int], sizes: Sizes, *, lands: bool) -> int:
    """The program for tc ingress (libbpf.attach_ingress) over these maps, made with these sizes.

    `lands`: the one of `load_land` is at the ingress of lo; else nothing goes round by it.
    """
    with open_object(RELAY) as opened:
        round_id = map_id(maps["trips"]) if lands else 0
        opened.set_constants(flows_per_processor=sizes.flows, short_bytes=SHORT, round_id=round_id)
        _load(opened, maps)
        return opened.program_fd("relay")


def load_land(maps: Mapping[str, int]) -> int:
    """The program for the tcx ingress of lo (libbpf.attach_tcx), which sends on what goes round."""
    with open_object(LAND) as opened:
        opened.set_constants(round_id=map_id(maps["trips"]))
        _load(opened, maps)
        return opened.program_fd("land")


def load_xdp(maps: Mapping[str, int], sizes: Sizes) -> int:
    """The program for XDP (libbpf.attach_xdp) over these maps."""
    with open_object(XDP) as opened:
        opened.set_constants(flows_per_processor=sizes.flows)
        _load(opened, maps)
        return opened.program_fd("relay_xdp")


def load_copy(maps: Mapping[str, int]) -> int:
    """The program for what XDP broadcasts, a part of the elements of each devmap."""
    with open_object(COPY) as opened:
        _load(opened, maps)
        return opened.program_fd("copy_xdp")


def load_rings(maps: Mapping[str, int], worker: int) -> tuple[int, int]:
    """The filters of a worker's rings (libbpf.attach_to): for short frames, and for long ones."""
    with open_object(RING) as opened:
        opened.set_constants(worker=worker, short_bytes=SHORT)
        _load(opened, maps)
        short = opened.program_fd("ring_short")
        try:
            return short, opened.program_fd("ring_long")
        except BaseException:
            os.close(short)
            raise


def _load(opened: Object, maps: Mapping[str, int]) -> None:
    for name in MAPS:
        opened.reuse(name, maps[name])
    opened.load()
