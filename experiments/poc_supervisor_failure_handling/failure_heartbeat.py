"""The heartbeat: what each kind costs, how long a healthy child is silent, and who judges it wrongly.

Owns the measurements and `ByClock`, the judge that is wrong; the right one is the product's supervisor.watch.
Called by poc_supervisor_failure_handling; every function blocks for the seconds it measures.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from mrelay.messages import Reload, Sync
from mrelay.pulse import SIZE
from mrelay.supervisor.children import shared_memory
from mrelay.supervisor.watch import CHECK, SILENCE, Watch
from mrelay.wire import encode
from processes import BEATS, LOOPS, Trial, cpu_seconds, give_memory, running

_BEAT: Final = 0.005  # seconds between beats while their cost is measured
_HOGS: Final = 4


# ---- what a beat costs --------------------------------------------------------------------------


class Cost(NamedTuple):
    """Microseconds of CPU for one beat and one look at it."""

    design: str
    child: float
    parent: float


_ASK: Final = encode(Sync(1))
_WAKE: Final = encode(Reload(""))  # a message that the child decodes and does not answer


def costs(beats: int) -> list[Cost]:
    """Each design, for a child with nothing else to do; the product's is the second."""
    beat = f"beat={_BEAT * 1000:.0f}"
    return [
        _cost("child's timer, message", beat, None, beats),
        _cost("child's timer, shared memory", f"{beat},silent", None, beats),
        _cost("asked each time, answers by message", "plain", _ASK, beats),
        _cost("loop's counter, asked when it stands still", "plain", _WAKE, beats, when_still=True),
    ]


def _cost(design: str, options: str, ask: bytes | None, beats: int, *, when_still: bool = False) -> Cost:
    with Trial(options) as trial:
        assert trial.channel is not None
        sock, words = trial.channel.sock, give_memory(trial)
        child, parent = cpu_seconds(trial.pid), time.thread_time()
        due, before = time.monotonic(), -1
        for _ in range(beats):
            due += _BEAT
            while (left := due - time.monotonic()) > 0:
                if select.select([sock], [], [], left)[0]:
                    sock.recv(4096)
            now = words[LOOPS] + words[BEATS]
            if ask is not None and (now == before or not when_still):
                sock.send(ask)
            before = now
        child, parent = cpu_seconds(trial.pid) - child, time.thread_time() - parent
        return Cost(design, child / beats * 1e6, parent / beats * 1e6)


def look_cost() -> float:
    """Microseconds that the product's judge takes for one look at a child that beats."""
    pulse = shared_memory("trial-pulse", SIZE)
    watch = Watch(os.getpid(), pulse, time.monotonic())
    rounds = 2_000
    start = time.thread_time()
    for number in range(rounds):
        os.pwrite(pulse, number.to_bytes(SIZE, "little"), 0)
        watch.check(time.monotonic())
    took = time.thread_time() - start
    os.close(pulse)
    return took / rounds * 1e6


# ---- how long a healthy child is silent -----------------------------------------------------------


def silences(core: int, seconds: float) -> dict[str, float]:
    """The longest wait for a healthy child's answer, in seconds, by what its core does besides."""
    result = {}
    for name, hogs, real_time in (("alone", 0, False), (f"{_HOGS} busy", _HOGS, False), ("real-time", 1, True)):
        with running([Trial(core=core)]) as (child,), _busy(core, hogs, real_time=real_time):
            result[name] = _silence(child, seconds if real_time else seconds / 3)
    return result


@contextlib.contextmanager
def _busy(core: int, count: int, *, real_time: bool) -> Iterator[None]:
    with running([Trial(core=core) for _ in range(count)]) as hogs:
        for hog in hogs:
            if real_time:
                os.sched_setscheduler(hog.pid, os.SCHED_FIFO, os.sched_param(1))
            hog.say("spin")
        yield


def _silence(child: Trial, seconds: float) -> float:
    assert child.channel is not None
    sock, end, longest = child.channel.sock, time.monotonic() + seconds, 0.0
    while (asked := time.monotonic()) < end:
        sock.send(_ASK)
        select.select([sock], [], [], max(0.0, end - asked))
        with contextlib.suppress(BlockingIOError):
            sock.recv(4096)
        longest = max(longest, time.monotonic() - asked)
        select.select([], [], [], 0.02)
    return longest


# ---- a pause of the whole machine -----------------------------------------------------------------


class Judge(Protocol):
    """Says why a child counts as hung, from looks at its pulse; empty while it does not."""

    def check(self, now: float) -> str: ...


class ByClock:
    """The obvious judge: too long since the pulse last moved."""

    def __init__(self, pulse: int, now: float) -> None:
        self._pulse, self._before, self._moved = pulse, b"", now

    def check(self, now: float) -> str:
        """As Watch.check."""
        beat = os.pread(self._pulse, SIZE, 0)
        if beat != self._before:
            self._before, self._moved = beat, now
        return f"silent for {now - self._moved:.1f} s" if now - self._moved > SILENCE else ""


def condemned_after_pause(judges: Sequence[Callable[[int, int, float], Judge]], children: int) -> list[int]:
    """How many healthy children each kind of judge takes for hung when everything stood still for a while.

    As when a virtual machine is moved, a laptop sleeps or a control group is frozen: they and their parent are
    not run, the clock goes on, and the parent looks before they have beaten again. A judge is made from (pid,
    pulse, now).
    """
    with running([Trial() for _ in range(children)]) as trials:
        made = [[make(trial.pid, trial.pulse, time.monotonic()) for trial in trials] for make in judges]
        condemned: list[set[int]] = [set() for _ in judges]
        for turn in range(3):
            for found, each in zip(condemned, made, strict=True):
                found |= {n for n, judge in enumerate(each) if judge.check(time.monotonic())}
            if turn == 0:
                _everybody(trials, signal.SIGSTOP)
                time.sleep(1.3 * SILENCE)  # nothing to await: not to be run at all is the point
            else:
                _everybody(trials, signal.SIGCONT)
                select.select([], [], [], CHECK)
        return [len(found) for found in condemned]


def _everybody(trials: Sequence[Trial], number: signal.Signals) -> None:
    for trial in trials:
        trial.send_signal(number)
