"""What Python and the BPF programs share: structs, map sizes and numbers of flow_map.bpf.c and numbered.bpf.c.

Owns the Python side, and `differences`, which compares it with the BTF that the compiler left in the objects.
Pure; addresses and ports are in network order, all else in the machine's.
"""

import ctypes
import re
import socket
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import Final

import numpy as np
from libbpf import Object

# enum flow_state
FLOW_FAST, FLOW_WHEN_DRAINED = 1, 2
# numbered.bpf.c
NUMBERS: Final = 1 << 19
OUTPUTS: Final = 2
FIRST_PORT: Final = 6000
SLOW_TTL: Final = 9
FAST_TTL: Final = 8
TC_ACT_OK, TC_ACT_SHOT = 0, 2  # linux/pkt_cls.h

Address = c_uint8 * 4
Port = c_uint8 * 2
Mac = c_uint8 * 6


class FlowKey(ctypes.Structure):
    _fields_ = (("ifindex", c_uint32), ("source", Address), ("group", Address), ("port", Port), ("vlan", c_uint16))


class Flow(ctypes.Structure):
    _fields_ = (("tail", c_uint64), ("state", c_uint32), ("route", c_uint32))


class Output(ctypes.Structure):
    _fields_ = (
        ("ifindex", c_uint32),
        ("source", Address),
        ("group", Address),
        ("source_port", Port),
        ("port", Port),
        ("destination_mac", Mac),
        ("source_mac", Mac),
        ("ttl", c_uint8),
        ("reserved", c_uint8 * 3),
    )


class Route(ctypes.Structure):
    _fields_ = (("count", c_uint32), ("outputs", Output * 4))


class Progress(ctypes.Structure):
    _fields_ = (("accepted", c_uint64), ("pad", c_uint64 * 7), ("drained", c_uint64), ("pad2", c_uint64 * 7))


class Counters(ctypes.Structure):
    _fields_ = (("frames", c_uint64), ("datagrams", c_uint64), ("passed", c_uint64), ("unmarked", c_uint64))


class SourceState(ctypes.Structure):
    _fields_ = (
        ("next", c_uint64),
        ("gap", c_uint64),
        ("count", c_uint64),
        ("flows", c_uint32),
        ("ifindex", c_uint32),
        ("ip_sum", c_uint16),
        ("udp_sum", c_uint16),
        ("head", c_uint8 * 44),
    )


class SinkState(ctypes.Structure):
    _fields_ = (("frames", c_uint64), ("datagrams", c_uint64), ("action", c_uint64))


class Tally(ctypes.Structure):
    _fields_ = (("arrived", c_uint64), ("delay", c_uint32), ("slow", c_uint16), ("fast", c_uint16))


TALLY: Final = np.dtype(Tally)
FLOW_MAP: Final = (FlowKey, Flow, Output, Route, Progress, Counters)
NUMBERED: Final = (SourceState, SinkState, Tally)


def flow_key(ifindex: int, source: str, group: str, port: int) -> bytes:
    """The key of an untagged flow."""
    addresses = (Address(*socket.inet_aton(text)) for text in (source, group))
    return bytes(FlowKey(ifindex, *addresses, Port(*port.to_bytes(2))))


def differences(loaded: Object, mirrored: tuple[type[ctypes.Structure], ...]) -> list[str]:
    """Where sizes, members, offsets or members' sizes differ; empty when all agree."""
    found = []
    for kind in mirrored:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
        fields = {field[0]: getattr(kind, field[0]) for field in kind._fields_}
        here = ctypes.sizeof(kind), {field: (at.offset, at.size) for field, at in fields.items()}
        if (there := loaded.layout(name)) != here:
            found.append(f"{name}: C {there}, Python {here}")
    return found
