"""The fast path's maps and program, with the arrays in NumPy's hands: what control and workers do, for tests."""

import ipaddress
import os
import struct
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mrelay.ebpf import layout, load
from mrelay.kernel import bpf, libbpf

TC_ACT_SHOT: Final = 2  # linux/pkt_cls.h
TC_ACT_REDIRECT: Final = 7
TCX_NEXT: Final = -1  # linux/bpf.h
XDP_PASS: Final = 2
XDP_REDIRECT: Final = 4
STAMP: Final = 8  # bytes that XDP may put before a frame
LOOPBACK: Final = 1  # where BPF_PROG_TEST_RUN has frames come in
OWN_MAC: Final = bytes.fromhex("020000000a01")
NEXT_MAC: Final = bytes.fromhex("020000000a02")
HOP_SOURCE: Final = "10.1.0.1"
HOP_SOURCE_6: Final = "fd00:1::1"
_GSO_SEGS: Final = 164  # offsets in struct __sk_buff, linux/bpf.h
_GSO_SIZE: Final = 176
_SK_BUFF: Final = 192
_DTYPES: Final[dict[str, Any]] = {
    "route": layout.PLACE, "outputs": layout.OUTPUT, "hops": layout.HOP, "counts": layout.COUNT, "passed": "<u8",
    "broadcasts": layout.BROADCAST,
    "limits": layout.LIMIT,
    "progress": layout.PROGRESS,
}  # fmt: skip


@dataclass(frozen=True)
class Out:
    """One output; what is not named is as in a rule that says nothing of it."""

    address: str = "239.2.2.2"
    port: int = 6000
    source_port: int = 40001
    hop: int = 0
    ttl: int = 0
    dscp: int = layout.DSCP_KEEP
    keep: bool = False
    source: str = ""


def packed(address: str) -> bytes:
    """16 bytes, IPv4 in the first four; zeros for ""."""
    return (ipaddress.ip_address(address).packed if address else b"").ljust(16, b"\0")


def key(source: str, group: str, port: int, *, ifindex: int = LOOPBACK, vlan: int = 0) -> bytes:
    """struct flow4_key or flow6_key."""
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(group).packed
    return addresses + struct.pack("<I", ifindex) + struct.pack(">H", port) + struct.pack("<H", vlan)


def merged(segments: int, size: int) -> bytes:
    """A context for BPF_PROG_TEST_RUN: a frame of so many segments of so many bytes."""
    context = bytearray(_SK_BUFF)
    struct.pack_into("=I", context, _GSO_SEGS, segments)
    struct.pack_into("=I", context, _GSO_SIZE, size)
    return bytes(context)


class FastPath:
    """One worker's share of a fast path, empty but for a hop 0 that is ready. A context manager."""

    def __init__(self, *, slots: int = 16, routes: int = 64, workers: int = 1) -> None:
        self.sizes = layout.Sizes(workers, slots, routes, outputs=routes, cpus=libbpf.possible_cpus())
        self.maps = load.create_maps(self.sizes)
        self.program = load.load_relay(self.maps, self.sizes, lands=True)
        self.land = load.load_land(self.maps)
        self.xdp = load.load_xdp(self.maps, self.sizes)
        self.arrays = {name: self._array(name, dtype) for name, dtype in _DTYPES.items()}
        self.flows = {
            family: bpf.Map(self.maps[name], np.dtype(kind).itemsize, np.dtype(layout.FLOW).itemsize)
            for family, name, kind in ((4, "flows4", layout.FLOW4_KEY), (6, "flows6", layout.FLOW6_KEY))
        }
        self.trips = bpf.Map(self.maps["trips"], 4, np.dtype(layout.TRIP).itemsize)
        self.ranges = bpf.Map(self.maps["ranges"], np.dtype(layout.RANGE_KEY).itemsize, 4)
        self.set_hop()

    def _array(self, name: str, dtype: Any) -> np.ndarray[Any, Any]:
        entries = self.sizes.entries()[name]
        memory = bpf.map_memory(self.maps[name], np.dtype(dtype).itemsize * entries, writable=True)
        return np.frombuffer(memory, dtype, entries)

    def __enter__(self) -> "FastPath":
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self.program, self.land, self.xdp, *self.maps.values()):
            os.close(fd)

    def set_hop(self, number: int = 0, **values: object) -> None:
        """Ready, an Ethernet link with an MTU of 1500, unless `values` say otherwise."""
        hop = self.arrays["hops"][number]
        mac, own = np.frombuffer(NEXT_MAC, "u1"), np.frombuffer(OWN_MAC, "u1")
        usual = {"flags": layout.HOP_READY, "ifindex": LOOPBACK, "mtu": 1500, "mac": mac, "own_mac": own}
        for name, value in {**usual, **values}.items():
            hop[name] = np.frombuffer(value, "u1") if isinstance(value, bytes) else value

    def install(
        self,
        flow: bytes,
        *outputs: Out,
        tail: int = 0,
        worker: int = 0,
        slot: int = 0,
        state: int = 0,
        stamp: int = 0,
        limit: int = 0,
        single: int = layout.SINGLE,
    ) -> None:
        """A flow with these outputs, at the start of the first half. `stamp`: given by XDP, and seen at tc."""
        for i, output in enumerate(outputs):
            at = self.arrays["outputs"][i]
            at["address"], at["source"] = (
                np.frombuffer(packed(text), "u1") for text in (output.address, output.source)
            )
            for name in ("port", "source_port", "hop", "ttl", "dscp", "keep"):
                at[name] = getattr(output, name)
            at["multicast"] = ipaddress.ip_address(output.address).is_multicast
            self.arrays["route"][i]["output"] = i
        first = tail, worker, slot, 0, len(outputs), 0, state, stamp, stamp
        value = struct.pack("<QIIIIIIQQ16xII", *first, limit, single)
        self.flows[4 if len(flow) == 16 else 6].update(flow, value)

    def enter(self, flow: bytes) -> None:
        """Have all frames of a flow that were left to the slow path come to its rings."""
        value = np.array([self.flow(flow)], layout.FLOW)
        value["entered"] = value["left"]
        self.flows[4 if len(flow) == 16 else 6].update(flow, value.tobytes())

    def flow(self, flow: bytes) -> Any:
        """What is installed under a key, as it is now."""
        value = self.flows[4 if len(flow) == 16 else 6].lookup(flow)
        assert value is not None
        return np.frombuffer(value, layout.FLOW)[0]

    def run(self, frame: bytes, context: bytes = b"") -> tuple[int, bytes]:
        """The program's verdict on a frame, and what it made of it."""
        done = libbpf.test_run(self.program, frame, context)
        return done.verdict, done.frame

    def run_xdp(self, frame: bytes) -> tuple[int, bytes, int]:
        """The same of XDP's, and the stamp that it put before a frame that it passed on; 0: none."""
        done = libbpf.test_run(self.xdp, frame)
        if done.verdict != XDP_PASS or len(done.frame) == len(frame):
            return done.verdict, done.frame, 0
        return done.verdict, done.frame[STAMP:], int.from_bytes(done.frame[:STAMP], "little")

    def passed(self) -> dict[str, int]:
        """Frames passed on so far, by reason; those that are not zero."""
        sums = self.arrays["passed"].reshape(-1, layout.PASSED_REASONS).sum(axis=0).tolist()
        return {name: count for name, count in zip(layout.PASSED, sums, strict=False) if count}

    def counted(self, slot: int = 0) -> tuple[int, int]:
        """Datagrams and bytes of payload carried for a slot."""
        counts = self.arrays["counts"].reshape(-1, self.sizes.flows)[:, slot]
        return int(counts["packets"].sum()), int(counts["bytes"].sum())

    def limited(self, slot: int = 0) -> int:
        """Datagrams of a slot that its rule's rate withheld."""
        return int(self.arrays["counts"].reshape(-1, self.sizes.flows)[:, slot]["limited"].sum())

    def set_rate(self, meter: str, rate: float, burst: float) -> None:
        """Of rule slot 0 of worker 0: units a second, and how many may be saved."""
        at = self.arrays["limits"][0][meter]
        at["cost"], at["burst"] = round(65536e9 / rate), round(1e9 * burst / rate)
        at["due"] = time.monotonic_ns() - int(at["burst"]) & (1 << 64) - 1
