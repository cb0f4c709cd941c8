"""Kernel programs of benchmarks and tests: compiled from C, and run on live frames.

Owns BPF_PROG_TEST_RUN's live mode (linux/bpf.h), which sends what an XDP program redirects. Called by traffic.py
and by the tests' numbered load. `compiled` runs the compiler for a second or two; `run_live` blocks until all is
sent.
"""

import ctypes
import importlib.util
import os
import platform
import struct
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Final

TREE: Final = Path(__file__).resolve().parents[1]
BPF_PROG_TEST_RUN: Final = 10  # linux/bpf.h, enum bpf_cmd
BPF_F_TEST_XDP_LIVE_FRAMES: Final = 1 << 1
_NR_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}  # asm/unistd.h
_libc = ctypes.CDLL(None, use_errno=True)


def compiled(source: Path) -> bytes:
    """The object file of a C source, by setup.py's compiler; ends the program when it does not compile."""
    with tempfile.TemporaryDirectory(prefix="mrelay-bpf-") as folder:
        target = Path(folder, "program.bpf.o")
        _setup_script().compile_program(source, target)
        return target.read_bytes()


def _setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mrelay_setup", TREE / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_live(program: int, frame: bytes, repeat: int, burst: int = 64) -> None:
    """Run the XDP program behind a descriptor on `repeat` live copies of `frame`, `burst` at a time.

    One call for a whole load: the kernel waits for an RCU grace period (tens of ms) around each.
    """
    data = ctypes.create_string_buffer(frame, len(frame))
    attr = struct.pack("<IIIIQQ", program, 0, len(frame), 0, ctypes.addressof(data), 0)
    attr += struct.pack("<IIIIQQ", repeat, 0, 0, 0, 0, 0)
    attr += struct.pack("<III", BPF_F_TEST_XDP_LIVE_FRAMES, 0, burst)
    buffer = ctypes.create_string_buffer(attr, 144)  # larger than any command's part of union bpf_attr
    number = ctypes.c_long(_NR_BPF[platform.machine()])
    if _libc.syscall(number, BPF_PROG_TEST_RUN, buffer, ctypes.sizeof(buffer)) < 0:
        raise OSError(ctypes.get_errno(), f"BPF_PROG_TEST_RUN: {os.strerror(ctypes.get_errno())}")
