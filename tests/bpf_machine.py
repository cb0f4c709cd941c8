"""A small interpreter for the part of classic BPF that the group filter uses, and what it is compared with."""

import struct

from mrelay.kernel import cbpf
from mrelay.kernel.cbpf import Insn, Range

V4_MAX = (1 << 32) - 1
V6_MAX = (1 << 128) - 1


def run(program: list[Insn], ethertype: int, destination: int) -> int:
    """What the program returns for a packet: the part of linux/filter.h that the group filter uses."""
    size = 4 if ethertype == cbpf.ETH_P_IP else 16
    start = cbpf.IPV4_DESTINATION if size == 4 else cbpf.IPV6_DESTINATION
    header = bytes(start) + destination.to_bytes(size, "big")
    accumulator = at = 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        match code:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                accumulator = load(header, ethertype, k - (1 << 32))
            case 0x05:  # BPF_JMP | BPF_JA
                at += k
            case 0x15:  # BPF_JMP | BPF_JEQ
                at += jt if accumulator == k else jf
            case 0x35:  # BPF_JMP | BPF_JGE
                at += jt if accumulator >= k else jf
            case 0x06:  # BPF_RET
                return k
            case _:
                raise AssertionError(f"code {code:#x}")


def load(header: bytes, ethertype: int, offset: int) -> int:
    if offset == cbpf.SKF_AD_OFF + cbpf.SKF_AD_PROTOCOL:
        return ethertype
    (word,) = struct.unpack_from("!I", header, offset - cbpf.SKF_NET_OFF)
    assert isinstance(word, int)
    return word


def inside(ranges: list[Range], value: int) -> bool:
    return any(low <= value <= high for low, high in ranges)


def edges(ranges: list[Range], maximum: int) -> list[int]:
    """Where an off-by-one would show."""
    near = {at + step for pair in ranges for at in pair for step in (-1, 0, 1)} | {0, maximum}
    return sorted(value for value in near if 0 <= value <= maximum)


def well_formed(program: list[Insn]) -> None:
    """What the kernel demands: it ends in a return, and no jump leaves it."""
    assert program[-1].code == cbpf.BPF_RET
    for at, insn in enumerate(program):
        if insn.code == cbpf.BPF_JMP | cbpf.BPF_JA:
            assert at + 1 + insn.k < len(program)
        elif insn.code & 7 == cbpf.BPF_JMP:
            assert max(insn.jt, insn.jf) <= 255
            assert at + 1 + max(insn.jt, insn.jf) < len(program)
