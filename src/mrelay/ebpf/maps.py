"""The fast path's maps as control and workers hold them: hashes by system call, arrays as memory.

Owns the descriptors that came with a messages.FastPath. No capability is needed for any of it
(experiments/poc_bpf_shared_flow_map). Nothing here blocks.
"""

import os
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mrelay.counters_size import MAX_RULES
from mrelay.ebpf import layout
from mrelay.ebpf.layout import DEVMAPS, MAPS, PASSED_REASONS, PROGRAMS_OWN, Sizes
from mrelay.kernel.bpf import Map, map_memory
from mrelay.messages import FastPath
from mrelay.model.ruleset import FlowKey

U64 = NDArray[np.uint64]

_KEY4: Final = np.dtype(layout.FLOW4_KEY)
_KEY6: Final = np.dtype(layout.FLOW6_KEY)
_FLOW: Final = np.dtype(layout.FLOW)
_RANGE: Final = np.dtype(layout.RANGE_KEY)
_INDEX, _DEVMAP_VALUE = 4, 8  # bytes of an array's key; of struct bpf_devmap_val, linux/bpf.h
_V4_START, _V6_START = struct.Struct(">II"), struct.Struct("16s16s")
_INTERFACE: Final = struct.Struct("=I")
_PORT, _VLAN = struct.Struct(">H"), struct.Struct("=H")


def sizes_of(message: FastPath) -> Sizes:
    """The sizes that the message tells."""
    return Sizes(message.workers, message.slots, message.routes, message.outputs, message.cpus)


def flow_key(key: FlowKey) -> bytes:
    """struct flow4_key or flow6_key."""
    if key.family == 4:
        addresses = _V4_START.pack(key.source, key.group)
    else:
        addresses = _V6_START.pack(key.source.to_bytes(16), key.group.to_bytes(16))
    return addresses + _INTERFACE.pack(key.ifindex) + _PORT.pack(key.port) + _VLAN.pack(key.vlan)


class Maps:
    """All of them. `flows` by family; `route`, `outputs`, `hops` and `broadcasts` of their structs, `counts` u64
    [processor, slot, (packets, bytes, limited)], `limits` [worker, rule] of its struct, `passed` u64 [processor,
    reason], `progress` u64 [worker, 16]. `devmaps` has one for each broadcast, and `copier` is the descriptor of
    their elements' program.
    """

    def __init__(self, fds: Sequence[int], sizes: Sizes) -> None:
        """Takes over the descriptors."""
        *of_maps, self.copier = fds
        by_name = dict(zip(MAPS, of_maps, strict=True))
        for name in PROGRAMS_OWN:
            os.close(by_name[name])
        entries = sizes.entries()
        self.sizes = sizes
        self.flows = {
            4: Map(by_name["flows4"], _KEY4.itemsize, _FLOW.itemsize),
            6: Map(by_name["flows6"], _KEY6.itemsize, _FLOW.itemsize),
        }
        self.ranges = Map(by_name["ranges"], _RANGE.itemsize, 4)
        self.devmaps = [Map(by_name[name], _INDEX, _DEVMAP_VALUE) for name in DEVMAPS]

        def memory(name: str, dtype: Any) -> NDArray[Any]:
            kind = np.dtype(dtype)
            found = np.frombuffer(map_memory(by_name[name], entries[name] * kind.itemsize), kind, entries[name])
            os.close(by_name[name])  # the mapping has its own
            return found

        self.route = memory("route", layout.PLACE)
        self.outputs = memory("outputs", layout.OUTPUT)
        self.hops = memory("hops", layout.HOP)
        self.broadcasts = memory("broadcasts", layout.BROADCAST)
        self.counts: U64 = memory("counts", (np.uint64, 3)).reshape(sizes.cpus, sizes.flows, 3)
        self.passed: U64 = memory("passed", np.uint64).reshape(sizes.cpus, PASSED_REASONS)
        self.limits = memory("limits", layout.LIMIT).reshape(sizes.workers, MAX_RULES)
        self.progress: U64 = memory("progress", (np.uint64, 16))

    def all_flows(self, family: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A copy of every installed flow of a family: its keys and values, of their structs."""
        keys, values = self.flows[family].dump(self.sizes.flows)
        return np.frombuffer(keys, _KEY4 if family == 4 else _KEY6), np.frombuffer(values, _FLOW)
