"""What happened lately: typed events, and a bounded log of them.

Owns the kinds of events, their ids, and how many are kept. Whoever sees something happen calls `add`: main,
rulebook, reconcile, notice; api and eventstream read. Nothing here blocks, and nothing is called per packet.

Ids grow by one and restart at 1 with each control process, so a place in the log is a `run` and an id: a reader
from an earlier run is told so, and gets all that there is.
"""

import asyncio
import re
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

from pydantic import BaseModel, Field

KEPT: Final = 4096  # events; about 2 MB
BULK: Final = 100  # events of one change; the rest are counted in an `omitted` for each kind
_CURSOR: Final = re.compile(r"(?:([0-9a-f]{8}):)?([0-9]{1,15})")


class Event(BaseModel):
    """`id` as above; `time` in seconds since 1970 (UTC); `text` says the whole event to people, in one line."""

    id: int = 0
    time: float = 0.0
    type: str = ""
    text: str = ""

    def say(self) -> str:
        """The text."""
        return self.type


class RuleAdded(Event):
    type: Literal["rule_added"] = "rule_added"
    rule: str

    def say(self) -> str:
        return f"rule '{self.rule}' was added"


class RuleRemoved(Event):
    type: Literal["rule_removed"] = "rule_removed"
    rule: str

    def say(self) -> str:
        return f"rule '{self.rule}' was removed"


class RuleChanged(Event):
    """Its name stayed, its contents did not."""

    type: Literal["rule_changed"] = "rule_changed"
    rule: str

    def say(self) -> str:
        return f"rule '{self.rule}' was changed"


class RuleUp(Event):
    """Its input and all its outputs are up."""

    type: Literal["rule_up"] = "rule_up"
    rule: str

    def say(self) -> str:
        return f"rule '{self.rule}' is up"


class RuleWaiting(Event):
    """Something of it is not up; `reason` is the rule's `state` in /v1/rules."""

    type: Literal["rule_waiting"] = "rule_waiting"
    rule: str
    reason: str

    def say(self) -> str:
        return f"rule '{self.rule}' is not up: {self.reason}"


class OutputState(Event):
    """One of a rule's several outputs is in another state: "up", or why not. A single output's is the rule's."""

    type: Literal["output_state"] = "output_state"
    rule: str
    output: str
    state: str

    def say(self) -> str:
        return f"rule '{self.rule}', output {self.output}: {self.state}"


class InterfaceUp(Event):
    """An interface that rules name."""

    type: Literal["interface_up"] = "interface_up"
    interface: str

    def say(self) -> str:
        return f"interface {self.interface} is up"


class InterfaceDown(Event):
    """An interface that rules name is down, or `gone` altogether."""

    type: Literal["interface_down"] = "interface_down"
    interface: str
    gone: bool

    def say(self) -> str:
        return f"interface {self.interface} is {'gone' if self.gone else 'down'}"


class WorkerStarted(Event):
    """`restarts`: how often it had to be started again."""

    type: Literal["worker_started"] = "worker_started"
    worker: int
    pid: int
    restarts: int

    def say(self) -> str:
        return f"worker {self.worker} started, pid {self.pid}"


class WorkerDied(Event):
    """`retry` in seconds: when another is started; 0 for at once."""

    type: Literal["worker_died"] = "worker_died"
    worker: int
    reason: str
    restarts: int
    retry: float

    def say(self) -> str:
        when = f"; next try in {self.retry:g} s" if self.retry else ""
        return f"worker {self.worker} ended: {self.reason}; restart {self.restarts}{when}"


class ControlStarted(Event):
    """The first event of each run. `took_over`: control was started again in a relay that runs, so what happened
    meanwhile, and all earlier events, are lost."""

    type: Literal["control_started"] = "control_started"
    version: str
    took_over: bool

    def say(self) -> str:
        return (
            f"control {'was started again and took over' if self.took_over else 'started'}, mrelay {self.version}"
        )


class Flow(BaseModel):
    """As in /v1/flows."""

    interface: str
    vlan: int | None
    source: str
    group: str
    port: int

    def __str__(self) -> str:
        vlan = "" if self.vlan is None else f" vlan {self.vlan}"
        return f"{self.interface}{vlan} {self.source} -> {self.group} port {self.port}"


class FlowAppeared(Event):
    """Its first datagram that went somewhere came, or the first after a `flow_gone`."""

    type: Literal["flow_appeared"] = "flow_appeared"
    flow: Flow

    def say(self) -> str:
        return f"flow {self.flow} appeared"


class FlowGone(Event):
    """Nothing came for `silence` seconds, or its place in the table was needed."""

    type: Literal["flow_gone"] = "flow_gone"
    flow: Flow
    silence: float

    def say(self) -> str:
        return f"flow {self.flow} is gone"


class EngineChanged(Event):
    """Something else carries the flow now; `why` not the fast path, as in /v1/flows."""

    type: Literal["engine_changed"] = "engine_changed"
    flow: Flow
    engine: Literal["xdp", "ebpf", "uring"]
    was: Literal["xdp", "ebpf", "uring"]
    why: str

    def say(self) -> str:
        why = f": {self.why}" if self.why else ""
        return f"flow {self.flow} went from {self.was} to {self.engine}{why}"


class DropsRising(Event):
    """Datagrams are dropped for `reason`: `per_second` lately, `total` since the relay started."""

    type: Literal["drops_rising"] = "drops_rising"
    reason: str
    per_second: float
    total: int

    def say(self) -> str:
        return f"datagrams are dropped as {self.reason}: {self.per_second:g} a second"


class DropsSettled(Event):
    """None has been dropped for `reason` for a while; `dropped` of them since the `drops_rising`."""

    type: Literal["drops_settled"] = "drops_settled"
    reason: str
    dropped: int
    total: int

    def say(self) -> str:
        return f"no more datagrams are dropped as {self.reason}; {self.dropped:,} were"


class Alarm(Event):
    """What a rule's `health` measures went beyond its `threshold` (`raised`), or came back.

    `flow`: null when the rule has none yet. `value` and threshold: a ratio for loss, else seconds.
    """

    type: Literal["alarm"] = "alarm"
    rule: str
    name: Literal["loss", "jitter", "silence"]
    flow: Flow | None
    value: float
    threshold: float
    raised: bool

    def say(self) -> str:
        of = "" if self.flow is None else f" of flow {self.flow}"
        what = "raised" if self.raised else "cleared"
        return f"rule '{self.rule}', alarm {self.name}{of} {what}: {self.value:g}, threshold {self.threshold:g}"


class Omitted(Event):
    """So many more events of a kind happened than are told one by one."""

    type: Literal["omitted"] = "omitted"
    kind: str
    count: int

    def say(self) -> str:
        return f"{self.count:,} more of {self.kind}"


AnyEvent = Annotated[
    RuleAdded
    | RuleRemoved
    | RuleChanged
    | RuleUp
    | RuleWaiting
    | OutputState
    | InterfaceUp
    | InterfaceDown
    | WorkerStarted
    | WorkerDied
    | ControlStarted
    | FlowAppeared
    | FlowGone
    | EngineChanged
    | DropsRising
    | DropsSettled
    | Alarm
    | Omitted,
    Field(discriminator="type"),
]
KINDS: Final[tuple[str, ...]] = tuple(
    kind.model_fields["type"].default for kind in get_args(get_args(AnyEvent)[0])
)


class Page(BaseModel):
    """A part of the log. `last`: the newest id of this `run`, whether or not it is in the page.

    `missed`: events after the place asked for that are no longer kept. `restarted`: that place was in another run.
    """

    run: str
    last: int
    missed: int
    restarted: bool
    events: list[AnyEvent]


class Cursor(NamedTuple):
    """A place in the log: after this id. `run` is "" for the present one."""

    run: str
    id: int

    def __str__(self) -> str:
        return f"{self.run}:{self.id}"

    @classmethod
    def parse(cls, text: str) -> "Cursor":
        """From `ID` or `RUN:ID`; ValueError for anything else."""
        match = _CURSOR.fullmatch(text)
        if match is None:
            raise ValueError(f"{text[:40]!r} is no event's id")
        return cls(match[1] or "", int(match[2]))


Happened = tuple[type[Event], dict[str, Any]]  # an event's type and fields: of thousands, few become events


class EventLog:
    """The events of this run. `counts`: how many there were, by type; `followers`: clients of a stream."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.run, self.last, self.closed = secrets.token_hex(4), 0, False
        self.counts: Counter[str] = Counter()
        self.followers = 0
        self._clock = clock
        self._kept: deque[Any] = deque(maxlen=KEPT)
        self._waiting: list[asyncio.Future[None]] = []

    def add(self, event: Event) -> None:
        """It happened now."""
        self.last += 1
        told = {"id": self.last, "time": round(self._clock(), 3), "text": event.say()}
        self._kept.append(event.model_copy(update=told))
        self.counts[event.type] += 1
        self._wake()

    def add_many(self, events: Sequence[Happened], most: int = BULK) -> None:
        """Events that happened together: one by one up to `most`, the rest as numbers."""
        for kind, fields in events[:most]:
            self.add(kind(**fields))
        for kind, count in Counter(kind for kind, _ in events[most:]).items():
            self.omit(kind.model_fields["type"].default, count)

    def omit(self, kind: str, count: int) -> None:
        """So many of this kind happened that are not told one by one."""
        self.counts[kind] += count
        self.add(Omitted(kind=kind, count=count))

    def page(self, after: Cursor | None = None, most: int = KEPT) -> Page:
        """At most so many events after a place, the oldest first; without one, from the oldest that is kept."""
        restarted = after is not None and (after.run not in ("", self.run) or after.id > self.last)
        place = 0 if after is None or restarted else after.id
        oldest = self.last - len(self._kept) + 1
        skip = max(0, place + 1 - oldest)
        return Page.model_construct(
            run=self.run,
            last=self.last,
            missed=max(0, oldest - 1 - place),
            restarted=restarted,
            events=list(islice(self._kept, skip, skip + most)),
        )

    async def news(self, after: int) -> None:
        """Return once there is an event after this id, or the log is closed."""
        while self.last <= after and not self.closed:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future

    def close(self) -> None:
        """The process ends: whoever waits goes."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
