"""What to do about an end or a hang: start again, how soon and how often.

Owns `Keeper`, the supervisor's loop reduced to checking, starting and cleaning up the product's children. Called
by poc_supervisor_failure_handling; every function blocks for the seconds that it watches, or until all
children are up again.
"""

import contextlib
import os
import resource
import select
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from unittest import mock

from mrelay.supervisor import backoff
from mrelay.supervisor.watch import CHECK, SILENCE, Watch
from processes import IN_TIME, READY, Trial, open_descriptors, readable, running

DELAYS: Final = backoff._DELAYS
SCALED: Final = tuple(min(delay * 0.1, 0.5) for delay in DELAYS)  # whole seconds would only be waited out
AT_ONCE: Final = (0.0,) * len(DELAYS)
_LONGEST: Final = 2.0  # seconds; longer than any delay of SCALED and a slow start


class Keeper:
    """Starts what is due, ends what hangs, and cleans up what ended, as the supervisor does.

    `ups` counts children that settled; `said`: what each child's checks had to say.
    """

    def __init__(self, trials: Sequence[Trial], give_up_after: int | None = None) -> None:
        self.trials, self._most = trials, give_up_after
        self.ups = self.starts = self.failed_starts = 0
        self.said: dict[Trial, str] = dict.fromkeys(trials, "")
        self._next_check = 0.0

    def turn(self, until: float) -> None:
        """One wait, `until` then at most, and what it brings."""
        now = time.monotonic()
        self._check(now)
        for trial in self._due():
            if trial.due is not None and trial.due <= now:
                self._act(trial)
        due = [trial.due for trial in self._due() if trial.due is not None]
        fds = {trial.pidfd: trial for trial in self.trials if trial.process is not None}
        fds |= {trial.channel.fileno(): trial for trial in self.trials if trial.channel is not None}
        wait = max(0.0, min([until, self._next_check, *due]) - time.monotonic())
        for fd in select.select(list(fds), [], [], wait)[0]:
            trial = fds[fd]
            if fd == trial.pidfd:
                trial.ended()
            elif trial.channel is not None:
                self._read(trial)

    def _due(self) -> list[Trial]:
        return [trial for trial in self.trials if self._most is None or trial.restarts < self._most]

    def _check(self, now: float) -> None:
        if now >= self._next_check:
            self._next_check = now + CHECK  # never several at once to catch up
            for trial in self.trials:
                self.said[trial] = trial.check(now) or self.said[trial]

    def _act(self, trial: Trial) -> None:
        if trial.process is not None:
            trial.kill()  # it lost its channel, and goes on
            return
        try:
            trial.start()
            self.starts += 1
        except OSError as error:
            self.failed_starts += 1
            trial.failed(str(error))

    def _read(self, trial: Trial) -> None:
        data = trial.answer()
        self.ups += data == READY
        if not data:
            trial.hung_up()

    def put_away(self) -> None:
        for trial in self.trials:
            trial.put_away()


# ---- a crash loop -------------------------------------------------------------------------------


def delays_asked_for(ends: int) -> tuple[list[float], list[str], float]:
    """The product's delays after so many early ends in a row, its words about them, and the delay after a life."""
    trial, delays, troubles = Trial("crash=3"), [], []
    for number in range(ends + 1):
        trial.start()
        readable([trial.pidfd])
        if number == ends:
            trial.works()
            trial._works_since = time.monotonic() - 10
        trial.ended()
        delays.append(round(trial.delay, 1))
        troubles.append(trial.trouble)
    return delays[:-1], troubles[:-1], delays[-1]


class Loop(NamedTuple):
    """A child that crashes at each start until the cause is gone: how often, at what cost, and when it is back."""

    policy: str
    starts: int
    seconds: float  # that the cause lasted
    cpu: float  # seconds, meanwhile
    back: float | None  # seconds from the cause's end to the child's readiness; None: not in the time watched


def crash_loop(
    policy: str,
    delays: tuple[float, ...],
    *,
    starts: int = 0,
    seconds: float = 0.0,
    give_up_after: int | None = None,
) -> Loop:
    """Let it crash for so many starts or seconds, then remove the cause and wait longer than the longest delay."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(backoff, "_DELAYS", delays):
        cause = Path(folder, "cause")
        cause.touch()
        trial = Trial(f"crash-while={cause}")
        keeper = Keeper([trial], give_up_after)
        try:
            before, begun = _children_cpu(), time.monotonic()
            while (now := time.monotonic()) < begun + seconds or trial.restarts < starts:
                keeper.turn(max(begun + seconds, now + CHECK))
            lasted, cpu, made = now - begun, _children_cpu() - before, keeper.starts
            cause.unlink()
            cured = time.monotonic()
            while not keeper.ups and time.monotonic() < cured + _LONGEST:
                keeper.turn(cured + _LONGEST)
            return Loop(policy, made, lasted, cpu, time.monotonic() - cured if keeper.ups else None)
        finally:
            keeper.put_away()


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def failing_starts(count: int, spare: int = 0) -> tuple[int, int]:
    """(starts that failed with only so many descriptors to be had, descriptors lost); then one that does not."""
    keeper = Keeper([Trial()])
    before, limits = open_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_next_descriptor() + spare, limits[1]))
    deadline = time.monotonic() + IN_TIME
    try:
        while keeper.failed_starts < count and time.monotonic() < deadline:
            keeper.turn(deadline)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        lost = open_descriptors() - before
        while not keeper.ups and time.monotonic() < deadline:
            keeper.turn(deadline)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        keeper.put_away()
    return keeper.failed_starts, lost


def _next_descriptor() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


# ---- several that fail and hang at once -----------------------------------------------------------


class Healed(NamedTuple):
    """Children that failed in different ways at the same moment: which were replaced, what was said of each."""

    replaced: dict[str, bool]
    said: dict[str, str]
    seconds: float  # until all that failed were new; 0 when they were not


_INJURIES: Final[dict[str, Callable[[Trial], None]]] = {
    "busy loop": lambda trial: trial.say("spin"),
    "blocked": lambda trial: trial.say("block"),
    "thread beats": lambda trial: trial.say("lie"),
    "stopped": lambda trial: trial.send_signal(signal.SIGSTOP),
    "killed": lambda trial: trial.send_signal(signal.SIGKILL),
}
HEALTHY: Final = ("starved", "at rest")
# A busy child is judged by its processor time, of which it may get little.
_PATIENCE: Final = 20 * SILENCE  # seconds
_WITHOUT: Final = 5 * SILENCE  # seconds, where what is waited for won't come


def heal_all(core: int, *, from_thread: bool, by_silence_alone: bool) -> Healed:
    """Injure five children at once, starve one on `core`, leave one at rest; supervise them as the product does.

    `from_thread`: the pulse is also raised by a thread that does not hang. `by_silence_alone`: the judge does not
    look at what a silent child is doing.
    """
    trials = {name: Trial("careless" if from_thread else "plain") for name in _INJURIES}
    trials |= {"starved": Trial(core=core), "at rest": Trial()}
    victim, took = trials["starved"], 0.0
    patience = _WITHOUT if from_thread or by_silence_alone else _PATIENCE
    with running(list(trials.values())), _judge(by_silence_alone):
        first = {name: trial.pid for name, trial in trials.items()}
        for name, injure in _INJURIES.items():
            injure(trials[name])
        keeper, start = Keeper(list(trials.values())), time.monotonic()
        with _starving(core, victim):
            while (now := time.monotonic()) < start + patience and not (took and keeper.said[victim]):
                keeper.turn(now + CHECK)
                took = took or (now - start if keeper.ups == len(_INJURIES) else 0.0)
        replaced = {name: trial.pid != first[name] for name, trial in trials.items()}
        said = {name: keeper.said[trial] for name, trial in trials.items()}
    return Healed(replaced, said, took)


@contextlib.contextmanager
def _starving(core: int, victim: Trial) -> Iterator[None]:
    """Give `victim` work for 100 ms, and its core to others that are so much more important that it gets none.

    They end first: a child that gets no processor time can't even be killed.
    """
    with running([Trial(core=core) for _ in range(4)]) as hogs:
        os.sched_setscheduler(victim.pid, os.SCHED_IDLE, os.sched_param(0))
        for hog in hogs:
            os.setpriority(os.PRIO_PROCESS, hog.pid, -20)
            hog.say("spin")
        victim.say("toil 100")
        yield


@contextlib.contextmanager
def _judge(by_silence_alone: bool) -> Iterator[None]:
    def silent(watch: Watch) -> str:
        return "silent" if watch._silent >= SILENCE else ""

    with mock.patch.object(Watch, "_judge", silent) if by_silence_alone else contextlib.nullcontext():
        yield
