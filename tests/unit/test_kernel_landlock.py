"""Landlock, in a process of its own for each case: what remains of the filesystem, TCP and signals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mrelay.kernel import landlock

PRELUDE = """
import json, os, signal, socket, sys, threading
from mrelay.kernel import landlock

folder = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)

def outcome(action, *arguments, **rest):
    try:
        result = action(*arguments, **rest)
        if isinstance(result, int):
            os.close(result)
    except OSError as error:
        return type(error).__name__
    return "through"

def connect(port):
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))

"""


def confined(folder: Path, script: str) -> dict[str, Any]:
    """What the script prints, which is JSON."""
    if landlock.abi() == 0:
        pytest.skip("needs a kernel with Landlock")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
        timeout=50,
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_folder_remains(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("x" * 10)
    found = confined(
        tmp_path,
        """
version = landlock.restrict(folder)
write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
print(json.dumps({
    "version": version,
    "truncate": outcome(os.open, "old", write, dir_fd=folder),
    "make": outcome(os.open, "new", write, 0o600, dir_fd=folder),
    "rename": outcome(os.rename, "new", "old", src_dir_fd=folder, dst_dir_fd=folder),
    "read": outcome(os.open, "old", os.O_RDONLY, dir_fd=folder),
    "list": outcome(os.listdir, folder),
    "remove": outcome(os.unlink, "old", dir_fd=folder),
    "link": outcome(os.symlink, "/etc/passwd", "link", dir_fd=folder),
    "subfolder": outcome(os.mkdir, "sub", dir_fd=folder),
    "beside": outcome(os.open, "..", os.O_RDONLY, dir_fd=folder),
    "elsewhere": outcome(os.open, "/etc/passwd", os.O_RDONLY),
}))
""",
    )
    assert found.pop("version") == landlock.abi()
    refused = {name for name, outcome in found.items() if outcome == "PermissionError"}
    assert refused == {"link", "subfolder", "beside", "elsewhere"}
    assert {outcome for name, outcome in found.items() if name not in refused} == {"through"}


def test_nothing_remains(tmp_path: Path) -> None:
    found = confined(
        tmp_path,
        """
landlock.restrict()
print(json.dumps({"file": outcome(os.open, "old", os.O_RDWR | os.O_CREAT, dir_fd=folder),
                  "list": outcome(os.open, ".", os.O_RDONLY, dir_fd=folder)}))
""",
    )
    assert set(found.values()) == {"PermissionError"}


def test_tcp(tmp_path: Path) -> None:
    if landlock.abi() < 4:
        pytest.skip("needs Landlock with ABI 4 (Linux 6.7)")
    found = confined(
        tmp_path,
        """
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()
port = listener.getsockname()[1]
before = outcome(connect, port)
landlock.restrict()
print(json.dumps({"before": before, "connect": outcome(connect, port),
                  "bind": outcome(socket.socket().bind, ("127.0.0.1", 0))}))
""",
    )
    assert found == {"before": "through", "connect": "PermissionError", "bind": "PermissionError"}


def test_signals_and_abstract_sockets(tmp_path: Path) -> None:
    if landlock.abi() < 6:
        pytest.skip("needs Landlock with ABI 6 (Linux 6.12)")
    found = confined(
        tmp_path,
        """
listener = socket.socket(socket.AF_UNIX)
listener.bind("")
listener.listen()
def meet():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(listener.getsockname())
before = [outcome(os.kill, os.getppid(), 0), outcome(meet)]
landlock.restrict()
print(json.dumps({"before": before, "parent": outcome(os.kill, os.getppid(), 0),
                  "self": outcome(os.kill, os.getpid(), 0), "meet": outcome(meet)}))
""",
    )
    assert found.pop("before") == ["through", "through"]
    assert found == {"parent": "PermissionError", "self": "through", "meet": "PermissionError"}


def test_a_thread_that_would_stay_free(tmp_path: Path) -> None:
    found = confined(
        tmp_path,
        """
end = threading.Event()
threading.Thread(target=end.wait).start()
try:
    landlock.restrict()
except OSError as error:
    print(json.dumps({"error": str(error)}))
end.set()
""",
    )
    assert "before another is started" in found["error"]


def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "SYS_LANDLOCK_CREATE_RULESET", 9999)  # ENOSYS
    assert landlock.abi() == 0
    assert landlock.restrict() == 0
