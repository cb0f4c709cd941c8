"""What a callable owns, and the recipe by which the supervisor starts a worker again and again.

Problem. Whoever restarts something keeps a "how to start it" for as long as it runs: in our case a supervisor
that holds privileges and must not leak one descriptor a restart. A closure is the obvious form, and it keeps
more than it shows: variables instead of values, whatever it can reach, and the things that were fresh when it
was made and are spent at the second start. What may a recipe own, and what must each start make anew?

How it is shown. Small cases for each way to make a callable; a recipe type with ParamSpec, run in one asyncio
loop, and what mypy says to wrong arguments; and the product's own `mrelay.supervisor.children.Child`: one
recipe, many real processes (this file is their program), which end in every way there is. Each answers over its
channel with the number of its descriptors; the parent counts its own in /proc/self/fd.

Key learnings.
- A closure captures variables, not values. Made in a loop, all see the last round's (ruff's B023 finds these
  where the callable escapes the loop; mypy says nothing). `partial`, a factory function and fields of an object
  bind the value at once.
- Binding early is not owning alone. `partial` of a list, a default argument and a captured list are one list for
  all runs: the second run starts with what the first left in it. Recipes hold immutable values (a frozen
  dataclass, tuples), and state is made inside the call.
- A closure owns what it reaches. A callback that mentions `self` keeps the object and its descriptors open for
  as long as anybody keeps the callback, and nothing shows it. Plain values keep nothing.
- Some captures are right once. A socketpair's end is closed in the parent after the first start, so a recipe that
  captured it can't start anything again. What is spent by a start is made by the start: the channel, the pulse,
  the process, the pidfd. What outlives a start is the recipe's owner's: program, uid, gid, core, and the
  counters' memory.
- `spawn(work: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs)` keeps the signature: mypy reports
  a wrong argument where the recipe is written, not at the third restart. With `*args: Any` it says nothing.
- A recipe of values can be compared ("are these the workers I already have?") and printed. Two closures from
  the same text are never equal.
- End and restart are two steps. `Child.ended()` gives back the process's entry, pidfd, pulse and channel; without
  it each restart leaks two descriptors. With it, no number of restarts changes the count.
- A start takes several things, and may fail at each of them; it must give back what it took until then. That is
  tried here with 0, 1, 2, … descriptors to spare, until a start succeeds.

What it changed. D18: a `Child` is a recipe of values; its `Process` is everything that belongs to one run, made by
`start()` and given back by `ended()`. The child inherits nothing but standard error, its channel and its pulse;
whatever else it has was sent to it. D24: a recipe holds no descriptor that the child could inherit by accident.

Related designs. Erlang's supervisors take a child specification of values `{module, function, arguments}` for the
same reason; systemd's unit files are recipes of values, with descriptors handed over by `FileDescriptorStore=`.
Rust makes the difference a type: `Fn` can be called again, `FnOnce` consumes what it captured.

Run: `python experiments/poc_closure_ownership.py [--short] [--break binding|fresh-channel|clean-up]`. No root.
Needs mypy, which `make test` sets up.

Verdict (2026-11-22; 2 cores, Linux 6.18, Python 3.11): settled. 40 processes from one recipe, 3 ways to end,
each with 5 descriptors; the parent's count is the same before and after.
"""

import asyncio
import functools
import os
import resource
import select
import socket
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, ParamSpec, TypeVar
from unittest import mock

from mrelay.messages import Done, Stop, Sync
from mrelay.supervisor.children import Child, end_all
from mrelay.wire import Channel, channel_pair

if TYPE_CHECKING:
    from experiment import Experiment  # at run time only in main: the small processes start without it

P = ParamSpec("P")
R = TypeVar("R")
CORES: Final = (0, 1, 2)
PATIENCE: Final = 30.0  # seconds; a bound for a stuck machine, not an expectation
OWN: Final = 5  # a child's descriptors: standard input, output and error, channel, pulse
PREMISES: Final = ("binding", "fresh-channel", "clean-up")


# ---- the recipe ----


class Recipe(Generic[P, R]):
    """Values only: async work and its arguments, which the type checker compares with its signature here."""

    def __init__(self, work: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> None:
        self._work, self._args, self._kwargs = work, args, kwargs

    async def run(self) -> R:
        """One run from scratch; as many as wanted, also at the same time."""
        return await self._work(*self._args, **self._kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((self._work, self._args))

    def _values(self) -> tuple[object, ...]:
        return self._work, self._args, self._kwargs


# mypy's opinion of these is claimed below; RECIPE is the class above without its methods' bodies.
RECIPE: Final = """
from collections.abc import Awaitable, Callable
from typing import Any, Generic, ParamSpec, TypeVar
P = ParamSpec("P")
R = TypeVar("R")

class Recipe(Generic[P, R]):
    def __init__(self, work: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> None: ...

class AnyRecipe:
    def __init__(self, work: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> None: ...

async def worker(core: int, *, flows: int) -> None: ...
"""
TYPES: Final = {
    "right": ('Recipe(worker, 3, flows=64)', ()),
    "wrong_type": ('Recipe(worker, "3", flows=64)', ("arg-type",)),
    "wrong_name": ('Recipe(worker, 3, flow=64)', ("call-arg",)),
    "coroutine": ('Recipe(worker(3, flows=64))', ("arg-type",)),
    "by_any": ('AnyRecipe(worker, "3", flow=64)', ()),
    "late_binding": ("made: list[Callable[[], int]] = [lambda: core for core in (0, 1, 2)]", ()),
}  # fmt: skip


def claim_types(exp: "Experiment") -> None:
    """What mypy says to right and wrong recipes."""
    from closure_passing_test import check

    said = check({name: f"{RECIPE}\n{line}\n" for name, (line, _) in TYPES.items()})
    exp.claim(
        "ParamSpec makes mypy report wrong arguments where the recipe is written; *args: Any does not",
        said == {name: codes for name, (_, codes) in TYPES.items()},
        "; ".join(f"{name.replace('_', ' ')}: {', '.join(codes) or 'nothing'}" for name, codes in said.items()),
    )


# ---- captures ----


def late_bound() -> list[Callable[[], int]]:
    """The trap: each holds the variable."""
    return [lambda: core for core in CORES]  # noqa: B023 (the trap itself: ruff sees it)


def early_bound() -> dict[str, list[Callable[[], int]]]:
    """Ways to hold the value."""

    def on(core: int) -> Callable[[], int]:
        return lambda: core

    return {
        "factory": [on(core) for core in CORES],
        "partial": [functools.partial(int, core) for core in CORES],
        "method": [core.__int__ for core in CORES],
    }


def claim_binding(exp: "Experiment") -> None:
    """Variables against values."""
    late = [call() for call in late_bound()]
    ways = dict.fromkeys(early_bound(), late_bound()) if exp.broken == "binding" else early_bound()
    early = {way: [call() for call in calls] for way, calls in ways.items()}
    exp.claim("closures made in a loop all see its last value", late == [CORES[-1]] * len(CORES), str(late))
    exp.claim(
        "a factory, a partial and a bound method each keep the value they were made with",
        all(values == list(CORES) for values in early.values()),
        "; ".join(f"{way} {values}" for way, values in early.items()),
    )


def claim_shared_state(exp: "Experiment") -> None:
    """Two runs of one callable: does the second find what the first left?"""
    captured: list[int] = []

    def run(state: list[int]) -> int:
        state.append(1)
        return len(state)

    def by_default(state: list[int] = []) -> int:  # noqa: B006 (the trap itself)
        return run(state)

    ways: dict[str, Callable[[], int]] = {
        "captured list": lambda: run(captured),
        "partial of a list": functools.partial(run, []),
        "default argument": by_default,
        "made inside": lambda: run([]),
    }
    found = {way: [call(), call()] for way, call in ways.items()}
    exp.claim(
        "a captured list, a partial's and a default argument's are shared by all runs; one made inside is not",
        list(found.values()) == [[1, 2], [1, 2], [1, 2], [1, 1]],
        "; ".join(f"{way} {runs}" for way, runs in found.items()),
    )


class Owner:
    """Something with a descriptor, and two ways to say what to do with its name."""

    def __init__(self) -> None:
        self.name = "worker"
        self.file = Path("/dev/null").open("rb")  # noqa: SIM115 (its lifetime is the point)

    def closure(self) -> Callable[[], str]:
        return lambda: self.name

    def values(self) -> Callable[[], str]:
        return functools.partial(str, self.name)


def kept_by(callback_of: Callable[[Owner], Callable[[], str]]) -> tuple[bool, int]:
    """Whether an owner lives on while only its callback is kept, and the descriptors that stay open."""
    before = open_descriptors()
    owner = Owner()
    callback = callback_of(owner)
    alive = weakref.ref(owner)
    del owner
    assert callback() == "worker"
    return alive() is not None, open_descriptors() - before


def claim_reach(exp: "Experiment") -> None:
    """What keeping the callback keeps."""
    by_closure, by_values = kept_by(Owner.closure), kept_by(Owner.values)
    after = kept_by(Owner.values)  # the closure is gone by now, and with it its owner
    exp.claim(
        "a closure that mentions self keeps the object and its descriptor open; values keep neither",
        (by_closure, by_values, after) == ((True, 1), (False, 0), (False, 0)),
        f"descriptors kept by the closure {by_closure[1]}, by values {by_values[1]}",
    )


async def count_to(number: int) -> tuple[int, ...]:
    """Work with state of its own, which lets others run in between."""
    state: list[int] = []
    for step in range(number):
        state.append(step)
        await asyncio.sleep(0)
    return tuple(state)


def claim_one_loop(exp: "Experiment") -> None:
    """One recipe, many runs in one asyncio loop, some at the same time."""
    once = Recipe(count_to, 5)

    async def many() -> list[tuple[int, ...]]:
        together = await asyncio.gather(*(once.run() for _ in range(50)))
        return together + [await once.run() for _ in range(50)]

    results = asyncio.run(many())
    exp.claim(
        "one recipe runs 100 times in one loop, 50 at once; each run begins with nothing",
        results == [(0, 1, 2, 3, 4)] * 100,
        f"{len(results)} runs, {len(set(results))} different result",
    )
    same, closures = Recipe(count_to, 5) == once, late_bound()[0] == late_bound()[0]
    exp.claim(
        "recipes of equal values are equal, closures of one text never are",
        same and Recipe(count_to, 6) != once and not closures,
        f"recipes equal: {same}; closures equal: {closures}",
    )


# ---- processes from one recipe: the product's Child ----


class SmallChild(Child):
    """The recipe: the product's Child, with this file as its program. (It keeps its user; no drop is needed.)"""

    def __init__(self) -> None:
        super().__init__("small", "", os.getuid(), os.getgid())
        self._command = [sys.executable, str(Path(__file__).resolve())]


def small_process(fd: int) -> None:
    """Its program: answer each Sync with its number of descriptors, until Stop or the channel's end."""
    channel = Channel(socket.socket(fileno=fd))
    while (got := channel.receive()) is not None and not isinstance(got[0], Stop):
        channel.send(Done(open_descriptors()))


def open_descriptors() -> int:
    """Descriptors of this process, less the one that listing them takes."""
    return len(os.listdir("/proc/self/fd")) - 1


# How a run may end: asked to, killed, or by the end of its channel; and what the supervisor's log then says.
WAYS: Final[dict[str, tuple[Callable[[Child], None], str]]] = {
    "Stop": (lambda child: child.tell(Stop()), "exit status 0"),
    "SIGKILL": (Child.kill, "signal SIGKILL"),
    "hang-up": (Child.hung_up, "exit status 0"),
}


@dataclass
class Runs:
    """What many runs of one recipe came to."""

    pids: set[int] = field(default_factory=set)
    descriptors: list[int] = field(default_factory=list)  # of each child, as it says itself
    ends: list[str] = field(default_factory=list)
    failure: str = "none"
    leaked: int = 0  # descriptors of this process


def ask(child: Child) -> int:
    """The child's number of descriptors. TimeoutError when it does not answer."""
    assert child.channel is not None
    child.tell(Sync(1))
    if not select.select([child.channel.fileno(), child.pidfd], [], [], PATIENCE)[0]:
        raise TimeoutError(f"no answer within {PATIENCE:.0f} s")
    got = child.channel.receive()
    if got is None or not isinstance(got[0], Done):
        raise ConnectionError("the child ended instead of answering")
    return got[0].id


def wait(child: Child) -> None:
    """Until it ended; `ended()` may follow."""
    if not select.select([child.pidfd], [], [], PATIENCE)[0]:
        child.kill()
        raise TimeoutError(f"still there after {PATIENCE:.0f} s")


def respawn(count: int, *, clean_up: bool = True) -> Runs:
    """Start one recipe `count` times, one after another; each run answers once, then ends in its way."""
    runs, child, ways = Runs(), SmallChild(), list(WAYS.values())
    before = open_descriptors()
    for number in range(count):
        end, _ = ways[number % len(ways)]
        try:
            child.start()
            runs.pids.add(child.pid)
            runs.descriptors.append(ask(child))
        except (OSError, ValueError) as error:
            runs.failure = f"start {number + 1}: {error}"
            break
        end(child)
        wait(child)
        runs.ends.append(child.ended() if clean_up else "not asked")
    runs.leaked = open_descriptors() - before
    return runs


@contextmanager
def captured_channel() -> Iterator[None]:
    """A recipe that made its channel once, where a start should make it."""
    with mock.patch("mrelay.supervisor.children.channel_pair", return_value=channel_pair()):
        yield


def claim_respawn(exp: "Experiment", count: int) -> Runs:
    """The same recipe many times, and nothing left of any run."""
    if exp.broken == "fresh-channel":
        with captured_channel():
            runs = respawn(count)
    else:
        runs = respawn(count, clean_up=exp.broken != "clean-up")
    expected = [list(WAYS.values())[number % len(WAYS)][1] for number in range(count)]
    exp.claim(
        "one recipe starts a working process each time, however the last one ended",
        len(runs.pids) == len(runs.descriptors) == count and runs.failure == "none",
        f"{len(runs.descriptors)} of {count} answered; failure: {runs.failure}",
    )
    exp.claim(
        "its end is told apart: asked to, killed, hung up",
        runs.ends == expected,
        "; ".join(f"{runs.ends.count(end)} × {end}" for end in sorted(set(runs.ends))) or "no end seen",
    )
    exp.claim(
        "no start or end leaks a descriptor here", runs.leaked == 0, f"{runs.leaked} more after {count} starts"
    )
    exp.claim(
        "each process has standard input, output, error, its channel and its pulse, nothing else of ours",
        set(runs.descriptors) == {OWN},
        f"descriptors in each: {', '.join(map(str, sorted(set(runs.descriptors))))}",
    )
    return runs


def claim_captured(exp: "Experiment") -> None:
    """The counter-example: a recipe that owns what its first start spends."""
    with captured_channel():
        runs = respawn(3)
    exp.claim(
        "a recipe that captured its channel starts once and never again",
        len(runs.descriptors) == 1 and runs.failure.startswith("start 2"),
        f"{len(runs.descriptors)} of 3 answered; {runs.failure}",
    )


def start_with(free: int) -> tuple[bool, int]:
    """Start with so many descriptors to spare: whether it could, and how many more are open afterwards."""
    before, child = open_descriptors(), SmallChild()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)  # the lowest free number; the limit is one of numbers
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, limits[1]))
    try:
        child.start()
    except OSError:
        started = False
    else:
        started = True
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    if started:
        child.kill()
        wait(child)
        child.ended()
    return started, open_descriptors() - before


def claim_failed_starts(exp: "Experiment") -> None:
    """Whatever a start could not get, it gives back what it got."""
    outcomes = [start_with(free) for free in range(12)]
    failed = [leaked for started, leaked in outcomes if not started]
    left = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    exp.claim(
        "a start that fails for want of a descriptor, whichever, leaves no descriptor and no process",
        len(failed) >= OWN and not any(failed) and not left,
        f"{len(failed)} starts failed, each a descriptor later; left open: {failed}; processes: {len(left)}",
    )


def claim_at_once(exp: "Experiment") -> None:
    """Three from the same recipe at the same time: one's end is no other's."""
    before = open_descriptors()
    children: list[Child] = [SmallChild() for _ in range(3)]
    for child in children:
        child.start()
    victim, *others = children
    victim.kill()
    wait(victim)
    reason = victim.ended()
    answered = [ask(child) for child in others]
    end_all(others, Stop(), PATIENCE)
    leaked = open_descriptors() - before
    exp.claim(
        "three from one recipe at once share nothing: one is killed, two answer, all end without a leak",
        (reason, answered, leaked) == ("signal SIGKILL", [OWN, OWN], 0),
        f"{reason}; descriptors in the others {answered}; {leaked} leaked here",
    )


def main() -> None:
    """All claims; the processes last."""
    from closure_passing_test import need_mypy
    from experiment import Experiment

    exp = Experiment("poc_closure_ownership", "What a callable owns; many starts from one recipe.", PREMISES)
    need_mypy(exp)
    claim_binding(exp)
    claim_shared_state(exp)
    claim_reach(exp)
    claim_one_loop(exp)
    claim_types(exp)
    runs = claim_respawn(exp, 9 if exp.short else 40)
    claim_captured(exp)
    claim_failed_starts(exp)
    claim_at_once(exp)
    exp.finish(
        f"{len(runs.pids)} processes from one recipe, {len(WAYS)} ways to end, {runs.leaked} descriptors leaked, "
        f"each with {OWN} of its own"
    )


if __name__ == "__main__":
    if len(sys.argv) == 6:  # as Child starts it: VERSION CHANNEL PULSE UID GID
        small_process(int(sys.argv[2]))
    else:
        main()
