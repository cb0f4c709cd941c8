"""Compiles the kernel programs (bpf/*.bpf.c) into the package, for wheels and editable installs alike.

setuptools runs this at build time; everything else about the package stands in pyproject.toml. The compiler is
the clang inside ziglang, a Python package, else `clang`. Objects are the same for all little-endian machines.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from setuptools import setup
from setuptools.command.build_py import build_py

TREE: Final = Path(__file__).resolve().parent
TARGET: Final = TREE / "src/mrelay/ebpf"
FLAGS: Final = (
    *("-mcpu=v3", "-O2", "-g", "-fno-asynchronous-unwind-tables", "-Wall", "-Wextra", "-Werror"),
    f"-ffile-prefix-map={TREE}=.",
)


def compiler() -> list[str]:
    """The command, up to and including where the kernel's headers are; ends the build if there is none."""
    found = importlib.util.find_spec("ziglang")
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent
        headers = folder / "lib/libc/include"  # any little-endian processor's asm/ will do for BPF
        return [
            *(str(folder / "zig"), "cc", "-target", "bpfel-freestanding"),
            *("-isystem", str(headers / "any-linux-any"), "-isystem", str(headers / "x86-linux-any")),
        ]
    if clang := shutil.which("clang"):
        # Debian keeps asm/ in a folder that clang knows for its own machine only.
        own = f"/usr/include/{platform.machine()}-linux-gnu"
        return [clang, "-target", "bpfel", "-idirafter", own, "-idirafter", "/usr/include"]
    sys.exit(
        "error: nothing to compile bpf/*.bpf.c with\n"
        "  remedy: pip install ziglang, or install clang and the kernel's headers (Debian: clang, linux-libc-dev)"
    )


def compile_programs() -> None:
    """Each bpf/NAME.bpf.c to src/mrelay/ebpf/NAME.bpf.o; ends the build with the compiler's message."""
    for source in sorted(TREE.glob("bpf/*.bpf.c")):
        compile_program(source, TARGET / f"{source.stem}.o")


def compile_program(source: Path, target: Path) -> None:
    """One of them; tests have some of their own."""
    command = [*compiler(), *FLAGS, "-I", str(TREE / "bpf"), "-c", str(source), "-o", str(target)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {source.relative_to(TREE)} does not compile\n{done.stderr}")


class BuildWithPrograms(build_py):
    """As setuptools', with the programs compiled first, so that they are there as package data."""

    def run(self) -> None:
        compile_programs()
        super().run()


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithPrograms})
