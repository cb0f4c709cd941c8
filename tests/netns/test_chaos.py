"""Sixty thousand datagrams a second while control and a worker are killed and stopped fifty times.

Streams of the worker that is left alone must lose nothing; at the end the counters add up, nothing has leaked,
and everything forwards. MRELAY_SEED repeats a run (the seed is printed), MRELAY_KILLS makes it longer.
"""

import contextlib
import multiprocessing
import os
import random
import select
import signal
import socket
import statistics
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Self

import pytest

from netns.lab import Lab, Namespace, Star, eventually
from netns.relay import Relay, rule
from netns.test_workers import core_list
from netns.traffic import Receiver, Sender

pytestmark = [pytest.mark.netns, pytest.mark.timeout(600)]
KILLS: Final = int(os.environ.get("MRELAY_KILLS") or 50)
RATE: Final = 60_000  # datagrams a second, over all flows
BURST: Final = 15  # datagrams a flow sends at once
SIZE: Final = 100  # bytes of payload
PORT, OUT_PORT = 5000, 6000
ROLES: Final = ("control", "worker")
AT_ONCE: Final = 3  # early ends in a row after which the next start is still at once or soon (supervisor.backoff)
WHILE: Final = 1.0  # seconds of work after which an end is not early
SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
GROUPS: Final = [f"239.1.1.{n}" for n in range(1, 33)]


class Load(threading.Thread):
    """Numbered datagrams to each group in turn, in bursts, until told to stop. `sent`: how many, by group."""

    def __init__(self, sender: Sender, groups: list[str]) -> None:
        super().__init__(daemon=True)
        self.sender, self.sent = sender, dict.fromkeys(groups, 0)
        self.stopped = threading.Event()

    def run(self) -> None:
        start, bursts, pause = time.monotonic(), 0, BURST * len(self.sent) / RATE
        filler = bytes(SIZE - 4)
        while not self.stopped.wait(max(0.0, start + bursts * pause - time.monotonic())):
            for group, first in self.sent.items():
                numbered = [struct.pack(">I", n) + filler for n in range(first, first + BURST)]
                self.sender.send_segmented(group, PORT, numbered)
                self.sent[group] = first + BURST
            bursts += 1


def listen(sink: Namespace, group: str) -> socket.socket:
    """A receiver of this group alone, with room for seconds of it."""
    with sink.inside():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        index = socket.if_nametoindex("k0")
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    sock.bind((group, OUT_PORT))
    joined = struct.pack("=4s4si", socket.inet_aton(group), b"", index)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, joined)
    return sock


def read_numbers(socks: dict[str, socket.socket], stop: Connection) -> None:
    """In a process of its own: every number that arrives, by group; the answer once `stop` has spoken."""
    numbers: dict[str, list[int]] = {group: [] for group in socks}
    watched: list[Any] = [*socks.values(), stop]
    while True:
        ready = select.select(watched, [], [])[0]
        for group, sock in socks.items():
            with contextlib.suppress(BlockingIOError):
                while sock in ready:
                    numbers[group] += struct.unpack_from(">I", sock.recv(SIZE))
        if ready == [stop]:
            stop.send(numbers)
            return


class Applications:
    """What receives at the sink. A context manager; `numbers` ends them."""

    def __init__(self, sink: Namespace, groups: Iterable[str]) -> None:
        socks = {group: listen(sink, group) for group in groups}
        self._ours, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=read_numbers, args=(socks, theirs), daemon=True)
        self._process.start()
        for sock in socks.values():
            sock.close()

    def numbers(self) -> dict[str, list[int]]:
        self._ours.send(None)
        found: dict[str, list[int]] = self._ours.recv()
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def groups_by_worker(relay: Relay, sender: Sender) -> dict[int, list[str]]:
    """Which worker has which group's flow: one datagram to each shows it."""
    for group in GROUPS:
        sender.send(group, PORT, [bytes(SIZE)])
    relay.await_received(len(GROUPS))
    found: dict[int, list[str]] = {0: [], 1: []}
    for flow in relay.flows():
        found[flow["worker"]].append(flow["group"])
    return found


def family(relay: Relay) -> dict[str, int]:
    """Descriptors of each process that serves, and how many processes there are (one is a spare worker)."""
    pids = {role: relay.role(role)[0] for role in ("supervisor", "control")}
    pids |= {f"worker {worker['worker']}": worker["pid"] for worker in relay.workers()}
    found = {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()}
    return {**found, "processes": len(relay.family())}


def memory(relay: Relay) -> int:
    """Proportional set size of all processes, kB."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in relay.family()]
    return sum(int(text.partition("\nPss:")[2].split()[0]) for text in texts)


def joined(star: Star) -> set[str]:
    return star.relay.groups("in0")


class Chaos:
    """Kills and stops control and worker 0 at random, and adds and removes rules meanwhile.

    A role that ended early several times in a row is left alone until it has worked for a while: it would be
    started after longer and longer pauses, which are test_failures' subject and the whole time of this test.
    """

    def __init__(self, relay: Relay, rng: random.Random) -> None:
        self.relay, self.rng = relay, rng
        self.done: Counter[str] = Counter()
        self.recovery: dict[str, list[float]] = {"killed": [], "stopped": []}
        self.began = dict.fromkeys(ROLES, 0.0)
        self.early = dict.fromkeys(ROLES, 0)

    def strike(self) -> None:
        """One blow; returns when what was struck runs again."""
        role = self.rng.choice(eventually(self._to_strike, "one that may be struck"))
        number, what = self.rng.choice([(signal.SIGKILL, "killed")] * 3 + [(signal.SIGSTOP, "stopped")])
        pid = self._pid(role)
        start = time.monotonic()
        self.early[role] = 0 if start > self.began[role] + WHILE else self.early[role] + 1
        os.kill(pid, number)
        self.done[f"{role} {what}"] += 1
        eventually(lambda: not alive(pid), f"{role} {what} is gone", 30)
        eventually(lambda: self._answers(role, pid), f"{role} is back after it was {what}", 60)
        self.began[role] = time.monotonic()
        self.recovery[what].append(self.began[role] - start)
        self._change_rules()

    def _to_strike(self) -> list[str]:
        now = time.monotonic()
        return [r for r in ROLES if self.early[r] < AT_ONCE or now > self.began[r] + WHILE]

    def _pid(self, role: str) -> int:
        if role == "control":
            return self.relay.role("control")[0]
        pid: int = next(worker["pid"] for worker in self.relay.workers() if worker["worker"] == 0)
        return pid

    def _answers(self, role: str, old: int) -> bool:
        try:
            workers = self.relay.workers()
        except OSError:  # control is on its way
            return False
        good = all(worker["state"] == "running" and worker["pid"] for worker in workers)
        return good and (role == "control" or workers[0]["pid"] != old)

    def _change_rules(self) -> None:
        name = f"other-{self.rng.randrange(5)}"
        if name in self.relay.rules():
            self.relay.remove_rule(name)
        else:
            self.relay.add_rule(name, f"in0:239.9.9.{self.rng.randrange(1, 250)}:5000", "out0:*:*")


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists()


def missing(numbers: list[int], sent: int) -> int:
    """How many of 0 … sent - 1 did not arrive."""
    return sent - len(set(numbers))


def test_fifty_kills_at_sixty_thousand_a_second(lab: Lab, figures: Callable[[str], None]) -> None:
    seed = int(os.environ.get("MRELAY_SEED") or random.randrange(2**32))
    star = lab.star()
    config = rule("all", f"in0:239.1.1.0/24:{PORT}", f"out0:*:{OUT_PORT}")
    arguments = ["--workers", core_list()]
    with Sender(star.source) as sender, Relay(star.relay, config, arguments=arguments) as relay:
        owned = groups_by_worker(relay, sender)
        struck, spared = owned[0][:2], owned[1][:2]
        assert len(struck) == len(spared) == 2, "32 flows, two workers"
        with Applications(star.sink, [*struck, *spared]) as applications:
            eventually(lambda: len(relay.role("worker")) == 3, "two workers and a spare one")
            eventually(lambda: relay.taps() == 2, "control listens to memberships, in two families")
            before, memberships, size = family(relay), joined(star), memory(relay)
            load = Load(sender, [*struck, *spared])
            chaos = Chaos(relay, random.Random(seed))
            start = time.monotonic()
            load.start()
            for _ in range(KILLS):
                chaos.strike()
            for name in [name for name in relay.rules() if name.startswith("other")]:
                relay.remove_rule(name)
            load.stopped.set()
            load.join()
            took = time.monotonic() - start
            total = sum(load.sent.values()) + len(GROUPS)
            settled = lambda s: s["received"] == s["matched"] + sum(s["drops"].values()) >= total - 1  # noqa: E731
            stats = relay.await_stats(settled, f"all {total} are accounted for")
            numbers = applications.numbers()
        lost = {group: missing(numbers[group], load.sent[group]) for group in numbers}
        doubled = {group: len(numbers[group]) - len(set(numbers[group])) for group in numbers}
        figures(f"seed {seed}: {dict(chaos.done)} in {took:.0f} s at {total / took:.0f} datagrams/s")
        for what, times in chaos.recovery.items():
            if times:
                figures(f"{what}: all running again after {statistics.median(times) * 1000:.0f} ms (median)")
        for name, groups in (("struck", struck), ("other", spared)):
            counts = [sum(of[group] for group in groups) for of in (lost, doubled, load.sent)]
            figures("the {} worker's streams: {} lost, {} twice of {}".format(name, *counts))
        drops = {reason: number for reason, number in stats["drops"].items() if number}
        figures(f"drops {drops or 'none'}; memory {size} -> {memory(relay)} kB")
        assert [lost[group] + doubled[group] for group in spared] == [0, 0]
        assert [numbers[group] == sorted(numbers[group]) for group in spared] == [True, True]
        assert joined(star) == memberships, "no membership leaked or lost"
        eventually(lambda: family(relay) == before, f"processes and descriptors as before, {before}")
        assert memory(relay) < size * 1.3
        with Receiver(star.sink, "k0", OUT_PORT, *struck) as receiver:
            sender.send(struck[0], PORT, [b"and on it goes"])
            assert receiver.receive(1) == [b"and on it goes"]
