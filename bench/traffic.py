"""The load and the count: an XDP source of paced UDP frames, and a tcx sink that counts datagrams.

Owns the frames, the two kernel programs and their maps; relay_bench.py drives them. The source rewrites
each frame's headers from a table (the receiving side may have changed them), goes through the table flow
by flow, and paces itself in the kernel, so Python's speed doesn't matter. Frames carry right checksums,
for GRO merges only such as have one, and DF unless told otherwise, as from Linux senders. Leaving
`Source.offering` blocks until all is sent.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import bpf
import lab as labs
from bpf import (
    ADD,
    DW,
    JEQ,
    JGE,
    JGT,
    JLE,
    JLT,
    JNE,
    MOV,
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R7,
    R8,
    R9,
    R10,
    SUB,
    W,
)

HEADERS: Final = 14 + 20 + 8  # Ethernet, IPv4, UDP
_REWRITTEN: Final = 48  # HEADERS, rounded up to whole u64
_XDP_DROP: Final = 1  # enum xdp_action
_TC_ACT_SHOT: Final = 2  # <linux/pkt_cls.h>; TCX_DROP
_SKB_LEN, _SKB_GSO_SEGS = 0, 164  # struct __sk_buff
_XDP_DATA, _XDP_DATA_END = 0, 4  # struct xdp_md
_SPINS: Final = 4000  # looks at the clock in one wait, at ~20 ns: bounds the loop for the verifier


@dataclass(frozen=True)
class Flow:
    """What a source sends: addresses as text, ports as numbers."""

    source: str
    group: str
    port: int


def checksum(data: bytes) -> int:
    """Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(flow: Flow, payload: int, *, df: bool = True) -> bytes:
    """An Ethernet frame of `flow` with `payload` zero bytes, TTL 16, checksums complete."""
    source, group = socket.inet_aton(flow.source), socket.inet_aton(flow.group)
    ethernet = bytes((1, 0, 0x5E, group[1] & 0x7F, group[2], group[3])) + b"\2\0\0\0\0\1\x08\0"
    fragment = 0x4000 if df else 0  # RFC 791 §3.1
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 28 + payload, 0, fragment, 16, 17, 0) + source + group
    ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
    udp = struct.pack("!HHHH", 4000, flow.port, 8 + payload, 0)
    pseudo = source + group + struct.pack("!HH", 17, 8 + payload)
    udp = udp[:6] + struct.pack("!H", checksum(pseudo + udp) or 0xFFFF)
    return ethernet + ip + udp + bytes(payload)


class Source:
    """Sends `flows` in turn, `pps` frames a second in all, out of `ifindex` of the caller's namespace."""

    def __init__(self, ifindex: int, flows: Sequence[Flow], payload: int, pps: float, *, df: bool = True) -> None:
        self.frame, self.pps = frame(flows[0], payload, df=df), pps
        self.state = bpf.Array(24)  # u64 time of the next frame, u64 frames so far, u32 next flow
        self.headers = bpf.Array(_REWRITTEN, len(flows))
        for index, flow in enumerate(flows):
            self.headers[index] = frame(flow, payload, df=df)[:_REWRITTEN]
        program = [*_pace(self.state, round(1e9 / pps)), *_rewrite(self.headers, len(flows)), *_transmit(ifindex)]
        self.program = bpf.Program(bpf.BPF_PROG_TYPE_XDP, program)

    @property
    def sent(self) -> int:
        """Frames offered to the interface so far."""
        return int(struct.unpack_from("<QQI", self.state[0])[1])

    @contextlib.contextmanager
    def offering(self, seconds: float) -> Iterator[None]:
        """Send for `seconds` from a thread that inherits the caller's namespace and core.

        One call for the whole time: the kernel waits an RCU grace period (tens of ms) around every call.
        """
        thread = threading.Thread(target=self._send, args=(int(self.pps * seconds),))
        with labs.real_time(2):  # above the source, which shares the core: the caller must wake to count
            thread.start()
            try:
                yield
            finally:
                thread.join()
                for thing in (self.program, self.state, self.headers):
                    thing.close()

    def _send(self, frames: int) -> None:
        with labs.real_time(1):
            self.program.test_run(self.frame, frames)


def _pace(state: bpf.Array, gap: int) -> list[bpf.Insn | str]:
    """Count the frame, wait for its time. Being over 1 ms late is not made up for.

    Under ~10,000 frames a second _SPINS is not long enough. Frames still leave 64 at a time.
    """
    return [
        bpf.alu_reg(MOV, R6, R1),  # ctx
        bpf.value_address(R7, state),
        bpf.load(DW, R1, R7, 8),
        bpf.alu(ADD, R1, 1),
        bpf.store(DW, R7, 8, R1),
        bpf.load(DW, R9, R7, 0),
        bpf.alu(MOV, R8, 0),
        "wait",
        bpf.call(bpf.BPF_FUNC_ktime_get_ns),
        bpf.jump_reg(JGE, R0, R9, "due"),
        bpf.alu(ADD, R8, 1),
        bpf.jump(JLT, R8, _SPINS, "wait"),
        "due",
        bpf.alu_reg(MOV, R1, R9),
        bpf.alu(ADD, R1, 1_000_000),
        bpf.jump_reg(JLE, R0, R1, "on_time"),
        bpf.alu_reg(MOV, R9, R0),
        "on_time",
        bpf.alu(ADD, R9, gap),
        bpf.store(DW, R7, 0, R9),
    ]


def _rewrite(headers: bpf.Array, flows: int) -> list[bpf.Insn | str]:
    """Copy the next flow's headers over the frame's."""
    look_up: list[bpf.Insn | str] = [
        bpf.load(W, R1, R7, 16),
        bpf.alu_reg(MOV, R2, R1),
        bpf.alu(ADD, R2, 1),
        bpf.jump(JLT, R2, flows, "next_flow"),
        bpf.alu(MOV, R2, 0),
        "next_flow",
        bpf.store(W, R7, 16, R2),
        bpf.store(W, R10, -4, R1),
        bpf.map_address(R1, headers),
        bpf.alu_reg(MOV, R2, R10),
        bpf.alu(ADD, R2, -4),
        bpf.call(bpf.BPF_FUNC_map_lookup_elem),
        bpf.jump(JEQ, R0, 0, "drop"),
        bpf.load(W, R1, R6, _XDP_DATA),
        bpf.load(W, R2, R6, _XDP_DATA_END),
        bpf.alu_reg(MOV, R3, R1),
        bpf.alu(ADD, R3, _REWRITTEN),
        bpf.jump_reg(JGT, R3, R2, "drop"),
    ]
    for offset in range(0, _REWRITTEN, 8):
        look_up += [bpf.load(DW, R4, R0, offset), bpf.store(DW, R1, offset, R4)]
    return look_up


def _transmit(ifindex: int) -> list[bpf.Insn | str]:
    return [
        bpf.alu(MOV, R1, ifindex),
        bpf.alu(MOV, R2, 0),
        bpf.call(bpf.BPF_FUNC_redirect),
        bpf.exit_(),
        "drop",
        bpf.alu(MOV, R0, _XDP_DROP),
        bpf.exit_(),
    ]


class Sink:
    """Counts and drops frames of at least `payload` bytes at tcx ingress of this namespace's interfaces."""

    def __init__(self, ifindexes: Sequence[int], payload: int) -> None:
        self.payload, self.outputs = payload, len(ifindexes)
        self.counts = bpf.Array(16 * self.outputs)  # for each output: u64 segments, u64 payload bytes
        self.open: list[bpf.Descriptor] = [self.counts]
        for output, ifindex in enumerate(ifindexes):
            program = bpf.Program(bpf.BPF_PROG_TYPE_SCHED_CLS, _count(self.counts, 16 * output, payload))
            self.open += [program, program.attach_tcx(ifindex)]

    def segments(self) -> list[int]:
        """Datagrams so far, for each output, by the kernel's count of segments."""
        return list(struct.unpack(f"<{2 * self.outputs}Q", self.counts[0])[0::2])

    def datagrams(self) -> list[int]:
        """The same by payload bytes: equal to `segments` unless a relay changed sizes."""
        return [n // self.payload for n in struct.unpack(f"<{2 * self.outputs}Q", self.counts[0])[1::2]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for thing in reversed(self.open):
            thing.close()


def _count(counts: bpf.Array, offset: int, payload: int) -> list[bpf.Insn | str]:
    return [
        bpf.load(W, R2, R1, _SKB_LEN),
        bpf.jump(JLT, R2, HEADERS + payload, "drop"),  # ARP, IGMP
        bpf.load(W, R3, R1, _SKB_GSO_SEGS),
        bpf.jump(JNE, R3, 0, "merged"),
        bpf.alu(MOV, R3, 1),
        "merged",
        bpf.value_address(R4, counts, offset),
        bpf.atomic_add(R4, 0, R3),
        bpf.alu(SUB, R2, HEADERS),
        bpf.atomic_add(R4, 8, R2),
        "drop",
        bpf.alu(MOV, R0, _TC_ACT_SHOT),
        bpf.exit_(),
    ]
