"""Attacks by a control or worker process that was taken over; docs/security.md has a line for each.

The attacking code (attacker.py, attempts.py) runs inside the real processes, started by the real supervisor.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrelay.kernel import landlock
from netns.attempts import ATTEMPTS, THROUGH
from netns.lab import Lab, Star, eventually
from netns.relay import Relay, rule
from netns.traffic import Capture, Sender

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"
CONFIG = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")
PROGRAM = (sys.executable, str(Path(__file__).with_name("attacker.py")))
WORD = "ATTACK "
EVERYTHING = {attempt.__name__ for attempt in ATTEMPTS}

# What gets through when a mechanism is left away: that mechanism alone stands against it. Anything that is not
# named here is stopped by two or more.
ONLY_SECCOMP = {
    *("udp_socket", "unix_connection", "firewall_socket", "attach_bpf", "executable_memory"),
    *("make_memory_executable", "file_in_memory", "descriptor_of_a_process", "set_up_io_uring", "add_a_key"),
    *("become_dumpable", "own_user_namespace", "enter_a_namespace", "signal_by_descriptor"),
}


@pytest.fixture
def place(folder: Path) -> Path:
    """A folder with what attempts.Targets promises."""
    (folder / "script").write_text("neither program nor script")
    (folder / "script").chmod(0o755)
    (folder / "closed").touch(mode=0o600)
    return folder


@pytest.fixture
def star(lab: Lab) -> Iterator[Star]:
    yield lab.star()


class AttackedRelay(Relay):
    """A relay with one role taken over."""

    _CHILDREN = ("control", "worker", "spare worker")

    def __init__(self, star: Star, place: Path, role: str, attack: str, without: str = "-") -> None:
        flags = ("--workers", "1", "--user", "nobody", "--worker-user", "daemon")
        super().__init__(star.relay, CONFIG, folder=place, arguments=flags)
        self._source, self._role = star.source, role
        command = self._arguments[self._arguments.index("run") :]
        self._arguments = [*PROGRAM, "supervise", role, attack, without, str(place), *command]

    def wait_ready(self) -> None:
        """Return when it is ready; a worker is taken over by a datagram."""
        super().wait_ready()
        if self._role == "worker":
            with Sender(self._source) as sender:
                sender.send(GROUP, 5000, [b"attack"])

    def said(self) -> Any:
        """What the attacker reports, once it does."""
        return eventually(lambda: report(self.stderr), "the attacker's report", 20)

    def descriptors(self) -> int:
        """How many the supervisor has open, once there is a spare worker.

        Its pidfd is the last that the supervisor opens for it, and those for its start are closed by then.
        """

        def opened() -> list[str]:
            found = []
            for link in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed as we look
                    found.append(os.readlink(link))
            return found if sum("pidfd" in target for target in found) == len(self._CHILDREN) else []

        return len(eventually(opened, f"a pidfd for each of {self._CHILDREN}"))


def report(log: str) -> Any:
    lines = [line for line in log.splitlines() if line.startswith(WORD)]
    return json.loads(lines[0].removeprefix(WORD)) if lines else None


def got_through(found: dict[str, str]) -> set[str]:
    return {name for name, outcome in found.items() if outcome == THROUGH}


def test_the_attempts_are_real(star: Star, place: Path) -> None:
    """Root, unconfined, gets through with all of them; so it is confinement that stops them below."""
    victims = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    try:
        pids = [str(victim.pid) for victim in victims]
        command = ["ip", "netns", "exec", star.relay.name, *PROGRAM, "free", str(place), *pids]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    finally:
        for victim in victims:
            victim.kill()
            victim.wait()
    found = report(done.stderr)
    unknown = {name for name, outcome in found.items() if outcome == "ENOSYS"}  # not built into this kernel
    assert got_through(found) == EVERYTHING - unknown, found


@pytest.mark.parametrize("role", ["control", "worker"])
def test_nothing_gets_through(star: Star, place: Path, role: str) -> None:
    with AttackedRelay(star, place, role, "probe") as relay:
        found = relay.said()
        assert found.keys() == EVERYTHING
        assert got_through(found) == set()


@pytest.mark.parametrize("role", ["control", "worker"])
def test_without_seccomp(star: Star, place: Path, role: str) -> None:
    """Users, capabilities and Landlock alone keep files, processes and programs safe."""
    if landlock.abi() < 6:
        pytest.skip("needs Landlock with ABI 6 (Linux 6.12)")
    with AttackedRelay(star, place, role, "probe", "seccomp") as relay:
        through = got_through(relay.said())
        assert through >= {"udp_socket", "unix_connection", "executable_memory"}, "seccomp is left away"
        assert through <= ONLY_SECCOMP | ({"fork", "clone_a_process"} if role == "control" else set())


@pytest.mark.parametrize("role", ["control", "worker"])
def test_without_landlock(star: Star, place: Path, role: str) -> None:
    """As on an older kernel: workers still reach nothing; control reads what everyone may read, no more."""
    with AttackedRelay(star, place, role, "probe", "landlock") as relay:
        through = got_through(relay.said())
        open_to_all = {"read_a_file_of_everyones", "list_a_folder", "read_a_device", "write_a_file"}
        assert through == (open_to_all if role == "control" else set())


ENDS_ITS_SENDER = [
    *(
        "no JSON",
        "another version",
        "an unknown message",
        "a field too many",
        "a wrong type",
        "a message for others",
    ),
    *("truncated", "oversized", "deeply nested", "a huge number", "descriptors", "many descriptors"),
    *("too much at once", "descriptors alone"),
    *("a group as neighbour", "a neighbour without address", "a neighbour on a huge interface"),
]


@pytest.mark.parametrize(
    ("role", "attack"), [("control", attack) for attack in ENDS_ITS_SENDER] + [("worker", "a worker's request")]
)
def test_a_bad_message_ends_its_sender_and_nothing_else(star: Star, place: Path, role: str, attack: str) -> None:
    relay = AttackedRelay(star, place, role, attack)
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, relay:
        assert relay.said() == "sent"
        eventually(lambda: "sent what it may not" in relay.stderr, "a refusal")
        eventually(lambda: "signal SIGKILL" in relay.stderr, "the end of its sender")
        in_service(relay)
        sender.send(GROUP, 5000, [b"still here"])
        wire.until(b"still here")


def in_service(relay: Relay) -> None:
    """Return when a control and a worker are at work."""

    def at_work() -> bool:
        try:
            return [worker["state"] for worker in relay.workers()] == ["running"]
        except (OSError, AssertionError):
            return False

    eventually(at_work, "control and worker at work")


def test_descriptors_do_not_stay_with_the_supervisor(star: Star, place: Path) -> None:
    with AttackedRelay(star, place, "control", "many descriptors") as relay:
        eventually(lambda: "signal SIGKILL" in relay.stderr, "the end of its sender")
        in_service(relay)
        after = relay.descriptors()
    (place / "attacked").touch()
    with AttackedRelay(star, place, "control", "many descriptors") as relay:
        assert relay.descriptors() == after, "as many as one that was never attacked"


def test_requests_that_no_rule_can_need(star: Star, place: Path) -> None:
    with AttackedRelay(star, place, "control", "requests") as relay:
        answers = relay.said()
        assert {name: answer for name, answer in answers.items() if not answer.startswith("refused: ")} == {}
        assert relay.rules()["a"]["state"] == "up"
        assert relay.socket.stat().st_mode & 0o777 == 0o660


def test_a_tap_is_good_for_looking_alone(star: Star, place: Path) -> None:
    with AttackedRelay(star, place, "control", "abuse a tap") as relay, Capture(star.source, "s0") as wire:
        found = relay.said()
        assert {found.pop(name) for name in ("bind", "another filter", "no transmit ring")} == {"EPERM"}
        assert {found.pop(name) for name in ("send", "sendto", "write")} <= {"0", "EINVAL", "EAGAIN"}
        assert found == {"after closing": "granted"}
        assert not [packet for packet in wire.arrived() if packet.source == "0.0.0.0"]
        # It keeps copies of those that it closed, at which nothing arrives; they end with it.
        assert sorted(taps(star)) == ["0003"] + ["88B6"] * 4
        os.kill(relay.role("control")[0], signal.SIGKILL)
        eventually(lambda: not taps(star), "the end of all taps")
        in_service(relay)


def taps(star: Star) -> list[str]:
    """The ethertypes of packet sockets that are no rings (/proc/net/packet)."""
    lines = [line.split() for line in star.relay.read("packet").splitlines()[1:]]
    return [line[3].upper() for line in lines if line[3] not in {"0800", "86dd"}]


def test_any_request_is_answered(star: Star, place: Path) -> None:
    """The supervisor survives requests of the right shape with anything in them, and still works after."""
    with AttackedRelay(star, place, "control", "fuzz") as relay:
        found = relay.said()
        print(found)
        assert found["answers"] == 700
        assert found["refused"] > 450
        assert "Traceback" not in relay.stderr
        in_service(relay)


def test_a_flood_of_requests_ends_its_sender(star: Star, place: Path) -> None:
    with AttackedRelay(star, place, "control", "flood") as relay:
        before = memory(relay.pid)
        # For not taking its answers, or for not beating its pulse meanwhile, whichever is noticed first.
        eventually(lambda: "control ended" in relay.stderr, "the end of its sender", 60)
        in_service(relay)
        assert memory(relay.pid) < before + (32 << 10), "kB; it keeps nothing of the flood"


def memory(pid: int) -> int:
    """Resident kB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


def test_a_worker_that_sends_nonsense_to_control(star: Star, place: Path) -> None:
    """Control starts again; forwarding goes on meanwhile."""
    relay = AttackedRelay(star, place, "worker", "nonsense to control")
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, relay:
        assert relay.said() == "sent"
        eventually(lambda: "control ended" in relay.stderr, "control's end")
        sender.send(GROUP, 5000, [b"meanwhile"])
        wire.until(b"meanwhile")
        in_service(relay)
