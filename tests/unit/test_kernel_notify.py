"""sd_notify messages, seen from the service manager's end."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mrelay.kernel import notify


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The service manager's socket, in the file system or abstract."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@mrelay-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def test_ready_with_status(manager: socket.socket) -> None:
    assert notify.ready("3 rules\nup")
    assert manager.recv(1000) == b"READY=1\nSTATUS=3 rules up"


def test_reloading_says_when(manager: socket.socket) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notify.reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    fields = dict(line.split("=") for line in manager.recv(1000).decode().splitlines())
    assert fields["RELOADING"] == "1"
    assert before <= int(fields["MONOTONIC_USEC"]) <= after


def test_the_rest(manager: socket.socket) -> None:
    assert notify.status("waiting") and notify.watchdog() and notify.stopping()
    assert [manager.recv(1000) for _ in range(3)] == [b"STATUS=waiting", b"WATCHDOG=1", b"STOPPING=1"]


def test_no_service_manager_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.ready()
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    assert not notify.ready()


def test_watchdog_interval() -> None:
    pid = str(os.getpid())
    assert notify.watchdog_interval({}) is None
    assert notify.watchdog_interval({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": pid}) == 30.0
    assert notify.watchdog_interval({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}) is None
    assert notify.watchdog_interval({"WATCHDOG_USEC": "soon"}) is None


def test_a_descriptor_is_given_by_name(manager: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as mine:
        assert notify.store("join-3-77", mine.fileno()) and notify.unstore("join-3-77")
        text, fds, _, _ = socket.recv_fds(manager, 1000, 4)
        assert text == b"FDSTORE=1\nFDNAME=join-3-77\nFDPOLL=0"
        assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(mine.fileno()).st_ino]
        os.close(fds[0])
    assert manager.recv(1000) == b"FDSTOREREMOVE=1\nFDNAME=join-3-77"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many", "LISTEN_FDNAMES": "a"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0", "LISTEN_FDNAMES": ""},
    ],
)
def test_nothing_was_kept_for_us(environ: dict[str, str]) -> None:
    assert notify.stored(environ) == []
    assert environ == {}, "and no child may think that it was"
