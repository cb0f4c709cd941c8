"""The supervisor's look at the host: users, the state directory, the API socket's file. No privilege needed."""

import os
import pwd
import socket
from pathlib import Path

import pytest

from mrelay.supervisor import host
from mrelay.supervisor.host import User
from mrelay.supervisor.resources import Refused

NAMES = {"mrelay": 901, "mrelay-worker": 902, "nobody": 65534, "alice": 1000, "root": 0}
US = User(os.getuid(), os.getgid())


def have(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the host have these users."""

    def getpwnam(name: str) -> pwd.struct_passwd:
        if name not in names:
            raise KeyError(name)
        return pwd.struct_passwd((name, "x", NAMES[name], NAMES[name], "", "/", "/bin/false"))

    monkeypatch.setattr(pwd, "getpwnam", getpwnam)


@pytest.mark.parametrize(
    ("there", "control", "workers", "found"),
    [
        (("mrelay", "mrelay-worker", "nobody"), None, None, (901, 902)),
        (("mrelay", "nobody"), None, None, (901, 901)),
        (("nobody",), None, None, (65534, 65534)),
        (("mrelay", "mrelay-worker", "alice"), "alice", None, (1000, 902)),
        (("mrelay", "alice"), None, "alice", (901, 1000)),
        (("alice", "nobody"), "alice", "nobody", (1000, 65534)),
    ],
)
def test_users(
    monkeypatch: pytest.MonkeyPatch,
    there: tuple[str, ...],
    control: str | None,
    workers: str | None,
    found: tuple[int, int],
) -> None:
    have(monkeypatch, *there)
    assert tuple(user.uid for user in host.find_users(control, workers)) == found


@pytest.mark.parametrize(
    ("control", "workers", "said"),
    [
        ("root", None, "--user root is root"),
        (None, "root", "--worker-user root is root"),
        ("bob", None, "no user bob: create it with 'useradd --system bob'"),
        (None, "bob", "no user bob"),
    ],
)
def test_users_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, control: str | None, workers: str | None, said: str
) -> None:
    have(monkeypatch, *NAMES)
    with pytest.raises(SystemExit, match=said):
        host.find_users(control, workers)


def test_the_supervisors_own_user(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, "mrelay")
    monkeypatch.setattr(os, "geteuid", lambda: NAMES["mrelay"])
    with pytest.raises(SystemExit, match="the supervisor itself runs as"):
        host.find_users(None, None)


def test_a_state_directory_of_our_own(tmp_path: Path) -> None:
    fd = host.open_state_dir(str(tmp_path / "made" / "state"), US)
    assert os.path.samestat(os.fstat(fd), (tmp_path / "made" / "state").stat())
    os.close(fd)


def test_a_state_directory_of_anothers(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"not empty: name another with --state-dir, or: install -d -o 61000"):
        host.open_state_dir(str(tmp_path), User(61000, 61000))


def test_a_state_directory_of_its_group(tmp_path: Path) -> None:
    """Such as systemd makes for a supervisor that is not root: StateDirectory= with mode 0770."""
    tmp_path.chmod(0o770)
    (tmp_path / "file").touch()
    os.close(host.open_state_dir(str(tmp_path), User(61000, os.getgid())))
    tmp_path.chmod(0o750)
    with pytest.raises(SystemExit):
        host.open_state_dir(str(tmp_path), User(61000, os.getgid()))


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_socket_has_its_mode_before_anyone_can_connect(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "sock", []
    monkeypatch.setattr(os, "lchown", lambda *_: seen.append(path.stat().st_mode & 0o777))
    with host.listen_at(str(path), mode, -1), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert seen == [mode]
    assert path.stat().st_mode & 0o777 == mode


def test_a_file_in_the_sockets_place(tmp_path: Path) -> None:
    (tmp_path / "sock").touch()
    with pytest.raises(Refused, match="is no socket"):
        host.listen_at(str(tmp_path / "sock"), 0o660, -1)


@pytest.mark.parametrize("name", ["", "a b", "adm\0", "\ud800", "../adm", "a" * 40, "no-such-group"])
def test_no_group(name: str) -> None:
    with pytest.raises(Refused):
        host.find_group(name)
