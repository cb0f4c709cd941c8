"""Processes that hang, keep dying, are of another version; interfaces that go: what it costs, and what is said."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mrelay
from netns.lab import Lab, eventually
from netns.relay import Relay, rule
from netns.test_workers import core_list
from netns.traffic import Capture, Sender, payloads

pytestmark = pytest.mark.netns
GROUP = "239.1.1.1"
# The slow path: what the kernel carries by itself would not wait for a worker.
CONFIG = '[relay]\nengine = "uring"\n\n' + rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000")


def worker(relay: Relay) -> int:
    """The process id of worker 0."""
    return int(eventually(lambda: relay.workers()[0]["pid"], "worker 0 runs"))


def spare(relay: Relay, *but: int) -> int:
    """The process id of a spare worker that has settled, and is none of `but`."""
    others = {entry["pid"] for entry in relay.workers()} | set(but)

    def found() -> list[int]:
        return [pid for pid in relay.role("worker") if pid not in others and settled(pid)]

    return eventually(found, "there is a spare worker")[0]


def settled(pid: int) -> bool:
    """Whether a child has dropped its privileges, and so is done with its imports, and waits, so has beaten."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "\nUid:\t0\t" not in status and "\nState:\tS" in status


def passes(wire: Capture, sender: Sender, text: bytes) -> None:
    """One datagram gets through: once, if nothing is broken for longer than its ring holds it."""
    sender.send(GROUP, 5000, [text])
    assert wire.wait(1, 20)[0].payload == text


def test_a_stopped_worker_is_replaced(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        passes(wire, sender, b"before")
        stopped, waiting = worker(relay), spare(relay)
        os.kill(stopped, signal.SIGSTOP)
        passes(wire, sender, b"meanwhile")  # it waits in the ring
        assert worker(relay) == waiting, "the spare took its place"
        assert not Path(f"/proc/{stopped}").exists()
        assert "worker 0 hangs (no sign of life for 1.5 s, stopped): ending it" in relay.stderr
        assert spare(relay), "there is another spare"
        assert relay.workers()[0]["restarts"] == 1


def test_a_killed_worker_s_place_is_taken_by_the_spare(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        passes(wire, sender, b"before")
        gaps = []
        for _ in range(2):
            killed, waiting = worker(relay), spare(relay)
            os.kill(killed, signal.SIGKILL)
            since = time.monotonic()
            passes(wire, sender, b"again")
            gaps.append(time.monotonic() - since)
            assert worker(relay) == waiting
            assert os.sched_getaffinity(waiting) == {relay.workers()[0]["core"]}
        print("a killed worker's stream went on after", *(f"{1000 * gap:.0f} ms" for gap in gaps))


def test_a_spare_that_dies_or_hangs_is_replaced(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        first = spare(relay)
        os.kill(first, signal.SIGKILL)
        second = spare(relay, first)
        os.kill(second, signal.SIGSTOP)
        spare(relay, first, second)
        assert relay.workers()[0]["restarts"] == 0
        passes(wire, sender, b"undisturbed")


def test_a_stopped_control_is_replaced_and_the_stream_goes_on(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        (stopped,) = relay.role("control")
        os.kill(stopped, signal.SIGSTOP)
        sender.send(GROUP, 5000, payloads(100))
        assert [packet.payload for packet in wire.wait(100)] == payloads(100)
        eventually(lambda: relay.role("control") not in ([], [stopped]), "control has been replaced")
        assert set(relay.rules()) == {"a"}
        assert relay.workers()[0]["restarts"] == 0
        assert "control hangs (no sign of life for 1.5 s, stopped)" in relay.stderr


def test_a_control_that_dies_after_the_config_file_went_goes_on_with_the_rules_that_run(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        (killed,) = relay.role("control")
        relay.config.unlink()
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: relay.role("control") not in ([], [killed]), "control has been restarted")
        assert set(relay.rules()) == {"a"}
        assert f"can't open {relay.config}: No such file" in relay.stderr
        passes(wire, sender, b"still")


def test_a_stopped_supervisor_is_no_problem_for_the_stream(lab: Lab) -> None:
    star = lab.star()
    with Capture(star.sink, "k0") as wire, Sender(star.source) as sender, Relay(star.relay, CONFIG) as relay:
        assert spare(relay)
        before = relay.family()
        relay.signal(signal.SIGSTOP)
        sent = payloads(200)
        for i in range(0, 200, 10):  # for longer than any silence that the supervisor would bear
            sender.send(GROUP, 5000, sent[i : i + 10])
            select.select([], [], [], 0.125)
        assert [packet.payload for packet in wire.wait(200)] == sent
        assert relay.stats()["matched"] == 200, "the API answers"
        relay.signal(signal.SIGCONT)
        passes(wire, sender, b"after")
        relay.add_rule("b", "in0:239.1.1.2:5000", "out0:239.2.2.2:6001")  # the supervisor has looked about
        assert relay.family() == before, "nobody was taken for hung"


def test_without_the_supervisor_nobody_goes_on(lab: Lab) -> None:
    """Not even those that are stopped, or not yet at work."""
    star = lab.star()
    relay = Relay(star.relay, CONFIG).start()
    try:
        relay.wait_ready()
        eventually(lambda: len(relay.role("worker")) == 2, "there is a spare worker")
        family = relay.family()
        for pid in relay.role("control"):
            os.kill(pid, signal.SIGSTOP)
        relay.signal(signal.SIGKILL)
        assert relay.process is not None
        relay.process.wait(10)
        since = time.monotonic()
        eventually(lambda: not any(runs(pid) for pid in family), "all of them have ended")
        print(f"all ended within {1000 * (time.monotonic() - since):.0f} ms of the supervisor")
        eventually(lambda: GROUP not in star.relay.groups("in0"), "and left the group")
    finally:
        relay.close()


def runs(pid: int) -> bool:
    """Whether there is such a process; one that has ended and that nobody waits for does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_crash_loop_is_said_once_and_shown_and_the_rest_goes_on(lab: Lab) -> None:
    star = lab.star()
    config = rule("all", "in0:239.1.1.0/24:5000", "out0:*:6000")
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source) as sender,
        Relay(star.relay, config, arguments=["--workers", core_list()]) as relay,
    ):
        kill_until(relay, r"crash loop \(signal SIGKILL\): next try in ")
        assert relay.stderr.count("worker 0: crash loop (signal SIGKILL)") == 1
        assert "It is tried again every 30 s; everything else goes on." in relay.stderr
        other = relay.workers()[1]
        assert (other["state"], other["restarts"]) == ("running", 0)
        groups = [f"239.1.1.{n}" for n in range(1, 65)]
        for group in groups:
            sender.send(group, 5000, [group.encode()])
        select.select([wire.sock], [], [], 10)
        assert wire.wait(1)[0].payload.decode() in groups, "the other worker's share"
        assert relay.rules()["all"]["state"] == "up"


def kill_until(relay: Relay, state: str) -> None:
    """Kill worker 0 as soon as it is there, until its state begins with this (a regular expression)."""

    def look() -> bool:
        found = relay.workers()[0]
        if found["pid"] is not None:
            os.kill(found["pid"], signal.SIGKILL)
        return re.match(state, found["state"]) is not None

    eventually(look, state, 40)


def test_an_interface_that_goes_ends_no_worker(lab: Lab) -> None:
    """Its ring and its egress socket fail under way; a worker that starts meanwhile gets them as they are."""
    star = lab.star(outputs=2)
    config = rule("a", f"in0:{GROUP}:5000", "out0:239.2.2.2:6000", "out1:239.2.2.2:6000")
    with Sender(star.source) as sender, Relay(star.relay, config) as relay:
        pid = worker(relay)
        with Capture(star.sink, "k0") as wire:
            passes(wire, sender, b"before")
            star.relay.ip("link del out1")
            sender.send(GROUP, 5000, payloads(50))
            assert [packet.payload for packet in wire.wait(50)] == payloads(50)
            star.relay.ip("link del in0")
            relay.await_rule("a", "waiting")
            assert (worker(relay), relay.workers()[0]["restarts"]) == (pid, 0), relay.stderr
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: relay.workers()[0]["state"] == "running", "it runs without them")
        lab.source_link(star.source, star.relay)
        lab.egress_link(star, 1)
        relay.await_rule("a", "up")
        with Capture(star.sink, "k1") as late, Sender(star.source) as again:
            passes(late, again, b"after")
        assert relay.workers()[0]["restarts"] == 1


def test_a_package_that_was_replaced_under_a_running_relay(lab: Lab, folder: Path) -> None:
    """The spare is still of the running version; the next one refuses, and everybody says what to do."""
    star = lab.star()
    python, version = installed_copy(folder)
    with (
        Capture(star.sink, "k0") as wire,
        Sender(star.source) as sender,
        Relay(star.relay, CONFIG, python=str(python), folder=folder) as relay,
    ):
        waiting = spare(relay)
        version.write_text(version.read_text().replace(f'"{mrelay.__version__}"', '"99.0"'))
        os.kill(worker(relay), signal.SIGKILL)
        passes(wire, sender, b"by the spare")
        assert worker(relay) == waiting
        outdated = "another version of mrelay is installed than the one that runs: restart the relay"
        eventually(lambda: f"spare worker: {outdated}" in relay.stderr, "it is said before it matters")
        os.kill(waiting, signal.SIGKILL)
        eventually(lambda: relay.workers()[0]["state"].startswith(f"{outdated}: next try in "), "it is shown")
        said = f"the running relay is version {mrelay.__version__}, this program is 99.0: restart the relay"
        assert said in relay.stderr
        assert relay.rules()["a"]["state"] == "up", "control goes on"
        assert "crash loop" not in relay.stderr


def installed_copy(folder: Path) -> tuple[Path, Path]:
    """A copy of this package with an interpreter of its own: that, and the file that says the version."""
    package = Path(mrelay.__file__).parent
    shutil.copytree(package, folder / "lib" / "mrelay", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=50)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("-packages")]
    (packages / "copy.pth").write_text("\n".join([str(folder / "lib"), *ours]))
    return folder / "venv" / "bin" / "python", folder / "lib" / "mrelay" / "__init__.py"
