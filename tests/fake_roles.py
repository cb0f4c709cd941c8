"""A supervisor and workers for the control process's tests: real channels, no privilege, no network.

Both run in the test's own event loop, keep what they were told in `events`, in one order for all, and can be
told to refuse or to be silent.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from mrelay.control.channel import AsyncChannel
from mrelay.control.supervisor import Event, Supervisor
from mrelay.control.workers import Workers
from mrelay.counters import MATCHED, RECEIVED, Counters
from mrelay.counters_size import counters_size
from mrelay.messages import (
    Commit,
    Committed,
    Done,
    DropRules,
    Failed,
    Grant,
    Listen,
    Listening,
    LogLevel,
    Message,
    OpenTap,
    Outcome,
    PutMore,
    PutRule,
    PutRules,
    Ready,
    Refusal,
    Release,
    Resource,
    StartWorkers,
    Status,
    Sync,
    Synced,
    WorkerUp,
    joined,
)
from mrelay.model.ruleset import rules_digest
from mrelay.wire import BadMessage, Channel, channel_pair

FLOW_LIMIT = 64
Said = tuple[str, object]


@contextmanager
def deadline(seconds: float = 20) -> Iterator[None]:
    """A hung test fails here, with a stack of the place that hangs."""
    handle = asyncio.get_running_loop().call_later(seconds, _give_up, asyncio.current_task())
    yield
    handle.cancel()


def _give_up(task: "asyncio.Task[object] | None") -> None:
    if task is not None:
        task.cancel("too slow")


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something has come about."""
    while not condition():
        await asyncio.sleep(0)


@dataclass
class FakeWorker:
    """A worker: takes rules at Commit, answers unless `silent`."""

    number: int
    events: list[Said]
    rules: dict[int, PutRule] = field(default_factory=dict)
    incoming: dict[int, PutRule | None] = field(default_factory=dict)
    silent: bool = False
    generation: int = 0

    def __post_init__(self) -> None:
        self.memory = os.memfd_create("counters")
        os.ftruncate(self.memory, counters_size(FLOW_LIMIT))
        self.counters = Counters(self.memory, FLOW_LIMIT, write=True)

    def connect(self, restarts: int = 0) -> tuple[WorkerUp, list[int]]:
        """A new channel: the WorkerUp that tells of it, and its descriptors."""
        ours, theirs = channel_pair()
        self.channel = AsyncChannel(ours, self._receive, lambda _: None)
        self.rules, self.incoming, self.generation = {}, {}, 0
        up = WorkerUp(self.number, self.number, os.getpid(), restarts, FLOW_LIMIT)
        return up, [theirs.detach(), os.dup(self.memory), os.open("/proc/self/statm", os.O_RDONLY)]

    def count(self, packets: int) -> None:
        """Datagrams received and matched."""
        self.counters.totals[RECEIVED] += packets
        self.counters.totals[MATCHED] += packets

    def _receive(self, message: Message, fds: list[int]) -> None:
        assert not fds
        if isinstance(message, PutRules):
            self.incoming |= {rule.rule: rule for rule in message.what}
        elif isinstance(message, PutMore):
            rule = self.incoming[message.rule]
            assert rule is not None
            self.incoming[message.rule] = joined(rule, message)
        elif isinstance(message, DropRules):
            self.incoming |= dict.fromkeys(message.slots)
        elif isinstance(message, Commit):
            self._commit(message)
        elif isinstance(message, Sync):
            self._answer(Synced(message.id, self.generation, self.digest()))

    def _commit(self, message: Commit) -> None:
        if message.whole:
            self.rules = {}
        for slot, rule in self.incoming.items():
            self.rules.pop(slot, None)
            if rule is not None:
                self.rules[slot] = rule
        self.incoming, self.generation = {}, message.generation
        self.events.append(("commit", tuple(sorted(self.rules))))
        self._answer(Committed(message.generation, "io_uring", self.digest()))

    def digest(self) -> int:
        """As a worker takes it of the rules that it really has."""
        return rules_digest(self.rules.values())

    def _answer(self, message: Message) -> None:
        if not self.silent:
            self.channel.send(message)


@dataclass
class FakeSupervisor:
    """A supervisor: opens whatever it is asked to, but what is in `refuses`."""

    events: list[Said] = field(default_factory=list)
    held: set[Resource] = field(default_factory=set)
    refuses: dict[Resource, Refusal] = field(default_factory=dict)
    workers: list[FakeWorker] = field(default_factory=list)
    listener: int | None = None
    owner: tuple[int, int] = (os.getuid(), os.getgid())
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        ours, self.theirs = channel_pair()
        self._reader = AsyncChannel(ours, self._receive, lambda _: self.gone.set())
        self.channel = Channel(ours)

    def refuse(self, what: Resource, problem: str, errno: int = 1) -> None:
        """Fail to open it from now on."""
        self.refuses[what] = Refusal(0, errno, problem, "")

    def hang_up(self) -> None:
        """Be gone."""
        self._reader.close()

    def said(self, kind: str) -> list[object]:
        """What was said of this kind, in order."""
        return [what for said, what in self.events if said == kind]

    def _receive(self, message: Message, fds: list[int]) -> None:
        assert not fds
        match message:
            case Grant():
                self._grant(message)
            case Release():
                self.events += [("release", what) for what in message.what]
                self.held.difference_update(message.what)
                self.channel.send(Outcome(message.id, ()))
            case Listen():
                assert self.listener is not None
                self.events.append(("listen", message.mode))
                self.channel.send(Listening(message.id, *self.owner), [os.dup(self.listener)])
            case StartWorkers():
                self.events.append(("start", message.cores))
                self.channel.send(Done(message.id))
                for number, _ in enumerate(message.cores):
                    self.start_worker(number)
            case OpenTap():
                self.channel.send(Failed(message.id, 1, "no taps here", ""))
            case Ready():
                self.events.append(("ready", message.status))
            case LogLevel():
                self.events.append(("level", (message.role, message.level)))
            case Status():
                self.events.append(("status", message.text))
            case _:
                raise BadMessage(str(message))

    def _grant(self, message: Grant) -> None:
        refused = [at for at, what in enumerate(message.what) if what in self.refuses]
        for at, what in enumerate(message.what):
            self.events.append(("refuse" if at in refused else "grant", what))
        granted = set(message.what) - self.refuses.keys()
        self.held |= granted
        refusals = tuple(replace(self.refuses[message.what[at]], at=at) for at in refused)
        self.channel.send(Outcome(message.id, refusals))

    def start_worker(self, number: int) -> None:
        """Start one, and tell control."""
        worker = FakeWorker(number, self.events)
        self.workers.append(worker)
        up, fds = worker.connect()
        self.channel.send(up, fds)
        for fd in fds:
            os.close(fd)


class Roles:
    """Control's ends of both, for tests of what is between them: no main."""

    def __init__(self, workers: int = 1) -> None:
        self.fake = FakeSupervisor()
        self.up: list[WorkerUp] = []
        self.bad: list[BadMessage] = []
        self.workers = Workers(lambda: None, self.bad.append)
        self.supervisor = Supervisor(self.fake.theirs, self._event, lambda _: None)
        for number in range(workers):
            worker = FakeWorker(number, self.fake.events)
            self.fake.workers.append(worker)
            self.workers.up(*worker.connect())

    def _event(self, event: Event, fds: list[int]) -> None:
        assert isinstance(event, WorkerUp)
        self.workers.up(event, fds)


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine in a fresh loop, for at most a deadline."""

    async def body() -> None:
        with deadline():
            await work()

    asyncio.run(body())
