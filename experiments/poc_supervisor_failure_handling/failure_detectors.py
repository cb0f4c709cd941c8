"""Every way to notice that a child failed, all watching the same children at the same time.

Owns the strategies, the failures and which strategy is expected to see which. Called by
poc_supervisor_failure_handling; `observe` blocks for some half a second.
"""

import contextlib
import os
import random
import selectors
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from mrelay.messages import Sync
from mrelay.wire import encode
from processes import BEATS, LOOPS, Trial, running, shared_words

INTERVAL: Final = 0.05  # seconds between checks, and between beats
_ROUNDS: Final = 5
MISSED: Final = 4  # checks without a sign of life that are a failure
_PIDFD: Final = "pidfd"  # readable at the child's end
_SIGCHLD: Final = "CHLD"  # SIGCHLD, for ends and for stops
_EOF: Final = "EOF"  # of the channel
_WAITPID: Final = "wait"  # without waiting, at each check
_MESSAGE: Final = "says"  # the child says "beat", by a timer
_COUNTER: Final = "beats"  # the child counts beats in shared memory, by a timer
_ASK: Final = "answers"  # asked at each check, it answers
_LOOK: Final = "turns"  # asked at each check, its loop counts a turn in shared memory
_ODD: Final = "odd"  # never asked: that counter is odd, which means at work, and stands still
STRATEGIES: Final = (_PIDFD, _SIGCHLD, _EOF, _WAITPID, _MESSAGE, _COUNTER, _ASK, _LOOK, _ODD)
EVENTS: Final = (_PIDFD, _SIGCHLD, _EOF)
BUILT: Final = (_PIDFD, _EOF)  # the events that the product's supervisor listens to
PULSE: Final = _LOOK  # that the loop itself turns is what the product's pulse says

_BEATS: Final = {_MESSAGE, _COUNTER, _ASK, _LOOK}
_FAILURES: Final[dict[str, tuple[Callable[[Trial], None], set[str], set[str]]]] = {
    # how, which strategies see it, which may or may not (it depends on where in its loop the child is)
    "exits": (lambda t: t.say("exit 3"), set(STRATEGIES), set()),
    "killed": (lambda t: t.send_signal(signal.SIGKILL), set(STRATEGIES) - {_ODD}, {_ODD}),
    "stopped": (lambda t: t.send_signal(signal.SIGSTOP), {_SIGCHLD, *_BEATS}, {_ODD}),
    "blocked": (lambda t: t.say("block"), {*_BEATS, _ODD}, set()),
    "thread beats": (lambda t: t.say("lie"), {_ASK, _LOOK, _ODD}, set()),
    "channel lost": (lambda t: t.say("close"), {_EOF, _MESSAGE, _ASK}, set()),
    "heir holds it": (lambda t: t.say("leave"), set(STRATEGIES) - {_EOF}, set()),
    "busy loop": (lambda t: t.say("spin"), {*_BEATS, _ODD}, set()),
}
FAILURES: Final = tuple(_FAILURES)
Seen = dict[str, float]  # strategy: seconds from the failure


def observe(failures: Sequence[str]) -> dict[str, Seen]:
    """Let one child fail in each of these ways, one soon after the other, and see who notices.

    A round in which we ourselves were kept from running says nothing, and is done again.
    """
    for _ in range(_ROUNDS):
        seen, disturbed = _observe(failures)
        if not disturbed:
            break
    return seen


def _observe(failures: Sequence[str]) -> tuple[dict[str, Seen], bool]:
    trials = [Trial(f"beat={INTERVAL * 1000:.0f}") for _ in failures]
    with running(trials), _Watch(trials) as watch:
        watch.run(2 * INTERVAL)
        for failure, detectors in zip(failures, watch.children, strict=True):
            watch.run(random.random() * INTERVAL)  # anywhere between two checks
            detectors.failed_at = time.monotonic()
            _FAILURES[failure][0](detectors.trial)
        watch.run((MISSED + 1.6) * INTERVAL)
        return {f: detectors.seen for f, detectors in zip(failures, watch.children, strict=True)}, watch.disturbed


def as_expected(failure: str, seen: Seen) -> bool:
    """Whether those strategies saw it that can, and no others."""
    _, certain, possible = _FAILURES[failure]
    return certain <= seen.keys() <= certain | possible


class _Watch:
    """One loop for all children: their events, SIGCHLD, and a check of each at every interval."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._signalled = socket.socketpair()
        for sock in (self._wakeup, self._signalled):
            sock.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_signal)
        self.children = [_Detectors(trial, self._selector) for trial in trials]
        self._due = time.monotonic() + INTERVAL
        self.disturbed = False

    def __enter__(self) -> "_Watch":
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        self._handler = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, self._handler)
        self._selector.close()
        for sock in (self._wakeup, self._signalled):
            sock.close()

    def run(self, seconds: float) -> None:
        """Take what comes, and check at each interval."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            if now >= self._due:
                self.disturbed |= now > self._due + INTERVAL
                self._due = now + INTERVAL  # checks that catch up would find five misses after one pause of ours
                for detectors in self.children:
                    detectors.check()
            for key, _ in self._selector.select(max(0.0, min(self._due, end) - time.monotonic())):
                key.data()

    def _on_signal(self) -> None:
        self._wakeup.recv(64)
        for detectors in self.children:
            detectors.on_sigchld()


class _Detectors:
    """All strategies on one child. `seen`: when each noticed, in seconds after `failed_at`."""

    def __init__(self, trial: Trial, selector: selectors.BaseSelector) -> None:
        assert trial.channel is not None
        self.trial, self._channel, self._selector = trial, trial.channel.sock, selector
        self.seen: Seen = {}
        self.failed_at = time.monotonic()
        fd, self._words = shared_words()
        trial.say("memory", (fd,))
        os.close(fd)
        selector.register(trial.pidfd, selectors.EVENT_READ, self._on_pidfd)
        selector.register(self._channel, selectors.EVENT_READ, self._on_channel)
        self._missed = dict.fromkeys((*_BEATS, _ODD), 0)
        self._alive: set[str] = set()  # which signs of life came since the last check
        self._before = (0, 0)

    def _note(self, strategy: str) -> None:
        self.seen.setdefault(strategy, time.monotonic() - self.failed_at)

    def _on_pidfd(self) -> None:
        self._note(_PIDFD)
        self._selector.unregister(self.trial.pidfd)

    def on_sigchld(self) -> None:
        """The signal says that some child ended or stopped: this one?"""
        kinds = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        if os.waitid(os.P_PIDFD, self.trial.pidfd, kinds):
            self._note(_SIGCHLD)

    def _on_channel(self) -> None:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = self._channel.recv(4096)
        if not data:
            self._note(_EOF)
            self._selector.unregister(self._channel)
            return
        self._alive.add(_MESSAGE if data == b"beat" else _ASK)

    def check(self) -> None:
        """Whether this child showed a sign of life since the last time, by each strategy that looks for one."""
        if os.waitid(os.P_PIDFD, self.trial.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._note(_WAITPID)
        beats, loops = self._words[BEATS], self._words[LOOPS]
        if beats != self._before[0]:
            self._alive.add(_COUNTER)
        if loops != self._before[1]:
            self._alive |= {_LOOK, _ODD}
        if loops % 2 == 0:
            self._alive.add(_ODD)
        for strategy, missed in self._missed.items():
            self._missed[strategy] = 0 if strategy in self._alive else missed + 1
            if self._missed[strategy] >= MISSED:
                self._note(strategy)
        self._before, self._alive = (beats, loops), set()
        with contextlib.suppress(OSError):
            self._channel.send(encode(Sync(1)), socket.MSG_NOSIGNAL)
