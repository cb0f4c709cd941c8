"""Config files as the commands read and write them.

Called by check, apply and save. Blocks on the disk (or on standard input for "-"). What can go wrong is
raised as Failure: exit 78 for a file that can't be read, 1 for one that can't be written.
"""

import os
import stat
import sys
import tempfile
from pathlib import Path

from mrelay.cli.failure import BAD_CONFIG, Failure


def read(path: Path) -> str:
    """The text of a config file; "-" is standard input."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Failure(f"no file {path}: see 'mrelay check --help'", status=BAD_CONFIG) from error
    except UnicodeDecodeError as error:
        raise Failure(f"{path} is not UTF-8 text: is it a config file?", status=BAD_CONFIG) from error
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}", status=BAD_CONFIG) from error


def write(path: Path, text: str) -> None:
    """Replace the file whole or not at all, its mode and owner kept; a link stays, its target changes."""
    target = Path(os.path.realpath(path))
    try:
        _replace(target, text)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}; nothing was changed") from error


def _replace(target: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            _copy_ownership(target, file.fileno())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _copy_ownership(target: Path, descriptor: int) -> None:
    try:
        info = target.stat()
    except FileNotFoundError:
        os.fchmod(descriptor, 0o644)  # it is new; mkstemp's 0600 would hide it from the relay's own user
        return
    if (info.st_uid, info.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(descriptor, info.st_uid, info.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(info.st_mode))


def _sync_directory(directory: Path) -> None:
    """Without this the rename itself may be lost with the power."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
