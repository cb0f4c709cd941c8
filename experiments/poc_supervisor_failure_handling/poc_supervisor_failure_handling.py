"""A child fails: who notices, how soon, and what is done about it. See README.md.

Starts processes of its own and lets them exit, crash, stop, spin and hang; for a few seconds some of them keep a
core busy at high priority. Needs root and two cores.
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runnable alone: the shared half is one folder up

from failure_detectors import (
    BUILT,
    EVENTS,
    FAILURES,
    INTERVAL,
    MISSED,
    PULSE,
    STRATEGIES,
    Seen,
    as_expected,
    observe,
)
from failure_heartbeat import ByClock, condemned_after_pause, costs, look_cost, silences
from failure_product import interface_gone, long_work, start_time
from failure_restart import (
    AT_ONCE,
    DELAYS,
    HEALTHY,
    SCALED,
    crash_loop,
    delays_asked_for,
    failing_starts,
    heal_all,
)

from experiment import Experiment
from mrelay import pulse
from mrelay.supervisor.watch import CHECK, SILENCE, Watch

Part = Callable[[Experiment, list[int]], dict[str, float]]


def main() -> None:
    """Show, claim, say. Without a premise only the part is run that rests on it."""
    parts: dict[Part, tuple[str, ...]] = {
        _detection: ("heartbeat",),
        _costs: (),
        _silence: (),
        _pause: ("clock",),
        _long_work: (),
        _healing: ("loop-beat", "look"),
        _crash_loop: ("back-off",),
        _starting: (),
    }
    experiment = Experiment(
        "poc_supervisor_failure_handling", __doc__, premises=[name for names in parts.values() for name in names]
    )
    experiment.need_root()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        experiment.lacks("two cores: one for a child that is kept from running")
    figures: dict[str, float] = {}
    for part, premises in parts.items():
        if experiment.runs(*premises):
            figures |= part(experiment, cores)
    if experiment.broken:
        experiment.finish(f"without {experiment.broken}")
    experiment.finish(
        f"a kill is seen after {figures['event']:.1f} ms by pidfd, {figures['beats']:.0f} ms by {MISSED} beats of "
        f"{INTERVAL * 1000:.0f} ms; a hang by beats alone, {figures['cost']:.3f} % of a core; 5 children failing "
        f"in 5 ways are new after {figures['healed']:.1f} s, a starved one is left alone"
    )


# ---- who notices --------------------------------------------------------------------------------


def _detection(experiment: Experiment, _: list[int]) -> dict[str, float]:
    """Median milliseconds from a kill to the pidfd's event, and to the heartbeat's verdict."""
    runs: dict[str, list[Seen]] = {failure: [] for failure in FAILURES}
    for _round in range(1 if experiment.short else 2):
        for failure, seen in observe(FAILURES).items():
            runs[failure].append(seen)
    rows = [(failure, *(_shown(runs[failure], strategy) for strategy in STRATEGIES)) for failure in FAILURES]
    title = f"ms until it is noticed; checks and beats each {INTERVAL * 1000:.0f} ms, {MISSED} missed"
    experiment.table(title, ("failure", *STRATEGIES), rows)
    wrong = [name for name, seen in runs.items() if not all(as_expected(name, one) for one in seen)]
    experiment.claim(
        "each strategy sees the failures that it can see, no others: no event tells of a busy loop or deadlock",
        not wrong,
        f"{sum(map(len, runs.values()))} failures of {len(FAILURES)} kinds; not as expected: {wrong or 'none'}",
    )
    events, both = _missed_by(runs, BUILT), _missed_by(runs, BUILT if experiment.broken else (*BUILT, PULSE))
    experiment.claim(
        "pidfd, the channel's end and a beat from the loop miss nothing together; without the beat a child that "
        "hangs is never noticed",
        not both and len(events) > 0,
        f"missed without: {', '.join(events)}; missed with: {', '.join(both) or 'none'}",
    )
    killed = {s: statistics.median(seen[s] for seen in runs["killed"]) * 1000 for s in (*EVENTS, PULSE)}
    slowest = max(killed[event] for event in EVENTS)
    experiment.claim(
        "an event tells of an end many times sooner than a heartbeat",
        slowest * 5 < killed[PULSE],
        f"slowest event {slowest:.1f} ms, heartbeat {killed[PULSE]:.0f} ms",
    )
    return {"event": killed[EVENTS[0]], "beats": killed[PULSE]}


def _shown(seen: list[Seen], strategy: str) -> str:
    times = [one[strategy] * 1000 for one in seen if strategy in one]
    median = statistics.median(times) if times else 0.0
    return "-" if not times else f"{median:.1f}" if median < 10 else f"{median:.0f}"


def _missed_by(runs: dict[str, list[Seen]], strategies: tuple[str, ...]) -> list[str]:
    return [name for name, seen in runs.items() if any(not one.keys() & set(strategies) for one in seen)]


# ---- the heartbeat ------------------------------------------------------------------------------


def _costs(experiment: Experiment, _: list[int]) -> dict[str, float]:
    """Per cent of a core for the product's heartbeat of one child at rest, both sides."""
    measured, look = costs(30 if experiment.short else 60), look_cost()
    rows = [(c.design, f"{c.child:.0f}", f"{c.parent:.0f}") for c in measured]
    rows.append(("a look of the product's judge, once awake", "", f"{look:.1f}"))
    experiment.table("CPU for one beat, µs", ("design", "child", "parent"), rows)
    memory, answered = measured[1], measured[2]
    total = (memory.child / pulse.INTERVAL + memory.parent / CHECK) / 1e4
    experiment.claim(
        "a beat in shared memory by the child's own timer costs less than a question and an answer",
        (memory.child + memory.parent) * 1.2 < answered.child + answered.parent,
        f"{memory.child + memory.parent:.0f} µs against {answered.child + answered.parent:.0f} µs",
    )
    experiment.claim(
        "at the product's rates the heartbeat is far below the 1 % of a core that the whole relay may use at rest",
        total < 0.2,
        f"{total:.3f} % for one child: {1 / pulse.INTERVAL:.0f} beats, {1 / CHECK:.0f} looks a second",
    )
    return {"cost": total}


@contextmanager
def _only_on(cores: list[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _silence(experiment: Experiment, cores: list[int]) -> dict[str, float]:
    """Not in the short form: it takes a core's real-time budget for a while."""
    if experiment.short:
        return {}
    with _only_on(cores[:-1]):
        silent = silences(cores[-1], 1.5)
    experiment.table(
        "Longest silence of a healthy child, seconds",
        ("its core is shared:", "s"),
        [(name, f"{seconds:.3f}") for name, seconds in silent.items()],
    )
    longest = max(silent.values())
    experiment.claim(
        "a healthy child whose core is taken can be silent for very long: patience alone is no judge",
        silent["alone"] * 10 < longest,
        f"{longest:.2f} s beside a real-time process, {silent['alone']:.4f} s alone; the product: {SILENCE}",
    )
    return {}


def _pause(experiment: Experiment, _: list[int]) -> dict[str, float]:
    count = 3

    def by_clock(pid: int, memory: int, now: float) -> ByClock:
        return ByClock(memory, now)

    judges = [by_clock if experiment.broken else Watch, by_clock]
    product, clock = condemned_after_pause(judges, count)
    experiment.claim(
        "after a pause of the whole machine the product's judge, for whom its own pause is one look, condemns no "
        "healthy child",
        product == 0,
        f"{product} of {count} after {1.3 * SILENCE:.1f} s",
    )
    experiment.claim("a judge that goes by the clock condemns them all", clock == count, f"{clock} of {count}")
    return {}


def _long_work(experiment: Experiment, cores: list[int]) -> dict[str, float]:
    worker = long_work(10_000 if experiment.short else 30_000, cores[-1])
    experiment.table(
        f"The product's worker with {worker.flows:,} flows, seconds of CPU",
        ("work", "in all", "pulse still for"),
        [(s.work, f"{s.seconds:.3f}", f"{s.still:.4f}") for s in worker.stretches],
    )
    experiment.claim(
        "long work beats too: it grows with the flows, and the pulse never stands still for a good part of it",
        all(s.still * 4 < s.seconds and s.still * 4 < SILENCE for s in worker.stretches),
        "; ".join(f"{s.work}: {s.still * 1000:.0f} ms of {s.seconds * 1000:.0f} ms" for s in worker.stretches),
    )
    experiment.claim(
        "a worker at rest uses next to no CPU, a start much more",
        worker.idle < 0.005 < worker.start,
        f"{worker.idle * 100:.3f} % of a core; a start {worker.start:.2f} s of CPU, "
        f"{worker.start / DELAYS[-1] * 100:.1f} % of a core in a crash loop at the cap",
    )
    return {}


# ---- starting again -----------------------------------------------------------------------------


def _healing(experiment: Experiment, cores: list[int]) -> dict[str, float]:
    with _only_on(cores[:-1]):
        broken = experiment.broken
        healed = heal_all(cores[-1], from_thread=broken == "loop-beat", by_silence_alone=broken == "look")
    hurt = [name for name in healed.replaced if name not in HEALTHY]
    experiment.table(
        "What the product's supervision says and does",
        ("child", "said", "replaced"),
        [(name, said or "-", "yes" if healed.replaced[name] else "no") for name, said in healed.said.items()],
    )
    experiment.claim(
        "of children that fail in five ways at the same moment all are replaced",
        all(healed.replaced[name] for name in hurt),
        f"{sum(healed.replaced[name] for name in hurt)} of {len(hurt)} after {healed.seconds:.1f} s",
    )
    experiment.claim(
        "one that is starved is said to be late and left alone, like one at rest: a look at what it does tells",
        not any(healed.replaced[name] for name in HEALTHY) and "late" in healed.said["starved"],
        f"starved: {healed.said['starved'] or '-'}; at rest: {healed.said['at rest'] or '-'}",
    )
    return {"healed": healed.seconds}


def _crash_loop(experiment: Experiment, _: list[int]) -> dict[str, float]:
    ends = 6 if experiment.short else len(DELAYS) + 1
    asked, troubles, after_life = delays_asked_for(ends)
    due = [*DELAYS[1:], DELAYS[-1], DELAYS[-1]][:ends]
    experiment.claim(
        "delays after early ends grow to a cap and stay there, are called a crash loop with its reason, and begin "
        "anew after a life",
        asked == due and after_life == 0 and troubles[0] == "" and troubles[-1] == "crash loop (exit status 3)",
        f"seconds: {asked}, then {after_life}; called a crash loop from end {troubles.index(troubles[-1]) + 1} on",
    )
    at_once = crash_loop("at once", AT_ONCE, starts=12)  # for as long as that takes here, then so does the next
    delays = AT_ONCE if experiment.broken else SCALED
    product = crash_loop("the product's, a tenth", delays, seconds=at_once.seconds)
    gives_up = crash_loop("gives up after 3", SCALED, starts=3, give_up_after=3)
    experiment.table(
        "A child that crashes at its start until the cause is gone",
        ("policy", "s", "starts", "CPU s", "up again after the cause is gone, s"),
        [
            (
                x.policy,
                f"{x.seconds:.1f}",
                x.starts,
                f"{x.cpu:.2f}",
                "never" if x.back is None else f"{x.back:.2f}",
            )
            for x in (at_once, product, gives_up)
        ],
    )
    experiment.claim(
        "delays save much of a crash loop's CPU",
        product.cpu * 1.1 < at_once.cpu and product.starts * 1.2 < at_once.starts,
        f"{product.starts} starts, {product.cpu:.2f} s against {at_once.starts}, {at_once.cpu:.2f} s",
    )
    experiment.claim(
        "capped delays heal by themselves once the cause is gone; giving up makes a passing cause a lasting one",
        product.back is not None and gives_up.back is None,
        f"back after {product.back or 0:.2f} s; given up: {'never' if gives_up.back is None else 'back'}",
    )
    tried = [failing_starts(1, spare) for spare in ((0, 1) if experiment.short else range(4))]
    failed, lost = (sum(column) for column in zip(*tried, strict=True))
    experiment.claim(
        "a start that fails for want of descriptors is one more end: tried again, and loses nothing",
        (failed, lost) == (len(tried), 0),
        f"{failed} starts failed, with 0 to {len(tried) - 1} descriptors to be had: {lost:+} descriptors, then up",
    )
    return {}


def _starting(experiment: Experiment, cores: list[int]) -> dict[str, float]:
    some = cores[:4]
    together, in_turn = (min(start_time(some, at_once=at_once) for _ in range(2)) for at_once in (True, False))
    experiment.table(
        f"{len(some)} product workers, a core for each: seconds until all answer",
        ("started", "s"),
        (("all at once", f"{together:.2f}"), ("one after another", f"{in_turn:.2f}")),
    )
    gone = interface_gone(cores[-1], 0.6 if experiment.short else 1.0)
    experiment.claim(
        "a child that ends because its interface is gone makes a crash loop of it; the product's worker waits",
        gone.restarts >= 2 and gone.product_restarts == 0 and gone.product_share < 0.2,
        f"{gone.restarts} restarts against {gone.product_restarts}, at {gone.product_share * 100:.1f} % of a core",
    )
    return {}


if __name__ == "__main__":
    main()
