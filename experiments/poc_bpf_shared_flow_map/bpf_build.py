"""Compiles a BPF program with the clang that ziglang, a Python package, brings along.

Owns the command line and a cache: objects by the hash of all that went into them, in a folder of the user's
own under the system's temporary one. Needs neither Debian's clang nor libbpf-dev nor kernel headers. The first
compilation blocks for about a tenth of a second.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

_FLAGS: Final = (
    *("-target", "bpfel-freestanding", "-mcpu=v3", "-O2", "-g"),
    *("-fno-asynchronous-unwind-tables", "-Wall", "-Wextra", "-Werror"),
)


class BuildError(Exception):
    """No compiler, or it refused the program; says which."""


def compiled(source: Path) -> bytes:
    """The object file of `source` and the headers beside it."""
    name = _digest(source)
    folder = _cache()
    target = folder / f"{source.stem}-{name}.o"
    if not target.exists():
        _compile(source, folder, target)
    return target.read_bytes()


def _digest(source: Path) -> str:
    try:
        version = importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError("ziglang, a Python package (make sets it up with what testing needs)") from None
    digest = hashlib.sha256(repr((version, _FLAGS)).encode())
    for file in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _cache() -> Path:
    """Nobody else may write there: root loads what it finds."""
    folder = Path(tempfile.gettempdir(), f"mrelay-bpf-{os.geteuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if folder.is_symlink() or state.st_uid != os.geteuid() or state.st_mode & 0o022:
        raise BuildError(f"a folder {folder} that belongs to this user alone (remove what is there)")
    return folder


def _compile(source: Path, folder: Path, target: Path) -> None:
    new = target.with_suffix(f".{os.getpid()}")
    command = [sys.executable, "-m", "ziglang", "cc", *_FLAGS, *_includes(), "-c", str(source), "-o", str(new)]
    caches = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}
    done = subprocess.run(
        command, env=os.environ | caches, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise BuildError(f"a compiler that takes {source.name}: {done.stderr.strip()}")
    new.replace(target)


def _includes() -> list[str]:
    """The kernel's headers, as ziglang carries them. Any little-endian processor's asm/ will do for BPF."""
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        raise BuildError("ziglang, a Python package")
    headers = Path(package.origin).parent / "lib/libc/include"
    return [word for name in ("any-linux-any", "x86-linux-any") for word in ("-isystem", str(headers / name))]
