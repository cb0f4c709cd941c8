"""Which children count as hung: by made-up pulses and activities, and by real processes."""

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from mrelay.pulse import Pulse
from mrelay.supervisor.children import shared_memory
from mrelay.supervisor.watch import CHECK, LONG_WORK, SILENCE, START, Activity, Watch, activity

SLEEPS, STOPPED = Activity("S", 0.0), Activity("T", 0.0)


@dataclass
class Scene:
    """A child that is made up, and the time."""

    busy: float = SILENCE
    doing: Activity = SLEEPS
    now: float = 1000.0
    looks: int = 0
    memory: int = field(default_factory=lambda: shared_memory("pulse", mmap.PAGESIZE))

    def __post_init__(self) -> None:
        self.pulse = Pulse(os.dup(self.memory))
        self.watch = Watch(1, self.memory, self.now, self.busy, self._look)

    def _look(self, pid: int) -> Activity:
        assert pid == 1
        self.looks += 1
        return self.doing

    def checks(self, seconds: float, *, cpu: float = 0.0) -> str:
        """The first verdict within these seconds; it uses `cpu` seconds of processor time a second."""
        for _ in range(round(seconds / CHECK)):
            self.now += CHECK
            self.doing = self.doing._replace(cpu=self.doing.cpu + cpu * CHECK)
            if verdict := self.watch.check(self.now):
                return verdict
        return ""

    def beats(self) -> None:
        self.pulse.beat()
        assert self.checks(CHECK) == ""


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    os.close(made.memory)


def test_a_child_that_beats_is_never_looked_at(scene: Scene) -> None:
    for _ in range(20):
        scene.pulse.beat()
        assert scene.checks(2 * CHECK) == ""
    assert scene.looks == 0


@pytest.mark.parametrize(("doing", "said"), [(SLEEPS, "waiting for something"), (STOPPED, "stopped")])
def test_one_that_could_beat_and_does_not_is_hung(scene: Scene, doing: Activity, said: str) -> None:
    scene.beats()
    scene.doing = doing
    assert scene.checks(SILENCE - CHECK) == ""
    assert said in scene.checks(2 * CHECK)


def test_a_busy_loop_is_hung(scene: Scene) -> None:
    scene.beats()
    scene.doing = Activity("R", 50.0)
    assert "busy" in scene.checks(SILENCE + CHECK, cpu=1.0)


def test_control_may_compute_for_longer_but_not_sleep() -> None:
    scene = Scene(busy=LONG_WORK)
    scene.beats()
    scene.doing = Activity("S", 0.0)  # as at a moment when it waits for its own threads
    assert scene.checks(LONG_WORK - CHECK, cpu=1.0) == ""
    assert "busy" in scene.checks(2 * CHECK, cpu=1.0)
    scene = Scene(busy=LONG_WORK)
    scene.beats()
    assert "waiting" in scene.checks(SILENCE + CHECK)


def test_one_that_gets_no_processor_is_late_not_hung(scene: Scene) -> None:
    scene.beats()
    scene.doing = Activity("R", 50.0)
    assert scene.checks(20, cpu=0.005) == ""
    assert scene.watch.late
    scene.beats()
    assert not scene.watch.late


@pytest.mark.parametrize("state", ["D", "t"])
def test_one_that_waits_in_the_kernel_or_is_traced_is_late_not_hung(scene: Scene, state: str) -> None:
    scene.beats()
    scene.doing = Activity(state, 0.0)
    assert scene.checks(20) == ""
    assert scene.watch.late


def test_a_pause_of_the_supervisor_is_no_silence(scene: Scene) -> None:
    scene.beats()
    scene.now += 3600
    assert scene.checks(2 * CHECK) == ""
    scene.beats()
    assert scene.checks(SILENCE - CHECK) == ""


def test_a_start_takes_its_time(scene: Scene) -> None:
    assert scene.checks(START - CHECK, cpu=1.0) == ""
    assert scene.checks(2 * CHECK, cpu=1.0) != ""


CHILD = """
import sys, time
from mrelay.pulse import Pulse
pulse = Pulse(int(sys.argv[1]))
for _ in range(3):
    pulse.beat()
print("beats", flush=True)
{then}
"""


@contextmanager
def child(then: str) -> Iterator[tuple[subprocess.Popen[bytes], Watch]]:
    """A process that beats, and then does `then`; and its watch."""
    memory = shared_memory("pulse", mmap.PAGESIZE)
    command = [sys.executable, "-c", CHILD.format(then=then), str(memory)]
    with subprocess.Popen(command, pass_fds=[memory], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process, Watch(process.pid, memory, time.monotonic())
        process.kill()
    os.close(memory)


def verdict(watch: Watch) -> str:
    """What the watch says of a process that does not beat, once the checks are made; by their own time."""
    now, deadline = time.monotonic(), time.monotonic() + 20
    assert watch.check(now) == ""
    while time.monotonic() < deadline:
        time.sleep(0.1)  # processor time is to be seen to pass, or not
        now += CHECK
        if said := watch.check(now):
            return said
    return "nothing"


@pytest.mark.parametrize(
    ("then", "said"),
    [("time.sleep(60)", "waiting for something"), ("while True: pass", "busy")],
    ids=["deadlock", "busy-loop"],
)
def test_real_hangs(then: str, said: str) -> None:
    with child(then) as (_, watch):
        assert said in verdict(watch)


def test_a_real_stop() -> None:
    with child("time.sleep(60)") as (process, watch):
        process.send_signal(signal.SIGSTOP)
        assert "stopped" in verdict(watch)


def test_activity_is_of_the_right_process() -> None:
    assert activity(os.getpid()).state == "R"
    assert abs(activity(os.getpid()).cpu - time.process_time()) < 1.0


def test_the_pulse_cannot_be_cut_off() -> None:
    """A child that was taken over must not make the supervisor, or anything that maps it, fault."""
    memory = shared_memory("pulse", mmap.PAGESIZE)
    with pytest.raises(PermissionError):
        os.ftruncate(memory, 0)
    os.close(memory)
