"""What the relay takes from this host: its users and groups, the state directory, the API socket's path.

Owns finding and checking them. Called at the start, and by supervisor.requests for Listen. User databases may be
slow to answer; nothing else here blocks.
"""

import errno
import grp
import os
import pwd
import re
import socket
import stat
import sys
from typing import Final, NamedTuple

from mrelay.supervisor.resources import Refused

CONTROL_USER: Final = "mrelay"
WORKER_USER: Final = "mrelay-worker"
_GROUP: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}")  # useradd(8)


class User(NamedTuple):
    """What a child becomes."""

    uid: int
    gid: int


def find_users(control: str | None, workers: str | None) -> tuple[User, User]:
    """Control's user and the workers': those named, or mrelay and mrelay-worker, or one for both, or nobody.

    Exits for a name that does not exist, for root, and for the supervisor's own user, whom they could signal.
    """
    first = [control] if control else [CONTROL_USER, "nobody"]
    ours = _user(first, "--user")
    return ours, _user([workers], "--worker-user") if workers else _find(WORKER_USER) or ours


def _user(names: list[str], option: str) -> User:
    for name in names:
        found = _find(name)
        if found is None:
            continue
        if found.uid == 0 or found.uid == os.geteuid():
            problem = "is root" if found.uid == 0 else "is the user that the supervisor itself runs as"
            sys.exit(f"mrelay: {option} {name} {problem}: name another, unprivileged user")
        return found
    sys.exit(f"mrelay: no user {names[0]}: create it with 'useradd --system {names[0]}'")


def _find(name: str) -> User | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return User(entry.pw_uid, entry.pw_gid)


def find_group(name: str) -> int:
    """Its gid; Refused when there is none."""
    if not _GROUP.fullmatch(name):
        raise Refused(f"{name!r:.50} is no group's name")
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise Refused(f"no group {name}", f"create it with 'groupadd --system {name}'") from None


def open_state_dir(path: str, user: User) -> int:
    """The state directory, made if need be, as a descriptor that control can work below; or exits."""
    try:
        os.makedirs(path, mode=0o755, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not _may_write(os.fstat(fd), user):
            if os.listdir(fd):
                raise OSError(errno.EPERM, "it is another user's, and not empty")
            os.fchown(fd, *user)
    except OSError as error:
        remedy = f"name another with --state-dir, or: install -d -o {user.uid} -g {user.gid} {path}"
        sys.exit(f"mrelay: state directory {path}: {error.strerror}: {remedy}")
    return fd


def _may_write(found: os.stat_result, user: User) -> bool:
    """Whether this user can keep files in this directory: as its owner, or as its group."""
    as_owner = found.st_uid == user.uid and found.st_mode & 0o300 == 0o300
    as_group = found.st_gid == user.gid and found.st_mode & 0o030 == 0o030
    return as_owner or as_group


def listen_at(path: str, mode: int, gid: int) -> socket.socket:
    """A listening Unix socket with this file mode and group (-1: ours); a dead one's file is replaced.

    Mode and group are there before anyone can connect. Neither is set through a symbolic link that someone
    might put in its place meanwhile.
    """
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    clear_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)
    os.lchown(path, -1, gid)
    sock.listen(128)
    return sock


def clear_path(path: str) -> None:
    """Remove a dead relay's socket file. Refused for another kind of file, and while a relay listens there."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise Refused(f"{path} exists and is no socket", "move it away, or choose another path with --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise Refused(f"a relay already listens on {path}", "stop it, or choose another path with --socket")
