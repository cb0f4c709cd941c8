"""A relay under mixed traffic and trouble for as long as one likes: does it stay as it was?

The command `python bench/soak.py [--help]`, as root, for `make soak`. In namespaces of its own a real relay gets
seven streams (small, large, fragmented, a prefix of groups, IPv6, one whose output's link flaps, one above its
rate) while rules come and go, the config is reloaded, and, in the first half, workers and control are killed.
Each process is sampled; soak_report.py judges and draws. Blocks until done. Exit code: 0 steady, 1 not.
"""

import argparse
import itertools
import json
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

HERE: Final = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from mrelay.traffic.account import StreamAccount  # noqa: E402  the paths above come first, for all of these
from netns.lab import SOURCE, SOURCE_6, Lab, Star  # noqa: E402
from netns.relay import Relay, rule  # noqa: E402
from netns.traffic import Receiver, Sender, number, payloads  # noqa: E402
from soak_report import Run, Sample, draw, verdicts  # noqa: E402

ROLES: Final = ("supervisor", "control", "worker")
TICK: Final = 0.01  # seconds between the sender's turns
QUIET: Final = 1.0  # seconds for what is under way to arrive
MANY: Final = tuple(f"239.1.8.{n}" for n in range(15))


@dataclass
class Stream:
    """One stream, in and out. `troubled` counts what was sent while its output's link was being struck."""

    name: str
    into: tuple[str, ...]
    out: tuple[str, ...]
    port: int
    rate: int
    size: int
    sink: str = "k0"
    limit: str = ""
    sent: int = 0
    troubled: int = 0
    account: StreamAccount = field(default_factory=StreamAccount)

    def rule(self) -> str:
        """The rule that relays it."""
        bracket = "[{}]" if self.v6 else "{}"
        wanted = "239.1.8.0/24" if len(self.into) > 1 else bracket.format(self.into[0])
        target = "*" if len(self.into) > 1 else bracket.format(self.out[0])
        options = {"rate": self.limit} if self.limit else {}
        where = f"out{self.sink[1:]}:{target}:{self.port + 1000}"
        return rule(self.name, f"in0:{wanted}:{self.port}", where, **options)

    @property
    def v6(self) -> bool:
        return ":" in self.into[0]


def streams() -> list[Stream]:
    """Fresh ones."""
    return [
        Stream("small", ("239.1.1.1",), ("239.2.2.1",), 5001, 300, 100),
        Stream("large", ("239.1.1.2",), ("239.2.2.2",), 5002, 200, 1400),
        Stream("fragments", ("239.1.1.3",), ("239.2.2.3",), 5003, 10, 4000),
        Stream("many", MANY, MANY, 5004, 150, 200),
        Stream("six", ("ff3e::1",), ("ff3e::2",), 5005, 100, 300),
        Stream("struck", ("239.1.1.5",), ("239.2.2.5",), 5006, 100, 300, sink="k1"),
        Stream("limited", ("239.1.1.6",), ("239.2.2.6",), 5007, 200, 100, limit="100pps"),
    ]


class Traffic:
    """All streams, from a thread that sends and one that receives, until stopped."""

    def __init__(self, star: Star, wanted: Sequence[Stream], stack: ExitStack) -> None:
        self.streams, self.stopped, self.struck = wanted, threading.Event(), False
        self._senders = {
            v6: stack.enter_context(Sender(star.source, a)) for v6, a in ((False, SOURCE), (True, SOURCE_6))
        }
        self._selector = selectors.DefaultSelector()
        for one in wanted:
            receiver = stack.enter_context(Receiver(star.sink, one.sink, one.port + 1000, *one.out, v6=one.v6))
            receiver.sock.setblocking(False)
            self._selector.register(receiver.sock, selectors.EVENT_READ, one)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        self._done = threading.Event()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more is sent; what is under way arrives."""
        self.stopped.set()
        self._threads[0].join()
        time.sleep(QUIET)
        self._done.set()
        self._threads[1].join()
        self._selector.close()

    def _send(self) -> None:
        start = time.monotonic()
        while not self.stopped.wait(TICK):
            for one in self.streams:
                due = int((time.monotonic() - start) * one.rate) - one.sent
                for payload in payloads(due, one.size, first=one.sent):
                    group = one.into[one.sent % len(one.into)]
                    self._senders[one.v6].send(group, one.port, [payload])
                    one.sent += 1
                    one.troubled += self.struck and one.sink != "k0"

    def _receive(self) -> None:
        while not self._done.is_set():
            for key, _ in self._selector.select(0.1):
                got = [number(payload) for payload in _waiting(key.fileobj)]
                key.data.account.add(np.array(got, np.int64))


def _waiting(sock: Any) -> Iterator[bytes]:
    try:
        while True:
            yield sock.recv(65536)
    except BlockingIOError:
        return


class Trouble:
    """What happens to the relay, one thing at a time, in turn; `done` has (seconds since the start, what)."""

    def __init__(self, relay: Relay, star: Star, traffic: Traffic, config: str, start: float) -> None:
        self.relay, self.star, self.traffic, self.config = relay, star, traffic, config
        self.done: list[tuple[float, str]] = []
        self._start, self._count = start, itertools.count()
        self._gentle: list[Callable[[], None]] = [self.rules, self.flap, self.reload]
        self._all = [*self._gentle, self.kill_worker, *self._gentle, self.kill_control]

    def next(self, *, kill: bool) -> None:
        """The next thing; without `kill` no process dies."""
        what = (self._all if kill else self._gentle)[next(self._count) % len(self._all if kill else self._gentle)]
        self.done.append((time.monotonic() - self._start, what.__name__))
        what()

    def rules(self) -> None:
        for n in range(20):
            self.relay.add_rule(f"extra-{n}", f"in0:239.3.0.{n}:5000", "out0:*:*", "out1:239.4.0.1:7000")
        for n in range(20):
            self.relay.remove_rule(f"extra-{n}")

    def flap(self) -> None:
        self.traffic.struck = True
        self.star.relay.ip("link set out1 down", "link set out1 up")
        self.relay.await_rule("struck", "up")
        self.traffic.struck = False

    def reload(self) -> None:
        self._read_again(self.config + rule("filed", "in0:239.3.1.1:5000", "out0:*:*"))
        _until(lambda: "filed" in self.relay.rules(), "a rule from the reload")
        self._read_again(self.config)
        _until(lambda: "filed" not in self.relay.rules(), "a rule's end by the reload")

    def _read_again(self, config: str) -> None:
        self.relay.config.write_text(config)
        self.relay.signal(signal.SIGHUP)

    def kill_worker(self) -> None:
        self._kill("worker")
        _until(lambda: all(w["state"] == "running" for w in self.relay.workers()), "a new worker")

    def kill_control(self) -> None:
        self._kill("control")
        _until(lambda: bool(self.relay.get("/v1/health")["ready"]), "a new control")

    def _kill(self, role: str) -> None:
        (old, *_) = self.relay.role(role)
        os.kill(old, signal.SIGKILL)
        _until(lambda: bool(self.relay.role(role)) and old not in self.relay.role(role), f"{role}'s successor")


def _until(question: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """A control that is being replaced may break off an answer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if question():
                return
        except (ConnectionError, AssertionError):
            pass
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.05)


def sample(relay: Relay, start: float) -> list[Sample]:
    """Every process of the relay, as /proc has it."""
    found = []
    for role in ROLES:
        for pid in relay.role(role):
            try:
                found.append(Sample.of(role, pid, time.monotonic() - start))
            except (FileNotFoundError, ProcessLookupError):
                continue  # killed meanwhile
    return found


def soak(seconds: float, workers: str) -> Run:
    """Run it; what was seen."""
    wanted = streams()
    config = "".join(one.rule() for one in wanted)
    with Lab() as lab, ExitStack() as stack:
        star = lab.star(2)
        relay = stack.enter_context(Relay(star.relay, config, arguments=["--workers", workers]))
        for one in wanted:
            relay.await_rule(one.name, "up")
        traffic = Traffic(star, wanted, stack)
        traffic.start()
        start = time.monotonic()
        trouble = Trouble(relay, star, traffic, config, start)
        samples, every, pause = [], max(0.5, seconds / 600), max(1.0, min(10.0, seconds / 60))
        trouble_at = pause
        while (now := time.monotonic() - start) < seconds:
            samples += sample(relay, start)
            if now >= trouble_at:
                trouble.next(kill=now < seconds / 2)
                trouble_at = time.monotonic() - start + pause
            time.sleep(every)
        traffic.stop()
        samples += sample(relay, start)
        relay.check_counters()
        numbers = [
            {
                "name": one.name,
                "sent": one.sent,
                "received": one.account.received,
                "lost": one.sent - one.account.distinct,
                "duplicates": one.account.duplicates,
                "reordered": one.account.reordered,
                "sent_in_trouble": one.troubled,
            }
            for one in wanted
        ]
        return Run(seconds, samples, trouble.done, numbers, relay.stats(), relay.workers())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="A relay under mixed traffic and trouble.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--workers", default="2", help="as mrelay run --workers")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "local", help="folder for soak.json, soak.png"
    )
    options = parser.parse_args(arguments)
    run = soak(options.seconds, options.workers)
    judged = verdicts(run)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.json").write_text(json.dumps(run.as_json() | {"verdicts": judged}, indent=1) + "\n")
    draw(run, options.out / "soak.png")
    for verdict in judged:
        print(f"{'ok  ' if verdict['ok'] else 'FAIL'} {verdict['what']}: {verdict['found']}")
    print(f"{options.out}/soak.json, soak.png")
    return 0 if all(verdict["ok"] for verdict in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
