"""The state that the parent keeps for its workers, and hands to each new one.

Owns `Master`: rules by slot and one socket, and what a worker was told of them. Called by
poc_supervisor_lifecycle; blocks for a worker's answers, IN_TIME at most.
"""

import random
import socket
import time
from typing import Final, NamedTuple

from mrelay.messages import Commit, Committed, DropRules, Granted, Message, OpenEgress, PutRule, PutRules
from mrelay.wire import Channel, decode, encode
from processes import Trial, cookie, digest, rule, running

_OUTPUT: Final = 3
_EGRESS: Final = OpenEgress(_OUTPUT, 1, socket.AF_INET, None, None, "egress", 0)


class Master:
    """The authority: `rules` and the socket are right whatever became of a worker. Owns its socket.

    `whole`: a new worker is told everything, instead of what changed since somebody was last told.
    """

    def __init__(self, *, whole: bool) -> None:
        self.rules: dict[int, PutRule] = {}
        self._told: dict[int, PutRule] = {}
        self._whole, self._fresh = whole, True
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))

    def __enter__(self) -> "Master":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def digest(self) -> bytes:
        return digest(self.rules, {_OUTPUT: cookie(self._socket)})

    def change(self, chance: random.Random, count: int, slots: int) -> None:
        """Add, replace and remove some rules."""
        for _ in range(count):
            slot = chance.randrange(slots)
            if slot in self.rules and chance.random() < 0.3:
                del self.rules[slot]
            else:
                self.rules[slot] = rule(slot, chance.randrange(1000))

    def begin(self, worker: Trial) -> None:
        """A new worker: its socket, and that nothing was told it yet."""
        self._fresh = True
        if self._whole:
            self._told = {}
        worker.tell(Granted((_EGRESS,), used=worker.restarts > 0), [self._socket.fileno()])

    def tell(self, worker: Trial, share: float = 1.0) -> None:
        """What it does not know, or a `share` of that; not in force yet."""
        gone: list[Message] = [DropRules((slot,)) for slot in self._told.keys() - self.rules.keys()]
        new = [PutRules((put,)) for slot, put in self.rules.items() if self._told.get(slot) != put]
        messages = [*gone, *new]
        for message in messages[: int(len(messages) * share)]:
            worker.tell(message)
        if share >= 1.0:
            self._told = dict(self.rules)

    def commit(self, worker: Trial) -> None:
        """What was told is in force when this returns."""
        worker.tell(Commit(1, whole=self._whole and self._fresh))
        self._fresh = False
        assert isinstance(decode(worker.answer()), Committed)

    def asked(self, worker: Trial) -> bytes:
        """What the worker's state comes to."""
        worker.say("digest")
        return worker.answer()


class Restarts(NamedTuple):
    """What became of the state over `kills` restarts, `cut` of which came in the middle of a change."""

    kills: int
    cut: int
    same: int  # new workers whose digest was the master's
    whole: int  # looks at a half-told change that showed the old state and nothing of the new


def restart_often(count: int, *, whole: bool) -> Restarts:
    """Change rules, kill the worker (each second time half-way through telling it), start it again, compare."""
    chance = random.Random(5)
    same = kept = cut = 0
    with Master(whole=whole) as master, running([Trial()]) as (worker,):
        master.change(chance, 200, 150)
        _hand_over(master, worker)
        for number in range(count):
            before = master.asked(worker)
            master.change(chance, 40, 150)
            if number % 2:
                master.tell(worker, 0.5)
                kept += master.asked(worker) == before
                cut += 1
            worker.put_away()
            worker.launch()
            _hand_over(master, worker)
            same += master.asked(worker) == master.digest
        return Restarts(count, cut, same, kept)


def _hand_over(master: Master, worker: Trial) -> None:
    master.begin(worker)
    master.tell(worker)
    master.commit(worker)


def time_hand_over(rules: int) -> float:
    """Seconds from the first message to a worker that runs already until all these rules are in force."""
    with Master(whole=True) as master, running([Trial()]) as (worker,):
        master.rules = {slot: rule(slot) for slot in range(rules)}
        start = time.perf_counter()
        _hand_over(master, worker)
        return time.perf_counter() - start


def room(*, forced: bool) -> int:
    """How many rules a channel takes before its reader has read one; `forced` as wire.Channel does it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        if forced:
            Channel(ours)
        ours.setblocking(False)
        data, count = encode(PutRules((rule(1),))), 0
        try:
            while True:
                ours.send(data)
                count += 1
        except BlockingIOError:
            return count
