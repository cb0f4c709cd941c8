"""Many tasks, one thread: io_uring's completions in an asyncio loop, and what that costs beside plain polling.

See README.md beside this file. `python experiments/poc_io_uring_concurrency/poc_io_uring_concurrency.py
[--short] [--json] [--break PREMISE]`; needs no root. Blocks for 5 seconds, with --short for 2.
"""

import asyncio
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's library starts a thread for each core when it is loaded
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runnable alone: the shared half is one folder up
import uring_overhead as overhead
from uring_churn import Account, Churn, described
from uring_overhead import Cost
from uring_ownership import LOST, one_signal_for_many, stop_while_receiving, written_after_close

from experiment import Experiment
from mrelay.kernel.io_uring import IORING_SETUP_DEFER_TASKRUN, IORING_SETUP_SINGLE_ISSUER
from uring import IOSQE_ASYNC, refusal

PAIRS, PROVIDED = 200, 64
SIGNALLED: Final = 10
POLL, READER, SOCK_RECV = "poll, recv", "asyncio add_reader", "asyncio sock_recv, a task each"
SINGLE, MULTISHOT = "io_uring recv, a task each", "io_uring multishot, a task each"
WAYS: Final[dict[str, Callable[[int], Cost]]] = {
    POLL: overhead.plain_poll,
    READER: lambda rounds: overhead.in_asyncio(overhead.add_reader, rounds),
    SOCK_RECV: lambda rounds: overhead.in_asyncio(overhead.sock_recv, rounds),
    SINGLE: lambda rounds: overhead.in_asyncio(overhead.uring_single, rounds),
    MULTISHOT: lambda rounds: overhead.in_asyncio(overhead.uring_multishot, rounds),
}


def main() -> None:
    """The run."""
    experiment = Experiment(
        "poc_io_uring_concurrency",
        "Many tasks in one asyncio loop, with io_uring completions signalled by an eventfd.",
        ("final", "give-back", "poll"),
    )
    if reason := refusal():
        experiment.lacks(reason)
    account = asyncio.run(_churn(experiment.broken, 100 if experiment.short else 500))
    _claim_account(experiment, account)
    _claim_ownership(experiment)
    costs = _measure(3 if experiment.short else 5, 10 if experiment.short else 30)
    _claim_costs(experiment, costs)
    experiment.finish(
        f"{account.started} tasks started and stopped, {account.sent} datagrams and every buffer accounted for, "
        f"no thread; µs a datagram: poll {costs[POLL].burst:.1f}, add_reader {costs[READER].burst:.1f}, "
        f"io_uring {costs[MULTISHOT].burst:.1f}"
    )


async def _churn(broken: str | None, steps: int) -> Account:
    flags = IOSQE_ASYNC if broken == "poll" else 0
    churn = Churn(PAIRS, PROVIDED, flags=flags, take_back=broken != "final", give_back=broken != "give-back")
    return await churn.run(steps)


def _claim_account(experiment: Experiment, account: Account) -> None:
    experiment.claim(
        f"while tasks on {PAIRS} sockets start and stop, each datagram arrives once and in order, or still waits",
        account.wrong == 0 and account.late > 0 and account.started > PAIRS,
        f"{account.started} started, up to {account.most_at_once} at once; {account.sent} datagrams, "
        f"{account.late} of them came while their task was being stopped; {account.wrong} sockets are wrong",
    )
    experiment.claim(
        "no buffer leaks: with all tasks stopped, the pool is whole and the kernel still gives every provided one",
        account.pool_missing == 0 and account.in_flight == 0 and account.provided == PROVIDED,
        f"{account.pool_missing} missing from the pool, {account.in_flight} operations in flight, "
        f"{account.provided} of {PROVIDED} provided buffers given",
    )
    experiment.claim(
        "there is no thread but the first, not even a worker of io_uring's",
        not account.threads,
        f"other threads in /proc/self/task: {described(account.threads)}",
    )


def _claim_ownership(experiment: Experiment) -> None:
    stopped = asyncio.run(stop_while_receiving(take_back=experiment.broken != "final"))
    experiment.claim(
        "a stopped task's buffer is free after the final completion, and the kernel writes to it no more",
        stopped.intact and stopped.where != LOST,
        f"free after {stopped.turns} turns of the loop; its next owner's data: "
        f"{'intact' if stopped.intact else 'overwritten'}; the datagram that came meanwhile: {stopped.where}",
    )
    signal = one_signal_for_many(SIGNALLED)
    experiment.claim(
        "with DEFER_TASKRUN the eventfd is written once for many, and nothing is there until io_uring_enter",
        (signal.count, signal.seen, signal.after) == (1, 0, SIGNALLED),
        f"{SIGNALLED} receives: written {signal.count} time(s), {signal.seen} completions, then {signal.after}",
    )
    deferring = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN
    plain, deferred = written_after_close(0), written_after_close(deferring)
    experiment.claim(
        "closing a ring's descriptor ends nothing: a plain ring, still mapped, writes into the buffer afterwards",
        plain and not deferred,
        f"written after close: plain {plain}, with DEFER_TASKRUN {deferred}",
    )


def _measure(rounds: int, repeats: int) -> dict[str, Cost]:
    """The ways take turns; medians over the rounds."""
    costs: dict[str, list[Cost]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            costs[name].append(way(repeats))
    return {
        name: Cost(
            *(statistics.median(getattr(cost, field) for cost in each) for field in ("burst", "single", "lone"))
        )
        for name, each in costs.items()
    }


def _claim_costs(experiment: Experiment, costs: dict[str, Cost]) -> None:
    experiment.table(
        f"{overhead.SOCKETS} sockets. µs of CPU a datagram, {overhead.BURST} or 1 waiting at each; "
        "µs from sending a lone one until it is read",
        ["", f"{overhead.BURST} waiting", "1 waiting", "lone"],
        [(name, f"{cost.burst:.1f}", f"{cost.single:.1f}", f"{cost.lone:.0f}") for name, cost in costs.items()],
    )
    poll, reader, task, single, multishot = (costs[name] for name in (POLL, READER, SOCK_RECV, SINGLE, MULTISHOT))
    experiment.claim(
        "a plain poll loop costs at most 0.8 of the cheapest io_uring way a datagram, add_reader less than it",
        poll.burst <= 0.8 * min(multishot.burst, single.burst) and reader.burst < multishot.burst,
        f"{overhead.BURST} waiting: poll {poll.burst:.1f}, add_reader {reader.burst:.1f}, "
        f"io_uring {multishot.burst:.1f} µs",
    )
    experiment.claim(
        "where each socket has a task that awaits, multishot costs at most 0.8 of asyncio's sock_recv",
        multishot.single <= 0.8 * task.single,
        f"1 waiting: {multishot.single:.1f} and {task.single:.1f} µs",
    )


if __name__ == "__main__":
    main()
