"""The Debian package for real: built, installed, started as its unit says, removed, purged."""

import contextlib
import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from manager import Manager
from mrelay import __version__
from mrelay.kernel import libbpf
from netns import as_unit
from netns.lab import Lab, Namespace, eventually
from netns.traffic import Capture, Sender

pytestmark = [pytest.mark.netns, pytest.mark.alone, pytest.mark.timeout(240)]  # its users are the host's
TREE = Path(__file__).resolve().parents[2]
UNIT = Path("/lib/systemd/system/mrelay.service")
TMPFILES = "systemd-tmpfiles --create /usr/lib/tmpfiles.d/mrelay.conf"
PINS = Path("/sys/fs/bpf/mrelay")
USERS = ("mrelay", "mrelay-worker", "mrelay-supervisor")
OURS = (
    "/usr/bin/mrelay", "/usr/lib/mrelay", UNIT,
    "/usr/lib/sysusers.d/mrelay.conf", "/usr/lib/tmpfiles.d/mrelay.conf",
    "/usr/share/doc/mrelay", "/usr/share/man/man1/mrelay.1.gz", "/usr/share/bash-completion/completions/mrelay",
)  # fmt: skip
KEPT = ("/etc/mrelay/relay.toml", "/var/lib/mrelay")
TRACES = (  # everything that the package may leave on a machine
    *OURS, *KEPT, "/etc/mrelay", "/run/mrelay", "/sys/fs/bpf/mrelay", "/etc/systemd/system/mrelay.service",
    "/etc/systemd/system/multi-user.target.wants/mrelay.service",
)  # fmt: skip


def run(*command: str) -> str:
    """Its output; AssertionError with it when it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


def present(paths: tuple[str | Path, ...]) -> list[str]:
    """Those of the paths that are there."""
    return [str(path) for path in paths if os.path.lexists(path)]


def users() -> set[str]:
    """Those of ours that there are."""
    return set(USERS) & {entry.pw_name for entry in pwd.getpwall()}


def busy_users() -> set[str]:
    """Those of ours that some process runs as; userdel leaves them."""
    uids = {pwd.getpwnam(name).pw_uid: name for name in users()}
    found: set[str] = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends as we look
            found.add(uids.get(int(status(int(path.name))["Uid"][0]), ""))
    return found - {""}


@pytest.fixture
def installed() -> Iterator[None]:
    """The package, built from this tree and installed; purged in the end."""
    for tool in (
        "dpkg-deb",
        "dpkg",
        "systemd-sysusers",
        "systemd-tmpfiles",
        "deb-systemd-helper",
        "systemd-analyze",
        "nsenter",
    ):
        if shutil.which(tool) is None:
            pytest.skip(f"needs the command {tool}")
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not Path("/usr/bin", minor).exists():
        pytest.skip(f"needs the system's own {minor}, which the package will use")
    if not as_unit.NUMBERS.exists():
        pytest.skip(f"needs {as_unit.NUMBERS}")
    if present(TRACES) or users():
        pytest.skip(f"needs a host without mrelay; here are {present(TRACES)} and users {users()}")
    run("sh", str(TREE / "packaging/build_deb.sh"), sys.executable)
    try:
        run("dpkg", "-i", *map(str, TREE.glob(f"dist/mrelay_{__version__}_*.deb")))
        yield
    finally:
        subprocess.run(["dpkg", "--purge", "mrelay"], capture_output=True, check=False, timeout=60)


def status(pid: int) -> dict[str, list[str]]:
    """/proc/PID/status: the words behind each key."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: words.split() for key, words in (line.split(":", 1) for line in lines)}


def children(pid: int) -> list[int]:
    """The processes that it started."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def start(namespace: Namespace, manager: Manager, log: Path) -> subprocess.Popen[bytes]:
    """The installed unit's command, as the unit would start it, beside a BPF file system like systemd's."""
    launcher = shlex.join([sys.executable, as_unit.__file__, str(UNIT)])
    script = f"mount -t bpf -o mode=700 bpf /sys/fs/bpf && {TMPFILES} && exec {launcher}"
    with log.open("wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", namespace.name, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=os.environ | manager.environment,
        )


def use(relay: int, star_relay: Namespace) -> None:
    """The installed client changes and shows the running relay; its processes are who they should be."""
    run("mrelay", "rule", "add", "a", "--from", "in0:239.1.1.1:5000", "--to", "out0:239.2.2.2:6000")
    assert "239.1.1.1" in star_relay.groups("in0")
    assert json.loads(run("mrelay", "rule", "list", "--json"))["rules"][0]["state"] == "up"
    assert f"engine {engine()}" in run("mrelay", "doctor")

    def settled() -> bool:  # a spare worker that was just started drops its rights after its imports
        return {pwd.getpwuid(int(status(pid)["Uid"][0])).pw_name for pid in children(relay)} == set(USERS[:2])

    eventually(settled, "every child runs as its own user", 30)
    assert pwd.getpwuid(int(status(relay)["Uid"][0])).pw_name == "mrelay-supervisor"
    for pid in children(relay):
        assert int(status(pid)["CapEff"][0], 16) == int(status(pid)["CapPrm"][0], 16) == 0


def engine() -> str:
    """The one that a relay with the unit's rights finds here."""
    return "uring" if libbpf.available() else "ebpf"


def end_and_flush(process: subprocess.Popen[bytes], namespace: Namespace) -> None:
    """End it as a restart does; what it leaves in the kernel, `mrelay stop --flush` finds from root's shell."""
    mounts = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)
    try:
        shell = ("nsenter", f"--mount=/proc/{os.getpid()}/fd/{mounts}", f"--net=/run/netns/{namespace.name}")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 0
        if engine() == "ebpf":
            assert "link-" in run(*shell, "find", str(PINS))
            assert "forwards no more at 1 interface" in run(*shell, "mrelay", "stop", "--flush")
        assert run(*shell, "find", str(PINS)).split() == [str(PINS)]
    finally:
        os.close(mounts)


def test_from_build_to_purge(lab: Lab, folder: Path, installed: None) -> None:
    assert users() == set(USERS)
    assert not [path for path in (*OURS, *KEPT) if not os.path.lexists(path)], "all there"
    assert __version__ in run("mrelay", "--version")
    run("mrelay", "check", "/etc/mrelay/relay.toml")
    star, log = lab.star(), folder / "log"
    with Manager(folder) as manager, Capture(star.sink, "k0") as wire, Sender(star.source) as sender:
        process = start(star.relay, manager, log)
        try:
            eventually(lambda: manager.take(1).get("READY") or process.poll() is not None, "ready", 30)
            assert process.poll() is None, log.read_text()
            use(process.pid, star.relay)
            sender.send("239.1.1.1", 5000, [b"installed"])
            assert wire.wait(1)[0].payload == b"installed"
            end_and_flush(process, star.relay)
        except BaseException as error:
            error.add_note(log.read_text())
            raise
        finally:
            process.kill()
            process.wait()
    assert Path("/var/lib/mrelay/state.json").exists()
    run("dpkg", "--remove", "mrelay")
    assert present(OURS) == [], "removing takes the program"
    assert len(present(KEPT)) == len(KEPT), "and keeps config and state"
    eventually(lambda: not busy_users(), "nothing runs as them, not even another test's relay", 60)
    run("dpkg", "--purge", "mrelay")
    assert present(TRACES) == [] and users() == set(), "purging leaves nothing"
