"""eBPF without a compiler: an assembler of a few lines, and bpf(2) through ctypes.

Owns the instruction encoding and the layout of `union bpf_attr` for the commands the benchmark needs;
used by traffic.py alone. Codes keep the spelling of <linux/bpf.h> and <linux/bpf_common.h>; semantics are
those of RFC 9669. `Program.test_run` blocks for as long as the program is told to repeat; nothing else does.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_NR_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}  # <asm/unistd.h>
_libc = ctypes.CDLL(None, use_errno=True)

# enum bpf_cmd
BPF_MAP_CREATE, BPF_MAP_LOOKUP_ELEM, BPF_MAP_UPDATE_ELEM = 0, 1, 2
BPF_PROG_LOAD, BPF_PROG_TEST_RUN, BPF_LINK_CREATE = 5, 10, 28
BPF_MAP_TYPE_ARRAY: Final = 2
BPF_PROG_TYPE_SCHED_CLS: Final = 3
BPF_PROG_TYPE_XDP: Final = 6
BPF_TCX_INGRESS: Final = 46
BPF_F_TEST_XDP_LIVE_FRAMES: Final = 1 << 1
# helpers: enum bpf_func_id
BPF_FUNC_map_lookup_elem, BPF_FUNC_ktime_get_ns, BPF_FUNC_redirect = 1, 5, 23

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = range(11)
W, DW = 0x00, 0x18  # BPF_W, BPF_DW: 4 and 8 bytes
MOV, ADD, SUB = 0xB0, 0x00, 0x10  # BPF_ALU64 operations
JEQ, JGT, JGE, JNE, JLT, JLE = 0x10, 0x20, 0x30, 0x50, 0xA0, 0xB0  # unsigned jumps


@dataclass(frozen=True)
class Insn:
    """One instruction; `off` may name a label, which `assemble` resolves. `wide`: second half's imm."""

    code: int
    dst: int = 0
    src: int = 0
    off: int | str = 0
    imm: int = 0
    wide: int | None = None


def alu(operation: int, dst: int, imm: int) -> Insn:
    """BPF_ALU64 | BPF_K: dst = dst `operation` imm."""
    return Insn(0x07 | operation, dst, imm=imm)


def alu_reg(operation: int, dst: int, src: int) -> Insn:
    """BPF_ALU64 | BPF_X: dst = dst `operation` src."""
    return Insn(0x0F | operation, dst, src)


def load(size: int, dst: int, src: int, off: int) -> Insn:
    """BPF_LDX | BPF_MEM: dst = *(src + off)."""
    return Insn(0x61 | size, dst, src, off)


def store(size: int, dst: int, off: int, src: int) -> Insn:
    """BPF_STX | BPF_MEM: *(dst + off) = src."""
    return Insn(0x63 | size, dst, src, off)


def atomic_add(dst: int, off: int, src: int) -> Insn:
    """BPF_STX | BPF_ATOMIC | BPF_DW with BPF_ADD: *(u64 *)(dst + off) += src."""
    return Insn(0xDB, dst, src, off)


def jump(condition: int, dst: int, imm: int, label: str) -> Insn:
    """BPF_JMP | BPF_K."""
    return Insn(0x05 | condition, dst, off=label, imm=imm)


def jump_reg(condition: int, dst: int, src: int, label: str) -> Insn:
    """BPF_JMP | BPF_X."""
    return Insn(0x0D | condition, dst, src, label)


def call(helper: int) -> Insn:
    """BPF_JMP | BPF_CALL: the helper's result is in R0; R1 to R5 are lost."""
    return Insn(0x85, imm=helper)


def exit_() -> Insn:
    """BPF_JMP | BPF_EXIT: return R0."""
    return Insn(0x95)


def map_address(dst: int, array: "Array") -> Insn:
    """BPF_LD_IMM64 with BPF_PSEUDO_MAP_FD: the map itself, as a helper's argument."""
    return Insn(0x18, dst, 1, imm=array.fd, wide=0)


def value_address(dst: int, array: "Array", offset: int = 0) -> Insn:
    """BPF_LD_IMM64 with BPF_PSEUDO_MAP_VALUE: the address `offset` bytes into element 0."""
    return Insn(0x18, dst, 2, imm=array.fd, wide=offset)


def assemble(program: Sequence[Insn | str]) -> bytes:
    """Machine code of `program`, in which a string is a label for the instruction that follows it."""
    labels: dict[str, int] = {}
    at = 0
    for item in program:
        if isinstance(item, str):
            labels[item] = at
        else:
            at += 1 if item.wide is None else 2
    code = b""
    for item in program:
        if isinstance(item, Insn):
            off = item.off if isinstance(item.off, int) else labels[item.off] - len(code) // 8 - 1
            code += struct.pack("<BBhi", item.code, item.dst | item.src << 4, off, item.imm)
            code += b"" if item.wide is None else struct.pack("<BBhi", 0, 0, 0, item.wide)
    return code


def _bpf(command: int, attr: bytes) -> int:
    buffer = ctypes.create_string_buffer(attr, 144)  # larger than any command's part of union bpf_attr
    number = _NR_BPF[platform.machine()]
    result = int(_libc.syscall(ctypes.c_long(number), command, buffer, ctypes.sizeof(buffer)))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"bpf command {command}: {os.strerror(ctypes.get_errno())}")
    return result


class Descriptor:
    """Owns one bpf descriptor; a closed map, program or link is gone (and detached) once unused."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Give the descriptor back; closing twice is fine."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Array(Descriptor):
    """BPF_MAP_TYPE_ARRAY of `entries` values of `size` bytes."""

    def __init__(self, size: int, entries: int = 1) -> None:
        self.size = size
        super().__init__(_bpf(BPF_MAP_CREATE, struct.pack("<IIII", BPF_MAP_TYPE_ARRAY, 4, size, entries)))

    def __setitem__(self, index: int, value: bytes) -> None:
        key, data = ctypes.c_uint32(index), ctypes.create_string_buffer(value, self.size)
        _bpf(BPF_MAP_UPDATE_ELEM, struct.pack("<IxxxxQQQ", self.fd, *map(ctypes.addressof, (key, data)), 0))

    def __getitem__(self, index: int) -> bytes:
        key, data = ctypes.c_uint32(index), ctypes.create_string_buffer(self.size)
        _bpf(BPF_MAP_LOOKUP_ELEM, struct.pack("<IxxxxQQQ", self.fd, *map(ctypes.addressof, (key, data)), 0))
        return data.raw


class Program(Descriptor):
    """A loaded program. OSError with the verifier's words when the kernel refuses it."""

    def __init__(self, kind: int, instructions: Sequence[Insn | str]) -> None:
        code = assemble(instructions)
        text, name, log = (ctypes.create_string_buffer(x) for x in (code, b"GPL", b""))
        head = struct.pack("<IIQQ", kind, len(code) // 8, ctypes.addressof(text), ctypes.addressof(name))
        try:
            super().__init__(_bpf(BPF_PROG_LOAD, head))
        except OSError as error:
            log = ctypes.create_string_buffer(1 << 20)
            try:  # once more, for the verifier's log
                fd = _bpf(BPF_PROG_LOAD, head + struct.pack("<IIQ", 1, len(log), ctypes.addressof(log)))
            except OSError:
                raise OSError(error.errno, f"{error.strerror}: {log.value[-2000:].decode()}") from error
            super().__init__(fd)

    def test_run(self, frame: bytes, repeat: int) -> None:
        """Run an XDP program on `repeat` live copies of `frame`, 64 at a time, and act on its verdicts."""
        run_live(self.fd, frame, repeat)

    def attach_tcx(self, ifindex: int) -> Descriptor:
        """Attach at the ingress of an interface of the caller's namespace, until the link is closed."""
        return Descriptor(_bpf(BPF_LINK_CREATE, struct.pack("<IIII", self.fd, ifindex, BPF_TCX_INGRESS, 0)))


def run_live(program: int, frame: bytes, repeat: int) -> None:
    """Run the XDP program behind a descriptor on `repeat` live copies of `frame`, 64 at a time."""
    data = ctypes.create_string_buffer(frame, len(frame))
    attr = struct.pack("<IIIIQQ", program, 0, len(frame), 0, ctypes.addressof(data), 0)
    attr += struct.pack("<IIIIQQ", repeat, 0, 0, 0, 0, 0)
    _bpf(BPF_PROG_TEST_RUN, attr + struct.pack("<III", BPF_F_TEST_XDP_LIVE_FRAMES, 0, 64))
